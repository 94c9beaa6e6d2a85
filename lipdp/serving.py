"""A trained network as a model of plain Keras layers, which loads without lipdp."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops, tree
from keras.src.backend import get_keras_mask, set_keras_mask
from keras.src.models.functional import Functional

from lipdp import layers
from lipdp.autodiff import fused
from lipdp.bounds import UnknownLayerError
from lipdp.inputs import input_tensors
from lipdp.training.model import PrivateModel

__all__ = ["to_keras"]

K = keras.layers


def to_keras(network: keras.Model) -> keras.Model:
    """A model of plain Keras layers with the same outputs, which loads where lipdp is missing.

    Each layer of lipdp becomes the Keras layer that computes the same with the weights as they are
    now, or a small functional model of Keras layers and operations, under the layer's name. Layers
    of Keras are copied, without their constraints. Models within the network are resolved into
    their layers, which get the model's name in front of theirs. The new model shares no weights
    with the network, and is for predictions: trained further it is not private, and a
    `PrivateModel` of it does not know what its weights have cost, unless by a ledger.

    Before it is returned, both are called on made-up rows, and their outputs compared.

    Args:
        network: a built Sequential or functional model, or a `PrivateModel` of one.

    Returns:
        A functional model with the inputs and the outputs of the network, not compiled.

    Raises:
        TypeError: a subclassed model, which has no graph.
        ValueError: the network is not built; the outputs differ.
        UnknownLayerError: a layer that is neither Keras' nor lipdp's, or that holds what is not
            Keras'; the message names it.

    >>> network = keras.Sequential([keras.Input((6,)), layers.SpectralDense(4), layers.MaxMin()])
    >>> plain = to_keras(network)
    >>> [type(layer).__name__ for layer in plain.layers]
    ['InputLayer', 'Dense', 'Functional']
    >>> x = ops.ones((1, 6))
    >>> bool(ops.all(plain(x) == network(x)))
    True
    """
    if isinstance(network, PrivateModel):
        network = network.network
    if not _has_graph(network):
        raise TypeError(
            "`network` must be a Sequential or functional model, or a PrivateModel of one; got "
            f"{type(network).__name__}. A subclassed model has no graph: rebuild it with the "
            "functional API."
        )
    if not getattr(network, "inputs", None):
        raise ValueError(f"Network {network.name!r} is not built; put keras.Input(shape) first.")
    inputs = tree.map_structure(
        lambda t: keras.Input(batch_shape=t.shape, dtype=t.dtype, name=t.name),
        input_tensors(network),
    )
    outputs = _Conversion().follow(network, tree.flatten(inputs))
    plain = keras.Model(inputs, outputs, name=network.name)
    _compare(network, plain)
    return plain


def _has_graph(layer):
    return type(layer) in (keras.Sequential, keras.Model, Functional)


class _Conversion:
    """One pass over a network; a layer that is called twice is converted once."""

    def __init__(self) -> None:
        self._singles = {}
        self._subgraphs = {}

    def follow(self, network: keras.Model, inputs: list, prefix: str = "") -> Any:
        """The outputs of a network on new inputs, in the structure of its outputs."""
        graph = getattr(network, "_functional", None) or network
        tensors = {id(old): new for old, new in zip(graph._inputs, inputs, strict=True)}
        for depth in sorted(graph._nodes_by_depth, reverse=True):
            for node in graph._nodes_by_depth[depth]:
                if node.is_input:
                    continue
                args, kwargs = node.arguments.fill_in(tensors)
                outputs = tree.flatten(self._call(node.operation, args, kwargs, prefix))
                for old, new in zip(node.outputs, outputs, strict=True):
                    tensors[id(old)] = new
        return tree.map_structure(lambda t: tensors[id(t)], graph._outputs_struct)

    def _call(self, layer, args, kwargs, prefix):
        if _has_graph(layer):
            inputs = tree.flatten(args[0] if args else kwargs["inputs"])
            masks = tree.flatten(kwargs.get("mask"))
            for tensor, mask in zip(inputs, masks, strict=False):
                if mask is not None:
                    set_keras_mask(tensor, mask)
            return self.follow(layer, inputs, f"{prefix}{layer.name}_")
        called = self._subgraph if type(layer) in _SUBGRAPHS else self._single
        return called(layer, args, kwargs, prefix + layer.name)

    def _single(self, layer, args, kwargs, name):
        if id(layer) in self._singles:
            outputs = self._singles[id(layer)](*args, **kwargs)
        else:
            new, weights = _single(layer, name)
            outputs = new(*args, **kwargs)  # builds it
            if isinstance(new, K.Layer):
                _give(new, weights)
            self._singles[id(layer)] = new
        if isinstance(layer, K.Embedding) and layer.mask_zero:
            set_keras_mask(outputs, layer.compute_mask(args[0]))
        return outputs

    def _subgraph(self, layer, args, kwargs, name):
        inputs = [t for t in tree.flatten((args, kwargs)) if isinstance(t, keras.KerasTensor)]
        mask = kwargs.get("mask")
        if mask is None:
            mask = get_keras_mask(inputs[0])
            if mask is not None and layer._call_has_mask_arg:
                inputs.append(mask)
        # One for each shape, since a small model is for the shape that it was made with.
        made = self._subgraphs.setdefault(id(layer), {})
        shapes = tuple(tuple(t.shape) for t in inputs)
        if shapes not in made:
            made[shapes] = _subgraph(layer, inputs, f"{name}_{len(made)}" if made else name)
        output = _without_masks(made[shapes], inputs)
        if layer.supports_masking or isinstance(layer, layers.Embedding):
            mask = layer.compute_mask(inputs[0], mask)
            if mask is not None:
                set_keras_mask(output, mask)
        return output


def _without_masks(model, inputs):
    """Calls a model whose masks, if any, are among its inputs: Keras would hand them on as well."""
    masks = [get_keras_mask(t) for t in inputs]
    for tensor in inputs:
        set_keras_mask(tensor, None)
    try:
        return model(inputs if len(inputs) > 1 else inputs[0])
    finally:
        for tensor, mask in zip(inputs, masks, strict=True):
            set_keras_mask(tensor, mask)


def _subgraph(layer, like, name):
    """A functional model that computes what a layer does, on tensors like those given."""
    inputs = [keras.Input(batch_shape=t.shape, dtype=t.dtype) for t in like]
    output = _SUBGRAPHS[type(layer)](layer, *inputs)
    model = keras.Model(inputs if len(inputs) > 1 else inputs[0], output, name=name)
    model.trainable = layer.trainable
    return model


def _give(layer, values):
    wanted, given = ([tuple(np.shape(w)) for w in found] for found in (layer.weights, values))
    if wanted != given:
        raise UnknownLayerError(
            f"Layer {layer.name!r} ({type(layer).__name__}) cannot be copied: its weights have the "
            f"shapes {given}, and those of a layer of its configuration have {wanted}."
        )
    layer.set_weights(values)
    if hasattr(layer, "finalize_state"):  # what Normalization makes of its weights
        layer.finalize_state()


def _values(layer):
    return [ops.convert_to_numpy(v) for v in layer.weights]


# --- one layer for one ------------------------------------------------------------------------


def _single(layer, name):
    """A Keras layer, or operation, that does what this one does, and the values of its weights."""
    if type(layer) in _SINGLE:
        make = _SINGLE[type(layer)]
        return make(layer, dict(name=name, dtype=layer.dtype_policy, trainable=layer.trainable))
    if type(layer).__module__.partition(".")[0] != "keras":
        raise UnknownLayerError(
            f"Layer {layer.name!r} ({type(layer).__name__}) is neither Keras' nor lipdp's: "
            "lipdp.to_keras cannot say in layers of Keras what it computes. Write it as a "
            "functional model."
        )
    config = {**_plain_config(layer.get_config()), "name": name}
    foreign = _foreign(config)
    if isinstance(layer, K.Lambda):
        foreign = "Python code"
    if foreign:
        raise _holds(layer, foreign)
    if isinstance(layer, K.Embedding):
        config["mask_zero"] = False  # masks are handed on by name
    new = type(layer).from_config(config)
    return new, _values(layer) if isinstance(layer, K.Layer) else []


def _holds(layer, foreign):
    return UnknownLayerError(
        f"Layer {layer.name!r} ({type(layer).__name__}) holds {foreign}, which loads only where "
        "its code is. Put a layer or operation of Keras in its place, then convert."
    )


def _plain_config(config):
    """Without constraints, which matter in training alone, here and in layers that it holds."""
    if isinstance(config, Mapping):
        return {
            k: None if str(k).endswith("_constraint") else _plain_config(v)
            for k, v in config.items()
        }
    return [_plain_config(v) for v in config] if isinstance(config, list) else config


def _foreign(config):
    """The name of something in a configuration that is not Keras' own; empty if there is none."""
    if isinstance(config, Mapping):
        if "class_name" in config:
            if config["class_name"] == "function":
                return str(config["config"])
            root = str(config.get("module") or "keras").partition(".")[0]
            if root not in ("keras", "builtins"):
                return str(config.get("registered_name") or config["class_name"])
        config = list(config.values())
    if isinstance(config, (list, tuple)):
        return next(filter(None, map(_foreign, config)), "")
    known = isinstance(config, str) and keras.saving.get_registered_object(config) is not None
    return config if known else ""


