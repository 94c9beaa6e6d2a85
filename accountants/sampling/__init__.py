"""Sampling schemes, as immutable values: one file for each, with how it draws and what it releases.

A scheme says three things. To the loader: what a batch is (`Sampling.rows`). To the trainer: the
constant by which a sum of gradients is divided. To the accountant: through how many noisy releases
one example can pass, with which probability each, and for which neighbouring relations that is
true.

The neighbouring relations:

- ``"add_or_remove_one"``: one data set has one example more than the other.
- ``"zero_out"``: one example is replaced by a blank that contributes nothing.
- ``"replace_one"``: one example is replaced by another, which moves a sum twice as far.

The number of examples is treated as public: it sets the sampling probability and the divisor.

To add a scheme, write a file with a frozen dataclass derived from `Sampling`, and import it here.
Commands, files, loaders and documents find it in `SCHEMES`; tests/accountants/sampling holds it to
what all schemes promise.
"""

from accountants.sampling.base import RELATIONS, SCHEMES, Relation, Sampling
from accountants.sampling.cyclic_poisson import CyclicPoisson
from accountants.sampling.draws import Draw, Draws
from accountants.sampling.fixed_epochs import FixedEpochs
from accountants.sampling.fixed_size import FixedSize
from accountants.sampling.full_batch import FullBatch
from accountants.sampling.poisson import PoissonSampling
from accountants.sampling.random_allocation import RandomAllocation
from accountants.sampling.shuffled_epochs import ShuffledEpochs
from accountants.sampling.truncated_poisson import TruncatedPoisson

__all__ = [
    "RELATIONS",
    "SCHEMES",
    "CyclicPoisson",
    "Draw",
    "Draws",
    "FixedEpochs",
    "FixedSize",
    "FullBatch",
    "PoissonSampling",
    "RandomAllocation",
    "Relation",
    "Sampling",
    "ShuffledEpochs",
    "TruncatedPoisson",
]
