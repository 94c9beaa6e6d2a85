"""The private step of every backend, in the order that the privacy argument needs.

A step is a function of the batch, of the weights, and of a `PrivateStep`: a frozen value with all
that was decided before. Nothing else is read, so that what a compiled step does can be told, and
compared, from outside.
"""

import dataclasses
import math
from collections.abc import Callable, Hashable
from typing import Any

import keras
import numpy as np
from keras import ops

from lipdp import losses
from lipdp.autodiff import gradient
from lipdp.bounds import gradient_bounds, norms
from lipdp.bounds.projections import certified_by, project, projected_later
from lipdp.bounds.rule import known_norms
from lipdp.bounds.walk import ROUNDING
from lipdp.data.augmentation import Augmentation
from lipdp.local.calls import LayerUnits
from lipdp.noise import GaussianNoise, standard_deviations
from lipdp.noise.gaussian_rng import standard_normal
from lipdp.training.clipping import (
    FixedClip,
    LayerThresholds,
    TrackedClip,
    clamp_weights,
    clip_rows,
    scale_rows,
)
from lipdp.training.rows import readable_inputs
from lipdp.training.steps.backend import Backend


@dataclasses.dataclass(frozen=True)
class StepConstants:
    """The numbers of every step of a run; public, and never a function of a batch.

    Attributes:
        noise_multiplier: of the joint release; what is accounted.
        gradient_noise_multiplier, count_noise_multiplier: those of the stds of its two parts, with
            what the noise adds for its rounding, or of what is fresh in a step of correlated
            noise; the second is 0 without adaptive clipping.
        expected_batch_size: the divisor of the sums.
        noise_constants: of the noise, where it is correlated.
        frozen_norms: what was measured of frozen weights: their numbers among the network's
            weights, what is measured of them, and the norms.
    """

    noise_multiplier: float
    gradient_noise_multiplier: float
    count_noise_multiplier: float
    expected_batch_size: float
    noise_constants: tuple[float, ...] = ()
    frozen_norms: tuple[tuple[int, Hashable, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class PrivateStep:
    """All that a private step reads beside its batch and the weights.

    Attributes:
        network: whose trainable weights are updated.
        optimizer: sees noisy gradients only.
        loss: of one example.
        clip: says to which norm rows of the loss gradient are clipped, or each unit's gradients.
        units: layers that clip their own gradients, `LayerUnits`; None where bounds are certified.
        noise: added to the sums.
        allocation: how noise is shared over the weights, as `standard_deviations` takes it.
        sample_weight_bound: most that an example can weigh; bounds start at the clip times this.
        augmentation: makes the views of an example, or None.
        physical_batch_size: most rows that are computed at once, or None.
        update_metrics: of outputs, losses, mask and weights of a batch; returns the logs.
        constants: of the run; None before one is planned.
    """

    network: keras.Model
    optimizer: keras.optimizers.Optimizer
    loss: losses.Loss
    clip: FixedClip | TrackedClip | LayerThresholds
    units: LayerUnits | None
    noise: GaussianNoise
    allocation: str | tuple[float, ...]
    sample_weight_bound: float
    augmentation: Augmentation | None
    physical_batch_size: int | None
    update_metrics: Callable[..., dict]
    constants: StepConstants | None = None

    @property
    def entries(self) -> int:
        """How many numbers a release has: those of the trainable weights, and a count."""
        sizes = (math.prod(v.shape) for v in self.network.trainable_variables)
        return sum(sizes) + self.clip.counts


def private_step(step: PrivateStep, data: tuple, backend: Backend) -> dict:
    """Takes one private step on one drawn batch; variables are updated in place.

    Args:
        step: what was decided before.
        data: what `DrawnBatch.as_data` gives.
        backend: the `Backend` in use.

    Returns:
        The metrics' results.
    """
    sums, logs = read_batch(step, data, backend)
    update_weights(step, data[0], sums, backend)
    return logs


def read_batch(step: PrivateStep, data: tuple, backend: Backend) -> tuple[list, dict]:
    """Takes the half of a step that reads the batch: forward pass, loss gradient of each example,
    clip of its rows, weights of the examples, pull-back of all rows at once; and the metrics.

    Returns:
        The sums that the noise is to hide: the clipped gradients' of each weight, and of an
        adaptive clip the count; and the metrics' results.
    """
    features, y, mask = data
    y = losses.readable_targets(step.loss, y, step.network.output_shape[1:])
    factors = {name: features[name] for name in ("weights", "shares") if name in features}
    if "shares" in factors:
        factors["shares"] = clamp_weights(factors["shares"], 1.0)
    clip = step.clip.current()

    def part(x, y, factors, mask):
        return gradient_sums(step, backend, clip, x, y, mask, **factors)

    rows = [features["inputs"], y, factors, mask]
    if step.physical_batch_size is None:
        sums, (outputs, values, within) = part(*rows)
    else:
        sums, (outputs, values, within) = backend.accumulate(part, rows, step.physical_batch_size)
    if step.clip.counts:
        # One example moves each sum of centred indicators by ½, as do all rows of a group.
        real = ops.reshape(ops.cast(mask, within.dtype), (-1,) + (1,) * (len(within.shape) - 1))
        centred = within - 0.5 * real
        if "shares" in factors:
            centred = scale_rows(centred, factors["shares"])
        sums = [*sums, ops.sum(centred, axis=0)]
    weights = factors.get("weights")
    if weights is not None:
        weights = clamp_weights(weights, step.sample_weight_bound)
    # Over the rows of all devices: noise is added to that, once.
    return backend.sum_over_replicas(sums), step.update_metrics(y, outputs, values, mask, weights)


def update_weights(step: PrivateStep, features: dict, sums: list, backend: Backend) -> None:
    """Takes the half of a step whose shapes no batch changes: sum over the expected batch size plus
    noise, optimizer, projection.

    Args:
        step, backend: as for `private_step`.
        features: the batch's key, and its noise where the host draws it.
        sums: what `read_batch` gave.
    """
    network, constants, key = step.network, step.constants, features["key"]
    divisor = constants.expected_batch_size
    variables = network.trainable_variables

    # Read from the weights that the forward pass used, before they change.
    stds, scales = noise_of_weights(step, sensitivities(step))
    if step.clip.counts:
        # Halves add up exactly; the shares of a group round, as gradients do.
        half = 0.5 * math.sqrt(step.clip.counts) * ROUNDING
        stds = [*stds, half * constants.count_noise_multiplier]
    if any(ops.is_tensor(std) for std in stds):
        stds = _synchronise(stds)
    noisy = step.noise.add(backend, features, sums, stds)
    updates = []
    for variable, total, scale in zip(variables, noisy[: len(variables)], scales, strict=True):
        update = total * (1.0 / divisor) if scale is None else total / (divisor * scale)
        if variable.regularizer is not None:
            # A penalty on the weights depends on no data: it comes after the noise.
            update = update + gradient(variable.regularizer, variable.value)[1]
        updates.append(update)

    # Probes are numbered behind the sums: no draw shares its stream with the noise.
    streams = iter(range(len(sums), 1_000_000))

    def certificate(matrix, expected):
        shape = norms.probe_shape(matrix.shape)
        probe = backend.compiled(standard_normal)(key, np.uint32(next(streams)), shape)
        return backend.compiled(norms.probable_norm_bound)(matrix, probe, expected)

    with projected_later():
        step.optimizer.apply(backend.on_first_replica(updates), variables)
    with certified_by(certificate, backend.compiled):
        project(variables)

    if step.clip.counts:
        step.clip.update(noisy[-1] / divisor + 0.5)


def noise_of_weights(step: PrivateStep, groups: list[tuple[Any, list[int]]]) -> tuple[list, list]:
    """Of each trainable weight the std of the noise on its sum, and what the noisy mean is divided
    by, or None; `groups` are the `sensitivities`.
    """
    bounds = [bound for bound, _ in groups]
    sizes = [math.prod(v.shape) for v in step.network.trainable_variables]
    stds_of_groups = standard_deviations(
        bounds,
        [sum(sizes[i] for i in group) for _, group in groups],
        step.constants.gradient_noise_multiplier,
        step.allocation,
    )
    scales_of_groups = update_scales(step, bounds)
    stds, scales = [None] * len(sizes), [None] * len(sizes)
    for std, scale, (_, group) in zip(stds_of_groups, scales_of_groups, groups, strict=True):
        for i in group:
            stds[i], scales[i] = std, scale
    return stds, scales


def sensitivities(step: PrivateStep) -> list[tuple[Any, list[int]]]:
    """Groups of trainable weights, by their numbers, each with the most that one example can move
    the sums of a group, in joint norm: a float or a scalar tensor.
    """
    if step.units is None:
        weights, start = step.network.weights, step.clip.current() * step.sample_weight_bound
        with known_norms((weights[i], *norm) for i, *norm in step.constants.frozen_norms):
            bounds = gradient_bounds(step.network, start, as_tensors=True)
        return [(bounds[v.path], [i]) for i, v in enumerate(step.network.trainable_variables)]
    thresholds = step.clip.current() * (step.sample_weight_bound * ROUNDING)
    # Where no noise could be scaled to one, the weights become NaN rather than public.
    thresholds = ops.where(thresholds > 1e-18, thresholds, math.nan)
    return [(thresholds[i], group) for i, group in enumerate(step.units.groups())]


def update_scales(step: PrivateStep, bounds: list) -> list:
    """What the noisy mean of each group is divided by, or None where it is the update itself.

    Thresholds may be of any size, and an update depends on none: a layer's is divided by its own.
    One std for all, or the least noise in all, is for gradients side by side as they are: all are
    divided by one number then. A layer whose threshold is small would else get noise that is many
    times its threshold, and after the division many times everybody's.
    """
    if step.units is None:
        return [None] * len(bounds)
    if step.allocation in ("global", "least"):
        return [ops.sqrt(sum(b * b for b in bounds) / len(bounds))] * len(bounds)
    return bounds


def gradient_sums(
    step: PrivateStep,
    backend: Backend,
    clip: Any,
    x: Any,
    y: Any,
    mask: Any,
    weights: Any = None,
    shares: Any = None,
) -> tuple[list, tuple]:
    """Sums the clipped examples' gradients, one tensor a weight.

    Args:
        step, backend: as for `private_step`.
        clip: as the step's clip says it now.
        x, y, mask: of the examples.
        weights: of the examples, `(batch,)`, or None.
        shares: in [0, 1], `(batch,)`: what an example counts of its group, or None.

    Returns:
        The sums; and outputs, losses and indicators of rows within the clip, one row an example.
    """
    views = step.augmentation
    targets = y
    if views is not None:
        targets, mask = keras.tree.map_structure(views.repeated, (y, mask))
        x = views(x)
    x, finite = readable_inputs(step.network, x)
    readable = mask * finite
    if weights is not None:
        weights = weights if views is None else views.repeated(weights)
        weights = clamp_weights(ops.cast(weights, "float32"), step.sample_weight_bound)
    if shares is not None:
        # Behind the clip, too: the mean over a group is then as short as each of its rows.
        shares = shares if views is None else views.repeated(shares)
        weights = shares if weights is None else weights * shares
    # The mean of an example's views is within the bound, as each of them is.
    share = 1.0 if views is None else 1.0 / views.views

    def losses_of(outputs):
        """Outputs and losses in float32, and the gradients as the network takes them."""
        z = ops.cast(outputs, "float32")
        values, slopes = gradient(lambda z: losses.per_example(step.loss, targets, z), z)
        return z, values, ops.cast(slopes, outputs.dtype)

    # Weights come behind the clip, which would undo them.
    if step.units is None:
        outputs, pull_back = backend.pull_back(step.network, x)
        outputs, values, gradients = losses_of(outputs)
        rows, within = clip_rows(gradients, clip, readable)
        rows = rows if weights is None else scale_rows(rows, weights)
        sums = pull_back(rows if views is None else rows * share)
    else:
        outputs, pull_back = backend.pull_back_to_calls(step.network, x, step.units)
        outputs, values, gradients = losses_of(outputs)
        factors = share * ops.cast(ops.greater(readable, 0), "float32")
        factors = factors if weights is None else factors * weights
        sums, within = step.units.clipped_sums(*pull_back(gradients), clip, factors, readable)
    if views is not None:
        outputs = outputs[:: views.views]
        values, within = views.averaged(values), views.averaged(within)
    return sums, (outputs, values, within)


def _synchronise(stds):
    """The same numbers, each of which depends on all: no weight changes before every bound that
    was measured on weights is there. TensorFlow's graph optimisers were seen to lose the order
    between the read of a weight and its update, and a bound came out of weights that were
    already new. What is not finite becomes NaN everywhere, and with it the weights.
    """
    whole = ops.isfinite(sum(stds))
    return [ops.where(whole, std, math.nan) for std in stds]
