"""Thresholds of units that clip their own gradients: settings, and the state of one model."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import keras
from keras import ops

from accountants.validation import check_number, check_probability
from lipdp.training.clipping import split_noise

__all__ = ["LayerThresholds", "PerLayerClip"]


@dataclasses.dataclass(frozen=True)
class PerLayerClip:
    """Each layer clips its own gradient, example by example, in one backward pass.

    Any Keras network whose examples stay apart can be trained so, with no bound on its layers.

    The thresholds follow a quantile of the norms of each layer's gradients: each step also
    releases, for each layer, the noisy fraction `b` of rows within the threshold, jointly with the
    gradients, and moves `C ← C·exp(−learning_rate·(b − quantile))` (Andrew et al., "Differentially
    Private Learning with Adaptive Clipping", NeurIPS 2021; for layers He et al., "Exploring the
    Limits of Differentially Private Deep Learning with Group-wise Clipping", ICLR 2023).

    Args:
        threshold: a fixed one for all layers, in place of adaptive ones.
        quantile: fraction of rows that should pass unclipped.
        initial: threshold of the first step.
        learning_rate: speed in log space.
        count_noise_multiplier: noise of the counts in units of their joint sensitivity, `√L/2` for
            `L` layers; by default it costs 2 % of gradient noise at most.

    Raises:
        ValueError: a value out of range.

    >>> PerLayerClip(quantile=0.7).learning_rate
    0.2
    """

    threshold: float | None = None
    quantile: float = 0.5
    initial: float = 1.0
    learning_rate: float = 0.2
    count_noise_multiplier: float | None = None
    mode: str = "raw"

    def __post_init__(self):
        if not 0 < self.quantile < 1:
            raise ValueError(f"`quantile` must lie strictly in (0, 1); got {self.quantile!r}.")
        for name in ("threshold", "initial", "learning_rate", "count_noise_multiplier"):
            value = getattr(self, name)
            if value is not None:
                check_number(value, name)


@dataclasses.dataclass(frozen=True, eq=False)
class LayerThresholds:
    """The thresholds of one model.

    Args:
        settings: the `PerLayerClip`.
        variable: `(units,)`, the thresholds; the model owns it, so that checkpoints hold it.
    """

    settings: PerLayerClip
    variable: keras.Variable

    @property
    def counts(self) -> int:
        """How many fractions a step counts."""
        return 0 if self.settings.threshold is not None else self.variable.shape[0]

    def current(self) -> Any:
        """The thresholds, `(units,)`."""
        return self.variable.value

    def update(self, fractions: Any) -> None:
        """Moves towards the quantile, from the noisy fractions of rows within the thresholds."""
        move = self.settings.learning_rate * (fractions - self.settings.quantile)
        self.variable.assign(ops.clip(self.variable * ops.exp(-move), 1e-10, 1e10))

    def split(self, noise_multiplier: float, expected_batch_size: float) -> tuple[float, float]:
        """(multiplier of the gradients, multiplier of the counts) whose joint one is given."""
        if not self.counts:
            return noise_multiplier, 0.0
        per_count = expected_batch_size / math.sqrt(self.counts)
        return split_noise(
            noise_multiplier, per_count, self.settings.count_noise_multiplier
        )
