"""Correlated noise: its strategies, its stream on the device, the steps that hold it private."""

import itertools

import keras
import numpy as np
import pytest
from scipy import linalg

import accountants
import lipdp
from lipdp.data.batches import DrawnBatches
from lipdp.data.sources import Arrays
from lipdp.noise.correlated import mean_error
from lipdp.randomness import RandomSource
from tests.lipdp import helpers
from tests.lipdp.helpers import data, dense_network, private

N = 40
CYCLIC = lipdp.CyclicPoisson(4, bands=5)
FIXED = lipdp.FixedEpochs(9, epochs=4)  # five steps an epoch, the last of which is smaller
KINDS = [
    pytest.param(lipdp.BandedNoise(), CYCLIC, id="banded"),
    pytest.param(lipdp.BandedNoise(3), CYCLIC, id="fewer bands"),
    pytest.param(lipdp.ToeplitzNoise(3), FIXED, id="toeplitz"),
]
BANDED = [KINDS[0], *(pytest.param(*k.values, id=k.id, marks=pytest.mark.slow) for k in KINDS[1:])]
TOEPLITZ = [pytest.param(*KINDS[0].values, id="banded", marks=pytest.mark.slow), KINDS[2]]


def dense(column):
    return linalg.toeplitz(column, np.zeros(len(column)))


# --- strategies -----------------------------------------------------------------------------------


@pytest.mark.any_backend
@pytest.mark.parametrize("steps", [1, 3, 40, 333])
@pytest.mark.parametrize("bands", [1, 2, 5, 16])
def test_banded_columns_have_unit_norm_and_few_entries(bands, steps):
    column = lipdp.BandedNoise(bands).coefficients(lipdp.CyclicPoisson(1, bands), 1000, steps)
    assert column.shape == (steps,)
    assert (column >= 0).all() and (column[bands:] == 0).all()
    assert 1 - 1e-5 < np.linalg.norm(column) <= 1


@pytest.mark.any_backend
def test_the_error_is_that_of_the_dense_matrices():
    column = lipdp.BandedNoise(4).coefficients(lipdp.CyclicPoisson(1, 4), 1000, 30)
    sums = np.tril(np.ones((30, 30))) @ np.linalg.inv(dense(column))
    assert mean_error(column) == pytest.approx(np.sum(sums**2) / 30)


@pytest.mark.any_backend
def test_more_bands_and_more_buffers_are_better_than_independent_noise():
    steps, independent = 200, (200 + 1) / 2
    errors = [
        mean_error(lipdp.BandedNoise(b).coefficients(lipdp.CyclicPoisson(1, b), 1000, steps))
        for b in (1, 2, 4, 16, 64)
    ]
    assert errors[0] == pytest.approx(independent, rel=1e-4)
    assert sorted(errors, reverse=True) == errors
    assert independent / errors[-1] > 10
    # The best of all lower triangular matrices cannot be far below: an eighth is beaten by none.
    assert errors[-1] > 1.0
    scheme = lipdp.FixedEpochs(10, epochs=10)  # 20 steps an epoch
    errors = [
        mean_error(lipdp.ToeplitzNoise(d).coefficients(scheme, 200, steps)) for d in (1, 2, 4)
    ]
    assert errors[0] * (1 + 1e-6) >= errors[1] >= errors[2] * (1 - 1e-3)
    assert 10 * independent / errors[-1] > 4  # of ten participations


@pytest.mark.any_backend
def test_the_banded_optimum_is_a_stationary_point_that_beats_its_neighbours():
    column = lipdp.BandedNoise(4).coefficients(lipdp.CyclicPoisson(1, 4), 1000, 50)
    best = mean_error(column)
    generator = np.random.default_rng(0)
    for _ in range(100):
        other = column.copy()
        other[:4] += generator.normal(0, 0.03, 4)
        assert mean_error(other / np.linalg.norm(other)) > best * (1 - 1e-6)


