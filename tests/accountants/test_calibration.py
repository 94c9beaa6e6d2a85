import math
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from accountants import (
    FixedSize,
    FullBatch,
    PoissonSampling,
    Query,
    RandomAllocation,
    ShuffledEpochs,
    TrainingRun,
    TruncatedPoisson,
    calibrate_batch_size,
    calibrate_epochs,
    calibrate_noise_multiplier,
    calibrate_steps,
    calibration,
    epsilon,
    tradeoff,
)
from accountants.sampling import SCHEMES

N = 60_000


@settings(deadline=None, max_examples=6)
@given(
    target=st.floats(0.05, 20.0),
    sampling=st.sampled_from(
        [PoissonSampling(6), PoissonSampling(600), PoissonSampling(30_000)]
        + [FullBatch(), ShuffledEpochs(600)]
    ),
    steps=st.integers(1, 3_000),
    accountant=st.sampled_from(["pld", "rdp"]),
    prior=st.booleans(),
)
def test_the_least_noise_never_overshoots(target, sampling, steps, accountant, prior):
    """A noise multiplier accepted although it overshoots: a mistake of the peers."""
    prior = [TrainingRun(100.0, FullBatch(), N, 2)] * prior
    common = {"delta": 1e-5, "accountant": accountant}
    found = calibrate_noise_multiplier(
        epsilon=target, sampling=sampling, num_examples=N, steps=steps, prior=prior, **common
    )

    def cost(noise_multiplier):
        return epsilon(runs=[*prior, TrainingRun(noise_multiplier, sampling, N, steps)], **common)

    assert cost(found) <= target
    assert cost(found * (1 - 1e-3)) > target


@settings(deadline=None, max_examples=6)
@given(
    target=st.floats(0.05, 10.0),
    sampling=st.sampled_from([PoissonSampling(600), FullBatch(), ShuffledEpochs(20_000)]),
    noise_multiplier=st.floats(0.6, 10.0),
    accountant=st.sampled_from(["pld", "rdp"]),
    prior=st.booleans(),
)
def test_the_most_steps_are_exact(target, sampling, noise_multiplier, accountant, prior):
    prior = [TrainingRun(noise_multiplier * 20, sampling, N, 7)] * prior
    common = {"delta": 1e-5, "accountant": accountant}

    def cost(steps):
        return epsilon(runs=[*prior, TrainingRun(noise_multiplier, sampling, N, steps)], **common)

    def calibrate():
        return calibrate_steps(
            epsilon=target,
            noise_multiplier=noise_multiplier,
            sampling=sampling,
            num_examples=N,
            prior=prior,
            **common,
        )

    if cost(0) > target:  # the prior runs alone
        with pytest.raises(ValueError, match="prior"):
            calibrate()
        return
    found = calibrate()
    assert cost(found) <= target < cost(found + 1)
    if isinstance(sampling, ShuffledEpochs):
        assert found % sampling.steps_per_epoch(N) == 0


def test_steps_at_the_edges():
    common = {"delta": 1e-5, "sampling": FullBatch(), "num_examples": N}
    assert calibrate_steps(epsilon=0.1, noise_multiplier=0.5, **common) == 0
    assert calibrate_steps(epsilon=0.1, noise_multiplier=0.0, **common) == 0
    assert calibrate_steps(epsilon=9.0, noise_multiplier=5.0, max_steps=3, **common) == 3
    assert calibrate_steps(epsilon=9.0, noise_multiplier=5.0, max_steps=0, **common) == 0
    assert calibrate_steps(epsilon=9.0, noise_multiplier=1e9, max_steps=10**6, **common) == 10**6
    limit = calibrate_steps(epsilon=9.0, noise_multiplier=5.0, **common)
    for most in (limit - 1, limit, limit + 1):
        found = calibrate_steps(epsilon=9.0, noise_multiplier=5.0, max_steps=most, **common)
        assert found == min(most, limit)


@pytest.mark.parametrize(
    "sampling",
    [PoissonSampling(600), ShuffledEpochs(700), RandomAllocation(90), TruncatedPoisson(600, 700)],
)
def test_the_most_epochs_are_exact(sampling):
    common = {"noise_multiplier": 1.1, "sampling": sampling, "num_examples": N, "delta": 1e-5}
    if isinstance(sampling, ShuffledEpochs):
        common["noise_multiplier"] = 3.0
    found = calibrate_epochs(epsilon=3.0, **common)
    length = sampling.steps_per_epoch(N)
    assert found > 0
    assert epsilon(steps=found * length, **common) <= 3.0
    assert epsilon(steps=(found + 1) * length, **common) > 3.0
    assert calibrate_epochs(epsilon=3.0, max_epochs=2, **common) == 2
    assert calibrate_epochs(epsilon=0.01, **common) == 0


