"""Learned scales."""

from typing import Any

import keras

from accountants.validation import check_number
from lipdp.bounds import Call, Rule, lipschitz
from lipdp.bounds.projections import EntryBall
from lipdp.bounds.rule import entry_norm
from lipdp.layers.projected import Projected


@keras.saving.register_keras_serializable("lipdp")
class ChannelGain(Projected, keras.layers.Layer):
    """Multiplies each channel by a learned gain `γ` with `max |γ| ≤ gain`.

    Output at most `gain·X`, cotangent at most `gain·G`. Each gain's gradient is the inner product
    of input and cotangent of its channel, so by Cauchy-Schwarz, in the channel and over the
    channels, the gradient is at most `X·G`, whatever the number of positions. The gains are
    clipped after each update.

    Args:
        gain: the largest absolute value of a gain.
        **kwargs: `name`, `dtype`, `trainable`.

    Input and output shape: `(batch, ..., channels)`. The gains start at `min(1, gain)`.

    Raises:
        ValueError: `gain` is not positive and finite.

    >>> [float(v) for v in ChannelGain(0.5)(keras.ops.array([[1.0, -4.0]]))[0]]
    [0.5, -2.0]
    """

    def __init__(self, gain: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.gain = check_number(gain, "gain")
        self._ball = EntryBall(gain)

    def build(self, input_shape):
        self.gamma = self.add_weight(
            name="gamma", shape=input_shape[-1:], initializer="ones", constraint=self._ball
        )
        super().build(input_shape)

    def call(self, x):
        return x * self.gamma

    def compute_output_shape(self, input_shape):
        return input_shape

    def bound(self, call: Call) -> Rule:
        return lipschitz(entry_norm(self.gamma), gradients=lambda x, g: [(self.gamma, x * g)])

    def get_config(self) -> dict:
        return {**super().get_config(), "gain": self.gain}
