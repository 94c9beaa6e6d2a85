"""Certificates of predictions: attacks never break them, and break wrong ones."""

import math

import keras
import numpy as np
import pytest
from keras import ops

import lipdp
from lipdp import layers, models
from lipdp.robustness import _certify, attack, certified_accuracy, certified_radii
from tests.lipdp.helpers import private

pytestmark = pytest.mark.any_backend

K = keras.layers


def right(network, x, y):
    return np.argmax(ops.convert_to_numpy(network(x)), axis=1) == y


def linear(kernel, front=()):
    kernel = np.array(kernel, dtype="float32")
    last = K.Dense(kernel.shape[1], use_bias=False)
    network = keras.Sequential([keras.Input((len(kernel),)), *front, last])
    last.kernel.assign(kernel)
    return network


def moved_to(network, x, radii):
    """Predictions where an attack within these radii leads, and how far it went."""
    before = np.argmax(ops.convert_to_numpy(network(x)), axis=1)
    worst = attack(network, x, before, radii)
    gone = np.linalg.norm((worst - x).reshape(len(x), -1).astype("float64"), axis=1)
    assert (gone <= radii * (1 + 1e-4) + 1e-6).all()
    return ~right(network, worst, before)


# --- exact where it can be ------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [math.sqrt(2.0), 2.0], ids=["without √2", "half of L"])
def test_the_certificate_of_a_linear_network_is_exact(rng, wrong):
    network = linear(np.eye(4))
    x = rng.normal(size=(30, 4)).astype("float32")
    y = x.argmax(axis=1)
    radii = certified_radii(network, x, y)
    assert not moved_to(network, x, radii).any()
    assert moved_to(network, x, 1.01 * radii + 1e-4).all()
    # A certificate that claims too much is caught.
    assert moved_to(network, x, wrong * radii + 1e-4).all()


def test_rows_of_the_last_layer_are_tighter_than_its_norm(rng):
    network = linear(np.array([[1.0, 0.9, 0.0], [0.0, 0.1, 1.0]]) * 3)
    x = rng.normal(size=(30, 2)).astype("float32")
    y = np.argmax(ops.convert_to_numpy(network(x)), axis=1)
    radii = certified_radii(network, x, y)
    assert moved_to(network, x, 1.01 * radii + 1e-4).all()
    norm = np.linalg.norm(ops.convert_to_numpy(network.layers[-1].kernel), 2)
    logits = np.sort(ops.convert_to_numpy(network(x)), axis=1)
    plain = (logits[:, -1] - logits[:, -2]) / (math.sqrt(2) * norm)
    assert (radii >= plain * (1 - 1e-3)).all() and (radii > 2 * plain).any()


def test_outside_of_the_ball_an_input_may_move_further(rng):
    angles = rng.uniform(0.55, 0.75, 20)  # the classes meet at 0.785
    x = 1000.0 * np.stack([np.cos(angles), np.sin(angles)], axis=1).astype("float32")
    front = [K.Rescaling(0.01), layers.BallProjection(0.5)]
    network = linear(np.eye(2), front)
    y = np.zeros(len(x), int)
    radii = certified_radii(network, x, y)
    truth = 1000.0 * np.sin(np.pi / 4 - angles)
    assert (radii <= truth).all() and (radii >= 0.99 * truth).all()
    assert not moved_to(network, x, radii).any()
    assert moved_to(network, x, 1.02 * radii).all()
    # What the projection's constant of 1 alone would certify is 20 times less.
    behind = linear(np.eye(2))
    assert (radii > 15 * 100 * certified_radii(behind, x / 2000.0, y)).all()
    # Inside of the ball nothing is gained.
    inside = certified_radii(network, x / 40.0, y)
    np.testing.assert_allclose(inside, 100 * certified_radii(behind, x / 4000.0, y), rtol=1e-3)


def test_centering_counts_as_a_projection(rng):
    network = keras.Sequential([keras.Input((6,)), layers.Centering(), layers.BallProjection(1.0)])
    network.add(layers.SpectralDense(3, use_bias=False))
    x = rng.uniform(5, 6, size=(20, 6)).astype("float32")
    y = np.argmax(ops.convert_to_numpy(network(x)), axis=1)
    shifted = certified_radii(network, x + 3.0, y)
    np.testing.assert_allclose(certified_radii(network, x, y), shifted, rtol=1e-3, atol=1e-4)


# --- on networks ----------------------------------------------------------------------------------


