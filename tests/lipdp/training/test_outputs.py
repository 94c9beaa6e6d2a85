"""Networks with several outputs and a loss for each: the same step, from whatever source."""

import math

import keras
import numpy as np
import pytest
from keras import layers as K
from keras import ops

import lipdp
from lipdp import layers, losses
from lipdp.losses import Joint
from lipdp.outputs import Outputs, side_by_side
from lipdp.training import trial
from tests.lipdp.helpers import EAGERLY, data, private, weights

EXAMPLES = 24
LOSSES = {"classes": "sparse_categorical_crossentropy", "value": "mae"}
WEIGHTS = {"classes": 1.0, "value": 0.5}


def network(certified=False, keyed=True, joined=False):
    x = keras.Input((6,))
    z = layers.BallProjection(2.0)(x) if certified else x
    dense = layers.SpectralDense if certified else K.Dense
    z = dense(4, name="body")(z)
    heads = [dense(3, name="classes")(z), dense(1, name="value")(z)]
    if joined:
        return keras.Model(x, K.Concatenate()(heads))
    return keras.Model(x, dict(zip(LOSSES, heads, strict=True)) if keyed else heads)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.body, self.classes, self.value = K.Dense(4), K.Dense(3), K.Dense(1)

    def call(self, x):
        z = self.body(x)
        return {"classes": self.classes(z), "value": self.value(z)}


def subclassed():
    made = Subclassed()
    made(ops.ones((1, 6)))
    return made


def targets():
    x, labels = data(EXAMPLES)
    return x, {"classes": labels, "value": np.sin(x[:, 0])}


def of_both(y, z):
    """The losses of both outputs, in one."""
    labels = ops.cast(y[:, 0], "int32")
    value = losses.per_example(losses.get(LOSSES["classes"]), labels, z[:, :3])
    return value + 0.5 * ops.abs(y[:, 1] - z[:, 3])


def one_step(made, x, y, loss=LOSSES, **options):
    """The weights after a step without noise on all examples."""
    options = {"noise_multiplier": 0.0, "sampling": lipdp.FullBatch(), **options}
    given = options.pop("fit", {})
    model = private(
        made,
        loss,
        keras.optimizers.SGD(1.0),
        compile={
            "metrics": None,
            "loss_weights": WEIGHTS if loss is LOSSES else None,
            **options.pop("compile", {}),
        },
        **options,
    )
    rng = np.random.default_rng(0)
    model.network.set_weights([0.3 * rng.normal(size=w.shape) for w in weights(model)])
    model.fit(x, y, verbose=0, **given)
    return weights(model)


@pytest.mark.parametrize("clip", [0.5, lipdp.PerLayerClip(threshold=0.5)], ids=["norm", "layers"])
def test_a_step_is_that_of_one_output_with_the_sum_of_the_losses(clip):
    x, y = targets()
    certified = clip == 0.5
    both = np.stack([y["classes"], y["value"]], axis=1).astype("float32")
    expected = one_step(network(certified, joined=True), x, both, of_both, clip=clip)
    ours = one_step(network(certified), x, y, clip=clip)
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


class Records:
    def __len__(self):
        return EXAMPLES

    def __getitem__(self, i):
        x, y = targets()
        return x[i], {name: v[i] for name, v in y.items()}


def as_dataset(x, y):
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices((x, y))


#: By name: what `fit` and `one_step` get for a network, in place of a dict of arrays.
SOURCES = {
    "list": lambda x, y: ((x, list(y.values())), {"made": network(keyed=False)}),
    "tuple": lambda x, y: ((x, tuple(y.values())), {"made": network(keyed=False)}),
    "a dict for a list": lambda x, y: ((x, y), {"made": network(keyed=False)}),
    "records": lambda x, y: ((Records(), None), {}),
    "data set": lambda x, y: ((as_dataset(x, y).batch(5), None), {}),
    "stream": lambda x, y: (
        (as_dataset(x, y), None),
        {"sampling": lipdp.ShuffledEpochs(EXAMPLES)},
    ),
    "pieces": lambda x, y: ((x, y), {"physical_batch_size": 5}),
    "subclassed": lambda x, y: ((x, y), {"made": subclassed()}),
    "views": lambda x, y: (
        (x, y),
        {"augmentation": lipdp.Augmentation(K.GaussianNoise(0.0), views=2)},
    ),
    "sample weights": lambda x, y: (
        (x, y),
        {"fit": {"sample_weight": np.ones(EXAMPLES)}, "compile": {"max_sample_weight": 1.0}},
    ),
}


