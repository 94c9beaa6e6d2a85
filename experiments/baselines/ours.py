"""Steps of lipdp, and plain ones of the same layers, on the backend that KERAS_BACKEND names.

Methods: `private`; `secure`, with noise="secure"; `plain`, the same layers without projections;
`relu`, the plain step with ReLU and maximum pooling; `per_layer`, that network trained privately,
each of its layers with a threshold.
"""

import functools

import keras

import lipdp
from experiments import record
from experiments.baselines import networks, worker
from lipdp import layers, models


def network_of(name):
    if name == "convnet":
        # Two convolutions, two poolings, dense layers of 1,024 and 10: 1.6 million weights.
        return keras.Sequential(
            [
                keras.Input(worker.SHAPES[name]),
                layers.BallProjection(1.0),
                layers.SpectralConv2D(16, 3, padding="same", use_bias=False),
                layers.GroupSort(),
                layers.L2NormPooling2D(2),
                layers.SpectralConv2D(32, 3, padding="same", use_bias=False),
                layers.GroupSort(),
                layers.L2NormPooling2D(2),
                keras.layers.Flatten(),
                layers.SpectralDense(1024, use_bias=False),
                layers.GroupSort(),
                layers.SpectralDense(10, use_bias=False),
            ]
        )
    if name == "vgg5":
        return models.vgg(worker.SHAPES[name], 10, depth=5)
    if name == "mlp":
        return models.mlp(worker.SHAPES[name], 10, width=1024, depth=4)
    if name == "mixer":
        return models.mixer(worker.SHAPES[name], 10)
    return models.mlp(worker.SHAPES[name], 10, depth=1)


def build(method, name, batch_size):
    optimizer = keras.optimizers.SGD(0.05, momentum=0.9)
    made = record.provenance()
    about = {"commit": made["commit"], **made["versions"]}
    x, y = worker.examples(name, batch_size)
    if method in ("private", "secure", "per_layer"):
        per_layer = method == "per_layer"
        model = lipdp.PrivateModel(
            keras.Model(*networks.layers_of(name, keras)) if per_layer else network_of(name),
            noise_multiplier=1.0,
            clip=lipdp.PerLayerClip() if per_layer else None,
            sampling=lipdp.PoissonSampling(batch_size),
            noise="secure" if method == "secure" else "gaussian",
        )
        model.compile(optimizer, loss="sparse_categorical_crossentropy", metrics=["accuracy"])
        fit = functools.partial(model.fit, x, y, epochs=worker.EPOCHS)
        return worker.fitting(keras, fit), about
    if method == "relu":
        network = keras.Model(*networks.layers_of(name, keras))
    else:
        network = network_of(name)
        for variable in network.trainable_variables:
            variable.constraint = None
    # The faster of Keras' two ways on this backend, as PrivateModel chooses too.
    from lipdp.training import steps

    network.compile(
        optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=steps.backend().default_jit_compile(),
    )
    fit = functools.partial(network.fit, x, y, batch_size=batch_size, epochs=worker.EPOCHS)
    return worker.fitting(keras, fit), about


if __name__ == "__main__":
    worker.serve(build)