def conv():
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Centering(),
            layers.BallProjection(1.0),
            layers.SpectralConv2D(4, 3, strides=2, padding="same"),
            layers.GroupSort(),
            layers.L2NormPooling2D(2),
            K.Flatten(),
            K.Dense(16, activation="relu"),
            K.Dense(3),
        ]
    )


@pytest.mark.parametrize(
    "network",
    [
        lambda: models.mlp((8, 8, 1), 3, width=16, depth=3),
        conv,
        lambda: models.mixer((8, 8, 1), 3, patch_size=4, width=16, depth=1, radius=2.0),
    ],
    ids=["mlp", "conv", "mixer"],
)
def test_attacks_never_break_a_certificate(network, rng):
    y = rng.integers(3, size=192)
    x = rng.normal(size=(192, 8, 8, 1)).astype("float32")
    x[np.arange(192), y + 2, y + 2] += 6.0
    network = network()
    network.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    network.optimizer.learning_rate = 0.03
    network.fit(x, y, epochs=6, verbose=0)
    x, y = x[:64], y[:64]
    assert right(network, x, y).mean() > 0.7
    radii = certified_radii(network, x, y)
    assert ((radii > 0) <= right(network, x, y)).all()
    assert np.median(radii) > 0.05
    worst = attack(network, x, y, radii, restarts=4)
    assert right(network, worst, y)[radii > 0].all()
    # Attacked at one radius for all, no example that is certified there flips either.
    radius = float(np.median(radii))
    flipped = ~right(network, attack(network, x, y, radius), y)
    assert not (flipped & (radii > radius)).any()
    share = certified_accuracy(network, x, y, [0.0, radius])
    assert share[0] >= share[1] > 0 and share[1] <= 1 - flipped.mean()


def test_after_private_training(rng):
    y = rng.integers(2, size=200)
    x = (rng.normal(size=(200, 6)) + 3.0 * y[:, None]).astype("float32")
    model = private(
        keras.Sequential(
            [
                keras.Input((6,)),
                layers.Centering(),
                layers.BallProjection(1.0),
                layers.SpectralDense(8),
                layers.GroupSort(),
                K.Dropout(0.1),
                layers.ClipGradient(0.1),
                layers.SpectralDense(2),
            ]
        )
    )
    model.compile("sgd", "sparse_categorical_crossentropy", [lipdp.metrics.CertifiedAccuracy(0.1)])
    history = model.fit(x, y, epochs=1, verbose=0)
    assert 0 <= history.history["certified_accuracy"][0] <= 1
    radii = certified_radii(model.network, x, y)
    worst = attack(model.network, x, y, radii)
    assert right(model.network, worst, y)[radii > 0].all()


def test_what_only_training_does_changes_no_certificate(rng):
    x = rng.normal(size=(10, 4)).astype("float32")
    y = x.argmax(axis=1)
    plain = certified_radii(linear(np.eye(4)), x, y)
    clipped = certified_radii(linear(np.eye(4), [layers.ClipGradient(0.01)]), x, y)
    np.testing.assert_allclose(clipped, plain, rtol=1e-3)


def test_weights_outside_of_their_ball_are_measured(rng):
    layer = layers.SpectralDense(4, use_bias=False)
    network = keras.Sequential([keras.Input((4,)), layer, K.Dense(4, use_bias=False)])
    network.layers[-1].kernel.assign(np.eye(4))
    x = rng.normal(size=(10, 4)).astype("float32")
    layer.kernel.assign(np.eye(4))
    inside = certified_radii(network, x, x.argmax(axis=1))
    layer.kernel.assign(np.diag([3.0, 1, 1, 1]).astype("float32"))
    y = np.argmax(ops.convert_to_numpy(network(x)), axis=1)
    radii = certified_radii(network, x, y)
    assert not moved_to(network, x, radii).any()
    layer.kernel.assign(0.5 * np.eye(4))
    small = certified_radii(network, x, x.argmax(axis=1))
    np.testing.assert_allclose(small, inside, rtol=1e-2)


def test_a_kernel_that_is_not_the_matrix_is_not_read(rng):
    layer = layers.CayleyDense(4, use_bias=False)
    network = keras.Sequential([keras.Input((4,)), layers.BallProjection(100.0), layer])
    layer.kernel.assign(0.01 * layer.kernel)
    x = rng.normal(size=(10, 4)).astype("float32")
    y = np.argmax(ops.convert_to_numpy(network(x)), axis=1)
    radii = certified_radii(network, x, y)
    assert not moved_to(network, x, radii).any()
    assert moved_to(network, x, 1.05 * radii + 1e-3).all()


