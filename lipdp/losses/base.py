"""Base classes of the losses."""

import keras
from keras import ops

from accountants.validation import check_number


class BoundedLoss(keras.losses.Loss):
    """A loss that knows a bound on its gradient; the base of a loss of your own.

    A subclass defines, side by side, `call(y_true, y_pred)`, which gives each example or position
    a loss of its own, and `bound(classes)`. A further subclass that changes only `call` is not
    believed. The private step clips at the bound, so that a bound which is too small costs
    accuracy and not privacy.

    Attributes:
        targets: what `check_targets` asks of `y`: `"labels"`, integers in `[0, classes)`;
            `"simplex"`, distributions; `"unit"`, values in [0, 1]; `"signs"`, values in [−1, 1];
            `"ball"`, rows no longer than `max_target_norm`; `"values"`, any finite numbers.
        takes_logits: whether a softmax or sigmoid at the network's end is a mistake.

    >>> class Linear(BoundedLoss):
    ...     targets = "signs"
    ...     def call(self, y_true, y_pred):
    ...         return ops.mean(-y_true * y_pred, axis=-1)
    ...     def bound(self, classes):
    ...         return classes**-0.5
    >>> from lipdp import losses
    >>> round(losses.gradient_bound(Linear(), (4,)), 4)
    0.5
    """

    targets = "labels"
    takes_logits = True

    def bound(self, classes: int) -> float:
        """Bound of the norm of the gradient at one position with so many outputs."""
        raise NotImplementedError(f"{type(self).__name__} must define bound(classes).")


class Tempered(BoundedLoss):
    """`ℓ(τz)/τ`: the gradient bound of `ℓ`, at a slope that is reached τ times sooner."""

    def __init__(
        self,
        temperature: float = 1.0,
        reduction: str = "sum_over_batch_size",
        name: str | None = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction)
        self.temperature = check_number(temperature, "temperature")

    def get_config(self) -> dict:
        return {**super().get_config(), "temperature": self.temperature}


def squeeze_labels(y_true, y_pred):
    """Labels of shape (..., 1) as (...)."""
    if len(y_true.shape) == len(y_pred.shape) and y_true.shape[-1] == 1:
        return ops.squeeze(y_true, axis=-1)
    return y_true


def align_targets(y_true, y_pred):
    """Targets `(...)` for outputs `(..., 1)` with that axis: nothing is broadcast over examples."""
    if len(y_true.shape) + 1 == len(y_pred.shape) and y_pred.shape[-1] == 1:
        return ops.expand_dims(y_true, -1)
    return y_true


def one_hot(y_true, y_pred):
    """Labels as one-hot rows beside the logits, in their dtype."""
    labels = ops.cast(squeeze_labels(y_true, y_pred), "int32")
    return ops.cast(ops.one_hot(labels, y_pred.shape[-1]), y_pred.dtype)
