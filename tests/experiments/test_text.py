"""Sentiment of reviews: bags of words, their weights, both networks."""

import math

import numpy as np
import pytest

from experiments import record, text

pytestmark = pytest.mark.any_backend


@pytest.fixture
def data(rng):
    """Reviews of 12 tokens out of 40; the first words are good, the next ones bad."""
    y = rng.integers(0, 2, 600).astype(np.int32)
    x = rng.integers(13, 40, (600, 12)).astype(np.int32)
    x[:, :4] = rng.integers(3, 8, (600, 4)) + 5 * (1 - y[:, None])
    return (x[:400], y[:400]), (x[400:], y[400:]), 40


def test_one_review_moves_the_frequencies_by_the_root_of_its_length():
    tokens = np.array([[0, 1, 2, 3, 3, 4], [5, 6, 7, 8, 9, 10]])
    bag = text.bags(tokens, 12)
    assert bag.shape == (2, 9) and bag.sum(axis=1).tolist() == [2, 6]
    assert np.linalg.norm(bag, axis=1).max() <= math.sqrt(6) + 1e-3


def test_frequent_words_weigh_less_and_noise_weighs_nothing_special():
    weights = text.weights_of(np.array([10_000.0, 400.0, 20.0, -50.0]), std=50.0, power=0.5)
    np.testing.assert_allclose(weights, [0.01, 0.05, 0.1, 0.1])


@pytest.mark.parametrize("name", text.NETWORKS)
def test_both_networks_learn_within_the_budget(data, name):
    settings = text.Settings(**text.CHANGES[name] | {"steps": 15, "batch_size": 200, "width": 4})
    result = text.train(data, name, 8.0, 1e-3, settings, seed=0)
    assert 7.8 < result["spent"]["epsilon"] <= 8.0
    assert (result["release"] is None) == (name == "embedding")
    assert result["accuracy"] > (0.9 if name == "bag" else 0.5)


def test_a_file_is_read(data, tmp_path):
    (x, y), (x_test, y_test), _ = data
    arrays = {"x_train": x.astype("uint16"), "y_train": y, "x_test": x_test, "y_test": y_test}
    np.savez(tmp_path / "reviews.npz", **arrays)
    assert text.load(tmp_path / "reviews.npz")[2] == int(x.max()) + 1
    np.savez(tmp_path / "reviews.npz", words=np.zeros(50, "S3"), **arrays)
    read = text.load(tmp_path / "reviews.npz")
    assert read[2] == 50 and np.array_equal(read[0][0], x)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"y_test": None}, "lacks y_test"),
        ({"x_train": np.ones((4, 3))}, "token ids"),
        ({"x_train": np.full((4, 3), -1)}, "token ids"),
        ({"y_train": np.array([0, 1, 2, 1])}, "labels 0 and 1"),
        ({"y_train": np.array([0, 1])}, "labels 0 and 1"),
        ({"words": np.zeros(3, "S3")}, "3 words"),
    ],
)
def test_files_that_are_none_are_refused(tmp_path, change, message):
    arrays = {
        "x_train": np.full((4, 3), 5),
        "y_train": np.array([0, 1, 0, 1]),
        "x_test": np.full((2, 3), 5),
        "y_test": np.array([0, 1]),
    } | change
    np.savez(tmp_path / "bad.npz", **{k: v for k, v in arrays.items() if v is not None})
    with pytest.raises(ValueError, match=message):
        text.load(tmp_path / "bad.npz")


def test_the_table_is_made_of_results(run, tmp_path):
    for epsilon in (1.0, 3.0):
        runs = [{"accuracy": 0.8}, {"accuracy": 0.82}, {"accuracy": 0.81}]
        result = {"network": "bag", "epsilon": epsilon, "delta": 1e-5, "runs": runs}
        record.append(tmp_path / "kept.jsonl", result)
    run(text, "--out=kept.jsonl", "--table=text.md")
    said = (tmp_path / "text.md").read_text()
    assert "| bag | 1 | 1e-05 | 3 | 81.0 (80.0–82.0) |" in said
    assert (tmp_path / "text.svg").exists()
