import pytest

from accountants import FullBatch, ShuffledEpochs, TrainingRun, epsilon


def test_shuffling_charges_an_epoch_as_soon_as_it_begins():
    run = TrainingRun(1.0, ShuffledEpochs(30), num_examples=100, steps=5)
    assert run.participations == 2
    with pytest.raises(ValueError, match="new epoch"):
        run.joined(run)
    whole = TrainingRun(1.0, ShuffledEpochs(30), num_examples=100, steps=8)
    assert whole.joined(run).participations == 4
    with pytest.raises(ValueError, match="equal runs"):
        run.joined(TrainingRun(2.0, ShuffledEpochs(30), num_examples=100, steps=5))


def test_groups_without_sampling_are_scaled_sensitivities():
    for scheme in (FullBatch(), ShuffledEpochs(10)):
        for relation in ("zero_out", "replace_one"):
            group = TrainingRun(9.0, scheme, 100, 20)
            single = TrainingRun(3.0, scheme, 100, 20)
            found = epsilon(runs=[group], delta=1e-5, group_size=3, relation=relation)
            assert found == pytest.approx(
                epsilon(runs=[single], delta=1e-5, relation=relation), rel=1e-9
            )
            assert found.group_size == 3 and "group_size=3" in repr(found)
