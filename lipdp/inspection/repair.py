"""A network that can be trained privately, made from one that cannot."""

from collections.abc import Callable

import keras
from keras.src.models.functional import Functional

from lipdp import layers
from lipdp.bounds import UnknownLayerError
from lipdp.bounds.walk import trace
from lipdp.inspection.check import check, final_activation
from lipdp.layers import BallProjection

__all__ = ["repair"]

K = keras.layers


def repair(
    network: keras.Model,
    *,
    certified: bool = False,
    radius: float | None = None,
    verbose: bool = True,
) -> keras.Model:
    """A network that can be trained privately, as a new model; the old one stays as it is.

    By default it is one to train with `clip=lipdp.PerLayerClip()`. Then almost nothing has to
    change: trained batch normalisation, which mixes examples, becomes group normalisation; a loss
    of a layer's own and a softmax or sigmoid at the end are left out. All other layers and their
    weights are kept.

    With `certified=True` it has certified bounds. Layers without a bound are replaced by those that
    come closest, layers with free weights by those whose weights stay in a ball, and a
    `BallProjection` is put behind the input. Weights that fit are taken over, projected. It
    computes something else, and has to be trained anew. Its robustness is certified as well, but
    deep networks learn less.

    Args:
        network: a built Sequential or functional model.
        certified: whether bounds are to be certified.
        radius: of the ball of the input: about the norm that inputs have. With `certified` only, 1
            by default.
        verbose: print each replacement and its reason.

    Returns:
        A model for which `check(model).per_layer` holds, or with `certified` `.private`.

    Raises:
        TypeError, ValueError: as `check`; no graph; a radius without `certified`.
        UnknownLayerError: something remains that cannot be private; the message lists it.

    >>> plain = keras.Sequential([keras.Input((8, 8, 1)), K.Conv2D(4, 3), K.BatchNormalization(),
    ...                           K.ReLU(), K.Flatten(), K.Dense(3, activation="softmax")])
    >>> [type(layer).__name__ for layer in repair(plain, verbose=False).layers]
    ['Conv2D', 'GroupNormalization', 'ReLU', 'Flatten', 'Dense']
    >>> [type(layer).__name__ for layer in repair(plain, verbose=False, certified=True).layers]
    ['BallProjection', 'SpectralConv2D', 'Centering', 'ReLU', 'Flatten', 'SpectralDense']
    """
    if radius is not None and not certified:
        raise ValueError(
            f"`radius` is that of certified networks: give certified=True, too; got {radius!r}."
        )
    trace(network)  # raises where there is no graph to repair
    ball = None
    if certified:
        ball = 1.0 if radius is None else radius
    work = _Repair(_CERTIFIED if certified else _PER_LAYER, final_activation(network)[0], ball)
    repaired = work.rebuild(network, front=certified)
    for new, old in work.carried:
        _carry_over(old, new)
    if verbose:
        for line in work.changes:
            print(line)
    found = check(repaired)
    if certified and not found.private:
        left = [layer.problem for layer in found.layers if layer.problem]
        raise UnknownLayerError("This remains to be changed: " + " ".join([*left, *found.problems]))
    if not certified and not found.per_layer:
        raise UnknownLayerError(f"This remains to be changed: {found.per_layer_problem}")
    return repaired


class _Repair:
    """One pass over a network; a shared layer is replaced once.

    Args:
        replacements: by class, a function of a layer that gives another one, or None, and the
            reason.
        last: the layer that makes the output.
        radius: of the ball of the input; None for per-layer clipping.
    """

    def __init__(self, replacements, last, radius):
        self.replacements = replacements
        self.last = last
        self.radius = radius
        self.changes = []
        self.carried = []
        self._made = {}

    def rebuild(self, network, front=False):
        if isinstance(network, keras.Sequential):
            new = [self.replaced(layer) for layer in network.layers]
            fresh = [keras.Input(t.shape[1:], dtype=t.dtype) for t in network.inputs]
            if front and not _bounded(network.layers[0]):
                new.insert(0, self.ball())
            return keras.Sequential([*fresh, *new], name=network.name)
        inputs = [keras.Input(t.shape[1:], dtype=t.dtype, name=t.name) for t in network.inputs]
        tensors = {}
        for old, tensor in zip(network.inputs, inputs, strict=True):
            if front and not all(
                _bounded(node.operation)
                for nodes in network._nodes_by_depth.values()
                for node in nodes
                if any(t is old for t in node.input_tensors)
            ):
                tensor = self.ball()(tensor)
            tensors[id(old)] = tensor
        for depth in sorted(network._nodes_by_depth, reverse=True):
            for node in network._nodes_by_depth[depth]:
                if node.is_input:
                    continue
                new = self.replaced(node.operation)
                args, kwargs = node.arguments.fill_in(tensors)
                if isinstance(new, layers.LipschitzAttention):
                    args, kwargs = _self_attention(node, tensors), {}
                outputs = keras.tree.flatten(new(*args, **kwargs))
                tensors.update({id(t): new for t, new in zip(node.outputs, outputs, strict=True)})
        outputs = keras.tree.map_structure(lambda t: tensors[id(t)], network._outputs_struct)
        return keras.Model(inputs if len(inputs) > 1 else inputs[0], outputs, name=network.name)

    def ball(self):
        self.changes.append(f"input: BallProjection({self.radius:g}), so that its norm is bounded")
        return BallProjection(self.radius)

    def replaced(self, layer):
        """The layer for the new network: a copy, or a replacement."""
        if id(layer) in self._made:
            return self._made[id(layer)]
        if isinstance(layer, (keras.Sequential, Functional)):
            new = self.rebuild(layer)
        elif not isinstance(layer, keras.layers.Layer):
            return layer  # an operation: it has no state
        else:
            make, reason = self.replacements.get(type(layer), (None, ""))
            new = make(layer) if make else None
            if new is None:
                new = self._copy(layer)
            else:
                self.changes.append(
                    f"{layer.name}: {type(layer).__name__} becomes {type(new).__name__}, {reason}"
                )
            self.carried.append((new, layer))
        self._made[id(layer)] = new
        return new

    def _copy(self, layer):
        if self.radius is not None:
            config, changes = _certified_config(layer), []
        else:
            config, changes = _clipped_config(layer, layer is self.last)
        self.changes += [f"{layer.name}: {change}" for change in changes]
        try:
            return type(layer).from_config(config)
        except (NotImplementedError, TypeError, ValueError) as error:
            raise UnknownLayerError(
                f"Layer {layer.name!r} ({type(layer).__name__}) has no replacement and cannot be "
                f"copied: {error}"
            ) from error


