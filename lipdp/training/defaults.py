"""What a run does where its user says nothing: batches, epochs, clip, optimizer and learning rate.

Each choice is a function of what is public: the network, the number of examples, the budget and the
epochs that were asked for. None looks at the data. The numbers were found by evidence, which is on
the page "Defaults" of the documentation.
"""

import dataclasses
import math
from typing import Any

import keras
from keras import ops

from accountants import Budget, PoissonSampling
from accountants.sampling import Sampling
from lipdp import losses

__all__ = [
    "CERTIFIED_CLIP",
    "PlannedDecay",
    "TrainingPlan",
    "choose_batches",
    "default_loss",
    "default_optimizer",
]

#: Steps of a run, and passes over the data, where nothing else is asked for.
_STEPS, _EPOCHS = 500, 20
#: The least batch size, and the largest share of the examples.
_LEAST_BATCH, _LARGEST_SHARE = 256, 0.25
#: What the noise of all steps moves the weights by, in norm; see `TrainingPlan.learning_rate`.
_DISTANCE = {"per layer": 30.0, "certified": 10.0}
_MOMENTUM, _AVERAGING = 0.9, 0.98
#: In the certified way: clip of the loss gradient, and temperature of a cross-entropy.
CERTIFIED_CLIP, _TEMPERATURE = 0.2, 20.0
#: The cross-entropies that Keras has on probabilities, too, and what makes these.
_HEADS = {
    "binary_crossentropy": ("sigmoid", keras.losses.BinaryCrossentropy),
    "categorical_crossentropy": ("softmax", keras.losses.CategoricalCrossentropy),
    "sparse_categorical_crossentropy": ("softmax", keras.losses.SparseCategoricalCrossentropy),
}
#: Signal over noise below which a run is hopeless.
_HOPELESS = 3.0


def choose_batches(num_examples: int, epochs: int | None = None) -> tuple[PoissonSampling, int]:
    """How batches are drawn, and for how many epochs.

    A larger batch carries less noise, as long as there are steps enough to learn in: 500 of them.
    Small data sets are read more often, in batches of at most a quarter of the examples.

    Args:
        num_examples: how many examples there are.
        epochs: those that were asked for; None lets them be chosen, too.

    >>> choose_batches(60_000)
    (PoissonSampling(batch_size=2400), 20)
    >>> choose_batches(1_500)
    (PoissonSampling(batch_size=256), 85)
    """
    wanted = num_examples * (_EPOCHS if epochs is None else epochs) / _STEPS
    most = max(1, int(num_examples * _LARGEST_SHARE))
    batch_size = min(most, max(_LEAST_BATCH, int(wanted)))
    chosen = max(1, round(_STEPS * batch_size / num_examples))
    return PoissonSampling(batch_size=batch_size), chosen if epochs is None else epochs


def default_loss(loss: Any, way: str, activation: str = "") -> Any:
    """The loss of a name: with a temperature for certified bounds; on probabilities where layers
    clip their own gradients and the network ends in such.

    Args:
        loss: as `compile` takes it; all but names of cross-entropies are as `losses.get` has them.
        way: `"per layer"`, `"certified"`, or `""` where nothing is chosen.
        activation: the last one of the network, in small letters.

    >>> default_loss("binary_crossentropy", "per layer", "sigmoid").from_logits
    False
    """
    made = losses.get(loss)
    if not isinstance(loss, str) or not losses.takes_logits(made):
        return made
    head, on_probabilities = _HEADS.get(loss, (None, None))
    if way == "per layer" and head == activation:
        return on_probabilities()
    if way == "certified" and hasattr(made, "temperature"):
        return type(made)(temperature=_TEMPERATURE)
    return made


class PlannedDecay(keras.optimizers.schedules.LearningRateSchedule):
    """A learning rate that is decided when a run is planned, and falls to zero along a cosine.

    Args:
        rate: at the first step of the run; None until a run is planned.
        steps: of the run.
        start: how many steps the optimizer had taken before.
    """

    def __init__(self, rate: float | None = None, steps: int = 1, start: int = 0) -> None:
        self.rate, self.steps, self.start = rate, steps, start

    def __call__(self, step):
        if self.rate is None:
            return ops.convert_to_tensor(0.0)
        done = (ops.cast(step, "float32") - self.start) / self.steps
        return self.rate * 0.5 * (1.0 + ops.cos(math.pi * ops.clip(done, 0.0, 1.0)))

    def get_config(self):
        return {"rate": self.rate, "steps": self.steps, "start": self.start}


