"""Groups of examples: what of them enters a step, and what is refused."""

import keras
import numpy as np
import pytest
from keras import layers as K

import accountants
import lipdp
from accountants import FullBatch, PoissonSampling, TrainingRun
from lipdp import layers
from lipdp.data.groups import Groups
from tests.lipdp.helpers import private, weights

pytestmark = pytest.mark.any_backend

SIZES = np.array([1, 2, 3, 7, 40, 1000])


def people(seed=0):
    """The id of each example, in a random order."""
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(len(SIZES)), SIZES))


@pytest.mark.parametrize("most", [1, 3, 7, 2000])
def test_of_each_group_at_most_so_many_enter_and_count_one_together(most):
    ids = people()
    groups = Groups(ids, len(ids), most)
    generator = np.random.default_rng(1)
    for drawn in ([], [5], [0, 2, 4], range(len(SIZES))):
        drawn = np.array(drawn, int)
        rows, shares = groups.rows(drawn, generator)
        assert len(set(rows.tolist())) == len(rows) == len(shares)
        assert shares.dtype == np.float32
        for number in range(len(SIZES)):
            own = ids[rows] == number
            expected = min(SIZES[number], most) if number in drawn else 0
            assert own.sum() == expected
            assert shares[own].sum() == pytest.approx(1.0 if expected else 0.0, abs=1e-6)


def test_every_choice_within_a_group_is_as_likely():
    groups = Groups(np.zeros(5, int), 5, most=2)
    generator = np.random.default_rng(0)
    pairs = [tuple(sorted(groups.rows(np.array([0]), generator)[0])) for _ in range(20_000)]
    counts = np.unique(pairs, axis=0, return_counts=True)[1]
    assert len(counts) == 10
    assert np.abs(counts - 2000).max() < 5 * np.sqrt(2000)


@pytest.mark.parametrize(
    "ids",
    [
        np.arange(4),
        np.array(["a", "b", "a", "c"]),
        ["a", "b", "a", "c"],
        np.array(["a", "b", "a", "c"], object),
        np.array([0.0, 1.0, 0.0, 2.0]),
        [2**62, 1, 2**62, 5],
    ],
)
def test_ids_of_every_kind(ids):
    assert len(Groups(ids, 4, 2)) == len(set(np.asarray(ids).tolist()))


@pytest.mark.parametrize(
    "ids, error",
    [
        ([0.0, np.nan, 1.0, 2.0], TypeError),
        ([0.0, np.inf, 1.0, 2.0], TypeError),
        ([0.5, 1.0, 1.0, 2.0], TypeError),
        (np.array(["a", None, "b", "c"], object), TypeError),
        (np.array([True, False, True, True]), TypeError),
        (np.array(["a", np.nan, "b", "c"]), ValueError),  # a text by now
        (["a", "", "b", "c"], ValueError),
        (np.ma.masked_equal([0, 1, 2, 3], 2), ValueError),
        ([0, 1, 2], ValueError),
        (np.zeros((4, 1), int), ValueError),
    ],
)
def test_ids_that_are_none(ids, error):
    with pytest.raises(error, match="`groups` must be one integer or text for each example"):
        Groups(ids, 4, 2)


def network():
    return keras.Sequential(
        [keras.Input((6,)), layers.BallProjection(1.0), layers.SpectralDense(3, name="head")]
    )


def arrays():
    ids = people()
    x = np.random.default_rng(2).normal(size=(len(ids), 6)).astype("float32")
    return x, ids % 3, ids


def grouped(**options):
    options = {"sampling": PoissonSampling(3), "unit": "group", **options}
    return private(network(), compile={"metrics": None}, **options)


def test_groups_are_what_is_drawn_counted_and_accounted():
    x, y, ids = arrays()
    model = grouped(examples_per_group=5)
    seen = 0
    for batch in model.batches(x, y, epochs=10, groups=ids):
        real = batch.mask > 0
        # Each row is told by its inputs, which differ.
        owners = [ids[np.flatnonzero((x == row).all(axis=1))[0]] for row in batch.inputs[real]]
        drawn, counts = np.unique(np.array(owners, int), return_counts=True)  # perhaps nobody
        assert (counts == np.minimum(SIZES[drawn], 5)).all()
        assert batch.shares[real].sum() == pytest.approx(len(drawn), abs=1e-5)
        assert not batch.shares[~real].any()
        seen += len(drawn)
        model.train_on_batch(batch)
    steps = 10 * 2  # of 6 people, 3 a step
    run = TrainingRun(1.0, PoissonSampling(3), 6, steps, "group")
    spent = model.spent(1e-3)
    assert (spent.steps, spent.unit) == (steps, "group")
    assert spent.epsilon == accountants.epsilon(runs=[run], delta=1e-3)
    assert model.step.constants.expected_batch_size == 3
    assert 0.3 * steps * 6 < seen < 0.7 * steps * 6  # mutant: draws of examples find all people


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_the_worst_person_moves_certified_weights_no_further_than_an_example(size):
    others, bound = np.arange(1, 9), None
    ids = np.concatenate([np.zeros(size, int), others])
    x = np.concatenate([np.tile([[1e6, 0, 0, 0, 0, 0]], (size, 1)), np.eye(6)[others % 6]])
    y = np.concatenate([np.zeros(size, int), others % 3])
    moves = []
    for kept in (1.0, 0.0):
        made = network()
        for variable in made.trainable_variables:
            variable.constraint = None
            variable.assign(0.1 * np.ones(variable.shape))
        bound = lipdp.gradient_bounds(made, np.sqrt(2) + 1e-5)
        model = private(
            made,
            sampling=FullBatch(),
            optimizer=keras.optimizers.SGD(1.0),
            noise_multiplier=0.0,
            unit="group",
            compile={"metrics": None},
        )
        for batch in model.batches(x, y, epochs=1, groups=ids):
            batch.mask = np.where(batch.inputs[:, 0] > 1e5, kept * batch.mask, batch.mask)
            model.train_on_batch(batch)
        moves.append(weights(model))
    paths = [v.path for v in made.trainable_variables]
    for path, a, b in zip(paths, *moves, strict=True):
        moved = 9 * np.linalg.norm(a - b)  # nine people
        assert 0.3 * bound[path] < moved <= bound[path]


