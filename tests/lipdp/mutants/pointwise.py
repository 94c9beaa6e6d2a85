"""Activations, normalization, projections of examples, and what moves entries."""

import math

import keras
import pytest
from keras import ops

from lipdp import layers
from lipdp.bounds import lipschitz, rule
from lipdp.bounds.builtin import activations, normalization
from lipdp.bounds.rule import Rule
from tests.lipdp.mutants.mutant import mutant, parts, register

K = keras.layers


@mutant
def group_sort_by_minimum_and_maximum(patch):
    if keras.backend.backend() != "tensorflow":
        pytest.skip("JAX halves the cotangent at ties")

    def call(self, x):
        first, second = ops.split(x, 2, axis=-1)
        return ops.concatenate([ops.maximum(first, second), ops.minimum(first, second)], axis=-1)

    patch.setattr(layers.GroupSort, "call", call)
    return layers.GroupSort(2), (4,)


@mutant
def centering_over_the_batch(patch):
    patch.setattr(layers.Centering, "call", lambda self, x: x - ops.mean(x, axis=0, keepdims=True))
    return layers.Centering(), (4,)


@mutant
def ball_projection_by_division(patch):
    def call(self, x):
        norm = ops.sqrt(ops.sum(ops.square(x), axis=-1, keepdims=True))
        return x * ops.minimum(1.0, self.radius / norm)

    patch.setattr(layers.BallProjection, "call", call)
    return keras.Sequential([keras.Input((3,)), layers.BallProjection(1.0), K.Dense(2)]), None


@mutant
def ball_projection_of_each_position_as_of_all(patch):
    patch.setattr(layers.BallProjection, "bound", lambda self, call: Rule(
        lambda xs: rule.minimum(xs[0], self.radius), lambda xs, g: [g]
    ))  # fmt: skip
    return keras.Sequential(
        [keras.Input((3, 2)), layers.BallProjection(1.0, per_position=True), K.Dense(2)]
    ), None


@mutant
def clip_of_the_gradient_that_does_not_clip(patch):
    patch.setattr(layers.ClipGradient, "call", lambda self, x: x)
    return layers.ClipGradient(0.5), (3,)


@mutant
def activation_taken_for_1_lipschitz(patch):
    patch.setitem(activations.ACTIVATIONS, keras.activations.selu, (1.0, 0.0))
    return K.Dense(3, activation="selu"), (3,)


@mutant
def activation_without_its_offset(patch):
    patch.setitem(activations.ACTIVATIONS, keras.activations.softplus, (1.0, 0.0))
    return K.Activation("softplus"), (3,)


@mutant
def dropout_without_its_factor(patch):
    register(patch, K.Dropout, lambda layer, call: lipschitz())
    return K.Dropout(0.5), (8,)


@mutant
def repetition_without_its_root(patch):
    register(patch, K.RepeatVector, lambda layer, call: lipschitz())
    return K.RepeatVector(3), (4,)


@mutant
def layer_norm_as_if_it_kept_norms(patch):
    """Without 1/√ε in the cotangent."""
    right = normalization.layer_normalization
    register(patch, K.LayerNormalization, lambda layer, call: Rule(
        right(layer, call).forward, lambda xs, g: [g], right(layer, call).gradients
    ))  # fmt: skip
    return K.LayerNormalization(), (4,)


@mutant
def layer_norm_of_one_position(patch):
    """√n of a row instead of √N of all."""
    right = normalization.layer_normalization
    register(patch, K.LayerNormalization, lambda layer, call: Rule(
        lambda xs: rule.minimum(math.sqrt(call.input_shape[-1]), right(layer, call).forward(xs)),
        *parts(right(layer, call)),
    ))  # fmt: skip
    return K.LayerNormalization(), (6, 4)


@mutant
def gain_not_measured(patch):
    right = normalization.rms_normalization
    register(patch, K.RMSNormalization, lambda layer, call: Rule(
        right(layer, call).forward,
        lambda xs, g: [g / math.sqrt(layer.epsilon)],
        right(layer, call).gradients,
    ))  # fmt: skip
    layer = K.RMSNormalization()
    layer.build((None, 4))
    layer.scale.assign([1.0, 3.0, -1.0, 0.5])
    return layer, (4,)


@mutant
def half_angle_counted_once(patch):
    """The angle itself as the weight, so that `v` turns at full speed."""

    def call(self, x):
        first, second = ops.split(x, 2, axis=-1)
        sine, cosine = ops.sin(self.theta), ops.cos(self.theta)
        beyond = 2.0 * ops.relu(cosine * second - sine * first)
        return ops.concatenate([first + sine * beyond, second - cosine * beyond], axis=-1)

    patch.setattr(layers.Householder, "call", call)
    return layers.Householder(), (4,)


@mutant
def slopes_of_prelu_not_measured(patch):
    register(patch, K.PReLU, lambda layer, call: lipschitz(
        gradients=lambda x, g: [(layer.alpha, x * g)]
    ))  # fmt: skip
    return K.PReLU(keras.initializers.Constant(1.5)), (4,)


@mutant
def slopes_of_prelu_of_one_position(patch):
    register(patch, K.PReLU, lambda layer, call: lipschitz(
        ops.maximum(1.0, ops.max(ops.abs(layer.alpha))),
        gradients=lambda x, g: [(layer.alpha, x * g / math.sqrt(call.positions))],
    ))  # fmt: skip
    return K.PReLU(shared_axes=1), (6, 2)


@mutant
def resizing_by_the_ratio_of_sizes(patch):
    """As if every cell were copied equally often."""
    register(patch, K.Resizing, lambda layer, call: lipschitz(7 / 3))
    return K.Resizing(7, 7, interpolation="nearest"), (3, 3, 1)


@mutant
def normalization_without_its_mean(patch):
    register(patch, K.Normalization, lambda layer, call: lipschitz(1.0))
    return K.Normalization(mean=1.0, variance=1.0), (3,)


@mutant
def alpha_dropout_without_its_offset(patch):
    register(patch, K.AlphaDropout, lambda layer, call: lipschitz(1.0))
    return K.AlphaDropout(0.5), (8,)


@mutant
def floor_forgotten(patch):
    patch.setattr(layers.FlooredNormalization, "bound", lambda self, call: Rule(
        lambda xs: rule.minimum(xs[0] / self.floor, 1.0), lambda xs, g: [g]
    ))  # fmt: skip
    return layers.FlooredNormalization(1.0, 0.1), (4,)


@mutant
def one_group_for_all(patch):
    patch.setattr(layers.FlooredNormalization, "bound", lambda self, call: Rule(
        lambda xs: rule.minimum(xs[0] / self.floor, 1.0), lambda xs, g: [g / self.floor]
    ))  # fmt: skip
    return layers.FlooredNormalization(1.0, 0.1, groups=2), (4,)


@mutant
def frozen_batch_normalization_without_its_statistics(patch):
    register(patch, K.BatchNormalization, lambda layer, call: lipschitz())
    layer = K.BatchNormalization(trainable=False)
    layer.build((None, 4))
    layer.moving_variance.assign(ops.full((4,), 0.01))
    return layer, (4,)
