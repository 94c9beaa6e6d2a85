"""DP-SGD with per-example clipping, to compare with: `python -m experiments.dpsgd --data=...`.

Not part of lipdp: a small trainer of ordinary Keras networks that clips the gradient of every
example, with the draws, the accountant, the data and the record of `experiments.images`, so that
the two differ in the mechanism alone. `mlp` and `conv_net` are those of `lipdp.models` with biases
and ReLU in place of projections and sorting; `scattering-linear` is the very network of
`experiments.images`, one dense layer on features.

Norms of the examples' gradients come without the gradients where they can ("ghost clipping"): for
a dense layer that reads `h` and has the cotangent `d` it is `‖h‖·‖d‖`. A convolution's are products
of patches and cotangents, summed over the positions. The sum of the clipped gradients is then one
product with the clipped cotangents.

`python -m experiments.curves` draws the results beside those of the private networks.
"""

import dataclasses
import json
import pathlib
import tempfile
import time

import numpy as np

from experiments import data, frame

NETWORKS = ("mlp", "conv_net", "scattering-linear")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of one run, by default chosen for `mlp` on 5,000 held-out examples of MNIST.

    Attributes:
        width: of the first hidden layer.
        radius: of the ball of the input, as for `experiments.settings`.
        batch_size: expected size of a Poisson batch.
        epochs, learning_rate, momentum: of SGD, decayed to zero along a cosine.
        clip: of an example's gradient.
    """

    width: int = 64
    radius: float = 1.0
    batch_size: int = 2048
    epochs: int = 10
    learning_rate: float = 16.0
    momentum: float = 0.9
    clip: float = 1.0


# --- the mechanism --------------------------------------------------------------------------------


def build_network(name, shape, classes, settings):
    """An ordinary network behind the inputs that the private one has."""
    import keras

    from lipdp import layers

    K = keras.layers
    bodies = {
        "mlp": [K.Flatten(), K.Dense(settings.width), K.ReLU()],
        "conv_net": [
            K.Conv2D(settings.width, 4, strides=2, padding="same"),
            K.ReLU(),
            K.Conv2D(2 * settings.width, 2, strides=2),
            K.ReLU(),
            K.Flatten(),
        ],
    }
    front = [K.Rescaling(1 / 255), layers.Centering(), layers.BallProjection(settings.radius)]
    last = K.Dense(classes, kernel_initializer="zeros")
    return keras.Sequential([keras.Input(shape), *front, *bodies[name], last], name=name)


def clipped_sums(network, values, x, y, mask, clip):
    """Sum of the examples' clipped gradients of the cross-entropy.

    Args:
        network: a Sequential model whose weights are those of `Dense` on vectors and `Conv2D`
            without groups or dilation, and whose activations are layers of their own.
        values: of its weights.
        x, y, mask: `(rows, ...)`; rows with mask 0 count nothing.
        clip: largest norm of an example's gradient, over all weights together.

    Returns:
        A tensor for each weight, and the norms `(rows,)` before the clip.
    """
    import keras
    from keras import ops

    from lipdp.autodiff import vjp

    weighted = [layer for layer in network.layers if layer.trainable_variables]

    def forward(*taps):
        # What is added to an output has its cotangent.
        h, read, taps = x, [], iter(taps)
        with keras.StatelessScope(zip(network.trainable_variables, values, strict=True)):
            for layer in network.layers:
                if layer in weighted:
                    read.append(h)
                    h = layer(h) + next(taps)
                else:
                    h = layer(h)
        return [h, *read]

    def cotangents(outputs):
        logits, *read = outputs
        own = ops.one_hot(y, logits.shape[-1])
        return [ops.softmax(logits) - own, *map(ops.zeros_like, read)]

    taps = [ops.zeros((x.shape[0], *layer.output.shape[1:])) for layer in weighted]
    (_, *read), found = vjp(forward, taps, cotangents)
    parts = [_part(*of) for of in zip(weighted, read, found, strict=True)]
    norms = ops.sqrt(sum(squares for squares, _ in parts))
    scales = mask * ops.minimum(1.0, clip / ops.maximum(norms, 1e-30))
    return [total for _, weigh in parts for total in weigh(scales)], norms


def _part(layer, h, d):
    """Squared norms of a layer's gradients `(rows,)`, and `scales -> [sum of its gradients]`."""
    from keras import ops

    kernel = layer.kernel
    biases = [] if layer.bias is None else [ops.sum(d, axis=tuple(range(1, len(d.shape) - 1)))]
    squares = sum(ops.sum(ops.square(b), axis=-1) for b in biases)
    if len(kernel.shape) == 2:
        squares += ops.sum(ops.square(h), axis=-1) * ops.sum(ops.square(d), axis=-1)

        def weigh(scales):
            kernels = ops.matmul(ops.transpose(h), d * scales[:, None])
            return [kernels, *(ops.matmul(scales, b) for b in biases)]

        return squares, weigh
    taps = tuple(kernel.shape[:2])
    patches = ops.image.extract_patches(h, taps, layer.strides, padding=layer.padding)
    rows, positions = h.shape[0], d.shape[1] * d.shape[2]
    patches = ops.reshape(patches, (rows, positions, -1))
    each = ops.matmul(ops.transpose(patches, (0, 2, 1)), ops.reshape(d, (rows, positions, -1)))
    squares += ops.sum(ops.square(each), axis=(1, 2))

    def weigh_each(scales):
        total = ops.matmul(scales, ops.reshape(each, (rows, -1)))
        return [ops.reshape(total, kernel.shape), *(ops.matmul(scales, b) for b in biases)]

    return squares, weigh_each


