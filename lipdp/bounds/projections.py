"""Keras constraints that put weights back into the set in which their bounds hold.

Projection happens on the variable itself, after the noisy update: it is post-processing, free
of privacy cost, and the forward pass uses the variable as it is, so that no Jacobian of the
projection enters a sensitivity. A private step projects by itself, after the optimizer, which may
apply constraints or not. Each class states the norm it certifies, which the rules in
`lipdp.bounds` read.
"""

import contextlib
import contextvars
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from accountants.validation import check_integer, check_number
from lipdp.autodiff import fused
from lipdp.bounds import norms

__all__ = [
    "AlmostOrthogonal",
    "ConvBall",
    "ConvTransposeBall",
    "DepthwiseConvBall",
    "EntryBall",
    "NormBall",
    "Projection",
    "ResidualConvBall",
    "RowBall",
    "SpectralBall",
    "certified_by",
    "project",
    "projected_later",
]

# Sides from which on a block of probes is cheaper than products of whole matrices.
_LARGE = 256
# Channels from which on a compiled certificate of a convolution is worth its compilation.
_CHANNELS = 32

# (certificate of large matrices, compiler of the others')
_DETERMINISTIC = (None, lambda function: function)
_certificates = contextvars.ContextVar("certificates", default=_DETERMINISTIC)
# Programs that project, by the class and the attributes of the projection.
_programs: dict[tuple[type, str], Callable[[Any], Any]] = {}


@contextlib.contextmanager
def certified_by(
    bound: Callable[[Any, float], Any], compiled: Callable[[Callable], Callable]
) -> Iterator[None]:
    """Lets `bound(matrix, radius)` certify large matrices while the scope lasts, and compiles
    what certifies kernels of many channels.

    The private step opens it with `norms.probable_norm_bound` and fresh probes. Outside of it
    every certificate is deterministic.
    """
    token = _certificates.set((bound, compiled))
    try:
        yield
    finally:
        _certificates.reset(token)


_later = contextvars.ContextVar("later", default=False)


@contextlib.contextmanager
def projected_later() -> Iterator[None]:
    """While the scope lasts, a projection that is called as a constraint leaves a weight as it is.

    The private step opens it around the optimizer's update and projects after it, so that nothing
    depends on what an optimizer does with constraints, and nothing is projected twice.
    """
    token = _later.set(True)
    try:
        yield
    finally:
        _later.reset(token)


def project(variables: Iterable[keras.Variable]) -> None:
    """Puts the weights that have a projection into their sets."""
    for variable in variables:
        if isinstance(variable.constraint, Projection):
            variable.assign(variable.constraint(variable))


def _read(w):
    """The value of a weight, read once: the bound and what it divides must be of one moment."""
    return 1.0 * w


def _matrix_bound(matrix, radius):
    probable, _ = _certificates.get()
    if probable is not None and min(matrix.shape) > _LARGE:
        return probable(matrix, radius)
    return norms.spectral_norm_bound(matrix)


def _factor(bound, radius):
    return ops.minimum(1.0, radius / ops.maximum(bound, 1e-30))


def _shrink(w, bound, radius):
    # The rounding of the product itself is covered by the bound's own allowance.
    return w * _factor(bound, radius)


class Projection(keras.constraints.Constraint):
    """Base of the projections: `projection(w)` lies in the set of norm `radius`.

    A subclass computes it in `project(w)`, from `w` and attributes that print as what they are.

    What is certified to be inside is left as it is, bit by bit. A weight whose norm is nearer to
    the radius than the certificate's gap (5 % by default, up to 13 % for the randomised one) may
    be scaled down to that distance, once: projecting again takes no more than rounding.
    """

    def __init__(self, radius: float = 1.0) -> None:
        self.radius = check_number(radius, "radius")

    def __call__(self, w: Any) -> Any:
        if _later.get():
            return w
        w = ops.convert_to_tensor(w)
        if _certificates.get() is not _DETERMINISTIC:  # of a step, which is compiled as a whole
            return self.project(w)
        key = type(self), repr(vars(self))
        if key not in _programs:
            # Of a copy: a program keeps what it has read, though the attributes may change.
            _programs[key] = fused(copy.deepcopy(self).project)
        return _programs[key](w)

    def project(self, w: Any) -> Any:
        """The weight, put into the set."""
        raise NotImplementedError

    def certifications(self, shape: Sequence[int]) -> int:
        """Number of randomised certificates that a weight of this shape takes; each costs δ."""
        return 0

    def get_config(self) -> dict:
        return {"radius": self.radius}


