"""Units: layers whose own trainable weights are clipped together, example by example.

A unit calls its layer so that the cotangents of the part with the weights can be asked for (`run`),
and tells, from what that part read and from those cotangents, the norm of each example's gradient
(`measure`). A unit without a formula of its own has each example's gradient computed by itself.
"""

import abc
import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras import layers as K
from keras import ops, tree

from lipdp.autodiff import per_row, vjp
from lipdp.bounds import UnknownLayerError
from lipdp.local.products import Pull, Tensor, cleaned, entrywise, gram_is_cheaper, outer, taps

__all__ = ["Unit", "find_units"]


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

    def run(self, call: Callable, tap: Callable, args: tuple, kwargs: dict) -> Any:
        """The layer's output.

        Args:
            call: the layer's own `call`.
            tap: `tap(value, saved, static=None)` gives the value back; `measure` gets its cotangent
                with what was saved, a list of tensors, and with what else it needs to know.
            args, kwargs: of the call.
        """
        with _without_activation(self.layer) as activation:
            value = call(*args, **kwargs)
        return activation(tap(value, [_first(args, kwargs)]))

    @abc.abstractmethod
    def measure(self, saved: list[Tensor], g: Tensor, static: Any = None) -> tuple[Tensor, Pull]:
        """Squares of the norms of the examples' gradients, `(batch,)`, and the function that gives
        the sum of the gradients times a factor each, in the order of `variables`.
        """


class _Weighted(Unit):
    """A layer with a kernel and perhaps a bias."""

    def __init__(self, layer):
        super().__init__(layer)
        self.trains = [
            any(v is w for w in self.variables)
            for v in (layer.kernel, getattr(layer, "bias", None))
            if v is not None
        ]

    @classmethod
    def fits(cls, layer):
        """Whether the weights are just those, and none is computed from others."""
        own = [layer.kernel, getattr(layer, "bias", None)]
        return all(any(w is v for w in own) for v in layer.trainable_variables)


class DenseUnit(_Weighted):
    """`x @ kernel + bias`, at each position."""

    def measure(self, saved, g, static=None):
        (x,) = saved
        x = ops.reshape(x, (-1, 1, _positions(x), x.shape[-1]))
        g = ops.reshape(g, (-1, 1, _positions(g), g.shape[-1]))
        return _affine(self, x, g)


def _affine(unit, x, g, kernel=lambda product: product[0]):
    """`outer`, for the trained ones of kernel and bias; `kernel` shapes the kernel's gradient."""
    trains_kernel, trains_bias = unit.trains[0], unit.trains[1:] == [True]
    if not trains_kernel:  # a frozen kernel
        return entrywise([ops.reshape(ops.sum(g, axis=2), (-1, math.prod(unit.layer.bias.shape)))])
    squares, pull = outer(x, g, trains_bias)

    def shaped(factors):
        found = pull(factors)
        found = [kernel(found[0]), *(ops.reshape(b, unit.layer.bias.shape) for b in found[1:])]
        return found

    return squares, shaped


class ConvUnit(_Weighted):
    """A convolution: a matrix that acts on the window at each position."""

    @classmethod
    def fits(cls, layer):
        return super().fits(layer) and layer.data_format == "channels_last"

    def measure(self, saved, g, static=None):
        (x,) = saved
        layer, groups = self.layer, self.layer.groups
        if None in x.shape[1:]:
            raise UnknownLayerError(
                f"Layer {layer.name!r} reads maps of unknown size; give keras.Input all sizes."
            )
        parts = taps(x, layer.kernel_size, layer.strides, layer.padding, layer.dilation_rate)
        positions, channels = parts[0].shape[1], x.shape[-1] // groups
        c = layer.filters // groups
        g = ops.reshape(g, (-1, positions, groups, c))
        parts = [ops.reshape(part, (-1, positions, groups, channels)) for part in parts]
        if self.trains[0] and gram_is_cheaper(positions, len(parts) * channels, c):
            x = ops.transpose(ops.concatenate(parts, axis=-1), (0, 2, 1, 3))

            def kernel(product):  # (groups, taps·channels, c) to the kernel's axes
                return ops.reshape(ops.transpose(product, (1, 0, 2)), layer.kernel.shape)

            return _affine(self, x, ops.transpose(g, (0, 2, 1, 3)), kernel)
        gradients = []
        if self.trains[0]:
            if groups > 1:
                gradients += [ops.einsum("btgp,btgc->bpgc", part, g) for part in parts]
            else:
                columns = ops.squeeze(g, 2)
                rows = [ops.transpose(ops.squeeze(part, 2), (0, 2, 1)) for part in parts]
                gradients += [ops.matmul(part, columns) for part in rows]
        if self.trains[1:] == [True]:
            gradients.append(ops.reshape(ops.sum(g, axis=1), (-1, layer.filters)))
        return self._by_taps(gradients)

    def _by_taps(self, gradients):
        """`entrywise` of the taps of the kernel and of the bias."""
        squares, pull = entrywise(gradients)
        count = len(gradients) - (self.trains[1:] == [True])

        def joined(factors):
            found = pull(factors)
            kernel = (
                ops.reshape(ops.stack(found[:count]), self.layer.kernel.shape) if count else None
            )
            return [v for v in (kernel, *found[count:]) if v is not None]

        return squares, joined


