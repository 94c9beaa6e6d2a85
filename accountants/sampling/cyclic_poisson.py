"""Poisson sampling from groups that take turns, for noise that is correlated over some steps."""

import dataclasses

import numpy as np

from accountants.releases import Release
from accountants.sampling.base import (
    BATCH_SIZE,
    RELATIONS,
    IndependentSteps,
    Relation,
    check_batch_size,
    positive_number,
    setting,
)
from accountants.sampling.draws import Draw, assigned_parts, distinct_rows
from accountants.sampling.poisson import poisson_release
from accountants.validation import check_integer


@dataclasses.dataclass(frozen=True)
class CyclicPoisson(IndependentSteps):
    """Poisson sampling from one of `bands` groups of the examples, a different one every step.

    At the start of a run each example is given a group by a fair draw of its own. Step t draws
    from group t mod bands, each example with probability bands * batch_size / num_examples. Two
    participations of an example are thus at least `bands` steps apart, which is what noise
    correlated over fewer than `bands` steps needs (Choquette-Choo et al. 2023). With independent
    noise the scheme is sound too, and seldom better than `PoissonSampling`.

    A run is accounted as ceil(steps / bands) releases of `PoissonRelease` at that probability.
    Step t releases x_t + σ (C⁻¹ z)_t, where x_t sums contributions of norm at most 1, z is
    standard normal, and C is lower triangular with as many bands and columns c of norm at most 1;
    which is as good as Cx + σz, row by row (C = 1 for independent noise). Fix the group of the
    example in which two data sets differ, and the coins of all others, whose groups and coins are
    the same in both. Let the j-th of the example's turns be step t; there it contributes χu, with
    χ its coin and u set by what was released before. That enters rows t to t + bands - 1, as
    c ⊗ χu, and these rows hold no other turn of the example: they are the rows of
    χ (c ⊗ u) + σz plus what both data sets share, which may depend on rows before but not on
    the example's coins. For add/remove, draw y ~ N(χ, σ²) in step t: y (c ⊗ u), which is no longer
    than y, plus Gaussian noise that completes the covariance to σ²I has the law of those rows, so
    that each turn is worth one y, however u is chosen. For replace-one the pair of c ⊗ u and
    c ⊗ u', both of norm at most 1, is what `PoissonRelease` dominates. Every turn has fresh
    coins, so all turns compose, adaptively. The groups are a mixture over equally likely cases
    of no more turns than accounted, and divergences are jointly convex.

    The loader: per run, one independent uniform group for each example; in step t (from 0) draw
    from group t mod bands by independent coins. Steps are taken in order, without leaving any out;
    a new run starts at t = 0, with new groups and fresh noise.

    >>> sampling = CyclicPoisson(batch_size=256, bands=4)
    >>> sampling.sampling_probability(4096), sampling.participations(4096, steps=30)
    (0.25, 8)

    Args:
        batch_size: the expected number of examples of a batch, a positive number; at most
            num_examples / bands.
        bands: the number of groups, a positive integer; 1 is `PoissonSampling`.

    Raises:
        TypeError, ValueError: `batch_size` is no positive finite number, or `bands` no positive
            integer.
    """

    batch_size: float = dataclasses.field(metadata=BATCH_SIZE)
    bands: int = dataclasses.field(
        metadata=setting("Groups of examples of cyclic_poisson.", example=4)
    )

    scheme = "cyclic_poisson"
    relations = RELATIONS
    varying_size = True
    rate = "one every `bands` steps"

    def __post_init__(self) -> None:
        object.__setattr__(self, "batch_size", positive_number(self.batch_size, "batch_size"))
        object.__setattr__(self, "bands", check_integer(self.bands, "bands"))

    @property
    def noise_bands(self) -> int:
        return self.bands

    def rows(self, draw: Draw) -> np.ndarray:
        n = draw.num_examples
        groups = draw.once_per_run(lambda generator: assigned_parts(generator, n, self.bands))
        # A coin for every example, of which those of the group count: no list of the group.
        rows = distinct_rows(draw, draw.generator.binomial(n, self.sampling_probability(n)))
        return rows[groups[rows] == draw.step % self.bands]

    def validate(self, num_examples: int) -> None:
        check_batch_size(self.batch_size, num_examples)
        if self.batch_size * self.bands > num_examples:
            raise ValueError(
                "batch_size * bands must not exceed the number of examples, as a batch is drawn "
                f"from one of the groups: got batch_size={self.batch_size!r} and "
                f"bands={self.bands!r} for num_examples={num_examples!r}."
            )

    def sampling_probability(self, num_examples: int) -> float:
        """The probability in a step of the example's own group."""
        self.validate(num_examples)
        return self.batch_size * self.bands / num_examples

    def participations(self, num_examples: int, steps: int) -> int:
        self.validate(num_examples)
        return -(-steps // self.bands)

    def release(self, noise_multiplier: float, num_examples: int, relation: Relation) -> Release:
        probability = self.sampling_probability(num_examples)
        return poisson_release(probability, noise_multiplier, relation == "replace_one")
