"""Down- and up-sampling that lose nothing."""

import math
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from lipdp.bounds import Call, Rule, lipschitz
from lipdp.layers.pooling import _sizes


class _Sampling2D(keras.layers.Layer):
    def __init__(self, block_size: int | Sequence[int] = 2, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.block_size = _sizes(block_size, 2, "block_size")

    def get_config(self) -> dict:
        return {**super().get_config(), "block_size": self.block_size}


@keras.saving.register_keras_serializable("lipdp")
class InvertibleDownSampling2D(_Sampling2D):
    """Space to depth: each block of cells becomes the channels of one cell.

    A permutation of the entries: output at most `X`, cotangent at most `G`.

    Args:
        block_size: height and width of a block, which must divide those of the map.

    Input shape: `(batch, height, width, channels)`, all but the batch known.
    Output shape: `(batch, height/a, width/b, a·b·channels)` for blocks of `a` times `b`.

    Raises:
        ValueError: blocks do not tile the map.

    >>> y = InvertibleDownSampling2D(2)(ops.reshape(ops.arange(4.0), (1, 2, 2, 1)))
    >>> [float(v) for v in y[0, 0, 0]]
    [0.0, 1.0, 2.0, 3.0]
    """

    def build(self, input_shape):
        known = len(input_shape) == 4 and None not in input_shape[1:]
        if not known or any(n % b for n, b in zip(input_shape[1:3], self.block_size, strict=True)):
            raise ValueError(
                f"InvertibleDownSampling2D(block_size={self.block_size}) needs maps (batch, "
                "height, width, channels) of known sizes which blocks tile; got shape "
                f"{tuple(input_shape)}."
            )

    def call(self, x):
        (height, width, channels), (a, b) = x.shape[1:], self.block_size
        x = ops.reshape(x, (-1, height // a, a, width // b, b, channels))
        x = ops.transpose(x, (0, 1, 3, 2, 4, 5))
        return ops.reshape(x, (-1, height // a, width // b, a * b * channels))

    def compute_output_shape(self, input_shape):
        batch, height, width, channels = input_shape
        a, b = self.block_size
        return (batch, height // a, width // b, a * b * channels)

    def bound(self, call: Call) -> Rule:
        return lipschitz()


@keras.saving.register_keras_serializable("lipdp")
class InvertibleUpSampling2D(_Sampling2D):
    """Depth to space, the inverse of `InvertibleDownSampling2D`: output at most `X`, cotangent at
    most `G`.

    Args:
        block_size: height and width of a block, whose product must divide the channels.

    Input shape: `(batch, height, width, channels)`, all but the batch known.
    Output shape: `(batch, a·height, b·width, channels/(a·b))` for blocks of `a` times `b`.

    Raises:
        ValueError: the channels do not make up blocks.

    >>> x = ops.reshape(ops.arange(32.0), (1, 4, 4, 2))
    >>> y = InvertibleUpSampling2D(2)(InvertibleDownSampling2D(2)(x))
    >>> bool(ops.all(x == y))
    True
    """

    def build(self, input_shape):
        known = len(input_shape) == 4 and None not in input_shape[1:]
        if not known or input_shape[-1] % math.prod(self.block_size):
            raise ValueError(
                f"InvertibleUpSampling2D(block_size={self.block_size}) needs maps (batch, height, "
                "width, channels) of known sizes with a number of channels that "
                f"{math.prod(self.block_size)} divides; got shape {tuple(input_shape)}."
            )

    def call(self, x):
        (height, width, channels), (a, b) = x.shape[1:], self.block_size
        x = ops.reshape(x, (-1, height, width, a, b, channels // (a * b)))
        x = ops.transpose(x, (0, 1, 3, 2, 4, 5))
        return ops.reshape(x, (-1, a * height, b * width, channels // (a * b)))

    def compute_output_shape(self, input_shape):
        batch, height, width, channels = input_shape
        a, b = self.block_size
        return (batch, a * height, b * width, channels // (a * b))

    def bound(self, call: Call) -> Rule:
        return lipschitz()
