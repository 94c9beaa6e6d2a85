"""Rules of fixed scales, shifts and dropout."""

import math

import keras
import numpy as np
from keras import layers, ops

from lipdp.bounds.rule import Rule, lipschitz, register, size


@register(layers.Dropout, layers.SpatialDropout1D, layers.SpatialDropout2D, layers.SpatialDropout3D)
def dropout(layer, call):
    if not 0 <= layer.rate < 1:
        raise ValueError(f"rate={layer.rate} has no bound; use a rate below 1")
    return lipschitz(1.0 / (1.0 - layer.rate))


@register(layers.Rescaling)
def rescaling(layer, call):
    scale = fitting(layer.scale, call.input_shape)
    offset = fitting(layer.offset, call.input_shape)
    return lipschitz(float(np.abs(scale).max()), offset=spread_norm(offset, call.input_shape))


@register(layers.AlphaDropout)
def alpha_dropout(layer, call):
    """Kept entries become `a·x + b`, dropped ones `a·α' + b`; without training it is `x`."""
    p = layer.rate
    if not 0 <= p < 1:
        raise ValueError(f"rate={p} has no bound; use a rate below 1")
    if p == 0:
        return lipschitz()
    alpha = -1.7580993408473766  # where SELU saturates
    a = ((1 - p) * (1 + p * alpha**2)) ** -0.5
    b = -a * alpha * p
    offset = max(abs(b), abs(a * alpha + b)) * math.sqrt(size(call.output_shape))
    return lipschitz(max(1.0, a), offset=offset)


@register(layers.GaussianNoise)
def gaussian_noise(layer, call):
    return Rule(
        forward=lambda xs: math.inf,
        backward=lambda xs, g: [g],
        note="the noise has no bound; a BallProjection behind it gives one",
    )


@register(layers.Normalization)
def normalization(layer, call):
    if layer.input_mean is None:
        raise ValueError(
            "its statistics come from `adapt`, so they tell about the examples; give it a public "
            "`mean` and `variance`"
        )
    if layer.mean.shape[0] != 1:
        raise ValueError("its statistics differ between the rows of a batch; use other axes")
    # Those that it computes with, which the arguments may be no more.
    mean, variance = (
        fitting(ops.convert_to_numpy(statistic)[0], call.input_shape)
        for statistic in (layer.mean, layer.variance)
    )
    deviation = np.maximum(np.sqrt(variance), keras.config.epsilon())
    if layer.invert:
        return lipschitz(float(deviation.max()), offset=spread_norm(mean, call.input_shape))
    offset = spread_norm(mean / deviation, call.input_shape)
    return lipschitz(float((1.0 / deviation).max()), offset=offset)


def fitting(constant, shape):
    """A constant operand as an array, if it broadcasts to the shape of an example as it is."""
    constant = np.asarray(constant, dtype=float)
    if not np.isfinite(constant).all():
        raise ValueError("a constant must be finite, without None and NaN")
    if constant.ndim and np.broadcast_shapes(constant.shape, shape) != tuple(shape):
        raise ValueError("a constant that changes the shape of an example has no rule")
    return constant


def spread_norm(constant, shape):
    """Norm of a constant broadcast to a shape."""
    repeats = size(shape) / constant.size if constant.any() else 0.0
    return float(np.linalg.norm(constant) * math.sqrt(repeats))
