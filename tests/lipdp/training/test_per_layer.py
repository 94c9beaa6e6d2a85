"""Networks whose layers clip their own gradients, with everything that a step can have."""

import math
import threading

import keras
import numpy as np
import pytest
from keras import layers as K
from keras import ops

import accountants
import lipdp
from lipdp import noise
from lipdp.autodiff import compiled, fused, gradient
from lipdp.bounds.walk import ROUNDING
from lipdp.data.groups import Groups
from lipdp.local.calls import layer_units
from lipdp.noise import standard_deviations
from lipdp.training import steps
from lipdp.training.clipping import LayerThresholds
from lipdp.training.steps import private_step
from tests.lipdp.helpers import EAGERLY, data, one_in, private, weights
from tests.lipdp.local.networks import Subclassed

BATCH = 12
SGD = keras.optimizers.SGD


def network(hidden=5):
    return keras.Sequential(
        [
            keras.Input((6,)),
            K.Dense(hidden, activation="tanh", name="first"),
            K.LayerNormalization(name="norm"),
            K.Dense(3, name="head"),
        ]
    )


def two_inputs():
    a, b = keras.Input((4,), name="a"), keras.Input((2,), name="b")
    z = K.Concatenate()([K.Dense(3, name="of_a")(a), K.Dense(2, name="of_b")(b)])
    return keras.Model([a, b], K.Dense(3, name="head")(z))


def subclassed():
    made = Subclassed()
    made(ops.ones((1, 5)))
    return made


def two_heads():
    x = keras.Input((6,))
    z = K.Dense(4, activation="tanh", name="body")(x)
    heads = [K.Dense(3, name="classes")(z), K.Dense(1, name="value")(z)]
    return keras.Model(x, K.Concatenate()(heads))


def loss_of_two_heads(y, z):
    """A label and a number, each with a loss of its own."""
    label = ops.cast(ops.clip(y[:, 0], 0.0, 2.0), "int32")
    of_label = keras.losses.sparse_categorical_crossentropy(label, z[:, :3], from_logits=True)
    return of_label + 0.3 * ops.square(y[:, 1] - z[:, 3])


def two_outputs():
    joined = two_heads()
    return keras.Model(joined.input, joined.layers[-1].input)


def clip_of(model):
    return np.asarray(ops.convert_to_numpy(model.current_clip()), "float64")


def set_thresholds(model, values):
    model.clip_state.variable.assign(np.asarray(values, "float32"))


class Step:
    """One step without noise, whose sums are read off the weights and the thresholds."""

    def __init__(
        self, made, x, y, weights=None, max_weight=None, compile=None, groups=None, **options
    ):
        options = {"noise_multiplier": 0.0, "clip": lipdp.PerLayerClip(learning_rate=1.0)} | options
        compile = {"max_sample_weight": max_weight, **(compile or {})}
        self.model = private(
            made,
            sampling=lipdp.FullBatch(),
            optimizer=SGD(1.0),
            allocation="per_weight",
            compile={"metrics": [], **compile},
            **options,
        )
        self.x, self.y, self.weights, self.groups = x, y, weights, groups
        self.shares = np.ones(BATCH)
        if groups is not None:
            self.shares = 1.0 / np.bincount(groups)[groups]
        self.most = max_weight or 1.0
        self.start = weights_of(self.model)
        self._gradients = fused(self._gradients_of_one)
        self.size = len(keras.tree.flatten(y)[0])
        each = [self.norms(row) for row in range(self.size)]
        # Of each unit another part of the examples is clipped.
        parts = np.linspace(0.3, 0.8, len(each[0]))
        self.thresholds = np.array(
            [np.quantile(n, part) for n, part in zip(np.transpose(each), parts, strict=True)]
        )

    def _gradients_of_one(self, values, x, y):
        model = self.model
        mapping = zip(model.graph.variables, values, strict=True)
        with keras.StatelessScope(list(mapping)):
            outputs, pull = steps.backend().pull_back(model.graph, x)
            _, g = gradient(lambda z: lipdp.losses.per_example(model.private_loss, y, z), outputs)
            return pull(g)

    def alone(self, row):
        """The gradients of one example by ordinary automatic differentiation, unit by unit."""
        values = [ops.convert_to_tensor(v) for v in self.model.graph.variables]
        x, y = keras.tree.map_structure(
            lambda a: ops.convert_to_tensor(a[row : row + 1]), (self.x, self.y)
        )
        found = self._gradients(values, x, y)
        return by_units(self.model, [ops.convert_to_numpy(f) for f in found])

    def norms(self, row):
        return np.array([np.linalg.norm(v) for v in self.alone(row)])

    def sums(self, mask=None, change=None):
        """The clipped sums of each unit, and the centred counts, of one step on these rows."""
        model = self.model
        model.network.set_weights(self.start)
        set_thresholds(model, self.thresholds)
        given = {}
        if isinstance(self.weights, dict):
            given = {"class_weight": self.weights}
        elif self.weights is not None:
            given = {"sample_weight": self.weights}
        if self.groups is not None:
            given["groups"] = self.groups
        for batch in model.batches(self.x, self.y, steps_per_epoch=1, **given):
            if mask is not None:
                batch.mask = np.asarray(mask, "float32")
            if change is not None:
                change(batch)
            model.train_on_batch(batch)
        size = self.shares.sum()  # examples, or groups of them
        moves = [a - b for a, b in zip(self.start, weights_of(model), strict=True)]
        sums = by_units(model, moves)
        scales = self.thresholds * self.most * ROUNDING * size
        sums = [s * scale for s, scale in zip(sums, scales, strict=True)]
        fractions = model.clip.quantile - np.log(clip_of(model) / self.thresholds)
        return sums, (fractions - 0.5) * size

    def expected(self, mask, weights):
        """The same, from the gradients of the examples alone."""
        sums, counts = None, 0.0
        self.model.network.set_weights(self.start)
        for row in np.flatnonzero(mask):
            gradients = self.alone(row)
            norms = np.array([np.linalg.norm(g) for g in gradients])
            factors = self.shares[row] * weights[row] * np.minimum(1, self.thresholds / norms)
            parts = [g * f for g, f in zip(gradients, factors, strict=True)]
            sums = parts if sums is None else [a + b for a, b in zip(sums, parts, strict=True)]
            counts = counts + self.shares[row] * ((norms <= self.thresholds) - 0.5)
        return sums, counts


