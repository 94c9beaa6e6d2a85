"""The one-run audit: its statistics, its canaries, and the sabotage that it must catch."""

import itertools
import json
import math

import keras
import numpy as np
import pytest
from scipy import optimize, stats

import lipdp
from lipdp import audit, layers
from lipdp.audit import one_run
from lipdp.bounds.builtin import linear as linear_rules
from lipdp.training.steps import private_step
from tests.lipdp.helpers import dense_network, private

pytestmark = pytest.mark.any_backend

any_backend = pytest.mark.any_backend


# --- statistics -----------------------------------------------------------------------------


@any_backend
@pytest.mark.parametrize(
    "counts, delta, published",
    [((1000, 100, 75), 1e-4, 0.673), ((100_000, 1510, 1439), 1e-5, 2.675)],
)
def test_the_numbers_of_the_paper(counts, delta, published):
    assert audit.epsilon_lower_bound(*counts, delta) == pytest.approx(published, abs=1.1e-3)


def guarantee(epsilon):
    return 1 / (1 + math.exp(-epsilon))


@any_backend
@pytest.mark.parametrize("epsilon", [0.0, 0.7, 2.0])
def test_p_value_is_exact_for_randomized_response(epsilon):
    """Each coin is told rightly with probability e^ε/(1 + e^ε): all outcomes, one by one."""
    q, m = guarantee(epsilon), 8
    for v in range(m + 1):
        exact = sum(
            q ** sum(right) * (1 - q) ** (m - sum(right))
            for right in itertools.product((0, 1), repeat=m)
            if sum(right) >= v
        )
        assert audit.p_value(m, m, v, epsilon, 0.0) == pytest.approx(exact)


@any_backend
@pytest.mark.parametrize("delta", [1e-3, 0.02])
@pytest.mark.parametrize("m", [5, 50])
def test_p_value_covers_mechanisms_that_fail_with_probability_delta(m, delta):
    """Failures one by one, all at once, or of some: each coin is told with probability δ."""
    epsilon = 1.0
    q, count = guarantee(epsilon), np.arange(m + 1)
    for v in range(m + 1):
        bound = audit.p_value(m, m, v, epsilon, delta)
        one_by_one = stats.binom.sf(v - 1, m, delta + (1 - delta) * q)
        all_at_once = delta + (1 - delta) * stats.binom.sf(v - 1, m, q)
        some = max(
            # With probability δ·m/i some i coins, drawn at random, are told.
            p + (1 - p) * stats.binom.sf(v - 1, m, q) if i >= v else
            p * stats.binom.sf(v - i - 1, m - i, q) + (1 - p) * stats.binom.sf(v - 1, m, q)
            for i in count[1:] if (p := min(1.0, delta * m / i))
        )  # fmt: skip
        assert max(one_by_one, all_at_once, some) <= bound + 1e-12


@any_backend
def test_p_value_of_epsilon_alone_would_not_do():
    """Without the term of δ the mechanism that tells all, once in a while, breaks the bound."""
    m, delta = 50, 0.02
    assert audit.p_value(m, m, m, 1.0, 0.0) < delta <= audit.p_value(m, m, m, 1.0, delta)


