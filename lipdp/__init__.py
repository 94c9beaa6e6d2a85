"""lipdp: differentially private training for Keras, layer by layer."""

import sys
from typing import TYPE_CHECKING, Any

from lipdp import _loading
from lipdp._version import __version__

if TYPE_CHECKING:  # at run time these are imported when they are first used
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
    from lipdp.bounds import UnknownLayerError, gradient_bounds
    from lipdp.data.augmentation import Augmentation
    from lipdp.inspection.check import check
    from lipdp.inspection.repair import repair
    from lipdp.local.declared import keeps_rows_apart
    from lipdp.noise import BandedNoise, ToeplitzNoise
    from lipdp.serving import to_keras
    from lipdp.training.ahead import plan
    from lipdp.training.clipping import AdaptiveClip, PerLayerClip
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
    "PerLayerClip",
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
    "keeps_rows_apart",
    "layers",
    "losses",
    "metrics",
    "models",
    "plan",
    "repair",
    "robustness",
    "to_keras",
]

# Where the names are that the block above imports, other than modules; a test compares them.
_HOMES = {
    "AdaptiveClip": "lipdp.training.clipping",
    "Augmentation": "lipdp.data.augmentation",
    "BandedNoise": "lipdp.noise",
    "Budget": "accountants",
    "BudgetExceeded": "lipdp.training.spending",
    "CyclicPoisson": "accountants",
    "FixedEpochs": "accountants",
    "FixedSize": "accountants",
    "FullBatch": "accountants",
    "PerLayerClip": "lipdp.training.clipping",
    "PoissonSampling": "accountants",
    "PrivateModel": "lipdp.training.model",
    "RandomAllocation": "accountants",
    "ShuffledEpochs": "accountants",
    "Spent": "lipdp.training.spending",
    "ToeplitzNoise": "lipdp.noise",
    "TruncatedPoisson": "accountants",
    "UnknownLayerError": "lipdp.bounds",
    "check": "lipdp.inspection.check",
    "gradient_bounds": "lipdp.bounds",
    "keeps_rows_apart": "lipdp.local.declared",
    "plan": "lipdp.training.ahead",
    "repair": "lipdp.inspection.repair",
    "to_keras": "lipdp.serving",
}


def __getattr__(name: str) -> Any:
    return _loading.get_attribute(sys.modules[__name__], name, _HOMES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_loading.register_with_keras()
