"""One case of the catalogue."""

import dataclasses
from collections.abc import Callable
from typing import Any

from lipdp.audit import AttackResult, attack_bounds

#: The quantities of a layer with one input and no weights.
BOTH = ("output", "input")


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer or network in one configuration, and what the attack is to find.

    Attributes:
        name: `"kind: configuration"`; the kind is a row of the table in the docs.
        make: gives the layer, or the network.
        shape: of a layer: its input's shape, without batch, or a list of shapes.
        tight: ends of the names of quantities whose bound must be attained to 85 % at least.
        options: of `attack_bounds`.
        slow: left out of the fast tests.
    """

    name: str
    make: Callable[[], Any]
    shape: Any = None
    tight: tuple[str, ...] = ()
    options: dict = dataclasses.field(default_factory=dict)
    slow: bool = False

    @property
    def kind(self) -> str:
        return self.name.partition(": ")[0]

    def attack(self) -> AttackResult:
        return attack_bounds(self.make(), self.shape, **self.options)
