"""noise="secure": the exact sampler, the grid, what one example can do on it, and the step."""

import functools
import math
from decimal import Context, Decimal
from fractions import Fraction

import keras
import numpy as np
import pytest
from keras import ops
from scipy import stats

import lipdp
from lipdp import layers
from lipdp import noise as noises
from lipdp.noise import discrete, secure
from lipdp.noise.discrete import discrete_gaussian
from lipdp.training import steps
from lipdp.training.clipping import split_noise
from tests.lipdp.helpers import data, dense_network, one_in, private, weights

SCALE = noises.SecureNoise.scale
PRECISE = Context(60)


def repeatable(seed=0):
    """A source of words that is the same in every run."""
    generator = np.random.Generator(np.random.Philox(seed))
    return lambda count: generator.integers(0, 2**64, count, dtype=np.uint64)


def exactly(words):
    """A source that gives these words, and fails where more are asked for."""
    words = iter(words)
    return lambda count: np.array([next(words) for _ in range(count)], np.uint64)


def density(z, scale):
    """exp(−z²/2s²), to 55 digits."""
    exponent = PRECISE.divide(Decimal(-z * z), Decimal(2 * scale * scale))
    return Fraction(PRECISE.exp(exponent))


# --- the sampler --------------------------------------------------------------------------------


@pytest.mark.any_backend
@pytest.mark.parametrize("scale", [1, 2, 3, 20, 40, 131])
def test_frequencies_are_those_of_the_discrete_gaussian(scale):
    draws = discrete_gaussian(400_000, scale, repeatable(scale))
    support = np.arange(-20 * scale, 20 * scale + 1)
    weights = np.exp(-0.5 * (support / scale) ** 2)
    expected = len(draws) * weights / weights.sum()
    often = expected > 20
    counts = np.bincount(draws + 20 * scale, minlength=len(support))
    counts, expected = (
        np.append(v[often], v[~often].sum()) for v in (counts.astype(float), expected)
    )
    if expected[-1] < 5:
        counts, expected = (np.append(v[1:-1], v[0] + v[-1]) for v in (counts, expected))
    assert stats.chisquare(counts, expected).pvalue > 1e-3


@pytest.mark.any_backend
def test_large_scales_look_normal_down_to_the_last_bits():
    draws = discrete_gaussian(400_000, SCALE, repeatable())
    assert stats.kstest(draws / SCALE, "norm").pvalue > 1e-3
    assert abs(draws.mean() / SCALE) * math.sqrt(draws.size) < 4
    assert abs(draws.std() / SCALE - 1) * math.sqrt(2 * draws.size) < 4
    for reach in (2.0, 3.0, 4.0):
        expected = draws.size * 2 * stats.norm.sf(reach)
        beyond = (np.abs(draws) > reach * SCALE).sum()
        assert abs(beyond - expected) < 5 * math.sqrt(expected)
    for shift in (0, 8, 12):  # up to below the blocks, of 2^16
        assert stats.chisquare(np.bincount((draws >> shift) & 255)).pvalue > 1e-3
    sums = np.corrcoef(draws[:-1], draws[1:])[0, 1]
    assert abs(sums) * math.sqrt(draws.size) < 4


@pytest.mark.any_backend
@pytest.mark.parametrize("scale", [1, 2, 3, 15, 16, 31, 33, 1000, SCALE, 2**24 - 1, 2**24])
def test_no_proposal_is_rarer_than_what_it_stands_for(scale):
    proposals = discrete._Proposals(scale)
    block = 2**proposals.block_bits
    assert block <= max(1, scale / 16) and proposals.blocks * block >= 8 * scale
    assert proposals.numbers.sum() == 2**16 - 1
    assert np.bincount(proposals.block_of).tolist() == [*proposals.numbers, 1]
    for j, number in enumerate(proposals.numbers):
        assert proposals.height * density(j * block, scale) <= int(number)
    # Few are rejected.
    kept = proposals.height * math.sqrt(2 * math.pi) * scale / (2**17 * block)
    assert kept > (0.9 if scale > 15 else 0.3)


