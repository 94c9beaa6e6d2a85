"""Numerical tools that releases share: privacy losses on a grid, and Rényi divergences.

dp_accounting and scipy are imported where they are needed, so that importing `accountants` is fast.
"""

import functools
import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import dp_accounting
    from dp_accounting.pld.pld_pmf import PLDPmf
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

# The orders at which Rényi divergences are evaluated.
ORDERS = np.array([1 + x / 10 for x in range(1, 100)] + [*range(11, 64), 128, 256, 512, 1024])

# Mass beyond nine standard deviations of the noise counts as lost: less than what rounds.
WIDTH = 9.0
LOG_TAIL = -40.0
# Below such noise the formulas overflow, and subsampling protects next to nothing.
LEAST_NOISE = 0.05


def sampled_scale(
    probability: float, noise_multiplier: float, width: float = WIDTH
) -> tuple[float, float]:
    """The root of the chi-square divergence, and the loss at `width` standard deviations."""
    exponent = width / noise_multiplier + 0.5 / noise_multiplier**2
    reach = math.log1p(probability * math.expm1(min(exponent, 600.0)))
    chi = probability * math.sqrt(math.expm1(min(noise_multiplier**-2, 600.0)))
    return min(chi, reach), reach


def sampled_gaussian_pld(
    probability: float, noise_multiplier: float, grid: float, replace: bool
) -> "PrivacyLossDistribution":
    """The losses of Poisson sampling, as dp_accounting has them."""
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        noise_multiplier,
        value_discretization_interval=grid,
        log_mass_truncation_bound=LOG_TAIL,
        sampling_prob=probability,
        neighboring_relation=(
            NeighboringRelation.REPLACE_ONE if replace else NeighboringRelation.ADD_OR_REMOVE_ONE
        ),
    )


def event_rdp(event: "dp_accounting.DpEvent", relation: str = "ADD_OR_REMOVE_ONE") -> np.ndarray:
    """The Rényi divergences at `ORDERS` of an event, as dp_accounting has them."""
    from dp_accounting import NeighboringRelation, rdp

    accountant = rdp.RdpAccountant(ORDERS, NeighboringRelation[relation])
    return np.maximum(accountant.compose(event).rdp, 0.0)


@functools.lru_cache(maxsize=64)
def without_replacement_rdp(probability: float, noise_multiplier: float) -> np.ndarray:
    """Rényi divergences of sampling without replacement, for noise over the *distance* 2.

    Wang, Balle and Kasiviswanathan 2019, Theorem 27. It bounds (1-q) A + q B against
    (1-q) A + q B' for any A, B, B' that are pairwise no further apart than the Gaussians of the
    theorem. That covers sampling without replacement, and the Poisson pair of replace-one, with
    A = N(0, σ²), B = N(1, σ²), B' = N(-1, σ²). dp_accounting measures the noise of this event in
    the distance, without doubling.
    """
    import dp_accounting

    # The event only ever takes the quotient of its sizes.
    event = dp_accounting.SampledWithoutReplacementDpEvent(
        1, probability, dp_accounting.GaussianDpEvent(noise_multiplier)
    )
    return np.minimum(
        event_rdp(event, "REPLACE_ONE"), ORDERS / (2 * noise_multiplier * noise_multiplier)
    )


def cell_masses(cdf: "np.ufunc", edges: np.ndarray) -> np.ndarray:
    """The masses between neighbouring edges, to relative precision in both tails."""
    left, right = edges[:-1], edges[1:]
    flip = left > 0
    return np.where(flip, cdf(-left) - cdf(-right), cdf(right) - cdf(left))


def self_convolve(masses: np.ndarray, times: int, tail: float) -> tuple[int, np.ndarray]:
    """The distribution of a sum of equal variables on 0, 1, ..., and where it begins.

    Sums that are left out have a mass of at most `tail` (Chernoff's bound at some orders), and are
    wrapped into the rest by the transform.
    """
    from scipy import fft

    if times == 1:
        return 0, masses
    places = np.arange(len(masses))
    mean = masses @ places / masses.sum()
    deviation = math.sqrt(masses @ (places - mean) ** 2 * times)
    low, high = 0, (len(masses) - 1) * times
    # Orders that would suit a Gaussian sum, and orders that suit the heaviest tails.
    gaussian = math.sqrt(2 * math.log(2 / tail)) / deviation
    for order in (*gaussian * 2.0 ** np.arange(-3, 2), *5.0 * 2.0 ** np.arange(7) / len(masses)):
        for sign in (1, -1):
            exponents = sign * order * (places - mean)
            if exponents.max() > 600.0:
                continue
            log_moment = math.log(masses @ np.exp(exponents))
            distance = (times * log_moment + math.log(2 / tail)) / order
            if sign > 0:
                high = min(high, math.ceil(times * mean + distance))
            else:
                low = max(low, math.floor(times * mean - distance))
    size = fft.next_fast_len(max(high - low + 1, len(masses)), real=True)
    sums = fft.irfft(fft.rfft(masses, size) ** times, size)
    return low, np.maximum(np.roll(sums, -low)[: high - low + 1], 0.0)


