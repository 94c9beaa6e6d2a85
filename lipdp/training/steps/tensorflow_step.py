"""The private step on TensorFlow."""

import functools

import keras
import numpy as np
import tensorflow as tf

from lipdp.data.batches import KerasBatches
from lipdp.devices import SINGLE_DEVICE, Devices
from lipdp.training import steps
from lipdp.training.steps.private_step import private_step


def pull_back(network, x):
    """Outputs of the network in training mode, and `cotangent -> gradients of its weights`."""
    variables = network.trainable_variables
    with tf.GradientTape() as tape:
        outputs = network(x, training=True)

    def pull(cotangent):
        gradients = tape.gradient(
            outputs,
            [v.value for v in variables],
            output_gradients=cotangent,
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        # Embeddings give slices of the rows that occur, of unknown number; noise goes onto all.
        pairs = zip(gradients, variables, strict=True)
        return [tf.ensure_shape(tf.convert_to_tensor(g), v.shape) for g, v in pairs]

    return outputs, pull


def accumulate(part, arrays, size):
    """`part` of `size` rows at a time: sums are added up, what has a row an example is joined."""
    pieces = tf.shape(arrays[-1])[0] // size

    def piece(i):
        return part(*tf.nest.map_structure(lambda a: a[i * size : (i + 1) * size], arrays))

    added, joined = piece(0)
    arrays_of = [tf.TensorArray(r.dtype, pieces, infer_shape=False) for r in joined]
    rows = [a.write(0, r) for a, r in zip(arrays_of, joined, strict=True)]

    def body(i, sums, rows):
        added, joined = piece(i)
        sums = [a + b for a, b in zip(sums, added, strict=True)]
        return i + 1, sums, [a.write(i, r) for a, r in zip(rows, joined, strict=True)]

    # One piece after the other: in parallel they would need the memory of the whole batch.
    _, sums, rows = tf.while_loop(
        lambda i, sums, rows: i < pieces, body, [1, added, rows], parallel_iterations=1
    )
    whole = [
        tf.ensure_shape(r.concat(), (None, *j.shape[1:])) for r, j in zip(rows, joined, strict=True)
    ]
    return sums, tuple(whole)


@functools.cache
def compiled(function):
    """The function through XLA, which fuses its small products."""
    return tf.function(function, jit_compile=True, autograph=False)


def sum_over_replicas(sums):
    """Sums over the rows of all replicas, the same on each of them."""
    replica = _replica()
    return sums if replica is None or not sums else replica.all_reduce("SUM", sums)


def on_first_replica(updates):
    """What each replica is to hand to the optimizer, which adds up what all of them hand in: the
    first one the updates, the others zeros. Nothing is rounded or clipped otherwise than on one
    device.
    """
    replica = _replica()
    if replica is None:
        return updates
    first = tf.equal(replica.replica_id_in_sync_group, 0)
    return [tf.where(first, update, tf.zeros_like(update)) for update in updates]


def train_step(model, data):
    """Keras' `train_step` on TensorFlow: variables change in place."""
    replica = _replica()
    if replica is None:
        return private_step(model, data, steps.backend())
    features, y, mask = data
    if "noise" in features:
        # Zeros but in the first replica; integers, so no sum rounds. What is reduced needs a
        # device, which an argument has not.
        features = {**features, "noise": sum_over_replicas([tf.identity(features["noise"])])[0]}
    private_step(model, (features, y, mask), steps.backend())
    # Each replica has projected its own copy, and a norm need not round alike on all devices.
    projected = [v for v in model.network.trainable_variables if v.constraint is not None]
    values = sum_over_replicas(on_first_replica([tf.convert_to_tensor(v.value) for v in projected]))
    for variable, value in zip(projected, values, strict=True):
        variable.assign(value)
    # A replica's own metrics are of its rows; outside of the replicas they are of all rows.
    logs = replica.merge_call(lambda strategy: model.get_metrics_result())
    if model.devices.processes > 1:
        # Among several workers Keras averages over an axis 0.
        logs = tf.nest.map_structure(lambda value: tf.reshape(value, (1,)), logs)
    return logs


def make_train_function(model, make):
    """Keras' train function."""
    make()


def prefetch(arguments, count):
    """Arguments of Keras' train function: batches are read between its steps."""
    return arguments


def default_jit_compile():
    """XLA only where there is a GPU: on CPUs its convolutions take up to twice the time. XLA
    compiles for one device.
    """
    return not tf.distribute.has_strategy() and bool(tf.config.list_physical_devices("GPU"))


def check_precision():
    """Refuses matrix products of rounded factors, which no bound allows for.

    Raises:
        ValueError: a GPU would compute them in TensorFloat-32.
    """
    if (
        tf.config.list_logical_devices("GPU")
        and tf.config.experimental.tensor_float_32_execution_enabled()
    ):
        raise ValueError(
            "Products of float32 matrices are computed in TensorFloat-32 here, with factors of 11 "
            "bits, and norms and gradients may surpass their bounds. Call "
            "tf.config.experimental.enable_tensor_float_32_execution(False) first."
        )


# --- several devices ------------------------------------------------------------------------------


def _replica():
    """The replica that this code runs for, or None where there is but one device."""
    return tf.distribute.get_replica_context() if tf.distribute.has_strategy() else None


def devices(model):
    """The `Devices` of a model's strategy.

    Raises:
        ValueError: an unknown strategy, or a variable that was made outside of its scope.
    """
    if keras.distribution.distribution() is not None:
        raise ValueError(
            "keras.distribution is for JAX; on TensorFlow make network, model and optimizer in "
            "the scope of a tf.distribute.MirroredStrategy or MultiWorkerMirroredStrategy."
        )
    strategy = model.distribute_strategy
    if strategy is tf.distribute.get_strategy() and not tf.distribute.has_strategy():
        return SINGLE_DEVICE
    known = (tf.distribute.MirroredStrategy, tf.distribute.MultiWorkerMirroredStrategy)
    if not isinstance(strategy, known):
        raise ValueError(
            "A private model trains under tf.distribute.MirroredStrategy or "
            f"MultiWorkerMirroredStrategy; got {type(strategy).__name__}, of which it is not known "
            "that each step's sums are whole before noise is added."
        )
    variables = [*model.network.variables, *model.optimizer.variables, *model.metrics_variables]
    for variable in variables:
        if not strategy.extended.variable_created_in_scope(variable.value):
            raise ValueError(
                f"The variable {variable.path!r} was made outside of the scope of the model's "
                f"{type(strategy).__name__}: make the network, the optimizer and the PrivateModel, "
                "and call compile(...), within `with strategy.scope():`."
            )
    if model.jit_compile:
        raise ValueError(
            f"`jit_compile` must be False under {type(strategy).__name__}: XLA compiles for one "
            "device. Call compile(..., jit_compile=False)."
        )
    if model.steps_per_execution > 1:
        raise ValueError(
            f"`steps_per_execution` must be 1 under {type(strategy).__name__}: TensorFlow cannot "
            f"reduce over replicas within Keras' loop of steps. Got {model.steps_per_execution}."
        )
    for name in ("gradient_accumulation_steps", "ema_overwrite_frequency"):
        if getattr(model.optimizer, name) is not None:
            raise ValueError(
                f"`optimizer` must have no {name} under {type(strategy).__name__}: Keras updates "
                "in a branch of the step, within which TensorFlow cannot reduce over replicas."
            )
    cluster = strategy.cluster_resolver
    workers = 1
    if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy) and cluster is not None:
        jobs = cluster.cluster_spec().as_dict()
        workers = sum(len(jobs.get(job, ())) for job in ("chief", "worker")) or 1
    process = 0
    if workers > 1:
        number = cluster.task_id or 0
        process = number + (cluster.task_type == "worker" and len(jobs.get("chief", ())))
    return Devices(strategy.num_replicas_in_sync, process, workers, distributed=True)