def weights_of(model):
    return [w.astype("float64") for w in weights(model)]


def by_units(model, values):
    """Arrays, one for each weight, as a vector for each unit."""
    flat = [np.asarray(v, "float64").ravel() for v in values]
    return [np.concatenate([flat[i] for i in group]) for group in model.units.groups()]


# --- the matrix -----------------------------------------------------------------------------------


def _halves(x):
    return {"a": x[:, :4], "b": x[:, 4:]}


def _pairs(y):
    return np.stack([y, np.sin(np.arange(len(y)))], axis=1).astype("float32")


def _views(count):
    return lipdp.Augmentation(K.GaussianNoise(0.0), views=count)


#: Whose each example is, in their order; nobody has more than four.
PEOPLE = np.array([0, 0, 0, 1, 2, 2, 3, 3, 3, 3, 4, 5])

#: By name: arguments of `Step`.
MATRIX = {
    "plain": {},
    "pieces": {"physical_batch_size": 4},
    "views": {"augmentation": _views(3), "physical_batch_size": 6},
    "weights": {"weights": np.linspace(0.0, 2.0, BATCH), "max_weight": 2.0},
    "weights, views, pieces": {
        "weights": np.linspace(0.0, 2.0, BATCH),
        "max_weight": 2.0,
        "augmentation": _views(2),
        "physical_batch_size": 3,
    },
    "class weights": {"weights": {0: 0.5, 1: 3.0}, "max_weight": 4.0},
    "several inputs": {"made": two_inputs, "packed": _halves},
    "several heads": {"made": two_heads, "loss": loss_of_two_heads, "targets": _pairs},
    "several outputs": {
        "made": two_outputs,
        "loss": {"classes": "sparse_categorical_crossentropy", "value": "mse"},
        "targets": lambda y: {"classes": y, "value": _pairs(y)[:, 1]},
        "compile": {"loss_weights": {"classes": 1.0, "value": 0.3}},
    },
    "groups": {"unit": "group", "groups": PEOPLE},
    "groups, weights, views, pieces": {
        "unit": "group",
        "groups": PEOPLE,
        "weights": np.linspace(0.0, 2.0, BATCH),
        "max_weight": 2.0,
        "augmentation": _views(2),
        "physical_batch_size": 4,
    },
    "subclassed": {"made": subclassed, "packed": lambda x: x[:, :5]},
    "eager": {"run_eagerly": True},
    "compiled": {"run_eagerly": False, "compile": {"jit_compile": True}},
    "not compiled": {"run_eagerly": False, "compile": {"jit_compile": False}},
}
# What takes seconds to compile, or to run op by op, and is the same on the other backend.
HEAVY = {"not compiled", "compiled"} if EAGERLY else {"eager", "not compiled", "class weights"}


