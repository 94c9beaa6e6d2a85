"""Networks as plain Keras layers: the same outputs, and no need of lipdp."""

import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import ops

import lipdp
from lipdp import layers, serving
from lipdp.autodiff import fused
from lipdp.bounds import UnknownLayerError
from lipdp.bounds.projections import NormBall
from tests.lipdp.layers.test_layers import LAYERS

K = keras.layers


def both(plain, network, x):
    """The outputs of two models."""
    results = fused(lambda x: [keras.tree.flatten(m(x)) for m in (plain, network)])(x)
    return keras.tree.map_structure(ops.convert_to_numpy, results)


def as_loaded(plain):
    """The model as a file gives it back, whose tuples are lists."""
    text = plain.to_json()
    assert "lipdp" not in text
    loaded = keras.models.model_from_json(text)
    loaded.set_weights(plain.get_weights())
    return loaded


def disturb(network, rng):
    """Weights that are not those of the beginning, and in no ball."""
    for v in network.trainable_variables:
        v.assign(ops.convert_to_numpy(v) + 0.3 * rng.standard_normal(v.shape))


def many_layers():
    """One network that holds each configuration of `LAYERS`, each with an input of its own."""
    inputs, found = {}, {}
    for name, (layer, shape) in LAYERS.items():
        key = "".join(c if c.isalnum() else "_" for c in name)
        inputs[key] = keras.Input(shape, name=key)
        copy = type(layer).from_config({**layer.get_config(), "name": f"layer_{key}"})
        found[key] = copy(inputs[key])
    x, y = keras.Input((4,), name="gate_x"), keras.Input((4,), name="gate_y")
    inputs |= {"gate_x": x, "gate_y": y}
    found["gate"] = layers.Gate(per_channel=True, name="layer_gate")([x, y])
    return keras.Model(inputs, found)


def text_network():
    tokens = keras.Input((6,), dtype="int32")
    bag = layers.EmbeddingBag(9, 4, mask_zero=True)(tokens)
    h = layers.Embedding(9, 4, mask_zero=True)(tokens)
    h = layers.PositionalEmbedding()(h)
    h = layers.MaxMin()(h)
    h = layers.LipschitzAttention(2, 3, temperature=0.2)(h)
    state = layers.LipschitzRNN(4)(h)
    mean = layers.MaskedAveragePooling1D()(h)
    other = K.LSTM(4)(K.Embedding(13, 4, mask_zero=True)(tokens))
    return keras.Model(tokens, K.Concatenate()([bag, state, mean, other]))


def test_every_layer_computes_the_same(rng):
    network = many_layers()
    disturb(network, rng)
    x = {
        name: 2 * rng.standard_normal((3, *t.shape[1:])).astype("float32")
        for name, t in network.input.items()
    }
    x["ball"][0] *= 1e30  # squares overflow
    plain = as_loaded(lipdp.to_keras(network))
    found, expected = both(plain, network, x)
    for name, a, b in zip(network.output_names, found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5, err_msg=name)


@pytest.mark.any_backend
def test_every_layer_has_a_conversion():
    known = {cls for cls in vars(layers).values() if isinstance(cls, type)}
    assert set(serving._SINGLE) | set(serving._SUBGRAPHS) == known


