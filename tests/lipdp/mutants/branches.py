"""Operations on one tensor or several."""

import math

import keras
import numpy as np
from keras import ops
from keras.src import ops as keras_ops

from lipdp import layers
from lipdp.bounds import lipschitz
from lipdp.bounds.builtin import branches
from lipdp.bounds.rule import Rule
from tests.lipdp.mutants.mutant import mutant, register

K = keras.layers


@mutant
def multiply_forgets_a_branch(patch):
    register(patch, K.Multiply, lambda layer, call: Rule(
        lambda xs: xs[0] * xs[1], lambda xs, g: [xs[1] * g, 0.0 * g]
    ))  # fmt: skip
    return K.Multiply(), [(3,), (3,)]


@mutant
def concatenation_by_the_largest(patch):
    register(patch, K.Concatenate, lambda layer, call: Rule(max, lambda xs, g: [g for _ in xs]))
    return K.Concatenate(), [(3,), (3,)]


@mutant
def residual_by_the_larger_branch(patch):
    register(patch, K.Add, lambda layer, call: Rule(max, lambda xs, g: [g for _ in xs]))
    x = keras.Input((3,))
    return keras.Model(x, K.Add()([x, K.ReLU()(x)])), None


@mutant
def broadcast_branch_without_its_root(patch):
    patch.setattr(branches, "_broadcasts", lambda call: [1.0 for _ in call.input_shapes])
    return K.Add(), [(4, 3), (1, 3)]


@mutant
def mean_without_its_root(patch):
    register(patch, keras_ops.numpy.Mean, lambda operation, call: lipschitz(1 / 4))
    x = keras.Input((4, 3))
    return keras.Model(x, ops.mean(x, axis=1)), None


@mutant
def sum_without_its_root(patch):
    register(patch, keras_ops.numpy.Sum, lambda operation, call: lipschitz())
    x = keras.Input((4, 3))
    return keras.Model(x, ops.sum(x, axis=1)), None


@mutant
def average_over_the_batch(patch):
    register(patch, keras_ops.numpy.Mean, lambda operation, call: lipschitz())
    x = keras.Input((3,))
    return keras.Model(x, x - ops.mean(x, axis=0, keepdims=True)), None


@mutant
def softmax_taken_for_quarter_lipschitz(patch):
    register(patch, K.Softmax, lambda layer, call: Rule(
        lambda xs: 1.0, lambda xs, g: [0.25 * g]
    ))  # fmt: skip
    return K.Softmax(), (2,)


@mutant
def softmax_of_one_row(patch):
    register(patch, K.Softmax, lambda layer, call: Rule(lambda xs: 1.0, lambda xs, g: [0.5 * g]))
    return K.Softmax(), (3, 2)


@mutant
def log_softmax_taken_for_1_lipschitz(patch):
    register(patch, keras_ops.nn.LogSoftmax, lambda operation, call: lipschitz(
        offset=math.sqrt(5) * math.log(5)
    ))  # fmt: skip
    x = keras.Input((5,))
    return keras.Model(x, ops.log_softmax(100.0 * x)), None


@mutant
def maximum_with_a_constant_without_its_offset(patch):
    register(patch, keras_ops.numpy.Maximum, lambda operation, call: lipschitz())
    x = keras.Input((4,))
    return keras.Model(x, ops.maximum(x, 0.8)), None


@mutant
def square_by_its_norm(patch):
    register(patch, keras_ops.numpy.Square, lambda operation, call: Rule(
        lambda xs: xs[0] ** 2, lambda xs, g: [xs[0] * g]
    ))  # fmt: skip
    x = keras.Input((3,))
    return keras.Model(x, ops.square(x)), None


@mutant
def entries_taken_twice_counted_once(patch):
    register(patch, keras_ops.numpy.Take, lambda operation, call: lipschitz())
    x = keras.Input((3,))
    return keras.Model(x, ops.take(x, [0, 1, 1], axis=1)), None


@mutant
def gate_gradient_of_one_branch(patch):
    right = layers.Gate.bound
    patch.setattr(layers.Gate, "bound", lambda self, call: Rule(
        right(self, call).forward,
        right(self, call).backward,
        lambda xs, g: [(self.gate, 0.25 * xs[0] * g)],
    ))  # fmt: skip
    return layers.Gate(), [(3,), (3,)]


@mutant
def matrix_by_its_largest_entry(patch):
    register(patch, keras_ops.numpy.Matmul, lambda operation, call: lipschitz(1.0))
    x = keras.Input((3,))
    return keras.Model(x, x @ np.ones((3, 2), "float32")), None


@mutant
def stop_gradient_forgotten(patch):
    """A product with its own constant copy has the slope of one factor, not of none."""
    register(patch, keras_ops.numpy.Multiply, lambda operation, call: Rule(
        lambda xs: xs[0] * xs[1], lambda xs, g: [0.0 * g, xs[0] * g]
    ))  # fmt: skip
    x = keras.Input((3,))
    return keras.Model(x, x * ops.stop_gradient(x)), None
