"""How the batches of a training run are drawn, as immutable values.

A scheme says three things. To the loader: what a batch is. To the trainer: the constant by which
a sum of gradients is divided. To the accountant: through how many noisy releases one example can
pass, with which probability each, and for which neighbouring relations that is true.

The neighbouring relations:

- ``"add_or_remove_one"``: one data set has one example more than the other.
- ``"zero_out"``: one example is replaced by a blank that contributes nothing.
- ``"replace_one"``: one example is replaced by another, which moves a sum twice as far.

The number of examples is treated as public: it sets the sampling probability and the divisor.
"""

import abc
import dataclasses
import math
from typing import Any, ClassVar, Literal

from accountants import _validation, releases
from accountants.releases import Release

Relation = Literal["add_or_remove_one", "zero_out", "replace_one"]
RELATIONS: tuple[Relation, ...] = ("add_or_remove_one", "zero_out", "replace_one")


class Sampling(abc.ABC):
    """What every sampling scheme answers; `PoissonSampling` shows it at work.

    Attributes:
        relations: the neighbouring relations for which the scheme is accounted, its default first.
        varying_size: whether the number of examples in a batch is random.
        fixed_epoch: whether the scheme itself fixes how many steps an epoch has.
        whole_run: whether a whole run is one release, which needs noise that is scaled to it.
        streamable: whether one pass in the data's own order is a draw of this scheme.
    """

    scheme: ClassVar[str]
    relations: ClassVar[tuple[Relation, ...]]
    varying_size: ClassVar[bool] = False
    fixed_epoch: ClassVar[bool] = False
    whole_run: ClassVar[bool] = False
    streamable: ClassVar[bool] = False

    @abc.abstractmethod
    def validate(self, num_examples: int) -> None:
        """Raises ValueError if no batch can be drawn so from `num_examples` examples."""

    @abc.abstractmethod
    def expected_batch_size(self, num_examples: int) -> float:
        """The constant divisor of a sum of gradients; never the size of a realised batch."""

    @abc.abstractmethod
    def steps_per_epoch(self, num_examples: int) -> int:
        """The number of steps that make an epoch."""

    @abc.abstractmethod
    def sampling_probability(self, num_examples: int) -> float:
        """The probability with which an example enters each release it may take part in."""

    @abc.abstractmethod
    def participations(self, num_examples: int, steps: int) -> int:
        """The most releases of a run of `steps` steps in which one example may take part."""

    @abc.abstractmethod
    def release(self, noise_multiplier: float, num_examples: int, relation: Relation) -> Release:
        """The pair of distributions that dominates each of the `participations`."""

    def group_release(
        self, noise_multiplier: float, num_examples: int, relation: Relation, size: int
    ) -> Release | None:
        """As `release`, for data sets that differ in a group of examples; None if not known."""
        return None

    def to_dict(self) -> dict[str, Any]:
        """The scheme as a dict of JSON values.

        >>> FullBatch().to_dict()
        {'scheme': 'full_batch'}
        """
        return {"scheme": self.scheme} | dataclasses.asdict(self)  # type: ignore[call-overload]

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "Sampling":
        """The inverse of `to_dict`.

        >>> Sampling.from_dict({"scheme": "poisson", "batch_size": 256})
        PoissonSampling(batch_size=256)

        Raises:
            ValueError: the scheme is unknown, or a value out of range.
            TypeError: a value is missing, unknown or of another type.
        """
        values = dict(values)
        scheme = _validation.one_of("scheme", values.pop("scheme", None), _SCHEMES)
        return _SCHEMES[scheme](**values)


class _Independent(Sampling):
    """What schemes share whose steps are drawn independently, at the same expected size."""

    batch_size: float

    def validate(self, num_examples: int) -> None:
        _validate_batch_size(self.batch_size, num_examples)

    def expected_batch_size(self, num_examples: int) -> float:
        self.validate(num_examples)
        return float(self.batch_size)

    def steps_per_epoch(self, num_examples: int) -> int:
        """Enough steps for one expected pass over the data, rounded up."""
        self.validate(num_examples)
        # The margin keeps a batch size computed as n / 60 from making 61 steps.
        return max(1, math.ceil(num_examples / self.batch_size - 1e-9))

    def sampling_probability(self, num_examples: int) -> float:
        self.validate(num_examples)
        return self.batch_size / num_examples

    def participations(self, num_examples: int, steps: int) -> int:
        self.validate(num_examples)
        return steps


