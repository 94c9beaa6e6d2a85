"""What would fail in a step, or count what it should not, fails before anything is paid for."""

import keras
import numpy as np
import pytest
from keras import ops

import lipdp
from lipdp import layers, losses
from lipdp.training import plan, trial
from tests.lipdp.helpers import data, dense_network, one_in, private

K = keras.losses
M = keras.metrics


# --- losses ---------------------------------------------------------------------------------------


def contrastive(y, z):
    """Each example has a value, which depends on the others."""
    near = ops.matmul(z, ops.transpose(z))
    own = ops.arange(ops.shape(z)[0])
    return K.sparse_categorical_crossentropy(own, near, from_logits=True)


def triplet(y, z):
    return ops.relu(z[:, 0] - ops.max(z[:, 0]) + 1.0)


def normalised(y, z):
    z = (z - ops.mean(z, axis=0)) / (1e-3 + ops.std(z, axis=0))
    return ops.mean(ops.square(y - z), axis=-1)


def over_the_batch_size(y, z):
    return ops.sum(ops.square(y - z), axis=-1) / ops.shape(z)[0]


def class_counts(y, z):
    weights = 1.0 / (1.0 + ops.mean(y, axis=0))
    return ops.mean(weights * ops.square(y - z), axis=-1)


class Batchwise(lipdp.losses.BoundedLoss):
    targets = "values"

    def call(self, y, z):
        return ops.mean(z - ops.mean(z, axis=0), axis=-1)

    def bound(self, classes):
        return 1.0


MIXING = {
    "contrastive": contrastive,
    "triplet": triplet,
    "normalised over the batch": normalised,
    "over the batch size": over_the_batch_size,
    "weights of the classes of the batch": class_counts,
    "pairs": lambda y, z: ops.matmul(z, ops.transpose(z)),
    "sorted": lambda y, z: ops.sort(z[:, 0], axis=0),
    "with a bound": Batchwise(),
}
SCALARS = {
    "mean": lambda y, z: ops.mean(ops.square(y - z)),
    "sum": lambda y, z: ops.sum(ops.abs(y - z)),
    "labels": lambda y, z: ops.mean(K.sparse_categorical_crossentropy(y, z, from_logits=True)),
    "a value a class": lambda y, z: ops.mean(ops.square(y - z), axis=0),
    "Dice of all": K.Dice(),
    "Tversky of all": K.Tversky(),
}
SEPARATE = {
    "mean": lambda y, z: ops.mean(ops.square(y - z), axis=-1),
    "positions": lambda y, z: ops.square(y - z),
    "labels": lambda y, z: K.sparse_categorical_crossentropy(y, z, from_logits=True),
    "Dice of each": K.Dice(axis=(1,)),
    "reduced": K.MeanSquaredError(reduction="sum"),
    "focal": K.CategoricalFocalCrossentropy(from_logits=True),
    "wrapped": K.MeanSquaredLogarithmicError(),
}


@pytest.mark.parametrize("name", one_in(3, MIXING))
def test_a_loss_that_mixes_examples_is_refused(name):
    with pytest.raises(ValueError, match="`loss` (gives an example another|must give each)"):
        private(loss=MIXING[name], clip=1.0)


@pytest.mark.parametrize("name", one_in(3, SCALARS))
def test_a_loss_of_the_whole_batch_is_refused_and_told_what_to_give(name):
    with pytest.raises(ValueError, match=r"a value of its own.* got shape \(.*axis=-1"):
        private(loss=SCALARS[name], clip=1.0)


@pytest.mark.parametrize("name", one_in(3, SEPARATE))
def test_a_loss_that_looks_at_each_example_is_welcome(name):
    private(loss=SEPARATE[name], clip=1.0)


AXES = [
    lambda axis: K.CategoricalCrossentropy(from_logits=True, axis=axis),
    lambda axis: K.CategoricalCrossentropy(from_logits=True, axis=axis, label_smoothing=0.1),
    lambda axis: K.BinaryCrossentropy(from_logits=True, axis=axis),
    lambda axis: K.CategoricalFocalCrossentropy(axis=axis),
    lambda axis: K.BinaryFocalCrossentropy(axis=axis),
    lambda axis: K.CosineSimilarity(axis=axis),
]


