"""Membership inference: how well attacks tell training examples from others, beside the ceiling.

An attack gives every example a score, higher for those that look like members. Reported are the
area under its curve, the largest advantage (true minus false positives) and the true positives at
few false positives, each with a confidence interval, over all examples and class by class.

What differential privacy claims bounds each of them. An attack beyond its ceiling tells that
something is wrong, with the training or with the comparison: members and others must come from
the same distribution. It is no proof, as the members of one run are not independent of one
another given the model; `OneRun` gives one.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from accountants.validation import check_integer, check_number, check_probability
from lipdp.audit.claims import Claim
from lipdp.data.opening import as_array, open_source
from lipdp.inspection.check import final_activation
from lipdp.rich_text import RichText

__all__ = ["Membership", "MembershipRow", "Signals", "infer_membership", "lira"]

# No probability is closer to 0 or 1: logarithms stay finite.
_TINY = 1e-12
# From so many shadow models inside (and outside) on, each example has a variance of its own.
_OWN_VARIANCE = 32


# --- what a model shows of an example -------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Signals:
    """Outputs of a classifier for examples whose labels are known.

    Attributes:
        logits: `(examples, classes)`; logarithms of the probabilities, where a network gives those.
        labels: `(examples,)`.
        outputs: `"logits"` or `"probabilities"`: what the network was taken to give.
    """

    logits: np.ndarray
    labels: np.ndarray
    outputs: str

    @classmethod
    def of(
        cls,
        model: keras.Model,
        x: Any,
        y: Any,
        from_logits: bool | None = None,
        temperature: float = 1.0,
    ) -> "Signals":
        """The signals of a model.

        Args:
            model: a classifier, or a `PrivateModel` of one. One output is taken for that of the
                second of two classes.
            x, y: examples; labels as integers or one-hot rows.
            from_logits: what the network gives. By default probabilities, if it ends in a softmax
                or sigmoid or if all its rows are distributions, and logits otherwise.
            temperature: logits are multiplied by it: as in the loss of the training.

        Raises:
            TypeError, ValueError: arrays that do not fit the model, labels that are none, or
                outputs that are not finite.
        """
        network = getattr(model, "network", model)
        if not getattr(network, "inputs", None):
            raise TypeError(
                "`model` must be a Sequential or functional keras.Model, or a PrivateModel; got "
                f"{type(network).__name__}."
            )
        if len(network.outputs) > 1:
            raise ValueError(
                f"`model` must have one output; this one has {len(network.outputs)}. Give the one "
                "to attack: keras.Model(network.inputs, output)."
            )
        temperature = check_number(temperature, "temperature")
        source = open_source(x, y, network)
        outputs = np.asarray(network.predict(source.x, verbose=0), np.float64)
        if outputs.ndim != 2:
            raise ValueError(
                f"membership inference needs one output row an example; got {outputs.shape}."
            )
        if not np.isfinite(outputs).all():
            raise ValueError("the model's outputs hold NaN or infinite values.")
        if from_logits is None:
            from_logits = not _gives_probabilities(network, outputs)
        if not from_logits and (outputs.min() < 0 or outputs.max() > 1 + 1e-3):
            raise ValueError(
                "the outputs are not probabilities: they range from "
                f"{outputs.min():.3g} to {outputs.max():.3g}."
            )
        single = outputs.shape[1] == 1
        if from_logits:
            logits = np.hstack([np.zeros_like(outputs), outputs]) if single else outputs
        else:
            rows = np.hstack([1 - outputs, outputs]) if single else outputs
            logits = np.log(np.clip(rows, _TINY, None))
        labels = _labels(as_array(y, "y"), logits.shape[1])
        kind = "logits" if from_logits else "probabilities"
        return cls(logits * (temperature if from_logits else 1.0), labels, kind)

    @property
    def probabilities(self) -> np.ndarray:
        """`(examples, classes)`."""
        from scipy import special

        return special.softmax(self.logits, axis=1)

    @property
    def loss(self) -> np.ndarray:
        """Cross-entropy of each example."""
        from scipy import special

        return -self._of_label(special.log_softmax(self.logits, axis=1))

    @property
    def entropy(self) -> np.ndarray:
        """Entropy of each prediction: it asks for no label."""
        p = np.clip(self.probabilities, _TINY, 1.0)
        return -np.sum(p * np.log(p), axis=1)

    @property
    def modified_entropy(self) -> np.ndarray:
        """`−(1 − p_y)·ln p_y − Σ_{c≠y} p_c·ln(1 − p_c)`, which is 0 for a confident prediction
        only if it is right (Song and Mittal, USENIX Security 2021).
        """
        p = np.clip(self.probabilities, _TINY, 1 - _TINY)
        right = self._of_label(p)
        wrong = p * np.log(1 - p)
        return -(1 - right) * np.log(right) - (wrong.sum(axis=1) - self._of_label(wrong))

    @property
    def confidence(self) -> np.ndarray:
        """`ln(p_y/(1 − p_y))`, close to normal where the loss is not (Carlini et al. 2022)."""
        from scipy import special

        others = self.logits.copy()
        others[np.arange(len(others)), self.labels] = -np.inf
        return self._of_label(self.logits) - special.logsumexp(others, axis=1)

    def _of_label(self, rows):
        return rows[np.arange(len(rows)), self.labels]


def _gives_probabilities(network, outputs):
    _, activation = final_activation(network)
    if activation in ("softmax", "sigmoid"):
        return True
    distributions = outputs.min() >= 0 and np.allclose(outputs.sum(axis=1), 1.0, atol=1e-3)
    return bool(distributions and outputs.shape[1] > 1)


def _labels(y, classes):
    if y.ndim == 2 and y.shape[1] == classes and classes > 1:
        if not np.isin(y, (0, 1)).all() or (y.sum(axis=1) != 1).any():
            raise ValueError("`y` must hold labels or one-hot rows; got other rows.")
        y = y.argmax(axis=1)
    labels = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    if labels.ndim != 1 or (labels != np.floor(labels)).any():
        raise ValueError(f"`y` must hold integer labels or one-hot rows; got shape {y.shape}.")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"labels must lie between 0 and {classes - 1}; got {labels.min()} to {labels.max()}."
        )
    return labels.astype(int)


# --- attacks --------------------------------------------------------------------------------


def _logistic_scores(members, others, seed):
    """Scores of a logistic regression on loss, entropy and logits, each example by the model of a
    fold that has not seen it.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import StratifiedKFold, cross_val_predict
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ImportError(
            "The attack by logistic regression needs scikit-learn: pip install 'lipdp[audit]', or "
            "leave 'logistic' out of `attacks`."
        ) from error
    features = [np.column_stack([s.loss, s.entropy, s.logits]) for s in (members, others)]
    truth = np.repeat([1, 0], [len(members.labels), len(others.labels)])
    folds = min(5, len(members.labels), len(others.labels))
    if folds < 2:
        raise ValueError("the attack by logistic regression needs two examples of each kind.")
    scores = cross_val_predict(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
        np.vstack(features),
        truth,
        cv=StratifiedKFold(folds, shuffle=True, random_state=seed),
        method="decision_function",
    )
    return scores[truth == 1], scores[truth == 0]


