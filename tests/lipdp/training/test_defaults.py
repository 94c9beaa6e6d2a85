"""What is chosen where nothing is said: by what is public alone, once, and as it is written."""

import dataclasses
import warnings

import keras
import numpy as np
import pytest

import lipdp
from lipdp.training import defaults
from lipdp.training.clipping import split_noise
from lipdp.training.defaults import choose_batches
from tests.lipdp.helpers import EAGERLY, data, dense_network, weights

BUDGET = lipdp.Budget(20.0, 1e-4)
LOSS = "sparse_categorical_crossentropy"


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """Runs of 8 steps: two epochs of 64 examples, in batches of 16."""
    monkeypatch.setattr(defaults, "_STEPS", 8)


def plain_network():
    return keras.Sequential([keras.Input((6,)), keras.layers.Dense(3)])


def undecided(network=None, optimizer=None, run_eagerly=EAGERLY, **kwargs):
    """A model of which nothing is said but its budget, or a noise multiplier, which is faster."""
    if "budget" not in kwargs:
        kwargs.setdefault("noise_multiplier", 1.0)
    model = lipdp.PrivateModel(network or plain_network(), **kwargs)
    model.compile(optimizer, loss=LOSS, run_eagerly=run_eagerly)
    return model


@pytest.mark.any_backend
@pytest.mark.parametrize("examples", [1, 5, 64, 1_437, 60_000, 10**7])
@pytest.mark.parametrize("epochs", [None, 0, 1, 40])
def test_batches_are_a_quarter_of_the_examples_at_most(monkeypatch, examples, epochs):
    monkeypatch.setattr(defaults, "_STEPS", 500)
    sampling, chosen = choose_batches(examples, epochs)
    sampling.validate(examples)
    assert 1 <= sampling.batch_size <= max(1, examples / 4)
    if epochs is not None:
        assert chosen == epochs
    else:
        assert 450 <= chosen * sampling.steps_per_epoch(examples) <= 560


def test_a_run_of_which_nothing_is_said_is_planned_spent_and_told():
    model = undecided(budget=BUDGET)
    assert model.plan is None
    with pytest.raises(RuntimeError, match="first fit"):
        model.report()
    x, y = data()
    model.fit(x, y, verbose=0)
    ahead = lipdp.plan(plain_network(), num_examples=64, budget=BUDGET)
    assert model.plan == ahead and model.sampling == lipdp.PoissonSampling(16)
    assert model.spent().steps == ahead.steps == 8
    assert 0.99 * BUDGET.epsilon < model.spent().epsilon <= BUDGET.epsilon
    rates = [float(model.optimizer._learning_rate(step)) for step in range(9)]
    cosine = 0.5 * (1 + np.cos(np.pi * np.arange(9) / 8))
    np.testing.assert_allclose(rates, ahead.learning_rate * cosine, rtol=1e-4, atol=1e-6)
    for part in ("per layer", "PoissonSampling(batch_size=16)", "learning rate", "signal"):
        assert part in str(model.plan)
    assert "batch size 16" in str(model.report())


@pytest.mark.any_backend
@pytest.mark.parametrize("network", [plain_network, dense_network])
def test_nothing_that_is_chosen_depends_on_the_data(network):
    plans = []
    warnings.simplefilter("ignore", UserWarning)  # rows that repeat
    for x, y in (data(), (np.full((64, 6), 1e4, "float32"), np.zeros(64, int))):
        keras.utils.set_random_seed(0)
        model = undecided(network())
        model.fit(x, y, epochs=1, verbose=0)
        plans.append((model.plan, str(model.plan), model.sampling, model.noise_multiplier))
    assert plans[0] == plans[1]


@pytest.mark.any_backend
def test_the_learning_rate_is_what_its_docstring_says():
    found = lipdp.plan(plain_network(), num_examples=64, budget=BUDGET)
    # One layer of 6·3 + 3 weights, in units of its threshold, which is followed.
    sigma, _ = split_noise(found.noise_multiplier, 16, None)
    assert found.noise_norm == pytest.approx(sigma * 21**0.5 / 16, rel=1e-5)
    assert found.learning_rate == pytest.approx(3.0 / (found.noise_norm * 8**0.5))
    assert found.signal == pytest.approx(8**0.5 / found.noise_norm)
    silent = dataclasses.replace(found, noise_norm=0.0)
    assert silent.learning_rate > 0


def test_a_further_fit_decays_anew_over_as_many_epochs(monkeypatch):
    monkeypatch.setattr(defaults, "_MOMENTUM", 0.0)  # so that nothing moves at a rate of zero
    model = undecided(noise_multiplier=0.01, run_eagerly=False)
    x, y = data()
    model.fit(x, y, verbose=0)
    first = weights(model)
    assert float(model.optimizer.learning_rate) == pytest.approx(0.0, abs=1e-6)
    model.fit(x, y, verbose=0)
    assert model.spent(1e-4).steps == 16
    assert max(np.abs(a - b).max() for a, b in zip(first, weights(model), strict=True)) > 1e-3


