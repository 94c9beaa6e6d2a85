"""Several devices on TensorFlow: `tf.distribute` strategies that mirror the weights."""

import keras
import numpy as np
import tensorflow as tf

from lipdp.devices import SINGLE_DEVICE, Devices
from lipdp.training.steps.backend import Backend


def replica_context():
    """The replica that this code runs for, or None where there is but one device."""
    return tf.distribute.get_replica_context() if tf.distribute.has_strategy() else None


class TensorFlowDevices(Backend):
    """The part of the TensorFlow backend that knows of several devices."""

    def devices(self, model):
        if keras.distribution.distribution() is not None:
            raise ValueError(
                "keras.distribution is for JAX; on TensorFlow make network, model and optimizer in "
                "the scope of a tf.distribute.MirroredStrategy or MultiWorkerMirroredStrategy."
            )
        strategy = model.distribute_strategy
        if strategy is tf.distribute.get_strategy() and not tf.distribute.has_strategy():
            return SINGLE_DEVICE
        name = type(strategy).__name__
        known = (tf.distribute.MirroredStrategy, tf.distribute.MultiWorkerMirroredStrategy)
        if not isinstance(strategy, known):
            raise ValueError(
                "A private model trains under tf.distribute.MirroredStrategy or "
                f"MultiWorkerMirroredStrategy; got {name}, of which it is not known that each "
                "step's sums are whole before noise is added."
            )
        variables = [*model.network.variables, *model.optimizer.variables, *model.metrics_variables]
        for variable in variables:
            if not strategy.extended.variable_created_in_scope(variable.value):
                raise ValueError(
                    f"The variable {variable.path!r} was made outside of the scope of the model's "
                    f"{name}: make the network, the optimizer and the PrivateModel, and call "
                    "compile(...), within `with strategy.scope():`."
                )
        if model.jit_compile:
            raise ValueError(
                f"`jit_compile` must be False under {name}: XLA compiles for one device. Call "
                "compile(..., jit_compile=False)."
            )
        if model.steps_per_execution > 1:
            raise ValueError(
                f"`steps_per_execution` must be 1 under {name}: TensorFlow cannot reduce over "
                f"replicas within Keras' loop of steps. Got {model.steps_per_execution}."
            )
        for setting in ("gradient_accumulation_steps", "ema_overwrite_frequency"):
            if getattr(model.optimizer, setting) is not None:
                raise ValueError(
                    f"`optimizer` must have no {setting} under {name}: Keras updates in a branch "
                    "of the step, within which TensorFlow cannot reduce over replicas."
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

    def scope(self, model):
        return model.distribute_strategy.scope()

    def all_gather(self, model, array):
        strategy, own = model.distribute_strategy, self.devices(model)
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

    def sum_over_replicas(self, sums):
        replica = replica_context()
        return sums if replica is None or not sums else replica.all_reduce("SUM", sums)

    def on_first_replica(self, updates):
        replica = replica_context()
        if replica is None:
            return updates
        first = tf.equal(replica.replica_id_in_sync_group, 0)
        return [tf.where(first, update, tf.zeros_like(update)) for update in updates]
