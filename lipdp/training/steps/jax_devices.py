"""Several devices on JAX: rows of a batch are sharded, weights as the distribution says."""

import contextlib

import jax
import keras
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from lipdp.devices import SINGLE_DEVICE, Devices
from lipdp.training.steps.backend import Backend


def replicate(array):
    """The array without a part of it for each device."""
    mesh = keras.distribution.distribution().device_mesh.backend_mesh
    return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, PartitionSpec()))


def replicate_features(features):
    """What several devices hand in part by part, but the rows."""
    if keras.distribution.distribution() is None:
        return features
    features = {**features, "key": replicate(features["key"][0])}
    if "noise" in features:
        # Zeros but in the first row; integers, so no sum rounds.
        features["noise"] = replicate(features["noise"].sum(axis=0))
    return features


def replicas():
    """How many devices share out the rows."""
    distribution = keras.distribution.distribution()
    if distribution is None:
        return 1
    mesh = distribution.device_mesh
    return mesh.shape[mesh.axis_names.index(distribution.batch_dim_name)]


class JaxDevices(Backend):
    """The part of the JAX backend that knows of several devices."""

    def devices(self, model):
        distribution = keras.distribution.distribution()
        if distribution is None:
            if jax.process_count() > 1:
                raise ValueError(
                    f"{jax.process_count()} processes of JAX train one model each: call "
                    "keras.distribution.set_distribution(keras.distribution.DataParallel()) first."
                )
            return SINGLE_DEVICE
        kinds = (keras.distribution.DataParallel, keras.distribution.ModelParallel)
        if not isinstance(distribution, kinds[: 1 if jax.process_count() > 1 else 2]):
            raise ValueError(
                "A private model trains under keras.distribution.DataParallel, or in a single "
                f"process under ModelParallel; got {type(distribution).__name__} in "
                f"{jax.process_count()}."
            )
        mesh = distribution.device_mesh.backend_mesh
        for variable in (*model.network.variables, *model.optimizer.variables):
            if variable.value.sharding.device_set != set(mesh.devices.flat):
                raise ValueError(
                    f"The variable {variable.path!r} was made before the distribution was set: "
                    "call keras.distribution.set_distribution(...) before anything of Keras is "
                    "made."
                )
        for process in range(jax.process_count()):
            found = sum(device.process_index == process for device in mesh.devices.flat)
            if found * jax.process_count() != mesh.devices.size:
                raise ValueError(
                    f"Each of the {jax.process_count()} processes must have equally many of the "
                    f"distribution's {mesh.devices.size} devices; process {process} has {found}."
                )
        return Devices(replicas(), jax.process_index(), jax.process_count(), distributed=True)

    def scope(self, model):
        return contextlib.nullcontext()

    def all_gather(self, model, array):
        return np.asarray(multihost_utils.process_allgather(array))

    def sum_over_replicas(self, sums):
        # They are over all rows already, wherever those are; here they become whole everywhere.
        return sums if keras.distribution.distribution() is None else [replicate(s) for s in sums]

    def on_first_replica(self, updates):
        return updates  # there is one optimizer, whatever the number of devices