@pytest.mark.any_backend
@pytest.mark.parametrize("scale", [2, 40, SCALE])
def test_a_close_call_is_decided_exactly(scale):
    proposals = discrete._Proposals(scale)
    generator = np.random.default_rng(scale)
    asked = 0
    for _ in range(40):
        choice = int(generator.integers(0, 2**16 - 1))
        block = int(proposals.block_of[choice])
        place = int(generator.integers(0, 2**proposals.block_bits))
        sign = int(generator.integers(0, 2))
        magnitude = block * 2**proposals.block_bits + place
        z = -1 - magnitude if sign else magnitude
        number = int(proposals.numbers[block])
        threshold = density(z, scale) * proposals.height / number  # of the uniform number
        units = threshold * 2**proposals.rest
        edge = math.floor(units)
        start = (choice << 48) | (sign << 47) | (place << proposals.rest)

        def accepted(bits, further=(), start=start):
            words = np.array([start | bits], np.uint64)
            return proposals.accepted(words, exactly(further)).tolist()

        # The next 64 bits on either side of the edge; only there are they asked for.
        below = math.floor((units - edge) * 2**64) - 1
        if 0 <= below < 2**64 - 3 and edge < 2**proposals.rest:
            assert accepted(edge, [below]) == [z]
            assert accepted(edge, [below + 2]) == []
            # And where those are the same, too, the bits behind them.
            assert accepted(edge, [below + 1, 0]) == [z]
            assert accepted(edge, [below + 1, 2**64 - 1]) == []
            with pytest.raises((StopIteration, RuntimeError)):
                accepted(edge)
            asked += 1
        slack = 2 + int(2.0 ** (proposals.rest - 38))
        if edge >= slack:
            assert accepted(edge - slack) == [z]
        if edge + slack < 2**proposals.rest:
            assert accepted(edge + slack) == []
    assert asked > 20


@pytest.mark.any_backend
@pytest.mark.parametrize("scale", [1, 33, SCALE])
def test_the_tail_goes_on_with_the_same_density(scale, monkeypatch):
    proposals = discrete._Proposals(scale)
    tail = (2**16 - 1) << 48
    beyond = proposals.blocks << proposals.block_bits
    width = 2 ** math.ceil(math.log2(scale))
    place = 5 % width
    seen = []
    exact = discrete._is_below
    monkeypatch.setattr(
        discrete, "_is_below", lambda *given: seen.append(given[2:4]) or exact(*given)
    )
    for sign, word in ((1, tail), (-1, tail | (1 << 47))):
        for stretch in range(4):
            odd = [2 * 7 + 1] * stretch
            for last, is_kept in ((0, True), (2**64 - 1, False)):
                # As many zeros as its tiny probability takes.
                words = exactly([*odd, 8, place, *([last] * (6 if is_kept else 1))])
                kept = proposals.accepted(np.array([word], np.uint64), words)
                magnitude = beyond + stretch * width + place
                z = magnitude if sign > 0 else -1 - magnitude
                assert kept.tolist() == ([z] if is_kept else [])
                ratio, where = seen.pop()
                assert where == z
                proposed = Fraction(1, 2**17 * 2 ** (stretch + 1) * width)
                everywhere = Fraction(proposals.height, 2 ** (17 + proposals.block_bits))
                assert proposed * ratio == everywhere
                assert ratio * density(z, scale) < 1


@pytest.mark.any_backend
def test_exponentials_are_far_better_than_what_is_allowed_for():
    for x in np.random.default_rng(0).uniform(-40, 0, 2000):
        exact = Fraction(PRECISE.exp(Decimal(float(x))))
        assert abs(Fraction(float(np.exp(x))) / exact - 1) < discrete._FLOAT_ERROR / 2**8


@pytest.mark.any_backend
@pytest.mark.parametrize("scale", [0, -3, 2**24 + 1, 2.0, True, None, math.nan])
def test_a_scale_out_of_range(scale):
    with pytest.raises(ValueError, match="scale.*2\\*\\*24"):
        discrete_gaussian(3, scale)


