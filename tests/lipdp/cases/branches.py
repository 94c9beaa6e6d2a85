"""What joins branches, and operations of the functional style."""

import keras
import numpy as np
from keras import ops

from lipdp import layers
from tests.lipdp.cases.case import Case

K = keras.layers
CASES = []

for cls, arguments, shapes in [
    (K.Add, {}, [(3,), (3,)]),
    (K.Add, {}, [(2, 3), (2, 1)]),
    (K.Add, {}, [(3,), (2, 3)]),
    (K.Add, {}, [(3,), (3,), (3,)]),
    (K.Subtract, {}, [(3,), (3,)]),
    (K.Average, {}, [(3,), (3,), (3,)]),
    (K.Average, {}, [(2, 3), (1, 3)]),
    (K.Maximum, {}, [(3,), (3,)]),
    (K.Maximum, {}, [(2, 3), (2, 1)]),
    (K.Minimum, {}, [(3,), (3,), (3,)]),
    (K.Concatenate, {}, [(3,), (2,)]),
    (K.Concatenate, {"axis": 1}, [(3, 2), (1, 2)]),
    (K.Multiply, {}, [(3,), (3,)]),
    (K.Multiply, {}, [(3,), (3,), (3,)]),
    (K.Multiply, {}, [(2, 3), (2, 1)]),
    (K.Multiply, {}, [(1, 3), (2, 1)]),
    (K.Multiply, {}, [(3,), (2, 3)]),
    (K.Dot, {"axes": 1}, [(3,), (3,)]),
    (K.Dot, {"axes": (2, 1)}, [(2, 3), (3, 2)]),
    (K.Dot, {"axes": (1, 1)}, [(3, 2), (3,)]),
]:
    tight = ("input", "input_1")
    CASES.append(
        Case(
            f"{cls.__name__}: {shapes}",
            lambda cls=cls, arguments=arguments: cls(**arguments),
            shapes,
            # Where a factor is broadcast, only a cotangent that follows the other attains it.
            ()
            if cls in (K.Multiply, K.Dot) and len({*shapes}) > 1
            else tight
            if cls in (K.Maximum, K.Minimum)
            else (*tight, "output"),
            options={"steps": 8},
        )
    )

