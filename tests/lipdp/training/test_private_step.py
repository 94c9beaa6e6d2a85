"""The private step: what one example can do, what noise reaches the weights, what is divided."""

import math

import keras
import numpy as np
import pytest
from keras import ops

import lipdp
from lipdp import layers, noise
from lipdp.autodiff import gradient
from lipdp.training import steps
from tests.lipdp.helpers import EAGERLY, conv_network, data, dense_network, one_in, private, weights

BATCH = 16


def one_step(model, x, y, mask=None, sample_weight=None):
    """Change of the weights by one step on exactly these rows."""
    before = weights(model)
    for batch in model.batches(x, y, steps_per_epoch=1, sample_weight=sample_weight):
        if mask is not None:
            batch.mask = np.asarray(mask, "float32")
        model.train_on_batch(batch)
    return [b - a for a, b in zip(before, weights(model), strict=True)]


def quiet(network=None, **kwargs):
    """A model without noise whose batch is all of its data, in steps of exactly 1."""
    kwargs.setdefault("noise_multiplier", 0.0)
    return private(
        network,
        sampling=lipdp.FullBatch(),
        optimizer=keras.optimizers.SGD(1.0),
        **kwargs,
    )


def unconstrained(network):
    """Takes the projections away, so that a step can be read off the weights."""
    for variable in network.trainable_variables:
        variable.constraint = None
    return network


@pytest.mark.parametrize(
    "make,shape",
    [
        (dense_network, (6,)),
        pytest.param(conv_network, (8, 8, 1), marks=pytest.mark.any_backend),
    ],
)
def test_gradient_of_each_example_stays_within_its_bound(make, shape):
    network = make()
    model = private(network)
    x, y = data(32, shape)
    model.fit(x, y, epochs=5, verbose=0)  # trained on, and noisy
    bounds = lipdp.gradient_bounds(network, model.current_clip())
    x[0] = 0.0
    x[1] = 1e6 * np.sign(x[1])
    x[2] = 1.0
    backend = steps.backend()
    for i in range(len(x) if EAGERLY else 8):  # traced anew each time on JAX
        outputs, pull = backend.pull_back(network, ops.convert_to_tensor(x[i : i + 1]))
        target = ops.convert_to_tensor(y[i : i + 1])
        _, g = gradient(
            lambda z, t=target: lipdp.losses.per_example(model.private_loss, t, z), outputs
        )
        for variable, slope in zip(network.trainable_variables, pull(g), strict=True):
            assert float(ops.norm(ops.reshape(slope, (-1,)))) <= bounds[variable.path]


@pytest.mark.parametrize("clip", one_in(2, [0.1, None]))
@pytest.mark.parametrize(
    "make,shape",
    [
        (dense_network, (6,)),
        pytest.param(conv_network, (8, 8, 1), marks=pytest.mark.any_backend),
    ],
)
def test_removing_an_example_moves_the_sum_by_at_most_its_bound(make, shape, clip):
    x, y = data(BATCH, shape)
    network = unconstrained(make())
    start = network.get_weights()
    moves = []
    bounds = lipdp.gradient_bounds(network, min(clip or 9.0, math.sqrt(2) + 1e-5))
    model = quiet(network, clip=clip, run_eagerly=False)
    for removed in range(4):
        network.set_weights(start)
        mask = np.ones(BATCH)
        if removed:
            mask[removed] = 0.0
        moves.append(one_step(model, x, y, mask))
    for other in moves[1:]:
        for path, a, b in zip(bounds, moves[0], other, strict=True):
            # The divisor is the public batch size, also when a row is missing.
            assert np.linalg.norm(a - b) <= bounds[path] / BATCH * (1 + 1e-5)
            assert np.linalg.norm(a - b) > 0


def test_the_sum_is_divided_by_the_expected_batch_size():
    x, y = data(BATCH)
    network = unconstrained(dense_network())
    model = quiet(network)
    start = network.get_weights()
    whole = one_step(model, x, y)
    halves = []
    for mask in (np.arange(BATCH) < 4, np.arange(BATCH) >= 4):
        network.set_weights(start)
        halves.append(one_step(model, x, y, mask))
    for a, b, c in zip(whole, *halves, strict=True):
        np.testing.assert_allclose(a, b + c, atol=1e-6)