class DepthwiseUnit(ConvUnit):
    """A depthwise convolution: a small matrix for each channel."""

    def measure(self, saved, g, static=None):
        (x,) = saved
        layer = self.layer
        parts = taps(x, layer.kernel_size, layer.strides, layer.padding, layer.dilation_rate)
        g = ops.reshape(g, (-1, *parts[0].shape[1:], layer.depth_multiplier))
        gradients = []
        if self.trains[0]:
            gradients += [ops.sum(ops.expand_dims(part, -1) * g, axis=1) for part in parts]
        if self.trains[1:] == [True]:
            gradients.append(ops.reshape(ops.sum(g, axis=1), (-1, *layer.bias.shape)))
        return self._by_taps(gradients)


class EinsumUnit(_Weighted):
    """`einsum(equation, x, kernel) + bias`."""

    @classmethod
    def fits(cls, layer):
        left, output = layer.equation.split("->")
        inputs, weights = left.split(",")
        simple = "." not in layer.equation and inputs[0] == output[0] and inputs[0] not in weights
        once = all(len(set(axes)) == len(axes) for axes in (inputs, weights, output))
        return super().fits(layer) and simple and once and set(weights) <= set(inputs + output)

    def measure(self, saved, g, static=None):
        (x,) = saved
        left, output = self.layer.equation.split("->")
        inputs, weights = left.split(",")
        sizes = dict(zip(inputs, x.shape, strict=True)) | dict(zip(output, g.shape, strict=True))
        shared = [a for a in inputs[1:] if a in output and a not in weights]
        lost = [a for a in inputs if a not in output and a not in weights]
        groups = [a for a in weights if a in inputs and a in output]
        old = [a for a in weights if a in inputs and a not in output]
        new = [a for a in weights if a not in inputs]
        batch = inputs[0]
        if lost:  # summed over before the kernel is met
            kept = "".join(a for a in inputs if a not in lost)
            x, inputs = ops.einsum(f"{inputs}->{kept}", x), kept

        def arranged(value, axes, last):
            order = [axes.index(a) for a in (batch, *groups, *shared, *last)]
            shape = [_product(sizes, part) for part in (groups, shared, last)]
            return ops.reshape(ops.transpose(value, order), (-1, *shape))

        def kernel(product):
            order = [*groups, *old, *new]
            whole = ops.reshape(product, [sizes[a] for a in order])
            return ops.transpose(whole, [order.index(a) for a in weights])

        x, matrix = arranged(x, inputs, old), arranged(g, output, new)
        bias = self.trains[1:] == [True]
        gradients = []
        if bias:
            gradients.append(_to_shape_of(self.layer.bias, g))
        if not self.trains[0]:
            return entrywise(gradients)
        squares, pull = outer(x, matrix)

        def both(factors):
            return [kernel(*pull(factors)), *(added(factors) if bias else [])]

        if bias:
            more, added = entrywise(gradients)
            squares = squares + more
        return squares, both


