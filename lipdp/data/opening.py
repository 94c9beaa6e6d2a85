"""From what `fit` is given to a source of examples, with what can be checked before training."""

import math
import time
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import tree
from keras.src.utils import io_utils

from lipdp.data.sources import Arrays, Records, Stream, as_type
from lipdp.inputs import input_names, like_inputs
from lipdp.outputs import Outputs

__all__ = ["as_array", "held_out", "open_source", "surely_ends"]

_PATIENCE = 5.0  # seconds of silence while a data set is read
_MOST_DENSE = 2**31  # bytes that a sparse matrix may take as an array
# Data sets of TensorFlow that may be endless without saying so.
_OF_UNKNOWN_LENGTH = ("FlatMap", "Interleave", "Generator", "Scan")

_WAYS = (
    "Give arrays, x and y; anything with __len__ and __getitem__, whose items are pairs (x, y); or "
    "a finite tf.data.Dataset of such pairs."
)


def open_source(
    x: Any,
    y: Any,
    network: keras.Model,
    outputs: Outputs | None = None,
    stream: bool = False,
) -> Arrays | Records | Stream:
    """The source of what `fit` was given, after the checks that can be made before training.

    Args:
        x: an array `(examples, ...)`, or a DataFrame; for several inputs a dict by their names, or
            a list in their order. Without `y`: a finite `tf.data.Dataset` of examples or batches
            `(x, y)` or a `keras.utils.PyDataset` of batches, which is read into memory; or anything
            with `len()` whose items are pairs `(x, y)`, of which only drawn ones are read.
        y: targets, an array `(examples, ...)`; for several outputs a dict by their names, or a list
            in their order.
        network: whose inputs they are.
        outputs: of the network, where it has several.
        stream: whether a pass in the data set's own order is what the scheme samples: a
            `tf.data.Dataset` is then not read into memory, and must know its length.

    Raises:
        TypeError: not one of these.
        ValueError: missing, empty, of different lengths, of a wrong shape, not finite, endless or
            repeated. Records are checked as far as their first one tells, arrays on disk as far as
            their first rows, streams as far as their `element_spec`.
    """

    def pack(x, y):
        return _packed(x, network), y if outputs is None else outputs.named(y, "y")

    if y is None and x is not None:
        if hasattr(x, "element_spec"):
            batched = _check_dataset(x, pack, network, outputs)
            if stream:
                return _opened_stream(x, batched, pack)
            if not surely_ends(x):
                raise ValueError(
                    "`x` does not know its number of examples, on which the sampling depends, and "
                    "may be endless. Announce how many elements it has: dataset.apply("
                    "tf.data.experimental.assert_cardinality(number))."
                )
            x, y = _read_batches(x if batched else x.batch(1024))
        elif isinstance(x, keras.utils.PyDataset):
            if x.num_batches is None:
                raise ValueError(
                    "`x` must be a finite data set; got one without a number of batches."
                )
            x, y = _read_batches(x[i] for i in range(x.num_batches))
        else:
            _check_has_targets(x)
            if not _is_array(x) and not isinstance(x, (Mapping, str)) and hasattr(x, "__getitem__"):
                return _checked_records(x, pack, network, outputs)
    elif x is not None and not hasattr(x, "__len__") and hasattr(x, "__iter__"):
        raise TypeError(_no_source(x))
    if x is None or y is None:
        raise ValueError("`x` and `y` must both be given, as arrays with one row an example.")
    x, y = pack(x, y)
    if outputs is None:
        y = as_array(y, "y")
    else:
        y = {name: as_array(v, f"y[{name!r}]") for name, v in y.items()}
    lengths = [len(v) for v in tree.flatten(y)]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"`y` must have a row an example for each output; got {lengths} rows for {list(y)}."
        )
    if lengths[0] == 0:
        raise ValueError("`x` and `y` are empty.")
    shapes = [tuple(tensor.shape[1:]) for tensor in network.inputs]
    wanted = dict(zip(input_names(network), shapes, strict=True))
    if isinstance(x, dict):
        return Arrays({k: _rows(as_array(v, "x"), wanted[k], lengths[0]) for k, v in x.items()}, y)
    (shape,) = wanted.values()
    return Arrays(_rows(as_array(x, "x"), shape, lengths[0]), y)


