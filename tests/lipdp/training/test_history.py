"""What trained a network is remembered with it."""

import gc
import warnings
import weakref

import keras
import numpy as np
import pytest

import accountants
import lipdp
from lipdp import layers
from tests.lipdp.helpers import data, dense_network, private

pytestmark = pytest.mark.any_backend

TRAINED_BEFORE = "trained privately before"


def trained(network, epochs=2, **kwargs):
    model = private(network, sampling=lipdp.FullBatch(), noise_multiplier=4.0, **kwargs)
    model.fit(*data(), epochs=epochs, verbose=0)
    return model


def quietly(make, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return make(*args, **kwargs)


def test_a_cell_that_runs_twice_goes_on_from_what_was_spent():
    network = dense_network()
    first = quietly(trained, network)
    with pytest.warns(UserWarning, match=f"{TRAINED_BEFORE}, in 2 steps.*clone_model"):
        second = trained(network, epochs=3)
    one_after_the_other = accountants.epsilon(runs=first.spending.runs, delta=1e-5)
    assert second.spent(1e-5).steps == 5
    assert second.spent(1e-5).epsilon == pytest.approx(float(one_after_the_other))
    # Also for the model that was there before: the weights went through both.
    assert first.spent(1e-5) == second.spent(1e-5)
    assert sum(run.steps for run in second.report().runs) == 5


def test_the_budget_holds_over_all_models_of_a_network():
    network = dense_network()
    first = trained(network)
    spent = first.spent(1e-5).epsilon
    budget = lipdp.Budget(2.0 * spent, 1e-5)
    with pytest.warns(UserWarning, match=TRAINED_BEFORE):
        second = private(network, sampling=lipdp.FullBatch(), noise_multiplier=4.0, budget=budget)
    with pytest.warns(UserWarning, match="budget allows"):
        second.fit(*data(), epochs=50, verbose=0)
    assert spent < second.spent().epsilon <= budget.epsilon
    with pytest.warns(UserWarning, match=TRAINED_BEFORE):
        third = private(network, sampling=lipdp.FullBatch(), noise_multiplier=4.0, budget=budget)
    with pytest.raises(lipdp.BudgetExceeded):
        third.fit(*data(), verbose=0)


def test_networks_that_share_trained_layers_share_their_history():
    network = dense_network()
    trained(network)
    longer = keras.Sequential(
        [keras.Input((6,)), *network.layers, keras.layers.ReLU(), layers.SpectralDense(3)]
    )
    inner = keras.Sequential([keras.Input((6,)), network, layers.SpectralDense(3)])
    features = keras.Model(network.inputs, network.layers[-2].output)
    features = keras.Sequential([keras.Input((6,)), features, layers.SpectralDense(3)])
    for other in (longer, inner, features):
        with pytest.warns(UserWarning, match=TRAINED_BEFORE):
            model = private(other)
        assert model.spent(1e-5).steps == 2


def test_a_frozen_part_was_not_trained():
    base = dense_network()
    base.trainable = False
    head = layers.SpectralDense(3)
    trained(keras.Sequential([base, head]))
    base.trainable = True
    assert quietly(private, base).spent(1e-5).steps == 0
    with pytest.warns(UserWarning, match=TRAINED_BEFORE):
        private(keras.Sequential([keras.Input((3,)), layers.BallProjection(1.0), head]))


@pytest.mark.parametrize("anew", [keras.models.clone_model, lambda network: dense_network()])
def test_a_network_that_is_built_anew_has_no_history(anew):
    network = dense_network()
    trained(network)
    assert quietly(private, anew(network)).spent(1e-5).steps == 0


def test_a_model_that_has_not_trained_leaves_no_history():
    network = dense_network()
    private(network)
    with pytest.raises(ValueError):
        private(network).fit(data()[0], None, verbose=0)
    for _batch in private(network).batches(*data()):
        break
    assert quietly(private, network).spent(1e-5).steps == 0


def test_runs_of_a_ledger_count_once(tmp_path):
    network = dense_network()
    ledger = tmp_path / "one.ledger"
    trained(network, ledger=ledger)
    again = quietly(trained, network, ledger=ledger)
    assert again.spent(1e-5).steps == 4 == accountants.Ledger(ledger).steps
    with pytest.warns(UserWarning, match="in 4 steps"):
        without = private(network)
    assert without.spent(1e-5).steps == 4
    with pytest.warns(UserWarning, match="in 4 steps"):
        other = trained(network, ledger=tmp_path / "another.ledger")
    assert other.spent(1e-5).steps == 6
    assert accountants.Ledger(tmp_path / "another.ledger").steps == 2


def test_a_ledger_that_is_gone_forgets_nothing_of_a_network(tmp_path):
    network = dense_network()
    ledger = tmp_path / "one.ledger"
    trained(network, ledger=ledger)
    ledger.unlink()
    with pytest.warns(UserWarning, match="in 2 steps"):
        assert private(network, ledger=ledger).spent(1e-5).steps == 2


def test_a_ledger_and_a_network_have_each_their_own_runs(tmp_path):
    ledger = tmp_path / "data.ledger"
    trained(dense_network(), ledger=ledger)
    network = dense_network()
    trained(network, epochs=3)
    with pytest.warns(UserWarning, match="in 3 steps"):
        model = trained(network, ledger=ledger)
    assert model.spent(1e-5).steps == 2 + 3 + 2


def test_a_run_that_another_one_overtakes_takes_no_further_step():
    network = dense_network()
    first, second = (
        private(network, sampling=lipdp.FullBatch(), noise_multiplier=4.0) for _ in range(2)
    )
    loop = first.batches(*data(), epochs=3)
    first.train_on_batch(next(loop))
    second.fit(*data(), epochs=2, verbose=0)
    assert second.spent(1e-5).steps == 3
    network.set_weights([100 * w for w in network.get_weights()])  # not even projected
    before = [np.array(w) for w in network.get_weights()]
    with pytest.raises(RuntimeError, match="Another run has begun to train this network"):
        first.train_on_batch(next(loop))
    assert all((a == b).all() for a, b in zip(before, network.get_weights(), strict=True))
    loop.close()
    assert first.spent(1e-5).steps == 3
    first.fit(*data(), verbose=0)
    assert first.spent(1e-5).steps == second.spent(1e-5).steps == 4


def test_a_history_keeps_no_network_alive():
    network = dense_network()
    trained(network)
    layer = weakref.ref(network.layers[1])
    del network
    keras.backend.clear_session()
    gc.collect()
    assert layer() is None
