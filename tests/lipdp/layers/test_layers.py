"""Layers of lipdp: what they compute, what they refuse, how they are saved, what they bound."""

import math

import keras
import numpy as np
import pytest
import scipy.linalg
from keras import ops

from lipdp import bounds, layers
from lipdp.autodiff import compiled, fused, vjp
from lipdp.bounds import norms
from lipdp.training import steps
from tests.lipdp.helpers import EAGERLY, one_in

LAYERS = {
    "ball": (layers.BallProjection(0.7), (5,)),
    "ball per position": (layers.BallProjection(0.7, per_position=True), (3, 4)),
    "centering": (layers.Centering(), (4, 3)),
    "centering of channels": (layers.Centering((1, 2)), (4, 4, 2)),
    "clip": (layers.ClipGradient(0.1), (4,)),
    "dense": (layers.SpectralDense(4, bias_norm=0.5), (6,)),
    "dense without bias": (layers.SpectralDense(4, use_bias=False, activation="relu"), (3, 6)),
    "dense, orthogonal": (layers.SpectralDense(4, orthogonal=True, name="named"), (6,)),
    "frobenius": (layers.FrobeniusDense(4, radius=2.0, bias_norm=0.3), (6,)),
    "conv": (
        layers.SpectralConv2D(
            4, (3, 2), strides=2, padding="same", bias_norm=0.2, certificate="reshaped"
        ),
        (6, 5, 2),
    ),
    "conv, groups": (
        layers.SpectralConv2D(4, 2, groups=2, use_bias=False, activation="tanh"),
        (4, 4, 2),
    ),
    "positional embedding": (layers.PositionalEmbedding(0.5, initializer="ones"), (4, 3)),
    "token dense": (layers.TokenDense(4, bias_norm=0.5, activation="relu"), (5, 3)),
    "attention": (layers.LipschitzAttention(2, 3, radius=0.5, temperature=0.2), (4, 3)),
    "rnn": (layers.LipschitzRNN(3, bias_norm=0.2), (4, 2)),
    "rnn, all states": (
        layers.LipschitzRNN(3, activation="relu", use_bias=False, return_sequences=True),
        (4, 2),
    ),
    "masked average pooling": (layers.MaskedAveragePooling1D(), (4, 2)),
    "conv 1d, causal": (
        layers.SpectralConv1D(3, 3, padding="causal", dilation_rate=2, certificate="fft"),
        (6, 2),
    ),
    "patches": (layers.PatchEmbedding(5, (2, 3), bias_norm=0.3), (4, 6, 2)),
    "map of patches": (
        layers.PatchEmbedding(3, 2, sequence=False, use_bias=False, activation="tanh"),
        (4, 4, 1),
    ),
    "depthwise conv": (
        layers.SpectralDepthwiseConv2D((3, 2), padding="same", depth_multiplier=2, bias_norm=0.2),
        (5, 4, 2),
    ),
    "separable conv": (
        layers.SpectralSeparableConv2D(3, 2, strides=2, depth_multiplier=2, activation="relu"),
        (4, 4, 2),
    ),
    "transposed conv": (
        layers.SpectralConv2DTranspose(3, 3, strides=2, padding="same", output_padding=1),
        (3, 2, 2),
    ),
    "residual conv": (
        layers.ResidualConv2D(2, 3, kernel_initializer="ones", bias_norm=0.2, activation="tanh"),
        (4, 3, 2),
    ),
    "sandwich": (layers.SandwichDense(3, 5, bias_norm=0.4), (4,)),
    "sandwich without bias": (layers.SandwichDense(3, use_bias=False), (2, 4)),
    "convex potential": (layers.ConvexPotential(bias_norm=0.4), (2, 3)),
    "convex potential, conv": (
        layers.ConvexPotentialConv2D((3, 2), 4, certificate="reshaped"),
        (4, 3, 2),
    ),
    "block reflector": (layers.BlockReflector(kernel_initializer="ones"), (5,)),
    "almost orthogonal": (layers.AlmostOrthogonalDense(4, activation="relu"), (3, 5)),
    "almost orthogonal conv": (
        layers.AlmostOrthogonalConv2D(3, 3, padding="same", bias_norm=0.3),
        (4, 4, 2),
    ),
    "cayley": (layers.CayleyDense(3, bias_norm=0.3), (5,)),
    "cayley, wide": (layers.CayleyDense(5, use_bias=False, activation="relu"), (2, 3)),
    "exponential": (layers.ExponentialDense(3, bias_norm=0.3), (5,)),
    "exponential, wide": (layers.ExponentialDense(5, use_bias=False), (2, 3)),
    "gain": (layers.ChannelGain(0.5), (3, 4)),
    "group sort": (layers.GroupSort(3), (2, 6)),
    "max min": (layers.MaxMin(), (2, 6)),
    "full sort": (layers.FullSort(), (2, 5)),
    "householder": (layers.Householder("random_normal"), (2, 6)),
    "floored": (layers.FlooredNormalization(2.0, 0.3, groups=2, center=False), (3, 4)),
    "floored per position": (layers.FlooredNormalization(per_position=True), (2, 3, 4)),
    "down sampling": (layers.InvertibleDownSampling2D((1, 2)), (3, 4, 2)),
    "up sampling": (layers.InvertibleUpSampling2D((3, 1)), (2, 2, 6)),
    "l2 pooling 1d": (layers.L2NormPooling1D(3, strides=2, padding="same"), (6, 2)),
    "average pooling 1d": (layers.ScaledAveragePooling1D(2), (5, 2)),
    "global l2 pooling 1d": (layers.GlobalL2NormPooling1D(), (5, 2)),
    "global average pooling 1d": (layers.GlobalScaledAveragePooling1D(), (5, 2)),
    "l2 pooling": (layers.L2NormPooling2D(3, strides=2, padding="same"), (5, 5, 2)),
    "average pooling": (layers.ScaledAveragePooling2D((2, 1)), (4, 4, 2)),
    "global l2 pooling": (layers.GlobalL2NormPooling2D(), (4, 4, 2)),
    "scattering": (layers.Scattering2D(1, L=2, padding="reflect"), (7, 6, 2)),
    "global average pooling": (layers.GlobalScaledAveragePooling2D(), (4, 4, 2)),
}