@pytest.mark.parametrize("name", SOURCES)
def test_whatever_the_source_the_step_is_the_same(name):
    x, y = targets()
    given, options = SOURCES[name](x, y)
    clip = lipdp.PerLayerClip(threshold=0.5)
    expected = one_step(network(), x, y, clip=clip)
    ours = one_step(options.pop("made", None) or network(), *given, clip=clip, **options)
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


#: By name: what is given otherwise, and what the error says.
MISTAKES = {
    "a target is missing": ({"y": {"classes": np.zeros(EXAMPLES)}}, "`y` must hold one for each"),
    "one array": ({"y": np.zeros(EXAMPLES)}, r"by their names \['classes', 'value'\]"),
    "another length": (
        {"y": {"classes": np.zeros(EXAMPLES), "value": np.zeros(3)}},
        "row an example for each output",
    ),
    "another shape": (
        {"y": {"classes": np.zeros(EXAMPLES), "value": np.zeros((EXAMPLES, 2))}},
        "Output 'value': `y` must have",
    ),
    "labels": (
        {"y": {"classes": np.full(EXAMPLES, 3), "value": np.zeros(EXAMPLES)}},
        "Output 'classes': `y` must hold integer labels from 0 to 2",
    ),
    "a loss is missing": ({"loss": {"classes": "mae"}}, "`loss` must hold one for each"),
    "a loss is None": ({"loss": {"classes": "mae", "value": None}}, "Each output needs a loss"),
    "a loss that mixes": (
        {"loss": {"classes": "mae", "value": lambda y, z: ops.mean(z)}},
        "Output 'value': .* value of its own",
    ),
    "negative weights": (
        {"compile": {"loss_weights": {"classes": 1.0, "value": -1.0}}},
        r"loss_weights\['value'\]",
    ),
    "no weights": ({"compile": {"loss_weights": {"classes": 0.0, "value": 0.0}}}, "not all be 0"),
    "class weights": (
        {"fit": {"class_weight": {0: 1.0}}, "compile": {"max_sample_weight": 1.0}},
        "needs one output",
    ),
}


@pytest.mark.any_backend
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_cost_nothing(name):
    given, words = MISTAKES[name]
    x, y = targets()
    options = {"clip": lipdp.PerLayerClip(), "noise_multiplier": 1.0, **given}
    y, loss = options.pop("y", y), options.pop("loss", LOSSES)
    made = network()
    with pytest.raises((TypeError, ValueError), match=words):
        one_step(made, x, y, loss, **options)
    assert lipdp.PrivateModel(made, noise_multiplier=1.0).spent(1e-5).steps == 0


@pytest.mark.any_backend
def test_one_output_has_no_weights_of_losses_and_no_several_losses():
    made = keras.Sequential([keras.Input((6,)), K.Dense(3)])
    model = lipdp.PrivateModel(made, noise_multiplier=1.0, clip=lipdp.PerLayerClip())
    with pytest.raises(ValueError, match="several outputs"):
        model.compile("sgd", "mae", loss_weights=[1.0])
    with pytest.raises(TypeError, match="one for each"):
        model.compile("sgd", ["mae", "mae"])


@pytest.mark.any_backend
def test_outputs_that_cannot_stand_side_by_side_are_refused():
    x, words = keras.Input((3,)), keras.Input((None, 3))
    twice = K.Dense(2)
    for made, message in (
        (keras.Model(x, [twice(x), twice(x)]), "must have a name each"),
        (keras.Model(words, {"a": K.Dense(2)(words), "b": K.Dense(1)(words)}), "known size"),
    ):
        with pytest.raises(ValueError, match=message):
            lipdp.PrivateModel(made, noise_multiplier=1.0, clip=lipdp.PerLayerClip())


