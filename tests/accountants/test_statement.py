"""The statement says what was spent, in figures that are upper bounds."""

import json
import math

import numpy as np
import pytest
from scipy import special

from accountants import (
    FullBatch,
    Ledger,
    LedgerError,
    PoissonSampling,
    Query,
    ShuffledEpochs,
    Statement,
    TrainingRun,
    Use,
    curves,
    epsilon,
    tradeoff,
)
from accountants.statement import up

RUN = TrainingRun(2.0, PoissonSampling(50), num_examples=1000, steps=40)
MEANS = Query(description="column means", laplace=3.0)


def statement(*uses, delta=1e-5, **kwargs):
    return Statement.of(uses, delta, subject="a network", **kwargs)


# --- figures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0.01, 0.5, 3.0])
@pytest.mark.parametrize("failure", [1e-2, 1e-6])
def test_a_belief_rises_above_the_posterior_rarely(shift, failure):
    """For Gaussians the loss is N(μ² / 2, μ²), where the example took part."""
    run = TrainingRun(1 / shift, FullBatch(), num_examples=10, steps=1)
    posterior = tradeoff(runs=[run]).posterior(0.5, failure)
    loss = math.log(posterior / (1 - posterior))
    assert special.ndtr(-(loss - shift**2 / 2) / shift) <= failure
    # And not much more than it has to be.
    quantile = shift**2 / 2 - shift * special.ndtri(failure)
    assert loss <= 1.25 * quantile + 0.02


def test_the_posterior_of_pure_privacy_and_of_none():
    found = tradeoff(runs=[Query(description="a", laplace=1.0)]).posterior(0.5, 1e-6)
    assert math.e / (1 + math.e) <= found <= math.e / (1 + math.e) + 0.005
    assert tradeoff(runs=[]).posterior(0.5, 1e-6) == pytest.approx(0.5, abs=0.005)
    nothing = TrainingRun(0.0, FullBatch(), num_examples=10, steps=1)
    assert tradeoff(runs=[nothing]).posterior(0.5, 1e-6) == 1.0
    rare = tradeoff(runs=[RUN]).posterior(0.01, 1e-6)
    assert 0.01 < rare < tradeoff(runs=[RUN]).posterior(0.5, 1e-6)
    for values in ((0.0, 1e-6), (1.0, 1e-6), (0.5, 0.0), (0.5, math.nan)):
        with pytest.raises(ValueError, match="prior|failure"):
            tradeoff(runs=[RUN]).posterior(*values)


def test_mutant_of_the_posterior_is_caught(monkeypatch):
    """The loss is not below ε at this δ with a probability of δ: that is often said."""
    monkeypatch.setattr(math, "log1p", lambda value: 0.0)
    monkeypatch.setattr(
        curves.GaussianCurve,
        "epsilon",
        lambda self, delta, real=curves.GaussianCurve.epsilon: real(self, min(0.9, delta * 100)),
    )
    with pytest.raises(AssertionError):
        test_a_belief_rises_above_the_posterior_rarely(0.5, 1e-6)


def test_figures_are_rounded_up():
    generator = np.random.default_rng(0)
    for value in 10 ** generator.uniform(-9, 9, 200):
        for digits in (3, 4):
            assert (
                value * (1 - 1e-8) <= float(up(value, digits)) <= value * (1 + 10 ** (1 - digits))
            )


def test_the_figures_are_those_of_the_accountant():
    found = statement(Use(RUN), Use(MEANS))
    curve = tradeoff(runs=[RUN, MEANS])
    spent = epsilon(runs=[RUN, MEANS], delta=1e-5)
    assert (found.epsilon, found.relation, found.accountant) == (spent, spent.relation, "pld")
    assert found.advantage == curve.advantage
    assert found.true_positive_rate == curve.true_positive_rate(0.01)
    assert found.posterior == curve.posterior(0.5, 1e-5)
    # What covers more than the runs is stated, what covers less is not.
    assert statement(Use(RUN), spent=9.0).epsilon == 9.0
    assert statement(Use(RUN), spent=0.1).epsilon == epsilon(runs=[RUN], delta=1e-5)
    other = statement(Use(RUN), accountant="rdp", relation="replace_one")
    assert (other.accountant, other.relation) == ("rdp", "replace_one")


# --- words ----------------------------------------------------------------------------------------


