"""Rules of layers that rearrange, repeat or drop entries."""

import math

from keras import layers
from keras.src import ops as keras_ops

from lipdp.bounds.rule import lipschitz, register, size


@register(
    layers.Flatten,
    layers.Reshape,
    layers.Permute,
    layers.ZeroPadding1D,
    layers.ZeroPadding2D,
    layers.ZeroPadding3D,
    layers.Cropping1D,
    layers.Cropping2D,
    layers.Cropping3D,
    layers.Identity,
)
def rearrangement(layer, call):
    return lipschitz()


@register(keras_ops.numpy.Reshape)
def reshape(operation, call):
    # A free reshape could fold the batch axis into the others.
    if not operation.newshape or operation.newshape[0] not in (-1, None):
        raise ValueError(
            "a reshape may mix the examples; use keras.layers.Reshape, which keeps the batch axis"
        )
    if any(n in (-1, None) for n in operation.newshape[1:]) or size(operation.newshape[1:]) != size(
        call.input_shape
    ):
        raise ValueError("a reshape must keep the size of an example; use keras.layers.Reshape")
    return lipschitz()


@register(layers.RepeatVector)
def repeat_vector(layer, call):
    return lipschitz(math.sqrt(layer.n))


@register(layers.UpSampling1D)
def up_sampling_1d(layer, call):
    return lipschitz(math.sqrt(layer.size))


@register(layers.UpSampling2D)
def up_sampling_2d(layer, call):
    if layer.interpolation not in ("nearest", "bilinear"):
        raise ValueError(
            f"interpolation={layer.interpolation!r} has no bound; use 'nearest' or 'bilinear'"
        )
    return lipschitz(math.sqrt(math.prod(layer.size)))


@register(layers.UpSampling3D)
def up_sampling_3d(layer, call):
    return lipschitz(math.sqrt(math.prod(layer.size)))
