"""Every layer and every rule in many configurations, attacked; and mutants that must be caught."""

import itertools
import math

import keras
import numpy as np
import pytest
from keras import ops

from lipdp import bounds, layers, norms
from lipdp.audit import attack_bounds
from lipdp.bounds import builtin, lipschitz, rule, walk
from lipdp.bounds.rule import Rule
from lipdp.steps.autodiff import pull_back

K = keras.layers
ROUNDING = 1 + 1e-5
SLOW = pytest.mark.slow


def held(result, tight=()):
    """No ratio above one, and those named in `tight` at least 0.85."""
    assert result.ratio <= ROUNDING, result
    for name, ratio in result.attained.items():
        if any(name.endswith(t) for t in tight):
            assert ratio >= 0.85, (name, result.attained)


BOTH = ("output", "input")


# --- activations ------------------------------------------------------------------------------

ACTIVATIONS = sorted(builtin._ACTIVATIONS, key=lambda f: f.__name__)
# Norms of the input for which the extreme slope lies inside the ball.
RADII = (0.05, 1.0, 20.0)
NOT_TIGHT_FORWARD = {
    # The offset and the slope are not attained together.
    "celu", "gelu", "silu", "mish", "hard_silu", "hard_sigmoid", "sigmoid", "softplus",
    "log_sigmoid", "squareplus", "sparse_plus", "selu", "soft_shrink", "tanh_shrink",
}  # fmt: skip
# TensorFlow's slope of celu at zero is 2; JAX's is 1 everywhere.
TIES = {"celu": 2.0} if keras.backend.backend() != "tensorflow" else {}


@pytest.mark.parametrize("function", ACTIVATIONS, ids=lambda f: f.__name__)
def test_activation(function):
    best = 0.0
    for radius in RADII:
        result = attack_bounds(K.Activation(function), (6,), input_bound=radius)
        held(result)
        best = max(best, result.attained["output"])
    if function.__name__ not in NOT_TIGHT_FORWARD:
        assert best >= 0.85


@pytest.mark.parametrize("function", ACTIVATIONS, ids=lambda f: f.__name__)
def test_constant_of_an_activation(function):
    """Slopes as the backward pass computes them, on a fine grid and at kinks."""
    constant, at_zero = builtin._ACTIVATIONS[function]
    kinks = [0.0, -0.0, *(s * k for s in (-1, 1) for k in (0.5, 1.0, 3.0, 6.0))]
    x = np.concatenate([np.linspace(-60, 60, 960_001), kinks, [1e-20, -1e-20, 1e4, -1e4]])
    (value,), (slopes,) = pull_back(
        lambda x: [function(x)],
        [ops.convert_to_tensor(x.astype("float32"))],
        lambda values: [ops.ones_like(values[0])],
    )
    slope = np.abs(ops.convert_to_numpy(slopes)).max()
    assert slope <= constant * (1 + 1e-6)
    assert slope * TIES.get(function.__name__, 1.0) >= 0.999 * constant
    assert abs(float(value[960_001])) <= at_zero * (1 + 1e-6)  # the first kink, zero


LAYER_ACTIVATIONS = [
    K.ReLU(),
    K.ReLU(max_value=0.3),
    K.ReLU(negative_slope=0.5),
    K.ReLU(negative_slope=1.7),
    K.LeakyReLU(0.3),
    K.LeakyReLU(2.0),
    K.ELU(0.7),
    K.ELU(1.9),
    K.Identity(),
]


@pytest.mark.parametrize("layer", LAYER_ACTIVATIONS, ids=lambda layer: layer.name)
@pytest.mark.parametrize("shape", [(5,), (2, 3)], ids=str)
def test_activation_layers(layer, shape):
    held(attack_bounds(layer, shape), tight=("input",))


# --- weights ----------------------------------------------------------------------------------

DENSE = {
    "keras": lambda **k: K.Dense(3, **k),
    "spectral": lambda **k: layers.SpectralDense(3, bias_norm=0.4, **k),
    "orthogonal": lambda **k: layers.SpectralDense(3, orthogonal=True, **k),
    "frobenius": lambda **k: layers.FrobeniusDense(3, radius=0.8, **k),
}


