"""Projections put weights into their sets and leave what is inside alone."""

import keras
import numpy as np
import pytest
from keras import ops

from lipdp.autodiff import compiled
from lipdp.bounds import norms, projections
from lipdp.bounds.projections import (
    AlmostOrthogonal,
    ConvBall,
    ConvTransposeBall,
    DepthwiseConvBall,
    EntryBall,
    NormBall,
    ResidualConvBall,
    RowBall,
    SpectralBall,
    identity_kernel,
)


def exact(w):
    return np.linalg.norm(np.asarray(w, dtype=np.float64), 2)


def matrices(shape, rng):
    u, _, v = np.linalg.svd(rng.standard_normal(shape), full_matrices=False)
    yield rng.standard_normal(shape)
    yield u @ v
    yield 1.01 * u @ v
    yield np.outer(np.ones(shape[0]), np.ones(shape[1]))
    yield np.zeros(shape)
    yield 1e25 * rng.standard_normal(shape)
    yield 3e38 * np.sign(rng.standard_normal(shape))
    yield 1e-25 * rng.standard_normal(shape)


def apply(projection, w):
    return ops.convert_to_numpy(projection(ops.convert_to_tensor(w.astype("float32"))))


@pytest.mark.parametrize("radius", [1.0, 0.3, 7.0])
@pytest.mark.parametrize("shape", [(6, 6), (3, 20), (20, 3), (1, 5), (80, 80)], ids=str)
@pytest.mark.parametrize("orthogonal", [False, True])
def test_spectral_ball(orthogonal, shape, radius, rng):
    projection = SpectralBall(radius, orthogonal=orthogonal)
    for w in matrices(shape, rng):
        projected = apply(projection, w)
        assert np.isfinite(projected).all()
        assert exact(projected) <= radius
        again = apply(projection, projected)
        assert exact(again) <= radius
        if not orthogonal:
            np.testing.assert_allclose(again, projected, rtol=1e-4)
            if exact(w) <= 0.9 * radius:
                np.testing.assert_array_equal(projected, w.astype("float32"))


def test_orthogonal_raises_small_singular_values(rng):
    u, _, v = np.linalg.svd(rng.standard_normal((12, 8)), full_matrices=False)
    values = np.linspace(0.2, 1.0, 8)
    w = (u * values) @ v
    previous = values.min()
    for _ in range(8):
        w = apply(SpectralBall(orthogonal=True), w)
        found = np.linalg.svd(w.astype("float64"), compute_uv=False)
        assert found.max() <= 1.0
        assert found.min() >= previous * (1 - 1e-4)
        previous = found.min()
    assert previous > 0.99


@pytest.mark.parametrize("orthogonal", [False, True])
def test_spectral_ball_large(orthogonal, rng):
    projection = SpectralBall(orthogonal=orthogonal)
    u, _, v = np.linalg.svd(rng.standard_normal((300, 280)), full_matrices=False)
    assert exact(apply(projection, u @ v)) <= 1.0
    assert exact(apply(projection, rng.standard_normal((300, 280)))) <= 1.0


@pytest.mark.parametrize("shape", [(5,), (4, 3), (3, 3, 2, 2)], ids=str)
def test_norm_ball(shape, rng):
    for scale in (1e-25, 0.01, 1.0, 1e25, 3e38 / 5):
        w = scale * np.clip(rng.standard_normal(shape), -2, 2)
        projected = apply(NormBall(2.0), w)
        assert np.linalg.norm(projected.astype("float64")) <= 2.0
        np.testing.assert_allclose(apply(NormBall(2.0), projected), projected, rtol=1e-4)
        if np.linalg.norm(w) <= 1.9:
            np.testing.assert_array_equal(projected, w.astype("float32"))
        elif scale < 1e37:
            assert np.linalg.norm(projected) >= 2.0 * (1 - 1e-4)


@pytest.mark.parametrize("certificate", ["reshaped", "fft", "auto"])
@pytest.mark.parametrize(
    "geometry",
    [
        dict(input_shape=(6, 6), padding="same"),
        dict(input_shape=(6, 6, 2), padding="valid", strides=2),
        dict(input_shape=(5, 5), padding="same", dilation_rate=2),
    ],
    ids=str,
)
def test_conv_ball(geometry, certificate, rng):
    projection = ConvBall(1.5, **geometry, certificate=certificate)
    options = {k: v for k, v in geometry.items() if k != "input_shape"}
    identity = np.eye(geometry["input_shape"][0] ** 2 * 2, dtype="float32")
    identity = identity.reshape(-1, *geometry["input_shape"][:2], 2)
    for scale in (1e-3, 1.0, 1e25):
        kernel = apply(projection, scale * rng.standard_normal((3, 3, 2, 3)))
        matrix = ops.convert_to_numpy(ops.conv(ops.convert_to_tensor(identity), kernel, **options))
        assert exact(matrix.reshape(len(identity), -1)) <= 1.5 * (1 + 1e-6)
        np.testing.assert_allclose(apply(projection, kernel), kernel, rtol=1e-4)


