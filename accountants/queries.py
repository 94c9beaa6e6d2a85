"""What else has touched the data: statistics with noise, published tables, the work of others.

A `Query` is stated by what is known of it. How it is composed with training follows from that:

| stated as | composed by ``"pld"`` as | by ``"rdp"`` |
|---|---|---|
| `laplace`, `gaussian` | its privacy loss distribution | its Rényi divergences |
| `epsilon`, `delta` | the pair that dominates whatever is (ε, δ)-private | refused where δ > 0 |
| `rho` | a pair that dominates whatever is ρ-zCDP | αρ at each order α |
| `event` | its privacy loss distribution, or as `rho` | its Rényi divergences, or refused |

All of these are upper bounds, so basic composition, which adds up epsilons and deltas, is never
needed: for (ε, δ) pairs the composition of the dominating pairs is the least that holds for all
such mechanisms (Kairouz, Oh and Viswanath 2015, Theorem 3.3).
"""

import dataclasses
import functools
import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from accountants.mechanisms import UNITS, Mechanism, TrainingRun
from accountants.numerics import ORDERS, WIDTH, event_rdp, renyi_pld, sampled_scale
from accountants.releases import Gaussian, Release, Zcdp, gaussian_release
from accountants.sampling import RELATIONS, Relation
from accountants.validation import (
    argument_message,
    check_choice,
    check_integer,
    check_number,
)

if TYPE_CHECKING:
    import dp_accounting
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

