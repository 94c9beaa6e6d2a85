"""The private step, and the backends it runs on."""

import functools
import importlib

import keras

from lipdp.training.steps.backend import Backend

__all__ = ["Backend", "backend"]

_BACKENDS = {
    "tensorflow": ("lipdp.training.steps.tensorflow_step", "TensorFlowBackend"),
    "jax": ("lipdp.training.steps.jax_step", "JaxBackend"),
}


@functools.cache
def backend() -> Backend:
    """The Keras backend in use.

    Raises:
        RuntimeError: lipdp does not train on it.
    """
    name = keras.backend.backend()
    if name not in _BACKENDS:
        raise RuntimeError(
            f"lipdp trains on the Keras backends {', '.join(_BACKENDS)}; KERAS_BACKEND is {name!r}."
        )
    module, kind = _BACKENDS[name]
    return getattr(importlib.import_module(module), kind)()
