"""Data sources: what is read, when, and what is refused."""

import pathlib

import keras
import numpy as np
import pytest

import lipdp
from lipdp import layers
from lipdp.data import sources
from lipdp.data.opening import open_source
from lipdp.data.sources import Arrays, Records, padded
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


@pytest.mark.parametrize(
    "change, error, words",
    [
        (lambda d: d.batch(7).repeat(2), ValueError, "hold each example once"),
        (lambda d: d.repeat(2).shuffle(4).batch(7), ValueError, "hold each example once"),
        (lambda d: d.repeat(), ValueError, "repeats for ever"),
        (lambda d: d.map(lambda x, y: x), TypeError, r"batches \(x, y\), or examples \(x, y\)"),
        (lambda d: d.map(lambda x, y: (x[:3], y)), ValueError, r"examples of shape \(6,\)"),
        (lambda d: d.batch(2).batch(2), ValueError, r"examples of shape \(6,\)"),
    ],
)
@pytest.mark.parametrize("sampling", [lipdp.ShuffledEpochs(8), lipdp.PoissonSampling(8)], ids=repr)
def test_data_sets_that_are_refused(change, error, words, sampling):
    tf = pytest.importorskip("tensorflow")
    model = private(sampling=sampling)
    with pytest.raises(error, match=words):
        model.fit(change(tf.data.Dataset.from_tensor_slices(data(50))), verbose=0)
    assert model.spent(1e-5).steps == 0


# --- streams --------------------------------------------------------------------------------------


def numbered(count=50):
    """Examples whose inputs and labels are their numbers, from 1 on."""
    tf = pytest.importorskip("tensorflow")
    x = np.arange(1, count + 1, dtype="float32")[:, None] * np.ones(6, "float32")
    return tf.data.Dataset.from_tensor_slices((x, np.arange(count) % 3))


@pytest.mark.parametrize("batch", [None, 1, 25])
def test_a_stream_takes_each_example_once_an_epoch(batch):
    stream = numbered().shuffle(50, seed=1)
    if batch is not None:
        stream = stream.batch(batch, drop_remainder=True)
    model = private(sampling=lipdp.ShuffledEpochs(8))
    passes = []
    for index, batch in enumerate(model.batches(stream, None, epochs=2)):
        if index % 7 == 0:
            passes.append([])
        assert len(batch.mask) == (2 if index % 7 == 6 else 8)
        passes[-1].extend(batch.inputs[:, 0])
        model.train_on_batch(batch)
    assert [sorted(p) for p in passes] == [list(range(1, 51))] * 2
    assert passes[0] != passes[1]  # the data set's own order, which it shuffles every time
    assert model.spent(1e-5).steps == 14


def test_a_stream_is_fitted_and_never_kept():
    tf = pytest.importorskip("tensorflow")
    read = []

    def examples():
        for i in range(400):
            read.append(i)
            yield np.full(6, i, "float32"), i % 3

    spec = (tf.TensorSpec((6,)), tf.TensorSpec((), tf.int64))
    stream = tf.data.Dataset.from_generator(examples, output_signature=spec)
    model = private(sampling=lipdp.ShuffledEpochs(100), physical_batch_size=30)
    with pytest.raises(ValueError, match="Announce it: .*assert_cardinality"):
        model.fit(stream, verbose=0)
    assert not read
    stream = stream.apply(tf.data.experimental.assert_cardinality(400))
    history = model.fit(stream, epochs=2, verbose=0)
    assert model.spent(1e-5).steps == 8 and np.isfinite(history.history["loss"]).all()
    # Streamed while Keras looks at the first batches, too, and not beyond what it asks for.
    assert read[-400:] == list(range(400)) and len(read) < 2 * 400 + 5 * 400


@pytest.mark.parametrize(
    "announced, words", [(60, "fewer|only 50|ended after"), (40, "at least 41|goes on after")]
)
@pytest.mark.parametrize("asserted", [True, False])
def test_a_stream_of_another_length_than_announced_stops(announced, words, asserted):
    """With TensorFlow's own check of the number, and where something slips by it."""
    tf = pytest.importorskip("tensorflow")
    source = open_source(numbered(), None, dense_network(), stream=True)
    source._examples = announced
    if asserted:
        stream = numbered().apply(tf.data.experimental.assert_cardinality(announced))
        source = open_source(stream, None, dense_network(), stream=True)
    assert len(source) == announced
    with pytest.raises((ValueError, tf.errors.OpError), match=words):
        for start in range(0, announced, 8):
            source.take(np.arange(start, min(start + 8, announced)), 8)