def made(name):
    options = dict(MATRIX[name])
    x, y = data(BATCH)
    x = options.pop("packed", lambda x: x)(2.0 * x)
    y = options.pop("targets", lambda y: y)(y)
    return Step(options.pop("made", network)(), x, y, **options)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in HEAVY)) for n in MATRIX]
)
def test_a_step_sums_the_clipped_gradients_of_its_examples(name):
    step = made(name)
    given = np.ones(BATCH)
    if isinstance(step.weights, dict):
        given = np.array([step.weights.get(int(label), 1.0) for label in step.y])
    elif step.weights is not None:
        given = step.weights
    mask = np.ones(BATCH)
    mask[[2, 3, BATCH - 1]] = 0.0
    sums, counts = step.sums(mask)
    # A unit that is used twice clips each use to its half: it keeps its bound, and is tried in
    # tests/lipdp/local.
    once = [sum(c.layer is u.layer for c in step.model.units.order) == 1 for u in units_of(step)]
    expected, expected_counts = step.expected(mask, given)
    for ours, theirs, single in zip(sums, expected, once, strict=True):
        if single:
            np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=2e-4 * np.abs(theirs).max())
        else:
            assert np.linalg.norm(ours) > 0
    np.testing.assert_allclose(counts[once], expected_counts[once], atol=1e-3)
    # Not the rows that only fill up the batch, whatever they hold.
    other = step.sums(mask, change=lambda batch: spoil(batch, 2))
    for a, b in zip([*sums, counts], [*other[0], other[1]], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(a).max())


PROBABILITIES = {
    "softmax": (3, keras.losses.SparseCategoricalCrossentropy),
    "softmax of distributions": (3, keras.losses.CategoricalCrossentropy),
    "sigmoid": (1, keras.losses.BinaryCrossentropy),
}


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("name", PROBABILITIES)
def test_a_loss_of_probabilities_has_their_gradient(name, traced):
    # Keras' losses look for the logits that a softmax was made of, also beyond what is watched.
    outputs, loss = PROBABILITIES[name]
    head = keras.Sequential([keras.Input((4,)), K.Dense(outputs, name.split()[0])])
    x, labels = np.random.default_rng(0).normal(size=(5, 4)), np.arange(5) % max(2, outputs)
    y = np.eye(3)[labels] if "distributions" in name else labels.reshape(-1, 1)

    def slopes(x, y):
        p = head(x)
        return p, gradient(lambda p: lipdp.losses.per_example(loss(), y, p), p)[1]

    run = compiled(slopes) if traced else slopes
    p, slope = map(ops.convert_to_numpy, run(ops.array(x, "float32"), ops.array(y, "float32")))
    own = 1.0 - np.abs(labels[:, None] - p) if outputs == 1 else p[np.arange(5), labels][:, None]
    # Along a direction that keeps the sum of the probabilities, which Keras divides by.
    move = np.where(np.arange(outputs) == labels[:, None], 1.0, -0.5) if outputs > 1 else 1.0
    sign = 1.0 if outputs > 1 else np.where(labels[:, None] == 1, 1.0, -1.0)
    np.testing.assert_allclose((slope * move).sum(1, keepdims=True), -sign / own, rtol=1e-3)


@pytest.mark.any_backend
@pytest.mark.parametrize("name", PROBABILITIES)
def test_a_final_softmax_is_taken_along_with_the_loss_of_its_name(name):
    outputs, loss = PROBABILITIES[name]
    body = [keras.Input((4,)), K.Dense(outputs)]
    for head in (body, [*body[:1], K.Dense(outputs, name.split()[0])]):
        model = lipdp.PrivateModel(
            keras.Sequential(head), noise_multiplier=1.0, clip=lipdp.PerLayerClip()
        )
        model.compile("sgd", loss=loss().name)
        assert lipdp.losses.takes_logits(model.private_loss) == (head is body)
    with pytest.raises(ValueError, match="leave out activation"):
        model.compile("sgd", loss="focal")


@pytest.mark.any_backend
def test_probabilities_that_a_loss_wants_and_nobody_makes_are_told_of():
    model = lipdp.PrivateModel(network(), noise_multiplier=1.0, clip=lipdp.PerLayerClip())
    with pytest.warns(UserWarning, match="from_logits=True"):
        model.compile("sgd", loss=keras.losses.SparseCategoricalCrossentropy())


def units_of(step):
    return step.model.units.units


def spoil(batch, row, value=1e4):
    """Another example in the place of this one."""

    def changed(array):
        array = array.copy()
        array[row] = value * np.sign(np.arange(array[row].size).reshape(array[row].shape) - 1.5)
        return array

    batch.inputs = keras.tree.map_structure(changed, batch.inputs)

    def other(array):
        array = array.copy()
        array[row] = (array[row] + 1) % 3
        return array

    batch.targets = keras.tree.map_structure(other, batch.targets)


