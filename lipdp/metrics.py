"""Metrics for `compile(metrics=[...])`, and what Keras' own see of logits."""

import math
from collections.abc import Iterator
from typing import Any

import keras
from keras import ops
from keras.src.trainers.compile_utils import CompileMetrics

from accountants.validation import check_number
from lipdp import losses
from lipdp.losses.base import one_hot, squeeze_labels

__all__ = ["CertifiedAccuracy", "MetricsOfLogits"]

# Keras' metrics that read probabilities. What a subclass reads is its own affair.
_OF_PROBABILITIES = (
    keras.metrics.AUC,
    keras.metrics.BinaryAccuracy,
    keras.metrics.BinaryCrossentropy,
    keras.metrics.BinaryIoU,
    keras.metrics.CategoricalCrossentropy,
    keras.metrics.F1Score,
    keras.metrics.FBetaScore,
    keras.metrics.FalseNegatives,
    keras.metrics.FalsePositives,
    keras.metrics.KLDivergence,
    keras.metrics.Precision,
    keras.metrics.PrecisionAtRecall,
    keras.metrics.Recall,
    keras.metrics.RecallAtPrecision,
    keras.metrics.SensitivityAtSpecificity,
    keras.metrics.SparseCategoricalCrossentropy,
    keras.metrics.SpecificityAtSensitivity,
    keras.metrics.TrueNegatives,
    keras.metrics.TruePositives,
)
_FUNCTIONS_OF_PROBABILITIES = (
    keras.metrics.binary_accuracy,
    keras.metrics.binary_crossentropy,
    keras.metrics.categorical_crossentropy,
    keras.metrics.kl_divergence,
    keras.metrics.sparse_categorical_crossentropy,
)


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


class MetricsOfLogits(CompileMetrics):
    """The metrics of a compiled model. Those of Keras that read probabilities get them, where the
    loss takes logits: the 0.5 of an accuracy, a precision or a recall then means what it says.

    A metric that was made for logits gets logits: one with `from_logits=True`, or with a threshold
    that is no probability, such as 0. Metrics of one's own get what the network gives.

    Args:
        metrics, weighted_metrics: as `compile` takes them.
        loss: of the output, or of all of them.
        output_names: of several outputs.
    """

    def __init__(
        self, metrics: Any, weighted_metrics: Any, loss: Any, output_names: list[str] | None = None
    ) -> None:
        super().__init__(metrics, weighted_metrics, output_names=output_names)
        self._loss = loss

    def build(self, y_true: Any, y_pred: Any) -> None:
        super().build(y_true, y_pred)
        for name, *lists in self.of_outputs():
            loss = self._loss if name is None else self._loss.losses[name]
            for found in lists:
                if found is not None:
                    found.metrics = [
                        _OnProbabilities(metric, loss) if _reads_probabilities(metric) else metric
                        for metric in found.metrics
                    ]

    def of_outputs(self) -> Iterator[tuple[str | None, Any, Any]]:
        """Of each output its name, its metrics, and those that are weighted; lists of Keras, or
        None. A single output has no name.
        """
        names = self.output_names or [None]
        return zip(names, self._flat_metrics, self._flat_weighted_metrics, strict=True)


def _reads_probabilities(metric):
    if type(metric) is keras.metrics.MeanMetricWrapper:
        return metric._fn in _FUNCTIONS_OF_PROBABILITIES
    if type(metric) not in _OF_PROBABILITIES:
        return False
    settings = metric.get_config()
    if settings.get("from_logits"):
        return False
    given = settings.get("thresholds", settings.get("threshold"))
    given = given if isinstance(given, (list, tuple)) else [given]
    return all(t is None or 0 < t < 1 for t in given) or isinstance(metric, keras.metrics.AUC)


class _OnProbabilities(keras.metrics.Metric):
    """A metric that is given probabilities in place of the outputs."""

    def __init__(self, metric, loss):
        super().__init__(name=metric.name, dtype=metric.dtype)
        self.metric = metric
        self._loss = loss

    @property
    def _built(self):
        return getattr(self.metric, "_built", True)

    def update_state(self, y_true, y_pred, sample_weight=None):
        y_pred = losses.probabilities(self._loss, y_pred)
        return self.metric.update_state(y_true, y_pred, sample_weight=sample_weight)

    def result(self):
        return self.metric.result()

    def reset_state(self):
        self.metric.reset_state()
