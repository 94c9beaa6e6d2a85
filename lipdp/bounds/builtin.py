"""Rules of Keras' own layers and operations."""

import math

import keras
import numpy as np
from keras import activations, layers
from keras.src import ops as keras_ops

from lipdp import norms
from lipdp.bounds.rule import (
    Rule,
    UnknownLayerError,
    conv_norm,
    lipschitz,
    matrix_norm,
    register,
    root_of_squares,
    size,
    vector_norm,
)

# --- activations ----------------------------------------------------------------------------

# Lipschitz constant and |σ(0)|. Constants that are not plain are maxima of |σ'|, rounded up.
_ACTIVATIONS = {
    activations.linear: (1.0, 0.0),
    activations.relu: (1.0, 0.0),
    activations.relu6: (1.0, 0.0),
    activations.leaky_relu: (1.0, 0.0),
    activations.elu: (1.0, 0.0),
    # As max(x, 0) + ... min(0, x): at zero TensorFlow hands the cotangent to both.
    activations.celu: (2.0, 0.0),
    activations.tanh: (1.0, 0.0),
    activations.hard_tanh: (1.0, 0.0),
    activations.softsign: (1.0, 0.0),
    activations.soft_shrink: (1.0, 0.0),
    activations.tanh_shrink: (1.0, 0.0),
    activations.softplus: (1.0, math.log(2.0) + 1e-6),
    activations.log_sigmoid: (1.0, math.log(2.0) + 1e-6),
    activations.squareplus: (1.0, 1.0),
    activations.sparse_plus: (1.0, 0.25),
    activations.sigmoid: (0.25, 0.5),
    activations.hard_sigmoid: (1.0 / 6.0 + 1e-7, 0.5),
    activations.selu: (1.75811, 0.0),
    activations.gelu: (1.129, 0.0),  # both forms
    activations.silu: (1.09984, 0.0),
    activations.hard_silu: (1.5, 0.0),
    activations.mish: (1.0885, 0.0),
}


def _activation(function, shape):
    """(Lipschitz constant, norm of the output at zero) of an elementwise activation."""
    if function is None:
        return 1.0, 0.0
    try:
        constant, at_zero = _ACTIVATIONS[function]
    except (KeyError, TypeError):
        known = ", ".join(sorted(f.__name__ for f in _ACTIVATIONS))
        name = getattr(function, "__name__", type(function).__name__)
        raise ValueError(
            f"the activation {name!r} has no known Lipschitz constant; use one of {known}, or a "
            "layer with a rule of its own"
        ) from None
    return constant, at_zero * math.sqrt(size(shape)) if at_zero else 0.0


def with_activation(rule, function, shape):
    """The rule of a layer that ends in `activation=function`."""
    constant, offset = _activation(function, shape)
    if (constant, offset) == (1.0, 0.0):
        return rule
    return Rule(
        forward=lambda xs: constant * rule.forward(xs) + offset,
        backward=lambda xs, g: rule.backward(xs, constant * g),
        gradients=lambda xs, g: rule.gradients(xs, constant * g),
        note=rule.note,
    )


@register(layers.Activation)
def activation(layer, call):
    return with_activation(lipschitz(), layer.activation, call.output_shape)


def _elementwise(constant, at_zero, call):
    return lipschitz(constant, offset=at_zero * math.sqrt(size(call.output_shape)))


@register(layers.ReLU)
def relu(layer, call):
    if layer.threshold != 0:
        raise ValueError(f"it jumps at threshold={layer.threshold}; use threshold=0")
    return lipschitz(max(1.0, abs(float(layer.negative_slope))))


@register(layers.LeakyReLU)
def leaky_relu(layer, call):
    return lipschitz(max(1.0, abs(float(layer.negative_slope))))


@register(layers.ELU)
def elu(layer, call):
    return lipschitz(max(1.0, abs(float(layer.alpha))))


# Operations of the functional style: `keras.ops.relu(x)`, `x + y`, `2 * x`.
@register(keras_ops.nn.Relu, keras_ops.nn.Relu6, keras_ops.numpy.Tanh, keras_ops.nn.Softsign)
def relu_like(operation, call):
    return lipschitz()


@register(keras_ops.numpy.Absolute, keras_ops.numpy.Abs, keras_ops.numpy.Negative)
def absolute(operation, call):
    return lipschitz()


@register(keras_ops.nn.Sigmoid)
def sigmoid(operation, call):
    return _elementwise(0.25, 0.5, call)


# --- shapes ---------------------------------------------------------------------------------


@register(
    layers.Flatten,
    layers.Reshape,
    layers.Permute,
    layers.ZeroPadding1D,
    layers.ZeroPadding2D,
    layers.ZeroPadding3D,
    layers.Cropping1D,
    layers.Cropping2D,
    layers.Cropping3D,
    layers.Identity,
)
def rearrangement(layer, call):
    return lipschitz()


