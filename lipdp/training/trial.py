"""Trials on made-up rows: what would fail within a step fails before one is paid for.

Each has a few rows of the right shapes through a part of the step, leaves no trace in variables,
and reads nothing of the data.
"""

import contextlib
import functools
import inspect
import itertools
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops, tree
from keras.src.backend import KerasTensor, compute_output_spec
from keras.src.trainers.data_adapters import get_data_adapter

from lipdp import losses
from lipdp.autodiff import compiled, gradient, raw_writes
from lipdp.data.augmentation import Augmentation
from lipdp.data.opening import as_array, surely_ends
from lipdp.inputs import like_inputs
from lipdp.inspection.check import Assignments

__all__ = [
    "build_losses",
    "over_positions",
    "try_augmentation",
    "try_loss",
    "try_metrics",
    "try_network",
    "try_validation",
]

_ROWS = 4
_KNOWN = ("keras.", "lipdp.")  # modules whose functions write nowhere but into Keras variables


def try_loss(
    loss: losses.Loss,
    output_shape: Sequence[int],
    target: Any = None,
    in_range: Any = False,
) -> None:
    """Refuses a loss of somebody's own that gives an example another value among others than
    alone. A step calls it with examples one by one, and what it says of a whole batch, such as how
    close two examples are, would be lost without a word. One without a gradient is warned of.

    Args:
        loss: as in `per_example`. One that is known to treat examples one by one is not tried.
        output_shape: shape of the network's output for one example.
        target: shape and type of the target of one example. Where it is not known yet some usual
            ones are tried, and a loss that takes none of them is left for later. For several
            outputs a dict of such pairs, by name.
        in_range: whether all labels are known to be among the classes; for several outputs a dict,
            by name.

    Raises:
        ValueError: it mixes examples, gives one number for all of them, assigns to a variable, or
            cannot be computed.

    >>> try_loss(lambda y, z: ops.mean(z), (3,))
    Traceback (most recent call last):
        ...
    ValueError: `loss` must give each example a value of its own, shape (batch,) ...
    """
    if not isinstance(loss, losses.Joint):
        without = [] if _tried_loss(loss, output_shape, target, in_range) else ["`loss`"]
    else:
        without = [
            f"`loss` of output {name!r}"
            for name, one, shape, _ in loss.parts()
            if not losses.of_output(
                name,
                _tried_loss,
                *(one, shape),
                None if target is None else target[name],
                bool(in_range) and in_range[name],
            )
        ]
    for name in without:
        warnings.warn(
            f"{name} has a gradient of zero at every output that was tried: nothing would be "
            "learnt from it. It must be differentiable; operations such as argmax, round and "
            "comparisons are not.",
            stacklevel=3,
        )


def _tried_loss(loss, output_shape, target, in_range):
    """Tries the loss of one output; tells whether it has a gradient, as far as it was tried."""
    losses.check_axis(loss, len(output_shape) + 1)
    if losses.is_known(loss):
        return True
    for shape, dtype in _usual_targets(output_shape) if target is None else [target]:
        y = _made_up_targets(loss, shape, dtype, output_shape[-1])
        try:
            _refuse_raw_writes(
                functools.partial(losses.as_written, loss), y, _made_up(output_shape)
            )
            values = _values_alone(loss, y, output_shape)
        except _Assigns as error:
            raise ValueError(f"`loss` {error}") from None
        except Exception as error:
            if target is None:
                continue
            raise ValueError(
                f"`loss` cannot be computed for outputs of shape {('batch', *output_shape)} and "
                f"targets of shape {('batch', *shape)}, {np.dtype(dtype)}: "
                f"{type(error).__name__}: {error}"
            ) from error
        _check_values(values)
        if target is not None and not in_range and np.dtype(dtype).kind in "iu":
            _try_labels_out_of_range(loss, y, output_shape)
        return _has_slopes(loss, y, output_shape)
    return True


def _usual_targets(output_shape):
    yield output_shape, "float32"
    yield output_shape[:-1], "int32"
    if len(output_shape) > 1:
        yield (), "int32"


