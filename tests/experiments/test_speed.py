"""The comparison keeps what it measures, and says why it lacks the rest."""

import dataclasses
import functools
import json
import sys
import types

import numpy as np
import pytest
from absl import app

from experiments import speed, speed_page, timing
from experiments.baselines import worker

pytestmark = pytest.mark.any_backend


LIMITS = timing.Limits(steps=3, seconds=20, gib=0.4)


def method(name, library="lipdp", **kinds):
    kinds = kinds or {"private": "private", "plain": "plain"}
    return timing.Method(library, name, "tests.experiments.stepping", kinds, ("mlp",), 5)


@pytest.fixture
def flags(monkeypatch, tmp_path):
    values = types.SimpleNamespace(
        **dataclasses.asdict(LIMITS), again=False, together=False,
        batch_sizes=["64", "256"], networks=["mlp"],
        out=str(tmp_path / "speed.json"), environments=str(tmp_path),
    )  # fmt: skip
    monkeypatch.setattr(speed, "FLAGS", values)
    return values


def no_plot(rows, path):
    """Draws nothing: a plot takes longer than all the rest."""


def rows(flags):
    found = json.loads(open(flags.out).read())["measurements"]
    return {(row["method"], row["batch_size"]): row for row in found}


def test_kinds_take_turns_and_each_has_its_own_process():
    found = timing.measure(sys.executable, method("ours"), "mlp", 64, LIMITS)
    assert found["steps"] == 3 and found["versions"] == {"pretence": "1.0 of mlp"}
    private, plain = found["private"], found["plain"]
    assert private["cpu_ms"] >= 30 and 10 <= plain["cpu_ms"] < private["cpu_ms"]
    assert 10 < plain["mib"] < 200


def test_methods_take_turns_too(flags, monkeypatch):
    taken = []

    def rounds(python, method, network, batch_size, limits):
        for i in range(2 if method.name == "lipdp, JAX" else 3):
            taken.append((method.name[-3:], batch_size, i))
            yield
        times = dict.fromkeys(("private", "plain"), {"cpu_ms": 1.0, "mib": 1.0})
        return {"steps": 3, "versions": {}, **times}

    monkeypatch.setattr(speed, "rounds", rounds)
    monkeypatch.setattr(speed_page, "plot", no_plot)
    flags.together, flags.batch_sizes = True, ["64"]
    methods = (method("lipdp, JAX"), method("lipdp, TensorFlow"))
    monkeypatch.setattr(speed, "METHODS", methods)
    speed.compare(methods)
    assert [name for name, *_ in taken] == ["JAX", "low", "JAX", "low", "low"]
    assert all(row["private"]["cpu_ms"] == 1.0 for row in rows(flags).values())


@pytest.mark.parametrize(
    ("private", "reason"),
    [
        ("dies", "private: exit status 1: RuntimeError: no such layer"),
        # The clock ends it where it gets too little CPU for that.
        ("endless", "private: (takes more than 3 s of CPU|says nothing for 30 s)"),
        ("large", "private: needs more than 0.4 GiB"),
    ],
)
def test_reasons(private, reason):
    dying = method("x", private=private, plain="plain")
    limits = dataclasses.replace(LIMITS, seconds=3) if private == "endless" else LIMITS
    with pytest.raises(timing.Failure, match=reason):
        timing.measure(sys.executable, dying, "mlp", 64, limits)


