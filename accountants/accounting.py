"""The cost of a training run, or of several on the same data: epsilon and delta.

Four accountants:

- ``"pld"``: privacy loss distributions of dp_accounting, discretised by Connect-the-Dots
  (Doroshenko et al. 2022), which bounds from above on any grid. Where no run is subsampled there
  is nothing to discretise, and the closed form is evaluated instead.
- ``"rdp"``: Rényi differential privacy (Mironov, Talwar and Zhang 2019), converted by
  Proposition 12 of Canonne, Kamath and Steinke 2020. Looser, cheap, and good for any delta.
- ``"exact"``: the closed form of the Gaussian mechanism (Balle and Wang 2018, Theorem 8), to
  which any composition of unsampled Gaussians reduces. Refuses runs that are subsampled.
- ``"zcdp"``: zero-concentrated differential privacy (Bun and Steinke 2016), whose ρ of an
  unsampled Gaussian adds up over a composition, converted as for ``"rdp"``. Looser than
  ``"exact"``, for comparison with work that reports ρ. Refuses runs that are subsampled too.

Every result is an upper bound: rounding goes to the safe side.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

from accountants import curves
from accountants.curves import Curve
from accountants.mechanisms import Mechanism, TrainingRun
from accountants.releases import Gaussian, Release
from accountants.sampling import RELATIONS, Relation, Sampling
from accountants.validation import check_choice, check_integer, check_number, check_probability

Accountant = Literal["pld", "rdp", "exact", "zcdp"]
ACCOUNTANTS: tuple[Accountant, ...] = ("pld", "rdp", "exact", "zcdp")


@dataclasses.dataclass(frozen=True)
class Budget:
    """The privacy that may be spent: (epsilon, delta).

    A delta near or above 1 / num_examples promises little: choose it well below.

    >>> Budget(epsilon=3, delta=1e-5)
    Budget(epsilon=3.0, delta=1e-05)

    Raises:
        TypeError: a value is no number.
        ValueError: epsilon is not positive and finite, or delta not strictly between 0 and 1.
    """

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "epsilon", check_number(self.epsilon, "epsilon"))
        object.__setattr__(self, "delta", check_probability(self.delta, "delta"))


class _Spent(float):
    """A float with attributes that tell what it was found for, named in `_details`."""

    _details: ClassVar[tuple[str, ...]]

    def __getnewargs__(self) -> tuple[Any, ...]:
        return float(self), *(getattr(self, name) for name in self._details)

    def __repr__(self) -> str:
        details = {name: getattr(self, name) for name in self._details}
        if details["group_size"] == 1:
            del details["group_size"]
        listed = "".join(f", {name}={value!r}" for name, value in details.items())
        return f"{type(self).__name__}({float(self)!r}{listed})"

    def __str__(self) -> str:
        return str(float(self))


class Epsilon(_Spent):
    """An epsilon, with what it was found for.

    A float with the attributes `delta`, `relation`, `accountant` and `group_size`.

    >>> Epsilon(0.5, delta=1e-5, relation="zero_out", accountant="exact")
    Epsilon(0.5, delta=1e-05, relation='zero_out', accountant='exact')
    """

    _details = ("delta", "relation", "accountant", "group_size")

    def __new__(
        cls,
        value: float,
        delta: float,
        relation: Relation,
        accountant: Accountant,
        group_size: int = 1,
    ) -> "Epsilon":
        self = super().__new__(cls, value)
        self.delta, self.relation, self.accountant = delta, relation, accountant
        self.group_size = group_size
        return self


class Delta(_Spent):
    """A delta, with what it was found for.

    A float with the attributes `epsilon`, `relation`, `accountant` and `group_size`.

    >>> Delta(1e-6, epsilon=1.0, relation="zero_out", accountant="exact")
    Delta(1e-06, epsilon=1.0, relation='zero_out', accountant='exact')
    """

    _details = ("epsilon", "relation", "accountant", "group_size")

    def __new__(
        cls,
        value: float,
        epsilon: float,
        relation: Relation,
        accountant: Accountant,
        group_size: int = 1,
    ) -> "Delta":
        self = super().__new__(cls, value)
        self.epsilon, self.relation, self.accountant = epsilon, relation, accountant
        self.group_size = group_size
        return self


def epsilon(
    *,
    delta: float,
    noise_multiplier: float | None = None,
    sampling: Sampling | None = None,
    num_examples: int | None = None,
    steps: int | None = None,
    runs: Iterable[Mechanism] | None = None,
    accountant: Accountant = "pld",
    relation: Relation | None = None,
    group_size: int = 1,
) -> Epsilon:
    """The epsilon of one training run, or of several `runs` on the same data, at `delta`.

    >>> from accountants import FullBatch, PoissonSampling
    >>> spent = epsilon(noise_multiplier=1.0, sampling=PoissonSampling(600), num_examples=60_000,
    ...                 steps=10_000, delta=1e-5)
    >>> round(spent, 3), spent.relation, spent.accountant
    (6.191, 'add_or_remove_one', 'pld')
    >>> pretraining = TrainingRun(20.0, FullBatch(), num_examples=60_000, steps=10)
    >>> finetuning = TrainingRun(1.0, PoissonSampling(600), num_examples=60_000, steps=100)
    >>> round(epsilon(runs=[pretraining, finetuning], delta=1e-5), 1)
    0.9

    Args:
        delta: strictly between 0 and 1; well below 1 / num_examples to mean anything.
        noise_multiplier, sampling, num_examples, steps: the run, as `TrainingRun` explains them.
        runs: instead of these four, the runs to be composed, and each `Query` beside them. None
            spent nothing.
        accountant: "pld", "rdp", "zcdp" or "exact", explained at the top of this module.
        relation: the neighbouring relation; the default is the first in the scheme's `relations`
            that every run supports.
        group_size: how many examples may differ between the data sets, each as `relation` says:
            more than 1 protects groups, such as the records of one person.

    Returns:
        The epsilon, at least 0, infinite without noise; it names its delta, its relation, and the
        accountant that did the work ("exact" for "pld" where no run is subsampled; for random
        allocation, and at a delta below about 1e-11, whichever of "pld", "rdp" and, for the former,
        no amplification is the least).

    Raises:
        TypeError: an argument is missing, of another type, or both ways of naming runs are mixed.
        ValueError: a value is out of range, or nobody can account for the combination.
    """
    delta = check_probability(delta, "delta")
    runs = as_runs(noise_multiplier, sampling, num_examples, steps, runs)
    found = compose(runs, accountant, relation, group_size)
    if isinstance(found.curve, curves.LeastCurve):
        value, name = found.curve.best(delta)
    else:
        value, name = found.curve.epsilon(delta), found.accountant
    return Epsilon(value, delta, found.relation, name, found.group_size)


def delta(
    *,
    epsilon: float,
    noise_multiplier: float | None = None,
    sampling: Sampling | None = None,
    num_examples: int | None = None,
    steps: int | None = None,
    runs: Iterable[Mechanism] | None = None,
    accountant: Accountant = "pld",
    relation: Relation | None = None,
    group_size: int = 1,
) -> Delta:
    """The delta of one training run, or of several `runs` on the same data, at `epsilon`.

    >>> from accountants import FullBatch
    >>> spent = delta(noise_multiplier=5.0, sampling=FullBatch(), num_examples=100, steps=1,
    ...               epsilon=1.0)
    >>> f"{spent:.3g}", spent.epsilon, spent.accountant
    ('1.75e-08', 1.0, 'exact')

    Args:
        epsilon: at least 0.
        noise_multiplier, sampling, num_examples, steps, runs, accountant, relation, group_size:
            as for `accountants.epsilon`.

    Returns:
        The delta, between 0 and 1, which names its epsilon, relation and accountant.

    Raises:
        TypeError, ValueError: as for `accountants.epsilon`.
    """
    epsilon = check_number(epsilon, "epsilon", zero=True)
    runs = as_runs(noise_multiplier, sampling, num_examples, steps, runs)
    found = compose(runs, accountant, relation, group_size)
    return Delta(
        found.curve.delta(epsilon), epsilon, found.relation, found.accountant, found.group_size
    )


def as_runs(
    noise_multiplier: float | None,
    sampling: Sampling | None,
    num_examples: int | None,
    steps: int | None,
    runs: Iterable[Mechanism] | None,
) -> tuple[Mechanism, ...]:
    """The runs that the arguments of `epsilon` name, in either of both ways."""
    run = {
        "noise_multiplier": noise_multiplier,
        "sampling": sampling,
        "num_examples": num_examples,
        "steps": steps,
    }
    if runs is None:
        if missing := [name for name, value in run.items() if value is None]:
            raise TypeError(f"{', '.join(missing)} must be given, or runs= instead of a run.")
        return (TrainingRun(**run),)  # type: ignore[arg-type]
    if given := [name for name, value in run.items() if value is not None]:
        raise TypeError(f"runs= stands in for {', '.join(given)}; give one or the other.")
    return check_runs("runs", runs)


def check_runs(name: str, runs: Iterable[Mechanism]) -> tuple[Mechanism, ...]:
    """`runs` as a tuple; TypeError if anything in it is no Mechanism."""
    if isinstance(runs, Mechanism):
        raise TypeError(f"{name} must be a list of runs, got the single run {runs!r}.")
    runs = tuple(runs)
    for run in runs:
        if not isinstance(run, Mechanism):
            raise TypeError(f"{name} must hold TrainingRun values, got {run!r}.")
    return runs


@dataclasses.dataclass(frozen=True)
class Composed:
    """Runs as accounted for: their curve, and what it was found for."""

    curve: Curve
    relation: Relation
    accountant: Accountant
    group_size: int


def compose(
    runs: Sequence[Mechanism],
    accountant: Accountant,
    relation: Relation | None,
    group_size: int = 1,
) -> Composed:
    """The curve of all the runs together; raises as `epsilon` does."""
    check_choice(accountant, "accountant", ACCOUNTANTS)
    group_size = check_integer(group_size, "group_size")
    fewest = min((getattr(run, "num_examples", math.inf) for run in runs), default=math.inf)
    if group_size > fewest:
        raise ValueError(
            f"group_size must be at most the number of {unit_of(runs)}s, {fewest}; got "
            f"{group_size}."
        )
    relation = resolve_relation(runs, relation)
    counts = _released(runs, accountant, relation, group_size)
    single = counts is None
    if counts is None:
        # Of one example every release is known.
        counts = _released(runs, accountant, relation, 1)
    shift = curves.gaussian_shift(counts)
    curve: Curve
    if shift is not None and accountant in ("pld", "exact"):
        curve, accountant = curves.GaussianCurve(shift), "exact"
    elif shift is not None and accountant == "zcdp":
        curve = curves.ZcdpCurve(shift**2 / 2)
    elif accountant == "rdp":
        curve = curves.RdpCurve(curves.composed_rdp(counts))
    else:
        curve = curves.least_curve(counts)
    if single:
        curve = curves.GroupCurve(curve, group_size)
    return Composed(curve, relation, accountant, group_size)


def _released(
    runs: Sequence[Mechanism], accountant: Accountant, relation: Relation, group_size: int
) -> dict[Release, int] | None:
    """The number of times that each release takes place, ordered by the last run that has it.

    None if a release is not known for groups of this size.
    """
    counts: dict[Release, int] = {}
    for run in runs:
        # Runs of no participation release nothing, whatever their noise.
        if not run.participations:
            continue
        release = run.group_release(relation, group_size)
        if release is None or (
            group_size > 1 and accountant == "rdp" and not isinstance(release, Gaussian)
        ):
            return None
        if accountant in ("exact", "zcdp") and not isinstance(release, Gaussian):
            raise ValueError(
                f"accountant={accountant!r} is for unsampled Gaussians, got {run.label} "
                f"under relation={relation!r}; 'pld' and 'rdp' account for it."
            )
        counts[release] = counts.pop(release, 0) + run.participations
    return counts


def unit_of(runs: Sequence[Mechanism]) -> str:
    """What the runs protect; a single example, where there are none."""
    return runs[0].unit if runs else "example"


def resolve_relation(runs: Sequence[Mechanism], relation: Relation | None) -> Relation:
    """The relation asked for, if every run supports it, or the first that all of them do.

    Raises:
        ValueError: there is none, or the runs protect different units.
    """
    if len({run.unit for run in runs}) > 1:
        raise ValueError(
            "runs that protect different units cannot be accounted for together: "
            f"{'; '.join(f'{run.label} one {run.unit}' for run in runs)}. Train another "
            "network, or keep another ledger."
        )
    if relation is None:
        preferred = runs[0].relations if runs else RELATIONS
        for candidate in preferred:
            if all(candidate in run.relations for run in runs):
                return candidate
        labels = ", ".join(run.label for run in runs)
        raise ValueError(f"no relation is supported by all of {labels}.")
    check_choice(relation, "relation", RELATIONS)
    for run in runs:
        if relation not in run.relations:
            raise ValueError(
                f"relation={relation!r} does not hold for {run.label}, which supports "
                f"{', '.join(map(repr, run.relations))}."
            )
    return relation
