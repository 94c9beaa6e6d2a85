"""A private network on images: `python -m experiments.images --data=mnist.npz --epsilon=1`.

`--data` is an `.npz` file with Keras' four keys, or `mnist`, `fashion_mnist` or `cifar10`, which
Keras fetches. `--network` is one of `lipdp.models` on pixels (`mlp`, `conv_net`, `vgg5`, `resnet6`,
`mixer`, ...) or a head on wavelet features that are computed once (`scattering-linear`,
`scattering-dense`, `scattering-conv`). Whatever is not given is looked up in `settings.py` by data
set, network and ε, where it was chosen on held-out training examples: `--validation=5000` holds so
many out, in place of the test set, to do that again.

With `--folder` features are kept there, and a run that is interrupted goes on where it was, with
what it has spent in a ledger. `--out`, a `.jsonl` file, gets a line with all that is needed to run
it again.
"""

import dataclasses
import hashlib
import json
import pathlib
import tempfile
import time

from experiments import data, frame, record
from experiments.settings import NETWORKS, Settings, settings_of

# --- networks -------------------------------------------------------------------------------------


def build_features(shape, settings):
    """The fixed front of a network that does not start at the pixels."""
    from experiments import features

    if settings.front == "patches":
        return features.patches(
            shape,
            settings.drawings,
            settings.filters,
            settings.patch_size,
            settings.cells,
            settings.threshold,
            settings.whitening,
            settings.mirror,
        )
    return features.scattering(
        shape,
        settings.drawings,
        settings.scales,
        settings.groups,
        settings.padding,
        settings.mirror,
        settings.views,
    )


def build_network(shape, classes, settings):
    """The network that is trained, on pixels or on features."""
    import keras

    from lipdp import layers, models

    width, depth, radius = settings.width, settings.depth, settings.radius
    hidden = settings.hidden_radius or None
    if settings.head == "dense":
        return models.mlp(shape, classes, width, depth, 1.0, hidden)
    if settings.front != "pixels":
        # Norms are taken of vectors: on a CPU that is a faster sum than of maps.
        body = [keras.Input(shape), keras.layers.Flatten(), layers.BallProjection(1.0)]
        if settings.head == "conv":
            body += [
                keras.layers.Reshape(shape),
                layers.SpectralConv2D(width, 1, use_bias=False),
                layers.GroupSort(),
                keras.layers.Flatten(),
            ]
        if settings.head == "linear":
            # Nothing lies before it that its norm could stretch: it may have any.
            last = keras.layers.Dense(classes, use_bias=False, kernel_initializer="zeros")
        else:
            last = layers.SpectralDense(classes, use_bias=False)
        return keras.Sequential([*body, last], name=settings.head)
    build = {
        "mlp": lambda: models.mlp(shape, classes, width, depth, radius, hidden),
        "conv_net": lambda: models.conv_net(shape, classes, width, radius, hidden),
        "vgg": lambda: models.vgg(shape, classes, depth, width, radius, hidden),
        "resnet": lambda: models.resnet(shape, classes, depth, width, radius),
        "mixer": lambda: models.mixer(shape, classes, settings.patch_size, width, depth, radius),
        "cosine_net": lambda: models.cosine_net(
            shape,
            classes,
            settings.patch_size,
            settings.filters,
            settings.stride,
            settings.pool,
            settings.cotangent,
            radius,
        ),
        "vision_transformer": lambda: models.vision_transformer(
            shape, classes, settings.patch_size, width, 4, depth, radius
        ),
    }
    network = build[settings.head]()
    # Centred pixels in front of all of them; where the model does so itself it changes nothing.
    return keras.Sequential(
        [keras.Input(shape), keras.layers.Rescaling(1 / 255), layers.Centering(), network]
    )


# --- training -------------------------------------------------------------------------------------


def fit(network, images, settings, epsilon, delta, seed=None, folder=None):
    """Trains a network privately.

    Args:
        network: a Keras model.
        images: `data.Images`, or features in their place.
        settings: `Settings`.
        epsilon, delta: the budget.
        seed: of noise and batches; None reads fresh entropy.
        folder: where a run that is interrupted goes on; None keeps nothing.

    Returns:
        The `PrivateModel`, and the seconds that its training took.
    """
    import keras

    import lipdp

    ledger, callbacks = None, []
    if folder is not None:
        run = pathlib.Path(folder) / f"run-{run_key(images, settings, epsilon, delta, seed)}"
        run.mkdir(exist_ok=True)
        ledger = run / "spent.ledger"
        callbacks = [keras.callbacks.BackupAndRestore(run / "backup")]
    model = lipdp.PrivateModel(
        network,
        budget=lipdp.Budget(epsilon, delta),
        noise_multiplier=_noise_of(ledger),
        sampling=lipdp.PoissonSampling(settings.batch_size),
        clip=settings.clip,
        augmentation=_augmentation(settings),
        physical_batch_size=settings.physical_batch_size,
        allocation=settings.allocation,
        ledger=ledger,
        seed=seed,
    )
    steps = settings.epochs * model.sampling.steps_per_epoch(len(images.y_train))
    model.compile(
        keras.optimizers.SGD(
            keras.optimizers.schedules.CosineDecay(settings.learning_rate, steps),
            momentum=settings.momentum,
            use_ema=settings.average > 0,
            ema_momentum=settings.average,
        ),
        loss=lipdp.losses.SparseCategoricalCrossentropy(settings.temperature),
        metrics=["accuracy"],
    )
    start = time.perf_counter()
    model.fit(images.x_train, images.y_train, epochs=settings.epochs, callbacks=callbacks)
    return model, time.perf_counter() - start


