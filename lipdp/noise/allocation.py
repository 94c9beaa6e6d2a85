"""How noise is shared over the weights: the standard deviation of each, for one joint mechanism."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from keras import ops

from accountants.validation import check_number

__all__ = ["ALLOCATIONS", "resolve_allocation", "standard_deviations"]

#: The allocations that have a name.
ALLOCATIONS = ("global", "per_weight", "least")


def standard_deviations(
    bounds: Sequence[Any],
    sizes: Sequence[int],
    noise_multiplier: float,
    allocation: str | Sequence[float],
) -> list[Any]:
    """Noise of each weight's gradient *sum*; divide by the expected batch size for its mean.

    Every weight alone would have the multiplier `σ_v = std_v/Δ_v`; together they are one Gaussian
    mechanism of multiplier `σ` with `1/σ² = Σ 1/σ_v²` (scale each weight by `1/std_v`: the noise
    becomes standard, the sensitivity `√Σ(Δ_v/std_v)²`). All allocations reach the same `σ`:

    - `"global"`: one std for all, `σ·√ΣΔ²`.
    - `"per_weight"`: equal multipliers, `σ·√D·Δ_v` for `D` weights.
    - `"least"`: the least total variance `Σ d_v·std_v²`, `σ·√Δ_v/d_v^¼·√(Σ_u Δ_u·√d_u)`
      (Lagrange: `d_v·std_v⁴` is proportional to `Δ_v²`).
    - numbers `a_v`, one a weight: its share of `1/σ²`, `std_v = σ·√(Σ_u a_u/a_v)·Δ_v`. Equal
      numbers are `"per_weight"`.

    Args:
        bounds: `Δ_v` of each weight, floats or scalar tensors.
        sizes: `d_v`, number of entries of each weight.
        noise_multiplier: `σ`.
        allocation: one of `ALLOCATIONS`, or positive numbers.

    Returns:
        A list of floats or scalar tensors.

    >>> stds = standard_deviations([3.0, 4.0], [10, 1000], 2.0, "global")
    >>> [round(s, 6) for s in stds]
    [10.0, 10.0]
    """
    if allocation == "global":
        std = _sqrt(sum(b * b for b in bounds)) * noise_multiplier
        return [std] * len(bounds)
    if allocation == "per_weight":
        allocation = [1.0] * len(bounds)
    if not isinstance(allocation, str):
        whole = sum(allocation)
        return [
            noise_multiplier * math.sqrt(whole / share) * b
            for b, share in zip(bounds, allocation, strict=True)
        ]
    total = _sqrt(sum(b * math.sqrt(d) for b, d in zip(bounds, sizes, strict=True)))
    return [
        noise_multiplier * _sqrt(b) / d**0.25 * total for b, d in zip(bounds, sizes, strict=True)
    ]


def resolve_allocation(
    allocation: str | Mapping[str, float], names: Sequence[str], of: str = "trainable weight"
) -> str | list[float]:
    """An allocation as `standard_deviations` takes it.

    Args:
        allocation: a name of an allocation, or a dict with a number for each of `names`.
        names: of what the noise is shared over: paths of weights, or names of layers.
        of: what they name.

    Raises:
        ValueError: an unknown allocation; a name too many or too few; a number that is not
            positive.
    """
    if isinstance(allocation, Mapping):
        if set(allocation) != set(names):
            raise ValueError(
                f"`allocation` must give a number for each {of}, {', '.join(map(repr, names))}; "
                f"got {', '.join(map(repr, allocation))}."
            )
        return [check_number(allocation[name], f"allocation[{name!r}]") for name in names]
    if allocation not in ALLOCATIONS:
        raise ValueError(
            f"`allocation` must be one of {ALLOCATIONS}, or a dict of a number for each {of}; got "
            f"{allocation!r}."
        )
    return allocation


def _sqrt(x):
    return math.sqrt(x) if isinstance(x, (int, float)) else ops.sqrt(x)
