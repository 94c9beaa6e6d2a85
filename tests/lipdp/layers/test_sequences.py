"""Layers for sequences: what they compute, masks, broken tokens; private training on text."""

import keras
import numpy as np
import pytest
from keras import ops

import lipdp
from lipdp import layers
from lipdp.audit import attack_bounds
from lipdp.autodiff import gradient, vjp
from lipdp.bounds import UnknownLayerError, gradient_bounds, network_bounds
from lipdp.training import steps
from tests.lipdp.helpers import EAGERLY, one_in, private, weights

K = keras.layers
TOKENS = 12


def tokens(length=6, dtype="int32"):
    return keras.Input((length,), dtype=dtype)


def sequential(*stack, **kwargs):
    return keras.Sequential([tokens(**kwargs), *stack])


def bag(mask_zero=True):
    return sequential(layers.EmbeddingBag(TOKENS, 4, mask_zero=mask_zero), layers.SpectralDense(2))


def masked_mean():
    return sequential(
        layers.Embedding(TOKENS, 4, mask_zero=True),
        layers.MaskedAveragePooling1D(),
        layers.SpectralDense(2),
    )


def recurrent():
    return sequential(
        layers.Embedding(TOKENS, 4, mask_zero=True),
        layers.LipschitzRNN(4, bias_norm=0.1),
        layers.SpectralDense(2),
    )


def transformer():
    x = tokens()
    y = layers.PositionalEmbedding()(layers.Embedding(TOKENS, 4, mask_zero=True)(x))
    y = K.Average()([y, layers.LipschitzAttention(2, 3)(y)])
    y = K.Average()([y, layers.LipschitzAttention(2, 3)(y)])
    return keras.Model(x, layers.SpectralDense(2)(layers.MaskedAveragePooling1D()(y)))


CLASSIFIERS = {f.__name__: f for f in (bag, masked_mean, recurrent, transformer)}


