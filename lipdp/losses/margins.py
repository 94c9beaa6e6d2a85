"""Losses that are linear in the logits, or piecewise so: hinges and Kantorovich–Rubinstein.

The priors of a Kantorovich–Rubinstein loss are public constants. Class counts of a batch, or of
the private data, would let one label change the gradients of all examples.
"""

import math
from collections.abc import Sequence

import keras
import numpy as np
from keras import ops

from accountants.validation import check_choice, check_number
from lipdp.losses.base import BoundedLoss, align_targets, one_hot

__all__ = ["BinaryHKR", "BinaryKR", "MulticlassHKR", "MulticlassHinge", "MulticlassKR"]


@keras.saving.register_keras_serializable("lipdp")
class MulticlassHinge(BoundedLoss):
    """`Σ_{c≠y} max(0, margin − z_y + z_c)/C`, or divided by `C − 1`.

    With `k` active classes the gradient has `k` entries of 1 and one of `−k`, over the divisor:
    at most `√((C−1)/C)·√C·√C/divisor`, which is `√((C−1)·C)/divisor`.

    Args:
        margin: distance that is asked for.
        divisor: `"classes"` for `C`, `"others"` for `C − 1`.

    Shapes: labels `(batch, ...)` of integers in `[0, C)`; logits `(batch, ..., C)`.

    Raises:
        ValueError: an argument is out of range.

    >>> round(MulticlassHinge().bound(10), 4)
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
        self.margin = check_number(margin, "margin", zero=True)
        self.divisor = check_choice(divisor, "divisor", ("classes", "others"))

    def call(self, y_true, y_pred):
        slack = _slack(one_hot(y_true, y_pred), y_pred, self.margin)
        return slack / (y_pred.shape[-1] - (self.divisor == "others"))

    def bound(self, classes: int) -> float:
        divisor = classes - (self.divisor == "others")
        return math.sqrt(classes * (classes - 1)) / divisor if divisor else 0.0

    def get_config(self) -> dict:
        return {**super().get_config(), "margin": self.margin, "divisor": self.divisor}


@keras.saving.register_keras_serializable("lipdp")
class MulticlassKR(BoundedLoss):
    """Kantorovich–Rubinstein: `−(1/C)·Σ_c z_c·(1[y=c]/π_c − 1[y≠c]/(1−π_c))`.

    In expectation, and with the true priors, it is minus the mean over the classes of the gap of
    `z_c` between class `c` and the rest, which over 1-Lipschitz functions is the Wasserstein
    distance between the two (Serrurier et al., CVPR 2021). It is linear: the gradient of label
    `y` has the norm `(1/C)·√(1/π_y² + Σ_{c≠y} 1/(1−π_c)²)`, and the bound is the largest of
    these; `√(C/(C−1))` for equal priors.

    Args:
        priors: probability of each class: public constants, never counted in the private data.
            By default they are equal.

    Shapes: labels `(batch, ...)` of integers in `[0, C)`; logits `(batch, ..., C)`.

    Raises:
        ValueError: `priors` are not positive numbers with sum 1, or not one for each output.

    >>> round(MulticlassKR().bound(10), 4)
    1.0541
    >>> round(MulticlassKR(priors=[0.9, 0.1]).bound(2), 4)
    7.0711
    """

    takes_logits = False

    def __init__(
        self,
        priors: Sequence[float] | None = None,
        reduction: str = "sum_over_batch_size",
        name: str = "multiclass_kr",
    ) -> None:
        super().__init__(name=name, reduction=reduction)
        self.priors = _check_priors(priors)

    def call(self, y_true, y_pred):
        own, other = self._slopes(y_pred.shape[-1])
        hot = one_hot(y_true, y_pred)
        return ops.sum(y_pred * ((1.0 - hot) * other - hot * own), axis=-1)

    def bound(self, classes: int) -> float:
        own, other = self._slopes(classes)
        return _largest_norm(own, other)

    def _slopes(self, classes):
        """Size of the slope of each logit where the class is the example's own, and where not."""
        priors = np.full(classes, 1.0 / classes) if self.priors is None else np.array(self.priors)
        if len(priors) != classes:
            raise ValueError(
                f"`priors` must hold one number for each of the {classes} outputs; got "
                f"{len(priors)}."
            )
        if classes < 2:
            raise ValueError(
                f"{type(self).__name__} needs two outputs or more; with one take a Binary loss."
            )
        return 1.0 / (classes * priors), 1.0 / (classes * (1.0 - priors))

    def get_config(self) -> dict:
        return {**super().get_config(), "priors": self.priors}


