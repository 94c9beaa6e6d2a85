"""Layers with known bounds. Ordinary Keras layers: they train, save and serve without lipdp's
training code, and may be mixed with every Keras layer that has a rule.
"""

from lipdp.layers.activations import FullSort, GroupSort, Householder, MaxMin
from lipdp.layers.almost_orthogonal import AlmostOrthogonalConv2D, AlmostOrthogonalDense
from lipdp.layers.attention import LipschitzAttention
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
from lipdp.layers.feature_cache import cached_features
from lipdp.layers.gate import Gate
from lipdp.layers.normalization import BallProjection, Centering, ClipGradient, FlooredNormalization
from lipdp.layers.orthogonal import CayleyDense, ExponentialDense
from lipdp.layers.pooling import (
    GlobalL2NormPooling1D,
    GlobalL2NormPooling2D,
    GlobalScaledAveragePooling1D,
    GlobalScaledAveragePooling2D,
    L2NormPooling1D,
    L2NormPooling2D,
    ScaledAveragePooling1D,
    ScaledAveragePooling2D,
)
from lipdp.layers.recurrent import LipschitzRNN
from lipdp.layers.resampling import InvertibleDownSampling2D, InvertibleUpSampling2D
from lipdp.layers.scaling import ChannelGain
from lipdp.layers.scattering import Scattering2D
from lipdp.layers.sequences import (
    Embedding,
    EmbeddingBag,
    MaskedAveragePooling1D,
    PositionalEmbedding,
    TokenDense,
)

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
    "Embedding",
    "EmbeddingBag",
    "ExponentialDense",
    "FlooredNormalization",
    "FrobeniusDense",
    "FullSort",
    "Gate",
    "GlobalL2NormPooling1D",
    "GlobalL2NormPooling2D",
    "GlobalScaledAveragePooling1D",
    "GlobalScaledAveragePooling2D",
    "GroupSort",
    "Householder",
    "InvertibleDownSampling2D",
    "InvertibleUpSampling2D",
    "L2NormPooling1D",
    "L2NormPooling2D",
    "LipschitzAttention",
    "LipschitzRNN",
    "MaskedAveragePooling1D",
    "MaxMin",
    "PatchEmbedding",
    "PositionalEmbedding",
    "ResidualConv2D",
    "SandwichDense",
    "ScaledAveragePooling1D",
    "ScaledAveragePooling2D",
    "Scattering2D",
    "SpectralConv1D",
    "SpectralConv2D",
    "SpectralConv2DTranspose",
    "SpectralDense",
    "SpectralDepthwiseConv2D",
    "SpectralSeparableConv2D",
    "TokenDense",
    "cached_features",
]
