import numpy as np
import pytest

from accountants import FixedEpochs, FullBatch, ShuffledEpochs, TrainingRun, epsilon
from tests.accountants.sampling.helpers import drawn


def test_one_order_for_a_run():
    found = drawn(FixedEpochs(8, epochs=3), 30, epochs=3)
    assert [len(rows) for rows in found] == [8, 8, 8, 6] * 3
    assert all(map(np.array_equal, found[:4], found[4:8]))
    assert all(map(np.array_equal, found[:4], found[8:]))
    order = np.concatenate(found[:4])
    assert sorted(order) == list(range(30)) and (order != np.arange(30)).any()
    assert (np.concatenate(drawn(FixedEpochs(8, 3), 30, 1, seed=1)) != order).any()


def test_a_run_is_one_gaussian():
    run = TrainingRun(2.0, FixedEpochs(8, epochs=3), 30, 12)
    once = TrainingRun(2.0, FullBatch(), 30, 1)
    spent = epsilon(runs=[run], delta=1e-5, relation="zero_out")
    assert spent == epsilon(runs=[once], delta=1e-5, relation="zero_out")
    assert spent.accountant == "exact"
    # As much as one epoch of fresh orders, whose noise is not scaled to a run.
    epoch = TrainingRun(2.0, ShuffledEpochs(8), 30, 4)
    assert spent == epsilon(runs=[epoch], delta=1e-5, relation="zero_out")


@pytest.mark.parametrize("sampling", [FixedEpochs(8, epochs=3), ShuffledEpochs(8)])
def test_only_a_fixed_order_is_a_release_a_run(sampling):
    assert sampling.whole_run == isinstance(sampling, FixedEpochs)
    # The order has to be drawn, and kept: a stream's own order is another one each epoch.
    assert sampling.streamable == (not sampling.whole_run)
