"""Checks whether a network can be trained privately, and what to change if not."""

import dataclasses
import math
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from lipdp.bounds import LayerBound, UnknownLayerError, network_bounds
from lipdp.bounds.projections import Projection
from lipdp.bounds.rule import as_float
from lipdp.bounds.walk import LONGEST_INPUT, LONGEST_SQUARED, Trace, rule_of, trace
from lipdp.inputs import input_tensors, like_inputs
from lipdp.local.calls import LayerUnits, layer_units
from lipdp.outputs import side_by_side
from lipdp.rich_text import RichText

__all__ = [
    "Check",
    "LayerCheck",
    "as_graph",
    "check",
    "check_trainable",
    "check_units",
    "final_activation",
    "head_advice",
]


@dataclasses.dataclass(frozen=True)
class LayerCheck:
    """One call of one layer.

    Attributes:
        layer: its name.
        kind: its class.
        lipschitz: how much a cotangent can grow on its way back; None without a rule.
        output_bound: bound of the output's norm; infinite where nothing bounds the input.
        note: where the bound is loose.
        problem: why the layer has no certified bound, and what to use instead; empty if it has.
        clipped: how the norms of its gradients are measured with `lipdp.PerLayerClip()`; empty
            without trained weights, and where the network cannot be trained so.
    """

    layer: str
    kind: str
    lipschitz: float | None
    output_bound: float
    note: str
    problem: str
    clipped: str


@dataclasses.dataclass(frozen=True)
class Check(RichText):
    """The result of `check`.

    Attributes:
        network: its name.
        layers: a `LayerCheck` for each call, in the order of computation; of a network that has no
            graph, for each layer that clips.
        problems: what stands against certified bounds for the network as a whole.
        per_layer_problem: why its layers cannot clip their own gradients; empty if they can.
    """

    network: str
    layers: tuple[LayerCheck, ...]
    problems: tuple[str, ...]
    per_layer_problem: str

    @property
    def private(self) -> bool:
        """True if `PrivateModel` can train it with certified bounds."""
        return not self.problems and not any(layer.problem for layer in self.layers)

    @property
    def per_layer(self) -> bool:
        """True if `PrivateModel` can train it with `clip=lipdp.PerLayerClip()`."""
        return not self.per_layer_problem

    def to_dict(self) -> dict:
        """Plain lists, numbers and strings, ready for JSON; infinite bounds are None."""
        layers = [dataclasses.asdict(layer) for layer in self.layers]
        for layer in layers:
            if not math.isfinite(layer["output_bound"]):
                layer["output_bound"] = None
        return {
            "network": self.network,
            "private": self.private,
            "per_layer": self.per_layer,
            "problems": list(self.problems),
            "per_layer_problem": self.per_layer_problem,
            "layers": layers,
        }

    def __rich__(self):
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(title=f"Layers of {self.network}", title_justify="left")
        table.add_column("layer", overflow="fold")
        table.add_column("class", overflow="fold")
        table.add_column("Lipschitz", justify="right", no_wrap=True)
        table.add_column("output ≤", justify="right", no_wrap=True)
        if self.per_layer:
            table.add_column("norm, if it clips", overflow="fold")
        table.add_column("what to know of its bound", overflow="fold")
        for layer in self.layers:
            constant = "–" if layer.lipschitz is None else f"{layer.lipschitz:.4g}"
            style = "red" if layer.problem and not self.per_layer else None
            said = layer.problem or layer.note
            output = f"{layer.output_bound:.4g}"
            cells = [layer.layer, layer.kind, constant, output]
            if self.per_layer:
                cells.append(layer.clipped)
            table.add_row(*cells, Text(said), style=style)
        wrong = sum(bool(layer.problem) for layer in self.layers)
        lines = [*self.problems]
        if wrong:
            lines.append(f"{wrong} of {len(self.layers)} layers have no certified bound.")
        if self.private:
            lines.append("The network can be trained privately.")
        elif self.per_layer:
            lines.append(f"The network can be trained as it is: {_AS_IT_IS}.")
        else:
            lines.append(self.per_layer_problem)
            lines.append("lipdp.repair(network) makes the replacements that can be made.")
        return Group(table, Text("\n".join(lines)))


