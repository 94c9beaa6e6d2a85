"""Layers for sequences; integers where tokens are read."""

import keras

from lipdp import layers
from tests.lipdp.cases.case import BOTH, Case

K = keras.layers
CASES = []

for cls, shapes in [(layers.Embedding, [(), (1,), (5,), (2, 3)]), (layers.EmbeddingBag, [(5,)])]:
    for shape in shapes:
        for arguments in [{}, {"radius": 0.3, "mask_zero": True}]:
            CASES.append(
                Case(
                    f"{cls.__name__}: {shape}, {arguments}",
                    lambda cls=cls, arguments=arguments: cls(7, 3, **arguments),
                    shape,
                    tight=("output", "embeddings"),
                )
            )
for shape in [(3,), (4, 3)]:
    CASES.append(
        Case(
            f"PositionalEmbedding: {shape}",
            lambda: layers.PositionalEmbedding(0.5),
            shape,
            tight=(*BOTH, "embeddings"),
        )
    )
for use_bias in (True, False):
    CASES.append(
        Case(
            f"TokenDense: use_bias={use_bias}",
            lambda use_bias=use_bias: layers.TokenDense(3, use_bias=use_bias, bias_norm=0.5),
            (4, 2),
            tight=(*BOTH, "kernel", "bias"),
            options={"steps": 6},
        )
    )
CASES += [
    Case("Masking", K.Masking, (4, 2), tight=BOTH),
    Case("Masking: mask_value=0.5", lambda: K.Masking(0.5), (4, 2), tight=BOTH),
    Case("MaskedAveragePooling1D: no mask", layers.MaskedAveragePooling1D, (4, 2), tight=BOTH),
]

ATTENTIONS = [
    # heads, key_dim, radius, temperature, shape, norm of the input
    (1, 3, 1.0, 1.0, (4, 3), 1.0),
    (1, 3, 0.5, 1.0, (4, 3), 2.0),
    (1, 2, 1.0, 0.3, (2, 2), 2.0),
    (2, 2, 1.0, 0.1, (4, 4), 2.0),
    (3, 2, 1.0, 0.2, (2, 4), 2.0),
    (1, 3, 1.0, 0.05, (6, 3), 1.0),
    (2, 2, 1.0, 0.3, (1, 3), 1.0),
]
for heads, key_dim, radius, temperature, shape, norm in ATTENTIONS:
    # Equal rows in the ball attain what does not go through the scores, for a single head.
    full = heads == 1 and norm >= radius * shape[0] ** 0.5
    CASES.append(
        Case(
            f"LipschitzAttention: {heads} heads of {key_dim}, radius {radius}, temperature "
            f"{temperature}, {shape}, ‖x‖ ≤ {norm}",
            lambda a=(heads, key_dim, radius, temperature): layers.LipschitzAttention(*a),
            shape,
            tight=("output", "value_kernel", "output_kernel") if full else (),
            options={"input_bound": norm, "steps": 6},
            slow=heads > 1 or not full,
        )
    )

for all_states in (False, True):
    for activation in ("linear", "tanh", "relu"):
        for use_bias in (False, True):
            CASES.append(
                Case(
                    f"LipschitzRNN: {activation}, use_bias={use_bias}, all states: {all_states}",
                    lambda a=activation, b=use_bias, s=all_states: layers.LipschitzRNN(
                        4, activation=a, use_bias=b, bias_norm=0.2, return_sequences=s
                    ),
                    (4, 3),
                    tight=() if all_states or activation == "relu" else ("input",),
                    options={"input_bound": 0.1 if activation == "tanh" else 1.0, "steps": 6},
                    slow=activation != "linear",
                )
            )
CASES.append(
    Case(
        "LipschitzRNN: one step",
        lambda: layers.LipschitzRNN(4),
        (1, 3),
        tight=("input", "kernel", "bias"),
    )
)


def masked(*after, shape=(5, 3)):
    """Positions that are zero are hidden."""
    return keras.Sequential([keras.Input(shape), K.Masking(), *after])


def tokens(*after, mask_zero=False, length=5):
    embedding = layers.Embedding(9, 4, mask_zero=mask_zero)
    return keras.Sequential([keras.Input((length,), dtype="int32"), embedding, *after])


def transformer(mask_zero):
    x = keras.Input((4,), dtype="int32")
    y = layers.PositionalEmbedding(0.5)(layers.Embedding(9, 4, mask_zero=mask_zero)(x))
    for _ in range(2):
        y = K.Average()([y, layers.LipschitzAttention(2, 2, temperature=0.3)(y)])
        y = K.Average()([y, layers.SpectralDense(4, activation="relu")(y)])
    return keras.Model(x, layers.SpectralDense(2)(layers.MaskedAveragePooling1D()(y)))


def mixer():
    x = keras.Input((4, 3))
    y = layers.BallProjection(2.0)(x)
    y = K.Average()([y, layers.TokenDense(4, activation="relu", use_bias=False)(y)])
    y = K.Average()([y, layers.SpectralDense(3, activation="relu", use_bias=False)(y)])
    return keras.Model(x, layers.SpectralDense(2)(K.Flatten()(y)))


NETWORKS = {
    "bag": lambda: keras.Sequential(
        [
            keras.Input((6,), dtype="int32"),
            layers.EmbeddingBag(9, 4, mask_zero=True),
            layers.SpectralDense(3),
        ]
    ),
    "mean": lambda: tokens(layers.MaskedAveragePooling1D(), layers.SpectralDense(3)),
    "masked mean": lambda: tokens(
        layers.MaskedAveragePooling1D(), layers.SpectralDense(3), mask_zero=True
    ),
    "recurrent": lambda: tokens(layers.LipschitzRNN(4, bias_norm=0.2), mask_zero=True),
    "transformer": lambda: transformer(False),
    "transformer, masked": lambda: transformer(True),
    "mixer": mixer,
}
CASES += [
    Case(f"network of sequences, {name}", make, options={"steps": 2}, slow="transformer" in name)
    for name, make in NETWORKS.items()
]
CASES += [
    Case(
        "MaskedAveragePooling1D: mask",
        lambda: masked(layers.MaskedAveragePooling1D()),
        tight=BOTH,
        options={"input_bound": 1.0},
    ),
    Case(
        "LipschitzAttention: mask",
        lambda: masked(layers.LipschitzAttention(1, 3, temperature=0.2)),
        options={"input_bound": 2.0},
    ),
    Case(
        "LipschitzRNN: mask",
        lambda: masked(layers.LipschitzRNN(3, bias_norm=0.2, return_sequences=True)),
        options={"input_bound": 1.0},
    ),
]