@pytest.mark.parametrize(
    "shape", [(4,), (5, 4), *(pytest.param(s, marks=SLOW) for s in [(1,), (2, 3, 4)])], ids=str
)
@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("kind", DENSE)
def test_dense(kind, use_bias, shape):
    layer = DENSE[kind](use_bias=use_bias)
    tight = ("input", "kernel", "bias", "output")
    held(attack_bounds(layer, shape, steps=6), tight)


@pytest.mark.parametrize("activation", ["relu", "gelu", "softplus", "sigmoid", "selu", "tanh"])
@pytest.mark.parametrize("kind", ["keras", "spectral"])
def test_dense_with_activation(kind, activation):
    held(attack_bounds(DENSE[kind](activation=activation), (2, 4)))


def conv_id(options):
    return "-".join(f"{v}" for v in options.values())


CONV_2D = [
    dict(kernel_size=k, strides=s, padding=p, dilation_rate=d)
    for k, s, p, d in [
        (1, 1, "valid", 1),
        (1, 2, "same", 1),
        (2, 1, "same", 1),
        (2, 2, "valid", 1),
        (3, 1, "same", 1),
        (3, 1, "valid", 1),
        (3, 2, "same", 1),
        (3, (1, 2), "same", 1),
        ((3, 2), 1, "same", 1),
        (3, 3, "same", 1),
        (2, 1, "same", 2),
        (3, 1, "same", 2),
        (4, 1, "same", 1),
        (4, 2, "valid", 1),
        (5, 1, "same", 1),
    ]
]


@pytest.mark.parametrize(
    "kind", ["spectral", *(pytest.param(k, marks=SLOW) for k in ("keras", "reshaped"))]
)
@pytest.mark.parametrize("options", CONV_2D, ids=conv_id)
def test_conv_2d(options, kind):
    if kind == "keras":
        layer = K.Conv2D(3, **options)
    else:
        certificate = "auto" if kind == "spectral" else "reshaped"
        layer = layers.SpectralConv2D(3, **options, certificate=certificate, bias_norm=0.5)
    tight = ("bias",)
    if options["kernel_size"] == 1:
        tight = ("bias", "kernel", "input")
    held(attack_bounds(layer, (5, 5, 2)), tight)


@pytest.mark.parametrize(
    "options",
    [dict(groups=2), dict(use_bias=False), pytest.param(dict(groups=4), marks=SLOW)],
    ids=str,
)
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_conv_2d_options(options, padding):
    for layer in (
        K.Conv2D(4, 3, padding=padding, **options),
        layers.SpectralConv2D(4, 3, padding=padding, activation="relu", **options),
    ):
        held(attack_bounds(layer, (4, 4, 4)))


@pytest.mark.parametrize("padding", ["same", "valid", "causal"])
@pytest.mark.parametrize("k, strides, dilation", [(1, 1, 1), (3, 1, 1), (3, 2, 1), (2, 1, 3)])
def test_conv_1d(k, strides, dilation, padding):
    layer = K.Conv1D(3, k, strides=strides, padding=padding, dilation_rate=dilation)
    held(attack_bounds(layer, (7, 2)), tight=("bias",))


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("k, strides", [(1, 1), (2, 1), (3, 2)])
def test_conv_3d(k, strides, padding):
    layer = K.Conv3D(2, k, strides=strides, padding=padding)
    held(attack_bounds(layer, (3, 4, 3, 2)), tight=("bias",))


# --- pooling and shapes -----------------------------------------------------------------------

POOLING = [
    dict(pool_size=p, strides=s, padding=pad)
    for (p, s), pad in itertools.product(
        [(2, None), (2, 1), (3, 2), (2, 3), (5, 2)], ["valid", "same"]
    )
]
POOLING_LAYERS = {
    "max": {1: K.MaxPooling1D, 2: K.MaxPooling2D, 3: K.MaxPooling3D},
    "average": {1: K.AveragePooling1D, 2: K.AveragePooling2D, 3: K.AveragePooling3D},
    "scaled": {2: layers.ScaledAveragePooling2D},
    "l2": {2: layers.L2NormPooling2D},
}


