"""What the experiments share: their flags, their data, their result line."""

import json
import pathlib
import time

import numpy as np
from absl import flags

FLAGS = flags.FLAGS


def define_flags(
    *, epsilon: float, delta: float, batch_size: int, epochs: int, learning_rate: float
) -> None:
    """The flags of a training script, with its defaults."""
    flags.DEFINE_float("epsilon", epsilon, "Privacy budget: epsilon.", lower_bound=1e-6)
    flags.DEFINE_float("delta", delta, "Privacy budget: delta, in (0, 1).", 0.0, 1.0)
    flags.DEFINE_integer(
        "batch_size", batch_size, "Expected size of a Poisson batch.", lower_bound=1
    )
    flags.DEFINE_integer("epochs", epochs, "Passes over the data.", lower_bound=1)
    flags.DEFINE_float("learning_rate", learning_rate, "Of SGD, decayed to zero.", lower_bound=0.0)
    flags.DEFINE_integer(
        "seed",
        None,
        "Fixes noise and batches, for tests: who knows it can subtract the noise.",
        lower_bound=0,
    )
    flags.DEFINE_string("out", None, "File to which the result line is written as well.")


def load_npz(path: str) -> tuple:
    """Training and test images and labels from a file with Keras' four keys.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a key is missing.
    """
    with np.load(path) as data:
        keys = ("x_train", "y_train", "x_test", "y_test")
        if missing := [key for key in keys if key not in data]:
            raise ValueError(f"{path} lacks {', '.join(missing)}; it must hold {', '.join(keys)}.")
        x_train, y_train, x_test, y_test = (data[key] for key in keys)
    return (x_train, y_train), (x_test, y_test)


def train(model, dataset: str, train_data: tuple, test_data: tuple) -> dict:
    """Trains a compiled `PrivateModel` by the flags, prints its report and the result line."""
    import rich

    start = time.perf_counter()
    model.fit(*train_data, epochs=FLAGS.epochs)
    seconds = time.perf_counter() - start
    rich.print(model.report())
    _, accuracy = model.evaluate(*test_data, verbose=0)
    spent = model.spent()
    result = {
        "dataset": dataset,
        "epsilon": round(spent.epsilon, 6),
        "delta": spent.delta,
        "test_accuracy": round(float(accuracy), 4),
        "noise_multiplier": round(model.noise_multiplier, 6),
        "steps": spent.steps,
        "seconds": round(seconds, 2),
    }
    line = json.dumps(result)
    if FLAGS.out:
        pathlib.Path(FLAGS.out).write_text(line + "\n")
    print(line)
    return result