def _made_up(shape, rows=_ROWS):
    """Different numbers in [−1, 1], the same in every call."""
    size = rows * int(np.prod(shape))
    return np.cos(1.0 + np.arange(size) ** 1.5).reshape(rows, *shape).astype("float32")


def _made_up_targets(loss, shape, dtype, classes):
    shape, dtype = tuple(shape), np.dtype(dtype)
    if dtype.kind in "iub":
        labels = np.arange(_ROWS * int(np.prod(shape))) % max(2, classes)
        return labels.reshape(_ROWS, *shape).astype(dtype)
    if getattr(loss, "targets", None) == "labels":
        return (np.abs(_made_up(shape)) > 0.5).astype("float32")
    if shape[-1:] == (classes,) and classes > 1:  # distributions
        return np.eye(classes, dtype="float32")[
            np.abs(_made_up(shape[:-1]) * 99).astype(int) % classes
        ]
    return np.abs(_made_up(shape))


def _values_alone(loss, y, output_shape):
    """What a loss gives for some batches of the made-up rows, and for each of their rows alone."""

    def values(y, z):
        pairs = []
        for rows, scale in ((_ROWS, 1.0), (_ROWS, 30.0), (2, 1.0)):
            some = scale * z[:rows]
            with _assigning_only():
                whole = losses.as_written(loss, y[:rows], some)
                alone = [
                    losses.as_written(loss, y[i : i + 1], some[i : i + 1]) for i in range(rows)
                ]
            pairs.append((whole, alone))
        return pairs

    return _run(values, y, _made_up(output_shape))


@contextlib.contextmanager
def _assigning_only(own=()):
    """A scope in which no variable changes, and at whose end only own ones may have been assigned.

    Raises:
        _Assigns: another one was.
    """
    with Assignments() as scope:
        yield scope
    for other in scope.assigned.keys() - set(map(id, own)):
        raise _Assigns(repr(scope.assigned[other].path))


def _refuse_raw_writes(function, *arrays):
    """Refuses a function that writes into a `tf.Variable` itself, which no scope of Keras sees.

    Raises:
        _Assigns: it does.
    """

    def scoped(*tensors):
        with keras.StatelessScope():
            function(*tensors)

    for operation in sorted(raw_writes(scoped, arrays)):
        raise _Assigns(f"of the backend, by {operation},")


def _check_values(pairs):
    for whole, alone in pairs:
        whole = ops.convert_to_numpy(whole)
        alone = [ops.convert_to_numpy(value) for value in alone]
        if whole.shape[:1] != (len(alone),):
            raise ValueError(
                "`loss` must give each example a value of its own, shape (batch,) or (batch, "
                f"positions); got shape {whole.shape} for {len(alone)} examples. Leave out the "
                "mean over the batch: ops.mean(values, axis=-1), and for a Keras loss name its "
                "`axis`."
            )
        same = all(value.size == whole[0].size for value in alone) and np.allclose(
            whole.ravel(), np.ravel(alone), rtol=1e-3, atol=1e-5, equal_nan=True
        )
        if not same:
            raise ValueError(
                "`loss` gives an example another value among others than alone: it mixes the "
                "examples of a batch, as contrastive losses do, and one of them would move the "
                "gradients of all. Give it what belongs together as one example, or use a loss "
                "that looks at one example only."
            )


def _has_slopes(loss, y, output_shape):
    """Whether it has a gradient; a step would spend its budget on noise alone where it has none.

    Outputs of any kind are tried, and such as probabilities are: a loss of these cuts off others.
    """

    def slopes(y, z):
        size = ops.abs(z)
        shares = size / (1.0 + ops.sum(size, axis=-1, keepdims=True))
        with _assigning_only():
            return [
                gradient(lambda z: losses.per_example(loss, y, z), outputs)[1]
                for outputs in (z, 30.0 * z, shares)
            ]

    return any(map(np.any, map(ops.convert_to_numpy, _run(slopes, y, _made_up(output_shape)))))


