"""Layers that look at one example: balls, centering, clips."""

import math

from lipdp import layers
from tests.lipdp.cases.case import BOTH, Case

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
