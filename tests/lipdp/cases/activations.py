"""Activations: elementwise, sorting."""

import keras

from lipdp import layers
from lipdp.bounds.builtin.activations import ACTIVATIONS
from tests.lipdp.cases.case import BOTH, Case

K = keras.layers
CASES = []

# The norm of the input at which the extreme slope lies inside the ball. Where it is not named
# the offset and the slope are not attained together.
TIGHT_AT = {
    "linear": 1.0,
    "relu": 1.0,
    "relu6": 1.0,
    "leaky_relu": 1.0,
    "elu": 1.0,
    "tanh": 0.05,
    "hard_tanh": 1.0,
    "softsign": 0.05,
}
for function in sorted(ACTIVATIONS, key=lambda f: f.__name__):
    for radius in (0.05, 1.0, 20.0):
        name = function.__name__
        CASES.append(
            Case(
                f"Activation({name}): ‖x‖ ≤ {radius}",
                lambda function=function: K.Activation(function),
                (6,),
                tight=("output",) if TIGHT_AT.get(name) == radius else (),
                options={"input_bound": radius},
            )
        )

for arguments in [
    {},
    {"max_value": 0.3},
    {"negative_slope": 0.5},
    {"negative_slope": 1.7},
]:
    for shape in [(5,), (2, 3)]:
        CASES.append(
            Case(
                f"ReLU: {arguments}, {shape}",
                lambda arguments=arguments: K.ReLU(**arguments),
                shape,
                tight=("input",),
            )
        )
for cls, values in {K.LeakyReLU: (0.3, 2.0), K.ELU: (0.7, 1.9)}.items():
    for value in values:
        CASES.append(
            Case(
                f"{cls.__name__}: {value}",
                lambda cls=cls, value=value: cls(value),
                (5,),
                tight=("input",),
            )
        )

for n, channels in [(2, 2), (2, 6), (3, 6), (4, 4), (6, 6)]:
    for shape in [(), (3,), (2, 2)]:
        CASES.append(
            Case(
                f"GroupSort: n={n}, {(*shape, channels)}",
                lambda n=n: layers.GroupSort(n),
                (*shape, channels),
                tight=BOTH,
            )
        )
