"""Rules: how a layer changes norms. They are registered here.

Norms are Euclidean over all axes but the first. For one call of a layer, `X` bounds the norm
of each input for one example and `G` the norm of the loss gradient with respect to the output
(the cotangent). A rule turns them into a bound of the output, of the cotangents of the inputs,
and of each weight's gradient. Bounds are Python floats where a projection holds a weight that is
trained, scalar tensors where the weight's current value is measured, so that a walk also works
inside a compiled step.
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

from keras import ops

from lipdp.bounds import norms
from lipdp.bounds.projections import (
    AlmostOrthogonal,
    ConvBall,
    EntryBall,
    NormBall,
    Projection,
    RowBall,
    SpectralBall,
)

Scalar = Any  # float or scalar tensor

_RULES: dict[type, Callable] = {}


class UnknownLayerError(ValueError):
    """A network holds something for which no bound is known."""


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a layer in a network: its shapes (without batch), other arguments, and whether
    an input may carry a Keras mask.
    """

    input_shapes: tuple[tuple[int | None, ...], ...]
    output_shape: tuple[int | None, ...]
    args: tuple = ()
    kwargs: dict = dataclasses.field(default_factory=dict)
    masked: bool = False

    @property
    def input_shape(self):
        return self.input_shapes[0]

    @property
    def positions(self) -> int:
        """`T`: positions of the output that share a weight acting on the last axis."""
        return size(self.output_shape[:-1])


def as_float(scalar: Scalar) -> float:
    """A float of a float or a scalar tensor."""
    return float(ops.convert_to_numpy(scalar)) if ops.is_tensor(scalar) else float(scalar)


def size(shape: Sequence[int | None]) -> int:
    """Number of entries of a shape.

    Raises:
        ValueError: a size is unknown.
    """
    if any(n is None for n in shape):
        raise ValueError(
            f"the shape {tuple(shape)} has an unknown size; give keras.Input all sizes, "
            "since the bound depends on the number of positions"
        )
    return math.prod(shape)


@dataclasses.dataclass(frozen=True)
class Rule:
    """The bounds of one call.

    Attributes:
        forward: `[X, ...] -> bound of the output`.
        backward: `([X, ...], G) -> [cotangent bound of each input]`.
        gradients: `([X, ...], G) -> [(variable, bound of its gradient), ...]`.
        note: where the bound comes from or is loose, for the report.
        masks: whether the bounds hold for every Keras mask that the layer may be called with.
        any_input: whether they hold for every number that float32 has, NaN and infinity too.
    """

    forward: Callable[[Sequence[Scalar]], Scalar]
    backward: Callable[[Sequence[Scalar], Scalar], Sequence[Scalar]]
    gradients: Callable[[Sequence[Scalar], Scalar], Sequence[tuple]] = lambda xs, g: ()
    note: str = ""
    masks: bool = False
    any_input: bool = False


def lipschitz(
    constant: Scalar = 1.0,
    *,
    offset: Scalar = 0.0,
    gradients: Callable[[Scalar, Scalar], Sequence[tuple]] | None = None,
    note: str = "",
) -> Rule:
    """Rule of a layer with one input: output at most `constant·X + offset`, cotangent
    `constant·G`; `gradients(X, G)` lists `(variable, bound)`.

    >>> rule = lipschitz(2.0, offset=1.0)
    >>> rule.forward([3.0]), rule.backward([3.0], 5.0)
    (7.0, [10.0])
    """
    return Rule(
        forward=lambda xs: constant * xs[0] + offset,
        backward=lambda xs, g: [constant * g],
        gradients=(lambda xs, g: gradients(xs[0], g)) if gradients else (lambda xs, g: ()),
        note=note,
    )


def register(*classes: type) -> Callable[[Callable], Callable]:
    """Registers `rule(layer, call) -> Rule` for exactly these classes, not their subclasses
    (a subclass may compute something else).

    A layer of your own needs no registration if its class has a method `bound(call) -> Rule`.

    Raises:
        ValueError: a class has a rule already.

    >>> import keras
    >>> class Halve(keras.layers.Layer):
    ...     def call(self, x):
    ...         return x / 2
    >>> @register(Halve)
    ... def halve(layer, call):
    ...     return lipschitz(0.5)
    """

    def decorate(rule):
        for cls in classes:
            if cls in _RULES:
                raise ValueError(f"{cls.__name__} has a rule already.")
            _RULES[cls] = rule
        return rule

    return decorate


def has_rule(layer: Any) -> bool:
    """True if `find_rule` knows the layer's class."""
    return type(layer) in _RULES or "bound" in vars(type(layer))


def find_rule(layer: Any) -> Callable[[Call], Rule]:
    """The function `call -> Rule` of a layer.

    Raises:
        UnknownLayerError: there is none; the message says how to add one.
    """
    cls = type(layer)
    if cls in _RULES:
        return lambda call: _RULES[cls](layer, call)
    # Not inherited either: a subclass may compute something else, be it in a helper of `call`.
    if "bound" in vars(cls):
        return layer.bound
    raise UnknownLayerError(
        f"No bound is known for layer {layer.name!r} of class {cls.__module__}.{cls.__name__}. "
        "Use a layer from lipdp.layers, or state its bound: give the class a method "
        "`bound(self, call) -> lipdp.bounds.Rule` of its own (it is not inherited), or decorate a "
        "function `rule(layer, call)` "
        f"with `@lipdp.bounds.register({cls.__name__})`."
    )


