"""The clipping baseline: its sums are those of clipped per-example gradients."""

import dataclasses

import keras
import numpy as np
import pytest
from keras import ops

from experiments import dpsgd, record
from lipdp.autodiff import vjp

pytestmark = pytest.mark.any_backend

SETTINGS = dpsgd.Settings(width=4)


def gradients(network, values, x, y):
    """Gradients of the summed cross-entropy, with respect to all weights: the plain way."""

    def logits(*values):
        with keras.StatelessScope(zip(network.trainable_variables, values, strict=True)):
            return [network(x)]

    def cotangents(outputs):
        return [ops.softmax(outputs[0]) - ops.one_hot(y, outputs[0].shape[-1])]

    return [np.asarray(g) for g in vjp(logits, values, cotangents)[1]]


@pytest.fixture(params=("mlp", "conv_net"))
def case(request, rng):
    network = dpsgd.build_network(request.param, (8, 8, 2), 3, SETTINGS)
    for variable in network.trainable_variables:
        variable.assign(rng.normal(size=variable.shape) / 2)
    values = [ops.convert_to_tensor(v) for v in network.trainable_variables]
    x = ops.convert_to_tensor(rng.uniform(0, 255, size=(6, 8, 8, 2)).astype("float32"))
    return network, values, x, np.array([0, 1, 2, 0, 1, 2])


def test_without_a_clip_it_is_the_plain_sum(case):
    network, values, x, y = case
    sums, _ = dpsgd.clipped_sums(network, values, x, y, np.ones(6, "float32"), np.inf)
    for found, expected in zip(sums, gradients(network, values, x, y), strict=True):
        np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-4, atol=1e-5)


def test_each_example_is_clipped_as_by_brute_force(case):
    network, values, x, y = case
    mask = np.array([1, 1, 0, 1, 1, 1], "float32")
    each = [gradients(network, values, x[i : i + 1], y[i : i + 1]) for i in range(6)]
    expected = np.array([np.sqrt(sum(np.sum(g**2) for g in of)) for of in each])
    clip = float(np.median(expected))
    sums, norms = dpsgd.clipped_sums(network, values, x, y, mask, clip)
    np.testing.assert_allclose(np.asarray(norms), expected, rtol=1e-4)
    scales = mask * np.minimum(1.0, clip / expected)
    assert 0 < (scales < 1).sum() and (scales * expected <= clip * (1 + 1e-6)).all()
    for index, found in enumerate(sums):
        total = sum(s * of[index] for s, of in zip(scales, each, strict=True))
        np.testing.assert_allclose(np.asarray(found), total, rtol=1e-4, atol=1e-5)
    # One example alone moves the sum by the clip at most.
    for i in range(6):
        alone = np.eye(6, dtype="float32")[i]
        sums, _ = dpsgd.clipped_sums(network, values, x, y, alone, clip)
        norm = np.sqrt(sum(np.sum(np.asarray(s) ** 2) for s in sums))
        assert norm <= clip * (1 + 1e-5)


# --- the runner -----------------------------------------------------------------------------------


QUICK = ("--epsilon=8", "--batch_size=45", "--epochs=4", "--width=8", "--learning_rate=4")


def test_a_run_learns_and_says_how_to_run_it_again(run, refused, corners):
    result = run(dpsgd, "--data=corners.npz", *QUICK, "--out=kept.jsonl")
    assert record.read("kept.jsonl") == [result] and result["method"] == "clipping"
    assert result["accuracy"] >= 0.9 and result["spent"]["epsilon"] <= 8
    assert result["sampling"] == {"scheme": "poisson", "batch_size": 45}
    assert result["settings"] == dataclasses.asdict(
        dpsgd.Settings(width=8, batch_size=45, epochs=4, learning_rate=4.0)
    )
    again = run(dpsgd, *result["command"].split()[3:])
    assert again["accuracy"] == result["accuracy"] and again["command"] == result["command"]
    said = refused(dpsgd, *result["command"].split()[3:], "--out=kept.jsonl")
    assert "has this run already" in said


def test_a_linear_layer_on_features_is_the_network_of_the_private_runs(run, corners):
    features = ("--network=scattering-linear", "--learning_rate=50")
    result = run(dpsgd, "--data=corners.npz", *QUICK, *features)
    assert result["weights"] == 81 * 2 * 2 * 2 and result["accuracy"] >= 0.9


def test_bad_arguments_are_refused(refused, corners):
    assert "nothing.npz" in refused(dpsgd, "--data=nothing.npz")
    assert "from 1 to 89" in refused(dpsgd, "--data=corners.npz", "--validation=90")
    for bad in ("--network=lenet", "--epsilon=0", "--clip=-1", "--epochs=0"):
        assert bad[2:6] in refused(dpsgd, "--data=corners.npz", bad)