@pytest.mark.any_backend
def test_draws_of_the_system_do_not_repeat():
    first, second = (noises.SecureNoise().draw(50) for _ in range(2))
    assert first.dtype == np.int32 and first.shape == (50,)
    assert (first != second).any()
    assert discrete_gaussian(0, 5).shape == (0,)


# --- why it is accounted as the Gaussian mechanism ------------------------------------------------


@pytest.mark.any_backend
@pytest.mark.parametrize("smoothing", [0.6, 0.8, 1.0])
def test_a_rounded_gaussian_is_a_discrete_one(smoothing):
    scale, mean = 3.0, 2
    support = np.arange(-60, 61)
    x, dx = np.linspace(-40, 44, 200_001, retstep=True)
    continuous = stats.norm.pdf(x, mean, math.sqrt(scale**2 - smoothing**2))
    normaliser = np.zeros_like(x)
    for k in support:
        normaliser += np.exp(-((k - x) ** 2) / (2 * smoothing**2))
    off = 2.1 * math.exp(-2 * math.pi**2 * smoothing**2)
    constant = normaliser / (smoothing * math.sqrt(2 * math.pi))
    assert 0.9 * off < np.abs(constant - 1).max() <= off
    exact = np.exp(-((support - mean) ** 2) / (2 * scale**2))
    exact /= exact.sum()
    for k, probability in zip(support, exact, strict=True):
        if probability > 1e-9:
            rounding = np.exp(-((k - x) ** 2) / (2 * smoothing**2)) / normaliser
            rounded = (continuous * rounding).sum() * dx
            assert abs(rounded / probability - 1) < 2 * off + 1e-10


@pytest.mark.any_backend
@pytest.mark.parametrize("noise_multiplier,entries", [(0.3, 10), (1.0, 1_600_000), (50.0, 10_000)])
def test_rounding_is_paid_for_by_the_multiplier(noise_multiplier, entries):
    noise = noises.SecureNoise()
    stds = noise.multiplier(noise_multiplier, entries)
    # Integers move by Δ/g + c√d; the continuous Gaussian has the variance s² − 64.
    moved = 1 / (stds / SCALE) + (1 + 2**-12) * math.sqrt(entries)
    assert math.sqrt(SCALE**2 - 64) / moved == pytest.approx(noise_multiplier, rel=1e-12)
    assert noise_multiplier < stds < 1.02 * noise_multiplier


# --- the grid -------------------------------------------------------------------------------------


def on_grid(total, noise, std):
    step = steps.backend().compiled(secure._on_grid)
    values = (np.asarray(total, "float32"), np.asarray(noise, "int32"), np.float32(std))
    return ops.convert_to_numpy(step(*(ops.convert_to_tensor(v) for v in values)))


def grid_of(std):
    """The grid that a std leads to, exactly: its factor `k` read off the value of one unit."""
    power = Fraction(2) ** (math.frexp(float(std))[1] - 1 - 20)
    one = float(on_grid([0.0], [1], std)[0])
    k = round(power * 2**15 / Fraction(one))
    grid = power * 2**15 / k
    assert one == pytest.approx(float(grid), rel=1e-6)
    return grid


def integers(total, std, grid):
    """What the sums are rounded to, read off exactly: noise takes nearly all of them away."""
    near = np.array([round(Fraction(float(v)) / grid) for v in total])
    left = on_grid(total, -near, std) / float(grid)
    assert np.abs(left - np.rint(left)).max() < 1e-4
    return near + np.rint(left).astype(int)


def stds(generator):
    """Stds of every size, also just beside powers of two."""
    yield from (float(np.float32(s)) for s in np.exp(generator.uniform(-40, 25, 6)))
    for exponent in (-20, 0, 3):
        for towards in (0.0, math.inf):
            yield float(np.nextafter(np.float32(2.0**exponent), np.float32(towards)))
        yield 2.0**exponent


def near_boundaries(generator, grid, count, largest):
    """float32 sums right beside the middle between two integers, on both sides of it."""
    n = np.rint(generator.choice([-1, 1], count) * 2.0 ** generator.uniform(0, largest, count))
    below = np.array([np.float32((Fraction(v) + Fraction(1, 2)) * grid) for v in n], np.float32)
    return below, np.nextafter(below, np.float32(math.inf)), np.nextafter(below, -below)


