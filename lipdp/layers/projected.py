"""Base classes of layers with projected weights."""

from typing import Any

import keras

from accountants.validation import check_number
from lipdp.bounds.projections import NormBall, project


class Projected(keras.layers.Layer):
    """Mixin, before a Keras layer: its weights lie in their sets from the start.

    A subclass sets `kernel_constraint` and the like after `super().__init__`, or hands
    `constraint=` to `add_weight`; they are its own business, neither arguments nor saved.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = sorted(name for name in kwargs if name.endswith("_constraint"))
        if given:
            raise TypeError(
                f"{type(self).__name__} chooses the sets of its weights itself; got `{given[0]}`."
            )
        super().__init__(*args, **kwargs)

    def build(self, input_shape):
        super().build(input_shape)
        project(self.weights)  # initializers know nothing of the sets

    def get_config(self) -> dict:
        config = super().get_config()
        return {k: v for k, v in config.items() if not k.endswith("_constraint")}


class WithBias(Projected):
    """The same with a bias in a ball, whose radius is `bias_norm`."""

    def __init__(
        self, *args: Any, use_bias: bool = True, bias_norm: float = 1.0, **kwargs: Any
    ) -> None:
        super().__init__(*args, use_bias=use_bias, **kwargs)
        self.bias_norm = check_number(bias_norm, "bias_norm")
        self.bias_constraint = NormBall(bias_norm) if use_bias else None

    def get_config(self) -> dict:
        return {**super().get_config(), "bias_norm": self.bias_norm}
