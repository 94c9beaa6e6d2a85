"""Gradients of single examples, layer by layer."""
