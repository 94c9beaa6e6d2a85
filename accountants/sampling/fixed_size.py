"""Batches of a fixed size, drawn anew in every step, with their release."""

import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np

from accountants.numerics import LEAST_NOISE, WIDTH, sampled_scale, without_replacement_rdp
from accountants.releases import Release, gaussian_release
from accountants.sampling.base import BATCH_SIZE, IndependentSteps, Relation
from accountants.sampling.draws import Draw, distinct_rows
from accountants.validation import check_integer

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution


@dataclasses.dataclass(frozen=True)
class FixedSize(IndependentSteps):
    """Every step draws batch_size distinct examples, uniformly, independently of other steps.

    Accounted by `FixedSizeRelease`, which is for replacing an example. Blanking one out is a
    special case, accounted as such (up to twice too dear). Adding or removing an example changes
    the sampling probability of all others: that relation is refused.

    The loader: in every step a fresh uniform choice without replacement, from all examples, also
    from those of the steps just before. A walk through a permutation is `ShuffledEpochs`.

    >>> sampling = FixedSize(batch_size=256)
    >>> sampling.sampling_probability(1024), sampling.relations
    (0.25, ('replace_one', 'zero_out'))

    Args:
        batch_size: the number of examples of a batch, a positive integer.

    Raises:
        TypeError, ValueError: `batch_size` is no positive integer.
    """

    batch_size: int = dataclasses.field(metadata=BATCH_SIZE)

    scheme = "fixed_size"
    relations = ("replace_one", "zero_out")

    def __post_init__(self) -> None:
        value = check_integer(self.batch_size, "batch_size")
        object.__setattr__(self, "batch_size", value)

    def rows(self, draw: Draw) -> np.ndarray:
        return distinct_rows(draw, self.batch_size)

    def release(self, noise_multiplier: float, num_examples: int, relation: Relation) -> Release:
        return fixed_size_release(self.sampling_probability(num_examples), noise_multiplier)


@dataclasses.dataclass(frozen=True)
class FixedSizeRelease(Release):
    """H_α((1-q) N(0, σ²) + q N(2, σ²) ‖ N(0, σ²)) for α >= 1, both ways, where q = b / n.

    Zhu, Dong and Wang 2022, Theorem 11, for replace-one: with A the release given that the
    example is not drawn, B and B' given that it is, in either data set, advanced joint convexity
    (Balle, Barthe and Gaboardi 2018, Theorem 2) bounds H_α((1-q) A + q B ‖ (1-q) A + q B') by
    q max(H_α'(B ‖ A), H_α'(B ‖ B')) with α' = 1 + (α-1) / q. A batch with the example is one
    without it in which one other, chosen uniformly, was exchanged: all three are mixtures of
    Gaussians that can be coupled at a distance of at most 2.

    The divergence for α < 1 follows by swapping the data sets. The curve made of both halves is
    that of a pair; composing the two directions of the Poisson pair separately, and taking the
    worse, would claim too little (Lebeda et al. 2024).
    """

    probability: float
    noise_multiplier: float

    source = (
        "Zhu, Dong and Wang 2022, Theorem 11; Lebeda et al. 2024; "
        "Wang, Balle and Kasiviswanathan 2019"
    )

    def scale(self, width: float = WIDTH) -> tuple[float, float]:
        return sampled_scale(self.probability, self.noise_multiplier / 2, width)

    def pld(self, grid: float, width: float = WIDTH) -> "PrivacyLossDistribution":
        """Connect-the-Dots on the half with α >= 1; the other half mirrors its masses.

        What lies beyond `width` standard deviations is lost.
        """
        from dp_accounting.pld import pld_pmf, privacy_loss_distribution

        _, reach = self.scale(width)
        top = max(2, math.ceil(reach / grid))
        epsilons = np.arange(top + 1) * grid
        stretched = np.log1p(np.expm1(np.minimum(epsilons, 600.0)) / self.probability)
        deltas = self.probability * _gaussian_delta(2 / self.noise_multiplier, stretched)
        steps = np.diff(deltas)
        masses = np.append(
            (steps[1:] - steps[:-1] * math.exp(grid)) / math.expm1(grid),
            steps[-1] / math.expm1(-grid),
        )
        masses = np.maximum(masses, 0.0)
        mirrored = masses * np.exp(-epsilons[1:])
        middle = max(0.0, 1 - deltas[-1] - masses.sum() - mirrored.sum())
        pmf = pld_pmf.DensePLDPmf(
            grid, -top, np.concatenate([mirrored[::-1], [middle], masses]), deltas[-1], True
        )
        return privacy_loss_distribution.PrivacyLossDistribution(pmf)

    def rdp(self) -> np.ndarray:
        return without_replacement_rdp(self.probability, self.noise_multiplier / 2)


def fixed_size_release(probability: float, noise_multiplier: float) -> Release:
    """The release of a batch of fixed size, or, for little noise, an unsampled one above it."""
    if probability == 1.0 or noise_multiplier < 2 * LEAST_NOISE:
        return gaussian_release(noise_multiplier, 2.0)
    return FixedSizeRelease(probability, noise_multiplier)


def _gaussian_delta(shift: float, epsilons: np.ndarray) -> np.ndarray:
    """The deltas of N(shift, 1) against N(0, 1)."""
    from scipy import special

    upper = special.log_ndtr(shift / 2 - epsilons / shift)
    lower = np.minimum(epsilons + special.log_ndtr(-shift / 2 - epsilons / shift), upper)
    return np.exp(upper) * -np.expm1(lower - upper)
