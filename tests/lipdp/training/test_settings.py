"""What a compiled step has baked in is compared before each step is paid for."""

import keras
import numpy as np
import pytest

import lipdp
from lipdp import layers
from lipdp.training.settings import changed_settings, settings_of
from tests.lipdp.helpers import data, private, weights


def model():
    network = keras.Sequential(
        [
            keras.Input((6,)),
            layers.BallProjection(1.0, name="ball"),
            layers.SpectralDense(6, name="dense"),
            layers.ChannelGain(2.0, name="gain"),
            keras.layers.Activation("relu", name="act"),
            layers.ClipGradient(1.0, name="cut"),
            layers.SpectralDense(3, name="head"),
        ]
    )
    return private(
        network,
        loss=lipdp.losses.SparseCategoricalCrossentropy(temperature=2.0),
        clip=0.5,
        noise_multiplier=0.5,
        sampling=lipdp.FullBatch(),
        allocation={v.path: 1.0 for v in network.trainable_variables},
    )


def set_of(name, attribute, value):
    return lambda m: setattr(m.network.get_layer(name), attribute, value)


def trainable(m):
    m.network.get_layer("dense").trainable = False


def another_constraint(m):
    m.network.get_layer("dense").kernel.constraint = None


def radius_of_a_constraint(m):
    m.network.get_layer("dense").kernel.constraint.radius = 5.0


def another_weight(m):
    new = keras.Variable(np.eye(6, dtype="float32"), name="kernel")
    object.__setattr__(m.network.get_layer("dense"), "_kernel", new)
    m.network.get_layer("dense")._trainable_variables[0] = new


def share_of_the_noise(m):
    m.allocation[m.network.trainable_variables[0].path] = 9.0


CHANGES = {
    "clip": lambda m: setattr(m, "clip", 2.0),
    "maximum of the weights": lambda m: setattr(m, "max_sample_weight", 3.0),
    "physical batch size": lambda m: setattr(m, "physical_batch_size", 8),
    "noise": lambda m: setattr(m, "noise", lipdp.noise.GaussianNoise()),
    "loss": lambda m: setattr(m.private_loss, "temperature", 30.0),
    "another loss": lambda m: setattr(m, "private_loss", lipdp.losses.get("mae")),
    "optimizer": lambda m: setattr(m, "optimizer", keras.optimizers.SGD(1.0)),
    "radius": set_of("ball", "radius", 50.0),
    "cut of the cotangent": set_of("cut", "clip_norm", 9.0),
    "activation": set_of("act", "activation", keras.activations.elu),
    "trainable": trainable,
    "another constraint": another_constraint,
    "radius of a constraint": radius_of_a_constraint,
    "another weight": another_weight,
    "share of the noise": share_of_the_noise,
}


@pytest.mark.any_backend
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_and_named(change):
    changed = model()
    before = settings_of(changed)
    assert changed_settings(before, settings_of(changed)) == []
    CHANGES[change](changed)
    assert changed_settings(before, settings_of(changed))
    with pytest.raises(RuntimeError, match="have changed since compile.*call compile"):
        changed.fit(*data(), verbose=0)
    assert changed.spent(1e-5).steps == 0 and changed.spending.run is None


class Change(keras.callbacks.Callback):
    """Changes a setting at the end of a step, or at the beginning of an epoch."""

    def __init__(self, change, at):
        super().__init__()
        self.change, self.at = change, at
        self.kept = None

    def _look(self, at):
        if at == self.at and self.kept is None and self.model.spending.run.paid > 0:
            self.change(self.model)
            if hasattr(self.model, "jax_state_sync"):
                self.model.jax_state_sync()
            self.kept = weights(self.model)

    def on_train_batch_end(self, batch, logs=None):
        self._look("step")

    def on_epoch_begin(self, epoch, logs=None):
        self._look("epoch")


@pytest.mark.parametrize("at", ["step", "epoch"])
@pytest.mark.parametrize("change", ["radius", "trainable"])
def test_a_change_within_fit_ends_it_before_the_step_is_paid_and_weights_are_kept(change, at):
    changed = model()
    callback = Change(CHANGES[change], at)
    with pytest.raises(RuntimeError, match="have changed since compile"):
        changed.fit(*data(), epochs=4, verbose=0, callbacks=[callback])
    assert changed.spent(1e-5).steps == 1
    for a, b in zip(weights(changed), callback.kept, strict=True):
        np.testing.assert_array_equal(a, b)
    # Compiled again, it goes on from what was spent, with the new setting in both halves.
    changed.allocation = "global"
    changed.compile(keras.optimizers.SGD(0.5), loss="sparse_categorical_crossentropy")
    changed.fit(*data(), epochs=2, verbose=0)
    assert changed.spent(1e-5).steps == 3
    assert any((a != b).any() for a, b in zip(weights(changed), callback.kept, strict=True))


