"""1-Lipschitz blocks around a matrix or a convolution in its ball.

Each block is 1-Lipschitz for every weight in the ball of radius 1, so the weight is projected after
its update and used as it is. A weight that a block uses twice collects both gradients. Bounds hold
for every norm `s` of the weight, which is 1 where it is trained and measured where it is frozen.
"""

import math
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from accountants.validation import check_integer, check_number
from lipdp.bounds import Call, Rule, lipschitz, norms
from lipdp.bounds.projections import ConvBall, NormBall, SpectralBall
from lipdp.bounds.rule import conv_norm, matrix_norm, maximum, root_of_squares, vector_norm
from lipdp.layers.projected import Projected


class _Block(Projected, keras.layers.Layer):
    """A layer with `kernel` and `bias`, the bias added in front of a ReLU."""

    def __init__(
        self,
        use_bias: bool,
        bias_norm: float,
        kernel_initializer: str | keras.initializers.Initializer,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.use_bias = use_bias
        self.bias_norm = check_number(bias_norm, "bias_norm")
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self._bias_ball = NormBall(bias_norm)

    def _add(self, kernel_shape, ball):
        self.kernel = self.add_weight(
            name="kernel",
            shape=kernel_shape,
            initializer=self.kernel_initializer,
            constraint=ball,
        )
        self.bias = None
        if self.use_bias:
            self.bias = self.add_weight(
                name="bias",
                shape=kernel_shape[-1:],
                initializer="zeros",
                constraint=self._bias_ball,
            )

    def _activate(self, z):
        return ops.relu(z if self.bias is None else z + self.bias)

    def _bias_bound(self, call):
        """`√T` and `√T·‖b‖`, both zero without a bias."""
        if self.bias is None:
            return 0.0, 0.0
        spread = math.sqrt(call.positions)
        return spread, spread * vector_norm(self.bias)

    def get_config(self) -> dict:
        return {
            **super().get_config(),
            "use_bias": self.use_bias,
            "bias_norm": self.bias_norm,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
        }


@keras.saving.register_keras_serializable("lipdp")
class SandwichDense(_Block):
    """`√2·Aᵀ·relu(√2·B·x + b)` with `s = s([A B]) ≤ 1` (Wang & Manchester, "Direct
    Parameterization of Lipschitz-Bounded Deep Networks", ICML 2023).

    With `D` the diagonal of the ReLU's slopes, in [0, 1], the Jacobian is `2·AᵀDB`. From
    `AAᵀ + BBᵀ ≤ I` follows `(AᵀDB)(AᵀDB)ᵀ ≤ AᵀD(I − AAᵀ)DA ≤ P − P²` with `P = AᵀDA`, whose
    eigenvalues are in [0, 1], and `p − p² ≤ 1/4`: the Jacobian's norm is at most 1, and `s²` where
    both are multiplied by `s`. The kernel holds `A` and `B`. Over `T` positions:

    - output at most `s²·X + √2·s·√T·‖b‖`, cotangent at most `s²·G`
    - gradient of `A` at most `√2·(√2·s·X + √T·‖b‖)·G`, of `B` at most `2·s·X·G`; of the kernel, the
      root of the squares of both
    - gradient of the bias at most `√2·s·√T·G`

    Args:
        units: size of the output's last axis.
        hidden: rows of `A` and `B`; by default `units`.
        use_bias: whether a bias is added.
        bias_norm: radius of the ball of the bias.
        kernel_initializer: a Keras initializer; its result is projected.
        **kwargs: `name`, `dtype`, `trainable`.

    Input shape: `(batch, ..., features)`. Output shape: `(batch, ..., units)`.

    >>> SandwichDense(3)(keras.ops.ones((2, 5))).shape == (2, 3)
    True
    """

    def __init__(
        self,
        units: int,
        hidden: int | None = None,
        use_bias: bool = True,
        bias_norm: float = 1.0,
        kernel_initializer: str | keras.initializers.Initializer = "orthogonal",
        **kwargs: Any,
    ) -> None:
        super().__init__(use_bias, bias_norm, kernel_initializer, **kwargs)
        self.units = check_integer(units, "units")
        self.hidden = _optional(hidden, "hidden")

    def build(self, input_shape):
        rows = self.units + input_shape[-1]
        self._add((rows, self.hidden or self.units), SpectralBall(1.0))
        super().build(input_shape)

    def call(self, x):
        outer, inner = self.kernel[: self.units], self.kernel[self.units :]
        hidden = self._activate(math.sqrt(2.0) * ops.matmul(x, inner))
        return math.sqrt(2.0) * ops.matmul(hidden, ops.transpose(outer))

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.units)

    def bound(self, call: Call) -> Rule:
        s = matrix_norm(self.kernel)
        spread, offset = self._bias_bound(call)
        root = math.sqrt(2.0)

        def gradients(x, g):
            outer, inner = root * (root * s * x + offset) * g, 2.0 * s * x * g
            pairs = [(self.kernel, root_of_squares([outer, inner]))]
            return pairs if self.bias is None else [*pairs, (self.bias, root * s * spread * g)]

        return lipschitz(s * s, offset=root * s * offset, gradients=gradients)

    def get_config(self) -> dict:
        return {**super().get_config(), "units": self.units, "hidden": self.hidden}


