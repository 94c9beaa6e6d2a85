"""The walk over a network's graph: norms forwards, cotangents backwards."""

import dataclasses
import itertools
import math

import keras
from keras import ops, tree
from keras.src import ops as keras_ops
from keras.src.backend import get_keras_mask
from keras.src.models.functional import Functional

from lipdp.bounds.rule import (
    Call,
    Rule,
    Scalar,
    UnknownLayerError,
    as_float,
    find_rule,
    has_rule,
)

#: Every sensitivity is multiplied by it: room for the float32 rounding of forward and backward
#: passes, which the rules, being about exact arithmetic, do not know.
ROUNDING = 1.0 + 1e-4

#: The longest example that a step reads: longer ones are scaled to it, each by itself.
LONGEST_INPUT = 1e16

#: A vector of at most this norm has squares that float32 can add up.
LONGEST_SQUARED = 1e19

#: A cotangent so short that no ClipGradient, which is the identity forwards, cuts it.
UNIT = 2.0**-30


@dataclasses.dataclass
class LayerBound:
    """Bounds at one call of one layer."""

    name: str
    kind: str
    inputs: list[Scalar]
    output: Scalar
    cotangent: Scalar
    input_cotangents: list[Scalar]
    gradients: list[tuple[str, Scalar]]
    note: str


@dataclasses.dataclass(frozen=True)
class LayerCall:
    """One call of one layer in a traced network, between numbered tensors."""

    operation: object
    signature: Call
    inputs: list[int]
    outputs: list[int]


@dataclasses.dataclass(frozen=True)
class Trace:
    """All calls of a network, nested ones included, in the order of computation."""

    network: keras.Model
    calls: list[LayerCall]
    inputs: list[int]
    outputs: list[int]


@dataclasses.dataclass
class NetworkBounds:
    """Bounds of a whole network.

    Attributes:
        trace: the calls that were walked.
        gradients: `{variable.path: Δ}`, the largest norm of one example's gradient.
        layers: one `LayerBound` for each call, in the order of computation.
        output: bound of the output's norm.
        input_cotangents: bound of the cotangent's norm at each input.
        lipschitz: bound of the network's Lipschitz constant.
    """

    trace: Trace
    gradients: dict[str, Scalar]
    layers: list[LayerBound]
    output: Scalar
    input_cotangents: list[Scalar]
    lipschitz: Scalar

    def sensitivities(self, as_tensors: bool = False) -> dict[str, Scalar]:
        """The largest norm of one example's gradient for each trainable weight, with room for
        rounding; see `gradient_bounds`.
        """
        variables = self.trace.network.trainable_variables
        paths = [v.path for v in variables]
        if len(set(paths)) < len(paths):
            double = sorted({p for p in paths if paths.count(p) > 1})
            raise ValueError(
                f"Several weights share the path {double}; give the layers other names."
            )
        bounds = {}
        for path in paths:
            if path not in self.gradients:
                raise UnknownLayerError(
                    f"Trainable weight {path!r} has no gradient bound. Freeze its layer, or name "
                    "the weight in the rule's `gradients`."
                )
            bound = self.gradients[path] * ROUNDING
            if not (as_tensors and ops.is_tensor(bound)):
                bound = as_float(bound)
                if not math.isfinite(bound):
                    raise ValueError(
                        f"The gradient of {path!r} is unbounded: nothing bounds the norm of what "
                        "its layer reads. Put lipdp.layers.BallProjection(radius) after the input."
                    )
            bounds[path] = bound
        return bounds


def _graph(network):
    """The network as a functional graph.

    Raises:
        TypeError: it is not a Sequential or functional Keras model.
        ValueError: it is not built.
    """
    if type(network) is keras.Sequential:
        if not network.built or network._functional is None:
            raise ValueError(
                f"Network {network.name!r} is not built; put keras.Input(shape) first."
            )
        return network._functional
    if type(network) is keras.Model or type(network) is Functional:
        return network
    raise TypeError(
        "`network` must be a keras.Sequential or functional keras.Model, whose graph can be "
        f"walked; got {type(network).__name__}. A subclassed model has no graph: rebuild it "
        "with the functional API."
    )


