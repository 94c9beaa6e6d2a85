"""Records of runs: where a result was made, and the file that keeps it.

Results of one kind share a JSON Lines file: each line is the record of one run.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import tempfile
from collections.abc import Iterator

import numpy as np

__all__ = ["append", "delta_of", "provenance", "read", "sha256", "spending", "write"]


def provenance() -> dict:
    """Commit, backend and versions."""
    import lipdp
    from lipdp import startup

    startup.import_keras()
    import keras

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


def spending(model) -> dict:
    """The budget that a `PrivateModel` has spent, and the mechanism of its steps."""
    return {
        "spent": dataclasses.asdict(model.spent()),
        "accountant": "pld",
        "sampling": model.sampling.to_dict(),
        "noise_multiplier": model.noise_multiplier,
    }


def sha256(path: str | os.PathLike[str]) -> str:
    """Digest of a file's bytes.

    Raises:
        FileNotFoundError: there is no such file.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def delta_of(examples: int) -> float:
    """10 to the power of -⌈log10 n⌉, below 1/n unless n is a power of ten.

    >>> delta_of(41_188), delta_of(1000)
    (1e-05, 0.001)
    """
    return float(f"1e-{len(str(examples - 1))}")


# --- files ----------------------------------------------------------------------------------------


def write(path: str | os.PathLike[str], result: dict | list) -> None:
    """Writes one JSON; a file of that name is replaced at once or not at all."""
    _replace(pathlib.Path(path), json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def append(path: str | os.PathLike[str], result: dict) -> None:
    """Appends one line to a JSON Lines file.

    The file is replaced at once or not at all, so that nobody ever reads half a line. Processes
    that append at the same time wait for each other.
    """
    path = pathlib.Path(path)
    with _locked(path):
        lines = path.read_text("utf-8") if path.exists() else ""
        if lines and not lines.endswith("\n"):
            lines += "\n"
        _replace(path, lines + json.dumps(result, ensure_ascii=False) + "\n")


def read(path: str | os.PathLike[str]) -> list[dict]:
    """Reads all records of a JSON Lines file, in its order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is no JSON object, or there are no lines.
    """
    path, found = pathlib.Path(path), []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"Line {number} of {path.name} is no JSON: {error}.") from error
            if not isinstance(found[-1], dict):
                raise ValueError(f"Line {number} of {path.name} is no JSON object.")
    if not found:
        raise ValueError(f"{path} holds no results.")
    return found


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    """Holds the folder's lock: that of a file would be lost when the file is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _replace(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)
