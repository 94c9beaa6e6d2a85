"""Rows stay apart: what passes and what is refused, each compared with made-up rows."""

import functools

import keras
import numpy as np
import pytest
from keras import layers, ops

import lipdp.layers
from lipdp.bounds import UnknownLayerError
from lipdp.inspection.check import check_units
from lipdp.local import row_rules
from lipdp.local.declared import keeps_rows_apart
from lipdp.local.rows import check_rows_apart, over_batch

random = keras.random


def units_of(network):
    """The layers that own trainable weights; a recurrent one as a whole."""
    found = []

    def visit(layer):
        if isinstance(layer, layers.RNN):
            own = layer.trainable_variables
        else:
            own = [v for v in layer._trainable_variables if v.trainable]
        if own and not any(layer is f for f in found):
            found.append(layer)
        if not isinstance(layer, layers.RNN):
            for inner in layer._layers:
                visit(inner)

    visit(network)
    return found


def check(network, units=None, **kwargs):
    return check_rows_apart(network, units_of(network) if units is None else units, **kwargs)


class Body(layers.Layer):
    """A layer that is a function of its input, and of a weight if it has a shape."""

    def __init__(self, function, weight=None, **kwargs):
        super().__init__(**kwargs)
        self.function, self.weight = function, weight

    def build(self, shape):
        if self.weight:
            self.w = self.add_weight(shape=self.weight, initializer="glorot_uniform")

    def call(self, x):
        return self.function(x, self.w) if self.weight else self.function(x)


class Loose(keras.Model):
    """A subclassed model around a function, built without calling it."""

    def __init__(self, body, shapes):
        super().__init__()
        self.body = body
        body.build((None, *shapes[0]))
        self.built = True
        self.inputs_of = [keras.KerasTensor((None, *shape)) for shape in shapes]

    def call(self, inputs):
        return self.body(inputs[0] if len(self.inputs_of) == 1 else inputs)


def body(shape, function, weight=None):
    shapes = shape if isinstance(shape, list) else [shape]
    return Loose(Body(function, weight), shapes)


def check_body(network, units=None):
    return check(network, units, inputs=network.inputs_of)


def made_up(tensors):
    """Two rows, and the same with the first or the second one changed."""
    rng = np.random.default_rng(0)
    rows = []
    for t in tensors:
        shape = (2, *t.shape[1:])
        if keras.backend.is_float_dtype(t.dtype):
            rows.append(rng.uniform(0.1, 1.0, shape))
        else:
            rows.append(rng.integers(0, 3, shape))

    def changed(row):
        found = [x.copy() for x in rows]
        for x in found:
            x[row] = x[row][::-1] + 1
        return found

    return [
        [ops.convert_to_tensor(x, t.dtype) for x, t in zip(xs, tensors, strict=True)]
        for xs in (rows, changed(0), changed(1))
    ]


def rows_stay(network, tensors, as_list=False):
    """Whether each of two rows stays as it is when the other one changes."""
    results = []
    for inputs in made_up(tensors):
        with keras.StatelessScope():
            outputs = network(inputs if as_list or len(inputs) > 1 else inputs[0], training=True)
        results.append([ops.convert_to_numpy(y) for y in keras.tree.flatten(outputs)])
    one, *others = results
    return all(
        len(right) == len(wrong) == 2 and np.allclose(right[1 - i], wrong[1 - i], 1e-4, 1e-5)
        for i, other in enumerate(others)
        for right, wrong in zip(one, other, strict=True)
    )


def size(x):
    return ops.shape(x)[0]


def ints(x):
    return ops.cast(3 * x, "int32")


# --- operations -----------------------------------------------------------------------------------

