"""What a compiled step has baked in, as a value that can be compared before each step is paid for.

A step is traced once, or once for each shape of a batch, and what Python attributes say at that
moment becomes a constant of the program: the radius of a ball, a gain, a clip, which weights are
trained. If one changes later, a part that is traced anew would follow and the rest would not, and
the noise would belong to another bound than the gradients do.
"""

import dataclasses
from typing import Any

import keras
import numpy as np

from lipdp import losses

__all__ = ["changed_settings", "settings_of"]

_VALUES_OF_MODEL = (
    "allocation",
    "clip",
    "examples_per_group",
    "jit_compile",
    "max_sample_weight",
    "physical_batch_size",
    "run_eagerly",
    "steps_per_execution",
    "unit",
)
# Each is what it was made as, or looks after its own state.
_PARTS_OF_MODEL = ("augmentation", "network", "noise", "optimizer", "private_loss", "sampling")
# Keras' own bookkeeping; what it says changes whenever a layer is called, saved or exported.
_KEPT_BY_KERAS = frozenset(vars(keras.layers.Layer())) | {"built"}
_KEPT_BY_MODELS = frozenset(vars(keras.Model())) | {"history", "optimizer", "stop_training"}
_VALUES = (bool, int, str, bytes, type(None))
_PRIVATE_VALUES = (bool, int, float, str, np.generic)  # of attributes that begin with an underscore
_LIBRARIES = ("jax", "keras", "numpy", "tensorflow")
_LARGEST = 4096  # entries of an array that is compared by value
_DEEPEST = 4  # objects within objects


@dataclasses.dataclass(frozen=True, eq=False)
class _Itself:
    """Stands for an object that is compared by identity, and keeps it alive: an identity that is
    free may be given to another.
    """

    thing: Any

    def __eq__(self, other):
        return isinstance(other, _Itself) and self.thing is other.thing

    __hash__ = None


def settings_of(model: Any) -> dict[str, Any]:
    """The settings of a `PrivateModel` and of its network, by the name of what has them.

    Numbers, names and small arrays are kept by value, within containers and plain objects, too;
    everything else by its identity: another function, constraint or variable is a change.
    """
    network = model.network
    layers = list(network._flatten_layers())
    found = {name: _plain(getattr(model, name)) for name in _VALUES_OF_MODEL}
    found |= {name: _Itself(getattr(model, name)) for name in _PARTS_OF_MODEL}
    found = {f"`{name}` of PrivateModel": value for name, value in found.items()}
    trained = tuple(v.path for v in network.trainable_variables)
    # A layer without trainable weights may follow the batch, or not, as it says: normalisation.
    found["`trainable`"] = trained, tuple(layer.trainable for layer in layers)
    found["layers of the network"] = [_Itself(layer) for layer in layers]
    # Of a layer without weights too: one that normalises by the batch when it is trained.
    found["`trainable` of the layers"] = [layer.trainable for layer in layers]
    found["`dtype_policy` of the layers"] = [layer.dtype_policy.name for layer in layers]
    found["weights of the network"] = [_Itself(v) for v in network.weights]
    if keras.backend.backend() == "tensorflow":  # elsewhere each step makes new values
        found["memory of the weights"] = [_Itself(v.value) for v in network.weights]
    if model.augmentation is not None:
        layers += [model.augmentation, *model.augmentation.layers]
    for number, layer in enumerate(layers):
        if not type(layer).__module__.startswith("keras.src.models."):
            found[f"layer {number}, {layer.name!r}"] = _attributes(layer)
    for variable in network.variables:
        constraint = getattr(variable, "constraint", None)
        if constraint is not None:
            found[f"constraint of {variable.path!r}"] = {
                "itself": _Itself(constraint),
                **_attributes(constraint),
            }
    found["loss"] = _of_loss(model.private_loss)
    if isinstance(model.private_loss, losses.Joint):
        for name, loss, *_ in model.private_loss.parts():
            found[f"loss of output {name!r}"] = _of_loss(loss)
    return found


def changed_settings(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The names of what has other settings now, with those of the attributes.

    >>> changed_settings({"`clip`": 1.0, "loss": {"gamma": 2}}, {"`clip`": 1.0, "loss": {}})
    ['loss (gamma)']
    """
    found = []
    for name in before | after:
        old, new = before.get(name), after.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            # An attribute that is new was not there to be read; loading gives layers some.
            attributes = [key for key in old if key not in new or old[key] != new[key]]
            attributes += [key for key in new if key not in old and key.startswith("class ")]
            if attributes:
                found.append(f"{name} ({', '.join(attributes)})")
        elif old != new:
            found.append(name)
    return found


def _of_loss(loss):
    """Its attributes; Keras keeps those of a function that a loss wraps by themselves."""
    return {**_attributes(loss), "arguments": _plain(getattr(loss, "_fn_kwargs", None))}


def _attributes(thing, depth=0):
    """Its attributes; of those that begin with an underscore only plain values, since Keras tracks
    its own in the others. One that hides an attribute of the class is marked.
    """
    found = {}
    for name, value in getattr(thing, "__dict__", {}).items():
        if name in (_KEPT_BY_MODELS if isinstance(thing, keras.Model) else _KEPT_BY_KERAS):
            continue
        if not name.startswith("_") or isinstance(value, _PRIVATE_VALUES):
            hides = hasattr(type(thing), name)
            found[f"class {name}" if hides else name] = _plain(value, depth)
    return found


def _plain(value, depth=0):
    if isinstance(value, _VALUES):
        return value
    if isinstance(value, (float, np.generic)):
        return repr(value)  # NaN is as good as NaN
    if isinstance(value, (tuple, list)):
        return tuple(_plain(v, depth) for v in value)
    if isinstance(value, dict):
        return tuple((key, _plain(v, depth)) for key, v in value.items())
    if isinstance(value, np.ndarray) and value.size <= _LARGEST:
        return value.dtype.str, value.shape, value.tobytes()
    library = type(value).__module__.partition(".")[0] in _LIBRARIES
    if (
        library
        or callable(value)
        or isinstance(value, (keras.Variable, keras.Model))
        or depth == _DEEPEST
    ):
        return _Itself(value)
    return _Itself(value), tuple(_attributes(value, depth + 1).items())
