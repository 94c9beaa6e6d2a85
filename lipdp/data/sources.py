"""Where examples come from: arrays, in memory or mapped from disk, records one by one, streams."""

import contextlib
import math
import mmap
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import tree

__all__ = ["Arrays", "Records", "Stream", "open_source"]

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

    Attributes:
        like: inputs and targets of the first record, whose shapes all others must have.

    Args:
        records: the source.
        pack: makes the structure of the network's inputs out of a record's `x`.

    >>> source = Records([(np.ones(2), 0), (np.zeros(2), 1)], lambda x: x)
    >>> source.take(np.array([1]), size=2)[1].tolist()
    [1, 0]
    """

    def __init__(self, records: Any, pack: Any) -> None:
        self.records = records
        self._pack = pack
        x, y = self._read(0)
        self.like = tree.map_structure(np.asarray, x), np.asarray(y)

    def __len__(self) -> int:
        return len(self.records)

    def _read(self, index):
        record = self.records[index]
        if not isinstance(record, (tuple, list)) or len(record) != 2:
            raise TypeError(
                "records must be pairs (x, y); got "
                f"{type(record).__name__}. Wrap the source in a class whose __getitem__ makes them."
            )
        return self._pack(record[0]), record[1]

    def take(self, rows: np.ndarray, size: int) -> tuple[Any, np.ndarray]:
        """Inputs and targets of those examples, padded with zeros to `size` rows.

        Raises:
            ValueError: a record differs in shape from the first one.
        """
        filled = tree.map_structure(
            lambda a: _aligned((size, *a.shape), np.float32 if a.dtype.kind == "f" else a.dtype),
            self.like,
        )
        for place, row in enumerate(rows):
            for array, value in zip(
                tree.flatten(filled), tree.flatten(self._read(int(row))), strict=True
            ):
                if np.shape(value) != array.shape[1:]:
                    raise ValueError(
                        f"records must all have the shapes of the first one, {array.shape[1:]}; "
                        f"got one of {np.shape(value)}."
                    )
                array[place] = as_type(np.asarray(value), array.dtype)
        return filled


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


def open_source(
    x: Any, y: Any, network: keras.Model, stream: int | None = None
) -> Arrays | Records | Stream:
    """The source of what `fit` was given, after the checks that can be made before training.

    Args:
        x: an array `(examples, ...)`; for several inputs a dict by their names, or a list in
            their order. Without `y`: a finite `tf.data.Dataset` of examples or batches `(x, y)`
            or a `keras.utils.PyDataset` of batches, which is read into memory; or anything with
            `len()` whose items are pairs `(x, y)`, of which only drawn ones are read.
        y: targets, an array `(examples, ...)`.
        network: whose inputs they are.
        stream: where a pass in the data set's own order is what the scheme samples, its batch
            size: a `tf.data.Dataset` is then not read into memory, and must know its length.

    Raises:
        TypeError: not one of these.
        ValueError: missing, empty, of different lengths, of a wrong shape, not finite, endless or
            repeated. Records are checked as far as their first one tells, arrays on disk as far as
            their first rows, streams as far as their `element_spec`.
    """

    def pack(x):
        return _packed(x, network)

    if y is None and x is not None:
        if hasattr(x, "element_spec"):
            batched = _check_dataset(x, pack, network)
            if stream is not None:
                return _opened_stream(x, batched, stream, pack)
            x, y = _read_batches(x if batched else x.batch(1024))
        elif isinstance(x, keras.utils.PyDataset):
            x, y = _read_batches(x)
        elif not _is_array(x) and not isinstance(x, (Mapping, str)) and hasattr(x, "__getitem__"):
            return _checked_records(x, pack, network)
    if x is None or y is None:
        raise ValueError("`x` and `y` must both be given, as arrays with one row an example.")
    y = as_array(y, "y")
    x = pack(x)
    x = {k: as_array(v, "x") for k, v in x.items()} if isinstance(x, dict) else as_array(x, "x")
    if len(y) == 0:
        raise ValueError("`x` and `y` are empty.")
    for tensor in network.inputs:
        array = x[tensor.name] if isinstance(x, dict) else x
        _check_rows(array, tuple(tensor.shape[1:]), len(y))
    return Arrays(x, y)


def _packed(x, network):
    """The inputs as the network's loops take them: one by itself, several by their names."""
    names = [t.name for t in network.inputs]
    if len(names) == 1 and not isinstance(x, Mapping):
        return x
    if isinstance(x, (list, tuple)) and len(x) == len(names):
        x = dict(zip(names, x, strict=True))
    if not isinstance(x, Mapping) or set(x) != set(names):
        came = list(x) if isinstance(x, Mapping) else type(x).__name__
        raise ValueError(
            f"`x` must hold the inputs of the network, as a dict by their names {names} or a list "
            f"in their order; got {came}."
        )
    return {name: x[name] for name in names} if len(names) > 1 else x[names[0]]


def _is_array(value):
    return isinstance(value, np.ndarray) or keras.ops.is_tensor(value)


def as_array(value: Any, name: str) -> np.ndarray:
    """A NumPy array of numbers with a row for each example.

    Raises:
        TypeError: `name` cannot be read as one.
    """
    array = value
    if keras.ops.is_tensor(array):
        array = keras.ops.convert_to_numpy(array)
    elif not isinstance(array, (np.ndarray, dict, str)):
        try:
            array = np.asarray(array)
        except ValueError:  # ragged
            array = None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "buif" or array.ndim == 0:
        dtype = f" of dtype {array.dtype}" if isinstance(array, np.ndarray) else ""
        raise TypeError(
            f"`{name}` must be one array of numbers with a row for each example; got "
            f"{type(value).__name__}{dtype}."
        )
    return array