KEEPS = {
    "reshape": ((8,), lambda x: ops.reshape(x, (-1, 2, 4))),
    "reshape to the batch": ((8,), lambda x: ops.reshape(x, (size(x), 2, -1))),
    "reshape flat": ((2, 4), lambda x: ops.reshape(x, (size(x), 8))),
    "method reshape": ((3,), lambda x: x.reshape((-1, 1, 3)) if hasattr(x, "reshape") else x),
    "zeros": ((4,), lambda x: ops.concatenate([x, ops.zeros((size(x), 2))], -1)),
    "ones": ((4,), lambda x: x + ops.ones((size(x), 4))),
    "full": ((4,), lambda x: x + ops.full((size(x), 4), 2.0)),
    "noise": ((4,), lambda x: x + random.normal((size(x), 4), seed=1)),
    "noise of the shape": ((4,), lambda x: x + random.uniform(ops.shape(x), seed=1)),
    "dropout": ((6,), lambda x: random.dropout(x, 0.5, seed=1)),
    "token broadcast": (
        (5, 4),
        lambda x, w: ops.concatenate([ops.broadcast_to(w, (size(x), 1, 4)), x], 1),
        (1, 1, 4),
    ),
    "token tiled": (
        (5, 4),
        lambda x, w: ops.concatenate([ops.tile(w, (size(x), 1, 1)), x], 1),
        (1, 1, 4),
    ),
    "token repeated": (
        (5, 4),
        lambda x, w: ops.concatenate([ops.repeat(w, size(x), axis=0), x], 1),
        (1, 1, 4),
    ),
    "positions": ((5, 4), lambda x, w: x + w, (5, 4)),
    "einsum": ((5, 4), lambda x, w: ops.einsum("bti,ij->btj", x, w), (4, 3)),
    "einsum of two": ((5, 4), lambda x: ops.einsum("bti,bsi->bts", x, x)),
    "einsum with dots": ((5, 4), lambda x, w: ops.einsum("...i,ij->...j", x, w), (4, 3)),
    "einsum sum": ((5, 4), lambda x: ops.einsum("bti->b", x)),
    "weight first": ((4,), lambda x, w: ops.where(w > x, w * x, w + x), (4,)),
    "matrix first": ((3, 2), lambda x, w: w @ x, (4, 3)),
    "constant first": ((4,), lambda x: ops.sqrt(2.0) * (np.ones(4, "float32") + x)),
    "NumPy number first": ((4,), lambda x: np.float32(2.0) * x),
    "matmul": ((5, 4), lambda x, w: ops.matmul(x, w), (4, 3)),
    "matmul of a constant": ((5, 4), lambda x, w: ops.matmul(w, x), (2, 5)),
    "matmul of two": ((5, 4), lambda x: x @ ops.transpose(x, (0, 2, 1))),
    "matmul of a matrix": ((4,), lambda x, w: x @ w, (4, 2)),
    "dot": ((3,), lambda x, w: ops.dot(x, w), (3, 2)),
    "tensordot": ((3, 6), lambda x, w: ops.tensordot(x, w, 1), (6, 2)),
    "tensordot axes": ((3, 6), lambda x, w: ops.tensordot(x, w, [[1, 2], [0, 1]]), (3, 6, 2)),
    "attention": ((5, 4), lambda x: ops.softmax(x @ ops.transpose(x, (0, 2, 1))) @ x),
    "dot_product_attention": ((5, 2, 4), lambda x: ops.dot_product_attention(x, x, x)),
    "attention mask": (
        (5, 2, 4),
        lambda x: ops.dot_product_attention(
            x, x, x, mask=ops.reshape(x[:, :, 0, 0] > 0.5, (-1, 1, 1, 5))
        ),
    ),
    "first position": ((5, 4), lambda x: x[:, 0]),
    "new axis": ((5, 4), lambda x: x[:, None]),
    "last entries": ((5, 4), lambda x: x[..., :2]),
    "broadcast_to": ((5, 1), lambda x: ops.broadcast_to(x, (size(x), 5, 3))),
    "tile": ((5, 1), lambda x: ops.tile(x, (1, 1, 3))),
    "repeat": ((5,), lambda x: ops.repeat(x, 2, axis=1)),
    "where": ((5,), lambda x: ops.where(x > 0.5, x, 0.0)),
    "clip": ((5,), lambda x: ops.clip(x, 0.2, 0.7)),
    "one_hot": ((5,), lambda x: ops.one_hot(ints(x), 3)),
    "multi_hot": ((5,), lambda x: ops.multi_hot(ints(x), 3)),
    "top_k": ((5,), lambda x: ops.top_k(x, 2)[0]),
    "sort": ((5,), lambda x: ops.sort(x, axis=-1)),
    "argsort": ((5,), lambda x: ops.argsort(x)),
    "take_along_axis": ((5,), lambda x: ops.take_along_axis(x, ops.argsort(x), axis=-1)),
    "take of a table": ((6,), lambda x, w: ops.take(w, ints(x), axis=0), (9, 3)),
    "take": ((6,), lambda x: ops.take(x, [0, 2], axis=1)),
    "split": ((6,), lambda x: ops.split(x, 2, axis=-1)[0]),
    "unstack": ((6, 2), lambda x: ops.unstack(x, axis=2)[0]),
    "stack": ((6,), lambda x: ops.stack([x, x], 1)),
    "pad": ((6, 4), lambda x: ops.pad(x, [[0, 0], [1, 1], [0, 0]])),
    "mean": ((6,), lambda x: x - ops.mean(x, -1, keepdims=True)),
    "sum": ((3, 6), lambda x: ops.sum(x, axis=(1, 2))),
    "norm": ((6,), lambda x: x / ops.norm(x, axis=-1, keepdims=True)),
    "normalize": ((6,), lambda x: ops.normalize(x, axis=-1)),
    "layer_normalization": ((6,), lambda x: ops.layer_normalization(x)),
    "rms_normalization": ((6,), lambda x: ops.rms_normalization(x)),
    "batch_normalization": (
        (6,),
        lambda x: ops.batch_normalization(x, ops.zeros(6), ops.ones(6), -1),
    ),
    "moments": ((3, 6), lambda x: ops.moments(x, [1])[0]),
    "logsumexp": ((3,), lambda x: ops.logsumexp(x, axis=1)),
    "log_softmax": ((3,), lambda x: ops.log_softmax(x)),
    "glu": ((4,), lambda x: ops.glu(x)),
    "cumsum": ((4,), lambda x: ops.cumsum(x, axis=-1)),
    "flip": ((4,), lambda x: ops.flip(x, axis=1)),
    "roll": ((4,), lambda x: ops.roll(x, 1, axis=1)),
    "diff": ((4,), lambda x: ops.diff(x)),
    "median": ((5,), lambda x: ops.median(x, axis=-1)),
    "average": ((5,), lambda x: ops.average(x, axis=1, weights=ops.arange(5.0))),
    "squeeze": ((1, 6), lambda x: ops.squeeze(x, 1)),
    "expand_dims": ((6,), lambda x: ops.expand_dims(x, -1)),
    "swapaxes": ((3, 6), lambda x: ops.swapaxes(x, 1, 2)),
    "moveaxis": ((3, 6, 2), lambda x: ops.moveaxis(x, -1, 1)),
    "transpose": ((3, 6), lambda x: ops.transpose(x, (0, 2, 1))),
    "tril": ((3, 3), lambda x: ops.tril(x)),
    "diagonal": ((3, 3), lambda x: ops.diagonal(x, axis1=1, axis2=2)),
    "inv": ((1, 1), lambda x: ops.inv(x)),
    "conv": ((6, 6, 3), lambda x, w: ops.conv(x, w), (3, 3, 3, 2)),
    "max_pool": ((6, 6, 3), lambda x: ops.max_pool(x, 2)),
    "resize": ((6, 6, 3), lambda x: ops.image.resize(x, (3, 3))),
    "extract_patches": ((6, 6, 3), lambda x: ops.image.extract_patches(x, 2)),
    "rfft": ((6,), lambda x: ops.rfft(x)[0]),
    "argmax": ((6, 2), lambda x: ops.argmax(x, axis=1)),
    "round": ((3,), lambda x: ops.round(4 * x)),
    "stop_gradient": ((3,), lambda x: ops.stop_gradient(x)),
    "two inputs": ([(4, 2), (2,)], lambda xs: xs[0] + xs[1][:, None]),
}

