"""What one example adds to the sums of a unit is within its threshold, whatever the others are."""

import keras
import numpy as np
import pytest
from keras import ops

from lipdp.autodiff import compiled
from lipdp.inspection.check import as_graph
from lipdp.local import products, units
from lipdp.local.calls import LayerUnits, layer_units
from lipdp.training import steps
from tests.lipdp.local import networks

ROWS = 4


class Attacked:
    """A network, and what its examples add to the sums of its units."""

    def __init__(self, name):
        self.network = networks.build(name)
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
            _, pull = steps.backend().pull_back_to_calls(self.graph, x, self.units)
            ones = ops.ones_like(factors)
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


@pytest.mark.parametrize("name", networks.NAMES)
def test_the_gradient_of_an_example_is_its_own(name, attacked):
    network = attacked(name)
    for row in (0, ROWS - 1):
        expected, found = network.alone(row), network.added(row)
        scale = max(np.abs(e).max() for e in expected)
        for unit, ours, theirs in zip(network.units.units, found, expected, strict=True):
            np.testing.assert_allclose(
                ours, theirs, rtol=2e-3, atol=2e-6 * scale, err_msg=unit.layer.name
            )


@pytest.mark.parametrize("name", networks.NAMES)
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
@pytest.mark.parametrize("name", networks.NAMES)
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


# --- mutants --------------------------------------------------------------------------------------


def without_bias(patch):
    measure = units.DenseUnit.measure

    def wrong(unit, saved, g, static=None):
        squares = ops.sum(ops.square(saved[0]), -1) * ops.sum(ops.square(g), -1)
        return squares, measure(unit, saved, g, static)[1]

    patch.setattr(units.DenseUnit, "measure", wrong)


def diagonal_of_gram(patch):
    by_gram = products._by_gram

    def wrong(x, g, bias):
        terms = ops.sum(ops.square(x), -1) * ops.sum(ops.square(g), -1)
        return ops.sum(terms, axis=(1, 2)), by_gram(x, g, bias)[1]

    patch.setattr(products, "_by_gram", wrong)


def uses_not_counted(patch):
    patch.setattr("lipdp.local.calls.sum", lambda uses: 1, raising=False)


def positions_without_rows(patch):
    patch.setattr("lipdp.local.calls.over_batch", lambda x, size: x)


@pytest.mark.parametrize(
    ("mutant", "name"),
    [
        (without_bias, "dense"),
        (diagonal_of_gram, "dense, positions, gram"),
        (uses_not_counted, "subclassed, shared"),
        (positions_without_rows, "places"),
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
            network.check(np.median(norms, axis=0) * 0.5, row)
            test_the_gradient_of_an_example_is_its_own(name, lambda name: network)
