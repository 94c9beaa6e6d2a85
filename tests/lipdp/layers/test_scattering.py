"""Wavelet scattering: equal to other implementations, and no larger than its bound."""

import keras
import numpy as np
import pytest
from keras import ops

from lipdp import layers
from lipdp.audit import attack_bounds
from lipdp.autodiff import compiled, fused, vjp
from lipdp.layers import scattering
from lipdp.layers.scattering import Scattering2D
from tests.lipdp.helpers import one_in

ROUNDING = 1 + 1e-5


def coefficients(layer, x):
    """Of the images `(batch, height, width, channels)`, without the layer's scale."""
    return ops.convert_to_numpy(layer(x)) / layer.scale


# --- what it computes -------------------------------------------------------------------------


def direct_filter(sizes, sigma, angle, xi, slant):
    """Gaussian times wave, summed over periods, as the published libraries define it."""
    total = np.zeros(sizes, complex)
    for row, column in np.ndindex(5, 5):
        a = np.arange(sizes[0])[:, None] + (row - 2) * sizes[0]
        b = np.arange(sizes[1])[None] + (column - 2) * sizes[1]
        u = a * np.cos(angle) + b * np.sin(angle)
        v = -a * np.sin(angle) + b * np.cos(angle)
        total += np.exp(-(u**2 + slant**2 * v**2) / (2 * sigma**2) + 1j * xi * u)
    return total * slant / (2 * 3.1415 * sigma**2)


def direct_convolution(u, kernel, stride):
    """Circular, as a double sum over the shifts."""
    total = np.zeros(u.shape, complex)
    for a, b in np.ndindex(kernel.shape):
        total += kernel[a, b] * np.roll(u, (a, b), axis=(-2, -1))
    return total[..., ::stride, ::stride]


def coarse(kernel, resolution):
    """The filter for maps of every `2^resolution`-th pixel: low frequencies, then sampled."""
    n, m = kernel.shape
    spectrum = np.fft.fft2(kernel)
    for axis, size in enumerate((n, m)):
        first = int(size / 2 ** (resolution + 1)) if resolution else size
        cut = range(first, first + int(size * (1 - 2.0**-resolution)))
        if resolution:
            np.moveaxis(spectrum, axis, 0)[list(cut)] = 0
    return np.fft.ifft2(spectrum)[:: 2**resolution, :: 2**resolution] * 4**resolution


def direct_scattering(image, J, L, max_order, padding):
    """`(height, width)` to `(height', width', K)`, path by path."""
    mode = {"zeros": "constant", "reflect": "reflect"}[padding]
    step = 2**J
    margins = [(step, step + -n % step) for n in image.shape]
    x = np.pad(image, margins, mode=mode)
    low = direct_filter(x.shape, 0.8 * 2 ** (J - 1), 0.0, 0.0, 1.0)
    waves = []
    for j in range(J):
        for theta in range(L):
            angle = (int(L / 2 - 1) - theta) * np.pi / L
            shape = (x.shape, 0.8 * 2**j, angle)
            gabor = direct_filter(*shape, 0.75 * np.pi / 2**j, 4 / L)
            gaussian = direct_filter(*shape, 0.0, 4 / L)
            waves.append((j, gabor - gaussian * gabor.sum() / gaussian.sum()))

    def smooth(u, j):
        return direct_convolution(u, coarse(low, j), 2 ** (J - j)).real[1:-1, 1:-1]

    orders = [[smooth(x, 0)], [], []]
    for j, wave in waves:
        u = np.abs(direct_convolution(x, wave, 2**j))
        orders[1].append(smooth(u, j))
        for i, second in waves if max_order == 2 else ():
            if i > j:
                v = np.abs(direct_convolution(u, coarse(second, j), 2 ** (i - j)))
                orders[2].append(smooth(v, i))
    return np.stack(sum(orders, []), axis=-1)


@pytest.mark.parametrize(
    "shape_and_arguments",
    one_in(
        4,
        [
            ((8, 12, 2), {"J": 2, "L": 3, "padding": "reflect"}),
            ((16, 16, 1), {"J": 2, "L": 4}),
            ((10, 7, 1), {"J": 1, "L": 2}),
            ((9, 6, 1), {"J": 2, "L": 4, "max_order": 1}),
            ((8, 16, 1), {"J": 3, "L": 2}),
            ((16, 16, 1), {"J": 3, "L": 1, "padding": "reflect"}),
        ],
    ),
    ids=str,
)
def test_equals_a_direct_computation(shape_and_arguments, rng):
    shape, arguments = shape_and_arguments
    layer = Scattering2D(**arguments)
    x = rng.standard_normal((2, *shape))
    found = ops.convert_to_numpy(fused(layer)(x.astype("float32"))) / layer.scale
    full = {"J": 2, "L": 8, "max_order": 2, "padding": "zeros"} | arguments
    expected = [
        np.concatenate([direct_scattering(image[..., c], **full) for c in range(shape[-1])], -1)
        for image in x
    ]
    np.testing.assert_allclose(found, np.stack(expected), atol=2e-6, rtol=0)
    assert found.shape[-1] == shape[-1] * len(layer.paths)


