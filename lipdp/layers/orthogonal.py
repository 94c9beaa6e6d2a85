"""Dense layers whose matrix is orthogonal by a map with bounded slopes.

The only reparametrisations here. The kernel is free inside a ball and a map makes an orthogonal
matrix of it, so the map's Jacobian is part of the kernel's gradient; the bound holds since that
Jacobian is bounded by a constant. The ball keeps the map where float32 computes it, and its
slopes, to a relative error of 1e-4 at most.
"""

import math
from typing import Any

import keras
from keras import ops

from lipdp.bounds import Call, Rule, norms
from lipdp.bounds.builtin import linear
from lipdp.bounds.projections import SpectralBall
from lipdp.bounds.rule import held_by, measured
from lipdp.layers.projected import WithBias

#: What rounding may add to the norm of the matrix and of the Jacobian.
_ROUNDING = 1.0 + 1e-4
# Of the exponential: halvings of `S`, and degree of the Taylor polynomial.
_SQUARINGS = 3
_DEGREE = 8


class _OrthogonalDense(WithBias, keras.layers.Dense):
    """Dense layer with the matrix `self._matrix(kernel)`, of orthonormal columns, for a kernel
    with at least as many rows as columns; otherwise the transposed.

    A subclass states `_RADIUS`, that of the kernel's ball. With `S = K − Kᵀ`, the kernel filled up
    with zero columns to a square, its map has a derivative that is an average of
    `dS ↦ c·L·dS·R`, with `L` and `R` of norm at most 1 and `c` at most `_SLOPE`.

    The kernel's gradient is then at most `√2·c·X·G`: the gradient of the matrix is the sum over
    the positions of `x_t·g_tᵀ`, that of `S` an average of sums of `c·u_t·v_tᵀ` with
    `‖u_t‖ ≤ ‖x_t‖` and `‖v_t‖ ≤ ‖g_t‖`, and that of `K` has the norm of
    `Σ c·(u_t·v_tᵀ − v_t·u_tᵀ)` at most. Each term is at most `√2·c·‖x_t‖·‖g_t‖`, and by
    Cauchy-Schwarz the sum of the products at most `X·G`.
    """

    _RADIUS: float
    _SLOPE: float

    def __init__(self, units: int, **kwargs: Any) -> None:
        super().__init__(units, **kwargs)
        self.kernel_constraint = SpectralBall(self._RADIUS)

    def call(self, x, training=None):
        matrix = self._matrix(self._tall(self.kernel))
        wide = self.kernel.shape[0] < self.kernel.shape[1]
        x = ops.matmul(x, ops.transpose(matrix) if wide else matrix)
        return self.activation(x if self.bias is None else x + self.bias)

    @staticmethod
    def _tall(kernel):
        wide = kernel.shape[0] < kernel.shape[1]
        return ops.transpose(kernel) if wide else ops.convert_to_tensor(kernel)

    def _bound(self, call):
        kernel = linear.weight_of(self, "kernel")
        ball = kernel.constraint
        inside = type(ball) is SpectralBall and ball.radius <= self._RADIUS
        if kernel.trainable and not inside:
            raise ValueError(
                f"its kernel has the constraint {ball!r} instead of SpectralBall({self._RADIUS}), "
                "in which float32 computes the slopes of its orthogonal matrix"
            )
        if held_by(kernel) is None:
            norm = measured(kernel, type(self), lambda: self._measured(kernel))
            slope, note = math.inf, ""
        else:
            norm, slope = _ROUNDING, math.sqrt(2.0) * self._SLOPE * _ROUNDING
            note = f"the matrix' slopes, at most {slope:.3f}, are in the bound of the kernel"
        return linear.affine(self, call, norm, [(kernel, slope)], note)

    def _measured(self, kernel):
        # Outside of the ball float32 may make another matrix of it, and slopes are unknown.
        inside = norms.spectral_norm_bound(kernel) <= self._RADIUS * _ROUNDING
        matrix = self._matrix(self._tall(kernel))
        return ops.where(inside, _ROUNDING, norms.spectral_norm_bound(matrix))


