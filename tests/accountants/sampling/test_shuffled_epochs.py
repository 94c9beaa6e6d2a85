import itertools

import numpy as np
import pytest

from accountants import FullBatch, ShuffledEpochs, TrainingRun, epsilon
from accountants.sampling import Draws
from tests.accountants.sampling.helpers import drawn


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


def test_each_epoch_has_an_order_of_its_own():
    found = drawn(ShuffledEpochs(9), 40, epochs=3)
    assert [len(rows) for rows in found] == [9, 9, 9, 9, 4] * 3
    orders = [np.concatenate(found[i : i + 5]) for i in (0, 5, 10)]
    assert all(sorted(order) == list(range(40)) for order in orders)
    assert all((a != b).any() for a, b in itertools.combinations(orders, 2))


def test_a_stream_keeps_its_order():
    scheme, fresh = ShuffledEpochs(9), Draws(40, 5, lambda *place: 1 / 0, in_order=True)
    rows = [scheme.rows(fresh.step(2, index)) for index in range(5)]
    np.testing.assert_array_equal(np.concatenate(rows), np.arange(40))
