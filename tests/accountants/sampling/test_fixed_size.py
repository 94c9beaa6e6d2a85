import itertools

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as dp_pld
from scipy import stats

from accountants import FixedSize, PoissonSampling, TrainingRun, delta, epsilon
from accountants.sampling.fixed_size import FixedSizeRelease
from tests.accountants.sampling.helpers import drawn, least_deltas


@pytest.mark.parametrize("steps", [1, 12])
def test_fixed_size_is_attained_by_others_that_oppose_the_example(steps):
    """Fixed batches accounted as Poisson samples: a mistake of the peers."""
    n, scheme = 40, FixedSize(2)
    # With all others at -1, the sum is -2, or 0 where the example at 1 is drawn.
    edges = np.arange(-12, 12, 2e-3)
    blank = np.diff(stats.norm.cdf(edges, -2, 1.0))
    drawn = np.diff(stats.norm.cdf(edges, 0, 1.0))
    p, q = 0.05 * drawn + 0.95 * blank, blank
    run = TrainingRun(1.0, scheme, n, steps)
    target = 1.0
    (lower,) = least_deltas(p, q, steps, [target], grid=1e-4)
    claimed = delta(runs=[run], epsilon=target, relation="replace_one")
    assert lower <= claimed <= lower * (1.001 if steps == 1 else 1.5)
    poisson = TrainingRun(1.0, PoissonSampling(2), n, steps)
    assert delta(runs=[poisson], epsilon=target) < 0.3 * lower
    assert delta(runs=[poisson], epsilon=target, relation="replace_one") < 0.7 * lower
    with pytest.raises(ValueError, match=r"add_or_remove_one.*FixedSize.*replace_one"):
        epsilon(runs=[run], delta=1e-5, relation="add_or_remove_one")


def test_fixed_size_composes_both_halves_of_its_curve():
    """Composing each direction of the Poisson pair, and taking the worse, claims too little."""
    probability, sigma, steps, grid = 0.05, 2.0, 200, 1e-3
    ours = FixedSizeRelease(probability, sigma).pld(grid).self_compose(steps)
    directions = dp_pld.from_gaussian_mechanism(
        sigma / 2, sampling_prob=probability, value_discretization_interval=grid
    )
    single = FixedSizeRelease(probability, sigma).pld(grid)
    for target in (0.0, 0.1, 1.0):
        assert single.get_delta_for_epsilon(target) == pytest.approx(
            directions.get_delta_for_epsilon(target), rel=1e-6
        )
    worse = directions.self_compose(steps)
    for target in (0.5, 1.0, 2.0):
        assert ours.get_delta_for_epsilon(target) > 1.01 * worse.get_delta_for_epsilon(target)


def test_rdp_without_replacement_agrees_with_dp_accounting():
    run = TrainingRun(4.0, FixedSize(100), 10_000, 300)
    theirs = dp_accounting.rdp.RdpAccountant(
        neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE
    )
    # It takes the noise over the distance, which is 2.
    gaussian = dp_accounting.GaussianDpEvent(2.0)
    event = dp_accounting.SampledWithoutReplacementDpEvent(10_000, 100, gaussian)
    theirs.compose(event, 300)
    ours = epsilon(runs=[run], delta=1e-6, accountant="rdp")
    assert ours == pytest.approx(theirs.get_epsilon(1e-6), rel=1e-6)
    assert epsilon(runs=[run], delta=1e-6) < ours


def test_each_step_is_a_fresh_choice_among_all():
    found = drawn(FixedSize(5), 20, epochs=300)
    assert {len(set(rows)) for rows in found} == {5}
    counts = np.bincount(np.concatenate(found), minlength=20)
    assert np.abs(counts - len(found) / 4).max() < 6 * np.sqrt(len(found) * 3 / 16)
    # Also among those of the step before.
    shared = [len({*a} & {*b}) for a, b in itertools.pairwise(found)]
    assert np.mean(shared) == pytest.approx(5 * 5 / 20, rel=0.1)
