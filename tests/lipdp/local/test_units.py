"""What one example adds to the sums of a unit is within its threshold, whatever the others are."""

import math

import keras
import numpy as np
import pytest
from keras import ops

from lipdp.autodiff import compiled
from lipdp.bounds import UnknownLayerError
from lipdp.inspection.check import as_graph
from lipdp.local import matrix_units, products, recurrent_units, units
from lipdp.local import unit as unit_module
from lipdp.local.calls import LayerUnits, layer_units
from lipdp.training import steps
from tests.lipdp.local import networks

ROWS = 4
NAMES = [
    pytest.param(name, marks=() if name in networks.FAST else pytest.mark.slow)
    for name in networks.NAMES
]


class Attacked:
    """A network, and what its examples add to the sums of its units."""

    def __init__(self, name, policy="float32"):
        keras.config.set_dtype_policy(policy)
        try:
            self.network = networks.build(name)
        finally:
            keras.config.set_dtype_policy("float32")
        self.graph = as_graph(self.network)
        self.units = layer_units(self.network)
        rng = np.random.default_rng(0)
        shape = (ROWS, *self.graph.input_shape[1:])
        self.tokens = "int" in self.graph.inputs[0].dtype
        if self.tokens:
            self.x = rng.integers(0, 7, shape).astype("int32")
            self.x[0, :2] = self.x[2] = 0  # what masks leave out
        else:
            self.x = rng.normal(size=shape).astype("float32")
        self.g = rng.normal(size=(ROWS, 3)).astype("float32")
        self._sums, self._gradients = compiled(self._run), compiled(self._plain)

    def _run(self, values, x, g, thresholds, factors):
        mapping = zip(self.graph.variables, values, strict=True)
        with keras.StatelessScope(list(mapping)):
            outputs, pull = steps.backend().pull_back_to_calls(self.graph, x, self.units)
            ones, g = ops.ones_like(factors), ops.cast(g, outputs.dtype)
            return self.units.clipped_sums(*pull(g), thresholds, factors, ones)[0]

    def added(self, row, thresholds=None, x=None, g=None):
        """The gradients of each unit, flat, that one row adds, among the others."""
        x, g = self.x if x is None else x, self.g if g is None else g
        if thresholds is None:
            thresholds = np.full(len(self.units.units), 1e12)
        factors = np.eye(ROWS, dtype="float32")[row]
        values = [ops.convert_to_tensor(v) for v in self.graph.variables]
        thresholds = np.asarray(thresholds, "float32")
        sums = self._sums(values, *map(ops.convert_to_tensor, (x, g, thresholds, factors)))
        return self._flat(sums)

    def alone(self, row):
        """The same by ordinary automatic differentiation, of a batch with no other row."""
        x, g = self.x[row : row + 1], self.g[row : row + 1]
        values = [ops.convert_to_tensor(v) for v in self.graph.variables]
        return self._flat(self._gradients(values, *map(ops.convert_to_tensor, (x, g))))

    def _plain(self, values, x, g):
        if keras.backend.backend() == "tensorflow":  # a tape watches variables
            return steps.backend().pull_back(self.graph, x)[1](g)
        with keras.StatelessScope(list(zip(self.graph.variables, values, strict=True))):
            return steps.backend().pull_back(self.graph, x)[1](g)

    def _flat(self, sums):
        sums = [ops.convert_to_numpy(s).astype("float64").ravel() for s in sums]
        return [np.concatenate([sums[i] for i in group]) for group in self.units.groups()]

    def check(self, thresholds, row, x=None, g=None):
        lengths = lengths_of(self.added(row, thresholds, x, g))
        assert np.isfinite(lengths).all()
        assert (lengths <= thresholds * (1 + 1e-5)).all()
        return lengths


def lengths_of(gradients):
    return np.array([np.linalg.norm(v) for v in gradients])


@pytest.fixture(scope="module")
def attacked():
    made = {}
    return lambda name: made.get(name) or made.setdefault(name, Attacked(name))


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_of_an_example_is_its_own(name, attacked):
    network = attacked(name)
    for row in (0, ROWS - 1):
        expected, found = network.alone(row), network.added(row)
        scale = max(np.abs(e).max() for e in expected)
        for unit, ours, theirs in zip(network.units.units, found, expected, strict=True):
            np.testing.assert_allclose(
                ours, theirs, rtol=2e-3, atol=2e-6 * scale, err_msg=unit.layer.name
            )


