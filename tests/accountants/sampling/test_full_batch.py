import numpy as np
import pytest

from accountants import FullBatch, TrainingRun, epsilon
from tests.accountants.sampling.helpers import drawn


def test_every_example_in_every_step():
    found = drawn(FullBatch(), 9, epochs=4)
    assert len(found) == 4 and all(np.array_equal(rows, np.arange(9)) for rows in found)


@pytest.mark.parametrize("relation", FullBatch.relations)
def test_steps_are_gaussians_that_add_up_in_squares(relation):
    many = TrainingRun(6.0, FullBatch(), 9, 9)
    one = TrainingRun(2.0, FullBatch(), 9, 1)
    spent = epsilon(runs=[many], delta=1e-5, relation=relation)
    assert spent == pytest.approx(epsilon(runs=[one], delta=1e-5, relation=relation), rel=1e-9)
    assert many.release(relation).shift == (2 if relation == "replace_one" else 1) / 6


def test_no_batch_size_describes_it():
    assert FullBatch().with_batch_size(3) is None and FullBatch().padded_size is None
