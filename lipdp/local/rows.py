"""Proof that the rows of a batch stay apart: row i of every tensor depends on row i of the input.

The network is called once on symbolic tensors whose batch axis is unknown. While it runs, every
layer and every operation of `keras.ops` comes by here: those of `row_rules` are checked with their
arguments, all other layers are followed into. What cannot be followed is refused.
"""

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops, tree
from keras.src import backend
from keras.src.backend.common import KerasVariable
from keras.src.backend.common.keras_tensor import any_symbolic_tensors
from keras.src.layers import layer as layer_module
from keras.src.models.functional import Functional
from keras.src.ops import numpy as numpy_ops
from keras.src.ops.operation import Operation
from keras.src.random.seed_generator import global_seed_generator

from lipdp.bounds.rule import UnknownLayerError, has_rule
from lipdp.bounds.walk import added_loss, check_losses
from lipdp.local import row_rules
from lipdp.local.declared import DeclaredFunction, is_declared

#: What stands for the unknown sizes of an input, such as the length of a text.
_UNKNOWN_SIZE = 128

_OPERATORS = (
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "matmul",
    "and",
    "or",
    "xor",
)
_COMPARISONS = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le", "ne": "ne"}

_DECLARE = (
    "Use operations of keras.ops that act on each row by itself, or declare that this is so with "
    "`keeps_rows_apart`."
)


@dataclasses.dataclass(frozen=True)
class UnitCall:
    """One call of a layer that owns trainable weights.

    Attributes:
        layer: the layer.
        batched: whether the tensors that it is called on come from the batch. A position embedding
            that is called on `ops.arange(length)` is not; see `over_batch`.
    """

    layer: keras.layers.Layer
    batched: bool


def over_batch(x: Any, batch_size: int) -> Any:
    """A copy of a tensor without batch for each row: how a call with `batched=False` is to run.

    A first axis of size 1 becomes the batch axis, as broadcasting would have it. Otherwise the
    batch axis is put in front.

    >>> from keras import ops
    >>> [tuple(over_batch(x, 2).shape) for x in (ops.arange(3), ops.zeros((1, 3)))]
    [(2, 3), (2, 3)]
    """
    return ops.broadcast_to(x, (batch_size, *_row_shape(x)))


def _row_shape(x):
    shape = tuple(x.shape)
    return shape[1:] if shape[:1] == (1,) else shape


def _has_own_rule(layer):
    # A rule speaks of one example; those of Keras' layers are not looked at here.
    return has_rule(layer) and not type(layer).__module__.startswith("keras.")


# --- the run --------------------------------------------------------------------------------------


def check_rows_apart(
    network: keras.Model, units: Sequence[keras.layers.Layer], *, inputs: Any = None
) -> list[UnitCall]:
    """Proves that every operation of a network maps row i of the batch to row i, in training.

    Args:
        network: a built Keras model of any kind.
        units: the layers whose weights are trained. They may be composite, and their weights are
            read within their own calls only.
        inputs: what the network is called on: `keras.KerasTensor`s with a batch axis of None.
            By default what it was built for; sizes that it leaves unknown are taken as 128.

    Returns:
        The calls of the units, in the order in which the forward pass makes them.

    Raises:
        UnknownLayerError: rows may be mixed, a batch may change the state of a layer, a layer has
            a loss of its own, or a trained weight is read where its gradient would not be seen.
        ValueError: the network is not built, or has a fixed batch size.

    >>> import keras
    >>> dense = keras.layers.Dense(2)
    >>> network = keras.Sequential([keras.Input((4,)), keras.layers.Flatten(), dense])
    >>> [(call.layer is dense, call.batched) for call in check_rows_apart(network, [dense])]
    [(True, True)]
    """
    run = _Run(network, units)
    for layer in network._flatten_layers():
        check_losses(layer)
    inputs = _symbolic_inputs(network, inputs)
    with run.watching():
        try:
            outputs = network(inputs, training=True)
        except UnknownLayerError:
            raise
        except Exception as error:
            raise run.refusal(network, _first_line(error), _DECLARE) from error
    if run.refusals:  # the network caught it
        raise run.refusals[0]
    for output in tree.flatten(outputs):
        if not isinstance(output, keras.KerasTensor):
            raise run.refusal(network, "an output does not depend on the batch", "Leave it out.")
    return run.calls


