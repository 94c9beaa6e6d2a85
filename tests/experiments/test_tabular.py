"""Anomalies in tables: what is released, what it costs, what comes out."""

import math

import numpy as np
import pytest

import accountants
from experiments import record, sums, tabular

pytestmark = pytest.mark.any_backend

SETTINGS = tabular.Settings(waves=32, terms=2, steps=10)


@pytest.fixture
def table(rng):
    """Two clusters of very different scales, and a feature that says nothing."""
    y = (np.arange(400) % 5 == 0).astype(np.int32)
    x = rng.normal(size=(400, 3)) * [1.0, 1e4, 1e-3]
    x[y == 1] += [4.0, 3e4, 0.0]
    return x, y


@pytest.mark.parametrize(
    "row", [[0.0, 0.0, 0.0], [1e300, -1e300, 1e-300], [5.0, 5.0, 5.0]], ids=str
)
@pytest.mark.parametrize("label", [0, 1])
def test_one_example_moves_the_counts_by_no_more_than_the_noise_is_for(table, row, label):
    x, y = table
    before = tabular.count(x, y, 4)
    after = tabular.count(np.vstack([x, row]), np.append(y, label), 4)
    moved = np.linalg.norm(after - before)
    assert moved <= math.sqrt(x.shape[1] + 1) + 1e-9
    assert label == 0 or moved == pytest.approx(math.sqrt(x.shape[1] + 1))


def test_a_release_is_paid_for_and_has_the_noise_it_says(tmp_path):
    budget = accountants.Budget(1.0, 1e-5)
    arguments = {"examples": 1000, "budget": budget, "share": 0.1, "seed": 0}
    ledger = tmp_path / "spent.ledger"
    noisy, multiplier = sums.release(np.zeros(20_000), 3.0, ledger=ledger, **arguments)
    assert np.std(noisy) == pytest.approx(3.0 * multiplier, rel=0.02)
    (paid,) = accountants.Ledger(str(ledger)).runs
    assert (paid.noise_multiplier, paid.steps, paid.num_examples) == (multiplier, 1, 1000)
    # Ten of them would be the budget: 1/σ² adds up.
    whole = accountants.epsilon(runs=[paid] * 10, delta=1e-5)
    assert 0.99 < whole <= 1.0
    again, _ = sums.release(np.zeros(3), 3.0, ledger=tmp_path / "other.ledger", **arguments)
    assert np.array_equal(again, noisy[:3])


@pytest.mark.parametrize("name, value", [("share", 0.0), ("share", 1.0), ("sensitivity", -1.0)])
def test_a_release_refuses(tmp_path, name, value):
    arguments = {"sensitivity": 1.0, "share": 0.1} | {name: value}
    with pytest.raises(ValueError, match=name):
        sums.release(
            np.zeros(3),
            examples=10,
            budget=accountants.Budget(1.0, 1e-5),
            ledger=tmp_path / "spent.ledger",
            **arguments,
        )
    assert not (tmp_path / "spent.ledger").exists()


def test_features_follow_the_quantiles_of_any_scale(table):
    x, y = table
    counts, anomalies = tabular.significant(tabular.count(x, y, 4), 3, std=1e-9)
    assert anomalies == y.sum()
    places = tabular.quantiles(x, counts, 4)
    assert places.min() >= 0 and places.max() <= 1
    for feature in range(3):
        order = np.argsort(x[:, feature])
        assert (np.diff(places[order, feature]) >= 0).all()
        assert places[order[200], feature] == pytest.approx(0.5, abs=0.1)


def test_a_feature_without_counts_is_squashed_publicly(table):
    x, y = table
    counts, _ = tabular.significant(tabular.count(x, y, 4), 3, std=1e9)
    assert not counts.any()
    places = tabular.quantiles(x, counts, 4)
    assert places.min() >= 0 and places.max() <= 1 and np.ptp(places[:, 0]) > 0.3


def test_features_of_an_example_do_not_depend_on_others(table):
    x, y = table
    counts, _ = tabular.significant(tabular.count(x, y, 4), 3, std=1.0)
    together = tabular.waves(tabular.quantiles(x, counts, 4), SETTINGS)
    alone = tabular.waves(tabular.quantiles(x[7:8], counts, 4), SETTINGS)
    assert together.shape == (400, 3 * 2 + 32)
    np.testing.assert_allclose(together[7], alone[0], atol=2e-3)


def test_splits_keep_the_labels_and_repeat():
    y = np.array([0] * 90 + [1] * 10)
    inside, outside = tabular.split(y, 3)
    assert (inside ^ outside).all()
    assert outside.sum() == 20 and y[outside].sum() == 2
    assert np.array_equal(outside, tabular.split(y, 3)[1])
    assert not np.array_equal(outside, tabular.split(y, 4)[1])