# --- arithmetic on floats and tensors alike -------------------------------------------------


def minimum(a, b):
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return min(a, b)
    return ops.minimum(a, b)


def maximum(a, b):
    return -minimum(-a, -b)


def root_of_squares(values):
    """`√(Σ v²)`."""
    total = sum(v * v for v in values)
    return math.sqrt(total) if isinstance(total, (int, float)) else ops.sqrt(total)


# --- norms of weights: the projection's certificate, or a certificate of the current value --

_measuring = contextvars.ContextVar("measuring", default=False)


@contextlib.contextmanager
def measuring() -> Iterator[None]:
    """While the scope lasts, norms are those of the weights' values, whatever projects them.

    They are tighter where a weight lies inside its ball, and hold for a weight that was assigned
    and lies outside.
    """
    token = _measuring.set(True)
    try:
        yield
    finally:
        _measuring.reset(token)


def held_by(variable: Any) -> Projection | None:
    """The projection in whose set a weight is, or None where that has to be measured.

    A step puts the weights that it trains into their sets before it reads a bound. A frozen weight
    is projected by nobody: it lies wherever it was loaded or assigned. Whoever asks compares the
    projection's exact class, since a subclass may project onto another set.
    """
    if _measuring.get() or not variable.trainable:
        return None
    return variable.constraint


_known = contextvars.ContextVar("known", default=None)  # {(id of the weight, kind): norm}
_noted = contextvars.ContextVar("noted", default=None)


@contextlib.contextmanager
def noted_norms() -> Iterator[list[tuple[Any, Hashable, float]]]:
    """Notes `(weight, kind, norm)` of each frozen weight that is measured while the scope lasts."""
    noted = []
    token = _noted.set(noted)
    try:
        yield noted
    finally:
        _noted.reset(token)


@contextlib.contextmanager
def known_norms(norms: Iterable[tuple[Any, Hashable, float]]) -> Iterator[None]:
    """While the scope lasts, frozen weights have the norms that were noted and are not measured.

    Whoever opens it has made sure that their values are still those.
    """
    token = _known.set({(id(variable), kind): norm for variable, kind, norm in norms})
    try:
        yield
    finally:
        _known.reset(token)


def measured(variable: Any, kind: Hashable, measure: Callable[[], Any]) -> Any:
    """`measure()`, a norm of the weight's value; of a frozen one what is known of it instead.

    Args:
        variable: the weight.
        kind: says what is measured of it, and how: the same for the same norm only.
        measure: measures it.
    """
    if variable.trainable:
        return measure()
    known = (_known.get() or {}).get((id(variable), kind))
    if known is not None:
        return ops.convert_to_tensor(known, "float32")
    norm = measure()
    if _noted.get() is not None:
        _noted.get().append((variable, kind, as_float(norm)))
    return norm


def matrix_norm(variable, axes=None, shape=None):
    """Bound of the spectral norm of a matrix-shaped weight, now and until it is updated; of the
    largest one of the stack of matrices that the weight is once its axes are put into the order
    `axes` and it is given the shape `shape`."""
    ball = held_by(variable)
    if type(ball) is NormBall:
        return ball.radius
    if type(ball) in (AlmostOrthogonal, SpectralBall) and len(variable.shape) == 2:
        return ball.radius

    def measure():
        stack = variable if axes is None else ops.reshape(ops.transpose(variable, axes), shape)
        return ops.max(norms.spectral_norm_bound(stack))

    return measured(variable, ("matrix", axes, shape), measure)


def row_norm(variable):
    """Bound of the Euclidean norm of each row of a weight."""
    ball = held_by(variable)
    if type(ball) in (RowBall, NormBall):
        return ball.radius
    return measured(variable, "row", lambda: ops.max(norms.euclidean_norm(variable, axis=-1)))


def vector_norm(variable):
    """Bound of the Euclidean norm of a weight."""
    ball = held_by(variable)
    if type(ball) is NormBall:
        return ball.radius
    return measured(variable, "vector", lambda: norms.euclidean_norm(variable))


def entry_norm(variable):
    """Bound of the absolute value of each entry of a weight."""
    ball = held_by(variable)
    if type(ball) is EntryBall:
        return ball.radius
    return measured(variable, "entry", lambda: ops.max(ops.abs(variable)))


def conv_norm(variable, ball=ConvBall, **geometry):
    """Bound of the operator norm of a convolution with this kernel in this geometry; `ball` is
    the projection whose certificate fits the kind of convolution."""
    held = held_by(variable)
    if type(held) is ball and held.geometry == geometry:
        return held.radius
    if type(held) is AlmostOrthogonal and ball is ConvBall:
        return held.radius
    kind = ball, repr(sorted(geometry.items()))
    return measured(variable, kind, lambda: ops.max(ball.bound(variable, **geometry)))