def _fits(shape, wanted):
    return len(shape) == len(wanted) and all(
        n is None or n == m for n, m in zip(wanted, shape, strict=True)
    )


def _check_rows(x, input_shape, examples):
    if len(x) != examples:
        raise ValueError(f"`x` and `y` must have one row an example; got {len(x)} and {examples}.")
    if not _fits(x.shape[1:], input_shape):
        raise ValueError(
            f"`x` must hold examples of shape {input_shape}, as the network's input; got "
            f"{x.shape[1:]}."
        )
    if x.dtype.kind == "f":
        rows = max(1, 2**24 // max(1, math.prod(x.shape[1:])))
        # Not all of a file: what is broken further on is read as zeros when it is drawn.
        end = rows if isinstance(x, np.memmap) else len(x)
        for start in range(0, end, rows):
            if not np.isfinite(as_type(x[start : start + rows], np.float32)).all():
                raise ValueError(
                    "`x` holds values that are NaN or infinite in float32; clean them before "
                    "training (a bound would hold all the same, but the examples would be read as "
                    "zeros)."
                )


def _checked_records(records, pack, network):
    if not hasattr(records, "__len__"):
        raise TypeError(f"`x` must have a length; {type(records).__name__} has none.")
    if len(records) == 0:
        raise ValueError("`x` is empty.")
    source = Records(records, pack)
    like, target = source.like
    if target.dtype.kind not in "buif":
        raise TypeError(
            "records must hold numbers as targets, one array an example; got "
            f"{type(records[0][1]).__name__}."
        )
    for tensor in network.inputs:
        value = like[tensor.name] if isinstance(like, dict) else like
        if value.dtype.kind not in "buif" or not _fits(value.shape, tuple(tensor.shape[1:])):
            raise ValueError(
                f"records must hold numbers of shape {tuple(tensor.shape[1:])}, as the network's "
                f"input; got {value.dtype} of shape {value.shape}."
            )
    return source


def _check_dataset(dataset, pack, network):
    """Whether a `tf.data.Dataset` holds batches, or single examples.

    Raises:
        TypeError, ValueError: it holds something else, or each example more than once.
    """
    if int(dataset.cardinality()) == -1:
        raise ValueError("`x` must be a finite data set; got one that repeats for ever.")
    if _repeats(dataset):
        raise ValueError(
            "`x` must hold each example once; got a data set with .repeat(), in which one takes "
            "part as if it were several. Say epochs=... instead."
        )
    spec = dataset.element_spec
    if not isinstance(spec, (tuple, list)) or len(spec) != 2 or tree.is_nested(spec[1]):
        raise TypeError(f"`x` must give batches (x, y), or examples (x, y); got {spec}.")
    inputs = pack(spec[0])
    kinds = set()
    for tensor in network.inputs:
        shape = (inputs[tensor.name] if isinstance(inputs, dict) else inputs).shape
        wanted = tuple(tensor.shape[1:])
        batched = shape.rank == len(wanted) + 1
        # A size that the data set does not know is found out when it is read.
        if shape.rank is None or not shape[int(batched) :].is_compatible_with(wanted):
            raise ValueError(
                f"`x` must hold examples of shape {wanted}, as the network's input, or batches of "
                f"them; got elements of shape {shape}."
            )
        kinds.add(batched)
    if len(kinds) > 1:
        raise ValueError("`x` must hold batches of every input, or of none.")
    return kinds.pop()


def _repeats(dataset):
    inputs = getattr(dataset, "_inputs", tuple)()
    return "Repeat" in type(dataset).__name__ or any(_repeats(d) for d in inputs)


def _opened_stream(dataset, batched, batch_size, pack):
    examples = int(dataset.cardinality())
    if batched:
        rows = tree.flatten(dataset.element_spec)[0].shape[0]
        examples = examples * rows if examples >= 0 and rows is not None else -2
        dataset = dataset.unbatch()
    if examples == -2:
        raise ValueError(
            "`x` does not know its number of examples, on which the sampling depends. Announce it: "
            "dataset.unbatch().apply(tf.data.experimental.assert_cardinality(number)), or without "
            "unbatch() where its elements are single examples."
        )
    if examples == 0:
        raise ValueError("`x` and `y` are empty.")
    return Stream(dataset, examples, batch_size, pack)


def _read_batches(dataset) -> tuple[Any, Any]:
    """All batches of a finite data set, joined."""
    if isinstance(dataset, keras.utils.PyDataset):
        if dataset.num_batches is None:
            raise ValueError("`x` must be a finite data set; got one without a number of batches.")
        batches: Sequence = [dataset[i] for i in range(dataset.num_batches)]
    else:
        batches = [tree.map_structure(keras.ops.convert_to_numpy, batch) for batch in dataset]
    if not batches:
        raise ValueError("`x` and `y` are empty.")
    if any(not isinstance(b, (tuple, list)) or len(b) != 2 for b in batches):
        raise TypeError("`x` must give batches (x, y).")
    return tree.map_structure(lambda *parts: np.concatenate(parts), *map(tuple, batches))
