"""What each backend spells in its own way: vector-Jacobian products, and compilation.

`compiled(function)` is `function` as a compiled program. `fused(function)` is what runs quickest
when it is called a few times only: a program on JAX, which would compile each operation by itself;
`function` as it is on TensorFlow, where tracing takes longer than running.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras

Tensor = Any

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    def _vjp(function, arguments, cotangents_of):
        arguments = [tf.convert_to_tensor(a) for a in arguments]  # variables are not watched
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

    def _per_row(function, rows):
        return tf.vectorized_map(lambda row: function(*row), tuple(rows))

elif keras.backend.backend() == "jax":
    import jax

    def _vjp(function, arguments, cotangents_of):
        values, pull = jax.vjp(function, *arguments)
        return values, list(pull(cotangents_of(values)))

    compiled = fused = jax.jit

    def _per_row(function, rows):
        return jax.vmap(function)(*rows)

else:
    raise ImportError(
        f"lipdp.autodiff knows the backends tensorflow and jax; got "
        f"{keras.backend.backend()!r}. Set KERAS_BACKEND."
    )


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
