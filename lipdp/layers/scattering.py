"""Wavelet scattering: fixed features that expand no norm."""

import functools
import itertools
import math
from typing import Any

import keras
import numpy as np
from keras import ops

from accountants.validation import check_choice, check_integer
from lipdp.bounds import Call, Rule, lipschitz

# Below this square of a modulus the modulus and its slope, which zero lacks, are set to zero.
_TINY = 1e-36
# Of the scale, against the rounding of the eigenvalues and of the features themselves.
_ROUNDING = 1.0 + 1e-5
# π as kymatio's filters are normalised with it.
_PI = 3.1415
# Numbers in the matrices of a layer: 512 MiB.
_LARGEST = 2**27

_PADDINGS = ("zeros", "reflect")


@keras.saving.register_keras_serializable("lipdp")
class Scattering2D(keras.layers.Layer):
    """Wavelet scattering of images (Bruna & Mallat, TPAMI 2013): fixed features, no weights.

    With Morlet wavelets `ψ` of `J` dyadic scales `j` and `L` angles `θ`, and a Gaussian `φ` of
    scale `2^J`, each channel `x` of the image gives `x∗φ`, `|x∗ψ₁|∗φ` and, in the second order,
    `||x∗ψ₁|∗ψ₂|∗φ` for `j₁ < j₂`, all sampled every `2^J` pixels:
    `K = 1 + J·L + L²·J(J−1)/2` features a position and channel.

    Nothing is learnt, so nothing is added to the sensitivity, and the features of a data set may
    be computed once (`cached_features`). Output at most `X`, cotangent at most `G`, for which the
    coefficients are multiplied by `scale`: a stage, all convolutions of one map with their
    subsampling, is linear and acts by itself on each set of frequencies that subsampling folds
    together. So the largest eigenvalue of a small Gram matrix for each set (the Littlewood-Paley
    sum, aliasing included) is the square of its norm; each wavelet is weighted by the constant of
    the stage behind it, and the modulus between them has slope one. Divided by `scale`, the
    coefficients are those of kymatio (Andreux et al., JMLR 2020), whose filters these are.

    Time and memory are those of a few matrix products, as fits images of up to about 100 pixels
    each way: with `n` padded pixels each way the matrices hold about `8·L·n³` numbers.

    Args:
        J: number of scales; a feature sees about `2^J` pixels each way.
        L: number of angles.
        max_order: 1 or 2, how many wavelets a path has at most.
        padding: how the image goes on for `2^J` pixels beyond its border. `"zeros"` repeats no
            pixel. `"reflect"`, as in kymatio, has norm 2 where a corner is repeated, which
            `scale` divides out although features rarely attain it.

    Input shape: `(batch, height, width, channels)`, all but the batch known, height and width at
    least `2^J`. Where `2^J` does not divide them they are padded, below and to the right.
    Output shape: `(batch, ⌈height/2^J⌉, ⌈width/2^J⌉, channels·K)`. The `K` features of an input
    channel are neighbours, in the order of `paths`: by order, then by `(j₁, θ₁, j₂, θ₂)`. Group
    normalisation over neighbours, 27 groups for `J=2, L=8`, is then that of published recipes;
    groups of one order and scale are `1`, then `J` times `L`, then blocks of `L` neighbours.

    Attributes:
        paths: for each of the `K` features `((j₁, θ₁), (j₂, θ₂))`, `((j₁, θ₁),)` or `()`. Waves
            of scale `j` have the frequency `¾π/2^j`, their direction the angle
            `(⌊L/2⌋ − 1 − θ)·π/L` to the downward axis (for `L > 1`).
        scale: what the coefficients are multiplied by; known once the layer is built.

    Raises:
        ValueError: an argument or the shape of the input is not as above.

    >>> layer = Scattering2D(J=2, L=4)
    >>> layer(ops.ones((1, 28, 28, 1))).shape == (1, 7, 7, 1 + 2 * 4 + 4 * 4)
    True
    >>> layer.paths[:2], layer.paths[-1]
    ([(), ((0, 0),)], ((0, 3), (1, 3)))
    """

    def __init__(
        self,
        J: int = 2,
        L: int = 8,
        max_order: int = 2,
        padding: str = "zeros",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.J, self.L = check_integer(J, "J"), check_integer(L, "L")
        self.max_order = check_integer(max_order, "max_order")
        if self.max_order > 2:
            raise ValueError(f"`max_order` must be 1 or 2; got {max_order!r}.")
        self.padding = check_choice(padding, "padding", _PADDINGS)
        self.scale = None

    @property
    def paths(self) -> list[tuple]:
        waves = list(itertools.product(range(self.J), range(self.L)))
        paths = [(), *((first,) for first in waves)]
        if self.max_order == 2:
            paths += [(a, b) for a, b in itertools.product(waves, waves) if a[0] < b[0]]
        return paths

    def build(self, input_shape):
        if len(input_shape) != 4 or any(n is None for n in input_shape[1:]):
            raise ValueError(
                "Scattering2D needs images of shape (batch, height, width, channels), all but the "
                f"batch known; got {tuple(input_shape)}."
            )
        if min(input_shape[1:3]) < 2**self.J:
            raise ValueError(
                f"Scattering2D(J={self.J}) needs images of at least {2**self.J} pixels each way; "
                f"got {input_shape[1]} by {input_shape[2]}. Use a smaller J."
            )
        self.input_spec = keras.layers.InputSpec(ndim=4, axes=dict(enumerate(input_shape[1:3], 1)))
        margins = [_margins(n, self.J) for n in input_shape[1:3]]
        if self.padding == "reflect":
            for n, margin in zip(input_shape[1:3], margins, strict=True):
                if max(margin) >= n:
                    raise ValueError(
                        f"Scattering2D(J={self.J}, padding='reflect') would reflect {max(margin)} "
                        f"pixels of {n}. Use a smaller J or padding='zeros'."
                    )
        sizes = tuple(n + sum(m) for n, m in zip(input_shape[1:3], margins, strict=True))
        if 8 * self.L * max(sizes) ** 3 > _LARGEST:
            raise ValueError(
                f"Images of {input_shape[1]} by {input_shape[2]} pixels are too large for "
                f"Scattering2D(J={self.J}, L={self.L}), whose matrices grow with the third power "
                "of their size. Use smaller images or crops."
            )
        constant = _certificate(sizes, self.J, self.L, self.max_order)
        paddings = []
        for n, margin in zip(input_shape[1:3], margins, strict=True):
            matrix = _padding_matrix(n, margin, self.padding)
            constant *= math.sqrt(matrix.sum(axis=0).max())  # how often a pixel is repeated
            paddings.append(matrix)
        self.scale = 1.0 / (constant * _ROUNDING)
        self._matrices(_Filters(sizes, self.J, self.L), paddings)

    def _matrices(self, filters, paddings):
        """All that `call` multiplies by. The image is padded by its matrices; maps are whole."""
        dtype = "float64" if self.compute_dtype == "float64" else "float32"

        def average(resolution, paddings):
            pair = [_averaging(t, 2 ** (self.J - resolution)) for t in filters.lows[resolution]]
            rows, columns = (p.T @ m for p, m in zip(paddings, pair, strict=True))
            return [(rows.T * self.scale).astype(dtype), columns.astype(dtype)]

        def waves(resolution, j, paddings):
            wave = filters.waves[resolution, j]
            return [m.astype(dtype) for m in _wave_matrices(wave, 2 ** (j - resolution), paddings)]

        self._average_of_image = average(0, paddings)
        self._waves_of_image = [waves(0, j, paddings) for j in range(self.J)]
        self._averages, self._waves = [], {}
        for j, low in enumerate(filters.lows):
            whole = [np.eye(len(t)) for t in low]
            self._averages.append(average(j, whole))
            for second in range(j + 1, self.J) if self.max_order == 2 else ():
                self._waves[j, second] = waves(j, second, whole)

    def call(self, x):
        # Rows lead and columns trail, so that both are transformed by one product each, without
        # moving anything; what lies between, examples, channels and angles, is one axis.
        height, width, channels = x.shape[1:]
        x = ops.transpose(ops.cast(x, self.compute_dtype), (1, 0, 3, 2))
        x = ops.reshape(x, (height, -1, width))
        features = [self._average(x, self._average_of_image, (channels, 1))]
        second_order = []
        for j, matrices in enumerate(self._waves_of_image):
            u = self._modulus_of_waves(x, matrices)
            features.append(self._average(u, self._averages[j], (channels, self.L)))
            pairs = []
            for second in range(j + 1, self.J) if self.max_order == 2 else ():
                v = self._modulus_of_waves(u, self._waves[j, second])
                shape = (channels, self.L, 1, self.L)
                pairs.append(self._average(v, self._averages[second], shape))
            if pairs:
                pairs = ops.concatenate(pairs, axis=4)
                shape = (pairs.shape[0], -1, channels, math.prod(pairs.shape[3:6]), pairs.shape[-1])
                second_order.append(ops.reshape(pairs, shape))
        features = ops.concatenate([*features, *second_order], axis=3)
        rows, _, _, k, columns = features.shape
        features = ops.transpose(features, (1, 0, 4, 2, 3))
        return ops.reshape(features, (-1, rows, columns, channels * k))

    def _modulus_of_waves(self, u, matrices):
        """`(rows, N, columns)` to `|u∗ψ|` at all angles, `(rows/s, N·L, columns/s)`."""
        analysis, filters, synthesis = self._tensors(matrices)
        rows, _, columns = u.shape
        frequencies, _, reads, _ = filters.shape
        v = ops.matmul(analysis, ops.reshape(u, (rows, -1)))
        v = ops.reshape(v, (frequencies, reads // columns, -1, columns))
        v = ops.reshape(ops.transpose(v, (0, 2, 1, 3)), (frequencies, 1, -1, reads))
        v = ops.matmul(v, filters)
        v = ops.matmul(synthesis, ops.reshape(v, (2 * frequencies, -1)))
        v = ops.reshape(v, (synthesis.shape[0], -1, 2, filters.shape[-1] // (2 * self.L)))
        return _modulus(v[:, :, 0], v[:, :, 1])

    def _average(self, u, matrices, shape):
        """`(rows, N, columns)` to `u∗φ` at the features' positions, `(rows', -1, *shape,
        columns')`.
        """
        rows, columns = self._tensors(matrices)
        u = ops.matmul(rows, ops.reshape(u, (u.shape[0], -1)))
        u = ops.matmul(ops.reshape(u, (-1, columns.shape[0])), columns)
        return ops.reshape(u, (rows.shape[0], -1, *shape, columns.shape[1]))

    def _tensors(self, matrices):
        return [ops.convert_to_tensor(m, dtype=self.compute_dtype) for m in matrices]

    def compute_output_shape(self, input_shape):
        batch, height, width, channels = input_shape
        step = 2**self.J
        return (batch, -(-height // step), -(-width // step), channels * len(self.paths))

    def bound(self, call: Call) -> Rule:
        return lipschitz()

    def get_config(self) -> dict:
        return {
            **super().get_config(),
            "J": self.J,
            "L": self.L,
            "max_order": self.max_order,
            "padding": self.padding,
        }


def _margins(n, J):
    """Pixels added before and after `n`: one step of the features, and what the last one lacks."""
    step = 2**J
    return step, step + -n % step


def _padding_matrix(n, margins, padding):
    """`(padded, n)`, of zeros and ones."""
    if padding == "zeros":
        return np.eye(n + sum(margins))[:, margins[0] : margins[0] + n]
    return np.eye(n)[np.pad(np.arange(n), margins, mode="reflect")]


def _modulus(re, im):
    squares = ops.square(re) + ops.square(im)
    some = squares > _TINY
    # The root is taken of ones where its slope must vanish: infinity times zero is not zero.
    root = ops.sqrt(ops.where(some, squares, ops.ones_like(squares)))
    return ops.where(some, root, ops.zeros_like(root))


# --- filters, in float64 ----------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
class _Filters:
    """Filters of a padded size.

    Attributes:
        waves: `{(resolution, j): (L, height, width)}`, real transforms of the wavelets of scale
            `j` on the grid that is left of every `2^resolution`-th pixel.
        lows: for each resolution the transforms of `φ` along rows and columns, whose outer
            product is that of `φ`.
    """

    def __init__(self, sizes, J, L):
        self.waves, self.lows = {}, []
        for j in range(J):
            wave = np.stack([_morlet(sizes, j, theta, L) for theta in range(L)])
            for resolution in range(max(j, 1)):
                self.waves[resolution, j] = _fold(_fold(wave, resolution, 1), resolution, 2)
        for resolution in range(J):
            self.lows.append([_fold(_gaussian(n, J), resolution, 0) for n in sizes])


def _tiles(n):
    """Positions on five periods; a filter is summed over them."""
    return np.arange(-2 * n, 3 * n, dtype=float)


def _gaussian(n, J):
    """Transform of one axis of `φ`, a Gaussian of width `0.8·2^(J−1)`."""
    sigma = 0.8 * 2 ** (J - 1)
    window = np.exp(-(_tiles(n) ** 2) / (2 * sigma**2)) / math.sqrt(2 * _PI * sigma**2)
    return np.fft.fft(window.reshape(5, n).sum(0)).real


def _morlet(sizes, j, theta, L):
    """Transform of `g(u)(exp(i·ξᵀu) − β)`, `β` such that its mean is zero.

    `ξ` is `¾π/2^j` long, `g` a Gaussian of width `0.8·2^j` along it and `L/4` times as much across.
    """
    sigma, xi, slant = 0.8 * 2**j, 0.75 * math.pi / 2**j, 4.0 / L
    angle = (int(L / 2 - 1) - theta) * math.pi / L
    rows, columns = np.meshgrid(*map(_tiles, sizes), indexing="ij")
    along = math.cos(angle) * rows + math.sin(angle) * columns
    across = math.cos(angle) * columns - math.sin(angle) * rows
    envelope = np.exp(-(along**2 + (slant * across) ** 2) / (2 * sigma**2))
    envelope *= slant / (2 * _PI * sigma**2)
    gabor, envelope = (
        f.reshape(5, sizes[0], 5, sizes[1]).sum((0, 2))
        for f in (envelope * np.exp(1j * xi * along), envelope)
    )
    return np.fft.fft2(gabor - envelope * (gabor.sum() / envelope.sum())).real


def _fold(transform, resolution, axis):
    """Transform on the grid of every `2^resolution`-th pixel, its upper frequencies cut."""
    if resolution == 0:
        return transform
    n = transform.shape[axis]
    factor = 2**resolution
    start = n // (2 * factor)
    kept = np.ones(n)
    kept[start : start + n - n // factor] = 0.0
    shape = [1] * transform.ndim
    shape[axis] = n
    parts = np.split(transform * kept.reshape(shape), factor, axis=axis)
    return sum(parts)


def _averaging(transform, stride):
    """Matrix `(n, features)` of the circular convolution, sampled; the margins' samples go."""
    n = len(transform)
    kernel = np.fft.ifft(transform).real
    samples = np.arange(stride, n - stride, stride)
    return kernel[(samples[None] - np.arange(n)[:, None]) % n]


def _wave_matrices(wave, stride, paddings):
    """Three matrices whose product convolves with complex filters and keeps every `stride`-th row
    and column: a real Fourier transform of the columns, at each of its frequencies a convolution
    along the rows, and the transform back.

    Real and imaginary parts of a filter are filters of a real map, so that half of the vertical
    frequencies are enough. A frequency of the subsampled map reads all the `stride` frequencies
    of the map that fold onto it.

    Args:
        wave: `(L, n, n')`, the filters' transforms, on the padded grid.
        stride: what divides `n` and `n'`.
        paddings: the matrices `(n, rows)`, `(n', columns)` that pad the map.

    Returns:
        `analysis` `(F·R, rows)` with `F = n/(2·stride) + 1` and `R = 2·stride`, for the real and
        imaginary part of what is read; `filters` `(F, 2, R·columns, L·2·n'/stride)` to the real
        and imaginary part of each, and `synthesis` `(n/stride, 2·F)`.
    """
    angles, n, width = wave.shape
    rows, columns = n // stride, width // stride
    frequencies = np.arange(rows // 2 + 1)
    reads = frequencies[:, None] + rows * np.arange(stride)

    phase = -2 * np.pi / n * np.multiply.outer(reads, np.arange(n))
    analysis = np.stack([np.cos(phase), np.sin(phase)], axis=2) @ paddings[0]

    kernels = np.fft.ifft2(wave)
    kernels = np.fft.fft(np.stack([kernels.real, kernels.imag], axis=1), axis=2)[:, :, reads]
    shifts = (stride * np.arange(columns) - np.arange(width)[:, None]) % width
    kernels = kernels[..., shifts] / stride  # (angles, 2, F, stride, width, columns)
    kernels = np.einsum("apfswc,wx->fsxapc", kernels, paddings[1], optimize=True)
    # Products of complex numbers: the real part reads (re, −im), the imaginary (im, re).
    re, im = kernels.real, kernels.imag
    filters = np.stack([np.stack([re, -im], 2), np.stack([im, re], 2)], 1)
    filters = filters.reshape(len(frequencies), 2, -1, angles * 2 * columns)

    # Frequencies but the first, and the last of an even number, stand for their opposites too.
    counted = np.where((frequencies == 0) | (2 * frequencies == rows), 1.0, 2.0) / rows
    phase = 2 * np.pi / rows * np.multiply.outer(np.arange(rows), frequencies)
    synthesis = np.stack([np.cos(phase) * counted, -np.sin(phase) * counted], axis=2)
    return analysis.reshape(-1, analysis.shape[-1]), filters, synthesis.reshape(rows, -1)


# --- certificate ------------------------------------------------------------------------------


@functools.lru_cache(maxsize=32)
def _certificate(sizes, J, L, max_order):
    """Lipschitz constant of the coefficients as a function of the padded image."""
    filters = _Filters(sizes, J, L)

    def squared(resolution, orders, first):
        """Squared norm of all that is made of a map, with wavelets of scale `first` and above."""
        stage = [(np.multiply.outer(*filters.lows[resolution])[None], 2 ** (J - resolution), 1.0)]
        for j in range(first, J) if orders else ():
            behind = squared(j, orders - 1, j + 1)
            stage.append((filters.waves[resolution, j], 2 ** (j - resolution), behind))
        return _squared_norm(stage, 2 ** (J - resolution))

    return math.sqrt(squared(0, max_order, 0))


def _squared_norm(stage, step):
    """Largest eigenvalue of `Σ weight·AᵀA`, `A` the convolution with a filter, subsampled.

    Subsampling by `s` sums the frequencies that differ by multiples of `n/s`, divided by `s` (in
    the unitary normalisation); so frequencies that differ by multiples of `n/step` make a block,
    if all strides divide `step`. Of a real map the frequencies `w` and `−w` have one modulus, so
    that a complex filter counts half at each.
    """
    height, width = (n // step for n in stage[0][0].shape[1:])
    gram = np.zeros((height, width, *(step,) * 4))
    for bank, stride, weight in stage:
        rest = step // stride
        view = gram.reshape(height, width, *(stride, rest) * 4)
        opposite = np.roll(bank[:, ::-1, ::-1], 1, axis=(1, 2))
        parts = np.concatenate([bank, opposite]) * (math.sqrt(0.5 * weight) / stride)
        parts = parts.reshape(-1, stride, rest, height, stride, rest, width)
        for p, q in itertools.product(range(rest), range(rest)):
            rows = parts[:, :, p, :, :, q].transpose(2, 4, 0, 1, 3)
            rows = rows.reshape(height, width, len(parts), stride**2)
            block = (rows.swapaxes(-1, -2) @ rows).reshape(height, width, *(stride,) * 4)
            view[:, :, :, p, :, q, :, p, :, q] += block
    half = gram[: height // 2 + 1]  # the blocks of w and −w have the same eigenvalues
    return np.linalg.eigvalsh(half.reshape(-1, step**2, step**2)).max()