def _of_base(layer, base):
    """The Keras layer from which one of lipdp derives."""
    base_class = next(c for c in type(layer).__mro__ if c.__module__.startswith("keras."))
    config = {**_plain_config(base_class.get_config(layer)), **base}
    if foreign := _foreign(config):
        raise _holds(layer, foreign)
    return base_class.from_config(config), _values(layer)


def _orthogonal_dense(layer, base):
    matrix = layer._matrix(layer._tall(layer.kernel))
    wide = layer.kernel.shape[0] < layer.kernel.shape[1]
    new, values = _of_base(layer, base)
    return new, [ops.convert_to_numpy(ops.transpose(matrix) if wide else matrix), *values[1:]]


def _recurrent(layer, base):
    new = K.SimpleRNN(
        layer.units,
        activation=layer.activation,
        use_bias=layer.use_bias,
        return_sequences=layer.return_sequences,
        unroll=True,  # as in lipdp; TFLite has no loops over lists of tensors
        **base,
    )
    kernel, *bias = _values(layer)
    return new, [kernel[layer.units :], kernel[: layer.units], *bias]


_SINGLE: dict[type, Callable] = {
    **dict.fromkeys(
        (
            layers.AlmostOrthogonalConv2D,
            layers.AlmostOrthogonalDense,
            layers.FrobeniusDense,
            layers.SpectralConv1D,
            layers.SpectralConv2D,
            layers.SpectralConv2DTranspose,
            layers.SpectralDense,
            layers.SpectralDepthwiseConv2D,
            layers.SpectralSeparableConv2D,
        ),
        _of_base,
    ),
    layers.CayleyDense: _orthogonal_dense,
    layers.ExponentialDense: _orthogonal_dense,
    layers.ClipGradient: lambda layer, base: (
        K.Activation("linear", **base),
        [],
    ),  # acts backwards only
    layers.LipschitzRNN: _recurrent,
}


