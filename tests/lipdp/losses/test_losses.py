"""Losses: their gradients are attacked; they stay within their bounds, and come close."""

import math

import keras
import numpy as np
import pytest
from keras import ops

from lipdp import losses
from lipdp.autodiff import fused, gradient
from lipdp.training.clipping import clamp_weights, clip_rows, scale_rows
from tests.lipdp.helpers import one_in

K = keras.losses
UNEQUAL = [0.02, 0.3, 0.18, 0.4, 0.1]

# Each loss is attacked with these numbers of outputs, at one position or at several.
LABELS = [
    losses.SparseCategoricalCrossentropy(),
    losses.SparseCategoricalCrossentropy(temperature=7.0),
    K.SparseCategoricalCrossentropy(from_logits=True),
    losses.MulticlassHinge(),
    losses.MulticlassHinge(margin=2.0, divisor="others"),
    losses.MulticlassKR(),
    losses.MulticlassHKR(alpha=3.0, divisor="others"),
    losses.Focal(gamma=0.3, temperature=5.0),
    losses.Focal(gamma=1.0),
    losses.Focal(gamma=2.0),
    losses.Focal(gamma=20.0),
    losses.LogitAnnealing(),
    losses.EMMA(radius=0.3, temperature=4.0),
    losses.EMMA(radius=50.0),
    losses.GloRo(radius=0.3),
    losses.GloRo(radius=5.0, temperature=4.0),
]
PRIORS = [
    losses.MulticlassKR(priors=UNEQUAL),
    losses.MulticlassHKR(alpha=2.0, margin=0.3, priors=UNEQUAL),
]
SIMPLEX = [
    losses.CategoricalCrossentropy(temperature=3.0),
    K.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1),
    K.CategoricalHinge(),
]
UNIT = [
    losses.BinaryCrossentropy(temperature=5.0),
    K.BinaryCrossentropy(from_logits=True),
    losses.BinaryKR(),
    losses.BinaryKR(prior=0.05),
    losses.BinaryHKR(alpha=2.0, prior=0.7),
]
OTHERS = [
    losses.CosineSimilarity(),
    losses.CosineSimilarity(min_norm=3.0, max_target_norm=2.0),
    K.Hinge(),
    K.MeanAbsoluteError(),
    K.Huber(delta=2.0),
    K.LogCosh(),
]
OWN = [
    loss
    for loss in [*LABELS, *PRIORS, *SIMPLEX, *UNIT, *OTHERS]
    if isinstance(loss, losses.BoundedLoss)
]


def named(loss):
    return type(loss).__name__


# --- the attack -----------------------------------------------------------------------------------


def candidate_logits(shape, generator):
    """Zeros, ties, equal and one-hot rows at every scale, tiny and huge draws."""
    classes = shape[-1]
    corners = [np.zeros(classes), *np.eye(classes)]
    corners += [np.eye(classes)[i] + np.eye(classes)[(i + 1) % classes] for i in range(classes)]
    corners += [np.ones(classes), np.linspace(-1, 1, classes), np.arange(classes) % 2]
    z = [s * c for c in corners for s in (1e-6, 1e-3, 0.1, 0.5, 1.0, 2.0, 3.0, 10.0, 1e3, 1e6)]
    z = [np.broadcast_to(v, (1, *shape)) for row in z for v in (row, -row, row + 1e4)]
    z += [s * generator.normal(size=(40, *shape)) for s in (1e-4, 0.1, 0.5, 1.0, 3.0, 10.0, 1e4)]
    return np.concatenate(z).astype("float32")