CONSTANT = np.array([1.0, -2.0, 0.5], "float32")
OPERATIONS = {
    "x + x": lambda x: x + x,
    "x * x": lambda x: x * x,
    "x + 1": lambda x: x + 1.0,
    "1 - x": lambda x: 1.0 - x,
    "x + c": lambda x: x + CONSTANT,
    "x * c": lambda x: x * CONSTANT,
    "x / c": lambda x: x / CONSTANT,
    "-x": lambda x: -x,
    "abs": lambda x: ops.abs(x),
    "relu": ops.relu,
    "relu6": ops.relu6,
    "tanh": ops.tanh,
    "softsign": ops.softsign,
    "sigmoid": ops.sigmoid,
    "reshape": lambda x: ops.reshape(x, (-1, 3, 2)),
    "x[:, 1:]": lambda x: x[:, 1:],
    "x[:, 0]": lambda x: x[:, 0],
    "x[..., ::2]": lambda x: x[..., ::2],
    "x[:, None]": lambda x: x[:, None],
    "x[:, [1]] by take": lambda x: ops.take(x, [1, 0, 1], axis=1),
    "take, matrix of indices": lambda x: ops.take(x, [[0, -1], [2, 2]], axis=-1),
    "transpose": lambda x: ops.transpose(x, (0, 2, 1)),
    "swapaxes": lambda x: ops.swapaxes(x, 1, -1),
    "moveaxis": lambda x: ops.moveaxis(x, 1, 2),
    "flip": lambda x: ops.flip(x, axis=1),
    "roll": lambda x: ops.roll(x, 1, axis=-1),
    "sort": lambda x: ops.sort(x, axis=1),
    "expand_dims": lambda x: ops.squeeze(ops.expand_dims(x, -1), axis=3),
    "pad": lambda x: ops.pad(x, ((0, 0), (1, 2), (0, 0))),
    "repeat": lambda x: ops.repeat(x, 3, axis=1),
    "tile": lambda x: ops.tile(x, (1, 2, 3)),
    "cast": lambda x: ops.cast(x, "float32"),
    "stop_gradient": lambda x: x * ops.stop_gradient(x),
    "space_to_depth": lambda x: ops.space_to_depth(ops.reshape(x, (-1, 2, 3, 1))[:, :, :2], 2),
    "concatenate": lambda x: ops.concatenate([x, 2.0 * x], axis=-1),
    "stack": lambda x: ops.stack([x, ops.abs(x)], axis=1),
    "sum": lambda x: ops.sum(x, axis=(1, 2), keepdims=True),
    "sum of one axis": lambda x: ops.sum(x, axis=1),
    "mean": lambda x: ops.mean(x, axis=-1),
    "x - mean": lambda x: x - ops.mean(x, axis=1, keepdims=True),
    "max": lambda x: ops.max(x, axis=1),
    "min": lambda x: ops.min(x, axis=(1, 2), keepdims=True),
    "amax": lambda x: ops.amax(x, axis=2),
    "logsumexp": lambda x: ops.logsumexp(x, axis=1),
    "resize": lambda x: ops.image.resize(ops.reshape(x, (-1, 2, 3, 1)), (4, 2)),
    "maximum(x, c)": lambda x: ops.maximum(x, 0.3),
    "maximum(c, x)": lambda x: ops.maximum(CONSTANT, x),
    "minimum(x, c)": lambda x: ops.minimum(x, CONSTANT),
    "maximum(x, -x)": lambda x: ops.maximum(x, -x),
    "minimum(x, relu)": lambda x: ops.minimum(x, ops.relu(x)),
    "clip": lambda x: ops.clip(x, -0.2, 0.4),
    "clip above zero": lambda x: ops.clip(x, 0.2, 0.4),
    "clip below zero": lambda x: ops.clip(x, -0.4, -0.2),
    "clip the wrong way": lambda x: ops.clip(x, 0.4, -0.2),
    "square": ops.square,
    "x ** 3": lambda x: x**3,
    "x ** 1": lambda x: x**1,
    "x @ c": lambda x: x @ np.array([[1.0, 2.0], [0.0, -1.0], [3.0, 1.0]], "float32"),
    "c @ x": lambda x: ops.matmul(np.array([[1.0, 2.0], [0.0, -1.0]], "float32"), x),
    "x @ x.T": lambda x: x @ ops.transpose(x, (0, 2, 1)),
    "where": lambda x: ops.where(x > 0.1, x, 0.5),
    "where, constant mask": lambda x: ops.where(CONSTANT > 0, x, ops.relu(x)),
    "where, three tensors": lambda x: ops.where(ops.abs(x) > 0.1, 2.0 * x, -x[:, :1]),
    "softplus": ops.softplus,
    "silu": ops.silu,
    "gelu": ops.gelu,
    "gelu, exact": lambda x: ops.gelu(x, approximate=False),
    "selu": ops.selu,
    "elu": lambda x: ops.elu(x, alpha=1.5),
    "celu": lambda x: ops.celu(x, alpha=0.5),
    "leaky_relu": lambda x: ops.leaky_relu(x, negative_slope=-0.4),
    "relu with a slope": lambda x: keras.activations.relu(x, negative_slope=0.4, max_value=0.5),
    "log_sigmoid": ops.log_sigmoid,
    "hard_sigmoid": ops.hard_sigmoid,
    "hard_silu": ops.hard_silu,
    "hard_tanh": ops.hard_tanh,
    "tanh_shrink": ops.tanh_shrink,
    "soft_shrink": lambda x: ops.soft_shrink(x, 0.2),
    "sparse_plus": ops.sparse_plus,
    "squareplus": lambda x: ops.squareplus(x, b=2),
    "sin": ops.sin,
    "cos": ops.cos,
    "arctan": ops.arctan,
    "erf": ops.erf,
    "softmax": lambda x: ops.softmax(x, axis=1),
    "log_softmax": lambda x: ops.log_softmax(x, axis=-1),
    "x * sigmoid(x)": lambda x: x * ops.sigmoid(x),
    "gate": lambda x: ops.sigmoid(x[:, :, :1]) * x,
    "x + relu(x)": lambda x: x + ops.relu(x),
    "x - tanh(x)": lambda x: x - ops.tanh(x),
    "broadcast": lambda x: ops.add(x, K.Cropping1D((0, 1))(x)),
}


def _network(operation):
    x = keras.Input((2, 3))
    return keras.Model(x, operation(x))


for name, operation in OPERATIONS.items():
    for radius in (0.5, 3.0):
        CASES.append(
            Case(
                f"operation {name}: ‖x‖ ≤ {radius}",
                lambda operation=operation: _network(operation),
                options={"input_bound": radius},
            )
        )


for per_channel in (False, True):
    for start in (0.0, -2.0, 5.0):
        CASES.append(
            Case(
                f"Gate: {start}, per_channel={per_channel}",
                lambda p=per_channel, s=start: layers.Gate(p, keras.initializers.Constant(s)),
                [(2, 3), (2, 3)],
                ("gate", "input", "input_1"),
                options={"steps": 8},
            )
        )