@pytest.mark.parametrize(
    "name", one_in(2, ["weights, views, pieces", "plain", "several outputs", "subclassed"])
)
@pytest.mark.parametrize("value", [1.0, 1e4, 1e30])
def test_neighbouring_data_sets_are_as_close_as_the_noise_supposes(name, value):
    check_neighbours(made(name), value)


@pytest.mark.parametrize("name", ["groups", "groups, weights, views, pieces"])
@pytest.mark.parametrize("value", [1.0, 1e30])
def test_a_whole_group_moves_a_step_no_further_than_one_example(name, value):
    check_groups(made(name), value)


def check_groups(step, value=1.0):
    most = step.thresholds * step.most * ROUNDING
    for person in (0, 3, 5):
        own = PEOPLE == person

        def worst(batch, own=own):
            for row in np.flatnonzero(own):
                spoil(batch, row, value)

        whole, counts = step.sums(change=worst)
        without, fewer = step.sums(mask=1.0 - own)
        lengths = np.array([np.linalg.norm(a - b) for a, b in zip(whole, without, strict=True)])
        assert (lengths <= most * (1 + 1e-4)).all()
        assert (np.abs(counts - fewer) <= 0.5 + 1e-3).all()


def forgets_the_shares(patch):
    rows = Groups.rows
    patch.setattr(Groups, "rows", lambda *given: (rows(*given)[0], np.ones_like(rows(*given)[1])))


def forgets_the_shares_of_counts(patch):
    patch.setattr(private_step, "scale_rows", lambda rows, factors: rows)


@pytest.mark.any_backend
@pytest.mark.parametrize("mutant", [forgets_the_shares, forgets_the_shares_of_counts])
def test_mutants_of_groups_are_caught(mutant, monkeypatch):
    step = made("groups")
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        check_groups(step)


def check_neighbours(step, value=1e4, rows=(0, BATCH - 1)):
    most = step.thresholds * step.most * ROUNDING
    whole, whole_counts = step.sums()
    moved = 0.0
    for row in rows:
        mask = np.ones(BATCH)
        mask[row] = 0.0
        # One example less, as under "add/remove"; its divisor is public, so "zero-out" is the same.
        without, counts = step.sums(mask)
        # Another one in its place, as under "replace": twice as far.
        other, other_counts = step.sums(change=lambda batch, row=row: spoil(batch, row, value))
        for (a, b), times in zip(((without, counts), (other, other_counts)), (1, 2), strict=True):
            lengths = np.array([np.linalg.norm(u - v) for u, v in zip(whole, a, strict=True)])
            assert np.isfinite(lengths).all()
            assert (lengths <= times * most * (1 + 1e-4)).all()
            assert (np.abs(whole_counts - b) <= times * 0.5 + 1e-3).all()
            moved = np.maximum(moved, lengths / most)
    assert (moved > 0.1).all()  # the attack does not look past the units


# --- thresholds and noise -------------------------------------------------------------------------


def released(allocation, noise="gaussian", seed=0, **options):
    """A model with a step of noise alone: its moves of units and counts over what is planned."""
    model = private(
        network(40),
        noise=noise,
        noise_multiplier=1.7,
        sampling=lipdp.FullBatch(),
        optimizer=SGD(1.0),
        allocation=allocation,
        clip=lipdp.PerLayerClip(learning_rate=1.0, quantile=0.7),
        seed=None if noise == "secure" else seed,
        run_eagerly=False,
        **options,
    )
    x, y = data(BATCH)
    thresholds = np.array([0.003, 2.0, 70.0])
    start, moves, counts = model.network.get_weights(), [], []
    for _ in range(12):
        model.network.set_weights(start)
        set_thresholds(model, thresholds)
        for batch in model.batches(x, y, steps_per_epoch=1):
            batch.mask = np.zeros(BATCH, "float32")
            model.train_on_batch(batch)
        moved = [a - b for a, b in zip(start, weights_of(model), strict=True)]
        moves.append(by_units(model, moved))
        counts.append(0.2 - np.log(clip_of(model) / thresholds))  # fraction - 1/2
    return model, thresholds, [np.concatenate(m) for m in zip(*moves, strict=True)], counts


SHARES = {"first": 4.0, "norm": 1.0, "head": 0.5}


