"""What is written down of a run, and what can be filed about the network that it trained."""

import os

from accountants import Statement
from lipdp._version import __version__
from lipdp.noise import SecureNoise

__all__ = ["circumstances", "software", "statement_of"]

software = f"lipdp {__version__}"


def circumstances(model) -> dict[str, str]:
    """What a statement says of a run of the model beside its mechanism; the ledger keeps it."""
    if isinstance(model.noise, SecureNoise):
        noise = "discrete Gaussian, from the system's generator"
    elif model.noise.correlated:
        noise = "floating-point Gaussian, correlated over steps"
    else:
        noise = "floating-point Gaussian"
    if model.random_source.seed is not None:
        noise += ", from a seed"
    if model.units is None:
        bounds = "certified norms of every layer, from a clip of each example's loss gradient"
    else:
        bounds = "each layer clips its gradient of each example to a threshold"
    if getattr(model.clip, "adaptive", False):
        bounds += ", which adapts by counts with noise"
    found = {"noise": noise, "bounds": bounds, "software": software}
    if model.unit == "group":
        most = model.examples_per_group
        found["groups"] = f"of a drawn one the mean of at most {most} examples enters a step"
    return found


def statement_of(model, delta: float | None) -> Statement:
    """The statement of what a `PrivateModel` and its ledger have spent; raises as `spent` does."""
    spent = model.spent(delta)
    ledger = ""
    if model.ledger is not None:
        ledger = f", and all that its ledger {os.path.basename(model.ledger.path)} holds"
    return Statement.of(
        model.spending.uses,
        spent.delta,
        subject=f"the network {model.network.name!r}{ledger}",
        software=software,
        relation=spent.relation,
        spent=spent.epsilon,
    )