def test_a_stream_that_ends_early_stops_the_run_and_what_ran_is_paid_for():
    tf = pytest.importorskip("tensorflow")
    short = numbered().apply(tf.data.experimental.assert_cardinality(60))
    model = private(sampling=lipdp.ShuffledEpochs(8))
    with pytest.raises(tf.errors.OpError):
        model.fit(short, epochs=3, verbose=0)
    assert model.spending.run is None
    assert model.spent(1e-5).steps <= 7


def test_a_stream_is_read_in_order_or_not_at_all():
    source = open_source(numbered(), None, dense_network(), stream=True)
    source.take(np.arange(8), 8)
    for wrong in (16, 24):
        with pytest.raises(RuntimeError, match="8 examples of this pass were taken"):
            source.take(np.arange(wrong, wrong + 8), 8)
    blank, targets = source.take(np.arange(0), 3)
    assert blank.shape == (3, 6) and blank.dtype == np.float32 and not targets.any()
    assert source.take(np.arange(8, 16), 8)[0][:, 0].tolist() == list(range(9, 17))
    assert source.take(np.arange(8), 10)[0][:, 0].tolist() == [*range(1, 9), 0, 0]  # a new pass


def test_streams_know_no_weights_of_examples():
    model = private(
        sampling=lipdp.ShuffledEpochs(8), noise_multiplier=1.0, compile=dict(max_sample_weight=1.0)
    )
    for given in (dict(sample_weight=np.ones(50)), dict(class_weight={0: 1.0})):
        with pytest.raises(ValueError, match="a stream has its own"):
            model.fit(numbered(), verbose=0, **given)


# --- files larger than memory ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_of_a_mapped_file_only_drawn_rows_are_read(dtype, tmp_path):
    """Twenty gigabytes, all holes but for what the operating system keeps of what was read."""
    width = 2**14 // np.dtype(dtype).itemsize
    rows = 20 * 2**30 // 2**14
    with open(tmp_path / "x.raw", "wb") as file:
        file.truncate(20 * 2**30)
    x = np.memmap(tmp_path / "x.raw", dtype, "r", shape=(rows, width))

    def resident():
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("RssFile"))

    before = resident()
    model = private(dense_network(width), sampling=lipdp.PoissonSampling(100))
    model.fit(x, np.zeros(rows, "uint8"), steps_per_epoch=5, verbose=0)
    # KiB: the first 64 MiB are checked, and each of some 800 drawn rows is 16 KiB.
    assert resident() - before < 200_000


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
        (iter([]), None, TypeError, "from which any example can be drawn"),
    ],
)
def test_what_is_refused(x, y, error, words):
    model = private(noise_multiplier=1.0)
    with pytest.raises(error, match=words):
        model.fit(x, y, verbose=0)
    assert model.spent(1e-5).steps == 0


@pytest.mark.parametrize(
    "broken",
    [
        (np.ones(5, "float32"), 1),
        (np.ones(6, "float32"), [1, 2]),
        (np.ones(6, "float32"), "no label"),
        (np.ones(6, "float32"), None),
        (["a"] * 6, 1),
        ([1.0, [2.0]], 1),
        (np.ones(6, "float32"),),
        {"x": 1},
        None,
    ],
    ids=str,
)
def test_a_broken_record_is_drawn_without_an_error(broken):
    records = [(np.ones(6, "float32"), 1), broken, (np.full(6, 2.0), 2)]
    x, y = open_source(records, None, dense_network()).take(np.array([2, 1, 0]), 4)
    assert np.isnan(x[1]).all() and y.tolist() == [2, 0, 1, 0]
    np.testing.assert_array_equal(x[[0, 2, 3]], [[2.0] * 6, [1.0] * 6, [0.0] * 6])


class Raising:
    """Records of which one raises an error."""

    def __init__(self, error, row=1):
        self.error, self.row = error, row

    def __len__(self):
        return 3

    def __getitem__(self, index):
        if index == self.row:
            raise self.error
        return np.full(6, index, "float32"), index


@pytest.mark.parametrize(
    "error",
    [ValueError(), KeyError("label"), StopIteration(), ZeroDivisionError(), OSError("truncated")],
    ids=repr,
)
def test_a_record_that_raises_is_broken(error):
    x, y = open_source(Raising(error), None, dense_network()).take(np.arange(3), 3)
    assert np.isnan(x[1]).all() and y.tolist() == [0, 0, 2] and (x[2] == 2.0).all()


def test_without_broken_records_an_error_ends_the_run(monkeypatch):
    """Mutant: every error is the machine's."""
    monkeypatch.setattr(sources, "_of_the_machine", lambda error: True)
    with pytest.raises(ZeroDivisionError):
        private(sampling=lipdp.FullBatch()).fit(Raising(ZeroDivisionError()), verbose=0)


@pytest.mark.parametrize("error", [OSError(5, "disk"), MemoryError(), KeyboardInterrupt()])
def test_errors_of_the_machine_end_the_run(error):
    source = open_source(Raising(error), None, dense_network())
    with pytest.raises(type(error)):
        source.take(np.arange(3), 3)