@keras.saving.register_keras_serializable("lipdp")
class MulticlassHKR(MulticlassKR):
    """`MulticlassKR + α·MulticlassHinge`: a large gap, and a margin that separates.

    Hinge and Kantorovich–Rubinstein push each logit the same way, so the gradient is longest where
    all classes are active; the bound is the largest norm over the labels of that sum of the two.

    Args:
        alpha: `α`, weight of the hinge.
        margin: distance that the hinge asks for.
        priors: as for `MulticlassKR`.
        divisor: of the hinge, `"classes"` for `C`, `"others"` for `C − 1`.

    Shapes: as for `MulticlassKR`.

    Raises:
        ValueError: an argument is out of range.

    >>> round(MulticlassHKR(alpha=2.0).bound(10), 4)
    2.9515
    """

    def __init__(
        self,
        alpha: float = 10.0,
        margin: float = 1.0,
        priors: Sequence[float] | None = None,
        divisor: str = "classes",
        reduction: str = "sum_over_batch_size",
        name: str = "multiclass_hkr",
    ) -> None:
        super().__init__(priors, reduction=reduction, name=name)
        self.alpha = check_number(alpha, "alpha", zero=True)
        self.hinge = MulticlassHinge(margin, divisor)

    def call(self, y_true, y_pred):
        hinge = self.hinge.call(y_true, y_pred)
        return MulticlassKR.call(self, y_true, y_pred) + self.alpha * hinge

    def bound(self, classes: int) -> float:
        own, other = self._slopes(classes)
        weight = self.alpha / (classes - (self.hinge.divisor == "others"))
        return _largest_norm(own + weight * (classes - 1), other + weight)

    def get_config(self) -> dict:
        hinge = {"margin": self.hinge.margin, "divisor": self.hinge.divisor}
        return {**super().get_config(), "alpha": self.alpha, **hinge}


@keras.saving.register_keras_serializable("lipdp")
class BinaryKR(BoundedLoss):
    """Kantorovich–Rubinstein of two classes: `−z·(y/π − (1−y)/(1−π))`, mean over the outputs.

    The slope of an output lies between `−1/π` and `1/(1−π)`, so the gradient is at most
    `max(1/π, 1/(1−π))/√C`.

    Args:
        prior: `π`, probability of the label 1: a public constant, never counted in the private
            data.

    Shapes: targets in [0, 1] and outputs `(batch, ..., C)`.

    Raises:
        ValueError: `prior` does not lie strictly between 0 and 1.

    >>> BinaryKR(prior=0.2).bound(1)
    5.0
    """

    targets = "unit"
    takes_logits = False

    def __init__(
        self,
        prior: float = 0.5,
        reduction: str = "sum_over_batch_size",
        name: str = "binary_kr",
    ) -> None:
        super().__init__(name=name, reduction=reduction)
        self.prior = check_number(prior, "prior", below=1.0)

    def call(self, y_true, y_pred):
        y_true = align_targets(y_true, y_pred)
        slope = (1.0 - y_true) / (1.0 - self.prior) - y_true / self.prior
        return ops.mean(slope * y_pred, axis=-1)

    def bound(self, classes: int) -> float:
        return max(1.0 / self.prior, 1.0 / (1.0 - self.prior)) / math.sqrt(classes)

    def get_config(self) -> dict:
        return {**super().get_config(), "prior": self.prior}


@keras.saving.register_keras_serializable("lipdp")
class BinaryHKR(BinaryKR):
    """`BinaryKR + α·max(0, margin − (2y−1)·z)`, mean over the outputs.

    Both slopes point the same way, and the hinge's is at most 1: the gradient is at most
    `(max(1/π, 1/(1−π)) + α)/√C`.

    Args:
        alpha: `α`, weight of the hinge.
        margin: distance that the hinge asks for.
        prior: as for `BinaryKR`.

    Shapes: as for `BinaryKR`.

    Raises:
        ValueError: an argument is out of range.

    >>> BinaryHKR(alpha=3.0).bound(1)
    5.0
    """

    def __init__(
        self,
        alpha: float = 10.0,
        margin: float = 1.0,
        prior: float = 0.5,
        reduction: str = "sum_over_batch_size",
        name: str = "binary_hkr",
    ) -> None:
        super().__init__(prior, reduction=reduction, name=name)
        self.alpha = check_number(alpha, "alpha", zero=True)
        self.margin = check_number(margin, "margin", zero=True)

    def call(self, y_true, y_pred):
        sign = 2.0 * align_targets(y_true, y_pred) - 1.0
        hinge = ops.mean(ops.relu(self.margin - sign * y_pred), axis=-1)
        return BinaryKR.call(self, y_true, y_pred) + self.alpha * hinge

    def bound(self, classes: int) -> float:
        return BinaryKR.bound(self, classes) + self.alpha / math.sqrt(classes)

    def get_config(self) -> dict:
        return {**super().get_config(), "alpha": self.alpha, "margin": self.margin}


def _slack(hot, logits, margin):
    """`Σ_{c≠y} max(0, margin − z_y + z_c)`."""
    own = ops.sum(hot * logits, axis=-1, keepdims=True)
    return ops.sum((1.0 - hot) * ops.relu(margin - own + logits), axis=-1)


def _largest_norm(own, other):
    """Largest norm over y of the vector with `own` at y and `other` elsewhere."""
    return float(np.sqrt(np.max(own**2 + np.sum(other**2) - other**2)))


def _check_priors(priors):
    if priors is None:
        return None
    try:
        values = np.asarray(priors, "float64")
    except (TypeError, ValueError):
        values = np.array(math.nan)
    # Written so that NaN is refused.
    if not (values.ndim == 1 and (values > 0).all() and abs(values.sum() - 1.0) <= 1e-6):
        raise ValueError(
            "`priors` must be positive numbers with sum 1, one for each class, or None for equal "
            f"ones; got {priors!r}."
        )
    return [float(value) for value in values]
