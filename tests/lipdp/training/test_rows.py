"""Rows that no data set should have: each is an example like any other, and nothing tells of it."""

import dataclasses
import math
import warnings

import keras
import numpy as np
import pytest
from keras import ops

import lipdp
from lipdp import layers, losses
from lipdp.autodiff import fused
from lipdp.local import calls
from lipdp.training import steps
from lipdp.training.steps import private_step
from tests.lipdp.helpers import dense_network, one_in, private, weights

K = keras.layers
BACKEND = steps.backend()

BROKEN = {
    "NaN": np.nan,
    "infinity": np.inf,
    "minus infinity": -np.inf,
    "largest": 3.4e38,
    "huge": 1e30,
    "longer than is read": 1e17,
    "tiny": 1e-30,
    "denormal": 1e-40,
    "zero": 0.0,
}


def after(*first, shape=(6, 6, 2)):
    """A network that begins with these layers."""
    body = [*first, K.Flatten(), layers.SpectralDense(3)]
    return keras.Sequential([keras.Input(shape), *body])


def with_power():
    x = keras.Input((6, 6, 2))
    h = layers.BallProjection(1.0)(x**9)
    return keras.Model(x, layers.SpectralDense(3)(K.Flatten()(h)))


def two_inputs():
    a, b = keras.Input((6, 6, 2), name="a"), keras.Input((4,), name="b")
    h = K.Concatenate()([K.Flatten()(K.RMSNormalization()(a)), K.Softmax()(b)])
    return keras.Model([a, b], layers.SpectralDense(3)(h))


def ball():
    return layers.BallProjection(1.0)


FIRST = {
    "ball": lambda: after(ball()),
    "RMS normalisation": lambda: after(K.RMSNormalization()),
    "RMS normalisation of what is scaled": lambda: after(K.Rescaling(255.0), K.RMSNormalization()),
    "softmax": lambda: after(K.Softmax()),
    "floored normalisation": lambda: after(layers.FlooredNormalization()),
    "ball of each position": lambda: after(layers.BallProjection(1.0, per_position=True)),
    "average pooling": lambda: after(layers.ScaledAveragePooling2D(2), ball()),
    "norm pooling": lambda: after(layers.L2NormPooling2D(2), ball()),
    "norm pooling before a norm": lambda: after(layers.L2NormPooling2D(2), K.RMSNormalization()),
    "convolution": lambda: after(K.Conv2D(2, 3, trainable=False), K.RMSNormalization()),
    "normalisation": lambda: after(K.Normalization(mean=3.0, variance=1e-6), ball()),
    "noise": lambda: after(K.GaussianNoise(1.0), ball()),
    "scattering": lambda: after(layers.Scattering2D(1), ball(), shape=(8, 8, 1)),
    "attention": lambda: after(layers.LipschitzAttention(1, 3), shape=(6, 2)),
    "power": with_power,
    "two inputs": two_inputs,
}


def inputs_of(network, value, generator):
    """A row for each way in which the value can stand among others, after as many plain ones."""
    found = {}
    for tensor in network.inputs:
        shape = tensor.shape[1:]
        plain = generator.normal(size=(6, *shape)).astype("float32")
        broken = plain[:3].copy()
        broken[0, ..., 0] = value
        broken[1].flat[1] = value
        broken[2] = value
        found[tensor.name] = np.concatenate([plain, broken])
    return found if len(found) > 1 else next(iter(found.values()))


def ratio(network, values):
    """How far a row, with others that do not count, moves the sum of a weight's gradients, over
    its bound; infinite for what is not finite.
    """
    model = private(network, noise_multiplier=0.0, sampling=lipdp.FullBatch())
    bounds = lipdp.gradient_bounds(network, model.current_clip())

    @fused
    def sums(x, y, mask):
        data = {"inputs": x, "key": np.zeros(4, "uint32")}, y, mask
        return private_step.read_batch(step, data, BACKEND)[0]

    step = dataclasses.replace(model.step, update_metrics=lambda *args: {})
    worst = 0.0
    for value in values:
        x = inputs_of(network, value, np.random.default_rng(0))
        x = keras.tree.map_structure(ops.convert_to_tensor, x)
        y = np.arange(9) % 3
        for row in range(9):
            mask = np.zeros(9, "float32")
            mask[row] = 1.0
            for bound, found in zip(bounds.values(), sums(x, y, mask), strict=True):
                length = np.linalg.norm(ops.convert_to_numpy(found).astype("float64")) / bound
                worst = max(worst, length if np.isfinite(length) else np.inf)
    return worst


