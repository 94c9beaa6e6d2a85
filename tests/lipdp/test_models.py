"""Networks of `lipdp.models`: shapes, bounds, saving, what they refuse."""

import keras
import numpy as np
import pytest

import lipdp
from lipdp import models
from lipdp.bounds import norms
from tests.lipdp.cases.networks import SMALL

pytestmark = pytest.mark.any_backend

LARGE = {
    "mlp": lambda: models.mlp((28, 28, 1), 10, width=512, depth=4),
    "vgg8": lambda: models.vgg((32, 32, 3), 10, depth=8, width=16),
    "resnet10": lambda: models.resnet((32, 32, 3), 10, depth=10, width=16),
    "mixer": lambda: models.mixer((32, 32, 3), 10, depth=4),
    "transformer": lambda: models.vision_transformer((32, 32, 3), 10, depth=4),
    "text": lambda: models.text_classifier(10_000, 256, 2),
    "scatter": lambda: models.scatter_net((28, 28, 1), 10, "conv"),
}


@pytest.mark.parametrize("name", SMALL)
def test_a_private_network_of_logits(name):
    network = SMALL[name]()
    assert network.output_shape == (None, 3)
    found = lipdp.check(network)
    assert found.private, found
    if name == "transformer":
        return
    # Every layer keeps norms: no bound grows on the way.
    assert all(layer.output_bound <= 1.0 + 1e-6 for layer in found.layers[2:])
    if not name.startswith(("scatter", "cosine")):  # a normalization in them stretches
        assert lipdp.bounds.network_bounds(network, 1.0).lipschitz <= 1.0 + 1e-6
    assert max(lipdp.gradient_bounds(network).values()) <= 3.0 + 1e-3


def test_the_bounds_of_a_transformer_do_not_grow_with_depth():
    found = [
        max(lipdp.gradient_bounds(models.vision_transformer((16, 16, 1), 3, depth=d)).values())
        for d in (1, 2, 6)
    ]
    assert max(found) < 12 and found[2] < 2 * found[0]


@pytest.mark.parametrize("name", SMALL)
def test_saved_and_loaded(name, tmp_path, rng):
    network = SMALL[name]()
    network.save(tmp_path / "network.keras")
    loaded = keras.saving.load_model(tmp_path / "network.keras")
    x = rng.uniform(0, 20, (2, *network.input_shape[1:])).astype(network.inputs[0].dtype)
    np.testing.assert_allclose(np.asarray(loaded(x)), np.asarray(network(x)), atol=1e-6)
    # Layers built anew get new names; the bounds are those of the same weights.
    claimed = lipdp.gradient_bounds(network).values()
    assert list(lipdp.gradient_bounds(loaded).values()) == pytest.approx(list(claimed))


@pytest.mark.parametrize(
    ("make", "hidden"),
    [
        (lambda part: models.mlp((4, 4), 3, 6, depth=3, radius=2.0, hidden_radius=part), 2),
        (lambda part: models.conv_net((8, 8, 1), 3, 2, radius=2.0, hidden_radius=part), 2),
        (lambda part: models.vgg((8, 8, 1), 3, 5, 2, radius=2.0, hidden_radius=part), 4),
    ],
)
def test_balls_behind_hidden_layers_bound_what_the_next_ones_read(make, hidden, rng):
    without, within = make(None), make(0.25)
    assert lipdp.check(within).private
    balls = [layer for layer in within.layers if isinstance(layer, lipdp.layers.BallProjection)]
    assert [ball.radius for ball in balls] == [2 / 4**i for i in range(hidden + 1)]
    bounds = [list(lipdp.gradient_bounds(network).values()) for network in (without, within)]
    expected = [4**i for i in range(hidden + 1)]
    np.testing.assert_allclose(np.divide(*bounds), expected, rtol=1e-3)
    # Where nothing is longer than its ball, balls change nothing.
    within.set_weights(without.get_weights())
    x = rng.uniform(-1, 1, (2, *within.input_shape[1:]))
    wide = make(1.0)
    wide.set_weights(without.get_weights())
    np.testing.assert_allclose(np.asarray(wide(x)), np.asarray(without(x)), atol=1e-6)
    assert np.abs(np.asarray(within(x))).max() <= 2 / 4**hidden + 1e-6


@pytest.mark.parametrize("name", LARGE)
def test_bounds_measure_no_weight(name, monkeypatch):
    """They are read from the sets of the weights, so large networks take as long as small ones."""
    network = LARGE[name]()
    for certificate in norms.__all__:
        if "bound" in certificate or "norm" in certificate:
            monkeypatch.delattr(norms, certificate)
    assert len(lipdp.gradient_bounds(network)) == len(network.trainable_variables)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: models.mlp((4,), 3, depth=0), "`depth` must be an integer of at least 1; got 0"),
        (lambda: models.mlp((4,), 3, width=3), "`width` must be a multiple of 2; got 3"),
        (lambda: models.mlp((4,), 3, radius=-1.0), "`radius`"),
        (
            lambda: models.mlp((4,), 3, hidden_radius=0.0),
            "`hidden_radius` must be a number above 0",
        ),
        (lambda: models.vgg((8, 8, 1), 3, depth=6), r"`depth` must be one of \[5, 8\]; got 6"),
        (lambda: models.vgg((6, 8, 1), 3), "at least 8×8 pixels"),
        (lambda: models.conv_net((8, 8), 3), r"\(height, width, channels\)"),
        (lambda: models.conv_net((8, 8, 1), 3, width=0), "`width`"),
        (lambda: models.cosine_net((8, 8, 1), 3), "at least 9×9 pixels"),
        (lambda: models.cosine_net((9, 9, 1), 3, filters=49), "`filters` must be below 49"),
        (
            lambda: models.cosine_net((9, 9, 1), 3, pool=0),
            "`pool` must be an integer of at least 1",
        ),
        (lambda: models.resnet((8, 8, 1), 3, depth=7), "`depth` must be 6, 8 or 10; got 7"),
        (lambda: models.mixer((8, 8, 1), 3, depth=0), "`depth`"),
        (lambda: models.mixer((9, 8, 1), 3), "patch"),
        (lambda: models.vision_transformer((8, 8, 1), 3, heads=3), "a divisor of width=64; got 3"),
        (lambda: models.text_classifier(0, 5, 2), "`vocabulary`"),
        (lambda: models.scatter_net((8, 8, 1), 3, "deep"), "`head` must be one of"),
        (lambda: models.scatter_net((28, 28, 1), 3, groups=5), "`?groups"),
        (lambda: models.resnet((None, 8, 1), 3), r"\(height, width, channels\)"),
    ],
)
def test_bad_arguments(make, words):
    with pytest.raises(ValueError, match=words):
        make()