@pytest.mark.parametrize("keyed", [False, True])
def test_logs_and_evaluation_name_the_outputs(keyed):
    x, y = targets()
    model = private(
        network(keyed=keyed),
        LOSSES,
        keras.optimizers.SGD(0.0),
        clip=lipdp.PerLayerClip(),
        sampling=lipdp.FullBatch(),
        run_eagerly=EAGERLY,
        compile={
            "metrics": {"classes": ["accuracy"], "value": ["mse"]},
            "weighted_metrics": {"classes": ["accuracy"]},
            "loss_weights": WEIGHTS,
            "max_sample_weight": 2.0,
        },
    )
    given = np.linspace(0.0, 2.0, EXAMPLES)
    seen = model.fit(
        x, y, sample_weight=given, verbose=0, validation_data=(x, y), validation_batch_size=EXAMPLES
    ).history
    plain = model.evaluate(x, y, verbose=0, return_dict=True, batch_size=EXAMPLES)
    # No step has moved the weights: what was trained on and what is evaluated agree.
    assert plain.keys() == {
        "loss",
        "classes_loss",
        "value_loss",
        "classes_accuracy",
        "value_mse",
        "classes_weighted_accuracy",
    }
    for name, value in plain.items():
        assert seen[f"val_{name}"] == [pytest.approx(value, rel=1e-5)]
        if name not in ("loss", "classes_weighted_accuracy"):
            assert seen[name] == [pytest.approx(value, rel=1e-5)]
    assert plain["loss"] == pytest.approx(
        plain["classes_loss"] + 0.5 * plain["value_loss"], rel=1e-5
    )
    logits = model.predict(x, verbose=0)["classes" if keyed else 0]
    right = logits.argmax(1) == y["classes"]
    assert seen["classes_weighted_accuracy"] == [pytest.approx((right * given).sum() / given.sum())]


@pytest.mark.any_backend
def test_metrics_read_probabilities_of_their_own_output():
    x, y = targets()
    y["value"] = (y["value"] > 0).astype("float32")
    model = private(
        network(),
        {"classes": LOSSES["classes"], "value": "binary_crossentropy"},
        clip=lipdp.PerLayerClip(),
        compile={"metrics": {"value": [keras.metrics.BinaryAccuracy()]}},
    )
    model.fit(x, y, verbose=0)
    found = model.evaluate(x, y, verbose=0, return_dict=True)["value_binary_accuracy"]
    logits = model.predict(x, verbose=0)["value"][:, 0]
    assert found == pytest.approx(np.mean((logits > 0) == (y["value"] > 0.5)))


class Scaled(keras.losses.Loss):
    factor = 1.0

    def call(self, y, z):
        return ops.mean(self.factor * ops.abs(y - z), axis=-1)


def arguments_of(loss):
    loss._fn_kwargs["delta"] = 9.0


#: By name: a loss of the value, and a change of it.
CHANGES = {
    "lipdp's": (
        lipdp.losses.BinaryCrossentropy(temperature=2.0),
        lambda loss: setattr(loss, "temperature", 9.0),
    ),
    "Keras'": (keras.losses.Huber(), arguments_of),
    "one's own": (Scaled(), lambda loss: setattr(loss, "factor", 9.0)),
}


@pytest.mark.any_backend
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_the_loss_of_one_output_is_seen(name):
    loss, change = CHANGES[name]
    model = private(
        network(), LOSSES | {"value": loss}, clip=lipdp.PerLayerClip(), compile={"metrics": None}
    )
    change(loss)
    with pytest.raises(RuntimeError, match="have changed since compile.*loss of output 'value'"):
        model.fit(*targets(), verbose=0)
    assert model.spent(1e-5).steps == 0


@pytest.mark.any_backend
@pytest.mark.parametrize("reverse", [False, True])
def test_outputs_of_different_depths_and_ranks_keep_the_order_of_the_weights(reverse):
    """Keras orders layers by their distance from the end, which joining them must leave."""
    x = keras.Input((5, 6))
    z = K.Dense(4)(x)
    heads = {
        "tags": K.Dense(3, name="tags")(z),
        "label": K.Dense(2, name="label")(K.GlobalAveragePooling1D()(z)),
        "image": K.Reshape((2, 2, 5), name="image")(z),
        "hidden": z,
    }
    made = keras.Model(x, [heads[name] for name in sorted(heads, reverse=reverse)])
    joined, _ = side_by_side(made)
    assert [v.path for v in joined.weights] == [v.path for v in made.weights]
    rows = ops.convert_to_tensor(data(3, (5, 6))[0])
    flat = [ops.reshape(head, (3, -1)) for head in made(rows)]
    np.testing.assert_allclose(joined(rows), ops.concatenate(flat, axis=1), rtol=1e-6)


@pytest.mark.any_backend
def test_a_dict_with_a_single_output_is_refused():
    """A step would end in an error, once it is paid for."""
    x = keras.Input((6,))
    made = keras.Model(x, {"only": K.Dense(3)(x)})
    for look in (lipdp.check, lambda made: private(made, clip=lipdp.PerLayerClip())):
        with pytest.raises(ValueError, match="dict with a single output, .'only'."):
            look(made)


