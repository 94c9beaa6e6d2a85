"""PrivateModel: budgets, counting, entrances, randomness, bad input."""

import json
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest

import accountants
import lipdp
from lipdp import layers
from lipdp.data.sources import Arrays
from tests.lipdp.helpers import EAGERLY, AddsLoss, data, dense_network, one_in, private, weights

BUDGET = lipdp.Budget(2.0, 1e-4)


@pytest.mark.parametrize("run_eagerly", one_in(2, [False, True]))
def test_fit_spends_what_was_planned_and_never_more(run_eagerly):
    model = private(budget=BUDGET, run_eagerly=run_eagerly)
    x, y = data()
    history = model.fit(x, y, epochs=4, verbose=0)
    spent = model.spent()
    assert spent.steps == 16
    assert 0.99 * BUDGET.epsilon < spent.epsilon <= BUDGET.epsilon
    assert (spent.delta, spent.relation) == (BUDGET.delta, "add_or_remove_one")
    epsilons = history.history["epsilon"]
    assert epsilons == sorted(epsilons) and len(epsilons) == 4
    assert epsilons[-1] == pytest.approx(spent.epsilon)
    direct = accountants.epsilon(
        noise_multiplier=model.noise_multiplier,
        sampling=model.sampling,
        num_examples=64,
        steps=16,
        delta=BUDGET.delta,
    )
    assert spent.epsilon == pytest.approx(float(direct))


def test_every_entrance_is_closed_once_the_budget_is_spent():
    model = private(budget=BUDGET)
    x, y = data()
    model.fit(x, y, epochs=2, verbose=0)
    before = weights(model)
    with pytest.raises(lipdp.BudgetExceeded, match="has not run"):
        model.fit(x, y, epochs=1, verbose=0)
    with pytest.raises(lipdp.BudgetExceeded):
        model.train_on_batch(x[:16], y[:16])
    with pytest.raises(lipdp.BudgetExceeded):
        next(iter(model.batches(x, y)))
    with pytest.raises(RuntimeError, match="nobody paid"):
        model.train_step((x, y, np.ones(64)))
    for a, b in zip(before, weights(model), strict=True):
        np.testing.assert_array_equal(a, b)
    assert model.spent().steps == 8


def test_training_ends_before_the_step_that_would_overspend():
    model = private(budget=BUDGET, noise_multiplier=2.0)
    x, y = data()
    allowed = accountants.calibrate_steps(
        epsilon=BUDGET.epsilon,
        delta=BUDGET.delta,
        noise_multiplier=2.0,
        sampling=model.sampling,
        num_examples=64,
    )
    assert 4 < allowed < 400
    with pytest.warns(UserWarning, match=f"allows {allowed} of"):
        model.fit(x, y, epochs=101, verbose=0)
    assert model.spent().steps == allowed
    assert model.spent().epsilon <= BUDGET.epsilon
    with pytest.raises(lipdp.BudgetExceeded):
        model.fit(x, y, verbose=0)


@pytest.mark.any_backend
def test_a_second_fit_goes_on_from_what_was_spent():
    model = private(budget=lipdp.Budget(50.0, 1e-4), noise_multiplier=2.0)
    x, y = data()
    model.fit(x, y, epochs=1, verbose=0)
    first = model.spent()
    model.fit(x, y, epochs=1, verbose=0)
    assert model.spent().steps == 2 * first.steps
    assert model.spent().epsilon > first.epsilon


@pytest.mark.any_backend
def test_initial_epoch_and_steps_per_epoch_count_real_steps():
    model = private()
    x, y = data()
    model.fit(x, y, epochs=5, initial_epoch=3, steps_per_epoch=3, verbose=0)
    assert model.spent(1e-5).steps == 6


