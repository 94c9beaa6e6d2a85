"""Clips: to which norms gradients are cut in a step.

`FixedClip` and `TrackedClip` are for the loss gradient, the rows of a (batch × outputs) array that
`clip_rows` clips; both know the loss' own bound, beyond which nothing needs to be clipped.
`LayerThresholds` are for layers that each clip their own gradients.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from accountants.validation import check_number
from lipdp.local.calls import LayerUnits

__all__ = [
    "AdaptiveClip",
    "FixedClip",
    "LayerThresholds",
    "PerLayerClip",
    "TrackedClip",
    "check_clip",
    "clamp_weights",
    "clip_rows",
    "clip_state",
    "scale_rows",
    "split_noise",
]


def clip_rows(gradients: Any, clip: Any, mask: Any) -> tuple[Any, Any]:
    """Clips each example's loss gradient to norm `clip`.

    Args:
        gradients: `(batch, ...)`, one row an example. A row that is not finite becomes zero.
        clip: the norm, a float or scalar tensor.
        mask: `(batch,)`, 1 for examples and 0 for padding, whose rows become zero.

    Returns:
        The clipped rows, and `(batch,)` indicators of rows within the clip (0 for padding).

    >>> rows, within = clip_rows(ops.array([[3.0, 4.0], [0.3, 0.4]]), 1.0, ops.ones((2,)))
    >>> [round(float(v), 2) for v in rows[0]], [float(v) for v in within]
    ([0.6, 0.8], [0.0, 1.0])
    """
    axes = tuple(range(1, len(gradients.shape)))
    finite = ops.all(ops.isfinite(gradients), axis=axes, keepdims=True)
    # XLA divides by a product with the inverse, and that of 1e38 is 0: rows of such entries would
    # have a norm of 0, and pass.
    rows = ops.where(finite, ops.clip(gradients, -1e37, 1e37), ops.zeros_like(gradients))
    # Divided by its largest entry first, a row's squares do not overflow. Of zeros that is 1: where
    # XLA sees that a gradient is constant, it squares the divisor by itself, and a small one's
    # inverse becomes infinite.
    scale = ops.max(ops.abs(rows), axis=axes, keepdims=True)
    scale = ops.where(scale > 0, scale, 1.0)
    norms = scale * ops.sqrt(ops.sum(ops.square(rows / scale), axis=axes, keepdims=True))
    mask = ops.reshape(ops.cast(ops.greater(mask, 0), rows.dtype), (-1,) + (1,) * len(axes))
    outside = norms > clip
    rows = rows * mask * ops.where(outside, clip / ops.where(outside, norms, 1.0), 1.0)
    within = mask * ops.cast(ops.logical_not(outside), rows.dtype)
    return rows, ops.reshape(within, (-1,))


def clamp_weights(weights: Any, largest: float) -> Any:
    """Weights in `[0, largest]`, whatever they were; one that is not finite becomes 0.

    >>> [float(v) for v in clamp_weights(ops.array([0.5, 9.0, math.nan]), 2.0)]
    [0.5, 2.0, 0.0]
    """
    return ops.where(ops.isfinite(weights), ops.clip(weights, 0.0, largest), 0.0)


def scale_rows(rows: Any, factors: Any) -> Any:
    """Multiplies each example's row by its factor.

    Args:
        rows: `(batch, ...)`.
        factors: `(batch,)`.

    >>> [float(v) for v in scale_rows(ops.ones((3, 1)), ops.array([0.5, 2.0, 1.0]))[:, 0]]
    [0.5, 2.0, 1.0]
    """
    return rows * ops.reshape(factors, (-1,) + (1,) * (len(rows.shape) - 1))


@dataclasses.dataclass(frozen=True)
class AdaptiveClip:
    """Settings of a clip that follows a quantile of the norms of the loss gradients.

    Each step also releases the noisy fraction `b` of the batch's rows within the clip, on the
    same batch and jointly with the gradient, and moves `C ← C·exp(−learning_rate·(b − quantile))`
    (Andrew et al., "Differentially Private Learning with Adaptive Clipping", NeurIPS 2021). The
    indicators are centred by ½, so one example moves their sum by ½. With noise of
    `count_noise_multiplier` times that, the gradient's own multiplier becomes
    `(σ⁻² − count_noise_multiplier⁻²)^(−1/2)`: the joint release is one Gaussian mechanism of
    multiplier `σ`, the one that is accounted.

    Args:
        quantile: fraction of rows that should pass unclipped.
        initial: clip of the first step; by default the loss' gradient bound, or 1.
        learning_rate: speed in log space.
        count_noise_multiplier: noise of the count in units of its sensitivity; by default
            `max(expected batch size / 10, 5·σ)`, which costs 2 % of gradient noise at most.

    Raises:
        ValueError: a value out of range.

    >>> AdaptiveClip(quantile=0.9).learning_rate
    0.2
    """

    quantile: float = 0.5
    initial: float | None = None
    learning_rate: float = 0.2
    count_noise_multiplier: float | None = None

    #: Whether each step releases counts.
    adaptive = True

    def __post_init__(self):
        if not 0 < self.quantile < 1:
            raise ValueError(f"`quantile` must lie strictly in (0, 1); got {self.quantile!r}.")
        for name in ("initial", "learning_rate", "count_noise_multiplier"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"`{name}` must be positive and finite; got {value!r}.")


def split_noise(
    noise_multiplier: float, batch_size: float, count_noise_multiplier: float | None
) -> tuple[float, float]:
    """(multiplier of the gradient, multiplier of the count) whose joint one is given.

    Args:
        noise_multiplier: the joint one.
        batch_size: the expected one, beside which the noise of the count should be small.
        count_noise_multiplier: of the count; by default `max(batch_size/10, 5·noise_multiplier)`.

    Raises:
        ValueError: the count's noise alone uses up the budget.

    >>> [round(v, 3) for v in split_noise(1.0, 256, None)]
    [1.001, 25.6]
    """
    if noise_multiplier == 0:
        return 0.0, 0.0
    count = count_noise_multiplier
    if count is None:
        count = max(batch_size / 10, 5 * noise_multiplier)
    if count <= noise_multiplier:
        raise ValueError(
            f"`count_noise_multiplier` must be above the noise multiplier "
            f"{noise_multiplier:.4g}, or nothing is left for the gradient; got {count:.4g}."
        )
    # (σ⁻² − c⁻²)^(−1/2), written so that it rounds well.
    return noise_multiplier / math.sqrt(1 - (noise_multiplier / count) ** 2), count


@dataclasses.dataclass(frozen=True)
class FixedClip:
    """A clip that is the same in every step.

    Args:
        norm: largest norm of an example's loss gradient; infinite where only the loss bounds it.
        loss_gradient_bound: of the loss.

    >>> FixedClip(2.0, loss_gradient_bound=1.5).current()
    1.5
    """

    norm: float
    loss_gradient_bound: float

    #: How many fractions of rows within the clip a step counts.
    counts = 0

    def current(self) -> float:
        """The norm to which rows are clipped."""
        return min(self.norm, self.loss_gradient_bound)

    def split(self, noise_multiplier: float, expected_batch_size: float) -> tuple[float, float]:
        """All of the noise is the gradient's: nothing is counted."""
        return noise_multiplier, 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class TrackedClip:
    """The clip of one model with an `AdaptiveClip`: its state is a Keras variable.

    Args:
        settings: the `AdaptiveClip`.
        loss_gradient_bound: of the loss.
        variable: the clip; the model owns it, so that checkpoints hold it.
    """

    settings: AdaptiveClip
    loss_gradient_bound: float
    variable: keras.Variable

    counts = 1

    def current(self) -> Any:
        """The norm to which rows are clipped, a scalar tensor."""
        return ops.minimum(self.variable.value, self.loss_gradient_bound)

    def update(self, fraction: Any) -> None:
        """Moves towards the quantile, from the noisy fraction of rows within the clip."""
        moved = self.variable * ops.exp(
            -self.settings.learning_rate * (fraction - self.settings.quantile)
        )
        self.variable.assign(ops.clip(moved, 1e-12, min(self.loss_gradient_bound, 1e30)))

    def split(self, noise_multiplier: float, expected_batch_size: float) -> tuple[float, float]:
        """As `split_noise`."""
        count = self.settings.count_noise_multiplier
        return split_noise(noise_multiplier, expected_batch_size, count)


