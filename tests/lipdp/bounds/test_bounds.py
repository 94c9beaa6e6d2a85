"""The walk over a network's graph, what it refuses, and random graphs that are attacked."""

import math

import keras
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from keras import ops

from lipdp import bounds, layers
from lipdp.audit import attack_bounds
from lipdp.bounds import UnknownLayerError, gradient_bounds, lipschitz, network_bounds
from lipdp.bounds.projections import SpectralBall

pytestmark = pytest.mark.any_backend

K = keras.layers


def dense(units=3, **kwargs):
    """A dense layer with bounds that are round numbers."""
    return layers.SpectralDense(units, kernel_initializer="identity", use_bias=False, **kwargs)


def ball(shape=(3,), radius=1.0):
    x = keras.Input(shape)
    return x, layers.BallProjection(radius)(x)


def deltas(network, g=1.0):
    """Bounds of the kernels in the order of the weights, without the factor for rounding."""
    return [pytest.approx(b / 1.0001) for b in gradient_bounds(network, g).values()]


# --- graphs -----------------------------------------------------------------------------------


def test_sequential_and_functional_agree():
    first, second = dense(), dense()
    sequential = keras.Sequential([keras.Input((3,)), layers.BallProjection(2.0), first, second])
    x, y = ball(radius=2.0)
    functional = keras.Model(x, second(first(y)))
    assert gradient_bounds(sequential, 0.5) == gradient_bounds(functional, 0.5)
    assert deltas(sequential, 0.5) == [1.0, 1.0]


def test_residual():
    x, y = ball()
    network = keras.Model(x, y + dense()(y))
    found = network_bounds(network)
    assert (found.output, found.lipschitz) == (2.0, 2.0)
    assert deltas(network) == [1.0]
    y = K.Average()([y, dense()(y)])
    found = network_bounds(keras.Model(x, y))
    assert (found.output, found.lipschitz) == (1.0, 1.0)
    assert deltas(keras.Model(x, y)) == [0.5]


def test_cotangents_of_branches_add_up():
    x, y = ball()
    trunk = dense(name="trunk")
    y = trunk(y)
    network = keras.Model(x, K.Concatenate()([y, K.ReLU()(y), y]))
    found = network_bounds(network)
    assert found.output == pytest.approx(math.sqrt(3))
    assert found.gradients[trunk.kernel.path] == 3.0


def test_shared_layer_sums():
    x, y = ball()
    shared = dense()
    network = keras.Model(x, shared(K.Rescaling(3.0)(shared(y))))
    # Outer call: X = 3, G = 1. Inner call: X = 1, G = 3.
    assert deltas(network) == [6.0]
    assert attack_bounds(network).ratio <= 1 + 1e-5


def test_shared_conv_in_two_geometries():
    x, y = ball((6, 6, 1))
    shared = layers.SpectralConv2D(1, 3, padding="same", use_bias=False)
    small = K.AveragePooling2D(2)(y)
    head = layers.GlobalScaledAveragePooling2D()
    network = keras.Model(x, head(shared(y)) + head(shared(small)))
    assert attack_bounds(network).ratio <= 1 + 1e-5


def test_open_axes_of_an_einsum():
    """Keras leaves them open in the output's shape; the bias needs the positions all the same."""
    x, y = ball((5, 3))
    layer = K.EinsumDense("abc,cd->abd", (None, 2), bias_axes="d")
    found = network_bounds(keras.Model(x, layer(y)))
    assert found.gradients[layer.bias.path] == pytest.approx(math.sqrt(5))


def test_nested_models():
    inner = keras.Sequential([keras.Input((3,)), dense(name="a"), dense(name="b")])
    x, y = ball(radius=2.0)
    network = keras.Model(x, dense(name="c")(inner(inner(y))))
    assert deltas(network) == [4.0, 4.0, 2.0]
    deeper = keras.Sequential([keras.Input((3,)), network, dense(name="d")])
    assert deltas(deeper) == [4.0, 4.0, 2.0, 2.0]