_THRESHOLDS = {
    "loss": lambda signals: -signals.loss,
    "entropy": lambda signals: -signals.entropy,
    "modified entropy": lambda signals: -signals.modified_entropy,
}
ATTACKS = (*_THRESHOLDS, "logistic")


def lira(
    train: Callable[[np.ndarray, np.ndarray], keras.Model],
    model: keras.Model,
    members: tuple[Any, Any],
    nonmembers: tuple[Any, Any],
    shadows: int = 16,
    seed: int | None = None,
    **signals: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the likelihood-ratio attack (Carlini et al., "Membership Inference Attacks From
    First Principles", 2022), online: from shadow models trained with and without each example.

    Every example is in half of the shadow models. A score is the log ratio of two normal
    densities, fitted to its confidences in models with it and in those without, at its confidence
    in the model under attack. Below 64 shadow models one variance is shared by all examples.

    Args:
        train: trains a model on arrays as the one under attack was.
        model: the model under attack.
        members, nonmembers: `(x, y)` arrays.
        shadows: number of shadow models, even.
        seed: of the choice of their training sets.
        signals: for `Signals.of`: `from_logits`, `temperature`.

    Returns:
        Scores of the members and of the others, for `infer_membership(scores={"LiRA": ...})`.

    Raises:
        TypeError, ValueError: `shadows` is odd or below 2, or data that do not fit.
    """
    if check_integer(shadows, "shadows", least=2) % 2:
        raise ValueError(f"`shadows` must be even; got {shadows!r}.")
    pairs = [(as_array(x, "x"), as_array(y, "y")) for x, y in (members, nonmembers)]
    x, y = (np.concatenate(arrays) for arrays in zip(*pairs, strict=True))
    # For each example, in which half of the shadow models it is.
    places = np.random.default_rng(seed).random((shadows, len(y))).argsort(axis=0)
    inside = places < shadows // 2
    confidences = np.empty((shadows, len(y)))
    for chosen, row in zip(inside, confidences, strict=True):
        row[:] = Signals.of(train(x[chosen], y[chosen]), x, y, **signals).confidence
    seen = Signals.of(model, x, y, **signals).confidence
    scores = _log_density(seen, confidences, inside) - _log_density(seen, confidences, ~inside)
    count = len(pairs[0][1])
    return scores[:count], scores[count:]


def _log_density(seen, confidences, chosen):
    count = chosen.sum(axis=0)
    mean = np.where(chosen, confidences, 0).sum(axis=0) / count
    squares = np.where(chosen, (confidences - mean) ** 2, 0).sum(axis=0) / count
    variance = squares if count[0] >= _OWN_VARIANCE else np.full_like(squares, squares.mean())
    variance = variance + _TINY
    return -((seen - mean) ** 2) / (2 * variance) - np.log(variance) / 2


# --- figures --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self):
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclasses.dataclass(frozen=True)
class Rate:
    """True positives at no more than some share of false positives.

    Attributes:
        false_positive_rate: what was asked for.
        true_positive_rate: an `Interval` (Clopper and Pearson).
        most_false_positives: upper end of the interval of the share of false positives that this
            threshold has: with few non-members far above what was asked for.
        ceiling: the most true positives that the claim allows there, or None.
    """

    false_positive_rate: float
    true_positive_rate: Interval
    most_false_positives: float
    ceiling: float | None


@dataclasses.dataclass(frozen=True)
class MembershipRow:
    """One attack on one group of examples.

    Attributes:
        attack: its name.
        group: `"all"`, or `"class 3"`.
        members, nonmembers: how many examples.
        auc: area under the curve (interval: DeLong, DeLong and Clarke-Pearson 1988).
        advantage: largest difference of true and false positives (interval: Massart's form of the
            Dvoretzky-Kiefer-Wolfowitz inequality for both distributions).
        rates: a `Rate` for each share of false positives.
        beyond: which figures exceed their ceiling, with their whole interval.
    """

    attack: str
    group: str
    members: int
    nonmembers: int
    auc: Interval
    advantage: Interval
    rates: tuple[Rate, ...]
    beyond: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Membership(RichText):
    """The result of `infer_membership`.

    Attributes:
        rows: a `MembershipRow` for each attack and group.
        outputs: what the network was taken to give, `"logits"` or `"probabilities"`.
        confidence: of each interval by itself.
        auc_ceiling, advantage_ceiling: what the claim allows, or None.
    """

    rows: tuple[MembershipRow, ...]
    outputs: str
    confidence: float
    auc_ceiling: float | None
    advantage_ceiling: float | None

    @property
    def violated(self) -> bool:
        """True if some figure exceeds its ceiling, its interval widened for their number."""
        return any(row.beyond for row in self.rows)

    def to_dict(self) -> dict:
        """Plain lists, numbers and strings, ready for JSON."""
        return {**dataclasses.asdict(self), "violated": self.violated}

    def __rich__(self):
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(
            title=f"Membership inference ({self.confidence:.0%} intervals)", title_justify="left"
        )
        rates = self.rows[0].rates
        for column in ("attack", "group"):
            table.add_column(column, no_wrap=True)
        figures = [f"TPR at {r.false_positive_rate:.1%}" for r in rates]
        for column in ("in / out", "AUC", "advantage", *figures):
            table.add_column(column, justify="right", overflow="fold")
        for row in self.rows:
            table.add_row(
                row.attack,
                row.group,
                f"{row.members} / {row.nonmembers}",
                str(row.auc),
                str(row.advantage),
                *(str(r.true_positive_rate) for r in row.rates),
                style="red" if row.beyond else None,
            )
        if self.auc_ceiling is not None:
            ceilings = [f"{self.auc_ceiling:.3f}", f"{self.advantage_ceiling:.3f}"]
            ceilings += [f"{r.ceiling:.3f}" for r in rates]
            table.add_section()
            table.add_row("ceiling of the claim", "", "", *ceilings)
        lines = [f"the network's outputs were taken for {self.outputs}"]
        lines += [
            f"BEYOND THE CEILING: {row.attack}, {row.group}: {', '.join(row.beyond)}"
            for row in self.rows
            if row.beyond
        ]
        if self.auc_ceiling is not None and not self.violated:
            lines.append("no attack is beyond the ceiling")
        return Group(table, Text("\n".join(lines)))


def infer_membership(
    model: keras.Model,
    members: tuple[Any, Any],
    nonmembers: tuple[Any, Any],
    *,
    claim: Any = None,
    attacks: Sequence[str] = ATTACKS,
    scores: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
    false_positive_rates: Sequence[float] = (0.001, 0.01),
    confidence: float = 0.95,
    from_logits: bool | None = None,
    temperature: float = 1.0,
    seed: int = 0,
) -> Membership:
    """Attacks a classifier.

    Args:
        model: a classifier, or a `PrivateModel` of one.
        members: `(x, y)`, examples that it was trained on.
        nonmembers: `(x, y)`, others of the same distribution.
        claim: a `Claim`, or the trained `PrivateModel`: what the attacks are held against.
        attacks: some of `"loss"`, `"entropy"`, `"modified entropy"` (thresholds) and `"logistic"`
            (regression on loss, entropy and logits; needs scikit-learn).
        scores: further attacks, `{name: (scores of members, scores of others)}`, as `lira` gives.
        false_positive_rates: where true positives are reported.
        confidence: of each interval.
        from_logits, temperature: as for `Signals.of`.
        seed: of the folds of the regression.

    Raises:
        ImportError: `"logistic"` without scikit-learn.
        TypeError, ValueError: arguments or arrays that are not as described.

    >>> network = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
    >>> x, y = np.random.default_rng(0).normal(size=(100, 2)), np.arange(100) % 2
    >>> found = infer_membership(network, (x[:50], y[:50]), (x[50:], y[50:]), attacks=["loss"])
    >>> [row.group for row in found.rows]
    ['all', 'class 0', 'class 1']
    """
    confidence = check_probability(confidence, "confidence")
    if not attacks and not scores or any(a not in ATTACKS for a in attacks):
        raise ValueError(f"`attacks` must be some of {ATTACKS}; got {attacks!r}.")
    false_positive_rates = [
        check_probability(rate, "false_positive_rates") for rate in false_positive_rates
    ]
    inside, outside = (
        Signals.of(model, x, y, from_logits, temperature) for x, y in (members, nonmembers)
    )
    if inside.outputs != outside.outputs:
        raise ValueError("members and others give different kinds of outputs; give `from_logits`.")
    found = {
        name: tuple(map(_THRESHOLDS[name], (inside, outside)))
        for name in attacks
        if name in _THRESHOLDS
    }
    if "logistic" in attacks:
        found["logistic"] = _logistic_scores(inside, outside, seed)
    for name, pair in (scores or {}).items():
        pair = tuple(np.asarray(s, np.float64) for s in pair)
        shapes = tuple(s.shape for s in pair)
        if shapes != (inside.labels.shape, outside.labels.shape) or not all(
            np.isfinite(s).all() for s in pair
        ):
            raise ValueError(f"`scores[{name!r}]` must hold one finite number for each example.")
        found[name] = pair

    groups = {"all": (slice(None), slice(None))}
    for label in np.unique(np.concatenate([inside.labels, outside.labels])):
        chosen = (inside.labels == label, outside.labels == label)
        if min(mask.sum() for mask in chosen) >= 2:
            groups[f"class {label}"] = chosen

    if claim is not None and not isinstance(claim, Claim):
        claim = Claim.of(claim)
    ceilings = None if claim is None else (claim.area, claim.advantage)
    figures = len(found) * len(groups) * (2 + len(false_positive_rates))
    rows = []
    for name, (high, low) in found.items():
        for group, (a, b) in groups.items():
            pair = high[a], low[b]
            row = _row(name, group, pair, false_positive_rates, confidence, claim)
            if claim is not None:
                wide = 1 - (1 - confidence) / figures
                strict = _row(name, group, pair, false_positive_rates, wide, claim)
                row = dataclasses.replace(row, beyond=_beyond(strict, claim, ceilings))
            rows.append(row)
    return Membership(tuple(rows), inside.outputs, confidence, *(ceilings or (None, None)))


def _beyond(row, claim, ceilings):
    figures = [("AUC", row.auc.low, ceilings[0]), ("advantage", row.advantage.low, ceilings[1])]
    for rate in row.rates:
        # Held against what is allowed at the most false positives that there may be.
        most = claim.true_positive_rate(rate.most_false_positives)
        name = f"TPR at {rate.false_positive_rate:.1%}"
        figures.append((name, rate.true_positive_rate.low, most))
    return tuple(name for name, low, ceiling in figures if low > ceiling)


def _row(attack, group, scores, rates, confidence, claim):
    members, others = scores
    return MembershipRow(
        attack,
        group,
        len(members),
        len(others),
        _auc(members, others, confidence),
        _advantage(members, others, confidence),
        tuple(_rate(members, others, rate, confidence, claim) for rate in rates),
        (),
    )


def _auc(members, others, confidence):
    """Mann and Whitney's statistic, and DeLong's variance: of the mean, over members, of the share
    of others below them, and the other way around.
    """
    from scipy import special, stats

    m, n = len(members), len(others)
    ranks = stats.rankdata(np.concatenate([members, others]))
    below = (ranks[:m] - stats.rankdata(members)) / n
    above = 1 - (ranks[m:] - stats.rankdata(others)) / m
    value = float(below.mean())
    if m < 2 or n < 2:
        return Interval(value, 0.0, 1.0)
    variance = below.var(ddof=1) / m + above.var(ddof=1) / n
    # A perfect attack has no variance; the interval of a share of min(m, n) still has a width.
    least = 1 - ((1 - confidence) / 2) ** (1 / min(m, n))
    half = float(special.ndtri((1 + confidence) / 2)) * math.sqrt(variance)
    half = max(half, least if value in (0.0, 1.0) else 0.0)
    return Interval(value, max(0.0, value - half), min(1.0, value + half))


def _advantage(members, others, confidence):
    thresholds = np.unique(np.concatenate([members, others]))
    true, false = (
        1 - np.searchsorted(np.sort(s), thresholds, side="left") / len(s) for s in (members, others)
    )
    value = float(max(0.0, (true - false).max()))
    # Both empirical distributions are that close to the true ones everywhere, at once.
    half = sum(math.sqrt(math.log(4 / (1 - confidence)) / (2 * len(s))) for s in (members, others))
    return Interval(value, max(0.0, value - half), min(1.0, value + half))


def _rate(members, others, rate, confidence, claim):
    allowed = int(rate * len(others))
    threshold = np.sort(others)[len(others) - 1 - allowed]
    right = int((members > threshold).sum())
    wrong = int((others > threshold).sum())
    most = _shares(wrong, len(others), confidence).high
    ceiling = None if claim is None else claim.true_positive_rate(rate)
    return Rate(rate, _shares(right, len(members), confidence), most, ceiling)


def _shares(count, total, confidence):
    """The interval of Clopper and Pearson."""
    from scipy import special

    tail = (1 - confidence) / 2
    low = special.betaincinv(count, total - count + 1, tail) if count else 0.0
    high = special.betaincinv(count + 1, total - count, 1 - tail) if count < total else 1.0
    return Interval(count / total, float(low), float(high))
