"""Rules of pooling."""

import math

import numpy as np
from keras import layers

from lipdp.bounds.builtin.linear import channels_last
from lipdp.bounds.rule import Rule, lipschitz, register, size


def pool_windows(pool_size, strides):
    """`w`: how many windows hold a cell, at most."""
    return math.prod(math.ceil(p / s) for p, s in zip(pool_size, strides, strict=True))


@register(layers.MaxPooling1D, layers.MaxPooling2D)
def max_pooling(layer, call):
    channels_last(layer)
    return lipschitz(math.sqrt(pool_windows(*_pooling(layer, call))))


@register(layers.MaxPooling3D)
def max_pooling_3d(layer, call):
    """TensorFlow hands the cotangent of a window to *all* cells that tie for its maximum, at
    most `Πpool`: rows sum to `Πpool`, columns to `w`, and the Schur test takes the mean.
    """
    channels_last(layer)
    pool_size, strides = _pooling(layer, call)
    windows = pool_windows(pool_size, strides)
    return Rule(
        forward=lambda xs: math.sqrt(windows) * xs[0],
        backward=lambda xs, g: [math.sqrt(windows * math.prod(pool_size)) * g],
        note="tied maxima share no cotangent, each gets all of it",
    )


def _pooling(layer, call):
    axes = len(call.input_shape) - 1
    return tuple(
        (v,) * axes if isinstance(v, int) else tuple(v)
        for v in (layer.pool_size, layer.strides or layer.pool_size)
    )


@register(layers.AveragePooling1D, layers.AveragePooling2D, layers.AveragePooling3D)
def average_pooling(layer, call):
    """`√Πa`, by the Schur test: rows of the averaging matrix sum to 1, columns to at most `a`."""
    channels_last(layer)
    constant = 1.0
    for n, p, s in zip(call.input_shape[:-1], *_pooling(layer, call), strict=True):
        n = size((n,))
        if layer.padding == "valid":
            starts = np.arange(0, n - p + 1, s)
        else:
            outputs = -(-n // s)
            before = max((outputs - 1) * s + p - n, 0) // 2
            starts = np.arange(outputs) * s - before
        column = np.zeros(n)
        for start in starts:
            cells = slice(max(start, 0), min(start + p, n))
            column[cells] += 1.0 / (cells.stop - cells.start)  # Keras divides by real cells
        constant *= column.max()
    return lipschitz(math.sqrt(constant))


@register(layers.GlobalMaxPooling1D, layers.GlobalMaxPooling2D, layers.GlobalMaxPooling3D)
def global_max_pooling(layer, call):
    channels_last(layer)
    return lipschitz()


@register(layers.GlobalAveragePooling2D, layers.GlobalAveragePooling3D)
def global_average_pooling(layer, call):
    channels_last(layer)
    return lipschitz(1.0 / math.sqrt(size(call.input_shape[:-1])))
