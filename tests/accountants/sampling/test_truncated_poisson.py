import dp_accounting
import numpy as np
import pytest

from accountants import FixedSize, PoissonSampling, TrainingRun, TruncatedPoisson, delta, epsilon
from tests.accountants.sampling.helpers import OTHERS, SIGMA, TARGETS, cells, drawn, least_deltas


@pytest.mark.parametrize("others", OTHERS)
@pytest.mark.parametrize("present", [4, 5])
def test_adding_an_example_to_truncated_batches(others, present):
    # The sampling probability is public; the data set has as many examples as it says, or one more.
    scheme = TruncatedPoisson(2, 2)
    run = TrainingRun(SIGMA, scheme, present, 6)
    p, q = (cells(scheme, present, data) for data in ((*others, 1), others))
    size = max(len(p), len(q))
    p, q = (np.pad(one, (size - len(one)) // 2) for one in (p, q))
    for target, lower in zip(TARGETS, least_deltas(p, q, 6, TARGETS), strict=True):
        assert lower <= delta(runs=[run], epsilon=target, relation="add_or_remove_one")


@pytest.mark.parametrize("relation", ["add_or_remove_one", "zero_out", "replace_one"])
@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_truncation_lies_between_poisson_and_fixed_size(relation, accountant):
    def cost(scheme):
        run = TrainingRun(2.0, scheme, 10_000, 500)
        fixed = relation == "add_or_remove_one" and isinstance(scheme, FixedSize)
        return epsilon(
            runs=[run],
            delta=1e-6,
            accountant=accountant,
            relation="zero_out" if fixed else relation,
        )

    often, seldom, never = (cost(TruncatedPoisson(100, b)) for b in (100, 130, 400))
    poisson, fixed = cost(PoissonSampling(100)), cost(FixedSize(100))
    # High orders of Rényi's divergence dislike even the rarest of cuts.
    assert poisson * 0.999 <= never <= poisson * (1.005 if accountant == "pld" else 1.05)
    assert never * 0.999 <= seldom <= often * 1.001 <= fixed * 1.002
    if accountant == "pld":
        assert seldom < poisson * 1.1


def test_truncation_costs_about_what_it_does_in_dp_accounting():
    run = TrainingRun(1.0, TruncatedPoisson(100, 115), 10_000, 400)
    theirs = dp_accounting.pld.PLDAccountant(value_discretization_interval=1e-3)
    event = dp_accounting.TruncatedSubsampledGaussianDpEvent(10_001, 0.01, 115, 1.0)
    theirs.compose(event, 400)
    ours = epsilon(runs=[run], delta=1e-6)
    assert epsilon(runs=[TrainingRun(1.0, PoissonSampling(100), 10_000, 400)], delta=1e-6) < ours
    # It knows a little more of how often the example is drawn when batches are cut.
    assert theirs.get_epsilon(1e-6) * 0.9 < ours <= theirs.get_epsilon(1e-6) * 1.03


@pytest.mark.parametrize(
    ("physical", "error"), [(29, ValueError), (30.0, TypeError), (None, TypeError)]
)
def test_bad_physical_batch_sizes(physical, error):
    with pytest.raises(error, match="physical_batch_size"):
        TruncatedPoisson(29.5, physical)


def test_batches_are_cut_without_favour():
    found = drawn(TruncatedPoisson(8, 8), 40, epochs=400)
    assert max(map(len, found)) == 8 > min(map(len, found))
    counts = np.bincount(np.concatenate(found), minlength=40)
    assert np.abs(counts - counts.mean()).max() < 6 * np.sqrt(counts.mean())
    # Where nothing is cut it draws as Poisson sampling does.
    assert all(
        map(np.array_equal, drawn(TruncatedPoisson(8, 40), 40, 5), drawn(PoissonSampling(8), 40, 5))
    )


def test_every_batch_fills_the_physical_size():
    assert TruncatedPoisson(8, 10).padded_size == 10
    assert TruncatedPoisson(8, 10).with_batch_size(4) is None
    with pytest.raises(ValueError, match=r"^`physical_batch_size` must be .* batch_size=8; got 7"):
        TruncatedPoisson(8, 7)
