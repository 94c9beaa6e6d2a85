"""Metrics for `compile(metrics=[...])`."""

import math
from typing import Any

import keras
from keras import ops

from accountants.validation import check_number
from lipdp.losses.base import one_hot, squeeze_labels

__all__ = ["CertifiedAccuracy"]


@keras.saving.register_keras_serializable("lipdp")
class CertifiedAccuracy(keras.metrics.MeanMetricWrapper):
    """Share of the examples whose label is predicted wherever they move within a radius.

    `z_y − z_c` is `√2·L`-Lipschitz, so those whose margin is above `√2·L·radius`. For a number to
    rely on use `lipdp.robustness.certified_accuracy`, which measures `L`, is tighter, and makes
    room for rounding; like every metric, on private batches it is not covered by the guarantee.

    Args:
        radius: in the norm and the units of the inputs.
        lipschitz: `L`, Lipschitz constant of the network; 1 for the networks of `lipdp.models`.

    Shapes: labels `(batch,)` of integers; logits `(batch, classes)`.

    Raises:
        ValueError: an argument is negative or not finite.

    >>> metric = CertifiedAccuracy(radius=0.5)
    >>> metric.update_state([0, 1], [[1.0, 0.0], [0.0, 0.5]])
    >>> float(metric.result())
    0.5
    """

    def __init__(
        self,
        radius: float,
        lipschitz: float = 1.0,
        name: str = "certified_accuracy",
        dtype: Any = None,
    ) -> None:
        super().__init__(self._certified, name=name, dtype=dtype)
        self.radius = check_number(radius, "radius", zero=True)
        self.lipschitz = check_number(lipschitz, "lipschitz", zero=True)

    def _certified(self, y_true, y_pred):
        logits = ops.convert_to_tensor(y_pred)
        own = one_hot(squeeze_labels(ops.convert_to_tensor(y_true), logits), logits)
        others = ops.max(ops.where(own > 0, -math.inf, logits), axis=-1)
        margins = ops.sum(own * logits, axis=-1) - others
        return ops.cast(margins > math.sqrt(2.0) * self.lipschitz * self.radius, logits.dtype)

    def get_config(self) -> dict:
        return {
            "name": self.name,
            "dtype": self.dtype,
            "radius": self.radius,
            "lipschitz": self.lipschitz,
        }
