"""Claim of a run: the most that any attack on it may achieve."""

import dataclasses
import math

import accountants
from accountants import TradeOff

__all__ = ["Claim"]


@dataclasses.dataclass(frozen=True)
class Claim:
    """An (ε, δ) guarantee and, where it is known, the whole trade-off curve behind it.

    Attributes:
        epsilon, delta: the guarantee.
        curve: what `accountants.tradeoff` says of the same runs, or None: then the curve is what
            ε and δ imply (Kairouz, Oh and Viswanath 2015).

    Raises:
        ValueError: a value out of range.

    >>> claim = Claim(epsilon=1.0, delta=1e-5)
    >>> round(claim.true_positive_rate(0.01), 4), round(claim.advantage, 4)
    (0.0272, 0.4621)
    """

    epsilon: float
    delta: float
    curve: TradeOff | None = None

    def __post_init__(self):
        if not self.epsilon >= 0:
            raise ValueError(f"`epsilon` must be at least 0; got {self.epsilon!r}.")
        if not 0 <= self.delta < 1:
            raise ValueError(f"`delta` must be at least 0 and below 1; got {self.delta!r}.")

    @classmethod
    def of(cls, model, delta: float | None = None) -> "Claim":
        """The claim of a trained `PrivateModel`; `delta` is by default its budget's."""
        spent = model.spent(delta)
        runs = model.spending.runs
        curve = accountants.tradeoff(runs=runs, relation=spent.relation) if runs else None
        return cls(spent.epsilon, spent.delta, curve)

    def true_positive_rate(self, false_positive_rate: float) -> float:
        """The most true positives at so few false positives: `g`, which rises and is concave."""
        if self.curve is not None:
            return self.curve.true_positive_rate(false_positive_rate)
        if math.isinf(self.epsilon):
            return 1.0
        few = self.delta + math.exp(min(self.epsilon, 700.0)) * false_positive_rate
        many = 1 - math.exp(-self.epsilon) * (1 - self.delta - false_positive_rate)
        return min(1.0, few, many)

    @property
    def advantage(self) -> float:
        """The most by which true positives can exceed false positives."""
        if self.curve is not None:
            return self.curve.advantage
        # Where the two lines of the curve meet.
        return (
            (math.expm1(self.epsilon) + 2 * self.delta) / (math.exp(self.epsilon) + 1)
            if (self.epsilon < 700)
            else 1.0
        )

    @property
    def area(self) -> float:
        """The largest area under an attack's curve, from above (`g` rises: right-hand sums)."""
        points = 2000
        return sum(self.true_positive_rate((i + 1) / points) for i in range(points)) / points
