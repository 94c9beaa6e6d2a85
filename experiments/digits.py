"""A private network on scikit-learn's digits: `python -m experiments.digits`.

1,797 images of 8×8 pixels that ship with scikit-learn, a fixed 80/20 split. Centred pixels of
unit norm and one layer with a spectral certificate: with so few examples the noise leaves no
room for more weights.
"""

import numpy as np
from absl import app, flags

from experiments import common

FLAGS = flags.FLAGS


def load():
    """`(x_train, y_train), (x_test, y_test)`, always the same split."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    x = (digits.images[order] / 16.0).astype("float32")
    y = digits.target[order]
    cut = int(0.8 * len(x))
    return (x[:cut], y[:cut]), (x[cut:], y[cut:])


def build_model(steps):
    """The demo's `PrivateModel`, compiled by the flags."""
    import keras

    import lipdp
    from lipdp import layers

    network = keras.Sequential(
        [
            keras.Input((8, 8)),
            keras.layers.Flatten(),
            layers.Centering(),
            layers.BallProjection(1.0),
            layers.SpectralDense(10, use_bias=False),
        ],
        name="digits",
    )
    model = lipdp.PrivateModel(
        network,
        budget=lipdp.Budget(FLAGS.epsilon, FLAGS.delta),
        sampling=lipdp.PoissonSampling(FLAGS.batch_size),
        clip=0.2,
        seed=FLAGS.seed,
    )
    rate = keras.optimizers.schedules.CosineDecay(FLAGS.learning_rate, steps)
    model.compile(
        keras.optimizers.SGD(rate, momentum=0.9),
        loss=lipdp.losses.SparseCategoricalCrossentropy(temperature=20.0),
        metrics=["accuracy"],
    )
    return model


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {' '.join(argv[1:])}")
    import lipdp

    train_data, test_data = load()
    sampling = lipdp.PoissonSampling(FLAGS.batch_size)
    steps = FLAGS.epochs * sampling.steps_per_epoch(len(train_data[0]))
    common.train(build_model(steps), "digits", train_data, test_data)


if __name__ == "__main__":
    common.define_flags(epsilon=3.0, delta=1e-5, batch_size=512, epochs=40, learning_rate=1.0)
    app.run(main)