class EmbeddingUnit(Unit):
    """Rows of a table: `Σ_ts [id_t = id_s] g_t·g_s`."""

    LONGEST = 1024  # positions, whose Gram matrix is formed

    def run(self, call, tap, args, kwargs):
        return tap(call(*args, **kwargs), [_first(args, kwargs)])

    @classmethod
    def fits(cls, layer):
        own = layer.trainable_variables
        return len(own) == 1 and own[0] is layer.embeddings

    def measure(self, saved, g, static=None):
        ids, table = saved[0], self.layer.embeddings
        g = ops.reshape(g, (-1, _positions(g), g.shape[-1]))
        ids = ops.reshape(ops.cast(ids, "int32"), (-1, _positions(g)))
        positions = g.shape[1]
        equal = ops.cast(ops.equal(ids[:, :, None], ids[:, None, :]), g.dtype)
        lengths = ops.sqrt(ops.sum(ops.square(g), axis=-1) + 2.0**-90)
        whole = ops.sum(
            ops.sum(equal * (lengths[:, :, None] * lengths[:, None, :]), axis=-1), axis=-1
        )
        if positions is not None and positions > self.LONGEST:
            squares = whole * (1 + 1e-4)  # rows of the same id, as if they had one direction
        else:
            gg = ops.matmul(g, ops.swapaxes(g, 1, 2))
            exact = ops.sum(ops.sum(equal * gg, axis=-1), axis=-1)
            terms = g.shape[-1] + 2 * (positions or self.LONGEST) + 8
            squares = ops.maximum(exact, 0.0) + 2 * terms * 2.0**-24 * whole

        def pull(factors):
            (rows,) = cleaned(squares, [g])
            rows = ops.reshape(rows * ops.reshape(factors, (-1, 1, 1)), (-1, g.shape[-1]))
            return [ops.segment_sum(rows, ops.reshape(ids, (-1,)), num_segments=table.shape[0])]

        return squares, pull


class AffineUnit(Unit):
    """A normaliser's scale and offset: the layer is called without them, and they are applied."""

    # Class to the names of scale and offset.
    NAMES = {
        K.LayerNormalization: ("gamma", "beta"),
        K.GroupNormalization: ("gamma", "beta"),
        K.BatchNormalization: ("gamma", "beta"),
        K.RMSNormalization: ("scale", None),
    }

    @classmethod
    def fits(cls, layer):
        return not getattr(layer, "rms_scaling", False)

    def run(self, call, tap, args, kwargs):
        layer = self.layer
        names = next(n for c, n in self.NAMES.items() if type(layer).call is c.call)
        scale, offset = (getattr(layer, n, None) if isinstance(n, str) else None for n in names)
        mapping = []
        if isinstance(scale, keras.Variable):
            mapping.append((scale, ops.ones(scale.shape, scale.dtype)))
        if isinstance(offset, keras.Variable):
            mapping.append((offset, ops.zeros(offset.shape, offset.dtype)))
        others = [v for v in layer.variables if not any(v is w for w, _ in mapping)]
        with keras.StatelessScope(mapping + [(v, v.value) for v in others]):
            normal = call(*args, **kwargs)
        axes = layer.axis if isinstance(layer.axis, (list, tuple)) else [layer.axis]
        shape = [1] * len(normal.shape)
        for axis in axes:
            shape[axis] = normal.shape[axis]
        value, saved = normal, []
        if isinstance(scale, keras.Variable):
            value = value * ops.reshape(scale, shape)
            saved.append(normal)
        if isinstance(offset, keras.Variable):
            value = value + ops.reshape(offset, shape)
        return tap(value, saved or [normal])

    def measure(self, saved, g, static=None):
        layer = self.layer
        axes = layer.axis if isinstance(layer.axis, (list, tuple)) else [layer.axis]
        kept = sorted(axis % len(g.shape) for axis in axes)
        away = tuple(a for a in range(1, len(g.shape)) if a not in kept)
        gradients = []
        for variable in self.variables:
            scale = variable.path.rsplit("/", 1)[-1] in ("gamma", "scale")
            rows = (
                ops.sum(saved[0] * g if scale else g, axis=away)
                if away
                else (saved[0] * g if scale else g)
            )
            gradients.append(ops.reshape(rows, (-1, *variable.shape)))
        return entrywise(gradients)