def test_an_interrupted_fit_is_charged_for_the_steps_that_ran():
    class Stop(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == 3:
                raise KeyboardInterrupt

    model = private()
    x, y = data()
    with pytest.raises(KeyboardInterrupt):
        model.fit(x, y, callbacks=[Stop()], verbose=0)
    assert model.spent(1e-5).steps == 3
    model.fit(x, y, verbose=0)
    assert model.spent(1e-5).steps == 7


def test_batches_are_good_for_one_step_each():
    model = private()
    x, y = data()
    count = 0
    for batch in model.batches(x, y, epochs=2):
        model.train_on_batch(batch)
        with pytest.raises(ValueError, match="just"):
            model.train_on_batch(batch)
        count += 1
    assert count == 8 == model.spent(1e-5).steps
    with pytest.raises(ValueError, match="sampling"):
        model.train_on_batch(x[:16], y[:16])
    with pytest.raises(ValueError):
        model.train_on_batch(batch)
    assert model.spent(1e-5).steps == 8


def test_a_loop_of_ones_own_that_is_left_early_is_settled():
    model = private()
    x, y = data()
    loop = model.batches(x, y)
    model.train_on_batch(next(loop))
    with pytest.raises(RuntimeError, match="training already"):
        model.fit(x, y)
    loop.close()
    assert model.spent(1e-5).steps == 1
    model.fit(x, y, verbose=0)
    assert model.spent(1e-5).steps == 5


@pytest.mark.parametrize(
    "sampling,steps",
    [
        (lipdp.PoissonSampling(16), 4),
        pytest.param(lipdp.FullBatch(), 1, marks=pytest.mark.any_backend),
        pytest.param(lipdp.ShuffledEpochs(24), 3, marks=pytest.mark.any_backend),
    ],
)
@pytest.mark.parametrize("clip", one_in(2, [lipdp.AdaptiveClip(0.5), 0.1, None]))
def test_schemes_and_clips(sampling, steps, clip):
    compiled = clip is not None and sampling == lipdp.PoissonSampling(16)
    model = private(sampling=sampling, clip=clip, noise_multiplier=3.0, run_eagerly=not compiled)
    x, y = data()
    history = model.fit(x, y, epochs=2, validation_data=(x, y), verbose=0)
    spent = model.spent(1e-5)
    assert spent.steps == 2 * steps
    assert spent.relation == sampling.relations[0]
    assert {"loss", "accuracy", "epsilon", "val_loss", "val_accuracy"} <= set(history.history)


def test_shuffled_epochs_take_every_example_once():
    model = private(sampling=lipdp.ShuffledEpochs(24))
    x = np.arange(64, dtype="float32")[:, None] * np.ones((1, 6), "float32")
    y = np.zeros(64, int)
    for _ in range(2):
        seen = []
        for batch in model.batches(x, y):
            seen.extend(batch.inputs[batch.mask > 0][:, 0])
            model.train_on_batch(batch)
        assert sorted(seen) == list(range(64))


def test_poisson_draws_have_the_right_law():
    model = private(sampling=lipdp.PoissonSampling(16))
    x = np.arange(64, dtype="float32")[:, None] * np.ones((1, 6), "float32")
    y = np.zeros(64, int)
    counts, sizes = np.zeros(64), []
    with model._running(x, y, 1) as batches:
        for index in range(4000):
            batch = batches.draw(index)
            rows = batch.inputs[batch.mask > 0][:, 0].astype(int)
            assert len(set(rows)) == len(rows)
            counts[rows] += 1
            sizes.append(len(rows))
    # Each example enters with probability 1/4; sizes are binomial.
    assert abs(counts / 4000 - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / 4000)
    assert abs(np.var(sizes) / (64 * 0.25 * 0.75) - 1) < 0.15


@pytest.mark.any_backend
def test_adaptive_clip_finds_its_quantile_and_is_accounted_in_one_mechanism():
    clip = lipdp.AdaptiveClip(quantile=0.5, initial=0.1, learning_rate=0.2)
    model = private(sampling=lipdp.FullBatch(), clip=clip, noise_multiplier=1.0)
    x, y = data(400)
    model.fit(x, y, epochs=60, verbose=0)
    z = model.predict(x, verbose=0)
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    norms = np.linalg.norm(p - np.eye(3)[y], axis=1)
    assert abs(np.log(float(model.current_clip()) / np.median(norms))) < 0.3
    mechanism = model.step.constants
    joint = (mechanism.gradient_noise_multiplier**-2 + mechanism.count_noise_multiplier**-2) ** -0.5
    assert joint == pytest.approx(mechanism.noise_multiplier)


def test_same_seed_same_result_and_no_seed_another():
    def train(seed):
        keras.utils.set_random_seed(1)
        model = private(seed=seed, run_eagerly=False)
        model.fit(*data(), epochs=2, verbose=0)
        return weights(model)

    first, second, third, fourth = train(5), train(5), train(None), train(None)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)
    assert any((a != b).any() for a, b in zip(first, third, strict=True))
    assert any((a != b).any() for a, b in zip(third, fourth, strict=True))