def _try_labels_out_of_range(loss, y, output_shape):
    labels = np.resize([-1, output_shape[-1], np.iinfo(y.dtype).max], y.shape).astype(y.dtype)
    try:
        _run(lambda y, z: losses.as_written(loss, y, z), labels, _made_up(output_shape))
    except Exception as error:
        raise ValueError(
            "`loss` ends in an error where a label is out of range, which would tell that such an "
            f"example is there: begin it with `y_true = ops.clip(y_true, 0, {output_shape[-1] - 1})"
            f"`, or use a loss of lipdp.losses. It said {type(error).__name__}."
        ) from error


def over_positions(weights: Any, outputs: Any) -> Any:
    """A weight for each position of an example, as metrics that flatten their arguments want it."""
    positions = tuple(outputs.shape[1:-1])
    if not positions:
        return weights
    rows = ops.shape(weights)[0]
    weights = ops.reshape(weights, (-1,) + (1,) * len(positions))
    return ops.broadcast_to(weights, (rows, *positions))


def try_metrics(model: Any, target: Any) -> None:
    """Refuses metrics that cannot be computed, that count rows which only fill up a batch, or that
    assign to other variables than their own.

    Args:
        model: a compiled `PrivateModel`.
        target: shape and type of the target of one example; for several outputs a dict of such
            pairs, by name.

    Raises:
        TypeError: a metric does not take `sample_weight`, which marks the rows that count.
        ValueError: another metric that does not fit.
    """
    metrics = model._compile_metrics
    if metrics is None:
        return
    y, z = _made_up_pair(model, target)
    if not metrics.built:
        metrics.build(*tree.map_structure(ops.convert_to_tensor, (y, z)))
    others = {
        id(v) for part in (model.network, model.optimizer, model.noise) for v in part.variables
    }
    others |= set(map(id, model.weights))
    for name, *lists in metrics.of_outputs():
        for metric in [metric for found in lists if found is not None for metric in found.metrics]:
            own = (y, z) if name is None else (y[name], z[name])
            _try_metric(metric, *own, others)


def build_losses(model: Any, target: Any) -> None:
    """Makes the variables in which the losses of several outputs are added up, each by itself."""
    if model.outputs is not None and not model._compile_loss.built:
        y, z = _made_up_pair(model, target)
        model._compile_loss.build(model.outputs.as_given(y), model.outputs.as_given(z))


def _made_up_pair(model, target):
    """Targets and outputs; of several outputs each, by name."""
    loss = model.private_loss
    if not isinstance(loss, losses.Joint):
        shape = model.graph.output_shape[1:]
        return _made_up_targets(loss, *target, shape[-1]), _made_up(shape)
    pairs = {
        name: (_made_up_targets(one, *target[name], shape[-1]), _made_up(shape))
        for name, one, shape, _ in loss.parts()
    }
    return ({name: pair[i] for name, pair in pairs.items()} for i in (0, 1))


class _Unfit(Exception):
    """What a metric lacks."""


class _Assigns(Exception):
    """That somebody's function changes a variable."""

    def __init__(self, variable):
        super().__init__(
            f"assigns to the variable {variable} within a step. What it writes tells of the batch "
            "without noise, and no bound holds for it. Leave that out, or do it in a callback."
        )


def _try_metric(metric, y, z, others):
    try:
        if not getattr(metric, "_built", True):  # makes its variables in its first update
            metric.update_state(y, z, sample_weight=np.zeros(_ROWS, "float32"))
            metric.reset_state()
        # A metric owns what is in an attribute of it, also a weight of the network.
        _update_metric(metric, y, z, [v for v in metric.variables if id(v) not in others])
    except _Assigns as error:
        raise ValueError(f"The metric {metric.name!r} {error}") from None
    except Exception as error:
        said = "" if isinstance(error, _Unfit) else f" {type(error).__name__}:"
        raise (TypeError if isinstance(error, _Unfit) else ValueError)(
            f"The metric {metric.name!r} does not fit outputs of shape {('batch', *z.shape[1:])} "
            f"and targets of shape {('batch', *y.shape[1:])}:{said} {error}"
        ) from error


