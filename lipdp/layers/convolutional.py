"""Convolutions whose operator norm is certified."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from lipdp.bounds import Call, Rule
from lipdp.bounds.builtin import linear
from lipdp.bounds.projections import (
    ConvBall,
    ConvTransposeBall,
    DepthwiseConvBall,
    ResidualConvBall,
)
from lipdp.layers.projected import WithBias

Initializer = str | keras.initializers.Initializer


class _Convolution(WithBias):
    """Mixin of the convolutions: the certificate that they want."""

    def __init__(self, *args: Any, certificate: str = "auto", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.certificate = certificate

    def _ball(self, cls, input_shape, **geometry):
        return cls(
            1.0,
            input_shape=input_shape[1:-1],
            strides=self.strides,
            dilation_rate=self.dilation_rate,
            certificate=self.certificate,
            **geometry,
        )

    def get_config(self) -> dict:
        return {**super().get_config(), "certificate": self.certificate}

    def _config_without(self, *names):
        """The config of a layer whose geometry is not for the user to choose."""
        fixed = ("strides", "padding", "data_format", "dilation_rate", "groups", *names)
        return {k: v for k, v in _Convolution.get_config(self).items() if k not in fixed}


class _SpectralConv(_Convolution):
    """`SpectralConv1D` and `SpectralConv2D`, before the Keras layer."""

    def __init__(
        self,
        filters: int,
        kernel_size: int | Sequence[int],
        *args: Any,
        kernel_initializer: Initializer = "orthogonal",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            filters, kernel_size, *args, kernel_initializer=kernel_initializer, **kwargs
        )

    def build(self, input_shape):
        self.kernel_constraint = self._ball(
            ConvBall, input_shape, padding=self.padding, groups=self.groups
        )
        super().build(input_shape)


@keras.saving.register_keras_serializable("lipdp")
class SpectralConv1D(_SpectralConv, keras.layers.Conv1D):
    """1-D convolution, causal ones too, whose operator norm is at most 1, certified after each
    update.

    As `SpectralConv2D`: with `m` the number of outputs that read one input entry and `T` output
    positions, output at most `X + √T·bias_norm`, cotangent at most `G`, gradients at most
    `√m·X·G` (kernel) and `√T·G` (bias).

    Args:
        filters, kernel_size, strides, padding, dilation_rate, groups: as in
            `keras.layers.Conv1D`.
        use_bias, bias_norm, certificate, activation, kernel_initializer, **kwargs: as for
            `SpectralConv2D`.

    Input shape: `(batch, steps, channels)`, all but the batch known.
    Output shape: `(batch, new_steps, filters)`.

    >>> layer = SpectralConv1D(4, 3, padding="causal", use_bias=False)
    >>> layer(keras.ops.ones((2, 8, 1))).shape == (2, 8, 4)
    True
    """

    def bound(self, call: Call) -> Rule:
        return linear.conv(self, call)


@keras.saving.register_keras_serializable("lipdp")
class SpectralConv2D(_SpectralConv, keras.layers.Conv2D):
    """2-D convolution whose operator norm is at most 1, certified after each update.

    The kernel itself is projected, zero padding and stride included (see
    `lipdp.bounds.norms.conv_norm_bound`), so nothing multiplies it in the forward pass. With `m`
    the number of outputs that read one input entry (`m = 1` for 1×1 kernels and for strides that do
    not overlap) and `T` output positions: output at most `X + √T·bias_norm`, cotangent at most
    `G`, gradients at most `√m·X·G` (kernel) and `√T·G` (bias).

    Args:
        filters: output channels.
        kernel_size, *args: as in `keras.layers.Conv2D`: strides, padding and so on.
        use_bias: whether a bias is added. On a map its bound grows with the root of the number
            of positions, so it costs much noise.
        bias_norm: radius of the ball of the bias.
        certificate: `"reshaped"`, `"fft"` or `"auto"`, as in `lipdp.bounds.norms.conv_norm_bound`.
        activation: a Keras activation with a known constant.
        kernel_initializer: a Keras initializer; its result is projected.
        **kwargs: as for `keras.layers.Conv2D`, but constraints.

    Input shape: `(batch, height, width, channels)`, all but the batch known.
    Output shape: `(batch, new_height, new_width, filters)`.

    >>> layer = SpectralConv2D(4, 3, padding="same", use_bias=False)
    >>> layer(keras.ops.ones((2, 8, 8, 1))).shape == (2, 8, 8, 4)
    True
    """

    def bound(self, call: Call) -> Rule:
        return linear.conv(self, call)


@keras.saving.register_keras_serializable("lipdp")
class PatchEmbedding(_Convolution, keras.layers.Conv2D):
    """Maps the patches of an image, which do not overlap, to vectors with one 1-Lipschitz matrix.

    A convolution whose stride is its kernel: each entry of the image is read once, so `m = 1` and
    the operator's norm is exactly that of the kernel as a matrix. With `T` patches: output at most
    `X + √T·bias_norm`, cotangent at most `G`, gradients at most `X·G` (kernel) and `√T·G` (bias).

    Args:
        units: length of the vector of a patch.
        patch_size: an integer or `(height, width)`; must divide the image.
        sequence: whether the patches come as a sequence, row by row, or as a map.
        use_bias, bias_norm, activation, kernel_initializer: as for `SpectralConv2D`.
        **kwargs: `name`, `dtype`, `trainable`.

    Input shape: `(batch, height, width, channels)`, all but the batch known.
    Output shape: `(batch, patches, units)`, or `(batch, rows, columns, units)`.

    Raises:
        ValueError: the image is not made of whole patches.

    >>> PatchEmbedding(16, 4)(keras.ops.ones((2, 8, 12, 3))).shape == (2, 6, 16)
    True
    """

    def __init__(
        self,
        units: int,
        patch_size: int | Sequence[int],
        sequence: bool = True,
        *,
        kernel_initializer: Initializer = "orthogonal",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            units,
            patch_size,
            strides=patch_size,
            certificate="reshaped",
            kernel_initializer=kernel_initializer,
            **kwargs,
        )
        self.sequence = bool(sequence)

    def build(self, input_shape):
        sizes = zip(input_shape[1:-1], self.kernel_size, strict=True)
        if any(n is None or n % k for n, k in sizes):
            raise ValueError(
                f"PatchEmbedding needs an image that patches of {self.kernel_size} tile; got the "
                f"input shape {tuple(input_shape)}."
            )
        self.kernel_constraint = self._ball(ConvBall, input_shape)
        super().build(input_shape)

    def call(self, x):
        x = super().call(x)
        return ops.reshape(x, (-1, x.shape[1] * x.shape[2], x.shape[3])) if self.sequence else x

    def compute_output_shape(self, input_shape):
        batch, rows, columns, units = super().compute_output_shape(input_shape)
        return (batch, rows * columns, units) if self.sequence else (batch, rows, columns, units)

    def bound(self, call: Call) -> Rule:
        return linear.conv(self, call)

    def get_config(self) -> dict:
        config = {"units": self.filters, "patch_size": self.kernel_size, "sequence": self.sequence}
        return {**config, **self._config_without("filters", "kernel_size", "certificate")}


@keras.saving.register_keras_serializable("lipdp")
class ResidualConv2D(_Convolution, keras.layers.Conv2D):
    """`x + conv(x, K) + b` with operator norm at most 1, certified after each update.

    Linear: the identity is a convolution with one tap, so `K` plus that tap is projected on the
    ball of convolutions, and the projected variable is `K` itself. With `m` the number of outputs
    that read one input entry and `T` positions: output at most `X + √T·bias_norm`, cotangent at
    most `G`, gradients at most `√m·X·G` (kernel) and `√T·G` (bias).

    Args:
        filters: output channels, as many as the input has.
        kernel_size: odd.
        use_bias, bias_norm, activation: as for `SpectralConv2D`.
        certificate: as in `lipdp.bounds.norms.conv_norm_bound`. `"reshaped"` does not know that the
            identity has norm 1 and shrinks it; `"fft"` is exact for it.
        kernel_initializer: of `K`; its result is projected. Zeros make the layer the identity.
        **kwargs: `name`, `dtype`, `trainable`.

    Input and output shape: `(batch, height, width, filters)`, all but the batch known.

    Raises:
        ValueError: the kernel size is even, or the input has another number of channels.

    >>> x = keras.ops.ones((1, 4, 4, 2))
    >>> float(keras.ops.max(keras.ops.abs(ResidualConv2D(2, 3)(x) - x))) < 1e-4
    True
    """

    def __init__(
        self,
        filters: int,
        kernel_size: int | Sequence[int],
        *,
        certificate: str = "fft",
        kernel_initializer: Initializer = "zeros",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            filters,
            kernel_size,
            padding="same",
            certificate=certificate,
            kernel_initializer=kernel_initializer,
            **kwargs,
        )

    def build(self, input_shape):
        self.kernel_constraint = ResidualConvBall(
            1.0, input_shape=input_shape[1:-1], certificate=self.certificate
        )
        super().build(input_shape)

    def convolution_op(self, inputs, kernel):
        return inputs + super().convolution_op(inputs, kernel)

    def bound(self, call: Call) -> Rule:
        return linear.conv(self, call, ResidualConvBall)

    def get_config(self) -> dict:
        return self._config_without()


@keras.saving.register_keras_serializable("lipdp")
class SpectralDepthwiseConv2D(_Convolution, keras.layers.DepthwiseConv2D):
    """2-D depthwise convolution whose operator norm is at most 1, certified after each update.

    Each input channel meets its own `depth_multiplier` filters only; all of them together are
    projected, channel by channel (`lipdp.bounds.norms.depthwise_norm_bounds`). With `m` the number
    of output positions that read one input entry and `T` output positions: output at most
    `X + √T·bias_norm`, cotangent at most `G`, gradients at most `√m·X·G` (kernel) and `√T·G`
    (bias).

    Args:
        kernel_size, strides, padding, depth_multiplier, dilation_rate: as in
            `keras.layers.DepthwiseConv2D`.
        use_bias, bias_norm, certificate, activation: as for `SpectralConv2D`.
        depthwise_initializer: a Keras initializer; its result is projected. By default normal
            with standard deviation 1, so that each channel starts with the certified norm 1.
        **kwargs: as for `keras.layers.DepthwiseConv2D`, but constraints.

    Input shape: `(batch, height, width, channels)`, all but the batch known.
    Output shape: `(batch, new_height, new_width, channels * depth_multiplier)`.

    >>> layer = SpectralDepthwiseConv2D(3, padding="same", depth_multiplier=2)
    >>> layer(keras.ops.ones((2, 8, 8, 3))).shape == (2, 8, 8, 6)
    True
    """

    def __init__(
        self,
        kernel_size: int | Sequence[int],
        *args: Any,
        depthwise_initializer: Initializer | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            kernel_size, *args, depthwise_initializer=_normal(depthwise_initializer), **kwargs
        )

    def build(self, input_shape):
        self.depthwise_constraint = self._ball(DepthwiseConvBall, input_shape, padding=self.padding)
        super().build(input_shape)

    def bound(self, call: Call) -> Rule:
        return linear.depthwise_conv(self, call)


def _normal(initializer):
    return keras.initializers.RandomNormal(stddev=1.0) if initializer is None else initializer


@keras.saving.register_keras_serializable("lipdp")
class SpectralSeparableConv2D(_Convolution, keras.layers.SeparableConv2D):
    """2-D depthwise convolution and a 1×1 convolution behind it, each of operator norm at most 1,
    certified after each update.

    With `m` the number of output positions that read one input entry and `T` output positions:
    output at most `X + √T·bias_norm`, cotangent at most `G`, gradients at most `√m·X·G`
    (depthwise kernel), `X·G` (pointwise kernel) and `√T·G` (bias).

    Args:
        filters, kernel_size, strides, padding, dilation_rate, depth_multiplier: as in
            `keras.layers.SeparableConv2D`.
        use_bias, bias_norm, certificate, activation: as for `SpectralConv2D`.
        depthwise_initializer: as for `SpectralDepthwiseConv2D`.
        pointwise_initializer: a Keras initializer; its result is projected.
        **kwargs: as for `keras.layers.SeparableConv2D`, but constraints.

    Input shape: `(batch, height, width, channels)`, all but the batch known.
    Output shape: `(batch, new_height, new_width, filters)`.

    >>> layer = SpectralSeparableConv2D(5, 3, padding="same")
    >>> layer(keras.ops.ones((2, 8, 8, 3))).shape == (2, 8, 8, 5)
    True
    """

    def __init__(
        self,
        filters: int,
        kernel_size: int | Sequence[int],
        *args: Any,
        depthwise_initializer: Initializer | None = None,
        pointwise_initializer: Initializer = "orthogonal",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            filters,
            kernel_size,
            *args,
            depthwise_initializer=_normal(depthwise_initializer),
            pointwise_initializer=pointwise_initializer,
            **kwargs,
        )

    def build(self, input_shape):
        self.depthwise_constraint = self._ball(DepthwiseConvBall, input_shape, padding=self.padding)
        self.pointwise_constraint = ConvBall(1.0, **linear.pointwise_geometry(self))
        super().build(input_shape)

    def bound(self, call: Call) -> Rule:
        return linear.separable_conv(self, call)


@keras.saving.register_keras_serializable("lipdp")
class SpectralConv2DTranspose(_Convolution, keras.layers.Conv2DTranspose):
    """2-D transposed convolution whose operator norm is at most 1, certified after each update.

    With `m` the number of input positions that one output entry reads (`m = 1` where the stride
    is at least the kernel) and `T` output positions: output at most `X + √T·bias_norm`, cotangent
    at most `G`, gradients at most `√m·X·G` (kernel) and `√T·G` (bias); see
    `lipdp.bounds.norms.conv_transpose_norm_bound`.

    Args:
        filters, kernel_size, strides, padding, output_padding, dilation_rate: as in
            `keras.layers.Conv2DTranspose`.
        use_bias, bias_norm, certificate, activation, kernel_initializer: as for
            `SpectralConv2D`.
        **kwargs: as for `keras.layers.Conv2DTranspose`, but constraints.

    Input shape: `(batch, height, width, channels)`, all but the batch known.
    Output shape: `(batch, new_height, new_width, filters)`.

    >>> layer = SpectralConv2DTranspose(4, 2, strides=2)
    >>> layer(keras.ops.ones((2, 4, 4, 3))).shape == (2, 8, 8, 4)
    True
    """

    def __init__(
        self,
        filters: int,
        kernel_size: int | Sequence[int],
        *args: Any,
        kernel_initializer: Initializer = "orthogonal",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            filters, kernel_size, *args, kernel_initializer=kernel_initializer, **kwargs
        )

    def build(self, input_shape):
        self.kernel_constraint = self._ball(ConvTransposeBall, input_shape)
        super().build(input_shape)

    def bound(self, call: Call) -> Rule:
        return linear.conv_transpose(self, call)
