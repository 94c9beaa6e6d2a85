"""Which operations and layers keep the rows of a batch apart, and with which arguments.

A tensor of the batch is a `KerasTensor` whose first axis is the batch. Everything else that has a
shape is a constant: it is the same for every row. A rule is called as the operation is. It returns
None if row i of every result depends on row i of the tensors of the batch, and on constants only.
Otherwise it returns the reason, which completes "... may mix the rows of a batch: ...".
"""

import inspect
import math

import keras
import numpy as np
from keras import tree
from keras.src.activations import activations as activation_functions
from keras.src.backend.common.keras_tensor import any_symbolic_tensors
from keras.src.models.functional import Functional
from keras.src.ops import core as core_ops
from keras.src.ops import image as image_ops
from keras.src.ops import linalg as linalg_ops
from keras.src.ops import math as math_ops
from keras.src.ops import nn as nn_ops
from keras.src.ops import numpy as numpy_ops

layers = keras.layers


def _of_batch(x):
    return isinstance(x, keras.KerasTensor)


def _rank(x):
    return len(x.shape)


def operands(value):
    """The tensors and arrays within an argument; plain numbers are left out."""
    if hasattr(value, "shape"):
        return [value]
    if isinstance(value, dict):
        return [x for v in value.values() for x in operands(v)]
    if isinstance(value, (list, tuple)):
        flat = tree.flatten(value)
        if flat and all(isinstance(v, (bool, int, float, complex)) for v in flat):
            return [np.asarray(value)]
        return [x for v in value for x in operands(v)]
    return []


def _aligned(*values):
    """Shapes are aligned from the right: the batch axes must meet each other, and nothing else."""
    found = [x for v in values for x in operands(v)]
    ranks = sorted({_rank(x) for x in found if _of_batch(x)})
    if len(ranks) > 1:
        return (
            f"shapes are aligned from the right, so for tensors of ranks {ranks} the batch axis of "
            "one meets another axis of the other; insert axes after the first"
        )
    for x in found:
        if not _of_batch(x) and (_rank(x) > ranks[0] or (_rank(x) == ranks[0] and x.shape[0] != 1)):
            return (
                f"the first axis of a constant of shape {tuple(x.shape)} meets the batch axis; "
                "give the constant a first axis of size 1 or none"
            )
    return None


def _elementwise(op, *args, **kwargs):
    for a in args:
        # NumPy makes NaN of None.
        if a is None or (isinstance(a, (float, np.floating)) and np.isnan(a)):
            return "it may read the size of the batch, which is unknown here"
    return _aligned(*args, *kwargs.values())


def _meets_batch(axes, rank):
    """Why an operation along these axes is refused, or None."""
    if axes is None:
        return "without an axis it acts on all rows at once; give it axes other than the first"
    for axis in axes if isinstance(axes, (list, tuple)) else (axes,):
        if not isinstance(axis, (int, np.integer)) or not -rank <= axis < rank:
            return f"its axis {axis!r} is none of a tensor of rank {rank}"
        if axis % rank == 0:
            return "it acts along the batch axis"
    return None


def _along(attribute="axis", added=0):
    """Rule of operations along the axes in an attribute; `added`: axes that the result has more."""

    def rule(op, x, *rest, **kwargs):
        found = operands(x)
        if not all(_of_batch(t) for t in found):
            return "it reads a constant where a tensor of the batch is expected"
        return _meets_batch(getattr(op, attribute), _rank(found[0]) + added) or _aligned(
            x, *rest, *kwargs.values()
        )

    return rule


def _expand_dims(op, x):
    axes = op.axis if isinstance(op.axis, (list, tuple)) else (op.axis,)
    return _meets_batch(axes, _rank(x) + len(axes))


def _moments(op, x):
    if op.synchronized:
        return "synchronized moments are those of the whole batch"
    return _meets_batch(op.axes, _rank(x))


def _inner_axes(axes):
    """Rule of operations on the last `axes` axes, which must not be the first."""

    def rule(op, x, *rest, **kwargs):
        if any(not _of_batch(t) or _rank(t) <= axes for t in operands(x)):
            return f"it needs tensors of the batch of rank {axes + 1} or more"
        if any(operands(v) for v in (*rest, *kwargs.values())):
            return "it reads a second tensor, of which nothing is known"
        return None

    return rule