class Records:
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.y)

    def __getitem__(self, i):
        return self.x[i], self.y[i]


def test_records_have_groups_and_streams_have_none():
    x, y, ids = arrays()
    model = grouped()
    model.fit(Records(x, y), groups=ids, verbose=0)
    assert model.spent(1e-3).unit == "group"
    tf = pytest.importorskip("tensorflow")
    stream = grouped(sampling=lipdp.ShuffledEpochs(3))
    with pytest.raises(ValueError, match="lie all over a stream"):
        stream.fit(tf.data.Dataset.from_tensor_slices((x, y)), groups=ids, verbose=0)


def test_what_does_not_go_together_costs_nothing():
    x, y, ids = arrays()
    single, model = private(network()), grouped()
    for refusing, given, words in (
        (single, {"groups": ids}, "protects single examples"),
        (model, {}, "`groups` must be given"),
        (model, {"groups": ids, "validation_split": 0.2}, "of other groups"),
        (model, {"groups": ids[1:]}, "one integer or text for each example"),
    ):
        with pytest.raises(ValueError, match=words):
            refusing.fit(x, y, verbose=0, **given)
        assert refusing.spent(1e-3).steps == 0
    with pytest.raises(ValueError, match='goes with unit="group"'):
        private(network(), examples_per_group=3)
    with pytest.raises(ValueError, match="examples_per_group"):
        grouped(examples_per_group=0)
    with pytest.raises(ValueError, match="`unit` must be one of"):
        private(network(), unit="person")
    model.unit = "example"
    with pytest.raises(RuntimeError, match="`unit` of PrivateModel"):
        model.fit(x, y, verbose=0)


def test_units_do_not_mix(tmp_path):
    x, y, ids = arrays()
    ledger = tmp_path / "people.ledger"
    model = grouped(ledger=ledger)
    model.fit(x, y, groups=ids, verbose=0)
    assert [run.unit for run in accountants.Ledger(ledger).runs] == ["group"]
    other = private(network(), ledger=ledger)
    with pytest.raises(ValueError, match="protect different units"):
        other.fit(x, y, verbose=0)
    same = private(model.network)
    assert same.spent(1e-3).unit == "group"
    with pytest.raises(ValueError, match="protect different units"):
        same.fit(x, y, verbose=0)  # by a noise multiplier, which no budget limits
    assert same.spent(1e-3) == model.spent(1e-3)
    with pytest.raises(ValueError, match="protect different units"):
        accountants.Ledger(ledger).add("a mean", laplace=2.0)
    with pytest.raises(ValueError, match="protect different units"):
        accountants.Ledger(ledger).open_run(
            noise_multiplier=1.0, sampling=PoissonSampling(3), num_examples=6
        )
    accountants.Ledger(ledger).add("a mean", laplace=2.0, unit="group")


def test_the_statement_names_the_unit():
    x, y, ids = arrays()
    model = grouped(examples_per_group=2)
    model.fit(x, y, groups=ids, verbose=0)
    statement = model.statement(1e-3)
    assert statement.to_dict()["unit"] == "one group"
    text = " ".join(str(statement).split())
    assert "One group: all rows of the data that share an id" in text
    assert "of 6 groups" in text and "at most 2 examples enters a step" in text
    assert "example more" not in text and "People with several examples" not in text


def test_views_and_units_share_one_mean():
    x, y, ids = arrays()
    model = grouped(
        clip=lipdp.PerLayerClip(), augmentation=lipdp.Augmentation(K.GaussianNoise(0.1), views=2)
    )
    model.fit(x, y, groups=ids, verbose=0)
    assert all(np.isfinite(w).all() for w in weights(model))
