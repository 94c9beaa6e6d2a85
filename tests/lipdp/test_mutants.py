"""Rules broken on purpose: the attack must find a violation of each.

A mutant patches one rule or layer and returns `(target, input_shape)` for which that matters.
"""

import math

import keras
import numpy as np
import pytest
from keras import ops

from lipdp import layers, norms, projections
from lipdp.audit import attack_bounds
from lipdp.bounds import lipschitz, rule, walk
from lipdp.bounds.builtin import activations, branches, pooling
from lipdp.bounds.builtin import linear as linear_rules
from lipdp.bounds.rule import Rule
from lipdp.layers.projected import Projected

K = keras.layers


def bias_without_positions(patch):
    def linear(layer, call, kernel_norm, multiplicity, note=""):
        right = right_linear(layer, call, kernel_norm, multiplicity, note)
        return Rule(
            right.forward,
            right.backward,
            lambda xs, g: [(v, g if v is layer.bias else b) for v, b in right.gradients(xs, g)],
        )

    right_linear = linear_rules.linear
    patch.setattr(linear_rules, "linear", linear)
    return K.Dense(2), (4, 3)


def output_without_bias_positions(patch):
    register(patch, K.Dense, lambda layer, call: Rule(
        lambda xs: rule.matrix_norm(layer.kernel) * xs[0] + rule.vector_norm(layer.bias),
        *parts(linear_rules.dense(layer, call)),
    ))  # fmt: skip
    return K.Dense(2), (4, 3)


def conv_gradient_with_mean_multiplicity(patch):
    right = norms.conv_multiplicity

    def mean(kernel_shape, input_shape, *args, **kwargs):
        return right(kernel_shape, input_shape, *args, **kwargs) * 0.5

    patch.setattr(norms, "conv_multiplicity", mean)
    return K.Conv2D(1, 3, padding="same", use_bias=False), (12, 12, 1)


def conv_gradient_without_multiplicity(patch):
    patch.setattr(norms, "conv_multiplicity", lambda *a, **k: 1)
    return K.Conv2D(2, 2, use_bias=False), (5, 5, 1)


def conv_norm_on_the_circular_grid(patch):
    """A grid of N = n cells does not bound a `same` convolution."""

    def bound(kernel, input_shape, strides, padding, dilation_rate, groups):
        transfer = np.fft.fft2(ops.convert_to_numpy(kernel), s=input_shape, axes=(0, 1))
        return float(np.linalg.norm(transfer, 2, axis=(-2, -1)).max())

    patch.setattr(rule.norms, "conv_norm_bound", bound)
    return K.Conv2D(1, 3, padding="same", use_bias=False), (3, 3, 1)


def conv_norm_of_the_reshaped_kernel(patch):
    def bound(kernel, input_shape, **geometry):
        return norms.spectral_norm_bound(ops.reshape(kernel, (-1, kernel.shape[-1])))

    patch.setattr(norms, "conv_norm_bound", bound)
    return K.Conv2D(2, 3, padding="same", use_bias=False), (6, 6, 1)


def power_iteration_as_norm(patch):
    def bound(matrix, gap=None):
        matrix = ops.convert_to_numpy(matrix)
        x = np.random.default_rng(0).standard_normal(matrix.shape[-1])
        for _ in range(2):
            x = matrix.T @ (matrix @ (x / np.linalg.norm(x)))
        return float(np.linalg.norm(matrix @ (x / np.linalg.norm(x))))

    patch.setattr(norms, "spectral_norm_bound", bound)
    return K.Dense(24, use_bias=False), (24,)


def l2_pooling_without_gain(patch):
    patch.setattr(layers.L2NormPooling2D, "bound", lambda self, call: lipschitz())
    return layers.L2NormPooling2D(3, strides=1), (5, 5, 1)


def max_pooling_without_gain(patch):
    register(patch, K.MaxPooling2D, lambda layer, call: lipschitz())
    return K.MaxPooling2D(3, strides=1), (5, 5, 1)


def max_pooling_by_one_cell(patch):
    """3-D pooling on TensorFlow hands a cotangent to all ties."""
    if keras.backend.backend() != "tensorflow":
        pytest.skip("only TensorFlow")
    register(patch, K.MaxPooling3D, lambda layer, call: lipschitz())
    return K.MaxPooling3D(2), (4, 4, 4, 1)


def average_pooling_as_if_valid(patch):
    register(
        patch,
        K.AveragePooling2D,
        lambda layer, call: lipschitz(1 / math.sqrt(math.prod(layer.pool_size))),
    )
    return K.AveragePooling2D(3, strides=1, padding="same"), (5, 5, 1)