def candidate_targets(kind, rows, shape, generator):
    """Lists of targets, a row for each row of the logits: corners, and draws in between."""
    classes = shape[-1]
    labels = [np.full((rows, *shape[:-1]), c) for c in range(classes)]
    labels.append(generator.integers(0, classes, (rows, *shape[:-1])))
    if kind == "labels":
        return labels
    hot = [np.eye(classes, dtype="float32")[y] for y in labels]
    soft = generator.dirichlet(np.full(classes, 0.5), (rows, *shape[:-1]))
    if kind == "simplex":
        return [*hot, soft, np.full((rows, *shape), 1.0 / classes)]
    if kind == "unit":
        corners = generator.integers(0, 2, (rows, *shape))
        return [np.zeros((rows, *shape)), np.ones((rows, *shape)), corners, soft]
    if kind == "signs":
        corners = generator.choice([-1.0, 1.0], (rows, *shape))
        return [-np.ones((rows, *shape)), np.ones((rows, *shape)), corners]
    draws = generator.normal(size=(rows, *shape))
    if kind == "ball":  # of radius 1
        draws /= np.maximum(1e-9, np.linalg.norm(draws, axis=-1, keepdims=True))
        return [hot[0], -hot[0], hot[-1], draws, 0.0 * draws]
    return [0.0 * draws, 1e4 * draws, -1e9 * np.ones((rows, *shape))]


def attack(function, kind, shape, scale=1.0, steps=16):
    """Largest norm that the gradient of one example's loss was seen to have.

    All structured logits meet all structured targets in one batch; from the best of these, and
    from some others, gradient ascent on the norm of the gradient.

    Args:
        function: `(y_true, y_pred)` to the losses of a batch.
        kind: of targets, as `BoundedLoss.targets`.
        shape: of the outputs.
        scale: largest norm of a target of the kind `"ball"`.
    """

    @fused
    def slope(y, z):
        return gradient(lambda v: function(y, v), z)[1]

    @fused
    def ascent(y, z):
        return gradient(lambda v: ops.square(slope(y, v)), z)[1]

    def norms(y, z):
        g = ops.convert_to_numpy(slope(y, ops.convert_to_tensor(z)))
        # The private step zeroes a row that is not finite; a loss here must not need that.
        assert np.isfinite(g).all()
        return np.linalg.norm(g.reshape(len(z), -1).astype("float64"), axis=1)

    generator = np.random.default_rng(0)
    z = candidate_logits(shape, generator)
    targets = candidate_targets(kind, len(z), shape, generator)
    y = np.concatenate(targets)
    y = y if kind == "labels" else (y * scale).astype("float32")
    z = np.concatenate([z] * len(targets))
    at_start = norms(ops.convert_to_tensor(y), z)
    some = np.concatenate([np.argsort(at_start)[-60:], generator.choice(len(z), 60, replace=False)])
    y, z = ops.convert_to_tensor(y[some]), z[some]
    size = 0.3 * (1.0 + np.abs(z).max(axis=-1, keepdims=True))
    found = at_start.max()
    for step in range(steps):
        uphill = np.nan_to_num(ops.convert_to_numpy(ascent(y, ops.convert_to_tensor(z))))
        length = np.linalg.norm(uphill, axis=-1, keepdims=True)
        z = (z + 0.8**step * size * uphill / np.maximum(length, 1e-20)).astype("float32")
        if step % 3 == 0 or step == steps - 1:
            found = max(found, norms(y, z).max())
    return found


def kind_of(loss):
    return losses.properties._targets(loss)


def attacked(loss, shape):
    return attack(
        lambda y, z: losses.per_example(loss, y, z),
        kind_of(loss),
        shape,
        getattr(loss, "max_target_norm", 1.0),
    )


CASES = [(loss, shape) for loss in LABELS + SIMPLEX + UNIT + OTHERS for shape in ((5,), (2, 3))] + [
    (loss, shape) for loss in PRIORS for shape in ((5,), (2, 5))
]
CASES += [(loss, (1,)) for loss in UNIT] + [(loss, (2,)) for loss in LABELS[3:]]


@pytest.mark.parametrize(
    "case", one_in(3, CASES), ids=[f"{i}-{named(c[0])}-{c[1]}" for i, c in enumerate(CASES)]
)
def test_gradients_stay_within_their_bound_and_attain_it(case):
    loss, shape = case
    found, bound = attacked(loss, shape), losses.gradient_bound(loss, shape)
    assert 0.85 * bound <= found <= bound * (1 + 1e-5)


