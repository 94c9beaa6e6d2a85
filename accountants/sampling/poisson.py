"""Poisson sampling, with its releases: for one example and for a group."""

import dataclasses
import functools
import math
from typing import TYPE_CHECKING

import numpy as np

from accountants.numerics import (
    LEAST_NOISE,
    WIDTH,
    cell_masses,
    event_rdp,
    sampled_gaussian_pld,
    sampled_scale,
    spread_over_grid,
    without_replacement_rdp,
)
from accountants.releases import Release, gaussian_release
from accountants.sampling.base import (
    BATCH_SIZE,
    RELATIONS,
    IndependentSteps,
    Relation,
    positive_number,
)
from accountants.sampling.draws import Draw, distinct_rows

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

# Numbers of examples of a group, drawn together, that are as rare as this count as infinite loss.
_RARE = 1e-18


@dataclasses.dataclass(frozen=True)
class PoissonSampling(IndependentSteps):
    """Each example enters each step by its own coin: probability batch_size / num_examples.

    Realised batches vary in size and may be empty. This is the scheme of DP-SGD (Abadi et al.
    2016), whose amplification is accounted exactly by `PoissonRelease`.

    The loader: in every step draw Binomial(n, batch_size / n) distinct examples, or toss n coins,
    independently of all other steps; take the step also when none was drawn.

    >>> sampling = PoissonSampling(batch_size=256)
    >>> sampling.sampling_probability(1024), sampling.steps_per_epoch(1000)
    (0.25, 4)

    Args:
        batch_size: the *expected* number of examples of a batch, a positive number.

    Raises:
        TypeError, ValueError: `batch_size` is no positive finite number.
    """

    batch_size: float = dataclasses.field(metadata=BATCH_SIZE)

    scheme = "poisson"
    relations = RELATIONS
    varying_size = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "batch_size", positive_number(self.batch_size, "batch_size"))

    def rows(self, draw: Draw) -> np.ndarray:
        # A binomial number of distinct examples is what n independent coins give.
        probability = self.sampling_probability(draw.num_examples)
        return distinct_rows(draw, draw.generator.binomial(draw.num_examples, probability))

    def release(self, noise_multiplier: float, num_examples: int, relation: Relation) -> Release:
        probability = self.sampling_probability(num_examples)
        return poisson_release(probability, noise_multiplier, relation == "replace_one")

    def group_release(
        self, noise_multiplier: float, num_examples: int, relation: Relation, size: int
    ) -> Release | None:
        if relation == "replace_one":
            return None
        probability = self.sampling_probability(num_examples)
        release = PoissonGroupRelease(probability, noise_multiplier, size)
        if probability == 1.0 or noise_multiplier < release.counts[-1] * LEAST_NOISE:
            return gaussian_release(noise_multiplier, float(size))
        return release


@dataclasses.dataclass(frozen=True)
class PoissonRelease(Release):
    """(1-q) N(0, σ²) + q N(1, σ²) and N(0, σ²), both ways; under replace-one with N(-1, σ²) too.

    Add/remove and zero-out: Zhu, Dong and Wang 2022, Theorem 11.

    Replace-one: the pair (1-q) N(0, σ²) + q N(1, σ²) and (1-q) N(0, σ²) + q N(-1, σ²) dominates
    that of any two contributions g, g' of at most unit norm. For the set E on which the
    likelihood ratio exceeds α >= 1 is {x : c₀ exp(-g·x) + c₁ exp((g'-g)·x) <= q}; turn g' away
    from g, and E loses mass under N(g', σ²), since mirroring a point of E that lies ahead in the
    direction of the turn gives a point of E behind. So g' is opposite to g; on that line E is a
    half-line, and the norms are best at 1. The pair is its own mirror image, which covers α < 1.
    """

    probability: float
    noise_multiplier: float
    replace: bool

    source = "Zhu, Dong and Wang 2022, Theorem 11; Mironov, Talwar and Zhang 2019"

    def scale(self) -> tuple[float, float]:
        spread, reach = sampled_scale(self.probability, self.noise_multiplier)
        factor = 2.0 if self.replace else 1.0
        return factor * spread, factor * reach

    def pld(self, grid: float) -> "PrivacyLossDistribution":
        return sampled_gaussian_pld(self.probability, self.noise_multiplier, grid, self.replace)

    def rdp(self) -> np.ndarray:
        import dp_accounting

        if self.replace:
            return without_replacement_rdp(self.probability, self.noise_multiplier / 2)
        gaussian = dp_accounting.GaussianDpEvent(self.noise_multiplier)
        return event_rdp(dp_accounting.PoissonSampledDpEvent(self.probability, gaussian))