def _of_rank(*ranks):
    """Rule of operations that take tensors of these ranks for a batch, and others for one row."""

    def rule(op, x, *rest, **kwargs):
        if not _of_batch(x) or _rank(x) not in ranks:
            return f"its input must be a tensor of the batch of rank {' or '.join(map(str, ranks))}"
        if any(_of_batch(t) for v in (*rest, *kwargs.values()) for t in operands(v)):
            return "a second argument is a tensor of the batch"
        return None

    return rule


def _clip(op, x):
    return _aligned(x, op.x_min, op.x_max)


def _where(op, condition, x1=None, x2=None):
    if x1 is None or x2 is None:
        return "the number of entries that it finds depends on the whole batch"
    return _aligned(condition, x1, x2)


def _pairs(op, x):
    return _meets_batch((op.axis1, op.axis2), _rank(x))


def _transpose(op, x):
    if op.axes is None and _rank(x) == 1:
        return None
    if op.axes is None or op.axes[0] % _rank(x) != 0:
        return "it moves the batch axis; begin `axes` with 0"
    return None


def _moveaxis(op, x):
    for axes in (op.source, op.destination):
        if reason := _meets_batch(axes, _rank(x)):
            return reason
    return None


def reshaped(op, x):
    """The shape of one row that a reshape gives, or why the rows do not stay as they are."""
    new, size = op.newshape, math.prod(x.shape[1:])
    if not isinstance(new, (list, tuple)) or not new or new[0] not in (None, -1):
        return None, "the first entry of its shape must be -1 or the size of the batch"
    row = list(new[1:])
    if any(not isinstance(n, (int, np.integer)) for n in row) or row.count(-1) > (new[0] is None):
        return None, "all entries of its shape but the first must be known"
    known = math.prod(n for n in row if n != -1)
    row = [size // known if n == -1 and known else int(n) for n in row]
    if size == 0 or math.prod(row) != size:
        return None, f"{size} entries of each row would become {math.prod(row)}"
    return tuple(row), None


def _reshape(op, x):
    return reshaped(op, x)[1]


def _broadcast_to(op, x):
    if len(op.shape) != _rank(x) or op.shape[0] is not None:
        return "its shape must have the rank of the tensor, and begin with the size of the batch"
    return None


def _tile(op, x):
    repeats = op.repeats if isinstance(op.repeats, (list, tuple)) else [op.repeats]
    if len(repeats) > _rank(x) or (len(repeats) == _rank(x) and repeats[0] != 1):
        return "it repeats the batch axis, or puts another before it"
    return None


def _pad(op, x, constant_values=None):
    if len(op.pad_width) != _rank(x) or tuple(op.pad_width[0]) != (0, 0):
        return "it pads the batch axis; give (0, 0) for the first axis"
    return _aligned(x, constant_values)


def _getitem(op, x, key):
    keys = key if isinstance(key, tuple) else (key,)
    bounds = [b for k in keys if isinstance(k, slice) for b in (k.start, k.stop, k.step)]
    if not _of_batch(x) or any_symbolic_tensors((keys, bounds)):
        return "its index is a tensor of the batch; use keras.ops.take or take_along_axis"
    first = keys[0] if keys else Ellipsis
    whole = isinstance(first, slice) and (
        first.start in (None, 0) and first.stop is None and first.step in (None, 1)
    )
    used = sum(k is not None for k in keys) - 1
    if not (whole or (first is Ellipsis and used < _rank(x))):
        return "it indexes the batch axis; begin the index with `:`"
    plain = (int, np.integer, slice, type(None), type(Ellipsis))
    if any(isinstance(k, bool) for k in keys):
        return "it is indexed with a bool"
    arrays = [k for k in keys if not isinstance(k, plain)]
    integers = [k for k in keys if isinstance(k, (int, np.integer))]
    if arrays and (len(arrays) > 1 or integers or np.asarray(arrays[0]).dtype == bool):
        return "an index with several arrays may move the batch axis; index one axis at a time"
    return None


def _take(op, x, indices):
    if _of_batch(x) and any(_of_batch(i) for i in operands(indices)):
        return "every row's indices are taken from every row; use keras.ops.take_along_axis"
    if _of_batch(x):
        return _meets_batch(op.axis, _rank(x))
    if op.axis is not None and op.axis % _rank(x) != 0:
        return "rows of indices are taken from an inner axis of a constant, which puts them there"
    return None


def _take_along_axis(op, x, indices):
    if not (_of_batch(x) and _of_batch(indices) and _rank(x) == _rank(indices)):
        return "its arguments must be two tensors of the batch of one rank"
    return _meets_batch(op.axis, _rank(x))


def _matmul(op, x1, x2):
    one, two = _of_batch(x1), _of_batch(x2)
    if one and two:
        if _rank(x1) != _rank(x2) or _rank(x1) < 3:
            return (
                "a product of two tensors of the batch needs the same rank of both, at least 3; "
                "otherwise it sums over the batch or meets it with another axis"
            )
        return None
    batch, constant = (x1, x2) if one else (x2, x1)
    if _rank(batch) < (2 if one else 3):
        return "it sums over the batch axis"
    if _rank(constant) > 2 or _rank(batch) == 2:
        if _rank(constant) > (2 if _rank(batch) == 2 else _rank(batch)):
            return "the constant has more axes than the tensor of the batch"
        if _rank(batch) > 2 and _rank(constant) == _rank(batch) and constant.shape[0] != 1:
            return "the first axis of the constant meets the batch axis"
    return None


def _dot(op, x1, x2):
    if _of_batch(x2) and operands(x1) and _rank(x1) > 0:
        return "it multiplies the rows of one tensor with all rows of the other; use einsum"
    return "it sums over the batch axis" if _of_batch(x1) and _rank(x1) < 2 and _rank(x2) else None


def _tensordot(op, x1, x2):
    if _of_batch(x2):
        return "it multiplies the rows of one tensor with all rows of the other; use einsum"
    axes = op.axes
    if isinstance(axes, int):
        summed = list(range(_rank(x1) - axes, _rank(x1)))
    else:
        summed = axes[0] if isinstance(axes[0], (list, tuple)) else [axes[0]]
    return _meets_batch(tuple(summed), _rank(x1)) if summed else None


def einsum(equation, operands):
    """Rule of an equation: the letter of the batch comes first in every tensor of the batch and in
    the result, and in no constant.
    """
    equation = equation.replace(" ", "")
    if "->" not in equation:
        return "its equation has no '->', which would say where the batch axis goes"
    left, result = equation.split("->")
    terms = left.split(",")
    if len(terms) != len(operands):
        return f"its equation has {len(terms)} terms for {len(operands)} tensors"
    more = [_rank(x) - len(t.replace("...", "")) for t, x in zip(terms, operands, strict=True)]
    widest = max([n for t, n in zip(terms, more, strict=True) if "..." in t], default=0)

    def labels(term, count):
        found = []
        for i, part in enumerate(term.split("...")):
            found += [f"...{n}" for n in range(widest - count, widest)] if i else []
            found += part
        return found

    terms = [labels(t, n) for t, n in zip(terms, more, strict=True)]
    result = labels(result, widest)
    first = {t[0] if t else "" for t, x in zip(terms, operands, strict=True) if _of_batch(x)}
    if len(first) > 1:
        return f"its tensors begin with different letters in {equation!r}"
    (batch,) = first
    if not result or result[0] != batch or result.count(batch) > 1:
        return f"its result does not begin with the letter of the batch in {equation!r}"
    for term, x in zip(terms, operands, strict=True):
        if term.count(batch) != int(_of_batch(x)):
            return f"the letter of the batch stands for another axis too in {equation!r}"
    return None


def _einsum(op, *tensors, **kwargs):
    return einsum(op.subscripts, tensors)


def _batch_norm(op, x, *statistics, **kwargs):
    if not _of_batch(x) or any(_of_batch(s) for s in (*statistics, *kwargs.values())):
        return "its mean and variance must be constants"
    return _meets_batch(op.axis, _rank(x))


def _attention(op, query, key, value, bias=None, mask=None, scale=None):
    if any(not _of_batch(t) or _rank(t) != 4 for t in (query, key, value)):
        return "query, key and value must be tensors of the batch of rank 4"
    return _aligned(query, bias, mask, scale)


def _multi_hot(op, x):
    return None if op.axis == -1 and _rank(x) > 1 else "it counts along the batch axis"


def _from(module, names, rule):
    return {getattr(module, n): rule for n in names.split() if hasattr(module, n)}


#: `{class of operation: rule}`, for exactly these classes.
OPERATIONS = {
    **_from(
        numpy_ops,
        "Abs Absolute Add Angle Arccos Arccosh Arcsin Arcsinh Arctan Arctan2 Arctanh Array "
        "BitwiseAnd BitwiseInvert BitwiseLeftShift BitwiseNot BitwiseOr BitwiseRightShift "
        "BitwiseXor Cbrt Ceil Conj Conjugate Copy Cos Cosh Deg2rad Divide DivideNoNan Equal Exp "
        "Exp2 Expm1 Fabs Floor FloorDivide Fmax Fmin Fmod FullLike Greater GreaterEqual Heaviside "
        "Hypot I0 Imag Isclose Isfinite Isinf Isnan Isneginf Isposinf Isreal LeftShift Less "
        "LessEqual Log Log10 Log1p Log2 Logaddexp Logaddexp2 LogicalAnd LogicalNot LogicalOr "
        "LogicalXor Maximum Minimum Mod Multiply NanToNum Negative NotEqual OnesLike Power Rad2deg "
        "Real Reciprocal RightShift Round Select Sign Signbit Sin Sinc Sinh Sqrt Square Subtract "
        "Tan Tanh TrueDivide Trunc ZerosLike",
        _elementwise,
    ),
    **_from(
        nn_ops,
        "Celu Elu Gelu HardShrink HardSigmoid HardSilu HardTanh LeakyRelu LogSigmoid Relu Relu6 "
        "Selu Sigmoid Silu SoftShrink Softplus Softsign SparsePlus SparseSigmoid Squareplus "
        "TanhShrink Threshold",
        _elementwise,
    ),
    **_from(activation_functions, "Mish ReLU", _elementwise),
    **_from(core_ops, "Cast ConvertToTensor SaturateCast StopGradient", _elementwise),
    **_from(math_ops, "Erf Erfc Erfinv Rsqrt", _elementwise),
    **_from(
        numpy_ops,
        "All Amax Amin Any Argmax Argmin Argpartition Argsort ArraySplit Average Concatenate "
        "CountNonzero Cumprod Cumsum Diff Flip Max Mean Median Min Nanargmax Nanargmin Nancumprod "
        "Nancumsum Nanmax Nanmean Nanmedian Nanmin Nanprod Nanstd Nansum Nanvar Prod Ptp Quantile "
        "Repeat Roll Sort Split Squeeze Std Sum Var",
        _along(),
    ),
    **_from(nn_ops, "Glu LayerNorm LogSoftmax Normalize RMSNorm Softmax Sparsemax", _along()),
    **_from(math_ops, "Logsumexp", _along()),
    **_from(linalg_ops, "Norm", _along()),
    **_from(core_ops, "Unstack", _along()),
    **_from(numpy_ops, "Stack", _along(added=1)),
    **_from(nn_ops, "OneHot", _along(added=1)),
    **_from(numpy_ops, "Diagonal Swapaxes Trace", _pairs),
    **_from(numpy_ops, "Tril Triu", _inner_axes(2)),
    **_from(linalg_ops, "Cholesky Det Eigh Inv Pinv", _inner_axes(2)),
    **_from(math_ops, "FFT RFFT TopK ExtractSequences STFT", _inner_axes(1)),
    **_from(math_ops, "FFT2", _inner_axes(2)),
    **_from(
        nn_ops,
        "AdaptiveAveragePool AdaptiveMaxPool AveragePool Conv ConvTranspose DepthwiseConv MaxPool "
        "SeparableConv",
        _of_rank(3, 4, 5),
    ),
    **_from(nn_ops, "DepthToSpace SpaceToDepth Unfold", _of_rank(4)),
    **_from(
        image_ops,
        "CropImages ExtractPatches HSVToRGB PadImages RGBToGrayscale RGBToHSV Resize",
        _of_rank(4),
    ),
    numpy_ops.BroadcastTo: _broadcast_to,
    numpy_ops.Clip: _clip,
    numpy_ops.Dot: _dot,
    numpy_ops.Einsum: _einsum,
    numpy_ops.ExpandDims: _expand_dims,
    numpy_ops.GetItem: _getitem,
    numpy_ops.Matmul: _matmul,
    numpy_ops.Moveaxis: _moveaxis,
    numpy_ops.Pad: _pad,
    numpy_ops.Reshape: _reshape,
    numpy_ops.Take: _take,
    numpy_ops.TakeAlongAxis: _take_along_axis,
    numpy_ops.Tensordot: _tensordot,
    numpy_ops.Tile: _tile,
    numpy_ops.Transpose: _transpose,
    numpy_ops.Where: _where,
    nn_ops.BatchNorm: _batch_norm,
    nn_ops.DotProductAttention: _attention,
    nn_ops.Moments: _moments,
    nn_ops.MultiHot: _multi_hot,
}


# --- layers of Keras: rules are called with the layer, its inputs, and its other arguments --------


def _within(layer, inputs, arguments):
    return None


def _axis_of(layer, inputs, arguments):
    return _meets_batch(layer.axis, _rank(inputs[0]))


def _merge(layer, inputs, arguments):
    # A layer that was built for inputs of several ranks inserts axes after the first.
    return None if layer._reshape_required else _aligned(*inputs)


def _rescaling(layer, inputs, arguments):
    return _aligned(inputs[0], layer.scale, layer.offset)


def _softmax(layer, inputs, arguments):
    return _axis_of(layer, inputs, arguments) or _aligned(inputs[0], arguments.get("mask"))


def _adapted(layer, inputs, arguments):
    # Its statistics are constants; an empty `axis` is one mean for all entries.
    statistics = getattr(layer, "mean", None), getattr(layer, "variance", None)
    return _meets_batch(layer.axis, _rank(inputs[0])) or _aligned(inputs[0], *statistics)


def _batch_normalization(layer, inputs, arguments):
    if arguments.get("training") and layer.trainable:
        return (
            "in training it normalises with the mean and variance of the batch, and moves its "
            "averages. lipdp.repair puts GroupNormalization in its place; or freeze it "
            "(trainable = False)"
        )
    return _axis_of(layer, inputs, arguments)


def _einsum_dense(layer, inputs, arguments):
    kernel = layer.kernel if layer.built else None
    return einsum(layer.equation, [inputs[0], kernel])


def _dot_layer(layer, inputs, arguments):
    axes = layer.axes if isinstance(layer.axes, (list, tuple)) else [layer.axes] * 2
    for axis, x in zip(axes, inputs, strict=True):
        if reason := _meets_batch(axis, _rank(x)):
            return reason
    return None


def _rank_at_least(rank):
    def rule(layer, inputs, arguments):
        if any(_rank(x) < rank for x in inputs):
            return f"it takes an input of rank below {rank} for a single row"
        return None

    return rule


def _sequences(layer, inputs, arguments):
    if any(_rank(x) != 3 for x in inputs):
        return "its inputs must be of rank 3"
    return None


_CELLS = (layers.SimpleRNNCell, layers.GRUCell, layers.LSTMCell)


def _recurrent(layer, inputs, arguments):
    if getattr(layer, "stateful", False):
        return "it is stateful: a row begins where a row of the batch before ended"
    cell = getattr(layer, "cell", None)
    if type(layer) is layers.RNN:
        cells = cell.cells if type(cell) is layers.StackedRNNCells else [cell]
        for each in cells:
            if type(each) not in _CELLS:
                return f"nothing is known of its cell, a {type(each).__name__}"
    return None


def _codes(layer, inputs, arguments):
    if getattr(layer, "output_mode", "int") not in ("int", "one_hot") and _rank(inputs[0]) < 2:
        return "it takes an input of rank 1 for a single row"
    return None


def _text(layer, inputs, arguments):
    if callable(layer._standardize) or callable(layer._split):
        return "nothing is known of its functions"
    # Else the longest text of the batch says how long all are.
    if layer._output_mode == "int" and layer._output_sequence_length is None:
        return "the longest text of the batch sets the length of all; give output_sequence_length"
    return None


_ROW_BY_ROW = (
    "Activation AveragePooling1D AveragePooling2D AveragePooling3D "
    "AdaptiveAveragePooling1D AdaptiveAveragePooling2D AdaptiveAveragePooling3D "
    "AdaptiveMaxPooling1D AdaptiveMaxPooling2D AdaptiveMaxPooling3D AlphaDropout Conv1D Conv2D "
    "Conv3D Conv1DTranspose Conv2DTranspose Conv3DTranspose Cropping1D Cropping2D Cropping3D Dense "
    "DepthwiseConv1D DepthwiseConv2D Dropout ELU Embedding Flatten GaussianDropout GaussianNoise "
    "GlobalAveragePooling1D GlobalAveragePooling2D GlobalAveragePooling3D GlobalMaxPooling1D "
    "GlobalMaxPooling2D GlobalMaxPooling3D Identity LeakyReLU MaxPooling1D MaxPooling2D "
    "MaxPooling3D PReLU Permute ReLU RepeatVector Reshape "
    "ReversibleEmbedding SeparableConv1D SeparableConv2D SpatialDropout1D SpatialDropout2D "
    "SpatialDropout3D UpSampling1D UpSampling2D UpSampling3D ZeroPadding1D ZeroPadding2D "
    "ZeroPadding3D "
)

#: `{class of layer: rule}`, for exactly these classes.
LAYERS = {
    **_from(layers, _ROW_BY_ROW, _within),
    **_from(
        layers,
        "Concatenate GroupNormalization LayerNormalization RMSNormalization UnitNormalization",
        _axis_of,
    ),
    **_from(layers, "SimpleRNN GRU LSTM RNN ConvLSTM1D ConvLSTM2D ConvLSTM3D", _recurrent),
    **_from(
        layers,
        "CenterCrop RandomBrightness RandomContrast RandomCrop RandomFlip RandomRotation "
        "RandomTranslation RandomZoom Resizing",
        _rank_at_least(4),
    ),
    **_from(layers, "CategoryEncoding Discretization Hashing IntegerLookup StringLookup", _codes),
    **_from(layers, "Attention AdditiveAttention", _sequences),
    **_from(layers, "Masking", _rank_at_least(2)),
    **_from(layers, "Add Average Maximum Minimum Multiply Subtract", _merge),
    layers.Rescaling: _rescaling,
    layers.BatchNormalization: _batch_normalization,
    layers.Dot: _dot_layer,
    layers.EinsumDense: _einsum_dense,
    layers.Normalization: _adapted,
    layers.Softmax: _softmax,
    layers.TextVectorization: _text,
}

#: Layers of Keras that are followed into, to what they call.
FOLLOWED = (
    keras.Model,
    keras.Sequential,
    Functional,
    layers.Bidirectional,
    layers.GroupQueryAttention,
    layers.MultiHeadAttention,
)

#: Layers that act on the last axes only, and so may be given one more axis in front.
LAST_AXES = (layers.Dense, layers.Embedding)


_ALONG_LAST = ("glu", "log_softmax", "softmax", "sparsemax")
_ELEMENTWISE = [
    function
    for name, function in vars(keras.activations).items()
    if inspect.isfunction(function)
    and name not in (*_ALONG_LAST, "deserialize", "get", "serialize")
]


def activations(layer):
    """The functions that a layer or its cells apply to tensors of the shape of its result, but for
    those of Keras that act on each entry by itself.
    """
    cell = getattr(layer, "cell", None)
    for owner in (layer, cell, *getattr(cell, "cells", ())):
        for name, value in vars(owner).items() if owner is not None else ():
            if "activation" in name and callable(value) and value not in _ELEMENTWISE:
                yield value


def named(layer, args, kwargs):
    """The first argument of a layer's call, and the others by their names."""
    bound = dict(layer._call_signature.bind(*args, **kwargs).arguments)
    first = bound.pop(next(iter(bound), None), None)
    bound.update(bound.pop("kwargs", {}))
    return first, bound
