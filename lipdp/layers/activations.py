"""Activations that keep norms."""

from typing import Any

import keras
from keras import ops

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
        if not isinstance(n, int) or n < 2:
            raise ValueError(f"`n` must be an integer of at least 2; got {n!r}.")
        self.n = n
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
            half = channels // 2
            first, second = x[..., :half], x[..., half:]
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
