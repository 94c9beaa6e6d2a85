"""What is drawn is what the scheme's accounting assumes."""

import threading
import time

import keras
import numpy as np
import pytest

import accountants
import lipdp
from lipdp.data.batches import DrawnBatches
from lipdp.data.sources import Arrays
from lipdp.randomness import RandomSource
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


# --- drawn ahead ----------------------------------------------------------------------------------


class Recorder(Arrays):
    """Examples that tell in which order and thread they were gathered, and may make one wait."""

    def __init__(self, x, y):
        super().__init__(x, y)
        self.taken, self.threads, self.gate = [], set(), threading.Event()
        self.gate.set()

    def take(self, rows, size):
        assert self.gate.wait(60)
        self.taken.append(tuple(rows))
        self.threads.add(threading.current_thread())
        return super().take(rows, size)


def recorded(sampling, seed=0):
    x = np.arange(1, N + 1)[:, None]
    source, steps = Recorder(x, x[:, 0]), sampling.steps_per_epoch(N)
    batches = DrawnBatches(source, sampling, RandomSource(seed), (0, 0), steps)
    batches.on_epoch_begin()
    return source, batches


def same_batch(a, b):
    return all(
        np.array_equal(getattr(a, name), getattr(b, name))
        for name in ("inputs", "targets", "mask", "key")
    )


@pytest.mark.parametrize("sampling", SCHEMES, ids=repr)
def test_each_step_gets_its_own_batch_drawn_once(sampling):
    source, batches = recorded(sampling)
    _, alone = recorded(sampling)
    for epoch in range(2):
        if epoch:
            batches.on_epoch_begin()
            alone.on_epoch_begin()
        for index in range(len(batches)):
            assert same_batch(batches.request(index), alone.draw(index))
    assert len(source.taken) == 2 * len(batches)
    batches.close()


def test_the_next_batch_is_drawn_while_a_step_runs():
    source, batches = recorded(lipdp.PoissonSampling(8))
    batches.request(0)
    for _ in range(12_000):
        if len(source.taken) == 2:
            break
        time.sleep(0.01)
    assert len(source.taken) == 2 and len(source.threads) == 2  # not by who asked for the first
    # A request waits for what is being drawn for it, and does not draw it again.
    source.gate.clear()
    batches.request(1)
    threading.Timer(0.05, source.gate.set).start()
    batches.request(2)
    batches.close()
    assert len(source.taken) in (3, 4)  # the fourth, if it had begun


def test_what_was_drawn_ahead_for_another_step_is_dropped():
    _, batches = recorded(lipdp.PoissonSampling(8), seed=None)
    seen = []
    for index in (0, 1, 0, 1, 2):  # left after two, begun again
        seen.append(batches.request(index))
    batches.on_epoch_begin()
    for index in (0, 3, 4):
        seen.append(batches.request(index))
    assert len({tuple(batch.key) for batch in seen}) == len(seen)
    assert not any(same_batch(a, b) for i, a in enumerate(seen) for b in seen[:i])
    batches.close()
    batches.request(1)  # of a loop that outlives its run: it is drawn, but nothing ahead of it
    assert batches._ahead == (None, None)


def test_what_fails_while_it_is_drawn_ahead_fails_where_it_is_used():
    source, batches = recorded(lipdp.PoissonSampling(8))
    take = source.take
    source.take = lambda rows, size: take(rows, size) if len(source.taken) < 2 else 1 / 0
    batches.request(0)
    batches.request(1)
    with pytest.raises(ZeroDivisionError):
        batches.request(2)
    batches.close()


class Keys:
    """Keeps the keys of the steps of a model that really ran."""

    def __init__(self, model):
        self.used = []
        add = model.noise.add

        def adds(backend, features, sums, stds):
            self.used.append(tuple(np.asarray(features["key"]).tolist()))
            return add(backend, features, sums, stds)

        model.noise.add = adds


class At(keras.callbacks.Callback):
    def __init__(self, batch, action):
        super().__init__()
        self.batch, self.action = batch, action

    def on_train_batch_end(self, batch, logs=None):
        if batch == self.batch:
            self.action(self.model)


def fail(model):
    raise KeyboardInterrupt


def test_an_interrupted_fit_trains_on_nothing_it_drew_ahead():
    x, y = data(N)
    whole, broken = (private(sampling=lipdp.PoissonSampling(4), seed=3) for _ in range(2))
    expected, found = Keys(whole), Keys(broken)
    whole.fit(x, y, epochs=1, verbose=0)
    with pytest.raises(KeyboardInterrupt):
        broken.fit(x, y, epochs=1, verbose=0, callbacks=[At(4, fail)])
    assert found.used == expected.used[:5] and broken.spent(1e-5).steps == 5
    broken.fit(x, y, epochs=1, verbose=0)
    broken.fit(x, y, epochs=1, verbose=0)
    # Also of the keys that were drawn and not used, none comes again.
    assert len(set(found.used)) == 25 and not set(found.used[5:]) & set(expected.used)


def workers():
    return {t for t in threading.enumerate() if t.name.startswith("ThreadPoolExecutor")}


def test_the_budget_ends_a_fit_that_has_drawn_ahead():
    x, y = data(N)
    budget = lipdp.Budget(2.0, 1e-3)
    model = private(sampling=lipdp.PoissonSampling(4), budget=budget, noise_multiplier=1.5)
    keys, before = Keys(model), workers()
    with pytest.warns(UserWarning, match="The budget allows"):
        model.fit(x, y, epochs=300, verbose=0)
    assert len(keys.used) == len(set(keys.used)) == model.spent().steps
    assert workers() <= before


# --- epochs that are one release ------------------------------------------------------------------

WHOLE = [lipdp.ShuffledEpochs(10), lipdp.RandomAllocation(4)]


@pytest.mark.parametrize("sampling", WHOLE, ids=repr)
def test_batches_cannot_be_left_out(sampling):
    """One step of each of three epochs would be three releases of an example, and paid as one."""
    model = private(sampling=sampling)
    with pytest.raises(RuntimeError, match="every batch being trained on"):
        for index, batch in enumerate(model.batches(*data(N), epochs=3)):
            if index != 2:
                model.train_on_batch(batch)
    assert model.spent(1e-5).steps == 2


@pytest.mark.filterwarnings("ignore:Your input ran out")
@pytest.mark.parametrize("sampling", [*WHOLE, lipdp.PoissonSampling(10)], ids=repr)
def test_no_epoch_begins_after_one_that_was_broken_off(sampling):
    """Keras takes a callback's StopIteration for the end of the data, and goes on."""
    model = private(sampling=sampling)
    stop = At(1, lambda model: next(iter(())))
    if isinstance(sampling, lipdp.PoissonSampling):
        model.fit(*data(N), epochs=3, verbose=0, callbacks=[stop])
        assert model.spent(1e-5).steps == 6
    else:
        with pytest.raises(RuntimeError, match="every batch being trained on"):
            model.fit(*data(N), epochs=3, verbose=0, callbacks=[stop])
        assert model.spent(1e-5).steps == 2