_STATED = ("laplace", "gaussian", "epsilon", "rho", "event")
# Long enough for a sentence, and for one line of a table.
_LONGEST = 200
# A loss that large counts as no privacy at all: its exponential is no number.
_MOST_LOSS = 500.0
# More noise counts as this much, and smaller losses as spread so far: grids are no finer.
_MOST_NOISE = 1e6
_LEAST_SPREAD = 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Query(Mechanism):
    """A use of the data that is no training: a statistic with noise, or whatever is private.

    Exactly one of `laplace`, `gaussian`, `epsilon`, `rho` and `event` states its privacy.

    >>> means = Query(description="column means", laplace=2.0)
    >>> means.relations, means.label
    (('add_or_remove_one', 'zero_out', 'replace_one'), "'column means'")
    >>> from accountants import epsilon
    >>> round(epsilon(runs=[means], delta=1e-6), 3)
    0.5

    Args:
        description: what it was, in one line of at most 200 printable characters.
        laplace: scale of Laplace noise over the ℓ1 sensitivity: 1 / ε.
        gaussian: standard deviation of Gaussian noise over the ℓ2 sensitivity.
        epsilon, delta: it is (ε, δ)-differentially private; delta is 0 by default.
        rho: it is ρ-zero-concentrated differentially private (Bun and Steinke 2016).
        event: a `dp_accounting.DpEvent`.
        relation: the neighbouring relation for which that is true. What holds where an example is
            added or removed holds where it is blanked, as a blank is read as no example; and what
            holds for either of these costs two changes where an example is replaced. Of sampled
            and other compound events nothing is derived for "replace_one".
        times: how often it took place; 0 is not at all.
        unit: what that is true for: an ``"example"``, or a ``"group"`` of them.

    Raises:
        TypeError: an argument is of another type, or not one of the five is given.
        ValueError: a number is negative or not finite; the description is no line; or
            dp_accounting has no account of the event.
    """

    description: str
    laplace: float | None = None
    gaussian: float | None = None
    epsilon: float | None = None
    delta: float | None = None
    rho: float | None = None
    event: "dp_accounting.DpEvent | None" = None
    relation: Relation = "add_or_remove_one"
    times: int = 1
    unit: str = "example"

    steps = 0

    def __post_init__(self) -> None:
        check_description(self.description)
        check_choice(self.relation, "relation", RELATIONS)
        check_choice(self.unit, "unit", UNITS)
        object.__setattr__(self, "times", check_integer(self.times, "times", 0))
        given = [name for name in _STATED if getattr(self, name) is not None]
        if len(given) != 1:
            raise TypeError(
                f"one of {', '.join(_STATED)} must be given, got {' and '.join(given) or 'none'}."
            )
        if self.delta is not None and self.epsilon is None:
            raise TypeError(f"`delta` goes with `epsilon`; got delta={self.delta!r} alone.")
        for name in ("laplace", "gaussian", "rho"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, check_number(value, name))
        if self.epsilon is not None:
            delta = 0.0 if self.delta is None else self.delta
            delta = check_number(delta, "delta", zero=True, below=1.0)
            object.__setattr__(self, "delta", delta)
            epsilon = check_number(self.epsilon, "epsilon", zero=delta > 0.0)
            object.__setattr__(self, "epsilon", epsilon)
        if self.event is not None:
            _check_event(self.event, self.relation)
            object.__setattr__(self, "event", event_from_dict(event_to_dict(self.event)))

    @property
    def relations(self) -> tuple[Relation, ...]:
        """The relation that was stated, and those that follow from it."""
        if self.relation == "replace_one":
            return ("replace_one",)
        derived = ("zero_out",) if self.relation == "add_or_remove_one" else ()
        twice = ("replace_one",) if self.event is None else ()
        return (self.relation, *derived, *twice)

    @property
    def count(self) -> int:
        """How often it took place."""
        return self.times

    @property
    def participations(self) -> int:
        """How often it took place."""
        return self.times

    @property
    def label(self) -> str:
        """The description, in quotes."""
        return repr(self.description)

    @property
    def words(self) -> str:
        """The query on one line.

        >>> Query(description="a count", epsilon=0.5, delta=1e-9, times=3).words
        "'a count': (0.5, 1e-09)-private, 3 times"
        """
        if self.laplace is not None:
            words = f"Laplace noise of {self.laplace:g} times the sensitivity"
        elif self.gaussian is not None:
            words = f"Gaussian noise of {self.gaussian:g} times the sensitivity"
        elif self.epsilon is not None:
            words = f"({self.epsilon:g}, {self.delta:g})-private"
        elif self.rho is not None:
            words = f"{self.rho:g}-zCDP"
        else:
            words = type(self.event).__name__
        often = "" if self.times == 1 else f", {self.times} times"
        return f"{self.label}: {words}{often}"

    @property
    def accounted(self) -> str:
        """How ``"pld"`` composes it, in words."""
        if self.epsilon is not None:
            return "as the worst of all that is (epsilon, delta)-private"
        if self.rho is not None or (self.event is not None and not _has_pld(self.event)):
            return "by its Rényi divergences, as the worst of all that have them"
        return "by its privacy loss distribution"

    def counted(self, count: int) -> "Query":
        """The query with another number of times."""
        return dataclasses.replace(self, times=count)

    def release(self, relation: Relation) -> Release:
        """The pair of distributions that dominates it, for two data sets that are related so."""
        twice = 1 if relation == self.relation or relation != "replace_one" else 2
        if self.gaussian is not None:
            return gaussian_release(min(self.gaussian, _MOST_NOISE), twice)
        found = self._release(twice)
        if not found.scale()[1] < _MOST_LOSS:
            return gaussian_release(0.0, 1.0)
        return found

    def _release(self, twice: int) -> Release:
        if self.laplace is not None:
            return LaplaceRelease(min(self.laplace, _MOST_NOISE) / twice)
        if self.epsilon is not None:
            # Two changes, one after the other, as in `curves.GroupCurve`.
            delta = self.delta * (1 + math.exp(min(self.epsilon, 700.0)) if twice == 2 else 1)
            return PairRelease(twice * max(self.epsilon, 1 / _MOST_NOISE), min(1.0, delta))
        if self.rho is not None:
            # Bun and Steinke 2016, Proposition 1.9: k changes cost k²ρ.
            return Zcdp(self.rho * twice**2)
        return EventRelease(json.dumps(event_to_dict(self.event), sort_keys=True))

    def group_release(self, relation: Relation, size: int) -> Release | None:
        """The `release` of a single example; of groups it is not known."""
        return self.release(relation) if size == 1 else None

    def to_dict(self) -> dict[str, Any]:
        """The query as a dict of JSON values.

        >>> query = Query(description="a table", rho=0.1)
        >>> query.to_dict()["query"]
        {'description': 'a table', 'rho': 0.1, 'relation': 'add_or_remove_one'}
        >>> Query.from_dict(query.to_dict()) == query
        True
        """
        names = [field.name for field in dataclasses.fields(self) if field.name != "times"]
        values = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.unit == "example":
            del values["unit"]
        if self.event is not None:
            values["event"] = event_to_dict(self.event)
        return {"query": values, "times": self.times}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Query":
        """The inverse of `to_dict`; raises as the constructor does."""
        query = dict(values["query"])
        if query.get("event") is not None:
            query["event"] = event_from_dict(query["event"])
        return cls(**query, times=values["times"])


