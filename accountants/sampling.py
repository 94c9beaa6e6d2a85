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

from accountants import _validation

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


@dataclasses.dataclass(frozen=True)
class PoissonSampling(Sampling):
    """Each example enters each step by its own coin: probability batch_size / num_examples.

    Realised batches vary in size and may be empty. This is the scheme of DP-SGD (Abadi et al.
    2016) whose amplification is accounted exactly: the pair (1-q) N(0, σ²) + q N(1, σ²) and
    N(0, σ²), both ways, dominates a step under add/remove and zero-out (Zhu, Dong and Wang 2022,
    Theorem 11). Under replace-one it is (1-q) N(0, σ²) + q N(±1, σ²).

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
        value = _validation.number("batch_size", self.batch_size, strict=True)
        object.__setattr__(self, "batch_size", int(value) if value.is_integer() else value)

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
class FullBatch(Sampling):
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

    def sampling_probability(self, num_examples: int) -> float:
        self.validate(num_examples)
        return 1.0

    def participations(self, num_examples: int, steps: int) -> int:
        self.validate(num_examples)
        return steps


@dataclasses.dataclass(frozen=True)
class ShuffledEpochs(Sampling):
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

    def sampling_probability(self, num_examples: int) -> float:
        self.validate(num_examples)
        return 1.0

    def participations(self, num_examples: int, steps: int) -> int:
        return -(-steps // self.steps_per_epoch(num_examples))


def _validate_batch_size(batch_size: float, num_examples: int) -> None:
    _validation.integer("num_examples", num_examples, minimum=1)
    if batch_size > num_examples:
        raise ValueError(
            f"batch_size must not exceed the number of examples: got batch_size={batch_size!r} "
            f"for num_examples={num_examples!r}. FullBatch() takes every example in every step."
        )


_SCHEMES: dict[str, type[Sampling]] = {
    kind.scheme: kind for kind in (PoissonSampling, FullBatch, ShuffledEpochs)
}
