"""Which unit each layer is: its own formula's, or one whose examples' gradients are computed by
themselves.
"""

import keras
from keras import layers as K
from keras import ops, tree

from lipdp.autodiff import per_row, settled, vjp
from lipdp.bounds import UnknownLayerError
from lipdp.local.matrix_units import (
    ConvUnit,
    DenseUnit,
    DepthwiseUnit,
    EinsumUnit,
    EmbeddingUnit,
    SeparableUnit,
    TransposedUnit,
)
from lipdp.local.products import entrywise
from lipdp.local.recurrent_units import RecurrentUnit
from lipdp.local.unit import Unit, first_argument

__all__ = ["find_units"]


class DistributedUnit(Unit):
    """A layer that is called at each time: times are more positions."""

    def __init__(self, layer):
        super().__init__(layer)
        self.inner = _kind(layer.layer)(layer.layer)

    @classmethod
    def fits(cls, layer):
        return issubclass(_kind(layer.layer), (DenseUnit, ConvUnit))

    def run(self, call, tap, args, kwargs):
        x, layer = first_argument(args, kwargs), self.layer.layer
        steps = ops.shape(x)[1]

        def back(v):
            return ops.reshape(v, (-1, steps, *v.shape[1:]))

        def tapped(value, saved, static=None):
            value = tap(back(value), [back(v) for v in saved], static)
            return ops.reshape(value, (-1, *value.shape[2:]))

        rows = ops.reshape(x, (-1, *x.shape[2:]))
        return back(self.inner.run(layer.call, tapped, (rows,), {}))

    def entries(self, saved, g):
        return self.inner.entries(saved, g)

    def measure(self, saved, g, static=None):
        return self.inner.measure(saved, g, static)


class PReLUUnit(Unit):
    """Slopes where x is negative: the gradient is `min(x, 0)·g`, summed where a slope is shared."""

    def measure(self, saved, g, static=None):
        return self.joined(self.offset(self.layer.alpha, ops.minimum(saved[0], 0.0) * g))


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
            value = value * ops.reshape(ops.cast(scale, normal.dtype), shape)
            saved.append(normal)
        if isinstance(offset, keras.Variable):
            value = value + ops.reshape(ops.cast(offset, normal.dtype), shape)
        return tap(value, saved or [normal])

    def measure(self, saved, g, static=None):
        layer = self.layer
        axes = layer.axis if isinstance(layer.axis, (list, tuple)) else [layer.axis]
        kept = sorted(axis % len(g.shape) for axis in axes)
        away = tuple(a for a in range(1, len(g.shape)) if a not in kept)
        gradients = []
        for variable in self.variables:
            scale = variable.path.rsplit("/", 1)[-1] in ("gamma", "scale")
            rows = saved[0] * g if scale else g
            rows = ops.sum(rows, axis=away) if away else rows
            gradients.append(ops.reshape(rows, (-1, *variable.shape)))
        return entrywise(gradients)


class AnyUnit(Unit):
    """Any layer: each example's gradient by itself."""

    measured = "of each example's gradient by itself"

    def run(self, call, tap, args, kwargs):
        # A state that moves on in the call: as it was before.
        others = [v for v in self.layer.variables if not self.trains(v)]
        state = [ops.convert_to_tensor(v) for v in others]
        tensors = _Tensors(args, kwargs)
        value = call(*args, **kwargs)
        tapped = iter(tap(_floats(value), tensors.rows + state, (call, tensors, others)))
        return tree.map_structure(lambda v: next(tapped) if _is_float(v) else v, value)

    def with_rows(self, saved, static):
        return len(static[1].rows)

    def measure(self, saved, g, static=None):
        call, tensors, others = static
        rows, state = saved[: len(tensors.rows)], saved[len(tensors.rows) :]
        known = list(zip(others, state, strict=True))

        def one(*values):
            values = [ops.expand_dims(v, 0) for v in values]
            args, kwargs = tensors.filled(values[: len(rows)])

            def f(*weights):
                mapping = list(zip(self.variables, weights, strict=True))
                with keras.StatelessScope(mapping + known):
                    return _floats(call(*args, **kwargs))

            def cotangents(outputs):
                pairs = zip(values[len(rows) :], outputs, strict=True)
                return [ops.cast(value, output.dtype) for value, output in pairs]

            weights = [ops.convert_to_tensor(v) for v in self.variables]
            return vjp(f, weights, cotangents)[1]

        gradients = per_row(one, [*rows, *g])
        in_float32 = all(v.compute_dtype == "float32" for v in self.layer._flatten_layers())
        # One that casts by itself rounds within: norm and sum are of what came out.
        return entrywise(gradients if in_float32 else settled(gradients))


