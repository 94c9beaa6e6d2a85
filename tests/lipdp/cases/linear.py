"""Dense layers and convolutions."""

import keras

from lipdp import layers
from tests.lipdp.cases.case import Case

K = keras.layers
CASES = []

DENSE = {
    "Dense": lambda **k: K.Dense(3, **k),
    "SpectralDense": lambda **k: layers.SpectralDense(3, bias_norm=0.4, **k),
    "SpectralDense(orthogonal)": lambda **k: layers.SpectralDense(3, orthogonal=True, **k),
    "FrobeniusDense": lambda **k: layers.FrobeniusDense(3, radius=0.8, **k),
}
for kind, make in DENSE.items():
    for shape in [(1,), (4,), (5, 4), (2, 3, 4)]:
        for use_bias in (True, False):
            CASES.append(
                Case(
                    f"{kind}: {shape}, use_bias={use_bias}",
                    lambda make=make, use_bias=use_bias: make(use_bias=use_bias),
                    shape,
                    tight=("input", "kernel", "bias", "output"),
                    options={"steps": 6},
                    slow=shape in [(1,), (2, 3, 4)],
                )
            )
for kind in ("Dense", "SpectralDense"):
    for activation in ("relu", "gelu", "softplus", "sigmoid", "selu", "tanh"):
        CASES.append(
            Case(
                f"{kind}: activation={activation}",
                lambda kind=kind, activation=activation: DENSE[kind](activation=activation),
                (2, 4),
            )
        )

CONV_2D = [
    # kernel, strides, padding, dilation
    (1, 1, "valid", 1),
    (1, 2, "same", 1),
    (2, 1, "same", 1),
    (2, 2, "valid", 1),
    (3, 1, "same", 1),
    (3, 1, "valid", 1),
    (3, 2, "same", 1),
    (3, (1, 2), "same", 1),
    ((3, 2), 1, "same", 1),
    (3, 3, "same", 1),
    (2, 1, "same", 2),
    (3, 1, "same", 2),
    (4, 1, "same", 1),
    (4, 2, "valid", 1),
    (5, 1, "same", 1),
]
CONVOLUTIONS = {
    "SpectralConv2D": lambda **k: layers.SpectralConv2D(3, bias_norm=0.5, **k),
    "SpectralConv2D(reshaped)": lambda **k: layers.SpectralConv2D(
        3, bias_norm=0.5, certificate="reshaped", **k
    ),
    "Conv2D": lambda **k: K.Conv2D(3, **k),
}
for kind, make in CONVOLUTIONS.items():
    for k, s, p, d in CONV_2D:
        options = dict(kernel_size=k, strides=s, padding=p, dilation_rate=d)
        CASES.append(
            Case(
                f"{kind}: kernel {k}, strides {s}, {p}, dilation {d}",
                lambda make=make, options=options: make(**options),
                (5, 5, 2),
                tight=("bias", "kernel", "input") if k == 1 else ("bias",),
                slow=kind != "SpectralConv2D",
            )
        )
for padding in ("same", "valid"):
    for groups in (2, 4):
        CASES += [
            Case(
                f"Conv2D: 3, {padding}, groups={groups}",
                lambda p=padding, g=groups: K.Conv2D(4, 3, padding=p, groups=g),
                (4, 4, 4),
                slow=groups == 4,
            ),
            Case(
                f"SpectralConv2D: 3, {padding}, groups={groups}, activation",
                lambda p=padding, g=groups: layers.SpectralConv2D(
                    4, 3, padding=p, groups=g, activation="relu"
                ),
                (4, 4, 4),
                slow=groups == 4,
            ),
        ]
    CASES.append(
        Case(
            f"SpectralConv2D: 3, {padding}, no bias",
            lambda p=padding: layers.SpectralConv2D(4, 3, padding=p, use_bias=False),
            (4, 4, 4),
        )
    )
    for k, s in [(1, 1), (2, 1), (3, 2)]:
        CASES.append(
            Case(
                f"Conv3D: kernel {k}, strides {s}, {padding}",
                lambda k=k, s=s, p=padding: K.Conv3D(2, k, strides=s, padding=p),
                (3, 4, 3, 2),
                tight=("bias",),
            )
        )
for padding in ("same", "valid", "causal"):
    for k, s, d in [(1, 1, 1), (3, 1, 1), (3, 2, 1), (2, 1, 3)]:
        CASES.append(
            Case(
                f"Conv1D: kernel {k}, strides {s}, {padding}, dilation {d}",
                lambda k=k, s=s, p=padding, d=d: K.Conv1D(
                    3, k, strides=s, padding=p, dilation_rate=d
                ),
                (7, 2),
                tight=("bias",),
            )
        )
