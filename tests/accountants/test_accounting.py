import copy
import itertools
import json
import math
import pickle

import dp_accounting
import numpy as np
import pytest
from dp_accounting import pld
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

import accountants
from accountants import (
    Budget,
    CyclicPoisson,
    FixedEpochs,
    FullBatch,
    PoissonSampling,
    ShuffledEpochs,
    TrainingRun,
    curves,
    delta,
    epsilon,
    releases,
)
from accountants.numerics import self_convolve

N = 60_000


def poisson(noise_multiplier, probability, steps, n=N):
    return TrainingRun(noise_multiplier, PoissonSampling(probability * n), n, steps)


def event(run):
    """The run as dp_accounting says it, under its default relation of add/remove."""
    gaussian = dp_accounting.GaussianDpEvent(run.noise_multiplier)
    probability = run.sampling.sampling_probability(run.num_examples)
    if probability < 1.0:
        gaussian = dp_accounting.PoissonSampledDpEvent(probability, gaussian)
    return dp_accounting.SelfComposedDpEvent(gaussian, run.participations)


# --- published and known values -------------------------------------------------------------------


def test_reference_values():
    run = {"noise_multiplier": 1.0, "sampling": PoissonSampling(600), "num_examples": N}
    run |= {"steps": 10_000, "delta": 1e-5}
    assert epsilon(**run, accountant="rdp") == pytest.approx(6.7128, abs=1e-4)
    assert epsilon(**run) == pytest.approx(6.1910, abs=1e-4)
    assert epsilon(**run) >= 6.1877


@pytest.mark.parametrize(("epochs", "published"), [(64, 2.483), (128, 3.632), (256, 5.341)])
def test_published_values_of_epochs(epochs, published):
    # The published figures charge one epoch more, and try whole orders of Rényi's divergence only.
    charged = poisson(2.0, 1 / 60, 60 * (epochs + 1))
    theirs = dp_accounting.rdp.RdpAccountant(range(2, 64))
    theirs.compose(event(charged))
    assert theirs.get_epsilon(1e-5) == pytest.approx(published, abs=5e-4)
    ours = epsilon(runs=[charged], delta=1e-5, accountant="rdp")
    assert published - 0.02 < ours <= published + 5e-4
    run = poisson(2.0, 1 / 60, 60 * epochs)
    assert (
        epsilon(runs=[run], delta=1e-5) < epsilon(runs=[run], delta=1e-5, accountant="rdp") < ours
    )


@pytest.mark.parametrize(("probability", "steps"), [(0.01, 1), (0.3, 20), (0.005, 3000)])
@pytest.mark.parametrize("noise_multiplier", [0.5, 1.0, 5.0])
def test_agrees_with_dp_accounting_called_directly(probability, noise_multiplier, steps):
    run = poisson(noise_multiplier, probability, steps)
    theirs = pld.PLDAccountant(value_discretization_interval=5e-4).compose(event(run))
    reference = theirs.get_epsilon(1e-6)
    assert reference * 0.98 - 1e-4 <= epsilon(runs=[run], delta=1e-6) <= reference * 1.02 + 2e-3
    theirs = dp_accounting.rdp.RdpAccountant().compose(event(run))
    ours = epsilon(runs=[run], delta=1e-6, accountant="rdp")
    assert ours == pytest.approx(theirs.get_epsilon(1e-6), rel=1e-6)


# --- held against integration ---------------------------------------------------------------------


MEANS = {"remove": (1.0, 0.0), "add": (0.0, 1.0), "replace": (1.0, -1.0)}


