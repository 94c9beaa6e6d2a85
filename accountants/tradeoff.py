"""The most that an attacker can achieve who has to tell whether an example took part.

The attacker knows everything else: the other examples, the network, every noisy gradient sum. All
figures are upper bounds on such attackers (lower bounds on their errors); what a given attack
achieves is less.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable

import numpy as np

from accountants.accounting import Accountant, as_runs, compose
from accountants.curves import Curve, GaussianCurve
from accountants.mechanisms import TrainingRun
from accountants.sampling import Relation, Sampling
from accountants.validation import argument_message, check_number, check_probability

_POINTS = 600


@dataclasses.dataclass(frozen=True, eq=False)
class TradeOff:
    """The f-DP curve of training runs (Dong, Roth and Su 2022); made by `tradeoff`.

    Attributes:
        relation, accountant: what it was found for, and by which accountant.
    """

    curve: Curve
    relation: Relation
    accountant: Accountant

    @functools.cached_property
    def _profile(self) -> tuple[np.ndarray, np.ndarray]:
        """Some epsilons, rising from 0, and deltas that hold at them."""
        most = 0.0
        for delta in (1e-12, 1e-10, 1e-8, 1e-6):
            try:
                most = self.curve.epsilon(delta)
            except ValueError:  # too small for the accountant
                continue
            if math.isfinite(most):
                break
        if not math.isfinite(most):
            most = 100.0
        epsilons = most * np.linspace(0.0, 1.0, _POINTS) ** 2 if most else np.zeros(1)
        return epsilons, self.curve.deltas(epsilons)

    @property
    def advantage(self) -> float:
        """The most by which the true positive rate can exceed the false positive rate.

        That is the delta at epsilon = 0, the total variation distance.
        """
        return self.curve.delta(0.0)

    def true_positive_rate(self, false_positive_rate: float) -> float:
        """The most true positives of any attack with so few false positives (a share of each).

        Exact for unsampled Gaussians. Otherwise the least, over some epsilons, of
        δ + exp(ε) FPR and 1 - exp(-ε) (1 - δ - FPR) (Wasserman and Zhou 2010); each holds.

        >>> from accountants import FullBatch
        >>> curve = tradeoff(noise_multiplier=4.0, sampling=FullBatch(), num_examples=100, steps=4)
        >>> round(curve.true_positive_rate(0.01), 4)
        0.0339

        Raises:
            TypeError, ValueError: the rate is no number between 0 and 1.
        """
        rate = check_number(false_positive_rate, "false_positive_rate", zero=True)
        if rate > 1.0:
            raise ValueError(argument_message("false_positive_rate", "a number from 0 to 1", rate))
        if isinstance(self.curve, GaussianCurve):
            from scipy import special

            if math.isinf(self.curve.shift):
                return 1.0
            return float(special.ndtr(special.ndtri(rate) + self.curve.shift))
        epsilons, deltas = self._profile
        with np.errstate(over="ignore"):
            few = deltas + np.exp(epsilons) * rate
            many = 1 - np.exp(-epsilons) * (1 - deltas - rate)
        return float(min(1.0, few.min(), many.min()))

    def false_negative_rate(self, false_positive_rate: float) -> float:
        """f of f-DP: the least false negatives of any attack with so few false positives."""
        return 1.0 - self.true_positive_rate(false_positive_rate)

    def posterior(self, prior: float, failure: float) -> float:
        """What a belief that an example took part becomes at most, but with a small probability.

        Of a loss ℓ = ε - log(1 - t), as exp(ε - ℓ) = 1 - t: delta at ε is the mean of
        (1 - exp(ε - L))₊ over the loss L, so at least t times the probability of L > ℓ. Where that
        delta is t times `failure`, L exceeds ℓ with a probability of `failure` at most, whether the
        example took part or not; otherwise odds grow by exp(ℓ) at most. Any t holds.

        >>> from accountants import FullBatch
        >>> curve = tradeoff(noise_multiplier=9.0, sampling=FullBatch(), num_examples=100, steps=4)
        >>> round(curve.posterior(0.5, failure=1e-5), 3)
        0.735

        Args:
            prior: the belief before, strictly between 0 and 1.
            failure: the probability, over the noise, with which it may become more.

        Raises:
            TypeError, ValueError: a value is not strictly between 0 and 1.
        """
        prior = check_probability(prior, "prior")
        failure = check_probability(failure, "failure")
        losses = [math.inf]
        for share in (0.5, 0.3, 0.2, 0.1, 0.03, 0.01):
            try:
                losses.append(self.curve.epsilon(share * failure) - math.log1p(-share))
            except ValueError:  # too small a delta for the accountant
                continue
        return 1 / (1 + (1 - prior) / prior * math.exp(-min(losses)))

    def gdp_mu(self, floor: float = 1e-9) -> float:
        """The least μ found such that the runs are μ-GDP, down to deltas of `floor`.

        For unsampled Gaussians it is exact, and holds at every delta. Otherwise it is the tightest
        that the computed curve supports: the profile of N(μ, 1) against N(0, 1) lies above delta
        at every epsilon at which delta is at least `floor`. Below, nothing is claimed: the true
        curve of sampled releases has heavier tails than any Gaussian, and the computed one is
        flat. Infinite without noise.

        >>> from accountants import ShuffledEpochs
        >>> curve = tradeoff(noise_multiplier=4.0, sampling=ShuffledEpochs(10), num_examples=100,
        ...                  steps=40)
        >>> curve.gdp_mu()
        0.5

        Raises:
            TypeError, ValueError: `floor` is not strictly between 0 and 1.
        """
        floor = check_probability(floor, "floor")
        if isinstance(self.curve, GaussianCurve):
            return self.curve.shift
        epsilons, deltas = self._profile
        if deltas[-1] >= floor:
            return math.inf if deltas[0] > floor else 0.0
        # Between two epsilons, delta is at most that at the lower and μ's at least at the upper.
        needed = deltas[:-1] >= floor
        pairs = zip(epsilons[1:][needed], deltas[:-1][needed], strict=True)
        return max((_shift(float(epsilon), float(delta)) for epsilon, delta in pairs), default=0.0)


def _shift(epsilon: float, delta: float) -> float:
    """A shift whose Gaussian has at least this delta at this epsilon."""
    from scipy import optimize

    if delta >= 1.0:
        return math.inf
    highest = 1.0
    while GaussianCurve(highest).delta(epsilon) <= delta:
        highest *= 2
    root = optimize.brentq(
        lambda shift: GaussianCurve(shift).delta(epsilon) - delta, 1e-12, highest, xtol=1e-12
    )
    return root * (1 + 1e-9)


def tradeoff(
    *,
    noise_multiplier: float | None = None,
    sampling: Sampling | None = None,
    num_examples: int | None = None,
    steps: int | None = None,
    runs: Iterable[TrainingRun] | None = None,
    accountant: Accountant = "pld",
    relation: Relation | None = None,
    group_size: int = 1,
) -> TradeOff:
    """The attacker's best trade-off against one training run, or several on the same data.

    >>> from accountants import PoissonSampling
    >>> curve = tradeoff(noise_multiplier=1.0, sampling=PoissonSampling(600), num_examples=60_000,
    ...                  steps=1000)
    >>> round(curve.advantage, 3), round(curve.true_positive_rate(0.01), 3)
    (0.161, 0.029)

    Args:
        noise_multiplier, sampling, num_examples, steps, runs, accountant, relation, group_size:
            as for `accountants.epsilon`.

    Raises:
        TypeError, ValueError: as for `accountants.epsilon`.
    """
    found = compose(
        as_runs(noise_multiplier, sampling, num_examples, steps, runs),
        accountant,
        relation,
        group_size,
    )
    return TradeOff(found.curve, found.relation, found.accountant)
