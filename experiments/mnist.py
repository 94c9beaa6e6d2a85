"""A private convolutional network on MNIST: `python -m experiments.mnist --data=mnist.npz`.

Without `--data` the images come from `keras.datasets.mnist`.
"""

from absl import app, flags

from experiments import common

FLAGS = flags.FLAGS


def load(path):
    """Images in [0, 1] of shape `(examples, 28, 28, 1)` and integer labels, train and test."""
    if path:
        train, test = common.load_npz(path)
    else:
        import keras

        train, test = keras.datasets.mnist.load_data()
    return [((x[..., None] / 255.0).astype("float32"), y.astype("int32")) for x, y in (train, test)]


def build_network():
    """Patches to features by convolutions that do not overlap, then one dense layer."""
    import keras

    from lipdp import layers

    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Centering(),
            layers.BallProjection(1.0),
            layers.SpectralConv2D(16, 4, strides=2, padding="same", use_bias=False),
            layers.GroupSort(),
            layers.SpectralConv2D(32, 2, strides=2, use_bias=False),
            layers.GroupSort(),
            keras.layers.Flatten(),
            layers.SpectralDense(10, use_bias=False),
        ],
        name="mnist",
    )


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {' '.join(argv[1:])}")
    import keras

    import lipdp

    train_data, test_data = load(FLAGS.data)
    model = lipdp.PrivateModel(
        build_network(),
        budget=lipdp.Budget(FLAGS.epsilon, FLAGS.delta),
        sampling=lipdp.PoissonSampling(FLAGS.batch_size),
        clip=FLAGS.clip,
        allocation=FLAGS.allocation,
        seed=FLAGS.seed,
    )
    steps = FLAGS.epochs * model.sampling.steps_per_epoch(len(train_data[1]))
    rate = keras.optimizers.schedules.CosineDecay(FLAGS.learning_rate, steps)
    model.compile(
        keras.optimizers.SGD(rate, momentum=0.9),
        loss=lipdp.losses.SparseCategoricalCrossentropy(temperature=FLAGS.temperature),
        metrics=["accuracy"],
    )
    common.train(model, "mnist", train_data, test_data)


if __name__ == "__main__":
    common.define_flags(epsilon=3.0, delta=1e-5, batch_size=2048, epochs=8, learning_rate=2.0)
    flags.DEFINE_string("data", None, "An .npz file with x_train, y_train, x_test, y_test.")
    flags.DEFINE_float("clip", 0.3, "Clip of the loss gradient.", lower_bound=0.0)
    flags.DEFINE_float("temperature", 300.0, "Temperature of the cross-entropy.", lower_bound=0.0)
    flags.DEFINE_enum("allocation", "global", ["global", "per_weight", "least"], "Of the noise.")
    app.run(main)
