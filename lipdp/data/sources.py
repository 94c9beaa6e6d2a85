"""Where examples come from: arrays, in memory or mapped from disk, records one by one, streams."""

import contextlib
import math
import mmap
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from keras import tree

__all__ = ["Arrays", "Records", "Stream", "as_type", "padded"]

_ALIGNMENT = 64  # bytes


class Arrays:
    """Arrays with a row for each example: one for the targets, one for each input.

    Args:
        x: an array, or for several inputs a dict of arrays.
        y: an array.

    >>> source = Arrays(np.arange(4.0), np.arange(4))
    >>> x, y = source.take(np.array([1, 3]), size=3)
    >>> x.tolist(), y.tolist()
    ([1.0, 3.0, 0.0], [1, 3, 0])
    """

    def __init__(self, x: Any, y: np.ndarray) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.y)

    def take(self, rows: np.ndarray, size: int) -> tuple[Any, np.ndarray]:
        """Inputs and targets of those examples, padded with zeros to `size` rows."""
        return tree.map_structure(lambda a: padded(a, rows, size), self.x), padded(
            self.y, rows, size
        )


class Records:
    """Anything with `len(records)` and `records[i] -> (x, y)`: files on disk, a database, a
    Hugging Face or Grain source with a function that makes the pair. Only what is drawn is read.

    A record that is no such pair, or differs in shape or kind from the first one, counts as broken:
    its entries become NaN, or zeros where they are integers. An error would tell, in the middle of
    a run, that this example had been drawn. What the source itself raises ends the run.

    Attributes:
        like: inputs and targets of the first record, whose shapes all others should have.

    Args:
        records: the source.
        pack: makes the structure of the network's inputs out of a record's `x`.

    >>> source = Records([(np.ones(2), 0.0), (np.zeros(3), 1.0)], lambda x: x)
    >>> x, y = source.take(np.array([0, 1]), size=3)
    >>> x.tolist(), y.tolist()
    ([[1.0, 1.0], [nan, nan], [0.0, 0.0]], [0.0, nan, 0.0])
    """

    def __init__(self, records: Any, pack: Callable[[Any], Any]) -> None:
        self.records = records
        self._pack = pack
        self.like = _pair(records[0], pack)

    def __len__(self) -> int:
        return len(self.records)

    def take(self, rows: np.ndarray, size: int) -> tuple[Any, np.ndarray]:
        """Inputs and targets of those examples, padded with zeros to `size` rows."""
        filled = tree.map_structure(
            lambda a: _aligned((size, *a.shape), np.float32 if a.dtype.kind == "f" else a.dtype),
            self.like,
        )
        arrays = tree.flatten(filled)
        for place, row in enumerate(rows):
            for array, value in zip(arrays, self._values(self.records[int(row)]), strict=True):
                array[place] = value
        return filled

    def _values(self, record):
        """The values of a record, one for each array."""
        like = tree.flatten(self.like)
        try:
            values = tree.flatten(_pair(record, self._pack))
        except (TypeError, ValueError):
            values = []
        shapes = [a.shape for a in like]
        if [v.shape for v in values] != shapes or any(v.dtype.kind not in "buif" for v in values):
            return [math.nan if a.dtype.kind == "f" else 0 for a in like]
        types = [np.float32 if a.dtype.kind == "f" else a.dtype for a in like]
        return [as_type(v, dtype) for v, dtype in zip(values, types, strict=True)]


def _pair(record, pack):
    """Inputs and target of a record, as arrays."""
    if not isinstance(record, (tuple, list)) or len(record) != 2:
        raise TypeError(
            f"records must be pairs (x, y); got {type(record).__name__}. Wrap the source in a "
            "class whose __getitem__ makes them."
        )
    return tree.map_structure(np.asarray, pack(record[0])), np.asarray(record[1])


