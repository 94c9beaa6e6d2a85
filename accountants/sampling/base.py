"""The sampling scheme as the other packages see it, and what several schemes share."""

import abc
import dataclasses
import math
from typing import Any, ClassVar, Literal

import numpy as np

from accountants.releases import Release, gaussian_release
from accountants.sampling.draws import Draw
from accountants.validation import check_choice, check_integer, check_number

Relation = Literal["add_or_remove_one", "zero_out", "replace_one"]
RELATIONS: tuple[Relation, ...] = ("add_or_remove_one", "zero_out", "replace_one")

# Every scheme by its name in files; a class that sets `scheme` enters itself.
SCHEMES: "dict[str, type[Sampling]]" = {}


class Sampling(abc.ABC):
    """A sampling scheme: how batches are drawn, and what one example's part in them costs.

    A scheme is a frozen dataclass. Its fields are its settings, described by `setting`. A new one
    needs a `scheme`, its `relations`, the facts below where they differ from their defaults, and
    the abstract methods; `PoissonSampling` shows it at work.

    Attributes:
        scheme: the name in files and commands.
        relations: the neighbouring relations for which the scheme is accounted, its default first.
        rate: how many releases a run makes, in words.
        varying_size: whether the number of examples in a batch is random.
        fixed_epoch: whether the scheme itself fixes how many steps an epoch has.
        whole_run: whether a whole run of up to `epochs` epochs is one release, in which an example
            takes part once an epoch, in the same step; it needs noise that is scaled to the run.
        streamable: whether one pass in the data's own order is a draw of this scheme.
    """

    scheme: ClassVar[str]
    relations: ClassVar[tuple[Relation, ...]]
    rate: ClassVar[str] = "one a step"
    varying_size: ClassVar[bool] = False
    fixed_epoch: ClassVar[bool] = False
    whole_run: ClassVar[bool] = False
    streamable: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "scheme" in vars(cls):
            SCHEMES[cls.scheme] = cls

    @property
    def noise_bands(self) -> int | None:
        """The most steps over which noise may be correlated; None if it has to be independent."""
        return None

    @property
    def padded_size(self) -> int | None:
        """The number of rows to which each batch is filled up; None if the scheme names none."""
        return None

    def with_batch_size(self, batch_size: float) -> "Sampling | None":
        """This scheme at another batch size; None if a batch size alone does not describe it.

        Raises:
            TypeError, ValueError: as the constructor.
        """
        return None

    @abc.abstractmethod
    def rows(self, draw: Draw) -> np.ndarray:
        """The examples that a step takes, as distinct numbers from 0.

        This is the scheme's loader: the accounting holds for batches that are drawn just so. All
        randomness has to come from `draw`, and nothing else about the data may enter.
        """

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
        """The `release` for data sets that differ in a group of examples; None if not known."""
        return None

    def to_dict(self) -> dict[str, Any]:
        """The scheme as a dict of JSON values.

        >>> from accountants import FullBatch
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
        return SCHEMES[check_choice(values.pop("scheme", None), "scheme", SCHEMES)](**values)

    @classmethod
    def settings(cls) -> "dict[str, dataclasses.Field[Any]]":
        """The fields of the scheme, by the name of their flag.

        >>> from accountants import FixedEpochs
        >>> {flag: field.name for flag, field in FixedEpochs.settings().items()}
        {'batch_size': 'batch_size', 'run_epochs': 'epochs'}
        """
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]
        return {field.metadata.get("flag") or field.name: field for field in fields}

    @classmethod
    def example(cls) -> "Sampling":
        """The scheme at small settings, for 100 examples and more: for documents and tests.

        >>> from accountants import CyclicPoisson
        >>> CyclicPoisson.example()
        CyclicPoisson(batch_size=10, bands=4)
        """
        fields = cls.settings().values()
        return cls(**{field.name: field.metadata["example"] for field in fields})


def setting(help: str, example: float, flag: str | None = None) -> dict[str, Any]:
    """The metadata of a scheme's field.

    Args:
        help: the line of help of its flag. Schemes that share a flag share the line.
        example: its value in `Sampling.example`.
        flag: the name of its flag, by default the field's.
    """
    return {"help": help, "example": example, "flag": flag}


BATCH_SIZE = setting("Examples of a batch (expected ones, where they vary).", example=10)


class IndependentSteps(Sampling):
    """A scheme whose steps are drawn independently, at the same expected size."""

    batch_size: float

    def with_batch_size(self, batch_size: float) -> Sampling | None:
        return dataclasses.replace(self, batch_size=batch_size)  # type: ignore[type-var]

    def validate(self, num_examples: int) -> None:
        check_batch_size(self.batch_size, num_examples)

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


class Unsampled(Sampling):
    """A scheme whose release is unsampled: each participation is certain."""

    def sampling_probability(self, num_examples: int) -> float:
        self.validate(num_examples)
        return 1.0

    def release(self, noise_multiplier: float, num_examples: int, relation: Relation) -> Release:
        return gaussian_release(noise_multiplier, distance(relation))

    def group_release(
        self, noise_multiplier: float, num_examples: int, relation: Relation, size: int
    ) -> Release | None:
        # However a group is spread over the steps of an epoch, all in one of them is the worst.
        return gaussian_release(noise_multiplier, size * distance(relation))


class CutEpochs(Unsampled):
    """A scheme that cuts an order of the examples into batches."""

    batch_size: int

    def with_batch_size(self, batch_size: float) -> Sampling | None:
        return dataclasses.replace(self, batch_size=batch_size)  # type: ignore[type-var]

    def cut(self, draw: Draw) -> tuple[int, int]:
        """The beginning and end of a step's batch in the order; the last one may be smaller."""
        start, end = (i * self.batch_size for i in (draw.index, draw.index + 1))
        return min(draw.num_examples, start), min(draw.num_examples, end)

    def validate(self, num_examples: int) -> None:
        check_batch_size(self.batch_size, num_examples)

    def expected_batch_size(self, num_examples: int) -> float:
        """The batch size, also for a smaller last batch: dividing by its own size would raise
        what one example contributes.
        """
        self.validate(num_examples)
        return float(self.batch_size)

    def steps_per_epoch(self, num_examples: int) -> int:
        self.validate(num_examples)
        return -(-num_examples // self.batch_size)


def distance(relation: Relation) -> float:
    """The distance by which one example's change moves a sum of contributions of norm 1 at most."""
    return 2.0 if relation == "replace_one" else 1.0


def positive_number(value: Any, name: str) -> float:
    """`value` as a positive finite number, an int where it is whole."""
    value = check_number(value, name)
    return int(value) if value.is_integer() else value


def check_batch_size(batch_size: float, num_examples: int) -> None:
    """Checks that a batch is no larger than the data set."""
    check_integer(num_examples, "num_examples")
    if batch_size > num_examples:
        raise ValueError(
            f"batch_size must not exceed the number of examples: got batch_size={batch_size!r} "
            f"for num_examples={num_examples!r}. FullBatch() takes every example in every step."
        )