@pytest.mark.parametrize("allocation", one_in(4, [*noise.ALLOCATIONS, SHARES]))
def test_noise_of_the_units_is_what_the_accountant_supposes(allocation):
    model, thresholds, moves, counts = released(allocation)
    constants = model.step.constants
    bounds = thresholds * ROUNDING
    sizes = [40 * 7, 80, 41 * 3]
    shares = list(SHARES.values()) if isinstance(allocation, dict) else allocation
    stds = noise.standard_deviations(bounds, sizes, constants.gradient_noise_multiplier, shares)
    together = allocation in ("global", "least")
    scales = np.full(3, np.sqrt(np.mean(bounds**2))) if together else bounds
    for name, move, std, scale in zip(SHARES, moves, stds, scales, strict=True):
        sample = move * BATCH * scale / std
        sigmas = (sample.std() - 1.0) * math.sqrt(2 * sample.size)
        assert abs(sigmas) < 4.5, name
        assert abs(sample.mean()) * math.sqrt(sample.size) < 4.5, name
        # No update of a layer drowns in the noise of others, whatever their thresholds are.
        assert sample.std() * std / scale < 20, name
    # All of it is one Gaussian mechanism of the multiplier that is paid for.
    count_std = 0.5 * math.sqrt(3) * constants.count_noise_multiplier
    joint = (
        sum((b / s) ** 2 for b, s in zip(bounds, stds, strict=True)) + 3 * (0.5 / count_std) ** 2
    )
    assert joint**-0.5 == pytest.approx(1.7, rel=1e-6)
    sample = np.concatenate(counts) * BATCH / count_std
    assert abs((sample.std() - 1.0) * math.sqrt(2 * sample.size)) < 4.5


def test_secure_noise_has_an_entry_for_each_count_and_charges_its_rounding():
    model, thresholds, moves, counts = released("per_weight", noise="secure")
    sizes = 40 * 7 + 80 + 41 * 3
    assert model.step.entries == sizes + 3
    constants = model.step.constants
    gradient, count = model.clip_state.split(1.7, BATCH)
    assert constants.gradient_noise_multiplier == model.noise.multiplier(gradient, sizes)
    assert constants.count_noise_multiplier == model.noise.multiplier(count, 3)
    for move in moves:
        sample = move * BATCH / (math.sqrt(3) * constants.gradient_noise_multiplier)
        assert abs((sample.std() - 1.0) * math.sqrt(2 * sample.size)) < 4.5
    sample = (
        np.concatenate(counts) * BATCH / (0.5 * math.sqrt(3) * constants.count_noise_multiplier)
    )
    assert abs((sample.std() - 1.0) * math.sqrt(2 * sample.size)) < 4.5


def test_what_is_spent_is_that_of_one_mechanism(tmp_path):
    model = private(network(), clip=lipdp.PerLayerClip(), ledger=tmp_path / "ledger")
    x, y = data()
    model.fit(x, y, epochs=1, verbose=0)
    spent = model.spent(1e-5)
    assert spent.steps == accountants.Ledger(tmp_path / "ledger").steps == 4
    assert spent.epsilon == pytest.approx(
        accountants.epsilon(
            noise_multiplier=1.0,
            sampling=lipdp.PoissonSampling(16),
            num_examples=64,
            steps=4,
            delta=1e-5,
        )
    )
    budget = private(
        network(), clip=lipdp.PerLayerClip(), budget=lipdp.Budget(3.0, 1e-5), noise_multiplier=None
    )
    budget.fit(x, y, epochs=1, verbose=0)
    assert 2.9 < budget.spent().epsilon <= 3.0


@pytest.mark.any_backend
def test_correlated_noise_takes_fixed_thresholds():
    x, y = data()
    options = {"noise": lipdp.BandedNoise(), "sampling": lipdp.CyclicPoisson(8, bands=3)}
    model = private(network(), clip=lipdp.PerLayerClip(threshold=0.5), **options)
    before = weights(model)
    model.fit(x, y, epochs=1, verbose=0)
    assert all((a != b).any() for a, b in zip(before, weights(model), strict=True))
    with pytest.raises(ValueError, match="`clip` must be fixed with correlated noise"):
        private(network(), clip=lipdp.PerLayerClip(), **options)


