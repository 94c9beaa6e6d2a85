"""Discrete Gaussian noise on an integer grid, drawn by the host."""

import math
from typing import Any

import numpy as np
from keras import ops

from lipdp.noise.discrete import discrete_gaussian
from lipdp.noise.gaussian import GaussianNoise

__all__ = ["SecureNoise"]


class SecureNoise(GaussianNoise):
    """Discrete Gaussian noise on a grid, drawn by the host: `PrivateModel(noise="secure")`.

    Floating-point Gaussian noise leaves traces: which of the sums could have led to a result can
    be told from its last bits (Mironov, "On Significance of the Least Significant Bits for
    Differential Privacy", CCS 2012). Here each sum, in units `g` of its grid, is rounded to an
    integer `n`; the noise is an integer `z` with exactly the discrete Gaussian distribution of
    scale `s = 2²⁰` (`lipdp.noise.discrete`), from the operating system's cryptographic generator;
    and `g·(n + z)` is released. `g ≥ std/s`, by less than 2⁻¹³ of it. No rounding but the one to
    `n` is in this; what happens to `n + z` afterwards (its reduction modulo 2³², the product with
    `g`, the optimizer) is post-processing.

    **Sensitivity.** Sums that differ by a vector `v` lead to integers that differ by at most
    `‖v‖/g + c·√d` in norm, over `d` entries: an entry is clamped, at 2²⁹ units (512 stds) or
    more, which moves no two values apart, and rounded, by at most ½ + 2⁻¹³ (`_on_grid`). So with
    stds of multiplier `σ'`, all weights together (`D` entries, each scaled by its own std) have
    the sensitivity `s·(1/σ' + c·√D/s)`, by Minkowski's inequality.

    **Accounting.** Up to a factor that no number can tell from 1, `n + z` is a post-processing of
    `x ~ N(n, s² − r²)` with `r = 8`: round `x` to the integer `k` with probability proportional
    to `exp(−(k − x)²/2r²)`. For `exp(−(x − n)²/2(s² − r²))·exp(−(k − x)²/2r²)` is
    `exp(−(k − n)²/2s²)` times a Gaussian density in `x` whose integral is the same for all `k`;
    and the sum over `k` that normalises the rounding is `r·√2π·(1 + 2·Σ_j cos(2πjx)·exp(−2π²r²j²))`
    by Poisson's formula: constant up to a factor `1 ± 10⁻⁵⁴⁷`. Even 10³⁰ entries over all steps
    multiply the probabilities of the whole training by `1 ± 10⁻⁵¹⁶`, and so ε and δ change by less
    than any float64 can show. Hence the Gaussian mechanism of multiplier `σ` is what is released,
    under sampling and adaptive composition too, if

        `1/σ' = √(1 − r²/s²)/σ − c·√D/s`.

    What that costs: at `σ = 1`, 0.12 % more noise for 1.6 million weights.

    Rounded sums are no sums of contributions any more, but what one example can change, given all
    others, is bounded as before, and the accountants use nothing else. The count of an adaptive
    clip is a release of one entry, with a `σ` and a grid of its own.

    **Not covered**: the float32 arithmetic before the rounding. That one example's gradient is
    within its bound holds up to float32's relative error; and the sum over all others rounds
    differently with it and without (Casacuberta et al., "Widespread Underestimation of Sensitivity
    in Differentially Private Libraries and How to Fix It", CCS 2022). For `B` rows that is about
    `√B·2⁻²⁴` of the sum's norm or less (6·10⁻⁶ of Δ was measured for 256 nearly parallel gradients
    of a convolutional network); a bound for the worst case would grow as `B²·2⁻²³·Δ`, and none is
    charged. Nor is anything said of the time that a step takes. Which examples are drawn is decided
    by NumPy's Philox generator, which is no cryptographic one, under a fresh key from the operating
    system for each draw; none of its output is released.

    >>> noise = SecureNoise()
    >>> round(noise.multiplier(1.0, 1_600_000), 6)
    1.001208
    >>> noise.draw(3).dtype
    dtype('int32')
    """

    #: `s`, in units of the grid.
    scale = 2**20
    _rounding = 1 + 2**-12  # c
    _smoothing = 8  # r

    def multiplier(self, noise_multiplier: float, entries: int) -> float:
        """`σ'` of the class' docstring.

        Raises:
            ValueError: without noise, or where the grid is too coarse for so much of it.
        """
        if noise_multiplier == 0:
            raise ValueError("noise='secure' needs a noise multiplier above 0; got 0.")
        accounted = math.sqrt(1 - (self._smoothing / self.scale) ** 2) / noise_multiplier
        left = accounted - self._rounding * math.sqrt(entries) / self.scale
        if not left > 0:
            most = accounted * noise_multiplier * self.scale / self._rounding / math.sqrt(entries)
            raise ValueError(
                f"noise='secure' reaches noise multipliers below {most:.4g} for {entries} entries, "
                f"beyond which rounding alone moves the sums too far; got {noise_multiplier:.4g}. "
                "Use noise='gaussian', a smaller network or smaller batches."
            )
        return 1 / left

    def draw(self, entries: int) -> np.ndarray:
        """int32 `(entries,)`: discrete Gaussians, modulo 2³²."""
        return discrete_gaussian(entries, self.scale).astype(np.int32)

    def add(self, backend: Any, features: dict, sums: list, stds: list) -> list:
        """As in `GaussianNoise`, with the noise that the batch carries."""
        noisy, start = [], 0
        for total, std in zip(sums, stds, strict=True):
            end = start + math.prod(total.shape)
            noise = ops.reshape(features["noise"][start:end], tuple(total.shape))
            std = ops.convert_to_tensor(std, "float32")
            noisy.append(backend.compiled(_on_grid)(total, noise, std))
            start = end
        return noisy


def _on_grid(total, noise, std):
    """`g·(n + noise)` for the smallest grids `g ≥ std/2²⁰` of 14 bits.

    `g = 2^(q+15)/k` for an integer `k` of at most 15 bits. In units of 2^q, float32 gives the sum
    exactly; `total/g` is that number times `k/2¹⁵`, in integers of 32 bits: with parts of 15 bits,
    `x = 2¹⁵·high + low + fraction/2¹⁵`. Each part that is cut moves the result by 2⁻¹⁵ at most,
    the rounding at the end by ½.
    """
    # Where nothing can move a sum, a noise of next to nothing does no harm. NaN stays.
    std = ops.where(std < 2.0**-80, 2.0**-80, std)
    bits = ops.bitwise_and(ops.view(std * 2.0**-20, "int32"), 0x7F800000)
    power, inverse = ops.view(bits, "float32"), ops.view((254 << 23) - bits, "float32")
    ratio = power / (std * 2.0**-20)  # in (½, 1]
    k = ops.cast(ops.floor(ratio * (2.0**15 * (1 - 2.0**-20))), "int32")

    x = ops.clip(total * inverse, -(2.0**30), 2.0**30)
    x = ops.where(ops.isnan(x), 0.0, x)
    whole = ops.floor(x)
    fraction = ops.cast((x - whole) * 2.0**15, "int32")
    whole = ops.cast(whole, "int32")
    high, low = ops.right_shift(whole, 15), ops.bitwise_and(whole, 2**15 - 1)
    low = low * k + ops.right_shift(fraction * k, 15)
    n = high * k + ops.right_shift(low + 2**14, 15)
    grid = power / ops.cast(k, "float32") * 2.0**15
    grid = ops.where(ops.isfinite(std), grid, math.nan)
    return ops.cast(n + noise, "float32") * grid
