"""Losses that ask for a certified radius: cross-entropy at the logits of the worst neighbour.

A network whose logit differences `z_i − z_j` have the Lipschitz constant `K` cannot change them
by more than `r·K` within the radius `r`. `K` is a constant here, held up by the projections of the
weights. Computed from the weights and trained through, it would add to each weight's gradient
what no bound of this package sees.
"""

import math

import keras
from keras import ops

from accountants.validation import check_number
from lipdp.losses.base import Tempered, one_hot, squeeze_labels

__all__ = ["EMMA", "GloRo"]


class _Certified(Tempered):
    def __init__(
        self,
        radius: float = 36 / 255,
        lipschitz: float = math.sqrt(2.0),
        temperature: float = 1.0,
        reduction: str = "sum_over_batch_size",
        name: str | None = None,
    ) -> None:
        super().__init__(temperature, reduction=reduction, name=name)
        self.radius = check_number(radius, "radius", zero=True)
        self.lipschitz = check_number(lipschitz, "lipschitz", zero=True)

    def get_config(self) -> dict:
        return {**super().get_config(), "radius": self.radius, "lipschitz": self.lipschitz}


@keras.saving.register_keras_serializable("lipdp")
class EMMA(_Certified):
    """Cross-entropy of `z_c + min(max(z_y − z_c, 0), r·K)` for the other classes `c ≠ y`.

    Every other class is raised by what the worst point within the radius could give it, but not
    above the own class: what is certified already is not pushed further (Hu et al., "Unlocking
    Deterministic Robustness Certification on ImageNet", NeurIPS 2023). What is added is constant
    in the backward pass, so the gradient is `softmax − e_y` at the raised logits: at most √2.

    Args:
        radius: `r`, in the inputs' norm.
        lipschitz: `K`, Lipschitz constant of a difference of two logits; √2 for a 1-Lipschitz
            network.
        temperature: `τ`, as for the cross-entropy.

    Shapes: labels `(batch, ...)` of integers in `[0, classes)`; logits `(batch, ..., classes)`.

    Raises:
        ValueError: an argument is out of range.

    >>> round(EMMA(radius=0.5).bound(10), 4)
    1.4142
    """

    def call(self, y_true, y_pred):
        # The own class keeps its logit: its distance to itself is 0.
        own = ops.sum(one_hot(y_true, y_pred) * y_pred, axis=-1, keepdims=True)
        raised = y_pred + ops.stop_gradient(
            ops.clip(own - y_pred, 0.0, self.radius * self.lipschitz)
        )
        return _entropy(y_true, y_pred, raised, self.temperature)

    def bound(self, classes: int) -> float:
        return math.sqrt(2.0)


@keras.saving.register_keras_serializable("lipdp")
class GloRo(_Certified):
    """Cross-entropy with one more class, whose logit is the second largest plus `r·K`.

    The further class wins wherever the prediction is not certified at the radius (Leino et al.,
    "Globally-Robust Neural Networks", ICML 2021). Its probability joins that of the second class
    in the gradient, which is a distribution minus `e_y`: at most √2. At ties it joins one of them
    or is shared, and a distribution it remains.

    Args:
        radius, lipschitz, temperature: as for `EMMA`.

    Shapes: labels `(batch, ...)` of integers in `[0, classes)`; logits `(batch, ..., classes)`,
    two classes or more.

    Raises:
        ValueError: an argument is out of range, or there is only one class.

    >>> round(GloRo(radius=0.5).bound(10), 4)
    1.4142
    """

    def call(self, y_true, y_pred):
        second = ops.top_k(y_pred, 2)[0][..., 1:]
        raised = ops.concatenate([y_pred, second + self.radius * self.lipschitz], axis=-1)
        return _entropy(y_true, y_pred, raised, self.temperature)

    def bound(self, classes: int) -> float:
        if classes < 2:
            raise ValueError("GloRo needs two outputs or more; got one.")
        return math.sqrt(2.0)


def _entropy(y_true, y_pred, logits, temperature):
    labels = squeeze_labels(y_true, y_pred)
    entropy = ops.sparse_categorical_crossentropy(labels, temperature * logits, from_logits=True)
    return entropy / temperature
