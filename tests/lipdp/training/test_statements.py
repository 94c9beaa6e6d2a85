"""What a model states: its own runs, its ledger's, and how they were made."""

import json

import keras
import pytest

import accountants
import lipdp
from accountants import Ledger
from lipdp import cli, layers
from lipdp.training.statements import circumstances
from tests.lipdp.helpers import data, dense_network, private

pytestmark = pytest.mark.any_backend


def test_the_statement_of_a_model_and_its_ledger(tmp_path, capsys):
    path = tmp_path / "spent.ledger"
    sampling = lipdp.FullBatch()  # whose page has no sliders to compute
    model = private(budget=lipdp.Budget(3.0, 1e-5), ledger=path, seed=0, sampling=sampling)
    empty = model.statement()
    assert "Nothing has been trained" in str(empty) and empty.epsilon == 0.0
    Ledger(path).add("<b>means", laplace=2.0)
    x, y = data()
    model.fit(x, y, verbose=0)
    found = model.statement()
    assert found.epsilon == model.spent().epsilon <= 3.0
    assert found.relation == model.spent().relation
    text = " ".join(str(found).split())
    for item in ("<b>means", f"lipdp {lipdp.__version__}", "certified", "spent.ledger", "seed"):
        assert item in text, item
    # Another process reads the same from the file.
    code = cli.COMMANDS["statement"][0](["statement", str(path), "--json"])
    read = json.loads(capsys.readouterr().out)
    assert code == 0 and read["uses"] == found.to_dict()["uses"]
    assert read["epsilon"] == pytest.approx(found.epsilon, rel=1e-3)
    # The page has it, too.
    model.report().to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "What is not covered" in page and "&lt;b&gt;means" in page and "<b>means" not in page
    json.dumps(model.report().to_dict(), allow_nan=False)
    # A second model of the network goes on from it, without the ledger.
    with pytest.warns(UserWarning, match="trained privately before"):
        second = private(model.network, noise_multiplier=2.0)
    assert [use.about for use in second.statement(1e-5).uses] == [circumstances(model)]


def test_a_delta_is_needed():
    with pytest.raises(ValueError, match="delta"):
        private(noise_multiplier=1.0).statement()


@pytest.mark.parametrize(
    ("settings", "name", "words"),
    [
        ({}, "noise", "floating-point"),
        ({"noise": "secure", "seed": None}, "noise", "discrete"),
        ({"seed": 3}, "noise", "from a seed"),
        ({}, "bounds", "certified"),
        ({"clip": lipdp.AdaptiveClip()}, "bounds", "adapts"),
        ({"clip": lipdp.PerLayerClip(threshold=1.0)}, "bounds", "each layer clips"),
        (
            {
                "noise": lipdp.BandedNoise(),
                "sampling": lipdp.CyclicPoisson(4, 2),
            },
            "noise",
            "correlated",
        ),
    ],
)
def test_how_a_run_was_made(settings, name, words):
    network = keras.Sequential(
        [keras.Input((4,)), layers.BallProjection(1.0), layers.SpectralDense(2)]
    )
    settings = {"sampling": accountants.PoissonSampling(4), "seed": None} | settings
    model = lipdp.PrivateModel(network, noise_multiplier=1.0, **settings)
    found = circumstances(model)
    assert words in found[name]
    assert ("seed" in found["noise"]) == (settings["seed"] is not None)
    assert all(text.isprintable() and len(text) <= 200 for text in found.values())


def test_queries_count_for_a_budget(tmp_path):
    path = tmp_path / "spent.ledger"
    model = private(budget=lipdp.Budget(1.0, 1e-5), noise_multiplier=30.0, ledger=path)
    x, y = data()
    model.fit(x, y, verbose=0)
    before = model.spent()
    Ledger(path).add("a table", epsilon=0.5)
    assert model.spent().epsilon > before.epsilon + 0.3 and model.spent().steps == before.steps
    Ledger(path).add("another", epsilon=0.6)
    with pytest.raises(lipdp.BudgetExceeded, match="overspend"):
        model.fit(x, y, verbose=0)
    assert model.report().runs[-1].description == "another"


def test_queries_alone_can_use_a_budget_up(tmp_path):
    path = tmp_path / "spent.ledger"
    Ledger(path).add("a table", epsilon=2.0)
    model = private(dense_network(), budget=lipdp.Budget(1.0, 1e-5), ledger=path)
    x, y = data()
    with pytest.raises(lipdp.BudgetExceeded, match="used up"):
        model.fit(x, y, verbose=0)
    assert model.spent().steps == 0 and model.spent().epsilon > 1.0
    assert "queries: 1" in str(model.statement())
    model.report().to_html(tmp_path / "page.html")
