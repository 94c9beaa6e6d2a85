"""The cost of a search for hyperparameters of which only the best trial is released.

Papernot and Steinke 2022: the number of trials is drawn at random, each trial draws a candidate
(independently of the data), trains and scores it; only the best candidate, its model and its score
are published. The cost is that of a few trials instead of the sum over all.
"""

import dataclasses
import math
from collections.abc import Iterable

import numpy as np

from accountants import curves
from accountants.accounting import Epsilon, as_runs, check_runs, resolve_relation
from accountants.mechanisms import TrainingRun
from accountants.numerics import ORDERS
from accountants.releases import Release
from accountants.sampling import Relation, Sampling
from accountants.validation import argument_message, check_number, check_probability


@dataclasses.dataclass(frozen=True)
class RandomTrials:
    """The number of trials of a search: a truncated negative binomial or Poisson number.

    A fixed number of trials costs more than a random one of the same mean, so the number has to be
    drawn, and kept: trying "one more" is another search.

    >>> trials = RandomTrials(mean=10)
    >>> trials.draw(np.random.default_rng(4)) >= 1
    True

    Args:
        mean: the expected number of trials, at least 1 (above 1, unless `shape` is infinite).
        shape: η of the truncated negative binomial: 1 is geometric, 0 logarithmic, larger values
            are more concentrated and cost more. Infinite is Poisson, which may draw no trial.

    Raises:
        TypeError, ValueError: a value is no number or out of range.
    """

    mean: float
    shape: float = 1.0

    def __post_init__(self) -> None:
        shape = self.shape
        if not (isinstance(shape, float) and shape == math.inf):
            shape = check_number(shape, "shape", zero=True)
        mean = check_number(self.mean, "mean")
        if mean < 1 or (mean == 1 and shape != math.inf):
            least = "of at least" if shape == math.inf else "above"
            raise ValueError(argument_message("mean", f"a number {least} 1 and finite", self.mean))
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "shape", shape)

    @property
    def stopping_probability(self) -> float:
        """γ of the truncated negative binomial."""
        from scipy import optimize

        if self.shape == 1.0:
            return 1 / self.mean
        # The mean falls with γ; on a logarithmic axis, as it may be tiny.
        root = optimize.brentq(
            lambda log: math.log(_mean(math.exp(log), self.shape) / self.mean),
            -700.0 / max(1.0, self.shape),
            -1e-9,
            xtol=1e-13,
        )
        return math.exp(root)

    def draw(self, generator: np.random.Generator | None = None) -> int:
        """A number of trials; `generator` is for tests: entropy of the system is the default."""
        generator = np.random.default_rng() if generator is None else generator
        if self.shape == math.inf:
            return int(generator.poisson(self.mean))
        stopping = self.stopping_probability
        if self.shape == 0.0:
            return int(generator.logseries(1 - stopping))
        # P(K = 0) = γ^η is truncated: try again.
        while not (number := int(generator.negative_binomial(self.shape, stopping))):
            pass
        return number


def _mean(stopping: float, shape: float) -> float:
    log = math.log(stopping)
    if shape == 0.0:
        return math.expm1(-log) / -log
    return shape * math.expm1(-log) / -math.expm1(shape * log)


def search_epsilon(
    *,
    delta: float,
    trials: RandomTrials,
    noise_multiplier: float | None = None,
    sampling: Sampling | None = None,
    num_examples: int | None = None,
    steps: int | None = None,
    runs: Iterable[TrainingRun] | None = None,
    relation: Relation | None = None,
    prior: Iterable[TrainingRun] = (),
) -> Epsilon:
    """The epsilon of releasing the best of a random number of trials.

    Theorem 2 of Papernot and Steinke 2022 for the truncated negative binomial and Theorem 6 for
    Poisson, on Rényi divergences. The score by which trials are compared is part of a trial: it
    must come from data that is not protected, or be paid for within the trial.

    >>> from accountants import PoissonSampling
    >>> run = TrainingRun(1.0, PoissonSampling(600), num_examples=60_000, steps=1000)
    >>> found = search_epsilon(delta=1e-5, trials=RandomTrials(mean=10), runs=[run])
    >>> round(found, 2)
    4.1

    Args:
        delta: as for `accountants.epsilon`.
        trials: how many trials there may be.
        noise_multiplier, sampling, num_examples, steps, runs: one trial, as for
            `accountants.epsilon`. If candidates differ in cost, the dearest; if none is the
            dearest in every respect, give them the same mechanism.
        relation: as for `accountants.epsilon`.
        prior: runs outside of the search, composed with it.

    Returns:
        The epsilon, by Rényi divergences (``accountant`` says "rdp").

    Raises:
        TypeError, ValueError: as for `accountants.epsilon`; `trials` is no RandomTrials.
    """
    delta = check_probability(delta, "delta")
    if not isinstance(trials, RandomTrials):
        raise TypeError(f"trials must be RandomTrials(mean=...), got {trials!r}.")
    trial = as_runs(noise_multiplier, sampling, num_examples, steps, runs)
    prior = check_runs("prior", prior)
    relation = resolve_relation((*trial, *prior), relation)
    single = curves.composed_rdp(_counts(trial, relation))
    divergences = _selected(single, trials) + curves.composed_rdp(_counts(prior, relation))
    return Epsilon(curves.RdpCurve(divergences).epsilon(delta), delta, relation, "rdp")


def _counts(runs: tuple[TrainingRun, ...], relation: Relation) -> dict[Release, int]:
    counts: dict[Release, int] = {}
    for run in runs:
        if run.participations:
            release = run.release(relation)
            counts[release] = counts.get(release, 0) + run.participations
    return counts


def _selected(single: np.ndarray, trials: RandomTrials) -> np.ndarray:
    """Rényi divergences at `ORDERS` of the best trial, from those of a single one."""
    spread = math.log(trials.mean) / (ORDERS - 1)
    if trials.shape == math.inf:
        curve = curves.RdpCurve(single)
        deltas = np.array([curve.delta(math.log1p(1 / (order - 1))) for order in ORDERS])
        return single + trials.mean * deltas + spread
    log_stopping = math.log(trials.stopping_probability)
    constant = (1 + trials.shape) * np.min((1 - 1 / ORDERS) * single - log_stopping / ORDERS)
    found = single + constant + spread
    # Divergences grow with the order, so that of any higher one bounds them.
    return np.minimum.accumulate(found[::-1])[::-1]