@pytest.mark.any_backend
def test_a_fit_that_fails_leaves_the_choice_open():
    model = undecided()
    with pytest.raises(ValueError):
        model.fit(*data(examples=4000)[:1], np.zeros(3999, int), verbose=0)
    x, y = data(examples=4000)
    with pytest.raises(ValueError):
        model.fit(x, y + 100, verbose=0)  # labels beyond the classes: once the batches are chosen
    assert model.sampling is None and model.chosen_epochs is None
    model.fit(*data(), verbose=0)
    assert model.sampling == lipdp.PoissonSampling(16) and model.spent(1e-4).steps == 8


@pytest.mark.any_backend
def test_an_interrupted_run_goes_on_with_its_own_epochs_as_far_as_the_budget_goes():
    class Stop(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == 3:
                raise KeyboardInterrupt

    model = undecided(budget=BUDGET)
    with pytest.raises(KeyboardInterrupt):
        model.fit(*data(), verbose=0, callbacks=[Stop()])
    with pytest.warns(UserWarning, match="allows 5 of the 8"):
        model.fit(*data(), verbose=0)
    assert model.plan.steps == 5 and model.spent().steps == 8
    assert model.spent().epsilon <= BUDGET.epsilon
    with pytest.raises(lipdp.BudgetExceeded):
        model.fit(*data(), verbose=0)


@pytest.mark.any_backend
def test_no_epochs_are_none():
    model = undecided()
    model.fit(*data(), epochs=2, initial_epoch=2, verbose=0)
    assert model.spent(1e-4).steps == 0


@pytest.mark.any_backend
@pytest.mark.parametrize("arguments", [{}, {"batch_size": 8}])
def test_a_setting_that_has_changed_is_refused_before_anything_is_chosen(arguments):
    model = undecided()
    model.clip = lipdp.PerLayerClip(threshold=1e-3)
    with pytest.raises(RuntimeError, match="clip"):
        model.fit(*data(), epochs=1, verbose=0, **arguments)
    assert model.sampling is None


@pytest.mark.any_backend
def test_what_is_said_is_done():
    x, y = data()
    model = undecided(optimizer=keras.optimizers.SGD(0.25))
    model.fit(x, y, batch_size=8, verbose=0)
    assert model.sampling == lipdp.PoissonSampling(8) and model.spent(1e-4).steps == 8  # one epoch
    assert float(model.optimizer.learning_rate) == 0.25 and model.plan is None
    model = undecided(optimizer=keras.optimizers.SGD(0.25))
    model.fit(x, y, epochs=1, verbose=0)
    assert model.plan.learning_rate is None and "as given" in str(model.plan)
    asked = lipdp.plan(
        plain_network(), num_examples=64, budget=BUDGET, sampling=lipdp.FullBatch(), epochs=3
    )
    assert (asked.sampling, asked.steps) == (lipdp.FullBatch(), 3)
    with pytest.raises(ValueError, match="batch_size"):
        lipdp.plan(
            plain_network(), num_examples=9, budget=BUDGET, sampling=lipdp.PoissonSampling(16)
        )


@pytest.mark.any_backend
def test_certified_bounds_are_kept_and_explicit_calls_stay_as_they_were():
    model = undecided(dense_network())
    assert model.units is None and model.clip == defaults.CERTIFIED_CLIP
    assert model.private_loss.temperature == 20.0
    model = undecided(dense_network(), sampling=lipdp.PoissonSampling(16))
    assert model.units is None and model.clip is None and model.private_loss.temperature == 1.0
    model = undecided(dense_network(), clip=lipdp.PerLayerClip())
    assert model.units is not None and model.private_loss.temperature == 1.0
    assert undecided(sampling=lipdp.PoissonSampling(16)).clip == lipdp.PerLayerClip()


@pytest.mark.any_backend
def test_a_hopeless_run_says_so_and_what_would_help():
    def wide():
        return keras.Sequential(
            [keras.Input((6,)), keras.layers.Dense(2000), keras.layers.Dense(3)]
        )

    budget = lipdp.Budget(0.5, 1e-4)
    found = lipdp.plan(wide(), num_examples=64, budget=budget)
    assert found.hopeless in str(found) and "linear model" in found.hopeless
    with pytest.warns(UserWarning, match="cannot teach 20,003 weights"):
        undecided(wide(), budget=budget).fit(*data(), epochs=1, verbose=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert undecided().fit(*data(), epochs=1, verbose=0)