MIXES = {
    "mean of all": ((4,), lambda x: x - ops.mean(x), "Mean.*axis"),
    "mean of the batch": ((4,), lambda x: x - ops.mean(x, axis=0), "Mean.*batch axis"),
    "mean, negative axis": ((4,), lambda x: x - ops.mean(x, axis=-2), "Mean.*batch axis"),
    "mean of positions and batch": (
        (3, 4),
        lambda x: x - ops.mean(x, axis=(0, 1), keepdims=True),
        "Mean",
    ),
    "variance": ((4,), lambda x: x / (1 + ops.var(x, axis=0)), "Var"),
    "maximum": ((4,), lambda x: x - ops.max(x, axis=0, keepdims=True), "Max"),
    "any": ((4,), lambda x: x * ops.cast(ops.all(x > 0.5, axis=0), "float32"), "All"),
    "softmax": ((4,), lambda x: ops.softmax(x, axis=0), "Softmax"),
    "softmax of a vector": ((4,), lambda x: ops.softmax(x[:, 0]), "Softmax"),
    "sort": ((4,), lambda x: ops.sort(x, axis=0), "Sort"),
    "argsort": ((4,), lambda x: ops.argsort(-x, axis=0), "Argsort"),
    "cumsum": ((4,), lambda x: ops.cumsum(x[:, ::-1], axis=0) + ops.sum(x, 0), "Cumsum"),
    "flip": ((4,), lambda x: ops.flip(x, axis=0), "Flip"),
    "flip all": ((4,), lambda x: ops.flip(x), "Flip"),
    "roll": ((4,), lambda x: ops.roll(x, 1, axis=0), "Roll"),
    "roll all": ((4,), lambda x: ops.roll(x, 1), "Roll"),
    "norm": ((4,), lambda x: x / ops.norm(x), "Norm"),
    "normalize": ((4,), lambda x: ops.normalize(x, axis=0), "Normalize"),
    "moments": ((4,), lambda x: x - ops.moments(x, [0])[0], "Moments"),
    "logsumexp": ((4,), lambda x: x - ops.logsumexp(x), "Logsumexp"),
    "reshape": (
        (2, 4),
        lambda x: ops.reshape(ops.reshape(x, (2, -1)), (-1, 2, 4))[::-1],
        "Reshape",
    ),
    "reshape of rows": (
        (8,),
        lambda x: ops.reshape(ops.flip(ops.reshape(x, (-1, 4)), 0), (-1, 8)),
        "Reshape.*8 entries",
    ),
    "transpose": ((4,), lambda x: ops.transpose(x) @ x @ ops.ones((4, 4)), "Transpose"),
    "wrong transpose in attention": (
        (5, 4),
        lambda x: ops.transpose(
            ops.softmax(ops.transpose(x, (1, 0, 2)) @ ops.transpose(x, (1, 2, 0)))
            @ ops.transpose(x, (1, 0, 2)),
            (1, 0, 2),
        ),
        "Transpose.*moves the batch axis",
    ),
    "swapaxes": ((2, 4), lambda x: ops.swapaxes(x, 0, 1), "Swapaxes"),
    "moveaxis": ((2, 4), lambda x: ops.moveaxis(x, 1, 0), "Moveaxis"),
    "in-batch similarity": ((4,), lambda x: x @ ops.transpose(x), "Transpose"),
    "matmul": ((2,), lambda x: x @ x, "Matmul.*rank"),
    "matmul of ranks": ((2, 2), lambda x: x[:, 0] @ x, "Matmul"),
    "matmul, constant first": ((4,), lambda x, w: w @ x, "Matmul.*sums over", (2, 2)),
    "dot": ((2,), lambda x: ops.dot(x, x), "Dot"),
    "tensordot": ((4,), lambda x: ops.tensordot(x, x, [[0], [0]])[:2], "Tensordot"),
    "tensordot of a constant": ((4,), lambda x, w: ops.tensordot(w, x, 1), "Tensordot", (2, 2)),
    "einsum sum": ((4,), lambda x: x - ops.einsum("bi->i", x), "Einsum"),
    "einsum pairs": ((4,), lambda x: ops.einsum("bi,ci->bc", x, x), "Einsum.*letters"),
    "einsum swap": ((2,), lambda x: ops.einsum("bi->ib", x), "Einsum"),
    "einsum with a constant": ((4,), lambda x, w: ops.einsum("bi,ab->ai", x, w), "Einsum", (2, 2)),
    "einsum of the letter twice": (
        (2, 2),
        lambda x: ops.einsum("bij,jb->bi", x, x[:, 0]),
        "Einsum",
    ),
    "ranks": ((2,), lambda x: x + ops.stack([x, 2 * x], 1), "Add.*ranks"),
    "mask of another rank": (
        (2, 2),
        lambda x: ops.where(x[:, :, 0] > 0.5, x, 0.0) * ops.sum(x[:, :, 0]),
        "Where.*ranks",
    ),
    "attention mask of another rank": (
        (2, 2, 4),
        lambda x: ops.dot_product_attention(x, x, x, bias=x[:, :, 0, :2]),
        "DotProductAttention.*ranks",
    ),
    "take": ((4,), lambda x: ops.take(x, [1, 0], axis=0), "Take"),
    "take of indices": (
        (2, 4),
        lambda x: ops.sum(ops.take(x, ints(x[:, 0, 0]) % 2, axis=1), axis=1),
        "Take",
    ),
    "take_along_axis": (
        (4,),
        lambda x: ops.take_along_axis(x, ops.argsort(x, axis=0), axis=0),
        "sort",
    ),
    "index": ((4,), lambda x: x[::-1], "GetItem.*batch axis"),
    "index of a row": ((4,), lambda x: x + x[1], "GetItem"),
    "index with None": ((4,), lambda x: ops.mean(x[None], axis=1) + x, "GetItem"),
    "dots that stand for nothing": ((4,), lambda x: x + x[..., 1, :], "GetItem"),
    "concatenate": ((4,), lambda x: ops.concatenate([x, x], 0)[1:3], "Concatenate"),
    "stack": ((4,), lambda x: ops.max(ops.stack([x, x], 0), 1), "Stack"),
    "expand_dims": ((4,), lambda x: x + ops.mean(ops.expand_dims(x, 0), 1), "ExpandDims"),
    "repeat": ((4,), lambda x: ops.repeat(x, 2, axis=0)[:2], "Repeat"),
    "tile": ((4,), lambda x: ops.tile(x, (2, 1))[1:3], "Tile"),
    "pad": ((4,), lambda x: ops.pad(x, [[1, 0], [0, 0]])[:-1], "Pad"),
    "split": ((4,), lambda x: ops.concatenate(ops.split(x, 2, axis=0)[::-1], 0), "Split"),
    "unstack": ((4,), lambda x: ops.stack(ops.unstack(x, 2)[::-1], 0), "Unstack"),
    "constant of the rank": ((4,), lambda x, w: ops.sum(x) + x + w, "Sum|constant", (2, 4)),
    "diagonal": ((2, 4), lambda x: ops.diagonal(x, axis1=0, axis2=1), "Diagonal"),
    "moments of images": ((4, 4, 3), lambda x: x - ops.mean(x, (0, 1, 2)), "Mean"),
    "image of rank 3": ((4, 3), lambda x: ops.image.resize(x, (3, 4)), "Resize"),
    "tril": ((4,), lambda x: ops.tril(x[:, ::-1]) + ops.sum(x), "Tril|Sum"),
    "fft": ((4,), lambda x: ops.fft2((x, x))[0], "FFT2"),
    "unknown operation": ((4,), lambda x: ops.kron(x, x)[:2], "Kron.*nothing is known"),
    "segments": ((4,), lambda x: ops.segment_sum(x, ops.zeros(2, "int32"), 2), "SegmentSum"),
    "size of the batch": ((4,), lambda x: x + ops.sum(x, 0) / size(x), "Sum|size of the batch"),
}

