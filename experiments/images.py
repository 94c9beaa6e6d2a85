"""A private network on images: `python -m experiments.images --data=mnist.npz --epsilon=1`.

`--data` is an `.npz` file with Keras' four keys, or `mnist`, `fashion_mnist` or `cifar10`, which
Keras fetches. `--network` is one of `lipdp.models` on pixels (`mlp`, `conv_net`, `vgg5`, `resnet6`,
`mixer`, ...) or a head on wavelet features that are computed once (`scattering-linear`,
`scattering-dense`, `scattering-conv`). Whatever is not given is looked up in `settings.py` by data
set, network and ε, where it was chosen on held-out training examples: `--validation=5000` holds so
many out, in place of the test set, to do that again.

With `--folder` features are kept there, and a run that is interrupted goes on where it was, with
what it has spent in a ledger. `--out` gets one JSON with all that is needed to run it again.
"""

import dataclasses
import hashlib
import json
import pathlib
import tempfile
import time

from absl import app, flags

from experiments import data, record
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
    """What is trained, on pixels or on features."""
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


def train(images, settings, epsilon, delta, seed=None, folder=None):
    """Trains a network on `x_train` and evaluates it on `x_test`.

    Args:
        images: `data.Images`, or features in their place.
        settings: `Settings`.
        epsilon, delta: the budget.
        seed: of noise, batches and initial weights; None reads fresh entropy.
        folder: where a run that is interrupted goes on; None keeps nothing.

    Returns:
        What a result says of a run, a dict.
    """
    import keras

    import lipdp

    if seed is not None:
        keras.utils.set_random_seed(seed)
    network = build_network(images.x_train.shape[1:], images.classes, settings)
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
    seconds = time.perf_counter() - start
    _, accuracy = model.evaluate(images.x_test, images.y_test, batch_size=1000, verbose=0)
    return {
        "accuracy": round(float(accuracy), 5),
        "spent": dataclasses.asdict(model.spent()),
        "accountant": "pld",
        "sampling": model.sampling.to_dict(),
        "examples": len(images.y_train),
        "noise_multiplier": model.noise_multiplier,
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


# --- the record -----------------------------------------------------------------------------------


def command(values):
    """What runs it again, but for where files lie on this machine."""
    parts = ["python -m experiments.images", f"--data={pathlib.PurePath(values.data).name}"]
    for name in ("network", "epsilon", "delta", "seed", "validation", *_CHANGEABLE):
        if values[name].present or name in ("network", "epsilon"):
            parts.append(f"--{name}={values[name].value}")
    return " ".join(parts)


def run(values):
    """The run that flags ask for; returns its result.

    Raises:
        app.UsageError: a flag that cannot be followed; nothing has been spent.
    """
    if values.folder and not pathlib.Path(values.folder).is_dir():
        raise app.UsageError(f"--folder={values.folder} is no folder.")
    images = data.asked_for(values)
    settings = settings_of(images.name, values.network, values.epsilon)
    given = {name: values[name].value for name in _CHANGEABLE if values[name].present}
    settings = dataclasses.replace(settings, **given)
    made = record.provenance()  # of the code that runs, whatever is changed meanwhile
    with tempfile.TemporaryDirectory() as scratch:
        used = with_features(images, settings, pathlib.Path(values.folder or scratch))
        done = train(used, settings, values.epsilon, values.delta, values.seed, values.folder)
    held_out = f"{values.validation} held-out training examples"
    result = {
        "command": command(values),
        "data": {"name": images.name, "sha256": images.sha256},
        "network": values.network,
        "epsilon": values.epsilon,
        "delta": values.delta,
        "seed": values.seed,
        "evaluated_on": held_out if values.validation else "test set",
        **done,
        "settings": dataclasses.asdict(settings),
        **made,
    }
    if values.out:
        record.write(values.out, result)
    return result


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {' '.join(argv[1:])}")
    print(json.dumps(run(flags.FLAGS)))


def define_flags(values=flags.FLAGS):
    """Defines the flags of a run."""

    def define(kind, name, default, text, **bounds):
        kind(name, default, text, flag_values=values, **bounds)

    number, count = flags.DEFINE_float, flags.DEFINE_integer
    define(flags.DEFINE_string, "data", None, "An .npz file, or a name that Keras knows.")
    flags.DEFINE_enum(
        "network", "scattering-linear", list(NETWORKS), "What is trained.", flag_values=values
    )
    define(number, "epsilon", 3.0, "Privacy budget: epsilon.", lower_bound=1e-6)
    define(number, "delta", 1e-5, "Privacy budget: delta.", lower_bound=0.0, upper_bound=1.0)
    define(
        count,
        "seed",
        None,
        "Fixes noise and batches, for benchmarks: who knows it can subtract the noise.",
        lower_bound=0,
    )
    define(count, "validation", 0, "Training examples to hold out.", lower_bound=0)
    define(flags.DEFINE_string, "folder", None, "Keeps features, and runs that are interrupted.")
    define(flags.DEFINE_string, "out", None, "File for the result, a JSON.")
    flags.mark_flag_as_required("data", flag_values=values)
    for name, kind in _CHANGEABLE.items():
        text = f"In place of the setting of that name, which {__package__}.settings explains."
        if kind is float:
            define(number, name, None, text, lower_bound=0.0)
        elif kind in (bool, str):
            define(flags.DEFINE_boolean if kind is bool else flags.DEFINE_string, name, None, text)
        else:
            define(count, name, None, text, lower_bound=1)


# The settings that flags may change; what is trained is the network's.
_CHANGEABLE = {
    field.name: field.type
    for field in dataclasses.fields(Settings)
    if field.name not in ("front", "head")
}

if __name__ == "__main__":
    define_flags()
    app.run(main)
