"""Rules of Keras' normalisation of each example by itself."""

import math

from keras import layers, ops

from lipdp.bounds.norms import euclidean_norm
from lipdp.bounds.rule import (
    Rule,
    UnknownLayerError,
    lipschitz,
    minimum,
    register,
    size,
    vector_norm,
)


def _normalization(call, axes, epsilon, gain, shift, *, centred):
    """Rule of `gain·z/√(‖z‖²/n + ε) + shift`, where `z` is a row of `n` entries, centred or not.

    Centering is a projection. The norm of a row is at most `√n` and, since the root is at least
    `√ε`, at most `‖z‖/√ε`; the Jacobian in `z` is `(I − zzᵀ/(n·s²))/s` with `s ≥ √ε`, of norm at
    most `1/√ε`. Gain and shift are shared by the rows: Cauchy-Schwarz over those.

    Keras computes `x·inv − mean·inv`: for centred rows the rounding of the two products,
    `2⁻²²·X/√ε` together, may be what is left of a row that is nearly constant.
    """
    rank = len(call.input_shape) + 1
    if any(a % rank == 0 for a in axes):
        raise ValueError(f"axis={axes} holds the batch axis, so it mixes examples; use others")
    if not epsilon > 0:
        raise ValueError(f"epsilon={epsilon} gives an infinite slope; use a positive one")
    entries = size(call.input_shape)
    slope = 1.0 / math.sqrt(epsilon)
    rounding = 2.0**-22 * slope if centred else 0.0
    largest = 1.0 if gain is None else ops.max(ops.abs(gain))
    repeats = 0.0 if shift is None else math.sqrt(entries / size(shift.shape))
    offset = 0.0 if shift is None else repeats * vector_norm(shift)

    def normalised(x):
        return minimum(math.sqrt(entries), slope * x) + (rounding * x if rounding else 0.0)

    def gradients(xs, g):
        pairs = [] if gain is None else [(gain, normalised(xs[0]) * g)]
        return pairs if shift is None else [*pairs, (shift, repeats * g)]

    def backward(xs, g):
        error = 1.0 + rounding * xs[0] if rounding else 1.0
        return [largest * slope * error * g]

    return Rule(
        forward=lambda xs: largest * normalised(xs[0]) + offset,
        backward=backward,
        gradients=gradients,
        note=f"cotangents may grow {slope:.4g} times; see lipdp.layers.FlooredNormalization",
    )


@register(layers.LayerNormalization)
def layer_normalization(layer, call):
    if layer.rms_scaling:
        raise ValueError("rms_scaling=True divides without centering; use RMSNormalization")
    return _normalization(call, layer.axis, layer.epsilon, layer.gamma, layer.beta, centred=True)


@register(layers.RMSNormalization)
def rms_normalization(layer, call):
    return _normalization(call, layer.axis, layer.epsilon, layer.scale, None, centred=False)


@register(layers.GroupNormalization)
def group_normalization(layer, call):
    if layer.axis % (len(call.input_shape) + 1) != len(call.input_shape):
        raise ValueError(f"axis={layer.axis} has no rule; use the last axis")
    axes = range(1, len(call.input_shape) + 1)
    return _normalization(call, axes, layer.epsilon, layer.gamma, layer.beta, centred=True)


@register(layers.BatchNormalization)
def batch_normalization(layer, call):
    """Frozen, it is affine with the moving statistics: `s·x + (β − s·μ)`, `s = γ/√(v + ε)`, at all
    positions of a channel alike, whether in training or not.

    Keras computes `x·s − μ·s + β`; the rounding of the two products is that of their sizes.
    """
    if layer.trainable:
        raise UnknownLayerError(
            f"Layer {layer.name!r} (BatchNormalization) cannot be private: it mixes the examples "
            "of a batch, so one example moves the gradient of all others. Freeze it (trainable = "
            "False), or use keras.layers.GroupNormalization, or lipdp.layers.Centering or "
            "BallProjection: they look at one example only."
        )
    scale = ops.rsqrt(layer.moving_variance + layer.epsilon)
    scale = scale if layer.gamma is None else scale * layer.gamma
    shift = -scale * layer.moving_mean
    shift = shift if layer.beta is None else shift + layer.beta
    repeats = math.sqrt(size(call.input_shape) / size(layer.moving_mean.shape))
    moved, by = euclidean_norm(shift), euclidean_norm(scale * layer.moving_mean)
    rounding = 2.0**-20 * (moved + by)
    return lipschitz(
        ops.max(ops.abs(scale)) * (1.0 + 2.0**-20), offset=repeats * (moved + rounding)
    )
