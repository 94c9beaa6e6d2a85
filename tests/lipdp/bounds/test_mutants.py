"""Rules broken on purpose: the attack must find a violation of each.

A mutant patches one rule or layer and returns `(target, input_shape)` for which that matters.
"""

import math

import keras
import numpy as np
import pytest
from keras import ops
from keras.src import ops as keras_ops

from lipdp import layers
from lipdp.audit import attack_bounds
from lipdp.autodiff import compiled, vjp
from lipdp.bounds import lipschitz, norms, projections, rule, walk
from lipdp.bounds.builtin import activations, branches, normalization, pooling
from lipdp.bounds.builtin import linear as linear_rules
from lipdp.bounds.rule import Rule
from lipdp.layers.projected import Projected

pytestmark = pytest.mark.any_backend

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
    """3-D pooling on TensorFlow hands a cotangent to all ties, on some processors."""
    pool = K.MaxPooling3D(2)
    slope_of = compiled(lambda x: vjp(lambda x: [pool(x)], [x], lambda v: [v[0] + 1.0])[1][0])
    slope = slope_of(ops.zeros((1, 2, 2, 2, 1)))
    if np.count_nonzero(ops.convert_to_numpy(slope)) == 1:
        pytest.skip("here one of the ties gets all of it")
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


def layer_norm_as_if_it_kept_norms(patch):
    """Without 1/√ε in the cotangent."""
    right = normalization.layer_normalization
    register(patch, K.LayerNormalization, lambda layer, call: Rule(
        right(layer, call).forward, lambda xs, g: [g], right(layer, call).gradients
    ))  # fmt: skip
    return K.LayerNormalization(), (4,)


def layer_norm_of_one_position(patch):
    """√n of a row instead of √N of all."""
    right = normalization.layer_normalization
    register(patch, K.LayerNormalization, lambda layer, call: Rule(
        lambda xs: rule.minimum(math.sqrt(call.input_shape[-1]), right(layer, call).forward(xs)),
        *parts(right(layer, call)),
    ))  # fmt: skip
    return K.LayerNormalization(), (6, 4)


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


def half_angle_counted_once(patch):
    """The angle itself as the weight, so that `v` turns at full speed."""

    def call(self, x):
        first, second = ops.split(x, 2, axis=-1)
        sine, cosine = ops.sin(self.theta), ops.cos(self.theta)
        beyond = 2.0 * ops.relu(cosine * second - sine * first)
        return ops.concatenate([first + sine * beyond, second - cosine * beyond], axis=-1)

    patch.setattr(layers.Householder, "call", call)
    return layers.Householder(), (4,)


def slopes_of_prelu_not_measured(patch):
    register(patch, K.PReLU, lambda layer, call: lipschitz(
        gradients=lambda x, g: [(layer.alpha, x * g)]
    ))  # fmt: skip
    return K.PReLU(keras.initializers.Constant(1.5)), (4,)


def slopes_of_prelu_of_one_position(patch):
    register(patch, K.PReLU, lambda layer, call: lipschitz(
        ops.maximum(1.0, ops.max(ops.abs(layer.alpha))),
        gradients=lambda x, g: [(layer.alpha, x * g / math.sqrt(call.positions))],
    ))  # fmt: skip
    return K.PReLU(shared_axes=1), (6, 2)


def mean_without_its_root(patch):
    register(patch, keras_ops.numpy.Mean, lambda operation, call: lipschitz(1 / 4))
    x = keras.Input((4, 3))
    return keras.Model(x, ops.mean(x, axis=1)), None


def sum_without_its_root(patch):
    register(patch, keras_ops.numpy.Sum, lambda operation, call: lipschitz())
    x = keras.Input((4, 3))
    return keras.Model(x, ops.sum(x, axis=1)), None


def average_over_the_batch(patch):
    register(patch, keras_ops.numpy.Mean, lambda operation, call: lipschitz())
    x = keras.Input((3,))
    return keras.Model(x, x - ops.mean(x, axis=0, keepdims=True)), None