def _is_float(value):
    return ops.is_tensor(value) and keras.backend.is_float_dtype(
        keras.backend.standardize_dtype(value.dtype)
    )


def _floats(value):
    return [v for v in tree.flatten(value) if _is_float(v)]


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
    K.Conv2DTranspose.call: TransposedUnit,
    K.DepthwiseConv2D.call: DepthwiseUnit,
    K.SeparableConv2D.call: SeparableUnit,
    K.Embedding.call: EmbeddingUnit,
    K.LayerNormalization.call: AffineUnit,
    K.GroupNormalization.call: AffineUnit,
    K.BatchNormalization.call: AffineUnit,
    K.RMSNormalization.call: AffineUnit,
    K.PReLU.call: PReLUUnit,
    K.TimeDistributed.call: DistributedUnit,
    K.LSTM.call: RecurrentUnit,
    K.GRU.call: RecurrentUnit,
    K.SimpleRNN.call: RecurrentUnit,
    K.RNN.call: RecurrentUnit,
}


# What a subclass may define and still compute as its base does.
_HARMLESS = frozenset(
    ("__init__", "build", "get_config", "from_config", "compute_output_shape", "bound")
)
_OF_EVERY_LAYER = frozenset(vars(K.Layer()))


def _kind(layer):
    kind = _KINDS.get(type(layer).call, AnyUnit)
    return kind if _computes_as_keras(layer) and kind.fits(layer) else AnyUnit


def _computes_as_keras(layer):
    """Whether nothing that its `call` may call is the layer's own, such as a `convolution_op`."""
    cls = type(layer)
    hidden = vars(layer).keys() - _OF_EVERY_LAYER
    if any(callable(getattr(cls, name, None)) for name in hidden):
        return False
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] in ("keras", "lipdp"):
            return True
        own = {name for name, value in vars(base).items() if callable(value)}
        if not own <= _HARMLESS or any(isinstance(v, property) for v in vars(base).values()):
            return False
    return True


def find_units(network: keras.Model) -> list[Unit]:
    """The units of a network: each trainable weight is in one of them.

    A layer that owns trainable weights is a unit, with all that is in it; so is a recurrent layer,
    whose cell is called many times.

    Raises:
        UnknownLayerError: a weight is owned by two layers, or a unit draws random numbers.
    """
    found, seen = [], set()

    def visit(layer):
        if id(layer) in seen:
            return
        seen.add(id(layer))
        if _is_unit(layer):
            _check_repeatable(layer)
            found.append(_kind(layer)(layer))
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


def _check_repeatable(unit):
    for layer in unit._flatten_layers():
        if not layer._seed_generators:
            continue
        rates = [getattr(layer, n, None) for n in ("rate", "dropout", "recurrent_dropout")]
        rates = [rate for rate in rates if rate is not None]
        if rates and not any(rates) and type(layer).__module__.startswith("keras."):
            continue
        where = "" if layer is unit else f", which is part of {unit.name!r}"
        raise UnknownLayerError(
            f"Layer {layer.name!r} ({type(layer).__name__}){where}, draws random numbers where the "
            "weights are used, and would draw others when each example's gradient is computed. "
            "Set its rates to 0, and put a keras.layers.Dropout of its own before it."
        )