# What only another size of the batch would show.
SIZES = {
    "division": lambda x: x / size(x),
    "power": lambda x: x ** size(x),
    "cast": lambda x: x / ops.cast(size(x), "float32"),
    "NumPy": lambda x: x * np.float32(size(x)),
    "arange": lambda x: x + ops.cast(ops.arange(size(x)), "float32")[:, None],
    "eye": lambda x: ops.eye(size(x)) @ x,
    "ones": lambda x: x * ops.ones(size(x)),
    "matrix": lambda x: x @ ops.zeros((4, size(x))),
    "squeeze": lambda x: ops.squeeze(x[:, :, None]),
    "part": lambda x: x[1:],
    "constant rows": lambda x: x + ops.ones((3, 4)),
    "tokens": lambda x: x + ops.tile(ops.ones((2, 4)), (size(x), 1)),
    "scalar": lambda x: ops.zeros(()) + 1,
}


@pytest.mark.parametrize("name", KEEPS)
def test_operation_passes(name):
    check_body(body(*KEEPS[name]))


@pytest.mark.any_backend
@pytest.mark.parametrize("name", KEEPS)
def test_operation_that_passes_keeps_rows(name):
    network = body(*KEEPS[name])
    assert rows_stay(network, network.inputs_of, as_list=True)


@pytest.mark.parametrize("name", MIXES)
def test_operation_is_refused(name):
    shape, function, pattern, *weight = MIXES[name]
    with pytest.raises(UnknownLayerError, match=f"(?s){pattern}") as error:
        check_body(body(shape, function, *weight))
    assert "body" in str(error.value)


@pytest.mark.any_backend
@pytest.mark.parametrize("name", MIXES)
def test_operation_that_is_refused_mixes_rows(name):
    shape, function, _, *weight = MIXES[name]
    network = body(shape, function, *weight)
    assert not rows_stay(network, network.inputs_of, as_list=True)


@pytest.mark.parametrize("name", SIZES)
def test_size_of_the_batch_is_refused(name):
    with pytest.raises(UnknownLayerError, match="body|output does not depend"):
        check_body(body((4,), SIZES[name]))


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "operation, name",
    [("Sort", "sort"), ("Roll", "roll"), ("Softmax", "softmax"), ("Flip", "flip")],
)
def test_rule_is_needed(operation, name, monkeypatch):
    """Without its rule an operation that mixes rows would pass: shapes do not show it."""
    cls = next(c for c in row_rules.OPERATIONS if c.__name__ == operation)
    monkeypatch.setitem(row_rules.OPERATIONS, cls, lambda op, *args, **kwargs: None)
    shape, function, _ = MIXES[name]
    check_body(body(shape, function))


@pytest.mark.any_backend
def test_elementwise_operations_keep_rows():
    tensors = [keras.KerasTensor((None, 3))] * 2
    one, _, other = made_up(tensors)
    tried = 0
    for cls, rule in row_rules.OPERATIONS.items():
        if rule is not row_rules._elementwise:
            continue
        for n in (1, 2):
            for dtype in ("float32", "int32"):
                try:
                    op = cls() if "Cast" not in cls.__name__ else cls("float32")
                    results = [
                        ops.convert_to_numpy(op.call(*(ops.cast(x, dtype) for x in xs[:n])))
                        for xs in (one, other)
                    ]
                except Exception:
                    continue
                tried += 1
                np.testing.assert_allclose(results[0][0], results[1][0], 1e-6, err_msg=str(cls))
    assert tried > 200


# --- layers of Keras ------------------------------------------------------------------------------

IMAGE, VOLUME, SEQUENCE, VECTOR = (6, 6, 4), (4, 4, 4, 2), (6, 4), (4,)


def of_ranks(name, *args, **kwargs):
    """A layer in one, two and three dimensions."""
    shapes = {1: SEQUENCE, 2: IMAGE, 3: VOLUME}
    return {
        f"{name}{n}D": (getattr(layers, f"{name}{n}D")(*args, **kwargs), shape)
        for n, shape in shapes.items()
        if hasattr(layers, f"{name}{n}D")
    }