def test_release_and_training_together_keep_to_the_budget(table):
    x, y = table
    result = tabular.train(x, y, x, y, 3.0, 1e-3, SETTINGS, seed=0)
    assert result["auroc"] > 0.9
    assert 2.9 < result["spent"]["epsilon"] <= 3.0
    assert result["spent"]["relation"] == "add_or_remove_one"
    runs = [
        accountants.TrainingRun(
            result["release"]["noise_multiplier"], accountants.FullBatch(), 400, 1
        ),
        accountants.TrainingRun(
            result["noise_multiplier"], accountants.PoissonSampling(200), 400, 10
        ),
    ]
    assert accountants.epsilon(runs=runs, delta=1e-3) == pytest.approx(result["spent"]["epsilon"])
    assert accountants.epsilon(runs=runs[1:], delta=1e-3) < 2.95
    assert tabular.train(x, y, x, y, 3.0, 1e-3, SETTINGS, seed=0)["auroc"] == result["auroc"]


def test_each_set_of_a_folder_gets_a_line_once(run, table, tmp_path, monkeypatch, capsys):
    x, y = table
    monkeypatch.setattr(tabular, "train", lambda *_: {"auroc": 0.5, "seconds": 1.0})
    for name in ("1_some", "2_more"):
        np.savez(tmp_path / f"{name}.npz", X=x, y=y)
    for printed in ("AUROC 50.0", "has a result already"):
        run(tabular, "--data=.", "--out=results", "--seeds=2")
        assert capsys.readouterr().out.count(printed) == 2
    results = record.read("results.jsonl")
    assert sorted(result["data"]["name"] for result in results) == ["more", "some"]
    assert all(len(result["runs"]) == 2 and result["delta"] == 1e-3 for result in results)
    assert results[0]["trained_on"] == 320 and "--seeds=2" in results[0]["command"]


def test_a_table_is_read(table, tmp_path):
    x, y = table
    path = tmp_path / "3_things.npz"
    np.savez(path, X=x, y=y)
    loaded = tabular.load(path)
    assert np.array_equal(loaded[0], x) and np.array_equal(loaded[1], y)
    assert tabular.name_of(path) == "things"
    assert record.sha256(path) == record.sha256(str(path))
    assert record.delta_of(400) == 1e-3


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"X": np.ones((4, 2))}, "lacks y"),
        ({"X": np.full((4, 2), np.nan), "y": [0, 0, 1, 1]}, "finite"),
        ({"X": np.ones(4), "y": [0, 0, 1, 1]}, "shape"),
        ({"X": np.ones((4, 2)), "y": [0, 0, 1, 2]}, "labels 0 and 1"),
        ({"X": np.ones((4, 2)), "y": [0, 0, 0, 1]}, "two of each"),
        ({"X": np.ones((4, 2)), "y": [0, 1]}, "shape"),
    ],
)
def test_tables_that_are_none_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        tabular.load(tmp_path / "bad.npz")


def test_the_table_and_the_plot_are_made_of_results(run, tmp_path):
    for name, values in (("yeast", [0.6, 0.7, 0.65]), ("Pima", [0.8, 0.81, 0.79])):
        result = {
            "data": {"name": name},
            "examples": 1484,
            "features": 8,
            "anomalies": 0.34,
            "epsilon": 1.0,
            "delta": 1e-4,
            "runs": [{"auroc": value} for value in values],
        }
        record.append(tmp_path / "results.jsonl", result)
    run(tabular, "--out=results", "--table=table.md")
    text = (tmp_path / "table.md").read_text()
    assert "| yeast | 1,484 | 8 | 34.0 % | 1e-04 | 65.0 (60.0–70.0) | 66.8 | 75.1 |" in text
    assert "| Pima* |" in text and text.index("yeast") < text.index("Pima*")
    drawn = (tmp_path / "table.svg").read_bytes()
    run(tabular, "--out=results.jsonl", "--table=table.md")
    assert (tmp_path / "table.svg").read_bytes() == drawn


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--data"),
        (["--data=nowhere.npz"], "nowhere.npz"),
        (["--data=."], "no .npz file"),
        (["--data=.", "extra"], "extra"),
        (["--data=.", "--epsilon=-1"], "epsilon"),
        (["--table=table.md"], "--out"),
        (["--table=table.md", "--out=nowhere"], "nowhere.jsonl"),
    ],
)
def test_commands_that_are_wrong_say_why(refused, arguments, message):
    assert message in refused(tabular, *arguments)