def no_slope(y, z):
    return ops.mean(ops.round(z), axis=-1)


@pytest.mark.any_backend
def test_the_output_whose_loss_has_no_gradient_is_named():
    outputs = Outputs(("a", "b"), ((3,), (1,)))
    joint = Joint(outputs, {"a": losses.get("mae"), "b": no_slope})
    with pytest.warns(UserWarning, match="`loss` of output 'b' has a gradient of zero") as seen:
        trial.try_loss(joint, (4,))
    assert len(seen) == 1


def of_labels(y, z):
    return keras.losses.sparse_categorical_crossentropy(y, z, from_logits=True)


def test_labels_of_arrays_are_in_range_for_a_loss_of_ones_own():
    """On TensorFlow a step ends in an error where one is not, as one of records may be."""
    loss = LOSSES | {"classes": of_labels}
    model = private(
        network(), loss, clip=lipdp.PerLayerClip(), compile={"metrics": None, "run_eagerly": True}
    )
    if keras.backend.backend() == "tensorflow":
        with pytest.raises(ValueError, match="Output 'classes': .* label is out of range"):
            model.fit(Records(), verbose=0)
    model.fit(*targets(), verbose=0)


def worst_gradients(joint, trials=400):
    """Norms of the gradients of a joint loss, where each output's own is as long as it gets."""
    rng = np.random.default_rng(0)
    z = np.concatenate([rng.normal(size=(trials, 4)), 1e3 * rng.normal(size=(trials, 4))])
    size = len(z)
    z[::2, :3] = 1e3 * np.eye(3)[rng.integers(0, 3, len(z[::2]))]  # sure, and as often wrong
    y = {"a": ops.array(rng.integers(0, 3, size)), "b": ops.array(rng.normal(size=(size, 1)))}
    slopes = np.array(
        lipdp.autodiff.gradient(lambda z: losses.per_example(joint, y, z), ops.array(z, "float32"))[
            1
        ]
    )
    return np.linalg.norm(slopes, axis=1)


@pytest.mark.parametrize("weights", [None, {"a": 3.0, "b": 0.5}, {"a": 0.0, "b": 2.0}])
def test_the_bound_of_a_joint_loss_holds_and_is_reached(weights):
    outputs = Outputs(("a", "b"), ((3,), (1,)))
    parts = {"a": losses.SparseCategoricalCrossentropy(), "b": losses.get("mae")}
    joint = Joint(outputs, parts, weights)
    bound = losses.gradient_bound(joint, (4,))
    longest = worst_gradients(joint).max()
    assert 0.99 * bound <= longest <= bound
    # Mutant: the longest of the parts, which is no bound of both together.
    own = [w * losses.gradient_bound(one, shape) for _, one, shape, w in joint.parts()]
    assert max(own) < longest or 0.0 in own


@pytest.mark.any_backend
def test_an_unknown_bound_of_one_output_leaves_none():
    outputs = Outputs(("a", "b"), ((3,), (1,)))
    joint = Joint(outputs, {"a": losses.get("mae"), "b": losses.get("mse")})
    assert losses.gradient_bound(joint, (4,)) == math.inf
    silent = Joint(outputs, {"a": losses.get("mae"), "b": losses.get("mse")}, {"a": 1.0, "b": 0.0})
    assert losses.gradient_bound(silent, (4,)) < math.inf


@pytest.mark.any_backend
def test_reports_and_checks_know_several_outputs():
    made = network(certified=True)
    assert lipdp.check(made).private
    model = private(made, LOSSES, clip=None, compile={"metrics": None})
    x, y = targets()
    report = model.report(16, sample=(x, y))
    assert {w.weight.split("/")[0] for w in report.weights} == {"body", "classes", "value"}
    for row, found in zip(report.weights, report.attained, strict=True):
        assert max(found.norms) <= row.sensitivity


@pytest.mark.any_backend
def test_a_report_of_a_sample_before_fit_where_outputs_come_in_another_order():
    """Keras sorts the keys of a dict: side by side the heads are not called as they were made."""
    x = keras.Input((6,))
    value, classes = K.Dense(1, name="value")(x), K.Dense(3, name="classes")(x)
    made = keras.Model(x, {"value": value, "classes": classes})
    model = private(made, LOSSES, clip=lipdp.PerLayerClip(), compile={"metrics": None})
    report = model.report(16, sample=targets())
    assert {found.name for found in report.attained} == {"classes", "value"}