def mechanism_from_dict(values: dict[str, Any]) -> Mechanism:
    """The inverse of `to_dict`, whichever kind it was; raises as the constructors do."""
    return (Query if "query" in values else TrainingRun).from_dict(values)


def check_description(value: Any, name: str = "description") -> str:
    """`value`, a text of one line that a terminal shows as it is."""
    if not isinstance(value, str):
        raise TypeError(argument_message(name, "a text", value))
    # Line breaks and control characters could make one entry look like several.
    if not value.strip() or not value.isprintable() or len(value) > _LONGEST:
        accepted = f"one line of 1 to {_LONGEST} printable characters"
        raise ValueError(argument_message(name, accepted, value))
    return value


# --- releases -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LaplaceRelease(Release):
    """Laplace(1, b) against Laplace(0, b), for a scale b.

    For a vector, the worst is that one coordinate moves by all of the ℓ1 distance, as dp_accounting
    has it; a test compares this with distances that are split.
    """

    noise: float

    source = "dp_accounting; Mironov 2017, Proposition 6"

    def scale(self) -> tuple[float, float]:
        return _wide(1 / self.noise, 1 / self.noise)

    def pld(self, grid: float) -> "PrivacyLossDistribution":
        from dp_accounting.pld import privacy_loss_distribution

        return privacy_loss_distribution.from_laplace_mechanism(
            self.noise, value_discretization_interval=grid
        )

    def rdp(self) -> np.ndarray:
        """Mironov 2017, Proposition 6, in logarithms: log of a sum of two exponentials."""
        first = np.log(ORDERS / (2 * ORDERS - 1)) + (ORDERS - 1) / self.noise
        second = np.log((ORDERS - 1) / (2 * ORDERS - 1)) - ORDERS / self.noise
        return _safe(np.logaddexp(first, second) / (ORDERS - 1))


@dataclasses.dataclass(frozen=True)
class PairRelease(Release):
    """The pair that dominates every (ε, δ)-private mechanism: Kairouz, Oh and Viswanath 2015.

    With probability δ it gives all away; otherwise it is randomised response at ε.
    """

    epsilon: float
    delta: float

    source = "Kairouz, Oh and Viswanath 2015, Theorem 3.3"

    def scale(self) -> tuple[float, float]:
        reach = self.epsilon if self.delta < 1 - 1e-6 else math.inf
        return _wide(self.epsilon, reach)

    def pld(self, grid: float) -> "PrivacyLossDistribution":
        from dp_accounting.pld import common, privacy_loss_distribution

        return privacy_loss_distribution.from_privacy_parameters(
            common.DifferentialPrivacyParameters(self.epsilon, self.delta),
            value_discretization_interval=grid,
        )

    def rdp(self) -> np.ndarray:
        """That of randomised response, where delta is 0 (Mironov 2017, Proposition 5)."""
        if self.delta > 0.0:
            raise ValueError(
                f"accountant='rdp' has no bound for what is ({self.epsilon:g}, {self.delta:g})-"
                "private and no more is known of; use 'pld'."
            )
        # Of p = e^ε / (1 + e^ε): log(p^α (1 - p)^(1 - α) + (1 - p)^α p^(1 - α)) / (α - 1).
        yes = -np.logaddexp(0.0, -self.epsilon)
        no = yes - self.epsilon
        first = ORDERS * yes + (1 - ORDERS) * no
        second = ORDERS * no + (1 - ORDERS) * yes
        return _safe(np.logaddexp(first, second) / (ORDERS - 1))


