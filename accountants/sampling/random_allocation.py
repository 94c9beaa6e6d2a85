"""Random allocation of the examples to the steps of an epoch, with its release."""

import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np

from accountants.numerics import (
    ORDERS,
    WIDTH,
    cell_masses,
    sampled_scale,
    self_convolve,
    spread_over_grid,
)
from accountants.releases import Gaussian, Release, gaussian_release
from accountants.sampling.base import RELATIONS, Relation, Sampling, distance, setting
from accountants.sampling.draws import Draw, assigned_parts
from accountants.validation import check_integer

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

# Balls in bins need sums of exp(N(0, 1 / σ²)) on a grid. Its range explodes for small noise: well
# above this Rényi divergences are tighter, and below it nothing is amplified.
_LEAST_NOISE = 0.2
_MOST_RATIOS = 2**18


@dataclasses.dataclass(frozen=True)
class RandomAllocation(Sampling):
    """Balls in bins: each epoch, every example falls into one of its steps, uniformly.

    Its batches vary in size as Poisson ones do, but no example is left out of an epoch or drawn
    twice. An epoch is one release, accounted by `BallsInBinsRelease` for add/remove and zero-out.
    Under replace-one no amplification is claimed: given the step, two contributions in it differ
    by at most 2.

    The loader: at the start of every epoch give each example a step in {0, ..., steps - 1},
    uniformly and independently of all else, and keep the steps in secret. Step i takes the
    examples that were given it, also if there are none. A permutation cut into pieces is not this
    scheme: it is `ShuffledEpochs`.

    An epoch that has begun is charged whole, and a run begins with a new epoch.

    >>> sampling = RandomAllocation(steps=40)
    >>> sampling.expected_batch_size(10_000), sampling.participations(10_000, steps=81)
    (250.0, 3)

    Args:
        steps: the number of steps of an epoch, a positive integer.

    Raises:
        TypeError, ValueError: `steps` is no positive integer.
    """

    steps: int = dataclasses.field(
        metadata=setting(
            "Steps of an epoch of random_allocation.", example=10, flag="steps_per_epoch"
        )
    )

    scheme = "random_allocation"
    relations = RELATIONS
    varying_size = True
    fixed_epoch = True
    rate = "one an epoch"

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", check_integer(self.steps, "steps"))

    def rows(self, draw: Draw) -> np.ndarray:
        steps = draw.once_per_epoch(
            lambda generator: assigned_parts(generator, draw.num_examples, self.steps)
        )
        return np.flatnonzero(steps == draw.index)

    def validate(self, num_examples: int) -> None:
        check_integer(num_examples, "num_examples")

    def expected_batch_size(self, num_examples: int) -> float:
        self.validate(num_examples)
        return num_examples / self.steps

    def steps_per_epoch(self, num_examples: int) -> int:
        self.validate(num_examples)
        return self.steps

    def sampling_probability(self, num_examples: int) -> float:
        """1: an epoch is one release, and every example takes part in it."""
        self.validate(num_examples)
        return 1.0

    def participations(self, num_examples: int, steps: int) -> int:
        self.validate(num_examples)
        return -(-steps // self.steps)

    def release(self, noise_multiplier: float, num_examples: int, relation: Relation) -> Release:
        if relation == "replace_one":
            return gaussian_release(noise_multiplier, distance(relation))
        if self.steps == 1 or noise_multiplier < _LEAST_NOISE:
            return gaussian_release(noise_multiplier, 1.0)
        return BallsInBinsRelease(self.steps, noise_multiplier)


@dataclasses.dataclass(frozen=True)
class BallsInBinsRelease(Release):
    """A whole epoch: the mean of N(eᵢ, σ²I) over i = 1 ... t and N(0, σ²I), both ways.

    The example falls into one of t steps. That the pair dominates, for add/remove and zero-out
    (Chua et al. 2025; Feldman and Shenfeld 2025): fix the bins of all others. From y ~ N(eᵢ, σ²I)
    or N(0, σ²I) the epoch can be simulated step by step: when step j would let the example
    contribute the vector u, which may depend on all outcomes before, publish the others' sum, plus
    y_j u, plus Gaussian noise that completes the covariance to σ²I.

    The likelihood ratio is the mean of t independent ratios of N(1, σ²) to N(0, σ²). Each is
    replaced by Connect-the-Dots on equally spaced *ratios*: a pair that dominates it (it has its
    delta at every dot and more between), hence so does their product. The sums of such ratios are
    multiples of the spacing, and their distribution is a convolution.
    """

    bins: int
    noise_multiplier: float

    source = "Chua et al. 2025; Feldman and Shenfeld 2025"

    def unsampled(self) -> Gaussian:
        return gaussian_release(self.noise_multiplier, 1.0)

    def scale(self) -> tuple[float, float]:
        spread, reach = sampled_scale(1 / self.bins, self.noise_multiplier)
        return math.sqrt(self.bins) * spread, reach

    def pld(self, grid: float) -> "PrivacyLossDistribution":
        from dp_accounting.pld import privacy_loss_distribution

        losses, blank, drawn, lost = self._sums()
        return privacy_loss_distribution.PrivacyLossDistribution(
            spread_over_grid(losses, drawn, lost, grid),
            spread_over_grid(-losses[::-1], blank[::-1], lost, grid),
        )

    def _sums(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
        """Losses, their mass without and with the example, and what is lost of either."""
        from scipy import signal, special

        sigma, bins = self.noise_multiplier, self.bins
        middle, spread = 0.5 / sigma**2, math.sqrt(math.expm1(1 / sigma**2))
        # What lies above the highest ratio is lost: less of it, the finer the spacing can be.
        reach = min(max(5.5, sigma * (math.log(spread * _MOST_RATIOS / 4) - middle)), 7.5)
        low, high = math.exp(-WIDTH / sigma - middle), math.exp(reach / sigma + middle)
        spacing = max(spread / 16, (high - low) / _MOST_RATIOS)
        ratios = low + spacing * np.arange(math.ceil((high - low) / spacing) + 1)
        # Where the ratio is r, the noise is at σ log r + 1 / 2σ in units of its deviation.
        edges = sigma * np.log(ratios) + 0.5 / sigma
        without, within = (cell_masses(special.ndtr, z) for z in (edges, edges - 1 / sigma))
        up = np.clip((within - ratios[:-1] * without) / spacing, 0.0, without)
        blank = np.zeros(len(ratios))
        blank[1:] += up
        blank[:-1] += without - up
        # Below the lowest ratio all goes to 0, which is lost, or up to it; above, to infinity.
        blank[0] += special.ndtr(edges[0] - 1 / sigma) / low
        blank[-1] += special.ndtr(-edges[-1])
        lost = special.ndtr(1 / sigma - edges[-1]) + bins * special.ndtr(edges[0])
        tail = 1e-15
        first, others = self_convolve(blank, bins - 1, tail)
        undrawn, drawn = (
            np.maximum(signal.fftconvolve(others, one), 0.0) for one in (blank, blank * ratios)
        )
        # The transforms round at the scale of 1e-16, raised to a power.
        lost += 2 * tail + 1e-14 + 2e-16 * bins
        sums = bins * low + spacing * (first + np.arange(len(drawn)))
        return np.log(sums / bins), undrawn, drawn, lost

    def rdp(self) -> np.ndarray:
        """Upper bounds: exact for P ‖ Q at whole orders, by Jensen's inequality for Q ‖ P.

        At a whole order a, E_Q[(Σ Lᵢ / t)^a] is a! / t^a times the coefficient of z^a in
        (Σ_k exp(k (k-1) / 2σ²) z^k / k!)^t. For Q ‖ P the mean of the ratios is at least their
        geometric mean, whence a divergence of at most (1 + (a-1) / t) / 2σ² (Feldman and Shenfeld
        2025 have both). Neither exceeds that of an unsampled release, a / 2σ².
        """
        from scipy import special

        unsampled = ORDERS / (2 * self.noise_multiplier**2)
        most = 256
        power = np.arange(most + 1.0)
        series = power * (power - 1) / (2 * self.noise_multiplier**2) - special.gammaln(power + 1)
        series -= power * math.log(self.bins)
        moments = _log_series_power(series, self.bins) + special.gammaln(power + 1)
        remove = np.full(len(ORDERS), np.inf)
        small = most >= ORDERS
        # (a-1) D_a is convex in a and 0 at 1: between whole orders the chord bounds it.
        moments[1] = 0.0
        remove[small] = np.interp(ORDERS[small], power[1:], moments[1:]) / (ORDERS[small] - 1)
        add = (1 + (ORDERS - 1) / self.bins) / (2 * self.noise_multiplier**2)
        return np.minimum(np.maximum(remove, add), unsampled)


def _log_series_power(series: np.ndarray, power: int) -> np.ndarray:
    """The logarithms of the first coefficients of a power series of positive terms, to a power."""
    result = np.full(len(series), -np.inf)
    result[0] = 0.0
    while power:
        if power & 1:
            result = _log_multiply(result, series)
        series, power = _log_multiply(series, series), power >> 1
    return result


def _log_multiply(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The logarithms of the first coefficients of the product of two such series."""
    size = len(left)
    sums = np.full((size, size), -np.inf)
    for shift in range(size):
        sums[shift:, shift] = left[: size - shift] + right[shift]
    highest = sums.max(axis=1)
    highest = np.where(np.isfinite(highest), highest, 0.0)
    with np.errstate(divide="ignore"):
        return highest + np.log(np.exp(sums - highest[:, None]).sum(axis=1))