def test_a_source_that_cannot_read_its_last_record_costs_nothing():
    model = private()
    with pytest.raises(ZeroDivisionError):
        model.fit(Raising(ZeroDivisionError(), row=2), verbose=0)
    assert model.spent(1e-5).steps == 0


@pytest.mark.parametrize("fault", ["shape", "error", "operation"])
def test_a_stream_goes_on_after_a_broken_example(fault):
    tf = pytest.importorskip("tensorflow")

    def examples():
        for i in range(10):
            yield np.full(5 if fault == "shape" and i == 3 else 6, i, "float32"), i

    def failing(i):
        if fault == "error" and int(i) == 3:
            raise ZeroDivisionError
        return tf.constant(0, "int64")

    def through(x, y):
        if fault == "error":
            y = y + tf.ensure_shape(tf.py_function(failing, [y], "int64"), ())
        if fault == "operation":
            x = tf.ensure_shape(tf.gather(x, tf.where(y == 3, 9, 0) + tf.range(6)), (6,))
        return x, y

    spec = (tf.TensorSpec((6,)), tf.TensorSpec((), tf.int64))
    stream = tf.data.Dataset.from_generator(examples, output_signature=spec).map(through)
    stream = stream.apply(tf.data.experimental.assert_cardinality(10))
    source = open_source(stream, None, dense_network(), stream=True)
    rows = [np.arange(10)[i : i + 4] for i in (0, 4, 8)]
    x, y = map(np.concatenate, zip(*(source.take(r, len(r)) for r in rows), strict=True))
    assert np.isnan(x[3]).all() and y.tolist() == [0, 1, 2, 0, *range(4, 10)]
    assert np.delete(x, 3, axis=0)[:, 0].tolist() == [0, 1, 2, *range(4, 10)]


@pytest.mark.parametrize("kind", ["text", "sparse", "ragged"])
def test_a_stream_of_other_than_dense_numbers_costs_nothing(kind):
    tf = pytest.importorskip("tensorflow")
    change = {
        "text": lambda x, y: (x, tf.strings.as_string(y)),
        "sparse": lambda x, y: (tf.sparse.from_dense(x), y),
        "ragged": lambda x, y: (x, tf.RaggedTensor.from_row_lengths([y], [1])),
    }[kind]
    model = private(sampling=lipdp.ShuffledEpochs(8))
    with pytest.raises(TypeError, match="dense tensors of numbers"):
        model.fit(numbered().map(change), verbose=0)
    assert model.spent(1e-5).steps == 0


def test_a_file_that_is_gone_ends_a_stream():
    tf = pytest.importorskip("tensorflow")
    names = tf.data.Dataset.from_tensor_slices((np.array(["/nowhere"]), np.array([0])))
    stream = names.map(
        lambda name, y: (tf.ensure_shape(tf.io.decode_raw(tf.io.read_file(name), "float"), 6), y)
    )
    source = open_source(stream, None, dense_network(), stream=True)
    with pytest.raises(tf.errors.NotFoundError):
        source.take(np.arange(1), 1)


def test_broken_records_add_nothing():
    records = [(np.full(6, i / 9, "float32"), i % 3) for i in range(32)]
    updates = []
    for source in (records, [records[0], (np.ones(5), 0), "x", *records[1:]]):
        model = private(sampling=lipdp.FullBatch(), noise_multiplier=0.0)
        model.network.set_weights([np.full_like(w, 0.1) for w in model.network.get_weights()])
        before = weights(model)
        model.fit(source, verbose=0)
        after = weights(model)
        updates.append([len(source) * (a - b) for a, b in zip(after, before, strict=True)])
    assert any(np.abs(u).max() > 0.1 for u in updates[0])
    for a, b in zip(*updates, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_class_weights_need_arrays():
    model = private(sampling=lipdp.FullBatch())
    model.compile("sgd", "sparse_categorical_crossentropy", max_sample_weight=2.0)
    with pytest.raises(ValueError, match="`class_weight` needs arrays"):
        model.fit(Log(X, Y), class_weight={0: 1.0}, verbose=0)
    model.fit(Log(X, Y), sample_weight=np.ones(8), verbose=0)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["float32", ">f4", "uint8", "bool"])
def test_rows_are_gathered_into_memory_that_is_read_without_a_copy(order, dtype, rng):
    values = np.asarray(rng.integers(0, 2, (20, 3, 5)), dtype, order=order)
    for rows in (np.array([2, 3, 19]), np.arange(0)):
        found = padded(values, rows, 7)
        assert found.dtype == values.dtype and found.ctypes.data % 64 == 0
        np.testing.assert_array_equal(found[: len(rows)], values[rows])
        assert not found[len(rows) :].any()