#: What to write for a network that has no certified bounds.
_AS_IT_IS = "PrivateModel(network, clip=lipdp.PerLayerClip(), ...)"


def check(network: keras.Model) -> Check:
    """Says for every layer whether it can be trained privately, in which way, and what that costs.

    With certified bounds, a layer has a Lipschitz constant, and a note where its bound is loose.
    With `clip=lipdp.PerLayerClip()` it clips its own gradient, whatever its bound.

    Args:
        network: a built Keras model.

    Returns:
        A `Check`: print it, ask `.private` and `.per_layer`, or take `to_dict()`.

    Raises:
        TypeError: the network is not a Keras model.
        ValueError: it is not built.

    >>> network = keras.Sequential([keras.Input((4, 3)), keras.layers.LSTM(2)])
    >>> found = check(network)
    >>> found.private, found.per_layer
    (False, True)
    """
    units, per_layer_problem = (), ""
    if isinstance(network, keras.Model):
        try:
            units = check_units(network).units
        except ValueError as error:
            per_layer_problem = str(error)
    try:
        traced = trace(_with_one_output(network))
    except UnknownLayerError as error:
        return Check(network.name, (), (str(error),), per_layer_problem)
    except TypeError as error:
        if not units:
            raise
        layers = [
            LayerCheck(u.layer.name, type(u.layer).__name__, None, math.inf, "", "", _clipped([u]))
            for u in units
        ]
        return Check(network.name, tuple(layers), (str(error),), "")
    assigned = _assigned_in_call(network)
    problems, layers = [], []
    if len(traced.network.outputs[0].shape) < 2:
        problems.append(
            "The network's output has no axis but the batch: end it with Reshape((1,))."
        )

    advices = _advices(network)
    bounds = dict.fromkeys(traced.inputs, math.inf)
    covered, unbounded = set(), []
    for call in traced.calls:
        xs = [bounds[s] for s in call.inputs]
        constant, output, note, problem = None, math.inf, "", ""
        try:
            rule = rule_of(call)
        except UnknownLayerError as error:
            problem = advices.get(id(call.operation)) or str(error)
            # One problem is told once: what its weights lack is no further one.
            covered.update(v.path for v in getattr(call.operation, "trainable_variables", []))
        else:
            output = as_float(rule.forward(xs))
            # The constant at an input of norm one, where the input's norm enters.
            ones = [x if as_float(x) < math.inf else 1.0 for x in xs]
            constant = max(as_float(b) for b in rule.backward(ones, 1.0))
            gradients = rule.gradients(xs, 1.0)
            covered.update(v.path for v, _ in gradients)
            if any(not math.isfinite(as_float(b)) for v, b in gradients if v.trainable):
                unbounded.append(call.operation.name)
            notes = [rule.note, _measured(gradients)]
            if advice := advices.get(id(call.operation)):
                notes.append(f"for a cross-entropy: {advice}")
            note = "; ".join(filter(None, notes))
        bounds.update(dict.fromkeys(call.outputs, output))
        layers.append(
            LayerCheck(
                call.operation.name,
                type(call.operation).__name__,
                constant,
                output,
                note,
                problem,
                _clipped(_units_of(call.operation, units)),
            )
        )

    if unbounded and not any(layer.problem for layer in layers):
        problems.append(
            f"Nothing bounds the norm of what {', '.join(map(repr, unbounded))} read: put "
            "lipdp.layers.BallProjection(radius) after the input."
        )
    if not network.trainable_variables:
        problems.append("The network has no trainable weights.")
    for variable in network.trainable_variables:
        if variable.path not in covered:
            problems.append(f"Trainable weight {variable.path!r} has no gradient bound.")
    if not any(layer.problem for layer in layers):
        problems += assigned + _imprecise(network)
    if not problems and not any(layer.problem for layer in layers):
        problems += _overflows(traced, network_bounds(traced).layers)
    return Check(network.name, tuple(layers), tuple(problems), per_layer_problem)