@pytest.mark.any_backend
@pytest.mark.parametrize("make", AXES)
def test_a_loss_along_another_axis_is_refused(make):
    for axis in (0, -2):
        with pytest.raises(ValueError, match=f"the last axis, axis=-1; got axis={axis}"):
            private(loss=make(axis), clip=1.0)
        with pytest.raises(ValueError, match="the last axis"):  # by the step itself, too
            losses.per_example(make(axis), ops.ones((4, 3)), ops.ones((4, 3)))
    for axis in (-1, 1):
        private(loss=make(axis), clip=1.0)


@pytest.mark.any_backend
def errors(y, z):
    return ops.mean(ops.cast(ops.not_equal(y > 0.5, z > 0.0), "float32"), axis=-1)


def of_the_targets_alone(y, z):
    return ops.mean(ops.square(y), axis=-1) + 0.0 * ops.mean(z, axis=-1)


@pytest.mark.parametrize("loss", [errors, of_the_targets_alone])
def test_a_loss_without_a_gradient_is_warned_of(loss):
    with pytest.warns(UserWarning, match="gradient of zero"):
        trial.try_loss(loss, (3,))


@pytest.mark.parametrize(
    "function, classes, dtype",
    [(K.sparse_categorical_crossentropy, 3, "int32"), (K.binary_crossentropy, 1, "float32")],
)
def test_a_function_of_probabilities_has_a_gradient(function, classes, dtype, recwarn):
    """Though it cuts off outputs that are none."""
    trial.try_loss(function, (classes,), ((1,), dtype), in_range=True)
    assert not [w for w in recwarn if "gradient of zero" in str(w.message)]


def test_a_known_loss_with_another_function_is_none():
    """Its class says no more what it computes."""
    replaced, patched = K.MeanAbsoluteError(), losses.SparseCategoricalCrossentropy()
    replaced.fn = lambda y, z: ops.mean(100.0 * z, axis=-1)
    patched.call = lambda y, z: ops.mean(z)
    for loss in (replaced, patched):
        assert not losses.is_known(loss) and losses.gradient_bound(loss, (3,)) == float("inf")
    replaced.fn = lambda y, z: ops.mean(z - ops.mean(z, axis=0), axis=-1)
    for loss in (replaced, patched):
        with pytest.raises(ValueError, match="`loss`"):
            private(loss=loss, clip=1.0)


class Pair(keras.losses.Loss):
    """Wants targets of a shape of its own."""

    def call(self, y, z):
        first, second = y[:, 0], y[:, 1]
        return ops.sum(ops.square(z - first), axis=-1) + ops.sum(second, axis=-1)


def test_a_loss_of_unusual_targets_is_tried_with_those_of_the_data():
    x, _ = data()
    model = private(loss=Pair(), clip=1.0, compile=dict(metrics=None))
    with pytest.raises(ValueError, match=r"`loss` cannot be computed for .*\('batch', 5\)"):
        model.fit(x, np.ones((64, 5), "float32"), verbose=0)
    assert model.spent(1e-5).steps == 0
    model.fit(x, np.ones((64, 2, 3), "float32"), verbose=0)
    assert model.spent(1e-5).steps == 4


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="JAX gathers without an error")
def test_a_loss_that_ends_in_an_error_at_a_label_out_of_range_is_refused():
    plain = SEPARATE["labels"]
    x, y = data()
    records = list(zip(x, y, strict=True))
    model = private(loss=plain, clip=1.0)
    model.fit(x, y, verbose=0)  # arrays are known to hold none
    for given in ((records, None), (x, y + 1)):
        with pytest.raises(ValueError, match=r"begin it with `y_true = ops.clip\(y_true, 0, 2\)`"):
            model.fit(*given, verbose=0)
    assert model.spent(1e-5).steps == 4
    model = private(loss=lambda y, z: plain(ops.clip(y, 0, 2), z), clip=1.0)
    model.fit(records, verbose=0)


def test_without_trials_a_contrastive_loss_trains_on_nothing(monkeypatch):
    """Mutant: called with examples one by one, it is 0."""
    monkeypatch.setattr(trial, "_check_values", lambda pairs: None)
    model = private(loss=contrastive, clip=1.0, compile=dict(metrics=None))
    assert model.fit(*data(), verbose=0).history["loss"] == [0.0]


