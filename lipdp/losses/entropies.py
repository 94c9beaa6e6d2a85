"""Cross-entropies, and their focal forms."""

import functools
import math

import keras
import numpy as np
from keras import ops

from accountants.validation import check_number
from lipdp.losses.base import Tempered, align_targets, one_hot, squeeze_labels

__all__ = [
    "BinaryCrossentropy",
    "CategoricalCrossentropy",
    "Focal",
    "LogitAnnealing",
    "SparseCategoricalCrossentropy",
]


@keras.saving.register_keras_serializable("lipdp")
class SparseCategoricalCrossentropy(Tempered):
    """Softmax cross-entropy `CE(τz)/τ` of integer labels; gradient at most √2 an example.

    The gradient is `softmax(τz) − e_y`, whose norm is at most √2. A large temperature lets a
    network of small Lipschitz constant be confident.

    Args:
        temperature: `τ`.

    Shapes: labels `(batch, ...)` of integers in `[0, classes)`; logits `(batch, ..., classes)`.

    Raises:
        ValueError: `temperature` is not a positive, finite number.

    >>> loss = SparseCategoricalCrossentropy(temperature=10.0)
    >>> round(loss.bound(3), 4)
    1.4142
    """

    def call(self, y_true, y_pred):
        return (
            ops.sparse_categorical_crossentropy(
                squeeze_labels(y_true, y_pred), self.temperature * y_pred, from_logits=True
            )
            / self.temperature
        )

    def bound(self, classes: int) -> float:
        return math.sqrt(2.0)


@keras.saving.register_keras_serializable("lipdp")
class CategoricalCrossentropy(Tempered):
    """Softmax cross-entropy `CE(τz)/τ` of targets in the simplex; gradient at most √2.

    Args:
        temperature: `τ`.

    Shapes: targets and logits `(batch, ..., classes)`.

    Raises:
        ValueError: `temperature` is not a positive, finite number.

    >>> round(CategoricalCrossentropy().bound(3), 4)
    1.4142
    """

    targets = "simplex"

    def call(self, y_true, y_pred):
        return (
            ops.categorical_crossentropy(y_true, self.temperature * y_pred, from_logits=True)
            / self.temperature
        )

    def bound(self, classes: int) -> float:
        return math.sqrt(2.0)


@keras.saving.register_keras_serializable("lipdp")
class BinaryCrossentropy(Tempered):
    """Sigmoid cross-entropy `BCE(τz)/τ`, mean over the outputs; gradient at most `1/√C`.

    Args:
        temperature: `τ`.

    Shapes: targets in [0, 1] and logits `(batch, ..., C)`.

    Raises:
        ValueError: `temperature` is not a positive, finite number.

    >>> BinaryCrossentropy().bound(4)
    0.5
    """

    targets = "unit"

    def call(self, y_true, y_pred):
        entropy = ops.binary_crossentropy(
            align_targets(y_true, y_pred), self.temperature * y_pred, from_logits=True
        )
        return ops.mean(entropy, axis=-1) / self.temperature

    def bound(self, classes: int) -> float:
        return 1.0 / math.sqrt(classes)


@keras.saving.register_keras_serializable("lipdp")
class Focal(Tempered):
    """Focal loss `−(1 − p)^γ·ln(p)/τ` with `p = softmax(τz)_y` (Lin et al., ICCV 2017).

    Examples that are classified well weigh less. With `s = softmax(τz)` the gradient is
    `((1−p)^γ + γ·p·(1−p)^(γ−1)·ln(1/p))·(s − e_y)`, as `p` is not held constant, and
    `‖s − e_y‖ ≤ √2·(1−p)`. So it is at most
    `√2·max_p[(1−p)^(γ+1) + γ·p·(1−p)^γ·ln(1/p)]`, which two classes attain: 1.4784, 1.5967,
    1.6993 and 1.8592 for `γ` = 1, 2, 3 and 5.

    Args:
        gamma: `γ`, at least 0; 0 is the cross-entropy.
        temperature: `τ`.

    Shapes: labels `(batch, ...)` of integers in `[0, classes)`; logits `(batch, ..., classes)`.

    Raises:
        ValueError: an argument is out of range.

    >>> round(Focal(gamma=2.0).bound(10), 4)
    1.5966
    """

    def __init__(
        self,
        gamma: float = 2.0,
        temperature: float = 1.0,
        reduction: str = "sum_over_batch_size",
        name: str | None = None,
    ) -> None:
        super().__init__(temperature, reduction=reduction, name=name)
        self.gamma = check_number(gamma, "gamma", zero=True)

    def call(self, y_true, y_pred):
        hot = one_hot(y_true, y_pred)
        return _focal_entropy(hot, self.temperature * y_pred, self.gamma) / self.temperature

    def bound(self, classes: int) -> float:
        return math.sqrt(2.0) * _focal_peak(self.gamma)

    def get_config(self) -> dict:
        return {**super().get_config(), "gamma": self.gamma}


