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


@register(layers.Concatenate, keras_ops.numpy.Concatenate)
def concatenate(layer, call):
    if layer.axis % (len(call.output_shape) + 1) == 0:
        raise ValueError(f"axis={layer.axis} joins examples; use another axis")
    return _joined()


@register(keras_ops.numpy.Stack)
def stack(operation, call):
    if operation.axis % (len(call.output_shape) + 1) == 0:
        raise ValueError(f"axis={operation.axis} puts an axis before the batch; use another axis")
    return _joined()


def _joined():
    return Rule(forward=root_of_squares, backward=lambda xs, g: [g for _ in xs])


@register(layers.Multiply)
def multiply(layer, call):
    return product()


def product():
    """Rule of a product, be it elementwise (broadcast or not), of matrices, or a dot product.

    An output is a sum of products of one entry of each factor, in which each pair of entries
    occurs at most once; so `Σ(xy)² ≤ Σx²·Σy²`, and by Cauchy-Schwarz the same for cotangents.
    """

    def others(xs, i):
        return math.prod(x for j, x in enumerate(xs) if j != i)

    return Rule(
        forward=lambda xs: math.prod(xs),
        backward=lambda xs, g: [others(xs, i) * g for i in range(len(xs))],
    )


@register(layers.Dot)
def dot(layer, call):
    if layer.normalize:
        raise ValueError("normalize=True has an unbounded slope at zero; use normalize=False")
    return product()


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
        return product()
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


@register(keras_ops.numpy.Power)
def power(operation, call):
    """`‖xⁿ‖ ≤ ‖x‖ⁿ` entry by entry, and the slope is at most `n·‖x‖ⁿ⁻¹`."""
    exponent = call.args[1] if len(call.args) > 1 else call.kwargs.get("x2")
    if not isinstance(exponent, int) or exponent < 1:
        raise ValueError(f"the exponent must be an integer of at least 1; got {exponent!r}")
    return _power(exponent)


@register(keras_ops.numpy.Square)
def square(operation, call):
    return _power(2)


def _power(n):
    return Rule(
        forward=lambda xs: xs[0] ** n,
        backward=lambda xs, g: [n * xs[0] ** (n - 1) * g],
    )


@register(keras_ops.numpy.Maximum, keras_ops.numpy.Minimum)
def maximum_operation(operation, call):
    constant = _constant(call)
    if constant is None:
        return maximum(operation, call)
    is_maximum = isinstance(operation, keras_ops.numpy.Maximum)
    return _at_least(np.maximum(constant if is_maximum else -constant, 0.0), call)


@register(keras_ops.numpy.Clip)
def clip(operation, call):
    bounds = [fitting(b, call.input_shape) for b in (operation.x_min, operation.x_max)]
    low, high = np.maximum(bounds[0], 0.0), np.maximum(-bounds[1], 0.0)
    return _at_least(np.sqrt(low**2 + high**2), call)


def _at_least(floor, call):
    """`max(x, c)` is `x` or, where it is larger in size, the positive part of `c`."""
    floor = spread_norm(floor, call.input_shape)
    return Rule(
        forward=lambda xs: root_of_squares([xs[0], floor]),
        backward=lambda xs, g: [g],
    )


@register(keras_ops.numpy.Matmul)
def matmul(operation, call):
    operands = [*call.args, *call.kwargs.values()]
    constants = [a for a in operands if not isinstance(a, keras.KerasTensor)]
    if constants:
        matrix = np.asarray(constants[0], dtype=float)
        if matrix.ndim != 2 or not np.isfinite(matrix).all():
            raise ValueError("a constant factor must be a matrix of finite entries")
        if len(call.input_shape) < 2 and constants[0] is operands[0]:
            raise ValueError("a matrix times vectors sums over the batch; use x @ matrix")
        return lipschitz(float(np.linalg.norm(matrix, 2)))
    first, second = call.input_shapes
    if not 2 <= len(first) == len(second) or first[:-2] != second[:-2]:
        raise ValueError(
            "matrices must have equal leading axes, the batch first; for a product of vectors use "
            "keras.layers.Dot, which keeps the batch axes together"
        )
    return product()


@register(keras_ops.numpy.Where)
def where(operation, call):
    """Each output entry is one of the two; the condition is boolean and takes no cotangent."""
    condition, *operands = [*call.args, *call.kwargs.values()]
    tensors = [a for a in (condition, *operands) if isinstance(a, keras.KerasTensor)]
    constants = [a for a in operands if not isinstance(a, keras.KerasTensor)]
    if len(operands) != 2 or len({len(a.shape) for a in tensors}) > 1:
        raise ValueError("where(condition, x1, x2) needs operands of one rank")
    weights = _broadcasts(call)
    if isinstance(condition, keras.KerasTensor):
        weights[0] = 0.0
    else:
        fitting(condition, call.output_shape)
    constants = [fitting(c, call.output_shape) for c in constants]
    offset = root_of_squares([spread_norm(c, call.output_shape) for c in constants])

    def forward(xs):
        values = [w * x for w, x in zip(weights, xs, strict=True) if w]
        return root_of_squares([*values, offset])

    return Rule(forward=forward, backward=lambda xs, g: [w * g for w in weights])


@register(
    keras_ops.numpy.Equal,
    keras_ops.numpy.NotEqual,
    keras_ops.numpy.Greater,
    keras_ops.numpy.GreaterEqual,
    keras_ops.numpy.Less,
    keras_ops.numpy.LessEqual,
    keras_ops.numpy.LogicalAnd,
    keras_ops.numpy.LogicalOr,
    keras_ops.numpy.LogicalNot,
)
def comparison(operation, call):
    _constant(call)
    root = math.sqrt(size(call.output_shape))
    return Rule(forward=lambda xs: root, backward=lambda xs, g: [0.0 for _ in xs])