# --- a small model for one layer ----------------------------------------------------------------


def _applied(new, x, *weights):
    y = new(x)
    new.set_weights([ops.convert_to_numpy(w) for w in weights])
    return y


def _dense(x, kernel, bias=None, activation=None):
    new = K.Dense(kernel.shape[1], activation=activation, use_bias=bias is not None)
    return _applied(new, x, kernel, *([] if bias is None else [bias]))


def _times(x, factors):
    """Each position, or each channel, times its own factor."""
    axes = "abcdefgh"[: len(x.shape)]
    equation = f"{axes},{axes[-len(factors.shape) :]}->{axes}"
    return _applied(K.EinsumDense(equation, x.shape[1:]), x, factors)


def _in_ball(x, radius, axes):
    """What `BallProjection` computes, on the way that is right for numbers of every size."""
    return layers.BallProjection(radius)._careful(x, axes)[0]


def _ball(layer, x):
    axes = (-1,) if layer.per_position else tuple(range(1, len(x.shape)))
    return _in_ball(ops.cast(x, layer.compute_dtype), layer.radius, axes)


def _householder(layer, x):
    first, second = ops.split(x, 2, axis=-1)
    theta = ops.convert_to_numpy(layer.theta)
    sine, cosine = np.sin(theta / 2), np.cos(theta / 2)
    beyond = 2.0 * ops.relu(_times(second, cosine) - _times(first, sine))
    return ops.concatenate([first + _times(beyond, sine), second - _times(beyond, cosine)], axis=-1)


