"""The contract of a unit: a layer whose own trainable weights are clipped together.

A unit calls its layer so that the cotangents of the part with the weights can be asked for (`run`),
and tells, from what that part read and from those cotangents, the norm of each example's gradient
(`measure`).
"""

import abc
import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
from keras import ops, tree

from lipdp.autodiff import in_pieces, settled
from lipdp.local.products import Pull, Tensor, entrywise, outer

__all__ = ["Unit", "first_argument", "patched"]

Measured = tuple[Tensor, Pull]

#: Bytes that the gradients of single examples may take, for one layer.
MEMORY = 2**28
# Rows for which gradients are written out at once, where their number is not known in advance.
_UNKNOWN_BATCH = 2**12


class Unit(abc.ABC):
    """A layer, and the gradients of its trainable weights.

    Attributes:
        layer: the layer.
        variables: its trainable weights, those of layers within it included.
        exact: whether norms are exact but for rounding, or upper bounds.
        measured: how norms are found, for the report.
    """

    exact = True
    measured = "from what it reads and its cotangents"

    def __init__(self, layer: keras.layers.Layer) -> None:
        self.layer = layer
        self.variables = list(layer.trainable_variables)

    @classmethod
    def fits(cls, layer: keras.layers.Layer) -> bool:
        """Whether the formula is that of the layer with its settings."""
        return True

    def run(self, call: Callable, tap: Callable, args: tuple, kwargs: dict) -> Any:
        """The layer's output.

        Args:
            call: the layer's own `call`.
            tap: `tap(value, saved, static=None)` gives the value back; `measure` gets its cotangent
                with what was saved, a list of tensors that may grow until the call ends, and with
                what else it needs to know. Called once. The value may be a list.
            args, kwargs: of the call.
        """
        return tap(call(*args, **kwargs), [first_argument(args, kwargs)])

    @abc.abstractmethod
    def measure(self, saved: list[Tensor], g: Any, static: Any = None) -> tuple[Tensor, Pull]:
        """Squares of the norms of the examples' gradients, `(batch,)`, and the function that gives
        the sum of the gradients times a factor each, in the order of `variables`.
        """

    def with_rows(self, saved: list[Tensor], static: Any) -> int:
        """How many of the saved tensors, the first ones, have a row an example."""
        return len(saved)

    def entries(self, saved: list[Tensor], g: Any) -> int:
        """How many numbers `measure` writes out for one example."""
        return sum(math.prod(v.shape) for v in self.variables)

    def clipped(
        self, saved: list[Tensor], g: Any, static: Any, scales: Callable, factors: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """The sum of the examples' gradients, each times what `scales` gives for it.

        Whatever the layer computes in, its norms and sums are of the same numbers of float32: what
        was saved and the cotangents are made such first, so that rounding to fewer bits, in the
        forward and in the backward pass, changes what is summed and never by how much one example
        moves it. What is in float32 already may have been rounded to fewer bits by a layer before
        or behind this one, so it is settled, too.

        Where the gradients of all examples would take more than `MEMORY` bytes, they are computed
        for some examples at a time.

        Args:
            saved, g, static: as for `measure`.
            scales: of squares and factors, `(batch,)` each, the number that multiplies each
                example's gradient.
            factors: `(batch,)`.

        Returns:
            The sums, in the order of `variables`, and the squares of the norms.
        """
        known = self.with_rows(saved, static)
        many = isinstance(g, list)
        saved, g = _in_float32((saved, g))

        def part(factors, *rows):
            own = [*rows[:known], *saved[known:]]
            squares, pull = self.measure(own, list(rows[known:]) if many else rows[-1], static)
            return pull(scales(squares, factors)), squares

        rows = [factors, *saved[:known], *(g if many else [g])]
        size = max(1, MEMORY // (4 * max(1, self.entries(saved, g))))
        if size >= (factors.shape[0] or _UNKNOWN_BATCH):
            return part(*rows)
        return in_pieces(part, rows, size, [v.shape for v in self.variables])

    def trains(self, variable: Any) -> bool:
        """Whether this is one of the weights that are trained."""
        return any(variable is v for v in self.variables)

    def joined(self, parts: Sequence[tuple[Sequence, Measured]]) -> Measured:
        """What `measure` gives, of weights in several parts.

        The squares of the parts' norms add up: they are of different entries.

        Args:
            parts: variables, and the squares and the pull of their gradients. A variable in several
                parts is joined along its last axis.
        """
        squares = sum(squares for _, (squares, _) in parts)

        def pull(factors):
            found = {}
            for variables, (_, pull_part) in parts:
                for v, value in zip(variables, pull_part(factors), strict=True):
                    found.setdefault(id(v), []).append(value)
            return [ops.reshape(_one(found[id(v)]), v.shape) for v in self.variables]

        return squares, pull

    def matrices(self, pairs: Sequence[tuple[Any, Tensor]], g: Tensor, bias: Any = None) -> list:
        """Parts of `joined`: matrices whose products with what they read are added up.

        With `y_t = Σ_k x_kt @ W_k + b`, the gradient of all together is `Σ_t (x_1t ‖ x_2t ‖ … ‖ 1)
        ⊗ g_t`, that of one matrix. Those that are not trained are left out.

        Args:
            pairs: variables, and what each reads, `(batch, positions, p)`.
            g: `(batch, positions, c)`.
            bias: variable, or None.
        """
        pairs = [(v, x) for v, x in pairs if self.trains(v)]
        biases = [bias] if self.trains(bias) else []
        if not pairs:
            return [(biases, entrywise([ops.sum(g, axis=1)]))] if biases else []
        x = _one([x for _, x in pairs])
        squares, pull = outer(ops.expand_dims(x, 1), ops.expand_dims(g, 1), bool(biases))

        def split(factors):
            kernel, *offset = (v[0] for v in pull(factors))
            ends = list(itertools.accumulate(x.shape[-1] for _, x in pairs))
            starts = [0, *ends[:-1]]
            return [kernel[i:j] for i, j in zip(starts, ends, strict=True)] + offset

        return [([*(v for v, _ in pairs), *biases], (squares, split))]

    def offset(self, bias: Any, g: Tensor) -> list:
        """Parts of `joined`: a bias, whose gradient is the sum of the cotangents that it meets."""
        return [([bias], entrywise([_to_shape_of(bias, g)]))] if self.trains(bias) else []


def first_argument(args: tuple, kwargs: dict) -> Any:
    """What a call reads."""
    return args[0] if args else next(iter(kwargs.values()))


@contextlib.contextmanager
def patched(owner: Any, **values: Any) -> Iterator[None]:
    """While the scope lasts, an object has these attributes."""
    own = vars(owner)
    before = {name: own[name] for name in values if name in own}
    own.update(values)
    try:
        yield
    finally:
        for name in values:
            del own[name]
        own.update(before)


def _is_short(value):
    """Whether these are numbers of fewer bits than float32 has."""
    return keras.backend.standardize_dtype(value.dtype) in ("bfloat16", "float16")


def _in_float32(tensors):
    """A structure of tensors, those of fewer bits as float32; all who read them see the same."""
    flat = [ops.cast(v, "float32") if _is_short(v) else v for v in tree.flatten(tensors)]
    return tree.pack_sequence_as(tensors, settled(flat))


def _one(values):
    return values[0] if len(values) == 1 else ops.concatenate(values, axis=-1)


def _to_shape_of(variable, g):
    """Row by row the sum over what a weight of this shape was broadcast over."""
    shape = (1,) * (len(g.shape) - 1 - len(variable.shape)) + tuple(variable.shape)
    away = tuple(i + 1 for i, n in enumerate(shape) if n == 1 and g.shape[i + 1] != 1)
    rows = ops.sum(g, axis=away, keepdims=True) if away else g
    return ops.reshape(rows, (-1, *variable.shape))
