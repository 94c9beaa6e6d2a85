"""What a compiled step has baked in, as a value that can be compared before each step is paid for.

A step is traced once, or once for each shape of a batch, and what Python attributes say at that
moment becomes a constant of the program: the radius of a ball, a gain, a clip, which weights are
trained. If one changes later, a part that is traced anew would follow and the rest would not, and
the noise would belong to another bound than the gradients do.
"""

from typing import Any

import keras

__all__ = ["changed_settings", "settings_of"]

_OF_MODEL = (
    "allocation",
    "augmentation",
    "clip",
    "max_sample_weight",
    "network",
    "noise",
    "optimizer",
    "physical_batch_size",
    "private_loss",
    "sampling",
)
_VALUES = (bool, int, float, str, bytes, type(None))


def settings_of(model: Any) -> dict[str, Any]:
    """The settings of a `PrivateModel` and of its network, by the name of what has them.

    Plain values are kept as they are, everything else by its identity: to put another function,
    constraint or variable in its place is a change.
    """
    network = model.network
    found = {f"`{name}` of PrivateModel": _plain(getattr(model, name)) for name in _OF_MODEL}
    found["`trainable`"] = tuple(v.path for v in network.trainable_variables)
    if model.augmentation is not None:
        for layer in (model.augmentation, *model.augmentation.layers):
            found[f"augmentation layer {layer.name!r}"] = _attributes(layer)
    for layer in network._flatten_layers():
        found[f"layer {layer.path!r}"] = _attributes(layer)
    for variable in network.variables:
        constraint = getattr(variable, "constraint", None)
        if constraint is not None:
            found[f"constraint of {variable.path!r}"] = {
                "itself": id(constraint),
                **_attributes(constraint),
            }
    found["loss"] = _attributes(model.private_loss)
    return found


def changed_settings(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The names of what has other settings now. Attributes that are new are none: loading and
    exporting give layers some, and no program that was compiled before has read them.

    >>> changed_settings({"`clip`": 1.0, "loss": 0}, {"`clip`": 2.0, "loss": 0})
    ['`clip`']
    """
    return [name for name, value in before.items() if _changed(value, after.get(name))]


def _changed(before, after):
    if not isinstance(before, dict) or not isinstance(after, dict):
        return before != after
    return any(name not in after or after[name] != value for name, value in before.items())


def _attributes(thing):
    """Its attributes, but whether it is built; of those that begin with an underscore only plain
    numbers, since Keras keeps its own state in the others.
    """
    return {
        name: _plain(value)
        for name, value in vars(thing).items()
        if value is not None
        and name != "built"
        and (not name.startswith("_") or type(value) is float)
    }


def _plain(value):
    if isinstance(value, _VALUES):
        return value
    if isinstance(value, (tuple, list)):
        return tuple(map(_plain, value))
    if isinstance(value, dict):
        return tuple((key, _plain(v)) for key, v in value.items())
    if isinstance(value, keras.Variable):
        return value.path
    return id(value)