class KRWithBatchPriors(losses.MulticlassKR):
    """Mutant: the priors are the class counts of the batch."""

    def call(self, y_true, y_pred):
        hot = ops.one_hot(y_true, y_pred.shape[-1])
        priors = ops.clip(ops.mean(hot, axis=0), 1e-3, 1.0 - 1e-3)
        return ops.mean(y_pred * ((1 - hot) / (1 - priors) - hot / priors), axis=-1)


class KRBoundOfTheOwnClass(losses.MulticlassKR):
    """Mutant: the slopes of the other classes are forgotten."""

    def bound(self, classes):
        return float(np.max(self._slopes(classes)[0]))


class HKRBoundOfTheHinge(losses.MulticlassHKR):
    """Mutant: the bound of the hinge alone."""

    def bound(self, classes):
        return self.alpha * self.hinge.bound(classes)


class CosineBoundSquared(losses.CosineSimilarity):
    """Mutant: 1/K² for 1/K."""

    def bound(self, classes):
        return self.max_target_norm / self.min_norm**2


class CosineOfItself(losses.CosineSimilarity):
    """Mutant: K does not reach the norm."""

    def call(self, y_true, y_pred):
        norm = ops.sqrt(ops.sum(ops.square(y_pred), axis=-1) + 1e-12)
        return -ops.sum(y_true * y_pred, axis=-1) / norm


class FocalBoundWithPStopped(losses.Focal):
    """Mutant: the factor (1 − p)^γ is taken for a constant: √2·max (1 − p)^(γ+1)."""

    def bound(self, classes):
        return math.sqrt(2.0)


class FocalBoundOfFactors(losses.Focal):
    """Mutant: the two terms are bounded by their maxima at p = 1/2."""

    def bound(self, classes):
        p = 0.5
        slope = (1 - p) ** (self.gamma + 1) + self.gamma * p * (1 - p) ** self.gamma * math.log(2)
        return math.sqrt(2.0) * slope


class FocalByDifferences(losses.Focal):
    """Mutant: ln(1 − p) as a difference, whose rounding is multiplied by ln p."""

    def call(self, y_true, y_pred):
        hot = ops.one_hot(y_true, y_pred.shape[-1])
        z = self.temperature * y_pred
        z = z - ops.stop_gradient(ops.max(z, axis=-1, keepdims=True))
        whole = ops.logsumexp(z, axis=-1)
        others = ops.logsumexp(ops.where(hot > 0, -1e30, z), axis=-1)
        loss = ops.exp(self.gamma * (others - whole)) * (whole - ops.sum(hot * z, axis=-1))
        return loss / self.temperature


class EMMAOutwards(losses.EMMA):
    """Mutant: raised where they are ahead, with the gradient let through."""

    def call(self, y_true, y_pred):
        hot = ops.one_hot(y_true, y_pred.shape[-1])
        own = ops.sum(hot * y_pred, axis=-1, keepdims=True)
        raised = y_pred + ops.clip(y_pred - own, 0.0, self.radius * self.lipschitz)
        return ops.sparse_categorical_crossentropy(y_true, raised, from_logits=True)


class GloRoWithMovingMargin(losses.GloRo):
    """Mutant: a margin that grows with the logits."""

    def call(self, y_true, y_pred):
        second = ops.top_k(y_pred, 2)[0][..., 1:]
        margin = self.radius * ops.sqrt(1e-9 + ops.sum(ops.square(y_pred), -1, keepdims=True))
        raised = ops.concatenate([y_pred, second + margin], axis=-1)
        return ops.sparse_categorical_crossentropy(y_true, raised, from_logits=True)


class UntemperedHalf(losses.SparseCategoricalCrossentropy):
    """Mutant: CE(τz) without the division by τ."""

    def call(self, y_true, y_pred):
        return self.temperature * super().call(y_true, y_pred)


class BinaryHKRBoundOfTheLarger(losses.BinaryHKR):
    """Mutant: the larger of the two slopes, not their sum."""

    def bound(self, classes):
        return max(losses.BinaryKR.bound(self, classes), self.alpha / math.sqrt(classes))


