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
    """Arrays with a row for each example: one for the targets of each output, one for each input.

    Args:
        x: an array, or for several inputs a dict of arrays.
        y: an array, or for several outputs a dict of arrays.

    >>> source = Arrays(np.arange(4.0), np.arange(4))
    >>> x, y = source.take(np.array([1, 3]), size=3)
    >>> x.tolist(), y.tolist()
    ([1.0, 3.0, 0.0], [1, 3, 0])
    """

    def __init__(self, x: Any, y: Any) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(tree.flatten(self.y)[0])

    def take(self, rows: np.ndarray, size: int) -> tuple[Any, Any]:
        """Inputs and targets of those examples, padded with zeros to `size` rows."""
        return tree.map_structure(lambda a: padded(a, rows, size), (self.x, self.y))


class Records:
    """Anything with `len(records)` and `records[i] -> (x, y)`: files on disk, a database, a
    Hugging Face or Grain source with a function that makes the pair. Only what is drawn is read.

    A record that cannot be read, is no such pair, or differs in shape or kind from the first one,
    counts as broken: its entries become NaN, or zeros where they are integers. An error would tell,
    in the middle of a run, that this example had been drawn. Errors of the machine, such as a disk
    that is gone, end the run.

    Attributes:
        like: inputs and targets of the first record, whose shapes all others should have.

    Args:
        records: the source, of which the first and the last record are read at once.
        pack: makes the structure of the network's inputs and targets out of a record `(x, y)`.

    Raises:
        Exception: what the source raises for the first or the last record.

    >>> source = Records([(np.ones(2), 0.0), (np.zeros(3), 1.0)], lambda x, y: (x, y))
    >>> x, y = source.take(np.array([0, 1]), size=3)
    >>> x.tolist(), y.tolist()
    ([[1.0, 1.0], [nan, nan], [0.0, 0.0]], [0.0, nan, 0.0])
    """

    def __init__(self, records: Any, pack: Callable[[Any, Any], tuple]) -> None:
        self.records = records
        self._pack = pack
        self.like = _pair(records[0], pack)
        # A source at fault for every record but the first would train on nothing, in silence.
        _pair(records[len(records) - 1], pack)

    def __len__(self) -> int:
        return len(self.records)

    def take(self, rows: np.ndarray, size: int) -> tuple[Any, Any]:
        """Inputs and targets of those examples, padded with zeros to `size` rows."""
        filled = tree.map_structure(
            lambda a: _aligned((size, *a.shape), np.float32 if a.dtype.kind == "f" else a.dtype),
            self.like,
        )
        for place, row in enumerate(rows):
            _fill(filled, place, lambda i=int(row): _pair(self.records[i], self._pack))
        return filled


def _pair(record, pack):
    """Inputs and target of a record, as arrays."""
    if not isinstance(record, (tuple, list)) or len(record) != 2:
        raise TypeError(
            f"records must be pairs (x, y); got {type(record).__name__}. Wrap the source in a "
            "class whose __getitem__ makes them."
        )
    x, y = pack(*record)
    y = {name: np.asarray(v) for name, v in y.items()} if isinstance(y, dict) else np.asarray(y)
    return tree.map_structure(np.asarray, x), y


def _fill(arrays, place, read):
    """Sets one row of each array to an example, or to NaN and zeros where it is broken.

    Returns:
        Whether it is broken.
    """
    arrays, values = tree.flatten(arrays), []
    try:
        values = tree.flatten(read())
    except Exception as error:
        if _of_the_machine(error):
            raise
    shapes = [a.shape[1:] for a in arrays]
    broken = [v.shape for v in values] != shapes or not all(map(_is_number, values, arrays))
    if broken:
        values = [np.array(math.nan if a.dtype.kind == "f" else 0) for a in arrays]
    for array, value in zip(arrays, values, strict=True):
        array[place] = as_type(value, array.dtype)
    return broken


def _is_number(value, array):
    return value.dtype.kind in "buif" or value.dtype == array.dtype


class _Ended(Exception):
    """A stream has no more examples."""