@keras.saving.register_keras_serializable("lipdp")
class NormBall(Projection):
    """Euclidean ball: `‖w‖ ≤ radius` over all entries; the Frobenius ball of a matrix.

    The exact projection, `w·min(1, radius/‖w‖)`.

    >>> float(ops.norm(NormBall(1.0)(ops.array([3.0, 4.0])))) <= 1.0
    True
    """

    def project(self, w: Any) -> Any:
        w = _read(w)
        return _shrink(w, norms.euclidean_norm(w) * (1 + 1e-6), self.radius)


@keras.saving.register_keras_serializable("lipdp")
class RowBall(Projection):
    """A Euclidean ball for each row: every vector along the last axis has norm at most `radius`.

    >>> w = RowBall(1.0)(ops.array([[3.0, 4.0], [0.0, 0.5]]))
    >>> [round(float(v), 4) for v in ops.reshape(w, (-1,))]
    [0.6, 0.8, 0.0, 0.5]
    """

    def project(self, w: Any) -> Any:
        w = _read(w)
        bounds = norms.euclidean_norm(w, axis=-1) * (1 + 1e-6)
        return _shrink(w, ops.expand_dims(bounds, -1), self.radius)


@keras.saving.register_keras_serializable("lipdp")
class EntryBall(Projection):
    """Cube: every entry within `[-radius, radius]`; what larger ones are is cut off.

    >>> [float(v) for v in EntryBall(1.0)(ops.array([3.0, -4.0, 0.5]))]
    [1.0, -1.0, 0.5]
    """

    def project(self, w: Any) -> Any:
        return ops.clip(_read(w), -self.radius, self.radius)


@keras.saving.register_keras_serializable("lipdp")
class SpectralBall(Projection):
    """Spectral ball of a matrix: largest singular value at most `radius`, certified.

    The matrix is divided by its certified norm where that is above `radius`. Scaling by an
    upper bound stays in the ball, and a matrix inside is left alone. With `orthogonal=True`
    Björck steps `W ← 1.5W − 0.5WWᵀW` follow (Björck & Bowie, 1971), which pull every singular
    value towards the radius and keep those in [0, 1] within [0, 1].

    Args:
        radius: the norm that is certified.
        orthogonal: pull the singular values up to the radius.
        iterations: Björck steps of one application.

    Raises:
        ValueError: a value out of range, or a weight that is not a matrix.

    >>> w = SpectralBall(1.0)(3.0 * ops.eye(4))
    >>> 0.99 < float(w[0, 0]) <= 1.0
    True
    """

    def __init__(self, radius: float = 1.0, orthogonal: bool = False, iterations: int = 2) -> None:
        super().__init__(radius)
        self.orthogonal = bool(orthogonal)
        self.iterations = check_integer(iterations, "iterations")

    def certifications(self, shape: Sequence[int]) -> int:
        return int(min(shape) > _LARGE)

    def project(self, w: Any) -> Any:
        if len(w.shape) != 2:
            raise ValueError(f"SpectralBall projects matrices; got a weight of shape {w.shape}.")
        w = _read(w)
        w = _shrink(w, _matrix_bound(w, self.radius), self.radius)
        if self.orthogonal:
            w = w / self.radius
            tall = w.shape[0] >= w.shape[1]
            for _ in range(self.iterations):
                gram = ops.matmul(ops.transpose(w), w) if tall else ops.matmul(w, ops.transpose(w))
                w = 1.5 * w - 0.5 * (ops.matmul(w, gram) if tall else ops.matmul(gram, w))
            # Rounding may leave a value a few units in the last place above one.
            w = w * (self.radius * (1 - 1e-5))
        return w

    def get_config(self) -> dict:
        return {
            **super().get_config(),
            "orthogonal": self.orthogonal,
            "iterations": self.iterations,
        }


