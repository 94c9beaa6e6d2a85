"""The private step on JAX, where the variables' values are passed through."""

import contextlib
import dataclasses

import jax
import keras
import numpy as np

from lipdp.data.batches import KerasBatches
from lipdp.training.steps.jax_devices import JaxDevices, replicas, replicate_features
from lipdp.training.steps.private_step import read_batch, update_weights


class JaxBackend(JaxDevices):
    """JAX. The step is in halves that are compiled each for itself: a batch of another shape has
    the first compiled anew, while most of what takes long to compile is in the second, the noise,
    the certificates and the updates, whose shapes are those of the weights.
    """

    def pull_back(self, network, x):
        state = [v.value for v in network.non_trainable_variables]

        def forward(values):
            return network.stateless_call(values, state, x, training=True)

        values = [v.value for v in network.trainable_variables]
        outputs, pull, state = jax.vjp(forward, values, has_aux=True)
        for variable, value in zip(network.non_trainable_variables, state, strict=True):
            variable.assign(value)
        return outputs, lambda cotangent: pull(cotangent)[0]

    def pull_back_to_calls(self, network, x, units):
        state = [v.value for v in network.non_trainable_variables]
        values = [v.value for v in network.trainable_variables]
        size = jax.tree.leaves(x)[0].shape[0]
        found = []  # the calls of the last trace

        def forward(tap):
            with units.recorded(tap, size) as calls:
                outputs, new = network.stateless_call(values, state, x, training=True)
            found[:] = calls
            return outputs, (new, [call.saved for call in calls])

        def shapes():
            like = []

            def tap(number, value):
                like.append(value)
                return value

            forward(tap)
            return like

        # What is added to a value has its cotangent; it is zero, and costs nothing.
        zeros = [jax.numpy.zeros(v.shape, v.dtype) for v in jax.eval_shape(shapes)]
        outputs, pull, (state, saved) = jax.vjp(
            lambda zeros: forward(lambda number, value: value + zeros[number]), zeros, has_aux=True
        )
        for variable, value in zip(network.non_trainable_variables, state, strict=True):
            variable.assign(value)
        calls = [dataclasses.replace(c, saved=s) for c, s in zip(found, saved, strict=True)]
        return outputs, lambda cotangent: (calls, pull(cotangent)[0])

    def accumulate(self, part, arrays, size):
        count = replicas()  # a piece has rows of each, which stay where they are
        arrays = jax.tree.map(lambda a: a.reshape(count, -1, *a.shape[1:]), arrays)
        sums, rows = None, []
        for start in range(0, arrays[-1].shape[1], size):
            piece = jax.tree.map(lambda a, i=start: _flat(a[:, i : i + size]), arrays)
            added, joined = part(*piece)
            sums = added if sums is None else [a + b for a, b in zip(sums, added, strict=True)]
            rows.append([r.reshape(count, -1, *r.shape[1:]) for r in joined])
        return sums, tuple(_flat(jax.numpy.concatenate(r, axis=1)) for r in zip(*rows, strict=True))

    def compiled(self, function):
        return function  # the whole step is compiled

    def train_step(self, model, state, data):
        first, second = model.step_halves
        trainable, non_trainable, optimizer, metrics = state
        sums, logs, non_trainable, metrics = first(trainable, (non_trainable, metrics), data)
        rest = {name: data[0][name] for name in ("key", "noise") if name in data[0]}
        model.half_step = lambda: (non_trainable, metrics)  # a list, Keras would track
        state = second((trainable, non_trainable, optimizer), sums, rest)
        model.half_step = None
        return logs, (*state, metrics)

    def make_train_function(self, model, make):
        step = model.step

        def first(trainable, rest, data):
            groups = (
                model.trainable_variables,
                model.non_trainable_variables,
                model.metrics_variables,
            )
            with _values(groups, (trainable, *rest)) as found:
                sums, logs = read_batch(step, data, self)
            return (sums, logs, *found()[1:])

        def second(state, sums, rest):
            groups = (
                model.trainable_variables,
                model.non_trainable_variables,
                model.optimizer.variables,
            )
            with _values(groups, state) as found:
                update_weights(step, replicate_features(rest), sums, self)
            return found()

        model.step_halves = first, second
        jit_compile = model.jit_compile
        if jit_compile and not model.run_eagerly:
            where = [None] * 4
            if keras.distribution.distribution() is not None:
                where = model._get_state_sharding_spec()
            trainable, non_trainable, optimizer, metrics = where
            shardings = (None, None, non_trainable, metrics)
            model.step_halves = (
                jax.jit(first, donate_argnums=1, out_shardings=shardings),
                jax.jit(
                    second, donate_argnums=0, out_shardings=(trainable, non_trainable, optimizer)
                ),
            )
        model.jit_compile = False  # Keras would compile the halves together
        try:
            make()
        finally:
            model.jit_compile = jit_compile

    def prefetch(self, arguments, count):
        state, iterator = arguments
        return state, iter([next(iterator) for _ in range(count)])

    def give_back(self, model, arguments):
        trainable, non_trainable, optimizer, metrics = arguments[0]
        if model.half_step is not None:  # the first half took the memory of what it made anew
            non_trainable, metrics = model.half_step()
        for variables, values in (
            (model.trainable_variables, trainable),
            (model.non_trainable_variables, non_trainable),
            (model.optimizer.variables, optimizer),
            (model.metrics_variables, metrics),
        ):
            for variable, value in zip(variables, values, strict=True):
                if not value.is_deleted():
                    variable.assign(value)
        model._jax_state, model.half_step = None, None

    def held_weights(self, plan, result):
        _, (trainable, non_trainable, *_) = result
        return tuple(plan.relied_on(trainable, non_trainable))

    def put_inside(self, plan, arguments, held):
        # Arrays are never written into: what is another array may have another value.
        (trainable, non_trainable, *rest), iterator = arguments
        inside = plan.relied_on(trainable, non_trainable)
        for i, value in enumerate(inside):
            if held is None or held[i] is not value:
                inside[i] = _placed_like(value, plan.inside(i, value))
        return (inside[: len(trainable)], non_trainable, *rest), iterator

    @contextlib.contextmanager
    def keep_weights(self, model):
        model._jax_state = None  # of an earlier fit
        try:
            yield
        finally:
            model.jax_state_sync()

    def keras_batches(self, model, drawn):
        return JaxBatches(self, model, drawn)

    def to_device(self, model, batch):
        own = model.devices
        if not own.distributed:
            return jax.device_put(batch.as_data())
        features, y, mask = batch.as_data()
        features["key"] = np.tile(batch.key, (own.local, 1))
        if batch.noise is not None:
            features["noise"] = np.zeros((own.local, len(batch.noise)), batch.noise.dtype)
            features["noise"][0] = batch.noise if own.chief else 0
        return features, y, mask

    def default_jit_compile(self):
        return True

    def check_precision(self, model):
        precision = jax.config.jax_default_matmul_precision
        if jax.default_backend() != "cpu" and precision not in ("float32", "highest"):
            raise ValueError(
                f"Products of float32 matrices are computed in less than float32 on a "
                f"{jax.default_backend().upper()} by default, and norms and gradients may surpass "
                "their bounds. Call jax.config.update('jax_default_matmul_precision', 'float32') "
                f"first; got {precision!r}."
            )


def _placed_like(array, new):
    same = new.sharding.is_equivalent_to(array.sharding, array.ndim)
    return new if same else jax.device_put(new, array.sharding)


def _flat(array):
    return array.reshape(-1, *array.shape[2:])


@contextlib.contextmanager
def _values(groups, values):
    """Gives groups of variables their values while the scope lasts; what it yields tells those
    that they have at its end.
    """
    pairs = zip(groups, values, strict=True)
    mapping = [pair for group, v in pairs for pair in zip(group, v, strict=True)]
    with keras.StatelessScope(state_mapping=mapping) as scope:
        yield lambda: tuple([scope.get_current_value(v) for v in group] for group in groups)


class JaxBatches(KerasBatches):
    """The rows of this process."""

    def __init__(self, backend, model, drawn):
        super().__init__(model, drawn)
        self.backend = backend

    def get_jax_iterator(self):
        for index in range(len(self.drawn)):
            yield self.backend.to_device(self.model, self.drawn.request(index))
