"""Weights are inside their sets at the beginning of every step, whoever put them elsewhere."""

import itertools

import keras
import numpy as np
import pytest
from keras import ops

import lipdp
from lipdp import layers
from lipdp.autodiff import vjp
from lipdp.bounds import projections, rule
from lipdp.training.steps.private_step import sensitivities
from tests.lipdp.helpers import data, dense_network, one_in, private, weights


def norms(network):
    """Of each trainable weight over its radius: at most 1 for the kinds of `dense_network`."""
    found = {}
    for v in network.trainable_variables:
        value = ops.convert_to_numpy(v).astype("float64")
        norm = np.linalg.norm(value, 2) if value.ndim == 2 else np.linalg.norm(value)
        found[v.path] = norm / v.constraint.radius
    return found


# --- assigned between steps -----------------------------------------------------------------------


def scale(network):
    for v in network.trainable_variables:
        v.assign(30.0 * v)


def load(network):
    network.set_weights([np.full(w.shape, 3.0, "float32") for w in network.get_weights()])


def underneath(network):
    """What Keras keeps is changed without Keras."""
    for v in network.trainable_variables:
        if keras.backend.backend() == "tensorflow":
            v.value.assign_add(30.0 * ops.ones(v.shape))
        else:
            v._value = 30.0 + v.value


def one_entry(network):
    v = network.trainable_variables[0]
    value = np.array(v)
    value[0, 0] = 50.0
    v.assign(value)


ASSIGNED = [scale, load, underneath, one_entry]


class Assigns(keras.callbacks.Callback):
    """Assigns weights at one kind of moment; notes where they are when a step ends."""

    def __init__(self, assign, moment):
        super().__init__()
        self.assign = assign
        self.worst = 0.0
        self.seen = 0
        setattr(self, moment, self._assign)

    def _assign(self, *args, **kwargs):
        self.assign(self.model.network)

    def note(self, network):
        self.seen += 1
        self.worst = max(self.worst, *norms(network).values())


def read_weights_are_noted(monkeypatch, note):
    """Calls `note` with the trainable weights' values of each step, as the step reads them."""
    from lipdp.training.steps import backend

    cls = type(backend())
    right = cls.put_inside

    def noted(self, plan, arguments, held):
        arguments = right(self, plan, arguments, held)
        on_jax = keras.backend.backend() == "jax"
        note([np.array(v) for v in (arguments[0][0] if on_jax else plan.trainable_variables)])
        return arguments

    monkeypatch.setattr(cls, "put_inside", noted)


MOMENTS = ["on_train_begin", "on_epoch_begin", "on_train_batch_begin", "on_train_batch_end"]


@pytest.mark.parametrize(
    "assign, moment",
    [
        pytest.param(a, m, marks=() if i % 5 == 0 else pytest.mark.any_backend)
        for i, (a, m) in enumerate(itertools.product(ASSIGNED, MOMENTS))
    ],
)
def test_no_step_reads_weights_that_a_callback_put_outside(assign, moment, monkeypatch):
    network = dense_network()
    model = private(network, sampling=lipdp.FullBatch(), noise_multiplier=0.1)
    read = []
    read_weights_are_noted(monkeypatch, read.append)
    model.fit(*data(), epochs=3, verbose=0, callbacks=[Assigns(assign, moment)])
    assert len(read) == 3
    for values in read:
        for value in values:
            assert np.linalg.norm(value, 2) <= 1.0 + 1e-5
    if moment != "on_train_batch_end":
        assert max(norms(network).values()) <= 1.0 + 1e-5


@pytest.mark.parametrize("assign", ASSIGNED)
def test_no_step_reads_weights_that_a_loop_put_outside(assign, monkeypatch):
    network = dense_network()
    model = private(network, sampling=lipdp.FullBatch(), noise_multiplier=0.1)
    read = []
    read_weights_are_noted(monkeypatch, read.append)
    for batch in model.batches(*data(), epochs=3):
        assign(network)
        model.train_on_batch(batch)
        assert max(norms(network).values()) <= 1.0 + 1e-5
    assert len(read) == 3
    assert all(np.linalg.norm(v, 2) <= 1.0 + 1e-5 for values in read for v in values)