def test_nested_model_with_an_unused_output():
    z = keras.Input((3,))
    used, unused = dense(name="used"), dense(name="unused")
    inner = keras.Model(z, [used(z), unused(z)])
    x, y = ball()
    network = keras.Model(x, inner(y)[0])
    assert deltas(network) == [1.0, 0.0]
    assert attack_bounds(network).ratio <= 1 + 1e-5


def test_unused_branch_is_no_part_of_the_network():
    x, y = ball()
    K.BatchNormalization()(y)
    assert deltas(keras.Model(x, dense()(y))) == [1.0]


def test_two_inputs():
    (a, ya), (b, yb) = ball((3,), 1.0), ball((2,), 2.0)
    first, second = dense(name="first"), dense(name="second")
    network = keras.Model([a, b], K.Add()([first(ya), second(yb)]))
    assert network_bounds(network).input_cotangents == [1.0, 1.0]
    assert deltas(network) == [1.0, 2.0]
    assert attack_bounds(network).ratio <= 1 + 1e-5


def test_product_of_branches():
    (a, ya), (b, yb) = ball((3,), 2.0), ball((3,), 5.0)
    first, second = dense(name="first"), dense(name="second")
    network = keras.Model([a, b], K.Multiply()([first(ya), second(yb)]))
    assert network_bounds(network).output == 10.0
    assert deltas(network) == [10.0, 10.0]


def test_clip_gradient_caps_what_comes_before():
    network = keras.Sequential(
        [keras.Input((3,)), layers.BallProjection(1.0), dense(), layers.ClipGradient(0.1), dense()]
    )
    assert deltas(network, 5.0) == [0.1, 5.0]
    found = network_bounds(network, 5.0)
    assert found.input_cotangents == [0.1]
    assert found.lipschitz == 1.0  # forwards nothing is clipped


def test_frozen_weights_have_no_bound_but_pass_norms_on():
    frozen = K.Dense(3, use_bias=False, kernel_initializer=keras.initializers.Identity(4.0))
    frozen.trainable = False
    network = keras.Sequential([keras.Input((3,)), layers.BallProjection(1.0), frozen, dense()])
    (found,) = gradient_bounds(network).values()
    assert 4.0 <= found <= 4.2
    assert network_bounds(network).lipschitz <= 4.2


def test_measured_weights_follow_their_values():
    layer = K.Dense(3, use_bias=False, kernel_initializer="identity")
    network = keras.Sequential([keras.Input((3,)), layers.BallProjection(1.0), dense(), layer])
    first = list(gradient_bounds(network).values())[0]
    layer.kernel.assign(3.0 * layer.kernel)
    assert list(gradient_bounds(network).values())[0] == pytest.approx(3.0 * first)
    tensors = gradient_bounds(network, as_tensors=True)
    assert [ops.is_tensor(b) for b in tensors.values()] == [True, False]


def test_layers_of_the_report_in_order_of_computation():
    network = keras.Sequential(
        [keras.Input((3,)), layers.BallProjection(2.0, name="ball"), dense(name="head")]
    )
    first, second = network_bounds(network, 0.5).layers
    assert (first.name, first.kind, first.inputs) == ("ball", "BallProjection", [math.inf])
    assert (first.output, first.cotangent, first.input_cotangents) == (2.0, 0.5, [0.5])
    assert (second.name, second.gradients) == (
        "head",
        [(network.layers[-1].kernel.path, 1.0)],
    )


def test_layer_of_ones_own():
    class Third(keras.layers.Layer):
        def call(self, x):
            return x / 3.0

        def bound(self, call):
            return lipschitz(1 / 3)

    network = keras.Sequential([keras.Input((3,)), layers.BallProjection(3.0), Third(), dense()])
    assert deltas(network) == [1.0]
    assert attack_bounds(network).ratio <= 1 + 1e-5


def test_registered_rule_and_double_registration():
    class Halved(keras.layers.Layer):
        def call(self, x):
            return x / 2.0

    bounds.register(Halved)(lambda layer, call: lipschitz(0.5))
    network = keras.Sequential([keras.Input((3,)), layers.BallProjection(2.0), Halved(), dense()])
    assert deltas(network) == [1.0]
    with pytest.raises(ValueError, match="Halved has a rule already"):
        bounds.register(Halved)(lambda layer, call: lipschitz(0.1))

    class Other(Halved):
        def call(self, x):
            return 10.0 * x

    with pytest.raises(UnknownLayerError, match="Other"):
        network_bounds(keras.Sequential([keras.Input((3,)), Other()]))


