"""Layers that rearrange, repeat, drop or scale entries."""

import keras

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
    "Rescaling: 0.5": (lambda: K.Rescaling(0.5), (3,)),
    "Rescaling: -2, offset": (lambda: K.Rescaling(-2.0, offset=1.0), (2, 3)),
    "Rescaling: arrays": (lambda: K.Rescaling([1.0, 3.0], offset=[0.0, 2.0]), (3, 2)),
}
CASES = [Case(name, make, shape, BOTH) for name, (make, shape) in TIGHT.items()]
for training in (False, True):
    for name, (make, shape) in {
        "Dropout: 0.4": (lambda: K.Dropout(0.4), (6,)),
        "Dropout: 0": (lambda: K.Dropout(0.0), (6,)),
        "Dropout: noise_shape": (lambda: K.Dropout(0.5, noise_shape=(1, 6)), (6,)),
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