@keras.saving.register_keras_serializable("lipdp")
class ConvexPotential(_Block):
    """`x − 2·W·relu(Wᵀx + b)` with `s = s(W) ≤ 1` (Meunier et al., "A Dynamical System
    Perspective for Lipschitz Neural Networks", ICML 2022).

    With `D` the diagonal of the ReLU's slopes, in [0, 1], the Jacobian is `I − 2·WDWᵀ`, symmetric
    with eigenvalues in [1 − 2·s², 1], of norm at most `l = max(1, 2·s² − 1)`. Over `T` positions:

    - output at most `l·X + 2·s·√T·‖b‖`, cotangent at most `l·G`
    - gradient of the kernel, used twice, at most `2·(s·X + √T·‖b‖)·G + 2·s·X·G`
    - gradient of the bias at most `2·s·√T·G`

    Args:
        hidden: columns of `W`; by default as many as the input has features.
        use_bias: whether a bias is added.
        bias_norm: radius of the ball of the bias.
        kernel_initializer: a Keras initializer; its result is projected.
        **kwargs: `name`, `dtype`, `trainable`.

    Input and output shape: `(batch, ..., features)`.

    >>> ConvexPotential(8)(keras.ops.ones((2, 5))).shape == (2, 5)
    True
    """

    def __init__(
        self,
        hidden: int | None = None,
        use_bias: bool = True,
        bias_norm: float = 1.0,
        kernel_initializer: str | keras.initializers.Initializer = "orthogonal",
        **kwargs: Any,
    ) -> None:
        super().__init__(use_bias, bias_norm, kernel_initializer, **kwargs)
        self.hidden = _optional(hidden, "hidden")

    def build(self, input_shape):
        self._add((input_shape[-1], self.hidden or input_shape[-1]), SpectralBall(1.0))
        super().build(input_shape)

    def call(self, x):
        hidden = self._activate(ops.matmul(x, self.kernel))
        return x - 2.0 * ops.matmul(hidden, ops.transpose(self.kernel))

    def compute_output_shape(self, input_shape):
        return input_shape

    def bound(self, call: Call) -> Rule:
        return _potential(self, call, matrix_norm(self.kernel), 1)

    def get_config(self) -> dict:
        return {**super().get_config(), "hidden": self.hidden}


def _reflection(s):
    """Norm of `I − 2·WDWᵀ` for `D` in [0, 1] and `‖W‖ ≤ s`."""
    return maximum(1.0, 2.0 * s * s - 1.0)


def _potential(layer, call, s, multiplicity):
    """Rule of `x − 2·Wᵀrelu(W·x + b)` for a matrix or convolution `W` of norm `s`."""
    spread, offset = layer._bias_bound(call)
    reach = math.sqrt(multiplicity)

    def gradients(x, g):
        pairs = [(layer.kernel, 2.0 * reach * (2.0 * s * x + offset) * g)]
        return pairs if layer.bias is None else [*pairs, (layer.bias, 2.0 * s * spread * g)]

    return lipschitz(
        _reflection(s),
        offset=2.0 * s * offset,
        gradients=gradients,
        note="the kernel acts twice",
    )


