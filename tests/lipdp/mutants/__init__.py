"""Rules broken on purpose, by subject; `tests/lipdp/bounds/test_mutants.py` attacks each."""

from tests.lipdp.mutants import (  # noqa: F401 - each lists its own
    blocks,
    branches,
    linear,
    pointwise,
    pooling,
    sequences,
)
from tests.lipdp.mutants.mutant import MUTANTS

__all__ = ["MUTANTS"]