def average_pooling_divided_by_all_cells(patch):
    """√(w/Πpool): as if Keras divided by the absent cells, too."""
    register(
        patch,
        K.AveragePooling2D,
        lambda layer, call: lipschitz(
            math.sqrt(
                pooling.pool_windows(layer.pool_size, layer.strides) / math.prod(layer.pool_size)
            )
        ),
    )
    return K.AveragePooling2D(2, padding="same"), (3, 3, 1)


def multiply_forgets_a_branch(patch):
    register(patch, K.Multiply, lambda layer, call: Rule(
        lambda xs: xs[0] * xs[1], lambda xs, g: [xs[1] * g, 0.0 * g]
    ))  # fmt: skip
    return K.Multiply(), [(3,), (3,)]


def concatenation_by_the_largest(patch):
    register(patch, K.Concatenate, lambda layer, call: Rule(max, lambda xs, g: [g for _ in xs]))
    return K.Concatenate(), [(3,), (3,)]


def residual_by_the_larger_branch(patch):
    register(patch, K.Add, lambda layer, call: Rule(max, lambda xs, g: [g for _ in xs]))
    x = keras.Input((3,))
    return keras.Model(x, K.Add()([x, K.ReLU()(x)])), None


def broadcast_branch_without_its_root(patch):
    patch.setattr(branches, "_broadcasts", lambda call: [1.0 for _ in call.input_shapes])
    return K.Add(), [(4, 3), (1, 3)]


def shared_weight_counted_once(patch):
    right = walk.network_bounds

    def once(network, *args):
        found = right(network, *args)
        for layer in found.layers:
            found.gradients.update(layer.gradients)
        return found

    patch.setattr("lipdp.audit.attack.network_bounds", once)
    x = keras.Input((3,))
    shared = K.Dense(3, use_bias=False)
    return keras.Model(x, K.Add()([shared(x), K.ReLU()(shared(x))])), None


def group_sort_by_minimum_and_maximum(patch):
    if keras.backend.backend() != "tensorflow":
        pytest.skip("JAX halves the cotangent at ties")

    def call(self, x):
        first, second = ops.split(x, 2, axis=-1)
        return ops.concatenate([ops.maximum(first, second), ops.minimum(first, second)], axis=-1)

    patch.setattr(layers.GroupSort, "call", call)
    return layers.GroupSort(2), (4,)


def centering_over_the_batch(patch):
    patch.setattr(layers.Centering, "call", lambda self, x: x - ops.mean(x, axis=0, keepdims=True))
    return layers.Centering(), (4,)


def ball_projection_by_division(patch):
    def call(self, x):
        norm = ops.sqrt(ops.sum(ops.square(x), axis=-1, keepdims=True))
        return x * ops.minimum(1.0, self.radius / norm)

    patch.setattr(layers.BallProjection, "call", call)
    return keras.Sequential([keras.Input((3,)), layers.BallProjection(1.0), K.Dense(2)]), None


def ball_projection_of_each_position_as_of_all(patch):
    patch.setattr(layers.BallProjection, "bound", lambda self, call: Rule(
        lambda xs: rule.minimum(xs[0], self.radius), lambda xs, g: [g]
    ))  # fmt: skip
    return keras.Sequential(
        [keras.Input((3, 2)), layers.BallProjection(1.0, per_position=True), K.Dense(2)]
    ), None


def l2_pooling_with_an_infinite_slope(patch):
    def call(self, x):
        return ops.sqrt(self._window_mean(ops.square(x)) * math.prod(self.pool_size))

    patch.setattr(layers.L2NormPooling2D, "call", call)
    return layers.L2NormPooling2D(2), (4, 4, 1)


def clip_of_the_gradient_that_does_not_clip(patch):
    patch.setattr(layers.ClipGradient, "call", lambda self, x: x)
    return layers.ClipGradient(0.5), (3,)


def activation_taken_for_1_lipschitz(patch):
    patch.setitem(activations.ACTIVATIONS, keras.activations.selu, (1.0, 0.0))
    return K.Dense(3, activation="selu"), (3,)


def activation_without_its_offset(patch):
    patch.setitem(activations.ACTIVATIONS, keras.activations.softplus, (1.0, 0.0))
    return K.Activation("softplus"), (3,)


def dropout_without_its_factor(patch):
    register(patch, K.Dropout, lambda layer, call: lipschitz())
    return K.Dropout(0.5), (8,)


def repetition_without_its_root(patch):
    register(patch, K.RepeatVector, lambda layer, call: lipschitz())
    return K.RepeatVector(3), (4,)


def projection_that_does_nothing(patch):
    patch.setattr("lipdp.projections.SpectralBall.__call__", lambda self, w: w)
    return layers.SpectralDense(3), (4,)


def initial_weights_outside_of_their_sets(patch):
    patch.setattr(Projected, "build", lambda self, shape: super(Projected, self).build(shape))
    return layers.SpectralDense(3, kernel_initializer="ones"), (4,)


