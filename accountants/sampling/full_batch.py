"""Every example in every step."""

import dataclasses

import numpy as np

from accountants.sampling.base import RELATIONS, Unsampled
from accountants.sampling.draws import Draw
from accountants.validation import check_integer


@dataclasses.dataclass(frozen=True)
class FullBatch(Unsampled):
    """Every example takes part in every step.

    >>> FullBatch().expected_batch_size(1000), FullBatch().participations(1000, steps=30)
    (1000.0, 30)
    """

    scheme = "full_batch"
    relations = RELATIONS

    def rows(self, draw: Draw) -> np.ndarray:
        return np.arange(draw.num_examples)

    def validate(self, num_examples: int) -> None:
        check_integer(num_examples, "num_examples")

    def expected_batch_size(self, num_examples: int) -> float:
        self.validate(num_examples)
        return float(num_examples)

    def steps_per_epoch(self, num_examples: int) -> int:
        self.validate(num_examples)
        return 1

    def participations(self, num_examples: int, steps: int) -> int:
        self.validate(num_examples)
        return steps