def _update_metric(metric, y, z, own):
    parameters = inspect.signature(metric.update_state).parameters.values()
    if not any(p.name == "sample_weight" or p.kind is p.VAR_KEYWORD for p in parameters):
        raise _Unfit(
            "its `update_state` must take `sample_weight`, which is 0 for rows that only fill up a "
            "batch."
        )

    def state_after(rows, counted):
        def update(y, z):
            weights = np.zeros(rows, "float32")
            weights[:counted] = 1.0
            with _assigning_only(own) as scope:
                metric.update_state(y, z, sample_weight=over_positions(weights, z))
                metric.result()
                return [scope.get_current_value(v) for v in scope.assigned.values()]

        return update

    makers = type(metric), getattr(metric, "_fn", type(metric))  # Keras wraps a function
    if all(maker.__module__.startswith(_KNOWN) for maker in makers):
        _run(state_after(_ROWS, _ROWS), y, z, values=False)
        return
    _refuse_raw_writes(state_after(_ROWS, _ROWS), y, z)
    filled = _run(state_after(_ROWS, 2), y, z)
    plain = _run(state_after(2, 2), y[:2], z[:2])
    for a, b in zip(filled, plain, strict=True):
        a, b = ops.convert_to_numpy(a), ops.convert_to_numpy(b)
        if not np.allclose(a, b, rtol=1e-3, atol=1e-5, equal_nan=True):
            raise _Unfit(
                "it counts rows whose `sample_weight` is 0, which only fill up a batch. Multiply "
                "what it adds up by `sample_weight`."
            )


def try_network(network: keras.Model) -> None:
    """Refuses layers of somebody's own that write into a `tf.Variable` itself when they are called.

    Those that assign to Keras variables are found when the network is checked.

    Raises:
        ValueError: one does.
    """
    if all(map(_is_known, network._flatten_layers(include_self=False))):
        return
    shapes = [tuple(8 if n is None else n for n in t.shape[1:]) for t in network.inputs]
    rows = [_made_up(s).astype(t.dtype) for s, t in zip(shapes, network.inputs, strict=True)]
    try:
        _refuse_raw_writes(lambda *x: network(like_inputs(network, list(x)), training=True), *rows)
    except _Assigns as error:
        raise ValueError(f"A layer {error}") from None


def _is_known(layer):
    """Whether a layer is Keras' or lipdp's, and so are the functions that it was given."""
    functions = [value for value in vars(layer).values() if inspect.isroutine(value)]
    return all(maker.__module__.startswith(_KNOWN) for maker in (type(layer), *functions))


def try_augmentation(augmentation: Augmentation, network: keras.Model) -> None:
    """Refuses an augmentation whose views mix examples, or do not fit the network.

    Raises:
        ValueError: it does.
    """
    shape = tuple(8 if n is None else n for n in network.inputs[0].shape[1:])
    x = np.abs(_made_up(shape))

    def views(x, other):
        found = []
        for images in (x, other):
            with keras.StatelessScope():  # which leaves the layers' seeds as they were
                found.append(augmentation(images))
        return found

    first, second = map(ops.convert_to_numpy, _run(views, x, np.concatenate([x[:1], 1.0 - x[1:]])))
    wanted = (_ROWS * augmentation.views, *shape)
    if first.shape != wanted:
        raise ValueError(
            f"`augmentation` makes views of shape {first.shape[1:]} of examples of shape {shape}, "
            f"and the network takes {tuple(network.inputs[0].shape[1:])}."
        )
    own = slice(augmentation.views)
    if not np.allclose(first[own], second[own], atol=1e-5, equal_nan=True):
        raise ValueError("`augmentation` mixes the examples of a batch; leave out the layer.")