@functools.cache
def layer_cases():
    two = [VECTOR, VECTOR]
    pooled = {}
    for kind in ("AveragePooling", "MaxPooling", "UpSampling"):
        pooled |= of_ranks(kind, 2)
    for kind in ("ZeroPadding", "Cropping"):
        pooled |= of_ranks(kind, 1)
    for kind in ("GlobalAveragePooling", "GlobalMaxPooling"):
        pooled |= of_ranks(kind)
    for kind in ("AdaptiveAveragePooling", "AdaptiveMaxPooling"):
        pooled |= of_ranks(kind, 2)
    for kind in ("Conv", "SeparableConv"):
        pooled |= of_ranks(kind, 2, 2, activation="relu")
    pooled |= {
        f"Conv{n}DTranspose": (getattr(layers, f"Conv{n}DTranspose")(2, 2), shape)
        for n, shape in ((1, SEQUENCE), (2, IMAGE), (3, VOLUME))
    }
    pooled |= of_ranks("DepthwiseConv", 2) | of_ranks("SpatialDropout", 0.5, seed=1)
    frames = {1: (3, 4, 2), 2: (3, 4, 4, 2), 3: (3, 4, 4, 4, 2)}
    pooled |= {
        f"ConvLSTM{n}D": (getattr(layers, f"ConvLSTM{n}D")(2, 2), s) for n, s in frames.items()
    }
    normalization = layers.Normalization()
    normalization.adapt(np.arange(8.0).reshape(2, 4))
    frozen = layers.BatchNormalization(trainable=False)
    words = layers.StringLookup(vocabulary=["a", "b"], output_mode="multi_hot")
    return pooled | {
        "Activation": (layers.Activation("softmax"), VECTOR),
        "Add": (layers.Add(), two),
        "Add of ranks": (layers.Add(), [SEQUENCE, VECTOR]),
        "AdditiveAttention": (layers.AdditiveAttention(), [SEQUENCE, SEQUENCE]),
        "AlphaDropout": (layers.AlphaDropout(0.5, seed=1), VECTOR),
        "Attention": (layers.Attention(use_scale=True), [SEQUENCE, SEQUENCE]),
        "Average": (layers.Average(), two),
        "BatchNormalization": (frozen, IMAGE),
        "CategoryEncoding": (layers.CategoryEncoding(9, "multi_hot"), VECTOR, "int32"),
        "CenterCrop": (layers.CenterCrop(3, 3), IMAGE),
        "Concatenate": (layers.Concatenate(), two),
        "Dense": (layers.Dense(2, activation="relu"), VECTOR),
        "Discretization": (layers.Discretization([0.3, 0.6]), VECTOR),
        "Dot": (layers.Dot(1), two),
        "Dropout": (layers.Dropout(0.5, noise_shape=(None, 1, 4), seed=1), SEQUENCE),
        "ELU": (layers.ELU(), VECTOR),
        "EinsumDense": (layers.EinsumDense("abc,cd->abd", (None, 3)), SEQUENCE),
        "EinsumDense with dots": (layers.EinsumDense("...x,xy->...y", 3), VECTOR),
        "Embedding": (layers.Embedding(9, 2, mask_zero=True), VECTOR, "int32"),
        "Flatten": (layers.Flatten(), SEQUENCE),
        "GRU": (layers.GRU(2, dropout=0.1, return_sequences=True, seed=1), SEQUENCE),
        "GaussianDropout": (layers.GaussianDropout(0.5, seed=1), VECTOR),
        "GaussianNoise": (layers.GaussianNoise(0.5, seed=1), VECTOR),
        "GroupNormalization": (layers.GroupNormalization(2), IMAGE),
        "Hashing": (layers.Hashing(9), VECTOR, "int32"),
        "Identity": (layers.Identity(), VECTOR),
        "IntegerLookup": (layers.IntegerLookup(vocabulary=[1, 2, 3]), VECTOR, "int32"),
        "LSTM": (layers.LSTM(2), SEQUENCE),
        "LayerNormalization": (layers.LayerNormalization(axis=(1, 2)), SEQUENCE),
        "LeakyReLU": (layers.LeakyReLU(), VECTOR),
        "Masking": (layers.Masking(), SEQUENCE),
        "Maximum": (layers.Maximum(), two),
        "Minimum": (layers.Minimum(), two),
        "Multiply": (layers.Multiply(), two),
        "Normalization": (normalization, VECTOR),
        "PReLU": (layers.PReLU(), SEQUENCE),
        "Permute": (layers.Permute((2, 1)), SEQUENCE),
        "RMSNormalization": (layers.RMSNormalization(), VECTOR),
        "RNN": (layers.RNN([layers.GRUCell(2), layers.LSTMCell(2)]), SEQUENCE),
        "RandomBrightness": (layers.RandomBrightness(0.5, seed=1), IMAGE[:2] + (3,)),
        "RandomContrast": (layers.RandomContrast(0.5, seed=1), IMAGE[:2] + (3,)),
        "RandomCrop": (layers.RandomCrop(3, 3, seed=1), IMAGE),
        "RandomFlip": (layers.RandomFlip(seed=1), IMAGE),
        "RandomRotation": (layers.RandomRotation(0.1, seed=1), IMAGE),
        "RandomTranslation": (layers.RandomTranslation(0.1, 0.1, seed=1), IMAGE),
        "RandomZoom": (layers.RandomZoom(0.1, seed=1), IMAGE),
        "ReLU": (layers.ReLU(), VECTOR),
        "RepeatVector": (layers.RepeatVector(2), VECTOR),
        "Rescaling": (layers.Rescaling(0.5), VECTOR),
        "Reshape": (layers.Reshape((-1, 2)), VECTOR),
        "Resizing": (layers.Resizing(3, 3), IMAGE),
        "ReversibleEmbedding": (layers.ReversibleEmbedding(9, 2), VECTOR, "int32"),
        "SimpleRNN": (layers.SimpleRNN(2, go_backwards=True), SEQUENCE),
        "Softmax": (layers.Softmax(), VECTOR),
        "StringLookup": (words, VECTOR, "string"),
        "Subtract": (layers.Subtract(), two),
        "TextVectorization": (
            layers.TextVectorization(vocabulary=["a", "b"], output_sequence_length=4),
            (1,),
            "string",
        ),
        "UnitNormalization": (layers.UnitNormalization(), VECTOR),
        # Followed into:
        "Bidirectional": (layers.Bidirectional(layers.LSTM(2)), SEQUENCE),
        "GroupQueryAttention": (layers.GroupQueryAttention(2, 4, 2), [SEQUENCE, SEQUENCE]),
        "MultiHeadAttention": (layers.MultiHeadAttention(2, 3), [SEQUENCE, SEQUENCE]),
        "Sequential": (keras.Sequential([layers.Dense(3), layers.Dense(2)]), VECTOR),
        "TimeDistributed": (layers.TimeDistributed(layers.Dense(3)), SEQUENCE),
    }


CASES = sorted(layer_cases())
SPREAD = ("GroupQueryAttention", "MultiHeadAttention")  # their inputs are several arguments


def layer_network(name):
    layer, shape, *dtype = layer_cases()[name]
    shapes = shape if isinstance(shape, list) else [shape]
    inputs = [keras.Input(s, dtype=dtype[0] if dtype else "float32") for s in shapes]
    if name in SPREAD:
        return keras.Model(inputs, layer(*inputs))
    return keras.Model(inputs, layer(inputs if len(inputs) > 1 else inputs[0]))


# What is followed into may be written differently for each backend.
FOLLOWED = {"Bidirectional", "GroupQueryAttention", "MultiHeadAttention", "TimeDistributed"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.any_backend] * (n not in FOLLOWED)) for n in CASES],
)
def test_layer_passes(name):
    check(layer_network(name))


@pytest.mark.any_backend
@pytest.mark.parametrize("name", CASES)
def test_layer_that_passes_keeps_rows(name):
    network = layer_network(name)
    if any(t.dtype == "string" for t in network.inputs):
        pytest.skip("made-up rows are numbers")
    assert rows_stay(network, network.inputs, as_list=len(network.inputs) > 1)


def test_every_layer_of_the_list_is_tried():
    tried = {type(layer) for layer, *_ in layer_cases().values()}
    assert set(row_rules.LAYERS) <= tried


def network_of(layer, shape=VECTOR, dtype="float32"):
    x = keras.Input(shape, dtype=dtype)
    return keras.Model(x, layer(x))


def mean_of_batch(x):
    return x - ops.mean(x, axis=0)


class Cell(layers.Layer):
    state_size = output_size = 2

    def call(self, x, states):
        return x[:, :2], [x[:, :2]]