class BinaryKRBoundOfThePrior(losses.BinaryKR):
    """Mutant: 1/π, whichever class is the rarer one."""

    def bound(self, classes):
        return 1.0 / self.prior / math.sqrt(classes)


class HingeBoundOverOthers(losses.MulticlassHinge):
    """Mutant: the bound of the divisor C, at the divisor C − 1."""

    def bound(self, classes):
        return math.sqrt((classes - 1) / classes)


MUTANTS = [
    KRWithBatchPriors(),
    KRBoundOfTheOwnClass(),
    HKRBoundOfTheHinge(alpha=2.0),
    CosineBoundSquared(min_norm=2.0),
    CosineOfItself(min_norm=2.0),
    FocalBoundWithPStopped(),
    FocalBoundOfFactors(),
    FocalByDifferences(gamma=0.3, temperature=5.0),
    EMMAOutwards(radius=1.0),
    GloRoWithMovingMargin(radius=1.0),
    UntemperedHalf(temperature=2.0),
    BinaryHKRBoundOfTheLarger(alpha=2.0),
    BinaryKRBoundOfThePrior(prior=0.8),
    HingeBoundOverOthers(divisor="others"),
]


@pytest.mark.any_backend
@pytest.mark.parametrize("mutant", MUTANTS, ids=named)
def test_the_attack_catches_mutants(mutant):
    # Called as they are, in one batch: `per_example` would pull mixed examples apart.
    assert attack(mutant.call, mutant.targets, (5,)) > mutant.bound(5) * (1 + 1e-5)


# --- bounds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "gamma,peak", [(0, 1.41422), (1, 1.47833), (2, 1.59663), (3, 1.69926), (5, 1.85914)]
)
def test_focal_bounds_are_the_known_ones(gamma, peak):
    assert losses.Focal(gamma).bound(10) == pytest.approx(peak, abs=1e-5)


@pytest.mark.parametrize("gamma", [1e-9, 0.01, 0.5, 2.0, 37.0, 1e4, 1e8, 1e30])
def test_focal_bounds_hold_on_a_fine_grid(gamma):
    p = np.concatenate([np.logspace(-40, -3, 100_001), np.linspace(1e-3, 1 - 1e-9, 100_001)])
    power = gamma * np.log1p(-p)
    slope = math.sqrt(2.0) * np.exp(power) * ((1 - p) - gamma * p * np.log(p))
    bound = losses.Focal(gamma).bound(3)
    assert slope.max() <= bound <= slope.max() * (1 + 1e-4) or bound == pytest.approx(
        math.sqrt(2.0), rel=1e-6
    )


def test_kr_is_the_gap_between_classes():
    generator = np.random.default_rng(0)
    y, z = generator.integers(0, 3, 600), generator.normal(size=(600, 3)).astype("float32")
    counts = np.bincount(y) / len(y)
    loss = losses.MulticlassKR(priors=counts)
    gaps = [z[y == c, c].mean() - z[y != c, c].mean() for c in range(3)]
    value = ops.mean(losses.per_example(loss, ops.convert_to_tensor(y), ops.convert_to_tensor(z)))
    assert float(value) == pytest.approx(-np.mean(gaps), abs=1e-5)


def test_equal_priors_have_the_stated_bound():
    for classes in (2, 3, 10, 100):
        loss = losses.MulticlassKR()
        assert loss.bound(classes) == pytest.approx(math.sqrt(classes / (classes - 1)))
        assert losses.MulticlassHKR(alpha=2.0).bound(classes) == pytest.approx(
            loss.bound(classes) + 2 * losses.MulticlassHinge().bound(classes)
        )