@pytest.mark.parametrize("allocation", one_in(4, [*noise.ALLOCATIONS, "shares"]))
def test_noise_of_the_weights_has_the_std_of_the_report(allocation):
    # No example in the batch: what moves the weights is noise alone. Without projections each
    # bound is measured on the other weights, which must not have moved yet.
    network = unconstrained(dense_network(40, hidden=80))
    if allocation == "shares":
        allocation = {v.path: i + 0.5 for i, v in enumerate(network.trainable_variables)}
    model = private(
        network,
        noise_multiplier=1.7,
        sampling=lipdp.FullBatch(),
        allocation=allocation,
        optimizer=keras.optimizers.SGD(1.0),
        run_eagerly=False,
    )
    x, y = data(BATCH, (40,))
    draws = []
    start = network.get_weights()
    for _ in range(12):
        network.set_weights(start)
        stds = [row.noise_std for row in model.report(BATCH).weights]
        moves = one_step(model, x, y, np.zeros(BATCH))
        draws.append([m / s for m, s in zip(moves, stds, strict=True)])
    for row, weight in zip(model.report().weights, zip(*draws, strict=True), strict=True):
        sample = np.concatenate([w.ravel() for w in weight])
        sigmas = (sample.std() - 1.0) * math.sqrt(2 * sample.size)
        assert abs(sigmas) < 4.5, row.weight
        assert abs(sample.mean()) * math.sqrt(sample.size) < 4.5, row.weight


@pytest.mark.parametrize("allocation", [*noise.ALLOCATIONS, [5.0, 1.0, 0.1]])
def test_every_allocation_is_one_mechanism_of_the_same_multiplier(allocation):
    bounds, sizes = [3.0, 0.5, 7.0], [10, 20_000, 3]
    stds = noise.standard_deviations(bounds, sizes, 1.3, allocation)
    joint = sum((b / s) ** 2 for b, s in zip(bounds, stds, strict=True)) ** -0.5
    assert joint == pytest.approx(1.3, rel=1e-9)


@pytest.mark.any_backend
def test_shares_are_for_all_weights_by_their_paths():
    network = dense_network()
    paths = [v.path for v in network.trainable_variables]
    whole = dict.fromkeys(reversed(paths), 1.0) | {paths[0]: 4.0}
    assert noise.resolve_allocation(whole, paths) == [4.0, 1.0, 1.0, 1.0]
    for wrong in ({paths[0]: 1.0}, {**whole, "other": 1.0}, {}, {**whole, paths[1]: 0.0}):
        with pytest.raises(ValueError, match="allocation"):
            private(network, allocation=wrong)
    model = private(network, allocation=whole)
    rows = model.report(BATCH).weights
    assert rows[0].noise_std / rows[0].sensitivity == pytest.approx(
        rows[1].noise_std / rows[1].sensitivity / 2
    )
    assert "4.0" in str(model.report(BATCH))


def test_least_noise_is_least():
    bounds, sizes = [3.0, 0.5, 7.0], [10, 20_000, 3]
    total = {
        name: sum(
            s * s * d
            for s, d in zip(noise.standard_deviations(bounds, sizes, 1.0, name), sizes, strict=True)
        )
        for name in noise.ALLOCATIONS
    }
    assert total["least"] == min(total.values())


@pytest.mark.any_backend
def test_weights_stay_in_their_sets_under_heavy_noise():
    network = keras.Sequential(
        [
            keras.Input((300,)),
            layers.BallProjection(1.0),
            layers.SpectralDense(280),  # large enough for the randomised certificate
            layers.GroupSort(),
            layers.SpectralDense(260, use_bias=False, orthogonal=True),
            layers.FrobeniusDense(3),
        ]
    )
    model = private(network, noise_multiplier=20.0, run_eagerly=False)
    x, y = data(64, (300,))
    model.fit(x, y, epochs=2, verbose=0)
    kernels = [layer.kernel.numpy() for layer in network.layers[1:] if hasattr(layer, "kernel")]
    assert np.linalg.norm(kernels[0].astype("float64"), 2) <= 1.0
    assert np.linalg.norm(kernels[1].astype("float64"), 2) <= 1.0
    assert np.linalg.norm(kernels[2].astype("float64")) <= 1.0
    assert np.linalg.norm(network.layers[1].bias.numpy()) <= 1.0


def test_an_empty_draw_is_a_step_of_noise():
    model = private(sampling=lipdp.PoissonSampling(1e-6))
    x, y = data(8)
    before = weights(model)
    model.fit(x, y, epochs=1, steps_per_epoch=2, verbose=0)
    assert model.spent(1e-5).steps == 2
    assert all(np.isfinite(w).all() for w in weights(model))
    assert any((a != b).any() for a, b in zip(before, weights(model), strict=True))


