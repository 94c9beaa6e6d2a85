"""Embeddings, attention, recurrence and masks."""

import math

import keras
import pytest
from keras import ops

from lipdp import layers
from lipdp.bounds import lipschitz, norms
from lipdp.bounds.rule import Rule
from tests.lipdp.mutants.mutant import mutant

K = keras.layers


def mutate(patch, cls, **factors):
    """Multiplies parts of a layer's rule; a gradient's factor goes by the end of its path."""
    right = cls.bound

    def bound(self, call):
        rule = right(self, call)
        return Rule(
            lambda xs: factors.get("forward", 1.0) * rule.forward(xs),
            lambda xs, g: [factors.get("backward", 1.0) * b for b in rule.backward(xs, g)],
            lambda xs, g: [
                (v, factors.get(v.path.rpartition("/")[2], 1.0) * b)
                for v, b in rule.gradients(xs, g)
            ],
            masks=True,
        )

    patch.setattr(cls, "bound", bound)


@mutant
def embedding_gradient_without_positions(patch):
    mutate(patch, layers.Embedding, embeddings=1 / math.sqrt(5))
    return layers.Embedding(6, 3), (5,)


@mutant
def embedding_norm_of_one_row(patch):
    mutate(patch, layers.Embedding, forward=1 / math.sqrt(5))
    return layers.Embedding(6, 3), (5,)


@mutant
def embedding_bag_as_if_tokens_differ(patch):
    mutate(patch, layers.EmbeddingBag, embeddings=1 / math.sqrt(5))
    return layers.EmbeddingBag(6, 3), (5,)


@mutant
def rows_projected_as_one_matrix(patch):
    """Divided by the spectral norm of the table, which the rows together may reach."""
    patch.setattr(
        "lipdp.bounds.projections.RowBall.project", lambda self, w: w / math.sqrt(w.shape[0])
    )
    return layers.Embedding(6, 3, radius=0.1), (5,)


@mutant
def tokens_out_of_range_as_keras_reads_them(patch):
    if keras.backend.backend() == "tensorflow":
        pytest.skip("ends in an error")
    patch.setattr(layers.Embedding, "call", K.Embedding.call)
    return layers.Embedding(6, 3), (5,)


@mutant
def positional_embedding_without_its_radius(patch):
    patch.setattr(layers.PositionalEmbedding, "bound", lambda self, call: lipschitz(
        gradients=lambda x, g: [(self.embeddings, g)]
    ))  # fmt: skip
    return layers.PositionalEmbedding(), (4, 3)


@mutant
def masked_mean_as_over_all_positions(patch):
    patch.setattr(layers.MaskedAveragePooling1D, "bound", lambda self, call: Rule(
        lambda xs: xs[0] / 2, lambda xs, g: [g / 2], masks=True
    ))  # fmt: skip
    return keras.Sequential(
        [keras.Input((4, 3)), K.Masking(), layers.MaskedAveragePooling1D()]
    ), None


@mutant
def masked_mean_that_divides_by_zero(patch):
    def call(self, x, mask=None):
        mask = ops.cast(mask[:, :, None], x.dtype)
        return ops.sum(x * mask, axis=1) / ops.sum(mask, axis=1)

    patch.setattr(layers.MaskedAveragePooling1D, "call", call)
    return keras.Sequential(
        [keras.Input((4, 3)), K.Masking(), layers.MaskedAveragePooling1D()]
    ), None


@mutant
def attention_values_without_the_root_of_the_rows(patch):
    mutate(patch, layers.LipschitzAttention, value_kernel=1 / math.sqrt(4))
    return layers.LipschitzAttention(1, 3, radius=0.5), (4, 3)


@mutant
def attention_output_without_the_root_of_the_rows(patch):
    mutate(patch, layers.LipschitzAttention, forward=1 / math.sqrt(4))
    return layers.LipschitzAttention(1, 3, radius=0.5), (4, 3)


@mutant
def attention_cotangent_without_the_scores(patch):
    root, scores = math.sqrt(2), (1 + 1 / math.sqrt(2)) / 0.1
    mutate(patch, layers.LipschitzAttention, backward=root / (root + scores))
    return layers.LipschitzAttention(1, 2, temperature=0.1), (2, 2)


@mutant
def attention_without_its_temperature(patch):
    mutate(patch, layers.LipschitzAttention, query_kernel=0.2, key_kernel=0.2)
    return layers.LipschitzAttention(1, 3, radius=0.5, temperature=0.2), (4, 3)


@mutant
def attention_on_rows_of_any_norm(patch):
    patch.setattr(layers.BallProjection, "call", lambda self, x: x)
    return layers.LipschitzAttention(1, 3, radius=0.2), (4, 3)


@mutant
def recurrent_kernel_counted_once(patch):
    mutate(patch, layers.LipschitzRNN, kernel=1 / 4)
    return layers.LipschitzRNN(4, use_bias=False, activation="linear"), (4, 3)


@mutant
def recurrent_bias_counted_once(patch):
    mutate(patch, layers.LipschitzRNN, bias=1 / 4)
    return layers.LipschitzRNN(4, activation="linear"), (4, 3)


@mutant
def recurrent_states_as_the_last_one(patch):
    mutate(patch, layers.LipschitzRNN, backward=1 / math.sqrt(4))
    return layers.LipschitzRNN(4, activation="linear", return_sequences=True), (4, 3)


@mutant
def recurrent_matrices_projected_one_by_one(patch):
    """s(W) ≤ 1 and s(U) ≤ 1 leave s([W U]) ≤ √2."""
    patch.setattr("lipdp.bounds.projections.SpectralBall.project", lambda self, w: ops.concatenate(
        [m / norms.spectral_norm_bound(m) for m in (w[:4], w[4:])]
    ))  # fmt: skip
    return layers.LipschitzRNN(4, use_bias=False, activation="linear"), (4, 4)
