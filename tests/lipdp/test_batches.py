"""What is drawn is what the scheme's accounting assumes."""

import numpy as np
import pytest

import accountants
import lipdp
from lipdp.batches import DrawnBatches
from lipdp.noise import RandomSource
from lipdp.sources import Arrays
from tests.lipdp.helpers import data, private

pytestmark = pytest.mark.any_backend

N = 40
SCHEMES = [
    lipdp.PoissonSampling(8),
    lipdp.TruncatedPoisson(8, 10),
    lipdp.FixedSize(8),
    lipdp.ShuffledEpochs(8),
    lipdp.ShuffledEpochs(9),
    lipdp.RandomAllocation(5),
    lipdp.FullBatch(),
]


def drawn(sampling, epochs=1, seed=0, bucket=1):
    """Rows of each step of each epoch; the examples are their own numbers."""
    x = np.arange(1, N + 1)[:, None]
    steps = sampling.steps_per_epoch(N)
    batches = DrawnBatches(Arrays(x, x[:, 0]), sampling, RandomSource(seed), (0, 0), steps, bucket)
    found = []
    for _ in range(epochs):
        batches.on_epoch_begin()
        for index in range(steps):
            batch = batches.draw(index)
            real = batch.mask == 1
            assert (batch.inputs[~real] == 0).all() and len(batch.mask) % bucket == 0
            np.testing.assert_array_equal(batch.inputs[real, 0], batch.targets[real])
            found.append(batch.targets[real] - 1)
    return found


@pytest.mark.parametrize("sampling", SCHEMES, ids=repr)
def test_each_example_once_a_batch(sampling):
    for rows in drawn(sampling, epochs=20):
        assert len(set(rows)) == len(rows)


@pytest.mark.parametrize("sampling", SCHEMES, ids=repr)
def test_participations_are_never_more_than_accounted(sampling):
    steps = drawn(sampling, epochs=7)
    for used in (1, len(steps) // 2, len(steps)):
        most = np.bincount(np.concatenate(steps[:used]), minlength=N).max()
        assert most <= sampling.participations(N, used)


@pytest.mark.parametrize(
    "sampling", [s for s in SCHEMES if s.sampling_probability(N) < 1], ids=repr
)
def test_every_example_is_drawn_with_the_probability_that_is_accounted(sampling):
    epochs = 400
    steps = drawn(sampling, epochs)
    counts = np.bincount(np.concatenate(steps), minlength=N)
    expected = len(steps) * sampling.sampling_probability(N)
    if isinstance(sampling, lipdp.TruncatedPoisson):
        assert counts.mean() < expected  # what is cut is not drawn
    else:
        # Seven standard deviations of a binomial count.
        assert np.abs(counts - expected).max() < 7 * np.sqrt(expected)
    if isinstance(sampling, lipdp.PoissonSampling):
        pairs = sum(bool({0, 1} <= set(rows)) for rows in steps)
        probability = sampling.sampling_probability(N) ** 2
        assert abs(pairs - len(steps) * probability) < 7 * np.sqrt(len(steps) * probability)


def test_sizes():
    sizes = {repr(s): [len(rows) for rows in drawn(s, epochs=40)] for s in SCHEMES}
    assert set(sizes["FixedSize(batch_size=8)"]) == {8}
    assert set(sizes["FullBatch()"]) == {N}
    assert max(sizes["TruncatedPoisson(batch_size=8, physical_batch_size=10)"]) == 10
    assert max(sizes["PoissonSampling(batch_size=8)"]) > 10
    assert set(sizes["ShuffledEpochs(batch_size=9)"]) == {9, 4}
    assert sum(sizes["RandomAllocation(steps=5)"]) == 40 * N
    assert len(set(sizes["RandomAllocation(steps=5)"])) > 5


@pytest.mark.parametrize("sampling", [lipdp.ShuffledEpochs(8), lipdp.RandomAllocation(5)], ids=repr)
def test_an_epoch_takes_each_example_once(sampling):
    steps = drawn(sampling, epochs=3)
    for epoch in range(3):
        assert sorted(np.concatenate(steps[5 * epoch : 5 * epoch + 5])) == list(range(N))
    assert any((set(a) != set(b)) for a, b in zip(steps[:5], steps[5:10], strict=True))


def test_a_truncated_draw_is_uniform_among_all():
    """Cutting by position would favour early examples."""
    counts = np.bincount(np.concatenate(drawn(lipdp.TruncatedPoisson(8, 8), 400)), minlength=N)
    assert np.abs(counts - counts.mean()).max() < 6 * np.sqrt(counts.mean())


@pytest.mark.parametrize("sampling", SCHEMES, ids=repr)
def test_draws_are_padded_to_buckets(sampling):
    drawn(sampling, bucket=16)


@pytest.mark.parametrize("sampling", SCHEMES, ids=repr)
def test_what_is_sampled_is_what_is_accounted(sampling):
    x, y = data(N)
    model = private(sampling=sampling, noise_multiplier=2.0)
    history = model.fit(x, y, epochs=2, verbose=0)
    steps = 2 * sampling.steps_per_epoch(N)
    spent = model.spent(delta=1e-3)
    claimed = accountants.epsilon(
        noise_multiplier=2.0, sampling=sampling, num_examples=N, steps=steps, delta=1e-3
    )
    assert (spent.epsilon, spent.relation, spent.steps) == (claimed, claimed.relation, steps)
    assert len(history.history["epsilon"]) == 2


@pytest.mark.parametrize("sampling", [lipdp.ShuffledEpochs(8), lipdp.RandomAllocation(5)], ids=repr)
def test_steps_of_an_epoch_that_the_scheme_fixes(sampling):
    x, y = data(N)
    with pytest.raises(ValueError, match="`steps_per_epoch` is fixed by"):
        private(sampling=sampling).fit(x, y, steps_per_epoch=3)


def test_an_unknown_scheme_is_refused():
    batches = DrawnBatches(
        Arrays(np.ones((4, 1)), np.ones(4)), object(), RandomSource(0), (0, 0), 1
    )
    with pytest.raises(TypeError, match="No batches can be drawn"):
        batches.draw(0)
