"""What the units of a network are called with, and the sums of their clipped gradients."""

import contextlib
import dataclasses
import functools
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
from keras import ops, tree

from lipdp.local.products import Tensor
from lipdp.local.rows import UnitCall, check_rows_apart, over_batch
from lipdp.local.unit import Unit, patched
from lipdp.local.units import find_units

__all__ = ["Call", "LayerUnits", "layer_units"]


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of one unit.

    Attributes:
        unit: its number.
        saved: tensors that its `measure` needs.
        static: what else it needs.
        values: of how many values it needs the cotangents; None for those of one, not in a list.
    """

    unit: int
    saved: list[Tensor]
    static: Any
    values: int | None


@dataclasses.dataclass(frozen=True, eq=False)
class LayerUnits:
    """The units of a network, and how a forward pass calls them.

    Attributes:
        units: the layers that clip their own gradients.
        order: the units' calls in a forward pass, as `check_rows_apart` found them. Where one is
            not batched, each example gets a copy of its input, so that its own cotangent can be
            told.
        variables: the trainable weights of the network.
        tables: Keras' embeddings that are no units.
    """

    units: tuple[Unit, ...]
    order: tuple[UnitCall, ...]
    variables: tuple[keras.Variable, ...]
    tables: tuple[keras.layers.Embedding, ...] = ()

    def groups(self) -> list[list[int]]:
        """For each unit the numbers of its weights among the network's trainable ones."""
        numbers = {id(v): i for i, v in enumerate(self.variables)}
        return [[numbers[id(v)] for v in unit.variables] for unit in self.units]

    def names(self) -> list[str]:
        """For each unit the name of its layer; its path, where another has the same name."""
        names = [unit.layer.name for unit in self.units]
        return [
            unit.layer.path if names.count(name) > 1 else name
            for unit, name in zip(self.units, names, strict=True)
        ]

    @contextlib.contextmanager
    def recorded(
        self, tap: Callable[[int, Tensor], Tensor], batch_size: Any
    ) -> Iterator[list[Call]]:
        """While the scope lasts, units' calls are recorded, and their values go through `tap`. An
        embedding reads a token out of range as the nearest one in range: TensorFlow would end the
        step with an error, which tells that such an example was drawn.

        Args:
            tap: of a number and a value: gives the value back, whose cotangent will be asked for.
                Values are numbered in the order in which they come.
            batch_size: rows of the batch.

        Yields:
            The calls so far.

        Raises:
            RuntimeError: a call that was not found when the network was checked.
        """
        calls, numbers = [], itertools.count()

        def call_of(number, original, *args, **kwargs):
            unit = self.units[number]
            expected = self.order[len(calls)] if len(calls) < len(self.order) else None
            if expected is None or expected.layer is not unit.layer:
                raise RuntimeError(
                    f"Layer {unit.layer.name!r} is called where it was not when the network was "
                    "checked: which layers a network calls must not change. The step has not run."
                )
            if not expected.batched:
                args, kwargs = tree.map_structure(
                    lambda v: over_batch(v, batch_size) if ops.is_tensor(v) else v, (args, kwargs)
                )

            def tapped(value, saved, static=None):
                many = isinstance(value, list)
                calls.append(Call(number, saved, static, len(value) if many else None))
                return [tap(next(numbers), v) for v in value] if many else tap(next(numbers), value)

            return unit.run(original, tapped, *_in_range(unit.layer, args, kwargs))

        def read_by(layer, original, *args, **kwargs):
            args, kwargs = _in_range(layer, args, kwargs)
            return original(*args, **kwargs)

        with contextlib.ExitStack() as stack:
            for number, unit in enumerate(self.units):
                # Fused kernels read weights without a call of the layer.
                for layer in unit.layer._flatten_layers():
                    if hasattr(layer, "use_cudnn"):
                        stack.enter_context(patched(layer, use_cudnn=False))
                stack.enter_context(_called_by(unit.layer, functools.partial(call_of, number)))
            for layer in self.tables:
                stack.enter_context(_called_by(layer, functools.partial(read_by, layer)))
            yield calls
        if len(calls) < len(self.order):
            raise RuntimeError(
                f"Layer {self.order[len(calls)].layer.name!r} is not called where it was when the "
                "network was checked: which layers a network calls must not change. The step has "
                "not run."
            )

    def clipped_sums(
        self,
        calls: Sequence[Call],
        cotangents: Sequence[Tensor],
        thresholds: Tensor,
        factors: Tensor,
        mask: Tensor,
    ) -> tuple[list[Tensor], Tensor]:
        """Sums of the examples' gradients, those of each unit clipped to its threshold.

        A unit that is called `k` times clips each call's part to the k-th of its threshold, so that
        the norm of their sum is within it (triangle inequality). A gradient that is not finite
        counts as zero.

        Args:
            calls: all of a forward pass.
            cotangents: of their values, in the order of `tap`.
            thresholds: `(units,)`.
            factors: `(batch,)`: what each example's clipped gradient is multiplied by.
            mask: `(batch,)`, 1 for examples and 0 for padding, which takes no part.

        Returns:
            The sums, in the order of the network's trainable weights; and `(batch, units)`
            indicators of gradients within the threshold (0 for padding).
        """
        uses = [sum(call.unit == number for call in calls) for number in range(len(self.units))]
        sums, within = [None] * len(self.units), [None] * len(self.units)
        real = ops.cast(ops.greater(mask, 0), "float32")
        factors = ops.where(real > 0, factors, 0.0)
        cotangents = iter(cotangents)
        for call in calls:
            unit, number = self.units[call.unit], call.unit
            if call.values is None:
                g = next(cotangents)
            else:
                g = list(itertools.islice(cotangents, call.values))
            share = uses[number] / thresholds[number]

            def ratios(squares, share=share):
                finite = ops.isfinite(squares)
                return finite, ops.sqrt(ops.where(finite, squares, 0.0)) * share

            def scales(squares, factors, ratios=ratios):
                finite, ratio = ratios(squares)
                return ops.where(finite, factors / ops.maximum(ratio, 1.0), 0.0)

            parts, squares = unit.clipped(call.saved, g, call.static, scales, factors)
            finite, ratio = ratios(squares)
            inside = real * ops.cast(ops.logical_and(finite, ratio <= 1.0), "float32")
            if sums[number] is None:
                sums[number], within[number] = parts, inside
            else:
                sums[number] = [a + b for a, b in zip(sums[number], parts, strict=True)]
                within[number] = within[number] * inside
        for number, unit in enumerate(self.units):
            if sums[number] is None:  # nothing of the network needs it
                sums[number] = [ops.zeros(v.shape, v.dtype) for v in unit.variables]
                within[number] = real
        found = {}
        for unit, parts in zip(self.units, sums, strict=True):
            found |= {id(v): part for v, part in zip(unit.variables, parts, strict=True)}
        return [found[id(v)] for v in self.variables], ops.stack(within, axis=-1)