class Pair:
    """P and Q of one release on neighbouring data, for contributions of norm 1 to zero."""

    def __init__(self, probability, noise_multiplier, direction):
        self.probability, self.noise = probability, noise_multiplier
        self.p_mean, self.q_mean = MEANS[direction]
        self.edge = 12 * noise_multiplier + 1

    def _mix(self, function, x, mean):
        blank = (1 - self.probability) * function(x, 0.0, self.noise)
        return blank + self.probability * function(x, mean, self.noise)

    def p(self, x):
        return self._mix(stats.norm.cdf, x, self.p_mean)

    def q(self, x):
        return self._mix(stats.norm.cdf, x, self.q_mean)

    def loss(self, x):
        p = self._mix(stats.norm.pdf, x, self.p_mean)
        return np.log(p) - np.log(self._mix(stats.norm.pdf, x, self.q_mean))

    def one_step_delta(self, target):
        """P - exp(target) Q of the half-line on which the (monotone) privacy loss exceeds it."""
        low, high = self.loss(-self.edge), self.loss(self.edge)
        if max(low, high) <= target:
            return 0.0
        if min(low, high) >= target:
            return -math.expm1(target)
        x = optimize.brentq(lambda x: self.loss(x) - target, -self.edge, self.edge, xtol=1e-15)
        left = self.p(x) - math.exp(target) * self.q(x)
        return left if low > high else -math.expm1(target) - left

    def delta_bounds(self, steps, targets):
        """Lower and upper bounds on delta after some steps, for each target.

        The line is cut into cells; all mass of a cell is given the least, or the greatest, privacy
        loss in it, rounded down, or up, to a grid; the losses of the steps are then convolved.
        """
        x = np.linspace(-self.edge, self.edge, 200_001)
        mass, loss, grid = np.diff(self.p(x)), self.loss(x), 2e-4
        for pick, turn, sign in ((np.minimum, np.floor, -1), (np.maximum, np.ceil, 1)):
            index = turn(pick(loss[1:], loss[:-1]) / grid).astype(int)
            least = index.min()
            distribution = np.bincount(index - least, weights=mass)
            size = (len(distribution) - 1) * steps + 1
            padded = 1 << (size - 1).bit_length()
            composed = np.fft.irfft(np.fft.rfft(distribution, padded) ** steps, padded)[:size]
            losses = (np.arange(size) + least * steps) * grid
            lost = sign * (steps * max(0.0, 1 - mass.sum()) + 1e-12)
            yield [
                np.dot(composed, np.maximum(0.0, -np.expm1(np.minimum(0.0, target - losses))))
                + lost
                for target in targets
            ]


