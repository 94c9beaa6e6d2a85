"""The table and the plot of results."""

from xml.etree import ElementTree

import pytest

from experiments import record, results

pytestmark = pytest.mark.any_backend


def write(folder, **changes):
    result = {
        "command": "python -m experiments.images --data=mnist.npz",
        "data": {"name": "mnist", "sha256": "0"},
        "network": "mixer",
        "epsilon": 1.0,
        "delta": 1e-5,
        "seed": 1,
        "evaluated_on": "test set",
        "accuracy": 0.9,
        "training_seconds": 10.0,
        "settings": {"epochs": 1},
    }
    record.append(folder / "images.jsonl", result | changes)


def test_table_and_plot_come_from_the_files(run, tmp_path):
    folder = tmp_path / "runs"
    for seed, accuracy in enumerate((0.91, 0.95, 0.9), 1):
        write(folder, seed=seed, accuracy=accuracy)
    write(folder, epsilon=3.0, accuracy=0.97)
    write(folder, data={"name": "unknown", "sha256": "1"})
    (folder / "notes.md").write_text("What is left.\n")
    run(results, folder)
    page = (tmp_path / "runs.md").read_text()
    assert "| MNIST | mixer | 1 | 91.00 (90.00 to 95.00) | 3 | 95.0 / 97.9 | 10 |" in page
    assert "| MNIST | mixer | 3 | 97.00 (97.00 to 97.00) | 1 | – / 98.9 | 10 |" in page
    assert page.index("| MNIST") < page.index("| unknown") and "runs.svg" in page
    assert page.endswith("\nWhat is left.\n")
    picture = (tmp_path / "runs.svg").read_text()
    ElementTree.fromstring(picture)
    assert "Béthune" in picture and "mixer" in picture and "MNIST" in picture
    run(results, folder)
    assert (tmp_path / "runs.svg").read_text() == picture


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"evaluated_on": "5000 held-out training examples"}, "was evaluated on 5000"),
        ({}, "repeats seed 1"),
        ({"seed": 2, "settings": {"epochs": 2}}, "has other settings"),
    ],
)
def test_runs_that_do_not_belong_together_are_refused(tmp_path, second, message):
    write(tmp_path)
    write(tmp_path, **second)
    with pytest.raises(ValueError, match=message):
        results.collect(tmp_path / "images.jsonl")


def test_what_is_no_result_is_refused(refused, tmp_path):
    file = tmp_path / "images.jsonl"
    for text, message in (("", "holds no results"), ("{", "Line 1 of images.jsonl is no JSON"),
                          ("{}", "Line 1 of images.jsonl lacks data")):  # fmt: skip
        file.write_text(text)
        assert message in refused(results, tmp_path)
    assert "nowhere" in refused(results, tmp_path / "nowhere")
    assert "Unknown arguments: more" in refused(results, tmp_path, "more")
