import math

import numpy as np
import pytest
from scipy import stats

from accountants import (
    FullBatch,
    PoissonSampling,
    RandomAllocation,
    TrainingRun,
    delta,
    epsilon,
)
from accountants.numerics import ORDERS
from accountants.sampling.random_allocation import BallsInBinsRelease
from tests.accountants.sampling.helpers import drawn


@pytest.mark.parametrize(
    ("sigma", "bins"), [(1.0, 10), (1.0, 100), (2.0, 50), (0.7, 50), (0.5, 20), (1.0, 2)]
)
def test_an_epoch_of_balls_in_bins_against_monte_carlo(sigma, bins):
    generator = np.random.default_rng(bins)
    noise = generator.normal(size=(2_000_000 // bins, bins)) * sigma
    ratios = np.exp(noise / sigma**2 - 0.5 / sigma**2)
    without = ratios.sum(axis=1)
    own = np.exp((noise[:, 0] + 1) / sigma**2 - 0.5 / sigma**2)
    losses = {
        "remove": np.log((without - ratios[:, 0] + own) / bins),
        "add": -np.log(without / bins),
    }
    for target in (0.01, 0.1, 0.5, 1.0):
        claimed = delta(
            noise_multiplier=sigma,
            sampling=RandomAllocation(bins),
            num_examples=1000,
            steps=bins,
            epsilon=target,
        )
        estimates = []
        for loss in losses.values():
            each = np.maximum(0.0, -np.expm1(np.minimum(0.0, target - loss)))
            error = each.std() / math.sqrt(len(each)) + 1e-7
            assert each.mean() - 4.5 * error <= claimed
            estimates.append(each.mean() + 4.5 * error)
        # Tight, too.
        assert claimed <= 1.05 * max(estimates) + 1e-5


def test_two_bins_against_integration():
    sigma, target = 0.8, 0.7
    axis = np.linspace(-9 * sigma, 1 + 9 * sigma, 1201)
    x, y = np.meshgrid(axis, axis)
    cell = (axis[1] - axis[0]) ** 2
    normal = stats.norm(scale=sigma).pdf
    q = normal(x) * normal(y)
    p = 0.5 * (normal(x - 1) * normal(y) + normal(x) * normal(y - 1))
    truth = max(
        np.maximum(0, one - math.exp(target) * other).sum() * cell
        for one, other in ((p, q), (q, p))
    )
    found = delta(
        noise_multiplier=sigma,
        sampling=RandomAllocation(2),
        num_examples=10,
        steps=2,
        epsilon=target,
    )
    assert truth * (1 - 1e-6) <= found <= truth * 1.01


# Values of the package random-allocation 1.0.5 (lower bounds at delta = 1e-5, and divergences).
@pytest.mark.parametrize(
    ("sigma", "bins", "lower", "upper"),
    [(1.0, 100, 0.5810, 1.0299), (0.7, 100, 2.1670, 2.9297), (0.5, 100, 5.3965, 7.2180)],
)
def test_balls_in_bins_against_another_implementation(sigma, bins, lower, upper):
    run = TrainingRun(sigma, RandomAllocation(bins), 1000, bins)
    assert lower <= epsilon(runs=[run], delta=1e-5) <= upper


@pytest.mark.parametrize(
    ("sigma", "bins", "order", "divergence"),
    [(1.0, 100, 20, 5.394830397887543), (0.6, 7, 5, 4.998647525247165)],
)
def test_divergences_of_balls_in_bins_against_another_implementation(
    sigma, bins, order, divergence
):
    found = BallsInBinsRelease(bins, sigma).rdp()
    assert found[list(ORDERS).index(order)] == pytest.approx(divergence, rel=1e-9)


def test_divergences_of_balls_in_bins_against_integration():
    # Both directions, two bins.
    sigma = 1.2
    axis = np.linspace(-20, 20, 801)
    x, y = np.meshgrid(axis, axis)
    cell = (axis[1] - axis[0]) ** 2
    log = stats.norm(scale=sigma).logpdf
    q = log(x) + log(y)
    p = np.logaddexp(log(x - 1) + log(y), log(x) + log(y - 1)) - math.log(2)
    found = BallsInBinsRelease(2, sigma).rdp()
    for order in (1.5, 2, 4.3, 7):
        truth = [
            math.log(np.exp(order * one + (1 - order) * other).sum() * cell) / (order - 1)
            for one, other in ((p, q), (q, p))
        ]
        assert found[np.argmin(np.abs(ORDERS - order))] >= max(truth) * (1 - 1e-9)


@pytest.mark.parametrize("bins, bound", [(10, 1e-5), (1_000, 1e-5), (1_000, 1e-8)])
def test_the_least_of_all_accountants_falls_with_the_noise(bins, bound):
    found = []
    for sigma in (0.1, 0.25, 0.4, 0.4999, 0.5, 0.7):
        run = TrainingRun(sigma, RandomAllocation(bins), 10**6, bins)
        found.append(epsilon(runs=[run], delta=bound))
        alone = TrainingRun(sigma, FullBatch(), 10**6, 1)
        others = [
            epsilon(runs=[run], delta=bound, accountant="rdp"),
            epsilon(runs=[alone], delta=bound),
        ]
        assert found[-1] <= min(others) * (1 + 1e-9)
    assert sorted(found, reverse=True) == found
    assert found[3] < 1.01 * found[4]
    assert "rdp" in {e.accountant for e in found}


def test_the_least_accountant_in_company():
    """Beside another run, and where a tiny delta leaves Rényi divergences alone."""
    runs = [
        TrainingRun(0.3, RandomAllocation(100), 10_000, 100),
        TrainingRun(1.0, PoissonSampling(100), 10_000, 50),
    ]
    together = epsilon(runs=runs, delta=1e-5)
    first = epsilon(runs=runs[:1], delta=1e-5)
    assert first < together <= epsilon(runs=runs, delta=1e-5, accountant="rdp")
    assert epsilon(runs=runs[:1], delta=1e-14).accountant in ("rdp", "exact")
    assert delta(runs=runs, epsilon=float(together)) <= 1e-5 * (1 + 1e-6)


def test_balls_in_bins_in_composition():
    def cost(scheme, steps, **kwargs):
        run = TrainingRun(1.0, scheme, 60_000, steps)
        return epsilon(runs=[run], delta=1e-5, **kwargs)

    bins = RandomAllocation(100)
    spent = cost(bins, 10_000)
    # About that of Poisson sampling at the same rate; far from unsampled.
    assert 0.9 * cost(PoissonSampling(600), 10_000) < spent < cost(PoissonSampling(600), 10_000)
    assert spent < cost(bins, 10_000, accountant="rdp")
    # An epoch that has begun is charged whole.
    assert cost(bins, 9_901) == spent > cost(bins, 9_900)
    # Under replace-one nothing is gained over one participation an epoch.
    one = RandomAllocation(1)
    assert cost(bins, 300, relation="replace_one") == cost(one, 3, relation="replace_one")
    # One bin is a full batch.
    assert cost(RandomAllocation(1), 3).accountant == "exact"


@pytest.mark.parametrize(("steps", "error"), [(0, ValueError), (1.0, TypeError), (None, TypeError)])
def test_bad_numbers_of_bins(steps, error):
    with pytest.raises(error, match="steps"):
        RandomAllocation(steps)


def test_each_epoch_gives_every_example_a_step_of_its_own():
    found = drawn(RandomAllocation(4), 30, epochs=200)
    steps = np.zeros((200, 30), int)
    for number, rows in enumerate(found):
        steps[number // 4, rows] += number % 4 + 1
    assert steps.min() == 1 and steps.max() == 4
    # Uniform, independent of other examples and of the epoch before.
    shares = np.bincount(steps.ravel(), minlength=5)[1:] / steps.size
    assert np.abs(shares - 0.25).max() < 6 * math.sqrt(3 / 16 / steps.size)
    for one, other in ((steps[:, 0], steps[:, 1]), (steps[1:, 2], steps[:-1, 2])):
        assert abs((one == other).mean() - 0.25) < 6 * math.sqrt(3 / 16 / len(one))
