"""What Keras users hand to `fit`: it trains, or one sentence says what to write in its place."""

import keras
import numpy as np
import pytest

import lipdp
from lipdp import layers
from lipdp.data.opening import as_array, held_out, open_source
from tests.lipdp.helpers import data, dense_network, private

pytestmark = pytest.mark.any_backend

X, Y = data(32)


def read(x, y, network=None):
    source = open_source(x, y, network or dense_network())
    return source.take(np.arange(len(source)), len(source))


# --- frames, text, sparse matrices ----------------------------------------------------------------


def frames():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(X, columns=list("abcdef"))
    mixed = frame.assign(f=frame["f"] > 0, e=(9 * frame["e"]).astype("int64"))
    return frame, mixed


@pytest.mark.parametrize(
    "change", [lambda f: f, lambda f: f.convert_dtypes()], ids=["", "nullable"]
)
def test_columns_of_numbers_of_every_type(change):
    for frame in frames():
        x, y = read(change(frame), change(frame["a"] > 0))
        np.testing.assert_allclose(x, frame.to_numpy("float64"), rtol=1e-6)
        np.testing.assert_array_equal(y, X[:, 0] > 0)


def test_missing_numbers_are_seen():
    frame = frames()[0].convert_dtypes()
    frame.loc[3, "b"] = None
    with pytest.raises(ValueError, match="NaN"):
        read(frame, Y)


def test_columns_of_text_are_named():
    frame = frames()[0].assign(c=["u", "v"] * 16)
    with pytest.raises(TypeError, match=r"Its columns \['c'\] hold no numbers.*StringLookup"):
        read(frame, Y)


@pytest.mark.parametrize("labels", [np.where(Y, "yes", "no"), ["a", "b"] * 16])
def test_labels_of_text_need_a_public_list(labels):
    with pytest.raises(TypeError, match="`y` must.*public list.*StringLookup.*num_oov_indices=0"):
        read(X, labels)


def test_frames_need_their_targets_apart():
    with pytest.raises(ValueError, match="`y` must be given where `x` is a DataFrame"):
        read(frames()[0], None)


def test_sparse_matrices_become_arrays_where_they_fit(monkeypatch):
    sparse = pytest.importorskip("scipy.sparse")
    np.testing.assert_array_equal(read(sparse.csr_matrix(X), Y)[0], X)
    monkeypatch.setattr("lipdp.data.opening._MOST_DENSE", 4 * X.size - 1)
    with pytest.raises(ValueError, match=r"`x` is a sparse matrix.*__getitem__\(i\)"):
        as_array(sparse.csr_matrix(X), "x")


# --- inputs by name, and their ranks --------------------------------------------------------------


def columns(struct):
    a, b = keras.Input((1,), name="a"), keras.Input((2,), name="b")
    joined = layers.BallProjection(1.0)(keras.layers.Concatenate()([a, b]))
    inputs = {"dict": {"b": b, "a": a}, "list": [a, b], "other": {"one": a, "two": b}}[struct]
    return keras.Model(inputs, layers.SpectralDense(3)(joined))


@pytest.mark.parametrize("clip", [None, lipdp.PerLayerClip()], ids=["certified", "per layer"])
@pytest.mark.parametrize("struct", ["dict", "list"])
def test_inputs_by_name_train(struct, clip):
    model = private(columns(struct), clip=clip)
    x = {"a": X[:, 0], "b": X[:, 1:3]}  # a column without an axis of its own
    model.fit(x, Y, verbose=0)
    model.fit([(dict(a=X[i, :1], b=X[i, 1:3]), Y[i]) for i in range(32)], verbose=0)
    assert np.isfinite(model.evaluate(x | {"a": X[:, :1]}, Y, verbose=0)).all()


@pytest.mark.filterwarnings("ignore:When providing `inputs` as a dict")
def test_inputs_go_by_the_keys_of_their_dict():
    x, _ = read({"one": X[:, 0], "two": X[:, 1:3]}, Y, columns("other"))
    assert {k: v.shape for k, v in x.items()} == {"one": (32, 1), "two": (32, 2)}
    with pytest.raises(ValueError, match=r"names \['one', 'two'\].*got \['a', 'b'\]"):
        read({"a": X[:, :1], "b": X[:, 1:3]}, Y, columns("other"))


def test_a_last_axis_of_one_may_be_missing_or_too_many():
    network = keras.Sequential([keras.Input((6, 1)), keras.layers.Flatten(), keras.layers.Dense(2)])
    assert read(X, Y, network)[0].shape == (32, 6, 1)
    assert read(X[..., None], Y)[0].shape == (32, 6)


def test_nested_inputs_are_refused():
    a, b = keras.Input((1,)), keras.Input((2,))
    network = keras.Model({"u": [a], "v": b}, keras.layers.Concatenate()([a, b]))
    with pytest.raises(ValueError, match="are nested"):
        read({"u": X[:, :1], "v": X[:, 1:3]}, Y, network)


# --- what gives batches of its own accord ---------------------------------------------------------


class Loader:
    """Like a loader of batches, with a length and an order of its own."""

    def __init__(self, dataset=None):
        if dataset is not None:
            self.dataset = dataset

    def __len__(self):
        return 2

    def __iter__(self):
        yield from ((X[:16], Y[:16]), (X[16:], Y[16:]))