def test_several_steps_in_one_call_are_those_of_single_ones():
    x, y = data()
    found = []
    for together in (1, 2):
        keras.utils.set_random_seed(0)
        model = private(
            network(),
            clip=lipdp.PerLayerClip(),
            seed=3,
            run_eagerly=False,
            compile={"steps_per_execution": together},
        )
        model.fit(x, y, epochs=1, verbose=0)
        found.append([*weights(model), clip_of(model)])
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_thresholds_reach_the_quantile_and_go_on():
    x, y = data(128)
    clip = lipdp.PerLayerClip(quantile=0.7, initial=0.01, learning_rate=0.4)
    # Steps of length zero: the gradients stay what they are.
    model = private(
        network(),
        clip=clip,
        sampling=lipdp.PoissonSampling(64),
        optimizer=SGD(0.0),
        noise_multiplier=0.1,
        seed=0,
    )
    step = Step(network(), x, y, clip=clip)
    step.model.network.set_weights(model.network.get_weights())
    norms = np.array([step.norms(row) for row in range(0, 128, 4)])
    model.fit(x, y, epochs=16, verbose=0)
    within = np.mean(norms <= clip_of(model), axis=0)
    assert (np.abs(within - 0.7) < 0.2).all()
    # A further call goes on, and so does one after `compile`.
    before = clip_of(model)
    model.compile(SGD(0.0), "sparse_categorical_crossentropy", run_eagerly=EAGERLY)
    np.testing.assert_array_equal(clip_of(model), before)
    model.fit(x, y, epochs=1, verbose=0)
    assert (np.abs(np.log(clip_of(model) / before)) < 1.0).all()
    assert (clip_of(model) != before).any()


@pytest.mark.any_backend
def test_thresholds_move_at_their_speed_and_stay_in_range():
    clip = lipdp.PerLayerClip(quantile=0.5)
    model = private(network(), clip=clip)
    state = model.clip_state

    def steps_to(target, fraction, start=0.05, most=1000):
        set_thresholds(model, [start] * 3)
        for count in range(most):
            if (clip_of(model) >= target if fraction < 0.5 else clip_of(model) <= target).all():
                return count
            state.update(ops.convert_to_tensor([fraction] * 3))
        return most

    # exp(±0.1) a step: nothing is known of the gradients' size, and a hundred steps find it.
    assert steps_to(1e3, 0.0) == math.ceil(10 * math.log(1e3 / 0.05))
    assert steps_to(1e-4, 1.0) == math.ceil(10 * math.log(0.05 / 1e-4))
    for fraction, end in ((0.0, 1e15), (1.0, 1e-9)):
        set_thresholds(model, [end] * 3)
        state.update(ops.convert_to_tensor([fraction] * 3))
        np.testing.assert_allclose(clip_of(model), end, rtol=1e-6)
    set_thresholds(model, [0.0, math.inf, 1.0])  # a checkpoint of somebody else
    np.testing.assert_allclose(clip_of(model), [1e-9, 1e15, 1.0], rtol=1e-6)


@pytest.mark.parametrize("allocation", one_in(3, noise.ALLOCATIONS))
def test_a_layer_without_gradients_stays_calm(allocation):
    """Its threshold falls to the floor; it is moved by noise of the size that all layers get."""

    class Ignored(K.Layer):
        def __init__(self):
            super().__init__()
            self.dead = K.Dense(4, name="dead")

        def build(self, shape):
            self.dead.build(shape)

        def call(self, x):
            return x + 0.0 * ops.sum(self.dead(x), axis=-1, keepdims=True)

    model = private(
        keras.Sequential([keras.Input((6,)), Ignored(), K.Dense(3, name="head")]),
        clip=lipdp.PerLayerClip(),
        allocation=allocation,
        optimizer=SGD(0.1),
        seed=0,
    )
    x, y = data()
    before = weights(model)
    set_thresholds(model, [1e-9, 1.0])
    model.fit(x, y, epochs=2, verbose=0)
    assert clip_of(model)[0] < 1e-7
    moved = [a - b for a, b in zip(before, weights(model), strict=True)]
    assert np.isfinite(moved[0]).all()
    # At most eight steps of 0.1 times noise of std 1·√2/16, and 4.5 sigmas.
    assert np.abs(moved[0]).max() < 0.1 * math.sqrt(8) * (math.sqrt(2) / 16) * 1.1 * 4.5
    assert np.abs(moved[2]).max() > 0


# --- arguments, settings and state ----------------------------------------------------------------


