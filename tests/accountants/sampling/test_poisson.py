import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as dp_pld
from scipy import stats

from accountants import PoissonSampling, TrainingRun, delta, epsilon
from accountants.releases import gaussian_release
from accountants.sampling.poisson import PoissonRelease, poisson_release
from tests.accountants.sampling.helpers import SIGMA, cells, drawn, least_deltas


@pytest.mark.parametrize("size", [2, 3])
def test_a_group_of_poisson_sampled_examples(size):
    n, scheme, steps = 5, PoissonSampling(1.5), 6
    run = TrainingRun(SIGMA, scheme, n, steps)
    p, q = (cells(scheme, n, (own,) * size + (0,) * (n - size)) for own in (1, 0))
    for target, lower in zip((0.5, 2.0), least_deltas(p, q, steps, (0.5, 2.0)), strict=True):
        claimed = delta(runs=[run], epsilon=target, group_size=size)
        assert lower <= claimed <= lower * 1.05 + 1e-6
        # What a single example pays is far too little, and the general reduction far too much.
        assert delta(runs=[run], epsilon=target) < lower
        assert delta(runs=[run], epsilon=target, group_size=size, accountant="rdp") > claimed


def test_a_group_against_dp_accounting():
    run = TrainingRun(4.0, PoissonSampling(20), 100, 30)
    theirs = dp_pld.from_mixture_gaussian_mechanism(
        4.0, [0, 1, 2, 3], stats.binom.pmf(range(4), 3, 0.2), value_discretization_interval=5e-3
    )
    theirs = theirs.self_compose(30).get_epsilon_for_delta(1e-6)
    found = epsilon(runs=[run], delta=1e-6, group_size=3)
    assert theirs * 0.98 <= found <= theirs * 1.001


def test_examples_are_drawn_by_coins_of_their_own():
    found = drawn(PoissonSampling(3), 12, epochs=500)
    takes = np.array([np.bincount(rows, minlength=12) for rows in found])
    # Sizes are binomial: batches may be empty, and the variance is n q (1 - q).
    sizes = takes.sum(axis=1)
    assert sizes.min() == 0 and abs(sizes.var() / (12 * 0.25 * 0.75) - 1) < 0.2
    # No pair of examples goes together, or apart.
    together = takes.T @ takes / len(found)
    apart = together[~np.eye(12, dtype=bool)]
    deviation = np.sqrt(0.25**2 * (1 - 0.25**2) / len(found))
    assert np.abs(apart - 0.25**2).max() < 6 * deviation
    # Nor do neighbouring steps.
    assert abs(np.corrcoef(sizes[1:], sizes[:-1])[0, 1]) < 6 / np.sqrt(len(found))


def test_a_batch_size_alone_describes_it():
    assert PoissonSampling(3).with_batch_size(2.5) == PoissonSampling(2.5)
    with pytest.raises(ValueError, match="batch_size"):
        PoissonSampling(3).with_batch_size(0)


@pytest.mark.parametrize("replace", [False, True])
def test_little_noise_and_whole_batches_are_unsampled(replace):
    for probability, noise in ((1.0, 2.0), (0.1, 1e-3)):
        found = poisson_release(probability, noise, replace)
        assert found == gaussian_release(noise, 2.0 if replace else 1.0)
    assert isinstance(poisson_release(0.1, 2.0, replace), PoissonRelease)