LAYERS_REFUSED = {
    "batch statistics": (layers.BatchNormalization, IMAGE, "lipdp.repair"),
    "stateful": (lambda: layers.LSTM(2, stateful=True), SEQUENCE, "lstm.*stateful"),
    "stateful in two directions": (
        lambda: layers.Bidirectional(layers.GRU(2, stateful=True)),
        SEQUENCE,
        "stateful",
    ),
    "unknown cell": (lambda: layers.RNN(Cell()), SEQUENCE, "Cell"),
    "mixup": (layers.MixUp, IMAGE, "mix_up"),
    "cutmix": (layers.CutMix, IMAGE, "cut_mix"),
    "spectral": (lambda: layers.SpectralNormalization(layers.Dense(2)), VECTOR, "spectral"),
    "lambda": (lambda: layers.Lambda(lambda x: x), VECTOR, "(?s)Lambda.*keeps_rows_apart"),
    "softmax": (lambda: layers.Softmax(axis=0), VECTOR, "Softmax.*batch axis"),
    "layer normalization": (lambda: layers.LayerNormalization(axis=[0, 1]), VECTOR, "batch axis"),
    "unit normalization": (lambda: layers.UnitNormalization(axis=0), VECTOR, "batch axis"),
    "activation": (lambda: layers.Activation(mean_of_batch), VECTOR, "Mean.*activation"),
    "activation of a layer": (lambda: layers.Dense(2, mean_of_batch), VECTOR, "Mean.*dense"),
    "activation of a cell": (lambda: layers.GRU(2, mean_of_batch), SEQUENCE, "Mean.*gru"),
    "image of rank 3": (lambda: layers.RandomFlip(), (4, 3), "rank below 4"),
    "scale of the batch": (lambda: layers.Rescaling(np.ones((3, 1))), VECTOR, "Rescaling"),
    "codes": (lambda: layers.CategoryEncoding(4, "multi_hot"), (), "rank 1"),
    "softmax of a vector": (lambda: layers.Activation("softmax"), (), "Softmax|cannot be followed"),
    "longest text": (lambda: layers.TextVectorization(vocabulary=["a"]), (1,), "output_sequence"),
    "einsum": (lambda: layers.EinsumDense("ab,bc->ca", (None,)), VECTOR, "begin with the letter"),
}


@pytest.mark.parametrize("name", LAYERS_REFUSED)
def test_layer_is_refused(name):
    make, shape, pattern = LAYERS_REFUSED[name]
    dtype = {"codes": "int32", "longest text": "string"}.get(name, "float32")
    layer = make()
    network = Loose(Body(lambda x: x), [shape])
    network.inputs_of = [keras.KerasTensor((None, *shape), dtype=dtype)]
    layer.build((2, *shape))
    network.body = layer
    with pytest.raises(UnknownLayerError, match=pattern):
        check_body(network)


@pytest.mark.parametrize("name", ["relu", "hard_swish", "gelu", "softmax", "mish", "glu"])
def test_activations_of_keras(name):
    assert len(check(network_of(layers.Dense(4, activation=name)))) == 1


def test_rule_of_a_layer_is_needed(monkeypatch):
    monkeypatch.setitem(row_rules.LAYERS, layers.BatchNormalization, row_rules._within)
    network = network_of(layers.BatchNormalization(), IMAGE)
    check(network)
    assert not rows_stay(network, network.inputs)


def test_dot_and_concatenate_along_the_batch_are_refused():
    for layer in (layers.Concatenate(axis=0), layers.Dot(axes=0)):
        network = Loose(Body(lambda x: x), [VECTOR, VECTOR])
        network.body = layer
        with pytest.raises(UnknownLayerError, match=layer.name):
            check_body(network)


def test_batch_normalization_in_inference():
    """Frozen, or called with training=False."""
    check(network_of(layers.BatchNormalization(trainable=False), IMAGE))
    layer = layers.BatchNormalization()
    layer.build((None, 4))
    network = body(VECTOR, lambda x: layer(x, training=False))
    check_body(network)
    assert rows_stay(network, network.inputs_of, as_list=True)


def test_lipdp_layers():
    network = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            lipdp.layers.BallProjection(1.0),
            lipdp.layers.SpectralConv2D(4, 3),
            lipdp.layers.GroupSort(),
            lipdp.layers.ScaledAveragePooling2D(2),
            layers.Flatten(),
            lipdp.layers.SpectralDense(3),
        ]
    )
    assert [c.layer.name for c in check(network)] == ["spectral_conv2d", "spectral_dense"]


# --- networks -------------------------------------------------------------------------------------


class TokenAndPositionEmbedding(layers.Layer):
    def __init__(self, length, vocabulary, width, expand=False):
        super().__init__()
        self.tokens = layers.Embedding(vocabulary, width)
        self.positions = layers.Embedding(length, width)
        self.expand = expand

    def call(self, x):
        positions = ops.arange(start=0, stop=ops.shape(x)[-1], step=1)
        if self.expand:
            positions = ops.expand_dims(positions, 0)
        return self.tokens(x) + self.positions(positions)


class TransformerBlock(layers.Layer):
    def __init__(self, width, heads, hidden, rate=0.1):
        super().__init__()
        self.attention = layers.MultiHeadAttention(heads, width)
        self.hidden = keras.Sequential([layers.Dense(hidden, "relu"), layers.Dense(width)])
        self.norm1 = layers.LayerNormalization(epsilon=1e-6)
        self.norm2 = layers.LayerNormalization(epsilon=1e-6)
        self.dropout1 = layers.Dropout(rate)
        self.dropout2 = layers.Dropout(rate)

    def call(self, x):
        y = self.norm1(x + self.dropout1(self.attention(x, x)))
        return self.norm2(y + self.dropout2(self.hidden(y)))


class Classifier(keras.Model):
    def __init__(self, body=None):
        super().__init__()
        self.body = body or layers.Dense(4, activation="relu")
        self.head = layers.Dense(2)

    def call(self, x, training=None):
        y = self.body(x)
        if training:
            y = y + random.normal(ops.shape(y), seed=1)
        return self.head(y / 2.0)


def transformer(expand):
    x = keras.Input((10,))
    y = TokenAndPositionEmbedding(10, 30, 8, expand)(x)
    y = TransformerBlock(8, 2, 16)(y)
    y = layers.GlobalAveragePooling1D()(y)
    y = layers.Dropout(0.1)(y)
    return keras.Model(x, layers.Dense(2, activation="softmax")(y))


@pytest.mark.parametrize("expand", [False, True])
def test_transformer(expand):
    calls = check(transformer(expand))
    found = [(call.layer.name.split("_")[0], call.batched) for call in calls]
    assert found == [
        ("embedding", True),
        ("embedding", False),
        ("query", True),
        ("key", True),
        ("value", True),
        ("attention", True),
        ("layer", True),
        ("dense", True),
        ("dense", True),
        ("layer", True),
        ("dense", True),
    ]


def test_frozen_backbone():
    base = keras.applications.MobileNetV2(
        weights=None, include_top=False, input_shape=(32, 32, 3), pooling="avg"
    )
    base.trainable = False
    network = keras.Sequential([keras.Input((32, 32, 3)), base, layers.Dense(3, name="head")])
    assert [call.layer.name for call in check(network)] == ["head"]
    base.trainable = True
    with pytest.raises(UnknownLayerError, match="bn_Conv1.*BatchNormalization"):
        check(network)


def test_subclassed_model():
    network = Classifier()
    network(np.zeros((3, 5), "float32"))
    assert [call.layer for call in check(network)] == [network.body, network.head]


def test_sequential_that_a_batch_built():
    network = keras.Sequential([layers.Dense(3), layers.Dense(2)])
    network(np.zeros((2, 4), "float32"))
    assert len(check(network)) == 2


