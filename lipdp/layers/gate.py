"""Trained mixtures of branches."""

from typing import Any

import keras
from keras import ops

from lipdp.bounds import Call, Rule


@keras.saving.register_keras_serializable("lipdp")
class Gate(keras.layers.Layer):
    """Convex combination `a·x + (1 − a)·y` of two branches with a trained `a = sigmoid(w)`; of a
    residual block, `Gate()([x, block(x)])`, which is no more than 1-Lipschitz if the block is.

    One `w` for all entries, or one for each channel. Output at most `max(a)·X + max(1 − a)·Y`,
    cotangents at most `max(a)·G` and `max(1 − a)·G`, with the present `a`; the gradient of `w` is
    `a(1 − a)·Σ(x − y)g`, summed over the entries that share it: at most `max a(1 − a)·(X + Y)·G`
    by Cauchy-Schwarz.

    Args:
        per_channel: one `w` for each entry of the last axis.
        gate_initializer: a Keras initializer of `w`; zeros weigh both branches by a half.

    Input shape: two of `(batch, ..., channels)`. Output shape: the same.

    Raises:
        ValueError: the input is not two tensors of one shape.

    >>> y = Gate()([ops.array([[1.0, 2.0]]), ops.array([[3.0, 0.0]])])
    >>> [float(v) for v in y[0]]
    [2.0, 1.0]
    """

    def __init__(
        self,
        per_channel: bool = False,
        gate_initializer: str | keras.initializers.Initializer = "zeros",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.per_channel = bool(per_channel)
        self.gate_initializer = keras.initializers.get(gate_initializer)

    def build(self, input_shape):
        several = isinstance(input_shape, (list, tuple)) and isinstance(
            input_shape[0], (list, tuple)
        )
        if not several or len(input_shape) != 2 or tuple(input_shape[0]) != tuple(input_shape[1]):
            raise ValueError(f"Gate needs two inputs of one shape; got {input_shape}.")
        if len(input_shape[0]) < 2:
            raise ValueError(
                f"Gate needs an axis in addition to the batch axis; got {input_shape}."
            )
        self.gate = self.add_weight(
            shape=input_shape[0][-1:] if self.per_channel else (1,),
            initializer=self.gate_initializer,
            name="gate",
        )

    def call(self, inputs):
        x, y = inputs
        a = ops.sigmoid(self.gate)
        return a * x + (1.0 - a) * y

    def compute_output_shape(self, input_shape):
        return input_shape[0]

    def bound(self, call: Call) -> Rule:
        a = ops.sigmoid(self.gate)
        first, second, slope = (ops.max(v) for v in (a, 1.0 - a, a * (1.0 - a)))
        return Rule(
            forward=lambda xs: first * xs[0] + second * xs[1],
            backward=lambda xs, g: [first * g, second * g],
            gradients=lambda xs, g: [(self.gate, slope * (xs[0] + xs[1]) * g)],
        )

    def get_config(self) -> dict:
        return {
            **super().get_config(),
            "per_channel": self.per_channel,
            "gate_initializer": keras.initializers.serialize(self.gate_initializer),
        }
