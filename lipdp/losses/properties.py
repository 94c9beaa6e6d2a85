"""Properties of a loss that a step needs: its gradient bound, values one by one, and targets."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import losses as keras_losses
from keras import ops

from lipdp.losses.base import BoundedLoss, align_targets
from lipdp.losses.certified import EMMA, GloRo
from lipdp.losses.entropies import (
    BinaryCrossentropy,
    CategoricalCrossentropy,
    Focal,
    LogitAnnealing,
    SparseCategoricalCrossentropy,
)
from lipdp.losses.joint import Joint
from lipdp.losses.margins import BinaryHKR, BinaryKR, MulticlassHinge, MulticlassHKR, MulticlassKR
from lipdp.losses.similarity import CosineSimilarity

__all__ = [
    "Loss",
    "as_written",
    "check_axis",
    "check_target_shape",
    "check_targets",
    "get",
    "gradient_bound",
    "is_known",
    "of_output",
    "per_example",
    "probabilities",
    "readable_targets",
    "takes_logits",
]


Loss = keras.losses.Loss | Callable[[Any, Any], Any] | Joint

_OWN_BINARY = (BinaryCrossentropy, BinaryKR, BinaryHKR)
_OWN_MULTICLASS = (
    SparseCategoricalCrossentropy,
    CategoricalCrossentropy,
    Focal,
    LogitAnnealing,
    EMMA,
    GloRo,
    MulticlassHinge,
    MulticlassKR,
    MulticlassHKR,
)
_OWN = (*_OWN_BINARY, *_OWN_MULTICLASS, CosineSimilarity)
# Keras' losses that treat examples one by one, and what their targets are.
_KERAS = {
    keras_losses.SparseCategoricalCrossentropy: "labels",
    keras_losses.CategoricalCrossentropy: "simplex",
    keras_losses.CategoricalHinge: "simplex",
    keras_losses.BinaryCrossentropy: "unit",
    keras_losses.Hinge: "signs",
    keras_losses.SquaredHinge: "signs",
    keras_losses.MeanAbsoluteError: "values",
    keras_losses.Huber: "values",
    keras_losses.LogCosh: "values",
    keras_losses.MeanSquaredError: "values",
    keras_losses.Poisson: "values",
    keras_losses.KLDivergence: "values",
}
_KERAS_HINGES = (keras_losses.Hinge, keras_losses.SquaredHinge)


def gradient_bound(loss: Loss, output_shape: Sequence[int]) -> float:
    """Bound of the norm of one example's loss gradient with respect to the network's output.

    It holds for targets as the loss wants them; the private step clips at it, so that it also
    holds for all others. Of Keras' own: cross-entropies on logits and the categorical hinge √2,
    and over `C` outputs the mean absolute error, the hinge, log-cosh and the binary cross-entropy
    on logits `1/√C`, Huber's loss `delta/√C`.

    Args:
        loss: a loss of this module, or a Keras one (on logits).
        output_shape: shape of the network's output for one example, classes last.

    Returns:
        A float; infinite for a loss whose gradient is unbounded or unknown.

    Raises:
        ValueError: the loss was made for another number of outputs.

    >>> gradient_bound(keras.losses.MeanSquaredError(), (1,))
    inf
    """
    if isinstance(loss, Joint):
        return loss.bound({name: gradient_bound(one, own) for name, one, own, _ in loss.parts()})
    classes, positions = output_shape[-1], math.prod(output_shape[:-1])
    one = 1.0 + 1e-6  # room for the rounding of the loss gradient itself
    if isinstance(loss, BoundedLoss):
        # A subclass that changes the loss alone is not believed.
        believed = _definer(loss, "call") is _definer(loss, "bound")
        believed = believed and not {"call", "bound"} & vars(loss).keys()
        bound = loss.bound(classes) if believed else math.inf
    else:
        bound = _keras_bound(loss, classes)
    return bound * one / math.sqrt(positions)


def _definer(loss, method):
    return next(kind for kind in type(loss).__mro__ if method in vars(kind))


def _keras_bound(loss, classes):
    kind = type(loss)
    if not is_known(loss):
        return math.inf
    if kind is keras_losses.CategoricalHinge:
        return math.sqrt(2.0)
    if kind in (keras_losses.SparseCategoricalCrossentropy, keras_losses.CategoricalCrossentropy):
        plain = loss.from_logits and getattr(loss, "axis", -1) == -1
        return math.sqrt(2.0) if plain else math.inf
    # In the mean over the outputs each has a slope of at most 1, or delta.
    if kind in (keras_losses.MeanAbsoluteError, keras_losses.Hinge, keras_losses.LogCosh):
        return 1.0 / math.sqrt(classes)
    if kind is keras_losses.BinaryCrossentropy:
        plain = loss.from_logits and loss.axis == -1
        return 1.0 / math.sqrt(classes) if plain else math.inf
    if kind is keras_losses.Huber:
        # Keras keeps delta with the arguments of the function that the loss wraps.
        return loss._fn_kwargs["delta"] / math.sqrt(classes)
    return math.inf


def takes_logits(loss: Loss) -> bool:
    """True if the loss has a softmax or sigmoid of its own, or wants outputs without bounds.

    >>> takes_logits(keras.losses.BinaryCrossentropy(from_logits=True)), takes_logits(BinaryKR())
    (True, False)
    """
    return bool(getattr(loss, "takes_logits", getattr(loss, "from_logits", False)))


_BINARY = (
    *_OWN_BINARY,
    keras_losses.BinaryCrossentropy,
    keras_losses.BinaryFocalCrossentropy,
)
_MULTICLASS = (
    *_OWN_MULTICLASS,
    keras_losses.SparseCategoricalCrossentropy,
    keras_losses.CategoricalCrossentropy,
    keras_losses.CategoricalFocalCrossentropy,
)


def probabilities(loss: Loss, outputs: Any) -> Any:
    """Probabilities of the classes, from the outputs that a loss is for: what metrics with a
    threshold of 0.5 read. The outputs themselves, where they are no logits.

    Args:
        loss: a loss; its temperature multiplies the logits.
        outputs: `(batch, ..., classes)`.

    >>> outputs = ops.array([[0.0], [20.0]])
    >>> [float(p) for p in probabilities(BinaryCrossentropy(), outputs)[:, 0]]
    [0.5, 1.0]
    >>> probabilities(keras.losses.MeanSquaredError(), outputs) is outputs
    True
    """
    if not isinstance(loss, BoundedLoss) and not takes_logits(loss):
        return outputs
    temperature = getattr(loss, "temperature", 1.0)
    if isinstance(loss, _BINARY):
        return ops.sigmoid(temperature * outputs)
    if isinstance(loss, _MULTICLASS):
        return ops.softmax(temperature * outputs, axis=-1)
    return outputs


_BY_NAME = {
    "sparse_categorical_crossentropy": SparseCategoricalCrossentropy,
    "categorical_crossentropy": CategoricalCrossentropy,
    "binary_crossentropy": BinaryCrossentropy,
    "focal": Focal,
    "logit_annealing": LogitAnnealing,
    "emma": EMMA,
    "gloro": GloRo,
    "multiclass_hinge": MulticlassHinge,
    "multiclass_kr": MulticlassKR,
    "multiclass_hkr": MulticlassHKR,
    "binary_kr": BinaryKR,
    "binary_hkr": BinaryHKR,
    "cosine_similarity": CosineSimilarity,
    "categorical_hinge": keras_losses.CategoricalHinge,
    "hinge": keras_losses.Hinge,
    "huber": keras_losses.Huber,
    "log_cosh": keras_losses.LogCosh,
    "mean_absolute_error": keras_losses.MeanAbsoluteError,
    "mae": keras_losses.MeanAbsoluteError,
    "mean_squared_error": keras_losses.MeanSquaredError,
    "mse": keras_losses.MeanSquaredError,
}


def get(loss: str | Loss) -> Loss:
    """The loss that `compile(loss=...)` names.

    The names of cross-entropies mean those on logits: a network that ends in a softmax would
    hide from the bound how steep it is. Keras' other names are accepted too; what they name has
    no known bound.

    Raises:
        ValueError: an unknown name, or none.
        TypeError: not a name, a loss or a function `(y_true, y_pred) -> per-example losses`.

    >>> type(get("binary_crossentropy")).__name__
    'BinaryCrossentropy'
    """
    accepted = f"one of the names {', '.join(_BY_NAME)}, a keras.losses.Loss or a function"
    if loss is None:
        raise ValueError(f"`loss` must be given: {accepted}.")
    if isinstance(loss, str):
        if loss in _BY_NAME:
            return _BY_NAME[loss]()
        try:
            return keras.losses.get(loss)
        except ValueError:
            raise ValueError(f"`loss` must be {accepted}; got {loss!r}.") from None
    if isinstance(loss, keras.losses.Loss) or (callable(loss) and not isinstance(loss, type)):
        return loss
    raise TypeError(
        f"`loss` must be {accepted}; got {loss if isinstance(loss, type) else type(loss)}. "
        "Several losses are for a network with several outputs, one for each."
    )


def per_example(loss: Loss, y_true: Any, y_pred: Any) -> Any:
    """Loss of each example, of shape `(batch,)`, whatever the loss' `reduction`.

    A loss that is not known to treat examples one by one is called with batches of one: no
    loss can mix them.

    Args:
        loss: a Keras loss or a function `(y_true, y_pred)`.
        y_true: targets, `(batch, ...)`; of a `Joint` loss a dict of them, by output.
        y_pred: outputs, `(batch, ...)`.

    Raises:
        ValueError: targets of a shape that the loss does not take for these outputs.

    >>> y, z = ops.array([0, 1]), ops.zeros((2, 2))
    >>> [round(float(v), 3) for v in per_example(SparseCategoricalCrossentropy(), y, z)]
    [0.693, 0.693]
    """
    if isinstance(loss, Joint):
        z = loss.outputs.apart(y_pred)
        return sum(w * per_example(one, y_true[k], z[k]) for k, one, _, w in loss.parts() if w)
    check_axis(loss, len(y_pred.shape))
    check_target_shape(loss, y_true.shape[1:], y_pred.shape[1:])
    if is_known(loss):
        values = as_written(loss, y_true, y_pred)
    else:
        values = ops.vectorized_map(
            lambda pair: ops.mean(as_written(loss, pair[0][None], pair[1][None])), (y_true, y_pred)
        )
    return ops.mean(ops.reshape(values, (ops.shape(values)[0], -1)), axis=1)


def as_written(loss: Loss, y_true: Any, y_pred: Any) -> Any:
    """What a loss gives for a batch, called once: `(batch, ...)`, if it treats examples one by one.

    >>> as_written(lambda y, z: ops.mean(z), ops.zeros((2, 1)), ops.ones((2, 1))).shape == ()
    True
    """
    if _targets(loss) != "labels":
        y_true = align_targets(ops.cast(y_true, y_pred.dtype), y_pred)
    if type(loss) in _KERAS_HINGES:
        y_true = _as_signs(y_true)
    return (loss.call if isinstance(loss, keras.losses.Loss) else loss)(y_true, y_pred)


def is_known(loss: Loss) -> bool:
    """True if the loss is known to treat examples one by one: a loss of this package or of Keras,
    and not one of which the function was replaced.

    >>> is_known(SparseCategoricalCrossentropy()), is_known(keras_losses.Dice())
    (True, False)
    """
    if isinstance(loss, Joint):
        return all(is_known(one) for _, one, _, _ in loss.parts())
    if type(loss) not in (*_OWN, *_KERAS) or {"call", "bound"} & vars(loss).keys():
        return False
    return type(loss) in _OWN or loss.fn is type(loss)().fn


def check_axis(loss: Loss, rank: int) -> None:
    """Refuses a loss along another axis than the last, which may be that of the examples.

    Args:
        loss: as in `per_example`.
        rank: of the outputs, with the batch axis.

    Raises:
        ValueError: the loss has such an `axis`.

    >>> check_axis(keras_losses.CategoricalCrossentropy(axis=0), 2)
    Traceback (most recent call last):
        ...
    ValueError: `loss` must work along the last axis, axis=-1; got axis=0, which ...
    """
    for axis in (getattr(loss, "axis", -1), getattr(loss, "_fn_kwargs", {}).get("axis", -1)):
        if isinstance(axis, int) and axis not in (-1, rank - 1):
            raise ValueError(
                f"`loss` must work along the last axis, axis=-1; got axis={axis}, which may mix "
                "the examples of a batch."
            )


def _as_signs(y_true):
    """Labels in {0, 1} as {−1, 1}, example by example.

    Keras' hinges look at the whole batch to tell the two apart, so that one example's label could
    change what the others' mean. What comes out of here they leave alone.
    """
    axes = tuple(range(1, len(y_true.shape)))
    binary = ops.logical_or(ops.equal(y_true, 0), ops.equal(y_true, 1))
    return ops.where(ops.all(binary, axis=axes, keepdims=True), 2.0 * y_true - 1.0, y_true)


def readable_targets(loss: Loss, y_true: Any, output_shape: Sequence[int]) -> Any:
    """Targets as a step may read them: a label out of range becomes the nearest one in range.

    One that is not would end a step with an error on one backend, and make NaN on another.

    Args:
        loss: as in `per_example`.
        y_true: targets, `(batch, ...)`.
        output_shape: shape of the network's output for one example.

    >>> loss = SparseCategoricalCrossentropy()
    >>> [int(y) for y in readable_targets(loss, ops.array([-7, 1, 9]), (3,))]
    [0, 1, 2]
    """
    if isinstance(loss, Joint):
        return {k: readable_targets(one, y_true[k], own) for k, one, own, _ in loss.parts()}
    if _targets(loss) != "labels":
        return y_true
    largest = output_shape[-1] - 1
    if "float" in keras.backend.standardize_dtype(y_true.dtype):
        # What a cast makes of others depends on the backend.
        y_true = ops.where(ops.isfinite(y_true), ops.clip(y_true, -(2.0**30), 2.0**30), 0.0)
    labels = ops.cast(y_true, "int32")
    nearest = ops.clip(labels, 0, largest)
    ignored = getattr(loss, "ignore_class", None)
    return nearest if ignored is None else ops.where(ops.equal(labels, ignored), labels, nearest)


def _targets(loss):
    if isinstance(loss, BoundedLoss):
        return loss.targets
    return _KERAS.get(type(loss))


def check_target_shape(
    loss: Loss, shape: Sequence[int | None], output_shape: Sequence[int | None]
) -> None:
    """Refuses targets of a shape that the loss does not take for these outputs.

    One that is merely broadcast could set one example's target beside another's output.

    Args:
        loss: as in `per_example`. One that is not known is called with examples one by one, and may
            take whatever it wants.
        shape: of the targets of one example; sizes that are not known are None.
        output_shape: of the network's output for one example.

    Raises:
        ValueError: the shape does not fit.

    >>> check_target_shape(SparseCategoricalCrossentropy(), (1,), (3,))
    >>> check_target_shape(SparseCategoricalCrossentropy(), (3,), (3,))
    Traceback (most recent call last):
        ...
    ValueError: `y` must have one label for an example: shape () or (1,); got (3,).
    """
    if isinstance(loss, Joint):
        for name, one, own, _ in loss.parts():
            of_output(name, check_target_shape, one, shape[name], own)
        return
    shape, output_shape, targets = tuple(shape), tuple(output_shape), _targets(loss)
    if targets is None:
        return
    positions = output_shape[:-1]
    if targets == "labels":
        accepted = [positions, (*positions, 1)]
        what = "one label for an example" if not positions else "one label for each position"
    else:
        accepted = [output_shape] + ([positions] if output_shape[-1:] == (1,) else [])
        what = "for each example the shape of the outputs"
    if not any(
        len(shape) == len(wanted)
        and all(n == m or n is None or m is None for n, m in zip(shape, wanted, strict=True))
        for wanted in accepted
    ):
        raise ValueError(
            f"`y` must have {what}: shape {' or '.join(map(str, accepted))}; got {shape}."
        )


def of_output(name: str, check: Callable, *arguments: Any) -> Any:
    """What a check of one of several outputs gives.

    Raises:
        ValueError: the check's, which names the output.
    """
    try:
        return check(*arguments)
    except ValueError as error:
        raise ValueError(f"Output {name!r}: {error}") from error


def check_targets(loss: Loss, y: np.ndarray, output_shape: Sequence[int]) -> None:
    """Refuses targets the loss cannot mean.

    Args:
        loss: as in `gradient_bound`.
        y: NumPy targets, `(examples, ...)`; of a `Joint` loss a dict of them, by output.
        output_shape: shape of the network's output for one example.

    Raises:
        ValueError: labels out of range, rows outside the simplex or longer than the loss allows,
            values outside [0, 1] or [−1, 1], numbers that are not finite, or a shape that does
            not fit.
    """
    if isinstance(loss, Joint):
        for name, one, own, _ in loss.parts():
            of_output(name, check_targets, one, y[name], own)
        return
    check_target_shape(loss, y.shape[1:], output_shape)
    classes = output_shape[-1]
    if y.dtype.kind == "f" and not np.isfinite(y).all():
        raise ValueError("`y` holds NaN or infinite values.")
    targets = _targets(loss)
    if targets is None:
        return
    if targets == "labels":
        if y.size and (y.min() < 0 or y.max() >= classes or (y != np.floor(y)).any()):
            raise ValueError(
                f"`y` must hold integer labels from 0 to {classes - 1}, one less than the outputs "
                f"of the network; got values from {y.min()} to {y.max()}."
            )
        return
    least = {"simplex": 0, "unit": 0, "signs": -1}.get(targets, -math.inf)
    most = 1 if math.isfinite(least) else math.inf
    if y.size and (y.min() < least or y.max() > most):
        raise ValueError(
            f"`y` must lie in [{least}, {most}]; got values from {y.min()} to {y.max()}."
        )
    if targets == "simplex" and not np.allclose(y.sum(axis=-1), 1.0, atol=1e-3):
        raise ValueError("`y` must hold distributions: the sum over the last axis must be 1.")
    if targets == "ball" and y.size:
        longest = np.sqrt(np.sum(np.square(y.astype("float64")), axis=-1)).max()
        if longest > loss.max_target_norm * (1 + 1e-6):
            raise ValueError(
                "`y` must hold rows of norm at most `max_target_norm` of the loss, "
                f"{loss.max_target_norm:g}; got a norm of {longest:.6g}."
            )
