"""Networks whose bounds are known, as plain Keras models of logits.

Each begins with a `BallProjection(radius)`, which bounds the input: a radius about the norm that
inputs have keeps their size, a smaller one makes all inputs equally long, which is tighter. Each
layer keeps norms, so that cotangents and gradients stay near their bounds; none has a bias,
whose bound grows with the root of the number of positions. Residual branches are averaged, not
added: `(x + f(x))/2` is no longer than `x`.
"""

from collections.abc import Sequence

import keras

from lipdp import layers

__all__ = ["conv_net", "mlp", "resnet", "vgg"]

K = keras.layers


def mlp(
    input_shape: Sequence[int],
    classes: int,
    width: int = 128,
    depth: int = 2,
    radius: float = 1.0,
) -> keras.Model:
    """Dense layers with sorted features between them.

    Args:
        input_shape: of an example, any rank.
        classes: number of logits.
        width: units of a hidden layer; even.
        depth: number of dense layers, the last included; 1 is a linear model.
        radius: of the ball of the input.

    Raises:
        ValueError: an argument out of range.

    >>> mlp((28, 28, 1), 10, depth=3).output_shape
    (None, 10)
    """
    _check("depth", depth, depth >= 1, "a positive integer")
    _check_width(width, 2)
    hidden = []
    for _ in range(depth - 1):
        hidden += [layers.SpectralDense(width, use_bias=False), layers.GroupSort()]
    return _sequential("mlp", input_shape, radius, [K.Flatten(), *hidden, _head(classes)])


def conv_net(
    input_shape: Sequence[int],
    classes: int,
    width: int = 16,
    radius: float = 1.0,
) -> keras.Model:
    """Two convolutions and a dense layer, nearly without overlap.

    A convolution with stride 2 reads each entry at most 4 times, and one with stride = kernel
    once, where a dense 3×3 kernel reads it 9 times and has three times the gradient bound.

    Args:
        input_shape: `(height, width, channels)`.
        classes: number of logits.
        width: filters of the first convolution, half of those of the second; even.
        radius: of the ball of the input.

    Raises:
        ValueError: an argument out of range.

    >>> conv_net((28, 28, 1), 10).output_shape
    (None, 10)
    """
    _check_image(input_shape, 4)
    _check_width(width, 2)
    return _sequential(
        "conv_net",
        input_shape,
        radius,
        [
            layers.SpectralConv2D(width, 4, strides=2, padding="same", use_bias=False),
            layers.GroupSort(),
            layers.SpectralConv2D(2 * width, 2, strides=2, use_bias=False),
            layers.GroupSort(),
            K.Flatten(),
            _head(classes),
        ],
        centred=True,
    )


# Convolutions of each stage; a pooling of 2 follows each.
_VGG = {5: (1, 1, 1), 8: (2, 2, 2)}


def vgg(
    input_shape: Sequence[int],
    classes: int,
    depth: int = 5,
    width: int = 32,
    radius: float = 1.0,
) -> keras.Model:
    """Stages of 3×3 convolutions with pooling, then two dense layers (Simonyan & Zisserman, 2015).

    Args:
        input_shape: `(height, width, channels)`, at least 8×8.
        classes: number of logits.
        depth: 5 (a convolution a stage) or 8 (two), dense layers included.
        width: filters of the first stage; doubled at each further one; even.
        radius: of the ball of the input.

    Raises:
        ValueError: an argument out of range.

    >>> vgg((32, 32, 3), 10, width=8).output_shape
    (None, 10)
    """
    _check("depth", depth, depth in _VGG, f"one of {sorted(_VGG)}")
    _check_image(input_shape, 8)
    _check_width(width, 2)
    body = []
    for stage, convolutions in enumerate(_VGG[depth]):
        for _ in range(convolutions):
            body += [_conv(width * 2**stage), layers.GroupSort()]
        body.append(layers.ScaledAveragePooling2D(2))
    body += [
        K.Flatten(),
        layers.SpectralDense(8 * width, use_bias=False),
        layers.GroupSort(),
        _head(classes),
    ]
    return _sequential("vgg", input_shape, radius, body, centred=True)


def resnet(
    input_shape: Sequence[int],
    classes: int,
    depth: int = 6,
    width: int = 32,
    radius: float = 1.0,
) -> keras.Model:
    """Averaged residual blocks of two 3×3 convolutions (after He et al., 2016).

    A convolution, blocks in two stages (the second with twice the filters and half the size), a
    pooling to 4×4 positions at most, and a dense layer.

    Args:
        input_shape: `(height, width, channels)`, at least 8×8.
        classes: number of logits.
        depth: 6, 8 or 10: layers with weights along the longest path, with 2, 3 or 4 blocks.
        width: filters of the first stage; even.
        radius: of the ball of the input.

    Raises:
        ValueError: an argument out of range.

    >>> resnet((32, 32, 3), 10, depth=6, width=8).output_shape
    (None, 10)
    """
    _check("depth", depth, depth in (6, 8, 10), "6, 8 or 10")
    _check_image(input_shape, 8)
    _check_width(width, 2)
    blocks = (depth - 2) // 2
    inputs, x = _front(input_shape, radius, centred=True)
    x = layers.GroupSort()(_conv(width, 4, strides=2)(x))
    for block in range(blocks):
        if block == blocks // 2:
            x = _conv(2 * width, 2, strides=2)(x)
        x = _residual(x)
    pool = max(1, min(x.shape[1:3]) // 4)
    x = K.Flatten()(layers.ScaledAveragePooling2D(pool)(x))
    return keras.Model(inputs, _head(classes)(x), name="resnet")


# --- parts ------------------------------------------------------------------------------------


def _front(input_shape, radius, centred=False):
    inputs = keras.Input(tuple(input_shape))
    x = layers.Centering()(inputs) if centred else inputs
    return inputs, layers.BallProjection(radius)(x)


def _sequential(name, input_shape, radius, body, centred=False):
    front = [layers.Centering()] if centred else []
    return keras.Sequential(
        [keras.Input(tuple(input_shape)), *front, layers.BallProjection(radius), *body], name=name
    )


def _conv(filters, kernel_size=3, strides=1):
    return layers.SpectralConv2D(
        filters, kernel_size, strides=strides, padding="same", use_bias=False
    )


def _residual(x):
    filters = x.shape[-1]
    branch = layers.GroupSort()(_conv(filters)(x))
    return K.Average()([x, layers.GroupSort()(_conv(filters)(branch))])


def _head(classes):
    return layers.SpectralDense(classes, use_bias=False, name="logits")


def _check(name, value, holds, accepted):
    if isinstance(value, bool) or not isinstance(value, int) or not holds:
        raise ValueError(f"`{name}` must be {accepted}; got {value!r}.")


def _check_width(width, multiple):
    _check(
        "width",
        width,
        isinstance(width, int) and width >= multiple and width % multiple == 0,
        f"a positive multiple of {multiple}",
    )


def _check_image(input_shape, least):
    shape = tuple(input_shape)
    if len(shape) != 3 or not all(isinstance(n, int) and n >= 1 for n in shape):
        raise ValueError(f"`input_shape` must be (height, width, channels); got {input_shape!r}.")
    if min(shape[:2]) < least:
        raise ValueError(
            f"`input_shape` must be at least {least}×{least} pixels; got {input_shape!r}."
        )