def test_values_of_the_certified_losses():
    z = ops.convert_to_tensor([[2.0, 1.0, -3.0]])
    y = ops.convert_to_tensor([0])
    emma = losses.EMMA(radius=0.5, lipschitz=4.0)  # r·K = 2: class 1 up to 2, class 2 to −1
    expected = -2.0 + np.log(np.exp([2.0, 2.0, -1.0]).sum())
    assert float(losses.per_example(emma, y, z)[0]) == pytest.approx(expected, rel=1e-5)
    gloro = losses.GloRo(radius=0.5, lipschitz=4.0)  # a fourth class at 1 + 2
    expected = -2.0 + np.log(np.exp([2.0, 1.0, -3.0, 3.0]).sum())
    assert float(losses.per_example(gloro, y, z)[0]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 3.0])
def test_values_of_the_focal_loss(gamma):
    z = np.random.default_rng(0).normal(size=(20, 4)).astype("float32") * 3
    y = np.arange(20) % 4
    p = np.exp(2 * z)[np.arange(20), y] / np.exp(2 * z).sum(1)
    values = losses.per_example(losses.Focal(gamma, 2.0), y, ops.convert_to_tensor(z))
    np.testing.assert_allclose(
        ops.convert_to_numpy(values), -((1 - p) ** gamma) * np.log(p) / 2, rtol=1e-4, atol=1e-6
    )
    moved = losses.LogitAnnealing(gamma, offset=0.7, temperature=2.0)
    shifted = z + 0.7 * np.eye(4, dtype="float32")[y]
    np.testing.assert_allclose(
        ops.convert_to_numpy(losses.per_example(moved, y, ops.convert_to_tensor(shifted))),
        ops.convert_to_numpy(values),
        rtol=1e-4,
        atol=1e-6,
    )


@pytest.mark.parametrize(
    "loss",
    [
        K.MeanSquaredError(),
        K.SparseCategoricalCrossentropy(),
        K.CategoricalCrossentropy(from_logits=True, axis=1),
        K.BinaryCrossentropy(),
        K.BinaryCrossentropy(from_logits=True, axis=1),
        K.Dice(),
        K.CosineSimilarity(),
        lambda y, z: z,
    ],
)
def test_unknown_and_unbounded_losses_are_infinite(loss):
    assert losses.gradient_bound(loss, (3,)) == float("inf")


@pytest.mark.parametrize("loss", OWN, ids=named)
def test_a_subclass_is_not_trusted(loss):
    class Steeper(type(loss)):
        def call(self, y_true, y_pred):
            return 100.0 * super().call(y_true, y_pred)

    assert losses.gradient_bound(Steeper.from_config(loss.get_config()), (5,)) == float("inf")


def test_a_subclass_that_names_its_bound_is_asked():
    class Steeper(losses.GloRo):
        def call(self, y_true, y_pred):
            return 3.0 * super().call(y_true, y_pred)

        def bound(self, classes):
            return 3.0 * super().bound(classes)

    assert losses.gradient_bound(Steeper(), (5,)) == pytest.approx(3 * math.sqrt(2), rel=1e-5)


# --- one by one -----------------------------------------------------------------------------------


def test_per_example_is_a_mean_over_positions_whatever_the_reduction():
    generator = np.random.default_rng(0)
    z = ops.convert_to_tensor(generator.normal(size=(3, 4, 5)).astype("float32"))
    y = np.zeros((3, 4), int)
    plain = losses.per_example(K.SparseCategoricalCrossentropy(from_logits=True), y, z)
    summed = K.SparseCategoricalCrossentropy(from_logits=True, reduction="sum")
    np.testing.assert_allclose(
        ops.convert_to_numpy(losses.per_example(summed, y, z)), ops.convert_to_numpy(plain)
    )
    assert plain.shape == (3,)