def depthwise_norm_by_output_channels(patch):
    """The largest norm over single filters: √M too small where the filters agree."""

    def bounds(kernel, input_shape, **geometry):
        kernel = ops.convert_to_tensor(kernel)
        filters = ops.split(kernel, kernel.shape[-1], axis=-1)
        return ops.max(ops.stack([right(f, input_shape, **geometry) for f in filters]), axis=0)

    right = norms.depthwise_norm_bounds
    patch.setattr(norms, "depthwise_norm_bounds", bounds)
    return K.DepthwiseConv2D(1, depth_multiplier=3, use_bias=False), (3, 3, 2)


def depthwise_gradient_without_multiplicity(patch):
    patch.setattr(norms, "conv_multiplicity", lambda *a, **k: 1)
    return layers.SpectralDepthwiseConv2D(2, certificate="fft", use_bias=False), (5, 5, 1)


def separable_pointwise_gradient_without_the_depthwise_norm(patch):
    def mutant(layer, call):
        right = linear_rules.separable_conv(layer, call)
        return Rule(
            right.forward,
            right.backward,
            lambda xs, g: [
                (v, xs[0] * g if v is layer.pointwise_kernel else b)
                for v, b in right.gradients(xs, g)
            ],
        )

    register(patch, K.SeparableConv2D, mutant)
    return K.SeparableConv2D(2, 2, use_bias=False), (5, 5, 1)


def transposed_norm_of_the_reshaped_kernel(patch):
    def bound(kernel, *geometry, **options):
        return norms.spectral_norm_bound(ops.reshape(kernel, (-1, kernel.shape[-1])))

    patch.setattr(norms, "conv_transpose_norm_bound", bound)
    return layers.SpectralConv2DTranspose(2, 3, use_bias=False), (4, 4, 1)


def transposed_gradient_without_multiplicity(patch):
    patch.setattr(norms, "conv_transpose_multiplicity", lambda *a, **k: 1)
    options = dict(strides=2, certificate="fft", use_bias=False)
    return layers.SpectralConv2DTranspose(2, 4, **options), (3, 3, 1)


def transposed_grid_of_the_input(patch):
    """As if a transposed convolution did not grow the map."""
    right = norms._kernel_norm_bounds

    def bounds(split, multiplicity, grid, dilations, certificate):
        sizes = split.shape[1:-2]
        grid = [n - k + 1 for n, k in zip(grid, sizes, strict=True)]
        return right(split, multiplicity, grid, dilations, "fft")

    patch.setattr(norms, "_kernel_norm_bounds", bounds)
    return K.Conv2DTranspose(1, 3, use_bias=False), (2, 2, 1)


def einsum_norm_of_the_first_matrix(patch):
    right = linear_rules._matrices
    patch.setattr(linear_rules, "_matrices", lambda *arguments: right(*arguments)[:1])
    return K.EinsumDense("abc,bcd->abd", (3, 2)), (3, 2)


def gain_taken_for_one(patch):
    patch.setattr(layers.ChannelGain, "bound", lambda self, call: lipschitz(
        gradients=lambda x, g: [(self.gamma, x * g)]
    ))  # fmt: skip
    return layers.ChannelGain(2.0), (3, 2)


def residual_conv_projected_without_the_identity(patch):
    ball = projections.ResidualConvBall
    patch.setattr(ball, "bound", staticmethod(projections.ConvBall.bound))
    patch.setattr(ball, "__call__", projections.ConvBall.__call__)
    return layers.ResidualConv2D(1, 3, use_bias=False), (4, 4, 1)


def sandwich_gradient_without_its_root(patch):
    def bound(self, call):
        return lipschitz(gradients=lambda x, g: [(self.kernel, 2.0 * x * g)])

    patch.setattr(layers.SandwichDense, "bound", bound)
    return layers.SandwichDense(3, 6, use_bias=False), (4,)


def convex_potential_that_counts_one_use(patch):
    patch.setattr(layers.ConvexPotential, "bound", lambda self, call: lipschitz(
        gradients=lambda x, g: [(self.kernel, 2.0 * x * g)]
    ))  # fmt: skip
    return layers.ConvexPotential(use_bias=False), (3,)


def convex_potential_bias_without_its_factor(patch):
    right = layers.ConvexPotential.bound

    def bound(self, call):
        rule = right(self, call)
        halved = lambda xs, g: [  # noqa: E731
            (v, b / 2 if v is self.bias else b) for v, b in rule.gradients(xs, g)
        ]
        return Rule(rule.forward, rule.backward, halved)

    patch.setattr(layers.ConvexPotential, "bound", bound)
    return layers.ConvexPotential(), (2, 3)