def network_of(layer, shape):
    """A fresh network of a fresh copy of the layer."""
    copy = type(layer).from_config(layer.get_config())
    return keras.Sequential([keras.Input(shape), copy])


@pytest.mark.any_backend
@pytest.mark.parametrize("name", LAYERS)
def test_saved_and_loaded(name, tmp_path, rng):
    layer, shape = LAYERS[name]
    network = network_of(layer, shape)
    x = rng.standard_normal((2, *shape)).astype("float32")
    network.save(tmp_path / "network.keras")
    loaded = keras.saving.load_model(tmp_path / "network.keras")
    np.testing.assert_array_equal(ops.convert_to_numpy(loaded(x)), ops.convert_to_numpy(network(x)))
    assert loaded.layers[0].get_config() == network.layers[0].get_config()
    found, expected = (bounds.network_bounds(n, 1.0, 2.0) for n in (loaded, network))
    assert found.output == expected.output and found.lipschitz == expected.lipschitz
    assert list(found.gradients.values()) == list(expected.gradients.values())
    constraints = [[type(w.constraint) for w in n.weights] for n in (loaded, network)]
    assert constraints[0] == constraints[1]


@pytest.mark.any_backend
@pytest.mark.parametrize("name", LAYERS)
def test_bounds_are_those_of_the_projections(name):
    """Nothing is measured: a step that trains such layers computes no bound."""
    layer, shape = LAYERS[name]
    found = bounds.network_bounds(network_of(layer, shape), 1.0, 2.0)
    for bound in (found.output, found.lipschitz, *found.gradients.values()):
        assert isinstance(bound, (int, float))


@pytest.mark.any_backend
@pytest.mark.parametrize("name", LAYERS)
def test_config_tells_everything(name):
    layer, _ = LAYERS[name]
    twin = type(layer).from_config(layer.get_config())
    assert twin.get_config() == layer.get_config()
    assert layer.get_config()["name"] == layer.name


@pytest.mark.any_backend
@pytest.mark.parametrize("name", LAYERS)
def test_declared_shape(name, rng):
    layer, shape = LAYERS[name]
    network = network_of(layer, shape)
    outputs = network(rng.standard_normal((2, *shape)).astype("float32"))
    assert tuple(outputs.shape) == (2, *network.output_shape[1:])
    assert tuple(layer.compute_output_shape((None, *shape)))[1:] == tuple(outputs.shape)[1:]


@pytest.mark.parametrize("name", LAYERS)
def test_gradient_of_each_example(name, rng):
    """One by one, and together their gradients make that of the batch."""
    layer, shape = LAYERS[name]
    network = network_of(layer, shape)
    found = bounds.network_bounds(network, 1.0, 1.0)
    weights = [ops.convert_to_tensor(v) for v in network.trainable_variables]
    state = [ops.convert_to_tensor(v) for v in network.non_trainable_variables]

    def pulled(x, g):
        def forward(*arguments):
            return [network.stateless_call(list(arguments[:-1]), state, arguments[-1])[0]]

        return vjp(forward, [*weights, x], lambda _: [g])[1]

    def alone_and_together(x, g):
        def of_one(pair):
            return pulled(pair[0][None], pair[1][None])

        if EAGERLY:
            return [of_one(pair) for pair in zip(x, g, strict=True)], pulled(x, g)
        alone = ops.map(of_one, (x, g))
        return [[c[i] for c in alone] for i in range(4)], pulled(x, g)

    both = fused(alone_and_together)
    x = rng.standard_normal((4, *shape)).astype("float32")
    x[0] = 0.0
    x /= np.maximum(np.linalg.norm(x.reshape(4, -1), axis=1), 1.0).reshape(4, *[1] * len(shape))
    g = rng.standard_normal((4, *network.output_shape[1:])).astype("float32")
    g /= np.linalg.norm(g.reshape(4, -1), axis=1).reshape(4, *[1] * (g.ndim - 1))
    claimed = [*found.gradients.values(), found.input_cotangents[0]]
    sums = [0.0] * len(claimed)
    alone, together = both(ops.convert_to_tensor(x), ops.convert_to_tensor(g))
    for single in alone:
        for j, (gradient, bound) in enumerate(zip(single, claimed, strict=True)):
            gradient = ops.convert_to_numpy(gradient)
            assert np.linalg.norm(gradient) <= bound * (1 + 1e-5)
            sums[j] = sums[j] + gradient
    for total, gradient in zip(sums[:-1], together[:-1], strict=True):
        np.testing.assert_allclose(total, ops.convert_to_numpy(gradient), atol=1e-5)


