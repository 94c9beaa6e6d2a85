"""Augmented views of each example, averaged before anything is summed."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

__all__ = ["Augmentation"]

K = keras.layers

# Layers of images that change each example by itself; the tests hold them to it. Others do not:
# AugMix and Equalization, and so RandAugment, were seen to mix examples, as MixUp and CutMix do.
_OF_IMAGES = (
    K.RandomBrightness,
    K.RandomContrast,
    K.RandomCrop,
    K.RandomFlip,
    K.RandomRotation,
    K.RandomTranslation,
    K.RandomZoom,
)
_SEPARATE = (K.GaussianNoise, *_OF_IMAGES)


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

    Input shape: images `(batch, height, width, channels)` or, gray, `(batch, height, width)`; for
    GaussianNoise alone any `(batch, ...)`. Output shape: `(batch·views, ...)`, an example's views
    together.

    Raises:
        TypeError: a layer that is none of these: it may mix examples, as MixUp and CutMix do.
        ValueError: `views` is not a positive integer; when called, examples are no images.

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
            x = _each_by_itself(layer, x)
        return x

    def repeated(self, values: Any) -> Any:
        """`(batch, ...)` to `(batch·views, ...)`, to go with the views."""
        return ops.repeat(values, self.views, axis=0) if self.views > 1 else values

    def averaged(self, values: Any) -> Any:
        """`(batch·views, ...)` to `(batch, ...)`, the mean of an example's views."""
        return ops.mean(ops.reshape(values, (-1, self.views, *values.shape[1:])), axis=1)


def _each_by_itself(layer, x):
    """Calls a layer. Keras' layers of images take `(batch, height, width)` for one image whose rows
    are examples, and would mix these: a gray image gets the axis of its one channel.
    """
    gray = isinstance(layer, _OF_IMAGES) and len(x.shape) == 3
    if isinstance(layer, _OF_IMAGES) and not gray and len(x.shape) != 4:
        raise ValueError(
            f"{type(layer).__name__} is for images (height, width, channels) or, gray, (height, "
            f"width); got examples of shape {tuple(x.shape[1:])}."
        )
    axis = 1 if getattr(layer, "data_format", None) == "channels_first" else -1
    x = layer(ops.expand_dims(x, axis) if gray else x, training=True)
    return ops.squeeze(x, axis) if gray else x
