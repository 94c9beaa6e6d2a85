"""Checks of arguments, for all packages: each returns the plain Python value that it accepted.

A value of the wrong kind raises TypeError, one out of range ValueError. Every message names the
argument, what is accepted, and what came.
"""

import math
import numbers
from collections.abc import Collection
from typing import Any

__all__ = [
    "argument_message",
    "check_choice",
    "check_integer",
    "check_number",
    "check_probability",
]


def check_integer(value: Any, name: str, least: int = 1) -> int:
    """`value` as an int of at least `least`.

    >>> check_integer(3, "steps")
    3
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(argument_message(name, f"an integer of at least {least}", value))
    if value < least:
        raise ValueError(argument_message(name, f"an integer of at least {least}", value))
    return int(value)


def check_number(value: Any, name: str, zero: bool = False, below: float = math.inf) -> float:
    """`value` as a float above 0 (or 0, where that will do) and below a limit; always finite.

    >>> check_number(2, "clip")
    2.0
    """
    least = "of at least 0" if zero else "above 0"
    accepted = f"a number {least} and {'finite' if below == math.inf else f'below {below:g}'}"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(argument_message(name, accepted, value))
    if not (0 <= value if zero else 0 < value) or not value < below:  # NaN is none of them
        raise ValueError(argument_message(name, accepted, value))
    return float(value)


def check_probability(value: Any, name: str) -> float:
    """`value` as a float strictly between 0 and 1.

    >>> check_probability(1e-5, "delta")
    1e-05
    """
    accepted = "a number strictly between 0 and 1"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(argument_message(name, accepted, value))
    if not 0 < value < 1:
        raise ValueError(argument_message(name, accepted, value))
    return float(value)


def check_choice(value: Any, name: str, accepted: Collection[str]) -> str:
    """`value`, which is among the accepted names.

    >>> check_choice("pld", "accountant", ["pld", "rdp"])
    'pld'
    """
    if not isinstance(value, str) or value not in accepted:
        raise ValueError(argument_message(name, f"one of {', '.join(map(repr, accepted))}", value))
    return value


def argument_message(name: str, accepted: str, value: Any) -> str:
    """The message of an argument that is not what is accepted.

    >>> argument_message("rate", "a number from 0 to 1", 2)
    '`rate` must be a number from 0 to 1; got 2.'
    """
    return f"`{name}` must be {accepted}; got {value!r}."
