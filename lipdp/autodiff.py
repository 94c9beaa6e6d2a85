"""What each backend spells in its own way: vector-Jacobian products, and compilation.

`compiled(function)` is `function` as a compiled program. `fused(function)` is what runs quickest
when it is called a few times only: a program on JAX, which would compile each operation by itself;
`function` as it is on TensorFlow, where tracing takes longer than running.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import keras

Tensor = Any

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    def _vjp(function, arguments, cotangents_of):
        # Fresh tensors: variables are not watched, and losses of Keras take the logits of a softmax
        # from the tensor that it made, which `values` would then not depend on.
        arguments = [tf.identity(a) for a in arguments]
        with tf.GradientTape() as tape:
            tape.watch(arguments)
            values = function(*arguments)
        cotangents = tape.gradient(
            values,
            arguments,
            output_gradients=cotangents_of(values),
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        # Embeddings hand out IndexedSlices.
        return values, [tf.convert_to_tensor(c) for c in cotangents]

    compiled = functools.partial(tf.function, autograph=False)

    def fused(function):
        return function

    _WRITING = re.compile("Assign|Resource(?!Gather)|LookupTable(Insert|Import|Remove)")

    def _raw_writes(function, arrays):
        specs = [tf.TensorSpec(array.shape, array.dtype) for array in arrays]
        definition = compiled(function).get_concrete_function(*specs).graph.as_graph_def()
        nodes = [*definition.node, *(n for f in definition.library.function for n in f.node_def)]
        return {node.op for node in nodes if _WRITING.match(node.op)}

    def _settled(tensors):
        return tensors  # each operation gives the numbers of its type

    def _per_row(function, rows):
        return tf.vectorized_map(lambda row: function(*row), tuple(rows))

    def _in_pieces(function, rows, size, shapes):
        pieces = tf.maximum(-(-tf.shape(rows[0])[0] // size), 1)

        def body(i, sums, vectors):
            added, vector = function(*(r[i * size : (i + 1) * size] for r in rows))
            sums = [a + b for a, b in zip(sums, added, strict=True)]
            return i + 1, sums, vectors.write(i, vector)

        vectors = tf.TensorArray("float32", pieces, infer_shape=False, element_shape=(None,))
        # One piece after the other: in parallel they would need the memory of all.
        _, sums, vectors = tf.while_loop(
            lambda i, sums, vectors: i < pieces,
            body,
            [0, [tf.zeros(shape) for shape in shapes], vectors],
            parallel_iterations=1,
        )
        return sums, tf.ensure_shape(vectors.concat(), rows[0].shape[:1])

elif keras.backend.backend() == "jax":
    import jax

    def _vjp(function, arguments, cotangents_of):
        values, pull = jax.vjp(function, *arguments)
        return values, list(pull(cotangents_of(values)))

    compiled = fused = jax.jit

    def _raw_writes(function, arrays):
        return set()  # a program changes nothing but what it returns

    def _settled(tensors):
        return jax.lax.optimization_barrier(tensors)

    def _per_row(function, rows):
        return jax.vmap(function)(*rows)

    def _in_pieces(function, rows, size, shapes):
        count = rows[0].shape[0]
        pieces = -(-count // size)
        missing = pieces * size - count
        rows = [jax.numpy.pad(r, [(0, missing)] + [(0, 0)] * (r.ndim - 1)) for r in rows]

        def body(sums, piece):
            added, vector = function(*piece)
            return [a + b for a, b in zip(sums, added, strict=True)], vector

        sums, vectors = jax.lax.scan(
            body,
            [jax.numpy.zeros(shape) for shape in shapes],
            [r.reshape(pieces, size, *r.shape[1:]) for r in rows],
        )
        return sums, vectors.reshape(-1)[:count]

else:
    raise ImportError(
        f"lipdp.autodiff knows the backends tensorflow and jax; got "
        f"{keras.backend.backend()!r}. Set KERAS_BACKEND."
    )


def raw_writes(function: Callable, arrays: Sequence[Any]) -> set[str]:
    """The operations by which a function writes into variables when it is compiled, past the scopes
    of Keras: those on a `tf.Variable` itself. The function is traced, and does not run.

    Args:
        function: takes tensors.
        arrays: with the shapes and types of these.

    >>> raw_writes(lambda x: keras.ops.sum(x), [keras.ops.ones(2)])
    set()
    """
    return _raw_writes(function, arrays)


def vjp(
    function: Callable[..., list[Tensor]],
    arguments: Sequence[Tensor],
    cotangents_of: Callable[[list[Tensor]], list[Tensor]],
) -> tuple[list[Tensor], list[Tensor]]:
    """One vector-Jacobian product; may be nested.

    Args:
        function: maps tensors to a list of tensors.
        arguments: the tensors it is applied to.
        cotangents_of: maps the list of values to a list of cotangents of the same shapes.

    Returns:
        The values, and the cotangent of each argument (zeros where nothing depends on it).

    >>> x = keras.ops.array([1.0, 2.0])
    >>> _, (slope,) = vjp(lambda x: [x * x], [x], lambda values: values)
    >>> [float(v) for v in slope]
    [2.0, 16.0]
    """
    return _vjp(function, list(arguments), cotangents_of)


def gradient(function: Callable[[Tensor], Tensor], value: Tensor) -> tuple[Tensor, Tensor]:
    """`function(value)` and the gradient of its sum.

    >>> values, slope = gradient(lambda x: x * x, keras.ops.array([1.0, 2.0]))
    >>> [float(v) for v in slope]
    [2.0, 4.0]
    """
    (result,), (slope,) = vjp(
        lambda x: [function(x)], [value], lambda values: [keras.ops.ones_like(values[0])]
    )
    return result, slope


def per_row(function: Callable[..., list[Tensor]], rows: Sequence[Tensor]) -> list[Tensor]:
    """`function` of each row by itself, and the results joined: no row can see another.

    Args:
        function: maps a row of each tensor to a list of tensors.
        rows: tensors `(batch, ...)`.

    >>> (doubled,) = per_row(lambda x: [2 * x], [keras.ops.array([1.0, 2.0])])
    >>> [float(v) for v in doubled]
    [2.0, 4.0]
    """
    return _per_row(function, list(rows))


def settled(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors, of which every reader sees the same numbers.

    Where a program rounds to few bits and back, XLA may leave that out for one reader and not for
    another. It does nothing of the kind across a barrier.

    >>> [float(v) for v in settled([keras.ops.array(1.0)])]
    [1.0]
    """
    return _settled(list(tensors))


def in_pieces(
    function: Callable[..., tuple[list[Tensor], Tensor]],
    rows: Sequence[Tensor],
    size: int,
    shapes: Sequence[tuple[int, ...]],
) -> tuple[list[Tensor], Tensor]:
    """`function` of some rows at a time, one piece after the other. Where each shape is compiled,
    the last piece is filled up with zeros.

    Args:
        function: maps rows to sums over them, and to a vector with an entry a row; in float32.
        rows: tensors `(batch, ...)`; the number of rows need not be known in advance.
        size: rows of a piece.
        shapes: of the sums.

    Returns:
        The sums, added up, and the vectors, joined.

    >>> x = keras.ops.array([1.0, 2.0, 3.0])
    >>> sums, squares = in_pieces(lambda x: ([keras.ops.sum(x)], x * x), [x], 2, [()])
    >>> [float(v) for v in sums], [float(v) for v in squares]
    ([6.0], [1.0, 4.0, 9.0])
    """
    return _in_pieces(function, list(rows), size, list(shapes))
