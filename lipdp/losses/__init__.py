"""Losses with a known bound on their gradient, and the gradient bound of Keras' own.

The gradient in question is that of one example's loss with respect to the network's output; where
an example has several positions its loss is their mean.
"""

from lipdp.losses.base import BoundedLoss
from lipdp.losses.certified import EMMA, GloRo
from lipdp.losses.entropies import (
    BinaryCrossentropy,
    CategoricalCrossentropy,
    Focal,
    LogitAnnealing,
    SparseCategoricalCrossentropy,
)
from lipdp.losses.joint import Joint
from lipdp.losses.margins import BinaryHKR, BinaryKR, MulticlassHinge, MulticlassHKR, MulticlassKR
from lipdp.losses.properties import (
    Loss,
    as_written,
    check_axis,
    check_target_shape,
    check_targets,
    get,
    gradient_bound,
    is_known,
    of_output,
    per_example,
    probabilities,
    readable_targets,
    takes_logits,
)
from lipdp.losses.similarity import CosineSimilarity

__all__ = [
    "BinaryCrossentropy",
    "BinaryHKR",
    "BinaryKR",
    "BoundedLoss",
    "CategoricalCrossentropy",
    "CosineSimilarity",
    "EMMA",
    "Focal",
    "Joint",
    "GloRo",
    "LogitAnnealing",
    "Loss",
    "MulticlassHKR",
    "MulticlassHinge",
    "MulticlassKR",
    "SparseCategoricalCrossentropy",
    "as_written",
    "check_axis",
    "check_target_shape",
    "check_targets",
    "get",
    "gradient_bound",
    "is_known",
    "of_output",
    "per_example",
    "probabilities",
    "readable_targets",
    "takes_logits",
]
