"""Curves of delta over epsilon, from above, of composed releases."""

import abc
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from accountants.numerics import ORDERS, self_convolve
from accountants.releases import Gaussian, Release, Zcdp

if TYPE_CHECKING:
    from dp_accounting.pld.pld_pmf import PLDPmf
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

# How often each release takes place.
Counts = Mapping[Release, int]


class Curve(abc.ABC):
    """The trade-off between epsilon and delta of some mechanism, from above."""

    @abc.abstractmethod
    def epsilon(self, delta: float) -> float:
        """An epsilon that holds at `delta`; infinite if none does."""

    @abc.abstractmethod
    def delta(self, epsilon: float) -> float:
        """A delta that holds at `epsilon`."""

    def deltas(self, epsilons: np.ndarray) -> np.ndarray:
        """Deltas that hold at each of some epsilons of at least 0."""
        return np.array([self.delta(float(epsilon)) for epsilon in epsilons])


# --- the closed form ------------------------------------------------------------------------------


def gaussian_shift(counts: Counts) -> float | None:
    """The shift of the one Gaussian that equals all the releases; None if any is sampled."""
    if not all(isinstance(release, Gaussian) for release in counts):
        return None
    return math.hypot(*(math.sqrt(count) * release.shift for release, count in counts.items()))


@dataclasses.dataclass(frozen=True)
class GaussianCurve(Curve):
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


# --- Rényi differential privacy, and its special case of zero concentration -----------------------


@dataclasses.dataclass(frozen=True, eq=False)
class RdpCurve(Curve):
    """Divergences at `ORDERS`, converted by Proposition 12 of Canonne, Kamath and Steinke 2020."""

    rdp: np.ndarray

    def epsilon(self, delta: float) -> float:
        from dp_accounting.rdp import rdp_privacy_accountant

        return float(rdp_privacy_accountant.compute_epsilon(ORDERS, self.rdp, delta)[0])

    def delta(self, epsilon: float) -> float:
        from dp_accounting.rdp import rdp_privacy_accountant

        return float(rdp_privacy_accountant.compute_delta(ORDERS, self.rdp, epsilon)[0])


def composed_rdp(counts: Counts) -> np.ndarray:
    """Upper bounds on the Rényi divergences at `ORDERS` of all the releases together."""
    divergences = np.zeros(len(ORDERS))
    for release, count in counts.items():
        divergences += count * release.rdp()
    # The logarithms of each release are good to some ulps of 1; a divergence that came out too
    # small, or negative, would be taken for epsilon = 0.
    return np.maximum(divergences, 0.0) * (1 + 1e-12) + 1e-14 * sum(counts.values())


@dataclasses.dataclass(frozen=True)
class ZcdpCurve(Curve):
    """ρ-zCDP: a Rényi divergence of at most ρα at every order α (Bun and Steinke 2016).

    Converted as Rényi divergences are, at the best of all orders instead of a table of them.
    """

    rho: float

    def epsilon(self, delta: float) -> float:
        if self.rho == 0.0 or math.isinf(self.rho):
            return self.rho
        # Near the order that is best for the simpler conversion ρα + log(1 / δ) / (α - 1).
        middle = 1 + math.sqrt(math.log(1 / delta) / self.rho)
        found = self._least(
            lambda order: (
                self.rho * order + math.log1p(-1 / order) - math.log(delta * order) / (order - 1)
            ),
            middle,
        )
        return max(0.0, found)

    def delta(self, epsilon: float) -> float:
        if self.rho == 0.0 or math.isinf(self.rho):
            return min(1.0, self.rho)
        middle = max(1.01, (epsilon / self.rho + 1) / 2)
        exponent = self._least(
            lambda order: (
                (order - 1) * (self.rho * order - epsilon + math.log1p(-1 / order))
                - math.log(order)
            ),
            middle,
        )
        return min(1.0, math.exp(min(exponent, 0.0)))

    def _least(self, bound: Callable[[float], float], middle: float) -> float:
        """The least of a bound over the orders; any order gives one that holds."""
        from scipy import optimize

        found = optimize.minimize_scalar(
            lambda log_order: bound(1 + math.exp(log_order)),
            bounds=(math.log(middle - 1) - 5, math.log(middle - 1) + 5),
            method="bounded",
            options={"xatol": 1e-9},
        )
        return float(found.fun) * (1 + 1e-12) + 1e-15


# --- privacy loss distributions -------------------------------------------------------------------

_GRID = 1e-3
_TRUNCATION = 1e-15