@keras.saving.register_keras_serializable("lipdp")
class ConvBall(Projection):
    """Kernels whose zero-padded convolution has operator norm at most `radius`, certified.

    The set depends on the geometry of the call (`lipdp.bounds.norms.conv_norm_bound`); a rule that
    meets the kernel in another geometry certifies it anew instead of trusting the radius.

    Args:
        radius: the norm that is certified.
        input_shape: spatial sizes of the input, with or without the channels.
        strides, padding, dilation_rate, groups: of the convolution.
        certificate: `"reshaped"`, `"fft"` or `"auto"`, as in `conv_norm_bound`.

    >>> ball = ConvBall(1.0, input_shape=(8, 8), padding="same")
    >>> kernel = ball(ops.ones((3, 3, 1, 1)))
    >>> 0.1 < float(kernel[0, 0, 0, 0]) < 0.12
    True
    """

    def __init__(
        self,
        radius: float = 1.0,
        input_shape: Sequence[int] | None = None,
        strides: int | Sequence[int] = 1,
        padding: str = "valid",
        dilation_rate: int | Sequence[int] = 1,
        groups: int = 1,
        certificate: str = "auto",
    ) -> None:
        super().__init__(radius)
        if input_shape is None:
            raise ValueError("`input_shape` must be the spatial sizes of the input; got None.")
        self.geometry = {
            "input_shape": tuple(input_shape),
            "strides": strides,
            "padding": padding,
            "dilation_rate": dilation_rate,
            "groups": groups,
        }
        self.certificate = certificate

    @staticmethod
    def bound(w: Any, **options: Any) -> Any:
        """The certificate: of the operator norm of a kernel in a geometry."""
        return norms.conv_norm_bound(w, **options)

    def project(self, w: Any) -> Any:
        w = _read(w)
        return _shrink(w, self._certified(w), self.radius)

    def _certified(self, w):
        _, compiled = _certificates.get()
        few = min(w.shape[-2:]) < _CHANNELS
        bound = self.bound if few else compiled(self.bound)
        return bound(w, **self.geometry, certificate=self.certificate)

    def get_config(self) -> dict:
        return {**super().get_config(), **self.geometry, "certificate": self.certificate}


@keras.saving.register_keras_serializable("lipdp")
class DepthwiseConvBall(ConvBall):
    """Kernels whose depthwise convolution has operator norm at most `radius`, certified.

    Input channels do not meet, so each is projected by itself (`norms.depthwise_norm_bounds`).
    Arguments as for `ConvBall`, without `groups`.

    >>> ball = DepthwiseConvBall(1.0, input_shape=(4, 4))
    >>> kernel = ball(ops.reshape(ops.array([4.0, 0.5]), (1, 1, 2, 1)))
    >>> [round(float(v), 3) for v in ops.reshape(kernel, (-1,))]
    [1.0, 0.5]
    """

    def __init__(
        self,
        radius: float = 1.0,
        input_shape: Sequence[int] | None = None,
        strides: int | Sequence[int] = 1,
        padding: str = "valid",
        dilation_rate: int | Sequence[int] = 1,
        certificate: str = "auto",
    ) -> None:
        super().__init__(
            radius, input_shape, strides, padding, dilation_rate, certificate=certificate
        )
        del self.geometry["groups"]

    @staticmethod
    def bound(w: Any, **options: Any) -> Any:
        return ops.expand_dims(norms.depthwise_norm_bounds(w, **options), -1)


