"""A private network on scikit-learn's digits: `python -m experiments.digits`.

1,797 images of 8×8 pixels that ship with scikit-learn, a fixed 80/20 split. Centred pixels of
unit norm and one layer with a spectral certificate: with so few examples the noise leaves no
room for more weights.
"""

import json
import pathlib
import time

import numpy as np

from experiments import frame


def load():
    """`(x_train, y_train), (x_test, y_test)`, always the same split."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    x = (digits.images[order] / 16.0).astype("float32")
    y = digits.target[order]
    cut = int(0.8 * len(x))
    return (x[:cut], y[:cut]), (x[cut:], y[cut:])


def build_model(values, steps):
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
        budget=lipdp.Budget(values.epsilon, values.delta),
        sampling=lipdp.PoissonSampling(values.batch_size),
        clip=0.2,
        seed=values.seed,
    )
    rate = keras.optimizers.schedules.CosineDecay(values.learning_rate, steps)
    model.compile(
        keras.optimizers.SGD(rate, momentum=0.9),
        loss=lipdp.losses.SparseCategoricalCrossentropy(temperature=20.0),
        metrics=["accuracy"],
    )
    return model


def train(values, model, train_data, test_data):
    """Trains by the flags, prints the report and the result line."""
    import rich

    start = time.perf_counter()
    model.fit(*train_data, epochs=values.epochs)
    seconds = time.perf_counter() - start
    rich.print(model.report())
    _, accuracy = model.evaluate(*test_data, verbose=0)
    spent = model.spent()
    result = {
        "dataset": "digits",
        "epsilon": round(spent.epsilon, 6),
        "delta": spent.delta,
        "test_accuracy": round(float(accuracy), 4),
        "noise_multiplier": round(model.noise_multiplier, 6),
        "steps": spent.steps,
        "seconds": round(seconds, 2),
    }
    line = json.dumps(result)
    if values.out:
        pathlib.Path(values.out).write_text(line + "\n")
    print(line)


def main(values):
    import lipdp
    from lipdp import startup

    startup.import_keras()
    train_data, test_data = load()
    sampling = lipdp.PoissonSampling(values.batch_size)
    steps = values.epochs * sampling.steps_per_epoch(len(train_data[0]))
    train(values, build_model(values, steps), train_data, test_data)


def define_flags(define):
    define.number("epsilon", 3.0, "Privacy budget: epsilon.", least=1e-6)
    define.delta(1e-5, "Privacy budget: delta.")
    define.integer("batch_size", 512, "Expected size of a Poisson batch.", least=1)
    define.integer("epochs", 40, "Passes over the data.", least=1)
    define.number("learning_rate", 1.0, "Of SGD, decayed to zero.", least=0.0)
    define.seed(None)
    define.text("out", None, "File to which the result line is written as well.")


if __name__ == "__main__":
    frame.start(main, define_flags)
