"""What joins branches, and operations of the functional style."""

import keras
import numpy as np
from keras import ops

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
]:
    tight = ("input", "input_1")
    CASES.append(
        Case(
            f"{cls.__name__}: {shapes}",
            lambda cls=cls, arguments=arguments: cls(**arguments),
            shapes,
            tight if cls in (K.Maximum, K.Minimum) else (*tight, "output"),
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