def spread_over_grid(losses: np.ndarray, masses: np.ndarray, lost: float, grid: float) -> "PLDPmf":
    """Finite losses, rounded to a grid so that the result dominates; `lost` is infinite loss.

    Each mass is split between its neighbours on the grid so that its mass under the second
    distribution, exp(-loss) times as much, is kept too: Connect-the-Dots of that point.
    """
    from dp_accounting.pld import pld_pmf

    kept = np.flatnonzero(masses > 1e-25)
    lost += float(np.delete(masses, kept).sum())
    losses, masses = losses[kept], masses[kept]
    cells = np.floor(losses / grid).astype(np.int64)
    above = np.clip(losses - cells * grid, 0.0, grid)
    share = np.exp(grid - above) * np.expm1(above) / np.expm1(grid)
    up = masses * np.minimum(share, 1.0)
    lowest = int(cells[0])
    size = int(cells[-1]) - lowest + 2
    probs = np.bincount(cells - lowest, masses - up, size)
    probs += np.bincount(cells - lowest + 1, up, size)
    return pld_pmf.DensePLDPmf(grid, lowest, probs, min(lost, 1.0), True)


def renyi_pld(divergences: np.ndarray, grid: float) -> "PrivacyLossDistribution":
    """Losses, on multiples of `grid`, that dominate whatever has these Rényi divergences at most.

    Proposition 12 of Canonne, Kamath and Steinke 2020 turns each of them into a bound on the
    hockey-stick divergence H(e^ε), for both directions. H is a convex function, so it lies below
    the largest convex function below these bounds, and a convex function that falls from 1 and
    stays above 1 - e^ε is that of a pair of distributions (Zhu, Dong and Wang 2022, Proposition
    8). Between grid points a chord is above, and chords are what losses on the grid have
    (Doroshenko et al. 2022).
    """
    from dp_accounting.pld import pld_pmf, privacy_loss_distribution

    finite = np.isfinite(divergences)
    if not finite.any():
        raise ValueError("without a finite Rényi divergence there is nothing to bound.")
    orders, divergences = ORDERS[finite], divergences[finite]

    def bound(epsilons: np.ndarray) -> np.ndarray:
        found = np.ones(len(epsilons))
        for order, divergence in zip(orders, divergences, strict=True):
            exponent = (order - 1) * (divergence - epsilons + math.log1p(-1 / order))
            np.minimum(found, np.exp(np.minimum(exponent - math.log(order), 0.0)), out=found)
        return found

    # Beyond this, what is left counts as lost.
    tail = math.log(1e-15)
    top = np.min(divergences + np.log1p(-1 / orders) - (tail + np.log(orders)) / (orders - 1))
    # On a grid that is much finer than the losses spread, differences would be rounding.
    stride = max(1, int(np.sqrt(2 * np.min(divergences / orders)) / (32 * grid)))
    size = max(1, math.ceil(max(top, 0.0) / (stride * grid)))
    positive = stride * grid * np.arange(size + 1)
    above = bound(positive)
    # Of the other direction: H(1 / a) = 1 - 1 / a + H'(a) / a.
    below = -np.expm1(-positive[:0:-1]) + np.exp(-positive[:0:-1]) * above[:0:-1]
    ratios = np.exp(np.concatenate([-positive[:0:-1], positive]))
    heights = _convex(ratios, np.concatenate([below, above]))
    # Masses are what the slope changes by; beyond the last point what is left stays. Both
    # directions are alike, so a loss of -ε has exp(-ε) times the mass of ε, and 0 has the rest.
    slopes = np.diff(heights[size:]) / np.diff(ratios[size:])
    masses = np.maximum(np.diff(slopes, append=0.0), 0.0) * ratios[size + 1 :]
    mirrored = (masses * np.exp(-positive[1:]))[::-1]
    lost = min(1.0, heights[-1] + 4e-16 * len(ratios))
    rest = max(0.0, 1.0 - lost - masses.sum() - mirrored.sum())
    found = np.zeros(2 * stride * size + 1)
    found[::stride] = [*mirrored, rest, *masses]
    pmf = pld_pmf.DensePLDPmf(grid, -stride * size, found, lost, True)
    return privacy_loss_distribution.PrivacyLossDistribution(pmf)


def _convex(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The largest convex values below y that start, at x = 0, from 1."""
    hull = [(0.0, 1.0)]
    for point in zip(x.tolist(), y.tolist(), strict=True):
        while len(hull) > 1:
            (ax, ay), (bx, by) = hull[-2:]
            if (by - ay) * (point[0] - bx) <= (point[1] - by) * (bx - ax):
                break
            hull.pop()
        hull.append(point)
    hx, hy = np.array(hull).T
    return np.interp(x, hx, hy)
