"""Certified norms against float64 SVDs."""

import itertools
import math

import keras
import numpy as np
import pytest
from keras import ops

from lipdp.autodiff import compiled, fused, vjp
from lipdp.bounds import norms
from tests.lipdp.helpers import one_in

ROUNDING = 5e-5  # of the bounds' own allowance, where one asks for tightness


def exact(matrix):
    return np.linalg.norm(np.asarray(matrix, dtype=np.float64), 2, axis=(-2, -1))


def orthogonal(rng, count, m, n):
    u, _, v = np.linalg.svd(rng.standard_normal((count, m, n)), full_matrices=False)
    return u @ v


def spectrum(rng, count, m, n, values):
    u, _, v = np.linalg.svd(rng.standard_normal((count, m, n)), full_matrices=False)
    return (u * values) @ v


def sparse(rng, count, m, n):
    stack = np.zeros((count, m, n))
    stack[np.arange(count), rng.integers(m, size=count), rng.integers(n, size=count)] = 3.0
    return stack


KINDS = {
    "gaussian": lambda rng, *s: rng.standard_normal(s),
    "uniform": lambda rng, *s: rng.random(s),
    "orthogonal": orthogonal,
    "near orthogonal": lambda rng, *s: orthogonal(rng, *s) + 1e-3 * rng.standard_normal(s),
    "low rank": lambda rng, c, m, n: (
        rng.standard_normal((c, m, 2)) @ rng.standard_normal((c, 2, n))
    ),
    "constant": lambda rng, *s: np.full(s, -0.3),
    "one spike": lambda rng, c, m, n: spectrum(
        rng, c, m, n, np.r_[1.0, np.full(min(m, n) - 1, 0.5)]
    ),
    "half at the top": lambda rng, c, m, n: spectrum(
        rng, c, m, n, (np.arange(min(m, n)) < (min(m, n) + 1) // 2) * 1.0
    ),
    "root at the top": lambda rng, c, m, n: spectrum(
        rng, c, m, n, (np.arange(min(m, n)) <= min(m, n) ** 0.5) * 1.0
    ),
    "one entry": sparse,
    "zeros": lambda rng, *s: np.zeros(s),
    "huge": lambda rng, *s: 1e25 * rng.standard_normal(s),
    "tiny": lambda rng, *s: 1e-25 * rng.standard_normal(s),
    "geometric": lambda rng, c, m, n: spectrum(rng, c, m, n, 0.7 ** np.arange(min(m, n))),
}
SHAPES = [(1, 1), (1, 9), (16, 16), (5, 40), (40, 7)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_spectral_norm_bound(kind, shape, rng):
    # 14 kinds × 5 shapes × 150 = 10,500 matrices.
    stack = KINDS[kind](rng, 150, *shape).astype("float32")
    bound = ops.convert_to_numpy(norms.spectral_norm_bound(stack)).astype("float64")
    true = exact(stack)
    assert bound.shape == (150,)
    assert (bound >= true).all()
    assert (bound <= 1.05 * true).all()


def turned(rng, count, side):
    return np.exp(2j * np.pi * rng.random((count, side)))


# Complex matrices of real ones; the first two keep the spectrum.
COMPLEX = {
    "turned": lambda rng, a: (
        turned(rng, len(a), a.shape[1])[:, :, None] * a * turned(rng, len(a), a.shape[2])[:, None]
    ),
    "imaginary": lambda rng, a: 1j * a,
    "one phase": lambda rng, a: a + 1j * a,
    "other part": lambda rng, a: a + 1j * rng.permuted(a, axis=0),
    "small part": lambda rng, a: a + 1e-4j * rng.permuted(a, axis=1),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("parts", COMPLEX)
@pytest.mark.parametrize("kind", KINDS)
def test_spectral_norm_bound_of_complex_matrices(kind, parts, shape, rng):
    stack = COMPLEX[parts](rng, KINDS[kind](rng, 40, *shape)).astype("complex64")
    bound = norms.spectral_norm_bound(stack.real, imaginary=stack.imag)
    bound = ops.convert_to_numpy(bound).astype("float64")
    true = np.linalg.norm(stack.astype("complex128"), 2, axis=(-2, -1))
    assert (bound >= true).all()
    assert (bound <= 1.05 * true).all()


@pytest.mark.parametrize(
    "side", [200, *(pytest.param(n, marks=pytest.mark.slow) for n in (512, 1100))]
)
@pytest.mark.parametrize("kind", ["gaussian", "orthogonal", "half at the top", "root at the top"])
def test_spectral_norm_bound_large(kind, side, rng):
    matrix = KINDS[kind](rng, 1, side, side)[0].astype("float32")
    true = exact(matrix)
    assert true <= float(norms.spectral_norm_bound(matrix)) <= 1.05 * true
    assert float(norms.spectral_norm_bound(matrix)) <= float(norms.euclidean_norm(matrix))


def test_spectral_norm_bound_is_exact_for_orthogonal(rng):
    matrix = orthogonal(rng, 1, 64, 64)[0].astype("float32")
    assert float(norms.spectral_norm_bound(matrix)) == pytest.approx(1.0, abs=1e-3)


def test_spectral_norm_bound_gap(rng):
    matrix = rng.standard_normal((60, 60)).astype("float32")
    tight = float(norms.spectral_norm_bound(matrix, gap=0.002))
    assert exact(matrix) <= tight <= 1.002 * exact(matrix)


@pytest.mark.parametrize("value", one_in(2, [3e38, 1e38, np.nan, np.inf]))
def test_norms_of_what_overflows_are_no_numbers_that_certify(value):
    matrix = np.full((4, 4), value, "float32")
    probe = np.ones(norms.probe_shape((4, 4)), "float32")
    for bound in (
        norms.spectral_norm_bound(matrix),
        norms.euclidean_norm(matrix),
        norms.probable_norm_bound(ops.convert_to_tensor(matrix), ops.convert_to_tensor(probe)),
        norms.conv_norm_bound(np.full((3, 3, 2, 2), value, "float32"), (5, 5), padding="same"),
    ):
        assert not float(bound) < 3e37  # infinite or NaN


def test_spectral_norm_bound_refuses_vectors():
    with pytest.raises(ValueError, match=r"at least two axes.*\(3,\)"):
        norms.spectral_norm_bound(np.ones(3, "float32"))


@pytest.mark.parametrize("size", [1, 7, 10**6])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_euclidean_norm(size, scale, rng):
    for x in (rng.standard_normal(size), np.full(size, 0.1)):
        x = (scale * x).astype("float32")
        true = np.linalg.norm(x.astype("float64"))
        assert true <= float(norms.euclidean_norm(x)) <= true * (1 + ROUNDING)


@pytest.mark.parametrize(
    "shape", [(130, 100), (100, 130), (30, 400), (300, 256), (40, 512), (256, 256)], ids=str
)
@pytest.mark.parametrize("kind", ["gaussian", "orthogonal", "one spike", "low rank", "one entry"])
def test_probable_norm_bound(kind, shape, rng):
    base = KINDS[kind](rng, 1, *shape)[0]
    base /= exact(base)

    bound = compiled(norms.probable_norm_bound)
    for scale in (1.0, 0.95, 1.05, 1.2, 0.05, 30.0, 1e15, 1e-15):
        matrix = (scale * base).astype("float32")
        true = exact(matrix)
        for _ in range(3):
            probe = rng.standard_normal(norms.probe_shape(shape)).astype("float32")
            found = float(bound(ops.convert_to_tensor(matrix), ops.convert_to_tensor(probe)))
            assert true <= found <= float(norms.euclidean_norm(matrix)) * (1 + ROUNDING)
            if scale == 1.0:
                assert found <= 1.15


def test_probable_norm_bound_of_what_is_not_finite():
    probe = ops.ones(norms.probe_shape((20, 20)))
    matrix = np.eye(20, dtype="float32")
    matrix[3, 4] = np.nan
    assert math.isnan(float(norms.probable_norm_bound(ops.convert_to_tensor(matrix), probe)))


def test_probable_norm_bound_survives_a_probe_almost_orthogonal_to_the_top(rng):
    """The failure event is a probe without a component along the top; small ones must hold."""
    side = 30
    bound = compiled(norms.probable_norm_bound)
    for scale in (0.5, *np.linspace(0.85, 1.3, 10), 2.0, 5.0):  # about the radius, 1
        matrix = scale * np.diag(np.r_[1.0, np.full(side - 1, 0.2)]).astype("float32")
        for size in (0.16, 0.3, 1.0):  # ‖Xv‖; the threshold is 0.154
            probe = rng.standard_normal(norms.probe_shape(matrix.shape)).astype("float32")
            probe[:, 0] *= size / np.linalg.norm(probe[:, 0])
            found = bound(ops.convert_to_tensor(matrix, "float32"), ops.convert_to_tensor(probe))
            assert float(found) >= scale


# --- convolutions -----------------------------------------------------------------------------

GEOMETRIES_2D = [
    dict(kernel=(k, k2), size=size, strides=s, padding=p, dilation_rate=d)
    for (k, k2), size, s, p, d in [
        ((1, 1), (3, 3), 1, "valid", 1),
        ((2, 2), (4, 4), 1, "same", 1),
        ((2, 2), (4, 4), 2, "valid", 1),
        ((2, 3), (5, 4), 1, "same", 1),
        ((3, 3), (4, 4), 1, "same", 1),
        ((3, 3), (5, 5), 1, "valid", 1),
        ((3, 3), (5, 5), 2, "same", 1),
        ((3, 3), (6, 5), (2, 1), "same", 1),
        ((3, 3), (5, 5), 1, "same", 2),
        ((3, 3), (6, 6), 1, "valid", 2),
        ((3, 3), (3, 3), 3, "same", 1),
        ((3, 2), (4, 4), 3, "same", 1),
        ((4, 4), (5, 5), 1, "same", 1),
        ((4, 4), (5, 5), 2, "same", 1),
        ((4, 4), (4, 4), 4, "valid", 1),
        ((5, 5), (2, 2), 1, "same", 1),
        ((5, 5), (6, 6), 2, "valid", 1),
        ((5, 1), (6, 2), 1, "same", 1),
        ((2, 2), (4, 4), 1, "same", 3),
    ]
]
GEOMETRIES_1D = [
    dict(kernel=(k,), size=(n,), strides=s, padding=p, dilation_rate=d)
    for k, n, s, p, d in itertools.chain(
        itertools.product((2, 3, 5), (6,), (1, 2), ("same", "causal"), (1,)),
        itertools.product((2, 3), (11,), (1,), ("valid", "same", "causal"), (2,)),
    )
]


def convolution(kernel, x, strides, padding, dilation_rate):
    if padding == "causal":
        before = (kernel.shape[0] - 1) * dilation_rate
        x, padding = np.pad(x, ((0, 0), (before, 0), (0, 0))), "valid"
    return ops.conv(ops.convert_to_tensor(x), kernel, strides, padding, dilation_rate=dilation_rate)


def operator(kernel, size, channels, **geometry):
    """The dense matrix of a convolution, one row for each input entry."""
    entries = math.prod(size) * channels
    identity = np.eye(entries, dtype="float32").reshape(entries, *size, channels)
    outputs = convolution(kernel, identity, **geometry)
    return ops.convert_to_numpy(outputs).reshape(entries, -1)


def kernels(shape, rng):
    signs = (-1.0) ** np.indices(shape[:-2]).sum(axis=0)
    yield rng.standard_normal(shape)
    yield np.ones(shape)
    yield np.broadcast_to(signs[..., None, None], shape)
    last = np.zeros(shape)
    last[(-1,) * len(shape)] = 1.0
    yield last


@pytest.mark.parametrize(
    "geometry",
    one_in(7, GEOMETRIES_2D + GEOMETRIES_1D),
    ids=lambda g: "-".join(map(str, g.values())),
)
def test_conv_norm_bound(geometry, rng):
    geometry = dict(geometry)
    shape, size = (*geometry.pop("kernel"), 2, 3), geometry.pop("size")
    bound = compiled(
        lambda kernel: [
            norms.conv_norm_bound(kernel, size, **geometry, certificate=c)
            for c in ("reshaped", "fft", "auto")
        ]
    )
    for kernel in kernels(shape, rng):
        kernel = kernel.astype("float32")
        true = exact(operator(kernel, size, 2, **geometry))
        bounds = list(map(float, bound(ops.convert_to_tensor(kernel))))
        assert min(bounds) >= true * (1 - 1e-6)
        assert bounds[2] <= min(bounds[:2]) * (1 + ROUNDING)


@pytest.mark.parametrize("groups", one_in(3, [2, 1, 4]))
@pytest.mark.parametrize("padding, strides", [("same", 1), ("valid", 2)])
def test_conv_norm_bound_groups(groups, padding, strides, rng):
    kernel = rng.standard_normal((3, 3, 4 // groups, 8)).astype("float32")
    true = exact(operator(kernel, (5, 5), 4, strides=strides, padding=padding, dilation_rate=1))
    bounds = fused(
        lambda kernel: [
            norms.conv_norm_bound(kernel, (5, 5, 4), strides, padding, groups=groups, certificate=c)
            for c in CERTIFICATES
        ]
    )
    assert min(map(float, bounds(ops.convert_to_tensor(kernel)))) >= true


def test_conv_norm_bound_3d(rng):
    kernel = rng.standard_normal((2, 3, 2, 1, 2)).astype("float32")
    true = exact(operator(kernel, (3, 4, 3), 1, strides=1, padding="same", dilation_rate=1))
    for certificate in ("reshaped", "fft"):
        bound = norms.conv_norm_bound(kernel, (3, 4, 3), padding="same", certificate=certificate)
        assert true <= float(bound) <= 3.0 * true


def test_conv_norm_bound_fft_is_tight_on_large_maps(rng):
    kernel = rng.standard_normal((3, 3, 2, 2)).astype("float32")
    true = exact(operator(kernel, (16, 16), 2, strides=1, padding="same", dilation_rate=1))
    assert float(norms.conv_norm_bound(kernel, (16, 16), padding="same")) <= 1.1 * true


@pytest.mark.parametrize(
    "geometry", GEOMETRIES_2D + GEOMETRIES_1D, ids=lambda g: "-".join(map(str, g.values()))
)
def test_conv_multiplicity(geometry):
    geometry = dict(geometry)
    taps, size = geometry.pop("kernel"), geometry.pop("size")
    bound = norms.conv_multiplicity((*taps, 1, 1), size, **geometry)
    # An input entry reaches an output through one tap at most: count its outputs.
    reached = operator(np.ones((*taps, 1, 1), "float32"), size, 1, **geometry)
    counted = int((reached != 0).sum(axis=1).max())
    assert counted <= bound
    if min(size) >= 3 * max(taps):
        assert counted == bound


CERTIFICATES = ("reshaped", "fft", "auto")


@pytest.mark.parametrize("multiplier", [1, 3])
@pytest.mark.parametrize(
    "taps_and_geometry",
    one_in(
        4,
        [
            ((3, 3), (4, 4), 1, "same", 1),
            ((2, 2), (5, 5), 2, "valid", 1),
            ((4, 4), (5, 5), 1, "same", 1),
            ((2, 3), (5, 6), 1, "same", 2),
            ((3,), (6,), 2, "same", 1),
            ((2,), (7,), 1, "valid", 3),
        ],
    ),
    ids=str,
)
def test_depthwise_norm_bounds(taps_and_geometry, multiplier, rng):
    taps, size, strides, padding, dilation_rate = taps_and_geometry
    geometry = dict(strides=strides, padding=padding, dilation_rate=dilation_rate)
    channels = 2
    entries = math.prod(size) * channels
    identity = np.eye(entries, dtype="float32").reshape(entries, *size, channels)
    for kernel in kernels((*taps, channels, multiplier), rng):
        kernel = kernel.astype("float32")
        outputs = ops.convert_to_numpy(ops.depthwise_conv(identity, kernel, **geometry))
        # (inputs, input channel, outputs, output channel, multiplier)
        blocks = outputs.reshape(entries // channels, channels, -1, channels, multiplier)
        for certificate in CERTIFICATES:
            bounds = norms.depthwise_norm_bounds(kernel, size, **geometry, certificate=certificate)
            bounds = ops.convert_to_numpy(bounds)
            assert bounds.shape == (channels,)
            for c in range(channels):
                block = blocks[:, c, :, c].reshape(entries // channels, -1)
                assert bounds[c] >= exact(block) * (1 - 1e-6)
            assert bounds.max() >= exact(outputs.reshape(entries, -1)) * (1 - 1e-6)


TRANSPOSED = [
    # taps, size, strides, padding, output_padding, dilation
    ((1, 1), (3, 3), 1, "valid", None, 1),
    ((2, 2), (3, 3), 2, "valid", None, 1),
    ((2, 2), (3, 3), 3, "valid", None, 1),
    ((3, 3), (3, 3), 1, "same", None, 1),
    ((3, 3), (3, 3), 2, "same", None, 1),
    ((3, 2), (3, 4), (2, 1), "same", None, 1),
    ((4, 4), (3, 3), 2, "same", 1, 1),
    ((4, 4), (2, 2), 1, "valid", None, 1),
    ((5,), (4,), 2, "same", 0, 1),
    ((5,), (4,), 3, "valid", 2, 1),
    ((3,), (4,), 1, "valid", None, 2),
    ((2,), (5,), 1, "same", None, 3),
]


def transposed(kernel, size, strides, padding, output_padding, dilation_rate):
    if dilation_rate > 1 and keras.backend.backend() == "tensorflow":
        pytest.skip("TensorFlow does not dilate transposed convolutions on CPUs")
    entries = math.prod(size) * kernel.shape[-1]
    identity = np.eye(entries, dtype="float32").reshape(entries, *size, kernel.shape[-1])
    outputs = ops.conv_transpose(
        identity, kernel, strides, padding, output_padding, dilation_rate=dilation_rate
    )
    return ops.convert_to_numpy(outputs).reshape(entries, -1)


@pytest.mark.parametrize("geometry", one_in(4, TRANSPOSED), ids=str)
def test_conv_transpose_norm_bound(geometry, rng):
    taps, size, strides, padding, output_padding, dilation = geometry
    bound = fused(
        lambda kernel: [
            norms.conv_transpose_norm_bound(kernel, size, strides, dilation, certificate=c)
            for c in CERTIFICATES
        ]
    )
    for kernel in kernels((*taps, 3, 2), rng):
        kernel = kernel.astype("float32")
        true = exact(transposed(kernel, size, strides, padding, output_padding, dilation))
        bounds = list(map(float, bound(ops.convert_to_tensor(kernel))))
        assert min(bounds) >= true * (1 - 1e-6)
        assert bounds[2] <= min(bounds[:2]) * (1 + ROUNDING)
        if norms.conv_transpose_multiplicity(kernel.shape, size, strides, dilation) == 1:
            if padding == "valid":
                assert bounds[2] <= 1.05 * true


@pytest.mark.parametrize("geometry", TRANSPOSED, ids=str)
def test_conv_transpose_multiplicity(geometry):
    taps, size, strides, padding, output_padding, dilation = geometry
    kernel = np.ones((*taps, 1, 1), "float32")
    reading = transposed(kernel, size, strides, padding, output_padding, dilation)
    counted = int((reading != 0).sum(axis=0).max())
    bound = norms.conv_transpose_multiplicity(kernel.shape, size, strides, dilation)
    assert counted <= bound
    if padding == "valid" and dilation == 1:
        assert counted == bound


@pytest.mark.parametrize(
    "geometry",
    one_in(7, GEOMETRIES_2D + GEOMETRIES_1D),
    ids=lambda g: "-".join(map(str, g.values())),
)
@pytest.mark.parametrize("channels", one_in(2, [(2, 3), (3, 2)]), ids=str)
def test_almost_orthogonal_scales_of_convolutions(geometry, channels, rng):
    geometry = dict(geometry)
    taps, size = geometry.pop("kernel"), geometry.pop("size")
    for kernel in kernels((*taps, *channels), rng):
        scaled = almost_orthogonal(kernel.astype("float32"))
        assert exact(operator(scaled, size, channels[0], **geometry)) <= 1.0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_almost_orthogonal_scales_of_matrices(kind, shape, rng):
    for matrix in KINDS[kind](rng, 20, *shape).astype("float32"):
        scaled = almost_orthogonal(matrix)
        assert exact(scaled) <= 1.0
        if kind == "orthogonal":
            np.testing.assert_allclose(scaled, matrix, atol=1e-4)


def almost_orthogonal(kernel):
    scales, axis = norms.almost_orthogonal_scales(kernel)
    scales = ops.convert_to_numpy(scales)
    return kernel * (scales if axis == -1 else scales[:, None])


def test_almost_orthogonal_scales_refuse():
    for shape in [(3,), (1, 1, 1, 1, 2, 2)]:
        with pytest.raises(ValueError, match="two axes of channels"):
            norms.almost_orthogonal_scales(np.ones(shape, "float32"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(input_shape=(5,)), "`input_shape` must be 2 known spatial sizes"),
        (dict(input_shape=(5, None)), "`input_shape` must be 2 known spatial sizes"),
        (dict(input_shape=(5, 5), strides=0), "`strides` must be an integer of at least 1; got 0"),
        (dict(input_shape=(5, 5), padding="full"), "`padding` must be"),
        (dict(input_shape=(2, 5)), "spans 3 cells of an axis of 2"),
        (dict(input_shape=(5, 5), certificate="guess"), "`certificate` must be"),
    ],
)
def test_conv_norm_bound_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        norms.conv_norm_bound(np.ones((3, 3, 1, 1), "float32"), **arguments)


def test_bounds_pull_back_is_two_products(rng):
    """`pull_back` nests: the slope of ½‖∇‖² of a bilinear map, by hand."""
    w, x = (
        rng.standard_normal((3, 2)).astype("float32"),
        rng.standard_normal((1, 3)).astype("float32"),
    )

    def gradient(x, w):
        return vjp(lambda x, w: [ops.matmul(x, w)], [x, w], lambda _: [ops.ones((1, 2))])[1][:1]

    arguments = [ops.convert_to_tensor(x), ops.convert_to_tensor(w)]
    (value,), (slope_x, slope_w) = vjp(gradient, arguments, lambda v: v)
    np.testing.assert_allclose(value, w.sum(axis=1)[None], rtol=1e-5)
    np.testing.assert_allclose(slope_x, np.zeros((1, 3)))
    np.testing.assert_allclose(slope_w, np.tile(w.sum(axis=1)[:, None], (1, 2)), rtol=1e-5)