# --- metrics --------------------------------------------------------------------------------------


class Seen(keras.metrics.Metric):
    """Counts examples."""

    def __init__(self, name="seen"):
        super().__init__(name=name)
        self.count = self.add_weight(shape=(), initializer="zeros", name="count")

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.count.assign_add(ops.cast(ops.sum(sample_weight), "float32"))

    def result(self):
        return self.count + 0.0


class Plain(Seen):
    def update_state(self, y_true, y_pred):
        self.count.assign_add(1.0)


class CountsPadding(Seen):
    def update_state(self, y_true, y_pred, sample_weight=None):
        self.count.assign_add(ops.cast(ops.shape(y_pred)[0], "float32"))


def of_the_batch(y, z):
    return ops.mean(z)


class Broken(Seen):
    def update_state(self, y_true, y_pred, sample_weight=None):
        self.count.assign_add(ops.sum(ops.matmul(y_pred, y_pred)))


@pytest.mark.parametrize(
    "metric, error, words",
    [
        (Plain, TypeError, "'seen'.*must take `sample_weight`"),
        (CountsPadding, TypeError, "'seen'.*counts rows whose `sample_weight` is 0"),
        (lambda: of_the_batch, ValueError, "'of_the_batch' does not fit outputs of shape"),
        (Broken, ValueError, "'seen' does not fit outputs of shape"),
        (lambda: M.SparseCategoricalCrossentropy(axis=5), ValueError, "does not fit"),
        (M.CategoricalCrossentropy, ValueError, r"does not fit .* \('batch', 3\)"),
        (M.AUC, ValueError, "'auc' does not fit"),
    ],
)
@pytest.mark.parametrize("weighted", one_in(2, ["metrics", "weighted_metrics"]))
def test_metrics_that_do_not_fit_cost_nothing(metric, error, words, weighted):
    metric = metric()
    model = private(compile={"metrics": None, weighted: [metric]})
    with pytest.raises(error, match=words):
        model.fit(*data(), verbose=0)
    assert model.spent(1e-5).steps == 0
    assert not any(np.asarray(v).any() for v in getattr(metric, "variables", ()))


def of_each(y, z):
    return ops.mean(z, axis=-1)


def test_a_function_of_each_example_is_a_metric():
    private(compile=dict(metrics=[of_each])).fit(*data(), verbose=0)


def maps(outputs):
    return keras.Sequential(
        [
            keras.Input((4, 4, 1)),
            layers.BallProjection(4.0),
            layers.SpectralConv2D(outputs, 1, padding="same"),
        ]
    )


@pytest.mark.parametrize("eager", one_in(2, [False, True]))
def test_metrics_of_positions_leave_padding_out(eager):
    x, y = data(32, (4, 4, 1))
    y = np.random.default_rng(0).integers(0, 3, (32, 4, 4))
    metrics = {
        3: [Seen(), "accuracy", M.MeanIoU(3, sparse_y_pred=False)],
        1: [M.AUC(from_logits=True), M.Precision(), M.BinaryAccuracy()],
    }
    for outputs, chosen in metrics.items():
        loss = "binary_crossentropy" if outputs == 1 else "sparse_categorical_crossentropy"
        target = (y > 1)[..., None].astype("float32") if outputs == 1 else y
        found = []
        for physical in (None, 7):
            keras.utils.set_random_seed(0)
            model = private(
                maps(outputs),
                loss=loss,
                sampling=lipdp.FullBatch(),
                optimizer=keras.optimizers.SGD(0.0),
                physical_batch_size=physical,
                run_eagerly=eager,
                compile=dict(metrics=chosen),
            )
            logs = model.fit(x, target, verbose=0).history
            found.append({name: value[0] for name, value in logs.items() if name != "epsilon"})
        assert found[0] == pytest.approx(found[1], rel=1e-4)
        if outputs == 3:
            assert found[1]["seen"] == 32 * 16
            z = np.asarray(model.predict(x, verbose=0)).argmax(-1)
            assert found[1]["accuracy"] == pytest.approx((z == y).mean(), abs=1e-5)


# --- validation data ------------------------------------------------------------------------------


class Batches(keras.utils.PyDataset):
    def __init__(self, x, y):
        super().__init__()
        self.x, self.y = x, y

    def __len__(self):
        return 2

    def __getitem__(self, i):
        return self.x, self.y


