"""The examples of the page run as they stand, on few made-up examples."""

import re

import keras
import numpy as np
import pytest

import lipdp
from experiments import how_to, record

SLOW = ("convolutional", "frozen", "lstm", "transformer")


def arrays(example, rng, count=24):
    if example in how_to.ON_TEXT:
        x, classes = rng.integers(0, 50, (count, 128)).astype("int32"), 2
    else:
        x, classes = rng.random((count, 28, 28, 1), dtype="float32"), 10
    y = (np.arange(count) % classes).astype("int32")
    found = {"x": x, "y": y, "x_test": x[:8], "y_test": y[:8]}
    return found | {"x_public": x, "y_public": y} if example in how_to.WITH_PUBLIC_PART else found


def shortened(code):
    """The code with small batches, one epoch, and few words."""
    code = re.sub(r"batch_size=\d+", "batch_size=6", code)
    code = re.sub(r"(model\.fit\(.*), verbose", r"\1, epochs=1, verbose", code)
    code = re.sub(r"epochs=\d+, epochs=1", "epochs=1", code)
    return re.sub(r"epochs=\d+", "epochs=1", code).replace("10_000", "50")


@pytest.mark.parametrize(
    "example",
    [pytest.param(e, marks=[pytest.mark.slow] if e in SLOW else []) for e in how_to.EXAMPLES],
)
def test_an_example_of_the_page_runs(example, rng):
    code = how_to.codes(example)[0]
    assert len(code.splitlines()) <= 30
    names = how_to.run(shortened(code), arrays(example, rng))
    assert 2.5 < names["model"].spent().epsilon <= 3.0
    assert all(np.isfinite(w).all() for w in names["model"].network.get_weights())


@pytest.mark.slow
def test_a_network_of_keras_applications_is_accepted():
    names = how_to.run(how_to.codes("frozen")[1], {"keras": keras})
    model = lipdp.PrivateModel(
        names["network"],
        noise_multiplier=1.0,
        sampling=lipdp.PoissonSampling(4),
        clip=lipdp.PerLayerClip(),
    )
    assert len(model.units.units) == 1


@pytest.mark.any_backend
def test_the_page_has_the_results_of_its_code():
    results = record.read(how_to.PAGE.parent / "results" / "how_to.jsonl")
    assert how_to.table(results) in how_to.PAGE.read_text("utf-8")
    for result in results:
        assert result["code"] == how_to.codes(result["example"])[0], result["example"]
        assert result["evaluated_on"] == "test set"
