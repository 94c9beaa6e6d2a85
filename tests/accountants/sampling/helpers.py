"""Data sets of a few examples, whose releases are known by going through all batches."""

import itertools

import numpy as np
import pytest
from scipy import stats

from accountants import FixedSize, TruncatedPoisson
from accountants.sampling import Draws

SIGMA = 0.9

# Others all against the example, for it, or neutral, and what the example becomes.
OTHERS = [(-1, -1, -1, -1), (0, 0, 0, 0), (1, 1, 1, 1), (-1, -1, 1, 0.5)]
TARGETS = (0.1, 1.0, 3.0)
CHANGES = {"zero_out": [(1, 0)], "replace_one": [(1, -1), (1, 0), (0.5, -1)]}


def batches(scheme, n, examples):
    """The probability of every batch, as a set of positions, drawn from some of n positions."""
    if isinstance(scheme, FixedSize):
        chosen = list(itertools.combinations(examples, scheme.batch_size))
        return {batch: 1 / len(chosen) for batch in chosen}
    q = scheme.sampling_probability(n)
    found = {}
    for size in range(len(examples) + 1):
        for drawn in itertools.combinations(examples, size):
            probability = q**size * (1 - q) ** (len(examples) - size)
            kept = [drawn]
            if isinstance(scheme, TruncatedPoisson) and size > scheme.physical_batch_size:
                kept = list(itertools.combinations(drawn, scheme.physical_batch_size))
            for batch in kept:
                found[batch] = found.get(batch, 0.0) + probability / len(kept)
    assert sum(found.values()) == pytest.approx(1.0)
    return found


def cells(scheme, n, contributions, sigma=SIGMA, width=1e-2):
    """The probability of every small interval, of the noisy sum of contributions on a line."""
    means = {}
    for batch, probability in batches(scheme, n, range(len(contributions))).items():
        total = sum(contributions[i] for i in batch)
        means[total] = means.get(total, 0.0) + probability
    edges = np.arange(-len(contributions) - 9 * sigma, len(contributions) + 9 * sigma, width)
    edges = np.concatenate([[-np.inf], edges, [np.inf]])
    return sum(w * np.diff(stats.norm.cdf(edges, mean, sigma)) for mean, w in means.items())


def least_deltas(p, q, steps, targets, grid=1e-3):
    """Lower bounds on delta, both ways, after some steps: losses are rounded down."""
    return np.maximum(
        _least_deltas(p, q, steps, targets, grid), _least_deltas(q, p, steps, targets, grid)
    )


def _least_deltas(p, q, steps, targets, grid):
    kept = (p > 1e-14) & (q > 1e-300)
    index = np.floor(np.log(p[kept] / q[kept]) / grid).astype(int)
    least = index.min()
    masses = np.bincount(index - least, p[kept])
    size = (len(masses) - 1) * steps + 1
    padded = 1 << (size - 1).bit_length()
    composed = np.fft.irfft(np.fft.rfft(masses, padded) ** steps, padded)[:size]
    losses = (np.arange(size) + least * steps) * grid
    return (
        np.array(
            [np.dot(composed, -np.expm1(np.minimum(0.0, target - losses))) for target in targets]
        )
        - 1e-11
    )


# --- draws ----------------------------------------------------------------------------------------


def draws_of(scheme, n, seed=0):
    """The draws of one run, which repeat with the seed."""
    steps = scheme.steps_per_epoch(n)
    return Draws(n, steps, lambda *place: np.random.default_rng([seed, len(place), *place]))


def drawn(scheme, n, epochs, seed=0):
    """The rows of each step of a run."""
    draws = draws_of(scheme, n, seed)
    return [
        scheme.rows(draws.step(epoch, index))
        for epoch in range(1, epochs + 1)
        for index in range(draws.steps)
    ]
