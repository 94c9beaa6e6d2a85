"""The private step on JAX."""

import contextlib

import jax
import keras
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lipdp.data.batches import KerasBatches
from lipdp.devices import SINGLE_DEVICE, Devices
from lipdp.training import steps
from lipdp.training.steps.private_step import read_batch, update_weights


def pull_back(network, x):
    """Outputs of the network in training mode, and `cotangent -> gradients of its weights`."""
    state = [v.value for v in network.non_trainable_variables]

    def forward(values):
        return network.stateless_call(values, state, x, training=True)

    values = [v.value for v in network.trainable_variables]
    outputs, pull, state = jax.vjp(forward, values, has_aux=True)
    for variable, value in zip(network.non_trainable_variables, state, strict=True):
        variable.assign(value)
    return outputs, lambda cotangent: pull(cotangent)[0]


def accumulate(part, arrays, size):
    """`part` of `size` rows at a time: sums are added up, what has a row an example is joined."""
    replicas = _replicas()  # a piece has rows of each, which stay where they are
    arrays = jax.tree.map(lambda a: a.reshape(replicas, -1, *a.shape[1:]), arrays)
    sums, rows = None, []
    for start in range(0, arrays[-1].shape[1], size):
        piece = jax.tree.map(lambda a, i=start: _flat(a[:, i : i + size]), arrays)
        added, joined = part(*piece)
        sums = added if sums is None else [a + b for a, b in zip(sums, added, strict=True)]
        rows.append([r.reshape(replicas, -1, *r.shape[1:]) for r in joined])
    return sums, tuple(_flat(jax.numpy.concatenate(r, axis=1)) for r in zip(*rows, strict=True))


def _flat(array):
    return array.reshape(-1, *array.shape[2:])


def compiled(function):
    """The function itself: the whole step is compiled."""
    return function


def sum_over_replicas(sums):
    """The sums, whole on each device: they are over all rows already, wherever those are."""
    return sums if keras.distribution.distribution() is None else [replicate(s) for s in sums]


def on_first_replica(updates):
    """What the optimizer is handed; there is one of it, whatever the number of devices."""
    return updates


def train_step(model, state, data):
    """Keras' `train_step` on JAX: the same step with the variables' values passed through."""
    first, second = model.step_halves
    trainable, non_trainable, optimizer, metrics = state
    sums, logs, non_trainable, metrics = first(trainable, (non_trainable, metrics), data)
    rest = {name: data[0][name] for name in ("key", "noise") if name in data[0]}
    state = second((trainable, non_trainable, optimizer), sums, rest)
    return logs, (*state, metrics)


def make_train_function(model, make):
    """Keras' train function, of a step in halves that are compiled each for itself.

    A batch of another shape has the first compiled anew. Most of what takes long to compile is in
    the second, the noise, the certificates and the updates, whose shapes are those of the weights.

    Args:
        model: the `PrivateModel`.
        make: has Keras make the function, of `model.train_step`.
    """

    def first(trainable, rest, data):
        groups = (
            model.trainable_variables,
            model.non_trainable_variables,
            model.metrics_variables,
        )
        with _values(groups, (trainable, *rest)) as found:
            sums, logs = read_batch(model, data, steps.backend())
        return (sums, logs, *found()[1:])

    def second(state, sums, rest):
        groups = (
            model.trainable_variables,
            model.non_trainable_variables,
            model.optimizer.variables,
        )
        with _values(groups, state) as found:
            update_weights(model, replicate_features(rest), sums, steps.backend())
        return found()

    model.step_halves = first, second
    jit_compile = model.jit_compile
    if jit_compile and not model.run_eagerly:
        where = [None] * 4
        if keras.distribution.distribution() is not None:
            where = model._get_state_sharding_spec()
        trainable, non_trainable, optimizer, metrics = where
        model.step_halves = (
            jax.jit(first, donate_argnums=1, out_shardings=(None, None, non_trainable, metrics)),
            jax.jit(second, donate_argnums=0, out_shardings=(trainable, non_trainable, optimizer)),
        )
    model.jit_compile = False  # Keras would compile the halves together
    try:
        make()
    finally:
        model.jit_compile = jit_compile


