"""Rules of pooling."""

import math

import numpy as np
from keras import layers
from keras.src import ops as keras_ops

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


@register(
    layers.GlobalAveragePooling1D, layers.GlobalAveragePooling2D, layers.GlobalAveragePooling3D
)
def global_average_pooling(layer, call):
    channels_last(layer)
    if call.masked:
        raise ValueError(
            "it divides by the number of positions that a mask leaves, which may be none; drop the "
            "mask, or use lipdp.layers.MaskedAveragePooling1D"
        )
    return lipschitz(1.0 / math.sqrt(size(call.input_shape[:-1])))


@register(
    layers.AdaptiveAveragePooling1D,
    layers.AdaptiveAveragePooling2D,
    layers.AdaptiveAveragePooling3D,
)
def adaptive_average_pooling(layer, call):
    """Norm of the averaging matrix, axis by axis."""
    norm = 1.0
    for n, starts, ends in _adaptive_windows(layer, call):
        cells = np.arange(n)
        inside = (starts[:, None] <= cells) & (cells < ends[:, None])
        norm *= np.linalg.norm(inside / inside.sum(axis=1, keepdims=True), 2)
    return lipschitz(float(norm))


@register(layers.AdaptiveMaxPooling1D, layers.AdaptiveMaxPooling2D, layers.AdaptiveMaxPooling3D)
def adaptive_max_pooling(layer, call):
    """The rule of max pooling, with the most windows that hold a cell."""
    windows, ties = 1, 1
    for n, starts, ends in _adaptive_windows(layer, call):
        cells = np.arange(n)[:, None]
        windows *= int(((starts <= cells) & (cells < ends)).sum(axis=1).max())
        ties *= int((ends - starts).max())
    if len(call.input_shape) < 4:
        return lipschitz(math.sqrt(windows))
    return Rule(
        forward=lambda xs: math.sqrt(windows) * xs[0],
        backward=lambda xs, g: [math.sqrt(windows * ties) * g],
        note="tied maxima share no cotangent, each gets all of it",
    )


def _adaptive_windows(layer, call):
    """For each axis its size, and where windows start and end: at `⌊i·n/o⌋` and `⌈(i+1)·n/o⌉`."""
    channels_last(layer)
    sizes = call.input_shape[:-1]
    outputs = layer.output_size
    outputs = (outputs,) * len(sizes) if isinstance(outputs, int) else outputs
    for n, o in zip(sizes, outputs, strict=True):
        i = np.arange(o)
        yield size((n,)), i * n // o, -(-(i + 1) * n // o)


# --- reductions: `keras.ops.mean(x, axis=1)` ----------------------------------------------------


def _reduced(operation, call):
    """Number of entries that make one."""
    axes = operation.axis
    rank = len(call.input_shape) + 1
    axes = range(rank) if axes is None else [axes] if isinstance(axes, int) else axes
    if any(a % rank == 0 for a in axes):
        raise ValueError("it reduces over the batch axis, so it mixes examples; use other axes")
    return size([call.input_shape[a % rank - 1] for a in axes])


@register(keras_ops.numpy.Sum)
def sum_operation(operation, call):
    return lipschitz(math.sqrt(_reduced(operation, call)))


@register(keras_ops.numpy.Mean)
def mean(operation, call):
    return lipschitz(1.0 / math.sqrt(_reduced(operation, call)))


@register(keras_ops.numpy.Max, keras_ops.numpy.Min, keras_ops.numpy.Amax, keras_ops.numpy.Amin)
def extremum(operation, call):
    """Ties share the cotangent on both backends."""
    _reduced(operation, call)
    if getattr(operation, "initial", None) is not None:
        raise ValueError("`initial` has no rule; apply keras.ops.maximum afterwards")
    return lipschitz()


@register(keras_ops.math.Logsumexp)
def logsumexp(operation, call):
    """Its gradient is a softmax, of norm at most 1; zeros give `ln n`."""
    n = _reduced(operation, call)
    return lipschitz(offset=math.log(n) * math.sqrt(size(call.output_shape)))


@register(keras_ops.numpy.Any, keras_ops.numpy.All)
def quantifier(operation, call):
    _reduced(operation, call)
    root = math.sqrt(size(call.output_shape))
    return Rule(forward=lambda xs: root, backward=lambda xs, g: [0.0])
