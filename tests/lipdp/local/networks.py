"""Networks whose layers clip their own gradients, one for each kind of unit and its options."""

import math

import keras
from keras import layers as K
from keras import ops

from lipdp import layers


class Block(K.Layer):
    """A transformer's block."""

    def __init__(self, width, heads):
        super().__init__()
        self.attention = K.MultiHeadAttention(heads, width // heads)
        self.norms = [K.LayerNormalization(), K.LayerNormalization()]
        self.dense = [K.Dense(6, activation="relu"), K.Dense(width)]

    def call(self, x):
        x = self.norms[0](x + self.attention(x, x))
        return self.norms[1](x + self.dense[1](self.dense[0](x)))


class Positions(K.Layer):
    """Embeddings of tokens and of their places, which know nothing of the batch."""

    def __init__(self, words, width, length):
        super().__init__()
        self.tokens, self.places = K.Embedding(words, width), K.Embedding(length, width)

    def call(self, ids):
        return self.tokens(ids) + self.places(ops.arange(ops.shape(ids)[-1]))


class Own(K.Layer):
    """A layer of one's own, with weights and a layer inside."""

    def __init__(self):
        super().__init__()
        self.inner = K.Dense(4, use_bias=False)

    def build(self, shape):
        self.inner.build(shape)
        self.scale = self.add_weight(shape=(4,), initializer="ones")

    def call(self, x):
        return ops.tanh(self.inner(x) * self.scale) * self.scale


class Subclassed(keras.Model):
    """A network without a graph, whose first layer is used twice."""

    def __init__(self):
        super().__init__()
        self.shared, self.head = K.Dense(5, activation="tanh"), K.Dense(3)

    def call(self, x):
        return self.head(self.shared(self.shared(x)))


class States(K.Layer):
    """A recurrent layer that begins where its input says, and all that it returns."""

    def __init__(self, inner, begin=False):
        super().__init__()
        self.inner, self.begin = inner, begin

    def build(self, shape):
        self.inner.build(shape)

    def call(self, x, mask=None):
        begin = [0.3 * x[:, i, : self.inner.cell.units] for i in (1, 2)] if self.begin else None
        outputs, *states = self.inner(x, mask=mask, initial_state=begin)
        outputs = ops.reshape(outputs, (-1, math.prod(outputs.shape[1:])))
        return ops.concatenate([outputs, *(ops.sin(3.0 * s) for s in states)], axis=-1)


class Pair(K.Layer):
    """A layer of one's own that returns several tensors, one of integers."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones")

    def call(self, x):
        other = {"signs": ops.cast(x > 0, "int32"), "sine": ops.sin(x) * self.scale}
        return ops.tanh(x * self.scale), other


class Both(K.Layer):
    """What `Pair` returns, together."""

    def __init__(self):
        super().__init__()
        self.pair = Pair()

    def build(self, shape):
        self.pair.build(shape)

    def call(self, x):
        one, other = self.pair(x)
        return one + ops.cast(other["signs"], x.dtype) * other["sine"]


def _lora(layer, shape):
    layer.build(shape)
    layer.enable_lora(2)
    return layer


def _masked(*rest):
    return [
        keras.Input((6,), dtype="int32"),
        K.Embedding(7, 4, mask_zero=True),
        *rest,
        K.Flatten(),
        K.Dense(3),
    ]


def _frozen(layer, shape, name):
    layer.build(shape)
    getattr(layer, name).trainable = False
    return layer


def _frozen_cell(layer, shape, *names):
    layer.build(shape)
    for name in names:
        getattr(layer.cell, name).trainable = False
    return layer


def _tokens(*rest):
    return [keras.Input((6,), dtype="int32"), *rest, K.GlobalAveragePooling1D(), K.Dense(3)]


def _flat(shape, *rest):
    return [keras.Input(shape), *rest, K.Flatten(), K.Dense(3)]


#: By name: layers of a Sequential network.
LAYERS = {
    "dense": lambda: _flat((5,), K.Dense(4, activation="relu"), K.Dense(3, use_bias=False)),
    "dense, positions, products": lambda: _flat((16, 3), K.Dense(2, activation="tanh")),
    "dense, positions, gram": lambda: _flat((3, 40), K.Dense(30)),
    "dense, frozen kernel": lambda: _flat((4, 5), _frozen(K.Dense(4), (None, 4, 5), "_kernel")),
    "dense, frozen bias": lambda: _flat((5,), _frozen(K.Dense(4), (None, 5), "bias")),
    "SpectralDense": lambda: _flat((5,), layers.SpectralDense(4, bias_norm=0.5)),
    "einsum, two axes": lambda: _flat(
        (2, 3, 4), K.EinsumDense("abcd,cde->abe", output_shape=(2, 5), bias_axes="e")
    ),
    "einsum, own matrices": lambda: _flat(
        (2, 3, 4), K.EinsumDense("abcd,bde->abce", output_shape=(2, 3, 5), bias_axes="be")
    ),
    "einsum, summed axis": lambda: _flat((6, 4), K.EinsumDense("abd,de->ae", output_shape=(5,))),
    "conv, products": lambda: _flat(
        (9, 8, 2), K.Conv2D(3, 3, strides=2, padding="same", activation="tanh")
    ),
    "conv, gram": lambda: _flat((4, 4, 16), K.Conv2D(24, 3, use_bias=False)),
    "conv, dilation": lambda: _flat((7, 7, 2), K.Conv2D(3, (2, 3), dilation_rate=2)),
    "conv, groups": lambda: _flat((12, 12, 4), K.Conv2D(6, 3, groups=2, padding="same")),
    "conv, groups, gram": lambda: _flat((3, 3, 32), K.Conv2D(32, 2, groups=2)),
    "conv, causal": lambda: _flat((7, 3), K.Conv1D(4, 3, padding="causal", dilation_rate=2)),
    "conv, three dimensions": lambda: _flat((3, 4, 3, 2), K.Conv3D(2, 2)),
    "depthwise": lambda: _flat((6, 6, 3), K.DepthwiseConv2D(3, depth_multiplier=2)),
    "depthwise, one dimension": lambda: _flat((7, 3), K.DepthwiseConv1D(3, padding="same")),
    "separable": lambda: _flat((6, 6, 2), K.SeparableConv2D(3, 3)),
    "separable, one dimension": lambda: _flat(
        (9, 3), K.SeparableConv1D(4, 3, strides=2, padding="same", depth_multiplier=2)
    ),
    "transposed": lambda: _flat((4, 4, 2), K.Conv2DTranspose(3, 3, strides=2)),
    "transposed, same": lambda: _flat(
        (4, 3, 2), K.Conv2DTranspose(3, (2, 3), strides=(3, 2), padding="same", activation="tanh")
    ),
    "transposed, one dimension": lambda: _flat(
        (5, 2), K.Conv1DTranspose(3, 3, padding="same", use_bias=False)
    ),
    "transposed, three dimensions": lambda: _flat((2, 3, 2, 2), K.Conv3DTranspose(2, 2)),
    "transposed, padded": lambda: _flat(
        (4, 2), K.Conv1DTranspose(3, 3, strides=2, output_padding=1)
    ),
    "layer normalization": lambda: _flat((4, 5), K.Dense(5), K.LayerNormalization()),
    "layer normalization, two axes": lambda: _flat((4, 5), K.LayerNormalization(axis=(1, 2))),
    "layer normalization, scale": lambda: _flat((4, 5), K.LayerNormalization(center=False)),
    "rms normalization": lambda: _flat((4, 5), K.RMSNormalization()),
    "group normalization": lambda: _flat((4, 4, 6), K.GroupNormalization(3)),
    "group normalization, offset": lambda: _flat((4, 6), K.GroupNormalization(2, scale=False)),
    "prelu": lambda: _flat((4, 5), K.PReLU()),
    "prelu, shared": lambda: _flat((4, 5), K.PReLU(shared_axes=[1])),
    "embedding": lambda: _tokens(K.Embedding(7, 4)),
    "places": lambda: _tokens(Positions(7, 4, 6)),
    "transformer": lambda: _tokens(Positions(7, 4, 6), Block(4, 2)),
    "masked": lambda: _masked(K.LSTM(3)),
    "masked, zero output": lambda: _masked(
        K.GRU(3, return_sequences=True, zero_output_for_mask=True)
    ),
    "masked, backwards": lambda: _masked(
        States(K.LSTM(3, go_backwards=True, return_state=True), begin=True)
    ),
    "masked, unrolled": lambda: _masked(K.GRU(3, unroll=True, use_bias=False)),
    "recurrent": lambda: [
        keras.Input((5, 3)),
        K.LSTM(4, return_sequences=True),
        K.Bidirectional(K.GRU(3)),
        K.Dense(3),
    ],
    "recurrent, gram": lambda: _flat((3, 20), K.LSTM(24)),
    "simple recurrent": lambda: _flat((5, 3), K.SimpleRNN(4)),
    "recurrent, states": lambda: _flat(
        (5, 3), States(K.LSTM(3, return_state=True, return_sequences=True, use_bias=False), True)
    ),
    "reset before": lambda: _flat(
        (5, 3), K.GRU(4, reset_after=False, recurrent_activation="tanh", go_backwards=True)
    ),
    "reset before, no bias": lambda: _flat(
        (5, 3), K.GRU(4, reset_after=False, use_bias=False, implementation=1)
    ),
    "recurrent, frozen": lambda: _flat(
        (5, 3),
        _frozen_cell(K.GRU(4, return_sequences=True), (None, 5, 3), "recurrent_kernel"),
        _frozen_cell(K.LSTM(3), (None, 5, 4), "kernel", "bias"),
    ),
    "recurrent, cell": lambda: _flat((5, 3), K.RNN(K.SimpleRNNCell(4, activation=None))),
    "recurrent, cells": lambda: _flat((4, 3), K.RNN([K.LSTMCell(3), K.GRUCell(2)])),
    "recurrent, maps": lambda: _flat((3, 5, 2), K.ConvLSTM1D(2, 2)),
    "at each time": lambda: _flat((4, 5), K.TimeDistributed(K.Dense(3, activation="tanh"))),
    "at each time, conv": lambda: _flat(
        (3, 6, 5, 2), K.TimeDistributed(K.Conv2D(3, 3, strides=2, activation="tanh"))
    ),
    "at each time, norm": lambda: _flat((3, 4), K.TimeDistributed(K.LayerNormalization())),
    "lora": lambda: _flat((5,), _lora(K.Dense(4), (None, 5))),
    "lora, positions": lambda: _flat((3, 5), _lora(K.Dense(4, activation="tanh"), (None, 3, 5))),
    "lora, einsum": lambda: _flat(
        (2, 3, 4),
        _lora(
            K.EinsumDense("abcd,cde->abce", output_shape=(2, 3, 5), bias_axes="e"), (None, 2, 3, 4)
        ),
    ),
    "lora, conv": lambda: _flat((6, 5, 3), _lora(K.Conv2D(4, 3), (None, 6, 5, 3))),
    "lora, embedding": lambda: _tokens(_lora(K.Embedding(7, 4), (None, 6))),
    "two outputs": lambda: _flat((5,), Both()),
    "own": lambda: _flat((5,), Own()),
    "behind frozen layers": lambda: _flat(
        (4, 4, 2), K.Conv2D(3, 2, trainable=False), K.BatchNormalization(trainable=False)
    ),
}

if keras.backend.backend() == "jax":  # TensorFlow has them on GPUs only
    LAYERS |= {
        "conv, channels first": lambda: _flat(
            (2, 9, 8), K.Conv2D(4, 3, groups=2, data_format="channels_first")
        ),
        "depthwise, channels first": lambda: _flat(
            (2, 6, 5), K.DepthwiseConv2D(3, data_format="channels_first")
        ),
        "separable, channels first": lambda: _flat(
            (2, 6, 5), K.SeparableConv2D(3, 3, data_format="channels_first")
        ),
        "transposed, channels first": lambda: _flat(
            (2, 3, 4), K.Conv2DTranspose(3, 3, strides=2, data_format="channels_first")
        ),
    }


def build(name):
    """A network by its name, with weights that are all different from zero."""
    keras.utils.set_random_seed(3)
    if name == "subclassed, shared":
        network = Subclassed()
        network(ops.ones((1, 5)))
    else:
        network = keras.Sequential(LAYERS[name]())
    for i, weight in enumerate(network.trainable_variables):
        weight.assign(weight + keras.random.normal(weight.shape, stddev=0.1, seed=i))
    return network


NAMES = [*LAYERS, "subclassed, shared"]

#: One for each kind of unit. The others are attacked in the slow tests.
FAST = [
    "dense",
    "dense, positions, gram",
    "dense, frozen kernel",
    "einsum, own matrices",
    "conv, products",
    "conv, gram",
    "depthwise",
    "separable",
    "transposed",
    "layer normalization, two axes",
    "prelu, shared",
    "places",
    "masked, backwards",
    "reset before",
    "at each time, conv",
    "lora, positions",
    "lora, embedding",
    "two outputs",
    "subclassed, shared",
]
