"""What is decided once, before the first step of a run: checks, data, noise, who takes part.

`make_plan` establishes it phase by phase and returns it as a value. Nothing is spent meanwhile, so
whatever cannot be trained on fails here. The steps only read.
"""

import dataclasses
import functools
import math
import warnings
from typing import Any

import keras
import numpy as np
from keras import ops

from accountants.queries import mechanism_from_dict
from accountants.validation import check_integer
from lipdp import losses
from lipdp.bounds.projections import Projection
from lipdp.bounds.rule import noted_norms
from lipdp.data.batches import DrawnBatches, check_weights, padding_multiple
from lipdp.data.groups import Groups, check_groups
from lipdp.data.opening import open_source
from lipdp.data.repeats import repeats
from lipdp.data.sources import Arrays, Stream
from lipdp.devices import Devices, broadcast_from_chief, digest, require_same_run
from lipdp.inputs import input_names, like_inputs
from lipdp.inspection.check import check_trainable, check_units
from lipdp.noise import resolve_allocation
from lipdp.training import steps
from lipdp.training.defaults import PlannedDecay, TrainingPlan, choose_batches
from lipdp.training.spending import ActiveRun
from lipdp.training.steps.private_step import (
    PrivateStep,
    StepConstants,
    noise_of_weights,
    sensitivities,
)
from lipdp.training.trial import (
    build_losses,
    try_augmentation,
    try_loss,
    try_metrics,
    try_network,
    try_validation,
)

__all__ = [
    "Plan",
    "allocation_of",
    "constants_of",
    "make_plan",
    "run_fingerprint",
    "step_of",
    "training_plan",
]


# A row that occurs so often is asked about.
_MANY = 10


@dataclasses.dataclass(frozen=True)
class Plan:
    """One run, ready to begin.

    Attributes:
        step: all that its steps read.
        run: how many steps may be paid for.
        batches: draws them.
        devices: that share out the rows of a batch.
        steps_per_call: how many steps one call of Keras' train function takes.
        new_memory: whether the noise has other variables now than those of the last plan.
        trainable_variables, non_trainable_variables: of the model, in the order that its steps
            count on.
        validation_data: as `try_validation` gives them back.
        frozen: of the weights whose norms were measured for this run, by their numbers among the
            non-trainable variables, a digest of the value.
        epochs: how many.
        training: what was chosen, and why, where the sampling or the learning rate was.
    """

    step: PrivateStep
    run: ActiveRun
    batches: DrawnBatches
    devices: Devices
    steps_per_call: int
    new_memory: bool
    trainable_variables: list
    non_trainable_variables: list
    validation_data: Any
    frozen: dict[int, str]
    epochs: int
    training: TrainingPlan | None

    def relied_on(self, trainable: list, non_trainable: list) -> list:
        """What a step relies on to be inside or as it was, of the variables or of their values."""
        return [*trainable, *(non_trainable[i] for i in self.frozen)]

    def inside(self, number: int, value: Any) -> Any:
        """The value with which a step may begin, where the one of `relied_on` with this number may
        have been assigned.

        Raises:
            RuntimeError: it is frozen, and another one than was measured.
        """
        if number < len(self.trainable_variables):
            constraint = self.trainable_variables[number].constraint
            return constraint(value) if isinstance(constraint, Projection) else value
        place, planned = list(self.frozen.items())[number - len(self.trainable_variables)]
        if digest(ops.convert_to_numpy(value)) != planned:
            raise RuntimeError(
                f"The frozen weight {self.non_trainable_variables[place].path!r} was assigned "
                "since this run began. Its norm was measured then, and the noise would not fit the "
                "new value: assign it before fit(...), or end this run and begin a new one, which "
                "measures it again. The step has not run."
            )
        return value


