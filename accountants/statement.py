"""What can be filed about the privacy of what was released, in words that need no mathematics.

The items follow two guides to what a claim of differential privacy has to say:

- Ponomareva et al. 2023, "How to DP-fy ML" (arXiv 2303.00654), its section on reporting: who is
  trusted, what is released, the unit of privacy, the neighbouring relation, which uses of the data
  are counted, tuning among them, how it was accounted, and whether batches were drawn as accounted.
- NIST SP 800-226, "Guidelines for Evaluating Differential Privacy Guarantees" (March 2025): the
  parameters and the unit of privacy first; then what may undermine them, such as rounding, side
  channels, and the data before they are used.
"""

import dataclasses
import datetime
import math
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from accountants.accounting import Accountant, Epsilon, epsilon, unit_of
from accountants.mechanisms import Mechanism, TrainingRun
from accountants.queries import Query
from accountants.sampling import Relation
from accountants.tradeoff import tradeoff
from accountants.validation import check_probability

# The false positive rate at which true positives are stated.
_RATE = 0.01

_RELATIONS = {
    "add_or_remove_one": "one has one {unit} more than the other",
    "zero_out": "one {unit} of the one is blank in the other, and contributes nothing",
    "replace_one": "one {unit} of the one is another {unit} in the other",
}
_UNITS = {
    "example": "One example: a row of the data.",
    "group": "One group: all rows of the data that share an id, such as those of one person.",
}

_ACCOUNTANTS = {
    "pld": "privacy loss distributions (pld)",
    "rdp": "Rényi divergences (rdp)",
    "exact": "the closed form of the Gaussian mechanism (exact)",
    "zcdp": "zero-concentrated differential privacy (zcdp)",
}