class AnyUnit(Unit):
    """Any layer: each example's gradient by itself."""

    measured = "of each example's gradient by itself"

    def run(self, call, tap, args, kwargs):
        # In training, layers may draw random numbers from a state that moves on: as it was before.
        others = [v for v in self.layer.variables if not any(v is w for w in self.variables)]
        state = [ops.convert_to_tensor(v) for v in others]
        tensors = _Tensors(args, kwargs)
        static = (call, tensors, others)
        return tap(call(*args, **kwargs), tensors.rows + state, static)

    def measure(self, saved, g, static=None):
        call, tensors, others = static
        rows, state = saved[: len(tensors.rows)], saved[len(tensors.rows) :]
        known = list(zip(others, state, strict=True))

        def one(*values):
            *own, cotangent = (ops.expand_dims(v, 0) for v in values)
            args, kwargs = tensors.filled(own)

            def f(*weights):
                mapping = list(zip(self.variables, weights, strict=True))
                with keras.StatelessScope(mapping + known):
                    return [call(*args, **kwargs)]

            weights = [ops.convert_to_tensor(v) for v in self.variables]
            return vjp(f, weights, lambda values: [cotangent])[1]

        return entrywise(per_row(one, [*rows, g]))


class _Tensors:
    """Arguments of a call, apart in tensors and the rest."""

    def __init__(self, args, kwargs):
        self.rows = [v for v in tree.flatten((args, kwargs)) if ops.is_tensor(v)]
        self.like = tree.map_structure(lambda v: _Row if ops.is_tensor(v) else v, (args, kwargs))

    def filled(self, rows):
        rows = iter(rows)
        return tree.map_structure(lambda v: next(rows) if v is _Row else v, self.like)


class _Row:
    """Stands for a tensor."""


# By the function that is the layer's call: a subclass that keeps it computes the same.
_KINDS = {
    K.Dense.call: DenseUnit,
    K.EinsumDense.call: EinsumUnit,
    K.Conv1D.call: ConvUnit,
    K.Conv2D.call: ConvUnit,
    K.Conv3D.call: ConvUnit,
    K.DepthwiseConv2D.call: DepthwiseUnit,
    K.Embedding.call: EmbeddingUnit,
    K.LayerNormalization.call: AffineUnit,
    K.GroupNormalization.call: AffineUnit,
    K.BatchNormalization.call: AffineUnit,
    K.RMSNormalization.call: AffineUnit,
}


def find_units(network: keras.Model) -> list[Unit]:
    """The units of a network: each trainable weight is in one of them.

    A layer that owns trainable weights is a unit, with all that is in it; so is a recurrent layer,
    whose cell is called many times.

    Raises:
        UnknownLayerError: a weight is owned by two layers.
    """
    found, seen = [], set()

    def visit(layer):
        if id(layer) in seen:
            return
        seen.add(id(layer))
        if _is_unit(layer):
            kind = _KINDS.get(type(layer).call, AnyUnit)
            found.append((kind if _fits(kind, layer) else AnyUnit)(layer))
            return
        for inner in layer._layers:
            visit(inner)

    visit(network)
    owners = {}
    for unit in found:
        for variable in unit.variables:
            other = owners.setdefault(id(variable), unit)
            if other is not unit:
                raise UnknownLayerError(
                    f"The weight {variable.path!r} belongs to {other.layer.name!r} and to "
                    f"{unit.layer.name!r}; give each layer weights of its own."
                )
    return found


def _is_unit(layer):
    own = any(v.trainable for v in layer._trainable_variables)
    return layer.trainable and (own or _composite(layer) and bool(layer.trainable_variables))


def _composite(layer):
    return isinstance(layer, (K.RNN, K.TimeDistributed, K.Wrapper)) and not isinstance(
        layer, K.Bidirectional
    )


def _fits(kind, layer):
    return kind is AnyUnit or kind.fits(layer)


@contextlib.contextmanager
def _without_activation(layer) -> Iterator[Callable]:
    activation = layer.activation
    vars(layer)["activation"] = None
    try:
        yield activation if activation is not None else lambda value: value
    finally:
        vars(layer)["activation"] = activation


def _first(args, kwargs):
    return args[0] if args else next(iter(kwargs.values()))


def _positions(value):
    shape = tuple(value.shape[1:-1])
    if any(n is None for n in shape):
        return None if len(shape) == 1 else -1
    return math.prod(shape)


def _product(sizes, axes):
    return math.prod(sizes[a] for a in axes)


def _to_shape_of(variable, g):
    """Row by row the sum over what a weight of this shape was broadcast over."""
    shape = (1,) * (len(g.shape) - 1 - len(variable.shape)) + tuple(variable.shape)
    away = tuple(i + 1 for i, n in enumerate(shape) if n == 1 and g.shape[i + 1] != 1)
    rows = ops.sum(g, axis=away, keepdims=True) if away else g
    return ops.reshape(rows, (-1, *variable.shape))