@pytest.mark.any_backend
def test_thresholds_by_layer():
    given = {"head": 1.5, "first": 0.5, "norm": 0.25}
    model = private(network(), clip=lipdp.PerLayerClip(threshold=given))
    assert clip_of(model).tolist() == [0.5, 0.25, 1.5]
    assert not model.clip.adaptive and model.clip_state.counts == 0
    bounds = [float(b) for b, _ in private_step.sensitivities(model.step)]
    np.testing.assert_allclose(bounds, [0.5, 0.25, 1.5], rtol=2e-4)
    x, y = data()
    model.fit(x, y, epochs=1, verbose=0)
    assert clip_of(model).tolist() == [0.5, 0.25, 1.5]
    given["head"] = 9.0  # what is given is kept as it was
    assert clip_of(model).tolist() == [0.5, 0.25, 1.5]
    for wrong in ({"head": 1.0}, {**given, "other": 1.0}, {}):
        with pytest.raises(
            ValueError, match="a threshold for each layer .*'first', 'norm', 'head'"
        ):
            private(network(), clip=lipdp.PerLayerClip(threshold=wrong))
    for wrong in (0.0, -1.0, math.nan, math.inf, 1e-12, 1e20):
        for named in (wrong, {"head": wrong}):
            with pytest.raises(ValueError, match="threshold"):
                lipdp.PerLayerClip(threshold=named)
        with pytest.raises(ValueError, match="initial"):
            lipdp.PerLayerClip(initial=wrong)
    for wrong in ("1", True, [1.0], {"head": "1"}):
        with pytest.raises(TypeError, match="threshold"):
            lipdp.PerLayerClip(threshold=wrong)


@pytest.mark.any_backend
def test_layers_of_the_same_name_are_told_apart_by_their_paths():
    inner = [keras.Sequential([keras.Input((6,)), K.Dense(6, name="d")], name=n) for n in "ab"]
    made = keras.Sequential([keras.Input((6,)), *inner, K.Dense(3, name="head")])
    model = private(made, clip=lipdp.PerLayerClip())
    names = model.units.names()
    assert len(set(names)) == 3 and names[-1] == "head"
    shares = dict.fromkeys(names, 1.0)
    private(made, clip=lipdp.PerLayerClip(threshold=shares), allocation=shares)


@pytest.mark.any_backend
def test_shares_are_for_all_layers_by_their_names():
    model = private(network(), clip=lipdp.PerLayerClip(), allocation=SHARES)
    assert model.step.allocation == (4.0, 1.0, 0.5)
    paths = {v.path: 1.0 for v in model.network.trainable_variables}
    for wrong in ({"first": 1.0}, {**SHARES, "other": 1.0}, {}, paths, "equal"):
        with pytest.raises(ValueError, match="`allocation` must .* layer with trained weights"):
            private(network(), clip=lipdp.PerLayerClip(), allocation=wrong)


@pytest.mark.any_backend
def test_layers_that_are_trained_are_found_anew_by_compile():
    x, y = data()
    made = network()
    model = private(made, clip=lipdp.PerLayerClip())
    set_thresholds(model, [0.1, 0.2, 0.3])
    made.get_layer("norm").trainable = False
    with pytest.raises(RuntimeError, match="compile"):
        model.fit(x, y, verbose=0)
    loss = "sparse_categorical_crossentropy"
    model.compile(SGD(0.5), loss, run_eagerly=True)
    np.testing.assert_allclose(clip_of(model), [0.1, 0.3], rtol=1e-6)
    model.fit(x, y, verbose=0)
    made.get_layer("norm").trainable = True
    set_thresholds(model, [0.1, 0.3])
    model.compile(SGD(0.5), loss, run_eagerly=True)
    np.testing.assert_allclose(clip_of(model), [0.1, 0.05, 0.3], rtol=1e-6)
    model.fit(x, y, verbose=0)
    # There is one variable of thresholds, whatever came before.
    assert sum("thresholds" in v.path for v in model.non_trainable_variables) == 1
    fixed = private(network(), clip=lipdp.PerLayerClip(threshold=1.0))
    assert not any("thresholds" in v.path for v in fixed.non_trainable_variables)


@pytest.mark.any_backend
def test_settings_that_change_are_refused():
    x, y = data()
    model = private(
        network(), clip=lipdp.PerLayerClip(threshold={"first": 1.0, "norm": 1, "head": 2})
    )
    model.clip.threshold["head"] = 3.0
    with pytest.raises(RuntimeError, match="clip"):
        model.fit(x, y, verbose=0)
    assert model.spent(1e-5).steps == 0


@pytest.mark.any_backend
def test_thresholds_are_part_of_a_checkpoint(tmp_path):
    x, y = data()
    model = private(network(), clip=lipdp.PerLayerClip())
    model.fit(x, y, epochs=2, verbose=0)
    assert (clip_of(model) != np.float32(0.05)).all()
    model.save_weights(tmp_path / "run.weights.h5")
    other = private(network(), clip=lipdp.PerLayerClip())
    other.load_weights(tmp_path / "run.weights.h5")
    np.testing.assert_array_equal(clip_of(other), clip_of(model))
    for a, b in zip(weights(model), weights(other), strict=True):
        np.testing.assert_array_equal(a, b)


# --- threads --------------------------------------------------------------------------------------


