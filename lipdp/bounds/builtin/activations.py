"""Rules of elementwise activations, as layers, as operations, and as `activation=` of a layer."""

import math

from keras import activations, layers, ops
from keras.src import ops as keras_ops
from keras.src.activations.activations import ReLU as ReLUOperation

from lipdp.bounds.rule import Rule, lipschitz, register, size

# Lipschitz constant and |σ(0)|. Constants that are not plain are maxima of |σ'|, rounded up.
ACTIVATIONS = {
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
        constant, at_zero = ACTIVATIONS[function]
    except (KeyError, TypeError):
        known = ", ".join(sorted(f.__name__ for f in ACTIVATIONS))
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


@register(layers.ReLU, ReLUOperation)
def relu(layer, call):
    if layer.threshold != 0:
        raise ValueError(f"it jumps at threshold={layer.threshold}; use threshold=0")
    return lipschitz(max(1.0, abs(float(layer.negative_slope))))


@register(layers.LeakyReLU, keras_ops.nn.LeakyRelu)
def leaky_relu(layer, call):
    return lipschitz(max(1.0, abs(float(layer.negative_slope))))


@register(layers.ELU, keras_ops.nn.Elu)
def elu(layer, call):
    return lipschitz(max(1.0, abs(float(layer.alpha))))


@register(layers.PReLU)
def prelu(layer, call):
    """Slopes are measured. An entry's slope has the gradient `min(x, 0)·g`; summed over the axes
    that share it, Cauchy-Schwarz leaves `X·G`.
    """
    slope = ops.maximum(1.0, ops.max(ops.abs(layer.alpha)))
    return lipschitz(slope, gradients=lambda x, g: [(layer.alpha, x * g)])


# --- not elementwise --------------------------------------------------------------------------


def _rows(call, axis):
    """Number of rows of a map along `axis`, and the length of each."""
    rank = len(call.input_shape) + 1
    axes = {a % rank for a in (axis if isinstance(axis, (list, tuple)) else [axis])}
    if 0 in axes:
        raise ValueError(f"axis={axis} holds the batch axis, so it mixes examples; use others")
    length = size([call.input_shape[a - 1] for a in axes])
    return size(call.input_shape) // length, length


@register(layers.Softmax, keras_ops.nn.Softmax)
def softmax(layer, call):
    """Rows are distributions, of norm at most 1. The Jacobian `diag(p) − ppᵀ` has norm at most ½
    (Gao & Pavel, "On the Properties of the Softmax Function", 2017).
    """
    rows, _ = _rows(call, layer.axis)
    return Rule(forward=lambda xs: math.sqrt(rows), backward=lambda xs, g: [0.5 * g])


@register(keras_ops.nn.LogSoftmax)
def log_softmax(operation, call):
    """The Jacobian `I − 1pᵀ` is an oblique projection, of norm `‖1‖·‖p‖ ≤ √C`."""
    rows, length = _rows(call, operation.axis)
    root = math.sqrt(length)
    return lipschitz(root, offset=root * math.sqrt(rows) * math.log(length))


# --- the functional style: `keras.ops.gelu(x)` -------------------------------------------------

_OPERATIONS = {
    keras_ops.nn.Relu: activations.relu,
    keras_ops.nn.Relu6: activations.relu6,
    keras_ops.nn.Sigmoid: activations.sigmoid,
    keras_ops.nn.Softplus: activations.softplus,
    keras_ops.nn.Softsign: activations.softsign,
    keras_ops.nn.SparsePlus: activations.sparse_plus,
    keras_ops.nn.Silu: activations.silu,
    keras_ops.nn.LogSigmoid: activations.log_sigmoid,
    keras_ops.nn.HardSigmoid: activations.hard_sigmoid,
    keras_ops.nn.HardSilu: activations.hard_silu,
    keras_ops.nn.HardTanh: activations.hard_tanh,
    keras_ops.nn.TanhShrink: activations.tanh_shrink,
    keras_ops.nn.Selu: activations.selu,
    keras_ops.nn.Gelu: activations.gelu,
    keras_ops.numpy.Tanh: activations.tanh,
}


@register(*_OPERATIONS)
def elementwise(operation, call):
    return with_activation(lipschitz(), _OPERATIONS[type(operation)], call.output_shape)


@register(
    keras_ops.numpy.Absolute,
    keras_ops.numpy.Abs,
    keras_ops.numpy.Negative,
    keras_ops.numpy.Sin,
    keras_ops.numpy.Arctan,
    keras_ops.math.Erf,
)
def odd(operation, call):
    slope = 2.0 / math.sqrt(math.pi) if isinstance(operation, keras_ops.math.Erf) else 1.0
    return lipschitz(slope)


@register(keras_ops.numpy.Cos)
def cosine(operation, call):
    return lipschitz(offset=math.sqrt(size(call.output_shape)))


@register(keras_ops.nn.Celu)
def celu(operation, call):
    if not operation.alpha > 0:
        raise ValueError(f"alpha={operation.alpha} has no bound; use a positive one")
    return with_activation(lipschitz(), activations.celu, call.output_shape)


@register(keras_ops.nn.SoftShrink)
def soft_shrink(operation, call):
    if not operation.threshold >= 0:
        raise ValueError(f"it jumps at threshold={operation.threshold}; use one of at least 0")
    return lipschitz()


@register(keras_ops.nn.Squareplus)
def squareplus(operation, call):
    if not operation.b > 0:
        raise ValueError(f"b={operation.b} has an infinite slope at zero; use a positive one")
    return lipschitz(offset=0.5 * math.sqrt(operation.b * size(call.output_shape)))