@keras.saving.register_keras_serializable("lipdp")
class LogitAnnealing(Focal):
    """Focal loss with the own logit lowered: `p = softmax(τ(z − ξ·e_y))_y`.

    The offset `ξ` asks for a margin, the exponent stops asking once there is one (Lai et al.,
    "Enhancing Certified Robustness via Block Reflector Orthogonal Layers and Logit Annealing
    Loss", ICML 2025, with `τ` = 1/0.75, `ξ` = 2√2 and `γ` = 5). A shift of the logits by a
    constant leaves the bound of `Focal`.

    Args:
        gamma: `γ`, at least 0.
        offset: `ξ`, at least 0, in units of the logits.
        temperature: `τ`.

    Shapes: as for `Focal`.

    Raises:
        ValueError: an argument is out of range.

    >>> round(LogitAnnealing(gamma=5.0).bound(10), 4)
    1.8591
    """

    def __init__(
        self,
        gamma: float = 5.0,
        offset: float = 2.0 * math.sqrt(2.0),
        temperature: float = 1.0,
        reduction: str = "sum_over_batch_size",
        name: str | None = None,
    ) -> None:
        super().__init__(gamma, temperature, reduction=reduction, name=name)
        self.offset = check_number(offset, "offset", zero=True)

    def call(self, y_true, y_pred):
        hot = one_hot(y_true, y_pred)
        logits = self.temperature * (y_pred - self.offset * hot)
        return _focal_entropy(hot, logits, self.gamma) / self.temperature

    def bound(self, classes: int) -> float:
        return super().bound(classes)

    def get_config(self) -> dict:
        return {**super().get_config(), "offset": self.offset}


def _focal_entropy(hot, logits, gamma):
    """`−(1 − p)^γ·ln p` of one-hot rows, by the log-odds `d` of `p`.

    `ln p` and `ln(1 − p)` are each a softplus of `d`: no difference cancels, which far from the
    own class would be multiplied by `ln p`, and no power of zero has an infinite slope.
    """
    others = ops.logsumexp(ops.where(hot > 0, -1e30, logits), axis=-1)
    odds = ops.sum(hot * logits, axis=-1) - others
    return ops.exp(-gamma * ops.softplus(odds)) * ops.softplus(-odds)


@functools.cache
def _focal_peak(gamma):
    """`max over p in [0, 1] of (1−p)^(γ+1) + γ·p·(1−p)^γ·ln(1/p)`, from above, within 1e-7.

    On a cell [a, b] the powers are largest at a, and `p·ln(1/p)`, which rises up to p = 1/e and
    falls behind, at the point of the cell that is nearest to 1/e. Cells whose bound is below a
    value that is attained are dropped, the others are split.
    """
    low, high = np.arange(64) / 64, np.arange(1, 65) / 64
    while True:
        middle = 0.5 * (low + high)
        attained = max(1.0, np.max(_focal_slope(gamma, middle, middle)))  # 1 at p = 0
        upper = _focal_slope(gamma, low, np.clip(np.exp(-1.0), low, high))
        if np.max(upper) <= attained + 1e-7 or np.min(high - low) < 1e-300:
            return float(np.max(upper)) * (1.0 + 1e-9)
        keep = upper > attained
        low, middle, high = low[keep], middle[keep], high[keep]
        low, high = np.concatenate([low, middle]), np.concatenate([middle, high])


def _focal_slope(gamma, p, q):
    entropy = -q * np.log(q)
    return np.exp((gamma + 1) * np.log1p(-p)) + gamma * np.exp(gamma * np.log1p(-p)) * entropy
