"""A recurrent layer with bounds."""

import math
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from accountants.validation import check_integer, check_number
from lipdp.bounds import Call, Rule
from lipdp.bounds.builtin.activations import ACTIVATIONS
from lipdp.bounds.projections import NormBall, SpectralBall
from lipdp.bounds.rule import matrix_norm, minimum, size, vector_norm
from lipdp.layers.projected import Projected


@keras.saving.register_keras_serializable("lipdp")
class LipschitzRNN(Projected):
    """Recurrent layer `h_t = φ(W·h_{t−1} + U·x_t + b)` from `h_0 = 0`, with `s([W U]) ≤ 1`.

    One matrix maps state and input together, so `‖h_t‖² ≤ ‖h_{t−1}‖² + ‖x_t‖²` and a cotangent is
    likewise shared out between the state before and the input: neither grows with the number `T`
    of steps. With `β = bias_norm` (0 without a bias):

    - last state: output at most `X + T·β`, cotangent at most `G`, gradients at most
      `(√((T−1)² + T)·X + T(T−1)/2·β)·G` (kernel) and `T·G` (bias).
    - all states: cotangent at most `√T·G`; of the output and the gradients the coefficients of
      `X`, `β` and `G` are the norms `√(Σ c_t²)` of those above at all `t` from 1 to `T`.

    Proof idea: a cotangent of state `s` gives `‖d_t‖ ≤ ‖g_s‖` at all `t ≤ s`. The kernel's
    gradient `Σ_t d_t·[h_{t−1} x_t]ᵀ` has a part of the states, at most `Σ_{t≥2} (X + (t−1)β)·G`,
    and one of the inputs, at most `Σ_t ‖x_t‖·G ≤ √T·X·G`. Cauchy-Schwarz sums over `s`. Long
    sequences cost noise, a bias even more. Where a mask hides a step the state stays as it is,
    which only shortens the sums. The steps are unrolled, so that compiling takes time in
    proportion to them.

    Args:
        units: size of the state.
        activation: `φ`, a Keras activation with Lipschitz constant 1 that is 0 at 0.
        use_bias: whether a bias is added.
        bias_norm: radius of the ball of the bias.
        return_sequences: give the states of all steps, not the last one.
        kernel_initializer: a Keras initializer; its result is projected.

    Input shape: `(batch, steps, features)`, all but the batch known. Output shape:
    `(batch, units)`, or `(batch, steps, units)`.

    Raises:
        ValueError: an activation that is something else, or an input of another rank.

    >>> LipschitzRNN(4)(ops.ones((2, 5, 3))).shape == (2, 4)
    True
    """

    def __init__(
        self,
        units: int,
        activation: str | Callable | None = "tanh",
        use_bias: bool = True,
        bias_norm: float = 1.0,
        return_sequences: bool = False,
        kernel_initializer: str | keras.initializers.Initializer = "orthogonal",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.units = check_integer(units, "units")
        self.activation = keras.activations.get(activation)
        if ACTIVATIONS.get(self.activation) != (1.0, 0.0):
            known = sorted(f.__name__ for f, rule in ACTIVATIONS.items() if rule == (1.0, 0.0))
            raise ValueError(
                "`activation` must have Lipschitz constant 1 and be 0 at 0, as "
                f"{', '.join(known)}; got {activation!r}."
            )
        self.use_bias = bool(use_bias)
        self.bias_norm = check_number(bias_norm, "bias_norm")
        self.bias_ball = NormBall(bias_norm)
        self.return_sequences = bool(return_sequences)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.supports_masking = True

    def build(self, input_shape):
        if len(input_shape) != 3:
            raise ValueError(
                "LipschitzRNN takes (batch, steps, features); got an input of shape "
                f"{tuple(input_shape)}."
            )
        self.kernel = self.add_weight(
            shape=(self.units + input_shape[-1], self.units),
            initializer=self.kernel_initializer,
            constraint=SpectralBall(1.0),
            name="kernel",
        )
        if self.use_bias:
            self.bias = self.add_weight(
                shape=(self.units,), initializer="zeros", constraint=self.bias_ball, name="bias"
            )
        super().build(input_shape)

    def call(self, x, mask=None):
        # What comes from the inputs does so for all steps at once.
        given = ops.matmul(x, self.kernel[self.units :])
        if self.use_bias:
            given = given + self.bias
        recurrent = self.kernel[: self.units]
        state = ops.zeros_like(given[:, 0])
        states = []
        # Unrolled: XLA has no gradient of the loop that ops.scan is on TensorFlow.
        for t in range(x.shape[1]):
            new = self.activation(ops.matmul(state, recurrent) + given[:, t])
            state = new if mask is None else ops.where(mask[:, t, None], new, state)
            states.append(state)
        return ops.stack(states, axis=1) if self.return_sequences else state

    def compute_mask(self, x, mask=None):
        return mask if self.return_sequences else None

    def compute_output_shape(self, input_shape):
        steps = input_shape[1:2] if self.return_sequences else ()
        return (input_shape[0], *steps, self.units)

    def bound(self, call: Call) -> Rule:
        steps = size(call.input_shape[:1])
        # Without its projection the kernel may be larger than 1, once more at each step.
        growth = (1.0 / minimum(1.0, 1.0 / matrix_norm(self.kernel))) ** steps
        beta = vector_norm(self.bias) if self.use_bias else 0.0

        def over_states(count):
            """`count(t)` at the last step, or the norm of all of them."""
            if not self.return_sequences:
                return float(count(steps))
            return math.sqrt(sum(count(t) ** 2 for t in range(1, steps + 1)))

        one, biases = over_states(lambda t: 1), over_states(lambda t: t)
        reads = over_states(lambda t: math.sqrt((t - 1) ** 2 + t))
        reads_of_biases = over_states(lambda t: t * (t - 1) / 2)

        def gradients(x, g):
            pairs = [(self.kernel, growth * (reads * x + reads_of_biases * beta) * g)]
            if self.use_bias:
                pairs.append((self.bias, growth * biases * g))
            return pairs

        return Rule(
            forward=lambda xs: growth * (one * xs[0] + biases * beta),
            backward=lambda xs, g: [growth * one * g],
            gradients=lambda xs, g: gradients(xs[0], g),
            note=f"the kernel is used at {steps} steps",
            masks=True,
        )

    def get_config(self) -> dict:
        return {
            **super().get_config(),
            "units": self.units,
            "activation": keras.activations.serialize(self.activation),
            "use_bias": self.use_bias,
            "bias_norm": self.bias_norm,
            "return_sequences": self.return_sequences,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
        }
