import dataclasses
import itertools
import json
import math

import numpy as np
import pytest

import accountants
from accountants import (
    CyclicPoisson,
    FixedEpochs,
    FixedSize,
    FullBatch,
    PoissonSampling,
    RandomAllocation,
    Sampling,
    ShuffledEpochs,
    TrainingRun,
    TruncatedPoisson,
    curves,
    delta,
    epsilon,
)
from accountants.releases import gaussian_release
from accountants.sampling import RELATIONS, SCHEMES, Draws, base
from accountants.sampling.base import BATCH_SIZE, IndependentSteps
from accountants.sampling.draws import distinct_rows
from tests.accountants.sampling.helpers import (
    CHANGES,
    OTHERS,
    SIGMA,
    TARGETS,
    cells,
    drawn,
    least_deltas,
)

EXAMPLES = [PoissonSampling(32), PoissonSampling(2.5), FullBatch(), ShuffledEpochs(32)]
EXAMPLES += [FixedSize(32), TruncatedPoisson(32, 40), TruncatedPoisson(2.5, 3), RandomAllocation(7)]
EXAMPLES += [CyclicPoisson(2.5, bands=4), FixedEpochs(32, epochs=5)]


@pytest.mark.parametrize("sampling", EXAMPLES)
def test_survives_json_and_is_a_value(sampling):
    again = Sampling.from_dict(json.loads(json.dumps(sampling.to_dict())))
    assert again == sampling and hash(again) == hash(sampling)
    run = TrainingRun(np.float32(1.5), sampling, np.int64(100), np.int32(7))
    assert TrainingRun.from_dict(json.loads(json.dumps(run.to_dict()))) == run
    with pytest.raises(AttributeError):
        run.steps = 3


def test_numbers_of_each_scheme():
    poisson, full, shuffled = PoissonSampling(30), FullBatch(), ShuffledEpochs(30)
    assert [s.steps_per_epoch(100) for s in (poisson, full, shuffled)] == [4, 1, 4]
    assert [s.expected_batch_size(100) for s in (poisson, full, shuffled)] == [30, 100, 30]
    assert [s.sampling_probability(100) for s in (poisson, full, shuffled)] == [0.3, 1, 1]
    assert [s.participations(100, 9) for s in (poisson, full, shuffled)] == [9, 9, 3]
    assert [s.participations(100, 0) for s in (poisson, full, shuffled)] == [0, 0, 0]
    # A batch size that is a rounded quotient makes no extra step.
    assert PoissonSampling(60_000 / 49).steps_per_epoch(60_000) == 49
    assert PoissonSampling(np.float64(30)).batch_size == 30


def test_numbers_of_the_other_schemes():
    schemes = TruncatedPoisson(30, 40), FixedSize(30), RandomAllocation(4)
    assert [s.steps_per_epoch(100) for s in schemes] == [4, 4, 4]
    assert [s.expected_batch_size(100) for s in schemes] == [30, 30, 25]
    assert [s.sampling_probability(100) for s in schemes] == [0.3, 0.3, 1]
    assert [s.participations(100, 9) for s in schemes] == [9, 9, 3]
    assert [s.participations(100, 0) for s in schemes] == [0, 0, 0]
    run = TrainingRun(1.0, RandomAllocation(4), num_examples=100, steps=6)
    with pytest.raises(ValueError, match="new epoch"):
        run.joined(run)
    # Cutting makes another scheme of it, never a kind of Poisson sampling.
    assert not isinstance(TruncatedPoisson(30, 40), PoissonSampling)