def _gate(layer, x, y):
    a = ops.convert_to_numpy(ops.sigmoid(layer.gate))
    a = np.broadcast_to(a, x.shape[-1:])
    return _times(x, a) + _times(y, 1.0 - a)


def _positions(layer, x):
    axes = "abcdefgh"[: len(x.shape)]
    embeddings = ops.convert_to_numpy(layer.embeddings)
    new = K.EinsumDense(f"{axes},{axes[1:]}->{axes}", x.shape[1:], bias_axes=axes[1:])
    return _applied(new, x, np.ones_like(embeddings), embeddings)


def _embedding(layer, tokens):
    tokens = ops.clip(ops.cast(tokens, "int32"), 0, layer.input_dim - 1)
    return _applied(K.Embedding(layer.input_dim, layer.output_dim), tokens, layer.embeddings)


def _embedding_bag(layer, tokens):
    mask = ops.greater(tokens, 0) if layer.mask_zero else None
    return layers.MaskedAveragePooling1D().call(_embedding(layer, tokens), mask)


def _token_dense(layer, x):
    # By the base class' configuration, whose activation may have arguments of its own.
    new, values = _of_base(layer, dict(name="dense"))
    return ops.swapaxes(_applied(new, ops.swapaxes(x, 1, 2), *values), 1, 2)


def _patches(layer, x):
    new, values = _of_base(layer, dict(name="patches"))
    x = _applied(new, x, *values)
    return ops.reshape(x, (-1, x.shape[1] * x.shape[2], x.shape[3])) if layer.sequence else x


def _residual_conv(layer, x):
    new, values = _of_base(layer, dict(name="conv", activation=None))
    return K.Activation(layer.activation)(x + _applied(new, x, *values))


def _sandwich(layer, x):
    kernel = math.sqrt(2.0) * ops.convert_to_numpy(layer.kernel)
    outer, inner = kernel[: layer.units], kernel[layer.units :]
    return _dense(_dense(x, inner, layer.bias, "relu"), outer.T)


def _potential(layer, x):
    kernel = ops.convert_to_numpy(layer.kernel)
    return x - 2.0 * _dense(_dense(x, kernel, layer.bias, "relu"), kernel.T)


def _potential_conv(layer, x):
    bias = [] if layer.bias is None else [layer.bias]
    width, size = layer.kernel.shape[-1], layer.kernel_size
    there = K.Conv2D(width, size, padding="same", activation="relu", use_bias=bool(bias))
    back = K.Conv2DTranspose(x.shape[-1], size, padding="same", use_bias=False)
    hidden = _applied(there, x, layer.kernel, *bias)
    return x - 2.0 * _applied(back, hidden, layer.kernel)


def _reflector(layer, x):
    kernel = ops.convert_to_numpy(layer.kernel)
    return x - 2.0 * _dense(_dense(x, kernel), kernel.T)


def _attention(layer, x, mask=None):
    x = _in_ball(ops.cast(x, layer.compute_dtype), layer.radius, (-1,))
    positions, split = x.shape[1], (-1, x.shape[1], layer.num_heads, layer.key_dim)

    def heads(kernel):
        return ops.swapaxes(ops.reshape(_dense(x, kernel), split), 1, 2)

    query, key, value = map(heads, (layer.query_kernel, layer.key_kernel, layer.value_kernel))
    scores = ops.matmul(query, ops.swapaxes(key, 2, 3)) / layer.temperature
    if mask is not None:
        hidden = -1e9 * (1.0 - ops.cast(mask[:, None, None, :], scores.dtype))
        scores = scores + hidden
    mixed = ops.swapaxes(ops.matmul(ops.softmax(scores, axis=-1), value), 1, 2)
    mixed = ops.reshape(mixed, (-1, positions, layer.num_heads * layer.key_dim))
    return _dense(mixed, layer.output_kernel)