@pytest.mark.parametrize(
    "x, words",
    [
        (iter(Loader()), "`x` must be data from which any example can be drawn.*generator"),
        (Loader(), "any example can be drawn.*got Loader.*__getitem__"),
        (Loader([(X[0], 0)]), r"fit\(loader.dataset\)"),
        ((X, Y), r"must be given apart: fit\(x, y\)"),
    ],
)
def test_what_cannot_be_drawn_from(x, words):
    with pytest.raises(TypeError, match=words):
        private().fit(x, verbose=0)


def test_two_records_in_a_tuple_are_no_arrays():
    x, y = read(((X[0], 1), (X[1], 2)), None)
    assert x.shape == (2, 6) and y.tolist() == [1, 2]


# --- data sets of TensorFlow ----------------------------------------------------------------------


def of_generator(count=None):
    import tensorflow as tf

    def examples():
        i = 0
        while count is None or i < count:
            yield X[i % 32], int(Y[i % 32])
            i += 1

    spec = (tf.TensorSpec((6,)), tf.TensorSpec((), tf.int64))
    return tf.data.Dataset.from_generator(examples, output_signature=spec)


@pytest.mark.parametrize(
    "change", [lambda d: d, lambda d: d.batch(8), lambda d: d.shuffle(4).map(lambda x, y: (x, y))]
)
def test_what_may_be_endless_must_announce_its_length(change):
    import tensorflow as tf

    with pytest.raises(ValueError, match="may be endless.*assert_cardinality"):
        read(change(of_generator()), None)
    announced = of_generator(32).apply(tf.data.experimental.assert_cardinality(32))
    np.testing.assert_array_equal(read(change(announced), None)[0].shape, (32, 6))


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.batch(8).unbatch(),
        lambda d: d.filter(lambda x, y: y >= 0),
        lambda d: d.take_while(lambda x, y: y >= 0),
    ],
    ids=["unbatch", "filter", "take_while"],
)
def test_what_is_made_of_finite_data_sets_ends(change):
    import tensorflow as tf

    dataset = change(tf.data.Dataset.from_tensor_slices((X, Y)))
    assert int(dataset.cardinality()) == -2
    np.testing.assert_array_equal(read(dataset, None)[0], X)


def test_windows_of_a_series_are_examples():
    dataset = keras.utils.timeseries_dataset_from_array(X[:, 0], Y[5:], 6, batch_size=4)
    x, y = read(dataset, None)
    assert x.shape == (27, 6) and y.shape == (27,)


@pytest.mark.parametrize("first", ["twice", "one"])
def test_an_example_that_is_zipped_several_times_is_found(first):
    import tensorflow as tf

    twice = tf.data.Dataset.from_tensor_slices(X).repeat(2)
    one = tf.data.Dataset.from_tensors(X[0]).repeat()
    labels = tf.data.Dataset.range(32)
    pairs = (twice, labels.repeat(2)) if first == "twice" else (one, labels.repeat(2))
    with pytest.raises(ValueError, match="hold each example once"):
        read(tf.data.Dataset.zip(*pairs), None)


def test_reading_for_long_is_said(monkeypatch, capsys):
    import tensorflow as tf

    monkeypatch.setattr("lipdp.data.opening._PATIENCE", -1.0)
    read(tf.data.Dataset.from_tensor_slices((X, Y)).batch(8), None)
    assert "Reading the data set into memory" in capsys.readouterr().out


# --- habits of Keras' fit -------------------------------------------------------------------------


def test_the_batch_size_is_that_of_the_sampling():
    model = private()
    model.fit(X, Y, batch_size=16, shuffle=True, verbose=0)
    with pytest.raises(ValueError, match=r"`batch_size`.*sampling, 16.*batch_size=32\)\)"):
        model.fit(X, Y, batch_size=32)
    with pytest.raises(ValueError, match="`shuffle` must be True"):
        model.fit(X, Y, shuffle=False)


def test_a_split_for_validation_is_neither_trained_on_nor_counted(monkeypatch):
    model = private(sampling=lipdp.FullBatch(), compile={"max_sample_weight": 2.0})
    weight = np.linspace(0, 2, 32)
    history = model.fit(X, Y, validation_split=0.25, sample_weight=weight, verbose=0)
    assert "val_loss" in history.history
    assert model.spending.runs[0].num_examples == 24
    (x, y, w), (vx, vy, vw) = held_out(X, Y, weight, 0.25)
    np.testing.assert_array_equal(np.concatenate([x, vx]), X)
    np.testing.assert_array_equal(np.concatenate([y, vy]), Y)
    np.testing.assert_array_equal(np.concatenate([w, vw]), weight)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"validation_split": 1.5}, "between 0 and 1; got 1.5"),
        ({"validation_split": 0.999}, "leaves 0 of the 32"),
        ({"validation_split": 0.5, "validation_data": (X, Y)}, "cannot both"),
    ],
)
def test_splits_that_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        private().fit(X, Y, verbose=0, **arguments)


def test_only_arrays_are_split():
    with pytest.raises(TypeError, match="`validation_split` is for arrays"):
        private().fit([(X[0], 0)], validation_split=0.5)
