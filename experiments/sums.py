"""One noisy release of sums over the private examples, paid for in the ledger of the training."""

import math
import os

import numpy as np

import accountants

__all__ = ["release"]


def release(
    total: np.ndarray,
    sensitivity: float,
    *,
    examples: int,
    budget: accountants.Budget,
    share: float,
    ledger: str | os.PathLike[str],
    seed: int | None = None,
) -> tuple[np.ndarray, float]:
    """The Gaussian mechanism, once, on a sum over all examples.

    A model with the same ledger and budget composes it with its own steps and calibrates them to
    what is left: for Gaussian releases 1/σ² adds up, and this one takes a share of it.

    Args:
        total: the sum, any shape.
        sensitivity: the most that one example adds to it, in ℓ2 norm over all entries.
        examples: their number, which is public.
        budget: of the release and the training together.
        share: of the budget, between 0 and 1.
        ledger: path of the file.
        seed: for benchmarks: who knows it can subtract the noise.

    Returns:
        The noisy sum, and the noise multiplier.

    Raises:
        ValueError: the share or the sensitivity is out of range.
    """
    from lipdp.randomness import RandomSource

    if not 0 < share < 1:
        raise ValueError(f"`share` must lie strictly between 0 and 1; got {share!r}.")
    if not 0 < sensitivity < math.inf:
        raise ValueError(f"`sensitivity` must be positive and finite; got {sensitivity!r}.")
    everything = accountants.calibrate_noise_multiplier(
        epsilon=budget.epsilon,
        delta=budget.delta,
        sampling=accountants.FullBatch(),
        num_examples=examples,
        steps=1,
    )
    noise_multiplier = everything / math.sqrt(share)
    opened = accountants.Ledger(os.fspath(ledger)).open_run(
        noise_multiplier=noise_multiplier,
        sampling=accountants.FullBatch(),
        num_examples=examples,
        max_steps=1,
    )
    with opened as run:
        run.pay()
        # A position that no step of a model has, so that a seed never gives the same noise twice.
        generator = RandomSource(seed).generator(2**31)
        noise = generator.normal(0.0, noise_multiplier * sensitivity, np.shape(total))
    return total + noise, noise_multiplier
