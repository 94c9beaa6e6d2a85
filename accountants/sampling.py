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
    """

    scheme: ClassVar[str]
    relations: ClassVar[tuple[Relation, ...]]

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


@dataclasses.dataclass(frozen=True)
class ShuffledEpochs(_Whole):
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

    def __post_init__(self) -> None:
        value = _validation.integer("batch_size", self.batch_size, minimum=1)
        object.__setattr__(self, "batch_size", value)

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

    def participations(self, num_examples: int, steps: int) -> int:
        return -(-steps // self.steps_per_epoch(num_examples))


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
        ShuffledEpochs,
        RandomAllocation,
        FullBatch,
    )
}
