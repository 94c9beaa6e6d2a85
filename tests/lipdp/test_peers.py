"""Mistakes found in other libraries, as far as they are about training: one test each.

Those about accounting are in tests/accountants/test_peers.py. Some are tested where they belong,
which `ELSEWHERE` says.
"""

import ast
import os
import pathlib
import secrets
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
from keras import ops

import accountants
import lipdp
from lipdp import layers, randomness
from lipdp.autodiff import compiled
from lipdp.noise.gaussian_rng import standard_normal
from lipdp.training.spending import Spending
from tests.lipdp.helpers import data, dense_network, one_in, private, weights

K = keras.layers
TESTS = pathlib.Path(__file__).parent
SCHEMES = [
    lipdp.PoissonSampling(16),
    lipdp.TruncatedPoisson(16, 24),
    lipdp.FixedSize(16),
    lipdp.ShuffledEpochs(16),
    lipdp.RandomAllocation(4),
    lipdp.FullBatch(),
]
ELSEWHERE = {
    "budget checked only in fit": "test_model.py::test_every_entrance_is_closed_once_the_budget",
    "steps that run together": "test_model.py::test_the_budget_holds_for_steps_that_run_together",
    "a repeated data set": "test_sources.py::test_data_sets_that_are_refused",
    "saving works, loading fails": "test_model.py::test_the_network_is_an_ordinary_keras_model",
    "a second fit that replays": "test_model.py::test_noise_and_draws_never_repeat",
    "a second fit that forgets": "test_model.py::test_a_second_fit_goes_on_from_what_was_spent",
    "a clip update not counted": "test_model.py::test_adaptive_clip_finds_its_quantile_and_is_acc",
    "layers that appear twice": "test_bounds.py::test_shared_layer_sums",
    "layers that share a name": "test_bounds.py::test_weights_of_one_path_are_refused",
    "a regulariser of weights": "test_private_step.py::test_a_penalty_on_weights_is_added_after",
    "loss weights": "test_private_step.py::test_noise_grows_with_the_declared_weight",
    "empty Poisson draws": "test_private_step.py::test_an_empty_draw_is_a_step_of_noise",
    "NaN gradients": "test_private_step.py::test_a_broken_row_changes_nothing_for_the_others",
}


class Gradients(keras.optimizers.SGD):
    """Keeps what it is given, and leaves the weights alone."""

    def __init__(self):
        super().__init__(0.0)
        self.seen = []

    def apply(self, grads, trainable_variables=None):
        self.seen.append([np.array(g) for g in grads])
        super().apply(grads, trainable_variables)


@pytest.mark.any_backend
@pytest.mark.parametrize("mistake", ELSEWHERE)
def test_what_is_tested_elsewhere(mistake):
    file, name = ELSEWHERE[mistake].split("::")
    (path,) = TESTS.rglob(file)
    assert f"\ndef {name}" in path.read_text()


# --- sampling, counting, budgets ------------------------------------------------------------------


@pytest.mark.any_backend
@pytest.mark.parametrize("steps_per_epoch", [4, None])
def test_shuffled_batches_are_not_accounted_as_poisson(steps_per_epoch):
    if steps_per_epoch is None:
        model = private(sampling=lipdp.ShuffledEpochs(16))
        model.fit(*data(), epochs=3, verbose=0)
        unsampled = accountants.epsilon(
            noise_multiplier=1.0, sampling=lipdp.FullBatch(), num_examples=64, steps=3, delta=1e-3
        )
        assert model.spent(1e-3).epsilon == pytest.approx(float(unsampled))
        assert model.spent(1e-3).relation == "zero_out"
        return
    # And what is accounted as Poisson is drawn so: no batch depends on the others of its epoch.
    model = private()
    x = np.arange(64.0)[:, None] * np.ones(6)
    epochs, repeated, sizes, before = 40, 0, set(), set()
    for index, batch in enumerate(model.batches(x, np.zeros(64, int), epochs=epochs)):
        rows = set(batch.inputs[batch.mask > 0][:, 0])
        before = before if index % 4 else set()
        repeated += bool(rows & before)
        before |= rows
        sizes.add(len(rows))
    assert repeated > 2 * epochs and len(sizes) > 10


