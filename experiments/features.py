"""Fixed features of images: nothing in them is learnt, and each image is treated by itself."""

import math
import pathlib

import keras
import numpy as np
from keras import ops
from scipy import ndimage

from lipdp import layers

__all__ = ["cached", "deformed", "drawings", "patches", "scattering", "steadied"]


def scattering(
    shape: tuple,
    kind: str = "",
    scales: int = 2,
    groups: int = 27,
    padding: str = "zeros",
    mirror: bool = False,
    views: bool = False,
) -> keras.Model:
    """Scattering coefficients, normalised by groups of channels, of norm one together.

    Args:
        shape: of an image, `(height, width, channels)`.
        kind: of the drawings by which they are `steadied`; empty: they are not.
        scales: J of the scattering.
        groups: of neighbouring channels, which are centred and scaled together.
        padding: `"zeros"` or `"reflect"`.
        mirror: average the coefficients of an image with those of its mirror image, so that a
            network on top of them cannot tell left from right.
        views: average the features of an image with those of six views of it: turned by 10°
            either way, slanted by 0.2 either way, and scaled by 1.12 and its inverse.
    """
    inputs = keras.Input(shape)
    scatter = layers.Scattering2D(scales, padding=padding)
    scale = layers.BallProjection(1.0)  # what follows takes the scale away anyway
    normalize = layers.FlooredNormalization(groups**-0.5, 1e-3, groups=groups)

    def features_of(x):
        x = scale(x)
        if mirror:
            return normalize(scatter(x) + scatter(ops.flip(x, axis=2)))
        return normalize(scatter(x))

    x = features_of(inputs)
    if views:
        maps = _views(*shape[:2])
        for view in maps:
            x = x + features_of(ops.image.affine_transform(inputs, view, fill_mode="constant"))
        x = x / (1 + len(maps))
    network = keras.Model(inputs, x, name="scattering")
    return steadied(network, kind) if kind else network


def _views(rows, columns):
    """Affine maps about the middle of an image, as `affine_transform` takes them."""
    cos, sin, size = math.cos(math.radians(10)), math.sin(math.radians(10)), 1.12
    maps = [(cos, -sin, sin, cos), (cos, sin, -sin, cos), (1, 0.2, 0, 1), (1, -0.2, 0, 1)]
    maps += [(size, 0, 0, size), (1 / size, 0, 0, 1 / size)]
    x, y = (columns - 1) / 2, (rows - 1) / 2
    found = [(a, b, x - a * x - b * y, c, d, y - c * x - d * y, 0, 0) for a, b, c, d in maps]
    return np.array(found, np.float32)


def steadied(
    network: keras.Model, kind: str, size: int = 1536, floor: float = 0.5, count: int = 5000
) -> keras.Model:
    """Features that change less where an image is deformed a little, of norm one.

    A linear head learns from noisy sums which directions of the features tell classes apart. Those
    that tell a slant or a thickness from another take room in a vector of norm one, and are not
    worth it. They are found in drawings that were `deformed` twice: with `S` the covariance of the
    difference of two such twins, features less their mean are multiplied by `(S + f·I)^(−1/2)`, in
    the leading directions of all features, and brought to norm one (whitening within classes, as
    linear discriminants do, where each drawing is a class of its own). Drawings are constants to
    which no image of a data set contributes.

    Args:
        network: makes the features.
        kind: of the `drawings`.
        size: leading directions that are kept.
        floor: `f`, in parts of the mean eigenvalue of `S`.
        count: how many drawings.

    Returns:
        A model with outputs `(size,)`, fewer where there are fewer features.
    """
    flat = keras.layers.Flatten()(network.outputs[0])
    unit = layers.FlooredNormalization(1.0, 1e-3, center=False)
    plain = keras.Model(network.input, unit(flat))
    images = drawings(kind, network.input_shape[1:], count)
    all_of_them = (images, deformed(images, 1), deformed(images, 2))
    found, once, twice = (plain.predict(x, batch_size=50, verbose=0) for x in all_of_them)
    mean = found.mean(axis=0)
    found, once, twice = found - mean, once - mean, twice - mean
    _, vectors = np.linalg.eigh(sum(x.T @ x for x in (found, once, twice)))
    leading = vectors[:, ::-1][:, :size]
    change = (once - twice) @ leading
    values, vectors = np.linalg.eigh(change.T @ change)
    values = np.maximum(values, 0.0) / values.mean()
    matrix = leading @ ((vectors * (values + floor) ** -0.5) @ vectors.T)
    steady = keras.layers.Dense(matrix.shape[1], trainable=False)
    outputs = unit(steady(plain.outputs[0]))
    steady.set_weights([matrix, -mean @ matrix])
    return keras.Model(network.input, outputs, name=network.name)


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
    """Likeness of an image's patches to those of made-up drawings, by cells of the image.

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
    """The network's features of images, computed once and kept in a file, in half precision."""
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


def deformed(images: np.ndarray, seed: int) -> np.ndarray:
    """Bright shapes on a dark ground, each as another hand might have drawn it.

    Turned, scaled, slanted and moved a little, bent smoothly, and a third of them thicker, a third
    thinner. The same seed deforms the same images in the same way.
    """
    generator = np.random.default_rng(seed)
    rows, columns, channels = images.shape[1:]
    middle = np.array([(rows - 1) / 2, (columns - 1) / 2])
    grid = np.stack(np.mgrid[:rows, :columns], axis=-1) - middle
    made = np.empty_like(images)
    for image, result in zip(images, made, strict=True):
        turn = math.radians(10) * generator.standard_normal()
        height, width = np.exp(0.1 * generator.standard_normal(2))
        slant = generator.normal(0, 0.17)
        cos, sin = math.cos(turn), math.sin(turn)
        linear = np.array([[cos, -sin], [sin, cos]]) @ np.diag([height, width])
        linear = linear @ np.array([[1, 0], [slant, 1]])
        bend = np.stack(
            [ndimage.zoom(generator.standard_normal((5, 5)), (rows / 5, columns / 5), order=3)
             for _ in range(2)], axis=-1)  # fmt: skip
        places = grid @ linear.T + middle + generator.standard_normal(2) + bend
        kind = generator.random()
        if kind < 1 / 3:
            strength = generator.uniform(1.1, 1.5)
            image = np.minimum(255, strength * ndimage.gaussian_filter(image, (0.6, 0.6, 0)))
        elif kind < 2 / 3:
            image = np.maximum(0, image - generator.uniform(0, 120))
            image = image * (255 / max(image.max(), 1.0))
        for channel in range(channels):
            result[..., channel] = ndimage.map_coordinates(
                image[..., channel], np.moveaxis(places, -1, 0), order=1, mode="constant"
            )
    return made


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