# --- each by itself ---------------------------------------------------------------------------


def norms_of(x):
    x = ops.convert_to_numpy(x).astype("float64")
    return np.linalg.norm(x.reshape(len(x), -1), axis=1)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e20, 1e37, 3e38])
def test_ball_projection(scale, rng):
    x = (scale * rng.uniform(-1, 1, (5, 3, 4))).astype("float32")
    x[4] = 0.0
    y = ops.convert_to_numpy(layers.BallProjection(0.5)(x))
    inside = np.linalg.norm(x.astype("float64").reshape(5, -1), axis=1) <= 0.5
    np.testing.assert_allclose(y[inside], x[inside], rtol=1e-6)
    np.testing.assert_allclose(norms_of(y)[~inside], 0.5, rtol=1e-5)
    if not inside[0] and scale < 1e37:  # above, entries are clipped
        direction = x[~inside] / np.abs(x[~inside]).max(axis=(1, 2), keepdims=True)
        direction /= np.linalg.norm(direction.reshape(len(direction), -1), axis=1)[:, None, None]
        np.testing.assert_allclose(y[~inside], 0.5 * direction, rtol=1e-4, atol=1e-6)


def test_ball_projection_of_broken_entries():
    x = np.array([[np.nan, 0.3, np.inf], [-np.inf, np.nan, np.nan]], "float32")
    y = ops.convert_to_numpy(layers.BallProjection(1.0)(x))
    np.testing.assert_allclose(y, [[0.0, 0.3, 0.0], [0.0, 0.0, 0.0]], rtol=1e-6)


@pytest.mark.optimized
def test_ball_projection_rounds_an_example_alike_whatever_the_others_are(rng):
    x = rng.standard_normal((6, 50)).astype("float32")
    layer, found = layers.BallProjection(0.5), []
    for last in (1.0, 1e30, np.nan):
        x[5, 0] = last
        tensor = ops.convert_to_tensor(x)
        (y,), (slope,) = vjp(lambda v: [layer(v)], [tensor], lambda values: [values[0] ** 2])
        found.append([ops.convert_to_numpy(y), ops.convert_to_numpy(slope)])
        assert np.isfinite(found[-1]).all()
    for pair in found[1:]:
        np.testing.assert_array_equal(np.array(pair)[:, :5], np.array(found[0])[:, :5])


@pytest.mark.parametrize("per_position", [False, True])
@pytest.mark.parametrize("broken", [np.nan, np.inf, 1e25])
def test_ball_projection_of_a_broken_example_changes_no_other(broken, per_position, rng):
    """Within a compiled step, too."""
    layer = layers.BallProjection(0.5, per_position)
    x, g = (rng.standard_normal((6, 2, 3)).astype("float32") for _ in range(2))
    x[:3] *= 0.1

    @compiled
    def slopes(x, g):
        values, (slope,) = vjp(lambda x: [layer(x)], [x], lambda _: [g])
        return values[0], slope

    with_it, more = (np.concatenate([a, np.full((1, 2, 3), v)]) for a, v in ((x, broken), (g, 1)))
    for found, expected in zip(
        slopes(with_it.astype("float32"), more.astype("float32")), slopes(x, g), strict=True
    ):
        found = ops.convert_to_numpy(found)
        np.testing.assert_allclose(found[:6], ops.convert_to_numpy(expected), atol=1e-6)
        assert np.isfinite(found).all()


