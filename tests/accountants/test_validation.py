import math

import numpy as np
import pytest

from accountants.validation import check_choice, check_integer, check_number, check_probability


def test_values_come_back_as_plain_ones():
    for value, expected in [
        (check_integer(np.int64(3), "n"), 3),
        (check_integer(0, "n", 0), 0),
        (check_number(np.float32(0.5), "x"), 0.5),
        (check_number(0, "x", zero=True), 0.0),
        (check_probability(0.25, "p"), 0.25),
        (check_choice("a", "c", {"a": 1}), "a"),
    ]:
        assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    ("check", "value", "error"),
    [
        *((check_integer, value, TypeError) for value in (1.0, True, "1", None)),
        *((check_integer, value, ValueError) for value in (0, -1)),
        *((check_number, value, TypeError) for value in (True, "1", None, 1j)),
        *((check_number, value, ValueError) for value in (0, -1.0, math.inf, math.nan)),
        *((check_probability, value, TypeError) for value in (True, "0.5", None)),
        *((check_probability, value, ValueError) for value in (0, 1, 2.0, math.nan)),
    ],
)
def test_others_are_refused_by_kind_and_by_range(check, value, error):
    with pytest.raises(error, match=rf"^`size` must be .*; got {value!r}\.$"):
        check(value, "size")


@pytest.mark.parametrize("value", ["c", None, [], 1])
def test_choices(value):
    with pytest.raises(ValueError, match=r"^`kind` must be one of 'a', 'b'; got "):
        check_choice(value, "kind", ["a", "b"])
