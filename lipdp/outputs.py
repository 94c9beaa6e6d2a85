"""Several outputs of a network: side by side as one, which is what is trained, and apart again."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import keras
from keras import ops, tree

from lipdp.inputs import input_tensors

__all__ = ["Outputs", "side_by_side"]


@dataclasses.dataclass(frozen=True)
class Outputs:
    """The outputs of a network that has several.

    Attributes:
        names: the keys of `keras.Model(inputs, {"key": output, ...})`, and otherwise the names of
            the layers that make them, in the order in which Keras lists the outputs.
        shapes: of each output, for one example.
        keyed: whether the network gives a dict.

    >>> outputs = Outputs(("a", "b"), ((2,), (1,)))
    >>> {name: z.shape[1] for name, z in outputs.apart(ops.zeros((5, 3))).items()}
    {'a': 2, 'b': 1}
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    keyed: bool = False

    def apart(self, joined: Any) -> dict[str, Any]:
        """Each output, `(batch, *shape)`, from all of them side by side, `(batch, sizes)`."""
        found, start = {}, 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            size = math.prod(shape)
            found[name] = ops.reshape(joined[:, start : start + size], (-1, *shape))
            start += size
        return found

    def named(self, values: Any, argument: str) -> dict[str, Any]:
        """What was given for each output, by their names.

        Args:
            values: a dict by the names of the outputs, or a list or tuple in their order.
            argument: how the caller calls it.

        Raises:
            ValueError: others are named, or it is neither.

        >>> Outputs(("a", "b"), ((2,), (1,))).named([1, 2], "y")
        {'a': 1, 'b': 2}
        """
        in_order = isinstance(values, (list, tuple)) and not self.keyed
        if in_order and len(values) == len(self.names):
            return dict(zip(self.names, values, strict=True))
        if not isinstance(values, Mapping) or set(values) != set(self.names):
            came = list(values) if isinstance(values, Mapping) else type(values).__name__
            came += f" of {len(values)}" if in_order else ""
            raise ValueError(
                f"`{argument}` must hold one for each output of the network, as a dict by their "
                f"names {list(self.names)}{'' if self.keyed else ' or a list in their order'}; "
                f"got {came}."
            )
        return {name: values[name] for name in self.names}

    def as_given(self, values: Mapping[str, Any]) -> Any:
        """Values by name, in the structure that the network gives."""
        return dict(values) if self.keyed else [values[name] for name in self.names]


def side_by_side(network: keras.Model) -> tuple[keras.Model, Outputs | None]:
    """A network with one output, `(batch, sizes)`, in which all outputs of a network are side by
    side; it shares all weights. And what these are. A network with one output is left alone.

    The gradient of a loss of all outputs has one norm then, and a bound or a clip of it holds for
    whatever share of it comes to each.

    Args:
        network: a functional model.

    Raises:
        ValueError: an output whose size is not known, or which has only the axis of the batch;
            outputs that share a name; or a single one in a dict.

    >>> x = keras.Input((3,))
    >>> network = keras.Model(x, {"a": keras.layers.Dense(2)(x), "b": keras.layers.Dense(4)(x)})
    >>> joined, outputs = side_by_side(network)
    >>> joined.output_shape, outputs.names, outputs.shapes
    ((None, 6), ('a', 'b'), ((2,), (4,)))
    """
    struct, tensors = getattr(network, "_outputs_struct", None), network.outputs
    keyed = isinstance(struct, Mapping)
    if len(tensors) < 2:
        if keyed:
            raise ValueError(
                f"Network {network.name!r} gives a dict with a single output, {list(struct)}. Take "
                "the output by itself: keras.Model(network.inputs, network.outputs[0])."
            )
        return network, None
    if keyed:
        names = tree.flatten({key: key for key in struct})
    else:
        names = [t._keras_history.operation.name for t in tensors]
    if len(tree.flatten(struct)) != len(struct) or len(set(names)) < len(tensors):
        raise ValueError(
            f"The outputs of network {network.name!r} must have a name each, in one list or one "
            f"dict; got {names}. Say keras.Model(inputs, {{'name': output, ...}})."
        )
    for name, tensor in zip(names, tensors, strict=True):
        if len(tensor.shape) < 2 or None in tensor.shape[1:]:
            raise ValueError(
                f"Each output must have a known size for an example, (batch, 1) say; {name!r} of "
                f"network {network.name!r} has the shape {tuple(tensor.shape)}."
            )
    # In float32, whatever the policy of the day: losses are computed so.
    flatten, join = keras.layers.Flatten(dtype="float32"), keras.layers.Concatenate(dtype="float32")
    # All or none: Keras orders layers by their distance from the end, and this leaves the order.
    flat = tensors if all(len(t.shape) == 2 for t in tensors) else [flatten(t) for t in tensors]
    joined = keras.Model(input_tensors(network), join(flat), name=network.name)
    if list(map(id, joined.weights)) != list(map(id, network.weights)):
        raise ValueError(
            f"The layers of network {network.name!r} cannot be put in one order. Join its outputs: "
            "keras.layers.Concatenate()([a, b])."
        )
    shapes = tuple(tuple(tensor.shape[1:]) for tensor in tensors)
    return joined, Outputs(tuple(names), shapes, keyed)