@dataclasses.dataclass(frozen=True)
class EventRelease(Release):
    """An event of dp_accounting, written down as JSON, as dp_accounting accounts for it.

    Noise multipliers mean the noise over the sensitivity, so it is asked for the relation in which
    its accountants add nothing to that.
    """

    text: str

    source = "dp_accounting"

    def scale(self) -> tuple[float, float]:
        return _wide(*_event_scale(self._event()))

    def pld(self, grid: float) -> "PrivacyLossDistribution":
        found = _event_pld(self._event(), grid)
        if found is not None:
            return found
        return renyi_pld(self.rdp(), grid)

    def rdp(self) -> np.ndarray:
        found = self._rdp()
        if found is None:
            raise ValueError(f"accountant='rdp' has no bound for {self._event()}; use 'pld'.")
        return found

    def _event(self) -> "dp_accounting.DpEvent":
        return event_from_dict(json.loads(self.text))

    def _rdp(self) -> np.ndarray | None:
        from dp_accounting import rdp

        event = self._event()
        return _safe(event_rdp(event)) if rdp.RdpAccountant(ORDERS).supports(event) else None


def _wide(spread: float, reach: float) -> tuple[float, float]:
    return max(spread, _LEAST_SPREAD), max(reach, _LEAST_SPREAD)


def _safe(divergences: np.ndarray) -> np.ndarray:
    """The divergences with room for the rounding of a few operations."""
    return np.maximum(divergences, 0.0) * (1 + 1e-12) + 1e-14


def _event_scale(event: "dp_accounting.DpEvent") -> tuple[float, float]:
    """As `Release.scale`, roughly: it chooses grids, on which any bound holds."""
    from dp_accounting import dp_event

    match event:
        case dp_event.ComposedDpEvent():
            parts = [_event_scale(part) for part in event.events]
            return _composed([(*part, 1) for part in parts])
        case dp_event.SelfComposedDpEvent():
            return _composed([(*_event_scale(event.event), event.count)])
        case dp_event.GaussianDpEvent():
            return Gaussian(1 / event.noise_multiplier).scale()
        case dp_event.LaplaceDpEvent():
            return 1 / event.noise_multiplier, 1 / event.noise_multiplier
        case dp_event.DiscreteLaplaceDpEvent():
            most = event.noise_parameter * event.sensitivity
            return most, most
        case dp_event.MixtureOfGaussiansDpEvent():
            return Gaussian(max(event.sensitivities) / event.standard_deviation).scale()
        case dp_event.TruncatedSubsampledGaussianDpEvent():
            return sampled_scale(event.sampling_probability, event.noise_multiplier)
        case dp_event.PoissonSampledDpEvent(event=dp_event.GaussianDpEvent()):
            return sampled_scale(event.sampling_probability, event.event.noise_multiplier)
        case dp_event.ZCDpEvent():
            spread, reach = Zcdp(event.rho).scale()
            return spread, event.xi + reach
        case dp_event.PoissonSampledDpEvent() | dp_event.RepeatAndSelectDpEvent():
            return _event_scale(event.event)
    return 0.0, 0.0


def _composed(parts: list[tuple[float, float, int]]) -> tuple[float, float]:
    """The scale of releases that take place so many times each."""
    spread = math.sqrt(sum(count * spread**2 for spread, _, count in parts))
    most = sum(count * reach for _, reach, count in parts)
    largest = max((reach for _, reach, _ in parts), default=0.0)
    return spread, min(most, spread**2 / 2 + WIDTH * spread + largest)


def _event_pld(event: "dp_accounting.DpEvent", grid: float) -> "PrivacyLossDistribution | None":
    """As dp_accounting composes it; None where it does not."""
    from dp_accounting.pld import PLDAccountant

    if not _has_pld(event):
        return None
    return PLDAccountant(value_discretization_interval=grid).compose(event)._pld


def _has_pld(event: "dp_accounting.DpEvent") -> bool:
    from dp_accounting.pld import PLDAccountant

    return PLDAccountant().supports(event)


def _check_event(event: "dp_accounting.DpEvent", relation: Relation) -> None:
    """Raises TypeError or ValueError for an event that cannot be accounted for."""
    from dp_accounting import rdp

    text = json.dumps(event_to_dict(event))
    if not (_has_pld(event) or rdp.RdpAccountant(ORDERS).supports(event)):
        raise ValueError(f"dp_accounting has no account of {event!r}. {_STATE_A_PAIR}")
    if relation == "replace_one" and any(f'"{name}DpEvent"' in text for name in _SAMPLED):
        raise ValueError(
            f"what is known of {event!r} is for data sets with one example more or less, not for "
            f"relation='replace_one'. {_STATE_A_PAIR}"
        )
    # Before anything is written: what nobody can evaluate would spoil all that it is added to.
    try:
        _try_event(json.dumps(event_to_dict(event), sort_keys=True))
    except Exception as error:
        raise ValueError(
            f"dp_accounting cannot account for {event!r} ({error}). {_STATE_A_PAIR}"
        ) from error


