"""Rules of elementwise activations, as layers, as operations, and as `activation=` of a layer."""

import math

from keras import activations, layers
from keras.src import ops as keras_ops

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
