"""Rules of Keras' own layers and operations; importing it registers them."""

from lipdp.bounds.builtin import (
    activations,
    branches,
    linear,
    normalization,
    pooling,
    refused,
    scaling,
    shapes,
)

__all__ = [
    "activations",
    "branches",
    "linear",
    "normalization",
    "pooling",
    "refused",
    "scaling",
    "shapes",
]