def held_out(
    x: Any, y: Any, sample_weight: Any, share: float
) -> tuple[tuple[Any, Any, Any], tuple]:
    """What is trained on, and what is evaluated on: the last part of the rows, as in Keras.

    Args:
        x, y, sample_weight: of `fit`; arrays.
        share: of the examples that are held out, above 0 and below 1.

    Raises:
        TypeError: the data are no arrays.
        ValueError: the share is out of range, or leaves nothing on one side.

    >>> (x, y, _), validation = held_out(np.arange(10.0), np.arange(10), None, 0.2)
    >>> len(x), validation[1].tolist()
    (8, [8, 9])
    """
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < 1:
        raise ValueError(f"`validation_split` must lie between 0 and 1; got {share!r}.")
    if y is None or hasattr(x, "element_spec"):
        raise TypeError(
            "`validation_split` is for arrays `x` and `y`; for other data sets give "
            "`validation_data`."
        )
    data = tree.map_structure(lambda v: v if v is None else as_array(v, "x"), (x, y, sample_weight))
    rows = len(tree.flatten(data[1])[0])
    first = math.floor(rows * (1 - share))
    if not 0 < first < rows:
        raise ValueError(
            f"`validation_split` = {share:g} leaves {first} of the {rows} examples to train on and "
            f"{rows - first} to evaluate on; each part needs some."
        )

    def part(rows):
        return tree.map_structure(lambda v: v if v is None else v[rows], data)

    return part(slice(first)), tuple(v for v in part(slice(first, None)) if v is not None)


def as_array(value: Any, name: str) -> np.ndarray:
    """A NumPy array of numbers with a row for each example.

    Raises:
        TypeError: `name` cannot be read as one.
        ValueError: a sparse matrix that is too large for an array.
    """
    array = value
    if keras.ops.is_tensor(array):
        array = keras.ops.convert_to_numpy(array)
    elif hasattr(array, "toarray") and hasattr(array, "nnz"):
        array = _dense(array, name)
    elif hasattr(array, "to_numpy"):
        array = _of_frame(array)
    elif not isinstance(array, (np.ndarray, dict, str)):
        try:
            array = np.asarray(array)
        except ValueError:  # ragged
            array = None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "buif" or array.ndim == 0:
        dtype = f" of dtype {array.dtype}" if isinstance(array, np.ndarray) else ""
        raise TypeError(
            f"`{name}` must be one array of numbers with a row for each example; got "
            f"{type(value).__name__}{dtype}.{_remedy(value, array, name)}"
        )
    return array


def _of_frame(frame):
    """The numbers of a pandas or polars DataFrame or Series; a missing one is NaN."""
    array = frame.to_numpy()
    if array.dtype.kind == "O":  # columns of several types, or of those that know missing values
        try:
            array = frame.to_numpy(dtype="float64", na_value=np.nan)
        except (TypeError, ValueError):
            pass
    return array


def _remedy(value, array, name):
    columns = getattr(value, "columns", None)
    if columns is not None and not callable(columns):
        dtypes = zip(columns, value.dtypes, strict=True)
        text = [str(c) for c, dtype in dtypes if getattr(dtype, "kind", "O") not in "buif"]
        return (
            f" Its columns {text} hold no numbers. Turn categories into numbers by a public list: "
            "keras.layers.StringLookup(vocabulary=[...])(column)."
        )
    if isinstance(array, np.ndarray) and array.dtype.kind in "OUST":
        return (
            " Turn text into numbers by a public list, not one that is collected from the private "
            "data: keras.layers.StringLookup(vocabulary=['no', 'yes'], num_oov_indices=0)"
            f"({name})."
        )
    return ""


def _dense(matrix, name):
    size = math.prod(matrix.shape) * 4
    if size > _MOST_DENSE:
        raise ValueError(
            f"`{name}` is a sparse matrix that would take {size / 2**30:.1f} GiB as an array. Give "
            "a class whose __getitem__(i) returns (matrix[i].toarray()[0], target), of which only "
            "drawn rows are read."
        )
    return matrix.toarray()


def _rows(x, input_shape, examples):
    """The array with the rank of the input: as in Keras, a last axis of size 1 may be missing."""
    if len(x) != examples:
        raise ValueError(f"`x` and `y` must have one row an example; got {len(x)} and {examples}.")
    if x.ndim == len(input_shape) and input_shape[-1:] == (1,):
        x = x[..., np.newaxis]
    elif x.ndim == len(input_shape) + 2 and x.shape[-1] == 1:
        x = x[..., 0]
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
    return x


def _fits(shape, wanted):
    return len(shape) == len(wanted) and all(
        n is None or n == m for n, m in zip(wanted, shape, strict=True)
    )


def _packed(x, network):
    """The inputs as the network's loops take them: one by itself, several by their names."""
    names = input_names(network)
    structured = isinstance(like_inputs(network, names), Mapping)
    if len(names) == 1 and not isinstance(x, Mapping):
        return {names[0]: x} if structured else x
    if isinstance(x, (list, tuple)) and len(x) == len(names):
        x = dict(zip(names, x, strict=True))
    if not isinstance(x, Mapping) or set(x) != set(names):
        came = list(x) if isinstance(x, Mapping) else type(x).__name__
        raise ValueError(
            f"`x` must hold the inputs of the network, as a dict by their names {names} or a list "
            f"in their order; got {came}."
        )
    several = len(names) > 1 or structured
    return {name: x[name] for name in names} if several else x[names[0]]


