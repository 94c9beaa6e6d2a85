"""Trains small models on several devices, in processes of their own: `test_devices` starts them.

`python -m tests.lipdp.training.devices KIND FOLDER CASE...` writes what each case came to into the
folder.
Devices are made before anything else runs, so that no test can do it in its own process.
"""

import contextlib
import json
import os
import pathlib
import sys
import time

import keras
import numpy as np

import lipdp
import lipdp.data.batches
import lipdp.training.steps
from tests.lipdp.helpers import conv_network, data, dense_network

SEED = 7
REPLICAS = 3  # a number that divides neither batches nor a key


def wide_network(hidden=8):
    """Its kernels can be cut in two by their columns."""
    return dense_network(classes=4, hidden=hidden)


def clipped_network(hidden=8):
    """Its layers clip their own gradients; the dropout drops nothing."""
    return keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(hidden, activation="tanh"),
            keras.layers.Dropout(1e-9),
            keras.layers.LayerNormalization(),
            keras.layers.Dense(3),
        ]
    )


def two_outputs():
    x = keras.Input((6,))
    z = keras.layers.Dense(8, activation="tanh")(x)
    return keras.Model(
        x,
        {
            "classes": keras.layers.Dense(3, name="classes")(z),
            "again": keras.layers.Dense(3, name="again")(z),
        },
    )


def cases():
    """By name, the arguments of a model, and what else is out of the ordinary."""
    poisson = {"sampling": lipdp.PoissonSampling(16)}
    return {
        "poisson": poisson,
        "loop": poisson | {"loop": True},
        "tiny": {
            "sampling": lipdp.PoissonSampling(1),
            "epochs": 1,
        },  # shards and whole batches are empty
        "conv": poisson | {"network": conv_network, "shape": (8, 8, 1)},
        "adaptive": poisson | {"clip": lipdp.AdaptiveClip(0.5), "physical_batch_size": 3},
        "per layer": poisson
        | {
            "network": clipped_network,
            "clip": lipdp.PerLayerClip(initial=0.5),
            "physical_batch_size": 3,
        },
        "per layer, whole": poisson | {"network": clipped_network, "clip": lipdp.PerLayerClip()},
        "outputs": poisson
        | {"network": two_outputs, "clip": lipdp.PerLayerClip(), "weights": True, "outputs": True},
        "shuffled": {"sampling": lipdp.ShuffledEpochs(13), "weights": True},
        "stream": {"sampling": lipdp.ShuffledEpochs(13), "streamed": True},
        "augmented": poisson
        | {"augmentation": lipdp.Augmentation(keras.layers.GaussianNoise(0.0), views=2)},
        "clipnorm": poisson | {"optimizer": {"global_clipnorm": 0.1}},
        "accumulated": poisson | {"optimizer": {"gradient_accumulation_steps": 2}},
        "ema": poisson | {"optimizer": {"use_ema": True, "ema_momentum": 0.5}},
        "straggler": poisson,
        "banded": {
            "noise": lipdp.BandedNoise(),
            "sampling": lipdp.CyclicPoisson(8, bands=3),
            "physical_batch_size": 2,
        },
        "toeplitz": {
            "noise": lipdp.ToeplitzNoise(),
            "sampling": lipdp.FixedEpochs(16, epochs=5),
            "network": clipped_network,
            "clip": lipdp.PerLayerClip(threshold=0.5),
        },
        "validated": poisson | {"validated": True},
        "together": poisson | {"compile": {"steps_per_execution": 2}},
        "plain": poisson | {"compile": {"jit_compile": False}},
        "unseeded": poisson | {"seed": None},
        "long": poisson | {"epochs": 100_000},
        "resumed": poisson | {"epochs": 2},
        "wide": poisson | {"network": wide_network},
        "noise": {"noisy": True},
        "compiled noise": {"noisy": True, "compile": {"jit_compile": True}},
        "secure noise": {
            "noisy": True,
            "noise": "secure",
            "seed": None,
            "physical_batch_size": 8,  # whose pieces share one draw
        },
        "wide secure noise": {
            "noisy": True,
            "network": wide_network,
            "noise": "secure",
            "seed": None,
        },
    }