@pytest.mark.parametrize(
    ("scheme", "noise_multiplier"),
    [(PoissonSampling, 1.0), (FixedSize, 3.0), (lambda b: TruncatedPoisson(b, b + 100), 1.0)],
)
@pytest.mark.parametrize("prior", [False, True])
def test_the_largest_batches_are_exact(scheme, noise_multiplier, prior):
    prior = [TrainingRun(20.0, FullBatch(), N, 1)] * prior
    common = {"delta": 1e-5, "accountant": "pld"}

    def cost(size):
        sampling = scheme(size)
        steps = 10 * sampling.steps_per_epoch(N)
        return epsilon(runs=[*prior, TrainingRun(noise_multiplier, sampling, N, steps)], **common)

    found = calibrate_batch_size(
        epsilon=2.0,
        noise_multiplier=noise_multiplier,
        epochs=10,
        num_examples=N,
        scheme=scheme,
        prior=prior,
        **common,
    )
    assert cost(found) <= 2.0 < cost(found + 1)


def test_batch_sizes_at_the_edges():
    common = {"delta": 1e-5, "num_examples": 1000, "epochs": 1}
    assert calibrate_batch_size(epsilon=9.0, noise_multiplier=50.0, **common) == 1000
    assert calibrate_batch_size(epsilon=0.01, noise_multiplier=0.3, **common) == 0
    with pytest.raises(ValueError, match="epochs"):
        calibrate_batch_size(epsilon=1.0, noise_multiplier=1.0, **(common | {"epochs": 0}))
    with pytest.raises(TypeError, match="sampling"):
        calibrate_batch_size(epsilon=1.0, noise_multiplier=1.0, scheme=int, **common)


@pytest.mark.parametrize(
    "sampling", [TruncatedPoisson(600, 700), FixedSize(600), RandomAllocation(100)]
)
def test_the_noise_of_other_schemes_never_overshoots(sampling):
    common = {"delta": 1e-5, "sampling": sampling, "num_examples": N, "steps": 1000}
    found = calibrate_noise_multiplier(epsilon=2.0, **common)
    assert epsilon(noise_multiplier=found, **common) <= 2.0
    assert epsilon(noise_multiplier=found * (1 - 1e-3), **common) > 2.0


def test_a_spent_budget_is_refused():
    prior = [TrainingRun(1.0, FullBatch(), N, 10)]
    common = {"epsilon": 1.0, "delta": 1e-5, "num_examples": N, "prior": prior}
    with pytest.raises(ValueError, match="prior"):
        calibrate_noise_multiplier(sampling=FullBatch(), steps=1, **common)
    with pytest.raises(ValueError, match="prior"):
        calibrate_steps(sampling=FullBatch(), noise_multiplier=1.0, **common)
    # All spent: no noise is enough, and that is said in time.
    spent = float(epsilon(runs=prior, delta=1e-5, accountant="rdp"))
    with pytest.raises(ValueError, match="out of reach"):
        calibrate_noise_multiplier(
            sampling=FullBatch(), steps=1, **(common | {"epsilon": spent, "accountant": "rdp"})
        )
    spent = float(epsilon(runs=prior, delta=1e-5))
    assert (
        calibrate_steps(sampling=FullBatch(), noise_multiplier=1.0, **(common | {"epsilon": spent}))
        == 0
    )


def test_the_relation_counts():
    common = {"epsilon": 2.0, "delta": 1e-5, "num_examples": N, "steps": 100}
    for sampling in (PoissonSampling(600), FullBatch()):
        one, two = (
            calibrate_noise_multiplier(sampling=sampling, relation=relation, **common)
            for relation in ("zero_out", "replace_one")
        )
        assert one < two <= 2.001 * one


@pytest.mark.parametrize(
    "change",
    [{"epsilon": 0}, {"epsilon": -1.0}, {"delta": 0.0}, {"delta": 1}, {"steps": 0}, {"steps": -4}]
    + [{"epsilon": float("nan")}, {"epsilon": float("inf")}, {"accountant": "magic"}],
)
def test_bad_arguments(change):
    common = {"epsilon": 2.0, "delta": 1e-5, "num_examples": N, "steps": 100}
    with pytest.raises(ValueError, match=next(iter(change))):
        calibrate_noise_multiplier(sampling=FullBatch(), **(common | change))


@pytest.mark.parametrize(
    ("target", "prior"), [(0.5, False), (1.0, True), (3.0, False), (8.0, True)]
)
def test_searches_probe_few_times(target, prior, monkeypatch):
    """A probe composes a privacy loss distribution, which is all that a search takes time for."""
    probed = []

    def probe(**arguments):
        probed.append(arguments)
        return epsilon(**arguments)

    monkeypatch.setattr(calibration, "spent", probe)
    prior = [TrainingRun(3.0, PoissonSampling(300), N, 500)] * prior
    common = {"delta": 1e-5, "sampling": PoissonSampling(600), "num_examples": N, "prior": prior}
    found = calibrate_noise_multiplier(epsilon=target, steps=10_000, **common)
    assert len(probed) <= 7  # the first is of the prior runs
    probed.clear()
    steps = calibrate_steps(epsilon=target, noise_multiplier=found, **common)
    assert 10_000 <= steps < 10_050
    assert len(probed) <= 12


