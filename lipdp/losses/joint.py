"""The loss of several outputs."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from accountants.validation import check_number
from lipdp.outputs import Outputs

__all__ = ["Joint"]


class Joint:
    """The loss of a network whose outputs stand side by side: the sum of what each output costs.

    The functions of `lipdp.losses` take it as they take a loss of one output; what they take for
    each example, targets or shapes, is then a dict by the names of the outputs.

    Args:
        outputs: of the network.
        losses: a loss for each output, by name.
        weights: what each is multiplied by, by name: public constants; 1 where None.

    Raises:
        TypeError, ValueError: a weight is no finite number of at least 0, or all are 0.
    """

    name = "joint"

    def __init__(
        self,
        outputs: Outputs,
        losses: Mapping[str, Any],
        weights: Mapping[str, float] | None = None,
    ) -> None:
        weights = dict.fromkeys(outputs.names, 1.0) if weights is None else weights
        self.outputs, self.losses = outputs, dict(losses)
        self.weights = {
            name: check_number(weight, f"loss_weights[{name!r}]", zero=True)
            for name, weight in weights.items()
        }
        if not any(self.weights.values()):
            raise ValueError("`loss_weights` must not all be 0: nothing would be learnt.")

    def parts(self) -> Iterator[tuple[str, Any, tuple[int, ...], float]]:
        """Of each output its name, its loss, its shape for one example, and its weight."""
        for name, shape in zip(self.outputs.names, self.outputs.shapes, strict=True):
            yield name, self.losses[name], shape, self.weights[name]

    def bound(self, bounds: Mapping[str, float]) -> float:
        """Bound of the norm of the gradient with respect to all outputs: that of output `k` is at
        most `w_k·G_k` long, and side by side they are `√Σ(w_k·G_k)²`.

        Args:
            bounds: `G_k` by name, infinite where it is not known.

        >>> outputs = Outputs(("a", "b"), ((2,), (1,)))
        >>> joint = Joint(outputs, {"a": "mae", "b": "mae"}, {"a": 3.0, "b": 2.0})
        >>> joint.bound({"a": 1.0, "b": 2.0})
        5.0
        """
        return math.hypot(*(w * bounds[name] for name, w in self.weights.items() if w))