def make_plan(
    model: Any,
    x: Any,
    y: Any,
    epochs: int | None,
    steps_per_epoch: int | None = None,
    sample_weight: Any = None,
    class_weight: dict[int, float] | None = None,
    groups: Any = None,
    steps_per_call: int = 1,
    validation: tuple[Any, int | None, int | None] = (None, None, None),
) -> Plan:
    """The plan of a run of a compiled `PrivateModel`; calibrates the noise of its first one.

    Args:
        model: the model.
        x, y, epochs, steps_per_epoch, sample_weight, class_weight, groups: as for `fit`. Without
            epochs there are as many as are chosen together with the sampling, or one.
        steps_per_call: how many steps run, and are paid for, together.
        validation: data that `fit` evaluates, its batch size, and how many batches.

    Raises:
        BudgetExceeded: not one step is left, or too little to calibrate noise to.
        LedgerError: the ledger is in use, or cannot be read or written.
        TypeError, ValueError: data or arguments that cannot be trained on.
    """
    backend = steps.backend()
    backend.check_precision(model)
    devices = backend.devices(model)
    all_gather = functools.partial(backend.all_gather, model)

    examples, weights, groups, epochs = _open_data(
        model, x, y, epochs, sample_weight, class_weight, groups, devices
    )
    units = len(examples if groups is None else groups)  # how many are drawn from, and protected
    per_epoch = _steps_per_epoch(model.sampling, units, steps_per_epoch, steps_per_call)
    frozen_norms, digests = _check_network(model, examples)
    with backend.scope(model):  # metrics have variables, which are made here
        validation_data = _try(model, examples, *validation)
    if devices.processes > 1:
        _follow_chief(model.spending, all_gather, devices)

    planned = per_epoch * epochs
    noise_constants = model.noise.plan(model.sampling, units, planned)
    run = model.spending.plan(model.sampling, units, planned, per_epoch, steps_per_call)
    step = step_of(model, constants_of(model, units, noise_constants, frozen_norms))
    training = None
    if model.chosen_epochs or isinstance(model.optimizer._learning_rate, PlannedDecay):
        training = training_plan(model, step, units, epochs, run.allowed)
        _settle_rate(model.optimizer, training)
    with backend.scope(model):
        new_memory = model.noise.begin(model.network.trainable_variables)

    position = (sum(earlier.steps for earlier in run.earlier), model.fits)
    source = model.random_source
    if devices.processes > 1:
        facts = run_fingerprint(model, step, examples, weights, groups, run, position)
        shared = require_same_run(all_gather, devices, facts)
        source = shared if source.seed is None else source
    batches = DrawnBatches(
        examples,
        model.sampling,
        source,
        position,
        per_epoch,
        padding_multiple(
            model.sampling,
            step.constants.expected_batch_size,
            model.physical_batch_size,
            model.jit_compile or keras.backend.backend() == "jax",
            devices.replicas,
            1 if groups is None else groups.most,
        ),
        weights,
        draw_noise=functools.partial(model.noise.draw, step.entries),
        steps_taken=lambda: run.paid,
        devices=devices,
        groups=groups,
    )
    return Plan(
        step,
        run,
        batches,
        devices,
        steps_per_call,
        new_memory,
        model.trainable_variables,
        model.non_trainable_variables,
        validation_data,
        {
            i: digests[id(v)]
            for i, v in enumerate(model.non_trainable_variables)
            if id(v) in digests
        },
        epochs,
        training,
    )


def training_plan(
    model: Any, step: PrivateStep, num_examples: int, epochs: int, steps: int
) -> TrainingPlan:
    """What was chosen for a run of so many steps, once the noise of a step is known."""
    groups = sensitivities(step)
    stds, scales = noise_of_weights(step, groups)
    divisor, sizes = step.constants.expected_batch_size, []
    square = 0.0
    for std, scale, variable in zip(stds, scales, step.network.trainable_variables, strict=True):
        sizes.append(math.prod(variable.shape))
        std = float(std) / (divisor if scale is None else divisor * float(scale))
        square += sizes[-1] * std * std
    if step.units is None:
        largest = math.sqrt(sum(float(bound) ** 2 for bound, _ in groups))
    else:
        largest = math.sqrt(len(groups))  # in units of the thresholds
    inputs = sum(math.prod(n or 1 for n in t.shape[1:]) for t in step.network.inputs)
    noise = math.sqrt(square)
    return TrainingPlan(
        way="certified" if step.units is None else "per layer",
        num_examples=num_examples,
        budget=model.budget,
        sampling=model.sampling,
        epochs=epochs,
        steps=steps,
        noise_multiplier=model.noise_multiplier,
        weights=sum(sizes),
        layers=len(groups),
        noise_norm=noise,
        signal=largest * math.sqrt(steps) / noise if noise else math.inf,
        linear_weights=inputs * (step.network.output_shape[-1] or 1),
        own_optimizer=not isinstance(model.optimizer._learning_rate, PlannedDecay),
    )


def _settle_rate(optimizer, training):
    """Gives the optimizer the learning rate that was left to be chosen, and warns of a run that
    is hopeless.
    """
    if not training.own_optimizer:
        decay = optimizer._learning_rate
        decay.rate, decay.steps = training.learning_rate, max(1, training.steps)
        decay.start = int(optimizer.iterations)
    if training.hopeless:
        warnings.warn(training.hopeless, stacklevel=2)


