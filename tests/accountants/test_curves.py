import math

import numpy as np
import pytest

from accountants import (
    FixedSize,
    FullBatch,
    PoissonSampling,
    RandomAllocation,
    TrainingRun,
    curves,
    epsilon,
)
from accountants.accounting import compose


def test_the_general_reduction_for_groups():
    # For a Gaussian the truth is known: k examples shift k times as far.
    single, truth = curves.GaussianCurve(0.4), curves.GaussianCurve(1.2)
    reduced = curves.GroupCurve(single, 3)
    for target in (0.5, 2.0, 5.0):
        assert truth.delta(target) <= reduced.delta(target)
        level = reduced.delta(target)
        if level < 1.0:
            assert reduced.epsilon(level) == pytest.approx(target, rel=1e-4)
            assert reduced.delta(reduced.epsilon(level)) <= level
    assert reduced.epsilon(1e-5) >= truth.epsilon(1e-5)
    assert curves.GroupCurve(curves.GaussianCurve(0.0), 3).epsilon(1e-5) == 0.0
    assert curves.GroupCurve(curves.GaussianCurve(math.inf), 3).epsilon(1e-5) == math.inf
    run = TrainingRun(2.0, RandomAllocation(10), 100, 20)
    one = epsilon(runs=[run], delta=1e-5)
    assert one * 2 < epsilon(runs=[run], delta=1e-5, group_size=2)
    with pytest.raises(ValueError, match="group_size"):
        epsilon(runs=[run], delta=1e-5, group_size=0)


def test_runs_added_one_by_one_are_composed_once(monkeypatch):
    """As the command shows a ledger: the epsilon after each run."""
    runs = [TrainingRun(2.0 + 0.1 * i, PoissonSampling(10), 1000, 20) for i in range(12)]
    monkeypatch.setattr(curves, "_LAST_COMPOSED", {})
    curves._composed_pld.cache_clear()
    released, real = [], curves._released
    monkeypatch.setattr(curves, "_released", lambda *args: (released.append(args), real(*args))[1])
    found = [epsilon(runs=runs[:end], delta=1e-5) for end in range(1, 13)]
    assert len(released) <= 2 * 12
    for end in (1, 5, 12, 3):
        curves._LAST_COMPOSED.clear()
        curves._composed_pld.cache_clear()
        assert epsilon(runs=runs[:end], delta=1e-5) == found[end - 1]
    # Others in between, that begin otherwise.
    assert epsilon(runs=runs[5:], delta=1e-5) == epsilon(runs=runs[5:], delta=1e-5)
    assert epsilon(runs=runs, delta=1e-5) == found[-1]


@pytest.mark.parametrize(
    ("noise", "sampling"),
    [(1.0, PoissonSampling(10)), (0.2, PoissonSampling(10)), (0.07, FixedSize(100))],
)
def test_many_deltas_are_those_of_each(noise, sampling):
    run = TrainingRun(noise, sampling, num_examples=1000, steps=40)
    curve = compose([run], "pld", None).curve
    epsilons = np.linspace(0.0, curve.epsilon(1e-9), 40)
    singly = np.array([curve.delta(float(epsilon)) for epsilon in epsilons])
    together = curve.deltas(epsilons)
    assert np.all(singly <= together + 1e-18)
    np.testing.assert_allclose(together, singly, rtol=1e-6, atol=1e-13)


def test_one_run_without_noise_leaves_nothing():
    runs = [TrainingRun(0.0, FullBatch(), 100, 1), TrainingRun(1.0, PoissonSampling(10), 100, 5)]
    for accountant in ("pld", "rdp"):
        for order in (runs, runs[::-1]):
            assert epsilon(runs=order, delta=1e-5, accountant=accountant) == math.inf
