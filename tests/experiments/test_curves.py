"""Certified accuracy of trained networks, and the pages of the comparisons."""

import json
from xml.etree import ElementTree

import numpy as np
import pytest
from absl import app, flags

from experiments import curves, robustness

pytestmark = pytest.mark.any_backend


@pytest.fixture
def file(tmp_path, rng):
    """Squares in one of two corners, 90 to train on and 30 to test on."""
    arrays = {}
    for part, count in (("train", 90), ("test", 30)):
        y = rng.integers(2, size=count).astype("uint8")
        x = rng.integers(30, size=(count, 8, 8)).astype("uint8")
        x[y == 0, :4, :4] += 200
        x[y == 1, 4:, 4:] += 200
        arrays |= {f"x_{part}": x, f"y_{part}": y}
    path = tmp_path / "corners.npz"
    np.savez(path, **arrays)
    return path


def run(*arguments):
    values = flags.FlagValues()
    robustness.define_flags(values)
    values(["robustness", *arguments])
    return robustness.run(values)


QUICK = ("--width=8", "--batch_size=45", "--epochs=3", "--attacked=10")


@pytest.mark.parametrize("how", [("--epsilon=8", "--learning_rate=20"), ("--plain",)])
def test_certified_accuracy_falls_with_the_radius_and_holds(file, tmp_path, how, monkeypatch):
    monkeypatch.setattr(robustness, "RADII", (0, 8, 72, 100_000))
    out = tmp_path / "result.json"
    result = run(f"--data={file}", *QUICK, *how, f"--out={out}")
    assert json.loads(out.read_text()) == result
    certified = result["certified_accuracy"]
    assert certified == sorted(certified, reverse=True)
    assert certified[0] >= 0.9 and certified[-1] == 0
    assert result["certified_images_broken"] == 0 and result["attacked_images"] == 10
    attacked = zip(
        result["certified_accuracy_of_attacked"], result["accuracy_under_attack"], strict=True
    )
    assert all(proven <= left for proven, left in attacked)
    assert ("spent" in result) == (how != ("--plain",)) == (result["epsilon"] is not None)
    again = run(f"--data={file}", *result["command"].split()[4:])
    assert again["certified_accuracy"] == certified and again["command"] == result["command"]


def test_broken_arguments_are_refused(file, tmp_path):
    with pytest.raises(app.UsageError, match="nothing.npz"):
        run(f"--data={tmp_path}/nothing.npz")
    with pytest.raises(app.UsageError, match="exists already"):
        run(f"--data={file}", f"--out={file}")
    for bad in ("--network=scattering-linear", "--epsilon=0", "--width=0"):
        with pytest.raises(flags.Error):
            run(f"--data={file}", bad)


# --- the pages ------------------------------------------------------------------------------------


def write(folder, name, **changes):
    folder.mkdir(exist_ok=True)
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
    (folder / f"{name}.json").write_text(json.dumps(result | changes))


def test_pages_and_plots_come_from_the_files(tmp_path):
    for seed, accuracy in enumerate((0.91, 0.95, 0.9), 1):
        write(tmp_path / "clipping", f"a{seed}", seed=seed, accuracy=accuracy)
    write(tmp_path / "results", "a", accuracy=0.94)
    write(tmp_path / "results", "b", network="mixer")
    write(tmp_path / "robustness", "a")
    write(tmp_path / "robustness", "b", data={"name": "cifar10"}, epsilon=None)
    curves.main(["curves", str(tmp_path)])
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
    curves.main(["curves", str(tmp_path)])
    assert (tmp_path / "clipping.svg").read_text() == pictures[0]


def test_what_is_no_result_is_refused(tmp_path):
    write(tmp_path / "robustness", "a", evaluated_on="5000 held-out training examples")
    with pytest.raises(app.UsageError, match="was evaluated on 5000"):
        curves.main(["curves", str(tmp_path)])
    (tmp_path / "robustness" / "a.json").write_text("{")
    with pytest.raises(app.UsageError, match="a.json is no JSON"):
        curves.main(["curves", str(tmp_path)])
