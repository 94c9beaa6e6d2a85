"""Privacy accounting for training with Gaussian noise: what runs cost, and what they may cost.

>>> import accountants
>>> sampling = accountants.PoissonSampling(batch_size=256)
>>> noise_multiplier = accountants.calibrate_noise_multiplier(
...     epsilon=3.0, delta=1e-5, sampling=sampling, num_examples=10_000, steps=400)
>>> spent = accountants.epsilon(
...     noise_multiplier=noise_multiplier, sampling=sampling, num_examples=10_000, steps=400,
...     delta=1e-5)
>>> 2.99 < spent <= 3.0
True
"""

from accountants.accounting import Budget, Delta, Epsilon, delta, epsilon
from accountants.calibration import (
    calibrate_batch_size,
    calibrate_epochs,
    calibrate_noise_multiplier,
    calibrate_steps,
)
from accountants.ledger import Ledger, LedgerError
from accountants.mechanisms import TrainingRun
from accountants.published import published_epsilon_not_a_guarantee
from accountants.queries import Query
from accountants.sampling import (
    CyclicPoisson,
    FixedEpochs,
    FixedSize,
    FullBatch,
    PoissonSampling,
    RandomAllocation,
    Sampling,
    ShuffledEpochs,
    TruncatedPoisson,
)
from accountants.selection import RandomTrials, search_epsilon
from accountants.statement import Statement, Use
from accountants.tradeoff import TradeOff, tradeoff

__all__ = [
    "Budget",
    "CyclicPoisson",
    "Delta",
    "Epsilon",
    "FixedEpochs",
    "FixedSize",
    "FullBatch",
    "Ledger",
    "LedgerError",
    "PoissonSampling",
    "Query",
    "RandomAllocation",
    "RandomTrials",
    "Sampling",
    "ShuffledEpochs",
    "Statement",
    "TradeOff",
    "TrainingRun",
    "TruncatedPoisson",
    "Use",
    "calibrate_batch_size",
    "calibrate_epochs",
    "calibrate_noise_multiplier",
    "calibrate_steps",
    "delta",
    "epsilon",
    "published_epsilon_not_a_guarantee",
    "search_epsilon",
    "tradeoff",
]
