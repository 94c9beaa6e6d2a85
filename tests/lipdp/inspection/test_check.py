"""`lipdp.check` and `lipdp.repair`."""

import json

import keras
import numpy as np
import pytest

import lipdp
from lipdp import layers
from tests.lipdp.helpers import AddsLoss, Rounded, data, private

pytestmark = pytest.mark.any_backend

K = keras.layers


def plain():
    return keras.Sequential(
        [
            keras.Input((8, 8, 2)),
            K.Conv2D(4, 3, padding="same", use_bias=False),
            K.BatchNormalization(),
            K.ReLU(),
            K.MaxPooling2D(),
            K.GaussianDropout(0.2),
            K.Flatten(),
            K.Dense(8, activation="relu", activity_regularizer="l2"),
            K.Dense(3, activation="softmax"),
        ],
        name="plain",
    )


def functional():
    x = keras.Input((6,))
    shared = K.Dense(6)
    h = K.UnitNormalization()(shared(x))
    h = K.Average()([h, shared(h)])
    h = keras.Sequential([K.Dense(4), K.BatchNormalization()])(h)
    return keras.Model(x, K.Dense(3)(h + keras.ops.relu(h)))


def test_every_layer_is_listed_with_its_problem():
    found = lipdp.check(plain())
    assert not found.private
    assert [layer.kind for layer in found.layers] == [type(v).__name__ for v in plain().layers]
    wrong = {layer.kind: layer.problem for layer in found.layers if layer.problem}
    assert set(wrong) == {"BatchNormalization", "GaussianDropout", "Dense"}
    assert "Centering" in wrong["BatchNormalization"]
    for words in ("BatchNormalization", "Centering", "lipdp.repair"):
        assert words in str(found)


def test_what_is_loose_is_said():
    notes = {layer.kind: layer.note for layer in lipdp.check(plain()).layers}
    assert "9 outputs read an entry" in notes["Conv2D"] and "measured" in notes["Conv2D"]
    network = keras.Sequential(
        [keras.Input((4,)), layers.BallProjection(2.0), layers.SpectralDense(3, bias_norm=0.5)]
    )
    found = lipdp.check(network)
    assert found.private and "can be trained privately" in str(found)
    ball, dense = found.layers
    assert (ball.lipschitz, ball.output_bound) == (1.0, 2.0)
    assert (dense.lipschitz, dense.output_bound, dense.note) == (1.0, 2.5, "")


def test_an_unbounded_input_is_a_problem():
    network = keras.Sequential([keras.Input((4,)), layers.SpectralDense(3)])
    found = lipdp.check(network)
    assert not found.private and not any(layer.problem for layer in found.layers)
    assert "BallProjection" in found.problems[0]
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["private"] is False


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda a, b: keras.Model(a, [K.Dense(2)(a), K.Dense(2)(a)]), "2 outputs"),
        (lambda a, b: keras.Model(a, K.ReLU()(a)), "no trainable weights"),
    ],
)
def test_networks_of_another_shape(make, words):
    found = lipdp.check(make(keras.Input((3,)), keras.Input((3,))))
    assert not found.private and any(words in problem for problem in found.problems)


def test_what_has_no_graph_is_refused():
    with pytest.raises(TypeError, match="must be a keras.Sequential"):
        lipdp.check("model.keras")
    with pytest.raises(ValueError, match="not built"):
        lipdp.check(keras.Sequential([K.Dense(3)]))


@pytest.mark.parametrize("make", [plain, functional])
def test_the_check_agrees_with_the_private_model(make):
    """Private here, trained there; and what is not is refused there."""
    network = make()
    assert not lipdp.check(network).private
    with pytest.raises((ValueError, lipdp.UnknownLayerError)):
        private(network)
    repaired = lipdp.repair(network, verbose=False)
    assert lipdp.check(repaired).private
    x, y = data(shape=network.input_shape[1:])
    model = private(repaired)
    model.fit(x, y, epochs=1, verbose=0)
    assert all(np.isfinite(w).all() for w in repaired.get_weights())


@pytest.mark.parametrize(
    "make",
    [
        AddsLoss,
        lambda: K.ReLU(dtype="float64"),
        lambda: layers.FrobeniusDense(3, kernel_initializer="ones", dtype=Rounded("float32")),
    ],
    ids=["adds a loss", "float64", "weights of few bits"],
)
def test_what_the_private_model_refuses_is_no_surprise(make):
    network = keras.Sequential(
        [keras.Input((3,)), layers.BallProjection(1.0), make(), layers.SpectralDense(2)]
    )
    found = lipdp.check(network)
    with pytest.raises((ValueError, lipdp.UnknownLayerError)) as refused:
        private(network)
    problems = [*found.problems, *(layer.problem for layer in found.layers if layer.problem)]
    assert problems[0] == str(refused.value)


