"""Cosine similarity, bounded also near the origin."""

import keras
from keras import ops

from accountants.validation import check_number
from lipdp.losses.base import BoundedLoss, align_targets

__all__ = ["CosineSimilarity"]


@keras.saving.register_keras_serializable("lipdp")
class CosineSimilarity(BoundedLoss):
    """`−⟨y, z⟩/max(‖z‖, K)`; gradient at most `max ‖y‖/K`.

    Within the ball of radius `K` the loss is linear, of slope `‖y‖/K`. Outside, the gradient is
    the part of `y` across `z`, over `‖z‖ > K`. The plain cosine (`K` = 0) has no bound.

    Args:
        min_norm: `K`, the length below which an output is not normalised.
        max_target_norm: largest `‖y‖`; longer targets are refused.

    Shapes: targets and outputs `(batch, ..., features)`; the norm is that of the last axis.

    Raises:
        ValueError: an argument is not a positive, finite number.

    >>> CosineSimilarity(min_norm=2.0).bound(10)
    0.5
    """

    targets = "ball"
    takes_logits = False

    def __init__(
        self,
        min_norm: float = 1.0,
        max_target_norm: float = 1.0,
        reduction: str = "sum_over_batch_size",
        name: str = "cosine_similarity",
    ) -> None:
        super().__init__(name=name, reduction=reduction)
        self.min_norm = check_number(min_norm, "min_norm")
        self.max_target_norm = check_number(max_target_norm, "max_target_norm")

    def call(self, y_true, y_pred):
        # As in the ball projection: no norm whose slope at 0 is not a number.
        square = ops.sum(ops.square(y_pred), axis=-1)
        scale = ops.rsqrt(ops.maximum(square, self.min_norm**2))
        return -ops.sum(align_targets(y_true, y_pred) * y_pred, axis=-1) * scale

    def bound(self, classes: int) -> float:
        return self.max_target_norm / self.min_norm

    def get_config(self) -> dict:
        norms = {"min_norm": self.min_norm, "max_target_norm": self.max_target_norm}
        return {**super().get_config(), **norms}
