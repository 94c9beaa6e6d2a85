"""Networks whose layers clip their own gradients, one for each kind of unit and its options."""

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


def _lora():
    dense = K.Dense(4)
    dense.build((None, 5))
    dense.enable_lora(2)
    return dense


def _frozen(layer, shape, name):
    layer.build(shape)
    getattr(layer, name).trainable = False
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
    "separable": lambda: _flat((6, 6, 2), K.SeparableConv2D(3, 3)),
    "transposed": lambda: _flat((4, 4, 2), K.Conv2DTranspose(3, 3, strides=2)),
    "layer normalization": lambda: _flat((4, 5), K.Dense(5), K.LayerNormalization()),
    "layer normalization, two axes": lambda: _flat((4, 5), K.LayerNormalization(axis=(1, 2))),
    "layer normalization, scale": lambda: _flat((4, 5), K.LayerNormalization(center=False)),
    "rms normalization": lambda: _flat((4, 5), K.RMSNormalization()),
    "group normalization": lambda: _flat((4, 4, 6), K.GroupNormalization(3)),
    "group normalization, offset": lambda: _flat((4, 6), K.GroupNormalization(2, scale=False)),
    "prelu": lambda: _flat((4, 5), K.PReLU()),
    "embedding": lambda: _tokens(K.Embedding(7, 4)),
    "places": lambda: _tokens(Positions(7, 4, 6)),
    "transformer": lambda: _tokens(Positions(7, 4, 6), Block(4, 2)),
    "masked": lambda: [
        keras.Input((6,), dtype="int32"),
        K.Embedding(7, 4, mask_zero=True),
        K.LSTM(3),
        K.Dense(3),
    ],
    "recurrent": lambda: [
        keras.Input((5, 3)),
        K.LSTM(4, return_sequences=True),
        K.Bidirectional(K.GRU(3)),
        K.Dense(3),
    ],
    "simple recurrent": lambda: [keras.Input((5, 3)), K.SimpleRNN(4), K.Dense(3)],
    "at each time": lambda: _flat((4, 5), K.TimeDistributed(K.Dense(3))),
    "lora": lambda: _flat((5,), _lora()),
    "own": lambda: _flat((5,), Own()),
    "behind frozen layers": lambda: _flat(
        (4, 4, 2), K.Conv2D(3, 2, trainable=False), K.BatchNormalization(trainable=False)
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