def _is_array(value):
    return isinstance(value, np.ndarray) or keras.ops.is_tensor(value)


def _check_has_targets(x):
    """Refuses what has no targets, or cannot be drawn from, though Keras' own `fit` takes it."""
    if hasattr(x, "columns") and hasattr(x, "to_numpy"):
        raise ValueError(
            "`y` must be given where `x` is a DataFrame: fit(frame.drop(columns='target'), "
            "frame['target'])."
        )
    if isinstance(x, tuple) and len(x) == 2 and all(map(_is_array, x)):
        raise TypeError("`x` and `y` must be given apart: fit(x, y), not fit((x, y)).")
    if not hasattr(x, "__getitem__") and hasattr(x, "__iter__"):
        raise TypeError(_no_source(x))


def _no_source(x):
    inner = getattr(x, "dataset", None)
    if inner is not None and hasattr(inner, "__getitem__"):
        return (
            f"`x` must be a data set from which any example can be drawn; got "
            f"{type(x).__name__}, which draws by itself. Give what it reads: fit(loader.dataset)."
        )
    return (
        "`x` must be data from which any example can be drawn, each with the same chance; got "
        f"{type(x).__name__}, which gives batches in an order of its own. {_WAYS}"
    )


def _checked_records(records, pack, network, outputs):
    if not hasattr(records, "__len__"):
        raise TypeError(f"`x` must have a length; {type(records).__name__} has none.")
    if len(records) == 0:
        raise ValueError("`x` is empty.")
    source = Records(records, pack)
    like, target = source.like
    several = isinstance(target, dict) and outputs is None
    if several or any(t.dtype.kind not in "buif" for t in tree.flatten(target)):
        raise TypeError(
            "records must hold numbers as targets, one array an example; got "
            f"{type(records[0][1]).__name__}."
        )
    for name, tensor in zip(input_names(network), network.inputs, strict=True):
        value = like[name] if isinstance(like, dict) else like
        if value.dtype.kind not in "buif" or not _fits(value.shape, tuple(tensor.shape[1:])):
            raise ValueError(
                f"records must hold numbers of shape {tuple(tensor.shape[1:])}, as the network's "
                f"input; got {value.dtype} of shape {value.shape}."
            )
    return source


def _check_dataset(dataset, pack, network, outputs):
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
    pair = isinstance(spec, (tuple, list)) and len(spec) == 2
    if not pair or (outputs is None and tree.is_nested(spec[1])):
        raise TypeError(f"`x` must give batches (x, y), or examples (x, y); got {spec}.")
    inputs, _ = pack(*spec)
    kinds = set()
    for name, tensor in zip(input_names(network), network.inputs, strict=True):
        shape = (inputs[name] if isinstance(inputs, dict) else inputs).shape
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


def _inputs_of(dataset):
    return getattr(dataset, "_inputs", tuple)()


def _repeats(dataset):
    inputs = _inputs_of(dataset)
    if "Zip" in type(dataset).__name__:  # beside others, one element that is repeated is a constant
        several = [d for d in inputs if not (_is_repeat(d) and _single(d))]
        inputs = several or inputs
    return _is_repeat(dataset) or any(_repeats(d) for d in inputs)


def _is_repeat(dataset):
    return "Repeat" in type(dataset).__name__


def _single(repeated):
    return all(int(d.cardinality()) == 1 for d in _inputs_of(repeated))


def surely_ends(dataset):
    """Whether a `tf.data.Dataset` knows its length, or is made of finite ones by what keeps them
    finite.
    """
    if int(dataset.cardinality()) != -2:
        return int(dataset.cardinality()) >= 0
    if any(kind in type(dataset).__name__ for kind in _OF_UNKNOWN_LENGTH):
        return False
    return all(surely_ends(d) for d in _inputs_of(dataset))


def _opened_stream(dataset, batched, pack):
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
    return Stream(dataset, examples, pack)


def _read_batches(dataset) -> tuple[Any, Any]:
    """All batches of a finite data set, joined. Says so where that takes long."""
    batches, bar, begin = [], None, time.monotonic()
    for batch in dataset:
        batches.append(tree.map_structure(_to_numpy, batch))
        if bar is None and time.monotonic() > begin + _PATIENCE:
            io_utils.print_msg("Reading the data set into memory:")
            bar = keras.utils.Progbar(None, unit_name="batch")
        if bar is not None:
            bar.update(len(batches))
    if not batches:
        raise ValueError("`x` and `y` are empty.")
    if any(not isinstance(b, (tuple, list)) or len(b) != 2 for b in batches):
        raise TypeError("`x` must give batches (x, y).")
    return tree.map_structure(lambda *parts: np.concatenate(parts), *map(tuple, batches))


def _to_numpy(value):
    return keras.ops.convert_to_numpy(value) if keras.ops.is_tensor(value) else np.asarray(value)