@pytest.mark.parametrize("options", POOLING, ids=conv_id)
@pytest.mark.parametrize(
    "kind, rank", [(kind, rank) for kind, ranks in POOLING_LAYERS.items() for rank in ranks]
)
def test_pooling(kind, rank, options):
    layer = POOLING_LAYERS[kind][rank](**options)
    result = attack_bounds(layer, {1: (7, 2), 2: (6, 6, 2), 3: (5, 5, 5, 1)}[rank])
    held(result)
    pool, strides = options["pool_size"], options["strides"] or options["pool_size"]
    if strides >= pool and rank < 3:
        held(result, tight=BOTH if kind != "max" else ("input",))


@pytest.mark.parametrize(
    "pool, strides, shape", [((2, 3), (1, 2), (4, 7, 1)), ((3, 1), 1, (5, 2, 2))]
)
@pytest.mark.parametrize("padding", ["valid", "same"])
def test_pooling_of_unequal_axes(pool, strides, shape, padding):
    for layer in (K.MaxPooling2D, K.AveragePooling2D, layers.L2NormPooling2D):
        held(attack_bounds(layer(pool, strides=strides, padding=padding), shape))


GLOBAL = [
    (K.GlobalMaxPooling1D(), (5, 2)),
    (K.GlobalMaxPooling2D(), (3, 4, 2)),
    (K.GlobalMaxPooling3D(), (2, 3, 2, 2)),
    (K.GlobalAveragePooling2D(), (3, 4, 2)),
    (K.GlobalAveragePooling2D(keepdims=True), (3, 4, 2)),
    (K.GlobalAveragePooling3D(), (2, 3, 2, 2)),
    (layers.GlobalScaledAveragePooling2D(), (3, 4, 2)),
    (layers.GlobalL2NormPooling2D(), (3, 4, 2)),
]


@pytest.mark.parametrize("layer, shape", GLOBAL, ids=lambda v: getattr(v, "name", str(v)))
def test_global_pooling(layer, shape):
    held(attack_bounds(layer, shape), tight=BOTH)


SHAPES = [
    (K.Flatten(), (2, 3)),
    (K.Reshape((3, 2)), (6,)),
    (K.Permute((2, 1)), (2, 3)),
    (K.ZeroPadding1D(2), (3, 2)),
    (K.ZeroPadding2D((1, 2)), (3, 3, 1)),
    (K.ZeroPadding3D(1), (2, 2, 2, 1)),
    (K.Cropping1D(1), (4, 2)),
    (K.Cropping2D(1), (4, 4, 1)),
    (K.Cropping3D(1), (3, 3, 3, 1)),
    (K.RepeatVector(4), (3,)),
    (K.UpSampling1D(3), (3, 2)),
    (K.UpSampling2D(2), (3, 3, 1)),
    (K.UpSampling2D((2, 3), interpolation="bilinear"), (3, 3, 1)),
    (K.UpSampling2D(2, interpolation="bilinear"), (1, 4, 2)),
    (K.UpSampling3D(2), (2, 2, 2, 1)),
    (K.Rescaling(0.5), (3,)),
    (K.Rescaling(-2.0, offset=1.0), (2, 3)),
    (K.Rescaling([1.0, 3.0], offset=[0.0, 2.0]), (3, 2)),
]


@pytest.mark.parametrize("layer, shape", SHAPES, ids=lambda v: getattr(v, "name", str(v)))
def test_shapes_and_scales(layer, shape):
    held(attack_bounds(layer, shape), tight=("output", "input"))


# --- one example by itself --------------------------------------------------------------------


@pytest.mark.parametrize("n, channels", [(2, 2), (2, 6), (3, 6), (4, 4), (6, 6)])
@pytest.mark.parametrize("shape", [(), (3,), (2, 2)], ids=str)
def test_group_sort(n, channels, shape):
    held(attack_bounds(layers.GroupSort(n), (*shape, channels)), tight=BOTH)


@pytest.mark.parametrize("axes, shape", [
    (None, (4,)), (None, (3, 2)), (1, (3, 2)), (2, (3, 2)), (-1, (2, 3, 2)), ((1, 2), (3, 3, 2)),
])  # fmt: skip
def test_centering(axes, shape):
    held(attack_bounds(layers.Centering(axes), shape), tight=BOTH)