def _of_the_machine(error):
    """Whether an error says nothing of what an example holds.

    The operating system numbers its errors. An `OSError` without a number is a decoder's: that an
    image is truncated, say. TensorFlow has codes: 2 is an error of Python within a pipeline, 3 an
    argument that an operation does not take; others are of files, memory and the like.
    """
    if isinstance(error, OSError):
        return error.errno is not None
    if isinstance(error, (MemoryError, _Ended)):
        return True
    return getattr(error, "error_code", 3) not in (2, 3)


class Stream:
    """A `tf.data.Dataset` that is read in its own order, one pass an epoch, an example at a time.

    Each example is in one step of a pass, which is all that `ShuffledEpochs` asks for. The order
    must not depend on what the examples hold, nor may the pipeline drop any by what they hold. An
    example at which the pipeline raises an error counts as broken, as one of `Records` does. Where
    the pipeline makes batches an error takes others along, and the run ends.

    Args:
        dataset: its elements are pairs `(x, y)` of single examples.
        examples: how many a pass has.
        pack: makes the structure of the network's inputs and targets out of `(x, y)`.

    >>> import tensorflow as tf
    >>> dataset = tf.data.Dataset.from_tensor_slices((np.arange(3.0), np.arange(3)))
    >>> source = Stream(dataset, 3, lambda x, y: (x, y))
    >>> [source.take(np.array(rows), size=2)[1].tolist() for rows in ([0, 1], [2])]
    [[0, 1], [2, 0]]
    """

    def __init__(self, dataset: Any, examples: int, pack: Callable[[Any, Any], tuple]) -> None:
        self._dataset = dataset
        self._spec = pack(*dataset.element_spec)
        self._examples = examples
        self._pack = pack
        self._pass, self._read, self._broken = iter(()), 0, False
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._examples

    def take(self, rows: np.ndarray, size: int) -> tuple[Any, Any]:
        """The next examples of the pass, padded with zeros to `size` rows.

        Args:
            rows: their places in the pass, consecutive; place 0 begins a new pass. Without any
                nothing is read.
            size: how many rows are returned.

        Raises:
            TypeError: the data set holds text, or sparse or ragged tensors.
            ValueError: the pass has fewer or more examples than announced, or the data set does not
                know the shape of an example.
            RuntimeError: these are not the next ones: what was read is gone.
        """
        filled = tree.map_structure(lambda spec: _zeros(spec, size), self._spec)
        if len(rows) == 0:
            return filled
        with self._lock:
            if rows[0] == 0:
                self._pass = self._dataset.as_numpy_iterator()
                self._read, self._broken = 0, False
            if rows[0] != self._read:
                raise RuntimeError(
                    f"A stream is read in order: {self._read} examples of this pass were taken, "
                    f"and those from {rows[0]} on were asked for."
                )
            for place in range(len(rows)):
                try:
                    self._broken |= _fill(filled, place, self._next)
                except _Ended:
                    self._wrong_length("ended after", self._read)
                self._read += 1
            if self._read == self._examples and self._goes_on():
                self._wrong_length("goes on after", self._read)
        return filled

    def _next(self):
        example = next(self._pass, None)
        if example is None:
            raise _Ended
        return tree.map_structure(np.asarray, self._pack(*example))

    def _goes_on(self):
        try:
            return next(self._pass, None) is not None
        except Exception:
            # `assert_cardinality` counts without the broken ones, and would tell that there are.
            if self._broken:
                return False
            raise

    def _wrong_length(self, what, count):
        raise ValueError(
            f"`x` announced {self._examples} examples a pass, and {what} {count}: the sampling "
            "that is accounted for is of the number announced. Announce it by "
            "tf.data.experimental.assert_cardinality, and drop no example by what it holds."
        )


def _zeros(spec, size):
    if type(spec).__name__ != "TensorSpec" or np.dtype(spec.dtype.as_numpy_dtype).kind in "OSU":
        raise TypeError(
            f"`x` must hold dense tensors of numbers; got {spec}. Turn text into numbers by a "
            "public list, keras.layers.StringLookup(vocabulary=[...]), and others by "
            "tf.sparse.to_dense."
        )
    if not spec.shape.is_fully_defined():
        raise ValueError(
            f"`x` must know the shape of its examples here; got {spec.shape}. Set it, with "
            "dataset.map(lambda x, y: (tf.ensure_shape(x, ...), tf.ensure_shape(y, ...)))."
        )
    return _aligned((size, *spec.shape), spec.dtype.as_numpy_dtype)


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
