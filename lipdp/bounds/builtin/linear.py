"""Rules of linear layers with weights: dense layers and convolutions."""

import dataclasses
import itertools
import math

import keras
from keras import layers

from lipdp.bounds import norms
from lipdp.bounds.builtin.activations import with_activation
from lipdp.bounds.projections import ConvBall, ConvTransposeBall, DepthwiseConvBall
from lipdp.bounds.rule import conv_norm, lipschitz, matrix_norm, register, size, vector_norm


def affine(layer, call, norm, weights, note=""):
    """Rule of `activation(L x + b)`, the bias `b` broadcast over `T` positions.

    `norm` bounds the operator norm of `L`, `weights` lists `(variable, c)` for the weights of `L`
    whose gradient is at most `c·X·G`. `‖Lx + b‖ ≤ norm·X + √T·‖b‖`, and the gradient of the bias
    is at most `√T·G` by Cauchy-Schwarz over the positions.
    """
    bias = layer.bias
    spread = math.sqrt(size(call.output_shape) / size(bias.shape)) if bias is not None else 0.0
    offset = spread * vector_norm(bias) if bias is not None else 0.0

    def gradients(x, g):
        pairs = [(variable, c * x * g) for variable, c in weights]
        return [*pairs, (bias, spread * g)] if bias is not None else pairs

    rule = lipschitz(norm, offset=offset, gradients=gradients, note=note)
    return with_activation(rule, layer.activation, call.output_shape)


def linear(layer, call, kernel_norm, multiplicity, note=""):
    """Rule of a layer with one kernel: its gradient is at most `√m·X·G`, with `m` the number of
    outputs an input entry reaches through the kernel's taps (or the other way around).
    """
    weights = [(weight_of(layer, "kernel"), math.sqrt(multiplicity))]
    return affine(layer, call, kernel_norm, weights, note)


def weight_of(layer, name):
    """The variable behind a weight; with LoRA or quantisation the weight is computed instead."""
    value = getattr(layer, name)
    quantized = getattr(layer, "quantization_mode", None) is not None
    if quantized or not isinstance(value, keras.Variable):
        raise ValueError(
            f"its {name} is computed from other weights (LoRA or quantisation), for which there is "
            "no rule; merge it first"
        )
    return value


@register(layers.Dense)
def dense(layer, call):
    return linear(layer, call, matrix_norm(weight_of(layer, "kernel")), 1)


def channels_last(layer):
    if getattr(layer, "data_format", "channels_last") != "channels_last":
        raise ValueError(f"data_format={layer.data_format!r} has no rule; use 'channels_last'")


def _reading(multiplicity):
    return f"{multiplicity} outputs read an entry"


def _geometry(layer, call):
    channels_last(layer)
    size(call.input_shape)  # all sizes must be known
    return {
        "input_shape": call.input_shape[:-1],
        "strides": layer.strides,
        "padding": layer.padding,
        "dilation_rate": layer.dilation_rate,
    }


@register(layers.Conv1D, layers.Conv2D, layers.Conv3D)
def conv(layer, call, ball=ConvBall):
    kernel = weight_of(layer, "kernel")
    geometry = _geometry(layer, call)
    multiplicity = norms.conv_multiplicity(tuple(kernel.shape), **geometry)
    norm = conv_norm(kernel, ball, **geometry, groups=layer.groups)
    return linear(layer, call, norm, multiplicity, _reading(multiplicity))


@register(layers.DepthwiseConv1D, layers.DepthwiseConv2D)
def depthwise_conv(layer, call):
    """Block-diagonal over the input channels: norms are the largest over them, each with all of
    its filters. The kernel's gradient of channel `c` is at most `√m·X_c·G_c`."""
    kernel = weight_of(layer, "kernel")
    geometry = _geometry(layer, call)
    multiplicity = norms.conv_multiplicity(tuple(kernel.shape), **geometry)
    norm = conv_norm(kernel, DepthwiseConvBall, **geometry)
    return linear(layer, call, norm, multiplicity, _reading(multiplicity))