@pytest.mark.parametrize("noise_multiplier", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("probability", [0.02, 0.5])
@pytest.mark.parametrize("relation", ["add_or_remove_one", "zero_out", "replace_one"])
def test_one_step_against_quadrature(noise_multiplier, probability, relation):
    run = poisson(noise_multiplier, probability, 1)
    directions = ["replace"] if relation == "replace_one" else ["add", "remove"]
    for target in (0.05, 0.5, 2.0):
        truth = max(
            Pair(probability, noise_multiplier, d).one_step_delta(target) for d in directions
        )
        found = delta(runs=[run], epsilon=target, relation=relation)
        assert truth * (1 - 1e-12) <= found <= truth * 1.03 + 1e-6


@pytest.mark.parametrize(
    ("noise_multiplier", "probability", "steps"), [(1.0, 0.1, 20), (0.7, 0.5, 8), (3.0, 0.3, 40)]
)
@pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_one"])
def test_some_steps_against_convolution(noise_multiplier, probability, steps, relation):
    run = poisson(noise_multiplier, probability, steps)
    directions = ["replace"] if relation == "replace_one" else ["add", "remove"]
    targets = (0.5, 2.0, 6.0)
    bounds = [
        Pair(probability, noise_multiplier, d).delta_bounds(steps, targets) for d in directions
    ]
    lowers, uppers = (np.max(side, axis=0) for side in zip(*bounds, strict=True))
    for target, lower, upper in zip(targets, lowers, uppers, strict=True):
        found = delta(runs=[run], epsilon=target, relation=relation)
        assert lower <= found <= upper * 1.02 + 1e-9
        assert upper - lower < 0.05 * upper + 1e-9
        assert delta(runs=[run], epsilon=target, relation=relation, accountant="rdp") >= lower


@pytest.mark.parametrize("angle", [0.0, 1.0, 2.0, 3.0, math.pi])
@pytest.mark.parametrize(("norm", "other"), [(1.0, 1.0), (1.0, 0.5), (0.3, 1.0)])
def test_replacing_an_example_by_its_opposite_is_the_worst(angle, norm, other):
    # The claim that makes the one-dimensional pair enough: any two contributions in the plane.
    sigma, probability = 0.8, 0.3
    run = poisson(sigma, probability, 1)
    axis = np.linspace(-7, 7, 701)
    x, y = np.meshgrid(axis, axis)
    cell = (axis[1] - axis[0]) ** 2

    def density(mean):
        return stats.norm.pdf(x, mean[0], sigma) * stats.norm.pdf(y, mean[1], sigma)

    blank = (1 - probability) * density((0, 0))
    one = blank + probability * density((norm, 0))
    two = blank + probability * density((other * np.cos(angle), other * np.sin(angle)))
    for target in (0.0, 0.3, 1.0):
        claimed = delta(runs=[run], epsilon=target, relation="replace_one")
        for p, q in ((one, two), (two, one)):
            assert np.maximum(0, p - math.exp(target) * q).sum() * cell <= claimed + 1e-5


@pytest.mark.parametrize("noise_multiplier", [0.02, 0.5, 3.0, 100.0])
@pytest.mark.parametrize("steps", [1, 1000])
def test_closed_form_is_tight_and_on_the_safe_side(noise_multiplier, steps):
    run = TrainingRun(noise_multiplier, FullBatch(), N, steps)
    shift = math.sqrt(steps) / noise_multiplier
    for target in (0.3, 1e-3, 1e-9, 1e-30):
        found = epsilon(runs=[run], delta=target)
        assert found.accountant == "exact"
        a = stats.norm.logcdf(shift / 2 - found / shift)
        b = stats.norm.logcdf(-shift / 2 - found / shift) + found
        assert math.exp(a) * -math.expm1(b - a) <= target
        if found:
            assert delta(runs=[run], epsilon=found * (1 - 1e-6) - 1e-11) > target


@pytest.mark.parametrize("rho", [1e-6, 0.01, 0.5, 30.0])
def test_zero_concentration_is_converted_at_the_best_order(rho):
    curve = curves.ZcdpCurve(rho)
    truth = curves.GaussianCurve(math.sqrt(2 * rho))
    orders = 1 + np.logspace(-3, 5, 20_001)
    for target in (1e-2, 1e-5, 1e-12):
        # Canonne, Kamath and Steinke 2020, Proposition 12.
        bound = rho * orders + np.log1p(-1 / orders) - np.log(target * orders) / (orders - 1)
        found = curve.epsilon(target)
        assert truth.epsilon(target) <= found == pytest.approx(max(0, bound.min()), rel=1e-5)
        # Bun and Steinke 2016, Proposition 1.3, is looser.
        assert found < rho + 2 * math.sqrt(rho * math.log(1 / target))
    for target in (0.0, 0.5, 5.0):
        assert truth.delta(target) <= curve.delta(target) <= 1.0
    assert curves.ZcdpCurve(0.0).epsilon(1e-5) == curves.ZcdpCurve(0.0).delta(1.0) == 0.0
    assert curves.ZcdpCurve(math.inf).epsilon(1e-5) == math.inf
    assert curves.ZcdpCurve(math.inf).delta(1.0) == 1.0


@pytest.mark.parametrize("steps", [3_000, 1_000_000])
@pytest.mark.parametrize("shift", [0.1, 1.0, 3.0])
def test_composed_distributions_round_to_the_safe_side(steps, shift):
    # Forced through the discretised path, unsampled Gaussians have a known answer.
    release = releases.Gaussian(shift / math.sqrt(steps))
    grid = curves._grid([(release, steps)])
    curve = curves.PldCurve(curves._released(release, steps, grid), rounding=1e-13 + 2e-16 * steps)
    truth = curves.GaussianCurve(shift)
    for target in (1e-3, 1e-6, 3e-9):
        assert truth.epsilon(target) * (1 - 1e-9) <= curve.epsilon(target)
        assert curve.epsilon(target) <= truth.epsilon(target) * 1.02
    for target in (1e-6, 1e-12, 1e-15, 1e-20):
        at = truth.epsilon(target)
        assert curve.delta(at) >= truth.delta(at)
    for times in (1.01, 1.5, 3.0, 10.0):
        target = times * curve.rounding
        assert curve.epsilon(target) >= truth.epsilon(target)
    with pytest.raises(ValueError, match="delta must be above"):
        curve.epsilon(1e-14)


@pytest.mark.parametrize("steps", [100, 20_000])
@pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_one"])
def test_every_delta_has_an_epsilon(steps, relation):
    run = TrainingRun(2.0, PoissonSampling(100), 10_000, steps)
    targets = 10.0 ** np.arange(-5.0, -19.0, -0.5)
    found = [epsilon(runs=[run], delta=float(t), relation=relation) for t in targets]
    assert all(a < b for a, b in itertools.pairwise(found))
    assert found[0].accountant == "pld" and found[-1].accountant == "rdp"
    for target, value in zip(targets, found, strict=True):
        divergences = epsilon(runs=[run], delta=float(target), relation=relation, accountant="rdp")
        assert value <= divergences


def test_noise_is_found_for_every_budget():
    for target in (1e-9, 1e-12, 1e-15):
        given = {"sampling": PoissonSampling(100), "num_examples": 10_000, "steps": 300}
        noise = accountants.calibrate_noise_multiplier(epsilon=2.0, delta=target, **given)
        assert 1.99 < epsilon(noise_multiplier=noise, delta=target, **given) <= 2.0


@pytest.mark.parametrize("probability", [1e-4, 3e-4])
def test_fine_grids_are_chosen_for_small_losses(probability):
    # A grid of 1e-3 gives more than twice the truth here.
    run = poisson(1.0, probability, 1000)
    rough = pld.privacy_loss_distribution.from_gaussian_mechanism(
        1.0, value_discretization_interval=1e-3, sampling_prob=probability
    ).self_compose(1000)
    fine = pld.privacy_loss_distribution.from_gaussian_mechanism(
        1.0, value_discretization_interval=2e-5, sampling_prob=probability
    ).self_compose(1000)
    found = epsilon(runs=[run], delta=1e-5)
    assert found <= rough.get_epsilon_for_delta(1e-5) + 1e-6
    assert found == pytest.approx(fine.get_epsilon_for_delta(1e-5), rel=0.02, abs=1e-4)


def fourier_epsilon(probability, noise, steps, delta):
    """Epsilon of Poisson sampling under add/remove by a transform of densities on a fine grid. It
    splits each loss between its neighbours, which keeps means, and is good to a part in a thousand.
    """
    x = np.linspace(-10 * noise, 1 + 10 * noise, 400_001)
    out, up = stats.norm.pdf(x, 0, noise), stats.norm.pdf(x, 1, noise)
    losses = np.logaddexp(np.log1p(-probability), np.log(probability) + (x - 0.5) / noise**2)
    found = 0.0
    for sign, density in ((1, (1 - probability) * out + probability * up), (-1, out)):
        loss, mass = sign * losses, density * (x[1] - x[0])
        mean = steps * (mass @ loss)
        spread = math.sqrt(steps * (mass @ loss**2))
        step = spread / (16 * math.sqrt(steps))  # far below the spread of one step
        size = 2 ** math.ceil(math.log2(max(40 * spread, 1.2 * np.ptp(loss)) / step))
        places = np.floor(loss / step).astype(int)
        rest = loss / step - places
        single = np.bincount(places % size, mass * (1 - rest), size)
        single += np.bincount((places + 1) % size, mass * rest, size)
        sums = np.maximum(np.fft.irfft(np.fft.rfft(single) ** steps, size), 0)
        k = np.arange(size)
        at = np.where(k > size // 2 + int(mean / step), k - size, k) * step

        def excess(value, sums=sums, at=at):
            above = at > value
            return sums[above] @ -np.expm1(value - at[above]) - delta

        found = max(found, optimize.brentq(excess, 0.0, max(mean, 0.0) + 40 * spread))
    return found


@pytest.mark.parametrize(
    "probability, noise, steps",
    [(0.01, 1.0, 1000), (1e-4, 0.7, 20_000), (1e-4, 1.0, 100_000), (1e-5, 0.8, 100_000)],
)
def test_losses_on_a_grid_are_within_a_hundredth_of_the_truth(probability, noise, steps):
    n = 10**7
    given = {"sampling": PoissonSampling(probability * n), "num_examples": n, "steps": steps}
    found = epsilon(noise_multiplier=noise, delta=1e-6, **given)
    truth = fourier_epsilon(probability, noise, steps, 1e-6)
    assert 0.999 * truth <= found <= 1.01 * truth
    more = epsilon(noise_multiplier=1.01 * noise, delta=1e-6, **given)
    assert 0.93 * found < more < found  # as smooth as the truth is


# --- relations ------------------------------------------------------------------------------------


@pytest.mark.parametrize("accountant", ["pld", "rdp", "exact", "zcdp"])
def test_a_noise_multiplier_means_the_same_to_every_accountant(accountant):
    """dp_accounting doubles the sensitivity of replace-one in PLD and not in RDP."""
    settings = {"num_examples": N, "sampling": FullBatch(), "delta": 1e-5, "steps": 10}
    settings["accountant"] = accountant
    replaced = epsilon(noise_multiplier=8.0, relation="replace_one", **settings)
    assert replaced == epsilon(noise_multiplier=4.0, relation="add_or_remove_one", **settings)
    assert replaced == epsilon(noise_multiplier=4.0, relation="zero_out", **settings)
    truth = epsilon(noise_multiplier=4.0, **(settings | {"accountant": "exact"}))
    assert truth <= replaced <= truth * 1.15


def test_subsampling_converges_to_the_full_batch():
    for relation in ("add_or_remove_one", "zero_out", "replace_one"):
        nearly = epsilon(runs=[poisson(4.0, 0.9999, 10)], delta=1e-5, relation=relation)
        full = epsilon(runs=[TrainingRun(4.0, FullBatch(), N, 10)], delta=1e-5, relation=relation)
        everyone = epsilon(runs=[poisson(4.0, 1.0, 10)], delta=1e-5, relation=relation)
        assert nearly == pytest.approx(full, rel=2e-3)
        assert everyone == full


def test_shuffled_epochs_are_one_gaussian_an_epoch():
    """Shuffled batches accounted as Poisson samples: a mistake of the peers."""
    run = TrainingRun(1.0, ShuffledEpochs(600), N, 1000)
    spent = epsilon(runs=[run], delta=1e-5)
    assert spent == epsilon(runs=[TrainingRun(1.0, FullBatch(), N, 10)], delta=1e-5)
    assert spent.relation == "zero_out"
    assert spent > 5 * epsilon(runs=[poisson(1.0, 0.01, 1000)], delta=1e-5)
    with pytest.raises(ValueError, match="add_or_remove_one.*ShuffledEpochs.*zero_out"):
        epsilon(runs=[run], delta=1e-5, relation="add_or_remove_one")
    # A run that stops amid an epoch has spent all of it, and its successor starts another.
    half = TrainingRun(1.0, ShuffledEpochs(600), N, 50)
    assert epsilon(runs=[half] * 20, delta=1e-5) == pytest.approx(
        epsilon(runs=[TrainingRun(1.0, FullBatch(), N, 20)], delta=1e-5)
    )


def test_runs_share_a_relation():
    shuffled = TrainingRun(9.0, ShuffledEpochs(600), N, 100)
    sampled = poisson(1.0, 0.01, 100)
    assert epsilon(runs=[sampled], delta=1e-5).relation == "add_or_remove_one"
    assert epsilon(runs=[sampled, shuffled], delta=1e-5).relation == "zero_out"
    assert epsilon(runs=[shuffled, sampled], delta=1e-5).relation == "zero_out"
    with pytest.raises(ValueError, match="ShuffledEpochs"):
        epsilon(runs=[sampled, shuffled], delta=1e-5, relation="add_or_remove_one")


def test_combinations_that_nobody_accounts_for():
    run = poisson(1.0, 0.01, 100)
    for accountant in ("exact", "zcdp"):
        with pytest.raises(ValueError, match=f"{accountant}.*PoissonSampling"):
            epsilon(runs=[run], delta=1e-5, accountant=accountant)
    # No divergences, and sums that round at the scale of delta.
    other = accountants.Query(description="a table", epsilon=0.1, delta=1e-20)
    with pytest.raises(ValueError, match="delta must be above"):
        epsilon(runs=[run, other], delta=1e-14)


# --- composition ----------------------------------------------------------------------------------


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_runs_compose(accountant):
    a, b = poisson(1.0, 0.01, 300), poisson(2.0, 0.05, 200)
    c = TrainingRun(15.0, FullBatch(), N, 4)

    def cost(*runs):
        return epsilon(runs=runs, delta=1e-5, accountant=accountant)

    assert cost(a, a) == pytest.approx(cost(poisson(1.0, 0.01, 600)), rel=1e-3)
    assert cost(a, b, c) == pytest.approx(cost(c, b, a), rel=1e-3)
    assert max(cost(a), cost(b), cost(c)) < cost(a, b, c) < cost(a) + cost(b) + cost(c)
    many = [poisson(1 + i / 10, 0.01, 25) for i in range(8)]
    assert cost(poisson(1.8, 0.01, 200)) < cost(*many) < cost(poisson(1.0, 0.01, 200)) * 1.01


def test_heterogeneous_composition_against_dp_accounting():
    a, b = poisson(1.0, 0.01, 300), poisson(2.0, 0.05, 200)
    c = TrainingRun(15.0, FullBatch(), N, 4)
    theirs = pld.PLDAccountant(value_discretization_interval=1e-4)
    for run in (a, b, c):
        theirs.compose(event(run))
    ours = epsilon(runs=[a, b, c], delta=1e-5)
    assert theirs.get_epsilon(1e-5) - 1e-4 <= ours <= theirs.get_epsilon(1e-5) * 1.01


# --- limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize("sampling", [PoissonSampling(600), FullBatch(), ShuffledEpochs(600)])
def test_nothing_costs_nothing_and_no_noise_costs_everything(accountant, sampling):
    run = {"sampling": sampling, "num_examples": N, "accountant": accountant}
    assert epsilon(**run, noise_multiplier=1.0, steps=0, delta=1e-5) == 0.0
    assert epsilon(**run, noise_multiplier=0.0, steps=0, delta=1e-5) == 0.0
    assert epsilon(**run, noise_multiplier=0.0, steps=1, delta=1e-5) == math.inf
    assert delta(**run, noise_multiplier=1.0, steps=0, epsilon=0.0) == 0.0
    assert delta(**run, noise_multiplier=0.0, steps=1, epsilon=5.0) == 1.0
    assert epsilon(runs=[], delta=1e-5) == 0.0
    # Never negative: also where the noise is far more than enough.
    assert epsilon(**run, noise_multiplier=1e8, steps=1, delta=1e-3) == 0.0


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize("noise_multiplier", [1e-200, 1e-6, 0.01, 0.06, 1e3, 1e7])
@pytest.mark.parametrize("batch_size", [1e-3, 60, 59_999])
def test_extreme_runs(accountant, noise_multiplier, batch_size):
    run = TrainingRun(noise_multiplier, PoissonSampling(batch_size), N, 1_000)
    spent = epsilon(runs=[run], delta=1e-5, accountant=accountant)
    full = epsilon(runs=[TrainingRun(noise_multiplier, FullBatch(), N, 1_000)], delta=1e-5)
    assert 0.0 <= spent
    if accountant == "pld" and full < 1e4:
        assert spent <= full * 1.01 + 1e-3
    assert 0.0 <= delta(runs=[run], epsilon=1.0, accountant=accountant) <= 1.0


@settings(deadline=None, max_examples=10)
@given(
    noise_multiplier=st.floats(0.4, 20.0),
    probability=st.floats(1e-3, 0.9),
    steps=st.integers(1, 3_000),
    relation=st.sampled_from(["add_or_remove_one", "replace_one"]),
    stretch=st.floats(1.05, 3.0),
)
def test_monotone(noise_multiplier, probability, steps, relation, stretch):
    def cost(*run):
        return epsilon(runs=[poisson(*run)], delta=1e-5, relation=relation)

    here = cost(noise_multiplier, probability, steps)
    tolerance = 1 + 1e-6
    assert cost(noise_multiplier * stretch, probability, steps) <= here * tolerance
    assert cost(noise_multiplier, probability, math.ceil(steps * stretch)) * tolerance >= here
    assert cost(noise_multiplier, min(1.0, probability * stretch), steps) * tolerance >= here
    assert epsilon(runs=[poisson(noise_multiplier, probability, steps)], delta=1e-4) <= here
    if relation == "replace_one":
        assert here >= epsilon(runs=[poisson(noise_multiplier, probability, steps)], delta=1e-5)


@settings(deadline=None, max_examples=10)
@given(
    noise_multiplier=st.floats(0.5, 10.0),
    probability=st.sampled_from([0.01, 0.2, 1.0]),
    accountant=st.sampled_from(["pld", "rdp"]),
    target=st.floats(0.05, 10.0),
)
def test_delta_and_epsilon_are_inverse(noise_multiplier, probability, accountant, target):
    runs = [poisson(noise_multiplier, probability, 50)]
    found = delta(runs=runs, epsilon=target, accountant=accountant)
    if 1e-9 < found < 0.5:
        back = epsilon(runs=runs, delta=found, accountant=accountant)
        # RDP's two conversions differ where another bound takes over, for large delta.
        assert back == pytest.approx(target, rel=1e-3) or accountant == "rdp" and back >= target


# --- interface ------------------------------------------------------------------------------------


def test_results_are_floats_that_say_of_what():
    result = epsilon(
        noise_multiplier=2.0, sampling=FullBatch(), num_examples=10, steps=1, delta=1e-5
    )
    assert (result.delta, result.relation, result.accountant) == (
        1e-5,
        "add_or_remove_one",
        "exact",
    )
    assert json.loads(json.dumps({"epsilon": result})) == {"epsilon": float(result)}
    assert str(result) == f"{result}" == str(float(result))
    assert "add_or_remove_one" in repr(result)
    assert type(result + 1) is float and f"{result:.2f}" == f"{float(result):.2f}"
    for again in (pickle.loads(pickle.dumps(result)), copy.deepcopy(result)):
        assert again == result and repr(again) == repr(result)
    other = delta(noise_multiplier=2.0, sampling=FullBatch(), num_examples=10, steps=1, epsilon=1.0)
    assert repr(pickle.loads(pickle.dumps(other))) == repr(other)
    assert (other.epsilon, other.relation) == (1.0, "add_or_remove_one")


RUN = {"noise_multiplier": 1.0, "sampling": PoissonSampling(10), "num_examples": 100, "steps": 5}


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"delta": 0.0}, ValueError, "delta"),
        ({"delta": 1.0}, ValueError, "delta"),
        ({"delta": -1e-5}, ValueError, "delta"),
        ({"delta": math.nan}, ValueError, "delta"),
        ({"delta": "1e-5"}, TypeError, "delta"),
        ({"noise_multiplier": -1.0}, ValueError, "noise_multiplier"),
        ({"noise_multiplier": math.nan}, ValueError, "noise_multiplier"),
        ({"noise_multiplier": None}, TypeError, "noise_multiplier"),
        ({"steps": None}, TypeError, "steps"),
        ({"steps": 2.0}, TypeError, "steps"),
        ({"sampling": 10}, TypeError, "sampling"),
        ({"accountant": "moments"}, ValueError, "'pld', 'rdp', 'exact'"),
        ({"relation": "add"}, ValueError, "relation.*'replace_one'"),
        ({"runs": []}, TypeError, "runs="),
    ],
)
def test_bad_arguments(change, error, match):
    with pytest.raises(error, match=match):
        epsilon(**({"delta": 1e-5} | RUN | change))