@pytest.mark.any_backend
def test_no_participation_that_the_schemes_allow_moves_a_run_by_more_than_one():
    """Attack: all patterns of steps, and directions found by ascent."""
    generator = np.random.default_rng(0)

    def worst(matrix, pattern):
        product = matrix[:, pattern].T @ matrix[:, pattern]
        most = product.sum()  # all contributions in one direction
        for _ in range(3):
            u = generator.normal(size=(len(pattern), 3))
            for _ in range(30):
                u = product @ u
                u /= np.linalg.norm(u, axis=1, keepdims=True)
            most = max(most, np.sum(product * (u @ u.T)))
        return np.sqrt(most)

    scheme, steps, length = lipdp.FixedEpochs(3, epochs=3), 12, 4
    toeplitz = dense(lipdp.ToeplitzNoise(2).coefficients(scheme, 12, steps))
    attained = [
        worst(toeplitz, list(pattern))
        for first in range(length)
        for size in (1, 2, 3)
        for pattern in itertools.combinations(range(first, steps, length), size)
    ]
    assert 0.9999 < max(attained) <= 1
    # Steps that the scheme does not allow would be too near to each other.
    assert worst(toeplitz, [0, 1, 2]) > 1

    banded = dense(lipdp.BandedNoise(3).coefficients(lipdp.CyclicPoisson(1, 3), 100, steps))
    for first in range(3):
        turns = range(first, steps, 3)
        product = banded.T @ banded
        assert max(np.sqrt(product[t, t]) for t in turns) <= 1
        for s, t in itertools.combinations(turns, 2):
            # Turns enter different rows: they compose as releases of their own.
            assert not (banded[:, s] * banded[:, t]).any()
    assert (banded[:, 0] * banded[:, 2]).any()


@pytest.mark.any_backend
def test_the_amplification_bounds_what_the_best_attacker_sees():
    """Monte Carlo of the likelihood ratio itself, over groups and coins; one direction suffices."""
    scheme, sigma, steps = lipdp.CyclicPoisson(4, bands=2), 0.8, 4
    generator = np.random.default_rng(0)

    def estimated(separation, target):
        column = lipdp.BandedNoise(2).coefficients(lipdp.CyclicPoisson(4, bands=2), 20, steps)
        probability = scheme.sampling_probability(20)
        moves, chances = [], []
        for group in range(separation):
            turns = range(group, steps, separation)
            for coins in itertools.product((0, 1), repeat=len(turns)):
                x = np.zeros(steps)
                x[list(turns)] = coins
                moves.append(dense(column) @ x)
                drawn = sum(coins)
                odds = probability**drawn * (1 - probability) ** (len(turns) - drawn)
                chances.append(odds / separation)
        moves, chances = np.array(moves), np.array(chances)
        chosen = generator.choice(len(chances), 200_000, p=chances)
        y = moves[chosen] + sigma * generator.normal(size=(len(chosen), steps))
        exponents = (y @ moves.T - (moves**2).sum(axis=1) / 2) / sigma**2
        loss = np.log(np.exp(exponents) @ chances)
        gains = np.maximum(0.0, 1 - np.exp(target - loss))
        return gains.mean(), gains.std() / np.sqrt(len(gains))

    run = {"noise_multiplier": sigma, "num_examples": 20, "sampling": scheme, "steps": steps}
    for target in (0.5, 1.5):
        claimed = accountants.delta(epsilon=target, **run)
        found, error = estimated(2, target)
        assert 0.5 * claimed < found < claimed + 4 * error
        # Turns in neighbouring steps, of the same expected number a step, would leak more.
        found, error = estimated(1, target)
        assert found > claimed + 4 * error


# --- what a run adds ------------------------------------------------------------------------------


def quiet(sampling, noise, **kwargs):
    """A model whose gradients are zero, so that its weights are sums of its noise alone."""
    network = keras.Sequential(
        [
            keras.Input((6,)),
            lipdp.layers.BallProjection(1.0),
            keras.layers.Dense(20, use_bias=False),
            keras.layers.Dense(12, use_bias=False),
        ]
    )
    network.set_weights([w * 0 + 0.1 for w in network.get_weights()])
    # A bound that does not move with the weights: the clip comes before the last layer only.
    network.layers[1].trainable = False
    return private(
        network,
        loss=lambda y, p: 0.0 * keras.ops.sum(p, axis=-1),
        optimizer=keras.optimizers.SGD(1.0),
        sampling=sampling,
        noise=noise,
        clip=1.0,
        **kwargs,
    )


