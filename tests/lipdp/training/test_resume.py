"""Runs that are interrupted, killed and resumed: nothing that was released is forgotten."""

import os
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest

import lipdp
from accountants import Ledger
from tests.lipdp.helpers import data, private, weights

pytestmark = pytest.mark.any_backend


class Interrupt(keras.callbacks.Callback):
    """Fails in the middle of an epoch, as a machine does."""

    def __init__(self, epoch, batch):
        super().__init__()
        self.at = epoch, batch

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if (self.epoch, batch) == self.at:
            raise KeyboardInterrupt


def test_backup_and_restore_goes_on_and_pays_for_what_ran(tmp_path):
    """The half epoch that was lost is run again, and paid for twice: it was released twice."""
    x, y = data()  # four steps an epoch
    ledger = tmp_path / "ledger"

    def fit(*callbacks):
        model = private(ledger=ledger)
        backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
        history = model.fit(x, y, epochs=5, callbacks=[backup, *callbacks], verbose=0)
        return model, history

    with pytest.raises(KeyboardInterrupt):
        fit(Interrupt(epoch=2, batch=1))
    assert Ledger(ledger).steps == 2 * 4 + 2
    model, history = fit()
    assert history.epoch == [2, 3, 4]
    assert Ledger(ledger).steps == model.spent(1e-5).steps == 10 + 3 * 4


def test_a_checkpoint_of_the_network_resumes_elsewhere(tmp_path):
    x, y = data()
    path = tmp_path / "best.weights.h5"
    model = private(ledger=tmp_path / "ledger", clip=lipdp.AdaptiveClip(0.5))
    checkpoint = keras.callbacks.ModelCheckpoint(path, save_weights_only=True)
    model.fit(x, y, epochs=2, callbacks=[checkpoint], verbose=0)

    other = private(ledger=tmp_path / "ledger", clip=lipdp.AdaptiveClip(0.5))
    other.load_weights(path)
    for a, b in zip(weights(model), weights(other), strict=True):
        np.testing.assert_array_equal(a, b)
    assert float(other.current_clip()) == float(model.current_clip())
    assert other.spent(1e-5) == model.spent(1e-5)
    other.fit(x, y, epochs=1, verbose=0)
    assert Ledger(tmp_path / "ledger").steps == 12


def test_an_old_checkpoint_does_not_unspend(tmp_path):
    x, y = data()
    model = private(ledger=tmp_path / "ledger")
    model.fit(x, y, epochs=1, verbose=0)
    model.save_weights(tmp_path / "early.weights.h5")
    model.fit(x, y, epochs=2, verbose=0)
    spent = model.spent(1e-5)
    model.load_weights(tmp_path / "early.weights.h5")
    assert model.spent(1e-5) == spent and spent.steps == 12


KILLED = textwrap.dedent(
    """
    import os, signal, sys, time
    import numpy as np, keras, lipdp
    from lipdp import layers

    ledger, released, seed, kills = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    random = np.random.default_rng(seed)
    x, y = np.ones((64, 4), "float32"), np.zeros(64, "int32")

    class Release(keras.callbacks.Callback):
        # Tells the parent that the weights of a step were there to be seen.
        def on_train_batch_end(self, batch, logs=None):
            os.write(self.file, b"x")

    for index in range(kills):
        child = os.fork()
        if child == 0:
            network = keras.Sequential(
                [keras.Input((4,)), layers.BallProjection(1.0), layers.SpectralDense(2)])
            model = lipdp.PrivateModel(network, noise_multiplier=1.0, ledger=ledger,
                                       sampling=lipdp.PoissonSampling(8))
            model.compile("sgd", loss="sparse_categorical_crossentropy", run_eagerly=True)
            release = Release()
            release.file = os.open(released, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            model.fit(x, y, epochs=10_000, verbose=0, callbacks=[release])
            os._exit(3)
        # From before the ledger is open to some tens of steps later. Most children are left to
        # make their first step, however long that takes.
        seen = os.path.getsize(released)
        while index % 4 and os.path.getsize(released) == seen:
            time.sleep(0.02)
        time.sleep(random.uniform(0.0, 1.0))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), status
    """
)


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="JAX does not survive a fork")
@pytest.mark.parametrize("seed", range(4))
def test_fifty_kills_of_a_training_process(seed, tmp_path):
    """Four times fifty; children of a process that only imported: each takes a second, not ten."""
    ledger, released = tmp_path / "ledger", tmp_path / "released"
    released.touch()
    subprocess.run(
        [sys.executable, "-c", KILLED, str(ledger), str(released), str(seed), "50"],
        check=True,
        timeout=3600,
        env={**os.environ, "KERAS_BACKEND": "tensorflow"},
    )
    seen = os.path.getsize(released)
    assert seen >= 37  # three of four trained before they died
    assert Ledger(ledger).steps >= seen
    assert private(ledger=ledger).spent(1e-5).steps == Ledger(ledger).steps
