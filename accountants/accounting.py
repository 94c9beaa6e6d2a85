"""What a training run, or several on the same data, cost: epsilon and delta.

Three accountants:

- ``"pld"``: privacy loss distributions of dp_accounting, discretised by Connect-the-Dots
  (Doroshenko et al. 2022), which bounds from above on any grid. Where no run is subsampled there
  is nothing to discretise, and the closed form is evaluated instead.
- ``"rdp"``: Rényi differential privacy (Mironov, Talwar and Zhang 2019), converted by
  Proposition 12 of Canonne, Kamath and Steinke 2020. Looser, cheap, and good for any delta.
- ``"exact"``: the closed form of the Gaussian mechanism (Balle and Wang 2018, Theorem 8), to
  which any composition of unsampled Gaussians reduces. Refuses runs that are subsampled.

Every result is an upper bound: rounding goes to the safe side.
"""

import abc
import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from accountants import _validation
from accountants.mechanisms import TrainingRun
from accountants.sampling import RELATIONS, FullBatch, Relation, Sampling

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

Accountant = Literal["pld", "rdp", "exact"]
_LEAST_NOISE = 0.05
ACCOUNTANTS: tuple[Accountant, ...] = ("pld", "rdp", "exact")


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
        object.__setattr__(
            self, "epsilon", _validation.number("epsilon", self.epsilon, strict=True)
        )
        object.__setattr__(self, "delta", _validation.probability("delta", self.delta))


class Epsilon(float):
    """An epsilon that says of what: a float with `delta`, `relation` and `accountant`.

    >>> Epsilon(0.5, delta=1e-5, relation="zero_out", accountant="exact")
    Epsilon(0.5, delta=1e-05, relation='zero_out', accountant='exact')
    """

    def __new__(
        cls, value: float, delta: float, relation: Relation, accountant: Accountant
    ) -> "Epsilon":
        return super().__new__(cls, value)

    def __init__(
        self, value: float, delta: float, relation: Relation, accountant: Accountant
    ) -> None:
        self.delta = delta
        self.relation = relation
        self.accountant = accountant

    def __getnewargs__(self) -> tuple[Any, ...]:
        return float(self), self.delta, self.relation, self.accountant

    def __repr__(self) -> str:
        return (
            f"Epsilon({float(self)!r}, delta={self.delta!r}, relation={self.relation!r}, "
            f"accountant={self.accountant!r})"
        )

    def __str__(self) -> str:
        return str(float(self))


class Delta(float):
    """A delta that says of what: a float with `epsilon`, `relation` and `accountant`.

    >>> Delta(1e-6, epsilon=1.0, relation="zero_out", accountant="exact")
    Delta(1e-06, epsilon=1.0, relation='zero_out', accountant='exact')
    """

    def __new__(
        cls, value: float, epsilon: float, relation: Relation, accountant: Accountant
    ) -> "Delta":
        return super().__new__(cls, value)

    def __init__(
        self, value: float, epsilon: float, relation: Relation, accountant: Accountant
    ) -> None:
        self.epsilon = epsilon
        self.relation = relation
        self.accountant = accountant

    def __getnewargs__(self) -> tuple[Any, ...]:
        return float(self), self.epsilon, self.relation, self.accountant

    def __repr__(self) -> str:
        return (
            f"Delta({float(self)!r}, epsilon={self.epsilon!r}, relation={self.relation!r}, "
            f"accountant={self.accountant!r})"
        )

    def __str__(self) -> str:
        return str(float(self))


