"""A training run as a mechanism: what has to be known to account for it."""

import dataclasses
from typing import TYPE_CHECKING, Any

from accountants import _validation
from accountants.sampling import RELATIONS, Relation, Sampling

if TYPE_CHECKING:
    import dp_accounting


@dataclasses.dataclass(frozen=True)
class TrainingRun:
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
        num_examples: size of the data set.
        steps: number of steps, not of epochs.

    Raises:
        TypeError: an argument is of another type.
        ValueError: an argument is negative, not finite, or a batch is larger than the data set.
    """

    noise_multiplier: float
    sampling: Sampling
    num_examples: int
    steps: int

    def __post_init__(self) -> None:
        if not isinstance(self.sampling, Sampling):
            raise TypeError(
                "sampling must be a scheme such as PoissonSampling(batch_size=256), got "
                f"{self.sampling!r} ({type(self.sampling).__name__})."
            )
        noise_multiplier = _validation.number("noise_multiplier", self.noise_multiplier)
        num_examples = _validation.integer("num_examples", self.num_examples, minimum=1)
        steps = _validation.integer("steps", self.steps, minimum=0)
        self.sampling.validate(num_examples)
        object.__setattr__(self, "noise_multiplier", noise_multiplier)
        object.__setattr__(self, "num_examples", num_examples)
        object.__setattr__(self, "steps", steps)

    @property
    def sampling_probability(self) -> float:
        """The probability with which an example enters each of its `participations`."""
        return self.sampling.sampling_probability(self.num_examples)

    @property
    def participations(self) -> int:
        """The most noisy releases in which one example may take part."""
        return self.sampling.participations(self.num_examples, self.steps)

    def effective_noise_multiplier(self, relation: Relation) -> float:
        """Standard deviation of the noise over the sensitivity of an unsampled release.

        >>> from accountants import FullBatch
        >>> TrainingRun(3.0, FullBatch(), 100, 1).effective_noise_multiplier("replace_one")
        1.5
        """
        _validation.one_of("relation", relation, RELATIONS)
        return self.noise_multiplier / (2.0 if relation == "replace_one" else 1.0)

    def event(self, relation: Relation) -> "dp_accounting.DpEvent":
        """The run as a dp_accounting event for an accountant of the add-or-remove relation.

        dp_accounting's accountants disagree on what the noise multiplier of an event is measured
        in under replace-one. So the sensitivity is put into the event, and the accountant is to be
        left at its default relation.

        >>> from accountants import FullBatch
        >>> TrainingRun(3.0, FullBatch(), 100, 7).event("replace_one").event
        GaussianDpEvent(noise_multiplier=1.5)

        Raises:
            ValueError: under replace-one, a Poisson sampled Gaussian has no such event.
        """
        import dp_accounting

        gaussian = dp_accounting.GaussianDpEvent(self.effective_noise_multiplier(relation))
        if self.sampling_probability == 1.0:
            return dp_accounting.SelfComposedDpEvent(gaussian, self.participations)
        if relation == "replace_one":
            raise ValueError(
                f"{self.sampling!r} is no add-or-remove event under relation='replace_one'; "
                "use accountant='pld', or relation='add_or_remove_one' or 'zero_out'."
            )
        sampled = dp_accounting.PoissonSampledDpEvent(self.sampling_probability, gaussian)
        return dp_accounting.SelfComposedDpEvent(sampled, self.participations)

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
        return {
            "noise_multiplier": self.noise_multiplier,
            "sampling": self.sampling.to_dict(),
            "num_examples": self.num_examples,
            "steps": self.steps,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainingRun":
        """The inverse of `to_dict`; raises as the constructor does."""
        return cls(**(values | {"sampling": Sampling.from_dict(values["sampling"])}))
