import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting import dp_event

from accountants import (
    FixedSize,
    FullBatch,
    PoissonSampling,
    RandomTrials,
    TrainingRun,
    epsilon,
    search_epsilon,
)

N = 60_000
RUN = TrainingRun(1.0, PoissonSampling(600), N, 1000)


@pytest.mark.parametrize("shape", [0.0, 0.5, 1.0, 3.0, math.inf])
@pytest.mark.parametrize("mean", [1.5, 10.0, 1000.0])
def test_agrees_with_dp_accounting(mean, shape):
    event = dp_accounting.SelfComposedDpEvent(
        dp_accounting.PoissonSampledDpEvent(0.01, dp_accounting.GaussianDpEvent(1.0)), 1000
    )
    theirs = dp_accounting.rdp.RdpAccountant()
    theirs.compose(dp_event.RepeatAndSelectDpEvent(event, mean, shape))
    ours = search_epsilon(delta=1e-5, trials=RandomTrials(mean, shape), runs=[RUN])
    assert ours == pytest.approx(theirs.get_epsilon(1e-5), rel=1e-6)
    assert ours.accountant == "rdp" and ours.relation == "add_or_remove_one"


def test_costs_more_than_one_trial_and_less_than_all():
    single = epsilon(runs=[RUN], delta=1e-5, accountant="rdp")
    found = [search_epsilon(delta=1e-5, trials=RandomTrials(m), runs=[RUN]) for m in (2, 10, 100)]
    assert single < found[0] < found[1] < found[2]
    assert found[2] < epsilon(runs=[RUN] * 100, delta=1e-5, accountant="rdp") / 2
    # Runs beside the search are paid for on top.
    common = {"delta": 1e-5, "trials": RandomTrials(10), "runs": [RUN]}
    beside = TrainingRun(20.0, FullBatch(), N, 1)
    assert search_epsilon(**common, prior=[beside]) > found[1]
    fixed = search_epsilon(**common, prior=[TrainingRun(20.0, FixedSize(600), N, 1)])
    assert fixed.relation == "zero_out"


@pytest.mark.parametrize(
    "trials", [RandomTrials(5), RandomTrials(5, 0.0), RandomTrials(5, 0.5), RandomTrials(5, 4.0)]
)
def test_draws_have_the_mean_and_are_at_least_one(trials):
    generator = np.random.default_rng(1)
    draws = np.array([trials.draw(generator) for _ in range(5_000)])
    assert draws.min() >= 1
    assert draws.mean() == pytest.approx(5, abs=5 * draws.std() / math.sqrt(len(draws)))
    assert isinstance(trials.draw(), int)


def test_poisson_draws():
    generator = np.random.default_rng(1)
    draws = [RandomTrials(3, math.inf).draw(generator) for _ in range(5000)]
    assert min(draws) == 0 and np.mean(draws) == pytest.approx(3, abs=0.15)


def test_bad_arguments():
    for mean in (1.0, 0.5, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="mean"):
            RandomTrials(mean)
    for shape in (-0.5, math.nan):
        with pytest.raises(ValueError, match="shape"):
            RandomTrials(3, shape)
    with pytest.raises(TypeError, match="trials"):
        search_epsilon(delta=1e-5, trials=10, runs=[RUN])
    with pytest.raises(ValueError, match="delta"):
        search_epsilon(delta=0.0, trials=RandomTrials(10), runs=[RUN])
    with pytest.raises(TypeError, match="steps"):
        search_epsilon(delta=1e-5, trials=RandomTrials(10), noise_multiplier=1.0)


def test_no_noise_costs_everything():
    run = TrainingRun(0.0, FullBatch(), N, 1)
    assert search_epsilon(delta=1e-5, trials=RandomTrials(10), runs=[run]) == math.inf
    assert search_epsilon(delta=1e-5, trials=RandomTrials(3, math.inf), runs=[run]) == math.inf