@pytest.mark.parametrize("name", NAMES)
def test_thresholds_are_kept_and_reached(name, attacked):
    network = attacked(name)
    norms = np.array([lengths_of(network.added(row)) for row in range(ROWS)])
    thresholds = np.median(norms, axis=0) * 0.5
    uses = np.array(
        [sum(c.layer is u.layer for c in network.units.order) for u in network.units.units]
    )
    for row in range(ROWS):
        lengths = network.check(thresholds, row)
        # A unit that is used twice has half of the threshold for each use.
        reached = np.minimum(norms[row], thresholds)[uses == 1]
        np.testing.assert_allclose(lengths[uses == 1], reached, rtol=3e-3)


@pytest.mark.parametrize("broken", [0.0, np.nan, np.inf, 1e30, 3e38, 1e-40, 1e-25])
@pytest.mark.parametrize("name", NAMES)
def test_no_row_exceeds_its_threshold_or_is_seen_by_another(name, broken, attacked):
    network = attacked(name)
    thresholds = 0.7 * lengths_of(network.added(1))
    usual = network.added(1, thresholds)
    for what in ("g",) if network.tokens else ("x", "g", "both"):
        x, g = network.x.copy(), network.g.copy()
        if what != "g":
            x[0] = broken
            x[0].flat[0] = 1.0
        if what != "x":
            g[0] = broken
        network.check(thresholds, 0, x, g)
        for ours, theirs in zip(network.added(1, thresholds, x, g), usual, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-7)


def test_a_call_that_was_not_checked_is_refused():
    network = networks.build("subclassed, shared")
    found = layer_units(network)
    for order, match in [
        (found.order[:-1], "is called where it was not"),
        (found.order[::-1], "is called where it was not"),
        ((*found.order, found.order[0]), "is not called where it was"),
    ]:
        other = LayerUnits(found.units, order, found.variables)
        with pytest.raises(RuntimeError, match=match):
            steps.backend().pull_back_to_calls(as_graph(network), ops.ones((2, 5)), other)
    assert "call" not in vars(network.shared)  # all is as it was


