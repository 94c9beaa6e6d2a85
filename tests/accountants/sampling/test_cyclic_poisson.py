import numpy as np
import pytest

from accountants import CyclicPoisson, PoissonSampling, TrainingRun, epsilon
from tests.accountants.sampling.helpers import drawn

N = 60


def turns(found, bands):
    """The groups that each example was drawn from."""
    return [{t % bands for t, rows in enumerate(found) if i in rows} for i in range(N)]


def test_an_example_keeps_its_group_for_a_run():
    # Twelve steps an epoch: no multiple of the five bands.
    scheme = CyclicPoisson(5, bands=5)
    found = drawn(scheme, N, epochs=20)
    groups = turns(found, 5)
    assert all(len(group) == 1 for group in groups)
    # Each group is a fair draw of each example, and the next run draws anew.
    sizes = np.bincount([group.pop() for group in groups], minlength=5)
    assert len(set(sizes)) > 1 and sizes.min() > 0
    assert turns(drawn(scheme, N, 20, seed=1), 5) != turns(found, 5)


def test_coins_of_a_turn_are_fresh():
    found = drawn(CyclicPoisson(5, bands=2), N, epochs=60)
    counts = np.bincount(np.concatenate(found), minlength=N)
    expected = len(found) / 2 * 10 / N
    assert np.abs(counts - expected).max() < 7 * np.sqrt(expected)
    assert len({tuple(rows) for rows in found}) > 0.95 * len(found)  # few are empty or alike


def test_one_band_is_poisson_sampling_as_drawn_and_as_accounted():
    cyclic, poisson = CyclicPoisson(5, bands=1), PoissonSampling(5)
    assert all(map(np.array_equal, drawn(cyclic, N, 3), drawn(poisson, N, 3)))
    one, other = (TrainingRun(1.0, scheme, N, 7) for scheme in (cyclic, poisson))
    assert one.release("zero_out") == other.release("zero_out")
    assert epsilon(runs=[one], delta=1e-5) == epsilon(runs=[other], delta=1e-5)


def test_a_group_is_accounted_as_a_smaller_data_set():
    cyclic = TrainingRun(1.0, CyclicPoisson(5, bands=4), N, 12)
    poisson = TrainingRun(1.0, PoissonSampling(5), N // 4, 3)
    for relation in CyclicPoisson.relations:
        assert cyclic.release(relation) == poisson.release(relation)
        assert cyclic.participations == poisson.participations == 3
    assert cyclic.group_release("zero_out", 2) is None


@pytest.mark.parametrize("bands", [1, 3])
def test_noise_may_be_correlated_over_the_bands(bands):
    assert CyclicPoisson(5, bands).noise_bands == bands
    assert PoissonSampling(5).noise_bands is None