@pytest.mark.parametrize("radius", [0.5, 1e-12])
@pytest.mark.parametrize("per_position", [False, True])
def test_ball_projection_hands_back_its_slope(per_position, radius, rng):
    """Beside that of the formula, in the ball, on it and beyond, where squares overflow, too."""
    scales = np.array([0.0, 0.1, 0.999, 1.001, 7.0, 1e18, 1e25])[:, None, None]
    x, g = rng.standard_normal((2, 7, 3, 4))
    axes = (2,) if per_position else (1, 2)
    x = (scales * radius * x / np.linalg.norm(x, axis=axes, keepdims=True)).astype("float32")
    layer = layers.BallProjection(radius, per_position)
    tensors = [ops.convert_to_tensor(a.astype("float32")) for a in (x, g)]
    _, (slope,) = vjp(lambda x: [layer(x)], tensors[:1], lambda _: tensors[1:])
    norm = np.sqrt(np.sum(x.astype("float64") ** 2, axis=axes, keepdims=True))
    unit = x / np.where(norm > radius, norm, np.inf)
    along = np.sum(unit * g, axis=axes, keepdims=True)
    expected = radius / np.maximum(norm, radius) * (g - unit * along)
    largest = np.abs(expected).max(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(ops.convert_to_numpy(slope) / largest, expected / largest, atol=1e-5)


@pytest.mark.optimized
@pytest.mark.parametrize("per_position", [False, True])
def test_ball_projection_is_what_it_was_where_xla_compiles_it(per_position, rng):
    """XLA lacks some of TensorFlow's operations."""
    x, g = rng.standard_normal((2, 5, 3, 4)).astype("float32")
    x[1, 0, 0] = 1e30
    layer = layers.BallProjection(0.5, per_position)

    def both(x, g):
        (y,), (slope,) = vjp(lambda x: [layer(x)], [x], lambda _: [g])
        return y, slope

    by_xla = compiled(steps.backend().compiled(both))
    tensors = [ops.convert_to_tensor(a) for a in (x, g)]
    for found, expected in zip(by_xla(*tensors), both(*tensors), strict=True):
        np.testing.assert_allclose(
            ops.convert_to_numpy(found), ops.convert_to_numpy(expected), rtol=1e-5, atol=1e-6
        )


def test_ball_projection_takes_integers():
    y = layers.BallProjection(1.0)(np.array([[3, 4]], "uint8"))
    np.testing.assert_allclose(ops.convert_to_numpy(y), [[0.6, 0.8]], rtol=1e-6)


def test_ball_projection_per_position(rng):
    x = 10 * rng.standard_normal((2, 3, 4, 5)).astype("float32")
    y = ops.convert_to_numpy(layers.BallProjection(0.5, per_position=True)(x))
    np.testing.assert_allclose(np.linalg.norm(y, axis=-1), 0.5, rtol=1e-5)


@pytest.mark.parametrize("axes, rank", [(None, 2), (None, 3), (1, 2), (-1, 3), ((1, 2), 4)])
def test_centering(axes, rank, rng):
    x = rng.standard_normal((3, 4, 5, 2)[:rank]).astype("float32")
    y = ops.convert_to_numpy(layers.Centering(axes)(x))
    mean_axes = tuple(range(1, rank)) if axes is None else axes
    np.testing.assert_allclose(y, x - x.mean(axis=mean_axes, keepdims=True), atol=1e-6)


@pytest.mark.parametrize("n, channels", [(2, 2), (2, 8), (3, 6), (4, 4), (8, 8)])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)], ids=str)
def test_group_sort_sorts(n, channels, shape, rng):
    x = rng.standard_normal((2, *shape, channels)).astype("float32")
    y = ops.convert_to_numpy(layers.GroupSort(n)(x))
    groups = x.reshape(2, *shape, n, channels // n)
    expected = -np.sort(-groups, axis=-2)
    np.testing.assert_allclose(y.reshape(groups.shape), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)], ids=str)
def test_full_sort_and_max_min_sort(shape, rng):
    x = rng.standard_normal((2, *shape, 6)).astype("float32")
    full = ops.convert_to_numpy(layers.FullSort()(x))
    np.testing.assert_array_equal(full, -np.sort(-x, axis=-1))
    pairs, expected = layers.MaxMin()(x), layers.GroupSort(2)(x)
    np.testing.assert_array_equal(ops.convert_to_numpy(pairs), ops.convert_to_numpy(expected))


@pytest.mark.parametrize("theta", [-2.0, 0.0, 0.3, math.pi / 2, 3.0, 100.0])
def test_householder_reflects(theta, rng):
    x = rng.standard_normal((50, 2)).astype("float32")
    y = layers.Householder(keras.initializers.Constant(theta))(x)
    cos, sin = np.cos(theta), np.sin(theta)
    mirrored = x @ np.array([[cos, sin], [sin, -cos]])
    stays = x[:, :1] * np.sin(theta / 2) - x[:, 1:] * np.cos(theta / 2) > 0
    expected = np.where(stays, x, mirrored)
    np.testing.assert_allclose(ops.convert_to_numpy(y), expected, atol=1e-4)