@pytest.mark.optimized
def test_sums_are_rounded_as_rational_numbers_would_be():
    generator = np.random.default_rng(0)
    for std in stds(generator):
        grid = grid_of(std)
        ideal = Fraction(std) / SCALE
        assert ideal <= grid <= ideal * (1 + Fraction(1, 2**13))
        sizes = 10.0 ** generator.uniform(-8, 2.7, 150)
        total = np.concatenate(
            [
                (generator.choice([-1, 1], 150) * sizes * std).astype("float32"),
                *near_boundaries(generator, grid, 50, 29),
                np.zeros(1, "float32"),
            ]
        )
        for value, n in zip(total, integers(total, std, grid), strict=True):
            assert abs(Fraction(float(value)) / grid - int(n)) <= Fraction(1, 2) + Fraction(
                1, 2**13
            )


def excess(rounded, total, other, grid):
    """How much further than the sums themselves the integers of pairs of sums are apart."""
    n, m = rounded(total), rounded(other)
    moved = [
        abs(int(a) - int(b)) - abs(Fraction(float(u)) - Fraction(float(v))) / grid
        for a, b, u, v in zip(n, m, total, other, strict=True)
    ]
    return float(max(moved))


def pairs(generator, std, grid, largest=29):
    """Pairs of sums whose integers are as far apart as the search can make them."""
    middle, above, below = near_boundaries(generator, grid, 120, largest)
    far = np.roll(middle, 1)
    return [(above, below), (above, middle), (middle, below), (above, far), (below, far)]


@pytest.mark.optimized
def test_no_pair_of_sums_moves_further_than_the_sensitivity_allows():
    generator = np.random.default_rng(1)
    c = 1 + 2**-12
    worst = -math.inf
    for std in [1.0, 0.37, 5.5e-7, 1.9999, 812.3]:
        grid = grid_of(std)
        for total, other in pairs(generator, std, grid):
            rounded = functools.partial(integers, std=std, grid=grid)
            worst = max(worst, excess(rounded, total, other, grid))
    assert 0.99 < worst <= c


@pytest.mark.any_backend
def test_the_search_finds_roundings_that_move_further():
    generator = np.random.default_rng(1)
    std = 0.37
    grid = Fraction(std) / SCALE
    wrong = {
        "a quotient in float32": lambda v: np.rint(v / np.float32(grid)).astype(np.int64),
        "rounded twice": lambda v: np.rint(np.rint(v * 2.0**21) * (0.5**21 / float(grid))),
        "away from zero": lambda v: np.where(
            np.abs(v) > 0, np.sign(v) * (np.floor(np.abs(v / float(grid))) + 1), 0
        ),
    }
    for name, rounded in wrong.items():
        if name == "away from zero":
            tried = [(np.float32([1e-9 * std]), np.float32([-1e-9 * std]))]
        else:
            tried = pairs(generator, std, grid)
        assert max(excess(rounded, *pair, grid) for pair in tried) > 1.05, name


def test_sums_beyond_the_grid_or_broken_are_held():
    total = [1e30, -1e30, math.inf, -math.inf, math.nan, 0.0]
    grid = float(grid_of(1.3))
    held = on_grid(total, [5] * 6, 1.3) / grid
    assert (np.abs(held[:4]) >= 2**29).all() and (np.abs(held[:4]) <= 2**30 + 64).all()
    assert np.sign(held[:4]).tolist() == [1, -1, 1, -1]
    np.testing.assert_allclose(held[4:], 5, rtol=1e-6)
    assert np.isnan(on_grid([0.5, 2.0], [1, 1], math.nan)).all()
    # Where the bound is 0 nothing can have moved, and next to no noise is added.
    assert np.abs(on_grid([0.0], [10**6], 0.0)).max() < 1e-20
    assert np.isfinite(on_grid([1e-30], [1], 1e-35)).all()


# --- the step -------------------------------------------------------------------------------------

BATCH = 16


