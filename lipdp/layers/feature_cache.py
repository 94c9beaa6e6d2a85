"""Features of a whole data set by fixed layers, computed once and kept on disk."""

import contextlib
import hashlib
import json
import os
import pathlib
import tempfile
from typing import Any

import keras
import numpy as np

from accountants.validation import check_integer
from lipdp._version import __version__


def cached_features(
    network: keras.layers.Layer,
    x: Any,
    path: str | os.PathLike,
    batch_size: int = 64,
    progress: bool = True,
) -> np.ndarray:
    """Features of a data set by a layer or network, from disk where they were computed before.

    Training on features costs what training on data does only if nothing private went into the
    network (`Scattering2D` has no weights; others may be trained on public data) and each row
    depends on its own example alone, as it does with every layer that has a rule.

    The file is a NumPy array followed by a digest of the data, the network's configuration and
    weights, and the version of this package. It is replaced in one step when it is complete;
    where the digest is missing or another, as in a torn or stale file, it is computed anew.

    Args:
        network: a layer, or a model with one input and one output. Called with `training=False`.
        x: examples, `(examples, ...)`, finite numbers.
        path: the file, usually `.npy`; its directory must exist.
        batch_size: examples computed at a time; on a CPU the scattering of large batches is slower.
        progress: whether a bar is shown while features are computed.

    Returns:
        The features, `(examples, ...)`, read-only and mapped from the file, so that only what is
        read takes memory. `PrivateModel.fit` takes it as it is.

    Raises:
        TypeError: `network` is no layer or `x` does not hold numbers.
        ValueError: `x` is empty or not finite, `batch_size` is not a positive integer, or the
            network has not one output with a row for each example.
        FileNotFoundError: the directory of `path` does not exist.

    >>> import tempfile
    >>> from lipdp.layers import Scattering2D
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     features = cached_features(
    ...         Scattering2D(J=1, L=2), np.ones((3, 4, 4, 1)), f"{folder}/x.npy", progress=False)
    ...     print(features.shape)
    (3, 2, 2, 3)
    """
    if not isinstance(network, keras.layers.Layer):
        raise TypeError(f"`network` must be a Keras layer or model; got {type(network).__name__}.")
    batch_size = check_integer(batch_size, "batch_size")
    x = np.asanyarray(x)
    if x.dtype.kind not in "buif":
        raise TypeError(f"`x` must hold real numbers; got dtype {x.dtype}.")
    if x.ndim == 0 or x.size == 0:
        raise ValueError(f"`x` must hold at least one example; got shape {x.shape}.")
    path = pathlib.Path(path).expanduser()
    if not path.parent.is_dir():
        raise FileNotFoundError(f"The folder of `path` does not exist: {path.parent}")

    dtype = network.inputs[0].dtype if getattr(network, "inputs", None) else keras.config.floatx()
    model = keras.Sequential([keras.Input(x.shape[1:], dtype=dtype), network])
    digest = _digest(network, x, batch_size)
    with contextlib.suppress(FileNotFoundError, OSError):
        with path.open("rb") as file:
            file.seek(-len(digest), os.SEEK_END)
            if file.read() == digest:
                return np.load(path, mmap_mode="r")

    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        _compute(model, x, partial, batch_size, progress)
        with open(partial, "ab") as file:
            file.write(digest)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise
    return np.load(path, mmap_mode="r")


def _digest(network, x, batch_size):
    config = network.get_config()
    config.pop("name", None)  # counted up in each process, and it changes nothing
    made_by = [__version__, type(network).__module__, type(network).__qualname__, config]
    digest = hashlib.sha256(json.dumps(made_by, sort_keys=True, default=repr).encode())
    for array in (*network.get_weights(), x):
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        for i in range(0, len(array) if array.ndim else 1, batch_size):
            part = array[i : i + batch_size] if array.ndim else array
            digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest().encode()


def _compute(model, x, path, batch_size, progress):
    dtype = model.inputs[0].dtype
    starts = range(0, len(x), batch_size)
    bar = keras.utils.Progbar(len(starts), unit_name="batch") if progress else None
    features = None
    for done, start in enumerate(starts, 1):
        batch = np.asarray(x[start : start + batch_size], dtype=dtype)
        if not np.isfinite(batch).all():
            raise ValueError(f"`x` is not finite in the rows from {start} to {start + len(batch)}.")
        rows = len(batch)
        # The last batch is filled up, lest the network is compiled for another size.
        batch = np.concatenate([batch, np.zeros((batch_size - rows, *batch.shape[1:]), dtype)])
        found = model.predict_on_batch(batch)
        if not isinstance(found, np.ndarray) or found.shape[:1] != batch.shape[:1]:
            raise ValueError("`network` must have one output, with a row for each example.")
        if features is None:
            shape = (len(x), *found.shape[1:])
            features = np.lib.format.open_memmap(path, mode="w+", dtype=found.dtype, shape=shape)
        features[start : start + rows] = found[:rows]
        if bar is not None:
            bar.update(done)
    features.flush()