def test_the_allowance_covers_what_float32_loses(rng):
    def build():
        body = models.mlp((28, 28, 1), 10, width=128, depth=3)
        return keras.Sequential([keras.Input((28, 28, 1)), layers.Centering(), body])

    network = build()
    try:
        keras.config.set_dtype_policy("float64")
        exact = build()
    finally:
        keras.config.set_dtype_policy("float32")
    exact.set_weights(network.get_weights())
    x = rng.uniform(0, 255, size=(50, 28, 28, 1)).astype("float32")
    lost = np.abs(ops.convert_to_numpy(network(x)) - ops.convert_to_numpy(exact(x))).max()
    assert 0 < lost < 0.1 * _certify(network, 1e4).error < 1e-5


def test_a_network_that_ignores_its_input_certifies_no_one():
    network = linear(np.zeros((3, 2)), [layers.BallProjection(1.0)])
    assert (certified_radii(network, np.ones((2, 3)), np.array([0, 1])) == 0).all()


# --- what is refused ------------------------------------------------------------------------------


def test_layers_that_hide_their_slope_are_refused():
    x = keras.Input((4,))
    hidden = keras.Model(x, K.Dense(2)(ops.stop_gradient(x)))
    with pytest.raises(ValueError, match="hands no cotangent back"):
        certified_radii(hidden, np.ones((1, 4)), np.array([0]))
    tokens = models.text_classifier(10, 5, 2)
    with pytest.raises(ValueError, match="floating-point"):
        certified_radii(tokens, np.ones((1, 5)), np.array([0]))
    masked = keras.Sequential(
        [keras.Input((5, 4)), K.Masking(), layers.MaskedAveragePooling1D(), K.Dense(2)]
    )
    with pytest.raises(ValueError, match="mask"):
        certified_radii(masked, np.ones((1, 5, 4)), np.array([0]))
    unknown = keras.Sequential([keras.Input((4,)), K.BatchNormalization(), K.Dense(2)])
    with pytest.raises(lipdp.UnknownLayerError):
        certified_radii(unknown, np.ones((1, 4)), np.array([0]))


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.ones((2, 3)), [0], "`y` must be 2 integer labels"),
        (np.ones((2, 3)), [0, 2], "from 0 to 1"),
        (np.ones((2, 3)), [0.0, 1.0], "integer labels"),
        (np.full((1, 3), np.nan), [0], "finite"),
        (np.ones(3), [0], "`x` must be numbers"),
        (np.ones((0, 3)), [], "`x` must be numbers"),
    ],
)
def test_broken_data_are_refused(x, y, message):
    network = linear(np.ones((3, 2)))
    for call in (certified_radii, lambda *data: attack(*data, radius=1.0)):
        with pytest.raises(ValueError, match=message):
            call(network, x, np.array(y))


def test_broken_radii_and_networks_are_refused():
    network = linear(np.ones((3, 2)))
    x, y = np.ones((2, 3)), np.array([0, 1])
    for radius in (-1.0, math.nan, np.ones(3)):
        with pytest.raises(ValueError, match="`radius`"):
            attack(network, x, y, radius)
    with pytest.raises(ValueError, match="`radii`"):
        certified_accuracy(network, x, y, [-1.0])
    with pytest.raises(ValueError, match="must have logits"):
        certified_radii(linear(np.ones((3, 1))), x, y)
    with pytest.raises(ValueError, match="one input"):
        certified_radii("network", x, y)


# --- the metric -----------------------------------------------------------------------------------


def test_the_metric_agrees_with_the_certificate(rng):
    network = linear(np.eye(3))
    x = rng.normal(size=(40, 3)).astype("float32")
    y = rng.integers(3, size=40)
    metric = lipdp.metrics.CertifiedAccuracy(0.2)
    metric.update_state(y, network(x))
    assert float(metric.result()) == pytest.approx(certified_accuracy(network, x, y, [0.2])[0])
    again = lipdp.metrics.CertifiedAccuracy.from_config(metric.get_config())
    assert (again.radius, again.lipschitz, again.name) == (0.2, 1.0, "certified_accuracy")
    for arguments in ({"radius": -1.0}, {"radius": 1.0, "lipschitz": math.nan}):
        with pytest.raises(ValueError, match="must be a number"):
            lipdp.metrics.CertifiedAccuracy(**arguments)