def test_subclassed_model_with_several_inputs():
    class Two(keras.Model):
        def __init__(self):
            super().__init__()
            self.a, self.b = layers.Dense(3), layers.Dense(3)

        def call(self, inputs):
            left, right = self.a(inputs["left"]), self.b(inputs["right"])
            return {"sum": left + right, "again": self.a(inputs["left"])}

    network = Two()
    network({"left": np.zeros((3, 5), "float32"), "right": np.zeros((3, 4), "float32")})
    assert [c.layer for c in check(network)] == [network.a, network.b, network.a]


def test_several_inputs_outputs_and_branches():
    image, words = keras.Input((8, 8, 3), name="image"), keras.Input((6,), name="words")
    shared = layers.Dense(4, name="shared")
    y = layers.GlobalMaxPooling2D()(layers.Conv2D(4, 3)(image))
    z = layers.GRU(4)(layers.Embedding(9, 4, mask_zero=True)(words))
    joined = layers.Concatenate()([shared(y), shared(z) * 2.0 - 1.0])
    outputs = {"one": layers.Dense(1)(joined), "two": layers.Dense(2)(joined)}
    calls = check(keras.Model({"image": image, "words": words}, outputs))
    assert sum(call.layer is shared for call in calls) == 2
    assert len(calls) == 7


def test_autoencoder():
    encoder = keras.Sequential([keras.Input((8,)), layers.Dense(4, "relu"), layers.Dense(2)])
    decoder = keras.Sequential([keras.Input((2,)), layers.Dense(4, "relu"), layers.Dense(8)])
    x = keras.Input((8,))
    assert len(check(keras.Model(x, decoder(encoder(x))))) == 4


def test_masks_and_unknown_length():
    x = keras.Input((None,))
    y = layers.Embedding(30, 4, mask_zero=True)(x)
    y = layers.Bidirectional(layers.LSTM(3, return_sequences=True))(y)
    y = layers.MultiHeadAttention(2, 4)(y, y, use_causal_mask=True)
    y = layers.Attention()([y, y])
    y = layers.Add()([y, layers.Masking()(y)])
    y = layers.GlobalAveragePooling1D()(y)
    names = [call.layer.name for call in check(keras.Model(x, layers.Dense(1)(y)))]
    assert names[:3] == ["embedding", "forward_lstm", "backward_lstm"]


def test_mask_of_another_rank_is_refused():
    x = keras.Input((6, 6))
    weights = layers.Softmax()
    with pytest.raises(UnknownLayerError, match="softmax.*ranks|softmax.*mask"):
        check_body(body((6, 6), lambda x: weights(x, mask=x[:, :, 0] > 0.5)))
    pooling = layers.GlobalAveragePooling1D()
    with pytest.raises(UnknownLayerError, match="pooling.*mask"):
        check_body(body((6, 6), lambda x: pooling(x, mask=x > 0.5)))
    y = layers.MultiHeadAttention(2, 4)(x, x, attention_mask=x > 0.5)
    check(keras.Model(x, y))


def test_time_distributed_calls_its_layer_for_each_step():
    x = keras.Input((5, 4))
    assert len(check(keras.Model(x, layers.TimeDistributed(layers.Dense(3))(x)))) == 5


def test_a_unit_as_a_whole():
    """A composite layer may be one unit."""
    network = network_of(Classifier(), VECTOR)
    (unit,) = network.layers[1:]
    assert [call.layer for call in check(network, [unit])] == [unit]


def test_the_network_is_left_as_it_was():
    network = transformer(False)
    before = [len(layer._inbound_nodes) for layer in network._flatten_layers()]
    check(network)
    assert [len(layer._inbound_nodes) for layer in network._flatten_layers()] == before
    with pytest.raises(UnknownLayerError):
        check_body(body((4,), mean_of_batch))
    x = keras.Input((4,))
    assert mean_of_batch(x).shape == (None, 4)  # Keras is what it was


# --- weights, state and losses --------------------------------------------------------------------


class Tied(keras.Model):
    def __init__(self, read):
        super().__init__()
        self.embedding = layers.Embedding(9, 4)
        self.read = read

    def call(self, x):
        return self.read(self, ops.mean(self.embedding(x), axis=1))


READS = {
    "transposed": lambda m, y: y @ ops.transpose(m.embedding.embeddings),
    "as it is": lambda m, y: ops.einsum("bi,vi->bv", y, m.embedding.embeddings),
    "by keyword": lambda m, y: ops.matmul(x1=y, x2=ops.transpose(m.embedding.embeddings)),
    "first": lambda m, y: ops.sum(m.embedding.embeddings[0] * y, axis=-1, keepdims=True),
    "value": lambda m, y: y + m.embedding.embeddings.value[0],
    "within a function": lambda m, y: keeps_rows_apart(lambda y: y + m.embedding.embeddings[0])(y),
    "a norm": lambda m, y: y / ops.norm(m.embedding.embeddings),
}


@pytest.mark.parametrize("name", READS)
def test_weight_read_outside_of_its_layer(name):
    network = Tied(READS[name])
    network(np.zeros((2, 3), "int32"))
    with pytest.raises(UnknownLayerError, match="embeddings.*is read in layer 'tied'"):
        check(network)
    network.embedding.trainable = False
    check(network, [])


def test_reversible_embedding_ties_its_output():
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.embedding = layers.ReversibleEmbedding(9, 4)

        def call(self, x):
            return self.embedding(self.embedding(x), reverse=True)

    network = Model()
    network(np.zeros((2, 3), "int32"))
    assert [call.layer for call in check(network)] == [network.embedding] * 2


class Table(layers.Layer):
    def build(self, shape):
        self.w = self.add_weight(shape=(4,))

    def call(self, x):
        return self.w + 0.0


@pytest.mark.parametrize(
    "layer, function, pattern",
    [
        # Its result is the same for all rows: it hands its weight out.
        (Table, lambda layer, x: x + layer(x), "table"),
        # A batch axis before the first axis would make it another convolution.
        (
            lambda: layers.Conv1D(3, 1),
            lambda layer, x: x + ops.sum(layer(np.ones((3, 4, 2), "float32"))),
            "conv1d.*without batch",
        ),
    ],
)
def test_unit_must_carry_the_batch(layer, function, pattern):
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner = layer()

        def call(self, x):
            return function(self.inner, x)

    network = Model()
    network(np.zeros((2, 4), "float32"))
    with pytest.raises(UnknownLayerError, match=pattern):
        check(network)


def test_over_batch_is_what_is_checked():
    assert tuple(over_batch(ops.ones((3, 4)), 2).shape) == (2, 3, 4)
    assert tuple(over_batch(ops.ones((1, 4)), 2).shape) == (2, 4)


