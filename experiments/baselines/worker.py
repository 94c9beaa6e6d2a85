"""Data of the baselines and of lipdp, and how a step is asked for and timed."""

import os
import pathlib
import resource
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np

__all__ = ["EPOCHS", "SHAPES", "examples", "fitting", "peak_mib", "repeated", "rows", "serve"]

#: Shape of an example, for each network.
SHAPES = {
    "convnet": (28, 28, 1),
    "vgg5": (32, 32, 3),
    "mlp": (28, 28, 1),
    "mixer": (32, 32, 3),
    "scattering": (2187,),
}


def examples(network: str, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Random examples of ten classes, four batches of them."""
    generator = np.random.default_rng(0)
    count = max(1024, 4 * batch_size)
    x = generator.random((count, *SHAPES[network]), dtype="float32")
    return x, generator.integers(0, 10, count)


def rows(network: str, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of that many random rows, without end."""
    x, y = examples(network, batch_size)
    generator = np.random.default_rng(1)
    while True:
        drawn = generator.integers(0, len(x), batch_size)
        yield x[drawn], y[drawn]


#: More than anybody will time: each has four steps at least.
EPOCHS = 250

Training = Callable[[Callable[[], None]], object]


def repeated(step: Callable[[], object]) -> Training:
    """The training that a loop around one step is."""

    def train(after):
        while True:
            step()
            after()

    return train


def fitting(keras: object, fit: Callable[..., object]) -> Training:
    """The training of a call of Keras' `fit`, of which all is there but the callbacks.

    Args:
        keras: the Keras whose `fit` it is.
        fit: takes `callbacks` and `verbose`.
    """

    def train(after):
        each = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: after())
        fit(callbacks=[each], verbose=0)

    return train


def serve(build: Callable[[str, str, int], tuple[Training, dict]]) -> None:
    """Makes a step for each line on stdin, and answers with what it took, as JSON.

    The CPU time is that of all threads since the answer before, so that what a library does in the
    background between two steps counts.

    Args:
        build: takes the method, the network and the batch size; returns a function that trains
            and calls its argument at the end of each step, and the versions to report.
    """
    import json

    # Libraries print; answers go where stdout went, and stdout goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(values):
        print(json.dumps(values), file=answers, flush=True)

    method, network, batch_size = sys.argv[1:]
    train, versions = build(method, network, int(batch_size))
    answer({"versions": versions, "mib": peak_mib()})
    asked, spent = time.perf_counter(), time.process_time()

    def wait():
        nonlocal asked
        if not sys.stdin.readline():
            sys.exit()
        asked = time.perf_counter()

    def after():
        nonlocal spent
        wall, cpu = time.perf_counter() - asked, time.process_time()
        answer({"cpu_ms": 1e3 * (cpu - spent), "wall_ms": 1e3 * wall, "mib": peak_mib()})
        spent = cpu
        wait()

    wait()
    train(after)


def peak_mib() -> float:
    """Peak memory of this program; `ru_maxrss` would count the one that started it as well."""
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
