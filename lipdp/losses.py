"""Losses with a known bound on their gradient, and the gradient bound of Keras' own.

All take logits. The gradient in question is that of one example's loss with respect to the
network's output; where an example has several positions its loss is their mean.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import losses as keras_losses
from keras import ops

__all__ = [
    "BinaryCrossentropy",
    "CategoricalCrossentropy",
    "MulticlassHinge",
    "SparseCategoricalCrossentropy",
    "check_targets",
    "get",
    "gradient_bound",
    "per_example",
]


Loss = keras.losses.Loss | Callable[[Any, Any], Any]


def _check_temperature(temperature):
    if not isinstance(temperature, (int, float)) or not 0 < temperature < math.inf:
        raise ValueError(f"`temperature` must be a positive, finite number; got {temperature!r}.")
    return float(temperature)


class _Tempered(keras.losses.Loss):
    """`ℓ(τz)/τ`: the gradient bound of `ℓ`, at a slope that is reached τ times sooner."""

    def __init__(
        self,
        temperature: float = 1.0,
        reduction: str = "sum_over_batch_size",
        name: str | None = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction)
        self.temperature = _check_temperature(temperature)

    def get_config(self) -> dict:
        return {**super().get_config(), "temperature": self.temperature}


@keras.saving.register_keras_serializable("lipdp")
class SparseCategoricalCrossentropy(_Tempered):
    """Softmax cross-entropy `CE(τz)/τ` of integer labels; gradient at most √2 an example.

    The gradient is `softmax(τz) − e_y`, whose norm is at most √2. A large temperature lets a
    network of small Lipschitz constant be confident.

    Args:
        temperature: `τ`.

    Shapes: labels `(batch, ...)` of integers in `[0, classes)`; logits `(batch, ..., classes)`.

    >>> loss = SparseCategoricalCrossentropy(temperature=10.0)
    >>> round(gradient_bound(loss, (3,)), 4)
    1.4142
    """

    def call(self, y_true, y_pred):
        return (
            ops.sparse_categorical_crossentropy(
                _squeeze(y_true, y_pred), self.temperature * y_pred, from_logits=True
            )
            / self.temperature
        )


@keras.saving.register_keras_serializable("lipdp")
class CategoricalCrossentropy(_Tempered):
    """Softmax cross-entropy `CE(τz)/τ` of targets in the simplex; gradient at most √2.

    Args:
        temperature: `τ`.

    Shapes: targets and logits `(batch, ..., classes)`.

    >>> round(gradient_bound(CategoricalCrossentropy(), (3,)), 4)
    1.4142
    """

    def call(self, y_true, y_pred):
        return (
            ops.categorical_crossentropy(y_true, self.temperature * y_pred, from_logits=True)
            / self.temperature
        )


@keras.saving.register_keras_serializable("lipdp")
class BinaryCrossentropy(_Tempered):
    """Sigmoid cross-entropy `BCE(τz)/τ`, mean over the outputs; gradient at most `1/√C`.

    Args:
        temperature: `τ`.

    Shapes: targets in [0, 1] and logits `(batch, ..., C)`.

    >>> gradient_bound(BinaryCrossentropy(), (4,)) >= 0.5
    True
    """

    def call(self, y_true, y_pred):
        entropy = ops.binary_crossentropy(y_true, self.temperature * y_pred, from_logits=True)
        return ops.mean(entropy, axis=-1) / self.temperature


@keras.saving.register_keras_serializable("lipdp")
class MulticlassHinge(keras.losses.Loss):
    """`Σ_{c≠y} max(0, margin − z_y + z_c)/C`, or divided by `C − 1`.

    With `k` active classes the gradient has `k` entries of 1 and one of `−k`, over the divisor:
    at most `√((C−1)/C)` for the divisor `C` and `√(C/(C−1))` for `C − 1`.

    Args:
        margin: distance that is asked for.
        divisor: `"classes"` for `C`, `"others"` for `C − 1`.

    Shapes: labels `(batch, ...)` of integers in `[0, C)`; logits `(batch, ..., C)`.

    >>> round(gradient_bound(MulticlassHinge(), (10,)), 4)
    0.9487
    """

    def __init__(
        self,
        margin: float = 1.0,
        divisor: str = "classes",
        reduction: str = "sum_over_batch_size",
        name: str = "multi_hinge",
    ) -> None:
        super().__init__(name=name, reduction=reduction)
        if divisor not in ("classes", "others"):
            raise ValueError(f"`divisor` must be 'classes' or 'others'; got {divisor!r}.")
        self.margin = float(margin)
        self.divisor = divisor

    def call(self, y_true, y_pred):
        classes = y_pred.shape[-1]
        hot = ops.one_hot(ops.cast(_squeeze(y_true, y_pred), "int32"), classes)
        hot = ops.cast(hot, y_pred.dtype)
        own = ops.sum(hot * y_pred, axis=-1, keepdims=True)
        slack = (1.0 - hot) * ops.relu(self.margin - own + y_pred)
        return ops.sum(slack, axis=-1) / (classes - (self.divisor == "others"))

    def get_config(self) -> dict:
        return {**super().get_config(), "margin": self.margin, "divisor": self.divisor}


def _squeeze(y_true, y_pred):
    """Labels of shape (..., 1) as (...)."""
    if len(y_true.shape) == len(y_pred.shape) and y_true.shape[-1] == 1:
        return ops.squeeze(y_true, axis=-1)
    return y_true


# --- bounds -----------------------------------------------------------------------------------

_SPARSE = (
    SparseCategoricalCrossentropy,
    keras_losses.SparseCategoricalCrossentropy,
    MulticlassHinge,
)
_SIMPLEX = (
    CategoricalCrossentropy,
    keras_losses.CategoricalCrossentropy,
    keras_losses.CategoricalHinge,
)
_UNIT = (BinaryCrossentropy, keras_losses.BinaryCrossentropy)
# Each output's slope is at most 1, in the mean over the outputs.
_MEAN_OF_UNIT_SLOPES = (
    *_UNIT,
    keras_losses.MeanAbsoluteError,
    keras_losses.Hinge,
    keras_losses.LogCosh,
)
# What Keras computes for each example by itself, so that no loop over examples is needed.
_SEPARATE = (
    *_SPARSE,
    *_SIMPLEX,
    *_MEAN_OF_UNIT_SLOPES,
    keras_losses.Huber,
    keras_losses.MeanSquaredError,
    keras_losses.SquaredHinge,
    keras_losses.Poisson,
    keras_losses.KLDivergence,
)


def gradient_bound(loss: Loss, output_shape: Sequence[int]) -> float:
    """Bound of the norm of one example's loss gradient with respect to the network's output.

    It holds for targets as the loss wants them; the private step clips at it, so that it also
    holds for all others.

    Args:
        loss: a loss of this module, or a Keras one (on logits).
        output_shape: shape of the network's output for one example, classes last.

    Returns:
        A float; infinite for a loss whose gradient is unbounded or unknown.

    >>> gradient_bound(keras.losses.MeanSquaredError(), (1,))
    inf
    """
    classes, positions = output_shape[-1], math.prod(output_shape[:-1])
    one = 1.0 + 1e-6  # room for the rounding of the loss gradient itself
    kind = type(loss)
    if kind in (
        SparseCategoricalCrossentropy,
        CategoricalCrossentropy,
        keras_losses.CategoricalHinge,
    ):
        bound = math.sqrt(2.0)
    elif kind in (keras_losses.SparseCategoricalCrossentropy, keras_losses.CategoricalCrossentropy):
        plain = loss.from_logits and getattr(loss, "axis", -1) == -1
        bound = math.sqrt(2.0) if plain else math.inf
    elif kind is MulticlassHinge:
        divisor = classes - (loss.divisor == "others")
        bound = math.sqrt(classes * (classes - 1)) / divisor if divisor else 0.0
    elif kind in _MEAN_OF_UNIT_SLOPES:
        logits = kind is not keras_losses.BinaryCrossentropy or loss.from_logits
        bound = 1.0 / math.sqrt(classes) if logits else math.inf
    elif kind is keras_losses.Huber:
        # Keras keeps delta with the arguments of the function that the loss wraps.
        bound = loss._fn_kwargs["delta"] / math.sqrt(classes)
    else:
        bound = math.inf
    return bound * one / math.sqrt(positions)


_BY_NAME = {
    "sparse_categorical_crossentropy": SparseCategoricalCrossentropy,
    "categorical_crossentropy": CategoricalCrossentropy,
    "binary_crossentropy": BinaryCrossentropy,
    "multiclass_hinge": MulticlassHinge,
}


def get(loss: str | Loss) -> Loss:
    """The loss that `compile(loss=...)` names.

    The names of cross-entropies mean those on logits: a network that ends in a softmax would
    hide from the bound how steep it is.

    Raises:
        ValueError: an unknown name, or none.
        TypeError: not a name, a loss or a function `(y_true, y_pred) -> per-example losses`.

    >>> type(get("binary_crossentropy")).__name__
    'BinaryCrossentropy'
    """
    if loss is None:
        raise ValueError("`loss` must be given: a name, a keras.losses.Loss or a function.")
    if isinstance(loss, str):
        return _BY_NAME[loss]() if loss in _BY_NAME else keras.losses.get(loss)
    if isinstance(loss, keras.losses.Loss) or callable(loss):
        return loss
    raise TypeError(
        f"`loss` must be one name, keras.losses.Loss or function; got {type(loss).__name__}. "
        "Several losses or outputs are not supported."
    )


def per_example(loss: Loss, y_true: Any, y_pred: Any) -> Any:
    """Loss of each example, of shape `(batch,)`, whatever the loss' `reduction`.

    A loss that is not known to treat examples one by one is called with batches of one: no
    loss can mix them.

    Args:
        loss: a Keras loss or a function `(y_true, y_pred)`.
        y_true: targets, `(batch, ...)`.
        y_pred: outputs, `(batch, ...)`.

    >>> y, z = ops.array([0, 1]), ops.zeros((2, 2))
    >>> [round(float(v), 3) for v in per_example(SparseCategoricalCrossentropy(), y, z)]
    [0.693, 0.693]
    """
    function = loss.call if isinstance(loss, keras.losses.Loss) else loss
    if not isinstance(loss, _SPARSE):
        y_true = ops.cast(y_true, y_pred.dtype)
    if type(loss) in _SEPARATE:
        values = function(y_true, y_pred)
    else:
        values = ops.vectorized_map(
            lambda pair: ops.mean(function(pair[0][None], pair[1][None])), (y_true, y_pred)
        )
    return ops.mean(ops.reshape(values, (ops.shape(values)[0], -1)), axis=1)


def check_targets(loss: Loss, y: np.ndarray, output_shape: Sequence[int]) -> None:
    """Refuses targets the loss cannot mean.

    Args:
        loss: as in `gradient_bound`.
        y: NumPy targets, `(examples, ...)`.
        output_shape: shape of the network's output for one example.

    Raises:
        ValueError: labels out of range, rows outside the simplex, values outside [0, 1], numbers
            that are not finite, or a shape that does not fit.
    """
    classes = output_shape[-1]
    if y.dtype.kind == "f" and not np.isfinite(y).all():
        raise ValueError("`y` holds NaN or infinite values.")
    if isinstance(loss, _SPARSE):
        shape = y.shape[1:-1] if y.ndim > len(output_shape) and y.shape[-1] == 1 else y.shape[1:]
        if tuple(shape) != tuple(output_shape[:-1]):
            raise ValueError(
                f"`y` must hold one label for each of the positions {tuple(output_shape[:-1])} of "
                f"an example; got shape {y.shape}."
            )
        if y.size and (y.min() < 0 or y.max() >= classes or (y != np.floor(y)).any()):
            raise ValueError(
                f"`y` must hold integer labels from 0 to {classes - 1}, one less than the outputs "
                f"of the network; got values from {y.min()} to {y.max()}."
            )
    elif isinstance(loss, (*_SIMPLEX, *_UNIT)):
        if y.shape[1:] != tuple(output_shape) and y.shape[1:] + (1,) != tuple(output_shape):
            raise ValueError(
                f"`y` must have the shape of the outputs, {tuple(output_shape)}, for each example; "
                f"got shape {y.shape}."
            )
        if y.size and (y.min() < 0 or y.max() > 1):
            raise ValueError(f"`y` must lie in [0, 1]; got values from {y.min()} to {y.max()}.")
        if isinstance(loss, _SIMPLEX) and not np.allclose(y.sum(axis=-1), 1.0, atol=1e-3):
            raise ValueError("`y` must hold distributions: the sum over the last axis must be 1.")