def trace(network: keras.Model) -> Trace:
    """The calls of a network. Whatever walks a network takes a trace as well.

    Raises:
        TypeError, ValueError: as `network_bounds`.
        UnknownLayerError: a mask that might mix examples, or a variable among the operands.
    """
    numbers = itertools.count()
    graph = _graph(network)
    inputs = [next(numbers) for _ in graph._inputs]
    calls = []
    # Tensors that may carry a Keras mask: once attached it may come through every further layer,
    # also through nested models, whose graphs do not show it.
    masked = set()

    def follow(graph, inputs):
        _check_batch_axis(graph)
        slots = {id(t): s for t, s in zip(graph._inputs, inputs, strict=True)}
        for depth in sorted(graph._nodes_by_depth, reverse=True):
            for node in graph._nodes_by_depth[depth]:
                if node.is_input:
                    continue
                operation = node.operation
                _check_operands(node)
                if all(t.dtype == "bool" for t in node.outputs) and not (
                    has_rule(operation) and all(id(t) in slots for t in node.input_tensors)
                ):
                    _check_alignment(node)
                    continue  # no cotangent passes; who reads it must know it as a mask
                tensors = _data_of(node, slots)
                sources = [slots[id(t)] for t in tensors]
                if isinstance(operation, (Functional, keras.Sequential)):
                    _check_layer(operation)
                    outputs = follow(_graph(operation), sources)
                else:
                    outputs = [next(numbers) for _ in node.outputs]
                    signature = Call(
                        input_shapes=tuple(tuple(t.shape[1:]) for t in tensors),
                        output_shape=tuple(node.outputs[0].shape[1:]),
                        args=node.arguments.args,
                        kwargs=node.arguments.kwargs,
                        masked=any(s in masked for s in sources),
                    )
                    if signature.masked or any(get_keras_mask(t) is not None for t in node.outputs):
                        masked.update(outputs)
                    calls.append(LayerCall(operation, signature, sources, outputs))
                slots.update({id(t): s for t, s in zip(node.outputs, outputs, strict=True)})
        return [slots[id(t)] for t in graph._outputs]

    _check_layer(network)
    outputs = follow(graph, inputs)
    return Trace(network, calls, inputs, outputs)


def rule_of(call: LayerCall) -> Rule:
    """The rule of one call.

    Raises:
        UnknownLayerError: there is none, or none for this call.
    """
    operation = call.operation
    _check_layer(operation)
    if () in call.signature.input_shapes and not isinstance(operation, _GIVES_AN_AXIS):
        raise UnknownLayerError(
            f"Layer {operation.name!r} ({type(operation).__name__}) reads a tensor of shape "
            "(batch,), whose only axis is that of the examples, and may mix them. Put "
            "keras.layers.Reshape((1,)) in front of it."
        )
    if len(call.outputs) != 1:
        raise UnknownLayerError(
            f"Layer {operation.name!r} has {len(call.outputs)} outputs; rules are for layers "
            "with one."
        )
    try:
        rule = find_rule(operation)(call.signature)
    except UnknownLayerError:
        raise
    except ValueError as error:
        raise UnknownLayerError(
            f"Layer {operation.name!r} ({type(operation).__name__}): {error}"
        ) from error
    if call.signature.masked and _takes_masks(operation) and not rule.masks:
        raise UnknownLayerError(
            f"Layer {operation.name!r} ({type(operation).__name__}) may be called with a mask, for "
            "which its bounds do not hold. Use a layer of lipdp.layers that knows masks, such as "
            "MaskedAveragePooling1D, or leave the mask out (mask_zero=False, no "
            "keras.layers.Masking)."
        )
    return rule


# What may read a tensor that has the batch axis alone: each gives an example an axis of its own.
_GIVES_AN_AXIS = (
    keras.layers.Embedding,
    keras.layers.Flatten,
    keras.layers.Reshape,
    keras_ops.numpy.ExpandDims,
)


def _check_batch_axis(graph):
    for tensor in graph._inputs:
        if tensor.shape[0] is not None:
            raise ValueError(
                f"`network` must take batches of any size: its input {tensor.name!r} has the shape "
                f"{tuple(tensor.shape)}. Say keras.Input({tuple(tensor.shape[1:])}), without the "
                "batch."
            )