@pytest.mark.any_backend
@pytest.mark.parametrize("sampling", SCHEMES[:5] + [lipdp.ShuffledEpochs(24)], ids=repr)
def test_the_divisor_is_neither_the_realised_batch_nor_the_data_set(sampling):
    """All examples are the same: a sum over the batch is so many times the first one's."""
    optimizer = Gradients()
    model = private(sampling=sampling, noise_multiplier=0.0, optimizer=optimizer)
    x, y = np.ones((70, 6), "float32"), np.zeros(70, int)
    sizes = [
        (batch.mask.sum(), model.train_on_batch(batch))[0]
        for batch in model.batches(x, y, epochs=2)
    ]
    norms = [np.sqrt(sum((g**2).sum() for g in seen)) for seen in optimizer.seen]
    if sampling != lipdp.FixedSize(16):
        assert len(set(sizes)) > 1
    alone = norms[0] / sizes[0]
    np.testing.assert_allclose(norms, alone * np.array(sizes), rtol=1e-5)
    # And one is an example's gradient over the public constant, whatever was drawn.
    full = private(model.network, sampling=lipdp.FullBatch(), optimizer=Gradients())
    full.spending.noise_multiplier = 0.0
    full.fit(x, y, verbose=0)
    mean = np.sqrt(sum((g**2).sum() for g in full.optimizer.seen[0]))
    assert alone == pytest.approx(mean / sampling.expected_batch_size(70), rel=1e-5)


@pytest.mark.any_backend
def test_the_budget_holds_in_an_epoch_that_never_ends():
    """The peers count floor(N/B) steps an epoch: with `steps_per_epoch` there may be any number."""
    model = private(budget=lipdp.Budget(2.0, 1e-3), noise_multiplier=1.5)
    with pytest.warns(UserWarning, match="The budget allows"):
        model.fit(*data(65), steps_per_epoch=1000, verbose=0)
    (run,) = model.spending.runs
    assert 5 < run.steps == model.spent().steps < 1000 and model.spent().epsilon <= 2.0
    more = accountants.epsilon(
        noise_multiplier=1.5,
        sampling=model.sampling,
        num_examples=65,
        steps=run.steps + 1,
        delta=1e-3,
    )
    assert more > 2.0


@pytest.mark.any_backend
@pytest.mark.parametrize("sampling", SCHEMES, ids=repr)
def test_a_calibrated_noise_never_overshoots(sampling):
    budget = lipdp.Budget(1.0, 1e-4)
    spending = Spending(budget, None, None, lambda: 0)
    run = spending.plan(sampling, 64, planned=40, per_epoch=4)
    spent = accountants.epsilon(
        noise_multiplier=spending.noise_multiplier,
        sampling=sampling,
        num_examples=64,
        steps=40,
        delta=1e-4,
    )
    assert run.allowed == 40 and 0.995 < spent <= 1.0


@pytest.mark.any_backend
def test_accumulation_is_one_draw_with_one_noise():
    """Not a draw, nor a noise, for each piece: the same weights as in one piece."""

    def train(**options):
        keras.utils.set_random_seed(1)
        model = private(seed=4, noise_multiplier=2.0, **options)
        model.fit(*data(), epochs=2, verbose=0)
        assert model.spent(1e-5).steps == 8
        return weights(model)

    for whole, pieces in zip(train(), train(physical_batch_size=3), strict=True):
        np.testing.assert_allclose(whole, pieces, atol=1e-5)


