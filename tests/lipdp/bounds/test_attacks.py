"""Every case of the catalogue, attacked."""

import keras
import numpy as np
import pytest
from keras import ops

from lipdp import bounds, layers
from lipdp.audit import attack_bounds
from lipdp.autodiff import vjp
from lipdp.bounds.builtin.activations import ACTIVATIONS
from tests.lipdp.bounds.tightness import DOCS
from tests.lipdp.cases import CASES

K = keras.layers
ROUNDING = 1 + 1e-5


def _fast_cases():
    """A case of each kind. Of whole networks, which hold rules that have kinds of their own, JAX
    attacks every fourth: it compiles for seconds what TensorFlow runs at once. The others are slow
    together, not alone.
    """
    left = dict.fromkeys((case.kind for case in CASES), 1)
    if keras.backend.backend() != "tensorflow":
        whole = [kind for kind in left if kind.startswith(("network", "model"))]
        left |= {kind: 0 for i, kind in enumerate(whole) if i % 4}
    for case in CASES:
        if not case.slow and left[case.kind]:
            left[case.kind] -= 1
            yield case.name


FAST = set(_fast_cases())


@pytest.mark.parametrize(
    "case",
    [c if c.name in FAST else pytest.param(c, marks=pytest.mark.slow) for c in CASES],
    ids=lambda case: case.name,
)
def test_bound_holds(case):
    result = case.attack()
    assert result.ratio <= ROUNDING, result
    for end in case.tight:
        for name, ratio in result.attained.items():
            assert ratio >= 0.85 or not name.endswith(end), (name, result.attained)


# TensorFlow's slope of celu at zero is 2; JAX's is 1 everywhere.
TIES = {"celu": 2.0} if keras.backend.backend() != "tensorflow" else {}


@pytest.mark.parametrize("function", ACTIVATIONS, ids=lambda f: f.__name__)
def test_constant_of_an_activation(function):
    """Slopes as the backward pass computes them, on a fine grid and at kinks."""
    constant, at_zero = ACTIVATIONS[function]
    kinks = [0.0, -0.0, *(s * k for s in (-1, 1) for k in (0.5, 1.0, 3.0, 6.0))]
    x = np.concatenate([np.linspace(-60, 60, 960_001), kinks, [1e-20, -1e-20, 1e4, -1e4]])
    (value,), (slopes,) = vjp(
        lambda x: [function(x)],
        [ops.convert_to_tensor(x.astype("float32"))],
        lambda values: [ops.ones_like(values[0])],
    )
    slope = np.abs(ops.convert_to_numpy(slopes)).max()
    assert slope <= constant * (1 + 1e-6)
    assert slope * TIES.get(function.__name__, 1.0) >= 0.999 * constant
    assert abs(float(value[960_001])) <= at_zero * (1 + 1e-6)  # the first kink, zero


def small_network():
    return keras.Sequential([keras.Input((4,)), layers.BallProjection(1.0), K.Dense(2, "relu")])


def test_the_weights_are_as_before():
    network = small_network()
    before = network.get_weights()
    attack_bounds(network)
    for now, value in zip(network.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, value)


def test_same_seed_same_result():
    network = small_network()
    first, second = attack_bounds(network, seed=3), attack_bounds(network, seed=3)
    assert first.attained == second.attained and first.weights == second.weights
    np.testing.assert_array_equal(first.inputs[0], second.inputs[0])


def test_a_search_ends_where_it_has_found_enough():
    network = small_network()
    before = network.get_weights()
    whole, some = attack_bounds(network), attack_bounds(network, until=0.3)
    assert 0.3 < some.ratio < whole.ratio
    for now, value in zip(network.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, value)


def test_attack_refuses():
    with pytest.raises(ValueError, match="`input_shape` is needed"):
        attack_bounds(K.Dense(3))
    network = keras.Sequential([keras.Input((4,)), K.Dense(2)])
    with pytest.raises(ValueError, match="is for layers"):
        attack_bounds(network, (4,))
    with pytest.raises(ValueError, match="BallProjection after the input"):
        attack_bounds(network)
    assert attack_bounds(network, input_bound=2.0).ratio <= ROUNDING


def test_random_walks_of_bounds_are_those_of_the_package():
    """The attack reads the bounds that users get."""
    network = keras.Sequential([keras.Input((3,)), layers.BallProjection(1.0), K.Dense(2)])
    found = bounds.network_bounds(network)
    claimed = bounds.gradient_bounds(network)
    assert claimed == {p: pytest.approx(float(b) * 1.0001) for p, b in found.gradients.items()}


def test_the_table_of_the_docs_has_every_kind():
    """A kind without a row was added without `python -m tests.lipdp.bounds.tightness`."""
    rows = {line.split(" | ")[0].strip("| ") for line in DOCS.read_text("utf-8").splitlines()}
    assert {case.kind for case in CASES} <= rows
