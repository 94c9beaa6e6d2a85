"""The generator of the noise."""

import numpy as np
import pytest
from keras import ops
from scipy import stats

from lipdp import autodiff, noise
from lipdp.noise.gaussian_rng import add_noise, standard_normal, threefry
from lipdp.randomness import RandomSource
from lipdp.training import steps

KEY = np.array([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], np.uint32)


def draw(shape, key=KEY, stream=0):
    def drawn(key, stream):
        return steps.backend().compiled(standard_normal)(key, stream, tuple(shape))

    words = ops.convert_to_tensor(key), ops.convert_to_tensor(np.uint32(stream))
    return ops.convert_to_numpy(autodiff.compiled(drawn)(*words))


@pytest.mark.parametrize(
    "key,counter,expected",
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 2, (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_words_are_those_that_the_authors_publish(key, counter, expected):
    key, counter = (
        [ops.convert_to_tensor(np.array([v], np.uint32)) for v in pair] for pair in (key, counter)
    )
    words = threefry(tuple(key), tuple(counter))
    assert tuple(int(ops.convert_to_numpy(w)[0]) for w in words) == expected


def reference(key, stream, count):
    """The same numbers in Python's integers and float64, but for `u`, which is rounded."""
    mask, numbers = 2**32 - 1, np.zeros((2, -(-count // 2)))
    keys = [int(k) for k in key]
    schedule = [keys[0], keys[1], keys[0] ^ keys[1] ^ 0x1BD11BDA]
    for place in range(numbers.shape[1]):
        a = (place + keys[2] + keys[0]) & mask
        b = ((keys[3] ^ stream) + keys[1]) & mask
        for i in range(20):
            turn = (13, 15, 26, 6, 17, 29, 16, 24)[i % 8]
            a = (a + b) & mask
            b = (((b << turn) | (b >> (32 - turn))) & mask) ^ a
            if i % 4 == 3:
                block = i // 4 + 1
                a = (a + schedule[block % 3]) & mask
                b = (b + schedule[(block + 1) % 3] + block) & mask
        u = float(np.float32((a + ((b & 255) + 0.5) / 256) / 2**32))
        radius = np.sqrt(2.0**-25 - 2 * np.log(u))
        angle = ((b >> 10) + 0.5) / 2**22 * np.pi / 2 - np.pi / 4
        opposite, across = b >> 9 & 1, b >> 8 & 1
        angle = (np.pi / 2 - angle if across else angle) + np.pi * opposite
        numbers[:, place] = radius * np.array([np.cos(angle), np.sin(angle)])
    return numbers.ravel()[:count]


def test_numbers_are_the_same_on_every_backend():
    for shape, stream in (((7, 300), 0), ((6, 35, 10), 5), ((7, 3, 1), 1), ((1,), 2), ((), 3)):
        expected = reference(KEY, stream, int(np.prod(shape))).reshape(shape)
        np.testing.assert_allclose(draw(shape, stream=stream), expected, atol=2e-6, rtol=1e-5)
    assert draw((0, 3)).shape == (0, 3)


def test_a_key_that_nobody_drew_gives_no_numbers():
    assert np.all(np.isnan(draw((5, 3), key=np.zeros(4, np.uint32))))


@pytest.mark.parametrize("streams", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_numbers_are_normal_in_bulk_and_tails(streams):
    draws = [draw((2500, 2000), stream=s).ravel() for s in range(streams)]
    z = np.concatenate(draws).astype("float64")
    n = len(z)
    assert stats.kstest(z[:2_000_000], "norm").pvalue > 1e-4
    # Counts in cells of equal width, and beyond: the tail is where privacy is lost.
    edges = np.concatenate([[-np.inf], np.arange(-5, 5.01, 0.25), [np.inf]])
    expected = n * np.diff(stats.norm.cdf(edges))
    observed = np.histogram(z, edges)[0]
    assert stats.chisquare(observed, expected).pvalue > 1e-4
    for cut in (4.5, 5.0, 5.5):
        mean = 2 * n * stats.norm.sf(cut)
        assert abs(np.sum(np.abs(z) > cut) - mean) < 5 * np.sqrt(mean) + 2
    assert np.all(z != 0)
    for moment, variance in ((1, 1), (2, 2), (3, 15), (4, 96)):
        odd = 0.0 if moment % 2 else {2: 1.0, 4: 3.0}[moment]
        assert abs(np.mean(z**moment) - odd) < 5 * np.sqrt(variance / n)


def test_extreme_words_give_finite_numbers(monkeypatch):
    """The largest and smallest of both words, through the same transform."""
    words = [0, 1, 255, 256, 2**31 - 1, 2**31, 2**32 - 256, 2**32 - 1]
    pairs = np.array([(a, b) for a in words for b in words], np.uint32)

    def fixed(key, counter):
        return tuple(ops.convert_to_tensor(pairs[:, i]) for i in range(2))

    monkeypatch.setattr("lipdp.noise.gaussian_rng.threefry", fixed)
    z = ops.convert_to_numpy(
        standard_normal(ops.convert_to_tensor(KEY), np.uint32(0), (2 * len(pairs),))
    )
    assert np.all(np.isfinite(z)) and np.all(z != 0)
    assert 7.5 < np.abs(z).max() < 7.6


def test_neighbours_streams_and_keys_are_independent():
    z = draw((1000, 1000))
    np.testing.assert_array_equal(z, draw((1000, 1000)))
    other_key = RandomSource(3).key(1)
    others = [z[1:, :], z[:, 1:], draw(z.shape, stream=1), draw(z.shape, stream=2**31)]
    others += [draw(z.shape, key=other_key), draw(z.shape, key=KEY ^ np.uint32(1))]
    for other in others:
        first = z[: other.shape[0], : other.shape[1]].ravel()
        for power in (1, 2):  # a shared radius shows in the squares
            correlation = np.corrcoef(first**power, other.ravel() ** power)[0, 1]
            assert abs(correlation) < 5 / np.sqrt(first.size)


def test_places_that_would_repeat_are_refused():
    with pytest.raises(ValueError, match="fewer than"):
        standard_normal(ops.convert_to_tensor(KEY), np.uint32(0), (2**16, 2**15))


def test_noise_is_added_at_its_std():
    total = ops.convert_to_tensor(np.full((100, 1000), 3.0, "float32"))
    key = ops.convert_to_tensor(KEY)
    noisy = ops.convert_to_numpy(
        add_noise([total], [ops.convert_to_tensor(0.5)], key, np.uint32(4))[0]
    )
    np.testing.assert_allclose(noisy, 3.0 + 0.5 * draw((100, 1000), stream=4), atol=1e-5)


def test_no_two_sums_of_a_step_share_numbers():
    """Small ones are parts of one draw, the others have a stream for themselves."""
    shapes = [(3, 2, 5), (300, 250), (7,), (250, 300), (), (0, 2), (1,)]
    key = ops.convert_to_tensor(KEY)
    sums = [ops.zeros(shape) for shape in shapes]
    found = noise.GaussianNoise().add(steps.backend(), {"key": key}, sums, [1.0] * len(sums))
    found = [ops.convert_to_numpy(z) for z in found]
    assert [z.shape for z in found] == shapes
    few = np.concatenate([found[i].ravel() for i in (0, 2, 4, 5, 6)])
    np.testing.assert_allclose(few, draw((39,), stream=0), atol=1e-6)
    for index in (1, 3):
        np.testing.assert_allclose(found[index], draw(shapes[index], stream=index), atol=1e-6)