def softmax_taken_for_quarter_lipschitz(patch):
    register(patch, K.Softmax, lambda layer, call: Rule(
        lambda xs: 1.0, lambda xs, g: [0.25 * g]
    ))  # fmt: skip
    return K.Softmax(), (2,)


def softmax_of_one_row(patch):
    register(patch, K.Softmax, lambda layer, call: Rule(lambda xs: 1.0, lambda xs, g: [0.5 * g]))
    return K.Softmax(), (3, 2)


def log_softmax_taken_for_1_lipschitz(patch):
    register(patch, keras_ops.nn.LogSoftmax, lambda operation, call: lipschitz(
        offset=math.sqrt(5) * math.log(5)
    ))  # fmt: skip
    x = keras.Input((5,))
    return keras.Model(x, ops.log_softmax(100.0 * x)), None


def maximum_with_a_constant_without_its_offset(patch):
    register(patch, keras_ops.numpy.Maximum, lambda operation, call: lipschitz())
    x = keras.Input((4,))
    return keras.Model(x, ops.maximum(x, 0.8)), None


def square_by_its_norm(patch):
    register(patch, keras_ops.numpy.Square, lambda operation, call: Rule(
        lambda xs: xs[0] ** 2, lambda xs, g: [xs[0] * g]
    ))  # fmt: skip
    x = keras.Input((3,))
    return keras.Model(x, ops.square(x)), None


def entries_taken_twice_counted_once(patch):
    register(patch, keras_ops.numpy.Take, lambda operation, call: lipschitz())
    x = keras.Input((3,))
    return keras.Model(x, ops.take(x, [0, 1, 1], axis=1)), None


def resizing_by_the_ratio_of_sizes(patch):
    """As if every cell were copied equally often."""
    register(patch, K.Resizing, lambda layer, call: lipschitz(7 / 3))
    return K.Resizing(7, 7, interpolation="nearest"), (3, 3, 1)


def normalization_without_its_mean(patch):
    register(patch, K.Normalization, lambda layer, call: lipschitz(1.0))
    return K.Normalization(mean=1.0, variance=1.0), (3,)


def alpha_dropout_without_its_offset(patch):
    register(patch, K.AlphaDropout, lambda layer, call: lipschitz(1.0))
    return K.AlphaDropout(0.5), (8,)


def adaptive_pooling_as_if_windows_did_not_overlap(patch):
    register(patch, K.AdaptiveAveragePooling1D, lambda layer, call: lipschitz(
        1 / math.sqrt(math.ceil(call.input_shape[0] / layer.output_size[0]))
    ))  # fmt: skip
    return K.AdaptiveAveragePooling1D(5), (7, 1)


def floor_forgotten(patch):
    patch.setattr(layers.FlooredNormalization, "bound", lambda self, call: Rule(
        lambda xs: rule.minimum(xs[0] / self.floor, 1.0), lambda xs, g: [g]
    ))  # fmt: skip
    return layers.FlooredNormalization(1.0, 0.1), (4,)


def one_group_for_all(patch):
    patch.setattr(layers.FlooredNormalization, "bound", lambda self, call: Rule(
        lambda xs: rule.minimum(xs[0] / self.floor, 1.0), lambda xs, g: [g / self.floor]
    ))  # fmt: skip
    return layers.FlooredNormalization(1.0, 0.1, groups=2), (4,)


def gate_gradient_of_one_branch(patch):
    right = layers.Gate.bound
    patch.setattr(layers.Gate, "bound", lambda self, call: Rule(
        right(self, call).forward,
        right(self, call).backward,
        lambda xs, g: [(self.gate, 0.25 * xs[0] * g)],
    ))  # fmt: skip
    return layers.Gate(), [(3,), (3,)]


def matrix_by_its_largest_entry(patch):
    register(patch, keras_ops.numpy.Matmul, lambda operation, call: lipschitz(1.0))
    x = keras.Input((3,))
    return keras.Model(x, x @ np.ones((3, 2), "float32")), None