def test_numbers_of_the_schemes_for_correlated_noise():
    cyclic, fixed = CyclicPoisson(20, bands=4), FixedEpochs(30, epochs=3)
    assert [s.steps_per_epoch(100) for s in (cyclic, fixed)] == [5, 4]
    assert [s.expected_batch_size(100) for s in (cyclic, fixed)] == [20, 30]
    assert [s.sampling_probability(100) for s in (cyclic, fixed)] == [0.8, 1]
    assert [cyclic.participations(100, t) for t in (0, 1, 4, 5, 9)] == [0, 1, 1, 2, 3]
    assert [fixed.participations(100, t) for t in (0, 1, 12, 13, 24)] == [0, 1, 1, 2, 2]
    # A run has one order and one noise: none goes on where another ended.
    run = TrainingRun(1.0, fixed, num_examples=100, steps=6)
    with pytest.raises(ValueError, match="no run can be joined"):
        run.joined(run)
    with pytest.raises(ValueError, match=r"batch_size \* bands must not exceed"):
        cyclic.validate(79)
    assert cyclic.sampling_probability(80) == 1.0


@pytest.mark.parametrize("value", [0, -1])
def test_bad_bands_and_epochs(value):
    with pytest.raises(ValueError, match="bands"):
        CyclicPoisson(8, bands=value)
    with pytest.raises(ValueError, match="epochs"):
        FixedEpochs(8, epochs=value)
    with pytest.raises(TypeError, match="bands"):
        CyclicPoisson(8, bands=float(value))
    with pytest.raises(TypeError, match="epochs"):
        FixedEpochs(8, epochs=None)


@pytest.mark.parametrize(
    "kind",
    [PoissonSampling, ShuffledEpochs, FixedSize, lambda size: TruncatedPoisson(size, 10**9)]
    + [lambda size: CyclicPoisson(size, bands=2), lambda size: FixedEpochs(size, epochs=2)],
)
@pytest.mark.parametrize(
    ("batch_size", "error"),
    [
        (0, ValueError),
        (-1, ValueError),
        (float("nan"), (ValueError, TypeError)),
        (float("inf"), (ValueError, TypeError)),
        (True, TypeError),
        ("8", TypeError),
        (None, TypeError),
    ],
)
def test_bad_batch_sizes(kind, batch_size, error):
    with pytest.raises(error, match="batch_size"):
        kind(batch_size)


@pytest.mark.parametrize("steps", [1, 12])
@pytest.mark.parametrize("others", OTHERS)
@pytest.mark.parametrize(
    "scheme",
    [PoissonSampling(2), TruncatedPoisson(1.5, 2), TruncatedPoisson(2, 4), FixedSize(2)],
)
def test_no_data_sets_of_a_few_examples_are_easier_to_tell_apart(scheme, others, steps):
    n = len(others) + 1
    for relation, changes in CHANGES.items():
        for before, after in changes:
            p, q = (cells(scheme, n, (*others, own)) for own in (before, after))
            run = TrainingRun(SIGMA, scheme, n, steps)
            for target, lower in zip(TARGETS, least_deltas(p, q, steps, TARGETS), strict=True):
                assert lower <= delta(runs=[run], epsilon=target, relation=relation)


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
@pytest.mark.parametrize("noise_multiplier", [0.0, 1e-200, 0.02, 0.3, 30.0, 1e6, 1e20, 1e300])
@pytest.mark.parametrize(
    "scheme",
    [
        TruncatedPoisson(1e-3, 1),
        TruncatedPoisson(99, 100),
        TruncatedPoisson(10, 10),
        FixedSize(1),
        FixedSize(99),
        FixedSize(100),
        RandomAllocation(1),
        RandomAllocation(3),
        RandomAllocation(5000),
    ],
)
def test_extreme_runs(scheme, noise_multiplier, accountant):
    run = TrainingRun(noise_multiplier, scheme, 100, 20)
    spent = epsilon(runs=[run], delta=1e-5, accountant=accountant)
    assert spent >= 0.0
    if noise_multiplier == 0.0:
        assert spent == math.inf
    unsampled = gaussian_release(min(noise_multiplier, 1e7), 2.0).shift
    unsampled *= math.sqrt(run.participations)
    bound = curves.GaussianCurve(unsampled).epsilon(1e-5)
    assert accountant == "rdp" or spent <= bound * 1.01 + 1e-3 or bound == math.inf
    assert 0.0 <= delta(runs=[run], epsilon=1.0, accountant=accountant) <= 1.0


