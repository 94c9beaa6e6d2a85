"""Activations: elementwise, sorting, reflecting, normalising."""

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

for name, make in {
    "MaxMin": layers.MaxMin,
    "FullSort": layers.FullSort,
    "Householder": layers.Householder,
    "Householder(random)": lambda: layers.Householder(keras.initializers.RandomUniform(-9, 9)),
}.items():
    for shape in [(2,), (6,), (3, 2), (2, 2, 4)]:
        CASES.append(Case(f"{name}: {shape}", make, shape, (*BOTH, "theta")))

for slopes in (0.0, 0.3, -0.9, 1.7):
    for shape, shared in [((4,), None), ((3, 2), None), ((3, 2), 1), ((2, 3, 2), (1, 2))]:
        CASES.append(
            Case(
                f"PReLU: {slopes}, {shape}, shared_axes={shared}",
                lambda slopes=slopes, shared=shared: K.PReLU(
                    keras.initializers.Constant(slopes), shared_axes=shared
                ),
                shape,
                ("alpha", "input") if len(shape) < 3 else ("input",),
                slow=slopes == -0.9,
            )
        )

for radius in (0.1, 3.0, 1000.0):
    for axis, shape in [(-1, (5,)), (1, (3, 2)), (-1, (3, 2)), ((1, 2), (2, 3))]:
        CASES.append(
            Case(
                f"Softmax: axis={axis}, {shape}, ‖x‖ ≤ {radius}",
                lambda axis=axis: K.Softmax(axis=axis),
                shape,
                ("output",) if radius == 1000.0 else (),
                options={"input_bound": radius},
                slow=radius == 0.1,
            )
        )
# Two equal entries have the Jacobian of norm ½.
CASES.append(Case("Softmax: (2,)", K.Softmax, (2,), ("input",)))