def layer_units(network: keras.Model, inputs: Any = None) -> LayerUnits:
    """The units of a network, once it is proven that its rows stay apart.

    Args:
        network: a built Keras model of any kind.
        inputs: what it is called on, as `check_rows_apart` takes it.

    Raises:
        UnknownLayerError: rows may be mixed, or a weight has no unit of its own.
        ValueError: the network is not built, or has a fixed batch size.

    >>> network = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    >>> [unit.layer.name for unit in layer_units(network).units] == [network.layers[0].name]
    True
    """
    units = find_units(network)
    order = check_rows_apart(network, [unit.layer for unit in units], inputs=inputs)
    own = [unit.layer for unit in units]
    tables = [v for v in network._flatten_layers() if isinstance(v, keras.layers.Embedding)]
    return LayerUnits(
        tuple(units),
        tuple(order),
        tuple(network.trainable_variables),
        tuple(v for v in tables if not any(v is layer for layer in own)),
    )


def _in_range(layer, args, kwargs):
    """Arguments of a call, with an embedding's tokens in range. A tied output reads no tokens."""
    if not isinstance(layer, keras.layers.Embedding) or len(args) > 1 or kwargs.get("reverse"):
        return args, kwargs
    # Cast first: the bound may not fit into a small integer.
    return tree.map_structure(
        lambda ids: ops.clip(ops.cast(ids, "int32"), 0, layer.input_dim - 1), (args, {})
    )


class _Calls:
    """Stands in for a layer's `call`, for some threads each in another way."""

    def __init__(self, layer):
        self.original = layer.call
        self.hidden = vars(layer).get("call")  # an attribute that is no method of the class
        self.of_thread = {}

    def __call__(self, *args, **kwargs):
        call = self.of_thread.get(threading.get_ident())
        return self.original(*args, **kwargs) if call is None else call(*args, **kwargs)


@contextlib.contextmanager
def _called_by(layer, call):
    """While the scope lasts, this thread calls a layer as `call(original, *args, **kwargs)`.

    Under a strategy of TensorFlow each replica traces the step in a thread of its own, and where
    replicas meet, in the update of a seed, say, one waits in the middle of its forward pass.
    """
    own, thread = vars(layer), threading.get_ident()
    calls = own["call"] if isinstance(own.get("call"), _Calls) else _Calls(layer)
    calls.of_thread[thread] = functools.partial(call, calls.original)
    own["call"] = calls
    try:
        yield
    finally:
        del calls.of_thread[thread]
        if not calls.of_thread:  # the last to leave, who need not be the first that came
            del own["call"]
            if calls.hidden is not None:
                own["call"] = calls.hidden