@dataclasses.dataclass(frozen=True, eq=False)
class PldCurve(Curve):
    """A privacy loss distribution of dp_accounting."""

    pld: "PrivacyLossDistribution"
    # What the FFTs of the composition may have lost of delta by rounding.
    rounding: float

    def epsilon(self, delta: float) -> float:
        if delta <= self.rounding:
            raise ValueError(
                f"delta must be above {self.rounding:.1e} for accountant='pld' at this number of "
                f"steps, as its sums round at that scale; got {delta!r}."
            )
        return max(0.0, float(self.pld.get_epsilon_for_delta(delta - self.rounding)) * (1 + 1e-12))

    def delta(self, epsilon: float) -> float:
        return min(1.0, float(self.pld.get_delta_for_epsilon(epsilon)) + self.rounding)

    def deltas(self, epsilons: np.ndarray) -> np.ndarray:
        """As `delta`, for all at once: sums over the losses above each epsilon."""
        if np.max(epsilons) > 600.0:  # where exp(-loss) has lost its digits
            return super().deltas(epsilons)
        found = np.zeros(len(epsilons))
        for pmf in (self.pld._pmf_remove, self.pld._pmf_add):
            dense = pmf.to_dense_pmf()
            losses = dense._discretization * (dense._lower_loss + np.arange(len(dense._probs)))
            above = losses > 0.0
            losses, masses = losses[above], dense._probs[above]
            first = np.searchsorted(losses, epsilons, side="right")
            upper, lower = (
                np.append(np.cumsum(values[::-1])[::-1], 0.0)[first]
                for values in (masses, masses * np.exp(-losses))
            )
            # Each sum is off by as many roundings as it has terms, at most.
            slack = 2.5e-16 * len(losses) * upper
            delta = np.maximum(upper - np.exp(epsilons) * lower, 0.0)
            found = np.maximum(found, dense._infinity_mass + delta + slack)
        return np.minimum(1.0, found + self.rounding)


@dataclasses.dataclass(frozen=True, eq=False)
class LeastCurve(Curve):
    """The least of several curves of the same releases: each of them holds.

    Rényi divergences lose more than losses on a grid, but nothing at a delta near what sums of
    these round at: there they are tried, too.

    Attributes:
        curves: each with the name of the accountant that found it; the first one has the losses on
            a grid.
        counts: the releases.
    """

    curves: tuple[tuple[str, Curve], ...]
    counts: Counts

    def best(self, delta: float) -> tuple[float, str]:
        """The least epsilon at `delta`, and who found it.

        Raises:
            ValueError: nobody can say at so small a delta.
        """
        found, refused, curves = [], None, self.curves
        if delta < 100 * getattr(curves[0][1], "rounding", 0.0):
            curves = (*curves, *self._divergences)
        for name, curve in curves:
            try:
                found.append((curve.epsilon(delta), name))
            except ValueError as error:  # a delta below what its sums round at
                refused = error
        if not found:
            raise refused
        return min(found)

    @functools.cached_property
    def _divergences(self) -> tuple[tuple[str, Curve], ...]:
        try:
            return (("rdp", RdpCurve(composed_rdp(self.counts))),)
        except ValueError:  # one of them has none
            return ()

    def epsilon(self, delta: float) -> float:
        return self.best(delta)[0]

    def delta(self, epsilon: float) -> float:
        return min(curve.delta(epsilon) for _, curve in self.curves)

    def deltas(self, epsilons: np.ndarray) -> np.ndarray:
        return np.min([curve.deltas(epsilons) for _, curve in self.curves], axis=0)


def least_curve(counts: Counts) -> Curve:
    """The curve of releases that are not all unsampled, by whichever accountant is the tightest.

    All but the losses on a grid are tried only where one of the releases says that they may win.
    """
    if all(release.unsampled() is None for release in counts):
        return LeastCurve((("pld", pld_curve(counts)),), counts)
    plain: dict[Release, int] = {}
    for release, count in counts.items():
        release = release.unsampled() or release
        plain[release] = plain.get(release, 0) + count
    shift = gaussian_shift(plain)
    found = [
        ("pld", pld_curve(counts)),
        ("pld", pld_curve(plain)) if shift is None else ("exact", GaussianCurve(shift)),
    ]
    least = LeastCurve(tuple(found), counts)
    return LeastCurve((*least.curves, *least._divergences), counts)


def pld_curve(counts: Counts) -> Curve:
    """The curve of releases that are not all unsampled."""
    unsampled = {one: count for one, count in counts.items() if isinstance(one, Gaussian)}
    # What is known by its ρ alone: these add up before they become one distribution.
    rho = sum(count * one.rho for one, count in counts.items() if isinstance(one, Zcdp))
    if math.isinf(gaussian_shift(unsampled)) or rho > 300.0:
        return GaussianCurve(math.inf)  # without noise, or next to none: nothing is private
    # The latest goes last: while calibration varies it, all before stays composed.
    groups = [
        (one, count)
        for one, count in counts.items()
        if one not in unsampled and not isinstance(one, Zcdp)
    ]
    if rho:
        groups.insert(0, (Zcdp(rho), 1))
    if shift := gaussian_shift(unsampled):
        groups.insert(0, (Gaussian(shift), 1))
    grid = _grid(groups)
    pld = _released(*groups[-1], grid)
    if groups[:-1]:
        pld = _composed_pld(tuple(groups[:-1]), grid).compose(pld)
    return PldCurve(pld, rounding=1e-13 + 2e-16 * sum(count for _, count in groups))


