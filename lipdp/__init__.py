"""lipdp: differentially private training for Keras, without per-example clipping."""

from accountants import Budget, FullBatch, PoissonSampling, ShuffledEpochs
from lipdp import bounds, layers, losses, models, norms, projections
from lipdp._version import __version__
from lipdp.bounds import UnknownLayerError, gradient_bounds
from lipdp.check import check
from lipdp.clipping import AdaptiveClip
from lipdp.model import PrivateModel
from lipdp.repair import repair
from lipdp.spending import BudgetExceeded, Spent

__all__ = [
    "AdaptiveClip",
    "Budget",
    "BudgetExceeded",
    "FullBatch",
    "PoissonSampling",
    "PrivateModel",
    "ShuffledEpochs",
    "Spent",
    "UnknownLayerError",
    "__version__",
    "bounds",
    "check",
    "gradient_bounds",
    "layers",
    "losses",
    "models",
    "norms",
    "projections",
    "repair",
]
