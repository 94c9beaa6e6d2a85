"""Callbacks and interrupts as Keras users have them: what decides without noise is named, what is
saved is the network, and whatever ends a run leaves a model that can go on.
"""

import os
import warnings

import keras
import numpy as np
import pytest

from lipdp.data.batches import DrawnBatches
from lipdp.training.spending import Spending
from tests.lipdp.helpers import data, dense_network, private, weights

C = keras.callbacks


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "callback, warned",
    [
        (C.EarlyStopping("loss"), True),
        (C.ReduceLROnPlateau("accuracy"), True),
        (C.ModelCheckpoint("unused.keras", "loss", save_best_only=True), True),
        (C.EarlyStopping("val_loss"), False),
        (C.EarlyStopping("epsilon", baseline=1e9, mode="min"), False),
        (C.ModelCheckpoint("{folder}/unused.keras"), False),
        (C.TerminateOnNaN(), False),
    ],
)
def test_a_callback_that_acts_on_numbers_without_noise_is_named(callback, warned, tmp_path):
    if isinstance(callback, C.ModelCheckpoint):
        callback.filepath = str(tmp_path / "best.keras")
    model = private()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model.fit(*data(), verbose=0, callbacks=[callback], validation_data=data(seed=1))
    found = [str(w.message) for w in said if "has no noise" in str(w.message)]
    assert len(found) == warned and all(type(callback).__name__ in text for text in found)


def test_a_checkpoint_in_its_default_form_saves_the_network(tmp_path):
    model = private()
    model.fit(*data(), verbose=0, callbacks=[C.ModelCheckpoint(tmp_path / "last.keras")])
    loaded = keras.saving.load_model(tmp_path / "last.keras")
    assert type(loaded) is keras.Sequential
    for a, b in zip(loaded.get_weights(), weights(model), strict=True):
        np.testing.assert_array_equal(a, b)


class Interrupt(C.Callback):
    def on_train_batch_end(self, batch, logs=None):
        raise KeyboardInterrupt


def interrupted(monkeypatch, target, name, after):
    """Has a function of the run raise KeyboardInterrupt, before or after its work, once."""
    function = getattr(target, name)

    def once(*args, **kwargs):
        monkeypatch.setattr(target, name, function)
        result = function(*args, **kwargs) if after else None
        del result
        raise KeyboardInterrupt

    monkeypatch.setattr(target, name, once)


INSTANTS = {
    "the disk is waited for": (os, "fsync"),
    "the run begins": (Spending, "begin"),
    "a step is paid for": (Spending, "pay"),
    "a batch is drawn": (DrawnBatches, "request"),
    "the batches are closed": (DrawnBatches, "close"),
}


@pytest.mark.any_backend
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("instant", INSTANTS)
def test_an_interrupt_leaves_a_model_that_goes_on(instant, after, monkeypatch, tmp_path):
    model = private(ledger=tmp_path / "ledger")
    interrupted(monkeypatch, *INSTANTS[instant], after)
    with pytest.raises(BaseException, match="(?s)KeyboardInterrupt|^$") as kept:  # as notebooks do
        model.fit(*data(), verbose=0)
    before = model.spent(1e-5).steps
    model.fit(*data(), verbose=0)
    assert model.spent(1e-5).steps >= before + 4 and kept
    assert model.ledger.steps >= model.spent(1e-5).steps


def test_an_interrupted_fit_keeps_what_it_has_learnt(tmp_path):
    model = private(ledger=tmp_path / "ledger")
    start = weights(model)
    with pytest.raises(KeyboardInterrupt):
        model.fit(*data(), verbose=0, callbacks=[Interrupt()])
    assert any((a != b).any() for a, b in zip(weights(model), start, strict=True))
    model.fit(*data(), verbose=0)
    assert model.spent(1e-5).steps == 5


def test_a_loop_that_was_left_is_ended():
    model = private()
    left = model.batches(*data())
    model.train_on_batch(next(left))
    with pytest.raises(RuntimeError, match=r"call model\.end_run"):
        model.fit(*data(), verbose=0)
    model.end_run()
    model.fit(*data(), verbose=0)
    assert model.spent(1e-5).steps == 5
    other = model.batches(*data())
    next(other)
    left.close()  # ends its own run only
    assert model.spending.run is not None
    other.close()
    assert model.spending.run is None


@pytest.mark.any_backend
def test_an_optimizer_of_another_model_is_refused_before_anything_is_spent():
    optimizer = keras.optimizers.Adam()
    optimizer.build(dense_network().trainable_variables)
    with pytest.raises(ValueError, match="`optimizer` was built for other weights"):
        private(optimizer=optimizer)
