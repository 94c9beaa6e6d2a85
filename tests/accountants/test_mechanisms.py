import pytest

from accountants import (
    CyclicPoisson,
    FixedEpochs,
    FixedSize,
    FullBatch,
    PoissonSampling,
    Sampling,
    ShuffledEpochs,
    TrainingRun,
    TruncatedPoisson,
)


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
        CyclicPoisson(11, bands=1),
        FixedEpochs(11, epochs=1),
    ):
        with pytest.raises(ValueError, match="num_examples=10"):
            TrainingRun(**(good | {"sampling": sampling}))
    with pytest.raises(ValueError, match="scheme"):
        Sampling.from_dict({"scheme": "lucky"})
    with pytest.raises(TypeError):
        Sampling.from_dict({"scheme": "poisson", "size": 3})
