"""Rules of layers for sequences."""

from keras import layers

from lipdp.bounds.rule import lipschitz, register


@register(layers.Masking)
def masking(layer, call):
    # Positions that are hidden become zero; which ones are, each example decides for itself.
    return lipschitz()
