"""Networks whose bounds are known, as plain Keras models of logits.

Each begins with a `BallProjection(radius)`, which bounds the input: a radius about the norm that
inputs have keeps their size, a smaller one makes all inputs equally long, which is tighter. Each
layer keeps norms, so that cotangents and gradients stay near their bounds; none has a bias,
whose bound grows with the root of the number of positions. Residual branches are averaged, not
added: `(x + f(x))/2` is no longer than `x`.
"""

from collections.abc import Sequence

import keras
import numpy as np

from accountants.validation import check_integer, check_number
from lipdp import layers

__all__ = [
    "conv_net",
    "cosine_net",
    "mixer",
    "mlp",
    "resnet",
    "scatter_net",
    "text_classifier",
    "vgg",
    "vision_transformer",
]

K = keras.layers


def mlp(
    input_shape: Sequence[int],
    classes: int,
    width: int = 128,
    depth: int = 2,
    radius: float = 1.0,
    hidden_radius: float | None = None,
) -> keras.Model:
    """Dense layers with sorted features between them.

    A layer of orthogonal rows that are fewer than its inputs keeps only a part of their norm, and
    bounds count on all of it. `hidden_radius` puts a ball behind each hidden layer: where it is
    about that part, next to nothing is cut off and the bounds behind it shrink to it.

    Args:
        input_shape: of an example, any rank.
        classes: number of logits.
        width: units of a hidden layer; even.
        depth: number of dense layers, the last included; 1 is a linear model.
        radius: of the ball of the input.
        hidden_radius: of the ball behind a hidden layer, in parts of the radius of the ball before
            it; None: no balls.

    Raises:
        ValueError: an argument out of range.

    >>> mlp((28, 28, 1), 10, depth=3).output_shape
    (None, 10)
    """
    check_integer(depth, "depth")
    _check_width(width, 2)
    hidden = []
    for _ in range(depth - 1):
        hidden += [layers.SpectralDense(width, use_bias=False), layers.GroupSort()]
    body = [K.Flatten(), *hidden, _head(classes)]
    return _sequential("mlp", input_shape, radius, body, hidden_radius=hidden_radius)