def step_of(model: Any, constants: StepConstants | None = None) -> PrivateStep:
    """What the steps of a compiled model read, as it is configured now."""
    allocation = allocation_of(model)
    return PrivateStep(
        network=model.graph,
        optimizer=model.optimizer,
        loss=model.private_loss,
        clip=model.clip_state,
        units=model.units,
        noise=model.noise,
        allocation=allocation if isinstance(allocation, str) else tuple(allocation),
        sample_weight_bound=model.sample_weight_bound,
        augmentation=model.augmentation,
        physical_batch_size=model.physical_batch_size,
        update_metrics=model.update_metrics,
        constants=constants,
    )


def allocation_of(model: Any) -> str | list[float]:
    """How noise is shared over the weights, or over the layers that clip their own gradients.

    Raises:
        ValueError: `allocation` does not fit them.
    """
    if model.units is not None:
        return resolve_allocation(
            model.allocation, model.units.names(), "layer with trained weights"
        )
    return resolve_allocation(model.allocation, [v.path for v in model.network.trainable_variables])


def run_fingerprint(
    model: Any,
    step: PrivateStep,
    examples: Any,
    weights: np.ndarray | None,
    groups: Groups | None,
    run: ActiveRun,
    position: tuple[int, ...],
) -> dict[str, Any]:
    """What must be the same in each process of a run, as JSON tells it."""
    some = np.unique(np.linspace(0, len(examples) - 1, 16).astype(int))
    inputs, targets = examples.take(some, len(some))
    optimizer = {k: v for k, v in step.optimizer.get_config().items() if k != "name"}
    settings = (
        step.clip.loss_gradient_bound,
        model.clip,
        model.allocation,
        step.sample_weight_bound,
        step.physical_batch_size,
        step.augmentation is None,
    )
    mechanism = (model.sampling, step.constants, type(step.noise), model.random_source.seed)
    return {
        "data": [len(examples), digest(*keras.tree.flatten((inputs, targets)))],
        "sample weights": None if weights is None else digest(weights),
        "groups": None if groups is None else groups.digest(),
        "steps": [run.per_epoch, model.steps_per_execution, run.allowed, *position],
        "mechanism": repr(mechanism),
        "settings": repr(settings),
        "optimizer": repr((type(step.optimizer).__name__, optimizer)),
        "weights": digest(*map(ops.convert_to_numpy, step.network.weights)),
    }


# --- phases ---------------------------------------------------------------------------------------


def _check_network(model, examples):
    """Checks it, and tells the norms that were measured of its frozen weights, as `StepConstants`
    have them, and digests of these weights by their ids.
    """
    if model.units is not None:
        _check_units(model, examples)
        return (), {}
    with noted_norms() as noted:
        check_trainable(model.network)
    places = {id(v): i for i, v in enumerate(model.network.weights)}
    noted = [(v, *norm) for v, *norm in noted if id(v) in places]  # what a step can look after
    frozen_norms = tuple(dict.fromkeys((places[id(v)], *norm) for v, *norm in noted))
    return frozen_norms, {id(v): digest(ops.convert_to_numpy(v)) for v, *_ in noted}


def _open_data(model, x, y, epochs, sample_weight, class_weight, groups, devices):
    """The source of the examples, the weight of each, their groups, and how many epochs there are
    to be.
    """
    sampling = model.sampling
    in_order = sampling is not None and sampling.streamable
    examples = open_source(x, y, model.graph, model.outputs, stream=in_order)
    groups = check_groups(groups, examples, model.unit, model.examples_per_group)
    units = len(examples if groups is None else groups)
    if sampling is None:
        sampling, model.chosen_epochs = choose_batches(units, epochs)
        model.take_sampling(sampling)
    if epochs is None:
        epochs = model.chosen_epochs or 1
    target = _target_of(examples)
    shape = {k: v[0] for k, v in target.items()} if isinstance(target, dict) else target[0]
    losses.check_target_shape(model.private_loss, shape, model.graph.output_shape[1:])
    if isinstance(examples, Arrays):  # for others the shape of the targets is known, no more
        losses.check_targets(model.private_loss, examples.y, model.graph.output_shape[1:])
    if isinstance(examples, Stream) and devices.processes > 1:
        raise ValueError(
            "`x` must be arrays, or records of which any can be read, for training in several "
            "processes: each would have to read all of a stream."
        )
    try:
        model.sampling.validate(units)
    except ValueError as error:
        if groups is None:
            raise
        raise ValueError(f'{error} With unit="group" all of these count groups.') from None
    if groups is None:
        _warn_of_repeats(examples)
    weights = check_weights(sample_weight, class_weight, examples, model.max_sample_weight)
    return examples, weights, groups, epochs


