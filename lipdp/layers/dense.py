"""Dense layers whose kernel stays in a ball."""

from typing import Any

import keras

from lipdp.bounds import Call, Rule
from lipdp.bounds.builtin import linear
from lipdp.bounds.projections import NormBall, SpectralBall
from lipdp.layers.projected import WithBias


@keras.saving.register_keras_serializable("lipdp")
class SpectralDense(WithBias, keras.layers.Dense):
    """Dense layer whose kernel has spectral norm at most 1, certified after each update.

    With `s(W) ≤ 1` and `‖b‖ ≤ bias_norm`, over `T` positions: output at most `X + √T·bias_norm`,
    cotangent at most `G`, gradients at most `X·G` (kernel) and `√T·G` (bias).

    Args:
        units: size of the output's last axis.
        use_bias: whether a bias is added.
        bias_norm: radius of the ball of the bias.
        orthogonal: after each update also pull the singular values towards 1.
        activation: a Keras activation with a known constant.
        kernel_initializer: a Keras initializer; its result is projected.
        **kwargs: as for `keras.layers.Dense`, but constraints.

    Input shape: `(batch, ..., features)`. Output shape: `(batch, ..., units)`.

    >>> layer = SpectralDense(3)
    >>> layer(keras.ops.ones((2, 5))).shape == (2, 3)
    True
    """

    def __init__(
        self,
        units: int,
        *,
        orthogonal: bool = False,
        kernel_initializer: str | keras.initializers.Initializer = "orthogonal",
        **kwargs: Any,
    ) -> None:
        super().__init__(units, kernel_initializer=kernel_initializer, **kwargs)
        self.orthogonal = bool(orthogonal)
        self.kernel_constraint = SpectralBall(1.0, orthogonal=self.orthogonal)

    def bound(self, call: Call) -> Rule:
        return linear.dense(self, call)

    def get_config(self) -> dict:
        return {**super().get_config(), "orthogonal": self.orthogonal}


@keras.saving.register_keras_serializable("lipdp")
class FrobeniusDense(WithBias, keras.layers.Dense):
    """Dense layer whose whole kernel has Frobenius norm at most `radius`.

    Its projection costs one pass over the kernel, and for one output it is the spectral ball.
    Bounds as for `SpectralDense` with `s(W) ≤ ‖W‖_F ≤ radius`.

    Args:
        units: size of the output's last axis.
        use_bias: whether a bias is added.
        bias_norm: radius of the ball of the bias.
        radius: radius of the ball of the kernel.
        activation: a Keras activation with a known constant.
        kernel_initializer: a Keras initializer; its result is projected.
        **kwargs: as for `keras.layers.Dense`, but constraints.

    Input shape: `(batch, ..., features)`. Output shape: `(batch, ..., units)`.

    >>> layer = FrobeniusDense(3, use_bias=False)
    >>> layer(keras.ops.ones((2, 5))).shape == (2, 3)
    True
    """

    def __init__(self, units: int, *, radius: float = 1.0, **kwargs: Any) -> None:
        super().__init__(units, **kwargs)
        self.radius = radius
        self.kernel_constraint = NormBall(radius)

    def bound(self, call: Call) -> Rule:
        return linear.dense(self, call)

    def get_config(self) -> dict:
        return {**super().get_config(), "radius": self.radius}