def as_dataset(x, y):
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(8)


def endless(x, y):
    while True:
        yield x, y


CHANGES = {
    "other inputs": lambda x, y: (x[:, :2], y),
    "other targets": lambda x, y: (x, np.eye(3)[y]),
    "fewer targets": lambda x, y: (x, y[:5]),
    "labels out of range": lambda x, y: (x, y + 1),
    "no targets": lambda x, y: (x,),
    "weights of another shape": lambda x, y: (x, y, np.ones(3)),
    "words": lambda x, y: (x.astype(str), y),
    "one number": lambda x, y: (1.0, 2.0),
    "a word": lambda x, y: "abc",
    "inputs alone": lambda x, y: {"x": x},
    "an iterator": lambda x, y: iter([(x, y)]),
    "no batches": lambda x, y: (b for b in ()),
    "endless batches": lambda x, y: endless(x, y),
    "endless data set": lambda x, y: as_dataset(x, y).repeat(),
    "batches without targets": lambda x, y: ((x,) for _ in range(4)),
    "second batch of other inputs": lambda x, y: ((x[:, : 6 - i], y) for i in range(4)),
    "batches of labels out of range": lambda x, y: ((x, y + i) for i in range(4)),
    "batches of other inputs": lambda x, y: Batches(x[:, :2], y),
    "data set of other inputs": lambda x, y: as_dataset(x[:, :2], y),
}


@pytest.mark.parametrize("change", one_in(4, CHANGES))
def test_validation_data_that_cannot_be_evaluated_costs_nothing(change):
    x, y = data()
    model = private()
    with pytest.raises(ValueError, match="`validation_data` cannot be evaluated"):
        model.fit(x, y, verbose=0, validation_data=CHANGES[change](x, y))
    assert model.spent(1e-5).steps == 0


@pytest.mark.parametrize("kind", one_in(2, ["arrays", "weights", "batches", "set", "generator"]))
def test_validation_data_that_can_be_evaluated(kind):
    x, y = data()
    given = {
        "arrays": lambda: (x.astype("float64"), y),
        "weights": lambda: (x, y, np.ones(64)),
        "batches": lambda: Batches(x, y),
        "set": lambda: as_dataset(x, y),
        "generator": lambda: ((x[i : i + 8], y[i : i + 8]) for i in range(0, 64, 8)),
    }[kind]()
    model = private(seed=1)
    options = {"validation_steps": 8} if kind == "generator" else {}
    history = model.fit(x, y, verbose=0, validation_data=given, **options)
    assert np.isfinite(history.history["val_loss"]).all()
    expected = model.evaluate(x, y, verbose=0)[0]
    assert history.history["val_loss"][0] == pytest.approx(expected, rel=1e-4)  # nothing is lost


def test_without_its_trial_validation_fails_after_an_epoch(monkeypatch):
    """Mutant: nothing is tried."""
    monkeypatch.setattr(plan, "try_validation", lambda model, data, *sizes: data)
    model = private()
    with pytest.raises(ValueError, match="Unrecognized data type"):
        model.fit(*data(), verbose=0, validation_data="abc")
    assert model.spent(1e-5).steps == 4


@pytest.mark.any_backend
def test_epochs_to_validate_after_may_be_listed():
    history = private().fit(
        *data(), epochs=3, verbose=0, validation_data=data(), validation_freq=(1, 3)
    )
    assert len(history.history["val_loss"]) == 2


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "argument", ["validation_freq", "validation_batch_size", "validation_steps"]
)
def test_how_often_and_how_many_are_checked_first(argument):
    model = private()
    with pytest.raises(ValueError, match=f"`{argument}` must be an integer"):
        model.fit(*data(), verbose=0, validation_data=data(), **{argument: 0})
    with pytest.raises(ValueError, match="`validation_freq` must be an integer"):
        model.fit(*data(), verbose=0, validation_data=data(), validation_freq=[1, 0])
    assert model.spent(1e-5).steps == 0


# --- augmentation ---------------------------------------------------------------------------------


def image_network(shape):
    body = [layers.BallProjection(1.0), keras.layers.Flatten(), layers.SpectralDense(3)]
    return keras.Sequential([keras.Input(shape), *body])