@pytest.mark.parametrize("seed", [None, 3])
def test_noise_and_draws_never_repeat(seed, tmp_path):
    x, y = data()
    keys, rows = set(), set()
    for _ in range(2):  # a second model resumes from the ledger of the first
        model = private(seed=seed, ledger=tmp_path / "spent.ledger")
        for _ in range(2):  # a second fit
            for batch in model.batches(x, y, epochs=2):
                keys.add(tuple(int(k) for k in batch.key))
                rows.add(batch.inputs.tobytes())
                model.train_on_batch(batch)
    assert len(keys) == 32 and len(rows) == 32


@pytest.mark.any_backend
def test_the_ledger_is_shared_across_processes(tmp_path):
    path = tmp_path / "spent.ledger"
    model = private(budget=lipdp.Budget(3.0, 1e-4), noise_multiplier=4.0, ledger=path)
    model.fit(*data(), epochs=3, verbose=0)
    script = textwrap.dedent(
        """
        import sys
        from tests.lipdp.helpers import private, data
        import lipdp
        model = private(budget=lipdp.Budget(3.0, 1e-4), noise_multiplier=4.0, ledger=sys.argv[1])
        assert model.spent().steps == 12
        model.fit(*data(), epochs=3, verbose=0)
        print(model.spent().epsilon)
        """
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert model.spent().steps == accountants.Ledger(path).steps == 24
    assert model.spent().epsilon == pytest.approx(float(done.stdout.splitlines()[-1]))
    assert model.spent().epsilon == pytest.approx(float(accountants.Ledger(path).epsilon(1e-4)))


@pytest.mark.any_backend
def test_the_ledger_holds_the_budget_of_all_runs(tmp_path):
    path = tmp_path / "spent.ledger"
    x, y = data()
    private(budget=BUDGET, ledger=path).fit(x, y, verbose=0)
    other = private(budget=BUDGET, noise_multiplier=1.0, ledger=path)
    with pytest.raises(lipdp.BudgetExceeded):
        other.fit(x, y, verbose=0)
    assert other.spent().steps == 4
    # What little is left is nothing to calibrate to; with much noise it can be had all the same.
    last = private(budget=BUDGET, ledger=path)
    with pytest.raises(lipdp.BudgetExceeded, match="used up.*`noise_multiplier`"):
        last.fit(x, y, verbose=0)
    assert last.noise_multiplier is None and last.spent().steps == 4
    last = private(budget=BUDGET, noise_multiplier=1000.0, ledger=path)
    last.fit(x, y, verbose=0)
    assert last.spent().steps == 8 and last.spent().epsilon <= BUDGET.epsilon


def test_the_network_is_an_ordinary_keras_model(tmp_path):
    model = private()
    x, y = data()
    model.fit(x, y, verbose=0)
    model.network.save(tmp_path / "network.keras")
    loaded = keras.models.load_model(tmp_path / "network.keras")
    np.testing.assert_allclose(loaded.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-6)
    again = private(loaded)
    again.fit(x, y, verbose=0)
    with pytest.raises(TypeError, match="network"):
        model.get_config()


def test_weights_outside_their_set_are_projected_before_the_first_step():
    network = dense_network()
    network.set_weights([100.0 * w + 1.0 for w in network.get_weights()])
    model = private(network, noise_multiplier=0.0, optimizer=keras.optimizers.SGD(0.0))
    model.fit(*data(), verbose=0)
    for layer in network.layers:
        if hasattr(layer, "kernel"):
            assert np.linalg.norm(np.array(layer.kernel), 2) <= 1.0 + 1e-6


def test_batches_come_without_a_generator_of_tensorflow(monkeypatch):
    """For one, TensorFlow has every larger tensor of the process mapped anew (`mallopt`)."""
    tensorflow = pytest.importorskip("tensorflow")

    def refused(*args, **kwargs):
        raise AssertionError("a private fit made a data set from a generator")

    monkeypatch.setattr(tensorflow.data.Dataset, "from_generator", refused)
    model = private()
    model.fit(*data(), epochs=2, verbose=0)
    assert model.spent(1e-3).steps == 8


def test_averaged_weights_are_kept_and_lie_in_their_set():
    """Keras averages what its optimizer wrote, before the projection: far outside, here."""
    ends = []
    for use_ema in (False, True):
        optimizer = keras.optimizers.SGD(500.0, use_ema=use_ema, ema_momentum=0.5)
        model = private(optimizer=optimizer, seed=1)
        model.fit(*data(), epochs=2, verbose=0)
        ends.append(weights(model))
        for variable in model.network.trainable_variables:
            value = np.array(variable)
            np.testing.assert_allclose(variable.constraint(variable), value, rtol=1e-4)
            assert np.linalg.norm(value, 2) <= 1 + 1e-4
    assert not any(np.allclose(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("optimizer", one_in(2, ["adam", "rmsprop", "lion", "adamw"]))
def test_any_optimizer_and_callbacks(optimizer):
    class Epochs(keras.callbacks.Callback):
        seen = ()

        def on_epoch_end(self, epoch, logs=None):
            self.seen = (*self.seen, logs["epsilon"])

    callback = Epochs()
    model = private(optimizer=optimizer)
    model.fit(*data(), epochs=2, callbacks=callback, verbose=0)
    assert len(callback.seen) == 2


@pytest.mark.any_backend
def test_report_adds_up():
    model = private(allocation="least", budget=lipdp.Budget(8.0, 1e-5))
    with pytest.raises(TypeError):
        model.report("x", "y")
    assert model.report().noise_multiplier is None
    model.fit(*data(), verbose=0)
    report = model.report()
    values = report.to_dict()
    json.dumps(values)
    assert [row["weight"] for row in values["weights"]] == [
        v.path for v in model.network.trainable_variables
    ]
    assert sum(row.noise_share for row in report.weights) == pytest.approx(1.0)
    bounds = lipdp.gradient_bounds(model.network, model.current_clip())
    assert {row.weight: row.sensitivity for row in report.weights} == bounds
    assert report.sensitivity == pytest.approx(sum(b * b for b in bounds.values()) ** 0.5)
    joint = sum((row.sensitivity / (row.noise_std * 16)) ** 2 for row in report.weights) ** -0.5
    assert joint == pytest.approx(model.noise_multiplier)
    text = report.to_text(width=80)
    assert "kernel" in text and "Δ" in text and f"{report.epsilon:.4g}" in text


# --- weights of examples ------------------------------------------------------------------------


@pytest.mark.parametrize("run_eagerly", one_in(2, [False, True]))
def test_weights_reach_losses_and_metrics_as_in_keras(run_eagerly):
    x, y = data(20)
    weight = np.random.default_rng(0).uniform(0, 3, 20)
    weight[:3] = 0.0
    settings = dict(
        metrics=["accuracy", keras.metrics.SparseCategoricalAccuracy(name="plain")],
        weighted_metrics=[keras.metrics.SparseCategoricalAccuracy(name="weighted")],
    )
    model = private(
        sampling=lipdp.FullBatch(),
        noise_multiplier=0.0,
        optimizer=keras.optimizers.SGD(0.0),
        run_eagerly=run_eagerly,
        compile=dict(max_sample_weight=3.0, **settings),
    )
    plain = keras.models.clone_model(model.network)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    plain.compile("sgd", loss, run_eagerly=True, **settings)
    plain.set_weights(model.network.get_weights())
    logs = []
    for batch in model.batches(x, y, sample_weight=weight):
        # Padding of 5 rows stays out.
        batch.inputs = np.concatenate([batch.inputs, np.ones((5, 6), "float32")])
        batch.targets = np.concatenate([batch.targets, np.zeros(5, int)])
        batch.mask = np.concatenate([batch.mask, np.zeros(5, "float32")])
        batch.weights = np.concatenate([batch.weights, np.full(5, 2.0, "float32")])
        logs.append(model.train_on_batch(batch, return_dict=True))
    expected = plain.evaluate(
        x, y, sample_weight=weight, batch_size=20, verbose=0, return_dict=True
    )
    assert set(expected) == {"loss", "accuracy", "plain", "weighted"} <= set(logs[0])
    for name, value in expected.items():
        assert float(logs[0][name]) == pytest.approx(value, rel=1e-5), name
    evaluated = model.evaluate(
        x, y, sample_weight=weight, batch_size=20, verbose=0, return_dict=True
    )
    for name, value in expected.items():
        assert evaluated[name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.any_backend
def test_class_weights_are_sample_weights():
    x, y = data()

    def train(network=None, **weights):
        keras.utils.set_random_seed(1)
        model = private(seed=3, compile=dict(max_sample_weight=2.0))
        history = model.fit(x, y, epochs=2, verbose=0, validation_data=(x, y), **weights)
        assert {"val_loss", "val_accuracy"} <= set(history.history)
        return weights_of(model)

    weights_of = weights
    by_class = train(class_weight={0: 0.25, 2: 2.0})
    by_example = train(sample_weight=np.choose(y, [0.25, 1.0, 2.0]))
    plain = train()
    for a, b in zip(by_class, by_example, strict=True):
        np.testing.assert_array_equal(a, b)
    assert any((a != b).any() for a, b in zip(by_class, plain, strict=True))


def test_class_weights_of_rows_and_of_distributions():
    expected = np.array([1.0, 3.0, 1.0], "float32")
    for y in (np.array([0, 1, 2]), np.array([[0], [1], [2]]), np.eye(3)):
        got = lipdp.data.batches.check_weights(None, {1: 3.0}, Arrays(np.ones(3), y), 3.0)
        np.testing.assert_array_equal(got, expected)


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "arguments,error,message",
    [
        (dict(sample_weight=np.ones(63)), ValueError, "64 examples"),
        (dict(sample_weight=np.ones((64, 2))), ValueError, r"\(64, 2\)"),
        (dict(sample_weight=np.full(64, 2.1)), ValueError, "max_sample_weight"),
        (dict(sample_weight=np.full(64, -0.1)), ValueError, "between 0 and"),
        (dict(sample_weight=np.full(64, np.nan)), ValueError, "between 0 and"),
        (dict(sample_weight=np.full(64, np.inf)), ValueError, "between 0 and"),
        (dict(sample_weight=["a"] * 64), TypeError, "sample_weight"),
        (dict(sample_weight="balanced"), TypeError, "sample_weight"),
        (dict(class_weight="balanced"), TypeError, "not covered"),
        (dict(class_weight=[1.0, 2.0, 1.0]), TypeError, "dict"),
        (dict(class_weight={0: 2.5}), ValueError, "max_sample_weight"),
        (dict(class_weight={0: None}), TypeError, "0: None"),
        (dict(class_weight={0: float("nan")}), ValueError, "between 0 and"),
        (dict(class_weight={0: 1.0}, sample_weight=np.ones(64)), ValueError, "both"),
    ],
)
def test_weights_that_are_refused_cost_nothing(arguments, error, message):
    model = private(budget=BUDGET, compile=dict(max_sample_weight=2.0))
    with pytest.raises(error, match=message):
        model.fit(*data(), verbose=0, **arguments)
    with pytest.raises(error, match=message):
        next(iter(model.batches(*data(), **arguments)))
    assert model.spent().steps == 0


@pytest.mark.parametrize(
    "arguments", [dict(sample_weight=np.ones(64)), dict(class_weight={0: 1.0})]
)
def test_weights_without_a_declared_maximum_are_refused(arguments):
    with pytest.raises(ValueError, match="max_sample_weight=.*not covered"):
        private().fit(*data(), verbose=0, **arguments)


@pytest.mark.any_backend
def test_class_weights_need_classes():
    model = private(
        dense_network(classes=2), loss="mae", clip=1.0, compile=dict(max_sample_weight=1.0)
    )
    x, _ = data()
    with pytest.raises(ValueError, match="sample_weight"):
        model.fit(x, np.full((64, 2), 0.7), verbose=0, class_weight={0: 0.5})


@pytest.mark.any_backend
@pytest.mark.parametrize("largest", [0, -1.0, float("inf"), float("nan"), "2", True])
def test_maxima_that_are_refused(largest):
    kind = ValueError if type(largest) in (int, float) else TypeError
    with pytest.raises(kind, match="max_sample_weight"):
        private(compile=dict(max_sample_weight=largest))


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "loss",
    [
        "multiclass_kr",
        "multiclass_hkr",
        "focal",
        "logit_annealing",
        "emma",
        "gloro",
    ],
)
def test_losses_by_name(loss):
    model = private(loss=loss)
    history = model.fit(*data(), epochs=1, verbose=0)
    assert np.isfinite(history.history["loss"]).all()
    known = lipdp.losses.gradient_bound(model.private_loss, (3,))
    assert model.clip_state.loss_gradient_bound == known


@pytest.mark.any_backend
@pytest.mark.parametrize("loss", ["binary_kr", "binary_hkr", "binary_crossentropy", "mae", "hinge"])
def test_losses_of_one_output_by_name(loss):
    x, y = data(classes=2)
    model = private(dense_network(classes=1), loss=loss, compile=dict(metrics=None))
    history = model.fit(x, y, epochs=1, verbose=0, validation_data=(x, y))
    assert np.isfinite(history.history["val_loss"]).all()


# --- bad input ----------------------------------------------------------------------------------


def network_with(*middle, first=True, outputs=3, **last):
    body = [layers.BallProjection(1.0)] if first else []
    return keras.Sequential(
        [keras.Input((6,)), *body, *middle, layers.SpectralDense(outputs, **last)]
    )


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "make,error,message",
    [
        (lambda: dict(noise_multiplier=None), ValueError, "budget"),
        (lambda: dict(noise_multiplier=-1.0), ValueError, "noise_multiplier"),
        (lambda: dict(noise_multiplier=float("nan")), ValueError, "noise_multiplier"),
        (lambda: dict(budget=(3.0, 1e-5)), TypeError, "Budget"),
        (lambda: dict(sampling=256), TypeError, "PoissonSampling"),
        (lambda: dict(clip=0.0), ValueError, "clip"),
        (lambda: dict(clip="adaptive"), TypeError, "AdaptiveClip"),
        (lambda: dict(allocation="equal"), ValueError, "least"),
        (lambda: dict(seed=-1), ValueError, "seed"),
        (lambda: dict(unknown=1), TypeError, "unknown"),
        (lambda: dict(network=3), TypeError, "network"),
        (
            lambda: dict(network=network_with(keras.layers.BatchNormalization())),
            lipdp.UnknownLayerError,
            "Centering",
        ),
        (lambda: dict(network=network_with(first=False)), ValueError, "BallProjection"),
        (
            lambda: dict(network=network_with(keras.layers.Dense(4, activity_regularizer="l2"))),
            lipdp.UnknownLayerError,
            "activity",
        ),
        (lambda: dict(network=network_with(AddsLoss())), lipdp.UnknownLayerError, "add_loss"),
        (
            lambda: dict(network=network_with(keras.layers.Dense(4, activation=keras.ops.exp))),
            lipdp.UnknownLayerError,
            "activation",
        ),
        (
            lambda: dict(network=network_with(keras.layers.LSTM(3), first=False)),
            ValueError,
            "Layer|dimension|ndim",
        ),
    ],
)
def test_models_that_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        arguments = {
            "network": None,
            "noise_multiplier": 1.0,
            "sampling": lipdp.PoissonSampling(16),
            **make(),
        }
        network = arguments.pop("network")
        lipdp.PrivateModel(dense_network() if network is None else network, **arguments)


@pytest.mark.parametrize("epsilon,delta", [(0, 1e-5), (-1, 1e-5), (3, 0), (3, 1), (3, 2)])
def test_budgets_that_are_refused(epsilon, delta):
    with pytest.raises(ValueError):
        lipdp.Budget(epsilon, delta)


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "change,error,message",
    [
        (lambda x, y: (np.where(np.arange(6) == 3, np.nan, x), y), ValueError, "NaN"),
        (lambda x, y: (x * np.inf, y), ValueError, "infinite"),
        (lambda x, y: (x, y + 1), ValueError, "labels from 0 to 2"),
        (lambda x, y: (x, y - 1), ValueError, "labels"),
        (lambda x, y: (x, y + 0.5), ValueError, "integer"),
        (lambda x, y: (x[:, :4], y), ValueError, "shape"),
        (lambda x, y: (np.stack([x, x], 2), y), ValueError, "shape"),
        (lambda x, y: (x[:10], y), ValueError, "10 and 64"),
        (lambda x, y: (x[:8], y[:8]), ValueError, "batch_size"),
        (lambda x, y: (x[:0], y[:0]), ValueError, "empty"),
        (lambda x, y: (x, None), ValueError, "both"),
        (lambda x, y: (x, np.stack([y, y], 1)), ValueError, "shape"),
        (lambda x, y: (x.astype(str), y), TypeError, "x"),
        (lambda x, y: ({"a": x}, y), ValueError, "by their names"),
    ],
)
def test_data_that_is_refused_costs_nothing(change, error, message, tmp_path):
    model = private(budget=BUDGET, ledger=tmp_path / "ledger")
    before = weights(model)
    with pytest.raises(error, match=message):
        model.fit(*change(*data()), verbose=0)
    assert model.spent().steps == 0 and model.noise_multiplier is None
    for a, b in zip(before, weights(model), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "arguments", [dict(epochs=0), dict(epochs=1.5), dict(steps_per_epoch=0), dict(batch_size=3)]
)
def test_fit_arguments_that_are_refused(arguments):
    with pytest.raises((ValueError, TypeError)):
        private().fit(*data(), verbose=0, **arguments)