def train(name, scope=contextlib.nullcontext, ledger=None, callbacks=(), checkpoint=None):
    """Trains the model of a case; returns it and the last logs."""
    options = {"seed": SEED, **cases()[name]}
    noisy, loop = options.pop("noisy", False), options.pop("loop", False)
    shape = options.pop("shape", (6,))
    compile = options.pop("compile", {})
    optimizer = options.pop("optimizer", {})
    network = options.pop("network", dense_network)
    weighted = options.pop("weights", False)
    validated, streamed = options.pop("validated", False), options.pop("streamed", False)
    several = options.pop("outputs", False)
    keras.utils.set_random_seed(1)
    x, y = data(64, shape)
    loss = "sparse_categorical_crossentropy"
    if several:
        y, loss = {"classes": y, "again": (y + 1) % 3}, {"classes": loss, "again": loss}
    fit = {"epochs": options.pop("epochs", 5)}
    if noisy:
        # Kernels get no gradient from zeros: one step of length 1 is their noise.
        x, options["sampling"] = np.zeros_like(x), lipdp.FullBatch()
        fit = {"epochs": 1}
    if weighted:
        fit["sample_weight"] = np.linspace(0.0, 2.0, 64)
        compile = {"max_sample_weight": 2.0}
    if streamed:
        import tensorflow as tf

        x, y = tf.data.Dataset.from_tensor_slices((x, y)), None
    if validated:
        fit |= {"validation_data": (x[:48], y[:48]), "validation_batch_size": 12}
    with scope():
        model = lipdp.PrivateModel(
            network(**({"hidden": 256} if noisy else {})),
            noise_multiplier=1.0,
            ledger=ledger,
            **options,
        )
        if noisy:
            for variable in model.network.trainable_variables:
                variable.constraint = None
            optimizer = keras.optimizers.SGD(1.0)
        elif loop:
            optimizer = keras.optimizers.Adam(0.05)
        else:  # by which a sum that is added up too often shows, as by Adam it does not
            optimizer = keras.optimizers.SGD(0.5, momentum=0.5, **optimizer)
        metrics = {"classes": ["accuracy"]} if several else ["accuracy"]
        model.compile(optimizer, loss, metrics=metrics, **compile)
    if checkpoint is not None and checkpoint.exists():
        with np.load(checkpoint) as arrays:
            model.network.set_weights([arrays[key] for key in arrays])
    before = [np.array(w) for w in model.network.get_weights()]
    if loop:
        for batch in model.batches(x, y, **fit):
            logs = model.train_on_batch(batch, return_dict=True)
    else:
        history = model.fit(x, y, verbose=0, callbacks=list(callbacks), **fit).history
        logs = {key: values[-1] for key, values in history.items()}
    for copies in map(copies_of, model.network.trainable_variables):
        assert all((copy == copies[0]).all() for copy in copies), "replicas differ"
    if noisy:
        logs["std"] = float(np.std(model.network.get_weights()[0] - before[0]))
    return model, {key: float(value) for key, value in logs.items()}


def copies_of(variable):
    """What each device of this process holds of a weight."""
    value = variable.value
    if keras.backend.backend() == "jax":
        shards = value.addressable_shards
        if shards[0].data.shape != value.shape:
            return [np.asarray(value)]
        return [np.asarray(shard.data) for shard in shards]
    return [copy.numpy() for copy in getattr(value, "values", [value])]


def write(folder, name, model, logs, process=0):
    folder = pathlib.Path(folder)
    np.savez(folder / f"{name}-{process}.npz", *model.network.get_weights())
    told = logs | {"steps": model.spent(1e-5).steps, "replicas": model.devices.replicas}
    (folder / f"{name}-{process}.json").write_text(json.dumps(told))