# Thresholds beyond which squares of norms are no longer numbers of float32.
_RANGE = (1e-9, 1e15)


@dataclasses.dataclass(frozen=True)
class PerLayerClip:
    """Each layer clips its own gradient, example by example, as the backward pass comes by.

    Any Keras network whose examples stay apart is trained as it is: no bounds on its layers are
    needed, and no gradient of a single example is kept. A layer with weights adds to the sum of its
    gradients at most its threshold for each example, so its sensitivity is the threshold.

    By default thresholds follow a quantile of the norms of each layer's gradients. Each step also
    releases, for each layer, the noisy fraction `b` of the batch's gradients within the threshold,
    and moves `C ← C·exp(−learning_rate·(b − quantile))`. One example moves the `L` centred counts
    by `√L/2` in norm, and the noise is split as for `AdaptiveClip` (Andrew et al., "Differentially
    Private Learning with Adaptive Clipping", NeurIPS 2021; thresholds for each layer: He et al.,
    "Exploring the Limits of Differentially Private Deep Learning with Group-wise Clipping", ICLR
    2023).

    The noisy gradient of each layer is divided by its threshold before the optimizer sees it. It
    is as long for a threshold of 10 as for one of 0.001, and the learning rate need not know them.
    With an `allocation` that gives several layers one std, all are divided by the same number, the
    root mean square of the thresholds. Either way the noise of an update depends on no threshold.
    A layer without gradients, an embedding of tokens that never occur, say, is moved by that noise
    alone, however small its threshold has become; freeze it.

    Args:
        threshold: for fixed thresholds a number for all layers, or a dict with one for each layer
            that has trained weights, by its name (its path, where two share a name); None for
            adaptive ones.
        quantile: fraction of an expected batch that should pass unclipped.
        initial: threshold of the first step. One that is too small does no harm: all gradients are
            cut to one norm until it has grown.
        learning_rate: speed in log space. In a step a threshold grows by a factor of at most
            `exp(learning_rate·quantile)`, but for noise, and shrinks by one of at most
            `exp(learning_rate·(1 − quantile))`. It stays between 1e-9 and 1e15.
        count_noise_multiplier: noise of the counts in units of their sensitivity; by default
            `max(expected batch size / 10√L, 5·σ)`, which costs 2 % of gradient noise at most.

    Raises:
        TypeError, ValueError: not a number, or out of range.

    >>> PerLayerClip(quantile=0.7).adaptive, PerLayerClip(threshold=1.0).adaptive
    (True, False)
    """

    threshold: float | Mapping[str, float] | None = None
    quantile: float = 0.7
    initial: float = 0.05
    learning_rate: float = 0.2
    count_noise_multiplier: float | None = None

    def __post_init__(self):
        if not 0 < check_number(self.quantile, "quantile") < 1:
            raise ValueError(f"`quantile` must lie strictly in (0, 1); got {self.quantile!r}.")
        if isinstance(self.threshold, Mapping):
            kept = {n: _check_threshold(v, f"threshold[{n!r}]") for n, v in self.threshold.items()}
            object.__setattr__(self, "threshold", kept)
        elif self.threshold is not None:
            _check_threshold(self.threshold, "threshold")
        _check_threshold(self.initial, "initial")
        check_number(self.learning_rate, "learning_rate")
        if self.count_noise_multiplier is not None:
            check_number(self.count_noise_multiplier, "count_noise_multiplier")

    @property
    def adaptive(self) -> bool:
        """Whether each step releases counts."""
        return self.threshold is None


