"""Whole networks."""

import keras

from lipdp import layers, models
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
    Case(f"network {name}", lambda shape=shape, make=make: _network(shape, make))
    for name, (shape, make) in NETWORKS.items()
]

#: The networks of `lipdp.models`, small.
SMALL = {
    "linear": lambda: models.mlp((6, 6, 2), 3, depth=1),
    "mlp": lambda: models.mlp((20,), 3, width=8, depth=3),
    "mlp, balls": lambda: models.mlp((20,), 3, width=8, depth=3, hidden_radius=0.5),
    "conv_net": lambda: models.conv_net((8, 8, 1), 3, width=4),
    "conv_net, balls": lambda: models.conv_net((8, 8, 1), 3, width=4, hidden_radius=0.5),
    "cosine": lambda: models.cosine_net((8, 8, 2), 3, 3, filters=4, strides=1, cotangent=0.02),
    "vgg5": lambda: models.vgg((8, 8, 3), 3, width=2),
    "vgg8": lambda: models.vgg((9, 8, 1), 3, depth=8, width=2),
    "resnet6": lambda: models.resnet((8, 8, 3), 3, width=2),
    "resnet10": lambda: models.resnet((16, 12, 1), 3, depth=10, width=2),
    "mixer": lambda: models.mixer((8, 8, 3), 3, width=4),
    "transformer": lambda: models.vision_transformer((8, 8, 1), 3, width=4, heads=2, depth=2),
    "text": lambda: models.text_classifier(20, 6, 3, width=4),
    "scatter": lambda: models.scatter_net((8, 8, 1), 3, J=1, L=2, groups=3),
    "scatter, dense": lambda: models.scatter_net((8, 8, 1), 3, "dense", 4, J=1, L=2, groups=1),
    "scatter, conv": lambda: models.scatter_net((8, 8, 2), 3, "conv", 4, J=1, L=2, groups=3),
}
#: Of which the fast tests attack three: the layers of all are attacked by themselves.
FAST = ("mlp", "conv_net", "text")
for name, make in SMALL.items():
    # Some bounds are those of layers that no example attains together.
    CASES.append(Case(f"model {name}", make, slow=name not in FAST))