def _check_operands(node):
    """No rule looks at a variable's value more than once, and no optimizer knows it."""
    operands = [node.arguments.args, node.arguments.kwargs]
    if not isinstance(node.operation, keras.layers.Layer):
        operands += vars(node.operation).values()
    if any(hasattr(operand, "assign") for operand in tree.flatten(operands)):
        raise UnknownLayerError(
            f"Operation {node.operation.name!r} reads a variable, whose value may change after its "
            "bound was found, and which is not trained. Use a layer with a weight, such as "
            "lipdp.layers.ChannelGain or PositionalEmbedding, or a constant."
        )


def _takes_masks(operation):
    # Keras fills `mask`, or `query_mask` and the like where there are several inputs.
    arguments = getattr(operation, "call_signature_parameters", ())
    return any(name.endswith("mask") for name in arguments)


def _check_alignment(node):
    # Shapes are aligned from the right: the batch axis of one mask would meet another axis.
    if len({len(t.shape) for t in node.input_tensors}) > 1:
        raise UnknownLayerError(
            f"The masks that {node.operation.name!r} joins have different ranks, which would mix "
            "the examples. Join branches of one rank, or leave out their masks."
        )


def _data_of(node, slots):
    """The input tensors of a call, but for the mask that Keras hands on beside them.

    Raises:
        UnknownLayerError: another mask, which might mix examples, or a comparison's result.
    """
    operation = node.operation
    attached = {id(get_keras_mask(t)) for t in node.input_tensors if id(t) in slots}
    masks = [m for m in tree.flatten(node.arguments.kwargs.get("mask")) if m is not None]
    if any(id(m) not in attached for m in masks):
        raise UnknownLayerError(
            f"Layer {operation.name!r} is called with a `mask` argument, which might mix the "
            "examples. Only masks that layers attach are supported: those of "
            "Embedding(mask_zero=True) and keras.layers.Masking."
        )
    known = {id(m) for m in masks}
    tensors = [t for t in node.input_tensors if id(t) not in known]
    if any(id(t) not in slots for t in tensors):
        raise UnknownLayerError(
            f"Layer {operation.name!r} reads a boolean tensor, which has no rule."
        )
    return tensors


def check_losses(layer: keras.layers.Layer) -> None:
    """Refuses a layer with a loss of its own.

    Raises:
        UnknownLayerError: it has an activity regulariser, or called `add_loss`.
    """
    if getattr(layer, "activity_regularizer", None) is not None:
        raise UnknownLayerError(
            f"Layer {layer.name!r} has an activity regulariser: its gradient bypasses the clip "
            "of the loss gradient, so it has no bound. Remove `activity_regularizer`."
        )
    # Keras keeps the first; of a call that leaves no trace, the second.
    if getattr(layer, "_losses", None) or getattr(layer, "_loss_ids", None):
        raise added_loss(layer)


def added_loss(layer: keras.layers.Layer) -> UnknownLayerError:
    """The refusal of a layer that calls `add_loss`."""
    return UnknownLayerError(
        f"Layer {layer.name!r} called `add_loss`: its gradient bypasses the clip of the loss "
        "gradient, so it has no bound. Put the term into the compiled loss."
    )


def _check_layer(layer):
    check_losses(layer)
    dtype = getattr(layer, "compute_dtype", None)
    if dtype is not None and dtype not in ("float32", "float64"):
        raise UnknownLayerError(
            f"Layer {layer.name!r} computes in {dtype}, whose rounding no bound covers; "
            "use dtype='float32'."
        )