@pytest.mark.parametrize("radius", [0.01, 1.0, 50.0])
@pytest.mark.parametrize("per_position", [False, True])
@pytest.mark.parametrize("shape", [(4,), (3, 2), (3, 3, 2)], ids=str)
def test_ball_projection(shape, per_position, radius):
    layer = layers.BallProjection(radius, per_position=per_position)
    held(attack_bounds(layer, shape, input_bound=math.inf), tight=BOTH)
    held(attack_bounds(layer, shape, input_bound=2.0))


@pytest.mark.parametrize("clip", [0.1, 1.0, 10.0])
def test_clip_gradient(clip):
    held(attack_bounds(layers.ClipGradient(clip), (2, 3), loss_gradient_bound=3.0), tight=BOTH)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("layer, shape", [
    (K.Dropout(0.4), (6,)), (K.Dropout(0.0), (6,)), (K.Dropout(0.5, noise_shape=(1, 6)), (6,)),
    (K.SpatialDropout1D(0.4), (4, 3)), (K.SpatialDropout2D(0.4), (2, 3, 3)),
    (K.SpatialDropout3D(0.4), (2, 2, 2, 3)),
], ids=lambda v: getattr(v, "name", str(v)))  # fmt: skip
def test_dropout(layer, shape, training):
    held(attack_bounds(layer, shape, training=training))


# --- branches ---------------------------------------------------------------------------------

MERGES = [
    (K.Add(), [(3,), (3,)]),
    (K.Add(), [(2, 3), (2, 1)]),
    (K.Add(), [(3,), (2, 3)]),
    (K.Add(), [(3,), (3,), (3,)]),
    (K.Subtract(), [(3,), (3,)]),
    (K.Average(), [(3,), (3,), (3,)]),
    (K.Average(), [(2, 3), (1, 3)]),
    (K.Maximum(), [(3,), (3,)]),
    (K.Maximum(), [(2, 3), (2, 1)]),
    (K.Minimum(), [(3,), (3,), (3,)]),
    (K.Concatenate(), [(3,), (2,)]),
    (K.Concatenate(axis=1), [(3, 2), (1, 2)]),
    (K.Multiply(), [(3,), (3,)]),
]


@pytest.mark.parametrize("layer, shapes", MERGES, ids=lambda v: getattr(v, "name", str(v)))
def test_merges(layer, shapes):
    result = attack_bounds(layer, shapes, steps=8)
    held(result, tight=("input", "input_1"))
    if not isinstance(layer, (K.Maximum, K.Minimum)):
        held(result, tight=("output",))