@any_backend
@pytest.mark.parametrize("m, r", [(12, 12), (20, 10), (60, 15)])
@pytest.mark.parametrize("epsilon, delta", [(0.3, 0.0), (1.0, 1e-3), (2.0, 1e-2)])
def test_p_value_of_curve_solves_its_linear_program(m, r, epsilon, delta):
    """The largest P(c ≥ v) among all distributions of c that fulfil the inequalities."""
    claim = audit.Claim(epsilon, delta)
    numbers = np.arange(r + 1)
    lines = [(math.exp(epsilon), delta), (math.exp(-epsilon), 1 - math.exp(-epsilon) * (1 - delta))]
    rows, limits = [], []
    for t in range(1, r + 1):
        right = np.where(numbers >= t, numbers, 0) / m
        wrong = np.where(numbers >= t - 1, r - numbers, 0) / m
        for slope, offset in lines:
            rows.append(right - slope * wrong)
            limits.append(offset)
    for v in range(r // 2 + 1, r + 1):
        found = optimize.linprog(
            -1.0 * (numbers >= v), rows, limits, np.ones((1, r + 1)), [1.0], method="highs"
        )
        bound = audit.p_value_of_curve(m, r, v, claim.true_positive_rate)
        assert -found.fun * (1 - 1e-8) <= bound <= -found.fun * (1 + 1e-3)


@any_backend
def test_lower_bounds_hold_as_often_as_they_say(rng):
    """Randomized response, Gaussians, and Gaussians that blurt out: with the choice of the number
    of guesses, at most 5 % of the audits may claim too much.
    """
    m, delta, repetitions = 200, 1e-3, 200
    epsilon, mu = 1.0, 0.8
    wrong = {"response": 0, "gaussian": 0, "claim": 0, "failing": 0}
    gaussian = audit.Claim(*_gaussian(mu, delta))
    for seed in range(repetitions):
        one = audit.OneRun(np.zeros((m, 1)), np.zeros(m, int), seed=seed)
        b = one.included
        response = np.where(rng.random(m) < guarantee(epsilon), b, ~b)
        found = one.result(response, delta=0.0, guesses=[m])
        wrong["response"] += found.epsilon > epsilon
        found = one.result(b * mu + rng.normal(size=m), gaussian)
        wrong["gaussian"] += found.gaussian_epsilon > gaussian.epsilon
        wrong["claim"] += found.violated or found.epsilon > gaussian.epsilon
        all_told = rng.random() < delta
        found = one.result(b if all_told else response, delta=delta, guesses=[m])
        wrong["failing"] += found.epsilon > epsilon
    assert max(wrong.values()) <= 0.05 * repetitions, wrong


def _gaussian(mu, delta):
    import accountants

    run = {"noise_multiplier": 1 / mu, "sampling": lipdp.FullBatch(), "num_examples": 9, "steps": 1}
    return float(accountants.epsilon(**run, delta=delta)), delta, accountants.tradeoff(**run)


@any_backend
def test_a_gaussian_of_half_the_noise_is_caught():
    """Simulated: 20,000 canaries, a claim of μ = 0.4, twice that in truth; and an honest one."""
    random = np.random.default_rng(1)
    claim = audit.Claim(*_gaussian(0.4, 1e-5))
    one = audit.OneRun(np.zeros((20_000, 1)), np.zeros(20_000, int), seed=2)
    noise = random.normal(size=len(one))
    sabotaged = one.result(0.8 * one.included + noise, claim)
    assert sabotaged.violated and sabotaged.gaussian_epsilon > claim.epsilon
    honest = one.result(0.4 * one.included + noise, claim)
    assert not honest.violated and 0.4 * claim.epsilon < honest.gaussian_epsilon < claim.epsilon


@any_backend
def test_all_right_and_none_right():
    one = audit.OneRun(np.zeros((2000, 1)), np.zeros(2000, int), seed=0)
    perfect = one.result(one.included, delta=1e-5)
    assert perfect.accuracy == 1.0 and perfect.epsilon > 4
    assert one.result(~one.included, delta=1e-5).epsilon == 0.0


@any_backend
@pytest.mark.parametrize(
    "epsilon, delta, what",
    [(-1.0, 0.1, "epsilon"), (math.nan, 0.1, "epsilon"), (1.0, 1.0, "delta")],
)
def test_claims_out_of_range(epsilon, delta, what):
    with pytest.raises(ValueError, match=what):
        audit.Claim(epsilon, delta)


@any_backend
def test_the_curve_of_a_claim():
    import accountants

    run = {"noise_multiplier": 1.0, "num_examples": 1000, "steps": 20}
    curve = accountants.tradeoff(**run, sampling=lipdp.PoissonSampling(100))
    epsilon = accountants.epsilon(**run, sampling=lipdp.PoissonSampling(100), delta=1e-5)
    whole, alone = audit.Claim(float(epsilon), 1e-5, curve), audit.Claim(float(epsilon), 1e-5)
    for rate in (0.0, 1e-3, 0.1, 0.5, 1.0):
        assert whole.true_positive_rate(rate) <= alone.true_positive_rate(rate) + 1e-9
    assert whole.advantage < alone.advantage
    assert 0.5 < whole.area < alone.area < 1.0
    assert audit.Claim(math.inf, 1e-5).true_positive_rate(0.0) == 1.0
    # At its widest the curve of (ε, δ) exceeds the diagonal by the advantage.
    widest = max(alone.true_positive_rate(x) - x for x in np.linspace(0, 1, 10_001))
    assert alone.advantage == pytest.approx(widest, abs=1e-3)


@any_backend
@pytest.mark.parametrize(
    "counts", [(10, 11, 3), (10, 5, 6), (10, 0, 0), (10, 5, -1)], ids=str
)  # fmt: skip
def test_impossible_counts(counts):
    with pytest.raises(ValueError, match="`correct`|`guesses`"):
        audit.p_value(*counts, 1.0, 0.0)
    with pytest.raises(TypeError, match="`guesses`"):
        audit.epsilon_lower_bound(10, 2.5, 1, 0.0)
    with pytest.raises(ValueError, match="confidence"):
        audit.epsilon_lower_bound(10, 5, 5, 0.0, confidence=1.0)


# --- canaries -------------------------------------------------------------------------------


@any_backend
def test_insert_adds_the_canaries_whose_coin_fell_so(rng):
    one = audit.OneRun(np.arange(100.0)[:, None] + 1000, np.arange(100) % 3, seed=3)
    x, y = one.insert(rng.normal(size=(20, 1)), np.zeros(20, int))
    assert 30 < one.included.sum() < 70 and len(x) == len(y) == 20 + one.included.sum()
    assert (x[20:, 0] == np.flatnonzero(one.included) + 1000).all()
    assert (y[20:] == np.flatnonzero(one.included) % 3).all()
    x, y, weights = one.blank(rng.normal(size=(20, 1)), np.zeros(20, int))
    assert len(x) == 120 and (weights[:20] == 1).all() and (weights[20:] == one.included).all()


@any_backend
def test_coins_are_fresh_without_a_seed():
    coins = [audit.OneRun(np.zeros((200, 1)), np.zeros(200), seed=s).included for s in (1, 1, None)]
    assert (coins[0] == coins[1]).all() and (coins[0] != coins[2]).any()


@any_backend
def test_canaries_of_several_inputs():
    x = {"a": np.ones((4, 2)), "b": np.ones((4, 3))}
    one = audit.OneRun(x, np.zeros(4, int), seed=0)
    joined, _, _ = one.blank({"a": np.zeros((5, 2)), "b": np.zeros((5, 3))}, np.zeros(5, int))
    assert joined["a"].shape == (9, 2) and joined["b"].shape == (9, 3)


@any_backend
def test_what_is_no_canary(rng):
    with pytest.raises(ValueError, match="one row each"):
        audit.OneRun(np.zeros((3, 2)), np.zeros(4))
    with pytest.raises(ValueError, match="one row each"):
        audit.OneRun(np.zeros((0, 2)), np.zeros(0))
    with pytest.raises(TypeError, match="array of numbers"):
        audit.OneRun([["a"], ["b"]], np.zeros(2))
    one = audit.OneRun(np.zeros((10, 2)), np.zeros(10, int))
    with pytest.raises(ValueError, match="shape"):
        one.insert(np.zeros((3, 4)), np.zeros(3))
    for scores in (np.zeros(9), np.full(10, math.nan)):
        with pytest.raises(ValueError, match="10 canaries"):
            one.result(scores, delta=1e-5)
    with pytest.raises(ValueError, match="`delta`"):
        one.result(np.zeros(10))
    for guesses in ([], [3], [12], [0]):
        with pytest.raises(ValueError, match="`guesses`"):
            one.result(np.zeros(10), delta=1e-5, guesses=guesses)
    with pytest.raises(ValueError, match="`count`"):
        audit.orthogonal_canaries((2, 2), 2, count=9)


@any_backend
def test_orthogonal_canaries_are_distinct():
    x, y = audit.orthogonal_canaries((3, 2), classes=2, scale=7.0)
    assert x.shape == (12, 3, 2) and x.max() == 7.0
    assert len({(tuple(row.ravel()), label) for row, label in zip(x, y, strict=True)}) == 12


@any_backend
def test_a_result_is_printed_and_written():
    one = audit.OneRun(np.zeros((200, 1)), np.zeros(200), seed=0)
    result = one.result(one.included, audit.Claim(0.1, 1e-5))
    assert result.violated and "REFUTED" in str(result) and "claimed: ε = 0.1" in str(result)
    record = json.loads(json.dumps(result.to_dict()))
    assert record["violated"] is True and record["correct"] == record["guesses"]
    assert "claimed" not in str(one.result(one.included, delta=1e-5))


# --- real runs ------------------------------------------------------------------------------


def linear_network(entries, classes):
    return keras.Sequential(
        [
            keras.Input((entries,)),
            layers.BallProjection(1.0),
            layers.SpectralDense(classes, use_bias=False),
        ]
    )


def test_scores_are_inner_products_with_the_canaries_gradients():
    """Of a linear head: x ⊗ g against the movement of the kernel, summed over steps."""
    network = linear_network(6, 3)
    sampling, clip = lipdp.FullBatch(), 0.3
    model = private(
        network, sampling=sampling, clip=clip, seed=1, optimizer=keras.optimizers.SGD(9.0)
    )
    one = audit.OneRun(*audit.orthogonal_canaries((6,), 3), seed=0)
    x, y = one.insert(np.ones((5, 6)), np.zeros(5, int))
    kernels = [np.array(network.get_weights()[0])]
    watch = one.watch()
    for _ in range(2):  # a second fit goes on
        model.fit(x, y, verbose=0, callbacks=[watch])
        kernels.append(np.array(network.get_weights()[0]))
    expected = np.zeros(len(one))
    for before, after in itertools.pairwise(kernels):
        logits = one.x @ before
        g = np.exp(logits) / np.exp(logits).sum(1, keepdims=True) - np.eye(3)[one.y]
        g *= np.minimum(1, clip / np.linalg.norm(g, axis=1, keepdims=True))
        expected -= np.einsum("bi,ij,bj->b", one.x, after - before, g)
    np.testing.assert_allclose(watch.scores, expected, atol=1e-5)
    first, last = (-np.log(_softmax(one.x @ k)[np.arange(18), one.y]) for k in kernels[::2])
    np.testing.assert_allclose(watch.loss_scores, first - last, atol=1e-5)


def _softmax(logits):
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


@any_backend
def test_canaries_are_looked_at_in_pieces(monkeypatch):
    one = audit.OneRun(*audit.orthogonal_canaries((6,), 3), seed=0)
    scores = []
    for rows in (4096, 5):
        keras.utils.set_random_seed(0)
        monkeypatch.setattr(one_run, "_ROWS", rows)
        model, watch = private(dense_network(), seed=1), one.watch()
        model.fit(*one.insert(np.ones((50, 6)), np.zeros(50, int)), verbose=0, callbacks=[watch])
        scores.append(watch.scores)
    np.testing.assert_allclose(*scores, atol=1e-6)


def audited(entries, *, epsilon, sampling, epochs, seed=0):
    """A run of a linear head on ten canaries an entry and a few examples, and its audit.

    The canaries attain Δ: they are as long as the ball, and their loss gradients as the clip.
    """
    model = private(
        linear_network(entries, 10),
        budget=lipdp.Budget(epsilon, 1e-5),
        sampling=sampling,
        clip=0.5,
        optimizer=keras.optimizers.SGD(0.1),
        compile={"max_sample_weight": 1.0},
        seed=seed,
    )
    one = audit.OneRun(*audit.orthogonal_canaries((entries,), 10), seed=seed)
    random = np.random.default_rng(seed)
    x, y, weights = one.blank(random.normal(size=(100, entries)), random.integers(0, 10, 100))
    watch = one.watch()
    model.fit(x, y, sample_weight=weights, epochs=epochs, verbose=0, callbacks=[watch])
    return one.result(watch.scores, model), one.result(watch.loss_scores, model)


def test_an_honest_run_in_short():
    white, black = audited(40, epsilon=3.0, sampling=lipdp.FullBatch(), epochs=2)
    for result in (white, black):
        assert not result.violated and result.epsilon < result.claimed_epsilon <= 3.0


def stds_times(factor):
    def sabotage(patch):
        right = private_step.standard_deviations
        patch.setattr(
            private_step, "standard_deviations", lambda *a: [s * factor for s in right(*a)]
        )

    return sabotage


def rule_too_small_by_two(patch):
    right = linear_rules.linear

    def linear(layer, call, kernel_norm, multiplicity, note=""):
        return right(layer, call, kernel_norm, multiplicity / 4, note)

    patch.setattr(linear_rules, "linear", linear)


def every_example_in_every_batch(patch, sampling):
    patch.setattr(type(sampling), "rows", lambda self, draw: np.arange(draw.num_examples))


@any_backend
@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_honest_runs_are_not_refuted(seed):
    for sampling in (lipdp.FullBatch(), lipdp.PoissonSampling(500), lipdp.ShuffledEpochs(500)):
        epochs = 2 if isinstance(sampling, lipdp.FullBatch) else 1
        for result in audited(500, epsilon=1.0, sampling=sampling, epochs=epochs, seed=seed):
            assert not result.violated and result.epsilon < result.claimed_epsilon
            assert result.gaussian_epsilon < result.claimed_epsilon


@any_backend
@pytest.mark.slow
def test_no_noise_is_caught(monkeypatch):
    stds_times(0.0)(monkeypatch)
    for result in audited(500, epsilon=1.0, sampling=lipdp.FullBatch(), epochs=2):
        assert result.violated and result.epsilon > 4 * result.claimed_epsilon
    for result in audited(500, epsilon=1.0, sampling=lipdp.PoissonSampling(500), epochs=1):
        assert result.violated and result.epsilon > result.claimed_epsilon


@any_backend
@pytest.mark.slow
@pytest.mark.parametrize("sabotage", [stds_times(0.5), rule_too_small_by_two], ids=["std", "rule"])
def test_half_the_noise_is_caught(monkeypatch, sabotage):
    """The bound that knows nothing of Gaussians does not reach so far; the claim's own curve
    does.
    """
    sabotage(monkeypatch)
    for result in audited(1000, epsilon=2.0, sampling=lipdp.FullBatch(), epochs=2):
        assert result.violated and result.p_value < 0.02
        assert result.gaussian_epsilon > result.claimed_epsilon


@any_backend
@pytest.mark.slow
@pytest.mark.parametrize(
    "sampling", [lipdp.PoissonSampling(500), lipdp.ShuffledEpochs(500)], ids=["poisson", "shuffled"]
)
def test_examples_in_every_batch_are_caught(monkeypatch, sampling):
    every_example_in_every_batch(monkeypatch, sampling)
    for result in audited(500, epsilon=1.0, sampling=sampling, epochs=1):
        assert result.violated and result.epsilon > result.claimed_epsilon