@keras.saving.register_keras_serializable("lipdp")
class CayleyDense(_OrthogonalDense):
    """Dense layer whose matrix is the Cayley transform of its kernel (Trockman & Kolter,
    "Orthogonalizing Convolutional Layers with the Cayley Transform", ICLR 2021).

    With `S = K − Kᵀ`, the kernel `K` filled up with zero columns to a square, the matrix is the
    first columns of `(I − S)(I + S)⁻¹ = 2(I + S)⁻¹ − I`. `S` is skew-symmetric, so `I + S` has no
    singular value below 1, and the matrix has orthonormal columns. Its derivative is
    `−2(I + S)⁻¹·dS·(I + S)⁻¹`. So for any shape: output at most `X + √T·bias_norm`, cotangent at
    most `G`, gradients at most `2·√2·X·G` (kernel) and `√T·G` (bias). (The map alone has the
    Lipschitz constant 4; that gradients come from inner products saves `√2`.)

    Args:
        units: size of the output's last axis.
        use_bias: whether a bias is added.
        bias_norm: radius of the ball of the bias.
        activation: a Keras activation with a known constant.
        kernel_initializer: of `K`, whose spectral norm is kept at 3 at most; zeros make the
            matrix that of the identity.
        **kwargs: as for `keras.layers.Dense`, but constraints.

    Input shape: `(batch, ..., features)`. Output shape: `(batch, ..., units)`.

    >>> y = CayleyDense(5)(keras.ops.array([[3.0, 0.0, 4.0]]))
    >>> round(float(keras.ops.norm(y)), 4)
    5.0
    """

    _RADIUS = 3.0
    _SLOPE = 2.0

    def _matrix(self, kernel):
        # The inverse of I + S by blocks: only its square part is inverted.
        columns = kernel.shape[1]
        square, rest = kernel[:columns], kernel[columns:]
        eye = ops.eye(columns, dtype=kernel.dtype)
        schur = eye + square - ops.transpose(square) + ops.matmul(ops.transpose(rest), rest)
        inverse = ops.inv(schur)
        return ops.concatenate([2.0 * inverse - eye, -2.0 * ops.matmul(rest, inverse)], axis=0)

    def bound(self, call: Call) -> Rule:
        return self._bound(call)


@keras.saving.register_keras_serializable("lipdp")
class ExponentialDense(_OrthogonalDense):
    """Dense layer whose matrix is the exponential of its kernel (Singla & Feizi, "Skew Orthogonal
    Convolutions", ICML 2021, for one tap; Lezcano-Casado & Martínez-Rubio, ICML 2019).

    With `S = K − Kᵀ`, the kernel `K` filled up with zero columns to a square, the matrix is the
    first columns of `exp(S)`, which is orthogonal. Its derivative is the integral of
    `exp(tS)·dS·exp((1 − t)S)` over `t` in [0, 1]. So for any shape: output at most
    `X + √T·bias_norm`, cotangent at most `G`, gradients at most `√2·X·G` (kernel) and `√T·G`
    (bias).

    Computed by scaling and squaring: `‖S‖ ≤ π`, and the Taylor polynomial of degree 8 of `S/8`
    leaves `1e-9`, its derivative `2e-8`. With angles up to π every rotation is reached.

    Args:
        units, use_bias, bias_norm, activation, **kwargs: as for `CayleyDense`.
        kernel_initializer: of `K`, whose spectral norm is kept at π/2 at most; zeros make the
            matrix that of the identity.

    Input shape: `(batch, ..., features)`. Output shape: `(batch, ..., units)`.

    >>> y = ExponentialDense(5)(keras.ops.array([[3.0, 0.0, 4.0]]))
    >>> round(float(keras.ops.norm(y)), 4)
    5.0
    """

    _RADIUS = math.pi / 2.0
    _SLOPE = 1.0

    def _matrix(self, kernel):
        rows, columns = kernel.shape
        kernel = ops.pad(kernel, [(0, 0), (0, rows - columns)])
        scaled = (kernel - ops.transpose(kernel)) / 2.0**_SQUARINGS
        eye = ops.eye(rows, dtype=kernel.dtype)
        power = eye
        for k in range(_DEGREE, 0, -1):  # Horner: I + s/1·(I + s/2·(I + ...))
            power = eye + ops.matmul(scaled, power) / k
        for _ in range(_SQUARINGS):
            power = ops.matmul(power, power)
        return power[:, :columns]

    def bound(self, call: Call) -> Rule:
        return self._bound(call)