# --- what a new scheme is held to -----------------------------------------------------------------

N = 100
# Those that the package registers; a test may define more.
KINDS = dict(SCHEMES)
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@every_kind
def test_a_scheme_is_a_value_with_a_name(kind):
    scheme = kind.example()
    assert type(scheme) is kind and kind.__dataclass_params__.frozen
    assert Sampling.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme
    assert scheme.to_dict()["scheme"] == kind.scheme and hash(scheme) == hash(kind.example())
    assert getattr(accountants, kind.__name__) is kind
    assert kind.__module__ == f"accountants.sampling.{kind.scheme.removesuffix('_sampling')}"
    for field in dataclasses.fields(kind):
        # Each setting has a flag, and none may be missing.
        assert field.type in (int, float) and field.metadata["help"].endswith(".")
        for bad in (0, -1, "2", None, True, float("nan")):
            with pytest.raises((TypeError, ValueError), match=field.name):
                dataclasses.replace(scheme, **{field.name: bad})
    with pytest.raises((TypeError, ValueError), match="num_examples"):
        scheme.validate(0)


@every_kind
def test_the_facts_of_a_scheme_fit_together(kind):
    scheme = kind.example()
    scheme.validate(N)
    assert kind.relations and set(kind.relations) <= set(RELATIONS)
    steps, expected = scheme.steps_per_epoch(N), scheme.expected_batch_size(N)
    assert isinstance(expected, float) and 0 < scheme.sampling_probability(N) <= 1
    # An epoch is one expected pass over the data, up to a last batch that is smaller.
    assert N <= steps * expected < N + expected
    counts = [scheme.participations(N, taken) for taken in range(3 * steps)]
    assert counts[0] == 0 and counts[1] == 1
    assert all(0 <= more - less <= 1 for less, more in itertools.pairwise(counts))
    # Only where an epoch is a unit of the scheme do its steps cost less than one release each.
    assert kind.fixed_epoch or counts[-1] >= (3 * steps - 1) // (scheme.noise_bands or 1)
    assert not kind.whole_run or (kind.fixed_epoch and scheme.epochs >= 1)
    assert kind.rate.startswith("one ")
    assert scheme.padded_size is None or scheme.padded_size >= expected
    again = scheme.with_batch_size(5)
    assert again is None or again.expected_batch_size(N) == 5.0
    assert again is None or again.with_batch_size(scheme.batch_size) == scheme


@every_kind
def test_what_is_released_is_accounted(kind):
    run = TrainingRun(2.0, kind.example(), N, 5)
    for relation in kind.relations:
        release = run.release(relation)
        assert release.source and hash(release) == hash(run.release(relation))
        spread, reach = release.scale()
        assert 0 < spread <= reach
        one, two = (epsilon(runs=[run] * k, delta=1e-5, relation=relation) for k in (1, 2))
        assert 0 < one < two < math.inf
        assert epsilon(runs=[run], delta=1e-5, relation=relation, group_size=2) > one
    # More noise costs less, and replacing an example at least what blanking it out does.
    less = epsilon(runs=[dataclasses.replace(run, noise_multiplier=4.0)], delta=1e-5)
    assert less < epsilon(runs=[run], delta=1e-5)
    if {"zero_out", "replace_one"} <= set(kind.relations):
        zero, replace = (
            epsilon(runs=[run], delta=1e-5, relation=r) for r in ("zero_out", "replace_one")
        )
        assert zero <= replace
    for relation in set(RELATIONS) - set(kind.relations):
        with pytest.raises(ValueError, match="does not hold"):
            epsilon(runs=[run], delta=1e-5, relation=relation)