@contextlib.contextmanager
def _values(groups, values):
    """Gives groups of variables their values while the scope lasts; what it yields tells those
    that they have at its end.
    """
    pairs = zip(groups, values, strict=True)
    mapping = [pair for group, v in pairs for pair in zip(group, v, strict=True)]
    with keras.StatelessScope(state_mapping=mapping) as scope:
        yield lambda: tuple([scope.get_current_value(v) for v in group] for group in groups)


def replicate_features(features):
    """What several devices hand in part by part, but the rows."""
    if keras.distribution.distribution() is None:
        return features
    features = {**features, "key": replicate(features["key"][0])}
    if "noise" in features:
        # Zeros but in the first row; integers, so no sum rounds.
        features["noise"] = replicate(features["noise"].sum(axis=0))
    return features


def prefetch(arguments, count):
    """Arguments of Keras' train function, the batches of its steps read: one that cannot be read
    fails before a step, which takes the weights' memory for the new ones, has begun.
    """
    state, iterator = arguments
    return state, iter([next(iterator) for _ in range(count)])


def default_jit_compile():
    return True


def check_precision():
    """Refuses matrix products of rounded factors, which no bound allows for.

    Raises:
        ValueError: a GPU or TPU would compute them with fewer bits than float32 has.
    """
    precision = jax.config.jax_default_matmul_precision
    if jax.default_backend() != "cpu" and precision not in ("float32", "highest"):
        raise ValueError(
            f"Products of float32 matrices are computed in less than float32 on a "
            f"{jax.default_backend().upper()} by default, and norms and gradients may surpass "
            "their bounds. Call jax.config.update('jax_default_matmul_precision', 'float32') "
            f"first; got {precision!r}."
        )


# --- several devices ------------------------------------------------------------------------------


def replicate(array):
    """The array without a part of it for each device."""
    mesh = keras.distribution.distribution().device_mesh.backend_mesh
    return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, PartitionSpec()))


def _replicas():
    distribution = keras.distribution.distribution()
    if distribution is None:
        return 1
    mesh = distribution.device_mesh
    return mesh.shape[mesh.axis_names.index(distribution.batch_dim_name)]


def devices(model):
    """The `Devices` of the distribution in use.

    Raises:
        ValueError: several processes without a distribution, one that is unknown or splits up
            weights among processes, processes with unequally many devices, or a variable that was
            made before the distribution was set.
    """
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
            "A private model trains under keras.distribution.DataParallel, or in a single process "
            f"under ModelParallel; got {type(distribution).__name__} in {jax.process_count()}."
        )
    mesh = distribution.device_mesh.backend_mesh
    for variable in (*model.network.variables, *model.optimizer.variables):
        if variable.value.sharding.device_set != set(mesh.devices.flat):
            raise ValueError(
                f"The variable {variable.path!r} was made before the distribution was set: call "
                "keras.distribution.set_distribution(...) before anything of Keras is made."
            )
    for process in range(jax.process_count()):
        found = sum(device.process_index == process for device in mesh.devices.flat)
        if found * jax.process_count() != mesh.devices.size:
            raise ValueError(
                f"Each of the {jax.process_count()} processes must have equally many of the "
                f"distribution's {mesh.devices.size} devices; process {process} has {found}."
            )
    return Devices(_replicas(), jax.process_index(), jax.process_count(), distributed=True)


def scope(model):
    """In which variables of a model are made."""
    return contextlib.nullcontext()


def all_gather(model, array):
    """An int32 array of this process to those of all processes, `(processes, ...)`."""
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array))


def to_device(model, batch):
    """The arguments of `train_on_batch`: the rows of this process, or a batch that is where Keras,
    which asks for it twice, would copy it each time.
    """
    own = model.devices
    if not own.distributed:
        return jax.device_put(batch.as_data())
    features, y, mask = batch.as_data()
    features["key"] = np.tile(batch.key, (own.local, 1))
    if batch.noise is not None:
        features["noise"] = np.zeros((own.local, len(batch.noise)), batch.noise.dtype)
        features["noise"][0] = batch.noise if own.chief else 0
    return features, y, mask


class JaxBatches(KerasBatches):
    """The rows of this process."""

    def get_jax_iterator(self):
        for index in range(len(self.drawn)):
            yield to_device(self.model, self.drawn.request(index))


keras_batches = JaxBatches
