"""Data sources: what is read, when, and what is refused."""

import keras
import numpy as np
import pytest

import lipdp
from lipdp import layers
from lipdp.sources import Arrays, Records, open_source
from tests.lipdp.helpers import data, dense_network, private, weights

pytestmark = pytest.mark.any_backend

K = keras.layers


class Log:
    """Records that remember which of them were read."""

    def __init__(self, x, y):
        self.x, self.y, self.read = x, y, []

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        self.read.append(index)
        return self.x[index], self.y[index]


class Batches(keras.utils.PyDataset):
    def __init__(self, x, y):
        super().__init__()
        self.x, self.y = x, y

    def __len__(self):
        return -(-len(self.x) // 10)

    def __getitem__(self, index):
        rows = slice(10 * index, 10 * index + 10)
        return self.x[rows], self.y[rows]


def two_inputs():
    a, b = keras.Input((4,), name="left"), keras.Input((2,), name="right")
    h = K.Concatenate()([layers.BallProjection(1.0)(a), layers.BallProjection(2.0)(b)])
    return keras.Model([a, b], layers.SpectralDense(3)(h))


def trained(*arguments, network=dense_network, **options):
    """The weights after an epoch with fixed seeds."""
    keras.utils.set_random_seed(1)
    model = private(network(), seed=3)
    model.fit(*arguments, epochs=1, verbose=0, **options)
    return weights(model)


def same(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_every_source_gives_the_same_run(tmp_path):
    x, y = data(50)
    expected = trained(x, y)
    np.save(tmp_path / "x.npy", x)
    assert same(expected, trained(np.load(tmp_path / "x.npy", mmap_mode="r"), y))
    assert same(expected, trained(keras.ops.convert_to_tensor(x), y))
    assert same(expected, trained(x.tolist(), y.tolist()))
    assert same(expected, trained(Batches(x, y)))
    assert same(expected, trained(Log(x, y)))
    assert same(expected, trained(list(zip(x, y, strict=True))))
    assert not same(expected, trained(x[::-1], y[::-1]))


def test_a_tf_data_set_is_read():
    tf = pytest.importorskip("tensorflow")
    x, y = data(50)
    stream = tf.data.Dataset.from_tensor_slices((x, y)).batch(7)
    assert same(trained(x, y), trained(stream))
    with pytest.raises(ValueError, match="repeats for ever"):
        trained(stream.repeat())
    with pytest.raises(TypeError, match=r"batches \(x, y\)"):
        trained(tf.data.Dataset.from_tensor_slices(x).batch(7))


def test_only_drawn_records_are_read():
    x, y = data(400)
    log = Log(x, y)
    model = private(sampling=lipdp.PoissonSampling(4))
    model.fit(log, epochs=1, steps_per_epoch=5, verbose=0)
    assert 1 < len(log.read) < 100


def test_several_inputs():
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(50, 4)), rng.normal(size=(50, 2))
    y = rng.integers(0, 3, 50)
    expected = trained([left, right], y, network=two_inputs)
    assert same(expected, trained({"right": right, "left": left}, y, network=two_inputs))
    pairs = [((a, b), c) for a, b, c in zip(left, right, y, strict=True)]
    found = trained(pairs, network=two_inputs)
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    named = [({"left": a, "right": b}, c) for (a, b), c in pairs]
    assert same(found, trained(named, network=two_inputs))


def test_several_inputs_compiled():
    keras.utils.set_random_seed(1)
    model = private(two_inputs(), run_eagerly=False, physical_batch_size=8)
    x = {"left": np.ones((40, 4), "float32"), "right": np.ones((40, 2), "float32")}
    y = np.zeros(40, int)
    history = model.fit(x, y, epochs=2, validation_data=([x["left"], x["right"]], y), verbose=0)
    assert np.isfinite(history.history["val_loss"]).all()


def test_sources_take_and_pad():
    x, y = data(6)
    arrays = open_source(x, y, dense_network())
    records = open_source(Log(x, y), None, dense_network())
    assert isinstance(arrays, Arrays) and isinstance(records, Records)
    for source in (arrays, records):
        taken, targets = source.take(np.array([4, 1]), 4)
        np.testing.assert_array_equal(taken, [x[4], x[1], 0 * x[0], 0 * x[0]])
        np.testing.assert_array_equal(targets[:2], y[[4, 1]])
        assert taken.dtype == np.float32


X, Y = np.ones((8, 6), "float32"), np.zeros(8, int)


@pytest.mark.parametrize(
    "x, y, error, words",
    [
        (X, None, ValueError, "`x` and `y` must both be given"),
        (None, Y, ValueError, "`x` and `y` must both be given"),
        (X, Y[:5], ValueError, "one row an example; got 8 and 5"),
        (X[:, :3], Y, ValueError, r"examples of shape \(6,\)"),
        (X[:0], Y[:0], ValueError, "empty"),
        (X * np.nan, Y, ValueError, "NaN"),
        ("data.csv", Y, TypeError, "`x` must be one array of numbers"),
        ({"other": X}, Y, ValueError, "must hold the inputs"),
        ([], None, ValueError, "`x` is empty"),
        ([X[0], X[1]], None, TypeError, r"records must be pairs \(x, y\)"),
        ([(X[0, :3], 0)], None, ValueError, r"records must hold numbers of shape \(6,\)"),
        (iter([]), None, ValueError, "must both be given"),
    ],
)
def test_what_is_refused(x, y, error, words):
    model = private(noise_multiplier=1.0)
    with pytest.raises(error, match=words):
        model.fit(x, y, verbose=0)
    assert model.spent(1e-5).steps == 0


def test_records_of_another_shape_are_refused_where_they_are_drawn():
    records = [(np.ones(6, "float32"), 0), (np.ones(5, "float32"), 0)]
    source = open_source(records, None, dense_network())
    with pytest.raises(ValueError, match=r"shapes of the first one, \(6,\); got one of \(5,\)"):
        source.take(np.array([1]), 1)


def test_class_weights_need_arrays():
    model = private(sampling=lipdp.FullBatch())
    model.compile("sgd", "sparse_categorical_crossentropy", max_sample_weight=2.0)
    with pytest.raises(ValueError, match="`class_weight` needs arrays"):
        model.fit(Log(X, Y), class_weight={0: 1.0}, verbose=0)
    model.fit(Log(X, Y), sample_weight=np.ones(8), verbose=0)