@every_kind
@pytest.mark.parametrize("n", [100, 101])
def test_draws_are_what_is_accounted(kind, n):
    scheme, epochs = kind.example(), 4
    steps = scheme.steps_per_epoch(n)
    found = drawn(scheme, n, epochs)
    again, other = drawn(scheme, n, epochs), drawn(scheme, n, epochs, seed=1)
    assert all(map(np.array_equal, found, again))
    assert all(map(np.array_equal, found, other)) == (kind is FullBatch)
    for rows in found:
        assert rows.dtype == np.int64 and len(set(rows)) == len(rows)
        assert not len(rows) or (0 <= rows.min() and rows.max() < n)
        assert scheme.padded_size is None or len(rows) <= scheme.padded_size
    sizes = {len(rows) for rows in found}
    # Of a size that does not vary only the last batch of an epoch may be smaller.
    assert kind.varying_size or len(sizes) <= 2
    assert kind.varying_size or max(sizes) == scheme.expected_batch_size(n)
    takes = np.array([np.bincount(rows, minlength=n) for rows in found])
    if kind.whole_run:
        # One release a run: an example takes part in the same step of each epoch.
        by_epoch = takes.reshape(epochs, steps, n)
        assert (by_epoch == by_epoch[0]).all() and (by_epoch[0].sum(axis=0) == 1).all()
        return
    for used in (1, len(found) // 2, len(found)):
        assert takes[:used].sum(axis=0).max() <= scheme.participations(n, used)
    if kind.fixed_epoch:
        # One release an epoch: an example takes part once in each.
        assert (takes.reshape(epochs, steps, n).sum(axis=1) == 1).all()
    if (bands := scheme.noise_bands) is not None:
        # Noise over so many steps meets an example once.
        windows = np.lib.stride_tricks.sliding_window_view(takes, bands, axis=0)
        assert windows.sum(axis=-1).max() == 1


@every_kind
def test_examples_are_drawn_as_often_as_expected(kind):
    scheme, epochs = kind.example(), 100
    found = drawn(scheme, N, epochs)
    mean = np.mean([len(rows) for rows in found])
    expected = scheme.expected_batch_size(N)
    deviation = math.sqrt(expected / len(found))
    # The physical size of the example is far out: next to nothing is cut.
    assert abs(mean - expected) <= (7 * deviation if kind.varying_size else 1e-9)
    if not kind.fixed_epoch and kind is not FullBatch:
        counts = np.bincount(np.concatenate(found), minlength=N)
        # In a turn of its own, with this probability; seven standard deviations.
        turns = scheme.participations(N, len(found))
        rate = turns * scheme.sampling_probability(N)
        assert np.abs(counts - rate).max() < 7 * math.sqrt(rate)


@every_kind
def test_an_order_of_the_datas_own_is_kept_by_schemes_that_stream(kind):
    scheme = kind.example()
    draws = Draws(N, scheme.steps_per_epoch(N), np.random.default_rng, in_order=True)
    if kind.streamable:
        rows = [scheme.rows(draws.step(2, index)) for index in range(draws.steps)]
        np.testing.assert_array_equal(np.concatenate(rows), np.arange(N))


def test_a_scheme_of_ones_own_is_one_class(monkeypatch):
    monkeypatch.setattr(base, "SCHEMES", dict(SCHEMES))

    @dataclasses.dataclass(frozen=True)
    class HalfBatch(IndependentSteps):
        batch_size: float = dataclasses.field(metadata=BATCH_SIZE)

        scheme = "half_batch"
        relations = ("replace_one",)

        def rows(self, draw):
            return distinct_rows(draw, self.batch_size)

        def release(self, noise_multiplier, num_examples, relation):
            return gaussian_release(noise_multiplier, 2.0)

    scheme = Sampling.from_dict({"scheme": "half_batch", "batch_size": 50})
    assert scheme == HalfBatch(50) and {len(rows) for rows in drawn(scheme, N, 2)} == {50}
    assert epsilon(runs=[TrainingRun(4.0, scheme, N, 2)], delta=1e-5).relation == "replace_one"
    with pytest.raises(TypeError, match="abstract"):
        type("Nothing", (Sampling,), {})()
