"""What users declare of code that cannot be followed: that it keeps the rows of a batch apart."""

import functools
import weakref
from typing import Any

import keras
from keras.src.backend.common.keras_tensor import any_symbolic_tensors
from keras.src.ops.operation import Operation

__all__ = ["DeclaredFunction", "is_declared", "keeps_rows_apart"]

_declared_classes = weakref.WeakSet()
_declared_lambdas = weakref.WeakSet()


class DeclaredFunction(keras.Operation):
    """A declared function, called on symbolic tensors."""

    def __init__(self, function):
        super().__init__(name=getattr(function, "__name__", None))
        self.function = function

    def call(self, *args, **kwargs):
        return self.function(*args, **kwargs)


def keeps_rows_apart(thing: Any) -> Any:
    """Declares that row i of a result depends on row i of the tensors that were given, only.

    The first axis of every tensor is the batch, and stays the batch throughout. This is a promise:
    the privacy guarantee relies on it. It is tried on two made-up rows, which finds some mistakes
    and proves nothing.

    Args:
        thing: a class of layers, as a decorator (its subclasses are not declared); a
            `keras.layers.Lambda`; or a function of tensors, also as a decorator. A class that
            holds other layers with trainable weights is followed into all the same: declare the
            functions that it calls.

    Returns:
        The same class or Lambda. Of a function, one to use in its place.

    Raises:
        TypeError: it is something else.

    >>> import keras
    >>> @keeps_rows_apart
    ... def double(x):
    ...     return 2 * x
    >>> double(keras.Input((3,))).shape
    (None, 3)
    """
    if isinstance(thing, type) and issubclass(thing, keras.layers.Layer):
        _declared_classes.add(thing)
        return thing
    if isinstance(thing, keras.layers.Lambda):
        _declared_lambdas.add(thing)
        return thing
    if not callable(thing) or isinstance(thing, (type, Operation)):
        raise TypeError(
            "`thing` must be a class of layers, a keras.layers.Lambda or a function; got "
            f"{thing!r}."
        )

    @functools.wraps(thing)
    def function(*args, **kwargs):
        if any_symbolic_tensors(args, kwargs):
            return DeclaredFunction(thing)(*args, **kwargs)
        return thing(*args, **kwargs)

    return function


def is_declared(layer: keras.layers.Layer) -> bool:
    """Whether a layer was declared, by its class or by itself."""
    return type(layer) in _declared_classes or layer in _declared_lambdas