@dataclasses.dataclass(frozen=True)
class PoissonGroupRelease(Release):
    """Σ_j Bin(k, q)(j) N(j, σ²) and N(0, σ²), both ways: Poisson sampling for k examples.

    How many of the k are drawn is binomial, and as many move the sum by at most their number
    (Ganesh 2024: this mixture of Gaussians dominates, for add/remove and zero-out).

    Numbers of a mass t in all, far out on either side, are left out. With P the mixture, R what is
    left of it, of mass 1 - t, and Q the other distribution: from P to Q, H(P‖Q) <= (1-t)
    H(R/(1-t)‖Q) + t by convexity, so t counts as infinite loss; from Q to P, H(Q‖P) <= H(Q‖R),
    since P is nowhere below R.
    """

    probability: float
    noise_multiplier: float
    size: int

    source = "Ganesh 2024 (mixtures of Gaussians)"

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """How many examples of the group may be drawn together, but for a mass below `_RARE`."""
        from scipy import stats

        counts, drawn = np.arange(self.size + 1), stats.binom(self.size, self.probability)
        # Half of it to either side; that the tails come out too small is covered by another half.
        least = np.searchsorted(drawn.cdf(counts), _RARE / 4)
        most = self.size - np.searchsorted(drawn.sf(counts)[::-1], _RARE / 4, side="right") + 1
        return counts[least : min(most, self.size) + 1]

    @functools.cached_property
    def _weights(self) -> np.ndarray:
        from scipy import stats

        return stats.binom.pmf(self.counts, self.size, self.probability)

    def scale(self) -> tuple[float, float]:
        from scipy import special

        sigma, counts, weights = self.noise_multiplier, self.counts, self._weights
        together = np.minimum(np.outer(counts, counts) / sigma**2, 600.0)
        chi = math.sqrt(max(0.0, weights @ np.expm1(together) @ weights))
        exponents = counts * WIDTH / sigma + counts**2 / (2 * sigma**2)
        reach = float(special.logsumexp(exponents, b=weights))
        return min(chi, reach, float(counts[-1]) / sigma), reach

    def pld(self, grid: float) -> "PrivacyLossDistribution":
        """Connect-the-Dots on the likelihood ratios, which rise, at equally spaced outcomes.

        (dp_accounting has this mixture, but takes tens of seconds over it.)
        """
        from dp_accounting.pld import privacy_loss_distribution
        from scipy import special

        sigma, counts, weights = self.noise_multiplier, self.counts, self._weights
        edges = np.linspace(-WIDTH, float(counts[-1]) / sigma + WIDTH, 2**14)
        losses = np.concatenate(
            [
                special.logsumexp(
                    part[:, None] * counts / sigma - counts**2 / (2 * sigma**2), axis=1, b=weights
                )
                for part in np.array_split(edges, 16)
            ]
        )
        blank = cell_masses(special.ndtr, edges)
        drawn = sum(
            weight * cell_masses(special.ndtr, edges - count / sigma)
            for count, weight in zip(counts, weights, strict=True)
        )
        # Of each cell, the masses that keep both of its probabilities at the ratios of its edges.
        low = np.exp(losses[:-1])
        rise = np.maximum(low * np.expm1(np.diff(losses)), 1e-300)
        up = np.clip((drawn - low * blank) / rise, 0.0, blank)
        without = np.zeros(len(edges))
        without[1:] += up
        without[:-1] += blank - up
        lost = 2 * float(special.ndtr(-WIDTH)) + 1e-15
        return privacy_loss_distribution.PrivacyLossDistribution(
            spread_over_grid(
                losses - math.log1p(-_RARE), without * np.exp(losses), lost + _RARE, grid
            ),
            spread_over_grid(-losses[::-1], without[::-1], lost, grid),
        )

    def rdp(self) -> np.ndarray:
        raise ValueError(
            "accountant='rdp' has no bound for a group of Poisson sampled examples; use 'pld'."
        )


def poisson_release(probability: float, noise_multiplier: float, replace: bool) -> Release:
    """The release of a Poisson sample, or, for little noise, an unsampled one that bounds it.

    Subsampling never adds to the loss (joint convexity).
    """
    if probability == 1.0 or noise_multiplier < LEAST_NOISE:
        return gaussian_release(noise_multiplier, 2.0 if replace else 1.0)
    return PoissonRelease(probability, noise_multiplier, replace)
