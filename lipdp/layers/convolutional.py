"""Convolutions whose operator norm is certified."""

from collections.abc import Callable, Sequence
from typing import Any

import keras

from lipdp.bounds import Call, Rule
from lipdp.bounds.builtin import linear
from lipdp.layers.projected import Projected
from lipdp.projections import ConvBall, NormBall


@keras.saving.register_keras_serializable("lipdp")
class SpectralConv2D(Projected, keras.layers.Conv2D):
    """2-D convolution whose operator norm is at most 1, certified after each update.

    The kernel itself is projected, zero padding and stride included (see
    `lipdp.norms.conv_norm_bound`), so nothing multiplies it in the forward pass. With `m` the
    number of outputs that read one input entry (`m = 1` for 1×1 kernels and for strides that do
    not overlap) and `T` output positions: output at most `X + √T·bias_norm`, cotangent at most
    `G`, gradients at most `√m·X·G` (kernel) and `√T·G` (bias).

    Args:
        filters: output channels.
        kernel_size, strides, padding, dilation_rate, groups: as in `keras.layers.Conv2D`.
        use_bias: whether a bias is added. On a map its bound grows with the root of the number
            of positions, so it costs much noise.
        bias_norm: radius of the ball of the bias.
        certificate: `"reshaped"`, `"fft"` or `"auto"`, as in `lipdp.norms.conv_norm_bound`.
        activation: a Keras activation with a known constant.
        kernel_initializer: a Keras initializer; its result is projected.
        **kwargs: as for `keras.layers.Conv2D`, but constraints.

    Input shape: `(batch, height, width, channels)`, all but the batch known.
    Output shape: `(batch, new_height, new_width, filters)`.

    >>> layer = SpectralConv2D(4, 3, padding="same", use_bias=False)
    >>> layer(keras.ops.ones((2, 8, 8, 1))).shape == (2, 8, 8, 4)
    True
    """

    def __init__(
        self,
        filters: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] = (1, 1),
        padding: str = "valid",
        dilation_rate: int | Sequence[int] = (1, 1),
        groups: int = 1,
        use_bias: bool = True,
        bias_norm: float = 1.0,
        certificate: str = "auto",
        activation: str | Callable | None = None,
        kernel_initializer: str | keras.initializers.Initializer = "orthogonal",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            filters,
            kernel_size,
            strides=strides,
            padding=padding,
            dilation_rate=dilation_rate,
            groups=groups,
            activation=activation,
            use_bias=use_bias,
            kernel_initializer=kernel_initializer,
            **kwargs,
        )
        self.bias_norm = bias_norm
        self.bias_constraint = NormBall(bias_norm) if use_bias else None
        self.certificate = certificate

    def build(self, input_shape):
        self.kernel_constraint = ConvBall(
            1.0,
            input_shape=input_shape[1:-1],
            strides=self.strides,
            padding=self.padding,
            dilation_rate=self.dilation_rate,
            groups=self.groups,
            certificate=self.certificate,
        )
        super().build(input_shape)

    def bound(self, call: Call) -> Rule:
        return linear.conv(self, call)

    def get_config(self) -> dict:
        return {
            **super().get_config(),
            "bias_norm": self.bias_norm,
            "certificate": self.certificate,
        }
