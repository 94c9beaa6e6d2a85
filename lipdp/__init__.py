"""lipdp: differentially private training for Keras, without per-example clipping."""

from accountants import (
    Budget,
    CyclicPoisson,
    FixedEpochs,
    FixedSize,
    FullBatch,
    PoissonSampling,
    RandomAllocation,
    ShuffledEpochs,
    TruncatedPoisson,
)
from lipdp import bounds, layers, losses, metrics, models, robustness
from lipdp._version import __version__
from lipdp.bounds import UnknownLayerError, gradient_bounds
from lipdp.data.augmentation import Augmentation
from lipdp.inspection.check import check
from lipdp.inspection.repair import repair
from lipdp.noise import BandedNoise, ToeplitzNoise
from lipdp.training.clipping import AdaptiveClip
from lipdp.training.model import PrivateModel
from lipdp.training.spending import BudgetExceeded, Spent

__all__ = [
    "AdaptiveClip",
    "Augmentation",
    "BandedNoise",
    "Budget",
    "BudgetExceeded",
    "CyclicPoisson",
    "FixedEpochs",
    "FixedSize",
    "FullBatch",
    "PoissonSampling",
    "PrivateModel",
    "RandomAllocation",
    "ShuffledEpochs",
    "Spent",
    "ToeplitzNoise",
    "TruncatedPoisson",
    "UnknownLayerError",
    "__version__",
    "bounds",
    "check",
    "gradient_bounds",
    "layers",
    "losses",
    "metrics",
    "models",
    "repair",
    "robustness",
]
