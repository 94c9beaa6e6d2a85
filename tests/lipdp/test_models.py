"""Networks of `lipdp.models`: shapes, bounds, saving, what they refuse."""

import time

import keras
import numpy as np
import pytest

import lipdp
from lipdp import models

SMALL = {
    "linear": lambda: models.mlp((6, 6, 2), 3, depth=1),
    "mlp": lambda: models.mlp((20,), 3, width=8, depth=3),
    "conv_net": lambda: models.conv_net((8, 8, 1), 3, width=4),
    "vgg5": lambda: models.vgg((8, 8, 3), 3, width=2),
    "vgg8": lambda: models.vgg((9, 8, 1), 3, depth=8, width=2),
    "resnet6": lambda: models.resnet((8, 8, 3), 3, width=2),
    "resnet10": lambda: models.resnet((16, 12, 1), 3, depth=10, width=2),
}
LARGE = {
    "mlp": lambda: models.mlp((28, 28, 1), 10, width=512, depth=4),
    "vgg8": lambda: models.vgg((32, 32, 3), 10, depth=8, width=16),
    "resnet10": lambda: models.resnet((32, 32, 3), 10, depth=10, width=16),
}


@pytest.mark.parametrize("name", SMALL)
def test_a_private_network_of_logits(name):
    network = SMALL[name]()
    assert network.output_shape == (None, 3)
    found = lipdp.check(network)
    assert found.private, found
    # Every layer keeps norms: no bound grows on the way.
    assert all(layer.output_bound <= 1.0 + 1e-6 for layer in found.layers[1:])
    lipschitz = lipdp.bounds.network_bounds(network, 1.0).lipschitz
    assert lipschitz <= 1.0 + 1e-6


@pytest.mark.parametrize("name", SMALL)
def test_saved_and_loaded(name, tmp_path, rng):
    network = SMALL[name]()
    network.save(tmp_path / "network.keras")
    loaded = keras.saving.load_model(tmp_path / "network.keras")
    x = rng.standard_normal((2, *network.input_shape[1:])).astype("float32")
    np.testing.assert_allclose(np.asarray(loaded(x)), np.asarray(network(x)), atol=1e-6)
    # Layers built anew get new names; the bounds are those of the same weights.
    claimed = lipdp.gradient_bounds(network).values()
    assert list(lipdp.gradient_bounds(loaded).values()) == pytest.approx(list(claimed))


@pytest.mark.parametrize("name", LARGE)
def test_bounds_take_less_than_a_second(name):
    network = LARGE[name]()
    start = time.process_time()
    lipdp.gradient_bounds(network)
    assert time.process_time() - start < 1.0


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: models.mlp((4,), 3, depth=0), "`depth` must be a positive integer; got 0"),
        (lambda: models.mlp((4,), 3, width=3), "`width` must be a positive multiple of 2; got 3"),
        (lambda: models.mlp((4,), 3, radius=-1.0), "`radius`"),
        (lambda: models.vgg((8, 8, 1), 3, depth=6), r"`depth` must be one of \[5, 8\]; got 6"),
        (lambda: models.vgg((6, 8, 1), 3), "at least 8×8 pixels"),
        (lambda: models.conv_net((8, 8), 3), r"\(height, width, channels\)"),
        (lambda: models.conv_net((8, 8, 1), 3, width=0), "`width`"),
        (lambda: models.resnet((8, 8, 1), 3, depth=7), "`depth` must be 6, 8 or 10; got 7"),
        (lambda: models.resnet((None, 8, 1), 3), r"\(height, width, channels\)"),
    ],
)
def test_bad_arguments(make, words):
    with pytest.raises(ValueError, match=words):
        make()