def test_compile_refuses_what_it_cannot_bound():
    model = lipdp.PrivateModel(
        dense_network(), noise_multiplier=1.0, sampling=lipdp.PoissonSampling(16)
    )
    with pytest.raises(RuntimeError, match="compile"):
        model.fit(*data())
    with pytest.raises(ValueError, match="clip"):
        model.compile("sgd", loss="mse")
    with pytest.raises(ValueError, match="loss"):
        model.compile("sgd")
    with pytest.raises(TypeError, match="loss"):
        model.compile("sgd", loss={"a": "mse"})
    with pytest.raises(ValueError, match="loss_weights"):
        model.compile("sgd", loss="mse", loss_weights=[2.0])
    with pytest.raises(ValueError, match="names .*gloro"):
        model.compile("sgd", loss="glorious")


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "loss",
    [
        "binary_crossentropy",
        "focal",
        "gloro",
        keras.losses.BinaryCrossentropy(from_logits=True),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_softmax_before_a_loss_of_logits_is_refused(loss, nested):
    network = network_with(activation="sigmoid", outputs=2)
    if nested:
        inputs = keras.Input((6,))
        network = keras.Model(inputs, network(inputs))
    model = lipdp.PrivateModel(network, noise_multiplier=1.0, sampling=lipdp.PoissonSampling(16))
    with pytest.raises(ValueError, match="logits"):
        model.compile("sgd", loss=loss)
    model.compile("sgd", loss="mae")


@pytest.mark.parametrize("eager", one_in(2, [False, True]))
def test_steps_that_run_together_are_paid_together(eager):
    x, y = data()
    model = private(noise_multiplier=1.0, seed=2)
    alone = private(noise_multiplier=1.0, seed=2)
    for one, together in ((model, 2), (alone, 1)):
        one.network.set_weights([np.ones_like(w) / 9 for w in weights(one)])
        one.compile(
            keras.optimizers.SGD(0.5),
            loss="sparse_categorical_crossentropy",
            steps_per_execution=together,
            run_eagerly=eager,
        )
        one.fit(x, y, epochs=3, verbose=0)
        assert one.spent(1e-5).steps == 12
    for a, b in zip(weights(model), weights(alone), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_the_budget_holds_for_steps_that_run_together():
    x, y = data()
    budget = lipdp.Budget(2.0, 1e-5)
    model = private(noise_multiplier=2.0, budget=budget, run_eagerly=EAGERLY)
    model.compile(
        "sgd", "sparse_categorical_crossentropy", steps_per_execution=4, run_eagerly=EAGERLY
    )
    with pytest.warns(UserWarning, match="The budget allows"):
        model.fit(x, y, epochs=100, verbose=0)
    spent = model.spent()
    assert spent.steps % 4 == 0 and spent.epsilon <= 2.0
    with pytest.raises(lipdp.BudgetExceeded):
        model.fit(x, y, epochs=1, verbose=0)
    # One step at a time the rest can still be used.
    model.compile("sgd", "sparse_categorical_crossentropy", run_eagerly=EAGERLY)
    model.fit(x, y, epochs=1, steps_per_epoch=1, verbose=0)
    assert model.spent().steps == spent.steps + 1 and model.spent().epsilon <= 2.0


def test_steps_together_must_divide_an_epoch():
    model = private()
    model.compile("sgd", "sparse_categorical_crossentropy", steps_per_execution=3)
    with pytest.raises(ValueError, match="`steps_per_execution` must divide the 4 steps"):
        model.fit(*data(), verbose=0)
    with pytest.raises(ValueError, match="`steps_per_execution` must be an integer"):
        model.compile("sgd", "sparse_categorical_crossentropy", steps_per_execution=0)