class Stream:
    """A `tf.data.Dataset` that is read in its own order, one pass an epoch, a batch at a time.

    Each example is in one step of a pass, which is all that `ShuffledEpochs` asks for. The order
    must not depend on what the examples hold, nor may the pipeline drop any by what they hold.

    Args:
        dataset: its elements are pairs `(x, y)` of single examples.
        examples: how many a pass has.
        batch_size: of the steps.
        pack: makes the structure of the network's inputs out of `x`.

    >>> import tensorflow as tf
    >>> dataset = tf.data.Dataset.from_tensor_slices((np.arange(3.0), np.arange(3)))
    >>> source = Stream(dataset, 3, 2, lambda x: x)
    >>> [source.take(np.array(rows), size=2)[1].tolist() for rows in ([0, 1], [2])]
    [[0, 1], [2, 0]]
    """

    def __init__(self, dataset: Any, examples: int, batch_size: int, pack: Any) -> None:
        self._batches = dataset.batch(batch_size)
        x, y = dataset.element_spec
        self._spec = pack(x), y
        self._examples = examples
        self._pack = pack
        self._pass, self._read = iter(()), 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._examples

    def take(self, rows: np.ndarray, size: int) -> tuple[Any, np.ndarray]:
        """The next examples of the pass, padded with zeros to `size` rows.

        Args:
            rows: their places in the pass, consecutive; place 0 begins a new pass. Without any
                nothing is read.
            size: how many rows are returned.

        Raises:
            ValueError: the pass has fewer or more examples than announced, or the data set does not
                know its shapes, and there are no rows that tell.
            RuntimeError: these are not the next ones: what was read is gone.
        """
        if len(rows) == 0:
            return tree.map_structure(lambda spec: _zeros(spec, size), self._spec)
        with self._lock:
            if rows[0] == 0:
                self._pass, self._read = self._batches.as_numpy_iterator(), 0
            if rows[0] != self._read:
                raise RuntimeError(
                    f"A stream is read in order: {self._read} examples of this pass were taken, "
                    f"and those from {rows[0]} on were asked for."
                )
            x, y = next(self._pass, (None, ()))
            self._read += len(y)
            if len(y) < len(rows):
                self._wrong_length("ended after", self._read)
            if self._read == self._examples and next(self._pass, None) is not None:
                self._wrong_length("goes on after", self._read)
        everything = np.arange(len(rows))
        return tree.map_structure(lambda a: padded(a, everything, size), (self._pack(x), y))

    def _wrong_length(self, what, count):
        raise ValueError(
            f"`x` announced {self._examples} examples a pass, and {what} {count}: the sampling "
            "that is accounted for is of the number announced. Announce it by "
            "tf.data.experimental.assert_cardinality, and drop no example by what it holds."
        )


def _zeros(spec, size):
    if not spec.shape.is_fully_defined():
        raise ValueError(
            f"`x` must know the shape of its examples here; got {spec.shape}. Set it, with "
            "dataset.map(lambda x, y: (tf.ensure_shape(x, ...), tf.ensure_shape(y, ...)))."
        )
    return np.zeros((size, *spec.shape), spec.dtype.as_numpy_dtype)


def padded(values: np.ndarray, rows: np.ndarray, size: int) -> np.ndarray:
    """Those rows of an array, and zeros up to `size` rows."""
    if len(rows) == len(values) == size:
        return values
    taken = _aligned((size, *values.shape[1:]), values.dtype)
    with _at_random(values):
        if values.flags.c_contiguous:  # others would be copied whole
            # The rows exist; a mode that checks it would gather them into memory of its own first.
            np.take(values, rows, axis=0, out=taken[: len(rows)], mode="clip")
        else:
            taken[: len(rows)] = values[rows]
    return taken


def as_type(values: np.ndarray, dtype: Any) -> np.ndarray:
    """A cast that keeps silent of what does not fit: no warning tells that an example is there."""
    with np.errstate(all="ignore"):
        return values.astype(dtype, copy=False)


def _aligned(shape, dtype):
    """Zeros that begin where XLA wants an array to begin, which JAX then reads without a copy."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    memory = np.zeros(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


@contextlib.contextmanager
def _at_random(values):
    """Has no more read of a mapped file than asked for: around each of a few scattered rows the
    operating system would read ahead, up to megabytes.
    """
    mapping = getattr(values, "_mmap", None)
    if mapping is None or not hasattr(mmap, "MADV_RANDOM"):
        yield
        return
    mapping.madvise(mmap.MADV_RANDOM)
    try:
        yield
    finally:
        mapping.madvise(mmap.MADV_NORMAL)
