"""What a step reads of a batch, whatever the rows hold.

A row that is not finite, or so long that its squares overflow, would make NaN of a layer in front
of the first ball. Zero times NaN is NaN: no clip of the loss gradient would keep it out of the sum
over the batch. So rows are made readable before the network sees them, each by itself.
"""

from typing import Any

import keras
from keras import ops

from lipdp.bounds.walk import LONGEST_INPUT
from lipdp.inputs import input_names

__all__ = ["readable_inputs"]


def readable_inputs(network: keras.Model, x: Any) -> tuple[Any, Any]:
    """The inputs of a batch in the types that the network reads, with rows that no layer in front
    of the first bound makes infinite.

    A row that is not finite in float32 becomes zeros. One that is longer than `LONGEST_INPUT` is
    scaled to it; a `BallProjection` makes the same of both.

    Args:
        network: whose inputs they are.
        x: `(batch, ...)`, for several inputs a dict by their names.

    Returns:
        The inputs; and `(batch,)` float32, 1 for a row that is finite in all of them, and 0 for
        another, whose loss gradient is to count as zero.

    >>> import math
    >>> network = keras.Sequential([keras.Input((2,)), keras.layers.RMSNormalization()])
    >>> x, finite = readable_inputs(network, ops.array([[1.0, 2.0], [math.nan, 2.0]]))
    >>> x.tolist() if hasattr(x, "tolist") else x.numpy().tolist()
    [[1.0, 2.0], [0.0, 0.0]]
    >>> [float(v) for v in finite]
    [1.0, 0.0]
    """
    if not isinstance(x, dict):
        return _readable(x, network.inputs[0].dtype)
    named = zip(input_names(network), network.inputs, strict=True)
    rows = {name: _readable(x[name], tensor.dtype) for name, tensor in named}
    finite = 1.0
    for _, whole in rows.values():
        finite = finite * whole
    return {name: values for name, (values, _) in rows.items()}, finite


def _readable(x, dtype):
    if "float" not in dtype:
        x = ops.cast(x, dtype)
        return x, ops.ones((ops.shape(x)[0],), "float32")
    x = ops.cast(ops.cast(x, dtype), "float32")
    axes = tuple(range(1, len(x.shape)))
    # Nearly always all rows are readable as they are, and one pass tells.
    plain = ops.sum(ops.square(x), axis=axes, keepdims=True) < LONGEST_INPUT**2

    def careful():
        finite = ops.all(ops.isfinite(x), axis=axes, keepdims=True)
        rows = ops.where(finite, x, 0.0)
        # Divided by its largest entry first, a row's squares do not overflow.
        largest = ops.maximum(ops.max(ops.abs(rows), axis=axes, keepdims=True), 1.0)
        unit = rows / largest
        root = ops.sqrt(ops.sum(ops.square(unit), axis=axes, keepdims=True))
        short = unit * (LONGEST_INPUT / ops.maximum(root, 1.0))
        return ops.where(plain, x, short), ops.cast(ops.logical_or(plain, finite), "float32")

    rows, finite = ops.cond(ops.all(plain), lambda: (x, ops.ones_like(plain, "float32")), careful)
    return rows, ops.reshape(finite, (-1,))