def test_one_example_moves_a_step_by_its_bound_after_an_assignment():
    network = dense_network()
    model = private(
        network,
        sampling=lipdp.FullBatch(),
        noise_multiplier=0.0,
        clip=0.1,
        optimizer=keras.optimizers.SGD(0.1),
    )
    x, y = data(16)
    bounds, moves = lipdp.gradient_bounds(network, 0.1), []
    start = [10.0 * w for w in network.get_weights()]
    for mask in (np.ones(16, "float32"), (np.arange(16) != 3).astype("float32")):
        for batch in model.batches(x, y):
            network.set_weights(start)
            batch.mask = mask
            model.train_on_batch(batch)
        moves.append(weights(model))
    # Twice, for what the projection after the step may add. From weights that are 10 times as long
    # the example would move them 10 times as far.
    for bound, a, b in zip(bounds.values(), *moves, strict=True):
        assert np.linalg.norm(a - b) <= 2 * 0.1 * bound / 16


def projections_are_counted(monkeypatch):
    counted, right = [], projections.Projection.__call__
    monkeypatch.setattr(
        projections.Projection, "__call__", lambda self, w: counted.append(w) or right(self, w)
    )
    return counted


class Looks(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        self.model.network.get_weights()
        if keras.backend.backend() == "tensorflow":  # on JAX Keras' predict makes new arrays
            self.model.network.predict(data()[0][:2], verbose=0)


@pytest.mark.parametrize("callbacks", [(), (Looks,)])
def test_weights_that_nobody_assigned_are_projected_once_a_step(callbacks, monkeypatch):
    model = private(sampling=lipdp.FullBatch(), run_eagerly=False)
    model.fit(*data(), epochs=1, verbose=0)  # the step is compiled: what it projects is not counted
    counted = projections_are_counted(monkeypatch)
    planned = len(model.network.trainable_variables)
    model.fit(*data(), epochs=4, verbose=0, callbacks=[c() for c in callbacks])
    assert len(counted) == planned
    for batch in model.batches(*data(), epochs=3):
        model.train_on_batch(batch)
        model.network.get_weights()
    assert len(counted) == 2 * planned


def test_only_what_was_assigned_is_projected(monkeypatch):
    model = private(sampling=lipdp.FullBatch(), run_eagerly=False)
    model.fit(*data(), verbose=0)
    counted = projections_are_counted(monkeypatch)
    kernel = model.network.trainable_variables[2]
    batches = model.batches(*data(), epochs=3)
    model.train_on_batch(next(batches))  # the first step projects all
    for batch in batches:
        del counted[:]
        kernel.assign(2.0 * kernel)
        model.train_on_batch(batch)
        assert [w.shape for w in counted] == [kernel.shape]


@pytest.mark.any_backend
def test_nothing_is_paid_where_a_weight_cannot_be_projected(monkeypatch):
    model = private(sampling=lipdp.FullBatch())

    def broken(self, w):
        raise ArithmeticError("no projection")

    with pytest.raises(ArithmeticError):
        for batch in model.batches(*data(), epochs=2):
            model.network.layers[1].kernel.assign(np.ones((6, 8)))
            monkeypatch.setattr(projections.SpectralBall, "__call__", broken)
            model.train_on_batch(batch)
    assert model.spent(1e-5).steps == 0


# --- optimizers -----------------------------------------------------------------------------------


class OwnApply(keras.optimizers.SGD):
    """Applies no constraints."""

    def apply(self, grads, trainable_variables=None):
        for g, v in zip(grads, trainable_variables, strict=True):
            v.assign_sub(self.learning_rate * g)
        self.iterations.assign_add(1)


class ThenScales(keras.optimizers.SGD):
    """Moves the weights once more when its constraints have been applied."""

    def apply(self, grads, trainable_variables=None):
        super().apply(grads, trainable_variables)
        for v in trainable_variables:
            v.assign(7.0 * v)


class OwnUpdate(keras.optimizers.SGD):
    def update_step(self, gradient, variable, learning_rate):
        variable.assign(9.0 * variable)


OPTIMIZERS = {
    "own apply": lambda: OwnApply(5.0),
    "then scales": lambda: ThenScales(5.0),
    "own update": lambda: OwnUpdate(5.0),
    "averages": lambda: keras.optimizers.SGD(5.0, use_ema=True, ema_overwrite_frequency=1),
    "accumulates": lambda: keras.optimizers.SGD(5.0, gradient_accumulation_steps=2),
    "plain": lambda: keras.optimizers.Adam(1.0),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_are_inside_after_a_step_of_any_optimizer(name):
    network = dense_network()
    model = private(network, sampling=lipdp.FullBatch(), optimizer=OPTIMIZERS[name]())
    for batch in model.batches(*data(), epochs=2):
        model.train_on_batch(batch)
        assert max(norms(network).values()) <= 1.0 + 1e-5
    model.fit(*data(), epochs=2, verbose=0)
    assert max(norms(network).values()) <= 1.0 + 1e-5


@pytest.mark.any_backend
def test_other_constraints_stay_with_the_optimizer():
    network = keras.Sequential(
        [
            keras.Input((6,)),
            layers.BallProjection(1.0),
            keras.layers.Dense(3, kernel_constraint=keras.constraints.NonNeg()),
        ]
    )
    model = private(network, sampling=lipdp.FullBatch())
    model.fit(*data(), epochs=2, verbose=0)
    assert (network.get_weights()[0] >= 0).all()


# --- frozen weights -------------------------------------------------------------------------------

FROZEN = {
    "dense": (lambda: layers.SpectralDense(5), (4,)),
    "frobenius": (lambda: layers.FrobeniusDense(5, radius=0.5), (4,)),
    "almost orthogonal": (lambda: layers.AlmostOrthogonalDense(5), (4,)),
    "cayley": (lambda: layers.CayleyDense(5), (4,)),
    "exponential": (lambda: layers.ExponentialDense(3), (4,)),
    "sandwich": (lambda: layers.SandwichDense(3), (4,)),
    "convex potential": (lambda: layers.ConvexPotential(5), (4,)),
    "reflector": (lambda: layers.BlockReflector(3), (4,)),
    "gain": (lambda: layers.ChannelGain(0.5), (4,)),
    "householder": (lambda: layers.Householder(), (4,)),
    "conv 1d": (lambda: layers.SpectralConv1D(3, 3), (6, 2)),
    "conv 2d": (lambda: layers.SpectralConv2D(3, 3, padding="same"), (5, 5, 2)),
    "almost orthogonal conv": (lambda: layers.AlmostOrthogonalConv2D(3, 3), (5, 5, 2)),
    "patches": (lambda: layers.PatchEmbedding(3, 2), (4, 4, 2)),
    "residual conv": (lambda: layers.ResidualConv2D(2, 3), (5, 5, 2)),
    "depthwise": (lambda: layers.SpectralDepthwiseConv2D(3), (5, 5, 2)),
    "separable": (lambda: layers.SpectralSeparableConv2D(3, 3), (5, 5, 2)),
    "transpose": (lambda: layers.SpectralConv2DTranspose(3, 2, strides=2), (3, 3, 2)),
    "convex potential conv": (lambda: layers.ConvexPotentialConv2D(3), (4, 4, 2)),
    "tokens": (lambda: layers.TokenDense(4), (3, 4)),
    "attention": (lambda: layers.LipschitzAttention(2, 3), (4, 3)),
    "recurrent": (lambda: layers.LipschitzRNN(3), (4, 3)),
    "positions": (lambda: layers.PositionalEmbedding(), (4, 3)),
    "gate": (lambda: OfBranches(layers.Gate(per_channel=True)), (4,)),
    "embedding": (lambda: layers.Embedding(9, 4), (5,)),
    "bag": (lambda: layers.EmbeddingBag(9, 4), (5,)),
}


class OfBranches:
    """A layer of two inputs, both of which are the same."""

    def __init__(self, layer):
        self.layer = layer

    def __call__(self, x):
        return self.layer([x, x])


def frozen_network(kind, scaled):
    """The layer between a trained one, where it does not read tokens, and a trained head."""
    keras.utils.set_random_seed(0)
    make, shape = FROZEN[kind]
    tokens = kind in ("embedding", "bag")
    inputs = keras.Input(shape, dtype="int32" if tokens else "float32")
    x = inputs
    if not tokens:
        x = layers.ChannelGain(1.0, name="front")(layers.BallProjection(1.0)(x))
    wrapped = make()
    layer = getattr(wrapped, "layer", wrapped)
    x = wrapped(x)
    network = keras.Model(
        inputs, layers.SpectralDense(3, use_bias=False, name="head")(keras.layers.Flatten()(x))
    )
    layer.trainable = False
    random = np.random.default_rng(0)
    layer.set_weights(
        [scaled * (w + random.normal(size=w.shape) / w.size) for w in layer.get_weights()]
    )
    return network, layer


def largest_ratio(network, shape, tokens):
    """The largest norm of one example's gradient over its bound, over some examples."""
    bounds = lipdp.gradient_bounds(network, 1.0)
    variables = network.trainable_variables
    random = np.random.default_rng(1)
    state = [ops.convert_to_tensor(v) for v in network.non_trainable_variables]
    ratio = 0.0
    for _ in range(12):
        x = random.integers(0, 9, (1, *shape)) if tokens else random.normal(size=(1, *shape))
        x = ops.convert_to_tensor(x.astype("int32" if tokens else "float32"))
        g = random.normal(size=(1, 3)).astype("float32")
        g = ops.convert_to_tensor(g / np.linalg.norm(g))

        def forward(*values, x=x):
            return [network.stateless_call(list(values), state, x, training=True)[0]]

        values = [ops.convert_to_tensor(v) for v in variables]
        _, slopes = vjp(forward, values, lambda _, g=g: [g])
        for variable, slope in zip(variables, slopes, strict=True):
            norm = np.linalg.norm(ops.convert_to_numpy(slope).astype("float64"))
            ratio = max(ratio, norm / bounds[variable.path])
    return ratio


@pytest.mark.parametrize(
    "kind",
    [
        k if i % 6 == 0 else pytest.param(k, marks=pytest.mark.any_backend)
        for i, k in enumerate(FROZEN)
    ],
)
@pytest.mark.parametrize("scaled", [0.3, 10.0])
def test_bounds_hold_for_frozen_weights_wherever_they_lie(kind, scaled):
    network, layer = frozen_network(kind, scaled)
    shape = FROZEN[kind][1]
    before = [np.array(w) for w in layer.get_weights()]
    assert 1e-4 < largest_ratio(network, shape, kind in ("embedding", "bag")) <= 1.0
    assert all((a == b).all() for a, b in zip(before, layer.get_weights(), strict=True))


@pytest.mark.parametrize("kind", one_in(9, FROZEN))
def test_a_step_knows_the_norms_of_frozen_weights(kind):
    network, layer = frozen_network(kind, 10.0)
    model = private(network, sampling=lipdp.FullBatch(), clip=0.5)
    shape = FROZEN[kind][1]
    x, y = data(shape=shape)
    next(model.batches(np.abs(x).astype("int32") if kind in ("embedding", "bag") else x, y))
    with rule.noted_norms() as measured:
        bounds = [float(bound) for bound, _ in sensitivities(model.step)]
    assert not measured
    expected = lipdp.gradient_bounds(network, 0.5).values()
    np.testing.assert_allclose(bounds, list(expected), rtol=1e-5)
    # What a step of this run goes by: that the values hold is made sure of before.
    if kind != "gate":  # which a rule measures by itself
        layer.set_weights([3.0 * w for w in layer.get_weights()])
        assert bounds == [float(bound) for bound, _ in sensitivities(model.step)]


@pytest.mark.any_backend
def test_norms_of_one_frozen_weight_are_told_apart():
    weight = keras.Variable(np.arange(24.0).reshape(2, 3, 4), trainable=False, dtype="float32")
    other = keras.Variable(np.ones((2, 3, 4)), trainable=False, dtype="float32")
    measure = [
        lambda v: rule.matrix_norm(v, (0, 1, 2), (1, 2, 12)),
        lambda v: rule.matrix_norm(v, (2, 1, 0), (1, 2, 12)),
        rule.row_norm,
        rule.vector_norm,
        rule.entry_norm,
        lambda v: rule.conv_norm(v, input_shape=(5,), padding="same"),
        lambda v: rule.conv_norm(v, input_shape=(5,), padding="valid"),
    ]
    with rule.noted_norms() as noted:
        first = [float(norm(v)) for v in (weight, other) for norm in measure]
    assert len({(id(v), kind) for v, kind, _ in noted}) == len(first)
    with rule.known_norms(noted), rule.noted_norms() as measured:
        assert first == [float(norm(v)) for v in (weight, other) for norm in measure]
        weight.trainable = True
        weight.assign(2.0 * weight)
        assert float(rule.entry_norm(weight)) == 46.0  # what is trained is measured
    assert not measured


def of_dense(**kwargs):
    """A model whose middle layer is frozen, and that layer."""
    network, layer = frozen_network("dense", 1.0)
    return private(network, sampling=lipdp.FullBatch(), **kwargs), layer


def _scaled(layer):
    layer.set_weights([3.0 * w for w in layer.get_weights()])


def _underneath(layer):
    if keras.backend.backend() == "tensorflow":
        layer.kernel.value.assign_add(ops.ones(layer.kernel.shape))
    else:
        layer.kernel._value = 1.0 + layer.kernel.value


def _one_bit(layer):
    value = np.array(layer.kernel)
    value[0, 0] = np.nextafter(value[0, 0], 9.0)
    layer.kernel.assign(value)


@pytest.mark.parametrize("eagerly", [True, False])
@pytest.mark.parametrize("assign", [_scaled, _underneath, _one_bit])
def test_a_step_whose_frozen_weights_were_assigned_is_refused(assign, eagerly):
    model, layer = of_dense(run_eagerly=eagerly)
    x, y = data(shape=(4,))
    batches = model.batches(x, y, epochs=4)
    model.train_on_batch(next(batches))
    before = weights(model)
    assign(layer)
    with pytest.raises(RuntimeError, match="kernel' was assigned since this run.*begin a new one"):
        model.train_on_batch(next(batches))
    assert model.spent(1e-5).steps == 1
    trained = [v.path for v in model.network.trainable_variables]
    for variable, old in zip(model.network.weights, before, strict=True):
        assert variable.path not in trained or (np.array(variable) == old).all()
    batches.close()
    model.fit(x, y, verbose=0)  # which measures it
    assert model.spent(1e-5).steps == 2


@pytest.mark.parametrize("moment", ["on_train_begin", "on_epoch_begin"])
def test_fit_ends_where_a_callback_assigns_a_frozen_weight(moment):
    model, layer = of_dense()

    class Assigns(keras.callbacks.Callback):
        pass

    setattr(Assigns, moment, lambda self, *args, **kwargs: _scaled(layer))
    with pytest.raises(RuntimeError, match="was assigned since this run began"):
        model.fit(*data(shape=(4,)), epochs=3, verbose=0, callbacks=[Assigns()])
    assert model.spent(1e-5).steps == 0


def test_frozen_weights_of_equal_values_are_not_refused():
    model, layer = of_dense(run_eagerly=False)
    x, y = data(shape=(4,))

    class Looks(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.evaluate(x, y, verbose=0)
            self.model.predict(x, verbose=0)
            self.model.network.predict(x, verbose=0)
            layer.set_weights(layer.get_weights())

    options = dict(verbose=0, callbacks=[Looks()], validation_data=(x, y))
    model.fit(x, y, epochs=3, **options)
    function = model.train_function
    model.fit(x, y, epochs=2, **options)
    assert model.train_function is function  # what is known is the same
    for batch in model.batches(x, y, epochs=3):
        layer.set_weights(layer.get_weights())
        model.network.predict(x, verbose=0)
        model.train_on_batch(batch)
    assert model.spent(1e-5).steps == 8


@pytest.mark.any_backend
def test_a_loop_goes_on_after_a_refused_step():
    model, layer = of_dense()
    right = layer.get_weights()
    steps = 0
    for batch in model.batches(*data(shape=(4,)), epochs=4):
        _scaled(layer)
        with pytest.raises(RuntimeError, match="was assigned"):
            model.train_on_batch(batch)
        layer.set_weights(right)
        model._open_batch = batch  # of the step that was not taken
        model.train_on_batch(batch)
        steps += 1
    assert steps == model.spent(1e-5).steps == 4


def test_frozen_weights_that_are_assigned_between_fits_get_other_noise():
    network, layer = frozen_network("dense", 1.0)
    model = private(network, sampling=lipdp.FullBatch(), noise_multiplier=1.0, run_eagerly=False)
    x, y = data(shape=(4,))
    gain = network.get_layer("front").gamma
    moves = []
    for _ in range(2):
        for batch in model.batches(x, y):
            batch.mask = np.zeros_like(batch.mask)  # noise alone
            gain.assign(np.zeros(4))
            model.train_on_batch(batch)
        moves.append(np.linalg.norm(np.array(gain)))
        layer.set_weights([1e-6 * w for w in layer.get_weights()])
    assert moves[1] < 1e-3 * moves[0]


@pytest.mark.any_backend
def test_a_subclass_of_a_projection_is_not_believed():
    class Elsewhere(projections.SpectralBall):
        def project(self, w):
            return 5.0 * super().project(w)

    layer = keras.layers.Dense(3, use_bias=False, kernel_constraint=Elsewhere(1.0))
    network = keras.Sequential([keras.Input((4,)), layers.BallProjection(1.0), layer])
    head = layers.SpectralDense(2, use_bias=False)
    network.add(head)
    projections.project(network.trainable_variables)
    norm = np.linalg.norm(np.array(layer.kernel), 2)
    assert norm > 2.0
    assert lipdp.gradient_bounds(network, 1.0)[head.kernel.path] >= norm


@pytest.mark.any_backend
def test_a_layer_that_assigns_to_a_weight_when_it_is_called_is_refused():
    class Restless(keras.layers.Layer):
        def build(self, shape):
            self.mean = self.add_weight(shape=shape[1:], trainable=False, name="mean")

        def call(self, x):
            self.mean.assign(ops.mean(x, axis=0))
            return x

        def bound(self, call):
            return lipdp.bounds.lipschitz()

    network = keras.Sequential(
        [keras.Input((6,)), layers.BallProjection(1.0), Restless(), layers.SpectralDense(3)]
    )
    assert "assigns to" in lipdp.check(network).problems[0]
    with pytest.raises(ValueError, match="mean.*no noise"):
        private(network)
