"""The noise of a step: its kinds, and how it is shared over the weights."""

from typing import Any

from accountants.sampling import Sampling
from lipdp.noise.allocation import ALLOCATIONS, resolve_allocation, standard_deviations
from lipdp.noise.correlated import BandedNoise, ToeplitzNoise
from lipdp.noise.gaussian import GaussianNoise
from lipdp.noise.secure import SecureNoise

__all__ = [
    "ALLOCATIONS",
    "BandedNoise",
    "GaussianNoise",
    "SecureNoise",
    "ToeplitzNoise",
    "make_noise",
    "resolve_allocation",
    "standard_deviations",
]


def make_noise(noise: Any, sampling: Sampling | None) -> GaussianNoise:
    """The noise of a model, as `PrivateModel(noise=)` names it.

    Raises:
        ValueError: `noise` is no name and no noise, or cannot hide what batches drawn by `sampling`
            may hold of one example.

    >>> from accountants import FullBatch
    >>> type(make_noise("secure", FullBatch())).__name__
    'SecureNoise'
    """
    named = {"gaussian": GaussianNoise, "secure": SecureNoise}
    if isinstance(noise, str) and noise in named:
        made = named[noise]()
    elif hasattr(noise, "stream") and sampling is None:
        raise ValueError(f"`sampling` must be given with noise={noise!r}; they go together.")
    elif hasattr(noise, "stream"):
        made = noise.stream(sampling)
    else:
        raise ValueError(
            f"`noise` must be one of {', '.join(map(repr, named))}, lipdp.BandedNoise(...) or "
            f"lipdp.ToeplitzNoise(...); got {noise!r}."
        )
    if sampling is not None and sampling.whole_run and not made.whole_runs:
        raise ValueError(
            f"{sampling!r} accounts for a whole run at once and needs noise=lipdp.ToeplitzNoise(); "
            f"with noise={noise!r} take lipdp.ShuffledEpochs."
        )
    return made
