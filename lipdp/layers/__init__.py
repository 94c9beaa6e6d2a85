"""Layers with known bounds. Ordinary Keras layers: they train, save and serve without lipdp's
training code, and may be mixed with every Keras layer that has a rule.
"""

from lipdp.layers.activations import GroupSort
from lipdp.layers.almost_orthogonal import AlmostOrthogonalConv2D, AlmostOrthogonalDense
from lipdp.layers.blocks import (
    BlockReflector,
    ConvexPotential,
    ConvexPotentialConv2D,
    SandwichDense,
)
from lipdp.layers.convolutional import (
    PatchEmbedding,
    ResidualConv2D,
    SpectralConv1D,
    SpectralConv2D,
    SpectralConv2DTranspose,
    SpectralDepthwiseConv2D,
    SpectralSeparableConv2D,
)
from lipdp.layers.dense import FrobeniusDense, SpectralDense
from lipdp.layers.normalization import BallProjection, Centering, ClipGradient
from lipdp.layers.orthogonal import CayleyDense, ExponentialDense
from lipdp.layers.pooling import (
    GlobalL2NormPooling2D,
    GlobalScaledAveragePooling2D,
    L2NormPooling2D,
    ScaledAveragePooling2D,
)
from lipdp.layers.scaling import ChannelGain

__all__ = [
    "AlmostOrthogonalConv2D",
    "AlmostOrthogonalDense",
    "BallProjection",
    "BlockReflector",
    "CayleyDense",
    "Centering",
    "ChannelGain",
    "ClipGradient",
    "ConvexPotential",
    "ConvexPotentialConv2D",
    "ExponentialDense",
    "FrobeniusDense",
    "GlobalL2NormPooling2D",
    "GlobalScaledAveragePooling2D",
    "GroupSort",
    "L2NormPooling2D",
    "PatchEmbedding",
    "ResidualConv2D",
    "SandwichDense",
    "ScaledAveragePooling2D",
    "SpectralConv1D",
    "SpectralConv2D",
    "SpectralConv2DTranspose",
    "SpectralDense",
    "SpectralDepthwiseConv2D",
    "SpectralSeparableConv2D",
]
