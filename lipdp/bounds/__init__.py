"""Rules of the layers and the walk that turns them into sensitivities."""

from lipdp.bounds import builtin as _builtin  # noqa: F401  (registers the rules)
from lipdp.bounds.rule import Call, Rule, UnknownLayerError, lipschitz, register
from lipdp.bounds.walk import LayerBound, NetworkBounds, gradient_bounds, network_bounds

__all__ = [
    "Call",
    "LayerBound",
    "NetworkBounds",
    "Rule",
    "UnknownLayerError",
    "gradient_bounds",
    "lipschitz",
    "network_bounds",
    "register",
]
