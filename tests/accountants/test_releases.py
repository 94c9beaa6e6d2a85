"""The pairs that dominate releases, held against what the schemes really do."""

import itertools
import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as dp_pld
from scipy import stats

from accountants import (
    FixedSize,
    FullBatch,
    PoissonSampling,
    RandomAllocation,
    ShuffledEpochs,
    TrainingRun,
    TruncatedPoisson,
    curves,
    delta,
    epsilon,
    releases,
)

SIGMA = 0.9


# --- a step of a few examples, by going through all batches it can draw ---------------------------


def batches(scheme, n, examples):
    """The probability of every batch, as a set of positions, drawn from some of n positions."""
    if isinstance(scheme, FixedSize):
        chosen = list(itertools.combinations(examples, scheme.batch_size))
        return {batch: 1 / len(chosen) for batch in chosen}
    q = scheme.sampling_probability(n)
    found = {}
    for size in range(len(examples) + 1):
        for drawn in itertools.combinations(examples, size):
            probability = q**size * (1 - q) ** (len(examples) - size)
            kept = [drawn]
            if isinstance(scheme, TruncatedPoisson) and size > scheme.physical_batch_size:
                kept = list(itertools.combinations(drawn, scheme.physical_batch_size))
            for batch in kept:
                found[batch] = found.get(batch, 0.0) + probability / len(kept)
    assert sum(found.values()) == pytest.approx(1.0)
    return found


def cells(scheme, n, contributions, sigma=SIGMA, width=1e-2):
    """The probability of every small interval, of the noisy sum of contributions on a line."""
    means = {}
    for batch, probability in batches(scheme, n, range(len(contributions))).items():
        total = sum(contributions[i] for i in batch)
        means[total] = means.get(total, 0.0) + probability
    edges = np.arange(-len(contributions) - 9 * sigma, len(contributions) + 9 * sigma, width)
    edges = np.concatenate([[-np.inf], edges, [np.inf]])
    return sum(w * np.diff(stats.norm.cdf(edges, mean, sigma)) for mean, w in means.items())


def least_deltas(p, q, steps, targets, grid=1e-3):
    """Lower bounds on delta, both ways, after some steps: losses are rounded down."""
    return np.maximum(
        _least_deltas(p, q, steps, targets, grid), _least_deltas(q, p, steps, targets, grid)
    )


def _least_deltas(p, q, steps, targets, grid):
    kept = (p > 1e-14) & (q > 1e-300)
    index = np.floor(np.log(p[kept] / q[kept]) / grid).astype(int)
    least = index.min()
    masses = np.bincount(index - least, p[kept])
    size = (len(masses) - 1) * steps + 1
    padded = 1 << (size - 1).bit_length()
    composed = np.fft.irfft(np.fft.rfft(masses, padded) ** steps, padded)[:size]
    losses = (np.arange(size) + least * steps) * grid
    return (
        np.array(
            [np.dot(composed, -np.expm1(np.minimum(0.0, target - losses))) for target in targets]
        )
        - 1e-11
    )


# Others all against the example, for it, or neutral, and what the example becomes.
OTHERS = [(-1, -1, -1, -1), (0, 0, 0, 0), (1, 1, 1, 1), (-1, -1, 1, 0.5)]
TARGETS = (0.1, 1.0, 3.0)
CHANGES = {"zero_out": [(1, 0)], "replace_one": [(1, -1), (1, 0), (0.5, -1)]}


@pytest.mark.parametrize("steps", [1, 12])
@pytest.mark.parametrize("others", OTHERS)
@pytest.mark.parametrize(
    "scheme",
    [PoissonSampling(2), TruncatedPoisson(1.5, 2), TruncatedPoisson(2, 4), FixedSize(2)],
)
def test_no_data_sets_of_a_few_examples_are_easier_to_tell_apart(scheme, others, steps):
    n = len(others) + 1
    for relation, changes in CHANGES.items():
        for before, after in changes:
            p, q = (cells(scheme, n, (*others, own)) for own in (before, after))
            run = TrainingRun(SIGMA, scheme, n, steps)
            for target, lower in zip(TARGETS, least_deltas(p, q, steps, TARGETS), strict=True):
                assert lower <= delta(runs=[run], epsilon=target, relation=relation)


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
    ours = releases.FixedSize(probability, sigma).pld(grid).self_compose(steps)
    directions = dp_pld.from_gaussian_mechanism(
        sigma / 2, sampling_prob=probability, value_discretization_interval=grid
    )
    single = releases.FixedSize(probability, sigma).pld(grid)
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


# --- balls in bins --------------------------------------------------------------------------------


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
    found = releases.BallsInBins(bins, sigma).rdp()
    assert found[list(releases.ORDERS).index(order)] == pytest.approx(divergence, rel=1e-9)


def test_divergences_of_balls_in_bins_against_integration():
    # Both directions, two bins.
    sigma = 1.2
    axis = np.linspace(-20, 20, 801)
    x, y = np.meshgrid(axis, axis)
    cell = (axis[1] - axis[0]) ** 2
    log = stats.norm(scale=sigma).logpdf
    q = log(x) + log(y)
    p = np.logaddexp(log(x - 1) + log(y), log(x) + log(y - 1)) - math.log(2)
    found = releases.BallsInBins(2, sigma).rdp()
    for order in (1.5, 2, 4.3, 7):
        truth = [
            math.log(np.exp(order * one + (1 - order) * other).sum() * cell) / (order - 1)
            for one, other in ((p, q), (q, p))
        ]
        assert found[np.argmin(np.abs(releases.ORDERS - order))] >= max(truth) * (1 - 1e-9)


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


# --- groups ---------------------------------------------------------------------------------------


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


def test_groups_without_sampling_are_scaled_sensitivities():
    for scheme in (FullBatch(), ShuffledEpochs(10)):
        for relation in ("zero_out", "replace_one"):
            group = TrainingRun(9.0, scheme, 100, 20)
            single = TrainingRun(3.0, scheme, 100, 20)
            found = epsilon(runs=[group], delta=1e-5, group_size=3, relation=relation)
            assert found == pytest.approx(
                epsilon(runs=[single], delta=1e-5, relation=relation), rel=1e-9
            )
            assert found.group_size == 3 and "group_size=3" in repr(found)


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


# --- extremes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize("noise_multiplier", [0.0, 1e-200, 0.02, 0.3, 30.0, 1e6])
@pytest.mark.parametrize(
    "scheme",
    [
        TruncatedPoisson(1e-3, 1),
        TruncatedPoisson(99, 100),
        TruncatedPoisson(10, 10),
        FixedSize(1),
        FixedSize(99),
        FixedSize(100),
        RandomAllocation(1),
        RandomAllocation(3),
        RandomAllocation(5000),
    ],
)
def test_extreme_runs(scheme, noise_multiplier, accountant):
    run = TrainingRun(noise_multiplier, scheme, 100, 20)
    spent = epsilon(runs=[run], delta=1e-5, accountant=accountant)
    assert spent >= 0.0
    if noise_multiplier == 0.0:
        assert spent == math.inf
    unsampled = releases.gaussian(noise_multiplier, 2.0).shift * math.sqrt(run.participations)
    bound = curves.GaussianCurve(unsampled).epsilon(1e-5)
    assert accountant == "rdp" or spent <= bound * 1.01 + 1e-3 or bound == math.inf
    assert 0.0 <= delta(runs=[run], epsilon=1.0, accountant=accountant) <= 1.0