class Meeting(K.Layer):
    """Where replicas wait for each other, if there are any."""

    barrier = None

    def call(self, x):
        if self.barrier is not None:
            self.barrier.wait(timeout=60)
        return x


@pytest.mark.any_backend
def test_forward_passes_of_several_threads_are_recorded_apart():
    meeting, inner = Meeting(), K.Dense(4, name="inner")
    made = keras.Sequential([keras.Input((6,)), inner, meeting, K.Dense(3, name="head")])
    units = layer_units(made)
    meeting.barrier = threading.Barrier(3)
    found, ended = {}, threading.Event()

    def replica(name):
        def tap(number, value):
            return value

        with units.recorded(tap, 2) as calls:
            made(np.full((2, 6), name, "float32"))
            if name:  # the first that came is the first that leaves
                ended.wait(timeout=60)
        found[name] = [(call.unit, float(np.mean(call.saved[0]))) for call in calls]
        ended.set()

    threads = [threading.Thread(target=replica, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [0, 1, 2]
    for name, calls in found.items():
        assert [unit for unit, _ in calls] == [0, 1]
        assert calls[0][1] == name
    assert not {"call"} & {*vars(inner), *vars(made.layers[-1])}


# --- mutants --------------------------------------------------------------------------------------


def counts_of_padding(patch):
    right = private_step.LayerUnits.clipped_sums

    def wrong(units, calls, cotangents, thresholds, factors, mask):
        return right(units, calls, cotangents, thresholds, factors, ops.ones_like(mask))

    patch.setattr(private_step.LayerUnits, "clipped_sums", wrong)


def views_of_layers_mixed(patch):
    def wrong(self, values):
        mean = ops.mean(ops.reshape(values, (-1, self.views)), axis=1)
        return ops.reshape(mean, (-1, *values.shape[1:]))

    patch.setattr(lipdp.Augmentation, "averaged", wrong)


def weights_not_in_the_bound(patch):
    right = private_step.clamp_weights
    patch.setattr(private_step, "clamp_weights", lambda w, most: right(3.0 * w, 3.0 * most))


def rows_not_clipped(patch):
    right = private_step.LayerUnits.clipped_sums

    def wrong(units, calls, cotangents, thresholds, *rest):
        return right(units, calls, cotangents, 3.0 * thresholds, *rest)

    patch.setattr(private_step.LayerUnits, "clipped_sums", wrong)


@pytest.mark.parametrize(
    ("broken", "check", "name"),
    [
        (counts_of_padding, test_a_step_sums_the_clipped_gradients_of_its_examples, "plain"),
        (views_of_layers_mixed, test_a_step_sums_the_clipped_gradients_of_its_examples, "views"),
        (weights_not_in_the_bound, lambda name: check_neighbours(made(name)), "weights"),
        (rows_not_clipped, lambda name: check_neighbours(made(name)), "plain"),
    ],
)
@pytest.mark.any_backend
def test_mutants_are_caught(broken, check, name, monkeypatch):
    broken(monkeypatch)
    with pytest.raises(AssertionError):
        check(name)


def noise_of_the_counts_is_free(patch):
    patch.setattr(LayerThresholds, "split", lambda self, sigma, size: (sigma, 5 * sigma))


def each_layer_by_its_own_threshold(patch):
    patch.setattr(private_step, "update_scales", lambda step, bounds: bounds)


@pytest.mark.any_backend
def test_mutants_of_the_noise_are_caught(monkeypatch):
    for broken, check in (
        (noise_of_the_counts_is_free, test_noise_of_the_units_is_what_the_accountant_supposes),
        (each_layer_by_its_own_threshold, test_a_layer_without_gradients_stays_calm),
    ):
        with monkeypatch.context() as patch, pytest.raises(AssertionError):
            broken(patch)
            check("global")


# --- numbers of any size --------------------------------------------------------------------------


@pytest.mark.any_backend
def test_noise_of_small_bounds_does_not_vanish():
    bounds = [ops.convert_to_tensor(v, "float32") for v in (1e-25, 2e-25)]
    for allocation in ("global", "per_weight", "least"):
        stds = standard_deviations(bounds, [3, 4], 2.0, allocation)
        joint = sum((float(b) / float(s)) ** 2 for b, s in zip(bounds, stds, strict=True))
        assert joint**-0.5 == pytest.approx(2.0, rel=1e-4)


@pytest.mark.any_backend
@pytest.mark.parametrize("weight", [1e-20, 1e7])
def test_sample_weights_beyond_float32_are_refused(weight):
    with pytest.raises(ValueError, match="`max_sample_weight` must lie between"):
        private(compile={"max_sample_weight": weight})