@pytest.mark.parametrize("together", [False, True])
def test_what_fails_is_kept_with_its_reason_and_the_rest_goes_on(together, flags, monkeypatch):
    flags.together = together
    methods = (
        method("lipdp, TensorFlow"),
        method("dying", "opacus", private="dies", plain="plain"),
        method("not there", "tf_privacy"),
        method("other", "jax_privacy"),
    )
    monkeypatch.setattr(speed, "METHODS", methods)

    def environment(library):
        if library == "tf_privacy":
            raise timing.Failure("not installed: no such version")
        return sys.executable

    monkeypatch.setattr(speed, "environment", environment)
    speed.compare(methods)
    found = rows(flags)
    assert len(found) == 8
    assert found["not there", 64]["failed"] == "not installed: no such version"
    assert found["dying", 256]["failed"].endswith("no such layer (at batch 64)")
    assert "failed" not in found["other", 256]
    monkeypatch.setattr(speed_page, "plot", no_plot)
    page = open(flags.out.replace(".json", ".md")).read()
    assert "| not there | mlp | 64 | not installed: no such version |" in page
    assert page.count("RuntimeError: no such layer") == 2
    assert "</svg>" in open(flags.out.replace(".json", ".svg")).read()

    # Nothing is measured twice, unless it is asked for, and then nothing else.
    made = {key: found["other", 64][key] for key in ("private", "plain", "versions")}

    def measured(*_):
        yield
        return {**made, "steps": 7}

    monkeypatch.setattr(speed, "rounds", measured)
    speed.compare(methods)
    assert rows(flags) == found
    flags.again = True
    speed.compare(methods[:1])
    again = rows(flags)
    assert [key for key in found if again[key] != found[key]] == [
        ("lipdp, TensorFlow", 64),
        ("lipdp, TensorFlow", 256),
    ]


def test_a_call_of_fit_is_timed_step_by_step():
    import keras

    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    seen = []

    def after():
        seen.append(float(model.layers[-1].kernel[0, 0]))
        if len(seen) == 5:
            raise EOFError

    fit = functools.partial(
        model.fit, np.ones((6, 2)), np.ones((6, 1)), batch_size=2, epochs=worker.EPOCHS
    )
    with pytest.raises(EOFError):
        worker.fitting(keras, fit)(after)
    assert len(set(seen)) == 5  # a step lies between any two


def test_who_is_ahead_and_what_would_fit():
    def row(name, library, batch_size, ms, mib):
        kinds = {"private": {"cpu_ms": ms, "mib": mib}, "plain": {"cpu_ms": ms / 2, "mib": mib}}
        return {"method": name, "library": library, "network": "mlp", "batch_size": batch_size,
                **kinds}  # fmt: skip

    found = [row("ours", "lipdp", 64, 20.0, 100.0), row("theirs", "opacus", 64, 30.0, 100.0)]
    found += [row("ours", "lipdp", 256, 200.0, 292.0), row("theirs", "opacus", 256, 30.0, 100.0)]
    assert "| MLP | **20.0** / 30.0 (theirs) | 200 / 30.0 (theirs) |" in speed_page._ahead(
        found, [64, 256]
    )
    ours = [r for r in found if r["library"] == "lipdp"]
    assert speed_page._largest(ours, "private", 1.0) is None  # too small to go by
    ours[1]["batch_size"] = 1024
    assert speed_page._largest(ours, "private", 1.0) == 1024 + (1024 - 292) * 5
    theirs = [r for r in found if r["library"] == "opacus"]
    assert speed_page._largest(theirs, "private", 1.0) is None


def test_methods_are_chosen_by_library_or_one_by_one():
    names = [m.name for m in speed.chosen(["lipdp:private", "opacus:ghost"])]
    assert names == ["lipdp, TensorFlow", "lipdp, JAX", "Opacus, ghost clipping"]
    assert len(speed.chosen(["lipdp"])) == 4
    with pytest.raises(app.UsageError, match="--only takes .*opacus:ghost.*; got opacus:gost"):
        speed.chosen(["opacus:gost"])


def test_every_library_has_an_environment_and_every_network_a_shape():
    assert {m.library for m in speed.METHODS} == {"lipdp", *speed.ENVIRONMENTS}
    for m in speed.METHODS:
        assert set(m.networks) <= set(worker.SHAPES) == set(speed_page._TITLES)
        assert "private" in m.kinds and "plain" in m.kinds


@pytest.mark.parametrize("network", worker.SHAPES)
def test_both_networks_of_a_name_are_alike(network):
    import keras

    from experiments.baselines import networks, ours

    theirs = keras.Model(*networks.layers_of(network, keras))
    mine = ours.network_of(network)
    assert mine.input_shape == theirs.input_shape and mine.output_shape == theirs.output_shape
    kernels = [
        sorted(tuple(v.shape) for v in n.trainable_variables if len(v.shape) > 1)
        for n in (mine, theirs)
    ]
    assert kernels[0] == kernels[1]
