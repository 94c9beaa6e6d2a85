"""Rules of layers and operations that rearrange, repeat, drop or resample entries."""

import math

import keras
import numpy as np
from keras import layers, ops
from keras.src import ops as keras_ops

from lipdp.bounds import norms
from lipdp.bounds.builtin.linear import channels_last
from lipdp.bounds.rule import Rule, lipschitz, register, size


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
    layers.Masking,
    keras_ops.numpy.Copy,
)
def rearrangement(layer, call):
    return lipschitz()


@register(keras_ops.nn.SpaceToDepth, keras_ops.nn.DepthToSpace)
def space_to_depth(operation, call):
    channels_last(operation)
    return lipschitz()


@register(keras_ops.core.StopGradient)
def stop_gradient(operation, call):
    return Rule(forward=lambda xs: xs[0], backward=lambda xs, g: [0.0])


@register(keras_ops.core.Cast)
def cast(operation, call):
    if operation.dtype not in ("float32", "float64"):
        raise ValueError(f"a cast to {operation.dtype} has no rule; cast to 'float32'")
    return lipschitz()


def _check_axes(axes, rank):
    """Raises `ValueError` where the axes hold the batch axis; `None` means all axes."""
    axes = range(rank) if axes is None else axes
    if any(a % rank == 0 for a in (axes if isinstance(axes, (list, tuple, range)) else [axes])):
        raise ValueError("it touches the batch axis, so it mixes examples; use other axes")


@register(keras_ops.numpy.Transpose)
def transpose(operation, call):
    if operation.axes is None or operation.axes[0] != 0:
        raise ValueError(
            f"axes={operation.axes} moves the batch axis, so it mixes examples; keep it first"
        )
    return lipschitz()


@register(keras_ops.numpy.Swapaxes)
def swapaxes(operation, call):
    _check_axes((operation.axis1, operation.axis2), len(call.input_shape) + 1)
    return lipschitz()


@register(keras_ops.numpy.Moveaxis)
def moveaxis(operation, call):
    _check_axes((*operation.source, *operation.destination), len(call.input_shape) + 1)
    return lipschitz()


@register(keras_ops.numpy.Flip, keras_ops.numpy.Roll, keras_ops.numpy.Squeeze, keras_ops.numpy.Sort)
def along_axes(operation, call):
    _check_axes(operation.axis, len(call.input_shape) + 1)
    return lipschitz()


@register(keras_ops.numpy.ExpandDims)
def expand_dims(operation, call):
    _check_axes(operation.axis, len(call.output_shape) + 1)
    return lipschitz()


@register(keras_ops.numpy.GetItem)
def get_item(operation, call):
    """Slices and integers take an entry once at most."""
    key = call.args[1] if len(call.args) > 1 else call.kwargs["key"]
    key = tuple(key) if isinstance(key, (list, tuple)) else (key,)
    if not all(
        k is None or k is Ellipsis or type(k) is slice or isinstance(k, (int, np.integer))
        for k in key
    ) or any(isinstance(k, bool) for k in key):
        raise ValueError("only slices and integers may pick entries; for others use keras.ops.take")
    whole = key[0] is Ellipsis or key[0] == slice(None)
    # An ellipsis may stand for no axis at all; then the next key meets the batch.
    named = sum(k is not None and k is not Ellipsis for k in key)
    if not whole or (key[0] is Ellipsis and named > len(call.input_shape)):
        raise ValueError("it picks examples out of the batch; begin with a whole slice, x[:, ...]")
    return lipschitz()


@register(keras_ops.numpy.Take)
def take(operation, call):
    """An entry that is taken `n` times counts `√n`."""
    indices = call.args[1] if len(call.args) > 1 else call.kwargs["indices"]
    if isinstance(indices, keras.KerasTensor):
        raise ValueError("indices that are computed have no rule; give constants")
    _check_axes(operation.axis, len(call.input_shape) + 1)
    length = size((call.input_shape[operation.axis % (len(call.input_shape) + 1) - 1],))
    indices = np.asarray(indices)
    if indices.dtype.kind not in "iu" or not ((-length <= indices) & (indices < length)).all():
        raise ValueError(f"indices must be integers in [{-length}, {length}); got {indices!r}")
    return lipschitz(math.sqrt(np.bincount(indices.ravel() % length, minlength=1).max()))


@register(keras_ops.numpy.Pad)
def pad(operation, call):
    values = call.args[1] if len(call.args) > 1 else call.kwargs.get("constant_values")
    if operation.mode != "constant" or values not in (None, 0):
        raise ValueError("only padding with zeros has a rule; use mode='constant'")
    if len(operation.pad_width) == 1 or any(operation.pad_width[0]):
        raise ValueError("it adds examples to the batch; begin `pad_width` with (0, 0)")
    return lipschitz()


@register(keras_ops.numpy.Repeat)
def repeat(operation, call):
    _check_axes(operation.axis, len(call.input_shape) + 1)
    return lipschitz(math.sqrt(np.max(operation.repeats)))


@register(keras_ops.numpy.Tile)
def tile(operation, call):
    repeats = operation.repeats
    if isinstance(repeats, int) or len(repeats) != len(call.input_shape) + 1 or repeats[0] != 1:
        raise ValueError("`repeats` must name every axis, the batch first and with 1")
    return lipschitz(math.sqrt(math.prod(repeats)))


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
    channels_last(layer)
    if layer.interpolation in ("nearest", "bilinear"):
        return lipschitz(math.sqrt(math.prod(layer.size)))
    target = [n * f for n, f in zip(size_of_map(call), layer.size, strict=True)]
    return _resampling(call, target, interpolation=layer.interpolation)


@register(layers.Resizing)
def resizing(layer, call):
    return _resizing(layer, call, (layer.height, layer.width))


@register(keras_ops.image.Resize)
def resize(operation, call):
    return _resizing(operation, call, operation.size)


def _resizing(layer, call, target):
    channels_last(layer)
    if layer.crop_to_aspect_ratio or layer.pad_to_aspect_ratio:
        raise ValueError("keeping the aspect ratio has no rule; crop or pad in a layer before it")
    return _resampling(call, target, interpolation=layer.interpolation, antialias=layer.antialias)


def size_of_map(call):
    if len(call.input_shape) != 3:
        raise ValueError(f"it needs maps (batch, height, width, channels); got {call.input_shape}")
    size(call.input_shape)  # all sizes must be known
    return call.input_shape[:2]


def _resampling(call, target, **options):
    """Interpolation acts on each axis by a fixed matrix; the norm of their Kronecker product is
    the product of their norms. The matrix is what the operation makes of unit vectors.
    """
    norm = 1.0
    for n, new in zip(size_of_map(call), target, strict=True):
        units = ops.reshape(ops.eye(n), (n, n, 1, 1))
        matrix = ops.image.resize(units, (new, 1), data_format="channels_last", **options)
        norm = norm * norms.spectral_norm_bound(ops.reshape(matrix, (n, new)), gap=0.005)
    return lipschitz(norm)


@register(layers.UpSampling3D)
def up_sampling_3d(layer, call):
    return lipschitz(math.sqrt(math.prod(layer.size)))