@pytest.mark.parametrize(
    "loss",
    one_in(
        3,
        [
            keras.losses.MeanSquaredError(),
            keras.losses.Huber(delta=100.0),
            keras.losses.MeanSquaredError(reduction="sum"),
            lambda y, z: 1e4 * ops.sum(ops.square(z - y), axis=-1),
        ],
    ),
)
def test_no_loss_breaks_the_clip(loss):
    network = unconstrained(dense_network(classes=2))
    x, _ = data(BATCH)
    y = np.full((BATCH, 2), 1e3, "float32")
    model = quiet(network, loss=loss, clip=0.3)
    moves = one_step(model, x, y, np.arange(BATCH) == 3)
    bounds = lipdp.gradient_bounds(network, 0.3)
    for path, move in zip(bounds, moves, strict=True):
        # Bounds of measured weights are those of the weights before the step.
        assert np.linalg.norm(move) * BATCH <= 3 * bounds[path]
    last = network.trainable_variables[-1]
    assert np.linalg.norm(moves[-1]) * BATCH <= 0.3 * (1 + 1e-5), last.path


def test_a_loss_that_mixes_examples_is_pulled_apart():
    def mixing(y, z):
        return ops.square(z - ops.mean(z, axis=0, keepdims=True) - y)

    z = ops.convert_to_tensor(np.random.default_rng(0).normal(size=(5, 2)).astype("float32"))
    y = ops.zeros((5, 2))
    _, whole = gradient(lambda v: lipdp.losses.per_example(mixing, y, v), z)
    _, alone = gradient(lambda v: lipdp.losses.per_example(mixing, y[:1], v), z[:1])
    np.testing.assert_allclose(ops.convert_to_numpy(whole)[:1], ops.convert_to_numpy(alone))


def test_a_broken_row_changes_nothing_for_the_others():
    def loss(y, z):
        return ops.sum(ops.log(y) * z, axis=-1)  # NaN for negative targets

    x, _ = data(BATCH)
    y = np.ones((BATCH, 3), "float32") * 2.0
    network = unconstrained(dense_network())
    start = network.get_weights()
    model = quiet(network, loss=loss, clip=1.0)
    masked = one_step(model, x, y, np.arange(BATCH) != 5)
    y[5] = -1.0
    network.set_weights(start)
    broken = one_step(model, x, y)
    for a, b in zip(masked, broken, strict=True):
        assert np.isfinite(b).all()
        np.testing.assert_allclose(a, b, atol=1e-7)


def test_a_penalty_on_weights_is_added_after_the_noise():
    def network(penalty):
        keras.utils.set_random_seed(0)
        return keras.Sequential(
            [
                keras.Input((6,)),
                layers.BallProjection(1.0),
                keras.layers.Dense(3, kernel_regularizer=penalty),
            ]
        )

    x, y = data(BATCH)
    plain, penalised = network(None), network(keras.regularizers.L2(0.5))
    kernel = plain.get_weights()[0]
    a = one_step(quiet(plain), x, y)
    b = one_step(quiet(penalised), x, y)
    np.testing.assert_allclose(b[0], a[0] - kernel, atol=1e-6)  # the gradient of ½‖w‖² is w