def test_entry_ball(rng):
    w = np.r_[rng.standard_normal(5), 1e30, -np.inf]
    projected = apply(EntryBall(0.7), w)
    np.testing.assert_allclose(projected, np.clip(w, -0.7, 0.7), rtol=1e-6)
    assert np.isnan(apply(EntryBall(0.7), np.array([np.nan]))).all()


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_depthwise_ball_projects_each_channel(padding, rng):
    projection = DepthwiseConvBall(0.5, input_shape=(5, 5), padding=padding)
    w = rng.standard_normal((3, 3, 4, 2))
    w[:, :, 1] *= 1e-3
    w[:, :, 2] *= 1e25
    projected = apply(projection, w)
    np.testing.assert_array_equal(projected[:, :, 1], w[:, :, 1].astype("float32"))
    bounds = norms.depthwise_norm_bounds(projected, (5, 5), padding=padding)
    np.testing.assert_allclose(ops.convert_to_numpy(bounds)[[0, 2, 3]], 0.5, rtol=1e-3)
    assert ops.convert_to_numpy(bounds).max() <= 0.5 * (1 + 2e-5)


@pytest.mark.parametrize("strides", [1, 2, (2, 3)])
def test_conv_transpose_ball(strides, rng):
    projection = ConvTransposeBall(1.5, input_shape=(3, 3), strides=strides)
    identity = np.eye(18, dtype="float32").reshape(18, 3, 3, 2)
    for padding in ("same", "valid"):
        for scale in (1e-3, 1.0, 1e25):
            kernel = apply(projection, scale * rng.standard_normal((3, 3, 4, 2)))
            matrix = ops.conv_transpose(identity, kernel, strides, padding)
            matrix = ops.convert_to_numpy(matrix).reshape(18, -1)
            assert exact(matrix) <= 1.5 * (1 + 1e-6)


@pytest.mark.parametrize("certificate", ["reshaped", "fft", "auto"])
def test_residual_conv_ball(certificate, rng):
    projection = ResidualConvBall(1.0, input_shape=(4, 5), certificate=certificate)
    identity = np.eye(40, dtype="float32").reshape(40, 4, 5, 2)
    for scale in (0.0, 0.1, 1.0, 1e6):
        kernel = apply(projection, scale * rng.standard_normal((3, 3, 2, 2)))
        outputs = identity + ops.convert_to_numpy(ops.conv(identity, kernel, padding="same"))
        assert exact(outputs.reshape(40, 40)) <= 1 + 1e-6


@pytest.mark.parametrize("shape", [(6, 6), (3, 20), (20, 3), (3, 2, 2, 5), (3, 2, 5, 2)], ids=str)
@pytest.mark.parametrize("radius", [1.0, 0.3])
def test_almost_orthogonal(shape, radius, rng):
    projection = AlmostOrthogonal(radius)
    for scale in (1e-25, 1e-3, 1.0, 1e25):
        w = scale * rng.standard_normal(shape)
        projected = apply(projection, w)
        assert np.isfinite(projected).all()
        if len(shape) == 2:
            assert exact(projected) <= radius
        else:
            bound = norms.conv_norm_bound(projected, (6, 6), padding="same")
            assert float(bound) <= 1.05 * radius
        if scale <= 1e-3:
            np.testing.assert_array_equal(projected, w.astype("float32"))
    assert (apply(projection, np.zeros(shape)) == 0).all()


def size_by_certificate(projection, w):
    options = {**projection.geometry, "certificate": projection.certificate}
    return np.max(ops.convert_to_numpy(projection.bound(w, **options)))


def size_of_residual(projection, w):
    return size_by_certificate(projection, w - ops.convert_to_numpy(identity_kernel(w.shape)))


def size_by_channel(projection, w):
    return 1 / np.min(ops.convert_to_numpy(norms.almost_orthogonal_scales(w)[0]))


