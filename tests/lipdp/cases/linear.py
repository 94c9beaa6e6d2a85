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

SPECTRAL_CONV_1D = [
    # kernel, strides, padding, dilation
    (1, 1, "valid", 1),
    (3, 1, "causal", 1),
    (2, 1, "causal", 3),
    (4, 1, "same", 1),
    (3, 2, "same", 1),
    (3, 3, "valid", 1),
]
for k, s, p, d in SPECTRAL_CONV_1D:
    for certificate in ("reshaped", "fft"):
        CASES.append(
            Case(
                f"SpectralConv1D: kernel {k}, strides {s}, {p}, dilation {d}, {certificate}",
                lambda k=k, s=s, p=p, d=d, c=certificate: layers.SpectralConv1D(
                    3, k, strides=s, padding=p, dilation_rate=d, certificate=c, bias_norm=0.5
                ),
                (7, 2),
                tight=("bias", "kernel") if k == 1 else ("bias",),
                slow=certificate == "fft" or p == "valid",
            )
        )
CASES.append(
    Case(
        "SpectralConv1D: groups=2, activation",
        lambda: layers.SpectralConv1D(4, 3, padding="causal", groups=2, activation="gelu"),
        (5, 2),
    )
)

for patch, shape in [(1, (2, 3, 2)), (2, (4, 4, 1)), ((2, 3), (4, 6, 2)), (4, (4, 4, 3))]:
    for sequence in (True, False):
        CASES.append(
            Case(
                f"PatchEmbedding: {patch} of {shape}, sequence={sequence}",
                lambda patch=patch, sequence=sequence: layers.PatchEmbedding(
                    3, patch, sequence=sequence, bias_norm=0.3
                ),
                shape,
                tight=("bias", "kernel", "input", "output"),
                options={"steps": 6},
                slow=patch in (1, 4),
            )
        )

DEPTHWISE_2D = [
    # kernel, strides, padding, dilation, multiplier; TensorFlow dilates without strides only
    (1, 1, "valid", 1, 3),
    (2, 1, "same", 1, 1),
    (2, 2, "valid", 1, 2),
    (3, 1, "same", 1, 2),
    (3, 2, "same", 1, 1),
    ((3, 2), 1, "valid", 1, 2),
    (3, 1, "same", 2, 2),
    (4, 1, "same", 1, 1),
]
DEPTHWISE = {
    "DepthwiseConv2D": lambda k, m, **o: K.DepthwiseConv2D(k, depth_multiplier=m, **o),
    "SpectralDepthwiseConv2D": lambda k, m, **o: layers.SpectralDepthwiseConv2D(
        k, depth_multiplier=m, bias_norm=0.5, **o
    ),
    "SeparableConv2D": lambda k, m, **o: K.SeparableConv2D(3, k, depth_multiplier=m, **o),
    "SpectralSeparableConv2D": lambda k, m, **o: layers.SpectralSeparableConv2D(
        3, k, depth_multiplier=m, bias_norm=0.5, **o
    ),
}
for kind, make in DEPTHWISE.items():
    for k, s, p, d, m in DEPTHWISE_2D:
        whole = k == s or k == 1  # no entry is read twice, or left out
        CASES.append(
            Case(
                f"{kind}: kernel {k}, strides {s}, {p}, dilation {d}, multiplier {m}",
                lambda make=make, k=k, s=s, p=p, d=d, m=m: make(
                    k, m, strides=s, padding=p, dilation_rate=d
                ),
                (4, 4, 2),
                tight=("bias", "kernel") if whole else ("bias",),
                slow=k not in ((1, 3) if "Spectral" in kind else (1,)),
            )
        )
    CASES.append(
        Case(
            f"{kind}: 3, same, activation, no bias",
            lambda make=make: make(3, 2, padding="same", use_bias=False, activation="selu"),
            (4, 4, 2),
        )
    )