class Weights(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.seen = []

    def on_train_begin(self, logs=None):
        self.seen.append(np.concatenate([np.ravel(w) for w in self.model.network.get_weights()]))

    def on_train_batch_end(self, batch, logs=None):
        self.on_train_begin()


def noise_of(model, epochs):
    """What each step added, over the std of what is fresh in it: `(steps, entries)`."""
    x, y = data(N)
    weights = Weights()
    model.fit(x, y, epochs=epochs, callbacks=[weights], verbose=0)
    moves = -np.diff(np.array(weights.seen, "float64"), axis=0)
    moves = moves[:, np.abs(moves).max(axis=0) > 0]
    bound = lipdp.gradient_bounds(model.network, 1.0)
    (std,) = [bound[v.path] for v in model.network.trainable_variables]
    mechanism = model.step.constants
    return moves * mechanism.expected_batch_size / (std * mechanism.noise_multiplier)


@pytest.mark.parametrize(("kind", "sampling"), BANDED)
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_stream_is_the_dense_solve_of_what_a_step_draws(kind, sampling, compiled):
    """The same keys draw the same z, whatever the noise: C times one is the other."""
    kwargs = {"noise_multiplier": 2.0, "seed": 3}
    if compiled:
        kwargs |= {"run_eagerly": False, "compile": {"steps_per_execution": 5}}
    epochs = 2
    model = quiet(sampling, kind, **kwargs)
    # With several steps together only the last weights of five are seen.
    found = noise_of(model, epochs)
    same_keys = lipdp.PoissonSampling(4 if sampling is CYCLIC else 9)
    fresh = noise_of(quiet(same_keys, "gaussian", **kwargs), epochs)
    steps = epochs * sampling.steps_per_epoch(N)
    solved = linalg.solve(
        dense(kind.coefficients(sampling, N, steps)),
        np.eye(steps),
    )
    if compiled:
        seen = np.arange(4, steps, 5)
        sums = np.tril(np.ones((steps, steps)))[seen]
        # What is not seen is not known; sums of z are, where z was seen alone.
        fresh = noise_of(quiet(same_keys, "gaussian", **(kwargs | {"compile": None})), epochs)
        expected = np.diff(sums @ solved @ fresh, axis=0, prepend=0.0)
    else:
        expected = solved @ fresh
    np.testing.assert_allclose(found, expected, atol=2e-4)


@pytest.mark.any_backend
@pytest.mark.parametrize(("kind", "sampling"), [KINDS[0], KINDS[2]])
def test_the_covariance_of_the_noise_is_that_of_the_inverse(kind, sampling):
    """C w is white, of the variance that was calibrated; w itself is not."""
    moves = noise_of(quiet(sampling, kind, seed=1), epochs=2)
    entries = moves.shape[1]
    white = dense(kind.coefficients(sampling, N, len(moves))) @ moves
    covariance = white @ white.T / entries
    assert np.abs(covariance - np.eye(len(white))).max() < 7 / np.sqrt(entries / 2)
    assert abs(np.mean(np.diag(covariance)) - 1) < 5 / np.sqrt(white.size / 2)
    raw = moves @ moves.T / entries
    assert np.mean(np.diag(raw, 1)) < -0.1 * np.mean(np.diag(raw))


@pytest.mark.parametrize(("kind", "sampling"), TOEPLITZ)
def test_every_run_begins_with_no_memory(kind, sampling):
    """Otherwise the noise of a run could be subtracted by who knows that of the one before."""
    model = quiet(sampling, kind, seed=5, noise_multiplier=2.0)
    steps = 2 * sampling.steps_per_epoch(N)
    matrix = dense(kind.coefficients(sampling, N, steps))
    first, second = (matrix @ noise_of(model, 2) for _ in range(2))
    for white in (first, second):
        assert abs(white.std() - 1) < 5 / np.sqrt(2 * white.size)
    assert abs(np.sum(first * second)) < 5 * np.sqrt(first.size)
    assert [run.steps for run in model.spending.runs] == [steps, steps]
    assert accountants.TrainingRun(2.0, sampling, N, steps).participations * 2 == sum(
        run.participations for run in model.spending.runs
    )


@pytest.mark.parametrize(("kind", "sampling"), TOEPLITZ)
def test_a_restored_run_repeats_no_noise_and_saves_none(kind, sampling, tmp_path):
    class Interrupt(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if self.model.spending.run.paid == 2 * self.model.spending.run.per_epoch + 2:
                raise KeyboardInterrupt

    x, y = data(N)
    ledger = tmp_path / "ledger"
    model = quiet(sampling, kind, ledger=ledger)
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    with pytest.raises(KeyboardInterrupt):
        model.fit(x, y, epochs=4, callbacks=[backup, Interrupt()], verbose=0)
    model.save_weights(tmp_path / "all.weights.h5")
    memory = [np.array(v) for v in model.noise.variables]
    assert all(np.abs(m).max() > 0 for m in memory)
    assert all(w.shape != m.shape for w in model.get_weights() for m in memory)

    other = quiet(sampling, kind, ledger=ledger)
    other.load_weights(tmp_path / "all.weights.h5")
    other.noise.plan(sampling, N, 4)
    other.noise.begin(other.network.trainable_variables)
    other.load_weights(tmp_path / "all.weights.h5")
    assert all(np.abs(np.array(v)).max() == 0 for v in other.noise.variables)

    began = []

    class Begin(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            began.append((epoch, [np.abs(np.array(v)).max() for v in self.model.noise.variables]))

    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    other.fit(x, y, epochs=4, callbacks=[backup, Begin()], verbose=0)
    assert [epoch for epoch, _ in began] == [2, 3]
    assert max(began[0][1]) == 0 and min(began[1][1]) > 0
    per_epoch = sampling.steps_per_epoch(N)
    runs = accountants.Ledger(ledger).runs
    assert [run.steps for run in runs] == [2 * per_epoch + 2, 2 * per_epoch]
    assert [run.sampling for run in runs] == [sampling] * 2
    assert other.spent(1e-3).epsilon == accountants.epsilon(runs=runs, delta=1e-3)


# --- the loader -----------------------------------------------------------------------------------


def drawn(sampling, epochs, seed=0):
    x = np.arange(N)[:, None]
    steps = sampling.steps_per_epoch(N)
    batches = DrawnBatches(Arrays(x, x[:, 0]), sampling, RandomSource(seed), (0, 0), steps)
    found = []
    for _ in range(epochs):
        batches.on_epoch_begin()
        for index in range(steps):
            batch = batches.draw(index)
            found.append(batch.targets[batch.mask == 1])
    return found


def turns(batches):
    """The steps in which each example takes part."""
    return [[t for t, rows in enumerate(batches) if i in rows] for i in range(N)]


@pytest.mark.any_backend
@pytest.mark.parametrize("bands", [3, 4, 7])  # ten steps an epoch: phases run on over its end
def test_turns_of_an_example_are_whole_rounds_apart(bands):
    scheme = lipdp.CyclicPoisson(4, bands=bands)
    found = turns(drawn(scheme, epochs=60))
    assert sum(map(len, found)) / (600 * 4) == pytest.approx(1, abs=0.1)
    for steps in found:
        assert len(steps) > 5 and len({t % bands for t in steps}) == 1
        assert len(steps) <= scheme.participations(N, 600)
    groups = [steps[0] % bands for steps in found]
    assert set(groups) == set(range(bands))
    again = [steps[0] % bands for steps in turns(drawn(scheme, epochs=60, seed=1))]
    assert groups != again
    # Groups are fair draws of their own, not a cut of the examples into equal parts.
    sizes = {tuple(np.bincount(groups, minlength=bands)) for groups in (groups, again)}
    assert len(sizes) == 2


@pytest.mark.any_backend
def test_the_coins_of_a_turn_are_independent_and_fair():
    scheme = lipdp.CyclicPoisson(4, bands=5)
    found = turns(drawn(scheme, epochs=400))
    rounds = 4000 // 5
    coins = np.zeros((N, rounds))
    for i, steps in enumerate(found):
        coins[i, np.array(steps) // 5] = 1
    assert np.abs(coins.mean(axis=1) - 0.5).max() < 5 * 0.5 / np.sqrt(rounds)
    correlation = np.corrcoef(coins) - np.eye(N)
    assert np.abs(correlation).max() < 5.5 / np.sqrt(rounds)
    assert abs(np.mean(coins[:, 1:] * coins[:, :-1]) - 0.25) < 5 / np.sqrt(coins.size)


@pytest.mark.any_backend
def test_one_order_for_the_whole_run():
    scheme = lipdp.FixedEpochs(9, epochs=30)
    found = turns(drawn(scheme, epochs=30))
    for steps in found:
        assert len(steps) == 30 and set(np.diff(steps)) == {5}
    assert found != turns(drawn(scheme, epochs=30, seed=1))
    assert [steps[0] for steps in found] != sorted(steps[0] for steps in found)


@pytest.mark.any_backend
@pytest.mark.parametrize(("kind", "sampling"), [KINDS[0], KINDS[2]])
@pytest.mark.parametrize("together", [1, 5])
def test_what_fit_trains_on_keeps_the_separation(kind, sampling, together, monkeypatch):
    """Prefetching loops and several steps together included."""
    taken = {}
    request = DrawnBatches.request

    def noted(self, index):
        batch = request(self, index)
        # Keras may look at batches, or begin an epoch, before the run begins.
        place = self.epoch, index
        if place[0]:
            taken[place] = batch.targets[batch.mask == 1]
        return batch

    monkeypatch.setattr(DrawnBatches, "request", noted)
    model = private(
        loss="mean_absolute_error",
        sampling=sampling,
        noise=kind,
        run_eagerly=None if together > 1 else helpers.EAGERLY,
        compile={"steps_per_execution": together, "metrics": []},
        network=dense_network(inputs=1, classes=1),
    )
    x = np.arange(N, dtype="float32")
    model.fit(x[:, None], x[:, None], epochs=4, verbose=0)
    assert len(taken) == 4 * sampling.steps_per_epoch(N) == model.spent(1e-3).steps
    for i in range(N):
        steps = [t for t, place in enumerate(sorted(taken)) if i in taken[place]]
        assert len({t % 5 for t in steps}) <= 1
        assert len(steps) == 4 or sampling is CYCLIC


@pytest.mark.any_backend
@pytest.mark.parametrize("sampling", [CYCLIC, FIXED, lipdp.ShuffledEpochs(8)], ids=repr)
def test_a_batch_that_is_left_out_ends_the_run(sampling):
    """Leaving out steps would bring those of one example nearer than the scheme says."""
    x, y = data(N)
    noise = {CYCLIC: lipdp.BandedNoise(), FIXED: lipdp.ToeplitzNoise()}.get(sampling, "gaussian")
    model = private(sampling=sampling, noise=noise)
    batches = model.batches(x, y, epochs=2)
    model.train_on_batch(next(batches))
    next(batches)
    with pytest.raises(RuntimeError, match="trained on, in order: 2 were drawn"):
        next(batches)
    assert model.spent(1e-3).steps == 1

    # A loop of Keras that cuts epochs short goes on with the batches that were left over.
    keras.config.set_max_steps_per_epoch(3)
    try:
        with pytest.raises(RuntimeError, match="The run has to end here"):
            model.fit(x, y, epochs=3, verbose=0)
    finally:
        keras.config.set_max_steps_per_epoch(None)
    assert model.spent(1e-3).steps == 1 + 3
    model.fit(x, y, epochs=1, verbose=0)  # a run of its own


@pytest.mark.any_backend
def test_poisson_batches_may_be_left_out():
    x, y = data(N)
    model = private(sampling=lipdp.PoissonSampling(8))
    for number, batch in enumerate(model.batches(x, y, epochs=2)):
        if number % 2:
            model.train_on_batch(batch)
    assert model.spent(1e-3).steps == 5


# --- accounting, and what is refused --------------------------------------------------------------


@pytest.mark.any_backend
@pytest.mark.parametrize(("kind", "sampling"), KINDS)
def test_a_budget_is_calibrated_and_kept(kind, sampling):
    x, y = data(N)
    model = private(sampling=sampling, noise=kind, budget=lipdp.Budget(3.0, 1e-3))
    model.fit(x, y, epochs=4, verbose=0)
    spent = model.spent()
    assert 2.9 < spent.epsilon <= 3.0 and spent.steps == 4 * sampling.steps_per_epoch(N)
    with pytest.raises(lipdp.BudgetExceeded):
        model.fit(x, y, epochs=1, verbose=0)


@pytest.mark.parametrize(("kind", "sampling"), BANDED)
def test_pieces_weights_and_views_work_as_ever(kind, sampling):
    x, y = data(N)
    model = private(
        sampling=sampling,
        noise=kind,
        physical_batch_size=4,
        allocation="least",
        augmentation=lipdp.Augmentation([keras.layers.GaussianNoise(0.1)], views=2),
        compile={"max_sample_weight": 2.0},
    )
    model.fit(x, y, epochs=2, sample_weight=np.full(N, 0.5), verbose=0)
    assert all(np.isfinite(w).all() for w in model.network.get_weights())
    assert model.report().to_dict()["noise_multiplier"] == 1.0
    assert model.spent(1e-3).steps == 2 * sampling.steps_per_epoch(N)


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("noise", "sampling", "error", "message"),
    [
        (lipdp.BandedNoise(8), lipdp.PoissonSampling(8), ValueError, r"CyclicPoisson\(batch"),
        (lipdp.BandedNoise(), FIXED, ValueError, r"CyclicPoisson\(batch"),
        (lipdp.BandedNoise(6), CYCLIC, ValueError, "at least as many bands"),
        (lipdp.ToeplitzNoise(), CYCLIC, ValueError, r"FixedEpochs\(batch"),
        (lipdp.ToeplitzNoise(), lipdp.ShuffledEpochs(8), ValueError, r"FixedEpochs\(batch"),
        ("gaussian", FIXED, ValueError, r"noise=lipdp.ToeplitzNoise\(\)"),
        ("pink", CYCLIC, ValueError, "`noise` must be"),
        (None, CYCLIC, ValueError, "`noise` must be"),
        (0.5, CYCLIC, ValueError, "`noise` must be"),
    ],
)
def test_noise_that_the_scheme_does_not_carry_is_refused(noise, sampling, error, message):
    with pytest.raises(error, match=message):
        private(noise=noise, sampling=sampling)


@pytest.mark.any_backend
@pytest.mark.parametrize("kind", [lipdp.BandedNoise, lipdp.ToeplitzNoise])
@pytest.mark.parametrize("value", [0, -1, 2.0, True, "3", float("nan")])
def test_bad_numbers_of_bands_and_buffers(kind, value):
    with pytest.raises(ValueError, match="must be a positive integer"):
        kind(value)


def test_other_refusals():
    x, y = data(N)
    for noise, sampling in [(lipdp.BandedNoise(), CYCLIC), (lipdp.ToeplitzNoise(), FIXED)]:
        with pytest.raises(ValueError, match="AdaptiveClip"):
            private(noise=noise, sampling=sampling, clip=lipdp.AdaptiveClip(0.5))
    model = private(noise=lipdp.ToeplitzNoise(), sampling=FIXED)
    with pytest.raises(ValueError, match="25 were asked for. Give the scheme more epochs"):
        model.fit(x, y, epochs=5, verbose=0)
    with pytest.raises(ValueError, match="`steps_per_epoch` is fixed"):
        model.fit(x, y, epochs=2, steps_per_epoch=3, verbose=0)
    assert model.spent(1e-3).steps == 0
    with pytest.raises(ValueError, match=r"batch_size \* bands"):
        private(noise=lipdp.BandedNoise(), sampling=lipdp.CyclicPoisson(9, bands=5)).fit(x, y)


@pytest.mark.any_backend
def test_independent_noise_is_sound_with_groups():
    x, y = data(N)
    model = private(sampling=CYCLIC, clip=lipdp.AdaptiveClip(0.5))
    model.fit(x, y, epochs=2, verbose=0)
    claimed = accountants.epsilon(
        noise_multiplier=1.0, sampling=CYCLIC, num_examples=N, steps=20, delta=1e-3
    )
    assert model.spent(1e-3).epsilon == claimed
