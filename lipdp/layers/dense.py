"""Dense layers whose kernel stays in a ball."""

from collections.abc import Callable
from typing import Any

import keras

from lipdp.bounds import Call, Rule, builtin
from lipdp.projections import NormBall, SpectralBall


class _BallDense(keras.layers.Dense):
    """A Keras Dense layer with its weights in balls; subclasses say which."""

    def _constrain(self, kernel_constraint, bias_norm):
        self.kernel_constraint = kernel_constraint
        self.bias_norm = bias_norm
        self.bias_constraint = NormBall(bias_norm) if self.use_bias else None

    def build(self, input_shape):
        super().build(input_shape)
        for variable in self.weights:  # initializers know nothing of the sets
            variable.assign(variable.constraint(variable))

    def get_config(self) -> dict:
        config = keras.layers.Layer.get_config(self)
        return {
            **config,
            "units": self.units,
            "use_bias": self.use_bias,
            "bias_norm": self.bias_norm,
            "activation": keras.activations.serialize(self.activation),
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "bias_initializer": keras.initializers.serialize(self.bias_initializer),
        }


@keras.saving.register_keras_serializable("lipdp")
class SpectralDense(_BallDense):
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

    Input shape: `(batch, ..., features)`. Output shape: `(batch, ..., units)`.

    >>> layer = SpectralDense(3)
    >>> layer(keras.ops.ones((2, 5))).shape == (2, 3)
    True
    """

    def __init__(
        self,
        units: int,
        use_bias: bool = True,
        bias_norm: float = 1.0,
        orthogonal: bool = False,
        activation: str | Callable | None = None,
        kernel_initializer: str | keras.initializers.Initializer = "orthogonal",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            units,
            activation=activation,
            use_bias=use_bias,
            kernel_initializer=kernel_initializer,
            **kwargs,
        )
        self.orthogonal = bool(orthogonal)
        self._constrain(SpectralBall(1.0, orthogonal=self.orthogonal), bias_norm)

    def bound(self, call: Call) -> Rule:
        return builtin.dense(self, call)

    def get_config(self) -> dict:
        return {**super().get_config(), "orthogonal": self.orthogonal}


@keras.saving.register_keras_serializable("lipdp")
class FrobeniusDense(_BallDense):
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

    Input shape: `(batch, ..., features)`. Output shape: `(batch, ..., units)`.

    >>> layer = FrobeniusDense(3, use_bias=False)
    >>> layer(keras.ops.ones((2, 5))).shape == (2, 3)
    True
    """

    def __init__(
        self,
        units: int,
        use_bias: bool = True,
        bias_norm: float = 1.0,
        radius: float = 1.0,
        activation: str | Callable | None = None,
        kernel_initializer: str | keras.initializers.Initializer = "glorot_uniform",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            units,
            activation=activation,
            use_bias=use_bias,
            kernel_initializer=kernel_initializer,
            **kwargs,
        )
        self.radius = radius
        self._constrain(NormBall(radius), bias_norm)

    def bound(self, call: Call) -> Rule:
        return builtin.dense(self, call)

    def get_config(self) -> dict:
        return {**super().get_config(), "radius": self.radius}
