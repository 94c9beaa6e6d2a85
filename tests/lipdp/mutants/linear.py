"""Dense, convolutional and other linear rules."""

import keras
import numpy as np
from keras import ops

from lipdp import layers
from lipdp.bounds import norms, rule, walk
from lipdp.bounds.builtin import linear as linear_rules
from lipdp.bounds.rule import Rule
from tests.lipdp.mutants.mutant import mutant, parts, register

K = keras.layers


@mutant
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


@mutant
def output_without_bias_positions(patch):
    register(patch, K.Dense, lambda layer, call: Rule(
        lambda xs: rule.matrix_norm(layer.kernel) * xs[0] + rule.vector_norm(layer.bias),
        *parts(linear_rules.dense(layer, call)),
    ))  # fmt: skip
    return K.Dense(2), (4, 3)


@mutant
def conv_gradient_with_mean_multiplicity(patch):
    right = norms.conv_multiplicity

    def mean(kernel_shape, input_shape, *args, **kwargs):
        return right(kernel_shape, input_shape, *args, **kwargs) * 0.5

    patch.setattr(norms, "conv_multiplicity", mean)
    return K.Conv2D(1, 3, padding="same", use_bias=False), (12, 12, 1)


@mutant
def conv_gradient_without_multiplicity(patch):
    patch.setattr(norms, "conv_multiplicity", lambda *a, **k: 1)
    return K.Conv2D(2, 2, use_bias=False), (5, 5, 1)


@mutant
def conv_norm_on_the_circular_grid(patch):
    """A grid of N = n cells does not bound a `same` convolution."""

    def bound(kernel, input_shape, strides, padding, dilation_rate, groups):
        transfer = np.fft.fft2(ops.convert_to_numpy(kernel), s=input_shape, axes=(0, 1))
        return float(np.linalg.norm(transfer, 2, axis=(-2, -1)).max())

    patch.setattr(rule.norms, "conv_norm_bound", bound)
    return K.Conv2D(1, 3, padding="same", use_bias=False), (3, 3, 1)


@mutant
def conv_norm_of_the_reshaped_kernel(patch):
    def bound(kernel, input_shape, **geometry):
        return norms.spectral_norm_bound(ops.reshape(kernel, (-1, kernel.shape[-1])))

    patch.setattr(norms, "conv_norm_bound", bound)
    return K.Conv2D(2, 3, padding="same", use_bias=False), (6, 6, 1)


@mutant
def power_iteration_as_norm(patch):
    def bound(matrix, gap=None):
        matrix = ops.convert_to_numpy(matrix)
        x = np.random.default_rng(0).standard_normal(matrix.shape[-1])
        for _ in range(2):
            x = matrix.T @ (matrix @ (x / np.linalg.norm(x)))
        return float(np.linalg.norm(matrix @ (x / np.linalg.norm(x))))

    patch.setattr(norms, "spectral_norm_bound", bound)
    return K.Dense(24, use_bias=False), (24,)


@mutant
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


@mutant
def depthwise_norm_by_output_channels(patch):
    """The largest norm over single filters: √M too small where the filters agree."""

    def bounds(kernel, input_shape, **geometry):
        kernel = ops.convert_to_tensor(kernel)
        filters = ops.split(kernel, kernel.shape[-1], axis=-1)
        return ops.max(ops.stack([right(f, input_shape, **geometry) for f in filters]), axis=0)

    right = norms.depthwise_norm_bounds
    patch.setattr(norms, "depthwise_norm_bounds", bounds)
    return K.DepthwiseConv2D(1, depth_multiplier=3, use_bias=False), (3, 3, 2)


@mutant
def depthwise_gradient_without_multiplicity(patch):
    patch.setattr(norms, "conv_multiplicity", lambda *a, **k: 1)
    return layers.SpectralDepthwiseConv2D(2, certificate="fft", use_bias=False), (5, 5, 1)


@mutant
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


@mutant
def transposed_norm_of_the_reshaped_kernel(patch):
    def bound(kernel, *geometry, **options):
        return norms.spectral_norm_bound(ops.reshape(kernel, (-1, kernel.shape[-1])))

    patch.setattr(norms, "conv_transpose_norm_bound", bound)
    return layers.SpectralConv2DTranspose(2, 3, use_bias=False), (4, 4, 1)


@mutant
def transposed_gradient_without_multiplicity(patch):
    patch.setattr(norms, "conv_transpose_multiplicity", lambda *a, **k: 1)
    options = dict(strides=2, certificate="fft", use_bias=False)
    return layers.SpectralConv2DTranspose(2, 4, **options), (3, 3, 1)


@mutant
def transposed_grid_of_the_input(patch):
    """As if a transposed convolution did not grow the map."""
    right = norms._kernel_norm_bounds

    def bounds(split, multiplicity, grid, dilations, certificate):
        sizes = split.shape[1:-2]
        grid = [n - k + 1 for n, k in zip(grid, sizes, strict=True)]
        return right(split, multiplicity, grid, dilations, "fft")

    patch.setattr(norms, "_kernel_norm_bounds", bounds)
    return K.Conv2DTranspose(1, 3, use_bias=False), (2, 2, 1)


@mutant
def einsum_norm_of_the_first_matrix(patch):
    def first(kernel, axes, shape):
        return norms.spectral_norm_bound(ops.reshape(ops.transpose(kernel, axes), shape)[0])

    patch.setattr(linear_rules, "matrix_norm", first)
    return K.EinsumDense("abc,bcd->abd", (3, 2)), (3, 2)