CONSTANT = np.array([1.0, -2.0, 0.5], "float32")
OPERATIONS = {
    "x + x": lambda x: x + x,
    "x * x": lambda x: x * x,
    "x + 1": lambda x: x + 1.0,
    "1 - x": lambda x: 1.0 - x,
    "x + c": lambda x: x + CONSTANT,
    "x * c": lambda x: x * CONSTANT,
    "x / c": lambda x: x / CONSTANT,
    "-x": lambda x: -x,
    "abs": lambda x: ops.abs(x),
    "relu": ops.relu,
    "relu6": ops.relu6,
    "tanh": ops.tanh,
    "softsign": ops.softsign,
    "sigmoid": ops.sigmoid,
    "reshape": lambda x: ops.reshape(x, (-1, 3, 2)),
    "x + relu(x)": lambda x: x + ops.relu(x),
    "x - tanh(x)": lambda x: x - ops.tanh(x),
    "broadcast": lambda x: ops.add(x, K.Cropping1D((0, 1))(x)),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations(operation):
    x = keras.Input((2, 3))
    network = keras.Model(x, OPERATIONS[operation](x))
    for radius in (0.5, 3.0):
        held(attack_bounds(network, input_bound=radius))


# --- whole networks ---------------------------------------------------------------------------


def mlp():
    return [layers.SpectralDense(6), layers.GroupSort(), layers.SpectralDense(4)]


def conv_net(pool, activation):
    return [
        layers.SpectralConv2D(4, 3, padding="same", bias_norm=0.1), activation, pool,
        K.Flatten(), layers.SpectralDense(3),
    ]  # fmt: skip


NETWORKS = {
    "mlp": ((5,), mlp),
    "plain mlp": ((5,), lambda: [K.Dense(4, "relu"), K.Dense(4, "gelu"), K.Dense(3)]),
    "centred": ((5,), lambda: [layers.Centering(), *mlp()]),
    "conv l2": ((4, 4, 2), lambda: conv_net(layers.L2NormPooling2D(), layers.GroupSort())),
    "conv average": (
        (4, 4, 2),
        lambda: conv_net(layers.ScaledAveragePooling2D(), layers.GroupSort(4)),
    ),
    "conv max": ((4, 4, 2), lambda: conv_net(K.MaxPooling2D(), K.ReLU())),
    "clipped": ((5,), lambda: [layers.SpectralDense(4), layers.ClipGradient(0.2), *mlp()]),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_network(name):
    shape, make = NETWORKS[name]
    network = keras.Sequential([keras.Input(shape), layers.BallProjection(2.0), *make()])
    before = [ops.convert_to_numpy(v) for v in network.trainable_variables]
    result = attack_bounds(network)
    held(result)
    for variable, value in zip(network.trainable_variables, before, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(variable), value)
    assert all(np.isfinite(v) for v in result.attained.values())


def test_same_seed_same_result():
    network = keras.Sequential([keras.Input((4,)), layers.BallProjection(1.0), K.Dense(2, "relu")])
    first, second = attack_bounds(network, seed=3), attack_bounds(network, seed=3)
    assert first.attained == second.attained and first.weights == second.weights
    np.testing.assert_array_equal(first.inputs[0], second.inputs[0])


def test_attack_refuses():
    with pytest.raises(ValueError, match="`input_shape` is needed"):
        attack_bounds(K.Dense(3))
    network = keras.Sequential([keras.Input((4,)), K.Dense(2)])
    with pytest.raises(ValueError, match="is for layers"):
        attack_bounds(network, (4,))
    with pytest.raises(ValueError, match="BallProjection behind the input"):
        attack_bounds(network)
    assert attack_bounds(network, input_bound=2.0).ratio <= ROUNDING


# --- mutants ----------------------------------------------------------------------------------
#
# Each breaks one rule; the attack on a layer for which it matters must find a ratio above one.


def bias_without_positions(patch):
    def linear(layer, call, kernel_norm, multiplicity, note=""):
        right = builtin_linear(layer, call, kernel_norm, multiplicity, note)
        return Rule(
            right.forward,
            right.backward,
            lambda xs, g: [(v, g if v is layer.bias else b) for v, b in right.gradients(xs, g)],
        )

    builtin_linear = builtin.linear
    patch.setattr(builtin, "linear", linear)
    return K.Dense(2), (4, 3)


def output_without_bias_positions(patch):
    register(patch, K.Dense, lambda layer, call: Rule(
        lambda xs: rule.matrix_norm(layer.kernel) * xs[0] + rule.vector_norm(layer.bias),
        *parts(builtin.dense(layer, call)),
    ))  # fmt: skip
    return K.Dense(2), (4, 3)


def conv_gradient_with_mean_multiplicity(patch):
    right = norms.conv_multiplicity

    def mean(kernel_shape, input_shape, *args, **kwargs):
        return right(kernel_shape, input_shape, *args, **kwargs) * 0.5

    patch.setattr(norms, "conv_multiplicity", mean)
    return K.Conv2D(1, 3, padding="same", use_bias=False), (12, 12, 1)


def conv_gradient_without_multiplicity(patch):
    patch.setattr(norms, "conv_multiplicity", lambda *a, **k: 1)
    return K.Conv2D(2, 2, use_bias=False), (5, 5, 1)


def conv_norm_on_the_circular_grid(patch):
    """A grid of N = n cells does not bound a `same` convolution."""

    def bound(kernel, input_shape, strides, padding, dilation_rate, groups):
        transfer = np.fft.fft2(ops.convert_to_numpy(kernel), s=input_shape, axes=(0, 1))
        return float(np.linalg.norm(transfer, 2, axis=(-2, -1)).max())

    patch.setattr(rule.norms, "conv_norm_bound", bound)
    return K.Conv2D(1, 3, padding="same", use_bias=False), (3, 3, 1)


def conv_norm_of_the_reshaped_kernel(patch):
    def bound(kernel, input_shape, **geometry):
        return norms.spectral_norm_bound(ops.reshape(kernel, (-1, kernel.shape[-1])))

    patch.setattr(norms, "conv_norm_bound", bound)
    return K.Conv2D(2, 3, padding="same", use_bias=False), (6, 6, 1)


def power_iteration_as_norm(patch):
    def bound(matrix, gap=None):
        matrix = ops.convert_to_numpy(matrix)
        x = np.random.default_rng(0).standard_normal(matrix.shape[-1])
        for _ in range(2):
            x = matrix.T @ (matrix @ (x / np.linalg.norm(x)))
        return float(np.linalg.norm(matrix @ (x / np.linalg.norm(x))))

    patch.setattr(norms, "spectral_norm_bound", bound)
    return K.Dense(24, use_bias=False), (24,)


def l2_pooling_without_gain(patch):
    patch.setattr(layers.L2NormPooling2D, "bound", lambda self, call: lipschitz())
    return layers.L2NormPooling2D(3, strides=1), (5, 5, 1)


def max_pooling_without_gain(patch):
    register(patch, K.MaxPooling2D, lambda layer, call: lipschitz())
    return K.MaxPooling2D(3, strides=1), (5, 5, 1)


def max_pooling_by_one_cell(patch):
    """3-D pooling on TensorFlow hands a cotangent to all ties."""
    if keras.backend.backend() != "tensorflow":
        pytest.skip("only TensorFlow")
    register(patch, K.MaxPooling3D, lambda layer, call: lipschitz())
    return K.MaxPooling3D(2), (4, 4, 4, 1)


def average_pooling_as_if_valid(patch):
    register(
        patch,
        K.AveragePooling2D,
        lambda layer, call: lipschitz(1 / math.sqrt(math.prod(layer.pool_size))),
    )
    return K.AveragePooling2D(3, strides=1, padding="same"), (5, 5, 1)


def average_pooling_divided_by_all_cells(patch):
    """√(w/Πpool): as if Keras divided by the absent cells, too."""
    register(
        patch,
        K.AveragePooling2D,
        lambda layer, call: lipschitz(
            math.sqrt(
                builtin.pool_windows(layer.pool_size, layer.strides) / math.prod(layer.pool_size)
            )
        ),
    )
    return K.AveragePooling2D(2, padding="same"), (3, 3, 1)


def multiply_forgets_a_branch(patch):
    register(patch, K.Multiply, lambda layer, call: Rule(
        lambda xs: xs[0] * xs[1], lambda xs, g: [xs[1] * g, 0.0 * g]
    ))  # fmt: skip
    return K.Multiply(), [(3,), (3,)]


def concatenation_by_the_largest(patch):
    register(patch, K.Concatenate, lambda layer, call: Rule(max, lambda xs, g: [g for _ in xs]))
    return K.Concatenate(), [(3,), (3,)]


def residual_by_the_larger_branch(patch):
    register(patch, K.Add, lambda layer, call: Rule(max, lambda xs, g: [g for _ in xs]))
    x = keras.Input((3,))
    return keras.Model(x, K.Add()([x, K.ReLU()(x)])), None


def broadcast_branch_without_its_root(patch):
    patch.setattr(builtin, "_broadcasts", lambda call: [1.0 for _ in call.input_shapes])
    return K.Add(), [(4, 3), (1, 3)]


def shared_weight_counted_once(patch):
    right = walk.network_bounds

    def once(network, *args):
        found = right(network, *args)
        for layer in found.layers:
            found.gradients.update(layer.gradients)
        return found

    patch.setattr("lipdp.audit.attack.network_bounds", once)
    x = keras.Input((3,))
    shared = K.Dense(3, use_bias=False)
    return keras.Model(x, K.Add()([shared(x), K.ReLU()(shared(x))])), None


def group_sort_by_minimum_and_maximum(patch):
    if keras.backend.backend() != "tensorflow":
        pytest.skip("JAX halves the cotangent at ties")

    def call(self, x):
        first, second = ops.split(x, 2, axis=-1)
        return ops.concatenate([ops.maximum(first, second), ops.minimum(first, second)], axis=-1)

    patch.setattr(layers.GroupSort, "call", call)
    return layers.GroupSort(2), (4,)


def centering_over_the_batch(patch):
    patch.setattr(layers.Centering, "call", lambda self, x: x - ops.mean(x, axis=0, keepdims=True))
    return layers.Centering(), (4,)


def ball_projection_by_division(patch):
    def call(self, x):
        norm = ops.sqrt(ops.sum(ops.square(x), axis=-1, keepdims=True))
        return x * ops.minimum(1.0, self.radius / norm)

    patch.setattr(layers.BallProjection, "call", call)
    return keras.Sequential([keras.Input((3,)), layers.BallProjection(1.0), K.Dense(2)]), None


def ball_projection_of_each_position_as_of_all(patch):
    patch.setattr(layers.BallProjection, "bound", lambda self, call: Rule(
        lambda xs: rule.minimum(xs[0], self.radius), lambda xs, g: [g]
    ))  # fmt: skip
    return keras.Sequential(
        [keras.Input((3, 2)), layers.BallProjection(1.0, per_position=True), K.Dense(2)]
    ), None


def l2_pooling_with_an_infinite_slope(patch):
    def call(self, x):
        return ops.sqrt(self._window_mean(ops.square(x)) * math.prod(self.pool_size))

    patch.setattr(layers.L2NormPooling2D, "call", call)
    return layers.L2NormPooling2D(2), (4, 4, 1)


def clip_of_the_gradient_that_does_not_clip(patch):
    patch.setattr(layers.ClipGradient, "call", lambda self, x: x)
    return layers.ClipGradient(0.5), (3,)


def activation_taken_for_1_lipschitz(patch):
    patch.setitem(builtin._ACTIVATIONS, keras.activations.selu, (1.0, 0.0))
    return K.Dense(3, activation="selu"), (3,)


def activation_without_its_offset(patch):
    patch.setitem(builtin._ACTIVATIONS, keras.activations.softplus, (1.0, 0.0))
    return K.Activation("softplus"), (3,)


def dropout_without_its_factor(patch):
    register(patch, K.Dropout, lambda layer, call: lipschitz())
    return K.Dropout(0.5), (8,)


def repetition_without_its_root(patch):
    register(patch, K.RepeatVector, lambda layer, call: lipschitz())
    return K.RepeatVector(3), (4,)


def projection_that_does_nothing(patch):
    patch.setattr("lipdp.projections.SpectralBall.__call__", lambda self, w: w)
    return layers.SpectralDense(3), (4,)


def register(patch, cls, mutant):
    patch.setitem(rule._RULES, cls, mutant)


def parts(right):
    return right.backward, right.gradients


MUTANTS = [
    bias_without_positions,
    output_without_bias_positions,
    conv_gradient_with_mean_multiplicity,
    conv_gradient_without_multiplicity,
    conv_norm_on_the_circular_grid,
    conv_norm_of_the_reshaped_kernel,
    power_iteration_as_norm,
    l2_pooling_without_gain,
    max_pooling_without_gain,
    max_pooling_by_one_cell,
    average_pooling_as_if_valid,
    average_pooling_divided_by_all_cells,
    multiply_forgets_a_branch,
    concatenation_by_the_largest,
    residual_by_the_larger_branch,
    broadcast_branch_without_its_root,
    shared_weight_counted_once,
    group_sort_by_minimum_and_maximum,
    centering_over_the_batch,
    ball_projection_by_division,
    ball_projection_of_each_position_as_of_all,
    l2_pooling_with_an_infinite_slope,
    clip_of_the_gradient_that_does_not_clip,
    activation_taken_for_1_lipschitz,
    activation_without_its_offset,
    dropout_without_its_factor,
    repetition_without_its_root,
    projection_that_does_nothing,
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.__name__)
def test_mutant_is_caught(mutant, monkeypatch):
    target, shape = mutant(monkeypatch)
    network = isinstance(target, keras.Model)
    bounded = network and any(isinstance(v, layers.BallProjection) for v in target.layers)
    radius = {} if bounded or not network else {"input_bound": 1.0}
    result = attack_bounds(target, shape, training=isinstance(target, K.Dropout), **radius)
    assert result.ratio > 1.003, result.attained


def test_random_walks_of_bounds_are_those_of_the_package():
    """The attack reads the bounds that users get."""
    network = keras.Sequential([keras.Input((3,)), layers.BallProjection(1.0), K.Dense(2)])
    found = bounds.network_bounds(network)
    claimed = bounds.gradient_bounds(network)
    assert claimed == {p: pytest.approx(float(b) * 1.0001) for p, b in found.gradients.items()}
