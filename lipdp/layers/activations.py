"""Activations that keep norms."""

import math
from typing import Any

import keras
from keras import ops

from accountants.validation import check_integer
from lipdp.bounds import Call, Rule, lipschitz


@keras.saving.register_keras_serializable("lipdp")
class GroupSort(keras.layers.Layer):
    """Sorts each group of `n` channels (Anil, Lucas & Grosse, ICML 2019); MaxMin for `n = 2`.

    A permutation of the entries, so norms of inputs and cotangents stay: output at most `X`,
    cotangent at most `G`. Group `j` holds the channels `j, j + C/n, j + 2·C/n, ...`: contiguous
    blocks are compared, which costs two passes over the map.

    Also where entries tie the backward pass is a permutation; `maximum` and `minimum` would
    send both cotangents to the same entry.

    Args:
        n: size of a group; must divide the channels.

    Input and output shape: `(batch, ..., channels)`.

    Raises:
        ValueError: `n` does not divide the channels.

    >>> [float(v) for v in GroupSort(2)(ops.array([[1.0, 5.0, 3.0, 2.0]]))[0]]
    [3.0, 5.0, 1.0, 2.0]
    """

    def __init__(self, n: int = 2, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.n = check_integer(n, "n", least=2)
        self.supports_masking = True

    def build(self, input_shape):
        if input_shape[-1] % self.n:
            raise ValueError(
                f"GroupSort(n={self.n}) needs a number of channels that {self.n} divides; got "
                f"{input_shape[-1]}."
            )

    def call(self, x):
        channels = x.shape[-1]
        if self.n == 2:
            # Slices would be padded one by one in TensorFlow's backward pass.
            first, second = ops.split(x, 2, axis=-1)
            # One mask serves both: the cotangents are swapped or not, ties included.
            excess = ops.relu(second - first)
            return ops.concatenate([first + excess, second - excess], axis=-1)
        shape = (-1, *x.shape[1:-1], self.n, channels // self.n)
        ordered = ops.flip(ops.sort(ops.reshape(x, shape), axis=-2), axis=-2)
        return ops.reshape(ordered, (-1, *x.shape[1:]))

    def compute_output_shape(self, input_shape):
        return input_shape

    def bound(self, call: Call) -> Rule:
        return lipschitz()

    def get_config(self) -> dict:
        return {**super().get_config(), "n": self.n}


@keras.saving.register_keras_serializable("lipdp")
class MaxMin(GroupSort):
    """`GroupSort(2)`: the larger and the smaller of each pair of channels, `C/2` apart.

    Input and output shape: `(batch, ..., channels)`, with an even number of channels.

    >>> [float(v) for v in MaxMin()(ops.array([[1.0, 5.0, 3.0, 2.0]]))[0]]
    [3.0, 5.0, 1.0, 2.0]
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(2, **kwargs)

    def bound(self, call: Call) -> Rule:
        return lipschitz()

    def get_config(self) -> dict:
        config = super().get_config()
        del config["n"]
        return config


@keras.saving.register_keras_serializable("lipdp")
class FullSort(keras.layers.Layer):
    """Sorts all channels, largest first: a permutation, so output at most `X`, cotangent at most
    `G`.

    Input and output shape: `(batch, ..., channels)`.

    >>> [float(v) for v in FullSort()(ops.array([[1.0, 5.0, 3.0, 2.0]]))[0]]
    [5.0, 3.0, 2.0, 1.0]
    """

    def build(self, input_shape):
        if len(input_shape) < 2:
            raise ValueError(
                "FullSort needs an axis in addition to the batch axis; got an "
                f"input of shape {tuple(input_shape)}."
            )

    def call(self, x):
        return ops.flip(ops.sort(x, axis=-1), axis=-1)

    def compute_output_shape(self, input_shape):
        return input_shape

    def bound(self, call: Call) -> Rule:
        return lipschitz()


@keras.saving.register_keras_serializable("lipdp")
class Householder(keras.layers.Layer):
    """Reflects each pair of channels that lies on the wrong side of a trained line (Singla,
    Singla & Feizi, "Improved deterministic l2 robustness on CIFAR-10 and CIFAR-100", ICLR 2022).

    With `v = (sin θ/2, −cos θ/2)` a pair becomes `z + 2·v·relu(−v·z)`: itself or its mirror image
    `[[cos θ, sin θ], [sin θ, −cos θ]]·z`, both isometries, and one mask decides for value and
    cotangent: output at most `X`, cotangent at most `G`. Also the derivative of that matrix in
    `θ` is an isometry (the half angle turns `v` at half the speed, and `v` enters twice), so the
    angles' gradient is at most `X·G`: Cauchy-Schwarz over the positions that share an angle.
    At the initial `θ = π/2` it is `MaxMin`.

    Args:
        theta_initializer: a Keras initializer of the angles, one for each pair.

    Input and output shape: `(batch, ..., channels)`, with an even number of channels. Pairs are
    `C/2` channels apart.

    Raises:
        ValueError: the number of channels is odd.

    >>> y = Householder()(ops.array([[1.0, 5.0, 3.0, 2.0]]))
    >>> [round(float(v), 4) for v in y[0]]
    [3.0, 5.0, 1.0, 2.0]
    """

    def __init__(
        self,
        theta_initializer: str | keras.initializers.Initializer | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if theta_initializer is None:
            theta_initializer = keras.initializers.Constant(math.pi / 2)
        self.theta_initializer = keras.initializers.get(theta_initializer)

    def build(self, input_shape):
        if len(input_shape) < 2 or input_shape[-1] % 2:
            raise ValueError(
                f"Householder needs an even number of channels; got an input of shape "
                f"{tuple(input_shape)}."
            )
        self.theta = self.add_weight(
            shape=(input_shape[-1] // 2,), initializer=self.theta_initializer, name="theta"
        )

    def call(self, x):
        first, second = ops.split(x, 2, axis=-1)
        sine, cosine = ops.sin(self.theta / 2), ops.cos(self.theta / 2)
        beyond = 2.0 * ops.relu(cosine * second - sine * first)
        return ops.concatenate([first + sine * beyond, second - cosine * beyond], axis=-1)

    def compute_output_shape(self, input_shape):
        return input_shape

    def bound(self, call: Call) -> Rule:
        return lipschitz(gradients=lambda x, g: [(self.theta, x * g)])

    def get_config(self) -> dict:
        return {
            **super().get_config(),
            "theta_initializer": keras.initializers.serialize(self.theta_initializer),
        }
