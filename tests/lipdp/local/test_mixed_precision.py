"""Layers that compute in fewer bits than float32: what is measured is what is summed."""

import keras
import numpy as np
import pytest
from keras import layers as K
from keras import ops

import lipdp
from lipdp import layers
from lipdp.local import products
from lipdp.local import unit as unit_module
from lipdp.local.calls import layer_units
from lipdp.training import steps
from tests.lipdp.helpers import EAGERLY, data, one_in, private, weights
from tests.lipdp.local import networks
from tests.lipdp.local.test_units import ROWS, Attacked, lengths_of

POLICIES = ["mixed_bfloat16", "mixed_float16"]
NAMES = [
    pytest.param(name, marks=() if name in networks.FAST else pytest.mark.slow)
    for name in networks.NAMES
]


def made(name, policy):
    return Attacked(name, policy)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("policy", one_in(2, POLICIES))
def test_no_row_exceeds_its_threshold_or_is_seen_by_another(name, policy):
    if not EAGERLY and (name, policy) == ("transformer", "mixed_float16"):
        pytest.skip("JAX has no such products on CPUs")
    network = made(name, policy)
    assert any("16" in v.compute_dtype for v in network.network._flatten_layers())
    check(network)


def check(network):
    """Thresholds that cut, ordinary rows and broken ones."""
    norms = np.array([lengths_of(network.added(row)) for row in range(ROWS)])
    thresholds = np.maximum(np.median(norms, axis=0) * 0.5, 1e-6)
    usual = network.added(1, thresholds)
    longest = np.max([network.check(thresholds, row) for row in range(ROWS)], axis=0)
    once = [sum(c.layer is u.layer for c in network.units.order) == 1 for u in network.units.units]
    some = np.median(norms, axis=0) > 1e-6
    assert (longest[once & some] > 0.99 * thresholds[once & some]).all()  # it is reached
    for broken in (np.nan, np.inf, 6e4, 1e-8):
        x, g = network.x.copy(), network.g.copy()
        if not network.tokens:
            x[0] = broken
        g[0] = broken
        network.check(thresholds, 0, x, g)
        for ours, theirs in zip(network.added(1, thresholds, x, g), usual, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("name", ["conv, products", "layer normalization, two axes"])
def test_mutant_that_measures_in_few_bits_is_caught(name, monkeypatch):
    # As far off as a number of bfloat16 may be.
    right = products.row_squares
    monkeypatch.setattr(products, "row_squares", lambda rows: right(rows) * (1 - 2.0**-8))
    with pytest.raises(AssertionError):
        check(made(name, "mixed_bfloat16"))


def network(policy):
    keras.config.set_dtype_policy(policy)
    try:
        return keras.Sequential(
            [
                keras.Input((6,)),
                K.Dense(16, activation="relu"),
                K.LayerNormalization(),
                K.Dense(3),
            ]
        )
    finally:
        keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize("policy", POLICIES)
def test_a_network_learns_in_every_precision(policy, tmp_path):
    x, _ = data(200)
    y = x[:, :3].argmax(axis=1)
    made = network(policy)
    model = private(
        made,
        optimizer=keras.optimizers.SGD(1.0),
        sampling=lipdp.PoissonSampling(100),
        clip=lipdp.PerLayerClip(initial=1.0),
        seed=1,
    )
    seen = model.fit(x, y, epochs=12, verbose=0, validation_data=(x, y)).history
    assert seen["val_accuracy"][-1] > 0.8
    assert all(v.dtype == "float32" for v in made.trainable_variables)
    assert all(np.isfinite(w).all() for w in weights(model))
    made.save(tmp_path / "network.keras")
    again = keras.models.load_model(tmp_path / "network.keras")
    assert again.layers[0].compute_dtype == made.layers[0].compute_dtype
    private(again, clip=lipdp.PerLayerClip()).fit(x[:32], y[:32], verbose=0)
    model.report(16, sample=(x[:2], y[:2]))


@pytest.mark.any_backend
def test_some_layers_may_be_in_float32():
    x, y = data()
    mixed = keras.Sequential(
        [
            keras.Input((6,)),
            K.Dense(4, dtype="mixed_bfloat16"),
            K.Dense(3, activation="softmax", dtype="float32"),
        ]
    )
    model = private(mixed, clip=lipdp.PerLayerClip())
    assert not lipdp.losses.takes_logits(model.private_loss)
    model.fit(x, y, verbose=0)
    assert np.isfinite(model.evaluate(x, y, verbose=0)).all()


@pytest.mark.any_backend
@pytest.mark.parametrize("policy", ["bfloat16", "float16", "float64"])
def test_weights_stay_in_float32(policy):
    made = keras.Sequential(
        [keras.Input((6,)), K.Dense(3, kernel_initializer="ones", dtype=policy)]
    )
    with pytest.raises(ValueError, match=r"updates weights in float32|computes in float64"):
        private(made, clip=lipdp.PerLayerClip())


def test_a_float32_layer_behind_one_of_few_bits_settles_what_it_reads(monkeypatch):
    """Keras casts up what it reads, and XLA might leave out the rounding for one reader only."""
    seen, right = [], unit_module.settled
    monkeypatch.setattr(unit_module, "settled", lambda t: seen.append(len(t)) or right(t))
    mixed = keras.Sequential(
        [
            keras.Input((6,)),
            K.Dense(4, dtype="mixed_bfloat16"),
            K.Dense(3, dtype="float32"),
        ]
    )
    found = layer_units(mixed)
    outputs, pull = steps.backend().pull_back_to_calls(mixed, ops.ones((2, 6)), found)
    ones = ops.ones((2,))
    found.clipped_sums(*pull(ops.ones_like(outputs)), ones, ones, ones)
    assert seen == [2, 2]  # of each layer what it read, and its cotangents


@pytest.mark.any_backend
def test_certified_bounds_are_for_float32():
    made = keras.Sequential(
        [
            keras.Input((6,)),
            layers.BallProjection(1.0),
            layers.SpectralDense(3, dtype="mixed_bfloat16"),
        ]
    )
    with pytest.raises(ValueError, match="computes in bfloat16"):
        private(made, clip=1.0)


@pytest.mark.skipif(not EAGERLY, reason="JAX has a barrier for its compiler")
def test_xla_on_tensorflow_is_refused_before_anything_is_spent():
    model = private(
        network("mixed_bfloat16"),
        clip=lipdp.PerLayerClip(),
        run_eagerly=False,
        compile={"jit_compile": True},
    )
    with pytest.raises(ValueError, match="`jit_compile` must be False"):
        model.fit(*data(), verbose=0)
    assert model.spent(1e-5).steps == 0


def test_rounding_that_is_left_out_is_left_out_for_all():
    """Norm and sum read numbers that went through few bits and back, in one compiled program."""
    from lipdp.autodiff import compiled, settled

    rows = np.random.default_rng(0).normal(size=(64, 300)).astype("float32")

    def both(x):
        short = ops.cast(ops.sin(x), "bfloat16")  # made in the program, so XLA may skip it
        (x,) = settled([ops.cast(short, "float32")])
        return ops.sum(ops.square(x), axis=1), ops.sum(x * x, axis=1), x

    squares, again, x = map(ops.convert_to_numpy, compiled(both)(ops.convert_to_tensor(rows)))
    np.testing.assert_allclose(squares, again, rtol=1e-6)
    np.testing.assert_allclose(squares, np.square(x.astype("float64")).sum(axis=1), rtol=1e-5)


@pytest.mark.any_backend
@pytest.mark.parametrize("policy", POLICIES)
def test_layers_of_ones_own_are_not_refused_for_rounding(policy):
    keras.config.set_dtype_policy(policy)
    try:
        wide = keras.Sequential([keras.Input((400,)), networks.Own(), K.Dense(400), K.Dense(3)])
    finally:
        keras.config.set_dtype_policy("float32")
    private(wide, clip=lipdp.PerLayerClip())
