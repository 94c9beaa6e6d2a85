import json

import numpy as np
import pytest

from accountants import (
    FixedSize,
    FullBatch,
    PoissonSampling,
    RandomAllocation,
    Sampling,
    ShuffledEpochs,
    TrainingRun,
    TruncatedPoisson,
)

SCHEMES = [PoissonSampling(32), PoissonSampling(2.5), FullBatch(), ShuffledEpochs(32)]
SCHEMES += [FixedSize(32), TruncatedPoisson(32, 40), TruncatedPoisson(2.5, 3), RandomAllocation(7)]


@pytest.mark.parametrize("sampling", SCHEMES)
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


def test_shuffling_charges_an_epoch_as_soon_as_it_begins():
    run = TrainingRun(1.0, ShuffledEpochs(30), num_examples=100, steps=5)
    assert run.participations == 2
    with pytest.raises(ValueError, match="new epoch"):
        run.joined(run)
    whole = TrainingRun(1.0, ShuffledEpochs(30), num_examples=100, steps=8)
    assert whole.joined(run).participations == 4
    with pytest.raises(ValueError, match="equal runs"):
        run.joined(TrainingRun(2.0, ShuffledEpochs(30), num_examples=100, steps=5))


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


@pytest.mark.parametrize(
    ("physical", "error"), [(29, ValueError), (30.0, TypeError), (None, TypeError)]
)
def test_bad_physical_batch_sizes(physical, error):
    with pytest.raises(error, match="physical_batch_size"):
        TruncatedPoisson(29.5, physical)


@pytest.mark.parametrize(("steps", "error"), [(0, ValueError), (1.0, TypeError), (None, TypeError)])
def test_bad_numbers_of_bins(steps, error):
    with pytest.raises(error, match="steps"):
        RandomAllocation(steps)


@pytest.mark.parametrize(
    "kind",
    [PoissonSampling, ShuffledEpochs, FixedSize, lambda size: TruncatedPoisson(size, 10**9)],
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


def test_bad_runs():
    good = {"noise_multiplier": 1.0, "sampling": FullBatch(), "num_examples": 10, "steps": 1}
    for name, value, error in [
        ("noise_multiplier", -1.0, ValueError),
        ("noise_multiplier", float("nan"), ValueError),
        ("noise_multiplier", float("inf"), ValueError),
        ("noise_multiplier", "1", TypeError),
        ("sampling", 32, TypeError),
        ("sampling", FullBatch, TypeError),
        ("num_examples", 0, ValueError),
        ("num_examples", 10.0, TypeError),
        ("steps", -1, ValueError),
        ("steps", 1.5, TypeError),
    ]:
        with pytest.raises(error, match=name):
            TrainingRun(**(good | {name: value}))
    for sampling in (
        PoissonSampling(11),
        ShuffledEpochs(11),
        FixedSize(11),
        TruncatedPoisson(11, 12),
    ):
        with pytest.raises(ValueError, match="num_examples=10"):
            TrainingRun(**(good | {"sampling": sampling}))
    with pytest.raises(ValueError, match="scheme"):
        Sampling.from_dict({"scheme": "lucky"})
    with pytest.raises(TypeError):
        Sampling.from_dict({"scheme": "poisson", "size": 3})