CASES.append(
    Case(
        "SpectralDepthwiseConv2D: reshaped",
        lambda: layers.SpectralDepthwiseConv2D(3, padding="same", certificate="reshaped"),
        (4, 4, 3),
        tight=("bias",),
    )
)
for cls in (K.DepthwiseConv1D, K.SeparableConv1D):
    for k, s, p, m in [(3, 1, "same", 2), (2, 2, "valid", 1), (4, 1, "same", 1)]:
        arguments = (k,) if cls is K.DepthwiseConv1D else (3, k)
        CASES.append(
            Case(
                f"{cls.__name__}: kernel {k}, strides {s}, {p}, multiplier {m}",
                lambda cls=cls, a=arguments, s=s, p=p, m=m: cls(
                    *a, strides=s, padding=p, depth_multiplier=m
                ),
                (6, 2),
                tight=("bias",),
            )
        )

TRANSPOSED_2D = [
    # kernel, strides, padding, output padding
    (1, 1, "valid", None),
    (2, 2, "valid", None),
    (2, 3, "valid", None),
    (3, 1, "same", None),
    (3, 2, "same", None),
    (3, 2, "same", 0),
    (4, 2, "valid", 1),
    ((2, 3), (1, 2), "same", None),
    (4, 1, "same", None),
]
for kind, make in {
    "Conv2DTranspose": lambda *a, **o: K.Conv2DTranspose(*a, **o),
    "SpectralConv2DTranspose": lambda *a, **o: layers.SpectralConv2DTranspose(
        *a, bias_norm=0.5, **o
    ),
}.items():
    for k, s, p, o in TRANSPOSED_2D:
        CASES.append(
            Case(
                f"{kind}: kernel {k}, strides {s}, {p}, output padding {o}",
                lambda make=make, k=k, s=s, p=p, o=o: make(
                    3, k, strides=s, padding=p, output_padding=o
                ),
                (3, 3, 2),
                tight=("bias", "kernel", "input") if k in (1, s) else ("bias",),
                slow=k != 3 if "Spectral" in kind else k != 2,
            )
        )
CASES.append(
    Case(
        "SpectralConv2DTranspose: reshaped, activation",
        lambda: layers.SpectralConv2DTranspose(
            2, 3, strides=2, certificate="reshaped", activation="softplus"
        ),
        (3, 3, 2),
    )
)
for k, s, p in [(3, 1, "same"), (2, 2, "valid"), (4, 2, "same")]:
    CASES += [
        Case(
            f"Conv1DTranspose: kernel {k}, strides {s}, {p}",
            lambda k=k, s=s, p=p: K.Conv1DTranspose(3, k, strides=s, padding=p),
            (5, 2),
            tight=("bias",),
        ),
        Case(
            f"Conv3DTranspose: kernel {k}, strides {s}, {p}",
            lambda k=k, s=s, p=p: K.Conv3DTranspose(2, k, strides=s, padding=p),
            (2, 3, 2, 1),
            tight=("bias",),
            slow=k == 4,
        ),
    ]

for equation, output_shape, bias_axes, shape in [
    ("ab,bc->ac", 3, "c", (4,)),
    ("abc,cd->abd", (3, 3), "d", (3, 4)),
    ("abc,dc->adb", (3, 2), "d", (2, 4)),  # another order of the axes
    ("abc,bcd->abd", (2, 3), "bd", (2, 4)),  # a matrix for each position
    ("abc,cde->abde", (2, 2, 3), "de", (2, 4)),  # the heads of attention
    ("abcd,cde->abe", (2, 4), "e", (2, 2, 3)),
    ("abc,bc->abc", (2, 3), None, (2, 3)),  # a gain for each entry
]:
    CASES.append(
        Case(
            f"EinsumDense: {equation}, {shape}",
            lambda e=equation, o=output_shape, b=bias_axes: K.EinsumDense(e, o, bias_axes=b),
            shape,
            tight=("input", "kernel", "bias", "output"),
            options={"steps": 6},
        )
    )
CASES.append(
    Case(
        "EinsumDense: activation",
        lambda: K.EinsumDense("abc,cd->abd", (2, 3), bias_axes="d", activation="gelu"),
        (2, 4),
    )
)

for gain in (0.3, 1.0, 4.0):
    for shape in [(3,), (4, 3), (2, 2, 3)]:
        CASES.append(
            Case(
                f"ChannelGain: {gain}, {shape}",
                lambda gain=gain: layers.ChannelGain(gain),
                shape,
                tight=("input", "output", "gamma"),
            )
        )

