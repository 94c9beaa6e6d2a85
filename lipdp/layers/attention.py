"""Self-attention with bounds."""

import math
from typing import Any

import keras
from keras import ops

from accountants.validation import check_integer, check_number
from lipdp.bounds import Call, Rule
from lipdp.bounds.projections import SpectralBall
from lipdp.bounds.rule import matrix_norm, minimum, size
from lipdp.layers.normalization import BallProjection
from lipdp.layers.projected import Projected

# Instead of the scores of hidden positions; −∞ would make NaN where all are hidden.
_HIDDEN = -1e9
# Far from overflow, and from the score of hidden positions.
_LARGEST = 1e6


@keras.saving.register_keras_serializable("lipdp")
class LipschitzAttention(Projected):
    """Multi-head self-attention on rows in a ball, its four matrices in spectral balls.

    Dot-product attention is Lipschitz on bounded rows only, so each of the `N` positions is first
    projected onto the ball of `radius` `R`; `Y` is the result of all heads side by side,
    `Y_h = P_h·V_h` with `P_h = softmax(Q_h·K_hᵀ/τ)`. Let `X' = min(X, √N·R)`, and `q, k, v, o ≤ 1`
    the norms of the matrices:

    - `‖Y‖ ≤ √N·v·min(X, √min(heads, N)·R)`; output at most `o·‖Y‖`, gradient of `o` at most
      `‖Y‖·G`.
    - cotangent at most `(√N·v + (R/τ)·q·k·v·(R + X'/√2))·o·G`.
    - gradients at most `(R²/τ)·k·v·o·X'·G` (query), `(R²/τ)·q·v·o·X'·G` (key) and
      `√N·min(X, R)·o·G` (value).

    Proof idea: `P` is row-stochastic, so `s(P) ≤ √N`, and `P·V` has rows in the convex hull of
    the rows of `V`. With the cotangent `g_i` of row `i` let `u_j = V_j·g_i ≤ v·R·‖g_i‖` and `J` be
    the softmax' Jacobian at row `i`: what reaches `Q_i` is `Cov_p(u, K)/τ`, a product of standard
    deviations at most, and what reaches all `K_j` is `(J·u)_j·Q_i/τ`, where `‖J·u‖₁ ≤ max|u|`
    sums to zero and so has norm at most `max|u|/√2`. For the weights `Σ_j (J·u)_j·x_j` is
    again a covariance. Cauchy-Schwarz sums over rows and heads.

    The score terms are loose by the spread of the rows that they assume; the table of attained
    ratios is in the docs. A mask hides positions from being attended to: a choice of which
    columns `P` has, under which all of this holds.

    Args:
        num_heads: number of heads.
        key_dim: length of the queries, keys and values of a head.
        radius: radius `R` of the ball of each row.
        temperature: `τ`, the divisor of the scores. They are at most `R²/τ`; with a large one
            attention is close to uniform.
        kernel_initializer: a Keras initializer; its results are projected.

    Input and output shape: `(batch, positions, features)`, all but the batch known.

    Raises:
        ValueError: a value out of range, or an input of another rank.

    >>> LipschitzAttention(num_heads=2, key_dim=4)(ops.ones((2, 5, 3))).shape == (2, 5, 3)
    True
    """

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        radius: float = 1.0,
        temperature: float = 1.0,
        kernel_initializer: str | keras.initializers.Initializer = "orthogonal",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_heads = check_integer(num_heads, "num_heads")
        self.key_dim = check_integer(key_dim, "key_dim")
        self.temperature = check_number(temperature, "temperature")
        self.radius = check_number(radius, "radius")
        if self.radius**2 / self.temperature > _LARGEST:
            raise ValueError(
                f"Scores reach `radius`²/`temperature`, which must be {_LARGEST:g} at most; got "
                f"{radius}²/{temperature}."
            )
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self._ball = BallProjection(radius, per_position=True, dtype=self.dtype_policy)
        self.supports_masking = True

    def build(self, input_shape):
        if len(input_shape) != 3:
            raise ValueError(
                "LipschitzAttention takes (batch, positions, features); got an input of shape "
                f"{tuple(input_shape)}."
            )
        features, width = input_shape[-1], self.num_heads * self.key_dim
        given = self.kernel_initializer

        def kernel(name, *shape):
            return self.add_weight(
                shape=shape,
                # The same initializer gives equal matrices of equal shape.
                initializer=given.clone() if hasattr(given, "clone") else given,
                constraint=SpectralBall(1.0),
                name=name,
            )

        self.query_kernel = kernel("query_kernel", features, width)
        self.key_kernel = kernel("key_kernel", features, width)
        self.value_kernel = kernel("value_kernel", features, width)
        self.output_kernel = kernel("output_kernel", width, features)
        super().build(input_shape)

    def call(self, x, mask=None):
        x = self._ball(x)
        positions = x.shape[1]

        def heads(kernel):
            split = (-1, positions, self.num_heads, self.key_dim)
            return ops.swapaxes(ops.reshape(ops.matmul(x, kernel), split), 1, 2)

        query, key, value = map(heads, (self.query_kernel, self.key_kernel, self.value_kernel))
        scores = ops.matmul(query, ops.swapaxes(key, 2, 3)) / self.temperature
        if mask is not None:
            scores = ops.where(mask[:, None, None, :], scores, _HIDDEN)
        mixed = ops.swapaxes(ops.matmul(ops.softmax(scores, axis=-1), value), 1, 2)
        mixed = ops.reshape(mixed, (-1, positions, self.num_heads * self.key_dim))
        return ops.matmul(mixed, self.output_kernel)

    def compute_output_shape(self, input_shape):
        return input_shape

    def bound(self, call: Call) -> Rule:
        positions = size(call.input_shape[:1])
        root, r = math.sqrt(positions), self.radius
        kernels = (self.query_kernel, self.key_kernel, self.value_kernel, self.output_kernel)
        q, k, v, o = map(matrix_norm, kernels)
        heads = math.sqrt(min(self.num_heads, positions))

        def within(x):
            return minimum(x, root * r)

        def mixed(x):
            return root * v * minimum(x, heads * r)

        def cotangent(x, g):
            scores = (r / self.temperature) * q * k * v * (r + within(x) / math.sqrt(2))
            return (root * v + scores) * o * g

        def gradients(x, g):
            slope = r * r / self.temperature * v * o * g * within(x)
            bounds = (k * slope, q * slope, root * minimum(x, r) * o * g, mixed(x) * g)
            return zip(kernels, bounds, strict=True)

        return Rule(
            forward=lambda xs: o * mixed(xs[0]),
            backward=lambda xs, g: [cotangent(xs[0], g)],
            gradients=lambda xs, g: gradients(xs[0], g),
            note="worst case over what the scores may be",
            masks=True,
            any_input=True,
        )

    def get_config(self) -> dict:
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "key_dim": self.key_dim,
            "radius": self.radius,
            "temperature": self.temperature,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
        }
