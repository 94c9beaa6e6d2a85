"""The least noise, the most steps or epochs, the largest batches that a privacy budget allows.

All searches evaluate `accountants.epsilon` itself, or `accountants.tradeoff`, and return only what
these have found within the target: they never overshoot.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from accountants.accounting import Accountant, Budget, check_runs, unit_of
from accountants.accounting import epsilon as spent
from accountants.curves import GaussianCurve
from accountants.mechanisms import Mechanism, TrainingRun
from accountants.sampling import PoissonSampling, Relation, Sampling
from accountants.tradeoff import tradeoff
from accountants.validation import argument_message, check_integer, check_probability

# How far above the least noise multiplier the answer may lie, relatively.
_TOLERANCE = 5e-4
# How far beyond the root that it expects the search probes: enough for the error of expecting.
_AIM = _TOLERANCE / 2
_MOST_NOISE = 1e9


def calibrate_noise_multiplier(
    *,
    epsilon: float | None = None,
    delta: float | None = None,
    advantage: float | None = None,
    tpr: float | None = None,
    at_fpr: float | None = None,
    sampling: Sampling,
    num_examples: int,
    steps: int,
    accountant: Accountant = "pld",
    relation: Relation | None = None,
    prior: Iterable[Mechanism] = (),
) -> float:
    """The least noise multiplier with which a run, after the `prior` ones, stays within a target.

    The target is a budget, or what the best attacker may achieve who has to tell whether one
    example took part (Kulynych et al. 2024, "Attack-aware noise calibration for differential
    privacy"). That is read off the trade-off curve of all the runs together. It needs less noise
    than to find an (epsilon, delta) that implies the same.

    >>> from accountants import FullBatch
    >>> sigma = calibrate_noise_multiplier(epsilon=1.0, delta=1e-5, sampling=FullBatch(),
    ...                                    num_examples=1000, steps=1)
    >>> 3.730 < sigma < 3.733  # Balle and Wang 2018 give 3.7304...
    True
    >>> sigma = calibrate_noise_multiplier(advantage=0.1, sampling=FullBatch(), num_examples=1000,
    ...                                    steps=1)
    >>> 3.978 < sigma < 3.981  # 2Φ(1 / (2σ)) - 1 = 0.1
    True

    Args:
        epsilon, delta: a budget, as `accountants.Budget` takes it.
        advantage: instead of it, the most by which an attacker's true positive rate may exceed the
            false positive rate, strictly between 0 and 1.
        tpr, at_fpr: instead of it, the highest true positive rate of an attacker whose false
            positive rate is `at_fpr`; both strictly between 0 and 1, and `tpr` is the larger.
        sampling, num_examples, steps: the run; at least one step.
        accountant, relation: as for `accountants.epsilon`.
        prior: runs, and queries, on the same data that have already spent of the target.

    Returns:
        A noise multiplier at most 5e-4 of itself above the least one, and never below.

    Raises:
        TypeError: an argument is of another type, or there is not one target.
        ValueError: a value is out of range, nobody can account for the combination, or the prior
            runs leave nothing of the target.
    """
    target = _target(epsilon, delta, advantage, tpr, at_fpr)
    steps = check_integer(steps, "steps")
    prior = check_runs("prior", prior)
    run = TrainingRun(1.0, sampling, num_examples, steps, unit_of(prior))
    how = {"accountant": accountant, "relation": relation}

    def cost(noise_multiplier: float) -> float:
        runs = (*prior, dataclasses.replace(run, noise_multiplier=noise_multiplier))
        return target.cost(runs=runs, **how)

    _check_prior(prior, run, target, how)
    # A bracket: `enough` keeps to the budget, `short` does not.
    enough, short = math.inf, 0.0
    costs: dict[float, float] = {}
    guess, stretch = _clt_noise_multiplier(run, target.shift), 1.05
    while enough > short * (1 + _TOLERANCE):
        costs[guess] = cost(guess)
        if costs[guess] <= target.most:
            enough = guess
        else:
            short = guess
        if short > _MOST_NOISE:
            raise ValueError(
                f"{target.words} is out of reach of noise: a noise multiplier of {short:.3g} still "
                f"has {target.measure} {costs[short]:.6g} ({len(prior)} prior runs included)."
            )
        if short == 0.0 or enough == math.inf:
            guess = _beyond(costs, target.most, stretch)
            stretch = min(stretch**4, 100.0)
        else:
            guess = _between(short, enough, costs, target.most)
    return enough


@dataclasses.dataclass(frozen=True)
class _Target:
    """What a search keeps to.

    Attributes:
        words, measure: the target and its cost, for messages.
        most: what the cost may be.
        shift: that of the Gaussian whose cost is that.
        cost: of runs, by an accountant under a relation; falls with noise.
    """

    words: str
    measure: str
    most: float
    shift: float
    cost: Callable[..., float]


def _target(
    epsilon: float | None,
    delta: float | None,
    advantage: float | None,
    tpr: float | None,
    at_fpr: float | None,
) -> _Target:
    """The one target that the arguments name."""
    from scipy import special

    budget, rates = (epsilon, delta), (tpr, at_fpr)
    pairs = [
        values for values in (budget, (advantage,), rates) if any(v is not None for v in values)
    ]
    if len(pairs) != 1 or None in pairs[0]:
        raise TypeError(
            "one target must be given: epsilon= and delta=, or advantage=, or tpr= and at_fpr=."
        )
    if advantage is not None:
        advantage = check_probability(advantage, "advantage")
        return _Target(
            words=f"advantage={advantage!r}",
            measure="an advantage of",
            most=advantage,
            shift=2 * float(special.ndtri((1 + advantage) / 2)),
            cost=lambda **runs: tradeoff(**runs).advantage,
        )
    if tpr is not None:
        tpr, at_fpr = check_probability(tpr, "tpr"), check_probability(at_fpr, "at_fpr")
        if tpr <= at_fpr:
            raise ValueError(argument_message("tpr", f"above at_fpr={at_fpr!r}", tpr))
        return _Target(
            words=f"tpr={tpr!r} at_fpr={at_fpr!r}",
            measure="true positives beyond at_fpr of",
            most=tpr - at_fpr,
            shift=float(special.ndtri(tpr) - special.ndtri(at_fpr)),
            cost=lambda **runs: tradeoff(**runs).true_positive_rate(at_fpr) - at_fpr,
        )
    return _budget_target(Budget(epsilon, delta))


def _budget_target(budget: Budget) -> _Target:
    from scipy import optimize

    # The closed form of delta at this epsilon rises from 0 to 1 with the shift.
    shift = optimize.brentq(
        lambda shift: GaussianCurve(shift).delta(budget.epsilon) - budget.delta,
        1e-12,
        2 * math.sqrt(2 * budget.epsilon) + 20.0,
        rtol=1e-3,
    )
    return _Target(
        words=f"epsilon={budget.epsilon!r} at delta={budget.delta!r}",
        measure="an epsilon of",
        most=budget.epsilon,
        shift=shift,
        cost=lambda **runs: spent(delta=budget.delta, **runs),
    )


def _beyond(costs: dict[float, float], target: float, stretch: float) -> float:
    """A noise multiplier on the other side of the target than all so far, it is hoped.

    A little beyond where the cost is expected to meet the target, and nowhere farther than
    `stretch` times the last.
    """
    *_, last = costs
    sign = 1 if costs[last] > target else -1
    root = _expected_root(costs, target)
    step = 0.0 if root is None else sign * math.log(root / last)
    # It may have come no closer.
    step = min(step + _AIM, math.log(stretch)) if step > 0.0 else math.log(stretch)
    return last * math.exp(sign * step)


def _between(short: float, enough: float, costs: dict[float, float], target: float) -> float:
    """A noise multiplier inside the bracket, which closes it if the expected root is right.

    First an `enough` a little above the root, then a `short` so close below that the search ends.
    Now and then the middle, in case the cost is not smooth.
    """
    root = _expected_root(costs, target)
    if root is None or not short < root < enough or len(costs) % 8 == 0:
        return math.sqrt(short * enough)
    if enough <= root * (1 + _TOLERANCE - _AIM / 2):
        return max(enough / (1 + _TOLERANCE) * (1 + 1e-9), math.sqrt(short * root))
    return min(root * (1 + _AIM), math.sqrt(root * enough))


def _expected_root(costs: Mapping[float, float], target: float) -> float | None:
    """Where the cost meets the target, to go by the three costs that are nearest; None for no idea.

    On log-log axes the cost is all but straight, and its inverse all but a parabola.
    """
    goal = math.log(target)
    points = {math.log(cost): math.log(x) for x, cost in costs.items() if 0.0 < cost < math.inf}
    nearest = sorted(points.items(), key=lambda point: abs(point[0] - goal))[:3]
    if len(nearest) < 2:
        return None
    root = 0.0
    for at, value in nearest:
        others = [other for other, _ in nearest if other != at]
        root += value * math.prod((goal - other) / (at - other) for other in others)
    return math.exp(root) if abs(root) < 100.0 else None


def _clt_noise_multiplier(run: TrainingRun, shift: float) -> float:
    """A first guess, by the central limit theorem of Bu, Dong, Long and Su 2020."""
    probability = run.sampling.sampling_probability(run.num_examples)
    if probability == 1.0:
        return math.sqrt(run.participations) / shift
    chi_square = (shift / probability) ** 2 / run.participations
    return 1 / math.sqrt(math.log1p(chi_square))


def calibrate_steps(
    *,
    epsilon: float,
    delta: float,
    noise_multiplier: float,
    sampling: Sampling,
    num_examples: int,
    accountant: Accountant = "pld",
    relation: Relation | None = None,
    prior: Iterable[Mechanism] = (),
    max_steps: int = 10_000_000,
) -> int:
    """The most steps with which a run, after the `prior` ones, stays within a budget.

    >>> from accountants import PoissonSampling
    >>> calibrate_steps(epsilon=6.0, delta=1e-5, noise_multiplier=1.0,
    ...                 sampling=PoissonSampling(600), num_examples=60_000)
    9464

    Args:
        epsilon, delta: the budget, as `accountants.Budget` takes it.
        noise_multiplier, sampling, num_examples: the run.
        accountant, relation: as for `accountants.epsilon`.
        prior: runs on the same data that have already spent of the budget.
        max_steps: the answer is at most this.

    Returns:
        The number n of steps such that n stay within the budget and n + 1 do not, or `max_steps`
        if that many do; 0 if a single one overspends.

    Raises:
        TypeError: an argument is of another type.
        ValueError: a value is out of range, nobody can account for the combination, or the prior
            runs alone overspend.
    """
    budget = Budget(epsilon, delta)
    max_steps = check_integer(max_steps, "max_steps", 0)
    prior = check_runs("prior", prior)
    run = TrainingRun(noise_multiplier, sampling, num_examples, 0, unit_of(prior))
    how = {"accountant": accountant, "relation": relation}

    def cost(steps: int) -> float:
        runs = (*prior, dataclasses.replace(run, steps=steps))
        return spent(runs=runs, delta=budget.delta, **how)

    _check_prior(prior, run, _budget_target(budget), how)
    return _last_within(cost, budget.epsilon, max_steps)


def calibrate_epochs(
    *,
    epsilon: float,
    delta: float,
    noise_multiplier: float,
    sampling: Sampling,
    num_examples: int,
    accountant: Accountant = "pld",
    relation: Relation | None = None,
    prior: Iterable[Mechanism] = (),
    max_epochs: int = 100_000,
) -> int:
    """The most whole epochs with which a run, after the `prior` ones, stays within a budget.

    >>> from accountants import ShuffledEpochs
    >>> calibrate_epochs(epsilon=6.0, delta=1e-5, noise_multiplier=4.0,
    ...                  sampling=ShuffledEpochs(600), num_examples=60_000)
    27

    Args:
        epsilon, delta, noise_multiplier, sampling, num_examples, accountant, relation, prior: as
            for `calibrate_steps`.
        max_epochs: the answer is at most this.

    Returns:
        The number of epochs, of `sampling.steps_per_epoch(num_examples)` steps each; 0 if a single
        one overspends.

    Raises:
        TypeError, ValueError: as for `calibrate_steps`.
    """
    budget = Budget(epsilon, delta)
    max_epochs = check_integer(max_epochs, "max_epochs", 0)
    prior = check_runs("prior", prior)
    run = TrainingRun(noise_multiplier, sampling, num_examples, 0, unit_of(prior))
    how = {"accountant": accountant, "relation": relation}
    length = sampling.steps_per_epoch(num_examples)

    def cost(epochs: int) -> float:
        runs = (*prior, dataclasses.replace(run, steps=epochs * length))
        return spent(runs=runs, delta=budget.delta, **how)

    _check_prior(prior, run, _budget_target(budget), how)
    return _last_within(cost, budget.epsilon, max_epochs)


def calibrate_batch_size(
    *,
    epsilon: float,
    delta: float,
    noise_multiplier: float,
    epochs: int,
    num_examples: int,
    scheme: Callable[[int], Sampling] = PoissonSampling,
    accountant: Accountant = "pld",
    relation: Relation | None = None,
    prior: Iterable[Mechanism] = (),
) -> int:
    """The largest batch size with which a run of some epochs stays within a budget.

    At the same noise multiplier and number of epochs larger batches cost more, and hold more
    signal against the noise.

    >>> calibrate_batch_size(epsilon=3.0, delta=1e-5, noise_multiplier=1.0, epochs=20,
    ...                      num_examples=60_000)
    770

    Args:
        epsilon, delta, noise_multiplier, num_examples, accountant, relation, prior: as for
            `calibrate_steps`.
        epochs: the number of epochs, of as many steps as the scheme says, at least 1.
        scheme: makes the scheme from a batch size, such as `PoissonSampling`, or
            ``lambda size: TruncatedPoisson(size, math.ceil(1.2 * size))``.

    Returns:
        A batch size that stays within the budget while the next larger one overspends (or is the
        whole data set); 0 if even batches of one example overspend.

    Raises:
        TypeError, ValueError: as for `calibrate_steps`, or `scheme` makes no scheme.
    """
    budget = Budget(epsilon, delta)
    epochs = check_integer(epochs, "epochs")
    num_examples = check_integer(num_examples, "num_examples")
    prior = check_runs("prior", prior)
    how = {"accountant": accountant, "relation": relation}

    def run(batch_size: int) -> TrainingRun:
        run = TrainingRun(noise_multiplier, scheme(batch_size), num_examples, 0, unit_of(prior))
        steps = epochs * run.sampling.steps_per_epoch(num_examples)
        return dataclasses.replace(run, steps=steps)

    def cost(batch_size: int) -> float:
        runs = (*prior, run(batch_size))
        return spent(runs=runs, delta=budget.delta, **how)

    _check_prior(prior, run(1), _budget_target(budget), how)
    return _last_within(cost, budget.epsilon, num_examples)


def _last_within(cost: Callable[[int], float], target: float, most: int) -> int:
    """The last n up to `most` with cost(n) <= target; that of 0 is known to be."""
    within, beyond = 0, most + 1
    costs: dict[int, float] = {}
    guess = 256
    while within + 1 < beyond:
        guess = min(max(guess, within + 1), beyond - 1)
        costs[guess] = cost(guess)
        if costs[guess] <= target:
            within = guess
        else:
            beyond = guess
        root = _expected_root(costs, target)
        if root is not None and within < root < beyond and len(costs) % 8:
            # Once it is within, the next guess is the next number.
            guess = min(math.floor(root), 256 * max(within, 1))
        else:
            guess = (within + beyond) // 2 if beyond in costs else within * 16
    return within


def _check_prior(
    prior: tuple[Mechanism, ...],
    run: TrainingRun,
    target: _Target,
    how: Mapping[str, Any],
) -> None:
    # With a run of no steps, so that the relation is the one that all of them will share.
    idle = dataclasses.replace(run, steps=0)
    cost = float(target.cost(runs=(*prior, idle), **how))
    if cost > target.most:
        raise ValueError(
            f"prior runs alone have {target.measure} {cost:.6g}, more than the target "
            f"{target.words}."
        )
