"""Rules of fixed scales, shifts and dropout."""

import math

import numpy as np
from keras import layers

from lipdp.bounds.rule import lipschitz, register, size


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


def fitting(constant, shape):
    """A constant operand as an array, if it broadcasts to the shape of an example as it is."""
    constant = np.asarray(constant, dtype=float)
    if constant.ndim and np.broadcast_shapes(constant.shape, shape) != tuple(shape):
        raise ValueError("a constant that changes the shape of an example has no rule")
    return constant


def spread_norm(constant, shape):
    """Norm of a constant broadcast to a shape."""
    repeats = size(shape) / constant.size if constant.any() else 0.0
    return float(np.linalg.norm(constant) * math.sqrt(repeats))
