"""Rules of linear layers with weights: dense and convolution."""

import math

import keras
from keras import layers

from lipdp import norms
from lipdp.bounds.builtin.activations import with_activation
from lipdp.bounds.rule import conv_norm, lipschitz, matrix_norm, register, size, vector_norm


def linear(layer, call, kernel_norm, multiplicity, note=""):
    """Rule of `activation(W x + b)` with the bias shared by all positions.

    `‖Wx + b‖ ≤ s·X + √T·‖b‖`; the gradient of the kernel is at most `√m·X·G` with `m` the
    number of outputs an input entry reaches through the kernel's taps, that of the bias
    `√T·G` by Cauchy-Schwarz over the positions.
    """
    positions = math.sqrt(call.positions) if layer.use_bias else 0.0
    offset = positions * vector_norm(layer.bias) if layer.use_bias else 0.0
    reach = math.sqrt(multiplicity)

    def gradients(x, g):
        pairs = [(weight_of(layer, "kernel"), reach * x * g)]
        if layer.use_bias:
            pairs.append((layer.bias, positions * g))
        return pairs

    rule = lipschitz(kernel_norm, offset=offset, gradients=gradients, note=note)
    return with_activation(rule, layer.activation, call.output_shape)


def weight_of(layer, name):
    """The variable behind a weight; with LoRA or quantisation the weight is computed instead."""
    value = getattr(layer, name)
    if not isinstance(value, keras.Variable):
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


@register(layers.Conv1D, layers.Conv2D, layers.Conv3D)
def conv(layer, call):
    channels_last(layer)
    kernel = weight_of(layer, "kernel")
    geometry = {
        "input_shape": call.input_shape[:-1],
        "strides": layer.strides,
        "padding": layer.padding,
        "dilation_rate": layer.dilation_rate,
    }
    size(call.input_shape)  # all sizes must be known
    multiplicity = norms.conv_multiplicity(tuple(kernel.shape), **geometry)
    norm = conv_norm(kernel, **geometry, groups=layer.groups)
    return linear(layer, call, norm, multiplicity, note=f"{multiplicity} outputs read an entry")