def scope(model):
    """In which variables of a model are made."""
    return model.distribute_strategy.scope()


def all_gather(model, array):
    """An int32 array of this process to those of all processes, `(processes, ...)`."""
    strategy, own = model.distribute_strategy, devices(model)
    whole = np.zeros((own.processes, *array.shape), np.int32)
    whole[own.process] = array
    zeros = np.zeros_like(whole)
    values = strategy.experimental_distribute_values_from_function(
        # Its replicas are counted within the process.
        lambda context: tf.constant(
            whole if context.replica_id_in_sync_group % own.local == 0 else zeros
        )
    )
    return np.asarray(strategy.reduce("SUM", values, axis=None))


def to_device(model, batch):
    """The arguments of `train_on_batch`, on several devices each with one value a replica."""
    if not model.devices.distributed:
        return batch.as_data()
    parts = batch.parts(model.devices.local, model.devices.chief)
    parts = [tf.nest.map_structure(tf.convert_to_tensor, part.as_data()) for part in parts]
    strategy = model.distribute_strategy

    def distributed(*values):
        values = iter(values)
        return strategy.experimental_distribute_values_from_function(lambda context: next(values))

    return tf.nest.map_structure(distributed, *parts)


class TensorFlowBatches(KerasBatches):
    """A part for each local replica after the other.

    They are read in a `map`. A data set `from_generator` would have TensorFlow tell the allocator
    of the whole process (`mallopt`, where Python is 3.11 or later) to fetch fresh pages for every
    tensor of more than 128 KiB, which was seen to double the time of a private step.
    """

    def get_tf_dataset(self):
        own = self.model.devices
        parts = []  # of the batch that is read

        def read(index):
            batch, part = divmod(int(index), own.local)
            if part == 0:
                parts[:] = self.drawn.request(batch).parts(own.local, own.chief)
            return tf.nest.flatten(parts[part].as_data())

        like = self.drawn.draw(0).as_data()  # for its types and shapes, and then dropped
        specs = tf.nest.map_structure(_rows, like)
        for name in {"key", "noise"} & set(like[0]):
            specs[0][name] = tf.TensorSpec(like[0][name].shape, like[0][name].dtype)
        flat = tf.nest.flatten(specs)

        def part(index):
            values = tf.numpy_function(read, [index], [spec.dtype for spec in flat])
            shaped = [tf.ensure_shape(v, s.shape) for v, s in zip(values, flat, strict=True)]
            return tf.nest.pack_sequence_as(specs, shaped)

        dataset = tf.data.Dataset.range(len(self.drawn) * own.local).map(part)
        if not own.distributed:
            return dataset
        strategy = self.model.distribute_strategy
        return strategy.distribute_datasets_from_function(lambda context: dataset)


def _rows(array):
    return tf.TensorSpec((None, *array.shape[1:]), array.dtype)


keras_batches = TensorFlowBatches