def network_bounds(
    network: keras.Model | Trace,
    loss_gradient_bound: Scalar = 1.0,
    input_bound: float = math.inf,
) -> NetworkBounds:
    """Bounds at every layer of a network.

    Bounds go through every call of every layer: a tensor that feeds several layers collects the
    sum of their cotangent bounds, a weight that is used several times the sum of its gradient
    bounds (triangle inequality).

    Args:
        network: a built Sequential or functional model with one output, or its trace; nested
            models, branches and shared layers are welcome.
        loss_gradient_bound: bound of the norm of the loss gradient with respect to the output,
            for each example.
        input_bound: bound of the norm of each input. Infinite unless something else than the
            network guarantees it.

    Returns:
        `NetworkBounds`, of the network as a private step uses it; see `gradient_bounds`. Scalars
        are tensors where a weight had to be measured.

    Raises:
        UnknownLayerError: a layer has no rule, mixes examples, or adds a loss.
        TypeError: the network is not a Sequential or functional model.
        ValueError: it has several outputs or is not built.
    """
    traced = network if isinstance(network, Trace) else trace(network)
    if len(traced.outputs) != 1:
        raise ValueError(
            f"`network` must have one output; {traced.network.name!r} has {len(traced.outputs)}. "
            "Join them with keras.layers.Concatenate."
        )
    calls, (output,) = traced.calls, traced.outputs
    forward = dict.fromkeys(traced.inputs, input_bound)
    rules = []
    for call in calls:
        rules.append(rule_of(call))
        forward[call.outputs[0]] = rules[-1].forward([forward[s] for s in call.inputs])
    if len(traced.network.outputs[0].shape) < 2:
        raise ValueError(
            f"`network` must give each example an axis, (batch, 1) say; {traced.network.name!r} "
            "gives (batch,). End it with keras.layers.Reshape((1,))."
        )

    def backwards(start):
        cotangents = {output: start}
        found = []
        for call, rule in zip(reversed(calls), reversed(rules), strict=True):
            xs = [forward[s] for s in call.inputs]
            g = cotangents.get(call.outputs[0])
            if g is None:  # nothing of the loss comes through here
                found.append((call, rule, xs, 0.0, [0.0] * len(xs)))
                continue
            back = list(rule.backward(xs, g))
            for source, cotangent in zip(call.inputs, back, strict=True):
                cotangents[source] = cotangents.get(source, 0.0) + cotangent
            found.append((call, rule, xs, g, back))
        return cotangents, found[::-1]

    cotangents, found = backwards(loss_gradient_bound)
    gradients: dict[str, Scalar] = {}
    layers = []
    for call, rule, xs, g, back in found:
        pairs = [(v.path, b) for v, b in rule.gradients(xs, g)]
        for path, bound in pairs:
            gradients[path] = gradients.get(path, 0.0) + bound
        layers.append(
            LayerBound(
                name=call.operation.name,
                kind=type(call.operation).__name__,
                inputs=xs,
                output=forward[call.outputs[0]],
                cotangent=g,
                input_cotangents=back,
                gradients=pairs,
                note=rule.note,
            )
        )
    unit, _ = backwards(UNIT)
    return NetworkBounds(
        trace=traced,
        gradients=gradients,
        layers=layers,
        output=forward[output],
        input_cotangents=[cotangents.get(s, 0.0) for s in traced.inputs],
        lipschitz=sum(unit.get(s, 0.0) for s in traced.inputs) / UNIT,
    )


def gradient_bounds(
    network: keras.Model | Trace, loss_gradient_bound: Scalar = 1.0, *, as_tensors: bool = False
) -> dict[str, Scalar]:
    """Sensitivity of each trainable weight: the largest norm of one example's gradient.

    Args:
        network: a built Sequential or functional model, or its trace.
        loss_gradient_bound: bound of the norm of the loss gradient with respect to the
            network's output, for each example (the loss constant, or the clip).
        as_tensors: leave bounds that depend on measured weights as tensors (for compiled steps).

    Returns:
        `{variable.path: Δ}` with a finite Δ for each trainable weight. A trainable weight that has
        a projection counts as inside its set, where every step puts it before it relies on that: a
        weight that was assigned may be outside until then. All other weights are measured, frozen
        ones, too, and the bound holds for their current values.

    Raises:
        UnknownLayerError: a layer has no rule, or a trainable weight no bound.
        ValueError: nothing bounds the input.

    >>> from lipdp import layers
    >>> network = keras.Sequential([
    ...     keras.Input((4,)), layers.BallProjection(2.0), layers.SpectralDense(3, use_bias=False)])
    >>> [round(b, 3) for b in gradient_bounds(network, 1.0).values()]
    [2.0]
    """
    return network_bounds(network, loss_gradient_bound).sensitivities(as_tensors)
