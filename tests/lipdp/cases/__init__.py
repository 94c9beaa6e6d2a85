"""The catalogue of what is attacked: every layer and rule in many configurations.

`tests/lipdp/bounds/test_attacks.py` attacks each case, and `tightness.py` there makes the table of
the docs from the same results.
"""

from tests.lipdp.cases import (
    activations,
    branches,
    example,
    linear,
    networks,
    pooling,
    sequences,
    shapes,
)
from tests.lipdp.cases.case import Case

CASES: list[Case] = [
    case
    for family in (
        linear,
        activations,
        pooling,
        shapes,
        example,
        branches,
        sequences,
        networks,
    )
    for case in family.CASES
]

_names = [case.name for case in CASES]
assert len(set(_names)) == len(_names), {name for name in _names if _names.count(name) > 1}