@pytest.mark.parametrize("first", one_in(3, list(FIRST)))
def test_no_row_moves_a_sum_further_than_its_bound(first):
    assert 0.0 < ratio(FIRST[first](), BROKEN.values()) <= 1.0


@pytest.mark.parametrize("first", ["RMS normalisation", "softmax"])
def test_without_readable_rows_the_sums_are_not_numbers(first, monkeypatch):
    """Mutant: the network reads what came."""
    monkeypatch.setattr(
        private_step, "readable_inputs", lambda network, x: (x, ops.ones((ops.shape(x)[0],)))
    )
    assert ratio(FIRST[first](), [np.nan]) == np.inf


@pytest.mark.any_backend
def test_what_may_overflow_before_the_first_bound_is_refused():
    def power():
        x = keras.Input((4,))
        return keras.Model(x, layers.SpectralDense(3)(K.RMSNormalization()(x**3)))

    def scaled():
        first = K.Rescaling(1e30), K.Rescaling(1e-30), K.Softmax()
        return keras.Sequential([keras.Input((4,)), *first, layers.SpectralDense(3)])

    def integers():
        first = K.Rescaling(1.0), K.RMSNormalization()
        return keras.Sequential([keras.Input((9,), dtype="int64"), *first, layers.SpectralDense(3)])

    for make in (power, scaled, integers):
        with pytest.raises(ValueError, match=r"squares overflow: put .*BallProjection\(radius\)"):
            private(make())
        assert any("squares overflow" in problem for problem in lipdp.check(make()).problems)


# --- through fit ----------------------------------------------------------------------------------


