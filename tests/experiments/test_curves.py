"""Certified accuracy of trained networks, and the pages of the comparisons."""

from xml.etree import ElementTree

import pytest

from experiments import curves, record, robustness

pytestmark = pytest.mark.any_backend


QUICK = ("--width=8", "--batch_size=45", "--epochs=3", "--attacked=10")


@pytest.mark.parametrize("how", [("--epsilon=8", "--learning_rate=20"), ("--plain",)])
def test_certified_accuracy_falls_with_the_radius_and_holds(run, corners, how, monkeypatch):
    monkeypatch.setattr(robustness, "RADII", (0, 8, 72, 100_000))
    result = run(robustness, "--data=corners.npz", *QUICK, *how, "--out=kept.jsonl")
    assert record.read("kept.jsonl") == [result]
    certified = result["certified_accuracy"]
    assert certified == sorted(certified, reverse=True)
    assert certified[0] >= 0.9 and certified[-1] == 0
    assert result["certified_images_broken"] == 0 and result["attacked_images"] == 10
    attacked = zip(
        result["certified_accuracy_of_attacked"], result["accuracy_under_attack"], strict=True
    )
    assert all(proven <= left for proven, left in attacked)
    assert ("spent" in result) == (how != ("--plain",)) == (result["epsilon"] is not None)
    if how != ("--plain",):
        again = run(robustness, *result["command"].split()[3:])
        assert again["certified_accuracy"] == certified and again["command"] == result["command"]


def test_broken_arguments_are_refused(refused, corners):
    assert "nothing.npz" in refused(robustness, "--data=nothing.npz")
    for bad in ("--network=scattering-linear", "--network=patches-linear", "--attacked=0"):
        assert bad[2:9] in refused(robustness, "--data=corners.npz", bad)


# --- the pages ------------------------------------------------------------------------------------


def write(folder, name, **changes):
    result = {
        "command": "python -m experiments.something --data=mnist.npz",
        "data": {"name": "mnist"},
        "network": "mlp",
        "epsilon": 1.0,
        "seed": 1,
        "evaluated_on": "test set",
        "accuracy": 0.9,
        "radii_in_255ths": [0, 16],
        "certified_accuracy": [0.9, 0.5],
        "certified_accuracy_of_attacked": [0.91, 0.45],
        "accuracy_under_attack": [0.92, 0.6],
        "attacked_images": 1000,
        "certified_images_broken": 0,
    }
    record.append(folder / "results" / f"{name}.jsonl", result | changes)


def test_pages_and_plots_come_from_the_files(run, tmp_path):
    for seed, accuracy in enumerate((0.91, 0.95, 0.9), 1):
        write(tmp_path, "clipping", seed=seed, accuracy=accuracy)
    write(tmp_path, "images", accuracy=0.94)
    write(tmp_path, "images", network="mixer")
    write(tmp_path, "robustness")
    write(tmp_path, "robustness", data={"name": "cifar10"}, epsilon=None)
    run(curves, tmp_path)
    page = (tmp_path / "clipping.md").read_text()
    assert "| MNIST | mlp | 1 | 91.00 (90.00 to 95.00) | 90.00 | 3 / 1 |" in page
    assert "mixer" not in page
    page = (tmp_path / "robustness.md").read_text()
    assert "| MNIST | mlp | 1 | 1 | 90.0 (91.0, 92.0) | 50.0 (45.0, 60.0) |" in page
    assert "| CIFAR-10 | mlp | none | 1 | 90.0 (91.0, 92.0) |" in page and "18.1" in page
    assert "In 4,000 attacks 0 certificates were broken." in page
    pictures = [(tmp_path / f"{name}.svg").read_text() for name in ("clipping", "robustness")]
    for picture, word in zip(pictures, ("DP-SGD", "without noise, certified"), strict=True):
        ElementTree.fromstring(picture)
        assert word in picture
    run(curves, tmp_path)
    assert (tmp_path / "clipping.svg").read_text() == pictures[0]


def test_what_is_no_result_is_refused(refused, tmp_path):
    write(tmp_path, "robustness", evaluated_on="5000 held-out training examples")
    assert "Line 1 of robustness.jsonl was evaluated on 5000" in refused(curves, tmp_path)
    (tmp_path / "results" / "robustness.jsonl").write_text("{")
    assert "Line 1 of robustness.jsonl is no JSON" in refused(curves, tmp_path)
