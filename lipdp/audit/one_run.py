"""A lower bound on ε from one training run (Steinke, Nasr and Jagielski 2023).

Canaries are examples that the audit adds to the training set, each by the toss of a fair coin.
After training each has a score, and the auditor guesses the coins of those that score highest
("in") and lowest ("out"). Private training cannot let many guesses come true: how many is bounded
below by two theorems, neither of which asks how the scores came about. A score that sees nothing
gives a weak bound, never a wrong one.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from accountants.validation import check_integer, check_probability
from lipdp import losses
from lipdp.audit.claims import Claim
from lipdp.autodiff import gradient
from lipdp.data.opening import as_array
from lipdp.rich_text import RichText
from lipdp.training.clipping import clip_rows

__all__ = [
    "OneRun",
    "OneRunResult",
    "Watch",
    "epsilon_lower_bound",
    "gaussian_lower_bound",
    "orthogonal_canaries",
    "p_value",
    "p_value_of_curve",
]

# Canaries that are looked at together.
_ROWS = 4096
# Largest ε that is reported: no number of canaries reaches it.
_MOST = 100.0


# --- statistics -----------------------------------------------------------------------------


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Bound of the probability of so many correct guesses if training is (ε, δ)-private.

    Of `m` coins, `r` are guessed and `v` of the guesses are right. With `W` binomial of `r` trials
    of probability `q = e^ε/(1 + e^ε)`,

        P(at least v right) ≤ P(W ≥ v) + 2·m·δ·max_{1≤i≤v} P(v > W ≥ v − i)/i.

    That is Corollary 5.4 of Steinke, Nasr and Jagielski ("Privacy Auditing with One (1) Training
    Run", NeurIPS 2023). For δ = 0: reveal the coins one after another. Whatever the trained model
    and the coins so far, the odds of the next one are within `e^±ε` of even, by Bayes' rule, so
    each guess is right with probability at most `q`, and their number is dominated by `W`. For
    δ > 0 that fails, coin by coin, on events of probability at most 2δ: the number of right
    guesses is dominated by `W + F`, with an integer `F ≥ 0` of mean at most 2mδ. Where `F = i`,
    it makes a difference only if `v > W ≥ v − i`; no distribution of `F` does more than the best
    single `i`.

    Raises:
        TypeError, ValueError: not `0 ≤ correct ≤ guesses ≤ canaries`, or ε or δ out of range.

    >>> round(p_value(canaries=100, guesses=10, correct=9, epsilon=0.0, delta=0.0), 4)
    0.0107
    """
    from scipy import stats

    m, r, v = _counts(canaries, guesses, correct)
    Claim(epsilon, delta)
    q = 1 / (1 + math.exp(-epsilon))
    beyond = stats.binom.sf(v - 1, r, q)
    if delta == 0 or v == 0:
        return float(beyond)
    steps = np.arange(1, v + 1)
    between = stats.binom.sf(v - 1 - steps, r, q) - beyond
    return float(min(1.0, beyond + 2 * m * delta * (between / steps).max()))


def epsilon_lower_bound(
    canaries: int, guesses: int, correct: int, delta: float, confidence: float = 0.95
) -> float:
    """The largest ε that so many correct guesses refute: with this confidence, training is not
    (ε, δ)-private for any smaller one; 0 if nothing is refuted.

    >>> round(epsilon_lower_bound(1000, 100, 75, delta=1e-4), 3)  # as published
    0.673

    Raises:
        TypeError, ValueError: as for `p_value`; `confidence` is not between 0 and 1.
    """
    level = 1 - check_probability(confidence, "confidence")
    below, _ = _boundary(lambda e: p_value(canaries, guesses, correct, e, delta) < level, _MOST)
    return below


