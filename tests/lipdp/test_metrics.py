"""Metrics of Keras that read probabilities are right where the loss takes logits."""

import keras
import numpy as np
import pytest
from keras import ops

import lipdp
from lipdp import layers, losses
from tests.lipdp.helpers import EAGERLY, private

ROWS = 40


def inputs(classes):
    generator = np.random.default_rng(1)
    return generator.normal(size=(ROWS, classes)).astype("float32")


def network(classes):
    """Gives its inputs, which lie in its ball, as logits."""
    dense = layers.SpectralDense(classes, use_bias=False)
    made = keras.Sequential([keras.Input((classes,)), layers.BallProjection(10.0), dense])
    dense.kernel.assign(np.eye(classes))
    return made


def shown(loss, metrics, x, y, **kwargs):
    """What a model says of its data, in `evaluate` and, without noise or step, in `fit`."""
    model = lipdp.PrivateModel(
        network(x.shape[1]), sampling=lipdp.FullBatch(), noise_multiplier=0.0, clip=1.0
    )
    model.compile(
        keras.optimizers.SGD(0.0), loss=loss, metrics=metrics, run_eagerly=EAGERLY, **kwargs
    )
    history = model.fit(x, y, verbose=0).history
    evaluated = model.evaluate(x, y, verbose=0, return_dict=True)
    for name, value in evaluated.items():
        np.testing.assert_allclose(value, history[name][-1], rtol=1e-4, atol=1e-6)
    return evaluated


def by_hand(metric, y, probabilities):
    metric.update_state(y, probabilities)
    return ops.convert_to_numpy(metric.result())


M = keras.metrics
BINARY = [
    M.AUC,
    M.BinaryAccuracy,
    M.BinaryCrossentropy,
    lambda: M.BinaryIoU([0, 1], 0.7),
    M.FalseNegatives,
    M.FalsePositives,
    lambda: M.FBetaScore(average="micro", threshold=0.6),
    lambda: M.F1Score(average="micro", threshold=0.6),
    M.Precision,
    lambda: M.Precision(thresholds=[0.3, 0.6]),
    lambda: M.PrecisionAtRecall(0.5),
    M.Recall,
    lambda: M.RecallAtPrecision(0.5),
    lambda: M.SensitivityAtSpecificity(0.5),
    lambda: M.SpecificityAtSensitivity(0.5),
    M.TrueNegatives,
    M.TruePositives,
    lambda: M.MeanMetricWrapper(M.binary_accuracy, "binary_accuracy"),
]


def test_metrics_of_binary_logits():
    x = inputs(1)
    y = (x + inputs(2)[:, 1:] > 0).astype("float32")
    for temperature in (1.0, 5.0):
        loss = losses.BinaryCrossentropy(temperature=temperature)
        metrics = [make() for make in BINARY]
        for i, metric in enumerate(metrics):
            metric.name = f"m{i}"
        found = shown(loss, metrics, x, y)
        for i, make in enumerate(BINARY):
            wanted = by_hand(make(), y, 1 / (1 + np.exp(-temperature * x)))
            np.testing.assert_allclose(found[f"m{i}"], wanted, rtol=1e-4)


MULTICLASS = [
    M.AUC,
    M.CategoricalAccuracy,
    M.CategoricalCrossentropy,
    lambda: M.F1Score(average="macro"),
    M.KLDivergence,
    M.Precision,
    M.Recall,
    lambda: M.TopKCategoricalAccuracy(2),
    M.MeanSquaredError,
]


def test_metrics_of_multiclass_logits():
    x = 3 * inputs(4)
    y = np.eye(4, dtype="float32")[np.argmax(x + 3 * inputs(4)[::-1], axis=1)]
    metrics = [make() for make in MULTICLASS]
    for i, metric in enumerate(metrics):
        metric.name = f"m{i}"
    found = shown("categorical_crossentropy", metrics, x, y)
    exponentials = np.exp(x)
    probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
    for i, make in enumerate(MULTICLASS):
        read = x if make is M.MeanSquaredError else probabilities
        np.testing.assert_allclose(found[f"m{i}"], by_hand(make(), y, read), rtol=1e-3)


@pytest.mark.parametrize(
    "loss",
    ["binary_crossentropy", losses.BinaryKR(0.5), losses.BinaryHKR(1.0, 0.5)],
    ids=["entropy", "kr", "hkr"],
)
def test_names_of_metrics(loss):
    x = inputs(1)
    y = (x + inputs(2)[:, 1:] > 0).astype("float32")
    names = ["accuracy", "binary_accuracy", "precision", "recall"]
    found = shown(loss, names, x, y, weighted_metrics=["auc"], max_sample_weight=1.0)
    said, true = x > 0, y > 0
    right = np.mean(said == true)
    wanted = [right, right, np.mean(true[said]), np.mean(said[true])]
    np.testing.assert_allclose([found[name] for name in names], wanted, rtol=1e-5)
    assert found["auc"] > 0.6


@pytest.mark.any_backend
def test_metrics_that_were_made_for_logits_get_them():
    x = inputs(1)
    y = (x + inputs(2)[:, 1:] > 0).astype("float32")
    metrics = [
        M.BinaryAccuracy(threshold=0.0, name="a"),
        M.Precision(thresholds=0, name="b"),
        M.AUC(from_logits=True, name="c"),
        M.BinaryCrossentropy(from_logits=True, name="d"),
        M.BinaryAccuracy(threshold=1.5, name="e"),
    ]
    made = [type(m).from_config(m.get_config()) for m in metrics]
    found = shown("binary_crossentropy", metrics, x, y)
    for metric in made:
        np.testing.assert_allclose(found[metric.name], by_hand(metric, y, x), rtol=1e-4)


class OwnAccuracy(M.BinaryAccuracy):
    """What a subclass reads is its own affair."""


@pytest.mark.any_backend
def test_other_metrics_and_losses_get_what_the_network_gives():
    x = inputs(1)
    y = (x + inputs(2)[:, 1:] > 0).astype("float32")
    own = OwnAccuracy(name="own", threshold=0.9)
    found = shown("binary_crossentropy", [own, "mse"], x, y)
    np.testing.assert_allclose(found["own"], np.mean((x > 0.9) == (y > 0)), rtol=1e-5)
    np.testing.assert_allclose(found["mse"], np.mean((x - y) ** 2), rtol=1e-4)
    found = shown("mse", [M.BinaryAccuracy(name="a")], x, y)
    np.testing.assert_allclose(found["a"], np.mean((x > 0.5) == (y > 0)), rtol=1e-5)


@pytest.mark.any_backend
def test_a_metric_that_the_user_holds_has_the_result():
    metric = M.AUC()
    model = private(network(1), "binary_crossentropy", compile={"metrics": [metric]})
    x = inputs(1)
    model.evaluate(x, x > 0, verbose=0)
    assert float(metric.result()) == pytest.approx(1.0)
    assert len(model.evaluate(x, x > 0, verbose=0)) == 2  # each is there once