@register(keras_ops.numpy.Reshape)
def reshape(operation, call):
    # A free reshape could fold the batch axis into the others.
    if not operation.newshape or operation.newshape[0] not in (-1, None):
        raise ValueError(
            "a reshape may mix the examples; use keras.layers.Reshape, which keeps the batch axis"
        )
    if any(n in (-1, None) for n in operation.newshape[1:]) or size(operation.newshape[1:]) != size(
        call.input_shape
    ):
        raise ValueError("a reshape must keep the size of an example; use keras.layers.Reshape")
    return lipschitz()


@register(layers.RepeatVector)
def repeat_vector(layer, call):
    return lipschitz(math.sqrt(layer.n))


@register(layers.UpSampling1D)
def up_sampling_1d(layer, call):
    return lipschitz(math.sqrt(layer.size))


@register(layers.UpSampling2D)
def up_sampling_2d(layer, call):
    if layer.interpolation not in ("nearest", "bilinear"):
        raise ValueError(
            f"interpolation={layer.interpolation!r} has no bound; use 'nearest' or 'bilinear'"
        )
    return lipschitz(math.sqrt(math.prod(layer.size)))


@register(layers.UpSampling3D)
def up_sampling_3d(layer, call):
    return lipschitz(math.sqrt(math.prod(layer.size)))


# --- dense and convolution --------------------------------------------------------------------


def linear(layer, call, kernel_norm, multiplicity, note=""):
    """Rule of `activation(W x + b)` with the bias shared by all positions.

    `‖Wx + b‖ ≤ s·X + √T·‖b‖`; the gradient of the kernel is at most `√m·X·G` with `m` the
    number of outputs an input entry reaches through the kernel's taps, that of the bias
    `√T·G` by Cauchy-Schwarz over the positions.
    """
    positions = math.sqrt(call.positions) if layer.use_bias else 0.0
    offset = positions * vector_norm(layer.bias) if layer.use_bias else 0.0
    reach = math.sqrt(multiplicity)

    def gradients(x, g):
        pairs = [(_weight(layer, "kernel"), reach * x * g)]
        if layer.use_bias:
            pairs.append((layer.bias, positions * g))
        return pairs

    rule = lipschitz(kernel_norm, offset=offset, gradients=gradients, note=note)
    return with_activation(rule, layer.activation, call.output_shape)


def _weight(layer, name):
    """The variable behind a weight; with LoRA or quantisation the weight is computed instead."""
    value = getattr(layer, name)
    if not isinstance(value, keras.Variable):
        raise ValueError(
            f"its {name} is computed from other weights (LoRA or quantisation), for which there is "
            "no rule; merge it first"
        )
    return value


@register(layers.Dense)
def dense(layer, call):
    return linear(layer, call, matrix_norm(_weight(layer, "kernel")), 1)


def _channels_last(layer):
    if getattr(layer, "data_format", "channels_last") != "channels_last":
        raise ValueError(f"data_format={layer.data_format!r} has no rule; use 'channels_last'")


@register(layers.Conv1D, layers.Conv2D, layers.Conv3D)
def conv(layer, call):
    _channels_last(layer)
    kernel = _weight(layer, "kernel")
    geometry = {
        "input_shape": call.input_shape[:-1],
        "strides": layer.strides,
        "padding": layer.padding,
        "dilation_rate": layer.dilation_rate,
    }
    size(call.input_shape)  # all sizes must be known
    multiplicity = norms.conv_multiplicity(tuple(kernel.shape), **geometry)
    norm = conv_norm(kernel, **geometry, groups=layer.groups)
    return linear(layer, call, norm, multiplicity, note=f"{multiplicity} outputs read an entry")


# --- pooling --------------------------------------------------------------------------------


def pool_windows(pool_size, strides):
    """`w`: how many windows hold a cell, at most."""
    return math.prod(math.ceil(p / s) for p, s in zip(pool_size, strides, strict=True))


@register(layers.MaxPooling1D, layers.MaxPooling2D)
def max_pooling(layer, call):
    _channels_last(layer)
    return lipschitz(math.sqrt(pool_windows(*_pooling(layer, call))))


@register(layers.MaxPooling3D)
def max_pooling_3d(layer, call):
    """TensorFlow hands the cotangent of a window to *all* cells that tie for its maximum, at
    most `Πpool`: rows sum to `Πpool`, columns to `w`, and the Schur test takes the mean.
    """
    _channels_last(layer)
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
    _channels_last(layer)
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
    _channels_last(layer)
    return lipschitz()


@register(layers.GlobalAveragePooling2D, layers.GlobalAveragePooling3D)
def global_average_pooling(layer, call):
    _channels_last(layer)
    return lipschitz(1.0 / math.sqrt(size(call.input_shape[:-1])))


# --- regularisation, scaling ------------------------------------------------------------------


@register(layers.Dropout, layers.SpatialDropout1D, layers.SpatialDropout2D, layers.SpatialDropout3D)
def dropout(layer, call):
    if not 0 <= layer.rate < 1:
        raise ValueError(f"rate={layer.rate} has no bound; use a rate below 1")
    return lipschitz(1.0 / (1.0 - layer.rate))


