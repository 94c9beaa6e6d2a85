"""Draws from very many examples, and what has to be light."""

import json
import os
import pathlib
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

import accountants
from experiments import scale, timing

pytestmark = pytest.mark.any_backend

ON_JAX = {"KERAS_BACKEND": "jax"}


def test_draws_pass_their_tests_and_biased_ones_do_not(monkeypatch):
    found = scale.draws(10**6, 500, 200, seed=0)
    assert found["p_value_sizes"] > 1e-3 and found["p_value_positions"] > 1e-3
    rows = accountants.PoissonSampling.rows
    monkeypatch.setattr(accountants.PoissonSampling, "rows", lambda *a: rows(*a)[::2])
    assert scale.draws(10**6, 500, 200, seed=0)["p_value_sizes"] < 1e-9
    monkeypatch.setattr(accountants.PoissonSampling, "rows", lambda *a: np.unique(rows(*a) // 2))
    assert scale.draws(10**6, 500, 200, seed=0)["p_value_positions"] < 1e-9
    for wrong in (lambda r: np.repeat(r, 2), lambda r: r[::-1], lambda r: r + 10**6):
        monkeypatch.setattr(accountants.PoissonSampling, "rows", lambda *a, f=wrong: f(rows(*a)))
        with pytest.raises(ValueError, match="not sorted, or not in range, or repeats"):
            scale.draws(10**6, 500, 2, seed=0)


@pytest.mark.parametrize(
    "sampling",
    [
        accountants.PoissonSampling(1000),
        accountants.TruncatedPoisson(1000, 1100),
        accountants.FixedSize(1000),
    ],
    ids=lambda s: type(s).__name__,
)
def test_memory_of_a_draw_does_not_grow_with_the_examples(sampling):
    batches = scale.batches_of(sampling, 10**12, 5, seed=0)
    tracemalloc.start()
    batches.draw(0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**18


def test_what_schemes_keep_of_an_example():
    found = scale.schemes(70_000, 500)["schemes"]
    assert {name: of["bytes_an_example"] for name, of in found.items()} == {
        "PoissonSampling": 0,
        "FixedSize": 0,
        "CyclicPoisson": 1,
        "RandomAllocation": 2,
        "ShuffledEpochs": 4,
    }


def test_importing_lipdp_loads_nothing_but_itself_beside_keras():
    code = (
        "import sys, keras; before = set(sys.modules); import lipdp;"
        "new = {name.split('.')[0] for name in set(sys.modules) - before};"
        "assert new - set(sys.stdlib_module_names) == {'lipdp', 'accountants'}, new"
    )
    # On JAX, which is imported sooner than TensorFlow.
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | ON_JAX)


def test_bounds_of_a_deep_network():
    found = scale.bounds(30)
    assert found["gradient_bounds_s"] < 1 and found["report_s"] < 1


def test_ledger_of_many_steps_is_small():
    found = scale.ledger(5000)
    assert found["bytes"] < 5 * found["steps"]


def test_a_part_is_measured_in_a_process_of_its_own(run, tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    monkeypatch.setenv("PYTHONPATH", str(pathlib.Path(scale.__file__).parents[1]))
    run(scale, "--parts=schemes", "--out=scale.json", "--examples=700000", "--batch_size=500")
    found = json.loads((tmp_path / "scale.json").read_text())
    assert found["schemes"]["schemes"]["CyclicPoisson"]["bytes_an_example"] == 1
    assert found["device"] == timing.machine() and "schemes" in found["made_with"]