@keras.saving.register_keras_serializable("lipdp")
class ConvexPotentialConv2D(_Block):
    """`ConvexPotential` with a convolution (stride 1, padding `"same"`) in the place of `Wᵀ` and
    its adjoint in the place of `W`.

    With `m` the number of outputs that read one input entry, the inner product of a cotangent
    with a convolution has a gradient of norm at most `√m` times both norms, for both uses: the
    kernel's gradient is at most `2·√m·(2·s·X + √T·‖b‖)·G`. All else as for `ConvexPotential`.

    Args:
        kernel_size: an integer or a pair.
        hidden: channels of the convolution; by default as many as the input has.
        certificate: as in `lipdp.bounds.norms.conv_norm_bound`.
        use_bias, bias_norm, kernel_initializer, **kwargs: as for `ConvexPotential`.

    Input and output shape: `(batch, height, width, channels)`, all but the batch known.

    >>> ConvexPotentialConv2D(3)(keras.ops.ones((2, 4, 4, 5))).shape == (2, 4, 4, 5)
    True
    """

    def __init__(
        self,
        kernel_size: int | Sequence[int],
        hidden: int | None = None,
        use_bias: bool = True,
        bias_norm: float = 1.0,
        certificate: str = "auto",
        kernel_initializer: str | keras.initializers.Initializer = "orthogonal",
        **kwargs: Any,
    ) -> None:
        super().__init__(use_bias, bias_norm, kernel_initializer, **kwargs)
        self.hidden = _optional(hidden, "hidden")
        sizes = (kernel_size,) * 2 if isinstance(kernel_size, int) else tuple(kernel_size)
        if len(sizes) != 2:
            raise ValueError(f"`kernel_size` must be an integer or two; got {kernel_size!r}.")
        self.kernel_size = tuple(check_integer(k, "kernel_size") for k in sizes)
        self.certificate = certificate

    def build(self, input_shape):
        channels = input_shape[-1]
        ball = ConvBall(
            1.0, input_shape=input_shape[1:-1], padding="same", certificate=self.certificate
        )
        self._geometry = ball.geometry
        self._add((*self.kernel_size, channels, self.hidden or channels), ball)
        super().build(input_shape)

    def call(self, x):
        hidden = self._activate(ops.conv(x, self.kernel, padding="same"))
        # Its kernel is (taps, channels out, channels in): that of the convolution as it is.
        return x - 2.0 * ops.conv_transpose(hidden, self.kernel, 1, padding="same")

    def compute_output_shape(self, input_shape):
        return input_shape

    def bound(self, call: Call) -> Rule:
        geometry = {**self._geometry, "input_shape": call.input_shape[:-1]}
        multiplicity = norms.conv_multiplicity(
            tuple(self.kernel.shape), call.input_shape[:-1], padding="same"
        )
        return _potential(self, call, conv_norm(self.kernel, **geometry), multiplicity)

    def get_config(self) -> dict:
        return {
            **super().get_config(),
            "kernel_size": self.kernel_size,
            "hidden": self.hidden,
            "certificate": self.certificate,
        }


@keras.saving.register_keras_serializable("lipdp")
class BlockReflector(_Block):
    """`x − 2·V·Vᵀ·x` with `s = s(V) ≤ 1`; a reflection where the columns of `V` are orthonormal.

    A symmetric matrix with eigenvalues in [1 − 2·s², 1], of norm at most `l = max(1, 2·s² − 1)`:
    output at most `l·X`, cotangent at most `l·G`. `V` is used twice, each time with a gradient of
    at most `2·s·X·G`: at most `4·s·X·G`.

    Args:
        rank: columns of `V`; by default half of the features, rounded up.
        kernel_initializer: a Keras initializer; its result is projected.
        **kwargs: `name`, `dtype`, `trainable`.

    Input and output shape: `(batch, ..., features)`.

    >>> BlockReflector(2)(keras.ops.ones((2, 5))).shape == (2, 5)
    True
    """

    def __init__(
        self,
        rank: int | None = None,
        kernel_initializer: str | keras.initializers.Initializer = "orthogonal",
        **kwargs: Any,
    ) -> None:
        super().__init__(False, 1.0, kernel_initializer, **kwargs)
        self.rank = _optional(rank, "rank")

    def build(self, input_shape):
        features = input_shape[-1]
        self._add((features, self.rank or (features + 1) // 2), SpectralBall(1.0))
        super().build(input_shape)

    def call(self, x):
        return x - 2.0 * ops.matmul(ops.matmul(x, self.kernel), ops.transpose(self.kernel))

    def compute_output_shape(self, input_shape):
        return input_shape

    def bound(self, call: Call) -> Rule:
        s = matrix_norm(self.kernel)
        note = "the kernel acts twice"
        return lipschitz(
            _reflection(s), gradients=lambda x, g: [(self.kernel, 4.0 * s * x * g)], note=note
        )

    def get_config(self) -> dict:
        config = super().get_config()
        del config["use_bias"], config["bias_norm"]
        return {**config, "rank": self.rank}


def _optional(value, name):
    return None if value is None else check_integer(value, name)
