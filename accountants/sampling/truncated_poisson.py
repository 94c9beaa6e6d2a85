"""Poisson sampling cut down to a physical batch size, with its release."""

import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np

from accountants.numerics import LEAST_NOISE, LOG_TAIL, ORDERS, WIDTH
from accountants.releases import Release
from accountants.sampling.base import (
    BATCH_SIZE,
    RELATIONS,
    IndependentSteps,
    Relation,
    positive_number,
    setting,
)
from accountants.sampling.draws import Draw, distinct_rows
from accountants.sampling.fixed_size import FixedSizeRelease, fixed_size_release
from accountants.sampling.poisson import PoissonRelease, poisson_release
from accountants.validation import argument_message, check_integer

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution


@dataclasses.dataclass(frozen=True)
class TruncatedPoisson(IndependentSteps):
    """A Poisson draw, cut down to a physical size where it is larger.

    Arrays of one fixed size then hold every batch. What cutting costs (an example that is drawn
    may push out another) is paid for by `TruncatedPoissonRelease`; with a physical size of some
    standard deviations above the expected one it costs next to nothing.

    The loader: in every step draw K ~ Binomial(n, batch_size / n) independently of all other
    steps; take min(K, physical_batch_size) distinct examples, uniformly. Fill up with blanks that
    contribute nothing, and divide by `expected_batch_size`, never by min(K, ...).

    >>> sampling = TruncatedPoisson(batch_size=256, physical_batch_size=320)
    >>> sampling.expected_batch_size(10_000), sampling.steps_per_epoch(10_000)
    (256.0, 40)

    Args:
        batch_size: the expected number of examples of a batch before cutting, a positive number.
        physical_batch_size: the most examples of a batch, an integer of at least `batch_size`.

    Raises:
        TypeError, ValueError: a size is no positive finite number, or the physical one no integer
            of at least the expected one.
    """

    batch_size: float = dataclasses.field(metadata=BATCH_SIZE)
    physical_batch_size: int = dataclasses.field(
        metadata=setting("Most examples of a batch of truncated_poisson.", example=20)
    )

    scheme = "truncated_poisson"
    relations = RELATIONS
    varying_size = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "batch_size", positive_number(self.batch_size, "batch_size"))
        physical = check_integer(self.physical_batch_size, "physical_batch_size")
        if physical < self.batch_size:
            accepted = f"an integer of at least batch_size={self.batch_size!r}"
            raise ValueError(
                argument_message("physical_batch_size", accepted, physical)
                + " A tenth more is usual, as draws vary in size."
            )
        object.__setattr__(self, "physical_batch_size", physical)

    @property
    def padded_size(self) -> int:
        return self.physical_batch_size

    def with_batch_size(self, batch_size: float) -> None:
        """Returns None, as the physical size would have to change too."""

    def rows(self, draw: Draw) -> np.ndarray:
        probability = self.sampling_probability(draw.num_examples)
        count = draw.generator.binomial(draw.num_examples, probability)
        return distinct_rows(draw, min(count, self.physical_batch_size))

    def release(self, noise_multiplier: float, num_examples: int, relation: Relation) -> Release:
        from scipy import stats

        probability, replace = self.sampling_probability(num_examples), relation == "replace_one"
        beyond = stats.binom.sf(self.physical_batch_size - 1, num_examples, probability)
        truncation = float(beyond) * (1 + 1e-9)
        if truncation < 1e-300:
            return poisson_release(probability, noise_multiplier, replace)
        if truncation >= 1.0 or probability == 1.0 or noise_multiplier < 2 * LEAST_NOISE:
            return fixed_size_release(probability, noise_multiplier)
        return TruncatedPoissonRelease(probability, noise_multiplier, replace, truncation)


@dataclasses.dataclass(frozen=True)
class TruncatedPoissonRelease(Release):
    """A Poisson release, or one of fixed size with the same q, the latter with probability τ.

    Let K of the other examples be drawn, and B be the physical size. While K < B, nothing is cut,
    whether the example is drawn or not: Poisson sampling. Where K >= B, the batch is a uniform
    choice of B; given that the example is in it the others are a uniform choice of B - 1, so the
    step samples without replacement, with a probability of at most q. There an example that enters
    pushes out another, and even adding or removing it is a replacement, of reach 2. Hockey-stick
    divergences are jointly convex, so the divergence is at most the mixture of both, with
    τ = P(Bin(n, q) >= B), an upper bound for neighbours with n - 1 and with n + 1 examples too:
    the second part is never the smaller. (Ganesh 2025 treats the same scheme.) So are
    exp((α-1) D_α): the Rényi divergences mix in this form.
    """

    probability: float
    noise_multiplier: float
    replace: bool
    truncation: float

    source = "mixture of both, by joint convexity; compare Ganesh 2025"

    @property
    def _parts(self) -> tuple[PoissonRelease, FixedSizeRelease]:
        return (
            PoissonRelease(self.probability, self.noise_multiplier, self.replace),
            FixedSizeRelease(self.probability, self.noise_multiplier),
        )

    @property
    def _width(self) -> float:
        """How far the tails of fixed size are kept: less far where a batch is seldom cut."""
        from scipy import special

        return min(WIDTH, -special.ndtri(min(0.1, math.exp(LOG_TAIL) / self.truncation)))

    def scale(self) -> tuple[float, float]:
        often, seldom = self._parts
        (usual, reach), (cut, furthest) = often.scale(), seldom.scale(self._width)
        spread = math.sqrt((1 - self.truncation) * usual**2 + self.truncation * cut**2)
        return spread, max(reach, furthest)

    def pld(self, grid: float) -> "PrivacyLossDistribution":
        often, seldom = self._parts
        usual, cut = often.pld(grid), seldom.pld(grid, self._width)
        return cut.compute_mixture(usual, self.truncation)

    def rdp(self) -> np.ndarray:
        usual, cut = (part.rdp() * (ORDERS - 1) for part in self._parts)
        usual, cut = usual + math.log1p(-self.truncation), cut + math.log(self.truncation)
        return np.maximum(np.logaddexp(usual, cut), 0.0) / (ORDERS - 1)