# --- refusals ---------------------------------------------------------------------------------


class Plain(keras.layers.Layer):
    def call(self, x):
        return x


class Louder(layers.GroupSort):
    """Inherits a bound, but computes something else."""

    def call(self, x):
        return 2.0 * x


class LouderDense(keras.layers.Dense):
    def call(self, x):
        return 2.0 * super().call(x)


def adapted():
    layer = K.Normalization()
    layer.adapt(np.ones((4, 3), "float32"))
    return layer


class LouderReflector(layers.BlockReflector):
    def call(self, x):
        return 2.0 * super().call(x)


def freed(layer, constraint=None):
    """The layer with another constraint of its kernel than it was built with."""
    layer.build((None, 3))
    layer.kernel.constraint = constraint
    return layer


def quantized(layer):
    layer.build((None, 3))
    layer.quantize("int8")
    return layer


REFUSED = {
    "unknown": (lambda: Plain(name="odd"), (3,), r"'odd' of class .*Plain.*`bound\(self, call\)"),
    "unknown tells the way": (Plain, (3,), r"lipdp\.bounds\.register\(Plain\)"),
    "overridden call": (Louder, (4,), "No bound is known"),
    "overridden dense": (lambda: LouderDense(3), (3,), "No bound is known"),
    "batch norm": (K.BatchNormalization, (3,), r"mixes the examples.*lipdp\.layers\.Centering"),
    "lambda": (lambda: K.Lambda(lambda x: x), (3,), "nothing is known of what a Lambda"),
    "unit norm": (K.UnitNormalization, (3,), "slope at zero is unbounded"),
    "gaussian dropout": (lambda: K.GaussianDropout(0.1), (3,), "factor is unbounded"),
    "activation": (lambda: K.Dense(3, "softmax"), (3,), "'softmax' has no known Lipschitz"),
    "own activation": (lambda: K.Dense(3, lambda x: x * x), (3,), "no known Lipschitz"),
    "regulariser": (
        lambda: K.Dense(3, activity_regularizer="l2"), (3,), "activity regulariser.*Remove",
    ),
    "float16": (lambda: K.Dense(3, dtype="mixed_float16"), (3,), "computes in float16"),
    "bfloat16": (lambda: dense(dtype="bfloat16"), (3,), "computes in bfloat16"),
    "unknown length": (lambda: K.Dense(3), (None, 3), "unknown size"),
    "unknown map": (lambda: K.Conv2D(3, 3), (None, 4, 1), "unknown size|known spatial"),
    "threshold": (lambda: K.ReLU(threshold=1.0), (3,), "jumps at threshold"),
    "channels first": (
        lambda: K.MaxPooling2D(2, data_format="channels_first"), (2, 4, 4), "channels_last",
    ),
    "categories": (lambda: K.Discretization([0.0, 1.0]), (3,), "Apply it to the data set"),
    "adapted": (lambda: adapted(), (3,), "public `mean` and `variance`"),
    "rms scaling": (lambda: K.LayerNormalization(rms_scaling=True), (3,), "RMSNormalization"),
    "layer norm of the batch": (
        lambda: K.LayerNormalization(axis=[0, 1], center=False, scale=False),
        (3,),
        "holds the batch",
    ),
    "layer norm without epsilon": (lambda: K.LayerNormalization(epsilon=0.0), (3,), "positive one"),
    "alpha dropout": (lambda: K.AlphaDropout(1.0), (3,), "rate below 1"),
    "activity": (lambda: K.ActivityRegularization(0.1), (3,), "activity|bypasses the clip"),
    "aspect ratio": (lambda: K.Resizing(2, 2, pad_to_aspect_ratio=True), (4, 3, 1), "aspect"),
    "scale that widens": (lambda: K.Rescaling([1.0, 2.0]), (3, 1), "changes the shape"),
    "lstm": (lambda: K.LSTM(3), (4, 3), r"recurrent weights.*Use lipdp\.layers\.LipschitzRNN"),
    "sum over an axis": (
        lambda: K.EinsumDense("abc,cd->ad", 2), (3, 4), "'abc,cd->ad' has no rule; a dense layer",
    ),
    "batch at the end": (
        lambda: K.EinsumDense("abc,cd->bad", (None, 2)), (3, 4), "with the batch first",
    ),
    "ellipsis": (lambda: K.EinsumDense("...b,bc->...c", 3), (3,), "give each axis a letter"),
    "depthwise, channels first": (
        lambda: K.DepthwiseConv2D(2, data_format="channels_first"), (2, 4, 4), "channels_last",
    ),
    "unknown map, depthwise": (lambda: K.DepthwiseConv2D(3), (None, 4, 1), "unknown size"),
    "unknown map, transposed": (lambda: K.Conv2DTranspose(3, 3), (None, 4, 1), "unknown size"),
    "subclass of a block": (lambda: LouderReflector(2), (3,), "No bound is known"),
    "cayley without its ball": (lambda: freed(layers.CayleyDense(3)), (3,), "SpectralBall"),
    "exponential of a larger ball": (
        lambda: freed(layers.ExponentialDense(3), SpectralBall(2.0)), (3,), "SpectralBall",
    ),
    "quantized": (lambda: quantized(K.Dense(3)), (3,), "LoRA or quantisation"),
    "wrapper": (lambda: K.TimeDistributed(K.Dense(2)), (4, 3), "No bound is known for layer"),
    "augmentation": (
        lambda: K.RandomFlip(), (8, 8, 1), r"augmentation=.*layers.RandomFlip",
    ),
    "embedding": (lambda: K.Embedding(5, 3), (4,), r"out of range.*Use lipdp\.layers\.Embedding"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    make, shape, message = REFUSED[case]
    with pytest.raises(UnknownLayerError, match=message):
        # The inside of a nested model is looked at, too.
        inner = keras.Sequential([keras.Input(shape), make()])
        network_bounds(keras.Sequential([keras.Input(shape), inner]), 1.0, 1.0)


def operation(function, *shapes):
    inputs = [keras.Input(shape) for shape in shapes]
    return keras.Model(inputs, function(*inputs))


@pytest.mark.parametrize("function, shapes", [
    (lambda x: x + np.ones((3, 1), "float32"), [(1,)]),
    (lambda x: x * np.ones((4, 3), "float32"), [(3,)]),
    (lambda x: x * np.ones((5,), "float32"), [(1,)]),
    (lambda x: x / np.ones((5,), "float32"), [(1,)]),
    (lambda x: 1.0 / x, [(3,)]),
    (lambda x: x / 0.0, [(3,)]),
    (lambda x, y: x / y, [(3,), (3,)]),
    (lambda x: ops.reshape(x, (3, -1)), [(3,)]),
    (lambda x: ops.reshape(x, (-1, 2)), [(4,)]),
    (lambda x: ops.transpose(x), [(3,)]),
    (lambda x: ops.mean(x, axis=0, keepdims=True), [(3,)]),
    (lambda x, y: ops.add(x, y), [(3,), (4, 3)]),
    (lambda x, y: ops.subtract(x, y), [(2, 3), (3,)]),
    (lambda x, y: ops.multiply(x, y), [(3,), (4, 3)]),
    (lambda x, y: K.Concatenate(axis=0)([x, y]), [(3,), (3,)]),
    (lambda x, y: ops.concatenate([x, y], axis=0), [(3,), (3,)]),
    (lambda x, y: ops.stack([x, y], axis=0), [(3,), (3,)]),
    (lambda x, y: ops.maximum(x, y), [(3,), (4, 3)]),
    (lambda x, y: ops.matmul(x, y), [(3,), (3, 4)]),
    (lambda x, y: ops.matmul(x, y), [(2, 3), (5, 3, 2)]),
    (lambda x, y: ops.where(x > 0, x, y), [(3,), (4, 3)]),
    (lambda x, y: ops.where(ops.all(x > y, axis=0, keepdims=True), x, y), [(3,), (3,)]),
    (lambda x, y: ops.matmul(x, ops.transpose(y)), [(3,), (3,)]),
    (lambda x, y: K.Dot(1, normalize=True)([x, y]), [(3,), (3,)]),
    (lambda x: ops.matmul(np.ones((2, 5), "float32"), ops.reshape(x, (-1, 3))), [(3,)]),
    (lambda x: ops.matmul(x, np.ones((3,), "float32")), [(3,)]),
    (lambda x: x[0:1, :], [(3,)]),
    (lambda x: x[::-1, :], [(3,)]),
    (lambda x: x[None, :], [(3,)]),
    (lambda x: x[..., 0:1, :], [(3,)]),
    (lambda x: ops.sum(x), [(3,)]),
    (lambda x: ops.sum(x, axis=0, keepdims=True), [(3,)]),
    (lambda x: ops.mean(x, axis=(0, 1), keepdims=True), [(3,)]),
    (lambda x: ops.max(x, axis=-2, keepdims=True), [(3,)]),
    (lambda x: ops.max(x, axis=1, initial=5.0), [(3,)]),
    (lambda x: ops.logsumexp(x, axis=0, keepdims=True), [(3,)]),
    (lambda x: ops.softmax(x, axis=0), [(3,)]),
    (lambda x: ops.softmax(x, axis=(0, 1)), [(3,)]),
    (lambda x: ops.log_softmax(x, axis=-2), [(3,)]),
    (lambda x: K.Softmax(axis=0)(x), [(3,)]),
    (lambda x: ops.sort(x, axis=0), [(3,)]),
    (lambda x: ops.flip(x), [(3,)]),
    (lambda x: ops.roll(x, 1), [(3,)]),
    (lambda x: ops.roll(x, 1, axis=0), [(3,)]),
    (lambda x: ops.expand_dims(x, 0), [(3,)]),
    (lambda x: ops.expand_dims(x, -3), [(3,)]),
    (lambda x: ops.squeeze(x), [(1, 3)]),
    (lambda x: ops.swapaxes(x, 0, 1), [(3,)]),
    (lambda x: ops.moveaxis(x, 1, 0), [(3,)]),
    (lambda x: ops.pad(x, 1), [(3,)]),
    (lambda x: ops.pad(x, ((1, 0), (0, 0))), [(3,)]),
    (lambda x: ops.pad(x, ((0, 0), (1, 0)), constant_values=2.0), [(3,)]),
    (lambda x: ops.pad(x, ((0, 0), (1, 0)), mode="reflect"), [(3,)]),
    (lambda x: ops.repeat(x, 2, axis=0), [(3,)]),
    (lambda x: ops.tile(x, (2, 1)), [(3,)]),
    (lambda x: ops.tile(x, 2), [(3,)]),
    (lambda x: ops.take(x, [0, 0], axis=0), [(3,)]),
    (lambda x: ops.take(x, [0, 3], axis=1), [(3,)]),
    (lambda x: ops.take(x, ops.cast(x, "int32"), axis=1), [(3,)]),
    (lambda x: ops.cast(x, "float16"), [(3,)]),
    (lambda x: ops.clip(x, 0.0, np.ones((2, 1, 3), "float32")), [(1, 3)]),
    (lambda x: ops.maximum(x, float("nan")), [(3,)]),
    (lambda x: x**0.5, [(3,)]),
    (lambda x: x**-1, [(3,)]),
    (lambda x: 2.0**x, [(3,)]),
    (lambda x: ops.sqrt(x), [(3,)]),
    (lambda x: ops.celu(x, alpha=-1.0), [(3,)]),
    (lambda x: ops.squareplus(x, b=0), [(3,)]),
    (lambda x: ops.soft_shrink(x, -1.0), [(3,)]),
    (lambda x: ops.threshold(x, 1.0, 0.0), [(3,)]),
    (lambda x: ops.hard_shrink(x), [(3,)]),
    (lambda x, y: K.Concatenate(axis=-2)([x, y]), [(3,), (3,)]),
])  # fmt: skip
def test_operations_that_mix_or_widen_are_refused(function, shapes):
    with pytest.raises(UnknownLayerError):
        network_bounds(operation(function, *shapes), 1.0, 1.0)


def test_masks_that_reach_an_average_are_refused():
    x = keras.Input((4, 3))
    masked = K.Dense(2)(K.Masking()(x))
    average = K.GlobalAveragePooling1D
    inner = keras.Sequential([keras.Input((4, 2)), K.ReLU(), average()])
    mask = ops.any(ops.not_equal(x, 0.0), axis=-1)
    for y in (average()(masked), inner(masked), average()(x, mask=mask)):
        with pytest.raises(
            UnknownLayerError, match="positions that a mask leaves|with a `mask` argument"
        ):
            network_bounds(keras.Model(x, y), 1.0, 1.0)
    y = layers.GlobalScaledAveragePooling1D()(masked)
    assert attack_bounds(keras.Model(x, y), input_bound=1.0).ratio <= 1 + 1e-5


def test_constants_by_keyword():
    network = operation(lambda x: ops.add(x1=x, x2=np.full((3,), 2.0, "float32")), (3,))
    assert network_bounds(network, 1.0, 1.0).output == pytest.approx(1 + 2 * math.sqrt(3))
    network = operation(lambda x: ops.multiply(x1=x, x2=4.0), (3,))
    assert network_bounds(network, 1.0, 1.0).output == pytest.approx(4.0)


def test_add_loss_is_refused():
    layer = dense()
    network = keras.Sequential([keras.Input((3,)), layers.BallProjection(1.0), layer])
    layer.add_loss(ops.sum(ops.ones((2,))))
    with pytest.raises(UnknownLayerError, match="add_loss"):
        gradient_bounds(network)
    inner = keras.Sequential([keras.Input((3,)), dense()])
    network = keras.Sequential([keras.Input((3,)), inner])
    inner.add_loss(ops.sum(ops.ones((2,))))
    with pytest.raises(UnknownLayerError, match="add_loss"):
        network_bounds(network, 1.0, 1.0)


def test_nothing_bounds_the_input():
    with pytest.raises(ValueError, match=r"unbounded.*BallProjection\(radius\) after the input"):
        gradient_bounds(keras.Sequential([keras.Input((3,)), K.Dense(2)]))


def test_nan_weights_are_refused():
    layer = K.Dense(2, use_bias=False)
    network = keras.Sequential([keras.Input((3,)), layers.BallProjection(1.0), dense(), layer])
    layer.kernel.assign(np.full((3, 2), np.nan))
    with pytest.raises(ValueError, match="unbounded"):
        gradient_bounds(network)


def test_several_outputs_are_refused():
    x, y = ball()
    with pytest.raises(ValueError, match="must have one output.* has 2"):
        gradient_bounds(keras.Model(x, [dense()(y), dense()(y)]))


def test_weights_of_one_path_are_refused():
    first, second = dense(name="same"), dense(name="same")
    inner = keras.Sequential([keras.Input((3,)), first])
    network = keras.Sequential([keras.Input((3,)), layers.BallProjection(1.0), inner, second])
    paths = [v.path for v in network.trainable_variables]
    if len(set(paths)) < 2:
        with pytest.raises(ValueError, match="share the path"):
            gradient_bounds(network)
    else:
        assert deltas(network) == [1.0, 1.0]


def test_weight_without_a_bound_is_refused():
    class Gain(keras.layers.Layer):
        def build(self, shape):
            self.gain = self.add_weight(shape=(), name="gain")

        def call(self, x):
            return x * ops.tanh(self.gain)

        def bound(self, call):
            return lipschitz()

    with pytest.raises(UnknownLayerError, match="gain' has no gradient bound"):
        gradient_bounds(keras.Sequential([keras.Input((3,)), layers.BallProjection(1.0), Gain()]))


def test_networks_that_cannot_be_walked_are_refused():
    class Subclassed(keras.Model):
        def call(self, x):
            return x

    class Louder(keras.Sequential):
        def call(self, x, **kwargs):
            return 2.0 * super().call(x, **kwargs)

    class LouderModel(keras.Model):
        def call(self, x, **kwargs):
            return 2.0 * super().call(x, **kwargs)

    x = keras.Input((3,))
    louder = [Louder([keras.Input((3,)), dense()]), LouderModel(x, dense()(x))]
    for network in (Subclassed(), *louder, keras.layers.Dense(3), None):
        with pytest.raises(TypeError, match="Sequential or functional"):
            network_bounds(network)
    for inner in louder:
        with pytest.raises(TypeError, match="Sequential or functional"):
            network_bounds(keras.Sequential([keras.Input((3,)), inner]))
    with pytest.raises(ValueError, match="not built"):
        network_bounds(keras.Sequential([dense()]))


# --- random graphs ----------------------------------------------------------------------------

UNARY = [
    lambda: layers.SpectralDense(4, bias_norm=0.5),
    lambda: layers.FrobeniusDense(4, activation="tanh"),
    lambda: K.Dense(4, activation="gelu"),
    lambda: K.Dense(4, use_bias=False),
    lambda: layers.GroupSort(2),
    lambda: layers.Centering(),
    lambda: layers.Centering(1),
    lambda: layers.BallProjection(0.8),
    lambda: layers.BallProjection(0.5, per_position=True),
    lambda: layers.ClipGradient(0.7),
    lambda: K.ReLU(),
    lambda: K.Activation("softplus"),
    lambda: K.Rescaling(-1.5, 0.2),
    lambda: K.Conv1D(4, 2, padding="same"),
    lambda: K.Conv1D(4, 3, padding="causal", use_bias=False),
    lambda: K.MaxPooling1D(2, strides=1, padding="same"),
    lambda: K.AveragePooling1D(3, strides=1, padding="same"),
    lambda: layers.Householder(),
    lambda: layers.FlooredNormalization(1.0, 0.5, groups=2),
    lambda: layers.FlooredNormalization(1.0, 2.0, per_position=True),
    lambda: layers.L2NormPooling1D(2, strides=1, padding="same"),
    lambda: K.LayerNormalization(epsilon=0.5),
    lambda: K.PReLU(shared_axes=1),
    lambda: lambda x: ops.softmax(x, axis=1),
    lambda: lambda x: x - ops.mean(x, axis=-1, keepdims=True),
    lambda: lambda x: ops.where(x > 0.1, ops.silu(x), -x),
]
BINARY = [
    lambda x, y: K.Add()([x, y]),
    lambda x, y: x - y,
    lambda x, y: K.Average()([x, y]),
    lambda x, y: K.Maximum()([x, y]),
    lambda x, y: layers.Gate()([x, y]),
    lambda x, y: ops.sigmoid(x[:, :1]) * y,
    lambda x, y: ops.softmax(x @ ops.transpose(y, (0, 2, 1))) @ y,
    lambda x, y: K.Multiply()([x, y]),
    lambda x, y: K.Cropping1D((0, 3))(K.Concatenate(axis=1)([x, y])),
]


@st.composite
def graphs(draw):
    """A functional network on (3, 4) maps: each node reads earlier tensors; layers may recur."""
    plan, used = [], []
    for i in range(draw(st.integers(1, 6))):
        sources = st.integers(0, i)
        if draw(st.booleans()) or i == 0:
            again = draw(st.booleans()) and bool(used)
            which = draw(st.sampled_from(used)) if again else draw(st.sampled_from(UNARY))
            used.append(which)
            plan.append((which, draw(sources)))
        else:
            plan.append((draw(st.sampled_from(BINARY)), draw(sources), draw(sources)))
    return plan


def build(plan):
    x = keras.Input((3, 4))
    tensors, made = [layers.BallProjection(1.5)(x)], {}
    for node, *sources in plan:
        inputs = [tensors[s] for s in sources]
        if len(sources) == 1:
            node = made.setdefault(node, node())
        tensors.append(node(*inputs))
    return keras.Model(x, tensors[-1])


def check(plan):
    result = attack_bounds(build(plan), steps=2)
    assert result.ratio <= 1 + 2e-5, (plan, result)


NO_LIMIT = dict(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@settings(max_examples=4, **NO_LIMIT)
@given(graphs())
def test_random_graphs(plan):
    check(plan)


@pytest.mark.slow
@settings(max_examples=150, **NO_LIMIT)
@given(graphs())
def test_many_random_graphs(plan):
    check(plan)
