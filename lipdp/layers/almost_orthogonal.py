"""Layers kept 1-Lipschitz by scaling their channels, without a norm to compute."""

from collections.abc import Sequence
from typing import Any

import keras

from lipdp.bounds import Call, Rule
from lipdp.bounds.builtin import linear
from lipdp.bounds.projections import AlmostOrthogonal
from lipdp.layers.projected import WithBias


class _AlmostOrthogonal(WithBias):
    """Before a Keras layer with one kernel and a bias."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kernel_constraint = AlmostOrthogonal(1.0)


@keras.saving.register_keras_serializable("lipdp")
class AlmostOrthogonalDense(_AlmostOrthogonal, keras.layers.Dense):
    """Dense layer whose kernel has spectral norm at most 1 by the rescaling of almost-orthogonal
    layers, as a projection after each update (`lipdp.bounds.projections.AlmostOrthogonal`).

    Costs one product of the kernel with itself, and scales single channels instead of the whole
    kernel. Bounds as for `SpectralDense`.

    Args:
        units, use_bias, bias_norm, activation, kernel_initializer, **kwargs: as for
            `SpectralDense`.

    Input shape: `(batch, ..., features)`. Output shape: `(batch, ..., units)`.

    >>> layer = AlmostOrthogonalDense(3)
    >>> layer(keras.ops.ones((2, 5))).shape == (2, 3)
    True
    """

    def __init__(
        self,
        units: int,
        *,
        kernel_initializer: str | keras.initializers.Initializer = "orthogonal",
        **kwargs: Any,
    ) -> None:
        super().__init__(units, kernel_initializer=kernel_initializer, **kwargs)

    def bound(self, call: Call) -> Rule:
        return linear.dense(self, call)


@keras.saving.register_keras_serializable("lipdp")
class AlmostOrthogonalConv2D(_AlmostOrthogonal, keras.layers.Conv2D):
    """2-D convolution whose operator norm is at most 1 by the rescaling of almost-orthogonal
    layers, as a projection after each update (`lipdp.bounds.projections.AlmostOrthogonal`).

    Costs one convolution of the kernel with itself, whatever the size of the map, and holds for
    maps of all sizes. Bounds as for `SpectralConv2D`.

    Args:
        filters, kernel_size, strides, padding, dilation_rate, groups: as in
            `keras.layers.Conv2D`.
        use_bias, bias_norm, activation, kernel_initializer, **kwargs: as for `SpectralConv2D`.

    Input shape: `(batch, height, width, channels)`, all but the batch known.
    Output shape: `(batch, new_height, new_width, filters)`.

    >>> layer = AlmostOrthogonalConv2D(4, 3, padding="same")
    >>> layer(keras.ops.ones((2, 8, 8, 3))).shape == (2, 8, 8, 4)
    True
    """

    def __init__(
        self,
        filters: int,
        kernel_size: int | Sequence[int],
        *args: Any,
        kernel_initializer: str | keras.initializers.Initializer = "orthogonal",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            filters, kernel_size, *args, kernel_initializer=kernel_initializer, **kwargs
        )

    def bound(self, call: Call) -> Rule:
        return linear.conv(self, call)