@functools.lru_cache(maxsize=256)
def _try_event(text: str) -> None:
    """Has dp_accounting evaluate an event on a coarse grid."""
    release = EventRelease(text)
    spread, reach = release.scale()
    if reach < _MOST_LOSS:
        release.pld(max(spread / 4, reach / 1000))


_STATE_A_PAIR = "If it is (epsilon, delta)-private for another reason, state epsilon= and delta=."


# --- events as JSON -------------------------------------------------------------------------------


def event_to_dict(event: "dp_accounting.DpEvent") -> dict[str, Any]:
    """An event of dp_accounting as JSON values.

    >>> import dp_accounting
    >>> event_to_dict(dp_accounting.GaussianDpEvent(2.0))
    {'name': 'GaussianDpEvent', 'noise_multiplier': 2.0}

    Raises:
        TypeError: it is no event of dp_accounting.
        ValueError: a number of it is negative or not finite, or it is one without privacy.
    """
    import attr

    kind = type(event)
    if _event_kinds().get(kind.__name__) is not kind:
        known = ", ".join(_event_kinds())
        raise TypeError(
            f"`event` must be of dp_accounting and one of {known}; got {event!r}. {_STATE_A_PAIR}"
        )
    values = {field.name: getattr(event, field.name) for field in attr.fields(kind)}
    chances = values.get("sampling_probs")
    if chances is not None and not math.isclose(sum(chances), 1.0, rel_tol=1e-9):
        raise ValueError(argument_message("sampling_probs", "numbers that add up to 1", chances))
    return {"name": kind.__name__, **{n: _plain(v, n) for n, v in values.items()}}


def _plain(value: Any, name: str) -> Any:
    import dp_accounting

    if isinstance(value, dp_accounting.DpEvent):
        return event_to_dict(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item, name) for item in value]
    if name in _WHOLE:
        return check_integer(value, name)
    number = check_number(value, name, zero=name not in _POSITIVE)
    if "prob" in name and number > 1.0:
        raise ValueError(argument_message(name, "a number from 0 to 1", value))
    return number


_WHOLE = ("count", "sensitivity", "dataset_size", "truncated_batch_size")
_POSITIVE = ("noise_multiplier", "noise_parameter", "standard_deviation", "mean")
# Whose dp_accounting accounts hold where an example is added, removed or blanked.
_SAMPLED = ("MixtureOfGaussians", "PoissonSampled", "TruncatedSubsampledGaussian")


def event_from_dict(values: dict[str, Any]) -> "dp_accounting.DpEvent":
    """The inverse of `event_to_dict`; raises as it does."""
    if not isinstance(values, dict):
        raise TypeError(argument_message("event", "a dict", values))
    fields = dict(values)
    kind = _event_kinds().get(check_choice(fields.pop("name", None), "name", _event_kinds()))
    event = kind(**{name: _event_value(value) for name, value in fields.items()})
    event_to_dict(event)
    return event


def _event_value(value: Any) -> Any:
    if isinstance(value, dict):
        return event_from_dict(value)
    return tuple(_event_value(item) for item in value) if isinstance(value, list) else value


@functools.cache
def _event_kinds() -> "dict[str, type[dp_accounting.DpEvent]]":
    """The events that dp_accounting can account for under "add or remove one", by their names."""
    import dp_accounting

    names = (
        "ComposedDpEvent",
        "DiscreteLaplaceDpEvent",
        "GaussianDpEvent",
        "LaplaceDpEvent",
        "MixtureOfGaussiansDpEvent",
        "NoOpDpEvent",
        "PoissonSampledDpEvent",
        "RepeatAndSelectDpEvent",
        "SelfComposedDpEvent",
        "TruncatedSubsampledGaussianDpEvent",
        "ZCDpEvent",
    )
    return {name: getattr(dp_accounting.dp_event, name) for name in names}
