"""Pairs of distributions that dominate one noisy release.

A pair (P, Q) dominates a release if no two neighbouring data sets are easier to tell apart by it
than P is from Q. Then as many independent draws from P or Q dominate an adaptive composition of
releases (Zhu, Dong and Wang 2022, Theorem 10), and the accountants need nothing else.

Throughout, one example contributes a vector of norm at most 1 and the noise has the standard
deviation σ, so that all pairs live on a line. H_α(P‖Q) = sup_S P(S) - α Q(S) is the hockey-stick
divergence; its value at α = exp(ε) is the delta at epsilon.

The unsampled release, and what is known by its ρ alone, are here. The others are in
`accountants.sampling`, each beside the scheme that it accounts for, and in `accountants.queries`.
"""

import abc
import dataclasses
import math
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from accountants.numerics import ORDERS, WIDTH, renyi_pld, sampled_gaussian_pld

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution


class Release(abc.ABC):
    """One noisy release, as a pair of distributions; a hashable value.

    Attributes:
        source: where the domination is proved.
    """

    source: ClassVar[str]

    def unsampled(self) -> "Gaussian | None":
        """The same release without amplification, where that, or the Rényi divergences, may be
        tighter than the losses on a grid; None where they never are.
        """
        return None

    @abc.abstractmethod
    def scale(self) -> tuple[float, float]:
        """The privacy loss' standard deviation and the most it can be, both roughly."""

    @abc.abstractmethod
    def pld(self, grid: float) -> "PrivacyLossDistribution":
        """The privacy loss, from above, on multiples of `grid`."""

    @abc.abstractmethod
    def rdp(self) -> np.ndarray:
        """Upper bounds on the Rényi divergences of both directions, at `ORDERS`."""


@dataclasses.dataclass(frozen=True)
class Gaussian(Release):
    """N(shift, 1) against N(0, 1): an unsampled release, of any number folded into one.

    Any composition of Gaussians is one: the shifts add up in squares.
    """

    shift: float

    source = "closed form, Balle and Wang 2018, Theorem 8"

    def scale(self) -> tuple[float, float]:
        return self.shift, self.shift * (WIDTH + self.shift / 2)

    def pld(self, grid: float) -> "PrivacyLossDistribution":
        return sampled_gaussian_pld(1.0, 1 / self.shift, grid, replace=False)

    def rdp(self) -> np.ndarray:
        return ORDERS * (self.shift**2 / 2)


@dataclasses.dataclass(frozen=True)
class Zcdp(Release):
    """A pair that dominates every ρ-zCDP mechanism; see `renyi_pld`.

    Of several, the ρ add up.
    """

    rho: float

    source = "Bun and Steinke 2016; Zhu, Dong and Wang 2022, Proposition 8"

    def scale(self) -> tuple[float, float]:
        spread = math.sqrt(2 * self.rho)
        return max(spread, 1e-4), self.rho + WIDTH * max(spread, 1e-4)

    def pld(self, grid: float) -> "PrivacyLossDistribution":
        return renyi_pld(self.rdp(), grid)

    def rdp(self) -> np.ndarray:
        return self.rho * ORDERS


def gaussian_release(noise_multiplier: float, sensitivity: float) -> Gaussian:
    """An unsampled release of noise that was measured against a sensitivity of 1."""
    # Also where the square underflows.
    square = noise_multiplier * noise_multiplier
    return Gaussian(sensitivity / noise_multiplier if square > 0.0 else math.inf)