def test_padding_changes_nothing():
    x, y = data(BATCH)
    network = unconstrained(dense_network())
    start = network.get_weights()
    model = quiet(network)
    plain = one_step(model, x, y)
    network.set_weights(start)
    for batch in model.batches(x, y, steps_per_epoch=1):
        batch.inputs = np.concatenate([batch.inputs, np.full((5, 6), np.nan, "float32")])
        batch.targets = np.concatenate([batch.targets, np.zeros(5, int)])
        batch.mask = np.concatenate([batch.mask, np.zeros(5, "float32")])
        model.train_on_batch(batch)
    padded = [b - a for a, b in zip(start, network.get_weights(), strict=True)]
    for a, b in zip(plain, padded, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("clip", one_in(3, [lipdp.AdaptiveClip(initial=0.1), None, 0.1]))
def test_weights_multiply_the_clipped_rows_and_no_more(clip):
    x, y = data(BATCH)
    network = unconstrained(dense_network())
    start = network.get_weights()

    def moves(weights=None, mask=None, largest=3.0):
        network.set_weights(start)
        model = quiet(network, clip=clip, compile=dict(max_sample_weight=largest))
        return one_step(model, x, y, mask, sample_weight=weights), model

    plain, _ = moves()
    doubled, _ = moves(np.full(BATCH, 2.0))
    for a, b in zip(plain, doubled, strict=True):
        np.testing.assert_allclose(2 * a, b, atol=1e-6)
    # An example that weighs 3 moves the sum up to 3 times as far as its clip, never further.
    chosen = np.arange(BATCH) == 2
    with_it, model = moves(np.where(chosen, 3.0, 0.5))
    without, _ = moves(np.where(chosen, 0.0, 0.5))
    masked, _ = moves(np.where(chosen, 3.0, 0.5), mask=~chosen)
    network.set_weights(start)
    norm = model.clip if isinstance(model.clip, float) else 0.1
    bounds = lipdp.gradient_bounds(network, min(norm, 1.5) * 3.0)
    if clip is None:
        bounds = lipdp.gradient_bounds(network, model.clip_state.loss_gradient_bound * 3.0)
    for path, a, b, c in zip(bounds, with_it, without, masked, strict=True):
        np.testing.assert_allclose(b, c, atol=1e-6)
        assert 0 < np.linalg.norm(a - b) <= bounds[path] / BATCH * (1 + 1e-5)
    last = network.trainable_variables[-1].path  # of the bias, attained where the clip cuts
    if clip is not None:
        assert np.linalg.norm(with_it[-1] - without[-1]) >= 0.99 * bounds[last] / BATCH


def test_weights_changed_behind_the_check_are_held_in_their_range():
    x, y = data(BATCH)
    network = unconstrained(dense_network())
    start = network.get_weights()
    moves = []
    for largest, written in ((2.0, np.full(BATCH, 2.0)), (2.0, np.full(BATCH, 1e6))):
        network.set_weights(start)
        model = quiet(network, compile=dict(max_sample_weight=largest))
        for batch in model.batches(x, y, steps_per_epoch=1):
            batch.weights = written.astype("float32")
            model.train_on_batch(batch)
        moves.append([b - a for a, b in zip(start, network.get_weights(), strict=True)])
    network.set_weights(start)
    undeclared = quiet(network)
    for batch in undeclared.batches(x, y, steps_per_epoch=1):
        batch.weights = np.full(BATCH, 7.0, "float32")
        batch.mask = np.full(BATCH, 7.0, "float32")
        undeclared.train_on_batch(batch)
    moves.append([2 * (b - a) for a, b in zip(start, network.get_weights(), strict=True)])
    for other in moves[1:]:
        for a, b in zip(moves[0], other, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)


def test_noise_grows_with_the_declared_weight():
    plain, weighted = private(), private(compile=dict(max_sample_weight=4.0))
    for a, b in zip(plain.report(BATCH).weights, weighted.report(BATCH).weights, strict=True):
        assert b.sensitivity == pytest.approx(4 * a.sensitivity)
        assert b.noise_std == pytest.approx(4 * a.noise_std)
    # And the noise that is drawn is that of the report.
    network = unconstrained(dense_network(40, hidden=80))
    model = private(
        network,
        noise_multiplier=1.7,
        sampling=lipdp.FullBatch(),
        optimizer=keras.optimizers.SGD(1.0),
        compile=dict(max_sample_weight=4.0),
    )
    stds = [row.noise_std for row in model.report(BATCH).weights]
    moves = one_step(model, *data(BATCH, (40,)), np.zeros(BATCH))
    for move, std in zip(moves, stds, strict=True):
        assert abs(move.std() / std - 1.0) < 5 / math.sqrt(2 * move.size)


def test_a_loss_whose_gradient_is_constant_zero_leaves_numbers():
    """Compilers fold such a clip; one whose constants were tiny became NaN on JAX."""
    model = private(loss=lambda y, p: 0.0 * keras.ops.sum(p, axis=-1), clip=1.0)
    model.fit(*data(), epochs=1, verbose=0)
    assert all(np.isfinite(w).all() for w in weights(model))


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="TensorFlow compiles no shapes")
def test_a_batch_of_another_shape_compiles_no_noise_and_no_certificates_anew(monkeypatch):
    from lipdp.training.steps import jax_step

    traced = []
    for half in (jax_step.read_batch, jax_step.update_weights):

        def counted(*args, half=half):
            traced.append(half.__name__)
            return half(*args)

        monkeypatch.setattr(jax_step, half.__name__, counted)
    model = private(dense_network(), sampling=lipdp.PoissonSampling(64))
    model.fit(*data(256, (6,)), epochs=4, verbose=0)
    assert traced.count("update_weights") == 1 < traced.count("read_batch")