# --- training -------------------------------------------------------------------------------------


def train(images, network, settings, epsilon, delta, seed, rows=1024):
    """Trains a network on `x_train` with DP-SGD and evaluates it on `x_test`.

    Args:
        images: `data.Images`, or features in their place.
        network: what is trained, as for `clipped_sums`.
        settings: `Settings`.
        epsilon, delta: the budget.
        seed: of noise and batches.
        rows: computed at once.

    Returns:
        What a result says of a run, a dict.
    """
    import keras
    from keras import ops
    from rich.progress import track

    import accountants
    from lipdp.autodiff import compiled

    x, y = images.x_train, images.y_train
    random = np.random.default_rng(seed)
    sampling = accountants.PoissonSampling(settings.batch_size)
    steps = settings.epochs * sampling.steps_per_epoch(len(y))
    run = {"sampling": sampling, "num_examples": len(y), "steps": steps}
    noise = accountants.calibrate_noise_multiplier(epsilon=epsilon, delta=delta, **run)
    spent = accountants.epsilon(delta=delta, noise_multiplier=noise, **run)
    rate = keras.optimizers.schedules.CosineDecay(settings.learning_rate, steps)
    optimizer = keras.optimizers.SGD(rate, momentum=settings.momentum)
    variables = network.trainable_variables
    optimizer.build(variables)

    @compiled
    def sums(values, *piece):
        return clipped_sums(network, values, *piece, settings.clip)[0]

    start = time.perf_counter()
    for _ in track(range(steps), description=f"{network.name}, ε = {epsilon:g}"):
        drawn = np.flatnonzero(random.random(len(y)) < sampling.sampling_probability(len(y)))
        totals = [random.normal(0.0, noise * settings.clip, v.shape) for v in variables]
        for first in range(0, len(drawn), rows):
            piece = drawn[first : first + rows]
            mask = np.arange(rows) < len(piece)
            piece = np.pad(piece, (0, rows - len(piece)))
            arrays = x[piece].astype("float32"), y[piece], mask.astype("float32")
            found = sums([v.value for v in variables], *map(ops.convert_to_tensor, arrays))
            totals = [t + ops.convert_to_numpy(f) for t, f in zip(totals, found, strict=True)]
        updates = [ops.convert_to_tensor(t / settings.batch_size, "float32") for t in totals]
        optimizer.apply(updates, variables)
    seconds = time.perf_counter() - start
    right = 0
    for first in range(0, len(images.y_test), 1000):
        part = slice(first, first + 1000)
        logits = ops.convert_to_numpy(network(images.x_test[part].astype("float32")))
        right += int((logits.argmax(axis=1) == images.y_test[part]).sum())
    return {
        "accuracy": round(right / len(images.y_test), 5),
        "spent": {"epsilon": float(spent), "delta": delta, "steps": steps},
        "accountant": "pld",
        "sampling": sampling.to_dict(),
        "examples": len(y),
        "noise_multiplier": noise,
        "weights": network.count_params(),
        "training_seconds": round(seconds, 1),
    }


# --- the command ----------------------------------------------------------------------------------

EXPERIMENT = frame.Experiment("dpsgd", Settings)


def run(values):
    """The run that flags ask for; returns its result.

    Raises:
        app.UsageError: a flag that cannot be followed.
    """
    folder = frame.folder(values)
    loaded = data.asked_for(values)
    settings = EXPERIMENT.chosen(values)
    about = {"method": "clipping", **data.about(values, loaded)}
    with EXPERIMENT.recorded(values, **about, settings=settings) as result:
        import keras

        from experiments import images
        from experiments.settings import settings_of

        keras.utils.set_random_seed(values.seed)
        used = loaded
        if values.network == "scattering-linear":
            ours = settings_of(loaded.name, values.network, values.epsilon)
            with tempfile.TemporaryDirectory() as scratch:
                place = folder or pathlib.Path(scratch)
                used = images.with_features(loaded, ours, place)
            network = images.build_network(used.x_train.shape[1:], loaded.classes, ours)
        else:
            shape = loaded.x_train.shape[1:]
            network = build_network(values.network, shape, loaded.classes, settings)
        result |= train(used, network, settings, values.epsilon, values.delta, values.seed)
    return result


def main(values):
    print(json.dumps(run(values)))


def define_flags(define):
    data.define_flags(define, EXPERIMENT, NETWORKS, "mlp", epsilon=3.0, seed=1)
    define.text("folder", None, "Keeps features.")


if __name__ == "__main__":
    frame.start(main, define_flags)