def train(images, settings, epsilon, delta, seed=None, folder=None):
    """Trains a network on `x_train` and evaluates it on `x_test`; arguments as for `fit`.

    Returns:
        A dict, for the record of the run.
    """
    import keras

    if seed is not None:
        keras.utils.set_random_seed(seed)
    network = build_network(images.x_train.shape[1:], images.classes, settings)
    model, seconds = fit(network, images, settings, epsilon, delta, seed, folder)
    _, accuracy = model.evaluate(images.x_test, images.y_test, batch_size=1000, verbose=0)
    return {
        "accuracy": round(float(accuracy), 5),
        **record.spending(model),
        "examples": len(images.y_train),
        "weights": network.count_params(),
        "training_seconds": round(seconds, 1),
    }


def with_features(images, settings, folder):
    """The images replaced by the front's features, which are kept in the folder as the front is."""
    import keras

    from experiments import features

    if settings.front == "pixels":
        return images
    shape = images.x_train.shape[1:]
    names = "-".join(str(getattr(settings, name)) for name in ("front", *_OF_FRONT[settings.front]))
    code = hashlib.sha256(pathlib.Path(features.__file__).read_bytes()).hexdigest()[:8]
    kept = folder / f"{'x'.join(map(str, shape))}-{names}-{code}.keras"
    if kept.exists():
        front = keras.saving.load_model(kept)
    else:
        front = build_features(shape, settings)
        part = kept.with_stem(f"{kept.stem}.part")
        front.save(part)
        part.replace(kept)
    made = {}
    for part, x in (("train", images.x_train), ("test", images.x_test)):
        file = f"{images.name}-{part}-{len(x)}-{names}.npy"
        made[f"x_{part}"] = features.cached(front, x, folder / file)
    return dataclasses.replace(images, **made)


# The settings of features.
_OF_FRONT = {
    "scattering": ("drawings", "scales", "groups", "padding", "mirror", "views"),
    "patches": (
        "drawings",
        "filters",
        "patch_size",
        "cells",
        "threshold",
        "whitening",
        "mirror",
    ),
}


def run_key(images, settings, epsilon, delta, seed):
    """Names a run: another one must not go on from its weights."""
    run = [images.sha256, len(images.y_train), dataclasses.asdict(settings), epsilon, delta, seed]
    return hashlib.sha256(json.dumps(run).encode()).hexdigest()[:16]


def _noise_of(ledger):
    """The noise with which an interrupted run began, and goes on; None where it begins."""
    import accountants

    runs = accountants.Ledger(ledger).runs if ledger is not None else []
    return runs[0].noise_multiplier if runs else None


def _augmentation(settings):
    import keras

    import lipdp

    if settings.flips == 1:
        return None
    return lipdp.Augmentation(keras.layers.RandomFlip("horizontal"), views=settings.flips)


# --- the command ----------------------------------------------------------------------------------

EXPERIMENT = frame.Experiment(
    "images",
    Settings,
    # What is trained is the network's.
    [f.name for f in dataclasses.fields(Settings) if f.name not in ("front", "head")],
)


def run(values):
    """The run that flags ask for; returns its result.

    Raises:
        app.UsageError: a flag that cannot be followed; nothing has been spent.
    """
    folder = frame.folder(values)
    images = data.asked_for(values)
    settings = settings_of(images.name, values.network, values.epsilon)
    settings = EXPERIMENT.chosen(values, settings)
    about = data.about(values, images)
    with (
        EXPERIMENT.recorded(values, **about, settings=settings) as result,
        tempfile.TemporaryDirectory() as scratch,
    ):
        used = with_features(images, settings, folder or pathlib.Path(scratch))
        result |= train(used, settings, values.epsilon, values.delta, values.seed, folder)
    return result


def main(values):
    print(json.dumps(run(values)))


def define_flags(define):
    data.define_flags(define, EXPERIMENT, NETWORKS, "scattering-linear", epsilon=3.0, seed=None)
    define.text("folder", None, "Keeps features, and runs that are interrupted.")


if __name__ == "__main__":
    frame.start(main, define_flags)