def pointwise_geometry(layer):
    """One cell stands for any map: a 1×1 convolution has the norm of its matrix."""
    return {
        "input_shape": (1,) * layer.rank,
        "strides": 1,
        "padding": "valid",
        "dilation_rate": 1,
        "groups": 1,
    }


@register(layers.SeparableConv1D, layers.SeparableConv2D)
def separable_conv(layer, call):
    """A depthwise convolution `D` and a 1×1 convolution `P` behind it: `X` grows by `c(D)` on the
    way to `P`, `G` by `s(P)` on the way to `D`."""
    depthwise, pointwise = (weight_of(layer, f"{n}_kernel") for n in ("depthwise", "pointwise"))
    geometry = _geometry(layer, call)
    multiplicity = norms.conv_multiplicity(tuple(depthwise.shape), **geometry)
    first = conv_norm(depthwise, DepthwiseConvBall, **geometry)
    second = conv_norm(pointwise, **pointwise_geometry(layer))
    weights = [(depthwise, math.sqrt(multiplicity) * second), (pointwise, first)]
    return affine(layer, call, first * second, weights, _reading(multiplicity))


@register(layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)
def conv_transpose(layer, call):
    """The adjoint of a convolution. Each output entry reads `m` inputs, so the taps' cotangents,
    as a matrix with one row for each input position, have Frobenius norm `√m·G` at most."""
    kernel = weight_of(layer, "kernel")
    geometry = _geometry(layer, call)
    del geometry["padding"]
    multiplicity = norms.conv_transpose_multiplicity(tuple(kernel.shape), **geometry)
    norm = conv_norm(kernel, ConvTransposeBall, **geometry)
    return linear(layer, call, norm, multiplicity, f"an output reads {multiplicity} entries")


@register(layers.EinsumDense)
def einsum_dense(layer, call):
    """A matrix product along the axes that the equation contracts: norm `max_i s(W_i)` over the
    matrices `W_i` that the kernel holds for the positions it indexes, and gradient at most
    `(Σ_i X_i²·G_i²)^(1/2) ≤ X·G`."""
    kernel = weight_of(layer, "kernel")
    axes, shape = _matrices(layer.equation, kernel)
    if None in call.output_shape and None not in call.input_shape:
        # Keras leaves axes of `output_shape` open; only the number of entries matters.
        _, contracted, new = shape
        entries = size(call.input_shape) // contracted * new
        call = dataclasses.replace(call, output_shape=(entries,))
    return linear(layer, call, matrix_norm(kernel, axes, shape), 1)


def _matrices(equation, kernel):
    """How the kernel of an einsum is a stack of matrices (indexed, contracted, new): the order of
    its axes, and the shape.

    Raises:
        ValueError: the equation is something else than products of positions with matrices.
    """
    if "..." in equation:
        raise ValueError(
            f"the equation {equation!r} has no rule, since Keras misstates the shape of its "
            "output; give each axis a letter"
        )
    left, output = equation.split("->")
    inputs, weights = left.split(",")
    indexed = [a for a in weights if a in inputs and a in output]
    contracted = [a for a in weights if a in inputs and a not in output]
    new = [a for a in weights if a not in inputs and a in output]
    passing = [a for a in inputs if a not in weights]
    once = all(len(set(axes)) == len(axes) for axes in (inputs, weights, output))
    complete = len(indexed) + len(contracted) + len(new) == len(weights)
    if not (
        once
        and complete
        and sorted(output) == sorted([*passing, *indexed, *new])
        and inputs[0] == output[0]
        and inputs[0] in passing
    ):
        raise ValueError(
            f"the equation {equation!r} has no rule; a dense layer on some axes has one, with the "
            "batch first in input and output and not in the kernel, and each other axis of the "
            "input kept once or contracted with the kernel"
        )
    groups = [[weights.index(a) for a in group] for group in (indexed, contracted, new)]
    shape = tuple(math.prod(kernel.shape[i] for i in group) for group in groups)
    return tuple(itertools.chain(*groups)), shape
