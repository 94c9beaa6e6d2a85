"""What the experiments share: where a result was made, and its file."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import tempfile
from collections.abc import Sequence

import numpy as np
from absl import flags

__all__ = [
    "command",
    "delta_of",
    "markdown",
    "plot",
    "provenance",
    "read_all",
    "sha256",
    "spread",
    "train",
    "write",
]


def provenance() -> dict:
    """Commit, backend and versions."""
    import keras

    import lipdp

    backend = keras.backend.backend()
    git = ["git", "-C", str(pathlib.Path(__file__).parent)]
    try:
        commit = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
        changed = subprocess.check_output(
            [*git, "status", "--porcelain", "--untracked-files=no"], text=True
        ).strip()
    except (OSError, subprocess.CalledProcessError):
        commit, changed = None, ""
    return {
        "commit": commit,
        "uncommitted_changes": bool(changed),
        "backend": backend,
        "versions": {
            "python": platform.python_version(),
            "lipdp": lipdp.__version__,
            "keras": keras.__version__,
            backend: __import__(backend).__version__,
            "numpy": np.__version__,
            "dp_accounting": importlib.metadata.version("dp-accounting"),
        },
    }


def sha256(path: str | os.PathLike[str]) -> str:
    """Of a file's bytes.

    Raises:
        FileNotFoundError: there is no such file.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def command(module: str, data: str | os.PathLike[str], names: Sequence[str]) -> str:
    """What runs it again, but for where files lie on this machine.

    Args:
        module: of this package.
        data: the file; its name is said.
        names: flags to mention where they differ from their defaults.
    """
    parts = [f"python -m experiments.{module}", f"--data={pathlib.PurePath(data).name}"]
    for name in names:
        if flags.FLAGS[name].value != flags.FLAGS[name].default:
            parts.append(f"--{name}={flags.FLAGS[name].value}")
    return " ".join(parts)


def delta_of(examples: int) -> float:
    """10 to the power of -⌈log10 n⌉, below 1/n unless n is a power of ten.

    >>> delta_of(41_188), delta_of(1000)
    (1e-05, 0.001)
    """
    return float(f"1e-{len(str(examples - 1))}")


def train(model, x: np.ndarray, y: np.ndarray, steps: int) -> None:
    """So many private steps of a compiled `PrivateModel`.

    On TensorFlow `fit` feeds batches through a generator data set, which makes the allocator hand
    freed memory back at once; with batches of many megabytes that costs more time than the step.
    """
    for batch in model.batches(x, y, steps_per_epoch=steps):
        model.train_on_batch(batch)


def write(path: str | os.PathLike[str], result: dict) -> None:
    """One JSON; a file of that name is replaced at once or not at all."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def read_all(folder: str | os.PathLike[str]) -> list[dict]:
    """The results of a folder, in the order of their names.

    Raises:
        ValueError: there are none.
    """
    paths = sorted(pathlib.Path(folder).glob("*.json"))
    if not paths:
        raise ValueError(f"{folder} holds no results (*.json).")
    return [json.loads(path.read_text()) for path in paths]


def spread(values: Sequence[float], digits: int = 1, scale: float = 100.0) -> str:
    """Median, least and largest.

    >>> spread([0.5, 0.7, 0.625])
    '62.5 (50.0–70.0)'
    """
    numbers = (statistics.median(values), min(values), max(values))
    middle, low, high = (f"{scale * v:.{digits}f}" for v in numbers)
    return f"{middle} ({low}–{high})"


@contextlib.contextmanager
def plot(path: str | os.PathLike[str], size: tuple[float, float]):
    """The axes of a plot that is written at the end, as an SVG that only its content changes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": "lipdp"}):
        figure, axes = pyplot.subplots(figsize=size, layout="constrained")
        yield axes
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


def markdown(head, lines):
    """A table of Markdown: the names of the columns, and lines of as many cells."""
    rule = "|---" * len(head) + "|"
    return "\n".join([f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(x)} |" for x in lines)])