def linear(inputs=40, classes=30):
    """One layer of zeros, whose bounds do not depend on it: a step of SGD is the update."""
    network = keras.Sequential(
        [keras.Input((inputs,)), layers.BallProjection(1.0), layers.SpectralDense(classes)]
    )
    for variable in network.trainable_variables:
        variable.constraint = None
        variable.assign(np.zeros(variable.shape))
    return network


def moves(model, x, y, steps_of_it=1, rows=None):
    """Changes of the weights, step by step, on these rows of a full batch, or on all."""
    start = weights(model)
    for batch in model.batches(x, y, epochs=steps_of_it):
        if rows is not None:
            batch.mask = np.asarray(rows, "float32")
        model.network.set_weights(start)
        model.train_on_batch(batch)
        yield [b - a for a, b in zip(start, weights(model), strict=True)]


@pytest.mark.parametrize("allocation", one_in(3, noises.ALLOCATIONS))
def test_updates_lie_on_the_grid_and_noise_has_the_std_of_the_report(allocation):
    model = private(
        linear(),
        noise="secure",
        noise_multiplier=1.7,
        sampling=lipdp.FullBatch(),
        allocation=allocation,
        optimizer=keras.optimizers.SGD(1.0),
        run_eagerly=False,
    )
    x, y = data(BATCH, (40,), classes=30)
    empty = list(moves(model, x, y, 6, np.zeros(BATCH)))
    full = list(moves(model, x, y, 2))
    for index, row in enumerate(model.report().weights):
        grid = grid_of(np.float32(row.noise_std * BATCH)) / BATCH
        for step in [*empty, *full]:
            units = step[index].astype("float64") / float(grid)
            # A float32 holds 24 bits of the integer.
            assert np.abs(units - np.rint(units)).max() <= 2.0**-22 * np.abs(units).max()
            small = np.abs(units) < 2**20
            assert small.any() and (np.rint(units[small]) % 2 == 1).any()
        sample = np.concatenate([step[index].ravel() for step in empty]) / row.noise_std
        assert abs(sample.std() - 1) * math.sqrt(2 * sample.size) < 4.5
        assert abs(sample.mean()) * math.sqrt(sample.size) < 4.5


def test_noise_is_that_of_gaussian_training_and_a_little_more():
    reports, spent = {}, {}
    for noise in ("gaussian", "secure"):
        model = private(linear(), noise=noise, sampling=lipdp.FullBatch())
        x, y = data(BATCH, (40,), classes=30)
        reports[noise] = [model.report(BATCH)]
        model.fit(x, y, verbose=0)
        reports[noise].append(model.report())
        spent[noise] = model.spent(1e-5)
    assert spent["gaussian"] == spent["secure"]
    for plain, on_a_grid in zip(reports["gaussian"], reports["secure"], strict=True):
        ratio = noises.SecureNoise().multiplier(1.0, 40 * 30 + 30)
        assert plain.noise_multiplier == on_a_grid.noise_multiplier == 1.0
        for a, b in zip(plain.weights, on_a_grid.weights, strict=True):
            assert b.noise_std / a.noise_std == pytest.approx(ratio, rel=1e-9)


@pytest.mark.any_backend
def test_removing_an_example_moves_the_integers_within_their_sensitivity():
    network = dense_network()
    x, y = data(BATCH)
    bounds = lipdp.gradient_bounds(network, math.sqrt(2) + 1e-5)
    backend = steps.backend()
    outputs, _ = backend.pull_back(network, ops.convert_to_tensor(x))
    slopes = ops.convert_to_numpy(ops.softmax(outputs)) - np.eye(3, dtype="float32")[y]
    std = float(np.float32(0.11))
    grid = grid_of(std)

    def rounded(rows):
        kept = slopes * np.asarray(rows, "float32")[:, None]
        _, pull = backend.pull_back(network, ops.convert_to_tensor(x))
        sums = pull(ops.convert_to_tensor(kept))
        return [integers(ops.convert_to_numpy(g).ravel(), std, grid) for g in sums]

    whole = rounded(np.ones(BATCH))
    for removed in range(4):
        other = rounded(np.arange(BATCH) != removed)
        for path, a, b in zip(bounds, whole, other, strict=True):
            allowed = bounds[path] / float(grid) + (1 + 2**-12) * math.sqrt(a.size)
            assert 0 < np.linalg.norm(a - b) <= allowed * (1 + 1e-5)