def test_bad_runs_and_epsilons():
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="epsilon"):
            delta(**RUN, epsilon=bad)
    with pytest.raises(TypeError, match="runs"):
        epsilon(runs=TrainingRun(**RUN), delta=1e-5)
    with pytest.raises(TypeError, match="runs"):
        epsilon(runs=[RUN], delta=1e-5)
    with pytest.raises(TypeError):
        epsilon(**RUN, delta=1e-5, momentum=0.9)


@pytest.mark.parametrize(("e", "d"), [(0, 1e-5), (-1, 1e-5), (math.inf, 1e-5), (1, 0), (1, 1)])
def test_bad_budgets(e, d):
    with pytest.raises(ValueError):
        Budget(epsilon=e, delta=d)


# --- speed ----------------------------------------------------------------------------------------


@pytest.fixture
def sums(monkeypatch):
    """The lengths of the distributions that are summed, and of their sums, while a test runs."""
    found = []

    def counted(masses, times, tail):
        first, summed = self_convolve(masses, times, tail)
        found.append((len(masses), len(summed)))
        return first, summed

    monkeypatch.setattr(curves, "self_convolve", counted)
    return found


@pytest.mark.parametrize(
    ("noise_multiplier", "probability"), [(1.0, 0.01), (1.0, 1e-3), (2.0, 1e-3)]
)
def test_a_million_steps_are_a_few_sums_of_short_distributions(noise_multiplier, probability, sums):
    epsilon(runs=[poisson(noise_multiplier, probability, 1_000_000)], delta=1e-5)
    assert 0 < len(sums) <= 4  # two stages for each direction
    assert max(map(max, sums)) < 2**18