@keras.saving.register_keras_serializable("lipdp")
class ConvTransposeBall(ConvBall):
    """Kernels whose transposed convolution has operator norm at most `radius`, certified.

    Holds for any padding (`norms.conv_transpose_norm_bound`). Arguments as for `ConvBall`,
    without `padding` and `groups`.

    >>> ball = ConvTransposeBall(1.0, input_shape=(4, 4), strides=2)
    >>> round(float(ball(ops.ones((2, 2, 1, 1)))[0, 0, 0, 0]), 3)
    0.5
    """

    def __init__(
        self,
        radius: float = 1.0,
        input_shape: Sequence[int] | None = None,
        strides: int | Sequence[int] = 1,
        dilation_rate: int | Sequence[int] = 1,
        certificate: str = "auto",
    ) -> None:
        super().__init__(
            radius, input_shape, strides, dilation_rate=dilation_rate, certificate=certificate
        )
        del self.geometry["padding"], self.geometry["groups"]

    @staticmethod
    def bound(w: Any, **options: Any) -> Any:
        return norms.conv_transpose_norm_bound(w, **options)


@keras.saving.register_keras_serializable("lipdp")
class ResidualConvBall(ConvBall):
    """Kernels `K` for which `x + conv(x, K)` has operator norm at most `radius`, certified.

    The convolution has stride 1, odd taps, padding `"same"` and as many outputs as inputs; then
    `x` is the convolution with the middle tap, and it is `K` plus that tap that is scaled.
    Arguments as for `ConvBall`.

    >>> ball = ResidualConvBall(1.0, input_shape=(4, 4))
    >>> abs(float(ball(ops.ones((1, 1, 1, 1)))[0, 0, 0, 0])) < 1e-4
    True
    """

    def __init__(
        self,
        radius: float = 1.0,
        input_shape: Sequence[int] | None = None,
        certificate: str = "auto",
    ) -> None:
        ones = (1,) * len(input_shape or ())  # as Keras' layers tell them
        super().__init__(radius, input_shape, ones, "same", ones, certificate=certificate)

    @staticmethod
    def bound(w: Any, **options: Any) -> Any:
        return norms.conv_norm_bound(w + identity_kernel(w.shape), **options)

    def project(self, w: Any) -> Any:
        w = _read(w)
        factor = _factor(self._certified(w), self.radius)
        # Not `factor·(w + I) − I`, which would round a kernel that is inside.
        return factor * w - (1.0 - factor) * identity_kernel(w.shape)

    def get_config(self) -> dict:
        config = super().get_config()
        return {name: config[name] for name in ("radius", "input_shape", "certificate")}


def identity_kernel(shape: Sequence[int]) -> Any:
    """The kernel of the convolution that keeps its input, with padding `"same"` and stride 1.

    Raises:
        ValueError: taps that are even, or channels that differ.
    """
    *taps, inputs, outputs = shape
    if inputs != outputs or any(k % 2 == 0 for k in taps):
        raise ValueError(
            "a residual convolution needs odd kernel sizes and as many filters as input channels; "
            f"got a kernel of shape {tuple(shape)}."
        )
    kernel = np.zeros(shape, "float32")
    kernel[tuple(k // 2 for k in taps)] = np.eye(inputs)
    return ops.convert_to_tensor(kernel)


@keras.saving.register_keras_serializable("lipdp")
class AlmostOrthogonal(Projection):
    """Matrices and conv kernels of operator norm at most `radius` by scaling each channel.

    The rescaling of almost-orthogonal layers (`norms.almost_orthogonal_scales`), used as a
    projection: each channel is multiplied by its factor where that is below 1. Needs one product
    and no norm, for kernels of any stride, padding, dilation and size of map. A kernel may be
    scaled although its norm was below the radius, and a little again at the next application.

    >>> w = AlmostOrthogonal(1.0)(ops.array([[3.0, 0.0], [0.0, 0.5]]))
    >>> [round(float(v), 3) for v in ops.diagonal(w)]
    [1.0, 0.5]
    """

    def project(self, w: Any) -> Any:
        w = _read(w)
        scales, axis = norms.almost_orthogonal_scales(w)
        scales = ops.minimum(1.0, self.radius * scales)
        return w * (scales if axis == -1 else ops.expand_dims(scales, -1))