def scope_of(kind):
    """Makes the devices; returns the scope for models, and the number of this process."""
    if kind == "one":
        return contextlib.nullcontext, 0
    if kind in ("mirrored", "workers"):
        import tensorflow as tf

        count = REPLICAS if kind == "mirrored" else 1
        tf.config.set_logical_device_configuration(
            tf.config.list_physical_devices("CPU")[0],
            [tf.config.LogicalDeviceConfiguration()] * count,
        )
        if kind == "mirrored":
            names = [f"CPU:{i}" for i in range(REPLICAS)]
            return tf.distribute.MirroredStrategy(names).scope, 0
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
        return strategy.scope, strategy.cluster_resolver.task_id
    import jax

    process = 0
    if kind == "processes":
        process = int(os.environ["PROCESS"])
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            os.environ["COORDINATOR"], 2, process, heartbeat_timeout_seconds=30
        )
    if kind == "sharded":
        names = [f"cpu:{i}" for i in range(4)]
        mesh = keras.distribution.DeviceMesh((2, 2), ("batch", "model"), names)
        layouts = keras.distribution.LayoutMap(mesh)
        layouts[".*kernel"] = (None, "model")
        distribution = keras.distribution.ModelParallel(layout_map=layouts, batch_dim_name="batch")
    else:
        distribution = keras.distribution.DataParallel()
    keras.distribution.set_distribution(distribution)
    return contextlib.nullcontext, process


class Late(keras.callbacks.Callback):
    """Has the others wait."""

    def on_train_batch_begin(self, batch, logs=None):
        time.sleep(0.2)


class Released(keras.callbacks.Callback):
    """Writes down each step, and the chief the weights of each epoch; goes on from the last."""

    def __init__(self, folder, process):
        super().__init__()
        self.folder, self.process = pathlib.Path(folder), process

    def on_train_batch_end(self, batch, logs=None):
        with open(self.folder / f"released-{self.process}", "ab") as file:
            file.write(b"x")

    def on_epoch_end(self, epoch, logs=None):
        if self.process == 0:
            np.savez(self.folder / "partial.npz", *self.model.network.get_weights())
            os.replace(self.folder / "partial.npz", self.folder / "checkpoint.npz")


def mutate(name):
    """Plausible mistakes, which the tests must catch."""
    backend = lipdp.training.steps.backend()
    if name == "own noise":  # drawn by each replica, in its own stream
        import tensorflow as tf

        add = lipdp.noise.GaussianNoise.add

        def added(noise, backend, features, sums, stds):
            number = tf.distribute.get_replica_context().replica_id_in_sync_group
            own = features["key"] + tf.cast(number, features["key"].dtype)
            return add(noise, backend, features | {"key": own}, sums, stds)

        lipdp.noise.GaussianNoise.add = added
        backend.on_first_replica = lambda updates: [u / REPLICAS for u in updates]
    elif name == "every update":  # each replica's, noise and all, and the optimizer adds them up
        backend.on_first_replica = lambda updates: updates
    elif name == "noise of parts":  # before the sums are added up
        backend.sum_over_replicas, backend.on_first_replica = (
            (lambda sums: sums),
            (lambda updates: updates),
        )
    elif name == "same rows":
        lipdp.data.batches.DrawnBatch.parts = lambda batch, number, first=True: [batch] * number
    else:
        raise ValueError(name)


def main(kind, folder, *names):
    scope, process = scope_of(kind)
    if "MUTANT" in os.environ:
        mutate(os.environ["MUTANT"])
    for name in names:
        options = {"callbacks": [Late()]} if name == "straggler" and process == 1 else {}
        if name in ("long", "resumed"):
            # Only the chief can write here: others never open it.
            ledger = pathlib.Path(folder, "ledger" if process == 0 else "nowhere/ledger")
            options = {"ledger": ledger, "callbacks": [Released(folder, process)]}
            options["checkpoint"] = pathlib.Path(folder, "checkpoint.npz")
        write(folder, name, *train(name, scope, **options), process)


if __name__ == "__main__":
    main(*sys.argv[1:])