def _bounded(layer):
    return isinstance(layer, (BallProjection, K.Embedding))


def _certified_config(layer):
    """Its configuration without what no bound covers."""
    config = layer.get_config()
    if config.get("activity_regularizer") is not None:
        config["activity_regularizer"] = None
    if config.get("activation") == "softmax":
        config["activation"] = "linear"  # the losses take logits
    config["dtype"] = "float32"
    return config


def _clipped_config(layer, last):
    """Its configuration without what no clip covers, and what was left out."""
    config, changes = layer.get_config(), []
    if config.get("activity_regularizer") is not None:
        config["activity_regularizer"] = None
        changes.append("without its activity regulariser, whose gradient no clip covers")
    if last and config.get("activation") in ("softmax", "sigmoid"):
        changes.append(f"without its {config['activation']}, since the losses take logits")
        config["activation"] = "linear"
    if layer.compute_dtype != "float32":
        config["dtype"] = "float32"
        changes.append("in float32")
    return config, changes


def _carry_over(old, new):
    """Takes over the weights: all of them for a copy, else those of the same name and shape."""
    if type(new) is type(old):
        pairs = list(zip(new.variables, old.variables, strict=True))
    else:
        known = {v.name: v for v in old.variables}
        pairs = [(v, known[v.name]) for v in new.variables if v.name in known]
    for variable, source in pairs:
        if tuple(source.shape) == tuple(variable.shape):
            value = keras.ops.convert_to_tensor(source)
            variable.assign(value if variable.constraint is None else variable.constraint(value))
            variable.trainable = source.trainable


def _like(cls: type) -> Callable:
    """A replacement that takes over all arguments but the constraints."""

    def make(layer):
        config = _certified_config(layer)
        return cls.from_config({k: v for k, v in config.items() if not k.endswith("_constraint")})

    return make


def _group_normalization(layer):
    """Groups of four channels or more, 32 of them at most; None for what is frozen."""
    if not layer.trainable:
        return None
    channels = layer.moving_mean.shape[0]
    groups = max(n for n in range(1, 33) if channels % n == 0 and channels >= 4 * n or n == 1)
    return K.GroupNormalization(
        groups,
        axis=layer.axis,
        epsilon=layer.epsilon,
        center=layer.center,
        scale=layer.scale,
        name=layer.name,
    )


def _centering(layer):
    # Each channel over its positions; without positions, the channels.
    return layers.Centering(tuple(range(1, layer.input_spec.ndim - 1)) or None, name=layer.name)


def _recurrent(layer):
    return layers.LipschitzRNN(
        layer.units, return_sequences=layer.return_sequences, name=layer.name
    )


def _attention(layer):
    return layers.LipschitzAttention(layer.num_heads, layer.key_dim, name=layer.name)


def _self_attention(node, tensors):
    """The one tensor that attends to itself."""
    if len({id(t) for t in node.input_tensors}) > 1:
        raise UnknownLayerError(
            f"Layer {node.operation.name!r} attends to another sequence, for which there is no "
            "replacement; lipdp.layers.LipschitzAttention is for a sequence and itself."
        )
    return (tensors[id(node.input_tensors[0])],)


_FREE = "whose weights stay in a ball, so that its noise does not grow with them"
_MIXES = "because it mixes the examples of a batch"

_PER_LAYER = {K.BatchNormalization: (_group_normalization, _MIXES)}

_CERTIFIED = {
    K.Dense: (_like(layers.SpectralDense), _FREE),
    K.Conv1D: (_like(layers.SpectralConv1D), _FREE),
    K.Conv2D: (_like(layers.SpectralConv2D), _FREE),
    K.Conv2DTranspose: (_like(layers.SpectralConv2DTranspose), _FREE),
    K.DepthwiseConv2D: (_like(layers.SpectralDepthwiseConv2D), _FREE),
    K.SeparableConv2D: (_like(layers.SpectralSeparableConv2D), _FREE),
    K.Embedding: (_like(layers.Embedding), "whose vectors stay in a ball"),
    K.SimpleRNN: (_recurrent, _FREE),
    K.LSTM: (_recurrent, _FREE),
    K.GRU: (_recurrent, _FREE),
    K.MultiHeadAttention: (_attention, "on rows in a ball, where attention has a bound"),
    K.BatchNormalization: (_centering, _MIXES),
    K.UnitNormalization: (
        lambda layer: BallProjection(1.0, name=layer.name),
        "because its slope at zero is unbounded",
    ),
    K.GaussianDropout: (
        lambda layer: K.Dropout(layer.rate, name=layer.name),
        "because its factor is unbounded",
    ),
}