def test_padding_takes_no_part(attacked):
    network = attacked("dense")
    found = layer_units(network.network)
    thresholds = ops.ones((len(found.units),))
    ends = np.array([0, ROWS - 1])
    sums, within = [], []
    for rows in (np.arange(ROWS), ends):
        x, g = (ops.convert_to_tensor(v[rows]) for v in (network.x, network.g))
        mask = ops.convert_to_tensor(np.isin(rows, ends).astype("float32"))
        _, pull = steps.backend().pull_back_to_calls(network.graph, x, found)
        one = found.clipped_sums(*pull(g), thresholds, ops.ones_like(mask), mask)
        sums.append(network._flat(one[0]))
        within.append(ops.convert_to_numpy(ops.sum(one[1], axis=0)))
    for ours, theirs in zip(*sums, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(*within)


@pytest.mark.parametrize(
    ("name", "memory"),
    [("two outputs", 60), ("conv, products", 1), ("reset before", 1), ("places", 1)],
)
def test_gradients_in_pieces_are_the_same(name, memory, attacked, monkeypatch):
    network = attacked(name)
    thresholds = 0.7 * lengths_of(network.added(1))
    expected = [network.added(row, thresholds) for row in range(ROWS)]
    monkeypatch.setattr(unit_module, "MEMORY", memory)  # 60: three rows, then one
    used = []
    in_pieces = unit_module.in_pieces
    monkeypatch.setattr(unit_module, "in_pieces", lambda *a: used.append(a[2]) or in_pieces(*a))
    other = Attacked(name)
    for row, theirs in enumerate(expected):
        for ours, their in zip(other.added(row, thresholds), theirs, strict=True):
            np.testing.assert_allclose(ours, their, rtol=1e-4, atol=1e-6)
    assert used and used[0] == (3 if memory == 60 else 1)


def test_a_layer_of_ten_million_weights_is_read_in_pieces(monkeypatch):
    class Large(keras.layers.Layer):
        def build(self, shape):
            self.scale = self.add_weight(shape=(10_000_000,), initializer="ones")

        def call(self, x):
            return x * self.scale[:4]

    large = Large()
    large.build((None, 4))
    found = []
    monkeypatch.setattr(unit_module, "in_pieces", lambda *a: found.append(a[2]))
    unit = units.find_units(keras.Sequential([keras.Input((4,)), large]))[0]
    saved, static = [], []
    unit.run(large.call, lambda v, s, c: saved.extend(s) or static.append(c) or v, (X,), {})
    unit.clipped(saved, [X], static[0], None, ops.ones((64,)))
    assert found and 4 * 10_000_000 * found[0] <= unit_module.MEMORY


X = np.ones((64, 4), "float32")


def test_fused_kernels_are_not_used(monkeypatch):
    # On a GPU they read the weights of both directions without a call of either.
    def fused(*args, **kwargs):
        raise AssertionError("fused")

    inputs = [keras.Input((5, 3)), keras.layers.LSTM(2, return_sequences=True)]
    network = keras.Sequential([*inputs, keras.layers.Bidirectional(keras.layers.GRU(2))])
    found = layer_units(network)
    for name in ("lstm", "gru", "bidirectional_lstm", "bidirectional_gru"):
        monkeypatch.setattr(keras.src.backend, name, fused)
    steps.backend().pull_back_to_calls(as_graph(network), ops.ones((2, 5, 3)), found)
    assert network.layers[0].use_cudnn == "auto"
    with pytest.raises(AssertionError, match="fused"):
        network(ops.ones((2, 5, 3)))


class Noisy(keras.layers.Layer):
    """A layer of one's own with a weight and random numbers."""

    def __init__(self):
        super().__init__()
        self.inner = keras.layers.Dropout(0.5)

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones")

    def call(self, x, training=False):
        return self.inner(x * self.scale, training=training)


@pytest.mark.parametrize(
    ("layer", "match"),
    [
        (lambda: keras.layers.LSTM(3, dropout=0.1), "'lstm_cell' .* part of 'lstm'"),
        (lambda: keras.layers.GRU(3, recurrent_dropout=0.1), "Dropout of its own"),
        (lambda: keras.layers.Bidirectional(keras.layers.GRU(3, dropout=0.1)), "random numbers"),
        (Noisy, "'dropout' .* part of 'noisy'"),
    ],
)
def test_random_numbers_beside_weights_are_refused(layer, match):
    with pytest.raises(UnknownLayerError, match=match):
        layer_units(keras.Sequential([keras.Input((5, 3)), layer()]))


# --- norms of products ----------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("close", [1e-3, 1e-4, 1e-5, 0.0])
def test_products_that_cancel_are_not_measured_as_nothing(close, bias):
    # Σ_t x_t ⊗ g_t is much shorter than its terms: rounding of the Gram sum exceeds it.
    rng = np.random.default_rng(0)
    x = np.repeat(rng.normal(size=(1, 1, 1, 64)), 2, axis=2).astype("float32")
    g = rng.normal(size=(1, 1, 1, 64)).astype("float32")
    g = np.concatenate([g, -g * np.float32(1 - close)], axis=2)
    squares, pull = products.outer(*map(ops.convert_to_tensor, (x, g)), bias)
    found = [ops.convert_to_numpy(f).astype("float64") for f in pull(ops.ones((1,)))]
    assert float(squares[0]) >= sum(np.sum(f**2) for f in found) * (1 - 1e-6)


@pytest.mark.parametrize("gram", [False, True])
def test_both_ways_agree(gram, monkeypatch):
    monkeypatch.setattr(products, "gram_is_cheaper", lambda *sizes: gram)
    rng = np.random.default_rng(1)
    x = rng.normal(size=(3, 2, 5, 4)).astype("float32")
    g = rng.normal(size=(3, 2, 5, 6)).astype("float32")
    factors = np.array([1.0, 0.5, 0.0], "float32")
    squares, pull = products.outer(*map(ops.convert_to_tensor, (x, g)), bias=True)
    kernel, bias = map(ops.convert_to_numpy, pull(ops.convert_to_tensor(factors)))
    each, sums = np.einsum("bgtp,bgtc->bgpc", x, g), np.sum(g, axis=2)
    np.testing.assert_allclose(kernel, np.tensordot(factors, each, 1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(bias, np.tensordot(factors, sums, 1), rtol=1e-4, atol=1e-5)
    exact = np.sum(each**2, axis=(1, 2, 3)) + np.sum(sums**2, axis=(1, 2))
    np.testing.assert_allclose(ops.convert_to_numpy(squares), exact, rtol=2e-3)


def exceeds(measured, rows):
    """By what factor the longest of what rows add is longer than measured."""
    squares, pull = measured
    norms, found = np.sqrt(ops.convert_to_numpy(squares).astype("float64")), []
    assert np.isfinite(norms).all()
    for row in range(rows):
        factors = ops.convert_to_tensor(np.eye(rows, dtype="float32")[row])
        parts = [ops.convert_to_numpy(p).astype("float64") for p in pull(factors)]
        found.append(math.sqrt(sum(np.sum(p**2) for p in parts)) / norms[row])
    return max(found)


def hard_rows(positions, width, seed):
    """Rows of many scales: terms that cancel, one term that swallows all others, denormals."""
    rng = np.random.default_rng(seed)
    plain = rng.normal(size=(positions, width))
    one = np.full((positions, width), 2.0**-12.1)
    one.flat[0] = 1.0
    same = np.repeat(rng.normal(size=(1, width)), positions, axis=0)
    signs = np.resize([1.0, -1.0], (positions, 1))
    rows = [plain, one, same, same * signs, same * (1 + 1e-7 * plain), plain * 1e-20, plain * 1e16]
    rows += [plain * 1e-42, plain * 10.0 ** rng.integers(-12, 12, (positions, width))]
    return np.stack(rows).astype("float32")


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("positions", "p", "c"), [(1, 300, 200), (8, 40, 30), (6, 300, 200), (300, 12, 9), (2, 2000, 3)]
)
def test_hard_rows_are_not_longer_than_measured(positions, p, c):
    x, g = hard_rows(positions, p, 0), hard_rows(positions, c, 1)
    count = len(x)
    pairs = [v[:, None] for v in (np.repeat(x, count, 0), np.tile(g, (count, 1, 1)))]
    kept = np.abs(pairs[0]).max((1, 2, 3)) * np.abs(pairs[1]).max((1, 2, 3)) < 1e15
    rows, (x, g) = kept.sum(), (ops.convert_to_tensor(v[kept]) for v in pairs)

    @compiled
    def measured(x, g):
        squares, pull = products.outer(x, g, bias=True)
        return squares, [part for row in range(rows) for part in pull(one_hot(row, rows))]

    squares, parts = measured(x, g)
    parts = [parts[i : i + 2] for i in range(0, len(parts), 2)]
    assert exceeds((squares, lambda f: parts[int(np.argmax(f))]), rows) < 1 + 2e-6


def one_hot(row, rows):
    return ops.convert_to_tensor(np.eye(rows, dtype="float32")[row])


@pytest.mark.optimized
@pytest.mark.parametrize("shape", [(1000, 1000), (100, 100, 100), (10_000,)])
def test_small_terms_are_not_swallowed(shape):
    # One by one, they would not change a sum that has begun with 1.
    rows = np.full((1, *shape), 2.0**-12.1, "float32")
    rows.flat[0] = 1.0
    exact = np.sum(rows.astype("float64") ** 2)
    for measure in (compiled(products.row_squares), products.row_squares):
        assert exact <= float(measure(ops.convert_to_tensor(rows))[0]) <= 1.001 * exact


@pytest.mark.parametrize("positions", [6, 200])
def test_hard_rows_of_a_table(positions):
    layer = keras.layers.Embedding(3, 10)
    layer.build()
    unit = matrix_units.EmbeddingUnit(layer)
    g = hard_rows(positions, 10, 0)
    for ids in (np.zeros(g.shape[:2]), np.random.default_rng(0).integers(0, 3, g.shape[:2])):
        rows = [ops.convert_to_tensor(v) for v in (ids.astype("int32"), g)]
        assert exceeds(unit.measure(rows[:1], rows[1]), len(g)) < 1 + 2e-6


# --- mutants --------------------------------------------------------------------------------------


def without_bias(patch):
    measure = matrix_units.DenseUnit.measure

    def wrong(unit, saved, g, static=None):
        squares = ops.sum(ops.square(saved[0]), -1) * ops.sum(ops.square(g), -1)
        return squares, measure(unit, saved, g, static)[1]

    patch.setattr(matrix_units.DenseUnit, "measure", wrong)


def diagonal_of_gram(patch):
    by_gram = products._by_gram

    def wrong(x, g, bias):
        terms = ops.sum(ops.square(x), -1) * ops.sum(ops.square(g), -1)
        return ops.sum(terms, axis=(1, 2)), by_gram(x, g, bias)[1]

    patch.setattr(products, "_by_gram", wrong)


def uses_not_counted(patch):
    patch.setattr("lipdp.local.calls.sum", lambda uses: 1, raising=False)


def frozen_part_counted(patch):
    measure = matrix_units.DenseUnit.measure

    def wrong(unit, saved, g, static=None):
        squares, pull = measure(unit, saved, g, static)
        frozen = products.row_squares(saved[0]) * products.row_squares(g)
        return squares + (frozen if unit.lora else 0.0), pull

    patch.setattr(matrix_units.DenseUnit, "measure", wrong)


def masks_not_counted(patch):
    run = recurrent_units.RecurrentUnit.run

    def wrong(unit, call, tap, args, kwargs):
        return run(unit, call, tap, args, {**kwargs, "mask": None})

    patch.setattr(recurrent_units.RecurrentUnit, "run", wrong)


def state_not_counted(patch):
    matrices = unit_module.Unit.matrices

    def wrong(unit, pairs, g, bias=None):
        found = matrices(unit, pairs, g, bias)
        if len(pairs) < 2:
            return found
        (names, (_, pull)) = found[0]
        return [(names, (matrices(unit, pairs[:1], g)[0][1][0], pull))]

    patch.setattr(unit_module.Unit, "matrices", wrong)


def gate_not_counted(patch):
    # The recurrent kernel's cotangent of a GRU is the kernel's through the gate.
    patch.setattr(recurrent_units.K, "GRUCell", object())


def positions_without_rows(patch):
    patch.setattr("lipdp.local.calls.over_batch", lambda x, size: x)


@pytest.mark.parametrize(
    ("mutant", "name"),
    [
        (without_bias, "dense"),
        (diagonal_of_gram, "dense, positions, gram"),
        (uses_not_counted, "subclassed, shared"),
        (positions_without_rows, "places"),
        (frozen_part_counted, "lora, positions"),
        (masks_not_counted, "masked, unrolled"),
        (state_not_counted, "simple recurrent"),
        (gate_not_counted, "reset before"),
    ],
)
def test_mutants_are_caught(mutant, name, monkeypatch):
    mutant(monkeypatch)
    network = Attacked(name)
    if not network.tokens:
        network.x = 0.1 * np.abs(network.x)
    norms = np.array([lengths_of(network.alone(row)) for row in range(ROWS)])
    with pytest.raises((AssertionError, ValueError, TypeError)):
        for row in range(ROWS):
            lengths = network.check(np.median(norms, axis=0) * 0.5, row)
            if (norms[row] > np.median(norms, axis=0)).all() and "shared" not in name:
                assert (lengths > 0.99 * np.median(norms, axis=0) * 0.5).all()
            test_the_gradient_of_an_example_is_its_own(name, lambda name: network)


# --- what a layer reads and is --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "int32"])
def test_integers_are_measured_as_floats(dtype):
    dense = keras.layers.Dense(3)
    network = keras.Sequential([keras.Input((6,), dtype=dtype), dense])
    found = layer_units(network)
    x = np.full((2, 6), 200 if dtype == "uint8" else 60_000, dtype)
    _, pull = steps.backend().pull_back_to_calls(network, ops.convert_to_tensor(x), found)
    one, first = ops.ones((1,)), ops.convert_to_tensor(np.array([1.0, 0.0], "float32"))
    sums, _ = found.clipped_sums(*pull(ops.ones((2, 3))), one, first, ops.ones((2,)))
    length = np.sqrt(sum(np.sum(ops.convert_to_numpy(s).astype("float64") ** 2) for s in sums))
    assert 0.99 <= length <= 1 + 1e-5


@pytest.mark.parametrize("layer", [keras.layers.LSTM, keras.layers.GRU])
def test_integers_that_a_recurrent_layer_reads_are_measured_as_floats(layer):
    network = keras.Sequential([keras.Input((1, 6), dtype="uint8"), layer(3)])
    for weight in network.trainable_variables:
        weight.assign(0.01 * weight)  # no gate is at its end, where gradients vanish
    found = layer_units(network)
    x = ops.convert_to_tensor(np.full((2, 1, 6), 16, "uint8"))
    _, pull = steps.backend().pull_back_to_calls(network, x, found)
    one, first = ops.ones((1,)), ops.convert_to_tensor(np.array([1.0, 0.0], "float32"))
    sums, _ = found.clipped_sums(*pull(ops.ones((2, 3))), one, first, ops.ones((2,)))
    length = np.sqrt(sum(np.sum(ops.convert_to_numpy(s).astype("float64") ** 2) for s in sums))
    assert 0.99 <= length <= 1 + 1e-5


class Standardised(keras.layers.Conv2D):
    def convolution_op(self, inputs, kernel):
        return super().convolution_op(inputs, kernel - ops.mean(kernel))


class Named(keras.layers.Conv2D):
    def __init__(self, filters):
        super().__init__(filters, 3)


@pytest.mark.any_backend
def test_a_subclass_with_code_of_its_own_has_no_formula():
    patched = keras.layers.Conv2D(2, 3)
    patched.convolution_op = lambda inputs, kernel: 2.0 * ops.conv(inputs, kernel)
    for conv, kind in [
        (keras.layers.Conv2D(2, 3), matrix_units.ConvUnit),
        (Named(2), matrix_units.ConvUnit),
        (Standardised(2, 3), units.AnyUnit),
        (patched, units.AnyUnit),
    ]:
        network = keras.Sequential([keras.Input((5, 5, 1)), conv])
        assert [type(unit) for unit in units.find_units(network)] == [kind]