def test_masks(rng):
    network = text_network()
    disturb(network, rng)
    tokens = np.array([[1, 2, 0, 0, 0, 0], [0, 3, 4, 0, 8, 1], [0] * 6, [12, 1, 5, 5, 5, 5]])
    plain = as_loaded(lipdp.to_keras(network))
    for a, b in zip(*both(plain, network, tokens.astype("int32")), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_models_within_the_network(rng):
    """Layers that are called twice stay one; constraints and operations come along or not."""
    shared = layers.SpectralDense(4, name="shared")
    inner = keras.Sequential([keras.Input((4,)), shared, layers.MaxMin()], name="inner")
    x = keras.Input((4,))
    outer = K.Dense(4, kernel_constraint=NormBall(1.0), name="shared")(inner(x) + inner(2.0 * x))
    network = keras.Model(x, K.Normalization(mean=[1.0] * 4, variance=[2.0] * 4)(outer))
    plain = lipdp.to_keras(
        lipdp.PrivateModel(
            network,
            noise_multiplier=1.0,
            sampling=lipdp.PoissonSampling(2),
            clip=lipdp.PerLayerClip(),
        )
    )
    assert "lipdp" not in plain.to_json()
    assert [v.name for v in plain.layers if isinstance(v, K.Dense)] == ["inner_shared", "shared"]
    values = rng.standard_normal((3, 4)).astype("float32")
    for a, b in zip(*both(plain, network, values), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    plain.set_weights([np.zeros_like(w) for w in plain.get_weights()])
    assert np.any(network.get_weights()[0])  # no weight is shared


# Without lipdp on the path, and with a finder that hides it where it is installed.
LOADING = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "lipdp":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Hidden())
import keras
import numpy as np

try:
    keras.saving.load_model(sys.argv[4])
except TypeError as error:  # it is long, and names the package to import
    assert "Could not locate class" in str(error) and "'lipdp>" in str(error)
else:
    raise AssertionError("a file with layers of lipdp was loaded")
model = keras.saving.load_model(sys.argv[1])
x = dict(np.load(sys.argv[2]))
y = model.predict(x, verbose=0)
np.savez(sys.argv[3], **{name: y[name] for name in y})
assert not any(name.partition(".")[0] == "lipdp" for name in sys.modules)
"""


@pytest.mark.any_backend
def test_loads_without_lipdp(tmp_path, rng):
    network = many_layers()
    disturb(network, rng)
    x = {
        name: rng.standard_normal((3, *t.shape[1:])).astype("float32")
        for name, t in network.input.items()
    }
    lipdp.to_keras(network).save(tmp_path / "plain.keras")
    network.save(tmp_path / "own.keras")
    np.savez(tmp_path / "x.npz", **x)
    names = ("plain.keras", "x.npz", "y.npz", "own.keras")
    files = [str(tmp_path / name) for name in names]
    subprocess.run([sys.executable, "-c", LOADING, *files], check=True, cwd=tmp_path)
    found, expected = np.load(tmp_path / "y.npz"), network(x)
    for name in expected:
        np.testing.assert_allclose(
            found[name], ops.convert_to_numpy(expected[name]), atol=1e-5, rtol=1e-5, err_msg=name
        )


@pytest.mark.any_backend
def test_onnx(tmp_path, rng):
    """As docs/how_to_serving.md says; where the packages are installed."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("tf2onnx" if keras.backend.backend() == "tensorflow" else "jax2onnx")
    network = lipdp.models.mlp((6,), 3, width=4)
    path = str(tmp_path / "plain.onnx")
    lipdp.to_keras(network).export(path, format="onnx", verbose=False)
    x = rng.standard_normal((3, 6)).astype("float32")
    session = runtime.InferenceSession(path)
    (found,) = session.run(None, {session.get_inputs()[0].name: x})
    np.testing.assert_allclose(found, ops.convert_to_numpy(network(x)), atol=1e-5)


class Own(K.Layer):
    def call(self, x):
        return x


def own(x):
    return x


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (Own(name="mine"), "Layer 'mine' \\(Own\\) is neither Keras' nor lipdp's"),
        (K.Lambda(own, name="mine"), "Layer 'mine' \\(Lambda\\) holds"),
        (K.Dense(2, activation=own, name="mine"), "Layer 'mine' \\(Dense\\) holds own"),
        (
            layers.SpectralDense(2, activation=own, name="mine"),
            "'mine' \\(SpectralDense\\) holds own",
        ),
        (K.TimeDistributed(layers.SpectralDense(2), name="mine"), "'mine' .* holds lipdp>Spectral"),
    ],
    ids=["layer", "lambda", "activation", "activation of lipdp", "wrapper"],
)
def test_what_cannot_be_converted_is_named(layer, said):
    network = keras.Sequential([keras.Input((2, 3)), layer])
    with pytest.raises(UnknownLayerError, match=said):
        lipdp.to_keras(network)


@pytest.mark.any_backend
def test_what_has_no_graph_is_refused():
    class Subclassed(keras.Model):
        pass

    with pytest.raises(TypeError, match="got Subclassed"):
        lipdp.to_keras(Subclassed())
    with pytest.raises(ValueError, match="not built"):
        lipdp.to_keras(keras.Sequential([layers.SpectralDense(2)]))


@pytest.mark.any_backend
def test_a_wrong_conversion_is_noticed(monkeypatch):
    monkeypatch.setitem(serving._SUBGRAPHS, layers.MaxMin, lambda layer, x: ops.relu(x))
    with pytest.raises(ValueError, match="differ by up to"):
        lipdp.to_keras(keras.Sequential([keras.Input((4,)), layers.MaxMin()]))
