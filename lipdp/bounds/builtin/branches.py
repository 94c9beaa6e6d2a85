"""Rules of what joins branches, and of arithmetic between tensors and constants."""

import math

import keras
import numpy as np
from keras import layers
from keras.src import ops as keras_ops

from lipdp.bounds.builtin.scaling import fitting, spread_norm
from lipdp.bounds.rule import Rule, lipschitz, register, root_of_squares, size


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
        return fitting(constants[0], call.input_shape)
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
    return lipschitz(offset=spread_norm(constant, call.input_shape))


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