def test_a_change_between_steps_of_a_loop_is_refused_and_weights_are_kept():
    changed = model()
    with pytest.raises(RuntimeError, match="`clip` of PrivateModel"):
        for batch in changed.batches(*data(), epochs=3):
            changed.train_on_batch(batch)
            kept = weights(changed)
            changed.clip = 9.0
    assert changed.spent(1e-5).steps == 1
    for a, b in zip(weights(changed), kept, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.any_backend
def test_a_model_that_trains_is_not_compiled_again():
    training = model()
    for _ in training.batches(*data()):
        with pytest.raises(RuntimeError, match="end the run before compile"):
            training.compile("sgd", loss="sparse_categorical_crossentropy")


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "method", ["train_step", "compute_loss", "fit", "make_train_function", "update_metrics"]
)
def test_subclasses_cannot_replace_parts_of_the_step(method):
    with pytest.raises(TypeError, match=f"Mine.{method} would replace"):
        type("Mine", (lipdp.PrivateModel,), {method: lambda self, *args: None})
    type("Mine", (lipdp.PrivateModel,), {"summary_line": lambda self: self.name})


class Inner:
    gain = 1.0


class Gain(keras.layers.Layer):
    """A layer of somebody's own, whose gain may stand anywhere."""

    of_the_class = 1.0

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner, self.several = Inner(), [Inner()]
        self.array, self.nothing = np.ones(1, np.float32), None
        self._number, self._float = 1, np.float64(1)

    def call(self, x):
        return x

    def bound(self, call):
        return lipdp.bounds.lipschitz(1.0)


PLACES = {
    "a private number": lambda gain: setattr(gain, "_number", 100),
    "a private float of NumPy": lambda gain: setattr(gain, "_float", np.float64(100)),
    "over one of the class": lambda gain: setattr(gain, "of_the_class", 100.0),
    "where None was": lambda gain: setattr(gain, "nothing", 100.0),
    "in an object": lambda gain: setattr(gain.inner, "gain", 100.0),
    "in an object of a list": lambda gain: setattr(gain.several[0], "gain", 100.0),
    "in an array": lambda gain: gain.array.fill(100.0),
}


@pytest.mark.any_backend
@pytest.mark.parametrize("place", PLACES)
def test_a_gain_is_seen_wherever_a_layer_keeps_it(place):
    network = keras.Sequential(
        [keras.Input((6,)), layers.BallProjection(1.0), layers.SpectralDense(3), Gain(name="gain")]
    )
    changed = private(network, sampling=lipdp.FullBatch())
    changed.fit(*data(), verbose=0)
    PLACES[place](network.get_layer("gain"))
    with pytest.raises(RuntimeError, match=r"layer \d+, 'gain' \("):
        changed.fit(*data(), verbose=0)
    assert changed.spent(1e-5).steps == 1


@pytest.mark.any_backend
def test_a_layer_that_is_added_and_a_number_of_steps_are_seen():
    changed = model()
    changed.network.add(keras.layers.Rescaling(100.0))
    with pytest.raises(RuntimeError, match="layers of the network"):
        changed.fit(*data(), verbose=0)
    changed = model()
    changed.steps_per_execution = 4
    with pytest.raises(RuntimeError, match="`steps_per_execution`"):
        changed.fit(*data(), verbose=0)


@pytest.mark.any_backend
def test_what_replaces_a_method_of_the_step_is_seen():
    class Mixed:
        def train_step(self, *args):
            return {}

    with pytest.raises(TypeError, match="train_step would replace"):
        type("Mine", (Mixed, lipdp.PrivateModel), {})
    changed = model()
    changed.train_step = lambda *args: {}
    with pytest.raises(RuntimeError, match="`train_step` of this model"):
        changed.fit(*data(), verbose=0)


@pytest.mark.any_backend
def test_the_network_may_be_compiled_and_used_by_itself():
    used = model()
    used.fit(*data(), verbose=0)
    used.network.compile(loss="mse", metrics=["mae"])
    used.network.predict(data()[0], verbose=0)
    used.fit(*data(), verbose=0)
    assert used.spent(1e-5).steps == 2


@pytest.mark.parametrize("half", ["read_batch", "update_weights"])
@pytest.mark.skipif(keras.backend.backend() != "jax", reason="TensorFlow updates in place")
def test_an_interrupt_of_a_half_that_is_compiled_keeps_the_weights(half, monkeypatch):
    from lipdp.training.steps import jax_step

    def interrupted(*args):
        raise KeyboardInterrupt

    kept = model()
    start = weights(kept)
    with monkeypatch.context() as patch:
        patch.setattr(jax_step, half, interrupted)
        with pytest.raises(KeyboardInterrupt):
            kept.fit(*data(), verbose=0)
    for a, b in zip(weights(kept), start, strict=True):
        np.testing.assert_array_equal(a, b)
    kept.train_function = None  # the one that was interrupted
    kept.fit(*data(), verbose=0)
    assert kept.spent(1e-5).steps == 2
