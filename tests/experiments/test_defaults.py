"""The defaults: both ways learn digits, and results make a table."""

import json

import pytest

from experiments import defaults, digits

pytestmark = pytest.mark.any_backend


@pytest.mark.parametrize("name", ["linear", "certified linear"])
def test_digits_are_learnt_within_the_budget(name):
    settings = defaults.Settings(epochs=10)
    result = defaults.train(*digits.load(), name, 8.0, 1e-3, settings, seed=0)
    assert 7.8 < result["spent"]["epsilon"] <= 8.0
    assert result["accuracy"] > 0.3


def test_results_make_a_table(run, refused, tmp_path):
    arguments = ("--data=digits", "--epochs=1", "--examples=100", "--seeds=1", "--out=kept.jsonl")
    run(defaults, *arguments, "--validation=50")
    run(defaults, *arguments, "--validation=50", "--rate=3", "--network=certified linear")
    assert "already" in refused(defaults, *arguments, "--validation=50")
    assert "below 1437" in refused(defaults, *arguments, "--validation=1437")
    run(defaults, "--out=kept.jsonl", "--table=table.md")
    rows = (tmp_path / "table.md").read_text().splitlines()
    kept = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and "| digits | certified linear | 100 | 3 | 3 | 50 training" in rows[2]
    assert kept[0]["runs"][0]["spent"]["epsilon"] <= 3 and kept[0]["trained_on"] == 100