_NOT_COVERED_OF_UNITS = {
    "example": (
        "People with several examples: for them the guarantee is that of a group, which is weaker.",
        "The number of examples, which is treated as public.",
    ),
    "group": (
        "People whose rows have several ids: for them the guarantee is weaker.",
        "The number of groups, which is treated as public.",
    ),
}
_NOT_COVERED = (
    "Uses of the same data that are not listed here.",
    "Choices made by looking at results on the data: settings, features, when to stop, which run "
    "is kept.",
    "The data themselves, while they are collected and stored, and the time and memory that "
    "computations take.",
    "What follows about a person from facts about everybody, which would be learned without that "
    "person's data, too.",
    "The code: it has not been reviewed by an independent party.",
)
_NOT_COVERED_OF_TRAINING = (
    "Losses and metrics of training batches, which are computed without noise.",
    "Validation data, and whatever was decided by it.",
    "Constants taken from the data, such as means for scaling or weights of classes.",
)
_ROUNDING = (
    "Rounding: the last digits of floating-point noise may give away more than is accounted "
    "(Mironov 2012)."
)


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of the data: a training run or a query, and what else is known of it.

    Attributes:
        run: its mechanism.
        about: its circumstances: texts by their names, such as "noise", "bounds" and "software".
        settled: whether it ended cleanly, so that nothing is charged beyond what took place.
    """

    run: Mechanism
    about: Mapping[str, str] = dataclasses.field(default_factory=dict)
    settled: bool = True

    @property
    def words(self) -> str:
        """The use on one line."""
        about = [f"{name}: {text}" for name, text in self.about.items()]
        left = [] if self.settled else ["not settled: what it reserved is charged"]
        return "; ".join([self.run.words, *about, *left])


@dataclasses.dataclass(frozen=True)
class Statement:
    """A statement of differential privacy; print it, or take `to_dict()`.

    >>> from accountants import FullBatch
    >>> run = TrainingRun(20.0, FullBatch(), num_examples=1000, steps=25)
    >>> statement = Statement.of([Use(run)], delta=1e-5, subject="the network 'a'")
    >>> round(statement.epsilon, 2), round(statement.advantage, 3), round(statement.posterior, 2)
    (0.93, 0.099, 0.76)
    >>> "the network 'a'" in str(statement)
    True

    Attributes:
        subject: what the statement is of.
        software: what accounted for it, or None.
        date: when it was made, in UTC, ISO 8601.
        uses: each `Use` that is counted.
        epsilon, delta, relation: the guarantee, and the neighbouring data sets that it is for.
        accountant: how it was accounted.
        advantage: the most by which an attacker's true positives exceed the false positives.
        true_positive_rate: the most true positives of an attacker with 1 % false positives.
        posterior: what a belief of one half, that an example took part, becomes at most, but with a
            probability of delta.
        unit: what is protected: an ``"example"``, or a ``"group"`` of them.
        warnings: what voids the statement, or weakens it.
        not_covered: what it says nothing about.
    """

    subject: str
    software: str | None
    date: str
    uses: tuple[Use, ...]
    epsilon: float
    delta: float
    relation: Relation
    accountant: Accountant
    advantage: float
    true_positive_rate: float
    posterior: float
    warnings: tuple[str, ...]
    not_covered: tuple[str, ...]
    unit: str = "example"

    @classmethod
    def of(
        cls,
        uses: Iterable[Use],
        delta: float,
        *,
        subject: str,
        software: str | None = None,
        accountant: Accountant = "pld",
        relation: Relation | None = None,
        spent: float | None = None,
        warnings: Iterable[str] = (),
    ) -> "Statement":
        """The statement of all that was done to one data set.

        Args:
            uses: what was done.
            delta: as for `accountants.epsilon`; well below one over the number of examples.
            subject, software: as the attributes.
            accountant, relation: as for `accountants.epsilon`.
            spent: an epsilon that covers more than the uses' own; the larger one is stated.
            warnings: what voids the statement, or weakens it.

        Raises:
            TypeError, ValueError: as for `accountants.epsilon`.
        """
        delta = check_probability(delta, "delta")
        uses = tuple(use for use in uses if use.run.count)
        how = {"runs": [use.run for use in uses], "accountant": accountant, "relation": relation}
        found = epsilon(delta=delta, **how)
        curve = tradeoff(**how)
        return cls(
            subject=subject,
            software=software,
            date=datetime.datetime.now(datetime.UTC).date().isoformat(),
            uses=uses,
            epsilon=float(found if spent is None else max(found, spent)),
            delta=delta,
            relation=found.relation,
            accountant=found.accountant,
            advantage=curve.advantage,
            true_positive_rate=curve.true_positive_rate(_RATE),
            posterior=curve.posterior(0.5, delta),
            warnings=(*warnings, *_warnings(uses, found)),
            not_covered=_not_covered(uses),
            unit=unit_of(how["runs"]),
        )

    def __str__(self) -> str:
        return self.to_text()

    def to_text(self) -> str:
        """The statement as plain text."""
        lines = ["Statement of differential privacy", ""]
        lines.append(f"Of {self.subject}. Made on {self.date}{self._by}.")
        for title, paragraph in self.paragraphs():
            whole = isinstance(paragraph, str)
            lines += ["", f"{title}. {paragraph}" if whole else f"{title}."]
            lines += () if whole else [f"- {item}" for item in paragraph]
        wrapper = textwrap.TextWrapper(100, subsequent_indent="  ", break_on_hyphens=False)
        return "\n".join(wrapper.fill(line) for line in lines)

    @property
    def _by(self) -> str:
        return "" if self.software is None else f" with {self.software}"

    def paragraphs(self) -> list[tuple[str, str | tuple[str, ...]]]:
        """Titles and what is below each: a paragraph, or the items of a list."""
        if not self.uses:
            return [("Nothing", "Nothing has been trained or released, so nothing has been spent.")]
        found: list[tuple[str, str | tuple[str, ...]]] = []
        if self.warnings:
            found.append(("Warnings", self.warnings))
        return [
            *found,
            ("What is protected", self._protected()),
            ("What is guaranteed", self._guaranteed()),
            ("What an attacker can gain", self._attacker()),
            ("What was done", self._done()),
            ("What is not covered", self.not_covered),
        ]

    def _protected(self) -> str:
        neighbours = _RELATIONS[self.relation].format(unit=self.unit)
        return (
            f"{_UNITS[self.unit]} Two data sets are neighbours if "
            f"{neighbours} ({self.relation}). Whoever holds the data and trains is "
            "trusted; whoever sees what is released is not."
        )

    def _guaranteed(self) -> str:
        if math.isinf(self.epsilon):
            return f"Nothing: there is no finite epsilon at delta = {up(self.delta)}."
        delta, accountant = up(self.delta), _ACCOUNTANTS[self.accountant]
        factor = up(math.exp(min(self.epsilon, 700.0)))
        return (
            f"({up(self.epsilon, 4)}, {delta})-differential privacy, of {self._released()}: "
            f"whatever is computed from that is at most e^epsilon = {factor} times as likely with "
            f"one data set as with its neighbour, but for a probability of delta = {delta}. "
            f"Accounted by {accountant}, as an upper bound, for batches that were drawn as the "
            "sampling schemes below say."
        )

    def _released(self) -> str:
        kinds = [
            (TrainingRun, "the weights after every step and at the end"),
            (Query, "what the queries below returned"),
        ]
        held = [text for kind, text in kinds if any(isinstance(u.run, kind) for u in self.uses)]
        return ", and of ".join(held)

    def _attacker(self) -> tuple[str, ...]:
        replaced = self.relation == "replace_one"
        unit = self.unit
        secret = f"which of two {unit}s took part" if replaced else f"whether one {unit} took part"
        return (
            f"The attacker knows all other {unit}s and everything that is released, and has to "
            f"tell {secret}.",
            f"Advantage: true positives exceed false positives by at most {up(self.advantage)} "
            "(0 is guessing, 1 is knowing).",
            f"At 1 % false positives, true positives are at most "
            f"{up(100 * self.true_positive_rate)} %.",
            f"A belief of 50 % becomes at most {up(100 * self.posterior, 4)} %, but for a "
            f"probability of {up(self.delta)}.",
        )

    def _done(self) -> tuple[str, ...]:
        runs = [use for use in self.uses if isinstance(use.run, TrainingRun)]
        steps = sum(use.run.steps for use in runs)
        queries = len(self.uses) - len(runs)
        return (
            f"In all, training runs: {len(runs)}, with {steps} steps; queries: {queries}.",
            *(use.words for use in self.uses),
        )

    def to_dict(self) -> dict[str, Any]:
        """The statement as JSON values; None for an infinite epsilon.

        The text is in it, and the runs as `to_dict` of each has them.
        """
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values |= {
            "epsilon": self.epsilon if math.isfinite(self.epsilon) else None,
            "uses": [
                {**use.run.to_dict(), "about": dict(use.about), "settled": use.settled}
                for use in self.uses
            ],
            "unit": f"one {self.unit}",
            "false_positive_rate": _RATE,
            "runs": sum(isinstance(use.run, TrainingRun) for use in self.uses),
            "steps": sum(use.run.steps for use in self.uses),
            "text": self.to_text(),
        }
        return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}


def _warnings(uses: tuple[Use, ...], found: Epsilon) -> list[str]:
    warnings = []
    sizes = [use.run.num_examples for use in uses if isinstance(use.run, TrainingRun)]
    if sizes and found.delta * max(sizes) > 1:
        unit = unit_of([use.run for use in uses])
        warnings.append(
            f"delta = {found.delta:g} is above one over the {max(sizes)} {unit}s: even a mechanism "
            f"that publishes one random {unit} in full has a delta of that size."
        )
    if any("seed" in use.about.get("noise", "") for use in uses):
        warnings.append(
            "Noise came from a seed: whoever knows the seed can subtract it, and nothing is "
            "private from them."
        )
    if not all(use.settled for use in uses):
        warnings.append(
            "Some runs did not end, or are going on: what they have reserved is counted for them."
        )
    return warnings


def _not_covered(uses: tuple[Use, ...]) -> tuple[str, ...]:
    training = [use for use in uses if isinstance(use.run, TrainingRun)]
    exact = all("discrete" in use.about.get("noise", "") for use in training)
    return (
        *(_NOT_COVERED_OF_TRAINING if training else ()),
        *_NOT_COVERED_OF_UNITS[unit_of([use.run for use in uses])],
        *_NOT_COVERED,
        *(() if exact else (_ROUNDING,)),
    )


def up(value: float, digits: int = 3) -> str:
    """A bound with so many digits, rounded up.

    >>> up(0.12301), up(2.0), up(19.995), up(1e-7), up(0.0)
    ('0.124', '2', '20', '1e-07', '0')
    """
    if value == 0.0 or not math.isfinite(value):
        return f"{value:g}"
    unit = 10.0 ** (math.floor(math.log10(value)) - digits + 1)
    rounded = math.ceil(value / unit - 1e-9) * unit
    return f"{rounded:.{digits}g}"