def _symbolic_inputs(network, inputs):
    """Fresh symbolic tensors on which the network is called."""
    if not network.built:
        raise ValueError(f"Network {network.name!r} is not built; call it on a batch first.")

    def fresh(shape, dtype):
        if len(shape) < 1:
            raise ValueError(f"An input of {network.name!r} has no batch axis.")
        row = (_UNKNOWN_SIZE if n is None else n for n in shape[1:])
        return keras.KerasTensor((None, *row), dtype=dtype)

    functional = getattr(network, "_functional", None) or network
    if inputs is None and isinstance(functional, Functional):
        inputs = functional._inputs_struct
    if inputs is not None:
        # A Sequential that was built by a call has the size of that batch, and takes any other.
        fixed = [x.shape for x in tree.flatten(inputs) if x.shape[:1] != (None,)]
        if fixed and functional is network:
            raise ValueError(
                f"Network {network.name!r} has an input of shape {fixed[0]}, whose batch size is "
                "fixed; it must be None."
            )
        return tree.map_structure(lambda x: fresh(x.shape, x.dtype), inputs)
    shapes = network._build_shapes_dict
    if not shapes or len(shapes) > 1:
        raise ValueError(
            f"Nothing is known of the inputs of {network.name!r}; give `inputs`, KerasTensors with "
            "a batch axis of None."
        )
    (shape,) = shapes.values()
    return tree.map_shape_structure(lambda s: fresh(s, network.input_dtype), shape)


def _first_line(error):
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"