def p_value_of_curve(
    canaries: int,
    guesses: int,
    correct: int,
    true_positive_rate: Callable[[float], float],
) -> float:
    """Bound of the probability of so many correct guesses if no attack exceeds a trade-off curve.

    `g = true_positive_rate` bounds the true positives of any test of one coin by its false
    positives, for guesses of either kind. Let `c` be the number of right guesses among `r` of `m`
    coins, and `p_i = P(c = i)`. Then for each t

        Σ_{i≥t} i·p_i / m  ≤  g( Σ_{i≥t−1} (r − i)·p_i / m ).

    For fix a coin j and all others. "Guess j is right and c ≥ t" and, with coin j turned, "guess
    j is wrong and c ≥ t − 1" are the same set of outcomes, so the probability of the first is at
    most `g` of that of the second. The mean over coins of the first is the left-hand side, and
    g, being concave, may be drawn before the mean (Jensen). The argument is that of Mahloujifar,
    Melis and Chaudhuri ("Auditing f-Differential Privacy in One Run", 2024).

    With `R_t` and `H_t` for the two sums from t on, `H_{t−1} ≥ g⁻¹(R_t)`: if `P(c ≥ v) = β`, then
    fewer right guesses must have their probability, too. All of β at v, and below only what is
    required, as far down as possible, leaves the least: mass at i adds to R and H in the ratio
    `i : (r − i)`, which falls with i. If even that adds up to more than 1, β is impossible. The
    result is the smallest β that is.

    Args:
        canaries, guesses, correct: m, r and v.
        true_positive_rate: g, concave, `x ↦ 1 − f(x)` of a symmetric trade-off function f.

    Raises:
        TypeError, ValueError: not `0 ≤ correct ≤ guesses ≤ canaries`.

    >>> perfect = p_value_of_curve(100, 20, 20, Claim(1.0, 0.0).true_positive_rate)
    >>> 0.001 < perfect < 0.005  # of independent guesses: (e/(1 + e))^20 = 0.0019
    True
    """
    m, r, v = _counts(canaries, guesses, correct)

    # In logarithms: a p-value of 1e-12 is as good as 0.
    _, above = _boundary(
        lambda x: not _refuted(m, r, v, true_positive_rate, 10.0 ** (x - 12)), 12.0
    )
    return 10.0 ** (above - 12)


def _refuted(m, r, v, true_positive_rate, beta):
    """True if `P(c ≥ v) = beta` is impossible under the curve."""
    right, wrong = v * beta / m, (r - v) * beta / m
    for i in range(v - 1, -1, -1):
        # g⁻¹(y) = f(1 − y), as f is its own inverse.
        needed = 1.0 - true_positive_rate(max(0.0, 1.0 - right))
        if needed <= wrong:
            return False  # nothing more is required
        right += i / (r - i) * (needed - wrong)
        wrong = needed
        if right + wrong > r / m:
            return True
    return False


def gaussian_lower_bound(
    canaries: int, guesses: int, correct: int, confidence: float = 0.95
) -> float:
    """The largest μ that so many correct guesses refute, among Gaussian mechanisms: N(0, 1)
    against N(μ, 1), where μ is one over the noise multiplier of an unsampled run.

    >>> round(gaussian_lower_bound(1000, 100, 95), 1)
    0.8

    Raises:
        TypeError, ValueError: as for `p_value_of_curve` and `epsilon_lower_bound`.
    """
    m, r, v = _counts(canaries, guesses, correct)
    level = 1 - check_probability(confidence, "confidence")
    below, _ = _boundary(
        lambda mu: _refuted(m, r, v, functools.partial(_gaussian, mu), level), 10.0
    )
    return below


def _gaussian(mu, rate):
    from scipy import special

    return float(special.ndtr(special.ndtri(rate) + mu))


def _boundary(holds, highest):
    """Two close values; what holds for small ones holds at the first, not at the second."""
    if not holds(0.0):
        return 0.0, 0.0
    low, high = 0.0, min(1.0, highest)
    while holds(high):
        if high == highest:
            return highest, highest
        low, high = high, min(2 * high, highest)
    while high - low > 1e-5 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low, high


def _counts(canaries, guesses, correct):
    canaries = check_integer(canaries, "canaries")
    guesses = check_integer(guesses, "guesses")
    correct = check_integer(correct, "correct", least=0)
    if not correct <= guesses <= canaries:
        raise ValueError(
            "`correct` must be at most `guesses`, and `guesses` at most `canaries`; got "
            f"correct={correct}, guesses={guesses}, canaries={canaries}."
        )
    return canaries, guesses, correct


# --- canaries and scores --------------------------------------------------------------------


