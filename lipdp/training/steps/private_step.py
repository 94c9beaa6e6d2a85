"""What every backend's private step does, in the order that the privacy argument needs."""

import math

import numpy as np
from keras import ops

from lipdp.autodiff import gradient
from lipdp.bounds import gradient_bounds, norms
from lipdp.bounds.projections import certified_by
from lipdp.losses import per_example
from lipdp.noise import resolve_allocation, standard_deviations
from lipdp.noise.gaussian_rng import standard_normal
from lipdp.training.clipping import clamp_weights, clip_rows, scale_rows


def private_step(model, data, backend):
    """One private step on one drawn batch; variables are updated in place.

    Args:
        model: the `PrivateModel`.
        data: what `DrawnBatch.as_data` gives.
        backend: the backend's module: `pull_back`, `accumulate`, `total`, `once`, `compiled`.

    Returns:
        The metrics' results.
    """
    sums, logs = read_batch(model, data, backend)
    update_weights(model, data[0], sums, backend)
    return logs


def read_batch(model, data, backend):
    """The half of a step that reads the batch: forward pass, loss gradient of each example, clip of
    its rows, weights of the examples, pull-back of all rows at once; and the metrics.

    Returns:
        The sums that the noise is to hide: the clipped gradients' of each weight, and of an
        adaptive clip the count; and the metrics' results.
    """
    features, y, mask = data
    x, weights = features["inputs"], features.get("weights")
    clip = model.current_clip()

    def part(x, y, mask, weights=None):
        return gradient_sums(model, backend, clip, x, y, mask, weights)

    rows = [x, y, mask] if weights is None else [x, y, mask, weights]
    if model.physical_batch_size is None:
        sums, (outputs, losses, within) = part(*rows)
    else:
        sums, (outputs, losses, within) = backend.accumulate(part, rows, model.physical_batch_size)
    if model.adaptive is not None:
        # One example moves the sum of centred indicators by ½.
        sums = [*sums, ops.sum(within - 0.5 * ops.cast(mask, within.dtype))]
    if weights is not None:
        weights = clamp_weights(weights, model.sample_weight_bound)
    # Over the rows of all devices: noise is added to that, once.
    return backend.sum_over_replicas(sums), model.update_metrics(y, outputs, losses, mask, weights)


def update_weights(model, features, sums, backend):
    """The half of a step whose shapes no batch changes: sum over the expected batch size plus
    noise, optimizer, projection.

    Args:
        model, backend: as for `private_step`.
        features: the batch's key, and its noise where the host draws it.
        sums: what `read_batch` gave.
    """
    network, mechanism, key = model.network, model.mechanism, features["key"]
    divisor = mechanism.expected_batch_size
    variables = network.trainable_variables

    # Read from the weights that the forward pass used, before they change.
    bounds = gradient_bounds(
        network, model.current_clip() * model.sample_weight_bound, as_tensors=True
    )
    stds = standard_deviations(
        [bounds[v.path] for v in variables],
        [math.prod(v.shape) for v in variables],
        mechanism.gradient_noise_multiplier,
        resolve_allocation(model.allocation, variables),
    )
    if model.adaptive is not None:
        stds = [*stds, 0.5 * mechanism.count_noise_multiplier]
    if any(ops.is_tensor(std) for std in stds):
        stds = synchronise(stds)
    noisy = model.noise.add(backend, features, sums, stds)
    updates = []
    for variable, total in zip(variables, noisy[: len(variables)], strict=True):
        update = total * (1.0 / divisor)
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

    with certified_by(certificate, backend.compiled):
        model.optimizer.apply(backend.on_first_replica(updates), variables)

    if model.adaptive is not None:
        model.move_clip(noisy[-1] / divisor + 0.5)


def gradient_sums(model, backend, clip, x, y, mask, weights):
    """Sum of the clipped examples' gradients, one tensor a weight; and outputs, losses and
    indicators of rows within the clip, one row an example.
    """
    views = model.augmentation
    targets = y
    if views is not None:
        x, targets, mask = views(x), views.repeated(y), views.repeated(mask)
    outputs, pull_back = backend.pull_back(model.network, x)
    losses, gradients = gradient(lambda z: per_example(model.private_loss, targets, z), outputs)
    rows, within = clip_rows(gradients, clip, mask)
    if weights is not None:
        # Behind the clip, which would undo them, and up to the maximum that the bounds start at.
        weights = weights if views is None else views.repeated(weights)
        rows = scale_rows(rows, weights, model.sample_weight_bound)
    if views is not None:
        # The mean of an example's views is within the bound, as each of them is.
        rows = rows * (1.0 / views.views)
        outputs = outputs[:: views.views]
        losses, within = views.averaged(losses), views.averaged(within)
    return pull_back(rows), (outputs, losses, within)


def synchronise(stds):
    """The same numbers, each of which depends on all: no weight changes before every bound that
    was measured on weights is there. TensorFlow's graph optimisers were seen to lose the order
    between the read of a weight and its update, and a bound came out of weights that were
    already new. What is not finite becomes NaN everywhere, and with it the weights.
    """
    whole = ops.isfinite(sum(stds))
    return [ops.where(whole, std, math.nan) for std in stds]
