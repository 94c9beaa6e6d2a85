import pytest
from dp_accounting.pld import privacy_loss_distribution as dp_pld
from scipy import stats

from accountants import PoissonSampling, TrainingRun, delta, epsilon
from tests.accountants.sampling.helpers import SIGMA, cells, least_deltas


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