def orthogonal_canaries(
    shape: Sequence[int], classes: int, count: int | None = None, scale: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Canaries that are as easy to tell apart as can be: one entry lit, the rest zero.

    In a linear head their gradients are orthogonal from one entry to the next, and have the norm
    of the bound if `scale` reaches the radius of the network's `BallProjection`. Every entry is
    used with one label before any is used with the next.

    Args:
        shape: of one input.
        classes: number of labels.
        count: how many; all `entries · classes` by default.
        scale: value of the lit entry.

    Returns:
        `(x, y)`, float32 `(count, *shape)` and integers `(count,)`.

    Raises:
        ValueError: there are not so many.

    >>> x, y = orthogonal_canaries((2, 2), classes=3, count=5)
    >>> x.shape, y.tolist()
    ((5, 2, 2), [0, 0, 0, 0, 1])
    """
    entries = math.prod(shape)
    count = entries * classes if count is None else count
    if not 1 <= count <= entries * classes:
        raise ValueError(
            f"`count` must lie between 1 and {entries * classes}, entries times classes; got "
            f"{count!r}."
        )
    index = np.arange(count)
    x = np.zeros((count, entries), np.float32)
    x[index, index % entries] = scale
    return x.reshape(count, *shape), index // entries


class OneRun:
    """An audit of one training run: canaries, their coins, and what the scores say.

    Args:
        x, y: the canaries, as arrays like those of the training set (`x` may be a dict).
            `orthogonal_canaries` makes strong ones; mislabelled examples are realistic ones.
        seed: None for fresh entropy. Who knows the coins must not choose the scores.

    Raises:
        TypeError, ValueError: not arrays of the same length.

    The training set's size is public. Where canaries are left out it tells their number, which
    helps nobody by more than a rounding error; `blank` does without even that.

    >>> from lipdp import PrivateModel, FullBatch, layers
    >>> network = keras.Sequential([
    ...     keras.Input((50,)), layers.BallProjection(1.0),
    ...     layers.SpectralDense(4, use_bias=False)])
    >>> model = PrivateModel(network, noise_multiplier=0.05, sampling=FullBatch(), clip=0.1)
    >>> model.compile(keras.optimizers.SGD(0.1), loss="sparse_categorical_crossentropy")
    >>> audit = OneRun(*orthogonal_canaries((50,), classes=4), seed=0)
    >>> x, y = audit.insert(np.ones((10, 50)), np.zeros(10, int))
    >>> watch = audit.watch()
    >>> history = model.fit(x, y, verbose=0, callbacks=[watch])
    >>> result = audit.result(watch.scores, model, delta=1e-5)
    >>> 1 < result.epsilon < model.spent(1e-5).epsilon
    True
    """

    def __init__(self, x: Any, y: Any, seed: int | None = None) -> None:
        self.y = as_array(y, "y")
        self.x = tree.map_structure(lambda a: as_array(a, "x"), x)
        if len(self.y) == 0 or any(len(a) != len(self.y) for a in tree.flatten(self.x)):
            raise ValueError(
                "canaries `x` and `y` must have one row each; got "
                f"{[len(a) for a in tree.flatten(self.x)]} and {len(self.y)}."
            )
        self.included = np.random.default_rng(seed).integers(0, 2, len(self.y)).astype(bool)

    def __len__(self) -> int:
        return len(self.y)

    def insert(self, x: Any, y: Any) -> tuple[Any, np.ndarray]:
        """The training set with the canaries whose coin fell so, behind it.

        For schemes whose neighbours add or remove an example: `PoissonSampling`, `FullBatch`.

        Raises:
            TypeError, ValueError: arrays that canaries cannot stand beside.
        """
        return self._joined(x, y, self.included)

    def blank(self, x: Any, y: Any) -> tuple[Any, np.ndarray, np.ndarray]:
        """The training set with all canaries, and weights for `fit(sample_weight=)`: 0 for those
        whose coin fell so, which are blanks. For every scheme, `ShuffledEpochs` among them; the
        model needs `compile(max_sample_weight=1.0)`.
        """
        x, y = self._joined(x, y, np.ones(len(self), bool))
        weights = np.ones(len(y), np.float32)
        weights[len(y) - len(self) :] = self.included
        return x, y, weights

    def _joined(self, x, y, chosen):
        def joined(array, canaries):
            array = as_array(array, "x")
            if array.shape[1:] != canaries.shape[1:]:
                raise ValueError(
                    f"canaries have rows of shape {canaries.shape[1:]}; got a training set of "
                    f"{array.shape[1:]}."
                )
            return np.concatenate([array, canaries[chosen].astype(array.dtype)])

        tree.assert_same_structure(x, self.x)
        return tree.map_structure(joined, x, self.x), joined(y, self.y)

    def watch(self) -> "Watch":
        """A callback for `fit` that scores the canaries."""
        return Watch(self)

    def result(
        self,
        scores: Any,
        claim: Any = None,
        *,
        delta: float | None = None,
        confidence: float = 0.95,
        guesses: Sequence[int] | None = None,
    ) -> "OneRunResult":
        """The result that the scores prove.

        Args:
            scores: `(canaries,)`, higher for those that look included. Any function of what the
                training released and of the canaries will do, but not of the coins.
            claim: the trained `PrivateModel`, or a `Claim`, to hold the scores against.
            delta: of the lower bound; by default the claim's.
            confidence: with which everything in the result holds at once.
            guesses: numbers of guesses to try, half of them "in" and half "out". The best is
                reported, and each pays its share of the confidence. By default m/2, m/4, ... m/64.

        Raises:
            TypeError, ValueError: scores of a wrong shape or not finite, no delta, or numbers of
                guesses that are odd or too large.
        """
        scores = np.asarray(scores, np.float64)
        m = len(self)
        if scores.shape != (m,) or not np.isfinite(scores).all():
            raise ValueError(
                f"`scores` must hold one finite number for each of the {m} canaries; got shape "
                f"{scores.shape}."
            )
        if claim is not None and not isinstance(claim, Claim):
            claim = Claim.of(claim, delta)
        delta = claim.delta if delta is None and claim is not None else delta
        if delta is None:
            raise ValueError("`delta` must be given where there is no claim.")
        check_probability(confidence, "confidence")
        if guesses is None:
            guesses = sorted({2 * max(1, m // (2 * 2**i)) for i in range(1, 7)} & {*range(m + 1)})
        if not guesses or any(not 2 <= r <= m or r % 2 for r in guesses):
            raise ValueError(f"`guesses` must be even numbers from 2 to {m}; got {guesses!r}.")

        # Ties fall as the coins' order does, which says nothing about them.
        order = np.argsort(scores, kind="stable")
        share = (1 - confidence) / (2 * len(guesses))  # two tests of each
        best = []
        for r in guesses:
            out, within = order[: r // 2], order[m - r // 2 :]
            v = int(self.included[within].sum() + (~self.included[out]).sum())
            epsilon = epsilon_lower_bound(m, r, v, delta, 1 - share)
            mu = gaussian_lower_bound(m, r, v, 1 - share)
            p = None
            if claim is not None:
                p = p_value(m, r, v, min(claim.epsilon, _MOST), claim.delta)
                p = min(p, p_value_of_curve(m, r, v, claim.true_positive_rate))
                p = min(1.0, p * 2 * len(guesses))
            best.append((epsilon, mu, p, r, v))
        epsilon, mu, _, r, v = max(best, key=lambda row: (row[0], row[1], row[4] / row[3]))
        mu = max(row[1] for row in best)
        return OneRunResult(
            canaries=m,
            guesses=r,
            correct=v,
            epsilon=epsilon,
            gaussian_epsilon=_gaussian_epsilon(mu, delta),
            delta=delta,
            confidence=confidence,
            claimed_epsilon=None if claim is None else claim.epsilon,
            p_value=None if claim is None else min(row[2] for row in best),
        )


def _gaussian_epsilon(mu, delta):
    from accountants.curves import GaussianCurve

    return GaussianCurve(mu).epsilon(delta) if mu and delta else 0.0


@dataclasses.dataclass(frozen=True)
class OneRunResult(RichText):
    """The result of a one-run audit, all of it at once with `confidence`.

    Attributes:
        canaries: m.
        guesses, correct: of the number of guesses that gives the best `epsilon`.
        epsilon: training is not (ε, `delta`)-private for any smaller ε. Holds for every mechanism.
        gaussian_epsilon: the same, if training is a Gaussian mechanism of some noise: a much
            sharper bound for `FullBatch` and `ShuffledEpochs`, an indication for others.
        delta, confidence: see there.
        claimed_epsilon: what training claims, or None.
        p_value: how probable so many right guesses are, at most, if the claim is true (all of it:
            its trade-off curve, where it has one).
    """

    canaries: int
    guesses: int
    correct: int
    epsilon: float
    gaussian_epsilon: float
    delta: float
    confidence: float
    claimed_epsilon: float | None
    p_value: float | None

    @property
    def accuracy(self) -> float:
        """Share of the guesses that are right."""
        return self.correct / self.guesses

    @property
    def violated(self) -> bool:
        """True if the claim is refuted. An honest run is, with probability `1 − confidence`."""
        return self.p_value is not None and self.p_value < 1 - self.confidence

    def to_dict(self) -> dict:
        """Plain numbers, ready for JSON."""
        return {
            **dataclasses.asdict(self), "accuracy": self.accuracy, "violated": self.violated
        }  # fmt: skip

    def __rich__(self):
        from rich.text import Text

        lines = [
            f"{self.correct} of {self.guesses} guesses are right ({self.accuracy:.1%}), of "
            f"{self.canaries} canaries",
            f"ε ≥ {self.epsilon:.3g} at δ = {self.delta:g}, with confidence "
            f"{self.confidence:.0%}; ≥ {self.gaussian_epsilon:.3g} if the mechanism is Gaussian",
        ]
        if self.p_value is not None:
            verdict = "REFUTED" if self.violated else "not refuted"
            lines.append(
                f"claimed: ε = {self.claimed_epsilon:.4g}: {verdict} (p-value {self.p_value:.2g})"
            )
        return Text("\n".join(lines))


class Watch(keras.callbacks.Callback):
    """Scores canaries while `fit` trains a `PrivateModel`, from what training releases.

    After each step, the weights before and after it are known to the auditor. A canary moves the
    outputs on itself against its own loss gradient, so each step adds to its score

        −⟨g, f(x; w_after) − f(x; w_before)⟩,

    with `g` the canary's clipped loss gradient at `w_before`. For a linear head and plain SGD that
    is the inner product of the noisy gradient sum with the canary's own gradient, up to constants:
    the optimal test, where canaries are orthogonal and in every batch. Momentum and projections
    blur it, and so does the noise of steps in which a canary did not take part: the auditor does
    not know which, so that the bounds are weak for `PoissonSampling` and `ShuffledEpochs`.

    Attributes:
        scores: `(canaries,)`, that sum: white-box.
        loss_scores: `(canaries,)`, by how much the canary's loss has fallen: black-box; once
            training has ended.
    """

    def __init__(self, audit: OneRun) -> None:
        super().__init__()
        self.audit = audit
        self.scores = np.zeros(len(audit))
        self.loss_scores = None
        self._first = None

    def on_train_begin(self, logs=None):
        self._outputs, self._slopes, values = self._look()
        self._first = values if self._first is None else self._first

    def on_train_batch_end(self, batch, logs=None):
        outputs, slopes, _ = self._look()
        axes = tuple(range(1, outputs.ndim))
        self.scores -= np.sum(self._slopes * (outputs - self._outputs), axis=axes)
        self._outputs, self._slopes = outputs, slopes

    def on_train_end(self, logs=None):
        self.loss_scores = self._first - self._look()[2]

    def _look(self):
        """Outputs on the canaries, their clipped loss gradients, their losses."""
        model = self.model  # which on JAX brings the weights up to date
        clip, rows = model.current_clip(), []
        for start in range(0, len(self.audit), _ROWS):
            piece = slice(start, start + _ROWS)
            x = tree.map_structure(lambda a: a[piece], self.audit.x)  # noqa: B023
            y = ops.convert_to_tensor(self.audit.y[piece])
            outputs = model.graph(x, training=False)
            values, slopes = gradient(
                lambda z: losses.per_example(model.private_loss, y, z),  # noqa: B023
                outputs,
            )
            slopes, _ = clip_rows(slopes, clip, ops.ones(len(outputs)))
            rows.append([ops.convert_to_numpy(a) for a in (outputs, slopes, values)])
        outputs, slopes, values = map(np.concatenate, zip(*rows, strict=True))
        return outputs.astype(np.float64), slopes.astype(np.float64), values.astype(np.float64)
