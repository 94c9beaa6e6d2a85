"""Pooling of all kinds."""

import itertools

import keras

from lipdp import layers
from tests.lipdp.cases.case import BOTH, Case

K = keras.layers
CASES = []

KINDS = [
    K.MaxPooling1D,
    K.MaxPooling2D,
    K.MaxPooling3D,
    K.AveragePooling1D,
    K.AveragePooling2D,
    K.AveragePooling3D,
    layers.ScaledAveragePooling1D,
    layers.ScaledAveragePooling2D,
    layers.L2NormPooling1D,
    layers.L2NormPooling2D,
]
SHAPES = {1: (7, 2), 2: (6, 6, 2), 3: (5, 5, 5, 1)}
WINDOWS = [(2, None), (2, 1), (3, 2), (2, 3), (5, 2)]
for cls, (pool, strides), padding in itertools.product(KINDS, WINDOWS, ["valid", "same"]):
    rank = int(cls.__name__[-2])
    tight = ()
    if rank < 3 and (strides or pool) >= pool:  # windows do not overlap
        tight = ("input",) if "Max" in cls.__name__ else BOTH
    CASES.append(
        Case(
            f"{cls.__name__}: {pool}, strides {strides}, {padding}",
            lambda cls=cls, pool=pool, strides=strides, padding=padding: cls(
                pool, strides=strides, padding=padding
            ),
            SHAPES[rank],
            tight,
        )
    )
UNEQUAL = [((2, 3), (1, 2), (4, 7, 1)), ((3, 1), 1, (5, 2, 2))]
for cls, (pool, strides, shape), padding in itertools.product(
    [K.MaxPooling2D, K.AveragePooling2D, layers.L2NormPooling2D], UNEQUAL, ["valid", "same"]
):
    CASES.append(
        Case(
            f"{cls.__name__}: {pool}, strides {strides}, {padding}, {shape}",
            lambda cls=cls, pool=pool, strides=strides, padding=padding: cls(
                pool, strides=strides, padding=padding
            ),
            shape,
        )
    )

for cls, shape in [
    (K.GlobalMaxPooling1D, (5, 2)),
    (K.GlobalMaxPooling2D, (3, 4, 2)),
    (K.GlobalMaxPooling3D, (2, 3, 2, 2)),
    (K.GlobalAveragePooling1D, (5, 2)),
    (K.GlobalAveragePooling2D, (3, 4, 2)),
    (K.GlobalAveragePooling3D, (2, 3, 2, 2)),
    (layers.GlobalScaledAveragePooling1D, (5, 2)),
    (layers.GlobalL2NormPooling1D, (5, 2)),
    (layers.GlobalScaledAveragePooling2D, (3, 4, 2)),
    (layers.GlobalL2NormPooling2D, (3, 4, 2)),
]:
    CASES.append(Case(f"{cls.__name__}: {shape}", cls, shape, BOTH))
CASES.append(
    Case(
        "GlobalAveragePooling2D: keepdims",
        lambda: K.GlobalAveragePooling2D(keepdims=True),
        (3, 4, 2),
        BOTH,
    )
)

for cls, size, shape in [
    (K.AdaptiveAveragePooling1D, 3, (7, 2)),
    (K.AdaptiveAveragePooling1D, 5, (7, 1)),
    (K.AdaptiveAveragePooling1D, 2, (4, 1)),
    (K.AdaptiveAveragePooling2D, 3, (5, 6, 2)),
    (K.AdaptiveAveragePooling2D, (2, 4), (4, 7, 1)),
    (K.AdaptiveAveragePooling3D, 2, (3, 4, 5, 1)),
    (K.AdaptiveMaxPooling1D, 3, (7, 2)),
    (K.AdaptiveMaxPooling1D, 2, (4, 1)),
    (K.AdaptiveMaxPooling2D, 3, (5, 6, 2)),
    (K.AdaptiveMaxPooling2D, 2, (4, 4, 1)),
    (K.AdaptiveMaxPooling3D, 2, (3, 4, 5, 1)),
]:
    CASES.append(
        Case(
            f"{cls.__name__}: {size}, {shape}",
            lambda cls=cls, size=size: cls(size),
            shape,
            BOTH if "Average" in cls.__name__ else (),
            options={"steps": 8},
        )
    )