def texts(count=64, length=6, used=8):
    """Tokens below `used`; the class is whether the last third of them prevails."""
    generator = np.random.default_rng(0)
    x = generator.integers(0, used, (count, length))
    return x, ((x >= 2 * used // 3).mean(axis=1) > 1 / 3).astype(int)


def array(x):
    return ops.convert_to_numpy(x)


# --- what they compute ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", one_in(2, ["int8", "uint8", "int32", "int64", "float32"]))
def test_tokens_of_any_type_are_clipped_into_range(dtype):
    layer = layers.Embedding(200, 3, mask_zero=True)
    x = np.array([[0, 5, 100, 127]]).astype(dtype)
    y = array(layer(x))
    table = array(layer.embeddings)
    np.testing.assert_array_equal(y[0], table[x[0].astype(int)])
    if dtype in ("int32", "int64", "float32"):
        y = array(layer(np.array([[-1, 200, 1_000_000, -(2**30)]], dtype)))
        np.testing.assert_array_equal(y[0], table[[0, 199, 199, 0]])
    if dtype == "float32":
        assert np.isfinite(array(layer(np.array([[np.nan, np.inf, -np.inf, 3e38]], dtype)))).all()


def test_rows_are_in_their_balls_from_the_start():
    layer = layers.Embedding(5, 3, radius=0.5, embeddings_initializer="ones")
    layer.build((None, 4))
    np.testing.assert_allclose(np.linalg.norm(array(layer.embeddings), axis=1), 0.5, rtol=1e-4)


def test_bag_is_the_masked_mean():
    x = np.array([[1, 2, 2, 0], [0, 0, 0, 0], [-3, 5, 99, 1]])
    one = layers.EmbeddingBag(6, 3, mask_zero=True)
    y = array(one(x))
    table = array(one.embeddings)
    np.testing.assert_allclose(y[0], table[[1, 2, 2]].mean(axis=0), atol=1e-6)
    np.testing.assert_array_equal(y[1], 0.0)
    np.testing.assert_allclose(y[2], table[[5, 5, 1]].mean(axis=0), atol=1e-6)
    two = layers.Embedding(6, 3, mask_zero=True)
    apart = keras.Sequential(
        [keras.Input((4,), dtype="int32"), two, layers.MaskedAveragePooling1D()]
    )
    two.embeddings.assign(table)
    np.testing.assert_allclose(array(apart(x)), y, atol=1e-6)
    plain = layers.EmbeddingBag(6, 3)
    plain.build((None, 4))
    plain.embeddings.assign(table)
    np.testing.assert_allclose(array(plain(x))[0], table[[1, 2, 2, 0]].mean(axis=0), atol=1e-6)


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("mask", one_in(2, [[1, 0, 1, 1], None, [0, 0, 0, 0]]))
def test_attention_by_hand(mask, rng):
    layer = layers.LipschitzAttention(2, 3, radius=0.8, temperature=0.3)
    x = rng.standard_normal((1, 4, 5)).astype("float32")
    given = None if mask is None else ops.convert_to_tensor(np.array([mask], bool))
    y = array(layer(x, mask=given))[0]
    rows = x[0] * np.minimum(1.0, 0.8 / np.linalg.norm(x[0], axis=1, keepdims=True))
    q, k, v, o = map(array, layer.weights)
    heads = []
    for h in range(2):
        part = slice(3 * h, 3 * h + 3)
        scores = (rows @ q[:, part]) @ (rows @ k[:, part]).T / 0.3
        if mask is not None:
            scores = np.where(np.array(mask, bool)[None], scores, -1e9)
        heads.append(softmax(scores) @ (rows @ v[:, part]))
    np.testing.assert_allclose(y, np.concatenate(heads, axis=1) @ o, atol=1e-5)


@pytest.mark.parametrize("mask", [None, [1, 0, 1, 1, 0], [0, 0, 0, 0, 0]])
@pytest.mark.parametrize("use_bias", one_in(2, [True, False]))
def test_recurrence_by_hand(mask, use_bias, rng):
    layer = layers.LipschitzRNN(3, use_bias=use_bias, return_sequences=True)
    x = rng.standard_normal((2, 5, 2)).astype("float32")
    layer.build(x.shape)
    if use_bias:
        layer.bias.assign([0.1, -0.3, 0.2])
    given = None if mask is None else ops.convert_to_tensor(np.array([mask] * 2, bool))
    states = array(layer(x, mask=given))
    kernel = array(layer.kernel)
    bias = array(layer.bias) if use_bias else 0.0
    h = np.zeros((2, 3))
    for t in range(5):
        new = np.tanh(np.concatenate([h, x[:, t]], axis=1) @ kernel + bias)
        h = new if mask is None or mask[t] else h
        np.testing.assert_allclose(states[:, t], h, atol=1e-5)
    twin = layers.LipschitzRNN(3, use_bias=use_bias)
    twin.build(x.shape)
    twin.set_weights(layer.get_weights())
    np.testing.assert_allclose(array(twin(x, mask=given)), h, atol=1e-5)


def test_token_dense_is_dense_on_the_other_axis(rng):
    layer = layers.TokenDense(4, activation="relu")
    x = rng.standard_normal((2, 5, 3)).astype("float32")
    y = array(layer(x))
    expected = np.einsum("btc,tu->buc", x, array(layer.kernel)) + array(layer.bias)[:, None]
    np.testing.assert_allclose(y, np.maximum(expected, 0.0), atol=1e-5)


def test_a_shift_register_attains_the_bounds_of_all_states():
    """Units that hand on their value: each state holds the whole of the first input."""
    layer = layers.LipschitzRNN(4, activation="linear", use_bias=False, return_sequences=True)
    network = keras.Sequential([keras.Input((4, 2)), layer])
    kernel = np.eye(6, 4, k=1)
    kernel[4, 0] = 1.0  # the first feature enters at the first unit
    layer.kernel.assign(kernel)
    x = np.zeros((1, 4, 2), "float32")
    x[0, 0, 0] = 1.0
    found = network_bounds(network, 1.0, 1.0)
    y = array(network(x))
    assert np.linalg.norm(y) == pytest.approx(found.output) == pytest.approx(2.0)
    _, (slope,) = vjp(
        lambda v: [network(v)], [ops.convert_to_tensor(x)], lambda values: [values[0] / 2.0]
    )
    assert np.linalg.norm(array(slope)) == pytest.approx(found.input_cotangents[0])


def test_bounds_of_a_recurrent_layer_without_its_projection():
    layer = layers.LipschitzRNN(4, use_bias=False, activation="linear")
    network = keras.Sequential([keras.Input((3, 2)), layers.BallProjection(1.0), layer])
    layer.kernel.constraint = None
    layer.kernel.assign(2.0 * layer.kernel)
    found = network_bounds(network)
    longest = np.linalg.norm(array(layer.kernel).astype(float), 2) ** 3  # one factor a step
    assert longest <= float(found.output) <= 1.1 * longest
    assert attack_bounds(network, steps=2).ratio <= 1 + 1e-5


# --- masks ------------------------------------------------------------------------------------


class Takes(keras.layers.Layer):
    """Knows masks, but its rule says nothing of them."""

    def call(self, x, mask=None):
        return x

    def bound(self, call):
        return lipdp.bounds.lipschitz()


class TakesOfSeveral(keras.layers.Layer):
    def call(self, x, y, x_mask=None):
        return x + y

    def bound(self, call):
        return lipdp.bounds.builtin.branches.add(self, call)


def test_masks_reach_the_layers():
    network = transformer()
    x, _ = texts(4)
    longer = x.copy()
    x[:, 3:] = 0
    longer[:, 3:] = 0
    before = array(network(x))
    table = network.layers[1].embeddings
    table.assign(np.concatenate([np.full((1, 4), 0.4), array(table)[1:]]))
    np.testing.assert_allclose(array(network(longer)), before, atol=1e-6)


def test_a_mask_costs_the_mean_its_factor():
    for mask_zero, constant in [(False, 6**-0.5), (True, 1.0)]:
        network = sequential(
            layers.Embedding(TOKENS, 4, mask_zero=mask_zero), layers.MaskedAveragePooling1D()
        )
        (bound,) = gradient_bounds(network).values()
        assert bound == pytest.approx(6**0.5 * constant, rel=1e-3)
    (bound, *_) = gradient_bounds(bag()).values()
    assert bound == pytest.approx(1.0, rel=1e-3)


def nested(inner):
    """The mask is attached inside of a nested model and does not show in the outer graph."""
    x = tokens()
    return keras.Model(x, inner(sequential(layers.Embedding(TOKENS, 4, mask_zero=True))(x)))


def inside(inner):
    """The mask is handed to a nested model, whose own graph does not show it."""
    x = tokens()
    y = layers.Embedding(TOKENS, 4, mask_zero=True)(x)
    return keras.Model(x, keras.Sequential([keras.Input((6, 4)), inner])(y))


def own_mask(inner):
    x = tokens()
    mask = ops.any(ops.greater(x, 0), axis=0, keepdims=True)
    return keras.Model(x, inner(layers.Embedding(TOKENS, 4)(x), mask=mask))


@pytest.mark.parametrize(
    "make",
    [
        lambda layer: sequential(layers.Embedding(TOKENS, 4, mask_zero=True), layer),
        lambda layer: sequential(layers.Embedding(TOKENS, 4), K.Masking(), K.Dense(3), layer),
        nested,
        inside,
    ],
)
def test_a_layer_without_a_rule_for_masks_is_refused(make):
    with pytest.raises(UnknownLayerError, match="may be called with a mask.*MaskedAveragePooling"):
        gradient_bounds(make(Takes()))
    # Where the mask does not show the layer that knows masks is charged for one all the same.
    network = make(layers.MaskedAveragePooling1D())
    found = network_bounds(network)
    assert found.layers[-1].input_cotangents == [1.0]


def test_masks_of_several_inputs_are_refused():
    x = tokens()
    for y in (
        layers.Embedding(TOKENS, 4, mask_zero=True)(x),
        sequential(layers.Embedding(TOKENS, 4, mask_zero=True))(x),
    ):
        with pytest.raises(UnknownLayerError, match="mask|boolean"):
            gradient_bounds(keras.Model(x, TakesOfSeveral()(y, y)))


def test_masks_that_might_mix_examples_are_refused():
    with pytest.raises(UnknownLayerError, match="with a `mask` argument"):
        gradient_bounds(own_mask(layers.MaskedAveragePooling1D()))
    x = tokens()
    y = layers.Embedding(TOKENS, 4)(x)
    with pytest.raises(UnknownLayerError, match="boolean"):
        gradient_bounds(keras.Model(x, y * ops.isfinite(y)))
    one, many = keras.Input((), dtype="int32"), tokens(1)
    y = K.Add()([layers.Embedding(5, 1, mask_zero=True)(t) for t in (one, many)])
    with pytest.raises(UnknownLayerError, match="different rank|whose only axis"):
        gradient_bounds(keras.Model([one, many], layers.MaskedAveragePooling1D()(y)))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: K.Embedding(5, 3), r"Use lipdp\.layers\.Embedding"),
        (lambda: layers.PositionalEmbedding(), None),
    ],
)
def test_rules_without_a_projection(make, message):
    layer = make()
    if message:
        with pytest.raises(UnknownLayerError, match=message):
            gradient_bounds(sequential(layer))
        return
    network = keras.Sequential([keras.Input((3, 2)), layers.BallProjection(1.0), layer])
    layer.embeddings.constraint = None
    layer.embeddings.assign(np.full((3, 2), 2.0))
    assert float(network_bounds(network).output) == pytest.approx(1 + 2 * 6**0.5, rel=1e-4)


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "make, shape, message",
    [
        (lambda: layers.Embedding(5, 3, radius=0.0), (4,), "`radius` must be a number"),
        (lambda: layers.PositionalEmbedding(-1.0), (4, 3), "`radius` must be a number"),
        (lambda: layers.PositionalEmbedding(), (None, 3), "unknown size"),
        (lambda: layers.EmbeddingBag(5, 3), (2, 3), "tokens"),
        (lambda: layers.TokenDense(5), (4,), "TokenDense mixes the positions"),
        (lambda: layers.LipschitzAttention(0, 3), (4, 3), "`num_heads` must be"),
        (lambda: layers.LipschitzAttention(1, 2.0), (4, 3), "`key_dim` must be"),
        (lambda: layers.LipschitzAttention(1, 2, temperature=0.0), (4, 3), "`temperature`"),
        (lambda: layers.LipschitzAttention(1, 2, radius=float("nan")), (4, 3), "`radius`"),
        (lambda: layers.LipschitzAttention(1, 2, radius=1e20), (4, 3), "Scores reach"),
        (lambda: layers.LipschitzAttention(1, 2), (4,), "takes .batch, positions, features"),
        (lambda: layers.LipschitzRNN(0), (4, 3), "`units` must be"),
        (lambda: layers.LipschitzRNN(3, activation="sigmoid"), (4, 3), "`activation` must have"),
        (lambda: layers.LipschitzRNN(3, activation="gelu"), (4, 3), "`activation` must have"),
        (lambda: layers.LipschitzRNN(3, bias_norm=-1.0), (4, 3), "`bias_norm` must be a number"),
        (lambda: layers.LipschitzRNN(3), (3,), "takes .batch, steps, features"),
    ],
)
def test_wrong_use_is_refused(make, shape, message):
    with pytest.raises((TypeError, ValueError), match=message):
        keras.Sequential([keras.Input(shape), make()])