def _check_threshold(value, name):
    value = check_number(value, name)
    if not _RANGE[0] <= value <= _RANGE[1]:
        raise ValueError(
            f"`{name}` must lie between {_RANGE[0]:g} and {_RANGE[1]:g}, as squares of norms in "
            f"float32 do; got {value!r}."
        )
    return value


@dataclasses.dataclass(frozen=True, eq=False)
class LayerThresholds:
    """The thresholds of one model with a `PerLayerClip`; adaptive ones are a Keras variable.

    Args:
        settings: the `PerLayerClip`.
        units: the layers that are clipped.
        variable: `(layers,)`, adaptive thresholds; the model owns it, so that checkpoints hold it.
            None for fixed ones.

    Raises:
        ValueError: fixed thresholds of other layers than these.
    """

    settings: PerLayerClip
    units: LayerUnits
    variable: keras.Variable | None = None

    #: Nothing is known of the loss.
    loss_gradient_bound = math.inf

    def __post_init__(self):
        given, names = self.settings.threshold, self.units.names()
        if isinstance(given, Mapping) and set(given) != set(names):
            raise ValueError(
                "`clip` must have a threshold for each layer with trained weights, "
                f"{', '.join(map(repr, names))}; got {', '.join(map(repr, given)) or 'none'}."
            )

    @property
    def counts(self) -> int:
        """How many fractions of rows within the thresholds a step counts."""
        return len(self.units.units) if self.settings.adaptive else 0

    def current(self) -> Any:
        """The thresholds, a tensor `(layers,)`."""
        if self.settings.adaptive:
            return ops.clip(self.variable.value, *_RANGE)
        given = self.settings.threshold
        fixed = [given[n] if isinstance(given, Mapping) else given for n in self.units.names()]
        return ops.convert_to_tensor(fixed, "float32")

    def update(self, fractions: Any) -> None:
        """Moves towards the quantile, from the noisy fractions of rows within the thresholds."""
        move = self.settings.learning_rate * (fractions - self.settings.quantile)
        self.variable.assign(ops.clip(self.current() * ops.exp(-move), *_RANGE))

    def split(self, noise_multiplier: float, expected_batch_size: float) -> tuple[float, float]:
        """(multiplier of the gradients, multiplier of the counts), as `split_noise`."""
        if not self.counts:
            return noise_multiplier, 0.0
        batch_size = expected_batch_size / math.sqrt(self.counts)
        return split_noise(noise_multiplier, batch_size, self.settings.count_noise_multiplier)