@pytest.mark.parametrize("shape", one_in(2, [(6, 6, 1), (6, 6)]))
def test_views_that_mix_examples_are_found(shape, monkeypatch):
    augmentation = lipdp.Augmentation(keras.layers.RandomContrast(0.5, (0, 1)), views=2)
    trial.try_augmentation(augmentation, image_network(shape))
    for mixing in (
        lambda x: x + ops.mean(x, axis=0),
        lambda x: ops.roll(x, 1, axis=0),
        lambda x: x * ops.max(x),
    ):
        monkeypatch.setattr(augmentation.layers[0], "call", lambda x, training=None, f=mixing: f(x))
        with pytest.raises(ValueError, match="`augmentation` mixes the examples"):
            trial.try_augmentation(augmentation, image_network(shape))


@pytest.mark.any_backend
def test_views_that_do_not_fit_the_network_cost_nothing():
    augmentation = lipdp.Augmentation(keras.layers.RandomCrop(4, 4))
    model = private(image_network((6, 6, 1)), augmentation=augmentation)
    with pytest.raises(ValueError, match=r"views of shape \(4, 4, 1\).* network takes \(6, 6, 1\)"):
        model.fit(*data(shape=(6, 6, 1)), verbose=0)
    vectors = private(dense_network(), augmentation=augmentation)
    with pytest.raises(ValueError, match="RandomCrop is for images"):
        vectors.fit(*data(), verbose=0)
    assert model.spent(1e-5).steps == vectors.spent(1e-5).steps == 0


# --- what assigns to a variable within a step -----------------------------------------------------


def of_the_network(network):
    return network.trainable_variables[0]


def of_nobody(network):
    return keras.Variable(np.zeros((6, 8)), name="of_nobody", trainable=False, dtype="float32")


def mean_into(variable, values):
    variable.assign(ops.zeros(variable.shape) + ops.mean(values))


OTHERS = [of_the_network, of_nobody]


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("clip", [1.0, lipdp.PerLayerClip()])
def test_a_loss_that_assigns_is_refused(other, clip):
    network = dense_network()
    variable = other(network)
    before = np.array(variable)

    def keeps(y, z):
        mean_into(variable, z)
        return ops.mean(ops.square(ops.cast(y, z.dtype) - z), axis=-1)

    with pytest.raises(ValueError, match=f"`loss` assigns to the variable '{variable.path}'"):
        model = private(network, loss=keeps, clip=clip, compile={"metrics": None})
        x, y = data()
        model.fit(x, np.eye(3, dtype="float32")[y], verbose=0)
    assert (np.array(variable) == before).all()


class Keeps(keras.metrics.Metric):
    """Has its own state, and writes into another variable."""

    def __init__(self, variable, where, **kwargs):
        super().__init__(name="keeps", **kwargs)
        self.count = self.add_variable((), initializer="zeros", name="count")
        self.other = variable  # which makes it one of the metric's variables
        self.where = where

    def update_state(self, y, z, sample_weight=None):
        self.count.assign_add(ops.sum(sample_weight))
        if self.where == "update":
            mean_into(self.other, z)

    def result(self):
        if self.where == "result":
            mean_into(self.other, self.count)
        return self.count * 1.0


@pytest.mark.parametrize("where", ["update", "result"])
def test_a_metric_that_assigns_to_a_weight_is_refused(where):
    network = dense_network()
    metric = Keeps(of_the_network(network), where)
    model = private(network, compile={"metrics": [metric]})
    before = network.get_weights()
    with pytest.raises(ValueError, match="metric 'keeps' assigns to the variable.*kernel"):
        model.fit(*data(), verbose=0)
    assert model.spent(1e-5).steps == 0
    assert all((a == b).all() for a, b in zip(before, network.get_weights(), strict=True))


def test_a_function_as_metric_that_assigns_is_refused():
    variable = of_nobody(None)

    def keeps(y, z):
        mean_into(variable, z)
        return ops.mean(z, axis=-1)

    model = private(compile={"metrics": [keeps]})
    with pytest.raises(ValueError, match="metric 'keeps' assigns to the variable 'of_nobody'"):
        model.fit(*data(), verbose=0)