@pytest.mark.parametrize("make", [
    lambda: layers.LipschitzRNN(3), lambda: layers.LipschitzAttention(1, 2),
    lambda: layers.TokenDense(3), lambda: layers.MaskedAveragePooling1D(),
])  # fmt: skip
def test_unknown_lengths_are_refused(make):
    with pytest.raises(ValueError, match="unknown size|should be defined|None"):
        network_bounds(keras.Sequential([keras.Input((None, 3)), make()]), 1.0, 1.0)


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "make",
    [
        lambda: layers.Embedding(9, 3, radius=0.5, mask_zero=True),
        lambda: layers.EmbeddingBag(9, 3, mask_zero=True),
    ],
)
def test_embeddings_are_saved_and_loaded(make, tmp_path):
    network = sequential(make())
    x, _ = texts(3)
    network.save(tmp_path / "network.keras")
    loaded = keras.saving.load_model(tmp_path / "network.keras")
    np.testing.assert_array_equal(array(loaded(x)), array(network(x)))
    assert loaded.layers[0].get_config() == network.layers[0].get_config()
    found, expected = gradient_bounds(loaded), gradient_bounds(network)
    assert list(found.values()) == list(expected.values())


# --- private training -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, run_eagerly",
    [
        *(pytest.param(name, EAGERLY, marks=pytest.mark.any_backend) for name in CLASSIFIERS),
        pytest.param("bag", not EAGERLY, marks=pytest.mark.any_backend),
        ("recurrent", False),
        pytest.param("masked_mean", not EAGERLY, marks=pytest.mark.slow),
        pytest.param("transformer", not EAGERLY, marks=pytest.mark.slow),
    ],
)
def test_text_classifiers_train_and_noise_reaches_every_row(name, run_eagerly):
    network = CLASSIFIERS[name]()
    table = network.layers[0 if isinstance(network, keras.Sequential) else 1].embeddings
    before = array(table)
    model = private(network, run_eagerly=run_eagerly, optimizer=keras.optimizers.SGD(0.01))
    x, y = texts(32)
    history = model.fit(x, y, epochs=1, verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    moved = np.abs(array(table) - before)
    assert (moved[8:] > 0).all()  # no text holds these tokens
    assert (np.linalg.norm(array(table), axis=1) <= 1.0).all()


@pytest.mark.any_backend
def test_noise_of_unused_rows_has_the_std_of_the_report():
    network = sequential(layers.EmbeddingBag(2000, 8), layers.SpectralDense(2))
    table = network.layers[0].embeddings
    table.constraint = None
    model = private(
        network, sampling=lipdp.FullBatch(), optimizer=keras.optimizers.SGD(1.0), run_eagerly=False
    )
    x, y = texts()
    before = array(table)
    std = next(r.noise_std for r in model.report(64).weights if r.weight == table.path)
    model.fit(x, y, verbose=0)
    noise = (array(table) - before)[8:] / std
    assert abs(noise.std() - 1.0) < 5 / np.sqrt(2 * noise.size)


@pytest.mark.any_backend
def test_a_separable_text_is_learnt():
    generator = np.random.default_rng(0)
    y = generator.integers(0, 2, 512)
    x = np.where(
        generator.random((512, 6)) < 0.8, 1 + y[:, None], generator.integers(3, 9, (512, 6))
    )
    model = private(
        bag(),
        optimizer=keras.optimizers.Adam(0.05),
        sampling=lipdp.PoissonSampling(128),
        loss=lipdp.losses.SparseCategoricalCrossentropy(temperature=4.0),
        run_eagerly=False,
    )
    model.fit(x, y, epochs=15, verbose=0)
    assert (model.predict(x, verbose=0).argmax(1) == y).mean() > 0.9


@pytest.mark.parametrize("name", one_in(2, list(CLASSIFIERS)))
def test_gradient_of_each_text_stays_within_its_bound(name):
    network = CLASSIFIERS[name]()
    model = private(network)
    x, y = texts(8)
    x[0], x[1], x[2] = 3, 0, 10**6
    bounds = gradient_bounds(network, model.current_clip())
    backend = steps.backend()
    for i in range(len(x)):
        outputs, pull = backend.pull_back(network, ops.convert_to_tensor(x[i : i + 1]))
        target = ops.convert_to_tensor(y[i : i + 1])
        _, g = gradient(
            lambda z, t=target: lipdp.losses.per_example(model.private_loss, t, z), outputs
        )
        for variable, slope in zip(network.trainable_variables, pull(g), strict=True):
            assert tuple(slope.shape) == tuple(variable.shape)
            assert float(ops.norm(ops.reshape(slope, (-1,)))) <= bounds[variable.path]


def test_padding_of_a_batch_moves_nothing():
    moves = []
    x, y = texts(8)
    for extra in (0, 5):
        keras.utils.set_random_seed(1)
        network = bag()
        model = private(
            network,
            noise_multiplier=0.0,
            sampling=lipdp.FullBatch(),
            optimizer=keras.optimizers.SGD(1.0),
        )
        for batch in model.batches(x, y):
            batch.inputs = np.concatenate([batch.inputs, np.zeros((extra, 6), batch.inputs.dtype)])
            batch.targets = np.concatenate([batch.targets, np.zeros(extra, int)])
            batch.mask = np.concatenate([batch.mask, np.zeros(extra, "float32")])
            model.train_on_batch(batch)
        moves.append(weights(model))
    for a, b in zip(*moves, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