# numpy frontend of kymatio 0.3.0 (NumPy 1.26): Scattering2D(J=2, shape=(8, 8), L=8) of the image
# below, moved to (height, width, K).
KYMATIO = """
1.717550e-01 6.776371e-02 1.024392e-01 1.430093e-01 1.821726e-01 1.430449e-01 1.022000e-01
6.779360e-02 4.642887e-02 8.516395e-02 1.721543e-01 1.770093e-01 1.716095e-01 1.830864e-01
1.651014e-01 9.153571e-02 3.992598e-02 1.400676e-02 1.209668e-02 1.317729e-02 6.118264e-03
6.325440e-03 5.584031e-03 5.207686e-03 1.196127e-02 1.389403e-02 1.784282e-02 1.794330e-02
9.583614e-03 1.112545e-02 1.281659e-02 9.633873e-03 8.329400e-03 9.279744e-03 1.011559e-02
1.258764e-02 7.587930e-03 1.899039e-02 1.793619e-02 1.312365e-02 5.329165e-03 8.737222e-03
7.658726e-03 1.028189e-02 1.685214e-02 8.850512e-03 8.293206e-03 9.515689e-03 7.704003e-03
1.397309e-02 1.888363e-02 1.843413e-02 7.521959e-03 1.293372e-02 1.142713e-02 9.528412e-03
4.968981e-03 9.645217e-03 1.155560e-02 1.173994e-02 1.041104e-02 1.714534e-02 1.712775e-02
1.396127e-02 9.557295e-03 4.825911e-03 6.428522e-03 6.485409e-03 5.983173e-03 1.323089e-02
1.237616e-02 1.361538e-02 1.179632e-02 8.420612e-03 5.787543e-03 5.518219e-03 5.536223e-03
7.671429e-03 6.320765e-03 9.997773e-03 1.050346e-02 1.456545e-01 1.259346e-01 1.381458e-01
1.348269e-01 1.055634e-01 1.324779e-01 1.317863e-01 1.238712e-01 1.075920e-01 1.701546e-01
1.929336e-01 1.700415e-01 7.213310e-02 1.645495e-01 1.759446e-01 2.014696e-01 1.329506e-01
2.207987e-02 2.682753e-02 2.150418e-02 9.601227e-03 8.498894e-03 8.160445e-03 9.116650e-03
1.353968e-02 1.843761e-02 2.977834e-02 2.563663e-02 1.310836e-02 1.731959e-02 1.877768e-02
1.237565e-02 7.973441e-03 7.512641e-03 1.542764e-02 1.784970e-02 1.069641e-02 1.956709e-02
1.859466e-02 1.034281e-02 3.726789e-03 1.179027e-02 6.755621e-03 4.828495e-03 1.352017e-02
5.165792e-03 7.396372e-03 9.529864e-03 1.822993e-02 1.386471e-02 1.967405e-02 1.859656e-02
1.109444e-02 1.754009e-02 1.596310e-02 1.206542e-02 4.843442e-03 1.076046e-02 1.699639e-02
1.730317e-02 1.506962e-02 2.437404e-02 2.700313e-02 1.966924e-02 6.637893e-03 6.773620e-03
9.531231e-03 8.033595e-03 8.649527e-03 1.993018e-02 2.771064e-02 2.490690e-02 1.385140e-02
1.052778e-02 6.030207e-03 3.420263e-03 7.679199e-03 7.208089e-03 7.961994e-03 1.186976e-02
1.046155e-02 -5.427088e-02 8.054210e-02 1.243964e-01 1.402517e-01 1.436745e-01 1.387521e-01
1.164124e-01 7.825327e-02 6.230212e-02 1.055518e-01 2.026214e-01 2.085392e-01 1.827045e-01
2.388015e-01 1.815226e-01 9.407554e-02 7.907406e-02 1.363193e-02 1.561669e-02 8.282940e-03
5.429987e-03 8.868327e-03 1.130889e-02 1.298995e-02 1.254755e-02 1.841348e-02 2.286630e-02
1.434387e-02 6.943671e-03 1.172736e-02 1.665314e-02 1.481760e-02 1.022356e-02 1.443579e-02
1.487487e-02 9.735729e-03 3.999983e-03 1.129558e-02 1.741222e-02 1.463730e-02 9.594403e-03
8.071678e-03 7.815386e-03 8.434969e-03 6.930090e-03 7.700926e-03 6.222894e-03 6.733136e-03
6.612355e-03 1.374870e-02 1.883241e-02 1.241185e-02 4.808147e-03 1.263620e-02 1.613622e-02
1.330863e-02 7.898785e-03 1.357665e-02 1.511182e-02 1.132352e-02 5.609555e-03 1.543669e-02
1.859599e-02 1.786955e-02 1.232614e-02 1.097016e-02 1.211336e-02 9.702825e-03 5.247879e-03
1.133956e-02 1.319151e-02 1.127163e-02 1.029173e-02 5.871951e-03 6.609935e-03 5.249431e-03
4.538304e-03 9.759477e-03 6.605562e-03 5.663910e-03 5.452093e-03 5.289550e-01 1.852022e-01
2.400645e-01 1.894842e-01 9.177373e-02 4.903964e-02 4.870315e-02 4.989973e-02 8.379397e-02
1.975413e-01 2.918713e-01 2.221674e-01 8.253765e-02 1.256981e-01 9.880543e-02 8.215769e-02
7.299714e-02 1.712396e-02 2.081883e-02 1.131785e-02 5.581705e-03 8.895393e-03 1.498146e-02
1.700749e-02 1.497079e-02 1.895463e-02 2.764164e-02 1.734410e-02 1.103256e-02 1.433351e-02
2.196697e-02 1.711481e-02 1.382716e-02 9.968266e-03 1.675779e-02 9.450489e-03 4.649860e-03
1.041638e-02 1.570012e-02 1.021286e-02 5.839843e-03 5.875327e-03 4.451983e-03 4.780669e-03
5.252898e-03 3.524445e-03 4.303335e-03 8.588133e-03 1.442122e-02 1.407573e-02 2.039826e-02
1.357267e-02 7.928657e-03 1.257939e-02 1.907012e-02 1.341742e-02 7.657399e-03 1.473584e-02
2.206355e-02 1.325775e-02 6.358781e-03 1.449889e-02 2.189565e-02 1.526331e-02 7.210396e-03
1.381063e-02 1.769846e-02 1.131498e-02 5.959461e-03 1.103784e-02 1.614480e-02 1.311017e-02
1.260118e-02 6.095404e-03 7.340999e-03 6.544892e-03 8.888088e-03 1.020985e-02 4.325560e-03
8.844573e-03 7.878829e-03
"""


