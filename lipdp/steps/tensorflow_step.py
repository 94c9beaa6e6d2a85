"""The private step on TensorFlow."""

import functools

import tensorflow as tf

from lipdp import steps
from lipdp.steps.private_step import private_step


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
    return tf.function(function, jit_compile=True)


def train_step(model, data):
    """Keras' `train_step` on TensorFlow: variables change in place."""
    return private_step(model, data, steps.backend())


def default_jit_compile():
    """XLA only where there is a GPU: on CPUs its convolutions take up to twice the time."""
    return bool(tf.config.list_physical_devices("GPU"))