@dataclasses.dataclass(frozen=True)
class PoissonSampling(_Independent):
    """Each example enters each step by its own coin: probability batch_size / num_examples.

    Realised batches vary in size and may be empty. This is the scheme of DP-SGD (Abadi et al.
    2016), whose amplification is accounted exactly by `releases.Poisson`.

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

    batch_size: float

    scheme = "poisson"
    relations = RELATIONS
    varying_size = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "batch_size", _positive("batch_size", self.batch_size))

    def release(self, noise_multiplier: float, num_examples: int, relation: Relation) -> Release:
        probability = self.sampling_probability(num_examples)
        return releases.poisson(probability, noise_multiplier, relation == "replace_one")

    def group_release(
        self, noise_multiplier: float, num_examples: int, relation: Relation, size: int
    ) -> Release | None:
        if relation == "replace_one":
            return None
        probability = self.sampling_probability(num_examples)
        return releases.poisson_group(probability, noise_multiplier, size)


@dataclasses.dataclass(frozen=True)
class TruncatedPoisson(_Independent):
    """A Poisson draw, cut down to a physical size where it is larger.

    Arrays of one fixed size then hold every batch. What cutting costs (an example that is drawn
    may push out another) is paid for by `releases.TruncatedPoisson`; with a physical size of some
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

    batch_size: float
    physical_batch_size: int

    scheme = "truncated_poisson"
    relations = RELATIONS
    varying_size = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "batch_size", _positive("batch_size", self.batch_size))
        physical = _validation.integer("physical_batch_size", self.physical_batch_size, minimum=1)
        if physical < self.batch_size:
            raise ValueError(
                f"physical_batch_size must be at least batch_size={self.batch_size!r}, got "
                f"{physical!r}; a tenth more is usual, as draws vary in size."
            )
        object.__setattr__(self, "physical_batch_size", physical)

    def release(self, noise_multiplier: float, num_examples: int, relation: Relation) -> Release:
        return releases.truncated_poisson(
            self.sampling_probability(num_examples),
            noise_multiplier,
            relation == "replace_one",
            self.physical_batch_size,
            num_examples,
        )


@dataclasses.dataclass(frozen=True)
class FixedSize(_Independent):
    """Every step draws batch_size distinct examples, uniformly, independently of other steps.

    Accounted by `releases.FixedSize`, which is for replacing an example. Blanking one out is a
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

    batch_size: int

    scheme = "fixed_size"
    relations = ("replace_one", "zero_out")

    def __post_init__(self) -> None:
        value = _validation.integer("batch_size", self.batch_size, minimum=1)
        object.__setattr__(self, "batch_size", value)

    def release(self, noise_multiplier: float, num_examples: int, relation: Relation) -> Release:
        return releases.fixed_size(self.sampling_probability(num_examples), noise_multiplier)


@dataclasses.dataclass(frozen=True)
class CyclicPoisson(_Independent):
    """Poisson sampling from one of `bands` groups of the examples, a different one every step.

    At the start of a run each example is given a group by a fair draw of its own. Step t draws
    from group t mod bands, each example with probability bands * batch_size / num_examples. Two
    participations of an example are thus at least `bands` steps apart, which is what noise
    correlated over fewer than `bands` steps needs (Choquette-Choo et al. 2023). With independent
    noise the scheme is sound too, and seldom better than `PoissonSampling`.

    A run is accounted as ceil(steps / bands) releases of `releases.Poisson` at that probability.
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
    c ⊗ u', both of norm at most 1, is what `releases.Poisson` dominates. Every turn has fresh
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

    batch_size: float
    bands: int

    scheme = "cyclic_poisson"
    relations = RELATIONS
    varying_size = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "batch_size", _positive("batch_size", self.batch_size))
        object.__setattr__(self, "bands", _validation.integer("bands", self.bands, minimum=1))

    def validate(self, num_examples: int) -> None:
        _validate_batch_size(self.batch_size, num_examples)
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
        return releases.poisson(probability, noise_multiplier, relation == "replace_one")