@pytest.mark.any_backend
def test_equals_published_coefficients():
    r = np.arange(8)
    image = np.cos(0.9 * r[:, None] + 0.3 * r[None] ** 1.5) + 0.1 * r[None]
    found = coefficients(Scattering2D(padding="reflect"), image[None, ..., None])
    expected = np.array(KYMATIO.split(), dtype=float).reshape(1, 2, 2, 81)
    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0)


@pytest.mark.any_backend
def test_paths():
    """Their number, their order, and that a wave answers to the path of its scale and angle."""
    for J, L in ((1, 3), (2, 8), (4, 2)):
        paths = Scattering2D(J, L).paths
        assert len(paths) == 1 + J * L + L**2 * J * (J - 1) // 2 == len(set(paths))
        assert paths == sorted(paths, key=lambda path: (len(path), path))
        assert all(a[0] < b[0] for a, b in (p for p in paths if len(p) == 2))
        assert Scattering2D(J, L, max_order=1).paths == paths[: 1 + J * L]
    layer = Scattering2D(J=2, L=4)
    rows = np.arange(32)[:, None] + np.zeros(32)
    wave = np.cos(3 * np.pi / 8 * rows).astype("float32")  # scale 1, along the rows: theta = 1
    energy = (coefficients(layer, wave[None, ..., None]) ** 2).sum((0, 1, 2))
    first = range(1, 9)
    assert layer.paths[max(first, key=lambda k: energy[k])] == ((1, 1),)


@pytest.mark.parametrize("dtype", one_in(3, ["uint8", "float64", "int32"]))
def test_images_of_other_types(dtype, rng):
    x = rng.integers(0, 255, (2, 8, 8, 1))
    layer = Scattering2D(J=1, L=2)
    expected = ops.convert_to_numpy(layer(x.astype("float32")))
    np.testing.assert_array_equal(ops.convert_to_numpy(layer(x.astype(dtype))), expected)


