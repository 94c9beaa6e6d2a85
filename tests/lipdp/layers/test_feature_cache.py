"""Features on disk: computed once, and again where the file is stale or torn."""

import os

import keras
import numpy as np
import pytest
from keras import ops

from lipdp import layers
from lipdp.layers import Scattering2D, cached_features, feature_cache

pytestmark = pytest.mark.any_backend


@pytest.fixture
def computed(monkeypatch):
    """How often features were computed, as the length of a list."""
    calls, compute = [], feature_cache._compute

    def counted(*arguments):
        calls.append(arguments)
        return compute(*arguments)

    monkeypatch.setattr(feature_cache, "_compute", counted)
    return calls


def images(rng, examples=5):
    return rng.standard_normal((examples, 6, 6, 1)).astype("float32")


def cached(x, path, network=None, **kwargs):
    network = network or Scattering2D(J=1, L=2)
    return cached_features(network, x, path, progress=False, **kwargs)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8])
def test_computed_once(batch_size, tmp_path, rng, computed):
    x, path = images(rng), tmp_path / "features.npy"
    features = cached(x, path, batch_size=batch_size)
    expected = ops.convert_to_numpy(Scattering2D(J=1, L=2)(x))
    np.testing.assert_allclose(features, expected, atol=1e-6)
    assert isinstance(features, np.memmap) and not features.flags.writeable
    again = cached(x.copy(), path, batch_size=3)  # of another layer, of another name
    np.testing.assert_array_equal(again, features)
    assert len(computed) == 1 and os.listdir(tmp_path) == ["features.npy"]
    np.testing.assert_array_equal(np.load(path), features)


def dense(value):
    layer = keras.layers.Dense(2, kernel_initializer=keras.initializers.Constant(value))
    return keras.Sequential([keras.Input((6, 6, 1)), layer], name="dense")


CHANGES = {
    "data": lambda x: (x + 1e-6, Scattering2D(J=1, L=2)),
    "dtype": lambda x: (x.astype("float64"), Scattering2D(J=1, L=2)),
    "fewer": lambda x: (x[:-1], Scattering2D(J=1, L=2)),
    "configuration": lambda x: (x, Scattering2D(J=1, L=2, padding="reflect")),
    "weights": lambda x: (x, dense(2.0)),
    "layer": lambda x: (x, layers.Centering()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_stale(change, tmp_path, rng, computed):
    x, path = images(rng), tmp_path / "features.npy"
    cached(x, path, dense(1.0) if change == "weights" else None)
    x, network = CHANGES[change](x)
    found = cached(x, path, network)
    assert len(computed) == 2
    expected = ops.convert_to_numpy(network(x.astype("float32")))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_stale_after_another_version(tmp_path, rng, computed, monkeypatch):
    x, path = images(rng), tmp_path / "features.npy"
    cached(x, path)
    monkeypatch.setattr(feature_cache, "__version__", "0.0.0")
    cached(x, path)
    assert len(computed) == 2


def test_unbuilt_layers_with_random_weights(tmp_path, rng, computed):
    """Their weights are drawn when they are built, and belong to the key."""
    x, path = images(rng), tmp_path / "features.npy"
    first = np.array(cached(x, path, keras.layers.Dense(3)))
    second = np.array(cached(x, path, keras.layers.Dense(3)))
    assert len(computed) == 2 and np.abs(first - second).max() > 1e-3


@pytest.mark.parametrize("size", [0, 10, 200, -64, -1])
def test_torn(size, tmp_path, rng, computed):
    x, path = images(rng), tmp_path / "features.npy"
    features = np.array(cached(x, path))
    content = path.read_bytes()
    path.write_bytes(content[:size])
    np.testing.assert_array_equal(cached(x, path), features)
    assert len(computed) == 2 and path.read_bytes() == content


def test_interrupted(tmp_path, rng):
    """A failure leaves the old file and nothing else."""
    x, path = images(rng), tmp_path / "features.npy"
    features = np.array(cached(x, path))
    broken = x.copy()
    broken[3, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="not finite in the rows from 2 to 4"):
        cached(broken, path, batch_size=2)
    assert os.listdir(tmp_path) == ["features.npy"]
    np.testing.assert_array_equal(cached(x, path), features)


def test_progress(tmp_path, rng, capsys):
    x, path = images(rng), tmp_path / "features.npy"
    cached_features(Scattering2D(J=1, L=2), x, path, batch_size=2)
    assert "3/3" in capsys.readouterr().out
    cached_features(Scattering2D(J=1, L=2), x, path, batch_size=2)
    assert not capsys.readouterr().out


def test_integers_and_models_of_integers(tmp_path, rng):
    x = rng.integers(0, 9, (4, 3))
    network = keras.Sequential([keras.Input((3,), dtype="int32"), keras.layers.Embedding(9, 2)])
    found = cached(x, tmp_path / "embedded.npy", network)
    np.testing.assert_allclose(found, ops.convert_to_numpy(network(x)), atol=1e-6)
    pixels = rng.integers(0, 255, (4, 6, 6, 1)).astype("uint8")
    found = cached(pixels, tmp_path / "pixels.npy", keras.layers.Rescaling(1 / 255))
    np.testing.assert_allclose(found, pixels / 255, atol=1e-6)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"network": lambda x: x}, TypeError, "`network` must be a Keras layer or model"),
        ({"x": np.array(["a"])}, TypeError, "`x` must hold real numbers"),
        ({"x": np.zeros((0, 6, 6, 1))}, ValueError, "at least one example"),
        ({"x": np.float32(1)}, ValueError, "at least one example"),
        ({"batch_size": 0}, ValueError, "`batch_size` must be an integer of at least 1; got 0"),
        ({"batch_size": 2.0}, TypeError, "`batch_size` must be an integer of at least 1; got 2.0"),
        ({"path": "/nowhere/at/all/x.npy"}, FileNotFoundError, "does not exist"),
    ],
)
def test_refused(arguments, error, message, tmp_path, rng):
    given = {"network": Scattering2D(J=1), "x": images(rng), "path": tmp_path / "x.npy"}
    with pytest.raises(error, match=message):
        cached_features(**{**given, **arguments})
    assert not os.listdir(tmp_path)


def test_refuses_several_outputs(tmp_path, rng):
    entry = keras.Input((6, 6, 1))
    network = keras.Model(entry, [entry + 1, entry + 2])
    with pytest.raises(ValueError, match="one output"):
        cached(images(rng), tmp_path / "x.npy", network)