def epsilon(
    *,
    delta: float,
    noise_multiplier: float | None = None,
    sampling: Sampling | None = None,
    num_examples: int | None = None,
    steps: int | None = None,
    runs: Iterable[TrainingRun] | None = None,
    accountant: Accountant = "pld",
    relation: Relation | None = None,
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
        runs: instead of these four, the runs to be composed. None spent nothing.
        accountant: "pld", "rdp" or "exact", explained at the top of this module.
        relation: the neighbouring relation; the default is the first in the scheme's `relations`
            that every run supports.

    Returns:
        The epsilon, at least 0, infinite without noise; it names its delta, its relation, and the
        accountant that did the work ("exact" for "pld" where no run is subsampled).

    Raises:
        TypeError: an argument is missing, of another type, or both ways of naming runs are mixed.
        ValueError: a value is out of range, or nobody can account for the combination.
    """
    delta = _validation.probability("delta", delta)
    composed = _compose(
        _as_runs(noise_multiplier, sampling, num_examples, steps, runs), accountant, relation
    )
    return Epsilon(composed.curve.epsilon(delta), delta, composed.relation, composed.accountant)


def delta(
    *,
    epsilon: float,
    noise_multiplier: float | None = None,
    sampling: Sampling | None = None,
    num_examples: int | None = None,
    steps: int | None = None,
    runs: Iterable[TrainingRun] | None = None,
    accountant: Accountant = "pld",
    relation: Relation | None = None,
) -> Delta:
    """The delta of one training run, or of several `runs` on the same data, at `epsilon`.

    >>> from accountants import FullBatch
    >>> spent = delta(noise_multiplier=5.0, sampling=FullBatch(), num_examples=100, steps=1,
    ...               epsilon=1.0)
    >>> f"{spent:.3g}", spent.epsilon, spent.accountant
    ('1.75e-08', 1.0, 'exact')

    Args:
        epsilon: at least 0.
        noise_multiplier, sampling, num_examples, steps, runs, accountant, relation: as for
            `accountants.epsilon`.

    Returns:
        The delta, between 0 and 1, which names its epsilon, relation and accountant.

    Raises:
        TypeError, ValueError: as for `accountants.epsilon`.
    """
    epsilon = _validation.number("epsilon", epsilon)
    composed = _compose(
        _as_runs(noise_multiplier, sampling, num_examples, steps, runs), accountant, relation
    )
    return Delta(composed.curve.delta(epsilon), epsilon, composed.relation, composed.accountant)


def _as_runs(
    noise_multiplier: float | None,
    sampling: Sampling | None,
    num_examples: int | None,
    steps: int | None,
    runs: Iterable[TrainingRun] | None,
) -> tuple[TrainingRun, ...]:
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


def check_runs(name: str, runs: Iterable[TrainingRun]) -> tuple[TrainingRun, ...]:
    """`runs` as a tuple; TypeError if anything in it is no TrainingRun."""
    if isinstance(runs, TrainingRun):
        raise TypeError(f"{name} must be a list of runs, got the single run {runs!r}.")
    runs = tuple(runs)
    for run in runs:
        if not isinstance(run, TrainingRun):
            raise TypeError(f"{name} must hold TrainingRun values, got {run!r}.")
    return runs


class _Curve(abc.ABC):
    """The trade-off between epsilon and delta of some mechanism, from above."""

    @abc.abstractmethod
    def epsilon(self, delta: float) -> float: ...

    @abc.abstractmethod
    def delta(self, epsilon: float) -> float: ...


@dataclasses.dataclass(frozen=True)
class _Composed:
    curve: _Curve
    relation: Relation
    accountant: Accountant


def _compose(
    runs: Sequence[TrainingRun], accountant: Accountant, relation: Relation | None
) -> _Composed:
    _validation.one_of("accountant", accountant, ACCOUNTANTS)
    relation = _resolve_relation(runs, relation)
    # Runs of no participation release nothing, whatever their noise.
    runs = [run for run in runs if run.participations]
    sampled = [run for run in runs if run.sampling_probability < 1.0]

    if accountant == "exact" and sampled:
        raise ValueError(
            f"accountant='exact' is the closed form of unsampled Gaussians, got "
            f"{sampled[0].sampling!r}; 'pld' and 'rdp' account for subsampling."
        )
    if accountant == "rdp" and sampled and relation == "replace_one":
        raise ValueError(
            f"accountant='rdp' has no bound for {sampled[0].sampling!r} under "
            "relation='replace_one'; use accountant='pld', or relation='add_or_remove_one' or "
            "'zero_out'."
        )
    runs = [_unsampled_where_noiseless(run) for run in runs]
    if accountant == "pld" and all(run.sampling_probability == 1.0 for run in runs):
        accountant = "exact"

    curve: _Curve
    # Also where the square underflows.
    if any(run.noise_multiplier**2 == 0.0 for run in runs):
        curve = GaussianCurve(math.inf)
    elif accountant == "exact":
        curve = GaussianCurve(_gaussian_shift(runs, relation))
    elif accountant == "rdp":
        curve = _rdp_curve(runs, relation)
    else:
        curve = _pld_curve(runs, relation)
    return _Composed(curve, relation, accountant)


def _unsampled_where_noiseless(run: TrainingRun) -> TrainingRun:
    """The run, or an unsampled one that bounds it, where the noise protects next to nothing.

    Subsampling never adds to the loss (joint convexity); its formulas overflow with such noise.
    """
    if run.sampling_probability == 1.0 or run.noise_multiplier >= _LEAST_NOISE:
        return run
    return dataclasses.replace(run, sampling=FullBatch(), steps=run.participations)


def _resolve_relation(runs: Sequence[TrainingRun], relation: Relation | None) -> Relation:
    if relation is None:
        preferred = runs[0].sampling.relations if runs else RELATIONS
        return next(r for r in preferred if all(r in run.sampling.relations for run in runs))
    _validation.one_of("relation", relation, RELATIONS)
    for run in runs:
        if relation not in run.sampling.relations:
            raise ValueError(
                f"relation={relation!r} does not hold for {run.sampling!r}, which supports "
                f"{', '.join(map(repr, run.sampling.relations))}."
            )
    return relation


# --- the closed form ------------------------------------------------------------------------------


def _gaussian_shift(runs: Iterable[TrainingRun], relation: Relation) -> float:
    """Sensitivity over standard deviation of the one Gaussian that equals all the runs."""
    return math.hypot(
        *(math.sqrt(run.participations) / run.effective_noise_multiplier(relation) for run in runs)
    )


@dataclasses.dataclass(frozen=True)
class GaussianCurve(_Curve):
    """N(0, 1) against N(shift, 1): Balle and Wang 2018, Theorem 8."""

    shift: float

    def _log_delta(self, epsilon: float) -> float:
        from scipy import special

        upper = special.log_ndtr(self.shift / 2 - epsilon / self.shift)
        lower = epsilon + special.log_ndtr(-self.shift / 2 - epsilon / self.shift)
        # Where epsilon is huge the two agree to the last digit; -inf would claim delta = 0.
        return upper + (math.log(-math.expm1(lower - upper)) if lower < upper else 0.0)

    def delta(self, epsilon: float) -> float:
        if self.shift == 0.0:
            return 0.0
        if math.isinf(self.shift):
            return 1.0
        return min(1.0, math.exp(self._log_delta(epsilon)) * (1 + 1e-9))

    def epsilon(self, delta: float) -> float:
        from scipy import optimize

        if self.delta(0.0) <= delta:
            return 0.0
        # The privacy loss is N(shift² / 2, shift²), and delta at most its tail.
        upper = self.shift * (self.shift / 2 + math.sqrt(2 * math.log(1 / delta)))
        if math.isinf(upper):
            return math.inf
        target = math.log(delta)
        if self._log_delta(upper) >= target:
            return upper
        root = optimize.brentq(
            lambda value: self._log_delta(value) - target, 0.0, upper, xtol=1e-14, rtol=1e-13
        )
        return min(upper, root * (1 + 1e-9) + 1e-12)


# --- Rényi differential privacy -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class _RdpCurve(_Curve):
    orders: np.ndarray
    rdp: np.ndarray

    def epsilon(self, delta: float) -> float:
        from dp_accounting.rdp import rdp_privacy_accountant

        return float(rdp_privacy_accountant.compute_epsilon(self.orders, self.rdp, delta)[0])

    def delta(self, epsilon: float) -> float:
        from dp_accounting.rdp import rdp_privacy_accountant

        return float(rdp_privacy_accountant.compute_delta(self.orders, self.rdp, epsilon)[0])


def _rdp_curve(runs: Sequence[TrainingRun], relation: Relation) -> _RdpCurve:
    from dp_accounting import rdp

    accountant = rdp.RdpAccountant()
    for run in runs:
        accountant.compose(run.event(relation))
    # The logarithms of each release are good to some ulps of 1; a divergence that came out too
    # small, or negative, would be taken for epsilon = 0.
    rounding = 1e-14 * sum(run.participations for run in runs)
    divergences = np.maximum(accountant.rdp, 0.0) * (1 + 1e-12) + rounding
    return _RdpCurve(accountant.orders, divergences)


# --- privacy loss distributions -------------------------------------------------------------------

# A subsampled Gaussian: sampling probability, noise multiplier, is it under replace-one?
_Release = tuple[float, float, bool]

_GRID = 1e-3
_TRUNCATION = 1e-15


@dataclasses.dataclass(frozen=True, eq=False)
class _PldCurve(_Curve):
    pld: "PrivacyLossDistribution"
    # What the FFTs of the composition may have lost of delta by rounding.
    rounding: float

    def epsilon(self, delta: float) -> float:
        if delta < 10 * self.rounding:
            raise ValueError(
                f"delta must be at least {10 * self.rounding:.1e} for accountant='pld' at this "
                f"number of steps, as its sums round at that scale; got {delta!r}. "
                "accountant='rdp' takes any delta."
            )
        return max(0.0, float(self.pld.get_epsilon_for_delta(delta - self.rounding)) * (1 + 1e-12))

    def delta(self, epsilon: float) -> float:
        return min(1.0, float(self.pld.get_delta_for_epsilon(epsilon)) + self.rounding)


def _pld_curve(runs: Sequence[TrainingRun], relation: Relation) -> _Curve:
    unsampled: list[TrainingRun] = []
    counts: dict[_Release, int] = {}
    for run in runs:
        if run.sampling_probability == 1.0:
            unsampled.append(run)
            continue
        release = (run.sampling_probability, run.noise_multiplier, relation == "replace_one")
        # The latest goes last: while calibration varies it, all before stays composed.
        counts[release] = counts.pop(release, 0) + run.participations
    if not counts:
        return GaussianCurve(_gaussian_shift(unsampled, relation))
    groups = list(counts.items())
    if unsampled:
        groups.insert(0, ((1.0, 1 / _gaussian_shift(unsampled, relation), False), 1))
    grid = _grid(groups)
    pld = _released(*groups[-1], grid)
    if groups[:-1]:
        pld = _composed_pld(tuple(groups[:-1]), grid).compose(pld)
    return _PldCurve(pld, rounding=1e-13 + 2e-16 * sum(count for _, count in groups))


@functools.lru_cache(maxsize=4)
def _composed_pld(
    groups: tuple[tuple[_Release, int], ...], grid: float
) -> "PrivacyLossDistribution":
    return functools.reduce(
        lambda left, right: left.compose(right),
        (_released(release, count, grid) for release, count in groups),
    )


def _released(release: _Release, count: int, grid: float) -> "PrivacyLossDistribution":
    single = _single_pld(release, grid)
    if count <= 1_000:
        return single.self_compose(count)
    # In two stages: the rounding of an FFT raised to a power grows with the power, and
    # dp_accounting takes seconds over a small distribution a million times.
    stage = math.isqrt(count)
    repeats, rest = divmod(count, stage)
    pld = single.self_compose(stage, _TRUNCATION / repeats).self_compose(repeats, _TRUNCATION)
    return pld.compose(single.self_compose(rest), _TRUNCATION) if rest else pld


@functools.lru_cache(maxsize=8)
def _single_pld(release: _Release, grid: float) -> "PrivacyLossDistribution":
    """The privacy loss of one release.

    Under replace-one it is that of (1-q) N(0, σ²) + q N(1, σ²) and (1-q) N(0, σ²) + q N(-1, σ²),
    which dominates the pair of any two contributions g, g' of at most unit norm. For the set E on
    which the likelihood ratio exceeds α >= 1 is {x : c₀ exp(-g·x) + c₁ exp((g'-g)·x) <= q}; turn
    g' away from g, and E loses mass under N(g', σ²), since mirroring a point of E that lies
    ahead in the direction of the turn gives a point of E behind. So g' is opposite to g; on that
    line E is a half-line, and the norms are best at 1. The pair is its own mirror image, which
    covers α < 1.
    """
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import privacy_loss_distribution

    probability, noise_multiplier, replace = release
    return privacy_loss_distribution.from_gaussian_mechanism(
        noise_multiplier,
        value_discretization_interval=grid,
        # Mass beyond nine standard deviations counts as lost: per step less than what rounds.
        log_mass_truncation_bound=-40,
        sampling_prob=probability,
        neighboring_relation=(
            NeighboringRelation.REPLACE_ONE if replace else NeighboringRelation.ADD_OR_REMOVE_ONE
        ),
    )


def _grid(groups: Sequence[tuple[_Release, int]]) -> float:
    """A grid fit for the releases. Any is sound; too coarse a one only inflates epsilon.

    A step whose loss spreads over s gains a variance of about grid² / 6 by discretisation, so
    s / 8 costs some permille of epsilon; 1e-3 does for ordinary runs, while small sampling
    probabilities over many steps need less. Powers of two let neighbouring cases share a cache.
    """
    steps = sum(count for _, count in groups)
    variance, widest = 0.0, 0.0
    for (probability, noise_multiplier, replace), count in groups:
        factor = 2.0 if replace else 1.0
        # The loss at nine standard deviations, and the root of the chi-square divergence.
        exponent = 9 / noise_multiplier + 0.5 / noise_multiplier**2
        reach = factor * math.log1p(probability * math.expm1(min(exponent, 600.0)))
        chi = factor * probability * math.sqrt(math.expm1(min(noise_multiplier**-2, 600.0)))
        variance += count * min(chi, reach) ** 2
        widest = max(widest, reach)
    finest = max(math.sqrt(variance / steps) / 8, widest / 20_000, 1e-8)
    grid = _GRID * 2.0 ** min(0, math.ceil(math.log2(finest / _GRID)))
    # Extreme losses, already beyond any use, must not exhaust time and memory.
    span = max(widest / 50_000, 16 * math.sqrt(variance) / 2**19)
    return grid * 2.0 ** max(0, math.ceil(math.log2(span / grid)))