def test_refusal_that_the_network_catches():
    def call(x):
        try:
            return mean_of_batch(x)
        except Exception:
            return x

    with pytest.raises(UnknownLayerError, match="Mean"):
        check_body(body((4,), call))


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_other_precisions(policy):
    x = keras.Input((5, 4))
    y = layers.MultiHeadAttention(2, 4, dtype=policy)(x, x)
    y = layers.LSTM(3, dtype=policy)(y)
    assert len(check(keras.Model(x, layers.Dense(1, dtype=policy)(y)))) == 6


class Counter(layers.Layer):
    def __init__(self, update):
        super().__init__()
        self.seen = self.add_weight(shape=(), trainable=False)
        self.update = update

    def call(self, x):
        self.update(self, x)
        return x


@pytest.mark.parametrize(
    "update",
    [
        lambda layer, x: layer.seen.assign(ops.mean(x)),
        lambda layer, x: layer.seen.assign_add(1.0),
    ],
)
def test_state_must_not_change(update):
    with pytest.raises(UnknownLayerError, match="counter"):
        check(network_of(Counter(update)))


def test_random_state_may_change():
    check(network_of(layers.Dropout(0.5)))


def test_losses_of_layers_are_refused():
    class Loss(layers.Layer):
        def call(self, x):
            self.add_loss(ops.mean(ops.square(x), axis=-1))
            return x

    with pytest.raises(UnknownLayerError, match="add_loss"):
        check_body(body(VECTOR, Loss()))
    with pytest.raises(UnknownLayerError, match="activity"):
        check(network_of(layers.Dense(2, activity_regularizer="l2")))


def test_quantized_layers_are_refused():
    network = network_of(layers.Dense(2))
    network.quantize("int8")
    with pytest.raises(UnknownLayerError, match="dense.*quantized"):
        check(network, [])


def test_fixed_batch_and_unbuilt_network():
    x = keras.Input(batch_shape=(3, 4))
    with pytest.raises(ValueError, match="batch size is fixed"):
        check(keras.Model(x, layers.Dense(2)(x)))
    with pytest.raises(ValueError, match="not built"):
        check(Classifier())


@pytest.mark.parametrize("name", ["tensorflow", "jax.numpy", "numpy"])
def test_functions_of_a_backend(name):
    library = pytest.importorskip(name)
    function = getattr(library, "reduce_mean", None) or library.mean
    with pytest.raises(UnknownLayerError, match="body.*cannot be followed"):
        check_body(body((4,), lambda x: x - function(x)))


# --- declarations ---------------------------------------------------------------------------------


def native(x):
    """Half of it, without symbolic tensors."""
    assert not isinstance(x, keras.KerasTensor)
    return ops.convert_to_tensor(x) / 2


def false(x):
    return native(x) - ops.mean(native(x), axis=0)


def test_declared_function():
    with pytest.raises(UnknownLayerError, match="keeps_rows_apart"):
        check_body(body((4,), native))
    check_body(body((4,), keeps_rows_apart(native)))
    with pytest.raises(UnknownLayerError, match="false.*row 0 changes with row 1"):
        check_body(body((4,), keeps_rows_apart(false)))


def test_declared_lambda():
    layer = layers.Lambda(lambda x: x / 2)
    network = network_of(layer)
    with pytest.raises(UnknownLayerError, match="lambda"):
        check(network)
    keeps_rows_apart(layer)
    check(network)
    with pytest.raises(UnknownLayerError, match="row 0 changes"):
        check(network_of(keeps_rows_apart(layers.Lambda(mean_of_batch))))


def test_declared_class_and_its_subclass():
    @keeps_rows_apart
    class Half(layers.Layer):
        def call(self, x):
            return native(x)

        def compute_output_shape(self, shape):
            return shape

    class Other(Half):
        pass

    check(network_of(Half()))
    with pytest.raises(UnknownLayerError, match="other"):
        check(network_of(Other()))


def test_declaration_does_not_hide_weights_and_state():
    """Nor does a class that says what shape it gives, so that Keras need not call it."""

    @keeps_rows_apart
    class Sly(layers.Layer):
        def __init__(self, act):
            super().__init__()
            self.act = act
            self.seen = self.add_weight(shape=(), trainable=False)

        def call(self, x):
            return x + self.act(self, x)

        def compute_output_shape(self, shape):
            return shape

    dense = layers.Dense(4)
    dense.build((None, 4))
    x = keras.Input((4,))
    network = keras.Model(x, dense(Sly(lambda layer, x: dense.kernel[0])(x)))
    with pytest.raises(UnknownLayerError, match="kernel.*is read in layer 'sly'"):
        check(network)
    network = keras.Model(x, Sly(lambda layer, x: layer.seen.assign(ops.mean(x)))(x))
    with pytest.raises(UnknownLayerError, match="is assigned in layer 'sly"):
        check(network)


def test_declaration_does_not_hide_units():
    @keeps_rows_apart
    class Block(layers.Layer):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(4)

        def call(self, x):
            return self.dense(ops.flip(x, 0))

    network = network_of(Block())
    with pytest.raises(UnknownLayerError, match="Flip.*block"):
        check(network)


def test_what_cannot_be_declared():
    for thing in (layers.Dense(2), 3, int):
        with pytest.raises(TypeError, match="thing"):
            keeps_rows_apart(thing)


# --- what runs otherwise than it looks ------------------------------------------------------------


@pytest.mark.any_backend
def test_a_layer_that_is_computed_twice_is_refused():
    with keras.RematScope(mode="full"):
        dense = layers.Dense(2)
    network = keras.Sequential([keras.Input((4,)), dense])
    with pytest.raises(UnknownLayerError, match="RematScope"):
        check_rows_apart(network, [dense])


class Scaled(layers.Layer):
    def build(self, shape, *others):
        self.scale = self.add_weight(shape=(4,), initializer="ones")

    def call(self, x, by):
        return x * self.scale * by


class Constant(layers.Layer):
    def __init__(self):
        super().__init__()
        self.inner = Scaled()

    def build(self, shape):
        self.inner.build(shape)

    def call(self, x):
        return self.inner(x, ops.arange(4.0))


@pytest.mark.any_backend
def test_a_tensor_beside_the_batch_is_refused():
    layer = Constant()
    network = keras.Sequential([keras.Input((4,)), layer])
    with pytest.raises(UnknownLayerError, match="no row for each example"):
        check_rows_apart(network, [layer.inner])


class Symbolic(layers.Layer):
    """Does to real tensors what it does not do to symbolic ones."""

    def compute_output_shape(self, shape):
        return shape

    def call(self, x):
        return x if isinstance(x, keras.KerasTensor) else x - ops.mean(x, axis=0)


def test_code_that_tells_symbolic_tensors_apart_is_found():
    network = keras.Sequential([keras.Input((4,)), Symbolic(), layers.Dense(2)])
    with pytest.raises(UnknownLayerError, match="Symbolic does something else on real tensors"):
        check_units(network)