def test_schedules_are_grouped(sums):
    schedule = [poisson(1 + i % 5 / 10, 0.01, 3) for i in range(2_000)]
    grouped = [poisson(1 + i / 10, 0.01, 1_200) for i in range(5)]
    spent = epsilon(runs=schedule, delta=1e-5)
    each = len(sums)
    assert spent == epsilon(runs=grouped, delta=1e-5)
    assert each <= 5 * 6


def test_public_names_exist():
    assert all(hasattr(accountants, name) for name in accountants.__all__)


@pytest.mark.parametrize("bands", [1, 4, 100])
def test_cyclic_sampling_is_one_composition_of_its_rounds(bands):
    scheme = CyclicPoisson(600, bands=bands)
    found = epsilon(noise_multiplier=1.5, sampling=scheme, num_examples=N, steps=399, delta=1e-5)
    one = pld.privacy_loss_distribution.from_gaussian_mechanism(1.5, sampling_prob=600 * bands / N)
    direct = one.self_compose(-(-399 // bands)).get_epsilon_for_delta(1e-5)
    assert found == pytest.approx(direct, rel=2e-3)
    assert found.relation == "add_or_remove_one"


def test_a_whole_run_of_one_order_is_one_gaussian():
    scheme = FixedEpochs(600, epochs=10)
    run = {"noise_multiplier": 2.0, "num_examples": N, "delta": 1e-5}
    whole = epsilon(sampling=FullBatch(), steps=1, **run)
    for steps in (1, 500, 1000):
        assert epsilon(sampling=scheme, steps=steps, **run) == whole
    assert epsilon(sampling=scheme, steps=1001, **run) == epsilon(
        sampling=FullBatch(), steps=2, **run
    )
    assert epsilon(sampling=scheme, steps=1, **run).relation == "zero_out"
    for kind in (scheme, CyclicPoisson(600, bands=4)):
        replaced = epsilon(sampling=kind, steps=1, relation="replace_one", **run)
        assert replaced > epsilon(sampling=kind, steps=1, **run)
    with pytest.raises(ValueError, match="add_or_remove_one.*FixedEpochs"):
        epsilon(sampling=scheme, steps=1, relation="add_or_remove_one", **run)