def _scattering(layer, x):
    twin = type(layer).from_config(layer.get_config())
    twin.build(x.shape)
    zero = ops.cast(ops.sum(ops.zeros_like(x)), "int32")

    def as_weight(matrix):
        # A row of an embedding, so that it is saved with the weights.
        row = _applied(K.Embedding(1, matrix.size, trainable=False), zero, matrix.reshape(1, -1))
        return ops.reshape(row, matrix.shape)

    twin._tensors = lambda matrices: [as_weight(np.asarray(m)) for m in matrices]
    return twin.call(x)


def _pooling(layer, x):
    # By a layer: JAX refuses the sizes of the operation as a file gives them back, as lists.
    kind = K.AveragePooling1D if layer.rank == 1 else K.AveragePooling2D
    twin = type(layer).from_config(layer.get_config())
    twin._window_mean = lambda x: kind(layer.pool_size, layer.strides)(layer._padded(x))
    return twin.call(x)


def _as_called(layer, x, mask=None):
    """For layers without weights, which compute with operations of Keras."""
    return layer.call(x) if mask is None else layer.call(x, mask)


_SUBGRAPHS: dict[type, Callable] = {
    layers.BallProjection: _ball,
    layers.BlockReflector: _reflector,
    layers.ChannelGain: lambda layer, x: _times(x, layer.gamma),
    layers.ConvexPotential: _potential,
    layers.ConvexPotentialConv2D: _potential_conv,
    layers.Embedding: _embedding,
    layers.EmbeddingBag: _embedding_bag,
    layers.Gate: _gate,
    layers.Householder: _householder,
    layers.LipschitzAttention: _attention,
    layers.PatchEmbedding: _patches,
    layers.PositionalEmbedding: _positions,
    layers.ResidualConv2D: _residual_conv,
    layers.SandwichDense: _sandwich,
    layers.Scattering2D: _scattering,
    layers.TokenDense: _token_dense,
    **dict.fromkeys(
        (
            layers.L2NormPooling1D,
            layers.L2NormPooling2D,
            layers.ScaledAveragePooling1D,
            layers.ScaledAveragePooling2D,
        ),
        _pooling,
    ),
    **dict.fromkeys(
        (
            layers.Centering,
            layers.FlooredNormalization,
            layers.FullSort,
            layers.GlobalL2NormPooling1D,
            layers.GlobalL2NormPooling2D,
            layers.GlobalScaledAveragePooling1D,
            layers.GlobalScaledAveragePooling2D,
            layers.GroupSort,
            layers.InvertibleDownSampling2D,
            layers.InvertibleUpSampling2D,
            layers.MaskedAveragePooling1D,
            layers.MaxMin,
        ),
        _as_called,
    ),
}


# --- a trial ------------------------------------------------------------------------------------


def _compare(network, plain):
    """Raises where made-up rows have other outputs. Sizes that are not fixed are 16."""
    random = np.random.default_rng(0)

    def rows(like):
        shape = (3, *(16 if n is None else n for n in like.shape[1:]))
        if "int" in like.dtype or like.dtype == "bool":
            return random.integers(0, 2, shape).astype(like.dtype)
        return random.normal(size=shape).astype("float32")

    x = tree.map_structure(rows, input_tensors(network))
    results = fused(lambda *x: [tree.flatten(m(*x, training=False)) for m in (plain, network)])(x)
    for a, b in zip(*tree.map_structure(ops.convert_to_numpy, results), strict=True):
        if not np.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True):
            raise ValueError(
                f"The outputs of {network.name!r} and of its conversion differ by up to "
                f"{np.max(np.abs(a - b)):.3g} on made-up rows. Please report this network."
            )