def test_repair_tells_what_it_changed(capsys):
    lipdp.repair(plain(), radius=3.0)
    said = capsys.readouterr().out
    for words in ("BallProjection(3)", "SpectralConv2D", "Centering", "Dropout", "SpectralDense"):
        assert words in said
    lipdp.repair(plain(), verbose=False)
    assert not capsys.readouterr().out


def test_repair_takes_weights_over_and_leaves_the_old_network():
    network = plain()
    before = network.get_weights()
    repaired = lipdp.repair(network, verbose=False)
    for now, value in zip(network.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, value)
    old = np.asarray(network.layers[0].kernel)
    new = np.asarray(repaired.layers[1].kernel)
    np.testing.assert_allclose(new / np.linalg.norm(new), old / np.linalg.norm(old), rtol=1e-4)
    assert not any(a is b for a in network.layers for b in repaired.layers)


def test_repair_keeps_sharing_and_nesting():
    repaired = lipdp.repair(functional(), verbose=False)
    kinds = [type(layer).__name__ for layer in repaired.layers]
    assert kinds.count("SpectralDense") == 2  # the shared one, and the head
    (nested,) = [layer for layer in repaired.layers if isinstance(layer, keras.Sequential)]
    assert [type(layer).__name__ for layer in nested.layers] == ["SpectralDense", "Centering"]


def test_a_private_network_is_only_copied(capsys):
    network = keras.Sequential(
        [keras.Input((4,)), layers.BallProjection(2.0), layers.SpectralDense(3)]
    )
    repaired = lipdp.repair(network)
    assert capsys.readouterr().out == ""
    x = np.ones((2, 4), "float32")
    np.testing.assert_allclose(repaired(x), network(x), rtol=1e-6)
    assert repaired.layers[0].radius == 2.0


def text():
    return keras.Sequential(
        [keras.Input((5,), dtype="int32"), K.Embedding(9, 4), K.LSTM(4), K.Dense(2)]
    )


def recurrent():
    x = keras.Input((5, 3))
    h = K.GRU(4, return_sequences=True)(x)
    h = K.Conv1D(4, 3, padding="causal")(h)
    return keras.Model(x, K.Dense(2)(K.Flatten()(K.MultiHeadAttention(2, 3)(h, h))))


def convolutional():
    return keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            K.SeparableConv2D(4, 3),
            K.DepthwiseConv2D(2),
            K.Conv2DTranspose(2, 2),
            K.Flatten(),
            K.Dense(2),
        ]
    )


@pytest.mark.parametrize(
    "make, kinds",
    [
        (text, "Embedding LipschitzRNN SpectralDense"),
        (
            recurrent,
            "BallProjection LipschitzRNN SpectralConv1D LipschitzAttention Flatten SpectralDense",
        ),
        (
            convolutional,
            "BallProjection SpectralSeparableConv2D SpectralDepthwiseConv2D "
            "SpectralConv2DTranspose Flatten SpectralDense",
        ),
    ],
)
def test_what_replaces_what(make, kinds):
    repaired = lipdp.repair(make(), verbose=False)
    found = [layer for layer in repaired.layers if not isinstance(layer, K.InputLayer)]
    assert [type(layer).__name__ for layer in found] == kinds.split()
    assert all(type(layer).__module__.startswith(("lipdp", "keras")) for layer in found)
    assert lipdp.check(repaired).private and repaired.output_shape == make().output_shape


def test_attention_to_another_sequence_is_not_repaired():
    a, b = keras.Input((5, 3)), keras.Input((5, 3))
    network = keras.Model([a, b], K.MultiHeadAttention(1, 3)(a, b))
    with pytest.raises(lipdp.UnknownLayerError, match="attends to another sequence"):
        lipdp.repair(network, verbose=False)


def test_repair_says_what_it_cannot_do():
    network = keras.Sequential([keras.Input((4,)), K.Lambda(lambda x: x), K.Dense(2)])
    with pytest.raises(lipdp.UnknownLayerError, match="Lambda"):
        lipdp.repair(network, verbose=False)