def test_a_metric_may_change_its_own_state():
    model = private(compile={"metrics": [Keeps(of_nobody(None), "nowhere"), "accuracy"]})
    model.fit(*data(), verbose=0)
    assert model.spent(1e-5).steps > 0


@pytest.mark.any_backend
def test_a_layer_that_assigns_to_a_variable_of_somebody_else_is_refused():
    variable = of_nobody(None)

    class Restless(keras.layers.Layer):
        def call(self, x):
            mean_into(variable, x)
            return x

        def bound(self, call):
            return lipdp.bounds.lipschitz()

    network = keras.Sequential(
        [keras.Input((6,)), layers.BallProjection(1.0), Restless(), layers.SpectralDense(3)]
    )
    with pytest.raises(ValueError, match="assigns to 'of_nobody'"):
        private(network)


# --- what writes into a variable of the backend itself --------------------------------------------

on_tensorflow = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="a program on JAX changes nothing"
)


def raw(variable, values):
    variable.value.assign(ops.zeros(variable.shape) + ops.mean(values))


def in_a_branch(variable, values):
    import tensorflow as tf

    tf.cond(tf.reduce_sum(values) > 1e9, lambda: raw(variable, values), lambda: None)


def scattered(variable, values):
    rows = ops.zeros((1, *variable.shape[1:])) + ops.mean(values)
    variable.value.scatter_nd_update([[0]], rows)


class Writes(keras.layers.Layer):
    """Writes where it should not; its rows stay apart otherwise."""

    def __init__(self, write, variable):
        super().__init__()
        self.write = lambda x: write(variable, x)

    def call(self, x):
        self.write(x)
        return x

    def bound(self, call):
        return lipdp.bounds.lipschitz()


@on_tensorflow
@pytest.mark.parametrize("write", [raw, in_a_branch, scattered])
@pytest.mark.parametrize("what", ["loss", "metric", "layer"])
@pytest.mark.parametrize("clip", [1.0, lipdp.PerLayerClip()], ids=["certified", "per layer"])
def test_raw_writes_are_refused_before_anything_is_paid(what, write, clip):
    network = dense_network()
    variable = of_the_network(network)
    before = np.array(variable)

    def loss(y, z):
        write(variable, z)
        return ops.mean(ops.square(z), axis=-1)

    class Metric(Seen):
        def update_state(self, y, z, sample_weight=None):
            write(variable, z)
            super().update_state(y, z, sample_weight)

    options = {"loss": loss} if what == "loss" else {}
    metrics = [Metric()] if what == "metric" else None
    if what == "layer":
        other = keras.Variable(np.zeros((2, 2)), trainable=False, dtype="float32")
        if isinstance(clip, lipdp.PerLayerClip):
            lipdp.keeps_rows_apart(Writes)
        network = keras.Sequential([keras.Input((6,)), *network.layers, Writes(write, other)])
    with pytest.raises(ValueError, match="assigns to the variable of the backend, by"):
        model = private(network, clip=clip, compile={"metrics": metrics}, **options)
        model.fit(*data(), verbose=0)
    if what != "layer":
        assert (np.array(variable) == before).all()


@on_tensorflow
def test_without_the_trace_a_raw_write_is_not_seen(monkeypatch):
    """Mutant: nothing is traced, and the weights are what the loss writes."""
    monkeypatch.setattr(trial, "raw_writes", lambda function, arrays: set())
    network = dense_network()
    extra = keras.Variable(np.zeros(()), trainable=False, dtype="float32")

    def loss(y, z):
        raw(extra, z)
        return ops.mean(ops.square(z), axis=-1)

    private(network, loss=loss, clip=1.0, compile={"metrics": None}).fit(*data(), verbose=0)
    assert float(extra) != 0.0


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="of JAX")
def test_what_a_traced_loss_leaves_in_a_variable_ends_in_an_error_first():
    network = dense_network()
    variable = of_the_network(network)

    def loss(y, z):
        variable._value = ops.zeros(variable.shape) + ops.mean(z)
        return ops.mean(ops.square(z), axis=-1)

    models = []
    with pytest.raises(Exception, match="racer"):
        models.append(private(network, loss=loss, clip=1.0, compile={"metrics": None}))
        models[0].fit(*data(), verbose=0)
    assert not models or models[0].spent(1e-5).steps == 0