@pytest.mark.any_backend
def test_steps_are_steps_and_not_rows_views_or_pieces():
    network = keras.Sequential(
        [
            keras.Input((4, 4, 1)),
            layers.BallProjection(1.0),
            K.Flatten(),
            layers.SpectralDense(3),
        ]
    )
    views = lipdp.Augmentation(K.RandomFlip("horizontal"), views=3)
    model = private(network, augmentation=views, physical_batch_size=5)
    model.fit(*data(65, (4, 4, 1)), epochs=2, verbose=0)
    # 65 examples in batches of 16 are five steps, not four.
    assert model.spent(1e-5).steps == 10


@pytest.mark.any_backend
def test_nothing_is_spent_before_the_first_step_and_nobody_fails_to_say_so():
    for options in (dict(), dict(budget=lipdp.Budget(1.0, 1e-5), noise_multiplier=None)):
        model = private(**options)
        spent = model.spent(1e-5)
        assert (spent.epsilon, spent.steps, spent.delta) == (0.0, 0, 1e-5)
        if not options:
            assert str(model.report())
    much = private(noise_multiplier=1e6)
    much.fit(*data(), verbose=0)
    assert 0.0 <= much.spent(0.5).epsilon <= much.spent(1e-9).epsilon < 0.1


# --- randomness -----------------------------------------------------------------------------------


