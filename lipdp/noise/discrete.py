"""The discrete Gaussian on the integers, sampled exactly, with bits of the operating system."""

import decimal
import functools
import os
from collections.abc import Callable
from fractions import Fraction

import numpy as np

__all__ = ["discrete_gaussian", "system_words"]

# Of the 64 bits of a proposal: 16 choose a block, 1 the sign, some the place within the block,
# the rest begin the uniform number that decides whether it is accepted.
_BLOCK_BITS = 16
_AFTER_SIGN = 64 - _BLOCK_BITS - 1
# Magnitudes up to so many scales have blocks of their own; what lies beyond is one tail.
_REACH = 8
# Proposals at a time: their arrays fit a core's cache.
_CHUNK = 2**15
# NumPy's `exp`, and the few operations around it, are wrong by about 2^-50 at most, relatively.
_FLOAT_ERROR = 2.0**-40


def system_words(count: int) -> np.ndarray:
    """`count` random uint64 from the operating system's cryptographic generator."""
    return np.frombuffer(os.urandom(8 * count), np.uint64)


def discrete_gaussian(
    count: int, scale: int, words: Callable[[int], np.ndarray] = system_words
) -> np.ndarray:
    """Independent integers `z`, each with probability `exp(−z²/2s²) / Σ_k exp(−k²/2s²)`, exactly.

    No rounding error is in their distribution, and no cut of its tails. Rejection sampling with
    dyadic proposals: magnitudes `m ≥ 0` lie in blocks of a power of two `B`, of `B ≤ max(1, s/16)`.
    16 random bits choose block `j` with probability `n_j/2¹⁶`, for integers
    `n_j ≥ A·exp(−(jB)²/2s²)`; a bit makes it `z = m` or `z = −1−m` (so that 0 comes once), further
    bits choose the place within the block. A proposal is accepted with probability
    `A·exp(−z²/2s²)/n_j`, at most 1 because `|z| ≥ jB`: each `z` then comes with the probability
    `A·exp(−z²/2s²)/(2¹⁷·B)`. One of the 2¹⁶ choices stands for the tail beyond `8s`, where the
    place is geometric (½ for each further stretch of a power of two `W ≥ s`) and uniform within
    its stretch `g`; accepted with `A·exp(−z²/2s²)·2^(g+1)·W/B`, it comes with the same
    probability. (That is at most 1: `A < 2¹⁶`, `W/B < 64` and `|z| ≥ (8 + g)·s`.)

    "With probability `p`" means that a uniform real number is below `p`, whose first bits are the
    rest of the 64. Where they and a float64 value of `p`, with its error, do not settle it (about
    once in 2³⁰), interval arithmetic of growing precision and further bits do.

    Args:
        count: how many.
        scale: `s`, an integer from 1 to 2²⁴.
        words: gives random uint64; by default the operating system's.

    Returns:
        int64 `(count,)`.

    Raises:
        ValueError: a scale out of range.

    >>> z = discrete_gaussian(100_000, 1000)
    >>> bool(abs(z.mean()) < 30), bool(abs(z.std() - 1000) < 20)
    (True, True)
    """
    if isinstance(scale, bool) or not isinstance(scale, int) or not 1 <= scale <= 2**24:
        raise ValueError(f"`scale` must be an integer from 1 to 2**24; got {scale!r}.")
    proposals = _Proposals.of(scale)
    drawn = np.empty(count, np.int64)
    done = 0
    while done < count:
        # Which are accepted does not depend on how many are wanted: the first ones are as good.
        wanted = count - done
        accepted = proposals.accepted(words(min(_CHUNK, wanted + wanted // 8 + 8)), words)[:wanted]
        drawn[done : done + len(accepted)] = accepted
        done += len(accepted)
    return drawn


class _Proposals:
    """The proposals of one scale; names as in `discrete_gaussian`."""

    def __init__(self, scale):
        self.scale = scale
        self.block_bits = max(0, scale.bit_length() - 5)
        self.rest = _AFTER_SIGN - self.block_bits
        self.blocks = -(-(_REACH * scale) >> self.block_bits)
        edges = np.arange(self.blocks) * 2.0**self.block_bits
        heights = np.exp(-0.5 * (edges / scale) ** 2) * (1 + 1e-9)
        choices = 2**_BLOCK_BITS
        self.height = int((choices - self.blocks - 2) / heights.sum())
        self.numbers = np.ceil(self.height * heights).astype(np.int64)
        self.numbers[0] += choices - 1 - self.numbers.sum()
        self.block_of = np.repeat(
            np.arange(self.blocks + 1, dtype=np.uint16), [*self.numbers, 1]
        ).astype(np.uint16)
        # In units of the last of the bits that are compared; NaN for the tail.
        self.ratios = np.append(2.0**self.rest * self.height / self.numbers, np.nan)

    @classmethod
    @functools.cache
    def of(cls, scale):
        return cls(scale)

    def accepted(self, proposed, words):
        """Those of the proposals that are accepted, in their order."""
        blocks = self.block_of[proposed >> np.uint64(64 - _BLOCK_BITS)]
        z = (proposed >> np.uint64(self.rest)).view(np.int64)
        z &= (1 << self.block_bits) - 1
        z += blocks.astype(np.int64) << self.block_bits
        z ^= (proposed.view(np.int64) << _BLOCK_BITS) >> 63
        exponents = z.astype(np.float64)
        exponents *= exponents
        exponents *= -0.5 / self.scale**2
        gaps = np.exp(exponents, out=exponents)
        gaps *= self.ratios[blocks]
        gaps -= (proposed & np.uint64(2**self.rest - 1)).astype(np.float64)
        gaps -= 0.5
        accepted = gaps > 0
        undecided = 0.5 + 2 * _FLOAT_ERROR * 2.0**self.rest
        for i in np.flatnonzero(~(np.abs(gaps, out=gaps) > undecided)):
            if blocks[i] == self.blocks:
                z[i], accepted[i] = self._tail(z[i] < 0, words)
            else:
                ratio = Fraction(self.height, int(self.numbers[blocks[i]]))
                bits = int(proposed[i]) & (2**self.rest - 1)
                accepted[i] = _is_below(bits, self.rest, ratio, int(z[i]), self.scale, words)
        return z[accepted]

    def _tail(self, negative, words):
        """A proposal of the tail, and whether it is accepted."""
        stretch = 0
        while int(words(1)[0]) & 1:
            stretch += 1
        width = 1 << (self.scale - 1).bit_length()
        place = int(words(1)[0]) & (width - 1)
        magnitude = (self.blocks << self.block_bits) + stretch * width + place
        z = -1 - magnitude if negative else magnitude
        ratio = Fraction(self.height * width * 2 ** (stretch + 1), 2**self.block_bits)
        return z, _is_below(0, 0, ratio, z, self.scale, words)


def _is_below(bits, length, ratio, z, scale, words):
    """Whether a uniform real number whose first `length` bits are `bits` is below
    `ratio·exp(−z²/2s²)`; its further bits are drawn as far as they matter.
    """
    exponent = Fraction(-z * z, 2 * scale * scale)
    digits = 40
    while True:
        context = decimal.Context(digits, Emin=decimal.MIN_EMIN, Emax=decimal.MAX_EMAX)
        rounded = context.divide(decimal.Decimal(exponent.numerator), exponent.denominator)
        # `exp` is rounded correctly; the rounding of its argument is the larger error.
        value = Fraction(context.exp(rounded)) * ratio
        error = value * (2 - exponent) / 10 ** (digits - 1)
        if Fraction(bits + 1, 2**length) <= value - error:
            return True
        if Fraction(bits, 2**length) >= value + error:
            return False
        bits, length = (bits << 64) | int(words(1)[0]), length + 64
        digits += 20