class _Whole(Sampling):
    """Every scheme whose release is unsampled: each participation is certain."""

    def sampling_probability(self, num_examples: int) -> float:
        self.validate(num_examples)
        return 1.0

    def release(self, noise_multiplier: float, num_examples: int, relation: Relation) -> Release:
        return releases.gaussian(noise_multiplier, _distance(relation))

    def group_release(
        self, noise_multiplier: float, num_examples: int, relation: Relation, size: int
    ) -> Release | None:
        # However a group is spread over the steps of an epoch, all in one of them is the worst.
        return releases.gaussian(noise_multiplier, size * _distance(relation))


@dataclasses.dataclass(frozen=True)
class FullBatch(_Whole):
    """Every example takes part in every step.

    >>> FullBatch().expected_batch_size(1000), FullBatch().participations(1000, steps=30)
    (1000.0, 30)
    """

    scheme = "full_batch"
    relations = RELATIONS

    def validate(self, num_examples: int) -> None:
        _validation.integer("num_examples", num_examples, minimum=1)

    def expected_batch_size(self, num_examples: int) -> float:
        self.validate(num_examples)
        return float(num_examples)

    def steps_per_epoch(self, num_examples: int) -> int:
        self.validate(num_examples)
        return 1

    def participations(self, num_examples: int, steps: int) -> int:
        self.validate(num_examples)
        return steps