@pytest.mark.parametrize("shape", [(5,), (3, 5)])
@pytest.mark.parametrize(
    "loss", one_in(3, LABELS + PRIORS + SIMPLEX + UNIT + OTHERS + [K.SquaredHinge()]), ids=named
)
def test_an_example_alone_is_the_example_in_a_batch(loss, shape):
    generator = np.random.default_rng(1)
    z = generator.normal(size=(6, *shape)).astype("float32")

    value = fused(lambda y, z: losses.per_example(loss, y, z))
    for y in candidate_targets(kind_of(loss), 6, shape, generator)[-2:]:
        y = y if kind_of(loss) == "labels" else y.astype("float32")
        whole = value(ops.convert_to_tensor(y), ops.convert_to_tensor(z))
        alone = [
            value(ops.convert_to_tensor(y[i : i + 1]), ops.convert_to_tensor(z[i : i + 1]))
            for i in range(6)
        ]
        np.testing.assert_allclose(
            ops.convert_to_numpy(whole), np.ravel(alone), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("loss", [K.Hinge(), K.SquaredHinge()], ids=named)
def test_one_label_does_not_change_what_the_others_mean(loss):
    # Keras takes labels for 0/1 where the whole batch is 0/1.
    z = ops.zeros((3, 1)) + 0.5
    binary = losses.per_example(loss, np.array([[0], [1], [1]]), z)
    signs = losses.per_example(loss, np.array([[-1], [1], [1]]), z)
    mixed = losses.per_example(loss, np.array([[0], [1], [-1]]), z)
    binary, signs, mixed = map(ops.convert_to_numpy, (binary, signs, mixed))
    np.testing.assert_allclose(binary, signs)
    np.testing.assert_allclose(mixed[:2], binary[:2])


@pytest.mark.parametrize("loss", [*UNIT, *OTHERS], ids=named)
def test_targets_without_the_last_axis_are_not_broadcast(loss):
    y = np.array([0.0, 1.0, 1.0], "float32")
    z = ops.convert_to_tensor(np.array([[0.3], [-2.0], [5.0]], "float32"))
    np.testing.assert_allclose(
        ops.convert_to_numpy(losses.per_example(loss, y, z)),
        ops.convert_to_numpy(losses.per_example(loss, y[:, None], z)),
    )
    # Nor where Keras evaluates.
    np.testing.assert_allclose(float(loss(y, z)), float(loss(y[:, None], z)), rtol=1e-6)


@pytest.mark.parametrize("loss", OWN, ids=named)
def test_losses_survive_a_round_trip(loss):
    again = K.deserialize(K.serialize(loss))
    assert type(again) is type(loss)
    assert again.get_config() == loss.get_config()
    assert again.bound(5) == loss.bound(5)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda v: losses.BinaryCrossentropy(v), "temperature"),
        (lambda v: losses.GloRo(temperature=v), "temperature"),
        (lambda v: losses.BinaryKR(prior=v), "prior"),
        (lambda v: losses.CosineSimilarity(min_norm=v), "min_norm"),
        (lambda v: losses.CosineSimilarity(max_target_norm=v), "max_target_norm"),
    ],
)
@pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan"), "warm", True, None])
def test_numbers_that_must_be_positive(make, message, value):
    with pytest.raises(ValueError if type(value) in (int, float) else TypeError, match=message):
        make(value)


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda v: losses.Focal(gamma=v), "gamma"),
        (lambda v: losses.LogitAnnealing(offset=v), "offset"),
        (lambda v: losses.MulticlassHKR(alpha=v), "alpha"),
        (lambda v: losses.BinaryHKR(alpha=v), "alpha"),
        (lambda v: losses.BinaryHKR(margin=v), "margin"),
        (lambda v: losses.MulticlassHinge(margin=v), "margin"),
        (lambda v: losses.EMMA(radius=v), "radius"),
        (lambda v: losses.GloRo(lipschitz=v), "lipschitz"),
    ],
)
@pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan"), "warm", None])
def test_numbers_that_may_be_zero(make, message, value):
    make(0)
    with pytest.raises(ValueError if type(value) in (int, float) else TypeError, match=message):
        make(value)


@pytest.mark.parametrize(
    "priors", [[0.5, 0.6], [1.0, 0.0], [1.5, -0.5], [math.nan, 1.0], [[0.5], [0.5]], 0.5, "equal"]
)
def test_priors_that_are_refused(priors):
    with pytest.raises(ValueError, match="priors"):
        losses.MulticlassKR(priors=priors)


