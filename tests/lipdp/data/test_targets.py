"""Targets of every source have the shape that the loss takes for these outputs."""

import keras
import numpy as np
import pytest

import lipdp
from lipdp import layers, losses
from tests.lipdp.helpers import private

pytestmark = pytest.mark.any_backend

COUNT = 24
X = np.linspace(-1, 1, COUNT * 4).reshape(COUNT, 4).astype("float32")


class Records:
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.y[i]


class Batches(keras.utils.PyDataset):
    def __init__(self, x, y):
        super().__init__()
        self.x, self.y = x, y

    def __len__(self):
        return 3

    def __getitem__(self, i):
        return self.x[8 * i : 8 * i + 8], self.y[8 * i : 8 * i + 8]


def dataset(x, y):
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices((x, y))


def generated(x, y):
    tf = pytest.importorskip("tensorflow")
    spec = (tf.TensorSpec(x.shape[1:], x.dtype), tf.TensorSpec(y.shape[1:], y.dtype))
    stream = tf.data.Dataset.from_generator(lambda: zip(x, y, strict=True), output_signature=spec)
    return stream.apply(tf.data.experimental.assert_cardinality(len(x)))


SOURCES = {
    "arrays": lambda x, y: (x, y),
    "records": lambda x, y: (Records(x, y), None),
    "batches": lambda x, y: (Batches(x, y), None),
    "data set": lambda x, y: (dataset(x, y), None),
    "stream": lambda x, y: (dataset(x, y), None),
    "generator": lambda x, y: (generated(x, y), None),
}

# Losses, shapes of the outputs, and of targets that fit and that do not.
CASES = [
    ("mse", (1,), [(), (1,)], [(2,), (1, 1)]),
    ("mae", (1, 1), [(1,), (1, 1)], [(), (2,)]),
    ("huber", (3,), [(3,)], [(), (1,), (2,), (3, 1), (1, 3)]),
    ("hinge", (2, 1), [(2,), (2, 1)], [(), (1,), (1, 2)]),
    ("binary_crossentropy", (2,), [(2,)], [(), (1,)]),
    ("binary_kr", (1, 2), [(1, 2)], [(), (2,), (1,)]),
    ("categorical_crossentropy", (3,), [(3,)], [(), (1,), (1, 3)]),
    ("cosine_similarity", (2, 3), [(2, 3)], [(), (3,), (2,)]),
    ("sparse_categorical_crossentropy", (3,), [(), (1,)], [(3,), (2,), (1, 1)]),
    ("multiclass_kr", (1, 3), [(1,), (1, 1)], [(), (3,), (1, 3)]),
    ("focal", (2, 3), [(2,), (2, 1)], [(), (1,), (3,), (1, 2)]),
]
WRONG = [(loss, outputs, shape) for loss, outputs, _, wrong in CASES for shape in wrong]
RIGHT = [(loss, outputs, shape) for loss, outputs, right, _ in CASES for shape in right]


def model(loss, outputs, source="arrays"):
    network = keras.Sequential(
        [
            keras.Input((4,)),
            layers.BallProjection(1.0),
            layers.SpectralDense(int(np.prod(outputs))),
            keras.layers.Reshape(outputs),
        ]
    )
    streams = source in ("stream", "generator")
    sampling = lipdp.ShuffledEpochs(8) if streams else lipdp.FixedSize(8)
    return private(network, loss=loss, clip=1.0, sampling=sampling, compile=dict(metrics=None))


def targets(loss, shape):
    kind = losses.properties._targets(losses.get(loss))
    y = np.zeros((COUNT, *shape), "int64" if kind == "labels" else "float32")
    if kind == "simplex" and y.ndim > 1:
        y[..., 0] = 1.0
    return y


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("loss, outputs, shape", WRONG)
def test_targets_of_another_shape_are_refused_before_anything_is_spent(
    loss, outputs, shape, source
):
    refusing = model(loss, outputs, source)
    with pytest.raises(ValueError, match=r"`y` must have .*: shape \(.*; got \("):
        refusing.fit(*SOURCES[source](X, targets(loss, shape)), verbose=0)
    assert refusing.spent(1e-5).steps == 0


@pytest.mark.parametrize("source", ["arrays", "records", "stream"])
@pytest.mark.parametrize("loss, outputs, shape", RIGHT)
def test_targets_that_fit(loss, outputs, shape, source):
    taking = model(loss, outputs, source)
    taking.fit(*SOURCES[source](X, targets(loss, shape)), verbose=0)
    assert taking.spent(1e-5).steps == 3


@pytest.mark.parametrize("loss, outputs, shape", WRONG)
def test_a_step_refuses_targets_that_would_be_broadcast(loss, outputs, shape):
    """Whatever the source said: the shapes are those of the step itself."""
    z = keras.ops.zeros((COUNT, *outputs))
    with pytest.raises(ValueError, match="`y` must have"):
        losses.per_example(losses.get(loss), targets(loss, shape), z)


@pytest.mark.parametrize(
    "y, error",
    [
        (["a"] * COUNT, TypeError),
        ([{"a": 1}] * COUNT, TypeError),
        ([None] * COUNT, TypeError),
    ],
)
def test_targets_of_records_that_are_no_numbers(y, error):
    refusing = model("mse", (1,))
    with pytest.raises(error, match="records must hold numbers as targets"):
        refusing.fit(Records(X, y), verbose=0)
    assert refusing.spent(1e-5).steps == 0


def test_targets_of_a_data_set_are_one_array():
    refusing = model("mse", (1,), "stream")
    with pytest.raises(TypeError, match=r"examples \(x, y\)"):
        refusing.fit(dataset(X, {"a": X[:, 0], "b": X[:, 0]}), verbose=0)


def test_without_the_check_a_target_reaches_other_examples(monkeypatch):
    """Mutant: targets of the shape (batch,) for outputs of (batch, 1, 1)."""
    monkeypatch.setattr(losses.properties, "check_target_shape", lambda *args: None)
    y = np.zeros(COUNT, "float32")
    other = y.copy()
    other[0] = 9.0
    z = keras.ops.ones((COUNT, 1, 1))
    first, second = (
        keras.ops.convert_to_numpy(losses.per_example(losses.get("mse"), v, z)) for v in (y, other)
    )
    assert (first != second).all()