def conv_net(
    input_shape: Sequence[int],
    classes: int,
    width: int = 16,
    radius: float = 1.0,
    hidden_radius: float | None = None,
) -> keras.Model:
    """Two convolutions and a dense layer, nearly without overlap.

    A convolution with stride 2 reads each entry at most 4 times, and one with stride = kernel
    once, where a dense 3×3 kernel reads it 9 times and has three times the gradient bound.

    Args:
        input_shape: `(height, width, channels)`.
        classes: number of logits.
        width: filters of the first convolution, half of those of the second; even.
        radius: of the ball of the input.
        hidden_radius: of a ball behind each hidden layer, as in `mlp`.

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
        hidden_radius=hidden_radius,
    )


def cosine_net(
    input_shape: Sequence[int],
    classes: int,
    kernel_size: int = 7,
    filters: int = 24,
    strides: int = 2,
    pool: int = 2,
    cotangent: float = 1e-5,
    radius: float = 1.0,
) -> keras.Model:
    """Rectified, pooled filters of all examples alike in size, and a dense layer.

    The filters start as the lowest cosines of a block transform, each with both signs, whose pooled
    sizes tell much about an image before anything is learnt (after Bruna & Mallat, "Invariant
    Scattering Convolution Networks", 2013). Each filter's map is brought to one norm, so that the
    bound of the dense layer is attained. A noisy gradient is too coarse for filters that are good
    already: what comes back to them is clipped to `cotangent`, which makes their bound, their noise
    and their steps small; a value for which they change by about a third during training is good.

    Args:
        input_shape: `(height, width, channels)`.
        classes: number of logits.
        kernel_size: pixels of a filter each way.
        filters: cosines, of the lowest frequencies; fewer than `kernel_size²·channels`.
        strides: of the filters.
        pool: positions that are averaged, each way.
        cotangent: largest norm of an example's gradient that reaches the filters' maps.
        radius: of the ball of the input.

    Raises:
        ValueError: an argument out of range.

    >>> cosine_net((28, 28, 1), 10).output_shape
    (None, 10)
    """
    kernel_size = check_integer(kernel_size, "kernel_size")
    strides, pool = check_integer(strides, "strides"), check_integer(pool, "pool")
    _check_image(input_shape, kernel_size + (pool - 1) * strides)
    entries = kernel_size**2 * input_shape[-1]
    if check_integer(filters, "filters") >= entries:
        raise ValueError(f"`filters` must be below {entries}; got {filters!r}.")
    waves = layers.SpectralConv2D(2 * filters, kernel_size, strides=strides, use_bias=False)
    network = _sequential(
        "cosine_net",
        input_shape,
        radius,
        [
            waves,
            K.ReLU(),
            layers.ScaledAveragePooling2D(pool),
            layers.FlooredNormalization((2 * filters) ** -0.5, radius / 100, groups=2 * filters),
            K.Flatten(),
            layers.ClipGradient(cotangent),
            _head(classes),
        ],
        centred=True,
    )
    kernel = _cosines(kernel_size, input_shape[-1], filters)
    waves.kernel.assign(waves.kernel.constraint(keras.ops.convert_to_tensor(kernel, "float32")))
    return network


def _cosines(size, channels, count):
    """The lowest cosines of a block, but for the constant, and their negatives, a kernel."""
    cells, axes = np.arange(size), []
    for n in (size, size, channels):
        waves = np.cos(np.pi * np.outer(np.arange(n), np.arange(n) + 0.5) / n)
        axes.append(waves / np.linalg.norm(waves, axis=1, keepdims=True))
    # A wave over the channels, which is a colour, counts as two over pixels.
    order = cells[:, None, None] + cells[:, None] + 2 * np.arange(channels)
    lowest = np.argsort(order, axis=None, kind="stable")[1 : count + 1]
    blocks = np.einsum("ui,vj,wk->uvwijk", *axes).reshape(-1, size, size, channels)[lowest]
    return np.moveaxis(np.concatenate([blocks, -blocks]), 0, -1)


# Convolutions of each stage; a pooling of 2 follows each.
_VGG = {5: (1, 1, 1), 8: (2, 2, 2)}


def vgg(
    input_shape: Sequence[int],
    classes: int,
    depth: int = 5,
    width: int = 32,
    radius: float = 1.0,
    hidden_radius: float | None = None,
) -> keras.Model:
    """Stages of 3×3 convolutions with pooling, then two dense layers (Simonyan & Zisserman, 2015).

    Args:
        input_shape: `(height, width, channels)`, at least 8×8.
        classes: number of logits.
        depth: 5 (a convolution a stage) or 8 (two), dense layers included.
        width: filters of the first stage; doubled at each further one; even.
        radius: of the ball of the input.
        hidden_radius: of a ball behind each hidden layer, as in `mlp`.

    Raises:
        ValueError: an argument out of range.

    >>> vgg((32, 32, 3), 10, width=8).output_shape
    (None, 10)
    """
    if check_integer(depth, "depth") not in _VGG:
        raise ValueError(f"`depth` must be one of {sorted(_VGG)}; got {depth!r}.")
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
    return _sequential("vgg", input_shape, radius, body, centred=True, hidden_radius=hidden_radius)


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
    if check_integer(depth, "depth") not in (6, 8, 10):
        raise ValueError(f"`depth` must be 6, 8 or 10; got {depth!r}.")
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


def mixer(
    input_shape: Sequence[int],
    classes: int,
    patch_size: int = 4,
    width: int = 64,
    depth: int = 2,
    radius: float = 1.0,
) -> keras.Model:
    """Patches mixed over positions and over features in turns (Tolstikhin et al., 2021).

    Dense layers along either axis share their weights over the other one, at no cost in the bound:
    the gradient of a matrix is at most `X·G`, however many positions share it.

    Args:
        input_shape: `(height, width, channels)`, made of whole patches.
        classes: number of logits.
        patch_size: pixels of a patch each way.
        width: features of a patch; even.
        depth: number of blocks.
        radius: of the ball of the input.

    Raises:
        ValueError: an argument out of range.

    >>> mixer((32, 32, 3), 10, width=8).output_shape
    (None, 10)
    """
    check_integer(depth, "depth")
    _check_image(input_shape, 2)
    _check_width(width, 2)
    inputs, x = _front(input_shape, radius, centred=True)
    x = layers.PatchEmbedding(width, patch_size, use_bias=False)(x)
    for _ in range(depth):
        tokens = layers.TokenDense(x.shape[1], use_bias=False)
        x = K.Average()([x, layers.GroupSort()(tokens(x))])
        x = K.Average()([x, _channels(x)])
    return keras.Model(inputs, _head(classes)(K.Flatten()(x)), name="mixer")


def vision_transformer(
    input_shape: Sequence[int],
    classes: int,
    patch_size: int = 4,
    width: int = 64,
    heads: int = 4,
    depth: int = 1,
    radius: float = 1.0,
) -> keras.Model:
    """Patches that attend to each other (after Dosovitskiy et al., 2021).

    Attention is no contraction: its cotangent may grow by about the root of the number of patches
    at each block. What enters a block from behind is therefore clipped to the norm that it would
    have without attention (`ClipGradient`), so that bounds do not grow with depth.

    Args:
        input_shape: `(height, width, channels)`, made of whole patches.
        classes: number of logits.
        patch_size: pixels of a patch each way.
        width: features of a patch; even, a multiple of `heads`.
        heads: heads of each attention.
        depth: number of blocks.
        radius: of the ball of the input.

    Raises:
        ValueError: an argument out of range.

    >>> vision_transformer((32, 32, 3), 10, width=8).output_shape
    (None, 10)
    """
    depth, heads = check_integer(depth, "depth"), check_integer(heads, "heads")
    _check_image(input_shape, 2)
    _check_width(width, 2)
    if width % heads:
        raise ValueError(f"`heads` must be a divisor of width={width}; got {heads!r}.")
    inputs, x = _front(input_shape, radius, centred=True)
    x = layers.PatchEmbedding(width, patch_size, use_bias=False)(x)
    positions = x.shape[1]
    x = layers.PositionalEmbedding(radius / 2)(x)
    # Twice what a row has where all are equally long; scores then spread over [-1, 1].
    row = 2 * radius / positions**0.5
    for _ in range(depth):
        attention = layers.LipschitzAttention(
            heads, width // heads, radius=row, temperature=row * row
        )
        mixed = attention(layers.ClipGradient(1.0)(x))
        x = layers.BallProjection(radius)(K.Average()([x, mixed]))
        x = K.Average()([x, _channels(x)])
    return keras.Model(inputs, _head(classes)(K.Flatten()(x)), name="vision_transformer")


def text_classifier(
    vocabulary: int,
    length: int,
    classes: int,
    width: int = 32,
    depth: int = 2,
    mask_zero: bool = True,
) -> keras.Model:
    """The mean of the words' vectors, then dense layers (after fastText, Joulin et al., 2017).

    One example moves the whole table by a gradient of norm `G` at most, however long it is.

    Args:
        vocabulary: number of tokens.
        length: tokens of an example.
        classes: number of logits.
        width: length of a vector and units of a hidden layer; even.
        depth: number of dense layers, the last included.
        mask_zero: leave token 0, the padding, out of the mean.

    Raises:
        ValueError: an argument out of range.

    >>> text_classifier(1000, 200, 2).output_shape
    (None, 2)
    """
    for name, value in (("vocabulary", vocabulary), ("length", length), ("depth", depth)):
        check_integer(value, name)
    _check_width(width, 2)
    body = [layers.EmbeddingBag(vocabulary, width, mask_zero=mask_zero)]
    for _ in range(depth - 1):
        body += [layers.SpectralDense(width, use_bias=False), layers.GroupSort()]
    return keras.Sequential(
        [keras.Input((length,), dtype="int32"), *body, _head(classes)], name="text_classifier"
    )


_HEADS = ("linear", "dense", "conv")


def scatter_net(
    input_shape: Sequence[int],
    classes: int,
    head: str = "linear",
    width: int = 64,
    J: int = 2,
    L: int = 8,
    groups: int = 27,
    floor: float = 1e-3,
) -> keras.Model:
    """Fixed wavelet scattering with a trained head (Tramèr & Boneh, ICLR 2021).

    Each example's features are normalised in groups of channels and have norm one together, so
    that bounds are attained. The features of a data set may be computed once:
    `lipdp.layers.cached_features` on the layers before the head.

    Args:
        input_shape: `(height, width, channels)`.
        classes: number of logits.
        head: `"linear"`, `"dense"` (a hidden layer of `width`) or `"conv"` (a 1×1 convolution of
            `width` filters).
        width: of the head; even.
        J, L: scales and angles of `lipdp.layers.Scattering2D`.
        groups: groups of channels; must divide their number, `channels·(1 + JL + L²J(J−1)/2)`.
        floor: norm of a group, in parts of the image's, below which it is not stretched further.

    Raises:
        ValueError: an argument out of range.

    >>> scatter_net((28, 28, 1), 10, head="conv").output_shape
    (None, 10)
    """
    if head not in _HEADS:
        raise ValueError(f"`head` must be one of {_HEADS}; got {head!r}.")
    _check_image(input_shape, 2)
    _check_width(width, 2)
    heads = {
        "linear": [],
        "dense": [K.Flatten(), layers.SpectralDense(width, use_bias=False), layers.GroupSort()],
        "conv": [layers.SpectralConv2D(width, 1, use_bias=False), layers.GroupSort()],
    }
    return keras.Sequential(
        [
            keras.Input(tuple(input_shape)),
            layers.BallProjection(1.0),  # what follows takes the scale away anyway
            layers.Scattering2D(J, L),
            layers.FlooredNormalization(groups**-0.5, floor, groups=groups),
            *heads[head],
            K.Flatten(),
            _head(classes),
        ],
        name="scatter_net",
    )


# --- parts ------------------------------------------------------------------------------------


def _front(input_shape, radius, centred=False):
    inputs = keras.Input(tuple(input_shape))
    x = layers.Centering()(inputs) if centred else inputs
    return inputs, layers.BallProjection(radius)(x)


def _sequential(name, input_shape, radius, body, centred=False, hidden_radius=None):
    front = [layers.Centering()] if centred else []
    front.append(layers.BallProjection(radius))
    if hidden_radius is not None:
        body = _with_balls(body, radius, check_number(hidden_radius, "hidden_radius"))
    return keras.Sequential([keras.Input(tuple(input_shape)), *front, *body], name=name)


def _with_balls(body, radius, part):
    for layer in body:
        yield layer
        if isinstance(layer, layers.GroupSort):
            radius *= part
            yield layers.BallProjection(radius)


def _conv(filters, kernel_size=3, strides=1):
    return layers.SpectralConv2D(
        filters, kernel_size, strides=strides, padding="same", use_bias=False
    )


def _residual(x):
    filters = x.shape[-1]
    branch = layers.GroupSort()(_conv(filters)(x))
    return K.Average()([x, layers.GroupSort()(_conv(filters)(branch))])


def _channels(x):
    """A hidden layer over the features of each position."""
    width = x.shape[-1]
    hidden = layers.GroupSort()(layers.SpectralDense(width, use_bias=False)(x))
    return layers.SpectralDense(width, use_bias=False)(hidden)


def _head(classes):
    return layers.SpectralDense(classes, use_bias=False, name="logits")


def _check_width(width, multiple):
    if check_integer(width, "width") % multiple:
        raise ValueError(f"`width` must be a multiple of {multiple}; got {width!r}.")


def _check_image(input_shape, least):
    shape = tuple(input_shape)
    if len(shape) != 3 or not all(isinstance(n, int) and n >= 1 for n in shape):
        raise ValueError(f"`input_shape` must be (height, width, channels); got {input_shape!r}.")
    if min(shape[:2]) < least:
        raise ValueError(
            f"`input_shape` must be at least {least}×{least} pixels; got {input_shape!r}."
        )