def test_import_is_light():
    code = (
        "import sys, accountants;"
        "assert not {'keras', 'tensorflow', 'jax', 'dp_accounting', 'scipy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- to the risk of an attack ---------------------------------------------------------------------


def gaussian_noise(steps, advantage=None, tpr=None, at_fpr=None):
    """In closed form, of full batches: the trade-off of N(μ, 1) against N(0, 1)."""
    if advantage is not None:
        return math.sqrt(steps) / (2 * special.ndtri((1 + advantage) / 2))
    return math.sqrt(steps) / (special.ndtri(tpr) - special.ndtri(at_fpr))


RISKS = [
    {"advantage": 0.01},
    {"advantage": 0.3},
    {"advantage": 0.99},
    {"tpr": 0.02, "at_fpr": 0.01},
    {"tpr": 0.9, "at_fpr": 1e-4},
]


def risk(curve, advantage=None, tpr=None, at_fpr=None):
    return curve.advantage if tpr is None else curve.true_positive_rate(at_fpr)


def goal(risk):
    return risk.get("advantage", risk.get("tpr"))


@pytest.mark.parametrize("target", RISKS)
def test_the_risk_of_the_gaussian_has_a_closed_form(target):
    for steps in (1, 100):
        found = calibrate_noise_multiplier(
            sampling=FullBatch(), num_examples=N, steps=steps, **target
        )
        least = gaussian_noise(steps, **target)
        assert least * (1 - 1e-9) <= found <= least * 1.0006


@pytest.mark.parametrize(
    ("name", "target"),
    [(name, {"advantage": 0.1}) for name in SCHEMES]
    + [(name, {"tpr": 0.1, "at_fpr": 0.05}) for name in ("poisson", "random_allocation")],
)
def test_the_risk_of_every_scheme_is_kept_to(name, target):
    run = {"sampling": SCHEMES[name].example(), "num_examples": 200, "steps": 8}
    found = calibrate_noise_multiplier(**target, **run)
    assert risk(tradeoff(noise_multiplier=found, **run), **target) <= goal(target)
    assert risk(tradeoff(noise_multiplier=found * (1 - 1e-3), **run), **target) > goal(target)


def test_the_risk_counts_what_was_spent_before():
    prior = [TrainingRun(30.0, FullBatch(), N, 10), Query(description="a", laplace=30.0)]
    common = {"advantage": 0.1, "num_examples": N, "sampling": PoissonSampling(600), "steps": 50}
    found = calibrate_noise_multiplier(**common, prior=prior)
    assert found > calibrate_noise_multiplier(**common)
    run = TrainingRun(found, PoissonSampling(600), N, 50)
    assert 0.0999 < tradeoff(runs=[*prior, run]).advantage <= 0.1
    with pytest.raises(ValueError, match="an advantage of 0.0[0-9]+, more than.*advantage=0.01"):
        calibrate_noise_multiplier(**(common | {"advantage": 0.01}), prior=prior)


def test_less_noise_than_an_epsilon_that_implies_the_risk():
    common = {"sampling": PoissonSampling(600), "num_examples": N, "steps": 1000}
    found = calibrate_noise_multiplier(advantage=0.1, **common)
    # (ε, δ) implies an advantage of (e^ε - 1 + 2δ) / (e^ε + 1): Kairouz et al. 2015.
    implied = math.log((1.1 - 2e-5) / 0.9)
    assert found < 0.7 * calibrate_noise_multiplier(epsilon=implied, delta=1e-5, **common)


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        ({}, TypeError, "one target"),
        ({"epsilon": 1.0}, TypeError, "epsilon= and delta="),
        ({"tpr": 0.1}, TypeError, "tpr= and at_fpr="),
        ({"at_fpr": 0.1}, TypeError, "tpr= and at_fpr="),
        ({"advantage": 0.1, "epsilon": 1.0, "delta": 1e-5}, TypeError, "one target"),
        ({"advantage": 0.1, "tpr": 0.1, "at_fpr": 0.01}, TypeError, "one target"),
        ({"advantage": 0.0}, ValueError, "advantage"),
        ({"advantage": 1.0}, ValueError, "advantage"),
        ({"advantage": float("nan")}, ValueError, "advantage"),
        ({"advantage": "0.1"}, TypeError, "advantage"),
        ({"tpr": 0.1, "at_fpr": 0.1}, ValueError, "tpr.*above at_fpr=0.1"),
        ({"tpr": 1.5, "at_fpr": 0.1}, ValueError, "tpr"),
        ({"tpr": 0.5, "at_fpr": 0.0}, ValueError, "at_fpr"),
    ],
)
def test_there_is_one_target(target, error, message):
    with pytest.raises(error, match=message):
        calibrate_noise_multiplier(sampling=FullBatch(), num_examples=N, steps=1, **target)
