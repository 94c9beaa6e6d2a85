"""Whole networks."""

import keras

from lipdp import layers
from tests.lipdp.cases.case import Case

K = keras.layers


def mlp():
    return [layers.SpectralDense(6), layers.GroupSort(), layers.SpectralDense(4)]


def conv_net(pool, activation):
    return [
        layers.SpectralConv2D(4, 3, padding="same", bias_norm=0.1),
        activation,
        pool,
        K.Flatten(),
        layers.SpectralDense(3),
    ]


NETWORKS = {
    "mlp": ((5,), mlp),
    "plain mlp": ((5,), lambda: [K.Dense(4, "relu"), K.Dense(4, "gelu"), K.Dense(3)]),
    "centred": ((5,), lambda: [layers.Centering(), *mlp()]),
    "conv l2": ((4, 4, 2), lambda: conv_net(layers.L2NormPooling2D(), layers.GroupSort())),
    "conv average": (
        (4, 4, 2),
        lambda: conv_net(layers.ScaledAveragePooling2D(), layers.GroupSort(4)),
    ),
    "conv max": ((4, 4, 2), lambda: conv_net(K.MaxPooling2D(), K.ReLU())),
    "clipped": ((5,), lambda: [layers.SpectralDense(4), layers.ClipGradient(0.2), *mlp()]),
}


def _network(shape, make):
    return keras.Sequential([keras.Input(shape), layers.BallProjection(2.0), *make()])


CASES = [
    Case(f"network: {name}", lambda shape=shape, make=make: _network(shape, make))
    for name, (shape, make) in NETWORKS.items()
]
