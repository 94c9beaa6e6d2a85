"""Fixed features of images: nothing in them is learnt, and each image is treated by itself."""

import pathlib

import keras
import numpy as np
from keras import ops
from scipy import ndimage

from lipdp import layers

__all__ = ["cached", "drawings", "mean_of_drawings", "patches", "scattering"]


def scattering(
    shape: tuple, scales: int = 2, groups: int = 27, padding: str = "zeros", mirror: bool = False
) -> keras.Model:
    """Scattering coefficients, normalised by groups of channels, of norm one together.

    Args:
        shape: of an image, `(height, width, channels)`.
        scales: J of the scattering.
        groups: of neighbouring channels, which are centred and scaled together.
        padding: `"zeros"` or `"reflect"`.
        mirror: average the coefficients of an image with those of its mirror image, so that a
            network on top of them cannot tell left from right.
    """
    inputs = keras.Input(shape)
    pixels = layers.BallProjection(1.0)(inputs)  # what follows takes the scale away anyway
    scatter = layers.Scattering2D(scales, padding=padding)
    x = scatter(pixels)
    if mirror:
        x = ops.add(x, scatter(ops.flip(pixels, axis=2)))
    x = layers.FlooredNormalization(groups**-0.5, 1e-3, groups=groups)(x)
    return keras.Model(inputs, x, name="scattering")


def patches(
    shape: tuple,
    kind: str,
    filters: int = 512,
    size: int = 6,
    cells: int = 3,
    threshold: float = 0.25,
    whitening: float = 0.3,
    mirror: bool = False,
) -> keras.Model:
    """How like the patches of an image are to those of made-up drawings, by cells of the image.

    Every patch of an image is centred, scaled and whitened, all of one length, and compared with
    a dictionary of patches that were treated alike; what exceeds the threshold, on either side, is
    averaged over the positions of a cell (after Coates, Ng & Lee, "An Analysis of Single-Layer
    Networks in Unsupervised Feature Learning", AISTATS 2011). What a cell has of features is
    centred, scaled and partly whitened, so that the few directions in which most of them vary leave
    room for others. The dictionary and all these statistics are those of `drawings`: constants to
    which no image of a data set contributes.

    Args:
        shape: of an image, `(height, width, channels)`.
        kind: of the drawings.
        filters: patches in the dictionary; twice as many features in each cell.
        size: pixels of a patch each way.
        cells: of the image each way.
        threshold: of the cosine between two patches.
        whitening: exponent of the features' covariance; 0 scales them only, 1/2 whitens them.
        mirror: average an image's features with those of its mirror image.

    Returns:
        A model whose outputs `(cells, cells, 2·filters)` have norm one together.
    """
    images = drawings(kind, shape, 1500)
    floor = 10.0  # of a patch's deviation in grey levels, squared
    kernel, dictionary = _patches_of(images, size, filters, floor)
    side = min(shape[:2]) - size + 1
    pool = side // cells
    margin = (side - pool * cells) // 2
    constant = {"use_bias": False, "trainable": False}
    whiten = keras.layers.Conv2D(kernel.shape[-1], size, **constant)
    compare = keras.layers.Conv2D(filters, 1, **constant)
    mean_of_patch = keras.layers.AveragePooling2D(size, strides=1)
    mean_of_cell = keras.layers.AveragePooling2D(pool)

    def features_of(x):
        mean = mean_of_patch(ops.mean(x, axis=-1, keepdims=True))
        square = mean_of_patch(ops.mean(ops.square(x), axis=-1, keepdims=True))
        variance = ops.maximum(square - ops.square(mean), 0.0)
        x = whiten(x) * ops.rsqrt(variance + floor)
        x = x * ops.rsqrt(ops.sum(ops.square(x), axis=-1, keepdims=True) + 1e-3)
        x = x[:, margin : margin + pool * cells, margin : margin + pool * cells]
        x = compare(x)
        either = [mean_of_cell(ops.relu(sign * x - threshold)) for sign in (1.0, -1.0)]
        return ops.concatenate(either, axis=-1)

    inputs = keras.Input(shape)
    x = features_of(inputs)
    if mirror:
        x = (x + features_of(ops.flip(inputs, axis=2))) / 2
    raw = keras.Model(inputs, x)
    whiten.set_weights([kernel])
    compare.set_weights([dictionary[None, None]])
    found = raw.predict(images, batch_size=4, verbose=0)
    balance = keras.layers.Dense(2 * filters, **constant)
    x = balance(x - found.mean(axis=0))
    balance.set_weights([_balanced(found.reshape(-1, 2 * filters), whitening)])
    x = layers.FlooredNormalization(1.0, 1e-3, center=False)(x)
    return keras.Model(inputs, x, name="patches")


def _patches_of(images, size, count, floor):
    """The whitening of centred patches of images, a kernel, and whitened patches, columns."""
    generator = np.random.default_rng(0)
    number, rows, columns, channels = images.shape
    of = [generator.integers(n, size=60 * count) for n in
          (number, rows - size + 1, columns - size + 1)]  # fmt: skip
    windows = np.lib.stride_tricks.sliding_window_view(images, (size, size), (1, 2))
    patches = windows[tuple(of)].transpose(0, 2, 3, 1).reshape(60 * count, -1).astype(float)
    patches -= patches.mean(axis=1, keepdims=True)
    patches = patches[patches.var(axis=1) > 4.0]  # flat ones have no shape
    patches /= np.sqrt(patches.var(axis=1, keepdims=True) + floor)
    values, vectors = np.linalg.eigh(patches.T @ patches / len(patches))
    values, vectors = values[1:], vectors[:, 1:]  # without the mean, of which nothing is left
    whitening = vectors * (values + 0.1 * values.mean()) ** -0.5
    chosen = patches[generator.permutation(len(patches))[:count]] @ whitening
    chosen /= np.linalg.norm(chosen, axis=1, keepdims=True)
    whitening -= whitening.mean(axis=0)
    return whitening.reshape(size, size, channels, -1), chosen.T