def test_the_text_names_every_item():
    found = statement(Use(RUN, {"noise": "floating-point"}), Use(MEANS), software="lipdp 9")
    text = " ".join(str(found).split())
    for item in (
        "a network",
        "with lipdp 9",
        "One example",
        "one has one example more than the other (add_or_remove_one)",
        f"({up(found.epsilon, 4)}, 1e-05)-differential privacy",
        "the weights after every step and at the end, and of what the queries below returned",
        "privacy loss distributions (pld)",
        f"at most {up(found.advantage)}",
        f"at most {up(100 * found.true_positive_rate)} %",
        f"at most {up(100 * found.posterior, 4)} %",
        "training runs: 1, with 40 steps; queries: 1",
        RUN.words,
        "noise: floating-point",
        MEANS.words,
        "Losses and metrics of training batches",
        "The number of examples",
        "Mironov 2012",
    ):
        assert item in text, item
    assert "Warnings" not in text and max(map(len, str(found).splitlines())) <= 100


def test_what_is_covered_depends_on_what_was_done():
    assert "Validation" not in str(statement(Use(MEANS)))
    assert "Mironov" not in str(statement(Use(RUN, {"noise": "discrete Gaussian"})))
    shuffled = TrainingRun(4.0, ShuffledEpochs(10), num_examples=100, steps=10)
    assert "blank" in str(statement(Use(shuffled)))
    replaced = Query(description="a", rho=0.1, relation="replace_one")
    text = " ".join(str(statement(Use(replaced))).split())
    assert "another example" in text and "which of two examples" in text


def test_nothing_was_done():
    for found in (statement(), statement(Use(RUN.counted(0)))):
        assert found.epsilon == found.advantage == 0.0 and found.uses == ()
        assert "Nothing has been trained or released" in str(found)
        json.dumps(found.to_dict(), allow_nan=False)


def test_no_privacy_is_not_dressed_up():
    found = statement(Use(TrainingRun(0.0, FullBatch(), num_examples=10, steps=1)))
    text = str(found)
    assert "Nothing: there is no finite epsilon" in text and "100 %" in text
    assert found.to_dict()["epsilon"] is None
    json.dumps(found.to_dict(), allow_nan=False)


def test_what_weakens_it_is_at_the_top():
    assert "delta = 0.01 is above one over the 1000" in str(statement(Use(RUN), delta=0.01))
    assert "did not end" in str(statement(Use(RUN, settled=False)))
    text = str(statement(Use(RUN, {"noise": "Gaussian, from a seed"})))
    assert "knows the seed" in text and text.index("Warnings") < text.index("What is protected")


def test_a_dict_of_json_values():
    event = {"name": "GaussianDpEvent", "noise_multiplier": 3.0}
    query = Query.from_dict({"query": {"description": "a", "event": event}, "times": 2})
    found = statement(Use(RUN, {"noise": "x"}), Use(query)).to_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert TrainingRun.from_dict(
        {key: found["uses"][0][key] for key in RUN.to_dict()}
    ) == RUN and found["uses"][0]["about"] == {"noise": "x"}
    assert (found["runs"], found["steps"], found["unit"]) == (1, 40, "one example")
    assert found["uses"][1]["query"]["event"] == event


# --- of a ledger ----------------------------------------------------------------------------------


ABOUT = {"noise": "discrete Gaussian", "software": "lipdp 9"}


def test_a_ledger_remembers_what_is_said_of_a_run(tmp_path):
    ledger = Ledger(tmp_path / "spent.ledger")
    for about in ({}, ABOUT):
        with ledger.open_run(
            noise_multiplier=2.0, sampling=PoissonSampling(50), num_examples=1000, about=about
        ) as run:
            run.pay(20)
    ledger.add("column means", laplace=3.0)
    assert [entry.about for entry in ledger.entries] == [{}, ABOUT, {}]
    found = ledger.statement(1e-5)
    assert found.epsilon == ledger.epsilon(1e-5) and len(found.uses) == 3
    assert "spent.ledger" in found.subject and "lipdp 9" in str(found)
    assert "Mironov" in str(found)  # of the first nothing is known
    assert "Nothing has been" in str(Ledger(tmp_path / "none.ledger").statement(1e-5))
    run = ledger.open_run(noise_multiplier=2.0, sampling=PoissonSampling(50), num_examples=1000)
    run.pay()
    run._writer.close()
    assert "did not end" in str(ledger.statement(1e-5))


@pytest.mark.parametrize("about", [[], "x", {"a": 1}, {"a": "two\nlines"}, {"\n": "a"}, {"a": ""}])
def test_what_is_said_of_a_run_is_a_text(tmp_path, about):
    from tests.accountants.test_queries import OPEN, forge

    path = tmp_path / "spent.ledger"
    with pytest.raises((TypeError, ValueError), match="about"):
        Ledger(path).open_run(
            noise_multiplier=1.0, sampling=FullBatch(), num_examples=10, about=about
        )
    assert not path.exists()
    forge(path, OPEN | {"about": about})
    with pytest.raises(LedgerError, match="line 2: `about"):
        _ = Ledger(path).entries
