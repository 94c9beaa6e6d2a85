"""The batch axis is that of the examples, in every network that is walked; nothing else is read."""

import keras
import numpy as np
import pytest
from keras import ops

import lipdp
from lipdp import layers
from tests.lipdp.helpers import private

pytestmark = pytest.mark.any_backend

K = keras.layers


def sequential(first, *body):
    return keras.Sequential([first, *body, layers.SpectralDense(3)])


def refused(network, words):
    """By the walk, by the model, and as a problem by the check."""
    for function in (lipdp.gradient_bounds, private):
        with pytest.raises(ValueError, match=words):
            function(network)
    found = lipdp.check(network)
    assert not found.private
    assert any(words in said for said in [*found.problems, *(r.problem for r in found.layers)])


@pytest.mark.parametrize("nested", [False, True])
def test_a_network_of_one_batch_size_is_refused(nested):
    network = sequential(keras.Input(batch_shape=(8, 4)), layers.BallProjection(1.0))
    if nested:
        x = keras.Input((4,))
        inner = keras.Sequential([keras.Input(batch_shape=(8, 4)), layers.BallProjection(1.0)])
        network = keras.Model(x, layers.SpectralDense(3)(inner(x)))
    for function in (lipdp.gradient_bounds, private, lipdp.check):
        with pytest.raises(ValueError, match=r"batches of any size: .* Say keras.Input\(\(4,\)\)"):
            function(network)


@pytest.mark.parametrize(
    "make", [K.Softmax, K.ReLU, layers.Centering, layers.BallProjection, K.GaussianNoise]
)
def test_a_layer_that_reads_the_batch_axis_alone_is_refused(make):
    layer = make(1.0) if make in (layers.BallProjection, K.GaussianNoise) else make()
    body = layer, K.Reshape((1,)), layers.BallProjection(1.0)
    refused(sequential(keras.Input(()), *body), "reads a tensor of shape")
    squeezed = sequential(
        keras.Input((4,)), layers.BallProjection(1.0), layers.SpectralDense(1), K.Reshape(()), *body
    )
    with pytest.raises(lipdp.UnknownLayerError, match=r"reads a tensor of shape \(batch,\)"):
        private(squeezed)


def test_numbers_one_an_example_are_taken_once_they_have_an_axis():
    def expanded():
        x = keras.Input(())
        h = layers.BallProjection(1.0)(ops.expand_dims(x, -1))
        return keras.Model(x, layers.SpectralDense(3)(h))

    for network in (
        sequential(keras.Input(()), K.Reshape((1,)), layers.BallProjection(1.0)),
        sequential(keras.Input(()), K.Flatten(), layers.BallProjection(1.0)),
        sequential(keras.Input((), dtype="int32"), layers.Embedding(5, 4)),
        expanded(),
    ):
        model = private(network, sampling=lipdp.FixedSize(8))
        model.fit(np.arange(24) % 5, np.arange(24) % 3, verbose=0)
        assert model.spent(1e-5).steps == 3


def test_an_output_without_an_axis_is_refused():
    x = keras.Input((4,))
    h = layers.SpectralDense(1)(layers.BallProjection(1.0)(x))
    for output in (ops.squeeze(h, -1), h[:, 0], K.Reshape(())(h)):
        network = keras.Model(x, output)
        with pytest.raises(ValueError, match="must give each example an axis"):
            private(network)
        assert any("no axis but the batch" in said for said in lipdp.check(network).problems)


OPERATIONS = {
    "multiply": lambda h, v: h * v,
    "add": lambda h, v: h + v,
    "subtract": lambda h, v: h - v,
    "divide": lambda h, v: h / v,
    "maximum": lambda h, v: ops.maximum(h, v),
    "clip": lambda h, v: ops.clip(h, v, 9.0),
    "where": lambda h, v: ops.where(h > 0.0, h, v),
    "comparison": lambda h, v: ops.where(h > v, h, 0.0),
    "matmul": lambda h, v: ops.matmul(h, keras.Variable(np.eye(3, dtype="float32"))),
    "concatenate": lambda h, v: ops.concatenate([h, keras.Variable(np.ones((1, 3)))], axis=1),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_variable_among_the_operands_is_refused(name):
    x = keras.Input((4,))
    h = layers.SpectralDense(3)(layers.BallProjection(1.0)(x))
    variable = keras.Variable(np.ones(3, "float32"))
    network = keras.Model(x, OPERATIONS[name](h, variable))
    refused(network, "reads a variable, whose")


def test_constants_are_welcome():
    x = keras.Input((4,))
    h = layers.SpectralDense(3)(layers.BallProjection(1.0)(x))
    private(keras.Model(x, ops.maximum(h * np.ones(3, "float32") + 1.0, ops.ones((3,)))))


def test_without_the_check_a_network_of_one_batch_size_mixes_examples(monkeypatch):
    """Mutant: eight examples are taken for the channels of one."""
    monkeypatch.setattr("lipdp.bounds.walk._check_batch_axis", lambda graph: None)
    monkeypatch.setattr("lipdp.bounds.walk._GIVES_AN_AXIS", object)
    body = layers.GroupSort(), K.Reshape((1,)), layers.BallProjection(1.0)
    network = sequential(keras.Input(batch_shape=(8,)), *body)
    assert lipdp.gradient_bounds(network)
    x = np.arange(8.0, dtype="float32")
    other = x.copy()
    other[0] = 50.0
    assert (np.asarray(network(x)) != np.asarray(network(other)))[1:].any()