def _balanced(features, exponent):
    """The matrix that scales features to deviation one, and their covariance's eigenvectors by
    its eigenvalues to the power of `−exponent`.
    """
    scale = 1.0 / np.maximum(features.std(axis=0, dtype=float), 1e-4)
    values, vectors = np.linalg.eigh(np.cov(features * scale, rowvar=False))
    weights = (np.maximum(values, 0.0) / values.mean() + 0.01) ** -exponent
    return scale[:, None] * ((vectors * weights) @ vectors.T)


def cached(network: keras.Model, x: np.ndarray, path: pathlib.Path) -> np.ndarray:
    """What the network makes of images, computed once and kept in a file, in half precision."""
    # Patches of few images at a time stay in the processor's cache.
    batch_size = 4 if network.name == "patches" else 100
    half = keras.Model(network.inputs, ops.cast(network.outputs[0], "float16"), name=network.name)
    return layers.cached_features(half, x, path, batch_size=batch_size)


def drawings(kind: str, shape: tuple, count: int = 500) -> np.ndarray:
    """Images that are made up, from no data: `"strokes"` of a pen, `"blobs"` of ink, or `"leaves"`.

    The first two stand for bright shapes in the middle of a dark ground, all channels alike, the
    third for photographs: things of all sizes that hide each other, in colours. Always the same
    ones: public constants.

    Args:
        kind: `"strokes"`, one to three arcs each; `"blobs"`, smooth noise above a threshold; or
            `"leaves"`, ellipses and boxes of flat shades that lie on each other anyhow (after Lee,
            Mumford & Huang, "Occlusion Models for Natural Images", IJCV 2001).
        shape: `(height, width, channels)`.
        count: how many.

    Returns:
        `(count, height, width, channels)`, float32 in [0, 255].

    Raises:
        ValueError: the kind is unknown.
    """
    generator = np.random.default_rng(0)
    rows, columns, channels = shape
    y, x = np.arange(rows) - (rows - 1) / 2, np.arange(columns) - (columns - 1) / 2
    if kind == "strokes":
        # Arcs are Bézier curves whose ends and bend scatter around the middle, a fifth of it.
        t = np.linspace(0, 1, 24)[:, None]
        spread = np.array([0.2 * rows, 0.14 * columns])
        images = np.zeros((count, rows, columns))
        for image in images:
            for _ in range(generator.integers(1, 4)):
                a, b, c = spread * generator.standard_normal((3, 2))
                arc = (1 - t) ** 2 * a + 2 * t * (1 - t) * b + t**2 * c
                squares = np.square(y[:, None] - arc[:, 0])[:, None] + np.square(
                    x[:, None] - arc[:, 1]
                )
                distance = np.sqrt(squares.min(-1))
                np.maximum(image, np.clip(1.5 - distance / (0.043 * rows), 0, 1), out=image)
    elif kind == "blobs":
        noise = generator.standard_normal((count, rows, columns))
        noise = ndimage.gaussian_filter(noise, (0, 0.09 * rows, 0.09 * columns))
        window = np.exp(-np.square(y / (0.4 * rows)))[:, None] * np.exp(
            -np.square(x / (0.4 * columns))
        )
        images = np.clip(2 * noise / noise.std() + 6 * (window - 0.5), 0, 1)
    elif kind == "leaves":
        return _leaves(generator, shape, count)
    else:
        raise ValueError(f"`kind` must be 'strokes', 'blobs' or 'leaves'; got {kind!r}.")
    return np.repeat(255 * images[..., None], channels, axis=-1).astype(np.float32)


def _leaves(generator, shape, count):
    """Sixty things each, of a shade and a tint that is weaker than the shade."""
    rows, columns, channels = shape
    y, x = np.mgrid[:rows, :columns]
    images = np.empty((count, *shape))
    for image in images:
        image[:] = generator.uniform(0, 1, channels)
        for _ in range(60):
            size = 1.5 * 13 ** (generator.random() ** 1.5)
            middle = generator.uniform(-4, np.array([rows, columns]) + 4)
            angle = generator.uniform(0, np.pi)
            slender = np.exp(generator.uniform(-0.7, 0.7))
            above, beside = y - middle[0], x - middle[1]
            along = (np.cos(angle) * above + np.sin(angle) * beside) * slender
            across = (np.cos(angle) * beside - np.sin(angle) * above) / slender
            if generator.random() < 0.5:
                reach = np.hypot(along, across)
            else:
                reach = np.maximum(np.abs(along), np.abs(across))
            inside = np.clip(0.5 - (reach - size), 0, 1)[..., None]
            tint = 0.1 * generator.standard_normal(channels)
            color = np.clip(generator.uniform() + tint, 0, 1)
            slope = 0.012 * generator.standard_normal(2)
            shade = (slope[0] * along + slope[1] * across)[..., None]
            image += inside * (color + shade - image)
        image += 0.01 * generator.standard_normal(shape)
    return (255 * np.clip(images, 0, 1)).astype(np.float32)


def mean_of_drawings(network: keras.Model, kind: str) -> np.ndarray:
    """The mean of what the network makes of `drawings`."""
    return network.predict(drawings(kind, network.input_shape[1:]), batch_size=100, verbose=0).mean(
        0
    )
