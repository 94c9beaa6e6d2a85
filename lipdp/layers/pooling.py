"""Pooling that keeps norms, where average pooling would shrink them."""

import math
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from lipdp.bounds import Call, Rule, lipschitz
from lipdp.bounds.builtin.pooling import pool_windows

# Below this square the slope of a norm is set to zero.
_TINY = 1e-12


def _pair(value, name):
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or any(not isinstance(v, int) or v < 1 for v in pair):
        raise ValueError(f"`{name}` must be one or two positive integers; got {value!r}.")
    return pair


def _norm(squares):
    """`max(√s, √tiny) − √tiny`: 1-Lipschitz in the vector, at most its norm, and with a finite
    slope at zero, where the root has none.
    """
    return ops.sqrt(ops.maximum(squares, _TINY)) - math.sqrt(_TINY)


def _windows_gain(layer):
    # A cell lies in at most `w` windows, each of which takes a functional of unit norm or a norm.
    return math.sqrt(pool_windows(layer.pool_size, layer.strides))


class _Pooling2D(keras.layers.Layer):
    """Windows of a map; zero padding counts as cells, so that a window's sum is a true sum."""

    def __init__(
        self,
        pool_size: int | Sequence[int] = (2, 2),
        strides: int | Sequence[int] | None = None,
        padding: str = "valid",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.pool_size = _pair(pool_size, "pool_size")
        self.strides = self.pool_size if strides is None else _pair(strides, "strides")
        if padding not in ("valid", "same"):
            raise ValueError(f"`padding` must be 'valid' or 'same'; got {padding!r}.")
        self.padding = padding

    def _window_mean(self, x):
        """Mean over each window, absent cells counted as zeros."""
        if self.padding == "same":
            pads = []
            for n, p, s in zip(x.shape[1:3], self.pool_size, self.strides, strict=True):
                total = max((-(-n // s) - 1) * s + p - n, 0)
                pads.append((total // 2, total - total // 2))
            x = ops.pad(x, ((0, 0), *pads, (0, 0)))
        return ops.average_pool(x, self.pool_size, self.strides, "valid", "channels_last")

    def compute_output_shape(self, input_shape):
        def outputs(n, p, s):
            if n is None:
                return None
            return -(-n // s) if self.padding == "same" else (n - p) // s + 1

        height, width = map(outputs, input_shape[1:3], self.pool_size, self.strides)
        return (input_shape[0], height, width, input_shape[3])

    def get_config(self) -> dict:
        return {
            **super().get_config(),
            "pool_size": self.pool_size,
            "strides": self.strides,
            "padding": self.padding,
        }


@keras.saving.register_keras_serializable("lipdp")
class ScaledAveragePooling2D(_Pooling2D):
    """Sum over each window divided by the root of its size (not by its size).

    The functional has unit norm; with `w = Π⌈pool/stride⌉` windows over a cell: output at most
    `√w·X`, cotangent at most `√w·G`; 1 where windows do not overlap.

    Args:
        pool_size, strides, padding: as in `keras.layers.AveragePooling2D`.

    Input shape: `(batch, height, width, channels)`. Output: the pooled map.

    >>> y = ScaledAveragePooling2D(2)(ops.ones((1, 4, 4, 1)))
    >>> y.shape == (1, 2, 2, 1), float(y[0, 0, 0, 0])
    (True, 2.0)
    """

    def call(self, x):
        return self._window_mean(x) * math.sqrt(math.prod(self.pool_size))

    def bound(self, call: Call) -> Rule:
        return lipschitz(_windows_gain(self))


@keras.saving.register_keras_serializable("lipdp")
class L2NormPooling2D(_Pooling2D):
    """Euclidean norm of each window, channel by channel: bounds as `ScaledAveragePooling2D`.

    Args:
        pool_size, strides, padding: as in `keras.layers.AveragePooling2D`.

    Input shape: `(batch, height, width, channels)`. Output: the pooled map.

    >>> y = L2NormPooling2D(2)(ops.ones((1, 4, 4, 1)))
    >>> y.shape == (1, 2, 2, 1), round(float(y[0, 0, 0, 0]), 4)
    (True, 2.0)
    """

    def call(self, x):
        return _norm(self._window_mean(ops.square(x)) * math.prod(self.pool_size))

    def bound(self, call: Call) -> Rule:
        return lipschitz(_windows_gain(self))


class _GlobalPooling2D(keras.layers.Layer):
    def compute_output_shape(self, input_shape):
        return (input_shape[0], input_shape[3])


@keras.saving.register_keras_serializable("lipdp")
class GlobalScaledAveragePooling2D(_GlobalPooling2D):
    """Sum over all positions divided by the root of their number: output at most `X`, cotangent
    at most `G`.

    Input shape: `(batch, height, width, channels)`. Output shape: `(batch, channels)`.

    >>> float(GlobalScaledAveragePooling2D()(ops.ones((1, 4, 4, 1)))[0, 0])
    4.0
    """

    def call(self, x):
        return ops.sum(x, axis=(1, 2)) / math.sqrt(x.shape[1] * x.shape[2])

    def bound(self, call: Call) -> Rule:
        return lipschitz()


@keras.saving.register_keras_serializable("lipdp")
class GlobalL2NormPooling2D(_GlobalPooling2D):
    """Euclidean norm over all positions, channel by channel: output at most `X`, cotangent at
    most `G`.

    Input shape: `(batch, height, width, channels)`. Output shape: `(batch, channels)`.

    >>> round(float(GlobalL2NormPooling2D()(ops.ones((1, 4, 4, 1)))[0, 0]), 4)
    4.0
    """

    def call(self, x):
        return _norm(ops.sum(ops.square(x), axis=(1, 2)))

    def bound(self, call: Call) -> Rule:
        return lipschitz()