def check_trainable(network: keras.Model) -> None:
    """Refuses a network that has no certified bounds, with the first thing that is wrong.

    Where its layers can clip their own gradients, the message says so.

    Raises:
        TypeError: it is not a Sequential or functional model.
        ValueError: it is not built, has no trainable weights, no bound of its input, or computes in
            anything but float32.
        UnknownLayerError: a layer has no bound, or cannot be private.

    >>> check_trainable(keras.Sequential([keras.Input((4,)), keras.layers.ReLU()]))
    Traceback (most recent call last):
        ...
    ValueError: `network` ... has no trainable weights.
    """
    try:
        _check_certified(network)
    except (TypeError, ValueError) as error:
        if not isinstance(network, keras.Model):
            raise
        try:
            check_units(network)
        except ValueError:
            raise error from None
        if isinstance(error, _Head):
            raise UnknownLayerError(f"{error} To train it as it is, write {_AS_IT_IS}.") from error
        raise type(error)(
            f"To train {network.name!r} as it is, write {_AS_IT_IS}: each layer then clips its own "
            f"gradient. Without a `clip` of this kind it needs certified bounds: {error}"
        ) from error


class _Head(UnknownLayerError):
    """A network ends in probabilities that have no bound."""


def _check_certified(network):
    traced = trace(_with_one_output(network))  # refuses what is no network before it is called
    assigned = _assigned_in_call(network)
    try:
        found = network_bounds(traced)
    except UnknownLayerError as error:
        if advice := _advices(network).get(id(_first_unknown(traced))):
            raise _Head(advice) from error
        raise
    found.sensitivities()
    if not network.trainable_variables:
        raise ValueError(f"`network` {network.name!r} has no trainable weights.")
    for problem in [*assigned, *_imprecise(network), *_overflows(traced, found.layers)]:
        raise ValueError(problem)


def _first_unknown(traced):
    """The first layer without a rule; None if all have one."""
    for call in traced.calls:
        try:
            rule_of(call)
        except UnknownLayerError:
            return call.operation
    return None


def check_units(network: keras.Model, inputs: Any = None) -> LayerUnits:
    """The layers of a network that can each clip its own gradient, in the order of their calls.

    Args:
        network: a built Keras model.
        inputs: what it is called on, `keras.KerasTensor`s; by default what it was built for.

    Raises:
        UnknownLayerError: rows may be mixed, or a weight has no layer of its own.
        ValueError: it is not built, has no trainable weights, keeps them in anything but float32,
            or computes in float64.
    """
    units = layer_units(network, inputs)
    if not network.trainable_variables:
        raise ValueError(f"`network` {network.name!r} has no trainable weights.")
    for problem in _imprecise(network, ("float32", "bfloat16", "float16")):
        raise ValueError(problem)
    own = {type(v).__name__ for v in network._flatten_layers() if not _of_a_library(v)}
    if own and _rows_meet(as_graph(network), inputs):
        raise UnknownLayerError(
            f"A row of {network.name!r} changes with another row of the batch, or with their "
            f"number, when made-up rows are tried. The code of {', '.join(sorted(own))} does "
            "something else on real tensors than on symbolic ones."
        )
    return units


def _of_a_library(layer):
    return type(layer).__module__.partition(".")[0] in ("keras", "lipdp")


def _rows_meet(graph, inputs):
    """Whether made-up rows change with others: finds mistakes, and proves nothing."""
    random = np.random.default_rng(0)

    def rows(like):
        shape = (3, *(4 if n is None else n for n in like.shape[1:]))
        if "int" in like.dtype or like.dtype == "bool":
            return random.integers(0, 2, shape).astype(like.dtype)
        return random.normal(size=shape).astype("float32")

    def outputs(x, training):
        mapping = [(v, ops.copy(v)) for v in graph.variables]
        with keras.StatelessScope(mapping):  # whatever changes is forgotten
            found = tree.flatten(graph(x, training=training))
            return [ops.convert_to_numpy(ops.cast(v, "float32")) for v in found]

    x = tree.map_structure(rows, input_tensors(graph) if inputs is None else inputs)
    others = tree.map_structure(lambda v: np.stack([v[0], v[0], v[2]]), x)
    fewer = tree.map_structure(lambda v: v[[0, 2]], x)
    # Random numbers, in training, depend on how many rows there are, so these stay as many.
    # Sums of 16-bit numbers in another order differ in the second digit.
    short = any("16" in layer.compute_dtype for layer in graph._flatten_layers())
    rtol, atol = (0.1, 0.05) if short else (1e-3, 1e-5)
    trials = [(True, others, [0, 2]), (False, others, [0, 2]), (False, fewer, [0, 1])]
    return any(
        not np.allclose(a[[0, 2]], b[where], rtol=rtol, atol=atol, equal_nan=True)
        for training, changed, where in trials
        for a, b in zip(outputs(x, training), outputs(changed, training), strict=True)
    )


