"""Certified accuracy against radius: `python -m experiments.robustness --data=mnist --epsilon=3`.

Trains one of the networks of `experiments.images` on pixels, privately or, with `--plain`, without
noise, and says for each radius how many test images are provably classified rightly wherever they
move within it (`lipdp.robustness.certified_accuracy`), and how many of the first `--attacked` ones
still are after an attack. A radius is Euclidean, over all pixels and channels of an image whose
values are from 0 to 1: 1/255 is one grey level of one channel of one pixel.

`--out`, a `.jsonl` file, gets a line with all that is needed to run it again; `python -m
experiments.curves` makes the table and the plot.
"""

import json
import time

import numpy as np

from experiments import data, frame, record
from experiments.settings import NETWORKS, Settings, settings_of

#: Of images with values from 0 to 1, in 255ths.
RADII = (0, 1, 2, 4, 8, 16, 36, 72, 144, 255, 510)


def train_plain(images, network, settings):
    """Trains the same network, projections included, without noise and clip."""
    import keras

    import lipdp

    batch_size = 256
    steps = settings.epochs * -(-len(images.y_train) // batch_size)
    network.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(3e-3, steps)),
        loss=lipdp.losses.SparseCategoricalCrossentropy(settings.temperature),
    )
    network.fit(
        images.x_train, images.y_train, epochs=settings.epochs, batch_size=batch_size, verbose=2
    )
    return {"optimizer": "adam, 0.003 decayed along a cosine, batches of 256"}


def evaluate(network, x, y, attacked, seed=0):
    """Certified accuracy at each radius, and accuracy under attack at those below a pixel's range.

    Returns:
        A dict of lists over `RADII`; `None` where nothing was attacked.
    """
    from keras import ops

    from lipdp.robustness import attack, certified_radii

    radii = certified_radii(network, x, y)
    few, labels = x[:attacked].astype("float32"), y[:attacked]
    parts = [network(x[i : i + 1000].astype("float32")) for i in range(0, len(x), 1000)]
    logits = np.concatenate([ops.convert_to_numpy(part) for part in parts])
    accuracy = round(float(np.mean(logits.argmax(axis=1) == y)), 5)
    # All radii in one call; what is certified is attacked all the same.
    each = np.repeat(np.array(RADII, dtype="float32"), len(few))
    every, own = np.concatenate([few] * len(RADII)), np.tile(labels, len(RADII))
    worst = attack(network, every, own, each, steps=12, restarts=1, seed=seed)
    predicted = [network(worst[i : i + 1000]) for i in range(0, len(worst), 1000)]
    right = np.concatenate([ops.convert_to_numpy(p).argmax(axis=1) for p in predicted]) == own
    broken = int((~right & (np.tile(radii[:attacked], len(RADII)) > each)).sum())
    under_attack = [round(float(v), 5) for v in right.reshape(len(RADII), -1).mean(axis=1)]
    return {
        "accuracy": accuracy,
        "radii_in_255ths": list(RADII),
        "certified_accuracy": [round(float(np.mean(radii > r)), 5) for r in RADII],
        "certified_accuracy_of_attacked": [
            round(float(np.mean(radii[:attacked] > r)), 5) for r in RADII
        ],
        "accuracy_under_attack": under_attack,
        "attacked_images": len(few),
        "certified_images_broken": broken,
        "median_certified_radius_in_255ths": round(float(np.median(radii)), 3),
    }


# --- the command ----------------------------------------------------------------------------------

EXPERIMENT = frame.Experiment(
    "robustness",
    Settings,
    ("width", "depth", "patch_size", "radius", "batch_size", "epochs", "learning_rate")
    + ("momentum", "clip", "temperature"),
)


def run(values):
    """The run that flags ask for; returns its result.

    Raises:
        app.UsageError: a flag that cannot be followed.
    """
    loaded = data.asked_for(values)
    settings = settings_of(loaded.name, values.network, values.epsilon)
    settings = EXPERIMENT.chosen(values, settings)
    with EXPERIMENT.recorded(values, **data.about(values, loaded), settings=settings) as result:
        import keras

        from experiments import images

        keras.utils.set_random_seed(values.seed)
        network = images.build_network(loaded.x_train.shape[1:], loaded.classes, settings)
        start = time.perf_counter()
        if values.plain:
            trained = train_plain(loaded, network, settings)
        else:
            budget = (values.epsilon, values.delta)
            model, _ = images.fit(network, loaded, settings, *budget, values.seed)
            trained = record.spending(model)
        seconds = time.perf_counter() - start
        result |= {
            **evaluate(network, loaded.x_test, loaded.y_test, values.attacked),
            **trained,
            "weights": network.count_params(),
            "training_seconds": round(seconds, 1),
        }
    return result


def main(values):
    print(json.dumps(run(values)))


def define_flags(define):
    on_pixels = [name for name, about in NETWORKS.items() if "front" not in about]
    data.define_flags(define, EXPERIMENT, on_pixels, "mlp", epsilon=8.0, seed=1)
    define.switch("plain", False, "Trains without noise and clip.")
    define.integer("attacked", 1000, "Images that are attacked.", least=1)


if __name__ == "__main__":
    frame.start(main, define_flags)