# (projection, shape of the weight, its size, gap up to which a weight near the radius may shrink)
SIZES = {
    "norm": (NormBall(0.7), (4, 3), lambda _, w: np.linalg.norm(w), 3e-5),
    "row": (RowBall(0.7), (4, 3), lambda _, w: np.linalg.norm(w, axis=1).max(), 3e-5),
    "entry": (EntryBall(0.7), (4, 3), lambda _, w: np.abs(w).max(), 1e-7),
    "spectral": (SpectralBall(0.7), (40, 30), lambda _, w: exact(w), 0.05),
    "spectral large": (SpectralBall(0.7), (260, 270), lambda _, w: exact(w), 0.05),
    "channels of a matrix": (AlmostOrthogonal(0.7), (8, 5), size_by_channel, 3e-5),
    "channels of a kernel": (AlmostOrthogonal(0.7), (3, 2, 2, 5), size_by_channel, 3e-5),
    **{
        f"{name}, {certificate}": (ball, shape, size_by_certificate, 3e-5)
        for certificate in ("fft", "reshaped")
        for name, ball, shape in [
            (
                "conv",
                ConvBall(0.7, (6, 6), padding="same", certificate=certificate),
                (3, 3, 2, 3),
            ),
            (
                "strided conv",
                ConvBall(0.7, (6,), 2, groups=2, certificate=certificate),
                (3, 2, 4),
            ),
            (
                "depthwise conv",
                DepthwiseConvBall(0.7, (6, 6), certificate=certificate),
                (3, 3, 2, 2),
            ),
            (
                "transposed conv",
                ConvTransposeBall(0.7, (4, 4), 2, certificate=certificate),
                (3, 3, 2, 3),
            ),
        ]
    },
    "residual conv": (
        ResidualConvBall(0.7, (4, 5), certificate="fft"),
        (3, 3, 2, 2),
        size_of_residual,
        3e-5,
    ),
}


@pytest.mark.parametrize("name", SIZES)
def test_what_is_inside_stays_as_it_is_over_a_hundred_steps(name, rng):
    projection, shape, size, gap = SIZES[name]
    residual = isinstance(projection, ResidualConvBall)
    identity = ops.convert_to_numpy(identity_kernel(shape)) if residual else 0.0
    direction = rng.standard_normal(shape).astype("float32")
    direction *= 0.7 / size(projection, direction)
    project = compiled(projection)
    for r in (0.0, 0.3, 0.9, 0.99, 1.0):
        start = (r * direction - identity).astype("float32")
        w = ops.convert_to_tensor(start)
        for _ in range(100):
            w = project(w)
        w = ops.convert_to_numpy(w)
        if r * (1 + gap) <= 1:
            np.testing.assert_array_equal(w, start)
        elif residual:  # the identity that is added rounds too
            np.testing.assert_allclose(w, start, rtol=gap, atol=gap)
        else:
            assert r / (1 + gap) <= size(projection, w) / 0.7 * r <= 1 + 1e-6
            factor = np.vdot(w, start) / np.vdot(start, start)
            assert 1 / (1 + gap) <= factor <= 1 + 1e-6