def test_the_count_of_an_adaptive_clip_has_discrete_noise_too():
    clip = lipdp.AdaptiveClip(quantile=0.5, initial=1e-3, learning_rate=0.5)
    model = private(linear(4, 3), noise="secure", clip=clip, sampling=lipdp.FullBatch())
    x, y = data(BATCH, (4,))
    found, before = [], 1e-3
    for batch in model.batches(x, y, epochs=60):
        batch.mask = np.zeros(BATCH, "float32")
        assert batch.noise.shape == (4 * 3 + 3 + 1,)
        model.train_on_batch(batch)
        after = float(model.clip_state.variable.numpy())
        units = -math.log(after / before) / 0.5 * BATCH / (0.5 * batch.noise[-1] / SCALE)
        found.append(units / model.step.constants.count_noise_multiplier)
        before = after
    # Each is the very noise of the batch, times the std of the count.
    np.testing.assert_allclose(found, 1.0, rtol=2e-3)
    mechanism = model.step.constants
    joint = mechanism.gradient_noise_multiplier**-2 + mechanism.count_noise_multiplier**-2
    assert joint**-0.5 == pytest.approx(1.0, rel=1e-4)
    parts = split_noise(1.0, BATCH, clip.count_noise_multiplier)
    split = zip(parts, (4 * 3 + 3, 1), strict=True)
    for multiplier, (accounted, entries) in zip(
        (mechanism.gradient_noise_multiplier, mechanism.count_noise_multiplier), split, strict=True
    ):
        paid = noises.SecureNoise().multiplier(accounted, entries)
        assert multiplier == pytest.approx(paid, rel=1e-12) and paid > accounted


def test_every_batch_carries_noise_of_its_own():
    secure, plain = private(noise="secure"), private()
    x, y = data()
    batches = [batch.noise for batch in secure.batches(x, y)]
    entries = sum(w.size for w in weights(secure))
    assert all(n.dtype == np.int32 and n.shape == (entries,) for n in batches)
    assert all((a != b).any() for a, b in zip(batches, batches[1:], strict=False))
    assert all(batch.noise is None for batch in plain.batches(x, y))


@pytest.mark.parametrize(
    "extra",
    one_in(
        2,
        [
            dict(
                physical_batch_size=8,
                augmentation=lipdp.Augmentation([keras.layers.GaussianNoise(0.1)], views=2),
                clip=lipdp.AdaptiveClip(),
                budget=lipdp.Budget(3.0, 1e-4),
            ),
            dict(run_eagerly=False, compile=dict(steps_per_execution=2)),
        ],
    ),
)
def test_it_trains_with_everything_else(extra):
    model = private(noise="secure", **extra)
    x, y = data()
    before = weights(model)
    history = model.fit(x, y, epochs=2, verbose=0)
    assert model.spent(1e-5).steps == 8
    assert np.isfinite(history.history["loss"]).all()
    assert all(np.isfinite(w).all() for w in weights(model))
    assert any((a != b).any() for a, b in zip(before, weights(model), strict=True))


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "noise", ["discrete", "", None, 3, math.nan, ["secure"], noises.SecureNoise]
)
def test_unknown_noise(noise):
    with pytest.raises(ValueError, match="`noise`.*'gaussian', 'secure'"):
        private(noise=noise)


@pytest.mark.any_backend
def test_a_seed_is_refused():
    with pytest.raises(ValueError, match="`seed`.*seed=0"):
        private(noise="secure", seed=0)


@pytest.mark.any_backend
@pytest.mark.parametrize("noise_multiplier,match", [(0.0, "above 0"), (1e6, "below.*83 entries")])
def test_noise_that_the_grid_cannot_give(noise_multiplier, match):
    model = private(noise="secure", noise_multiplier=noise_multiplier)
    with pytest.raises(ValueError, match=match):
        model.fit(*data(), verbose=0)
    assert model.spending.run is None and model.spending.runs == []
