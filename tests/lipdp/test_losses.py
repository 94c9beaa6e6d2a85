"""Losses: their gradients stay within their bounds, and come close."""

import keras
import numpy as np
import pytest
from keras import ops

from lipdp import losses
from lipdp.clipping import clip_rows
from lipdp.steps.autodiff import gradient

SPARSE = [
    losses.SparseCategoricalCrossentropy(),
    losses.SparseCategoricalCrossentropy(temperature=7.0),
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    losses.MulticlassHinge(),
    losses.MulticlassHinge(margin=2.0, divisor="others"),
]
DENSE = [
    losses.CategoricalCrossentropy(temperature=3.0),
    keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1),
    keras.losses.CategoricalHinge(),
]
REAL = [
    losses.BinaryCrossentropy(temperature=5.0),
    keras.losses.BinaryCrossentropy(from_logits=True),
    keras.losses.MeanAbsoluteError(),
    keras.losses.Huber(delta=2.0),
    keras.losses.LogCosh(),
    keras.losses.Hinge(),
]


def worst(loss, y, z):
    _, g = gradient(
        lambda v: losses.per_example(loss, ops.convert_to_tensor(y), v), ops.convert_to_tensor(z)
    )
    return np.linalg.norm(ops.convert_to_numpy(g).reshape(len(z), -1), axis=1).max()


def logits(shape, seed=0):
    """Small and huge logits, ties, and each class ahead or far behind."""
    generator = np.random.default_rng(seed)
    z = [s * generator.normal(size=(60, *shape)) for s in (0.0, 0.1, 1.0, 10.0, 1e4)]
    eye = np.eye(shape[-1])
    z += [np.broadcast_to(s * e, (1, *shape)) for e in eye for s in (30.0, -30.0, 1e-3)]
    return np.concatenate(z).astype("float32")


@pytest.mark.parametrize("positions", [(), (4,)])
@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("loss", SPARSE + DENSE + REAL, ids=lambda loss: type(loss).__name__)
def test_gradients_stay_within_their_bound_and_attain_it(loss, classes, positions):
    shape = (*positions, classes)
    z = logits(shape)
    found = 0.0
    for label in range(classes):
        y = np.full((len(z), *positions), label)
        if loss in DENSE:
            y = np.eye(classes, dtype="float32")[y]
        elif loss in REAL:
            y = np.full((len(z), *shape), float(label > 0), "float32")
        found = max(found, worst(loss, y, z))
    bound = losses.gradient_bound(loss, shape)
    assert found <= bound * (1 + 1e-6)
    assert found >= 0.85 * bound


def test_per_example_is_a_mean_over_positions_whatever_the_reduction():
    y, z = np.zeros((3, 4), int), logits((4, 5))[:3]
    plain = losses.per_example(SPARSE[2], y, ops.convert_to_tensor(z))
    summed = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum")
    np.testing.assert_allclose(
        ops.convert_to_numpy(losses.per_example(summed, y, ops.convert_to_tensor(z))),
        ops.convert_to_numpy(plain),
    )
    assert plain.shape == (3,)


@pytest.mark.parametrize(
    "loss",
    [
        keras.losses.MeanSquaredError(),
        keras.losses.SparseCategoricalCrossentropy(),
        keras.losses.CategoricalCrossentropy(from_logits=True, axis=1),
        keras.losses.BinaryCrossentropy(),
        keras.losses.Dice(),
        keras.losses.CosineSimilarity(),
        lambda y, z: z,
    ],
)
def test_unknown_and_unbounded_losses_are_infinite(loss):
    assert losses.gradient_bound(loss, (3,)) == float("inf")


def test_a_subclass_is_not_trusted():
    class Steeper(losses.SparseCategoricalCrossentropy):
        def call(self, y_true, y_pred):
            return 100.0 * super().call(y_true, y_pred)

    assert losses.gradient_bound(Steeper(), (3,)) == float("inf")


@pytest.mark.parametrize(
    "loss", [SPARSE[0], SPARSE[1], DENSE[0], REAL[0], losses.MulticlassHinge()]
)
def test_losses_survive_a_round_trip(loss):
    again = keras.losses.deserialize(keras.losses.serialize(loss))
    assert again.get_config() == loss.get_config()


@pytest.mark.parametrize("temperature", [0, -1.0, float("inf"), "warm"])
def test_bad_temperatures(temperature):
    with pytest.raises(ValueError, match="temperature"):
        losses.BinaryCrossentropy(temperature)


def test_bad_targets():
    simplex = losses.CategoricalCrossentropy()
    with pytest.raises(ValueError, match="sum"):
        losses.check_targets(simplex, np.ones((4, 3)), (3,))
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        losses.check_targets(simplex, np.full((4, 3), -1.0), (3,))
    with pytest.raises(ValueError, match="shape"):
        losses.check_targets(simplex, np.ones((4, 2)), (3,))
    with pytest.raises(ValueError, match="NaN"):
        losses.check_targets(keras.losses.MeanSquaredError(), np.array([np.nan]), (1,))
    losses.check_targets(losses.BinaryCrossentropy(), np.array([0, 1]), (1,))


def test_clipped_rows_are_finite_and_short():
    rows = np.array(
        [[3e30, 4e30], [1e-30, 0.0], [0.3, 0.4], [np.nan, 1.0], [np.inf, 0.0], [0.0, 0.0]],
        "float32",
    )
    clipped, within = clip_rows(ops.convert_to_tensor(rows), 0.6, ops.ones((6,)))
    clipped, within = map(ops.convert_to_numpy, (clipped, within))
    np.testing.assert_allclose(clipped[0], [0.36, 0.48], rtol=1e-5)
    np.testing.assert_array_equal(clipped[1:3], rows[1:3])
    np.testing.assert_array_equal(clipped[3:], 0.0)
    np.testing.assert_array_equal(within, [0, 1, 1, 1, 1, 1])
    masked, within = clip_rows(ops.convert_to_tensor(rows), 0.6, ops.zeros((6,)))
    assert not ops.convert_to_numpy(masked).any() and not ops.convert_to_numpy(within).any()
