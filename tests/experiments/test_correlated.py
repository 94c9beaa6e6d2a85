"""The figure of correlated noise."""

import json

import pytest

from experiments import correlated

pytestmark = pytest.mark.any_backend


def test_gains_are_over_independent_noise_and_drawn(run, tmp_path):
    settings = ("--num_examples=400", "--batch_size=20", "--epochs=2", "--epsilons=8")
    run(correlated, *settings, "--bands=1,4", "--out=gains.json", "--plot=gains.svg")
    found = json.loads((tmp_path / "gains.json").read_text())
    assert found["steps"] == 40
    curve = found["curves"]["8"]
    assert curve["1"] == pytest.approx(1.0, abs=2e-3)  # one band is independent noise
    assert 0.3 < curve["4"] < 1.0 and 0.3 < curve["whole run"] < 2.0
    assert "</svg>" in (tmp_path / "gains.svg").read_text()