def stop_gradient_forgotten(patch):
    """A product with its own constant copy has the slope of one factor, not of none."""
    register(patch, keras_ops.numpy.Multiply, lambda operation, call: Rule(
        lambda xs: xs[0] * xs[1], lambda xs, g: [0.0 * g, xs[0] * g]
    ))  # fmt: skip
    x = keras.Input((3,))
    return keras.Model(x, x * ops.stop_gradient(x)), None


def projection_that_does_nothing(patch):
    patch.setattr("lipdp.bounds.projections.SpectralBall.__call__", lambda self, w: w)
    return layers.SpectralDense(3), (4,)


def mutate(patch, cls, **factors):
    """Multiplies parts of a layer's rule; a gradient's factor goes by the end of its path."""
    right = cls.bound

    def bound(self, call):
        rule = right(self, call)
        return Rule(
            lambda xs: factors.get("forward", 1.0) * rule.forward(xs),
            lambda xs, g: [factors.get("backward", 1.0) * b for b in rule.backward(xs, g)],
            lambda xs, g: [
                (v, factors.get(v.path.rpartition("/")[2], 1.0) * b)
                for v, b in rule.gradients(xs, g)
            ],
            masks=True,
        )

    patch.setattr(cls, "bound", bound)


def embedding_gradient_without_positions(patch):
    mutate(patch, layers.Embedding, embeddings=1 / math.sqrt(5))
    return layers.Embedding(6, 3), (5,)


def embedding_norm_of_one_row(patch):
    mutate(patch, layers.Embedding, forward=1 / math.sqrt(5))
    return layers.Embedding(6, 3), (5,)


def embedding_bag_as_if_tokens_differ(patch):
    mutate(patch, layers.EmbeddingBag, embeddings=1 / math.sqrt(5))
    return layers.EmbeddingBag(6, 3), (5,)


def rows_projected_as_one_matrix(patch):
    """Divided by the spectral norm of the table, which the rows together may reach."""
    patch.setattr(
        "lipdp.bounds.projections.RowBall.__call__", lambda self, w: w / math.sqrt(w.shape[0])
    )
    return layers.Embedding(6, 3, radius=0.1), (5,)


def tokens_out_of_range_as_keras_reads_them(patch):
    if keras.backend.backend() == "tensorflow":
        pytest.skip("ends in an error")
    patch.setattr(layers.Embedding, "call", K.Embedding.call)
    return layers.Embedding(6, 3), (5,)


def positional_embedding_without_its_radius(patch):
    patch.setattr(layers.PositionalEmbedding, "bound", lambda self, call: lipschitz(
        gradients=lambda x, g: [(self.embeddings, g)]
    ))  # fmt: skip
    return layers.PositionalEmbedding(), (4, 3)


def masked_mean_as_over_all_positions(patch):
    patch.setattr(layers.MaskedAveragePooling1D, "bound", lambda self, call: Rule(
        lambda xs: xs[0] / 2, lambda xs, g: [g / 2], masks=True
    ))  # fmt: skip
    return keras.Sequential(
        [keras.Input((4, 3)), K.Masking(), layers.MaskedAveragePooling1D()]
    ), None


def masked_mean_that_divides_by_zero(patch):
    def call(self, x, mask=None):
        mask = ops.cast(mask[:, :, None], x.dtype)
        return ops.sum(x * mask, axis=1) / ops.sum(mask, axis=1)

    patch.setattr(layers.MaskedAveragePooling1D, "call", call)
    return keras.Sequential(
        [keras.Input((4, 3)), K.Masking(), layers.MaskedAveragePooling1D()]
    ), None


def attention_values_without_the_root_of_the_rows(patch):
    mutate(patch, layers.LipschitzAttention, value_kernel=1 / math.sqrt(4))
    return layers.LipschitzAttention(1, 3, radius=0.5), (4, 3)