class Records:
    """Pairs (x, y), some of which are replaced."""

    def __init__(self, bad_x=None, bad_y=None):
        self.bad_x, self.bad_y = bad_x, bad_y

    def __len__(self):
        return 24

    def __getitem__(self, i):
        x = np.linspace(-1, 1, 6) + i % 2
        y = i % 3
        if i % 5 == 3:
            x = x if self.bad_x is None else self.bad_x(x)
            y = y if self.bad_y is None else self.bad_y[i // 5 % len(self.bad_y)]
        return x, y


def as_stream(records, dtype):
    tf = pytest.importorskip("tensorflow")
    x, y = zip(*(records[i] for i in range(len(records))), strict=True)
    return tf.data.Dataset.from_tensor_slices((np.array(x), np.array(y, dtype)))


def normaliser():
    return keras.Sequential(
        [keras.Input((6,)), K.RMSNormalization(), layers.SpectralDense(3, use_bias=False)]
    )


def trained(data, network=None, loss="sparse_categorical_crossentropy", metrics=(), **options):
    """The weights after an epoch, in which nothing may be said of the rows."""
    stream = not isinstance(data, Records)
    model = private(
        network or normaliser(),
        loss=loss,
        sampling=lipdp.ShuffledEpochs(8) if stream else lipdp.FixedSize(8),
        compile=dict(metrics=list(metrics)),
        **options,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        before = model.spent(1e-5).steps  # of another model of the network
        model.fit(data, verbose=0)
    assert model.spent(1e-5).steps - before == 3
    return weights(model)


ROWS = {
    "NaN": lambda x: np.where(np.arange(6) == 2, np.nan, x),
    "infinity": lambda x: np.where(np.arange(6) == 2, np.inf, x),
    "beyond float32": lambda x: 1e300 * x,
    "huge": lambda x: 1e30 * x,
}


@pytest.mark.parametrize("source", one_in(2, ["records", "stream"]))
@pytest.mark.parametrize("rows", one_in(2, ROWS))
def test_training_on_broken_rows(rows, source):
    data = Records(bad_x=ROWS[rows])
    data = as_stream(data, "int64") if source == "stream" else data
    for network in (normaliser(), dense_network()):
        assert all(np.isfinite(w).all() for w in trained(data, network))


def test_training_on_broken_rows_of_a_mapped_file(tmp_path):
    """Its first rows alone are checked; here all of them would be."""
    x = np.ones((24, 6))
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r+")
    model = private(normaliser(), sampling=lipdp.FullBatch(), physical_batch_size=8)
    for batch in model.batches(mapped, np.zeros(24, int)):
        batch.inputs[5, 2], batch.inputs[9] = np.nan, 1e38
        model.train_on_batch(batch)
    assert all(np.isfinite(w).all() for w in weights(model))


@pytest.mark.parametrize("physical", [8, None])
def test_training_on_broken_rows_with_all_that_reads_them(physical):
    network = keras.Sequential(
        [keras.Input((6,)), K.RMSNormalization(), layers.SpectralDense(3, use_bias=False)]
    )
    model = private(
        network,
        sampling=lipdp.FullBatch(),
        clip=lipdp.AdaptiveClip(0.5),
        augmentation=lipdp.Augmentation(K.GaussianNoise(0.1), views=2),
        physical_batch_size=physical,
        compile=dict(max_sample_weight=2.0),
        run_eagerly=False,
    )
    for row in ROWS.values():
        model.fit(Records(bad_x=row), sample_weight=np.linspace(0, 2, 24), verbose=0)
    assert all(np.isfinite(w).all() for w in weights(model))
    assert np.isfinite(float(model.current_clip()))


@pytest.mark.parametrize("dtype", one_in(2, ["int32", "float32", "uint8"]))
def test_training_on_tokens_out_of_range(dtype):
    network = keras.Sequential(
        [keras.Input((6,), dtype=dtype), layers.EmbeddingBag(5, 4), layers.SpectralDense(3)]
    )
    for token in (-1, 99, 2**40, np.nan, np.inf):
        found = trained(
            Records(bad_x=lambda x, v=token: np.where(np.arange(6) == 2, v, x)), network
        )
        assert all(np.isfinite(w).all() for w in found)


def of_tokens(kind):
    tokens = keras.Input((6,), dtype="int32")
    if kind == "tied":
        table = K.ReversibleEmbedding(3, 4)
        outputs = table(K.Dense(4)(table(tokens)), reverse=True)
    else:
        outputs = K.Dense(3)(K.Embedding(3, 4, trainable=kind == "trained")(tokens))
    return keras.Model(tokens, K.GlobalAveragePooling1D()(outputs))


def moved_by(network, tokens):
    """How far an example moves the weights of each layer, in units of the layer's threshold."""
    model = private(
        network,
        clip=lipdp.PerLayerClip(threshold=0.01),
        sampling=lipdp.FullBatch(),
        noise_multiplier=0.0,
        optimizer=keras.optimizers.SGD(1.0),
    )
    before = weights(model)
    model.fit(np.array([tokens], "int32"), np.array([1]), verbose=0)
    moved = [np.sum((a - b) ** 2) for a, b in zip(weights(model), before, strict=True)]
    groups = model.units.groups()
    frozen = len(moved) - sum(map(len, groups))
    return [math.sqrt(sum(moved[frozen + i] for i in group)) for group in groups]


@pytest.mark.parametrize("kind", ["trained", "frozen", "tied"])
def test_embeddings_of_keras_read_the_nearest_token_in_range(kind):
    moved = moved_by(of_tokens(kind), [99, 98, 97, 96, 95, -7])
    assert 0.9 < max(moved) <= 1.0


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="JAX gathers without an error")
def test_without_a_range_a_token_ends_the_step(monkeypatch):
    """Mutant: an embedding reads what came."""
    monkeypatch.setattr(calls, "_in_range", lambda layer, args, kwargs: (args, kwargs))
    with pytest.raises(Exception, match="is not in \\[0, 3\\)"):
        moved_by(of_tokens("trained"), [99] * 6)


@pytest.mark.any_backend
def test_arrays_that_overflow_float32_are_refused_before_anything_is_spent():
    x = np.ones((24, 6))
    x[7, 1] = 1e300
    model = private(normaliser())
    with pytest.raises(ValueError, match="NaN or infinite in float32"):
        model.fit(x, np.zeros(24, int), verbose=0)
    assert model.spent(1e-5).steps == 0


LOSSES = [
    "sparse_categorical_crossentropy",
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1),
    "focal",
    "emma",
    "gloro",
    "multiclass_hinge",
    "multiclass_hkr",
]
METRICS = [
    "accuracy",
    keras.metrics.SparseCategoricalCrossentropy(from_logits=True),
    keras.metrics.SparseTopKCategoricalAccuracy(2),
    keras.metrics.MeanIoU(3, sparse_y_pred=False),
]


