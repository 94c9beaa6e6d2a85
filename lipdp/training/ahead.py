"""The plan of a run, before there are data."""

from typing import Any

import keras

from accountants import Budget
from accountants.validation import check_integer
from lipdp.training.defaults import TrainingPlan, choose_batches
from lipdp.training.model import PrivateModel
from lipdp.training.plan import constants_of, step_of, training_plan

__all__ = ["plan"]


def plan(
    network: keras.Model,
    *,
    num_examples: int,
    budget: Budget,
    loss: Any = "sparse_categorical_crossentropy",
    epochs: int | None = None,
    **arguments: Any,
) -> TrainingPlan:
    """What `PrivateModel` would choose for a run, with reasons. Nothing is spent or trained.

    Args:
        network: what is to be trained.
        num_examples: how many examples there are.
        budget: `lipdp.Budget(epsilon, delta)`.
        loss: as for `compile`.
        epochs: those that the run may take; by default they are chosen, too.
        arguments: further ones of `PrivateModel`, which are then not chosen.

    Returns:
        `TrainingPlan`: print it. Its parts are what `PrivateModel`, `compile` and `fit` take.

    Raises:
        TypeError, ValueError, UnknownLayerError: as `PrivateModel`.

    >>> network = keras.Sequential([keras.Input((20,)), keras.layers.Dense(2)])
    >>> found = plan(network, num_examples=10_000, budget=Budget(1.0, 1e-5))
    >>> found.sampling, found.epochs, found.way
    (PoissonSampling(batch_size=400), 20, 'per layer')
    """
    num_examples = check_integer(num_examples, "num_examples")
    if epochs is not None:
        epochs = check_integer(epochs, "epochs")
    model = PrivateModel(network, budget=budget, **arguments)
    model.compile(loss=loss)
    if model.sampling is None:
        model.sampling, epochs = choose_batches(num_examples, epochs)
    model.sampling.validate(num_examples)
    epochs = 1 if epochs is None else epochs
    steps = epochs * model.sampling.steps_per_epoch(num_examples)
    noise_constants = model.noise.plan(model.sampling, num_examples, steps)
    model.spending.plan(model.sampling, num_examples, steps, steps)
    model.spending.settle()
    step = step_of(model, constants_of(model, num_examples, noise_constants, ()))
    return training_plan(model, step, num_examples, epochs, steps)
