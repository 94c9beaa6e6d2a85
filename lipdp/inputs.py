"""The inputs of a network: their names, and the structure that it is called on."""

from collections.abc import Mapping
from typing import Any

import keras
from keras import tree

__all__ = ["input_names", "input_tensors", "like_inputs"]


def input_tensors(network: keras.Model) -> Any:
    """The inputs of a functional or Sequential model, in the structure that it is called on."""
    return (getattr(network, "_functional", None) or network)._inputs_struct


def input_names(network: keras.Model) -> list[str]:
    """The names under which data holds the inputs, in the order of `network.inputs`: the keys of
    `keras.Model({"key": input, ...})`, and otherwise the names of the inputs.

    >>> a, b = keras.Input((2,), name="a"), keras.Input((3,), name="b")
    >>> output = keras.layers.Concatenate()([a, b])
    >>> input_names(keras.Model([a, b], output)), input_names(keras.Model({"u": a, "v": b}, output))
    (['a', 'b'], ['u', 'v'])
    """
    struct = input_tensors(network)
    if not isinstance(struct, Mapping):
        return [tensor.name for tensor in network.inputs]
    names = {id(tensor): key for key, tensor in struct.items()}
    if not set(names) >= set(map(id, network.inputs)):
        raise ValueError(
            f"The inputs of network {network.name!r} are nested. Make it with one list, or one "
            "dict, of inputs."
        )
    return [names[id(tensor)] for tensor in network.inputs]


def like_inputs(network: keras.Model, values: list) -> Any:
    """Values in the order of `network.inputs`, in the structure that it is called on."""
    return tree.pack_sequence_as(input_tensors(network), values)