class _Run:
    """One symbolic run of a network."""

    def __init__(self, network, units):
        self.calls = []
        self.refusals = []
        self._units = {id(u): u for u in units}
        self._stack = [network]
        self._unchecked = 0
        self._thread = threading.get_ident()
        #: For each trainable weight the units in whose calls it may be read: the innermost ones.
        self._trainable = {id(v) for v in network.trainable_variables}
        self._readers = {}
        for unit in units:
            inner = {id(v) for u in self._inner_units(unit) for v in u.trainable_variables}
            for v in unit.trainable_variables:
                if id(v) not in inner:
                    self._readers.setdefault(id(v), set()).add(id(unit))
        generators = [g for layer in network._flatten_layers() for g in layer._seed_generators]
        self._seeds = {id(g.state) for g in (*generators, global_seed_generator())}

    def _inner_units(self, layer):
        inner = layer._flatten_layers(include_self=False)
        return [u for u in inner if id(u) in self._units and u is not layer]

    def refusal(self, thing, why, remedy):
        where = f"Layer {thing.name!r} ({type(thing).__name__})"
        if not isinstance(thing, keras.layers.Layer):
            kind = type(thing).__name__
            name = thing.name if isinstance(thing, DeclaredFunction) else kind
            where = f"Operation {name!r} in {self._place()}"
        text = f"{where} may mix the rows of a batch: {why}. {remedy}"
        return self._refusal(text.rstrip())

    def _refusal(self, text):
        error = UnknownLayerError(text)
        self.refusals.append(error)
        return error

    def _place(self):
        return f"layer {self._stack[-1].name!r} ({type(self._stack[-1]).__name__})"

    # --- what Keras calls while the network runs

    def layer(self, layer, args, kwargs):
        batched = any_symbolic_tensors(args, kwargs)
        unit = id(layer) in self._units
        self._stack.append(layer)
        try:
            if getattr(layer, "quantization_mode", None) is not None:
                raise self.refusal(layer, "nothing is known of quantized layers", "Train in float.")
            if not unit and not batched:
                return self._follow(layer, args, kwargs)
            if not batched:
                args, kwargs = self._over_batch(layer, args, kwargs)
            if unit:
                self._check_unit(layer, args, kwargs)
                self.calls.append(UnitCall(layer, batched))
            if type(layer) is keras.layers.TimeDistributed:
                outputs = self._time_distributed(layer, args, kwargs)
            elif self._is_leaf(layer):
                self._check_leaf(layer, args, kwargs)
                if type(layer) in row_rules.LAYERS:
                    with self._as_it_is():
                        outputs = layer.compute_output_spec(*args, **kwargs)
                    if any(None in x.shape[1:] for x in tree.flatten(outputs)):
                        # It says less than is known: EinsumDense in an attention layer.
                        outputs = self._trace(layer.call, args, kwargs)
                else:
                    outputs = self._trace(layer.call, args, kwargs)
                self._settle(layer, outputs)
                self._check_activations(layer, args, kwargs, outputs)
            else:
                outputs = self._follow(layer, args, kwargs)
            if unit:
                self._settle(layer, outputs)
            return outputs
        finally:
            self._stack.pop()

    def _check_unit(self, layer, args, kwargs):
        if layer._remat_mode:
            raise self.refusal(
                layer, "it is computed twice, under RematScope", "Make it outside of the scope."
            )
        flat = tree.flatten((args, kwargs))
        if any(ops.is_tensor(v) and not isinstance(v, keras.KerasTensor) for v in flat):
            raise self.refusal(
                layer,
                "it is called on the batch and on a tensor that has no row for each example",
                "Give each example a copy, with keras.ops.broadcast_to.",
            )

    def _over_batch(self, layer, args, kwargs):
        def symbolic(x):
            if not hasattr(x, "shape") or not tuple(x.shape):
                return x
            if tuple(x.shape)[0] != 1 and not self._takes_another_axis(layer):
                raise self.refusal(
                    layer,
                    "it is called on a tensor without batch",
                    "Call it on a copy for each row: keras.ops.broadcast_to(x, "
                    "(keras.ops.shape(inputs)[0], *x.shape)).",
                )
            return keras.KerasTensor((None, *_row_shape(x)), dtype=x.dtype)

        batched = tree.map_structure(symbolic, (args, kwargs))
        if not any_symbolic_tensors(*batched):
            raise self.refusal(layer, "it is called on no tensor", "Call it on the batch.")
        return batched

    def _takes_another_axis(self, layer):
        known = type(layer) in row_rules.LAYERS or _has_own_rule(layer)
        return known and isinstance(layer, row_rules.LAST_AXES)

    def _is_leaf(self, layer):
        """Whether it is one operation to the run, whatever it calls."""
        cls = type(layer)
        if cls in row_rules.LAYERS or cls is keras.layers.Lambda:
            return True
        if cls in row_rules.FOLLOWED:
            return False
        if cls.__module__.startswith("keras.src.layers."):
            raise self.refusal(
                layer, "nothing is known of it", "Leave it out, or declare a class of your own."
            )
        return (is_declared(layer) or _has_own_rule(layer)) and not self._inner_units(layer)

    def _check_leaf(self, layer, args, kwargs):
        first, rest = row_rules.named(layer, args, kwargs)
        inputs = row_rules.operands(first)
        for x in (*inputs, *row_rules.operands(rest)):
            if tuple(x.shape) and not isinstance(x, keras.KerasTensor):
                why = f"it is called on a constant of shape {tuple(x.shape)}"
                raise self.refusal(layer, why, "Use keras.ops for operations with constants.")
        masks = tree.flatten(rest.get("mask"))
        for x, mask in zip(inputs, masks, strict=False):
            # Broadcast from the right, a mask of a position's own entries would meet other axes.
            ranks = {2, len(x.shape)} if type(layer) is keras.layers.Softmax else {2}
            listed = type(layer) in row_rules.LAYERS
            if mask is not None and (
                mask.shape != x.shape[: len(mask.shape)]
                or (listed and len(mask.shape) not in ranks)
            ):
                why = f"its mask of shape {mask.shape} does not fit its input of shape {x.shape}"
                raise self.refusal(layer, why, "Give it a mask that begins as its input does.")
        if self._inner_units(layer):
            inner = self._inner_units(layer)[0].name
            raise self.refusal(layer, f"it calls layer {inner!r} out of sight", "Train it as one.")
        rule = row_rules.LAYERS.get(type(layer))
        if rule is not None:
            if reason := rule(layer, inputs, rest):
                raise self.refusal(layer, reason, "")
        elif is_declared(layer):
            self._try(layer, layer.call, args, kwargs)
        elif type(layer) is keras.layers.Lambda:
            raise self.refusal(layer, "nothing is known of what a Lambda computes", _DECLARE)

    def _check_activations(self, layer, args, kwargs, outputs):
        if type(layer) not in row_rules.LAYERS:
            return
        shape = tree.flatten(outputs)[0].shape
        if isinstance(layer, keras.layers.Activation):
            shape = row_rules.named(layer, args, kwargs)[0].shape
        elif isinstance(layer, keras.layers.RNN):
            shape = (None, shape[-1])
        for activation in row_rules.activations(layer):
            x = keras.KerasTensor(shape, dtype=layer.compute_dtype)
            self._follow(layer, (x,), {}, activation)

    def _follow(self, layer, args, kwargs, call=None):
        try:
            return (call or layer.call)(*args, **kwargs)
        except UnknownLayerError:
            raise
        except Exception as error:
            raise self.refusal(
                layer, f"its call cannot be followed ({_first_line(error)})", _DECLARE
            ) from error

    def _trace(self, call, args, kwargs):
        """What a call gives of which only the shapes, the weights read and the state are seen."""

        def sized(x, old, new):
            if not isinstance(x, keras.KerasTensor) or x.shape[:1] != (old,):
                return x
            return keras.KerasTensor((new, *x.shape[1:]), dtype=x.dtype)

        args, kwargs = tree.map_structure(lambda x: sized(x, None, 2), (args, kwargs))
        with self._as_it_is():
            outputs = backend.compute_output_spec(call, *args, **kwargs)
        return tree.map_structure(lambda x: sized(x, 2, None), outputs)

    def _time_distributed(self, layer, args, kwargs):
        # Keras calls `layer.layer.call` on each step, with the batch axis moved back and forth.
        x, rest = row_rules.named(layer, args, kwargs)
        inner, steps, inner_kwargs = layer.layer, x.shape[1], {}
        if inner._call_has_training_arg:
            inner_kwargs["training"] = rest.get("training")
        if inner._call_has_mask_arg and rest.get("mask") is not None:
            mask = rest["mask"].shape
            inner_kwargs["mask"] = keras.KerasTensor((None, *mask[2:]), dtype="bool")
        before = len(self.calls)
        step = keras.KerasTensor((None, *x.shape[2:]), dtype=x.dtype)
        outputs = self.layer(inner, (step,), inner_kwargs)
        self.calls += self.calls[before:] * (steps - 1)
        return keras.KerasTensor((None, steps, *outputs.shape[1:]), dtype=outputs.dtype)

    def operation(self, op, args, kwargs):
        for x in tree.flatten((args, kwargs)):
            if isinstance(x, keras.Variable):
                self.read(x)  # symbolically nothing else reads it
        rule = row_rules.OPERATIONS.get(type(op))
        if isinstance(op, DeclaredFunction):
            self._try(op, op.call, args, kwargs)
        elif rule is None:
            raise self.refusal(op, "nothing is known of it", _DECLARE)
        elif type(op) is not numpy_ops.Clip and any_symbolic_tensors(tuple(vars(op).values())):
            raise self.refusal(op, "one of its settings is a tensor of the batch", _DECLARE)
        else:
            if reason := rule(op, *args, **kwargs):
                raise self.refusal(op, reason, _DECLARE)
        if type(op) is numpy_ops.Reshape:
            row, _ = row_rules.reshaped(op, *args, **kwargs)
            return keras.KerasTensor((None, *row), dtype=args[0].dtype)
        if isinstance(op, DeclaredFunction):
            outputs = self._trace(op.call, args, kwargs)
        else:
            with self._as_it_is():
                outputs = op.compute_output_spec(*args, **kwargs)
        self._settle(op, outputs)
        return outputs

    def _settle(self, thing, outputs):
        """The first axis of every result is the batch, and no other axis is."""
        for output in tree.flatten(outputs):
            shape = getattr(output, "shape", None)
            symbolic = isinstance(output, keras.KerasTensor)
            if not symbolic or shape[:1] != (None,) or None in shape[1:]:
                why = f"a result of shape {shape} does not have the batch as its first axis"
                raise self.refusal(thing, why, _DECLARE)

    def read(self, variable):
        if id(variable) not in self._trainable or threading.get_ident() != self._thread:
            return
        readers = self._readers.get(id(variable), set())
        if not readers & {id(layer) for layer in self._stack}:
            raise self._refusal(
                f"Weight {variable.path!r} is read in {self._place()}, outside of the layer that "
                "owns it, where its gradient is not clipped. Call the owner instead (a "
                "keras.layers.ReversibleEmbedding for a tied output), or freeze the weight."
            )

    def assign(self, variable):
        if id(variable) not in self._seeds and threading.get_ident() == self._thread:
            raise self._refusal(
                f"Variable {variable.path!r} is assigned in {self._place()}: the state of a "
                "network must not change with a batch, since no noise hides the change. Leave the "
                "assignment out."
            )

    def creates(self, shape, dtype, *, of=None):
        """A tensor whose first size is that of the batch, which is None here: the same for each
        row, or random.
        """
        if shape[0] is not None or None in shape[1:]:
            raise self._refusal(
                f"A tensor of shape {tuple(shape)} is made in {self._place()}: the size of the "
                "batch may only be the size of the first axis."
            )
        if of is not None and len(of) == len(shape) and of[0] != 1:
            raise self._refusal(
                f"A constant of shape {of} is repeated in {self._place()} to the shape "
                f"{tuple(shape)}: its first axis would become the batch. Give it the size 1."
            )
        return keras.KerasTensor(shape, dtype=dtype or keras.config.floatx())

    # --- made-up rows

    def _try(self, thing, call, args, kwargs):
        """Refuses a declaration that two made-up rows show to be false."""
        random = np.random.default_rng(0)

        def rows(x):
            if not isinstance(x, keras.KerasTensor):
                return x
            shape = (2, *x.shape[1:])
            if keras.backend.is_float_dtype(x.dtype):
                return random.normal(size=shape)
            return random.integers(0, 2, shape)

        def changed(x, symbolic):
            if not isinstance(symbolic, keras.KerasTensor):
                return x
            x = np.array(x)
            x[1] = 1 - x[1]
            return x

        def tensors(values):
            return tree.map_structure(
                lambda v, x: (
                    ops.convert_to_tensor(v, x.dtype) if isinstance(x, keras.KerasTensor) else v
                ),
                values,
                (args, kwargs),
            )

        def first_rows(values):
            values = tensors(values)
            with keras.StatelessScope():
                outputs = call(*values[0], **values[1])
            return [ops.convert_to_numpy(y)[0] for y in tree.flatten(outputs)]

        one = tree.map_structure(rows, (args, kwargs))
        other = tree.map_structure(changed, one, (args, kwargs))
        with self._as_it_is():
            try:
                results = [first_rows(values) for values in (one, one, other)]
            except UnknownLayerError:
                raise
            except Exception:  # made-up rows may be none that it takes
                return
        for right, again, wrong in zip(*results, strict=True):
            same = np.allclose(right, again, equal_nan=True)
            if same and not np.allclose(right, wrong, 1e-3, 1e-5, equal_nan=True):
                why = "it is declared to keep them apart, but row 0 changes with row 1"
                raise self.refusal(thing, why, "Correct it, and leave out the declaration.")

    # --- how Keras is made to call the above

    @contextlib.contextmanager
    def _as_it_is(self):
        """Keras does what it does always, but for variables."""
        self._unchecked += 1
        try:
            yield
        finally:
            self._unchecked -= 1

    def _applies(self):
        return not self._unchecked and threading.get_ident() == self._thread

    @contextlib.contextmanager
    def watching(self):
        run = self

        def instead(owner, name, make):
            right = getattr(owner, name, None)
            if name in vars(owner):
                stack.callback(setattr, owner, name, right)
            else:
                stack.callback(delattr, owner, name)
            setattr(owner, name, make(right))

        def call(right):
            @functools.wraps(right)
            def __call__(op, *args, **kwargs):
                if not run._applies():
                    return right(op, *args, **kwargs)
                if isinstance(op, keras.layers.Layer):
                    return run.layer(op, args, kwargs)
                if any_symbolic_tensors(args, kwargs):
                    return run.operation(op, args, kwargs)
                return right(op, *args, **kwargs)

            return __call__

        def symbolic_call(right):
            def symbolic_call(op, *args, **kwargs):
                if not run._applies():
                    return right(op, *args, **kwargs)
                return run.operation(op, args, kwargs)

            return symbolic_call

        def node(right):
            def node(*args, **kwargs):
                return None if run._applies() else right(*args, **kwargs)

            return node

        def read(right):
            def get_current_value(scope, variable):
                run.read(variable)
                return right(scope, variable)

            return get_current_value

        def assign(right):
            def add_update(scope, update):
                run.assign(update[0])
                return right(scope, update)

            return add_update

        def add_loss(right):
            def add_loss(layer, loss):
                raise added_loss(layer)

            return add_loss

        def sized(right):
            @functools.wraps(right)
            def sized(shape, *args, **kwargs):
                if run._applies() and (shape is None or None in tree.flatten(shape)):
                    if any_symbolic_tensors(args, kwargs):
                        raise run._refusal(
                            f"A tensor is made in {run._place()} of numbers of the batch, whose "
                            "rows might not be its rows. Make it without them, and add or multiply "
                            "them afterwards."
                        )
                    shape = (shape,) if shape is None else shape
                    return run.creates(shape, kwargs.get("dtype"))
                return right(shape, *args, **kwargs)

            return sized

        def broadcast_to(right):
            def broadcast_to(x, shape):
                if run._applies() and None in tuple(shape):
                    return run.creates(shape, x.dtype, of=tuple(x.shape))
                return right(x, shape)

            return broadcast_to

        def tile(right):
            def tile(x, repeats):
                if run._applies() and isinstance(repeats, (list, tuple)) and None in repeats:
                    missing = len(repeats) - len(x.shape)
                    old = (1,) * missing + tuple(x.shape)
                    pairs = zip(old[-len(repeats) :], repeats, strict=True)
                    new = [None if n is None else size * n for size, n in pairs]
                    return run.creates((*old[: -len(repeats)], *new), x.dtype, of=old)
                return right(x, repeats)

            return tile

        def repeat(right):
            def repeat(x, repeats, axis=None):
                if run._applies() and repeats is None:
                    new = tuple(None if i == axis else n for i, n in enumerate(x.shape))
                    return run.creates(new, x.dtype, of=tuple(x.shape))
                return right(x, repeats, axis)

            return repeat

        def dropout(right):
            def dropout(inputs, *args, **kwargs):
                if run._applies() and isinstance(inputs, keras.KerasTensor):
                    return keras.KerasTensor(inputs.shape, dtype=inputs.dtype)
                return right(inputs, *args, **kwargs)

            return dropout

        def fused(right):
            # It reads the weights of its layers outside of their calls.
            def fused(*args, **kwargs):
                raise NotImplementedError

            return fused

        def with_tensor(name):
            # `weight * x`: a variable knows tensors only.
            opposite = _COMPARISONS.get(name, "r" + name)

            def make(right):
                def operator(variable, other):
                    if run._applies() and isinstance(other, keras.KerasTensor):
                        return getattr(other, f"__{opposite}__")(variable)
                    return right(variable, other)

                return operator

            return make

        with contextlib.ExitStack() as stack:
            for name in (*_OPERATORS, *_COMPARISONS):
                instead(KerasVariable, f"__{name}__", with_tensor(name))
            # Of `array * x` NumPy and JAX then leave the product to x.
            instead(keras.KerasTensor, "__array_ufunc__", lambda right: None)
            instead(keras.KerasTensor, "__jax_array__", lambda right: property())
            instead(Operation, "__call__", call)
            instead(Operation, "symbolic_call", symbolic_call)
            instead(layer_module, "Node", node)
            instead(keras.StatelessScope, "get_current_value", read)
            instead(keras.StatelessScope, "add_update", assign)
            instead(layer_module.Layer, "add_loss", add_loss)
            for name in ("zeros", "ones", "full"):
                instead(backend.numpy, name, sized)
            for name in ("normal", "uniform", "truncated_normal", "randint"):
                instead(backend.random, name, sized)
            for name in (broadcast_to, tile, repeat):
                instead(backend.numpy, name.__name__, name)
            instead(backend.random, "dropout", dropout)
            for name in ("bidirectional_lstm", "bidirectional_gru"):
                instead(backend, name, fused)
            stack.enter_context(keras.StatelessScope())
            yield