def check_clip(clip: Any) -> "float | AdaptiveClip | PerLayerClip | None":
    """What `PrivateModel(clip=)` accepts: None, a number above 0, `AdaptiveClip`, `PerLayerClip`.

    Raises:
        TypeError, ValueError: anything else.
    """
    if clip is None or isinstance(clip, (AdaptiveClip, PerLayerClip)):
        return clip
    try:
        return check_number(clip, "clip")
    except (TypeError, ValueError) as error:
        raise type(error)(
            "`clip` must be a number above 0 and finite, lipdp.AdaptiveClip(...) or "
            f"lipdp.PerLayerClip(...); got {clip!r}."
        ) from None


def clip_state(
    model: Any, loss_gradient_bound: float
) -> "FixedClip | TrackedClip | LayerThresholds":
    """The clip of a `PrivateModel` that is being compiled; an adaptive one's variable, which an
    earlier `compile` made, goes on.
    """
    clip, earlier = model.clip, model.clip_state
    if model.units is not None:
        if not clip.adaptive:
            return LayerThresholds(clip, model.units)
        return LayerThresholds(clip, model.units, _thresholds(model, earlier))
    if not isinstance(clip, AdaptiveClip):
        return FixedClip(math.inf if clip is None else clip, loss_gradient_bound)
    if earlier is not None:
        return TrackedClip(clip, loss_gradient_bound, earlier.variable)
    initial = clip.initial
    if initial is None:
        initial = loss_gradient_bound if math.isfinite(loss_gradient_bound) else 1.0
    return TrackedClip(clip, loss_gradient_bound, _variable(model, "clip", initial))


def _thresholds(model, earlier):
    """The variable of the thresholds. Layers that an earlier `compile` found keep theirs."""
    layers = [unit.layer for unit in model.units.units]
    known = {}
    if earlier is not None:
        values = ops.convert_to_numpy(earlier.variable)
        before = [unit.layer for unit in earlier.units.units]
        known = {id(k): float(v) for k, v in zip(before, values, strict=True)}
        if list(known) == list(map(id, layers)):
            return earlier.variable
        model._untrack_variable(earlier.variable)
    return _variable(
        model, "thresholds", [known.get(id(layer), model.clip.initial) for layer in layers]
    )


def _variable(model, name, values):
    """A variable of the model, which is no weight, so that checkpoints hold it."""
    return model.add_weight(
        shape=np.shape(values),
        initializer=lambda shape, dtype: ops.cast(values, dtype),
        trainable=False,
        name=name,
        aggregation="only_first_replica",
    )
