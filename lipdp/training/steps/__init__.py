"""The train step, one short file for each Keras backend: only these files import a backend."""

import importlib

import keras

_MODULES = {
    "tensorflow": "lipdp.training.steps.tensorflow_step",
    "jax": "lipdp.training.steps.jax_step",
}


def backend():
    """The module of the Keras backend in use.

    Raises:
        RuntimeError: there is none for it.
    """
    name = keras.backend.backend()
    if name not in _MODULES:
        raise RuntimeError(
            f"lipdp trains on the Keras backends {', '.join(_MODULES)}; KERAS_BACKEND is {name!r}."
        )
    return importlib.import_module(_MODULES[name])
