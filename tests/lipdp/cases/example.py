"""Layers that look at one example: balls, centering, clips, normalisation."""

import math

import keras

from lipdp import layers
from tests.lipdp.cases.case import BOTH, Case

K = keras.layers
CASES = []

for radius in (0.01, 1.0, 50.0):
    for per_position in (False, True):
        for shape in [(4,), (3, 2), (3, 3, 2)]:
            for input_bound in (math.inf, 2.0):
                CASES.append(
                    Case(
                        f"BallProjection: {radius}, per_position={per_position}, {shape}, "
                        f"‖x‖ ≤ {input_bound}",
                        lambda radius=radius, per_position=per_position: layers.BallProjection(
                            radius, per_position=per_position
                        ),
                        shape,
                        tight=BOTH if input_bound == math.inf else (),
                        options={"input_bound": input_bound},
                    )
                )
for axes, shape in [
    (None, (4,)),
    (None, (3, 2)),
    (1, (3, 2)),
    (2, (3, 2)),
    (-1, (2, 3, 2)),
    ((1, 2), (3, 3, 2)),
]:
    CASES.append(
        Case(
            f"Centering: axes={axes}, {shape}",
            lambda axes=axes: layers.Centering(axes),
            shape,
            BOTH,
        )
    )
for clip in (0.1, 1.0, 10.0):
    CASES.append(
        Case(
            f"ClipGradient: {clip}",
            lambda clip=clip: layers.ClipGradient(clip),
            (2, 3),
            BOTH,
            options={"loss_gradient_bound": 3.0},
        )
    )

for radius, floor in [(1.0, 0.1), (2.0, 2.0), (0.5, 3.0)]:
    for center in (True, False):
        for per_position in (True, False):
            for groups, shape in [(1, (4,)), (2, (4,)), (2, (3, 4)), (3, (2, 2, 6))]:
                CASES.append(
                    Case(
                        f"FlooredNormalization: {radius}, {floor}, groups={groups}, "
                        f"per_position={per_position}, center={center}, {shape}",
                        lambda r=radius, f=floor, g=groups, p=per_position, c=center: (
                            layers.FlooredNormalization(r, f, groups=g, per_position=p, center=c)
                        ),
                        shape,
                        BOTH,
                        options={"steps": 8},
                        slow=radius == 2.0 and shape != (3, 4),
                    )
                )
CASES.append(
    Case(
        "FlooredNormalization: any input",
        lambda: keras.Sequential(
            [keras.Input((3, 4)), layers.FlooredNormalization(groups=2), K.Dense(2)]
        ),
    )
)

NORMALIZATIONS = {
    "LayerNormalization": lambda **k: K.LayerNormalization(**k),
    "LayerNormalization(axis=1)": lambda **k: K.LayerNormalization(axis=1, **k),
    "LayerNormalization(axis=[1, 2])": lambda **k: K.LayerNormalization(axis=[1, 2], **k),
    "LayerNormalization(plain)": lambda **k: K.LayerNormalization(center=False, scale=False, **k),
    "RMSNormalization": lambda **k: K.RMSNormalization(**k),
    "GroupNormalization": lambda **k: K.GroupNormalization(groups=2, **k),
    "GroupNormalization(instance)": lambda **k: K.GroupNormalization(groups=-1, **k),
}
# Small inputs attain the slope 1/√ε, large ones the norm √N.
for name, make in NORMALIZATIONS.items():
    for epsilon in (1e-3, 0.5):
        for radius, tight in [(1e-3, ("output", "input")), (1.0, ()), (1e4, ("output",))]:
            CASES.append(
                Case(
                    f"{name}: ε={epsilon}, ‖x‖ ≤ {radius}",
                    lambda make=make, epsilon=epsilon: make(epsilon=epsilon),
                    (3, 4),
                    (*tight, "beta"),
                    options={"input_bound": radius, "steps": 8},
                )
            )