def test_householder_is_max_min_at_first(rng):
    x = rng.standard_normal((20, 3, 6)).astype("float32")
    y, expected = layers.Householder()(x), layers.MaxMin()(x)
    np.testing.assert_allclose(
        ops.convert_to_numpy(y), ops.convert_to_numpy(expected), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("per_position", [False, True])
@pytest.mark.parametrize("center", [False, True])
def test_floored_normalization_by_hand(per_position, center, rng):
    x = rng.standard_normal((4, 3, 2, 6)).astype("float32")
    x[1] *= 0.01
    x[2] = 1.0
    layer = layers.FlooredNormalization(2.0, 0.5, 3, per_position=per_position, center=center)
    z = x.astype("float64").reshape(4, 3, 2, 3, 2)
    axes = (-1,) if per_position else (1, 2, 4)
    z = z - z.mean(axis=axes, keepdims=True) if center else z
    norm = np.sqrt(np.square(z).sum(axis=axes, keepdims=True))
    expected = (2.0 * z / np.maximum(norm, 0.5)).reshape(x.shape)
    np.testing.assert_allclose(ops.convert_to_numpy(layer(x)), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.any_backend
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e20, 3e38])
def test_floored_normalization_at_extreme_scales(scale, rng):
    x = (scale * rng.uniform(-1, 1, (5, 4, 6))).astype("float32")
    x[3] = scale
    x[4] = np.nan
    for per_position in (False, True):
        layer = layers.FlooredNormalization(0.5, 0.01, groups=2, per_position=per_position)
        _, (slopes,) = vjp(
            lambda x, layer=layer: [layer(x)],
            [ops.convert_to_tensor(x)],
            lambda values: [ops.ones_like(values[0])],
        )
        assert norms_of(layer(x)).max() <= 0.5 * math.sqrt(8 if per_position else 2) * (1 + 1e-5)
        assert norms_of(slopes).max() <= math.sqrt(24) * 50 * (1 + 1e-5)


