"""Pooling that keeps norms, where average pooling would shrink them."""

import math
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from accountants.validation import check_choice, check_integer
from lipdp.bounds import lipschitz
from lipdp.bounds.builtin.pooling import pool_windows

# Below this square the slope of a norm is set to zero.
_TINY = 1e-12


def _sizes(value, rank, name):
    sizes = (value,) * rank if isinstance(value, int) else tuple(value)
    if len(sizes) != rank:
        wanted = "an integer" if rank == 1 else f"an integer or {rank} of them"
        raise ValueError(f"`{name}` must be {wanted}; got {value!r}.")
    return tuple(check_integer(size, name) for size in sizes)


def _norm(squares):
    """`max(√s, √tiny) − √tiny`: 1-Lipschitz in the vector, at most its norm, and with a finite
    slope at zero, where the root has none.
    """
    return ops.sqrt(ops.maximum(squares, _TINY)) - math.sqrt(_TINY)


def _windows_rule(layer, call):
    # A cell lies in at most `w` windows, each of which takes a functional of unit norm or a norm.
    return lipschitz(math.sqrt(pool_windows(layer.pool_size, layer.strides)))


class _Pooling(keras.layers.Layer):
    """Windows of a map; zero padding counts as cells, so that a window's sum is a true sum."""

    rank: int

    def __init__(
        self,
        pool_size: int | Sequence[int] = 2,
        strides: int | Sequence[int] | None = None,
        padding: str = "valid",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.pool_size = _sizes(pool_size, self.rank, "pool_size")
        self.strides = self.pool_size if strides is None else _sizes(strides, self.rank, "strides")
        self.padding = check_choice(padding, "padding", ("valid", "same"))

    def _padded(self, x):
        if self.padding == "same":
            pads = []
            for n, p, s in zip(x.shape[1:-1], self.pool_size, self.strides, strict=True):
                total = max((-(-n // s) - 1) * s + p - n, 0)
                pads.append((total // 2, total - total // 2))
            x = ops.pad(x, ((0, 0), *pads, (0, 0)))
        return x

    def _window_mean(self, x):
        """Mean over each window, absent cells counted as zeros."""
        x = self._padded(x)
        return ops.average_pool(x, self.pool_size, self.strides, "valid", "channels_last")

    def compute_output_shape(self, input_shape):
        def outputs(n, p, s):
            if n is None:
                return None
            return -(-n // s) if self.padding == "same" else (n - p) // s + 1

        sizes = map(outputs, input_shape[1:-1], self.pool_size, self.strides)
        return (input_shape[0], *sizes, input_shape[-1])

    def get_config(self) -> dict:
        return {
            **super().get_config(),
            "pool_size": self.pool_size,
            "strides": self.strides,
            "padding": self.padding,
        }


class _ScaledAveragePooling(_Pooling):
    def call(self, x):
        return self._window_mean(x) * math.sqrt(math.prod(self.pool_size))


class _L2NormPooling(_Pooling):
    def call(self, x):
        return _norm(self._window_mean(ops.square(x)) * math.prod(self.pool_size))


@keras.saving.register_keras_serializable("lipdp")
class ScaledAveragePooling1D(_ScaledAveragePooling):
    """`ScaledAveragePooling2D` of sequences.

    Args:
        pool_size, strides, padding: as in `keras.layers.AveragePooling1D`.

    Input shape: `(batch, steps, channels)`. Output: the pooled sequence.

    >>> y = ScaledAveragePooling1D(4)(ops.ones((1, 8, 1)))
    >>> y.shape == (1, 2, 1), float(y[0, 0, 0])
    (True, 2.0)
    """

    rank = 1
    bound = _windows_rule


@keras.saving.register_keras_serializable("lipdp")
class ScaledAveragePooling2D(_ScaledAveragePooling):
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

    rank = 2
    bound = _windows_rule


@keras.saving.register_keras_serializable("lipdp")
class L2NormPooling1D(_L2NormPooling):
    """`L2NormPooling2D` of sequences.

    Args:
        pool_size, strides, padding: as in `keras.layers.AveragePooling1D`.

    Input shape: `(batch, steps, channels)`. Output: the pooled sequence.

    >>> y = L2NormPooling1D(4)(ops.ones((1, 8, 1)))
    >>> y.shape == (1, 2, 1), round(float(y[0, 0, 0]), 4)
    (True, 2.0)
    """

    rank = 1
    bound = _windows_rule


@keras.saving.register_keras_serializable("lipdp")
class L2NormPooling2D(_L2NormPooling):
    """Euclidean norm of each window, channel by channel: bounds as `ScaledAveragePooling2D`.

    Args:
        pool_size, strides, padding: as in `keras.layers.AveragePooling2D`.

    Input shape: `(batch, height, width, channels)`. Output: the pooled map.

    >>> y = L2NormPooling2D(2)(ops.ones((1, 4, 4, 1)))
    >>> y.shape == (1, 2, 2, 1), round(float(y[0, 0, 0, 0]), 4)
    (True, 2.0)
    """

    rank = 2
    bound = _windows_rule


def _global_rule(layer, call):
    return lipschitz()


class _GlobalPooling(keras.layers.Layer):
    rank: int

    def build(self, input_shape):
        if len(input_shape) != self.rank + 2:
            raise ValueError(
                f"{type(self).__name__} needs an input of rank {self.rank + 2}, with batch and "
                f"channels; got shape {tuple(input_shape)}."
            )
        self._axes = tuple(range(1, self.rank + 1))

    def compute_output_shape(self, input_shape):
        return (input_shape[0], input_shape[-1])


class _GlobalScaledAveragePooling(_GlobalPooling):
    def call(self, x):
        return ops.sum(x, axis=self._axes) / math.sqrt(math.prod(x.shape[1:-1]))


class _GlobalL2NormPooling(_GlobalPooling):
    def call(self, x):
        return _norm(ops.sum(ops.square(x), axis=self._axes))


@keras.saving.register_keras_serializable("lipdp")
class GlobalScaledAveragePooling1D(_GlobalScaledAveragePooling):
    """`GlobalScaledAveragePooling2D` of sequences.

    Input shape: `(batch, steps, channels)`. Output shape: `(batch, channels)`.

    >>> float(GlobalScaledAveragePooling1D()(ops.ones((1, 16, 1)))[0, 0])
    4.0
    """

    rank = 1
    bound = _global_rule


@keras.saving.register_keras_serializable("lipdp")
class GlobalScaledAveragePooling2D(_GlobalScaledAveragePooling):
    """Sum over all positions divided by the root of their number: output at most `X`, cotangent
    at most `G`.

    Input shape: `(batch, height, width, channels)`. Output shape: `(batch, channels)`.

    >>> float(GlobalScaledAveragePooling2D()(ops.ones((1, 4, 4, 1)))[0, 0])
    4.0
    """

    rank = 2
    bound = _global_rule


@keras.saving.register_keras_serializable("lipdp")
class GlobalL2NormPooling1D(_GlobalL2NormPooling):
    """`GlobalL2NormPooling2D` of sequences.

    Input shape: `(batch, steps, channels)`. Output shape: `(batch, channels)`.

    >>> round(float(GlobalL2NormPooling1D()(ops.ones((1, 16, 1)))[0, 0]), 4)
    4.0
    """

    rank = 1
    bound = _global_rule


@keras.saving.register_keras_serializable("lipdp")
class GlobalL2NormPooling2D(_GlobalL2NormPooling):
    """Euclidean norm over all positions, channel by channel: output at most `X`, cotangent at
    most `G`.

    Input shape: `(batch, height, width, channels)`. Output shape: `(batch, channels)`.

    >>> round(float(GlobalL2NormPooling2D()(ops.ones((1, 4, 4, 1)))[0, 0]), 4)
    4.0
    """

    rank = 2
    bound = _global_rule
