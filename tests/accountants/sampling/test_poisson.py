import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as dp_pld
from scipy import stats

from accountants import PoissonSampling, TrainingRun, curves, delta, epsilon
from accountants.releases import gaussian_release
from accountants.sampling import poisson
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


def group_cells(noise_multiplier, probability, size):
    """Masses of the mixture of all numbers of drawn examples, and of the noise alone, over cells:
    what they can tell apart is less than what the outcomes can.
    """
    edges = np.linspace(-8, size / noise_multiplier + 8, 4000)
    edges[[0, -1]] = -np.inf, np.inf

    def masses(count):
        return np.diff(stats.norm.cdf(edges - count / noise_multiplier))

    weights = stats.binom.pmf(np.arange(size + 1), size, probability)
    return sum(w * masses(c) for c, w in enumerate(weights)), masses(0)


@pytest.mark.parametrize("rare", [1e-18, 0.1], ids=["", "much is left out"])
@pytest.mark.parametrize("noise, probability, size", [(0.7, 0.02, 20), (4.0, 0.5, 6)])
def test_rare_numbers_of_a_group_are_charged(monkeypatch, rare, noise, probability, size):
    monkeypatch.setattr(poisson, "_RARE", rare)
    monkeypatch.setattr(curves, "_single_pld", curves._single_pld.__wrapped__)  # without its memory
    steps, targets = 5, (0.5, 2.0, 5.0, 10.0)
    run = TrainingRun(noise, PoissonSampling(1000 * probability), 1000, steps)
    least = least_deltas(*group_cells(noise, probability, size), steps, targets)
    for target, lower in zip(targets, least, strict=True):
        claimed = delta(runs=[run], epsilon=target, group_size=size)
        assert lower <= claimed
        assert rare == 0.1 or claimed <= lower * 1.1 + 1e-6
    counts = poisson.PoissonGroupRelease(probability, noise, size).counts
    assert rare < 0.1 or len(counts) < size


@pytest.mark.parametrize(
    "size, noise, probability, independent",
    [(64, 3.0, 0.01, 54.5), (64, 4.0, 0.01, 35.2), (16, 0.79, 0.01, 90.8)],
)
def test_large_groups_against_an_independent_accountant(size, noise, probability, independent):
    run = TrainingRun(noise, PoissonSampling(60_000 * probability), 60_000, 1_000)
    found = epsilon(runs=[run], delta=1e-5, group_size=size)
    assert found.accountant == "pld" and 0.998 * independent < found < 1.01 * independent


def test_groups_have_no_cliffs():
    def cost(noise, size):
        run = TrainingRun(noise, PoissonSampling(256), 60_000, 1_000)
        return epsilon(runs=[run], delta=1e-5, group_size=size)

    by_size = [cost(2.0, size) for size in (*range(36, 46), 100, 1_000)]
    assert sorted(by_size) == by_size
    assert all(b < 1.05 * a for a, b in zip(by_size[:9], by_size[1:10], strict=True))
    by_noise = [cost(noise, 64) for noise in (1.0, 1.2, 2.0, 3.1, 3.3, 5.0)]
    assert sorted(by_noise, reverse=True) == by_noise


def test_a_group_has_no_more_examples_than_there_are():
    run = TrainingRun(2.0, PoissonSampling(8), 32, 10)
    assert epsilon(runs=[run], delta=1e-3, group_size=32) > 0
    with pytest.raises(ValueError, match="at most the number of examples, 32; got 33"):
        epsilon(runs=[run], delta=1e-3, group_size=33)


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