def convex_potential_conv_without_multiplicity(patch):
    patch.setattr(norms, "conv_multiplicity", lambda *a, **k: 1)
    options = dict(certificate="fft", use_bias=False)
    return layers.ConvexPotentialConv2D(2, 1, **options), (5, 5, 1)


def reflector_that_counts_one_use(patch):
    patch.setattr(layers.BlockReflector, "bound", lambda self, call: lipschitz(
        gradients=lambda x, g: [(self.kernel, 2.0 * x * g)]
    ))  # fmt: skip
    return layers.BlockReflector(2), (4,)


def cayley_without_its_jacobian(patch):
    patch.setattr(layers.CayleyDense, "_SLOPE", 0.5**0.5)
    return layers.CayleyDense(3, use_bias=False), (3,)


def cayley_without_the_factor_of_the_skew_part(patch):
    patch.setattr(layers.CayleyDense, "_SLOPE", 2.0**0.5)
    return layers.CayleyDense(3, use_bias=False), (3,)


def exponential_without_the_factor_of_the_skew_part(patch):
    patch.setattr(layers.ExponentialDense, "_SLOPE", 0.5**0.5)
    return layers.ExponentialDense(3, use_bias=False), (3,)


def almost_orthogonal_by_the_norms_of_channels(patch):
    def scales(kernel):
        axis = -1 if kernel.shape[-1] <= kernel.shape[-2] else -2
        others = tuple(a for a in range(len(kernel.shape)) if a != len(kernel.shape) + axis)
        return 1.0 / ops.sqrt(ops.sum(ops.square(kernel), axis=others)), axis

    patch.setattr(norms, "almost_orthogonal_scales", scales)
    return layers.AlmostOrthogonalDense(3, use_bias=False), (4,)


def almost_orthogonal_conv_without_shifts(patch):
    """The channels' correlations at shift zero alone."""
    right = norms.almost_orthogonal_scales

    def scales(kernel):
        flat, axis = right(ops.reshape(kernel, (-1, kernel.shape[-1])))
        return flat, axis

    patch.setattr(norms, "almost_orthogonal_scales", scales)
    return layers.AlmostOrthogonalConv2D(1, 3, padding="same", use_bias=False), (5, 5, 1)


def register(patch, cls, mutant):
    patch.setitem(rule._RULES, cls, mutant)


def parts(right):
    return right.backward, right.gradients


MUTANTS = [
    bias_without_positions,
    output_without_bias_positions,
    conv_gradient_with_mean_multiplicity,
    conv_gradient_without_multiplicity,
    conv_norm_on_the_circular_grid,
    conv_norm_of_the_reshaped_kernel,
    power_iteration_as_norm,
    l2_pooling_without_gain,
    max_pooling_without_gain,
    max_pooling_by_one_cell,
    average_pooling_as_if_valid,
    average_pooling_divided_by_all_cells,
    multiply_forgets_a_branch,
    concatenation_by_the_largest,
    residual_by_the_larger_branch,
    broadcast_branch_without_its_root,
    shared_weight_counted_once,
    group_sort_by_minimum_and_maximum,
    centering_over_the_batch,
    ball_projection_by_division,
    ball_projection_of_each_position_as_of_all,
    l2_pooling_with_an_infinite_slope,
    clip_of_the_gradient_that_does_not_clip,
    activation_taken_for_1_lipschitz,
    activation_without_its_offset,
    dropout_without_its_factor,
    repetition_without_its_root,
    projection_that_does_nothing,
    initial_weights_outside_of_their_sets,
    depthwise_norm_by_output_channels,
    depthwise_gradient_without_multiplicity,
    separable_pointwise_gradient_without_the_depthwise_norm,
    transposed_norm_of_the_reshaped_kernel,
    transposed_gradient_without_multiplicity,
    transposed_grid_of_the_input,
    einsum_norm_of_the_first_matrix,
    gain_taken_for_one,
    residual_conv_projected_without_the_identity,
    sandwich_gradient_without_its_root,
    convex_potential_that_counts_one_use,
    convex_potential_bias_without_its_factor,
    convex_potential_conv_without_multiplicity,
    reflector_that_counts_one_use,
    cayley_without_its_jacobian,
    cayley_without_the_factor_of_the_skew_part,
    exponential_without_the_factor_of_the_skew_part,
    almost_orthogonal_by_the_norms_of_channels,
    almost_orthogonal_conv_without_shifts,
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.__name__)
def test_mutant_is_caught(mutant, monkeypatch):
    target, shape = mutant(monkeypatch)
    network = isinstance(target, keras.Model)
    bounded = network and any(isinstance(v, layers.BallProjection) for v in target.layers)
    radius = {} if bounded or not network else {"input_bound": 1.0}
    result = attack_bounds(target, shape, training=isinstance(target, K.Dropout), **radius)
    assert result.ratio > 1.003, result.attained
