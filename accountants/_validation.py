"""Checks of arguments, shared by the package: each returns the plain Python value it accepted."""

import math
import numbers
from collections.abc import Collection
from typing import Any


def integer(name: str, value: Any, *, minimum: int) -> int:
    """`value` as an int of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {value!r} ({type(value).__name__}).")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value!r}.")
    return int(value)


def number(name: str, value: Any, *, minimum: float = 0.0, strict: bool = False) -> float:
    """`value` as a finite float, at least `minimum`, or above it if `strict`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a real number, got {value!r} ({type(value).__name__}).")
    value = float(value)
    if not math.isfinite(value) or value < minimum or (strict and value == minimum):
        kind = "greater than" if strict else "at least"
        raise ValueError(f"{name} must be finite and {kind} {minimum:g}, got {value!r}.")
    return value


def probability(name: str, value: Any) -> float:
    """`value` as a float strictly between 0 and 1."""
    value = number(name, value, strict=True)
    if value >= 1.0:
        raise ValueError(f"{name} must be strictly between 0 and 1, got {value!r}.")
    return value


def one_of(name: str, value: Any, accepted: Collection[str]) -> str:
    """`value` if it is among the accepted names."""
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, accepted))}; got {value!r}.")
    return value