def default_optimizer(learning_rate: Any = None) -> keras.optimizers.Optimizer:
    """SGD with momentum and averaged weights; its learning rate is found when a run is planned,
    unless it is given.
    """
    rate = PlannedDecay() if learning_rate is None else learning_rate
    return keras.optimizers.SGD(rate, momentum=_MOMENTUM, use_ema=True, ema_momentum=_AVERAGING)


@dataclasses.dataclass(frozen=True)
class TrainingPlan:
    """What was chosen for a run, with reasons; print it.

    Attributes:
        way: `"per layer"` or `"certified"`.
        num_examples: how many examples there are.
        budget: what may be spent, or None.
        sampling: how batches are drawn.
        epochs, steps: of the run; as many steps as the budget allows.
        noise_multiplier: with which the run spends the budget.
        weights, layers: how many numbers are trained, and in how many groups.
        noise_norm: expected norm of the noise of one update, before the learning rate.
        signal: the most that all steps can add up to, where all examples agree, over the norm of
            the noise of all steps; no data set is so kind.
        linear_weights: how many numbers a linear model of the same inputs would train.
        own_optimizer: whether the optimizer was given, and no learning rate is chosen.
    """

    way: str
    num_examples: int
    budget: Budget | None
    sampling: Sampling
    epochs: int
    steps: int
    noise_multiplier: float
    weights: int
    layers: int
    noise_norm: float
    signal: float
    linear_weights: int
    own_optimizer: bool = False

    @property
    def learning_rate(self) -> float | None:
        """Of the first step; None where the optimizer was given.

        It is `c·(1 − momentum) / (noise_norm·√steps)`: at this rate the noise of all steps together
        moves the weights by about `c`, in norm, whatever the budget. `c` is 30 with per-layer
        clipping, where updates come in units of the thresholds, and 10 for certified bounds.
        """
        if self.own_optimizer:
            return None
        if self.noise_norm == 0:
            return 0.1
        distance = _DISTANCE[self.way] * (1 - _MOMENTUM)
        return distance / (self.noise_norm * math.sqrt(max(1, self.steps)))

    @property
    def hopeless(self) -> str | None:
        """What to change, where the noise drowns whatever the data could say; else None."""
        if self.signal >= _HOPELESS or not self.steps:
            return None
        advice = []
        if 2 * self.linear_weights < self.weights:
            gain = math.sqrt(self.weights / self.linear_weights)
            advice.append(
                f"a linear model on fixed features ({self.linear_weights:,} weights have "
                f"{gain:.0f} times the signal of {self.weights:,})"
            )
        factor = math.ceil(10 * _HOPELESS / max(self.signal, 1e-9))
        advice += [
            f"more examples (about {min(factor, 10**6):,} times as many)",
            "a larger ε",
            "larger batches and more epochs",
        ]
        return (
            f"At best, the signal of all {self.steps} steps is {self.signal:.2g} times their "
            f"noise: {self.num_examples:,} examples and this budget cannot teach {self.weights:,} "
            f"weights. What helps most: {'; '.join(advice[:3])}."
        )

    def __str__(self) -> str:
        own = isinstance(self.sampling, PoissonSampling)
        rows = [
            (
                "way of bounding",
                self.way,
                "each layer clips its own gradient"
                if self.way == "per layer"
                else "every layer has a proven bound",
            ),
            (
                "sampling",
                repr(self.sampling),
                f"{self.steps} steps: larger batches carry less noise, fewer steps learn less"
                if own
                else "as was asked for",
            ),
            ("epochs", f"{self.epochs}", f"{self.num_examples:,} examples"),
            (
                "noise multiplier",
                f"{self.noise_multiplier:.4g}",
                "as given" if self.budget is None else f"at most {self.budget} is spent",
            ),
            (
                "learning rate",
                "as given" if self.own_optimizer else f"{self.learning_rate:.3g}, to 0",
                "of your own optimizer"
                if self.own_optimizer
                else "at this rate the noise of all steps moves the weights by about "
                f"{_DISTANCE[self.way]:g}, in norm",
            ),
            (
                "signal over noise",
                f"{self.signal:.3g}",
                f"at best, for {self.weights:,} weights in {self.layers} groups",
            ),
        ]
        wide = [max(len(row[i]) for row in rows) for i in range(2)]
        lines = [f"{a:<{wide[0]}}  {b:<{wide[1]}}  {c}" for a, b, c in rows]
        return "\n".join(lines + ([self.hopeless] if self.hopeless else []))
