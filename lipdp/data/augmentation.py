"""Augmented views of each example, averaged before anything is summed."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

__all__ = ["Augmentation"]

K = keras.layers

# Layers that change each example by itself; the tests hold them to it.
_SEPARATE = (
    K.GaussianNoise,
    K.RandomBrightness,
    K.RandomContrast,
    K.RandomCrop,
    K.RandomFlip,
    K.RandomRotation,
    K.RandomTranslation,
    K.RandomZoom,
)


class Augmentation(keras.layers.Layer):
    """Random views of each example, as many as wanted, for the sensitivity of one.

    A step sees `views` versions of each drawn example and averages their clipped loss gradients.
    Each view's gradient is within the bound, so their mean is too, and the noise stays what it is
    for one view (De et al., "Unlocking High-Accuracy Differentially Private Image Classification
    through Scale", 2022, call it augmentation multiplicity). Compute grows with `views`.

    Augmentation happens in training only, before the network, whose `BallProjection` bounds what
    comes out of it.

    Args:
        layers: one or several of Keras' random layers that treat each example by itself:
            RandomFlip, RandomTranslation, RandomCrop, RandomRotation, RandomZoom, RandomContrast,
            RandomBrightness, GaussianNoise.
        views: views of each example.

    Input shape: `(batch, ...)`. Output shape: `(batch·views, ...)`, an example's views together.

    Raises:
        TypeError: a layer that is none of these: it may mix examples, as MixUp and CutMix do.
        ValueError: `views` is not a positive integer.

    >>> augmentation = Augmentation(K.RandomFlip("horizontal"), views=4)
    >>> augmentation(ops.ones((2, 8, 8, 1))).shape[0]
    8
    """

    def __init__(
        self, layers: keras.layers.Layer | Sequence[keras.layers.Layer], views: int = 1
    ) -> None:
        super().__init__()
        layers = [layers] if isinstance(layers, keras.layers.Layer) else list(layers)
        for layer in layers:
            if type(layer) not in _SEPARATE:
                accepted = ", ".join(cls.__name__ for cls in _SEPARATE)
                raise TypeError(
                    f"`layers` must be {accepted}, which change each example by itself; got "
                    f"{type(layer).__name__}, which may mix them."
                )
        if isinstance(views, bool) or not isinstance(views, int) or views < 1:
            raise ValueError(f"`views` must be a positive integer; got {views!r}.")
        self.layers = layers
        self.views = views

    def call(self, x: Any) -> Any:
        x = self.repeated(ops.cast(x, self.compute_dtype))
        for layer in self.layers:
            x = layer(x, training=True)
        return x

    def repeated(self, values: Any) -> Any:
        """`(batch, ...)` to `(batch·views, ...)`, to go with the views."""
        return ops.repeat(values, self.views, axis=0) if self.views > 1 else values

    def averaged(self, values: Any) -> Any:
        """`(batch·views, ...)` to `(batch, ...)`, the mean of an example's views."""
        return ops.mean(ops.reshape(values, (-1, self.views, *values.shape[1:])), axis=1)