@pytest.mark.parametrize("shape", [(257, 257), (300, 520), (520, 300)], ids=str)
@pytest.mark.parametrize("kind", ["gaussian", "orthogonal", "spike", "steps"])
def test_random_certificates_leave_what_is_inside_as_it_is(kind, shape, rng):
    u, values, v = np.linalg.svd(rng.standard_normal(shape), full_matrices=False)
    ranks = np.arange(len(values))
    spectrum = {
        "gaussian": values / values[0],
        "orthogonal": np.ones(len(values)),
        "spike": np.where(ranks == 0, 1.0, 0.6),
        "steps": np.where(ranks < len(values) // 2, 1.0, 0.2),
    }[kind]
    direction = (u * spectrum) @ v
    projection = SpectralBall(0.7)

    @compiled
    def project(w, probe):
        with projections.certified_by(
            lambda matrix, radius: norms.probable_norm_bound(matrix, probe, radius), compiled
        ):
            return projection(w)

    for r in (0.0, 0.3, 0.9, 0.99, 1.0, 4.0):
        start = (0.7 * r * direction).astype("float32")
        w = ops.convert_to_tensor(start)
        for step in range(100):
            probe = rng.standard_normal(norms.probe_shape(shape)).astype("float32")
            w = project(w, ops.convert_to_tensor(probe))
            if step == 0:
                assert exact(ops.convert_to_numpy(w)) <= 0.7
        w = ops.convert_to_numpy(w)
        if r <= 0.9:
            np.testing.assert_array_equal(w, start)
        else:  # the gap aimed at and what its steps take, once
            assert exact(w) >= 0.7 / (1.13 if r <= 1 else 1.4)


PROJECTIONS = [
    NormBall(0.5),
    EntryBall(0.3),
    DepthwiseConvBall(0.5, input_shape=(5, 5), strides=2, padding="same"),
    ConvTransposeBall(0.5, input_shape=(5, 5), strides=(2, 1), certificate="reshaped"),
    ResidualConvBall(0.5, input_shape=(5, 5), certificate="fft"),
    AlmostOrthogonal(0.5),
    SpectralBall(2.0),
    SpectralBall(2.0, orthogonal=True, iterations=3),
    ConvBall(1.5, input_shape=(5, 5), strides=(2, 1), padding="same", certificate="reshaped"),
]


@pytest.mark.any_backend
@pytest.mark.parametrize("projection", PROJECTIONS, ids=lambda p: type(p).__name__)
def test_config_round_trip(projection, rng):
    data = keras.saving.serialize_keras_object(projection)
    twin = keras.saving.deserialize_keras_object(data)
    assert type(twin) is type(projection)
    assert twin.get_config() == projection.get_config()
    shape = (3, 3, 2, 2) if isinstance(projection, ConvBall) else (4, 4)
    w = rng.standard_normal(shape)
    np.testing.assert_array_equal(apply(twin, w), apply(projection, w))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_optimizers_apply_them(optimizer, rng):
    variable = keras.Variable(np.eye(4, dtype="float32"))
    variable.constraint = SpectralBall(1.0)
    optimizer = keras.optimizers.get({"class_name": optimizer, "config": {"learning_rate": 10.0}})
    for _ in range(3):
        optimizer.apply([ops.convert_to_tensor(rng.standard_normal((4, 4)), "float32")], [variable])
        assert exact(ops.convert_to_numpy(variable.value)) <= 1.0


def test_certified_by_serves_large_matrices_inside_its_scope_only(rng):
    asked = []

    def bound(matrix, radius):
        asked.append((tuple(matrix.shape), radius))
        return norms.euclidean_norm(matrix)

    def counting(function):
        def counted(w, **options):
            asked.append((function, tuple(w.shape)))
            return function(w, **options)

        return counted

    large, small = (np.eye(n, dtype="float32") for n in (300, 4))
    many, few = (np.ones((1, 1, n, 40), "float32") for n in (40, 4))
    projection, ball = SpectralBall(2.0), ConvBall(1.0, input_shape=(2, 2))
    with projections.certified_by(bound, counting):
        inside = apply(projection, large)
        apply(projection, small)
        apply(NormBall(), large)
        kernel = apply(ball, many)
        apply(ball, few)
    np.testing.assert_array_equal(kernel, apply(ball, many))
    apply(projection, large)
    assert asked == [((300, 300), 2.0), (ConvBall.bound, (1, 1, 40, 40))]
    assert inside[0, 0] == pytest.approx(2.0 / 300**0.5, rel=1e-4)
    with pytest.raises(RuntimeError), projections.certified_by(bound, counting):
        raise RuntimeError
    apply(projection, large)
    assert len(asked) == 2


def test_equal_projections_are_one_program_which_attributes_are_part_of(monkeypatch):
    monkeypatch.setattr(projections, "_programs", {})
    kernel = 9.0 * np.ones((3, 3, 1, 1))
    balls = [ConvBall(1.0, input_shape=(4, 4), padding="same") for _ in range(2)]
    first, second = (apply(ball, kernel) for ball in balls)
    np.testing.assert_array_equal(first, second)
    assert len(projections._programs) == 1
    # What has run before is not what runs after a change.
    balls[0].radius = 0.5
    np.testing.assert_allclose(apply(balls[0], kernel), first / 2, rtol=1e-6)
    balls[0].geometry["strides"] = 3
    assert apply(balls[0], kernel).max() > first.max() / 2
    np.testing.assert_array_equal(apply(balls[1], kernel), first)
    assert len(projections._programs) == 3


@pytest.mark.any_backend
@pytest.mark.parametrize("radius", [0.0, -1.0, float("inf"), float("nan"), "1", None])
def test_radius_is_refused(radius):
    kind = ValueError if isinstance(radius, float) else TypeError
    with pytest.raises(kind, match="`radius` must be a number above 0 and finite"):
        NormBall(radius)


@pytest.mark.any_backend
def test_wrong_use_is_refused():
    with pytest.raises(ValueError, match="SpectralBall projects matrices"):
        SpectralBall()(ops.ones((3,)))
    with pytest.raises(ValueError, match="`iterations`"):
        SpectralBall(iterations=0)
    with pytest.raises(ValueError, match="`input_shape`"):
        ConvBall()
