"""Rules of Keras' own layers and operations; importing it registers them."""

from lipdp.bounds.builtin import (
    activations,
    branches,
    linear,
    pooling,
    refused,
    scaling,
    sequences,
    shapes,
)

__all__ = [
    "activations",
    "branches",
    "linear",
    "pooling",
    "refused",
    "scaling",
    "sequences",
    "shapes",
]
