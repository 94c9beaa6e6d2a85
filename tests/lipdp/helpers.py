"""Small networks and data for the tests."""

import keras
import numpy as np
import pytest

import lipdp
from lipdp import layers

EAGERLY = keras.backend.backend() == "tensorflow"


def one_in(count, values):
    """Values of a parameter, of which JAX, where each is compiled anew, gets one in so many: as far
    as the others differ, no backend changes it.
    """
    return [
        v if i % count == 0 else pytest.param(v, marks=pytest.mark.any_backend)
        for i, v in enumerate(values)
    ]


def dense_network(inputs=6, classes=3, hidden=8, radius=1.0, use_bias=True):
    return keras.Sequential(
        [
            keras.Input((inputs,)),
            layers.BallProjection(radius),
            layers.SpectralDense(hidden, use_bias=use_bias),
            layers.GroupSort(),
            layers.SpectralDense(classes, use_bias=use_bias),
        ]
    )


def conv_network():
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.BallProjection(2.0),
            layers.SpectralConv2D(4, 3, padding="same"),
            layers.GroupSort(),
            layers.L2NormPooling2D(2),
            layers.ClipGradient(1.0),
            keras.layers.Flatten(),
            layers.SpectralDense(3),
        ]
    )


def data(examples=64, shape=(6,), classes=3, seed=0):
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(examples, *shape)).astype("float32")
    return x, generator.integers(0, classes, examples)


def private(
    network=None,
    loss="sparse_categorical_crossentropy",
    optimizer=None,
    run_eagerly=EAGERLY,
    compile=None,
    **kwargs,
):
    """A compiled PrivateModel; Poisson batches of 16 and noise 1 unless told otherwise.

    On TensorFlow steps run eagerly, which saves seconds of tracing for each model; on JAX it is
    compiling that is faster. `compile` holds further arguments of that method.
    """
    kwargs.setdefault("sampling", lipdp.PoissonSampling(16))
    if "budget" not in kwargs:
        kwargs.setdefault("noise_multiplier", 1.0)
    model = lipdp.PrivateModel(network or dense_network(), **kwargs)
    optimizer = keras.optimizers.SGD(0.5) if optimizer is None else optimizer
    arguments = {"metrics": ["accuracy"], "run_eagerly": run_eagerly, **(compile or {})}
    model.compile(optimizer, loss=loss, **arguments)
    return model


def weights(model):
    return [np.array(v) for v in model.network.get_weights()]


class AddsLoss(keras.layers.Layer):
    def call(self, x):
        self.add_loss(keras.ops.sum(x))
        return x

    def bound(self, call):
        return lipdp.bounds.lipschitz()


class Rounded(keras.dtype_policies.DTypePolicy):
    """Computes in float32 on weights that are kept with fewer bits."""

    variable_dtype = "float16"