def try_validation(
    model: Any, data: Any, batch_size: int | None = None, steps: int | None = None
) -> Any:
    """Refuses validation data whose first batches cannot be evaluated, or that may be endless. It
    is public, and may be read.

    Args:
        model: a compiled `PrivateModel`.
        data, batch_size, steps: `validation_data`, `validation_batch_size` and `validation_steps`
            of `fit`.

    Returns:
        The data. Of a generator a new one, which begins with the batches that were tried.

    Raises:
        ValueError: it cannot.
    """
    try:
        batches, data, ends = _first_batches(model, data, batch_size)
        for batch in batches:
            if not isinstance(batch, tuple) or len(batch) < 2 or batch[1] is None:
                raise ValueError("it must have targets, too, in tuples: (x, y).")
            if all(isinstance(y, np.ndarray) for y in tree.flatten(batch[1])):
                _check_targets(model, batch[1])
            compute_output_spec(_evaluation_of(model), *tree.map_structure(_without_values, batch))
        if not ends and steps is None:
            raise ValueError("it may be endless; say validation_steps=...")
    except Exception as error:
        raise ValueError(
            f"`validation_data` cannot be evaluated: {type(error).__name__}: {error}"
        ) from error
    return data


def _first_batches(model, data, batch_size):
    """The first batches, the data as they were, and whether these are known to end."""
    if hasattr(data, "element_spec"):
        return [data.element_spec], data, surely_ends(data)
    if isinstance(data, keras.utils.PyDataset):
        if data.num_batches == 0:
            raise ValueError("it has no batches.")
        first = tree.map_structure(np.asarray, tuple(data[0]))
        return [first], data, data.num_batches is not None
    if isinstance(data, types.GeneratorType):
        first = list(itertools.islice(data, 2))  # as many as Keras looks at
        if not first:
            raise ValueError("it has no batches.")
        again = (batch for batch in itertools.chain(first, data))
        return [tree.map_structure(np.asarray, batch) for batch in first], again, False
    if isinstance(data, (tuple, list, dict)) or hasattr(data, "shape"):
        return [_first_rows(model, data, batch_size)], data, True
    get_data_adapter(data)  # raises where Keras does not know it
    return [tree.map_structure(np.asarray, tuple(next(iter(data))))], data, hasattr(data, "__len__")


def _first_rows(model, data, batch_size):
    parts = keras.utils.unpack_x_y_sample_weight(tuple(data) if isinstance(data, list) else data)
    lengths = {len(part) for part in tree.flatten(parts) if part is not None}
    if len(lengths) != 1:
        raise ValueError(f"it must have one row an example; got {sorted(lengths)} rows.")
    if parts[1] is None:
        raise ValueError("it must have targets, too: (x, y).")
    _check_targets(model, parts[1])
    first = tuple(part for part in parts if part is not None)
    return tree.map_structure(lambda part: np.asarray(part[: batch_size or 32]), first)


def _check_targets(model, y):
    if model.outputs is None:
        y = as_array(y, "y")
    else:
        named = model.outputs.named(y, "y")
        y = {name: as_array(v, f"y[{name!r}]") for name, v in named.items()}
    losses.check_targets(model.private_loss, y, model.graph.output_shape[1:])


def _without_values(array):
    dtype = np.dtype(getattr(array.dtype, "as_numpy_dtype", array.dtype))
    dtype = "float32" if dtype == np.float64 else dtype.name
    return KerasTensor(tuple(array.shape), dtype)


def _evaluation_of(model):
    def evaluated(x, y, weights=None):
        outputs = model(x, training=False)
        model._compute_loss(x=x, y=y, y_pred=outputs, sample_weight=weights, training=False)
        return model.compute_metrics(x, y, outputs, sample_weight=weights)

    return evaluated


def _run(function: Callable, *arrays: np.ndarray, values: bool = True) -> Any:
    """Runs it once as fast as the backend can; without values, where these do not matter."""
    if keras.backend.backend() == "tensorflow":  # which runs at once what others compile
        return function(*map(ops.convert_to_tensor, arrays))
    if not values:
        return compute_output_spec(function, *map(_without_values, arrays))
    return compiled(function)(*map(ops.convert_to_tensor, arrays))
