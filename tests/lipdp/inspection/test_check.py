"""`lipdp.check` and `lipdp.repair`."""

import json

import keras
import numpy as np
import pytest

import lipdp
from lipdp import layers
from lipdp.inspection.check import check_trainable
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


def ended(*last):
    return keras.Sequential(
        [keras.Input((4,)), layers.BallProjection(1.0), K.Dense(3, use_bias=False), *last]
    )


def ended_in(operation):
    network = ended()
    return keras.Model(network.inputs, operation(network.outputs[0]))


ENDS = {
    "softmax": (
        lambda: ended(K.Dense(3, activation="softmax", name="p")),
        "leave out activation='softmax' of layer 'p', and use loss='sparse_categorical_crossentro",
    ),
    "softmax of lipdp": (
        lambda: ended(layers.SpectralDense(3, activation="softmax", name="p")),
        "leave out activation='softmax' of layer 'p'",
    ),
    "sigmoid": (
        lambda: ended(K.Dense(1, activation="sigmoid", name="p")),
        "leave out activation='sigmoid' of layer 'p', and use loss='binary_crossentropy'",
    ),
    "Activation": (
        lambda: ended(K.Activation("softmax", name="p")),
        "take layer 'p' (Activation) away, and use loss='sparse_categorical_crossentropy'",
    ),
    "Activation, sigmoid": (
        lambda: ended(K.Activation("sigmoid", name="p")),
        "take layer 'p' (Activation) away, and use loss='binary_crossentropy'",
    ),
    "Softmax": (lambda: ended(K.Softmax(name="p")), "take layer 'p' (Softmax) away"),
    "ops.softmax": (lambda: ended_in(keras.ops.softmax), "take keras.ops.softmax away"),
    "ops.sigmoid": (lambda: ended_in(keras.ops.sigmoid), "take keras.ops.sigmoid away"),
    "nested": (
        lambda: ended(keras.Sequential([keras.Input((3,)), K.Dense(3, "softmax", name="p")])),
        "leave out activation='softmax' of layer 'p'",
    ),
}


@pytest.mark.parametrize("name", ENDS)
def test_probabilities_at_the_end_are_refused_in_one_line(name):
    make, words = ENDS[name]
    network = make()
    layer = lipdp.check(network).layers[-1]
    assert words in layer.problem + layer.note
    loss = "binary_crossentropy" if "sigmoid" in name else "sparse_categorical_crossentropy"
    with pytest.raises(ValueError, match=r"^The network ends in a .*takes logits\.") as error:
        private(network, loss)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_each_output_is_told_apart():
    body = ended()
    x, h = body.inputs[0], body.outputs[0]
    outputs = [K.Dense(2, name="logits")(h), K.Dense(3, activation="softmax", name="p")(h)]
    found = {v.layer: v.problem for v in lipdp.check(keras.Model(x, outputs)).layers}
    assert "of layer 'p'" in found["p"] and not found["logits"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: K.RandomFlip(),
        lambda: K.RandomCrop(6, 6),
        lambda: K.RandomRotation(0.1),
        lambda: K.RandomTranslation(0.1, 0.1),
        lambda: K.RandomZoom(0.1),
        lambda: K.RandomContrast(0.1),
        lambda: K.RandomBrightness(0.1),
    ],
    ids=["flip", "crop", "rotation", "translation", "zoom", "contrast", "brightness"],
)
def test_augmentation_in_the_network_is_refused_with_its_argument(make):
    layer = make()
    network = keras.Sequential(
        [keras.Input((8, 8, 1)), layer, K.Flatten(), layers.SpectralDense(3)]
    )
    words = f"augmentation=lipdp.Augmentation(keras.layers.{type(layer).__name__}(...))"
    assert words in lipdp.check(network).layers[0].problem
    with pytest.raises(lipdp.UnknownLayerError) as error:
        private(network)
    assert words in str(error.value)
    lipdp.Augmentation(layer)  # takes what the message says


def test_an_unbounded_input_is_a_problem():
    network = keras.Sequential([keras.Input((4,)), layers.SpectralDense(3)])
    found = lipdp.check(network)
    assert not found.private and not any(layer.problem for layer in found.layers)
    assert "BallProjection" in found.problems[0]
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["private"] is False


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda a, b: keras.Model(a, [K.Dense(2)(a), K.Dense(2)(a)]), "Nothing bounds"),
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
    repaired = lipdp.repair(network, certified=True, verbose=False)
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
    lipdp.repair(plain(), certified=True, radius=3.0)
    said = capsys.readouterr().out
    for words in ("BallProjection(3)", "SpectralConv2D", "Centering", "Dropout", "SpectralDense"):
        assert words in said
    lipdp.repair(plain(), certified=True, verbose=False)
    assert not capsys.readouterr().out


