"""What has touched the data, as mechanisms: what has to be known to account for each."""

import abc
import dataclasses
from typing import Any

from accountants.releases import Release
from accountants.sampling import RELATIONS, Relation, Sampling
from accountants.validation import check_choice, check_integer, check_number

#: What a guarantee is for: one example, or all examples of a group, such as those of one person.
UNITS = ("example", "group")


class Mechanism(abc.ABC):
    """Something that has touched the data, as often as its `count` says; a frozen dataclass.

    A `TrainingRun` counts its steps; an `accountants.Query` is anything else.

    Attributes:
        relations: the neighbouring relations for which it is accounted, its default first.
        count: how often it has taken place.
        steps: the training steps among that.
        participations: the number of releases to account for.
        unit: what its guarantee is for, one of `UNITS`.
        label: what it is, for a message.
        words: all that is known of it, on one line.
    """

    relations: tuple[Relation, ...]
    count: int
    steps: int
    participations: int
    unit: str
    label: str
    words: str

    @abc.abstractmethod
    def counted(self, count: int) -> "Mechanism":
        """The same, with another count."""

    @abc.abstractmethod
    def group_release(self, relation: Relation, size: int) -> Release | None:
        """The pair of distributions that dominates each of the `participations`, for data sets
        that differ in `size` examples; None if not known.
        """

    @abc.abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The mechanism as a dict of JSON values."""


# Noise multipliers above this are charged as this.
_MOST_NOISE = 1e7


@dataclasses.dataclass(frozen=True)
class TrainingRun(Mechanism):
    """A number of equal noisy steps on one data set.

    >>> from accountants import ShuffledEpochs
    >>> run = TrainingRun(1.1, ShuffledEpochs(100), num_examples=1000, steps=25)
    >>> run.participations
    3

    Args:
        noise_multiplier: standard deviation of the Gaussian noise over the most that one example
            can add to the noised sum, in ℓ2 norm. It means the same under every relation: that
            replacing an example moves the sum twice as far is the accountant's business. Zero is
            no privacy.
        sampling: how each step draws its batch.
        num_examples: size of the data set; where the unit is a group, the number of groups.
        steps: number of steps, not of epochs.
        unit: ``"example"``; or ``"group"``, where `sampling` draws groups of examples and the noise
            is for the most that one group can add, whatever its examples are.

    Raises:
        TypeError: an argument is of another type.
        ValueError: an argument is negative, not finite, or a batch is larger than the data set.
    """

    noise_multiplier: float
    sampling: Sampling
    num_examples: int
    steps: int
    unit: str = "example"

    def __post_init__(self) -> None:
        check_choice(self.unit, "unit", UNITS)
        if not isinstance(self.sampling, Sampling):
            raise TypeError(
                "sampling must be a scheme such as PoissonSampling(batch_size=256), got "
                f"{self.sampling!r} ({type(self.sampling).__name__})."
            )
        noise_multiplier = check_number(self.noise_multiplier, "noise_multiplier", zero=True)
        num_examples = check_integer(self.num_examples, "num_examples")
        steps = check_integer(self.steps, "steps", 0)
        self.sampling.validate(num_examples)
        object.__setattr__(self, "noise_multiplier", noise_multiplier)
        object.__setattr__(self, "num_examples", num_examples)
        object.__setattr__(self, "steps", steps)

    @property
    def relations(self) -> tuple[Relation, ...]:
        """Those of the sampling scheme."""
        return self.sampling.relations

    @property
    def count(self) -> int:
        """The number of steps."""
        return self.steps

    @property
    def label(self) -> str:
        """The sampling scheme."""
        return repr(self.sampling)

    @property
    def words(self) -> str:
        """The run on one line.

        >>> from accountants import FullBatch
        >>> TrainingRun(2.0, FullBatch(), num_examples=100, steps=3).words
        '3 steps, noise multiplier 2, FullBatch() of 100 examples'
        """
        return (
            f"{self.steps} steps, noise multiplier {self.noise_multiplier:.4g}, "
            f"{self.sampling!r} of {self.num_examples} {self.unit}s"
        )

    def counted(self, count: int) -> "TrainingRun":
        """The run with another number of steps."""
        return dataclasses.replace(self, steps=count)

    @property
    def participations(self) -> int:
        """The most noisy releases in which one example may take part."""
        return self.sampling.participations(self.num_examples, self.steps)

    def release(self, relation: Relation) -> Release:
        """The pair of distributions that dominates each of the `participations`.

        The noise multiplier is in units of one contribution under every relation; what a relation
        makes of it is in the pair. (dp_accounting's accountants disagree on that: under
        replace-one PLD doubles the sensitivity and RDP does not.)

        >>> from accountants import FullBatch
        >>> TrainingRun(4.0, FullBatch(), 100, 1).release("replace_one")
        Gaussian(shift=0.5)
        """
        check_choice(relation, "relation", RELATIONS)
        return self.sampling.release(self._charged_noise, self.num_examples, relation)

    def group_release(self, relation: Relation, size: int) -> Release | None:
        """The `release` for data sets that differ in `size` examples; None if not known."""
        if size == 1:
            return self.release(relation)
        return self.sampling.group_release(self._charged_noise, self.num_examples, relation, size)

    @property
    def _charged_noise(self) -> float:
        """More noise than `_MOST_NOISE` costs no more than that: it can be added afterwards. Beyond
        it squares overflow, and losses vanish beside the grid and the ulps of 1.
        """
        return min(self.noise_multiplier, _MOST_NOISE)

    def joined(self, other: "TrainingRun") -> "TrainingRun":
        """This run and its continuation `other` as one run; both must be equal but for `steps`.

        >>> from accountants import FullBatch
        >>> run = TrainingRun(2.0, FullBatch(), num_examples=100, steps=3)
        >>> run.joined(run).steps
        6

        Raises:
            ValueError: the runs differ, or the participations of the joined run are not the sum
                of theirs, as when `other` reshuffles in the middle of an epoch.
        """
        if dataclasses.replace(other, steps=self.steps) != self:
            raise ValueError(f"only equal runs can be joined, got {self!r} and {other!r}.")
        run = dataclasses.replace(self, steps=self.steps + other.steps)
        if run.participations != self.participations + other.participations:
            raise ValueError(
                f"{self.sampling!r} starts a new epoch with every run, so after {self.steps} "
                f"steps, amid an epoch of {self.sampling.steps_per_epoch(self.num_examples)}, no "
                "run can be joined. Account for both runs instead."
            )
        return run

    def to_dict(self) -> dict[str, Any]:
        """The run as a dict of JSON values.

        >>> from accountants import FullBatch
        >>> run = TrainingRun(2.0, FullBatch(), num_examples=100, steps=3)
        >>> TrainingRun.from_dict(run.to_dict()) == run
        True
        """
        values = {
            "noise_multiplier": self.noise_multiplier,
            "sampling": self.sampling.to_dict(),
            "num_examples": self.num_examples,
            "steps": self.steps,
        }
        return values if self.unit == "example" else values | {"unit": self.unit}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainingRun":
        """The inverse of `to_dict`; raises as the constructor does."""
        return cls(**(values | {"sampling": Sampling.from_dict(values["sampling"])}))