def as_graph(network: keras.Model) -> keras.Model:
    """The network as a functional model, which tells its inputs and outputs; it shares all weights.

    Raises:
        ValueError: a subclassed model that is not built.

    >>> class Twice(keras.Model):
    ...     def call(self, x):
    ...         return 2 * x
    >>> network = Twice()
    >>> _ = network(ops.ones((1, 3)))
    >>> as_graph(network).output_shape
    (None, 3)
    """
    if hasattr(network, "inputs") and network.inputs:
        return network
    shapes = network._build_shapes_dict if network.built else None
    if not shapes:
        raise ValueError(
            f"Network {network.name!r} is not built, so its inputs are not known: call it on a "
            "batch, or build(input_shape), first."
        )
    inputs = [
        tree.map_shape_structure(lambda shape: keras.Input(shape[1:]), shape)
        for shape in shapes.values()
    ]
    return keras.Model(inputs if len(inputs) > 1 else inputs[0], network(*inputs))


def _with_one_output(network):
    """The network, its outputs side by side; what has no graph is left to `trace`."""
    if isinstance(network, keras.Model) and getattr(network, "outputs", None):
        return side_by_side(network)[0]
    return network


def final_activation(network: keras.Model, output: int = 0) -> tuple[keras.layers.Layer, str]:
    """The layer that makes an output, also where it is the last of a model within the model, and
    the name of its activation in small letters: its own name where it has none.
    """
    last, _, number = network.outputs[output]._keras_history
    if isinstance(last, keras.Model) and getattr(last, "outputs", None):
        return final_activation(last, number)
    name = getattr(getattr(last, "activation", None), "__name__", type(last).__name__)
    return last, name.lower()


def _advices(network):
    """By the identity of each layer that makes an output: `head_advice`, where there is any."""
    ends = [final_activation(network, number) for number in range(len(network.outputs))]
    return {id(last): head_advice(last, activation) for last, activation in ends}


def head_advice(last: keras.layers.Layer, activation: str) -> str:
    """What to do where a network ends in probabilities, in one line; empty where it does not.

    Args:
        last, activation: as `final_activation` gives them.

    >>> head_advice(keras.layers.Dense(1, "sigmoid", name="p"), "sigmoid")
    "The network ends in a sigmoid: leave out activation='sigmoid' of layer 'p', and use \
loss='binary_crossentropy', which takes logits."
    """
    if activation not in ("softmax", "sigmoid"):
        return ""
    loss = "sparse_categorical_crossentropy" if activation == "softmax" else "binary_crossentropy"
    if not isinstance(last, keras.layers.Layer):
        change = f"take keras.ops.{activation} away"
    elif isinstance(last, (keras.layers.Activation, keras.layers.Softmax)):
        change = f"take layer {last.name!r} ({type(last).__name__}) away"
    else:
        change = f"leave out activation={activation!r} of layer {last.name!r}"
    return (
        f"The network ends in a {activation}: {change}, and use loss={loss!r}, which takes logits."
    )


def _units_of(layer, units):
    """The layers that clip which a layer is, or holds."""
    inner = {id(v) for v in layer._flatten_layers()} if hasattr(layer, "_flatten_layers") else ()
    return [unit for unit in units if id(unit.layer) in inner]


def _clipped(units):
    found = {f"{'exact' if u.exact else 'upper bound'}, {u.measured}" for u in units}
    return "; ".join(sorted(found))