def test_all_128_bits_of_a_key_make_the_noise():
    """A seed of 32 bits can be searched through."""
    key = np.frombuffer(bytes(range(16)), np.uint32)
    draw = compiled(lambda key: standard_normal(key, np.uint32(0), (2,)))
    drawn = {tuple(np.asarray(draw(ops.convert_to_tensor(key))))}
    for bit in range(128):
        flipped = key.copy()
        flipped[bit // 32] ^= np.uint32(1 << (bit % 32))
        drawn.add(tuple(np.asarray(draw(ops.convert_to_tensor(flipped)))))
    assert len(drawn) == 129


@pytest.mark.any_backend
def test_keys_and_draws_have_128_bits_of_entropy_each_time(monkeypatch):
    asked = []
    monkeypatch.setattr(
        randomness.secrets, "token_bytes", lambda n: asked.append(8 * n) or os.urandom(n)
    )
    monkeypatch.setattr(
        randomness.secrets,
        "randbits",
        lambda n: asked.append(n) or int.from_bytes(os.urandom(n // 8)),
    )
    source = randomness.RandomSource(None)
    keys = {tuple(source.key(0)) for _ in range(100)}
    draws = {tuple(source.generator(0).integers(2**62, size=3)) for _ in range(100)}
    assert len(asked) == 200 and min(asked) >= 128
    assert len(keys) == len(draws) == 100
    # No word of a key is constant, nor are two alike.
    assert len({word for key in keys for word in key}) == 400
    # The state behind a draw is as long: NumPy's pool, and the key of Philox.
    generator = source.generator(0).bit_generator
    assert generator.seed_seq.pool.nbytes == 16 == generator.state["state"]["key"].nbytes


@pytest.mark.any_backend
def test_models_never_coincide_whatever_is_seeded():
    """Nor do processes that are forked after everything was seeded."""
    read, write = os.pipe()
    keys = set()
    for _ in range(2):
        keras.utils.set_random_seed(0)
        model = private()
        keys.add(bytes(model.random_source.key(0)))
    child = os.fork()
    if child == 0:
        os.write(write, bytes(model.random_source.key(0)))
        os._exit(0)
    os.waitpid(child, 0)
    keys.add(os.read(read, 16))
    keys.add(bytes(model.random_source.key(0)))
    assert len(keys) == 4
    assert randomness.secrets is secrets  # of the operating system, with nothing to copy


# --- the network ----------------------------------------------------------------------------------


@keras.saving.register_keras_serializable("tests")
class Own(keras.layers.Layer):
    """A layer with states of its own, which look like a key and like a clip."""

    def build(self, shape):
        new = dict(trainable=False, initializer="ones")
        self.key = self.add_weight(shape=(4,), dtype="uint32", name="key", **new)
        self.clip = self.add_weight(shape=(), name="clip", **new)
        self.seed_generator = keras.random.SeedGenerator(3)

    def call(self, x):
        return x

    def bound(self, call):
        return lipdp.bounds.lipschitz()


def test_state_is_not_found_by_position():
    network = keras.Sequential(
        [keras.Input((6,)), Own(), layers.BallProjection(1.0), layers.SpectralDense(3)]
    )
    own = network.layers[0]
    model = private(network, clip=lipdp.AdaptiveClip(initial=0.5), run_eagerly=False)
    model.fit(*data(), epochs=2, verbose=0)
    assert np.asarray(own.key).tolist() == [1] * 4 and float(own.clip) == 1.0
    assert float(model.current_clip()) != 0.5


def test_dropout_masks_differ_between_steps_and_examples():
    network = keras.Sequential(
        [
            keras.Input((6,)),
            layers.BallProjection(10.0),
            K.Dropout(0.5),
            layers.SpectralDense(3),
        ]
    )
    still = keras.optimizers.SGD(0.0)
    model = private(
        network,
        sampling=lipdp.FullBatch(),
        optimizer=still,
        run_eagerly=False,
    )
    model.fit(*data(8), epochs=1, verbose=0)
    before = weights(model)
    # Compiled once, the weights stay: only the masks can move the loss.
    losses = model.fit(*data(8), epochs=12, verbose=0).history["loss"]
    for a, b in zip(before, weights(model), strict=True):
        np.testing.assert_array_equal(a, b)
    assert len(set(losses)) == 12
    outputs = np.asarray(network(np.ones((64, 6), "float32"), training=True))
    assert len(np.unique(outputs.round(5), axis=0)) > 16


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "layer",
    [
        K.BatchNormalization(),
        K.Lambda(lambda x: 100.0 * x),
        K.Dense(6, activation=lambda x: 100.0 * x),
        K.Dense(6, activity_regularizer="l2"),
        K.ActivityRegularization(l2=1.0),
    ],
    ids=["batch statistics", "lambda", "activation", "activity of a layer", "activity"],
)
@pytest.mark.parametrize("nested", [False, True])
def test_what_no_bound_sees_is_refused(layer, nested):
    layer = keras.Sequential([keras.Input((6,)), layer]) if nested else layer
    network = keras.Sequential(
        [keras.Input((6,)), layers.BallProjection(1.0), layer, layers.SpectralDense(3)]
    )
    with pytest.raises(lipdp.UnknownLayerError):
        private(network)
    with pytest.raises(lipdp.UnknownLayerError):
        lipdp.gradient_bounds(network, 1.0)


@pytest.mark.any_backend
def test_an_activation_of_a_layer_is_in_its_bound():
    def bound(activation):
        dense = K.Dense(6, activation=activation, kernel_initializer="identity", use_bias=False)
        last = layers.SpectralDense(3, use_bias=False)
        network = keras.Sequential([keras.Input((6,)), layers.BallProjection(1.0), dense, last])
        return lipdp.gradient_bounds(network, 1.0)[dense.kernel.path]

    # The slope of the sigmoid is at most a quarter, that of silu 1.0998.
    assert bound("sigmoid") == pytest.approx(0.25 * bound(None), rel=1e-3)
    assert bound("silu") == pytest.approx(1.0998 * bound(None), rel=1e-3)


@pytest.mark.parametrize("nested", one_in(2, [True, False]))
def test_what_is_frozen_stays_and_gets_no_noise(nested):
    network = dense_network()
    frozen = network.layers[1]
    if nested:
        network = keras.Sequential([keras.Input((6,)), network])
    frozen.trainable = False
    model = private(network, run_eagerly=False, noise_multiplier=5.0)
    model.optimizer.weight_decay = 0.1
    before, moving = np.array(frozen.kernel), np.array(network.weights[-1])
    model.fit(*data(), epochs=2, verbose=0)
    np.testing.assert_array_equal(before, np.array(frozen.kernel))
    assert (moving != np.array(network.weights[-1])).any()
    assert frozen.kernel.path not in lipdp.gradient_bounds(network, 1.0)


def test_predictions_are_those_of_the_last_update():
    """No projection or average that only the training sees."""
    seen = []

    class Keep(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(weights(self.model))

    x, y = data()
    model = private(run_eagerly=False)
    model.fit(x, y, epochs=2, verbose=0, callbacks=[Keep()])
    for a, b in zip(seen[-1], weights(model), strict=True):
        np.testing.assert_array_equal(a, b)
    fresh = dense_network()
    fresh.set_weights(seen[-1])
    np.testing.assert_allclose(
        model.predict(x, verbose=0), np.asarray(fresh(x, training=False)), atol=1e-6
    )
    np.testing.assert_allclose(
        model.network.predict(x, verbose=0), np.asarray(fresh(x, training=True)), atol=1e-6
    )
    for a, b in zip(seen[-1], weights(model), strict=True):
        np.testing.assert_array_equal(a, b)


# --- checks ---------------------------------------------------------------------------------------


@pytest.mark.any_backend
@pytest.mark.parametrize("package", [lipdp, accountants], ids=lambda p: p.__name__)
def test_no_check_is_an_assertion(package):
    files = list(pathlib.Path(package.__file__).parent.rglob("*.py"))
    assert len(files) > 10
    for file in files:
        found = [n.lineno for n in ast.walk(ast.parse(file.read_text())) if type(n) is ast.Assert]
        assert not found, f"{file}: lines {found}"


REFUSALS = textwrap.dedent(
    """
    import keras, numpy as np, lipdp, sys
    from lipdp import layers
    from tests.lipdp.helpers import data, dense_network, private

    x, y = data()
    open_ball = keras.Sequential([keras.Input((6,)), layers.SpectralDense(3)])
    batch_norm = keras.Sequential([keras.Input((6,)), layers.BallProjection(1.0),
                                   keras.layers.BatchNormalization(), layers.SpectralDense(3)])
    for attempt in (
        lambda: private(open_ball),
        lambda: private(batch_norm),
        lambda: private(noise_multiplier=-1.0),
        lambda: private(loss="mse"),
        lambda: private().fit(x * np.nan, y),
        lambda: private().fit(x, y + 7),
        lambda: private().train_on_batch(x, y),
        lambda: private().train_step((x, y)),
        lambda: lipdp.ShuffledEpochs(0),
        lambda: lipdp.Budget(-1.0, 1e-5),
    ):
        try:
            attempt()
            print("accepted")
        except Exception as error:
            print(type(error).__name__)
    print(bool(__debug__))
    """
)


@pytest.mark.slow
@pytest.mark.any_backend
def test_refusals_are_the_same_where_assertions_are_off():
    said = {}
    for option in ((), ("-O",)):
        command = [sys.executable, *option, "-c", REFUSALS]
        done = subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parents[1])
        assert done.returncode == 0, done.stderr
        *said[option], debug = done.stdout.split()
        assert debug == str(not option)
    assert said[()] == said[("-O",)] and "accepted" not in said[()] and len(said[()]) == 10


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "call",
    [
        lambda model, x, y: lipdp.PrivateModel(
            dense_network(), noise_multiplier=1.0, sampling=model.sampling, l2_norm_clip=1.0
        ),
        lambda model, x, y: model.compile("sgd", "mae", target_tensors=[y]),
        lambda model, x, y: model.compile("sgd", "mae", auto_scale_loss=True),
        lambda model, x, y: list(model.batches(x, y, batch_size=8)),
        lambda model, x, y: model.train_on_batch(None, sample_weight=np.ones(3)),
        lambda model, x, y: lipdp.AdaptiveClip(quantil=0.5),
        lambda model, x, y: lipdp.PoissonSampling(16, replacement=True),
    ],
)
def test_unknown_arguments_are_not_swallowed(call):
    model = private()
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        call(model, *data())
    assert model.spent(1e-5).steps == 0
