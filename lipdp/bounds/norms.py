"""Certified upper bounds of operator norms.

Every function returns a number that is *at least* the norm, rounding included: sensitivities
are multiplied from these numbers, so an estimate from below (power iteration alone) would
void the privacy guarantee. Everything is differentiable-free `keras.ops`, works inside a
compiled step and on leading batch axes.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from keras import ops
from scipy import stats

from accountants.validation import check_choice, check_integer

Tensor = Any

__all__ = [
    "FAILURE_PROBABILITY",
    "almost_orthogonal_scales",
    "conv_multiplicity",
    "conv_norm_bound",
    "conv_transpose_multiplicity",
    "conv_transpose_norm_bound",
    "depthwise_norm_bounds",
    "euclidean_norm",
    "probable_norm_bound",
    "probe_shape",
    "spectral_norm_bound",
]

#: Probability that one `probable_norm_bound` is too small; the model pays for it out of delta.
FAILURE_PROBABILITY = 1e-20

# Relative allowance for float32 rounding, for sides up to 1,024.
_ROUNDING = 1e-5
# The widest gap to the true norm that the default bounds leave.
_GAP = 0.05
# Rows of the probe: wider probes need fewer products, each of them dearer.
_PROBES = 16
# What is allowed for in the norm of the probe's image: the rounding of the recurrence, which moves
# it by far less than 1 % of its size, and the gap of its own bound.
_RECURRENCE = 1.01
_PROBE_GAP = 0.03
# Values of `a` that are tried.
_CANDIDATES = 5
# The reciprocal of a larger number underflows on JAX: norms of larger tensors are infinite.
_HUGE = 1e37
# What the FFT certificate of a convolution may hold in memory, in numbers.
_FFT_LIMIT = 2**22


def _rounding(*sides):
    return 1.0 + _ROUNDING * max(1.0, max(sides) / 1024)


def _scaled(parts, axis=None):
    """The sum of the magnitudes in some tensors, and those divided by it: squares of that neither
    overflow nor, as far as they count, underflow.

    A sum, where the largest entry would do: what is certified is a noisy weight, and LLVM has been
    seen to take hours over a maximum of a few entries that each are computed by the generator of
    `lipdp.noise.gaussian_rng` (it looks for a checksum's loop behind the maximum, along every
    path).
    """
    scale = sum(ops.sum(ops.abs(part), axis=axis, keepdims=True) for part in parts)
    safe = ops.where(scale > 0, scale, ops.ones_like(scale))
    return scale, [part / safe for part in parts]


def _gram(real, imaginary=None):
    """Real and imaginary part of `M*M`, for `M` of the given parts: two real products, where the
    complex one is four.
    """
    if imaginary is None:
        return [ops.matmul(ops.swapaxes(real, -2, -1), real)]
    mixed = ops.matmul(ops.swapaxes(real, -2, -1), imaginary)
    turned = ops.swapaxes(mixed, -2, -1)
    both = real - imaginary
    return [ops.matmul(ops.swapaxes(both, -2, -1), both) + mixed + turned, mixed - turned]


def euclidean_norm(x: Tensor, axis: int | None = None) -> Tensor:
    """Euclidean (Frobenius) norm of a tensor, rounded up.

    Args:
        x: tensor of any shape.
        axis: the axis of the norm; by default all of them.

    Returns:
        A scalar tensor, or one without the axis; infinite where the entries' magnitudes sum to more
        than 1e37.

    >>> float(euclidean_norm(ops.array([3.0, 4.0]))) >= 5.0
    True
    """
    scale, (unit,) = _scaled([x], axis)
    squares = ops.sum(ops.square(unit), axis=axis, keepdims=True)
    norm = ops.where(scale > _HUGE, math.inf, scale * ops.sqrt(squares) * _rounding(1))
    return ops.squeeze(norm, axis)


def spectral_norm_bound(
    kernel: Tensor, gap: float = _GAP, imaginary: Tensor | None = None
) -> Tensor:
    """Upper bound of the largest singular value of a matrix, at most `gap` above it.

    Gram iteration (Delattre et al., "Efficient Bound of Lipschitz Constant for Convolutional
    Layers by Gram Iteration", ICML 2023): with `G_1 = WᵀW` and `G_{t+1} = G_t²`, the largest
    eigenvalue of `G_t` is `s(W)^(2^t)`, and any upper bound of it gives one of `s(W)` whose
    relative error vanishes like `2^-t`. The eigenvalue is bounded through trace and variance,
    `λ ≤ m + d·√(p−1)` with `m = tr(G)/p` and `d² = ‖G − mI‖²_F/p` (Wolkowicz & Styan, "Bounds
    for Eigenvalues Using Traces", 1980, Theorem 2.1), which is exact for orthogonal matrices
    and never worse than the Frobenius norm. The worst spectrum has half of its values at the
    top, which costs `((1 + √(p−1))/2)^(2^-t)`; the number of iterations follows from that.

    Args:
        kernel: float tensor of shape `(..., m, n)`.
        gap: relative distance to the true norm that is accepted.
        imaginary: of the kernel's shape, its imaginary part where it is complex.

    Returns:
        A tensor of shape `(...)`: the bound of each matrix. Zero for zeros, NaN for NaN, infinite
        where the entries' magnitudes sum to more than 1e37.

    Raises:
        ValueError: the kernel is not a matrix.

    >>> bound = float(spectral_norm_bound(ops.diag(ops.array([1.0, 2.0]))))
    >>> 2.0 <= bound <= 2.1
    True
    """
    kernel = ops.convert_to_tensor(kernel)
    if len(kernel.shape) < 2:
        raise ValueError(
            f"`kernel` must have at least two axes, (..., m, n); got shape {tuple(kernel.shape)}."
        )
    rows, columns = kernel.shape[-2:]
    side = min(rows, columns)
    parts = [kernel] if imaginary is None else [kernel, ops.convert_to_tensor(imaginary)]
    if rows < columns:
        parts = [ops.swapaxes(part, -2, -1) for part in parts]
    worst = (1.0 + math.sqrt(side - 1)) / 2.0
    # `gap / 2` leaves room for rounding; 2^-t·log(worst) <= log(1 + gap).
    iterations = 1
    while math.log(worst) > 2**iterations * math.log1p(gap / 2):
        iterations += 1

    def squares(parts):
        return sum(ops.sum(ops.square(p), axis=(-2, -1), keepdims=True) for p in parts)

    scale, parts = _scaled(parts, (-2, -1))
    log_norm = ops.zeros_like(scale)
    for iteration in range(1, iterations + 1):
        parts = _gram(*parts)  # a Gram matrix is Hermitian: that of it is its square
        size = ops.maximum(ops.sqrt(squares(parts)), 1e-30)
        parts = [part / size for part in parts]
        log_norm = log_norm + ops.log(size) / 2**iteration
    trace = ops.sum(ops.diagonal(parts[0], axis1=-2, axis2=-1), axis=-1)[..., None, None]
    mean = trace / side
    spread = squares([parts[0] - mean * ops.eye(side, dtype=parts[0].dtype), *parts[1:]])
    top = mean + ops.sqrt(spread / side * (side - 1))
    # No matrix has a spectral norm above its Frobenius norm, nor `top` below zero but by rounding.
    bound = scale * ops.exp(log_norm) * ops.power(ops.maximum(top, 1e-30), 2.0**-iterations)
    bound = ops.where(scale > _HUGE, math.inf, bound * _rounding(rows, columns))
    return bound[..., 0, 0]


def probe_shape(kernel_shape: Sequence[int]) -> tuple[int, int]:
    """Shape of the Gaussian probe that `probable_norm_bound` wants for a matrix.

    >>> probe_shape((300, 200))
    (16, 200)
    """
    return (_PROBES, kernel_shape[-1])


def probable_norm_bound(
    kernel: Tensor, probe: Tensor, radius: float = 1.0, gap: float = 0.1
) -> Tensor:
    """Upper bound of the largest singular value that fails with probability 1e-20 at most.

    The cheap certificate of large matrices: `2k` products with a block of 16 vectors instead of
    products of whole matrices. With `A = WᵀW`, largest eigenvalue `λ` and unit eigenvector `v`,
    a Gaussian block `X` (rows are probes) and the Chebyshev polynomial `T_k`, let
    `Y = X·T_k(2A/a − I)` for any `a > 0`. If `λ ≥ a`,

        T_k(2λ/a − 1)·‖Xv‖ = ‖Yv‖ ≤ s(Y),    so    λ ≤ a·(1 + cosh(arccosh(s(Y)/ξ)/k))/2

    whenever `‖Xv‖ ≥ ξ`; if `λ < a` the right-hand side is at least `a` anyway. `‖Xv‖²` is
    chi-square with 16 degrees of freedom whatever `v` is, so with `ξ²` its 1e-20 quantile the
    bound fails with probability 1e-20 at most. The randomised lower tail is that of Halko,
    Martinsson & Tropp (2011), section 4.3; the polynomial is what makes a flat spectrum cost
    `k ~ 1/√gap` instead of `1/gap` products.

    The event `‖Xv‖ ≥ ξ` does not depend on `a`. On it the inequality holds for all `a` at once,
    so `a` may depend on `X` and `W`, and the smallest of several bounds holds with the same
    probability. The choice of `a` decides how tight the bound is:

    - If `λ ≤ a`, no eigenvalue of `T_k(2A/a − I)` is above 1 and `s(Y) ≤ s(X)`. By Davidson &
      Szarek (2001), `s(X) ≤ √n + √16 + 6` but with probability 2e-8. That makes the bound at
      most `a·c²`, with `c` about `1 + gap`. The first `a` is `(radius/c)²`: a matrix of norm up
      to `radius/c` is told to be inside the ball of `radius`.
    - A larger norm would be overestimated by up to `c²`. So five values of `a` are tried, a
      quarter of `gap` apart in the norm, up to `(radius·(1 + gap)/c)²`; the one just above `λ`
      gives at most `(1 + gap/4)·c` times the norm. The products are the same: `T_k(2A/b − I)` is
      a combination of the `T_j(2A/a − I)` with `j ≤ k`.

    However often a matrix is multiplied by `radius` and divided by its bound, with fresh probes,
    it therefore stops at a norm of at least `radius/((1 + gap/4)·c)`.

    `A` has the side of the columns, also where there are fewer rows: that is the order in which
    both products are fast, and eigenvalues of zero take nothing from the tightness.

    The probe must be independent of the matrix: fresh at every call, never a function of it.

    Args:
        kernel: float tensor of shape `(m, n)`.
        probe: standard normal tensor of shape `probe_shape((m, n))`.
        radius: the norm that the bound is compared with. Only the tightness depends on it.
        gap: relative distance to the true norm that is aimed at for norms up to the radius.

    Returns:
        A scalar tensor, never above the Frobenius norm (rounded up).

    >>> from keras import random
    >>> w = random.normal((400, 300), seed=1) / 37.3
    >>> bound = float(probable_norm_bound(w, random.normal(probe_shape(w.shape), seed=2)))
    >>> float(ops.linalg.norm(w, 2)) <= bound <= 1.15
    True
    """
    rows, columns = kernel.shape
    threshold = math.sqrt(stats.chi2.ppf(FAILURE_PROBABILITY, _PROBES))
    # For a flat spectrum s(Y) is about s(X) <= √columns + √probes + 2.
    ratio = (math.sqrt(columns) + math.sqrt(_PROBES) + 2.0) / threshold
    degree = math.ceil(math.acosh(ratio) / math.acosh(2.0 * (1.0 + gap) ** 2 - 1.0))
    ratios, combinations = _candidates(degree, gap)

    def gram(y):
        # `y·Wᵀ·W`. Written so that the kernel is the left factor, which processors multiply with
        # thin right ones faster than the other way round.
        image = ops.matmul(y, ops.transpose(kernel))
        return ops.transpose(ops.matmul(ops.transpose(kernel), ops.transpose(image)))

    # Rayleigh quotients are below λ: with `a` at least a fraction of them nothing overflows.
    first = gram(probe)
    rayleigh = ops.max(ops.sum(first * probe, axis=1) / ops.sum(ops.square(probe), axis=1))
    # (1 + cosh(x))/2 = cosh²(x/2).
    largest = _RECURRENCE * (1.0 + _PROBE_GAP) * (ratio + 4.0 / threshold)
    tightness = math.cosh(math.acosh(largest) / degree / 2.0) * _rounding(rows, columns)
    a = ops.maximum(rayleigh, (radius / tightness) ** 2)
    blocks = [probe, 2.0 / a * first - probe]
    for _ in range(degree - 1):
        blocks.append(4.0 / a * gram(blocks[-1]) - 2.0 * blocks[-1] - blocks[-2])
    blocks = ops.stack(blocks)
    candidates = ops.tensordot(ops.convert_to_tensor(combinations, blocks.dtype), blocks, axes=1)
    # The rounding of the blocks, which may be larger than their combination.
    sizes = euclidean_norm(ops.reshape(blocks, (degree + 1, -1)), axis=1)
    noise = ops.matmul(ops.convert_to_tensor(np.abs(combinations), blocks.dtype), sizes)
    noise = noise * (10.0 * (_rounding(rows, columns) - 1.0))
    tops = _RECURRENCE * spectral_norm_bound(candidates, _PROBE_GAP) + noise
    growth = ops.maximum(tops / threshold, 1.0)
    # arccosh(x) = log(x + √(x² − 1)), written so that a large x does not overflow.
    log_growth = ops.log(growth) + ops.log(1.0 + ops.sqrt(1.0 - ops.square(1.0 / growth)))
    bounds = ops.sqrt(a) * ops.convert_to_tensor(ratios, blocks.dtype)
    bounds = bounds * ops.cosh(log_growth / degree / 2.0) * _rounding(rows, columns)
    bound = ops.min(ops.where(ops.isfinite(bounds), bounds, math.inf))
    # The Frobenius norm is smaller for matrices of few singular values, and where the norm is far
    # above the radius and the recurrence overflows. A few rows tell that it is not.
    few = euclidean_norm(kernel[: -(-rows // 8)])

    def smaller():
        frobenius = euclidean_norm(kernel)
        return ops.where(ops.isfinite(bound), ops.minimum(bound, frobenius), frobenius)

    return ops.cond(bound <= few, lambda: bound, smaller)


def _candidates(degree, gap):
    """`√(b/a)` for each `b` that is tried, and `T_k(2x/b − 1)` in terms of `T_j(2x/a − 1)`."""

    def polynomial(y, ratio):
        return np.cos(degree * np.arccos(np.clip((y + 1.0) / ratio**2 - 1.0, -1.0, 1.0)))

    ratios = np.geomspace(1.0, 1.0 + gap, _CANDIDATES)
    interpolate = np.polynomial.chebyshev.chebinterpolate
    return ratios, np.stack([interpolate(polynomial, degree, (ratio,)) for ratio in ratios])


def _per_axis(value, axes, name):
    values = (value,) * axes if isinstance(value, int) else tuple(value)
    if len(values) != axes:
        raise ValueError(f"`{name}` must be an integer or {axes} of them; got {value!r}.")
    return tuple(check_integer(v, name) for v in values)


def _axes(kernel_shape, input_shape, strides, dilation_rate):
    """(kernel, input, stride, dilation) of each spatial axis."""
    axes = len(kernel_shape) - 2
    sizes = tuple(input_shape)
    if len(sizes) == axes + 1:
        sizes = sizes[:-1]
    if len(sizes) != axes or any(n is None or n < 1 for n in sizes):
        raise ValueError(
            f"`input_shape` must be {axes} known spatial sizes (and the channels); "
            f"got {tuple(input_shape)}."
        )
    strides = _per_axis(strides, axes, "strides")
    dilations = _per_axis(dilation_rate, axes, "dilation_rate")
    return list(zip(kernel_shape[:axes], sizes, strides, dilations, strict=True))


def _geometry(kernel_shape, input_shape, strides, padding, dilation_rate):
    """(kernel, input, stride, dilation, outputs) of each spatial axis of a convolution."""
    check_choice(padding, "padding", ("valid", "same", "causal"))
    geometry = []
    for k, n, s, d in _axes(kernel_shape, input_shape, strides, dilation_rate):
        reach = (k - 1) * d + 1
        outputs = -(-(n - reach + 1) // s) if padding == "valid" else -(-n // s)
        if outputs < 1:
            raise ValueError(
                f"The kernel spans {reach} cells of an axis of {n}: with padding='valid' "
                "nothing is left of the input."
            )
        geometry.append((k, n, s, d, outputs))
    return geometry


def conv_multiplicity(
    kernel_shape: Sequence[int],
    input_shape: Sequence[int],
    strides: int | Sequence[int] = 1,
    padding: str = "valid",
    dilation_rate: int | Sequence[int] = 1,
) -> int:
    """Largest number of output positions that one input entry can reach.

    On an axis with `k` taps, stride `s` and dilation `d` the taps that meet a given input cell
    are `s/gcd(s, d)` apart, so `⌈k/(s/gcd(s, d))⌉` outputs read it, and never more than there
    are outputs. The norm of the gradient of a conv kernel is at most the square root of this
    number times `X·G`.

    Args:
        kernel_shape: `(taps..., channels_in, channels_out)`.
        input_shape: spatial sizes of the input, channels optional.
        strides, dilation_rate: an integer, or one for each axis.
        padding: `"valid"`, `"same"` or `"causal"`, with zeros.

    Returns:
        An integer.

    >>> conv_multiplicity((3, 3, 1, 8), (28, 28)), conv_multiplicity((2, 2, 1, 8), (28, 28), 2)
    (9, 1)
    """
    multiplicity = 1
    for k, _, s, d, outputs in _geometry(
        kernel_shape, input_shape, strides, padding, dilation_rate
    ):
        multiplicity *= min(-(-k // (s // math.gcd(s, d))), outputs)
    return multiplicity


def conv_norm_bound(
    kernel: Tensor,
    input_shape: Sequence[int],
    strides: int | Sequence[int] = 1,
    padding: str = "valid",
    dilation_rate: int | Sequence[int] = 1,
    groups: int = 1,
    certificate: str = "auto",
) -> Tensor:
    """Upper bound of the operator norm of a zero-padded convolution, stride included.

    Two bounds that both hold; the smaller one is returned:

    - `"reshaped"`: `√m·s(K̂)`, with `K̂` the kernel as a `(taps·channels_in, channels_out)`
      matrix and `m` the `conv_multiplicity`: patch extraction has norm at most `√m`.
    - `"fft"`: the largest singular value of the kernel's transfer matrices on a frequency grid.
      A zero-padded convolution is a part of a circular one on `N` cells an axis as soon as
      nothing wraps around: `N ≥ n + ⌊k'/2⌋` for `same`, `n` for `valid`, `n + k' − 1` for
      `causal`, `k' = (k − 1)·d + 1`; a circular one is block-diagonal in the Fourier basis
      (Sedghi, Gupta & Long, ICLR 2019; `N = n` would not bound a `same` convolution), and
      dropping rows for the stride cannot raise the norm.

    Args:
        kernel: tensor `(taps..., channels_in // groups, channels_out)`, any number of axes.
        input_shape: spatial sizes of the input, channels optional.
        strides, padding, dilation_rate, groups: as in `keras.layers.Conv2D`.
        certificate: `"reshaped"`, `"fft"`, or `"auto"`: both, unless the frequency grid would
            take more than 4 million numbers.

    Returns:
        A scalar tensor.

    Raises:
        ValueError: an argument is not one of these.

    >>> kernel = ops.ones((3, 3, 1, 1)) / 9.0
    >>> 0.9 < float(conv_norm_bound(kernel, (8, 8), padding="same")) < 1.05
    True
    """
    kernel = ops.convert_to_tensor(kernel)
    shape = tuple(kernel.shape)
    # (taps..., channels_in, groups, channels_out) -> (groups, taps..., channels_in, channels_out)
    split = ops.reshape(kernel, (*shape[:-1], groups, shape[-1] // groups))
    split = ops.moveaxis(split, -2, 0)
    return ops.max(
        _conv_norm_bounds(split, input_shape, strides, padding, dilation_rate, certificate)
    )


def depthwise_norm_bounds(
    kernel: Tensor,
    input_shape: Sequence[int],
    strides: int | Sequence[int] = 1,
    padding: str = "valid",
    dilation_rate: int | Sequence[int] = 1,
    certificate: str = "auto",
) -> Tensor:
    """Upper bounds of the operator norms of a depthwise convolution, one for each input channel.

    An input channel meets its own filters only, so the operator is block-diagonal over the input
    channels and its norm is the largest entry of the result. A block is a convolution from one
    channel to all filters of that channel: with depth multiplier `M` its norm can be `√M` times
    that of each filter.

    Args:
        kernel: tensor `(taps..., channels, depth_multiplier)`.
        input_shape, strides, padding, dilation_rate, certificate: as in `conv_norm_bound`.

    Returns:
        A tensor of shape `(channels,)`.

    Raises:
        ValueError: as `conv_norm_bound`.

    >>> kernel = ops.ones((1, 1, 3, 4))
    >>> [round(float(bound), 3) for bound in depthwise_norm_bounds(kernel, (5, 5))]
    [2.0, 2.0, 2.0]
    """
    kernel = ops.convert_to_tensor(kernel)
    split = ops.expand_dims(ops.moveaxis(kernel, -2, 0), -2)
    return _conv_norm_bounds(split, input_shape, strides, padding, dilation_rate, certificate)


def conv_transpose_multiplicity(
    kernel_shape: Sequence[int],
    input_shape: Sequence[int],
    strides: int | Sequence[int] = 1,
    dilation_rate: int | Sequence[int] = 1,
) -> int:
    """Largest number of input positions that one output entry of a transposed convolution reads.

    As `conv_multiplicity` with inputs and outputs exchanged; the norm of the kernel's gradient
    is at most the square root of this number times `X·G`.

    Args:
        kernel_shape: `(taps..., channels_out, channels_in)`, as `keras.layers.Conv2DTranspose`.
        input_shape: spatial sizes of the input, channels optional.
        strides, dilation_rate: an integer, or one for each axis.

    Returns:
        An integer.

    >>> conv_transpose_multiplicity((3, 3, 8, 1), (9, 9), 2)
    4
    """
    return math.prod(
        min(-(-k // (s // math.gcd(s, d))), n)
        for k, n, s, d in _axes(kernel_shape, input_shape, strides, dilation_rate)
    )


def conv_transpose_norm_bound(
    kernel: Tensor,
    input_shape: Sequence[int],
    strides: int | Sequence[int] = 1,
    dilation_rate: int | Sequence[int] = 1,
    certificate: str = "auto",
) -> Tensor:
    """Upper bound of the operator norm of a transposed convolution with any padding.

    It is the adjoint of a convolution with the same taps and stride that reads the output, so
    both bounds of `conv_norm_bound` hold: `√m·s(K̂)` with `K̂` the kernel as a
    `(taps·channels_out, channels_in)` matrix and `m` the `conv_transpose_multiplicity`, and the
    transfer matrices on `N ≥ (n − 1)·s + k'` cells an axis, where nothing wraps around. What
    `padding` and `output_padding` cut off or append changes neither.

    Args:
        kernel: tensor `(taps..., channels_out, channels_in)`.
        input_shape: spatial sizes of the input, channels optional.
        strides, dilation_rate: as in `keras.layers.Conv2DTranspose`.
        certificate: `"reshaped"`, `"fft"` or `"auto"`, as in `conv_norm_bound`.

    Returns:
        A scalar tensor.

    Raises:
        ValueError: an argument is not one of these.

    >>> kernel = ops.ones((2, 2, 1, 1)) / 2.0
    >>> round(float(conv_transpose_norm_bound(kernel, (4, 4), strides=2)), 3)
    1.0
    """
    kernel = ops.convert_to_tensor(kernel)
    shape = tuple(kernel.shape)
    multiplicity = conv_transpose_multiplicity(shape, input_shape, strides, dilation_rate)
    axes = _axes(shape, input_shape, strides, dilation_rate)
    grid = [(n - 1) * s + (k - 1) * d + 1 for k, n, s, d in axes]
    dilations = [d for *_, d in axes]
    return _kernel_norm_bounds(kernel[None], multiplicity, grid, dilations, certificate)[0]


def _conv_norm_bounds(split, input_shape, strides, padding, dilation_rate, certificate):
    """Norm bounds of the convolutions with each of the stacked kernels."""
    shape = tuple(split.shape)[1:]
    geometry = _geometry(shape, input_shape, strides, padding, dilation_rate)
    multiplicity = conv_multiplicity(shape, input_shape, strides, padding, dilation_rate)
    grid = []
    for k, n, _, d, _ in geometry:
        reach = (k - 1) * d + 1
        grid.append(n + {"same": reach // 2, "valid": 0, "causal": reach - 1}[padding])
    dilations = [d for _, _, _, d, _ in geometry]
    return _kernel_norm_bounds(split, multiplicity, grid, dilations, certificate)


def _kernel_norm_bounds(split, multiplicity, grid, dilations, certificate):
    """Norm bounds of each kernel of a stack `(kernels, taps..., a, b)`; see `conv_norm_bound`."""
    check_choice(certificate, "certificate", ("auto", "fft", "reshaped"))
    kernels, *sizes, rows, columns = split.shape
    taps = math.prod(sizes)
    # The kernel is real: opposite frequencies have the same singular values.
    frequencies = [np.arange(n) for n in grid]
    frequencies[0] = frequencies[0][: grid[0] // 2 + 1]
    waves = math.prod(map(len, frequencies))

    bounds = []
    if certificate != "fft":
        matrices = ops.reshape(split, (kernels, taps * rows, columns))
        bounds.append(spectral_norm_bound(matrices) * math.sqrt(multiplicity))
    small = 4 * waves * rows * columns * kernels <= _FFT_LIMIT
    if certificate == "fft" or (certificate == "auto" and small and taps > 1):
        phase = np.zeros((1, 1))
        for k, d, n, f in zip(sizes, dilations, grid, frequencies, strict=True):
            axis = np.outer(f, np.arange(k) * d) / n
            phase = (phase[:, None, :, None] + axis[None, :, None, :]).reshape(
                phase.shape[0] * axis.shape[0], -1
            )
        flat = ops.reshape(split, (kernels, taps, rows * columns))

        def transfer(wave):
            wave = ops.convert_to_tensor(wave.astype("float32"), dtype=split.dtype)
            return ops.reshape(ops.matmul(wave, flat), (kernels, waves, rows, columns))

        real = transfer(np.cos(2 * np.pi * phase))
        imaginary = transfer(np.sin(2 * np.pi * phase))
        norms = spectral_norm_bound(real, imaginary=imaginary)
        bounds.append(ops.max(norms, axis=-1) * _rounding(1))
    return ops.minimum(bounds[0], bounds[1]) if len(bounds) == 2 else bounds[0]


def almost_orthogonal_scales(kernel: Tensor) -> tuple[Tensor, int]:
    """Factors of the channels with which a kernel's operator norm is at most 1, and their axis.

    Prach & Lampert, "Almost-Orthogonal Layers for Efficient General-Purpose Lipschitz Networks"
    (ECCV 2022): with `d_c = (Σ_c' |WᵀW|_cc')^(-1/2)` the matrix `W·diag(d)` has norm at most 1,
    since `diag(d)·WᵀW·diag(d)` is similar to a matrix whose absolute row sums are at most 1. For
    a convolution on an unbounded grid `WᵀW` is again a convolution, with the correlations of the
    kernel with itself; padding with zeros, cropping, strides, dilation and groups all take a part
    of that operator. Rows and columns may be exchanged: the smaller side of channels is scaled.

    Args:
        kernel: tensor `(taps..., channels_in, channels_out)`, a matrix if there are no taps.

    Returns:
        `(scales, axis)`: the factors of the channels, rounded down, and -2 or -1, the axis of the
        kernel that they are for. Channels of zeros get 1e30.

    Raises:
        ValueError: the kernel is not a matrix and has more than three axes of taps.

    >>> scales, axis = almost_orthogonal_scales(ops.ones((4, 1)))
    >>> round(float(scales[0]), 3), axis
    (0.5, -1)
    """
    kernel = ops.convert_to_tensor(kernel)
    if not 2 <= len(kernel.shape) <= 5:
        raise ValueError(
            "`kernel` must have two axes of channels and at most three of taps before them; got "
            f"shape {tuple(kernel.shape)}."
        )
    *taps, rows, columns = kernel.shape
    axis = -2 if rows < columns else -1
    size, (unit,) = _scaled([kernel])
    size = ops.reshape(size, ())
    if axis == -1:
        unit = ops.swapaxes(unit, -2, -1)
    # (taps..., scaled channels, others): the products of the channels at all shifts.
    if taps:
        images = ops.moveaxis(unit, -2, 0)
        filters = ops.swapaxes(unit, -2, -1)
        padded = ops.pad(images, [(0, 0), *((k - 1, k - 1) for k in taps), (0, 0)])
        products = ops.conv(padded, filters, padding="valid")
    else:
        products = ops.matmul(unit, ops.transpose(unit))
    sums = ops.sum(ops.abs(products), axis=tuple(range(1, len(products.shape))))
    norms = size * ops.sqrt(sums) * _rounding(math.prod(products.shape[1:]))
    return 1.0 / ops.where(size > _HUGE, math.inf, ops.maximum(norms, 1e-30)), axis