class _CutEpochs(_Whole):
    """What schemes share that cut an order of the examples into batches."""

    batch_size: int

    def validate(self, num_examples: int) -> None:
        _validate_batch_size(self.batch_size, num_examples)

    def expected_batch_size(self, num_examples: int) -> float:
        """The batch size, also for a smaller last batch: dividing by its own size would raise
        what one example contributes.
        """
        self.validate(num_examples)
        return float(self.batch_size)

    def steps_per_epoch(self, num_examples: int) -> int:
        self.validate(num_examples)
        return -(-num_examples // self.batch_size)


@dataclasses.dataclass(frozen=True)
class ShuffledEpochs(_CutEpochs):
    """Every epoch cuts a fresh permutation into batches; the last one may be smaller.

    An example takes part in exactly one step of an epoch, so an epoch is one Gaussian mechanism
    (parallel composition, given the permutation, which does not depend on the data). No
    amplification by shuffling is claimed. Adding or removing an example would change everybody's
    batches, so that relation is refused.

    An epoch that has begun is charged whole, and a run begins with a new epoch: a loader that
    drops the last batch, or reshuffles earlier, has to end the run there.

    >>> sampling = ShuffledEpochs(batch_size=256)
    >>> sampling.steps_per_epoch(1000), sampling.participations(1000, steps=9)
    (4, 3)

    Args:
        batch_size: the number of examples of a batch, a positive integer.

    Raises:
        TypeError, ValueError: `batch_size` is no positive integer.
    """

    batch_size: int

    scheme = "shuffled_epochs"
    relations = ("zero_out", "replace_one")
    fixed_epoch = True
    streamable = True

    def __post_init__(self) -> None:
        value = _validation.integer("batch_size", self.batch_size, minimum=1)
        object.__setattr__(self, "batch_size", value)

    def participations(self, num_examples: int, steps: int) -> int:
        return -(-steps // self.steps_per_epoch(num_examples))


@dataclasses.dataclass(frozen=True)
class FixedEpochs(_CutEpochs):
    """One shuffled order for a whole run of up to `epochs` epochs, released as *one* mechanism.

    An example takes part in the same step of every epoch, in at most `epochs` steps that are
    exactly an epoch apart. With noise that is correlated over the whole run there is no cost of a
    step: the run is one Gaussian mechanism, and its noise multiplier is the noise over the most
    that one example can move the *whole run*. Whoever adds the noise has to scale it so
    (`lipdp.ToeplitzNoise` does); with noise independent in each step, `ShuffledEpochs` says the
    same without that burden.

    Step t releases x_t + sσ (C⁻¹ z)_t, where x_t sums contributions of norm at most 1, z is
    standard normal, C lower triangular with entries of at least 0, and s the largest norm, over
    the steps i of an epoch, of the sum of the columns i, i + b, i + 2b, ... of C, b the steps of
    an epoch. Given what was released before, row t of Cx + sσz is Gaussian, and the difference
    d_t of its means between two neighbours (zero-out) is Σ_j c_{t, i+jb} u_j, where u_j is the
    example's j-th contribution. Whatever directions they take, Σ_t ‖d_t‖² =
    Σ_jk ⟨c_{i+jb}, c_{i+kb}⟩ ⟨u_j, u_k⟩ is at most s², as no product of columns is negative
    (Choquette-Choo et al. 2022). Of a sequence of Gaussian releases whose adaptively chosen
    differences have squares that never sum to more than s², one of exactly s is the worst: add
    releases at the end until the sum is s² on every path; then the privacy loss is a Brownian
    motion with drift at a fixed time (Denisov et al. 2022 for matrix mechanisms). Under
    replace-one u_j - u'_j has norm at most 2. A run that ends early has fewer rows.

    Adding or removing an example would change everybody's batches, so that relation is refused.
    Nothing is amplified.

    The loader: one permutation of the examples a run, cut into batches, the same in each epoch;
    the last batch may be smaller. After `epochs` epochs a new run begins, with a new order and
    fresh noise, and costs as much again.

    >>> sampling = FixedEpochs(batch_size=256, epochs=10)
    >>> sampling.steps_per_epoch(1000), sampling.participations(1000, steps=40)
    (4, 1)

    Args:
        batch_size: the number of examples of a batch, a positive integer.
        epochs: the most epochs of one run, a positive integer.

    Raises:
        TypeError, ValueError: either is no positive integer.
    """

    batch_size: int
    epochs: int

    scheme = "fixed_epochs"
    relations = ("zero_out", "replace_one")
    fixed_epoch = True
    whole_run = True

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs"):
            value = _validation.integer(name, getattr(self, name), minimum=1)
            object.__setattr__(self, name, value)

    def participations(self, num_examples: int, steps: int) -> int:
        """How many whole runs, begun or complete, the steps are."""
        return -(-steps // (self.epochs * self.steps_per_epoch(num_examples)))


@dataclasses.dataclass(frozen=True)
class RandomAllocation(Sampling):
    """Balls in bins: each epoch, every example falls into one of its steps, uniformly.

    Its batches vary in size as Poisson ones do, but no example is left out of an epoch or drawn
    twice. An epoch is one release, accounted by `releases.BallsInBins` for add/remove and
    zero-out. Under replace-one no amplification is claimed: given the step, two contributions in
    it differ by at most 2.

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

    steps: int

    scheme = "random_allocation"
    relations = RELATIONS
    varying_size = True
    fixed_epoch = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", _validation.integer("steps", self.steps, minimum=1))

    def validate(self, num_examples: int) -> None:
        _validation.integer("num_examples", num_examples, minimum=1)

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
            return releases.gaussian(noise_multiplier, _distance(relation))
        return releases.balls_in_bins(self.steps, noise_multiplier)


def _distance(relation: Relation) -> float:
    """How far the change of one example moves a sum of contributions of norm at most 1."""
    return 2.0 if relation == "replace_one" else 1.0


def _positive(name: str, value: Any) -> float:
    value = _validation.number(name, value, strict=True)
    return int(value) if value.is_integer() else value


def _validate_batch_size(batch_size: float, num_examples: int) -> None:
    _validation.integer("num_examples", num_examples, minimum=1)
    if batch_size > num_examples:
        raise ValueError(
            f"batch_size must not exceed the number of examples: got batch_size={batch_size!r} "
            f"for num_examples={num_examples!r}. FullBatch() takes every example in every step."
        )


_SCHEMES: dict[str, type[Sampling]] = {
    kind.scheme: kind
    for kind in (
        PoissonSampling,
        TruncatedPoisson,
        FixedSize,
        CyclicPoisson,
        ShuffledEpochs,
        FixedEpochs,
        RandomAllocation,
        FullBatch,
    )
}
