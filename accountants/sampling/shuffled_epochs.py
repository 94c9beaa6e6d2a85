"""A fresh permutation of the examples in every epoch, cut into batches."""

import dataclasses

import numpy as np

from accountants.sampling.base import BATCH_SIZE, CutEpochs
from accountants.sampling.draws import Draw, shuffled_order
from accountants.validation import check_integer


@dataclasses.dataclass(frozen=True)
class ShuffledEpochs(CutEpochs):
    """Every epoch cuts a fresh permutation into batches; the last one may be smaller.

    An example takes part in exactly one step of an epoch, so an epoch is one Gaussian mechanism
    (parallel composition, given the permutation, which does not depend on the data). No
    amplification by shuffling is claimed. Adding or removing an example would change everybody's
    batches, so that relation is refused.

    An epoch that has begun is charged whole, and a run begins with a new epoch: a loader that
    drops the last batch, or reshuffles earlier, has to end the run there.

    >>> sampling = ShuffledEpochs(batch_size=256)
    >>> sampling.steps_per_epoch(1000), sampling.participations(1000, steps=9)
    (4, 3)

    Args:
        batch_size: the number of examples of a batch, a positive integer.

    Raises:
        TypeError, ValueError: `batch_size` is no positive integer.
    """

    batch_size: int = dataclasses.field(metadata=BATCH_SIZE)

    scheme = "shuffled_epochs"
    relations = ("zero_out", "replace_one")
    fixed_epoch = True
    streamable = True
    rate = "one an epoch"

    def __post_init__(self) -> None:
        value = check_integer(self.batch_size, "batch_size")
        object.__setattr__(self, "batch_size", value)

    def rows(self, draw: Draw) -> np.ndarray:
        start, end = self.cut(draw)
        if draw.in_order:
            return np.arange(start, end)
        order = draw.once_per_epoch(lambda generator: shuffled_order(generator, draw.num_examples))
        return order[start:end].astype(np.int64)

    def participations(self, num_examples: int, steps: int) -> int:
        return -(-steps // self.steps_per_epoch(num_examples))