class Assignments(keras.StatelessScope):
    """A scope in which no variable changes, and which notes those that would have.

    The states of random generators, which tell of no data, are left out.

    >>> weight = keras.Variable(1.0, name="w")
    >>> with Assignments() as scope:
    ...     _ = weight.assign(2.0)
    >>> [v.name for v in scope.assigned.values()], float(weight)
    (['w'], 1.0)
    """

    def __init__(self) -> None:
        super().__init__(collect_losses=True)
        self.assigned = {}

    def add_update(self, update: tuple[keras.Variable, Any]) -> None:
        super().add_update(update)
        if update[0].name != "seed_generator_state":
            self.assigned[id(update[0])] = update[0]


def _assigned_in_call(network):
    """Problems: variables that a call in training mode assigns.

    It is called on zeros where its shapes are known, without a trace in its variables. What a layer
    adds to the loss shows only then, too, and `rule_of` finds it.
    """
    inputs = network.inputs
    if any(n is None for t in inputs for n in t.shape[1:]):
        return []
    zeros = [ops.zeros((1, *t.shape[1:]), dtype=t.dtype) for t in inputs]
    with Assignments() as scope:
        network(like_inputs(network, zeros), training=True)
    return [
        f"A layer assigns to {variable.path!r} while it is called in training mode: what it writes "
        "has no noise, and no bound holds for it. Leave that out, or do it in a callback."
        for variable in scope.assigned.values()
    ]


def _imprecise(network, accepted=("float32",)):
    """Problems: layers that compute in other types, and weights that are not in float32."""
    problems = [
        f"Private training of this kind computes in {' or '.join(accepted)}: what rounding may add "
        "to a gradient is within the bounds' allowance there, and nowhere else. Layer "
        f"{layer.name!r} computes in {layer.compute_dtype}; make it with dtype='float32', or the "
        "whole network under keras.config.set_dtype_policy('float32')."
        for layer in network._flatten_layers(include_self=False)
        if layer.compute_dtype not in accepted
    ]
    return problems + [
        f"Private training updates weights in float32; {variable.path!r} has dtype "
        f"{variable.dtype}. Make its layer with dtype='float32'."
        for variable in network.trainable_variables
        if variable.dtype != "float32"
    ]


def _overflows(traced: Trace, layers: list[LayerBound]) -> list[str]:
    """Problems: layers that read what may overflow. Their bounds are about numbers; what is NaN
    forwards is NaN in the gradient of a weight, whatever cotangent comes.

    An input is at most `LONGEST_INPUT` long, so most layers in front of the first that bounds what
    it reads cannot overflow. It matters to the latter alone: nothing is trained in front of it.
    """
    longest = dict.fromkeys(traced.inputs, LONGEST_INPUT)
    for slot, tensor in zip(traced.inputs, traced.network.inputs, strict=True):
        if "int" in tensor.dtype:
            largest = float(np.iinfo(tensor.dtype).max)
            longest[slot] = largest * math.sqrt(math.prod(n or 1 for n in tensor.shape[1:]))
    problems = []
    for call, layer in zip(traced.calls, layers, strict=True):
        xs = [longest[s] for s in call.inputs]
        rule = rule_of(call)
        output = as_float(layer.output)
        if not math.isfinite(output):
            try:  # as long as what it reads, at least: a later layer may make it short again
                output = max(*xs, as_float(rule.forward(xs)))
            except OverflowError:  # a power
                output = math.inf
        elif not rule.any_input and max(xs) > LONGEST_SQUARED:
            problems.append(
                f"Layer {layer.name!r} ({layer.kind}) may read numbers of which the squares "
                "overflow: put lipdp.layers.BallProjection(radius) in front of it."
            )
        longest.update(dict.fromkeys(call.outputs, output))
    return problems


def _measured(gradients):
    """A note on weights that no projection holds."""
    names = [
        v.name for v, _ in gradients if not isinstance(getattr(v, "constraint", None), Projection)
    ]
    if not names:
        return ""
    return (
        f"{', '.join(names)}: measured at each step, so bounds and noise grow with the weights; "
        "the layers of lipdp keep theirs in a ball"
    )
