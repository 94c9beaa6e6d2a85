"""Layers that bound, centre or clip, each example by itself."""

import math
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from accountants.validation import check_integer, check_number
from lipdp.bounds import Call, Rule, lipschitz
from lipdp.bounds.rule import minimum, size

# Entries of larger magnitude are clipped to it before a norm is taken.
_HUGE = 1e37
# Squares of norms between which `x^(-3/2)`, the slope of their rsqrt, is a number of float32, too.
_PLAIN = 1e-20, 1e20
# Of the largest entry; the slope of rsqrt would overflow at the square of a smaller floor, and
# what is left of entries by centering is far above it, or rounding.
_SMALLEST_FLOOR = 1e-10


def _finite(x):
    # Beyond _HUGE the reciprocal of an entry underflows on JAX, which gives 0·∞.
    return ops.where(ops.isfinite(x), ops.clip(x, -_HUGE, _HUGE), ops.zeros_like(x))


@keras.saving.register_keras_serializable("lipdp")
class BallProjection(keras.layers.Layer):
    """Projects each example onto the Euclidean ball of a radius; what bounds the input.

    `r·x/max(‖x‖, r)`: output at most `min(X, r)`, cotangent at most `G`. NaN and infinite
    entries are replaced by zero first, so that no input, however broken, is outside the bound.

    Args:
        radius: radius of the ball.
        per_position: project the vector at each position (last axis) instead of the whole
            example; the output is then at most `min(X, √T·r)`.

    Input and output shape: `(batch, ...)`.

    Raises:
        ValueError: the radius is not a positive number, or there is no axis but the batch.

    >>> y = BallProjection(1.0)(ops.array([[3.0, 4.0], [0.0, 0.5]]))
    >>> [round(float(v), 4) for v in ops.reshape(y, (-1,))]
    [0.6, 0.8, 0.0, 0.5]
    """

    def __init__(self, radius: float, per_position: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.radius = check_number(radius, "radius")
        self.per_position = bool(per_position)
        self.supports_masking = True

    def build(self, input_shape):
        if self.per_position and len(input_shape) < 2:
            raise ValueError(
                "per_position=True needs an axis in addition to the batch axis; "
                f"got an input of shape {tuple(input_shape)}."
            )

    def call(self, x):
        x = ops.cast(x, self.compute_dtype)
        axes = (-1,) if self.per_position else tuple(range(1, len(x.shape)))

        @ops.custom_gradient
        def projected(x):
            y, factor, outside, fits = self._scaled(x, axes)

            def grad(*args, upstream=None):
                # With `y` of norm r, the slope of r·x/‖x‖ is r/‖x‖·(I − yyᵀ/r²).
                (g,) = args if upstream is None else (upstream,)
                along = ops.sum(y * g, axis=axes, keepdims=True) / self.radius**2
                slope = factor * (g - ops.where(outside, along, 0.0) * y)
                # Zeros in place of broken entries do not move with them.
                return ops.cond(
                    ops.all(fits),
                    lambda: slope,
                    lambda: ops.where(ops.isfinite(x), slope, ops.zeros_like(slope)),
                )

            return y, grad

        return projected(x)

    def _scaled(self, x, axes):
        """The projection `y = factor·x`, its factors, whether they are of vectors outside of the
        ball, and of which vectors the squares are numbers of float32.
        """
        low, high = _PLAIN
        if self.compute_dtype != "float32" or not low <= self.radius**2 <= high:
            return *self._careful(x, axes), False
        # Nearly always all are, and two passes suffice. It is asked of each vector, so that no
        # example changes how others are rounded.
        squares = ops.sum(ops.square(x), axis=axes, keepdims=True)
        fits, outside = squares < high, squares > self.radius**2
        factor = self.radius * ops.rsqrt(ops.maximum(squares, self.radius**2))

        def plain():
            return x * factor, factor, outside

        def mixed():
            both = zip(plain(), self._careful(x, axes), strict=True)
            return tuple(ops.where(fits, some, careful) for some, careful in both)

        return *ops.cond(ops.all(fits), plain, mixed), fits

    def _careful(self, x, axes):
        x = _finite(x)
        # Divided by its largest entry first, a vector's squares neither overflow nor vanish.
        scale = ops.maximum(ops.max(ops.abs(x), axis=axes, keepdims=True), self.radius)
        x = x / scale
        r = self.radius / scale
        squares, least = ops.sum(ops.square(x), axis=axes, keepdims=True), ops.square(r)
        inverse = ops.rsqrt(ops.maximum(squares, least))
        return x * (self.radius * inverse), r * inverse, squares > least

    def compute_output_shape(self, input_shape):
        return input_shape

    def bound(self, call: Call) -> Rule:
        positions = size(call.input_shape[:-1]) if self.per_position else 1
        radius = self.radius * math.sqrt(positions)
        return Rule(
            forward=lambda xs: minimum(xs[0], radius),
            backward=lambda xs, g: [g],
            any_input=True,
        )

    def get_config(self) -> dict:
        return {**super().get_config(), "radius": self.radius, "per_position": self.per_position}


@keras.saving.register_keras_serializable("lipdp")
class Centering(keras.layers.Layer):
    """Subtracts the mean over non-batch axes: an orthogonal projection, so output at most `X`,
    cotangent at most `G`. What batch normalisation does for the mean, for one example.

    Args:
        axes: axes of the mean, counted with the batch axis 0, which is refused; by default all
            axes but the batch. `(1, 2)` centres each channel of a map.

    Input and output shape: `(batch, ...)`.

    Raises:
        ValueError: the batch axis is among them, or an axis does not exist.

    >>> [float(v) for v in Centering()(ops.array([[1.0, 3.0]]))[0]]
    [-1.0, 1.0]
    """

    def __init__(self, axes: int | Sequence[int] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.axes = None if axes is None else tuple([axes] if isinstance(axes, int) else axes)

    def build(self, input_shape):
        rank = len(input_shape)
        axes = range(1, rank) if self.axes is None else self.axes
        if not all(-rank <= a < rank for a in axes):
            raise ValueError(f"`axes` must be axes of the input, of rank {rank}; got {self.axes}.")
        if any(a % rank == 0 for a in axes):
            raise ValueError(
                f"`axes` must not hold the batch axis, which would mix examples; got {self.axes}."
            )
        self._axes = tuple(a % rank for a in axes)

    def call(self, x):
        return x - ops.mean(x, axis=self._axes, keepdims=True)

    def compute_output_shape(self, input_shape):
        return input_shape

    def bound(self, call: Call) -> Rule:
        return lipschitz()

    def get_config(self) -> dict:
        return {**super().get_config(), "axes": self.axes}


@keras.saving.register_keras_serializable("lipdp")
class FlooredNormalization(keras.layers.Layer):
    """Centres groups of channels and brings each to the same norm, for each example by itself.

    A group's centred entries `z` become `r·z/max(‖z‖, floor)`: norm `r`, unless the group is
    nearly constant, where a division by its norm alone would have an infinite slope. As a
    normaliser of the input it takes each example's scale away; with `per_position=True` it is a
    layer normalisation whose constant is chosen, not `1/√ε`.

    The Jacobian in `z` is `(r/‖z‖)·(I − zzᵀ/‖z‖²)` above the floor and `(r/floor)·I` below it,
    of norm at most `r/floor`, and centering is a projection. With `m` groups, counted at each
    position if they are normalised there: output at most `min(√m·r, X·r/floor)`, cotangent at
    most `(r/floor)·G`. NaN and infinite entries are replaced by zero first.

    Args:
        radius: norm `r` of a group.
        floor: norm below which a group keeps its proportion to `floor`.
        groups: number of groups of neighbouring channels; must divide the channels.
        per_position: normalise the channels at each position instead of over all positions.
        center: whether the mean of a group's entries is subtracted first.

    Input and output shape: `(batch, ..., channels)`, all but the batch known.

    Raises:
        ValueError: radius or floor is not a positive number, or `groups` does not divide the
            channels.

    >>> y = FlooredNormalization(1.0, 0.1, groups=2)(ops.array([[3.0, 5.0, 8.0, 8.0]]))
    >>> [round(float(v), 4) for v in y[0]]
    [-0.7071, 0.7071, 0.0, 0.0]
    """

    def __init__(
        self,
        radius: float = 1.0,
        floor: float = 0.1,
        groups: int = 1,
        per_position: bool = False,
        center: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.radius = check_number(radius, "radius")
        self.floor = check_number(floor, "floor")
        self.groups = check_integer(groups, "groups")
        self.per_position = bool(per_position)
        self.center = bool(center)

    def build(self, input_shape):
        shape = input_shape[1:]
        if not shape or None in shape or shape[-1] % self.groups:
            raise ValueError(
                f"FlooredNormalization(groups={self.groups}) needs known sizes and a number of "
                f"channels that {self.groups} divides; got shape {tuple(input_shape)}."
            )

    def call(self, x):
        shape = x.shape[1:]
        x = _finite(ops.cast(x, self.compute_dtype))
        x = ops.reshape(x, (-1, *shape[:-1], self.groups, shape[-1] // self.groups))
        rank = len(x.shape)
        axes = (-1,) if self.per_position else (*range(1, rank - 2), rank - 1)
        # As in BallProjection: entries of at most one neither overflow nor vanish when squared.
        scale = ops.stop_gradient(
            ops.maximum(ops.max(ops.abs(x), axis=axes, keepdims=True), self.floor)
        )
        x = x / scale
        if self.center:
            x = x - ops.mean(x, axis=axes, keepdims=True)
        floor = ops.maximum(self.floor / scale, _SMALLEST_FLOOR)
        squares = ops.sum(ops.square(x), axis=axes, keepdims=True)
        x = self.radius * x * ops.rsqrt(ops.maximum(squares, ops.square(floor)))
        return ops.reshape(x, (-1, *shape))

    def compute_output_shape(self, input_shape):
        return input_shape

    def bound(self, call: Call) -> Rule:
        positions = size(call.input_shape[:-1]) if self.per_position else 1
        largest = self.radius * math.sqrt(self.groups * positions)
        slope = self.radius / self.floor
        return Rule(
            forward=lambda xs: minimum(slope * xs[0], largest),
            backward=lambda xs, g: [slope * g],
            any_input=True,
        )

    def get_config(self) -> dict:
        return {
            **super().get_config(),
            "radius": self.radius,
            "floor": self.floor,
            "groups": self.groups,
            "per_position": self.per_position,
            "center": self.center,
        }


@keras.saving.register_keras_serializable("lipdp")
class ClipGradient(keras.layers.Layer):
    """Identity forwards; backwards each example's cotangent is clipped to a norm.

    Output at most `X`, cotangent at most `min(G, clip_norm)`. It biases the gradient as every
    clip does; it lowers the sensitivity of all layers before it.

    Args:
        clip_norm: largest norm of a cotangent that passes.

    Input and output shape: `(batch, ...)`.

    Raises:
        ValueError: the norm is not a positive number.

    >>> float(ClipGradient(0.1)(ops.array([[2.0]]))[0, 0])
    2.0
    """

    def __init__(self, clip_norm: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.clip_norm = check_number(clip_norm, "clip_norm")
        self.supports_masking = True

    def call(self, x):
        radius = self.clip_norm

        @ops.custom_gradient
        def clipped(x):
            def grad(*args, upstream=None):
                (g,) = args if upstream is None else (upstream,)
                g = ops.where(ops.isfinite(g), g, ops.zeros_like(g))
                axes = tuple(range(1, len(g.shape)))
                norm = ops.sqrt(ops.sum(ops.square(g), axis=axes, keepdims=True))
                return g * (radius / ops.maximum(norm, radius))

            return ops.copy(x) if hasattr(ops, "copy") else x, grad

        return clipped(x)

    def compute_output_shape(self, input_shape):
        return input_shape

    def bound(self, call: Call) -> Rule:
        return Rule(forward=lambda xs: xs[0], backward=lambda xs, g: [minimum(g, self.clip_norm)])

    def get_config(self) -> dict:
        return {**super().get_config(), "clip_norm": self.clip_norm}