@pytest.mark.skipif(keras.backend.backend() == "jax", reason="float64 is off by default")
def test_float64(rng):
    x = rng.standard_normal((1, 8, 8, 1))
    layer = Scattering2D(J=2, L=2, dtype="float64")
    expected = direct_scattering(x[0, ..., 0], J=2, L=2, max_order=2, padding="zeros")
    found = ops.convert_to_numpy(layer(ops.convert_to_tensor(x, dtype="float64")))
    np.testing.assert_allclose(found[0] / layer.scale, expected, atol=1e-12, rtol=0)


def test_broken_examples_stay_alone(rng):
    x = rng.standard_normal((3, 8, 8, 1)).astype("float32")
    layer = Scattering2D(J=1, L=2)
    expected = ops.convert_to_numpy(layer(x))
    x[1, 2, 3] = np.nan
    found = ops.convert_to_numpy(layer(x))
    np.testing.assert_array_equal(found[[0, 2]], expected[[0, 2]])
    assert np.isnan(found[1]).any()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"J": 0}, "`J` must be an integer of at least 1; got 0"),
        ({"J": 1.5}, "`J` must be an integer of at least 1; got 1.5"),
        ({"L": True}, "`L` must be an integer of at least 1; got True"),
        ({"max_order": 3}, "`max_order` must be 1 or 2; got 3"),
        ({"max_order": True}, "`max_order` must be an integer of at least 1; got True"),
        ({"padding": "same"}, "`padding` must be one of 'zeros', 'reflect'; got 'same'"),
    ],
)
def test_refused_arguments(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Scattering2D(**arguments)


@pytest.mark.parametrize(
    "shape, arguments, message",
    [
        ((8, 8), {}, "images of shape"),
        ((None, 8, 1), {}, "all but the batch known"),
        ((3, 8, 1), {}, "at least 4 pixels each way; got 3 by 8"),
        ((4, 8, 1), {"padding": "reflect"}, "would reflect 4 pixels of 4"),
        ((300, 300, 1), {}, "too large"),
    ],
)
def test_refused_images(shape, arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Scattering2D(**arguments).build((None, *shape))


@pytest.mark.any_backend
def test_refuses_images_of_another_size():
    layer = Scattering2D(J=1, L=2)
    layer(np.ones((1, 8, 8, 1), "float32"))
    with pytest.raises(ValueError, match="expected axis 2"):
        layer(np.ones((1, 8, 10, 1), "float32"))


# --- its bound --------------------------------------------------------------------------------


def stage_operator(stage):
    """A stage of filters on real maps of the torus, as a matrix of real entries."""
    height, width = stage[0][0].shape[1:]
    maps = np.fft.fft2(np.eye(height * width).reshape(-1, height, width))
    rows = []
    for bank, stride, weight in stage:
        y = np.fft.ifft2(maps[:, None] * bank)[..., ::stride, ::stride] * np.sqrt(weight)
        rows += [y.real.reshape(len(maps), -1), y.imag.reshape(len(maps), -1)]
    return np.concatenate(rows, axis=1).T


@pytest.mark.parametrize("sizes, J, L", [((12, 8), 2, 3), ((16, 24), 3, 2), ((6, 4), 1, 4)])
def test_norm_of_a_stage(sizes, J, L):
    """The certificate is the exact norm of the subsampled operator, weights included."""
    filters = scattering._Filters(sizes, J, L)
    for resolution in range(J):
        low = np.multiply.outer(*filters.lows[resolution])[None]
        stage = [(low, 2 ** (J - resolution), 0.7)]
        for j in range(resolution + (resolution > 0), J):
            stage.append((filters.waves[resolution, j], 2 ** (j - resolution), 0.3 + j))
        found = scattering._squared_norm(stage, 2 ** (J - resolution))
        assert found == pytest.approx(np.linalg.norm(stage_operator(stage), 2) ** 2, rel=1e-9)


CONFIGURATIONS = [
    ((16, 16, 1), {"J": 2, "L": 4}, 0.9),
    ((12, 9, 2), {"J": 1, "L": 3}, 0.9),
    ((16, 16, 1), {"J": 2, "L": 3, "padding": "reflect"}, 0.6),  # corners alone attain the factor 2
    ((5, 6, 3), {"J": 2, "L": 2}, 0.6),  # much of the waves lies in the margin
    pytest.param((16, 16, 1), {"J": 3, "L": 2}, 0.7, marks=pytest.mark.slow),
    pytest.param((28, 28, 1), {"J": 2, "L": 8}, 0.94, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("shape, arguments, attained", CONFIGURATIONS, ids=str)
def test_bound_holds(shape, arguments, attained):
    result = attack_bounds(Scattering2D(**arguments), shape, steps=12)
    assert result.ratio <= ROUNDING, result
    assert result.attained["output"] >= attained and result.attained["input"] >= attained


def border(n, name):
    x = np.zeros((n, n, 1))
    if name == "corner":
        x[:2, :2] = 1
    elif name == "edges":
        x[0] = x[-1] = x[:, 0] = x[:, -1] = 1
    elif name == "pixel":
        x[n // 2, n // 2] = 1
    return x


@pytest.mark.parametrize("padding", ["zeros", "reflect"])
def test_bound_on_borders_and_frequencies(padding):
    """Norms of features and of the Jacobian's products, from images that are extreme by design."""
    n = 16
    layer = Scattering2D(J=2, L=4, padding=padding)
    index = np.arange(n)
    waves = [
        np.cos(2 * np.pi * (a * index[:, None] + b * index[None]) / n + phase)[..., None]
        for a in range(0, n // 2 + 1, 2)
        for b in range(-n // 2, n // 2 + 1, 4)
        for phase in (0.0, 1.0)
    ]
    borders = [border(n, name) for name in ("zero", "corner", "edges", "pixel")]
    x = np.stack([*borders, *waves])
    norms = np.linalg.norm(x.reshape(len(x), -1), axis=1)
    x = (x / np.maximum(norms, 1e-9)[:, None, None, None]).astype("float32")
    both = compiled(
        lambda x: vjp(
            lambda x: [layer(x)],
            [x],
            lambda values: [ops.ones_like(values[0]) / np.sqrt(np.prod(values[0].shape[1:]))],
        )
    )
    for size in (1.0, 1e-6, 1e-25):
        (y,), (cotangents,) = both(ops.convert_to_tensor(x * np.float32(size)))
        y, cotangents = (ops.convert_to_numpy(v).reshape(len(x), -1) for v in (y, cotangents))
        assert np.linalg.norm(y, axis=1).max() <= size * ROUNDING
        assert np.linalg.norm(cotangents, axis=1).max() <= ROUNDING
        assert not y[0].any() and np.isfinite(cotangents).all()


@pytest.mark.any_backend
def test_behind_trainable_layers():
    network = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.BallProjection(1.0),
            layers.SpectralConv2D(2, 3, padding="same"),
            Scattering2D(J=1, L=3),
            layers.BallProjection(0.8),
            keras.layers.Flatten(),
            layers.SpectralDense(3),
        ]
    )
    result = attack_bounds(network, steps=1)
    assert result.ratio <= ROUNDING, result


# --- mutants, each of which the attack must catch ----------------------------------------------


class LargerFilters(Scattering2D):
    """Filters that are 10 % too large."""

    def _matrices(self, filters, paddings):
        self.scale *= 1.1
        super()._matrices(filters, paddings)

    bound = Scattering2D.bound


class NoAliasing(Scattering2D):
    """As if subsampling folded nothing: norm 2^-J if the Littlewood-Paley sum is one."""

    def _matrices(self, filters, paddings):
        self.scale = 2.0**self.J
        super()._matrices(filters, paddings)

    bound = Scattering2D.bound


class FreeReflection(Scattering2D):
    """Reflection taken for an isometry."""

    def _matrices(self, filters, paddings):
        self.scale *= 2
        super()._matrices(filters, paddings)

    bound = Scattering2D.bound


def plain_root(re, im):
    return ops.sqrt(ops.square(re) + ops.square(im))


def steep_root(re, im):
    squares = ops.square(re) + ops.square(im)
    return squares * ops.rsqrt(ops.maximum(squares, 1e-2))


MUTANTS = {
    "filters": (LargerFilters(J=2, L=4), (16, 16, 1)),
    "aliasing": (NoAliasing(J=1, L=2), (20, 20, 1)),
    "reflection": (FreeReflection(J=2, L=4, padding="reflect"), (16, 16, 1)),
}


@pytest.mark.any_backend
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name):
    layer, shape = MUTANTS[name]
    assert attack_bounds(layer, shape, steps=15).ratio > 1.001


@pytest.mark.any_backend
@pytest.mark.parametrize("root", [plain_root, steep_root])
def test_mutant_of_the_modulus_is_caught(root, monkeypatch):
    monkeypatch.setattr(scattering, "_modulus", root)
    assert attack_bounds(Scattering2D(J=1, L=2), (6, 6, 1), steps=10).ratio > 1.001