def _warn_of_repeats(examples):
    """Asks about a row that occurs often, of arrays in memory: others would have to be read."""
    if not isinstance(examples, Arrays):
        return
    arrays = keras.tree.flatten((examples.x, examples.y))
    if not any(isinstance(a, np.memmap) for a in arrays) and repeats(arrays, _MANY):
        warnings.warn(
            f"Some row of `x` and `y` occurs {_MANY} times or more, and ε is for one row. Where "
            "such rows are one person's, that person's ε is the one of a group: "
            "accountants.epsilon(..., group_size=k). This message tells of the data and is not "
            "private: keep it where the data are.",
            stacklevel=2,
        )


def _check_units(model, examples):
    """Proves anew, for rows of the shapes of these, that they stay apart; and looks at the
    thresholds that the first step begins with.
    """
    rows, _ = examples.take(np.arange(0), 1)

    def like(name, tensor):
        array = rows[name] if isinstance(rows, dict) else rows
        return keras.KerasTensor((None, *array.shape[1:]), dtype=tensor.dtype)

    tensors = map(like, input_names(model.graph), model.graph.inputs)
    inputs = like_inputs(model.graph, list(tensors))
    found = check_units(model.graph, inputs)
    if [unit.layer for unit in found.units] != [unit.layer for unit in model.units.units]:
        raise RuntimeError("The layers that are trained have changed: call compile(...) again.")
    if found.order != model.units.order:
        model.units = dataclasses.replace(model.units, order=found.order)
    if not np.isfinite(ops.convert_to_numpy(model.clip_state.current())).all():
        raise ValueError("The thresholds of the layers are not all finite: make the model anew.")


def _target_of(examples):
    """Shape and type of the target of one example, of several outputs a dict of such pairs; nothing
    is read.
    """
    _, targets = examples.take(np.arange(0), 1)
    if isinstance(targets, dict):
        return {name: (y.shape[1:], y.dtype) for name, y in targets.items()}
    return targets.shape[1:], targets.dtype


def _try(model, examples, validation_data, batch_size, steps):
    """Whatever a step or an evaluation would fail at, on made-up rows. Gives back the validation
    data, with what was read of them.
    """
    target, output_shape = _target_of(examples), model.graph.output_shape[1:]
    in_range = _labels_in_range(model.private_loss, examples, output_shape)
    if model.tried != (target, in_range):
        try_network(model.graph)
        try_loss(model.private_loss, output_shape, target, in_range)
        try_metrics(model, target)
        build_losses(model, target)
        if model.augmentation is not None:
            try_augmentation(model.augmentation, model.graph)
        model.tried = target, in_range
    if validation_data is None:
        return None
    return try_validation(model, validation_data, batch_size, steps)


def _labels_in_range(loss, examples, output_shape):
    """Whether all labels are among the classes, for a loss that does not look itself; of several
    outputs each, by name. Of records that is not known.
    """

    def within(loss, y, classes):
        return not losses.is_known(loss) and bool(0 <= y.min() and y.max() < classes)

    if not isinstance(examples, Arrays):
        return False
    if not isinstance(loss, losses.Joint):
        return within(loss, examples.y, output_shape[-1])
    return {name: within(one, examples.y[name], own[-1]) for name, one, own, _ in loss.parts()}


def _steps_per_epoch(sampling, examples, asked, steps_per_call):
    per_epoch = sampling.steps_per_epoch(examples)
    if asked is not None:
        if sampling.fixed_epoch:
            raise ValueError(
                f"`steps_per_epoch` is fixed by {sampling!r}: {per_epoch} for {examples} examples."
            )
        per_epoch = check_integer(asked, "steps_per_epoch")
    if per_epoch % steps_per_call:
        raise ValueError(
            f"`steps_per_execution` must divide the {per_epoch} steps of an epoch, so that "
            f"what is paid for is what runs; got {steps_per_call}."
        )
    return per_epoch


def _follow_chief(spending, all_gather, devices):
    """Has every process count what the chief has spent, which keeps the ledger."""
    if devices.chief:
        spending.lock()
    runs = broadcast_from_chief(all_gather, devices, [run.to_dict() for run in spending.runs])
    if not devices.chief:
        spending.follow([mechanism_from_dict(run) for run in runs])


def constants_of(model, examples, noise_constants, frozen_norms):
    """The numbers of every step, once the noise multiplier is known."""
    clip, noise = model.clip_state, model.noise
    divisor = model.sampling.expected_batch_size(examples)
    gradient, count = clip.split(model.noise_multiplier, divisor)
    weights = sum(math.prod(v.shape) for v in model.network.trainable_variables)
    return StepConstants(
        noise_multiplier=model.noise_multiplier,
        gradient_noise_multiplier=noise.multiplier(gradient, weights),
        count_noise_multiplier=noise.multiplier(count, clip.counts) if clip.counts else 0.0,
        expected_batch_size=divisor,
        noise_constants=noise_constants,
        frozen_norms=frozen_norms,
    )