@functools.lru_cache(maxsize=4)
def _composed_pld(
    groups: tuple[tuple[Release, int], ...], grid: float
) -> "PrivacyLossDistribution":
    # A ledger's runs are added one by one: what was composed last is often how this begins.
    known, pld = _LAST_COMPOSED.get(grid, ((), None))
    if groups[: len(known)] != known:
        known, pld = (), None
    for release, count in groups[len(known) :]:
        single = _released(release, count, grid)
        pld = single if pld is None else pld.compose(single)
    if len(_LAST_COMPOSED) > 3:
        _LAST_COMPOSED.clear()
    _LAST_COMPOSED[grid] = groups, pld
    return pld


# For each grid the groups, and their distribution.
_LAST_COMPOSED: dict[float, tuple[tuple[Any, ...], Any]] = {}


def _released(release: Release, count: int, grid: float) -> "PrivacyLossDistribution":
    from dp_accounting.pld import privacy_loss_distribution

    single = _single_pld(release, grid)
    directions = [single._pmf_remove]
    if not single._symmetric:
        directions.append(single._pmf_add)
    return privacy_loss_distribution.PrivacyLossDistribution(
        *(_self_compose(pmf, count) for pmf in directions)
    )


def _self_compose(pmf: "PLDPmf", count: int) -> "PLDPmf":
    """The sum of `count` losses; dp_accounting's own has wide bounds for long distributions."""
    if count <= 1_000:
        return _sum_of(pmf, count, _TRUNCATION)
    # In two stages: the rounding of an FFT raised to a power grows with the power.
    stage = math.isqrt(count)
    repeats, rest = divmod(count, stage)
    most = _sum_of(_sum_of(pmf, stage, _TRUNCATION / repeats), repeats, _TRUNCATION)
    return most.compose(_sum_of(pmf, rest, _TRUNCATION), _TRUNCATION) if rest else most


def _sum_of(pmf: "PLDPmf", count: int, tail: float) -> "PLDPmf":
    """The losses of so many releases; `tail` of their mass counts as infinite loss."""
    from dp_accounting.pld import pld_pmf

    single = pmf.to_dense_pmf()
    first, masses = self_convolve(single._probs, count, tail)
    infinite = single._infinity_mass
    lost = tail - math.expm1(count * math.log1p(-infinite)) if infinite < 1.0 else 1.0
    return pld_pmf.DensePLDPmf(
        single._discretization, single._lower_loss * count + first, masses, min(lost, 1.0), True
    )


@functools.lru_cache(maxsize=8)
def _single_pld(release: Release, grid: float) -> "PrivacyLossDistribution":
    return release.pld(grid)


def _grid(groups: Sequence[tuple[Release, int]]) -> float:
    """A grid fit for the releases. Any is sound; too coarse a one only inflates epsilon.

    A step whose loss spreads over s gains a variance of about grid² / 6 by discretisation, so
    s / 8 costs some permille of epsilon; 1e-3 does for ordinary runs, while small sampling
    probabilities over many steps need less, though single losses of theirs are far longer than s.
    Powers of two let neighbouring cases share a cache.
    """
    steps = sum(count for _, count in groups)
    variance, widest = 0.0, 0.0
    for release, count in groups:
        spread, reach = release.scale()
        variance += count * min(spread, reach) ** 2
        widest = max(widest, reach)
    finest = max(math.sqrt(variance / steps) / 8, widest / 500_000, 1e-8)
    grid = _GRID * 2.0 ** min(0, math.ceil(math.log2(finest / _GRID)))
    # Extreme losses, already beyond any use, must not exhaust time and memory.
    places = 1_000_000 if widest < 50.0 else 50_000
    span = max(widest / places, 16 * math.sqrt(variance) / 2**19)
    return grid * 2.0 ** max(0, math.ceil(math.log2(span / grid)))


# --- groups ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class GroupCurve(Curve):
    """The curve for data sets that differ in `size` examples, from the `curve` for one.

    Through size - 1 data sets between, P(S) <= exp(ε) P'(S) + δ chains up to size·ε and
    δ (1 + exp(ε) + ... + exp((size - 1) ε)) (Dwork and Roth 2014, Section 2.3; Vadhan 2017).
    """

    curve: Curve
    size: int

    def delta(self, epsilon: float) -> float:
        single = epsilon / self.size
        delta = self.curve.delta(single)
        if delta == 0.0:
            return 0.0
        log_sum = float(np.logaddexp.reduce(single * np.arange(self.size)))
        return min(1.0, math.exp(min(log_sum + math.log(delta), 0.0)) * (1 + 1e-12))

    def epsilon(self, delta: float) -> float:
        if self.delta(0.0) <= delta:
            return 0.0
        low, high = 0.0, 1.0
        while self.delta(high) > delta:
            low, high = high, 2 * high
            if high > 1e6:
                return math.inf
        while high - low > 1e-6 * high:
            middle = (low + high) / 2
            if self.delta(middle) <= delta:
                high = middle
            else:
                low = middle
        return high