def test_losses_for_another_number_of_outputs():
    with pytest.raises(ValueError, match="3 outputs; got 2"):
        losses.gradient_bound(losses.MulticlassKR(priors=[0.5, 0.5]), (3,))
    with pytest.raises(ValueError, match="two outputs"):
        losses.gradient_bound(losses.MulticlassKR(), (1,))
    with pytest.raises(ValueError, match="two outputs"):
        losses.gradient_bound(losses.GloRo(), (1,))


def test_bad_targets():
    simplex = losses.CategoricalCrossentropy()
    with pytest.raises(ValueError, match="sum"):
        losses.check_targets(simplex, np.ones((4, 3)), (3,))
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        losses.check_targets(simplex, np.full((4, 3), -1.0), (3,))
    with pytest.raises(ValueError, match="shape"):
        losses.check_targets(simplex, np.ones((4, 2)), (3,))
    with pytest.raises(ValueError, match="NaN"):
        losses.check_targets(K.MeanSquaredError(), np.array([np.nan]), (1,))
    with pytest.raises(ValueError, match=r"\[-1, 1\]"):
        losses.check_targets(K.Hinge(), np.array([2.0]), (1,))
    with pytest.raises(ValueError, match="max_target_norm"):
        losses.check_targets(losses.CosineSimilarity(), np.ones((4, 3)), (3,))
    for loss in LABELS:
        with pytest.raises(ValueError, match="integer labels"):
            losses.check_targets(loss, np.array([0, 3]), (3,))
    losses.check_targets(losses.BinaryCrossentropy(), np.array([0, 1]), (1,))
    losses.check_targets(losses.CosineSimilarity(), np.eye(3), (3,))


@pytest.mark.parametrize("loss", [K.MeanAbsoluteError(), K.Huber(), K.Hinge(), *UNIT], ids=named)
def test_targets_that_would_be_broadcast_over_examples(loss):
    # Three labels align_targets three outputs each: every example would see them all.
    with pytest.raises(ValueError, match="shape"):
        losses.check_targets(loss, np.zeros(3), (3,))


def test_names():
    for name in losses.properties._BY_NAME:
        loss = losses.get(name)
        bounded = math.isfinite(losses.gradient_bound(loss, (4,)))
        assert bounded != (name in ("mse", "mean_squared_error")), name
    with pytest.raises(ValueError, match="multiclass_kr.*got 'entropy'"):
        losses.get("entropy")
    with pytest.raises(TypeError, match="EMMA"):
        losses.get(losses.EMMA)  # a class, not a loss


# --- the clip -------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("entry", [1e36, 9e37, 3e38, -3e38])
def test_rows_are_clipped_up_to_the_largest_number_in_a_program(entry):
    """XLA divides by 1e38 by a product with its inverse, which is 0."""
    rows = ops.convert_to_tensor(np.array([[entry, 0.0, 0.0], [entry, entry, entry]], "float32"))
    clipped, within = fused(lambda rows: clip_rows(rows, 0.5, ops.ones((2,))))(rows)
    assert np.linalg.norm(ops.convert_to_numpy(clipped), axis=1).max() <= 0.5 * (1 + 1e-6)
    assert not ops.convert_to_numpy(within).any()


def test_neither_mask_nor_weights_lengthen_a_row():
    rows = ops.convert_to_tensor(np.array([[3.0, 4.0], [0.3, 0.4], [3.0, 4.0]], "float32"))
    clipped, within = clip_rows(rows, 1.0, np.array([50.0, 50.0, -50.0], "float32"))
    assert np.linalg.norm(ops.convert_to_numpy(clipped), axis=1).max() <= 1 + 1e-6
    np.testing.assert_array_equal(ops.convert_to_numpy(within), [0, 1, 0])
    factors = clamp_weights(np.array([99.0, 0.5, math.inf], "float32"), 3.0)
    weighted = scale_rows(clipped, factors)
    np.testing.assert_allclose(
        np.linalg.norm(ops.convert_to_numpy(weighted), axis=1), [3.0, 0.25, 0.0], rtol=1e-6
    )
