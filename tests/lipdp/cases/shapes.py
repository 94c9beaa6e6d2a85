"""Layers that rearrange, repeat, drop or scale entries."""

import keras
import numpy as np

from lipdp import layers
from tests.lipdp.cases.case import BOTH, Case

K = keras.layers

TIGHT = {
    "Identity": (K.Identity, (5,)),
    "Flatten": (K.Flatten, (2, 3)),
    "Reshape": (lambda: K.Reshape((3, 2)), (6,)),
    "Permute": (lambda: K.Permute((2, 1)), (2, 3)),
    "ZeroPadding1D": (lambda: K.ZeroPadding1D(2), (3, 2)),
    "ZeroPadding2D": (lambda: K.ZeroPadding2D((1, 2)), (3, 3, 1)),
    "ZeroPadding3D": (lambda: K.ZeroPadding3D(1), (2, 2, 2, 1)),
    "Cropping1D": (lambda: K.Cropping1D(1), (4, 2)),
    "Cropping2D": (lambda: K.Cropping2D(1), (4, 4, 1)),
    "Cropping3D": (lambda: K.Cropping3D(1), (3, 3, 3, 1)),
    "RepeatVector": (lambda: K.RepeatVector(4), (3,)),
    "UpSampling1D": (lambda: K.UpSampling1D(3), (3, 2)),
    "UpSampling2D: nearest": (lambda: K.UpSampling2D(2), (3, 3, 1)),
    "UpSampling2D: bilinear (2, 3)": (
        lambda: K.UpSampling2D((2, 3), interpolation="bilinear"),
        (3, 3, 1),
    ),
    "UpSampling2D: bilinear": (lambda: K.UpSampling2D(2, interpolation="bilinear"), (1, 4, 2)),
    "UpSampling3D": (lambda: K.UpSampling3D(2), (2, 2, 2, 1)),
    "UpSampling2D: bicubic": (lambda: K.UpSampling2D(2, interpolation="bicubic"), (3, 4, 1)),
    "UpSampling2D: lanczos3": (
        lambda: K.UpSampling2D((2, 3), interpolation="lanczos3"),
        (3, 3, 1),
    ),
    "Resizing: bilinear, larger": (lambda: K.Resizing(5, 7), (3, 4, 1)),
    "Resizing: bilinear, smaller": (lambda: K.Resizing(2, 3), (5, 5, 2)),
    "Resizing: antialias": (lambda: K.Resizing(2, 3, antialias=True), (5, 5, 2)),
    "Resizing: nearest": (lambda: K.Resizing(7, 2, interpolation="nearest"), (3, 4, 1)),
    "Resizing: bicubic": (lambda: K.Resizing(5, 3, interpolation="bicubic"), (4, 4, 1)),
    "Resizing: lanczos5": (lambda: K.Resizing(2, 6, interpolation="lanczos5"), (4, 4, 1)),
    "InvertibleDownSampling2D": (lambda: layers.InvertibleDownSampling2D((2, 1)), (4, 3, 2)),
    "InvertibleUpSampling2D": (lambda: layers.InvertibleUpSampling2D(2), (2, 1, 4)),
    "Normalization: 1": (lambda: K.Normalization(mean=0.5, variance=4.0), (3,)),
    "Normalization: channels": (
        lambda: K.Normalization(mean=[0.0, 1.0], variance=[4.0, 0.01]),
        (3, 2),
    ),
    "Normalization: axes": (
        lambda: K.Normalization(axis=(1, 2), mean=[[0.0, 1.0]] * 2, variance=[[4.0, 0.0]] * 2),
        (2, 2),
    ),
    "Normalization: inverse": (
        lambda: K.Normalization(mean=[0.0, 1.0], variance=[4.0, 0.01], invert=True),
        (3, 2),
    ),
    "Rescaling: 0.5": (lambda: K.Rescaling(0.5), (3,)),
    "Rescaling: -2, offset": (lambda: K.Rescaling(-2.0, offset=1.0), (2, 3)),
    "Rescaling: arrays": (lambda: K.Rescaling([1.0, 3.0], offset=[0.0, 2.0]), (3, 2)),
}


def _frozen(shape, axis=-1, **options):
    """Frozen batch normalisation with moving statistics of its own."""
    layer = K.BatchNormalization(axis=axis, trainable=False, **options)
    layer.build((None, *shape))
    channels = np.arange(shape[axis if axis < 0 else axis - 1])
    layer.moving_mean.assign(0.5 - channels)
    layer.moving_variance.assign(0.25 + channels)
    if layer.gamma is not None:
        layer.gamma.assign(1.0 - 3.0 * channels)
    if layer.beta is not None:
        layer.beta.assign(channels - 0.25)
    return layer


FROZEN = {
    "BatchNormalization: frozen": (lambda: _frozen((3, 2)), (3, 2)),
    "BatchNormalization: frozen, channels first": (lambda: _frozen((2, 3), axis=1), (2, 3)),
    "BatchNormalization: frozen, plain": (
        lambda: _frozen((4, 2), center=False, scale=False),
        (4, 2),
    ),
}
# Where the offset and the widest channel are not attained together, or the ascent ends early.
PARTLY = dict.fromkeys(
    ["Normalization: inverse", "Resizing: nearest", "Resizing: lanczos5"], ("input",)
)
CASES = [
    Case(
        name,
        make,
        shape,
        PARTLY.get(name, BOTH),
        options={"steps": 12 if name.startswith(("Resizing", "UpSampling2D")) else 4},
    )
    for name, (make, shape) in TIGHT.items()
]
for training in (False, True):
    for name, (make, shape) in FROZEN.items():
        options = {"training": training, "steps": 4}
        CASES.append(Case(f"{name}, training={training}", make, shape, ("input",), options=options))
    for name, (make, shape) in {
        "Dropout: 0.4": (lambda: K.Dropout(0.4), (6,)),
        "Dropout: 0": (lambda: K.Dropout(0.0), (6,)),
        "Dropout: noise_shape": (lambda: K.Dropout(0.5, noise_shape=(1, 6)), (6,)),
        "AlphaDropout: 0.4": (lambda: K.AlphaDropout(0.4), (6,)),
        "AlphaDropout: 0.1": (lambda: K.AlphaDropout(0.1), (4, 6)),
        "AlphaDropout: 0.9": (lambda: K.AlphaDropout(0.9), (6,)),
        "AlphaDropout: 0": (lambda: K.AlphaDropout(0.0), (6,)),
        "SpatialDropout1D": (lambda: K.SpatialDropout1D(0.4), (4, 3)),
        "SpatialDropout2D": (lambda: K.SpatialDropout2D(0.4), (2, 3, 3)),
        "SpatialDropout3D": (lambda: K.SpatialDropout3D(0.4), (2, 2, 2, 3)),
    }.items():
        colon = "," if ":" in name else ":"
        CASES.append(
            Case(
                f"{name}{colon} training={training}",
                make,
                shape,
                options={"training": training},
            )
        )
    CASES.append(
        Case(
            f"GaussianNoise: training={training}",
            lambda: keras.Sequential(
                [
                    keras.Input((4,)),
                    layers.BallProjection(1.0),
                    K.Dense(3),
                    K.GaussianNoise(0.5),
                    layers.BallProjection(2.0),
                    K.Dense(2),
                ]
            ),
            options={"training": training},
        )
    )