def test_repair_takes_weights_over_and_leaves_the_old_network():
    network = plain()
    before = network.get_weights()
    repaired = lipdp.repair(network, certified=True, verbose=False)
    for now, value in zip(network.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, value)
    old = np.asarray(network.layers[0].kernel)
    new = np.asarray(repaired.layers[1].kernel)
    np.testing.assert_allclose(new / np.linalg.norm(new), old / np.linalg.norm(old), rtol=1e-4)
    assert not any(a is b for a in network.layers for b in repaired.layers)


def test_repair_keeps_sharing_and_nesting():
    repaired = lipdp.repair(functional(), certified=True, verbose=False)
    kinds = [type(layer).__name__ for layer in repaired.layers]
    assert kinds.count("SpectralDense") == 2  # the shared one, and the head
    (nested,) = [layer for layer in repaired.layers if isinstance(layer, keras.Sequential)]
    assert [type(layer).__name__ for layer in nested.layers] == ["SpectralDense", "Centering"]


def test_a_private_network_is_only_copied(capsys):
    network = keras.Sequential(
        [keras.Input((4,)), layers.BallProjection(2.0), layers.SpectralDense(3)]
    )
    repaired = lipdp.repair(network, certified=True)
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
    repaired = lipdp.repair(make(), certified=True, verbose=False)
    found = [layer for layer in repaired.layers if not isinstance(layer, K.InputLayer)]
    assert [type(layer).__name__ for layer in found] == kinds.split()
    assert all(type(layer).__module__.startswith(("lipdp", "keras")) for layer in found)
    assert lipdp.check(repaired).private and repaired.output_shape == make().output_shape


def test_attention_to_another_sequence_is_not_repaired():
    a, b = keras.Input((5, 3)), keras.Input((5, 3))
    network = keras.Model([a, b], K.MultiHeadAttention(1, 3)(a, b))
    with pytest.raises(lipdp.UnknownLayerError, match="attends to another sequence"):
        lipdp.repair(network, certified=True, verbose=False)


def test_repair_says_what_it_cannot_do():
    network = keras.Sequential([keras.Input((4,)), K.Lambda(lambda x: x), K.Dense(2)])
    with pytest.raises(lipdp.UnknownLayerError, match="Lambda"):
        lipdp.repair(network, certified=True, verbose=False)


# --- networks whose layers clip their own gradients -----------------------------------------------


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.first, self.second = K.Dense(4), K.Dense(2)

    def call(self, x):
        return self.second(self.first(x))


def subclassed():
    network = Subclassed()
    network(np.ones((1, 3)))
    return network


def clipped(network, loss="sparse_categorical_crossentropy"):
    model = lipdp.PrivateModel(
        network,
        noise_multiplier=1.0,
        sampling=lipdp.PoissonSampling(8),
        clip=lipdp.PerLayerClip(),
    )
    model.compile("sgd", loss)
    return model


@pytest.mark.parametrize("make", [text, recurrent, convolutional, subclassed])
def test_a_network_without_bounds_is_told_how_to_train_as_it_is(make):
    network = make()
    found = lipdp.check(network)
    assert found.per_layer and not found.private and found.per_layer_problem == ""
    line = "clip=lipdp.PerLayerClip()"
    assert f"can be trained as it is: PrivateModel(network, {line}" in " ".join(str(found).split())
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["per_layer"] is True
    with pytest.raises((TypeError, ValueError)) as refused:
        check_trainable(network)
    # The way out comes first, the reason after it.
    assert str(refused.value).startswith("To train") and line in str(refused.value)
    assert type(refused.value) in (TypeError, ValueError, lipdp.UnknownLayerError)
    assert private(network).clip == lipdp.PerLayerClip()  # the default, where nothing is said


def test_each_layer_says_how_its_norm_is_measured():
    found = lipdp.check(recurrent())
    said = {layer.kind: layer.clipped for layer in found.layers}
    assert said["Flatten"] == ""
    for kind in ("GRU", "Conv1D", "Dense", "MultiHeadAttention"):
        assert said[kind].startswith("exact, "), kind
    assert "cotangents" in said["GRU"] and "cotangents" in said["Dense"]
    assert [layer.clipped != "" for layer in lipdp.check(subclassed()).layers] == [True, True]


def mixing():
    return keras.Sequential(
        [
            keras.Input((8, 8, 2)),
            K.Conv2D(12, 3, use_bias=False),
            K.BatchNormalization(center=False),
            K.ReLU(),
            K.Conv2D(4, 3, trainable=False),
            K.BatchNormalization(trainable=False),
            K.Flatten(),
            K.Dense(5, activation="softmax", activity_regularizer="l2"),
            K.Dense(3, activation="softmax"),
        ]
    )


def test_a_network_that_mixes_examples_can_be_trained_in_no_way():
    network = mixing()
    found = lipdp.check(network)
    assert not found.per_layer and not found.private
    assert "regulariser" in found.per_layer_problem  # the first of them
    assert found.per_layer_problem in " ".join(str(found).split()) and "lipdp.repair" in str(found)
    with pytest.raises(lipdp.UnknownLayerError, match="BatchNormalization") as refused:
        check_trainable(network)
    with pytest.raises(lipdp.UnknownLayerError, match="regulariser"):
        private(network)
    assert "PerLayerClip" not in str(refused.value)