BLOCKS = {
    "SandwichDense": (lambda h, **o: layers.SandwichDense(3, h, **o), (4,), ("output", "input")),
    "ConvexPotential": (layers.ConvexPotential, (4,), ("input", "kernel")),
    "ConvexPotentialConv2D": (
        lambda h, **o: layers.ConvexPotentialConv2D(3, h, **o),
        (3, 3, 2),
        ("input",),
    ),
}
for kind, (make, shape, tight) in BLOCKS.items():
    for hidden in (None, 2, 6):
        CASES.append(
            Case(
                f"{kind}: hidden={hidden}, no bias",
                lambda make=make, hidden=hidden: make(hidden, use_bias=False),
                shape,
                tight=tight if hidden else (),
                options={"steps": 8},
                slow=hidden is None,
            )
        )
    for bias_norm in (0.2, 2.0):
        CASES.append(
            Case(
                f"{kind}: bias at most {bias_norm}, positions",
                lambda make=make, bias_norm=bias_norm: make(6, bias_norm=bias_norm),
                shape if len(shape) == 3 else (2, *shape),
                tight=() if len(shape) == 3 else ("input", "bias"),
                options={"steps": 8},
                slow=bias_norm == 2.0,
            )
        )
CASES.append(
    Case(
        "ConvexPotentialConv2D: even kernel",
        lambda: layers.ConvexPotentialConv2D((2, 4), 3, certificate="reshaped"),
        (3, 3, 2),
        tight=("input",),
    )
)
for rank, shape in [(1, (3,)), (2, (2, 4)), (None, (4,)), (6, (2, 2, 3))]:
    CASES.append(
        Case(
            f"BlockReflector: rank={rank}, {shape}",
            lambda rank=rank: layers.BlockReflector(rank),
            shape,
            tight=("input", "output", "kernel"),
            options={"steps": 8},
        )
    )
for k, certificate, activation in [
    (1, "fft", None),
    (3, "fft", None),
    (3, "auto", "tanh"),
    (3, "reshaped", None),
    ((1, 5), "fft", None),
]:
    CASES.append(
        Case(
            f"ResidualConv2D: kernel {k}, {certificate}, activation={activation}",
            lambda k=k, c=certificate, a=activation: layers.ResidualConv2D(
                2, k, certificate=c, activation=a, bias_norm=0.5
            ),
            (4, 4, 2),
            # The bound by reshaping shrinks the identity, too.
            tight=("bias",) if certificate == "reshaped" else ("input", "bias"),
            options={"steps": 6},
            slow=certificate == "auto",
        )
    )
for kind, cls in {
    "AlmostOrthogonalDense": layers.AlmostOrthogonalDense,
    "CayleyDense": layers.CayleyDense,
    "ExponentialDense": layers.ExponentialDense,
}.items():
    for units, shape in [(4, (4,)), (2, (3, 4)), (5, (3, 3))]:
        for initializer in ("zeros", "glorot_normal"):
            tall = cls is layers.CayleyDense and units == 2
            CASES.append(
                Case(
                    f"{kind}: {shape} to {units}, {initializer}",
                    lambda cls=cls, units=units, initializer=initializer: cls(
                        units, bias_norm=0.2, kernel_initializer=initializer
                    ),
                    shape,
                    tight=("input", "bias") if tall else ("input", "bias", "kernel"),
                    options={"steps": 8},
                    slow=initializer != "zeros" and units != 5,
                )
            )
    CASES.append(
        Case(
            f"{kind}: activation, no bias",
            lambda cls=cls: cls(3, use_bias=False, activation="gelu"),
            (2, 4),
        )
    )
for k, s, p, groups in [
    (1, 1, "valid", 1),
    (2, 2, "valid", 1),
    (3, 1, "same", 1),
    (3, 2, "same", 2),
    (4, 1, "same", 1),
]:
    CASES.append(
        Case(
            f"AlmostOrthogonalConv2D: kernel {k}, strides {s}, {p}, groups {groups}",
            lambda k=k, s=s, p=p, groups=groups: layers.AlmostOrthogonalConv2D(
                4, k, strides=s, padding=p, groups=groups, bias_norm=0.5
            ),
            (4, 4, 2),
            tight=("bias", "kernel", "input") if k == 1 else ("bias",),
        )
    )