def attention_output_without_the_root_of_the_rows(patch):
    mutate(patch, layers.LipschitzAttention, forward=1 / math.sqrt(4))
    return layers.LipschitzAttention(1, 3, radius=0.5), (4, 3)


def attention_cotangent_without_the_scores(patch):
    root, scores = math.sqrt(2), (1 + 1 / math.sqrt(2)) / 0.1
    mutate(patch, layers.LipschitzAttention, backward=root / (root + scores))
    return layers.LipschitzAttention(1, 2, temperature=0.1), (2, 2)


def attention_without_its_temperature(patch):
    mutate(patch, layers.LipschitzAttention, query_kernel=0.2, key_kernel=0.2)
    return layers.LipschitzAttention(1, 3, radius=0.5, temperature=0.2), (4, 3)


def attention_on_rows_of_any_norm(patch):
    patch.setattr(layers.BallProjection, "call", lambda self, x: x)
    return layers.LipschitzAttention(1, 3, radius=0.2), (4, 3)


def recurrent_kernel_counted_once(patch):
    mutate(patch, layers.LipschitzRNN, kernel=1 / 4)
    return layers.LipschitzRNN(4, use_bias=False, activation="linear"), (4, 3)


def recurrent_bias_counted_once(patch):
    mutate(patch, layers.LipschitzRNN, bias=1 / 4)
    return layers.LipschitzRNN(4, activation="linear"), (4, 3)


def recurrent_states_as_the_last_one(patch):
    mutate(patch, layers.LipschitzRNN, backward=1 / math.sqrt(4))
    return layers.LipschitzRNN(4, activation="linear", return_sequences=True), (4, 3)


def recurrent_matrices_projected_one_by_one(patch):
    """s(W) ≤ 1 and s(U) ≤ 1 leave s([W U]) ≤ √2."""
    patch.setattr("lipdp.bounds.projections.SpectralBall.__call__", lambda self, w: ops.concatenate(
        [m / norms.spectral_norm_bound(m) for m in (w[:4], w[4:])]
    ))  # fmt: skip
    return layers.LipschitzRNN(4, use_bias=False, activation="linear"), (4, 4)


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
    layer_norm_as_if_it_kept_norms,
    layer_norm_of_one_position,
    gain_not_measured,
    half_angle_counted_once,
    slopes_of_prelu_not_measured,
    slopes_of_prelu_of_one_position,
    mean_without_its_root,
    sum_without_its_root,
    average_over_the_batch,
    softmax_taken_for_quarter_lipschitz,
    softmax_of_one_row,
    log_softmax_taken_for_1_lipschitz,
    maximum_with_a_constant_without_its_offset,
    square_by_its_norm,
    entries_taken_twice_counted_once,
    resizing_by_the_ratio_of_sizes,
    normalization_without_its_mean,
    alpha_dropout_without_its_offset,
    adaptive_pooling_as_if_windows_did_not_overlap,
    floor_forgotten,
    one_group_for_all,
    gate_gradient_of_one_branch,
    matrix_by_its_largest_entry,
    stop_gradient_forgotten,
    projection_that_does_nothing,
    embedding_gradient_without_positions,
    embedding_norm_of_one_row,
    embedding_bag_as_if_tokens_differ,
    rows_projected_as_one_matrix,
    tokens_out_of_range_as_keras_reads_them,
    positional_embedding_without_its_radius,
    masked_mean_as_over_all_positions,
    masked_mean_that_divides_by_zero,
    attention_values_without_the_root_of_the_rows,
    attention_output_without_the_root_of_the_rows,
    attention_cotangent_without_the_scores,
    attention_without_its_temperature,
    attention_on_rows_of_any_norm,
    recurrent_kernel_counted_once,
    recurrent_bias_counted_once,
    recurrent_states_as_the_last_one,
    recurrent_matrices_projected_one_by_one,
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
    result = attack_bounds(
        target, shape, training=isinstance(target, (K.Dropout, K.AlphaDropout)), **radius
    )
    assert result.ratio > 1.003, result.attained
