"""The private step on TensorFlow, where variables change in place."""

import contextlib
import ctypes
import functools

import tensorflow as tf

from lipdp.data.batches import KerasBatches
from lipdp.training.steps.private_step import private_step
from lipdp.training.steps.tensorflow_devices import TensorFlowDevices, replica_context


class TensorFlowBackend(TensorFlowDevices):
    """TensorFlow 2."""

    def pull_back(self, network, x):
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

    def pull_back_to_calls(self, network, x, units):
        values = []
        with tf.GradientTape(watch_accessed_variables=False) as tape:

            def tap(number, value):
                values.append(value)
                tape.watch(value)
                return value

            size = tf.shape(tf.nest.flatten(x)[0])[0]
            with units.recorded(tap, size) as calls:
                outputs = network(x, training=True)

        def pull(cotangent):
            return calls, tape.gradient(
                outputs,
                values,
                output_gradients=cotangent,
                unconnected_gradients=tf.UnconnectedGradients.ZERO,
            )

        return outputs, pull

    def accumulate(self, part, arrays, size):
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
            tf.ensure_shape(r.concat(), (None, *j.shape[1:]))
            for r, j in zip(rows, joined, strict=True)
        ]
        return sums, tuple(whole)

    def compiled(self, function):
        return _compiled(function)

    def train_step(self, model, data):
        replica = replica_context()
        if replica is None:
            return private_step(model.step, data, self)
        features, y, mask = data
        if "noise" in features:
            # Zeros but in the first replica; integers, so no sum rounds. What is reduced needs a
            # device, which an argument has not.
            noise = self.sum_over_replicas([tf.identity(features["noise"])])[0]
            features = {**features, "noise": noise}
        private_step(model.step, (features, y, mask), self)
        # Each replica has projected its own copy, and a norm need not round alike on all devices.
        projected = [v for v in model.network.trainable_variables if v.constraint is not None]
        values = [tf.convert_to_tensor(v.value) for v in projected]
        values = self.sum_over_replicas(self.on_first_replica(values))
        for variable, value in zip(projected, values, strict=True):
            variable.assign(value)
        # A replica's own metrics are of its rows; outside of the replicas they are of all rows.
        logs = replica.merge_call(lambda strategy: model.get_metrics_result())
        if model.devices.processes > 1:
            # Among several workers Keras averages over an axis 0.
            logs = tf.nest.map_structure(lambda value: tf.reshape(value, (1,)), logs)
        return logs

    def make_train_function(self, model, make):
        make()

    def prefetch(self, arguments, count):
        return arguments

    def give_back(self, model, arguments):
        pass  # a step changes the variables themselves

    def held_weights(self, plan, result):
        return tuple(tf.convert_to_tensor(v.value) for v in _relied_on(plan))

    def put_inside(self, plan, arguments, held):
        # A tensor that was read keeps its value: while somebody holds it, TensorFlow writes what a
        # variable becomes elsewhere.
        for i, variable in enumerate(_relied_on(plan)):
            value = tf.convert_to_tensor(variable.value)
            if held is None or _address(value) != _address(held[i]):
                inside = plan.inside(i, value)
                if inside is not value:
                    variable.assign(inside)
        return arguments

    def keep_weights(self, model):
        return contextlib.nullcontext()

    def keras_batches(self, model, drawn):
        return TensorFlowBatches(model, drawn)

    def to_device(self, model, batch):
        if not model.devices.distributed:
            return batch.as_data()
        parts = batch.parts(model.devices.local, model.devices.chief)
        parts = [tf.nest.map_structure(tf.convert_to_tensor, part.as_data()) for part in parts]
        strategy = model.distribute_strategy

        def distributed(*values):
            values = iter(values)
            return strategy.experimental_distribute_values_from_function(
                lambda context: next(values)
            )

        return tf.nest.map_structure(distributed, *parts)

    def default_jit_compile(self):
        # On CPUs XLA's convolutions take up to twice the time; and it compiles for one device.
        return not tf.distribute.has_strategy() and bool(tf.config.list_physical_devices("GPU"))

    def check_precision(self, model):
        short = [v for v in model.network._flatten_layers() if "16" in v.compute_dtype]
        if model.jit_compile and short:
            raise ValueError(
                f"`jit_compile` must be False where layers compute in {short[0].compute_dtype}, as "
                f"{short[0].name!r} does: XLA may keep more digits where norms are measured than "
                "where gradients are summed. Call compile(..., jit_compile=False)."
            )
        if (
            tf.config.list_logical_devices("GPU")
            and tf.config.experimental.tensor_float_32_execution_enabled()
        ):
            raise ValueError(
                "Products of float32 matrices are computed in TensorFloat-32 here, with factors of "
                "11 bits, and norms and gradients may surpass their bounds. Call "
                "tf.config.experimental.enable_tensor_float_32_execution(False) first."
            )


def _relied_on(plan):
    return plan.relied_on(plan.trainable_variables, plan.non_trainable_variables)


_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def _address(tensor):
    """Where the memory of an eager tensor begins: the first field of its DLPack structure."""
    capsule = tf.experimental.dlpack.to_dlpack(tensor)
    return ctypes.cast(_pointer(capsule, b"dltensor"), ctypes.POINTER(ctypes.c_void_p))[0]


@functools.cache
def _compiled(function):
    """The function through XLA, which fuses its small products."""
    return tf.function(function, jit_compile=True, autograph=False)


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
