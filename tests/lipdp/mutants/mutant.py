"""What mutants share: where they are listed, and how one breaks a rule."""

from collections.abc import Callable

from lipdp.bounds import rule

#: All mutants, in the order in which they are defined.
MUTANTS: list[Callable] = []


def mutant(function: Callable) -> Callable:
    """Lists `patch -> (target, input_shape)`, which breaks one rule or layer and gives a layer or
    network for which that matters.
    """
    assert function.__name__ not in {m.__name__ for m in MUTANTS}, function.__name__
    MUTANTS.append(function)
    return function


def register(patch, cls, mutant):
    patch.setitem(rule._RULES, cls, mutant)


def parts(right):
    return right.backward, right.gradients