@pytest.mark.parametrize("block", [(2, 2), (1, 3), (4, 1)])
def test_sampling_by_hand(block, rng):
    a, b = block
    x = rng.standard_normal((2, 4, 6, 3)).astype("float32")
    y = ops.convert_to_numpy(layers.InvertibleDownSampling2D(block)(x))
    for i in range(4 // a):
        for j in range(6 // b):
            cells = x[:, i * a : (i + 1) * a, j * b : (j + 1) * b]
            np.testing.assert_array_equal(y[:, i, j], cells.reshape(2, -1))
    back = layers.InvertibleUpSampling2D(block)(y)
    np.testing.assert_array_equal(ops.convert_to_numpy(back), x)


def test_pooling_of_sequences_is_that_of_maps(rng):
    x = rng.standard_normal((2, 7, 3)).astype("float32")
    for name in ("ScaledAveragePooling", "L2NormPooling"):
        one, two = getattr(layers, f"{name}1D"), getattr(layers, f"{name}2D")
        for padding in ("valid", "same"):
            y = one(3, 2, padding)(x)
            expected = two((3, 1), (2, 1), padding)(x[:, :, None])
            np.testing.assert_allclose(
                ops.convert_to_numpy(y), ops.convert_to_numpy(expected)[:, :, 0], rtol=1e-6
            )
        y = getattr(layers, f"Global{name}1D")()(x)
        expected = getattr(layers, f"Global{name}2D")()(x[:, :, None])
        np.testing.assert_allclose(
            ops.convert_to_numpy(y), ops.convert_to_numpy(expected), rtol=1e-5
        )


def test_gate_saved_and_loaded(tmp_path, rng):
    x = keras.Input((4,))
    y = layers.Gate(per_channel=True, gate_initializer="random_normal")([x, 2.0 * x])
    network = keras.Model(x, y)
    network.save(tmp_path / "network.keras")
    loaded = keras.saving.load_model(tmp_path / "network.keras")
    x = rng.standard_normal((3, 4)).astype("float32")
    np.testing.assert_array_equal(ops.convert_to_numpy(loaded(x)), ops.convert_to_numpy(network(x)))
    assert loaded.layers[-1].get_config() == network.layers[-1].get_config()


def test_gate_keeps_a_residual_block_from_growing():
    x = keras.Input((4,))
    y = layers.BallProjection(1.0)(x)
    for _ in range(5):
        y = layers.Gate()([y, layers.SpectralDense(4, use_bias=False)(y)])
    found = bounds.network_bounds(keras.Model(x, y))
    assert float(found.lipschitz) == pytest.approx(1.0)
    assert float(found.output) == pytest.approx(1.0)


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize(
    "pool, strides",
    [
        pytest.param((2, 2), (2, 2), marks=pytest.mark.any_backend),
        ((3, 2), (1, 2)),
        pytest.param((2, 2), (3, 3), marks=pytest.mark.any_backend),
    ],
)
def test_pooling_by_hand(pool, strides, padding, rng):
    x = rng.standard_normal((2, 6, 5, 3)).astype("float32")
    padded = x
    if padding == "same":
        total = [
            max((-(-n // s) - 1) * s + p - n, 0)
            for n, p, s in zip((6, 5), pool, strides, strict=True)
        ]
        padded = np.pad(x, ((0, 0), *((t // 2, t - t // 2) for t in total), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, pool, axis=(1, 2))
    windows = windows[:, :: strides[0], :: strides[1]]
    average = layers.ScaledAveragePooling2D(pool, strides, padding)(x)
    expected = windows.sum(axis=(-2, -1)) / np.sqrt(np.prod(pool))
    np.testing.assert_allclose(ops.convert_to_numpy(average), expected, rtol=1e-4, atol=1e-5)
    norm = layers.L2NormPooling2D(pool, strides, padding)(x)
    expected = np.sqrt(np.square(windows).sum(axis=(-2, -1)))
    np.testing.assert_allclose(ops.convert_to_numpy(norm), expected, rtol=1e-4, atol=1e-5)


def test_clip_gradient_clips_each_example_and_what_is_not_finite():
    g = np.array([[3.0, 4.0], [0.01, 0.0], [np.nan, 1.0], [0.0, 0.0], [1e30, 0.0]], "float32")
    _, (pulled,) = vjp(
        lambda x: [layers.ClipGradient(0.5)(x)],
        [ops.ones((5, 2))],
        lambda _: [ops.convert_to_tensor(g)],
    )
    pulled = ops.convert_to_numpy(pulled)
    np.testing.assert_allclose(pulled[:2], [[0.3, 0.4], [0.01, 0.0]], rtol=1e-5)
    assert np.isfinite(pulled).all()
    assert (norms_of(pulled) <= 0.5 * (1 + 1e-6)).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda **k: layers.SpectralDense(3, bias_initializer="ones", bias_norm=0.1, **k),
        lambda **k: layers.FrobeniusDense(3, bias_initializer="ones", radius=0.2, **k),
        lambda **k: layers.SpectralDense(3, kernel_initializer="ones", orthogonal=True, **k),
    ],
)
@pytest.mark.parametrize("trainable", [True, False])
def test_initial_weights_are_in_their_sets(make, trainable):
    layer = make(trainable=trainable)
    layer.build((None, 4))
    for variable in layer.weights:
        value = ops.convert_to_numpy(variable)
        norm = np.linalg.norm(value, 2)
        assert norm <= variable.constraint.radius


def test_initial_conv_weights_are_in_their_sets():
    layer = layers.SpectralConv2D(
        2, 3, kernel_initializer="ones", bias_initializer="ones", bias_norm=0.1, padding="same"
    )
    layer.build((None, 4, 4, 1))
    assert np.linalg.norm(ops.convert_to_numpy(layer.bias)) <= 0.1
    assert ops.convert_to_numpy(layer.kernel).max() < 0.2


@pytest.mark.parametrize("sequence", [True, False])
def test_patches_by_hand(sequence, rng):
    layer = layers.PatchEmbedding(5, (2, 3), sequence=sequence)
    x = rng.standard_normal((2, 4, 9, 3)).astype("float32")
    y = ops.convert_to_numpy(layer(x))
    assert y.shape == ((2, 6, 5) if sequence else (2, 2, 3, 5))
    patches = x.reshape(2, 2, 2, 3, 3, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 6, 18)
    expected = patches @ ops.convert_to_numpy(layer.kernel).reshape(18, 5)
    np.testing.assert_allclose(y.reshape(2, 6, 5), expected, atol=1e-5)


def matrix_of(layer, features):
    return ops.convert_to_numpy(layer(np.eye(features, dtype="float32"))).astype("float64")


@pytest.mark.parametrize(
    "features, units",
    [
        (6, 3),
        (3, 6),
        *(pytest.param(*s, marks=pytest.mark.any_backend) for s in ((4, 4), (1, 4), (40, 30))),
    ],
)
@pytest.mark.parametrize("cls", [layers.CayleyDense, layers.ExponentialDense])
def test_orthogonal_by_a_map(cls, features, units, rng):
    layer = cls(units, use_bias=False)
    layer.build((None, features))
    tall = features >= units
    for scale in (0.0, 0.1, 1.0, 100.0):
        value = (scale * rng.standard_normal((features, units))).astype("float32")
        layer.kernel.assign(layer.kernel.constraint(ops.convert_to_tensor(value)))
        matrix = matrix_of(layer, features)
        gram = matrix.T @ matrix if tall else matrix @ matrix.T
        np.testing.assert_allclose(gram, np.eye(min(features, units)), atol=2e-5)
        kernel = ops.convert_to_numpy(layer.kernel).astype("float64")
        kernel = kernel if tall else kernel.T
        skew = np.pad(kernel, ((0, 0), (0, kernel.shape[0] - kernel.shape[1])))
        skew = skew - skew.T
        eye = np.eye(len(skew))
        if cls is layers.CayleyDense:
            expected = (eye - skew) @ np.linalg.inv(eye + skew)
        else:
            expected = scipy.linalg.expm(skew)
        expected = expected[:, : kernel.shape[1]]
        np.testing.assert_allclose(matrix if tall else matrix.T, expected, atol=2e-5)


@pytest.mark.parametrize("cls", [layers.CayleyDense, layers.ExponentialDense])
@pytest.mark.parametrize("shape", one_in(3, [(4, 4), (6, 3), (24, 24)]), ids=str)
def test_slopes_of_the_orthogonal_maps(cls, shape, rng):
    """The Jacobian that the backward pass multiplies with, on rank-one cotangents, where the
    kernel is at the edge of its ball."""
    layer = cls(shape[1], use_bias=False)
    layer.build((None, shape[0]))
    limit = np.sqrt(2) * {layers.CayleyDense: 2.0, layers.ExponentialDense: 1.0}[cls]
    largest = 0.0
    for scale in (0.0, 0.3, 10.0):
        for _ in range(10):
            value = (scale * rng.standard_normal(shape)).astype("float32")
            value = layer.kernel.constraint(ops.convert_to_tensor(value))
            x, g = (rng.standard_normal(n) for n in shape)
            g -= x[: shape[1]] * (g @ x[: shape[1]]) / (x[: shape[1]] @ x[: shape[1]])
            cotangent = np.outer(x, g) / np.linalg.norm(x) / np.linalg.norm(g)
            cotangent = [ops.convert_to_tensor(cotangent.astype("float32"))]
            _, (slope,) = vjp(
                lambda kernel: [layer._matrix(kernel)], [value], lambda _, c=cotangent: c
            )
            largest = max(largest, np.linalg.norm(ops.convert_to_numpy(slope)))
    assert 0.9 * limit * (shape[0] == shape[1]) <= largest <= limit * (1 + 1e-4)


def jacobian(layer, x):
    """Of the layer at one example, by rows of the cotangents."""
    outputs = int(np.prod(layer(x).shape[1:]))
    rows = np.repeat(x, outputs, axis=0)
    identity = np.eye(outputs, dtype="float32").reshape(outputs, *layer(x).shape[1:])
    _, (slopes,) = vjp(lambda x: [layer(x)], [rows], lambda _: [identity])
    return ops.convert_to_numpy(slopes).reshape(outputs, -1).astype("float64")


def test_blocks_by_hand(rng):
    x = rng.standard_normal((5, 4)).astype("float32")
    b = np.array([0.3, -0.4, 0.2], "float32")
    relu = lambda z: np.maximum(z, 0.0)  # noqa: E731
    layer = layers.SandwichDense(2, 3)
    layer.build((None, 4))
    layer.bias.assign(b)
    kernel = ops.convert_to_numpy(layer.kernel)
    a_t, b_t = kernel[:2], kernel[2:]
    expected = np.sqrt(2) * relu(np.sqrt(2) * x @ b_t + b) @ a_t.T
    np.testing.assert_allclose(ops.convert_to_numpy(layer(x)), expected, atol=1e-5)
    layer = layers.ConvexPotential(3)
    layer.build((None, 4))
    layer.bias.assign(b)
    w = ops.convert_to_numpy(layer.kernel)
    expected = x - 2 * relu(x @ w + b) @ w.T
    np.testing.assert_allclose(ops.convert_to_numpy(layer(x)), expected, atol=1e-5)
    layer = layers.BlockReflector(2)
    layer.build((None, 4))
    v = ops.convert_to_numpy(layer.kernel)
    reflector = np.eye(4) - 2 * v @ v.T
    np.testing.assert_allclose(ops.convert_to_numpy(layer(x)), x @ reflector, atol=1e-5)
    np.testing.assert_allclose(reflector @ reflector, np.eye(4), atol=1e-4)  # V is orthonormal


@pytest.mark.any_backend
@pytest.mark.parametrize("kernel_size", [1, 3, (2, 4), (3, 2)], ids=str)
def test_convex_potential_is_a_gradient(kernel_size, rng):
    """Its Jacobian is symmetric only if the transposed convolution is the adjoint."""
    layer = layers.ConvexPotentialConv2D(kernel_size, 3)
    x = rng.standard_normal((1, 3, 4, 2)).astype("float32")
    slopes = jacobian(layer, x)
    np.testing.assert_allclose(slopes, slopes.T, atol=1e-5)
    assert np.abs(np.linalg.eigvalsh(slopes)).max() <= 1 + 1e-5


@pytest.mark.any_backend
def test_residual_conv_starts_as_the_identity_and_keeps_its_channels(rng):
    x = rng.standard_normal((2, 4, 5, 3)).astype("float32")
    for kernel_size in (1, 3, (1, 5)):
        y = layers.ResidualConv2D(3, kernel_size)(x)
        np.testing.assert_allclose(ops.convert_to_numpy(y), x, atol=1e-4)


@pytest.mark.any_backend
def test_each_channel_of_a_depthwise_kernel_starts_at_its_norm():
    layer = layers.SpectralDepthwiseConv2D(3, padding="same")
    layer.build((None, 6, 6, 4))
    found = norms.depthwise_norm_bounds(layer.kernel, (6, 6), padding="same")
    np.testing.assert_allclose(ops.convert_to_numpy(found), 1.0, rtol=1e-4)


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "make, shape, message",
    [
        (lambda: layers.BallProjection(0.0), (3,), "`radius` must be a number"),
        (lambda: layers.BallProjection(float("nan")), (3,), "`radius` must be a number"),
        (
            lambda: layers.BallProjection(1.0, per_position=True),
            (),
            "in addition to the batch axis",
        ),
        (lambda: layers.ClipGradient(-1.0), (3,), "`clip_norm` must be a number"),
        (lambda: layers.Centering(0), (3,), "would mix examples"),
        (lambda: layers.Centering(-2), (3,), "would mix examples"),
        (lambda: layers.Centering((1, 5)), (3,), "axes of the input"),
        (lambda: layers.GroupSort(1), (4,), "`n` must be an integer"),
        (lambda: layers.GroupSort(3), (4,), "that 3 divides"),
        (lambda: layers.FullSort(), (), "FullSort needs an axis"),
        (lambda: layers.Householder(), (2, 3), "even number of channels"),
        (lambda: layers.FlooredNormalization(-1.0), (3,), "`radius` must be a number"),
        (lambda: layers.FlooredNormalization(floor=0.0), (3,), "`floor` must be a number"),
        (
            lambda: layers.FlooredNormalization(groups=0),
            (3,),
            "`groups` must be an integer of at least 1",
        ),
        (lambda: layers.FlooredNormalization(groups=2), (3,), "that 2 divides"),
        (lambda: layers.FlooredNormalization(), (), "channels that 1 divides"),
        (lambda: layers.Gate(), (3,), "two inputs of one shape"),
        (lambda: layers.InvertibleDownSampling2D(2), (4, 3, 1), "which blocks tile"),
        (lambda: layers.InvertibleDownSampling2D(2), (4, 4), "which blocks tile"),
        (lambda: layers.InvertibleDownSampling2D(0), (4, 4, 1), "`block_size` must be"),
        (lambda: layers.InvertibleUpSampling2D(2), (4, 4, 6), "that 4 divides"),
        (lambda: layers.InvertibleUpSampling2D(2), (None, 4, 4), "known sizes"),
        (lambda: layers.InvertibleDownSampling2D(2), (4, None, 4), "known sizes"),
        (lambda: layers.FlooredNormalization(), (None, 4), "known sizes"),
        (lambda: layers.L2NormPooling1D((2, 2)), (4, 1), "`pool_size` must be an integer; got"),
        (lambda: layers.GlobalL2NormPooling2D(), (4, 1), "input of rank 4"),
        (
            lambda: layers.SpectralDense(3, bias_norm=0.0),
            (4,),
            "`bias_norm` must be a number",
        ),
        (lambda: layers.L2NormPooling2D(0), (4, 4, 1), "`pool_size` must be"),
        (lambda: layers.L2NormPooling2D(2, padding="full"), (4, 4, 1), "`padding` must be"),
        (lambda: layers.SpectralConv2D(2, 3), (None, 4, 1), "known spatial sizes"),
        (lambda: layers.SpectralConv1D(2, 3), (None, 1), "known spatial sizes"),
        (lambda: layers.SpectralConv2DTranspose(2, 3), (None, 4, 1), "known spatial sizes"),
        (lambda: layers.SpectralDepthwiseConv2D(3), (None, 4, 1), "known spatial sizes"),
        (lambda: layers.ResidualConv2D(3, 3), (4, 4, 2), "as many filters as input channels"),
        (lambda: layers.ResidualConv2D(2, 2), (4, 4, 2), "needs odd kernel sizes"),
        (lambda: layers.SandwichDense(0), (4,), "`units` must be an integer of at least 1"),
        (lambda: layers.SandwichDense(3, 1.5), (4,), "`hidden` must be an integer of at least 1"),
        (
            lambda: layers.SandwichDense(3, bias_norm=-1.0),
            (4,),
            "`bias_norm` must be a number",
        ),
        (lambda: layers.ConvexPotential(-1), (4,), "`hidden` must be an integer of at least 1"),
        (lambda: layers.ConvexPotentialConv2D((3, 3, 3)), (4, 4, 2), "`kernel_size` must be"),
        (lambda: layers.ConvexPotentialConv2D(3), (None, 4, 2), "known spatial sizes"),
        (lambda: layers.BlockReflector(0), (4,), "`rank` must be an integer of at least 1"),
        (
            lambda: layers.CayleyDense(3, bias_norm=0.0),
            (4,),
            "`bias_norm` must be a number",
        ),
        (lambda: layers.PatchEmbedding(2, 3), (6, 4, 1), r"patches of \(3, 3\) tile"),
        (lambda: layers.PatchEmbedding(2, 2), (None, 4, 1), "patches of"),
        (lambda: layers.ChannelGain(float("nan")), (4,), "`gain` must be a number"),
        (lambda: layers.ChannelGain(-1.0), (4,), "`gain` must be a number"),
    ],
)
def test_wrong_use_is_refused(make, shape, message):
    with pytest.raises((TypeError, ValueError), match=message):
        keras.Sequential([keras.Input(shape), make()])
