"""Sequences: embeddings of tokens and positions, pooling and mixing over positions."""

import dataclasses
import math
from typing import Any

import keras
from keras import ops

from lipdp.bounds import Call, Rule, lipschitz
from lipdp.bounds.builtin import linear
from lipdp.bounds.projections import NormBall, RowBall
from lipdp.bounds.rule import row_norm, size, vector_norm
from lipdp.layers.dense import SpectralDense
from lipdp.layers.projected import Projected


@keras.saving.register_keras_serializable("lipdp")
class Embedding(Projected, keras.layers.Embedding):
    """Vectors for integer tokens, each of norm at most `radius`; it needs no ball in front.

    A token out of range is read as the nearest one in range: no example can stop a step, or make
    it NaN. Over `T` positions: output at most `√T·radius`, gradient at most `√T·G` (a row that
    `m` positions share collects the sum of their cotangents, at most `√m` times their norm),
    nothing passes to the tokens. Noise goes onto every row, also of tokens that nobody used: which
    rows move would tell what was read.

    Args:
        input_dim: number of tokens; they are the integers from 0 to `input_dim - 1`.
        output_dim: length of a vector.
        radius: radius of the ball of each vector.
        embeddings_initializer: a Keras initializer; its result is projected.
        mask_zero: hand on a mask that hides the positions of token 0.
        **kwargs: as for `keras.layers.Embedding`, but constraints.

    Input shape: `(batch, ...)`, integers of 32 bits. Output shape: `(batch, ..., output_dim)`.

    >>> layer = Embedding(10, 3)
    >>> layer(ops.array([[1, 2], [9, 1000]])).shape == (2, 2, 3)
    True
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        radius: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(input_dim, output_dim, **kwargs)
        self.radius = radius
        self.embeddings_constraint = RowBall(radius)

    def call(self, tokens):
        # Cast first: the bound may not fit into a small integer, and NaN is cast to some integer.
        return super().call(ops.clip(ops.cast(tokens, "int32"), 0, self.input_dim - 1))

    def compute_mask(self, tokens, mask=None):
        return ops.greater(tokens, 0) if self.mask_zero else None  # below zero is read as zero

    def bound(self, call: Call) -> Rule:
        positions = math.sqrt(size(call.input_shape))
        table = linear.weight_of(self, "embeddings")
        length = row_norm(table)
        return Rule(
            forward=lambda xs: positions * length,
            backward=lambda xs, g: [0.0],
            gradients=lambda xs, g: [(table, positions * g)],
            any_input=True,
        )

    def get_config(self) -> dict:
        return {**super().get_config(), "radius": self.radius}


@keras.saving.register_keras_serializable("lipdp")
class PositionalEmbedding(Projected):
    """Adds a trainable array of the shape of an example, of norm at most `radius`.

    Output at most `X + radius`, cotangent and gradient at most `G`: each entry of the array meets
    one entry of the example.

    Args:
        radius: radius of the ball of the whole array.
        initializer: a Keras initializer; its result is projected.

    Input and output shape: `(batch, positions, features)`, all but the batch known.

    >>> PositionalEmbedding()(ops.ones((2, 5, 3))).shape == (2, 5, 3)
    True
    """

    def __init__(
        self,
        radius: float = 1.0,
        initializer: str | keras.initializers.Initializer = "uniform",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.radius = radius
        self.constraint = NormBall(radius)
        self.initializer = keras.initializers.get(initializer)
        self.supports_masking = True

    def build(self, input_shape):
        size(input_shape[1:])  # all sizes must be known
        self.embeddings = self.add_weight(
            shape=input_shape[1:],
            initializer=self.initializer,
            constraint=self.constraint,
            name="embeddings",
        )
        super().build(input_shape)

    def call(self, x):
        return x + self.embeddings

    def compute_output_shape(self, input_shape):
        return input_shape

    def bound(self, call: Call) -> Rule:
        return lipschitz(
            offset=vector_norm(self.embeddings),
            gradients=lambda x, g: [(self.embeddings, g)],
        )

    def get_config(self) -> dict:
        return {
            **super().get_config(),
            "radius": self.radius,
            "initializer": keras.initializers.serialize(self.initializer),
        }


@keras.saving.register_keras_serializable("lipdp")
class EmbeddingBag(Embedding):
    """Mean of the vectors of all tokens: `Embedding` and an average over `T` positions in one.

    A row that `m` of `n` positions share gets `m/n` of the cotangent, and `Σ (m/n)² ≤ 1`. So the
    output is at most `radius`, the gradient at most `G`, with a mask, too, where the two layers
    apart would be charged for a single position and for `T` of them at once.

    Args:
        mask_zero: leave the positions of token 0 out of the mean; where nothing else is left the
            output is zero. The other arguments are those of `Embedding`.

    Input shape: `(batch, positions)`. Output shape: `(batch, output_dim)`.

    >>> EmbeddingBag(10, 3, mask_zero=True)(ops.array([[1, 2, 0], [0, 0, 0]])).shape == (2, 3)
    True
    """

    def build(self, input_shape=None):
        if input_shape is None or len(input_shape) != 2:
            raise ValueError(
                f"EmbeddingBag takes tokens (batch, positions); got a shape of {input_shape}."
            )
        super().build(input_shape)

    def call(self, tokens):
        vectors = super().call(tokens)
        return _mean(vectors, ops.greater(tokens, 0) if self.mask_zero else None)

    def compute_mask(self, tokens, mask=None):
        return None

    def compute_output_spec(self, tokens):
        return keras.KerasTensor((tokens.shape[0], self.output_dim), dtype=self.compute_dtype)

    def compute_output_shape(self, input_shape):
        return (input_shape[0], self.output_dim)

    def bound(self, call: Call) -> Rule:
        table = linear.weight_of(self, "embeddings")
        length = row_norm(table)
        return Rule(
            forward=lambda xs: length,
            backward=lambda xs, g: [0.0],
            gradients=lambda xs, g: [(table, g)],
            any_input=True,
        )


def _mean(x, mask):
    """Mean over the positions that a mask leaves, zero where it leaves none."""
    if mask is None:
        return ops.mean(x, axis=1)
    mask = ops.expand_dims(mask, -1)
    count = ops.sum(ops.cast(mask, x.dtype), axis=1)
    return ops.sum(ops.where(mask, x, ops.zeros_like(x)), axis=1) / ops.maximum(count, 1.0)


@keras.saving.register_keras_serializable("lipdp")
class MaskedAveragePooling1D(keras.layers.Layer):
    """Mean over the positions that a mask leaves, zero where it leaves none.

    Over `n` positions the mean is at most `X/√n`, its cotangent at most `G/√n`. Without a mask
    that is `n = T`; with one an example may leave a single position: `X` and `G`. So a mask costs
    noise: behind an embedding use `EmbeddingBag`, for which it is free.

    Input shape: `(batch, positions, features)`. Output shape: `(batch, features)`.

    >>> x = ops.array([[[1.0], [3.0], [8.0]]])
    >>> float(MaskedAveragePooling1D()(x, mask=ops.array([[True, True, False]]))[0, 0])
    2.0
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True

    def call(self, x, mask=None):
        return _mean(x, mask)

    def compute_mask(self, x, mask=None):
        return None

    def compute_output_shape(self, input_shape):
        return (input_shape[0], input_shape[2])

    def bound(self, call: Call) -> Rule:
        constant = 1.0 if call.masked else 1.0 / math.sqrt(size(call.input_shape[:1]))
        return dataclasses.replace(lipschitz(constant), masks=True)


@keras.saving.register_keras_serializable("lipdp")
class TokenDense(SpectralDense):
    """`SpectralDense` over the positions, with the same weights for each feature: how the blocks
    of an MLP-Mixer mix tokens. Arguments and bounds are those of `SpectralDense`, where `T`
    counts the features, which share the bias.

    Input shape: `(batch, positions, features)`. Output shape: `(batch, units, features)`.

    >>> TokenDense(4)(ops.ones((2, 5, 3))).shape == (2, 4, 3)
    True
    """

    def build(self, input_shape):
        if len(input_shape) != 3:
            raise ValueError(
                "TokenDense mixes the positions of (batch, positions, features); got an input of "
                f"shape {tuple(input_shape)}."
            )
        super().build(_swapped(input_shape))
        self.input_spec = keras.layers.InputSpec(ndim=3, axes={1: input_shape[1]})

    def call(self, x):
        return ops.swapaxes(super().call(ops.swapaxes(x, 1, 2)), 1, 2)

    def compute_output_shape(self, input_shape):
        return _swapped(super().compute_output_shape(_swapped(input_shape)))

    def bound(self, call: Call) -> Rule:
        return linear.dense(self, call)


def _swapped(shape):
    return (shape[0], shape[2], shape[1])
