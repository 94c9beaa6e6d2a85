"""One order of the examples for a whole run, for noise that is correlated over all of it."""

import dataclasses

import numpy as np

from accountants.sampling.base import BATCH_SIZE, CutEpochs, setting
from accountants.sampling.draws import Draw, shuffled_order
from accountants.validation import check_integer


@dataclasses.dataclass(frozen=True)
class FixedEpochs(CutEpochs):
    """One shuffled order for a whole run of up to `epochs` epochs, released as *one* mechanism.

    An example takes part in the same step of every epoch, in at most `epochs` steps that are
    exactly an epoch apart. With noise that is correlated over the whole run there is no cost of a
    step: the run is one Gaussian mechanism, and its noise multiplier is the noise over the most
    that one example can move the *whole run*. Whoever adds the noise has to scale it so
    (`lipdp.ToeplitzNoise` does); with noise independent in each step, `ShuffledEpochs` says the
    same without that burden.

    Step t releases x_t + sσ (C⁻¹ z)_t, where x_t sums contributions of norm at most 1, z is
    standard normal, C lower triangular with entries of at least 0, and s the largest norm, over
    the steps i of an epoch, of the sum of the columns i, i + b, i + 2b, ... of C, b the steps of
    an epoch. Given what was released before, row t of Cx + sσz is Gaussian, and the difference
    d_t of its means between two neighbours (zero-out) is Σ_j c_{t, i+jb} u_j, where u_j is the
    example's j-th contribution. Whatever directions they take, Σ_t ‖d_t‖² =
    Σ_jk ⟨c_{i+jb}, c_{i+kb}⟩ ⟨u_j, u_k⟩ is at most s², as no product of columns is negative
    (Choquette-Choo et al. 2022). Of a sequence of Gaussian releases whose adaptively chosen
    differences have squares that never sum to more than s², one of exactly s is the worst: add
    releases at the end until the sum is s² on every path; then the privacy loss is a Brownian
    motion with drift at a fixed time (Denisov et al. 2022 for matrix mechanisms). Under
    replace-one u_j - u'_j has norm at most 2. A run that ends early has fewer rows.

    Adding or removing an example would change everybody's batches, so that relation is refused.
    Nothing is amplified.

    The loader: one permutation of the examples a run, cut into batches, the same in each epoch;
    the last batch may be smaller. After `epochs` epochs a new run begins, with a new order and
    fresh noise, and costs as much again.

    >>> sampling = FixedEpochs(batch_size=256, epochs=10)
    >>> sampling.steps_per_epoch(1000), sampling.participations(1000, steps=40)
    (4, 1)

    Args:
        batch_size: the number of examples of a batch, a positive integer.
        epochs: the most epochs of one run, a positive integer.

    Raises:
        TypeError, ValueError: either is no positive integer.
    """

    batch_size: int = dataclasses.field(metadata=BATCH_SIZE)
    epochs: int = dataclasses.field(
        metadata=setting(
            "Most epochs of a run of fixed_epochs, which is one release.",
            example=2,
            flag="run_epochs",
        )
    )

    scheme = "fixed_epochs"
    relations = ("zero_out", "replace_one")
    fixed_epoch = True
    whole_run = True
    rate = "one a run of up to `epochs` epochs"

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs"):
            value = check_integer(getattr(self, name), name)
            object.__setattr__(self, name, value)

    def rows(self, draw: Draw) -> np.ndarray:
        start, end = self.cut(draw)
        order = draw.once_per_run(lambda generator: shuffled_order(generator, draw.num_examples))
        return order[start:end].astype(np.int64)

    def participations(self, num_examples: int, steps: int) -> int:
        """The number of whole runs, begun or complete, that the steps are."""
        return -(-steps // (self.epochs * self.steps_per_epoch(num_examples)))