def test_repair_changes_only_what_cannot_be_clipped(capsys):
    network = mixing()
    for weight in network.weights:
        weight.assign(weight + 0.1)
    repaired = lipdp.repair(network)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3
    assert "becomes GroupNormalization" in said[0] and "mixes" in said[0]
    assert "activity regulariser" in said[1] and "softmax" in said[2]
    kinds = [type(layer).__name__ for layer in repaired.layers]
    expected = [type(layer).__name__ for layer in network.layers]
    expected[1] = "GroupNormalization"
    assert kinds == expected
    assert repaired.layers[1].groups == 3 and not repaired.layers[1].center
    assert repaired.layers[-2].activation is keras.activations.softmax
    # All weights but the moving statistics, and what is frozen stays so.
    for old, new in zip(network.layers, repaired.layers, strict=True):
        for v in new.weights:
            (same,) = [w for w in old.weights if w.name == v.name]
            np.testing.assert_array_equal(v, same)
            assert v.trainable == same.trainable
    assert lipdp.check(repaired).per_layer
    x, y = data(shape=(8, 8, 2))
    clipped(repaired).fit(x, y, epochs=1, verbose=0)


def test_repair_keeps_what_a_network_computes():
    """Frozen batch normalisation stays; so do the weights of composite layers."""
    x = keras.Input((6, 4))
    shared = K.MultiHeadAttention(2, 3)
    h = shared(x, x)
    h = K.BatchNormalization(trainable=False)(h)
    h = keras.Sequential([K.Dense(4), K.BatchNormalization(trainable=False)])(shared(h, h))
    network = keras.Model(x, K.Dense(2)(K.Flatten()(h)))
    for seed, weight in enumerate(network.weights):
        weight.assign(keras.random.uniform(weight.shape, 0.5, 1.0, seed=seed))
    network.layers[-1].bias.trainable = False
    repaired = lipdp.repair(network, verbose=False)
    rows = np.random.default_rng(0).normal(size=(3, 6, 4)).astype("float32")
    np.testing.assert_allclose(repaired(rows), network(rows), rtol=1e-4, atol=1e-4)
    assert len(repaired.trainable_variables) == len(network.trainable_variables)
    assert not any(a is b for a in network.weights for b in repaired.weights)


def test_repair_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="certified=True"):
        lipdp.repair(text(), radius=1.0)
    with pytest.raises(TypeError, match="functional"):
        lipdp.repair(subclassed())
    with pytest.raises(lipdp.UnknownLayerError, match="Lambda"):
        lipdp.repair(
            keras.Sequential([keras.Input((4,)), K.Lambda(lambda x: x), K.Dense(2)]), verbose=False
        )


@pytest.mark.parametrize("channels, groups", [(3, 1), (4, 1), (12, 3), (64, 16), (512, 32)])
def test_groups_have_four_channels_or_more(channels, groups):
    network = keras.Sequential(
        [keras.Input((2, channels)), K.BatchNormalization(), K.Flatten(), K.Dense(2)]
    )
    assert lipdp.repair(network, verbose=False).layers[0].groups == groups


def behind_a_frozen_backbone():
    backbone = keras.Sequential(
        [
            keras.Input((8, 8, 2)),
            K.DepthwiseConv2D(3, use_bias=False),
            K.BatchNormalization(),
            K.ReLU(6.0),
            K.GlobalAveragePooling2D(),
        ]
    )
    backbone.trainable = False
    x = keras.Input((8, 8, 2))
    features = layers.BallProjection(1.0)(backbone(x, training=False))
    return keras.Model(x, layers.SpectralDense(3)(features))


def test_a_head_behind_a_frozen_backbone_trains_in_both_ways():
    x, y = data(shape=(8, 8, 2))
    for make in (private, clipped):
        network = behind_a_frozen_backbone()
        found = lipdp.check(network)
        assert found.private and found.per_layer
        before = network.layers[1].get_weights()
        make(network).fit(x, y, epochs=1, verbose=0)
        for old, new in zip(before, network.layers[1].get_weights(), strict=True):
            np.testing.assert_array_equal(old, new)


@pytest.mark.parametrize("make", [private, clipped])
def test_a_backbone_that_thaws_is_noticed(make):
    """Also where no trainable weight tells of it."""
    x, y = data(shape=(8, 8, 2))
    network = behind_a_frozen_backbone()
    normaliser = network.layers[1].layers[1]
    normaliser.gamma.trainable = normaliser.beta.trainable = False
    model = make(network)
    model.fit(x, y, epochs=1, verbose=0)
    trained = model.network.trainable_variables
    normaliser._trainable = True
    assert [v.path for v in model.network.trainable_variables] == [v.path for v in trained]
    with pytest.raises((RuntimeError, ValueError), match="trainable|mixes"):
        model.fit(x, y, epochs=1, verbose=0)