def _name(loss):
    """The same in every process, where an object has an address in its own."""
    return loss if isinstance(loss, str) else f"ignore_class={loss.get_config()['ignore_class']}"


@pytest.mark.parametrize("source", one_in(2, ["records", "float32"]))
@pytest.mark.parametrize("loss", one_in(4, LOSSES), ids=_name)
def test_training_on_labels_out_of_range(loss, source):
    data = Records(bad_y=[-1, 3, 2.0**40, np.nan, np.inf])
    data = data if source == "records" else as_stream(data, source)
    assert all(np.isfinite(w).all() for w in trained(data, loss=loss))


def test_metrics_of_labels_out_of_range():
    data = Records(bad_y=[-1, 3, 2**40])
    assert all(np.isfinite(w).all() for w in trained(data, metrics=METRICS, run_eagerly=False))


@pytest.mark.any_backend
@pytest.mark.parametrize("label", [300, -1, np.nan, 2.5, np.float64("inf")])
def test_labels_that_do_not_fit_the_type_of_the_first_record(label):
    records = [(np.ones(6), np.uint8(1))] + [(np.ones(6), label)] * 23
    model = private(normaliser(), sampling=lipdp.FixedSize(8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = lipdp.data.opening.open_source(records, None, model.network)
        _, y = source.take(np.arange(3), 3)
    assert y.dtype == np.uint8 and y[0] == 1


@pytest.mark.parametrize("loss", one_in(3, ["mse", "hinge", "log_cosh", "binary_crossentropy"]))
def test_training_on_targets_that_are_not_numbers(loss):
    network = keras.Sequential(
        [keras.Input((6,)), K.RMSNormalization(), layers.SpectralDense(1, use_bias=False)]
    )
    records = Records(bad_y=[np.nan, np.inf, 1e300])
    assert all(np.isfinite(w).all() for w in trained(records, network, loss=loss, clip=1.0))


def test_a_label_is_read_as_the_nearest_and_one_that_is_ignored_as_itself():
    plain = losses.SparseCategoricalCrossentropy()
    ignoring = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=255)
    for dtype in ("uint8", "int32", "int64", "float32"):
        y = np.array([0, 2, 3, 255], dtype)
        found = [losses.readable_targets(loss, y, (3,)) for loss in (plain, ignoring)]
        found = [ops.convert_to_numpy(y).tolist() for y in found]
        assert found == [[0, 2, 2, 2], [0, 2, 2, 255]]
    y = np.array([-1.0, np.nan, np.inf, -np.inf, 1e30], "float32")
    found = ops.convert_to_numpy(losses.readable_targets(plain, y, (3,)))
    assert found.tolist() == [0, 0, 0, 0, 2]


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="JAX gathers without an error")
def test_without_readable_targets_an_error_tells_of_a_label(monkeypatch):
    """Mutant: the loss reads what came."""
    monkeypatch.setattr(losses, "readable_targets", lambda loss, y, shape: y)
    with pytest.raises(Exception, match="label value of 9 which is outside"):
        trained(Records(bad_y=[9]))
