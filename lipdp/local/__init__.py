"""Gradients of single examples, layer by layer: their norms and clipped sums in one backward pass."""