@register(layers.Rescaling)
def rescaling(layer, call):
    scale = _fitting(layer.scale, call.input_shape)
    offset = _fitting(layer.offset, call.input_shape)
    return lipschitz(float(np.abs(scale).max()), offset=_spread_norm(offset, call.input_shape))


def _fitting(constant, shape):
    """A constant operand as an array, if it broadcasts to the shape of an example as it is."""
    constant = np.asarray(constant, dtype=float)
    if constant.ndim and np.broadcast_shapes(constant.shape, shape) != tuple(shape):
        raise ValueError("a constant that changes the shape of an example has no rule")
    return constant


def _spread_norm(constant, shape):
    """Norm of a constant broadcast to a shape."""
    repeats = size(shape) / constant.size if constant.any() else 0.0
    return float(np.linalg.norm(constant) * math.sqrt(repeats))


# --- branches ---------------------------------------------------------------------------------


def _broadcasts(call):
    """`√r` of each input that is repeated `r` times to the output's shape."""
    return [math.sqrt(size(call.output_shape) / max(size(s), 1)) for s in call.input_shapes]


def weighted_sum(weights):
    """Rule of `Σ a_i·x_i`; the weights include the root of how often an input is repeated."""
    return Rule(
        forward=lambda xs: sum(a * x for a, x in zip(weights, xs, strict=True)),
        backward=lambda xs, g: [a * g for a in weights],
    )


@register(layers.Add, layers.Subtract)
def add(layer, call):
    return weighted_sum(_broadcasts(call))


@register(layers.Average)
def average(layer, call):
    return weighted_sum([r / len(call.input_shapes) for r in _broadcasts(call)])


@register(layers.Maximum, layers.Minimum)
def maximum(layer, call):
    repeats = _broadcasts(call)
    return Rule(
        forward=lambda xs: root_of_squares([r * x for r, x in zip(repeats, xs, strict=True)]),
        backward=lambda xs, g: [r * g for r in repeats],
    )


@register(layers.Concatenate)
def concatenate(layer, call):
    if layer.axis % (len(call.output_shape) + 1) == 0:
        raise ValueError(f"axis={layer.axis} joins examples; use another axis")
    return Rule(forward=root_of_squares, backward=lambda xs, g: [g for _ in xs])


@register(layers.Multiply)
def multiply(layer, call):
    if len(call.input_shapes) != 2 or len(set(call.input_shapes)) != 1:
        raise ValueError("it has a rule for two inputs of the same shape only")
    return Rule(
        forward=lambda xs: xs[0] * xs[1],
        backward=lambda xs, g: [xs[1] * g, xs[0] * g],
    )


def _constant(call):
    """The constant operand, if there is one."""
    operands = [*call.args, *call.kwargs.values()]
    constants = [a for a in operands if not isinstance(a, keras.KerasTensor)]
    if constants:
        return _fitting(constants[0], call.input_shape)
    # Shapes are aligned from the right: the batch axis of one would meet another axis.
    if len({len(shape) for shape in call.input_shapes}) > 1:
        raise ValueError(
            "operands of different rank mix examples; use a layer of keras.layers, which keeps "
            "the batch axes together"
        )
    return None


@register(keras_ops.numpy.Add, keras_ops.numpy.Subtract)
def add_operation(operation, call):
    constant = _constant(call)
    if constant is None:
        return weighted_sum(_broadcasts(call))
    return lipschitz(offset=_spread_norm(constant, call.input_shape))


@register(keras_ops.numpy.Multiply)
def multiply_operation(operation, call):
    constant = _constant(call)
    if constant is None:
        return multiply(operation, call)
    return lipschitz(float(np.abs(constant).max()))


@register(keras_ops.numpy.TrueDivide, keras_ops.numpy.Divide)
def divide_operation(operation, call):
    first = call.args[0] if call.args else call.kwargs.get("x1")
    constant = _constant(call)
    if constant is None or not isinstance(first, keras.KerasTensor):
        raise ValueError("division by a tensor has no bound; divide by a constant")
    if not constant.all():
        raise ValueError("division by zero has no bound")
    return lipschitz(float((1.0 / np.abs(constant)).max()))


# --- what cannot be private -------------------------------------------------------------------

_MIXES = "it mixes the examples of a batch, so one example moves the gradient of all others"


def _refused(remedy, reason=_MIXES):
    def rule(layer, call):
        raise UnknownLayerError(
            f"Layer {layer.name!r} ({type(layer).__name__}) cannot be private: {reason}. {remedy}"
        )

    return rule


register(layers.BatchNormalization)(
    _refused("Use lipdp.layers.Centering or BallProjection, which look at one example only.")
)
register(layers.Lambda)(
    _refused(
        "Use a layer with a rule, or register one for a class of your own.",
        "nothing is known of what a Lambda computes",
    )
)
register(layers.UnitNormalization)(
    _refused("Use lipdp.layers.BallProjection.", "its slope at zero is unbounded")
)
register(layers.GaussianDropout)(_refused("Use keras.layers.Dropout.", "its factor is unbounded"))

__all__ = ["linear", "pool_windows", "with_activation"]
