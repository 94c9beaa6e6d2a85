"""What every backend's private step does, in the order that the privacy argument needs."""

import math

from keras import ops

from lipdp import norms
from lipdp.bounds import gradient_bounds
from lipdp.clipping import clip_rows, weigh_rows
from lipdp.losses import per_example
from lipdp.noise import standard_deviations
from lipdp.projections import certified_by
from lipdp.steps.autodiff import gradient


def private_step(model, data, backend):
    """One private step on one drawn batch; variables are updated in place.

    Forward pass, loss gradient of each example, clip of its rows, weights of the examples,
    pull-back of all rows at once, sum over the expected batch size plus noise, optimizer,
    projection.

    Args:
        model: the `PrivateModel`.
        data: what `DrawnBatch.as_data` gives.
        backend: the backend's module: `pull_back`, `normal`, `compiled`.

    Returns:
        The metrics' results.
    """
    features, y, mask = data
    x, key = features["inputs"], features["key"]
    network, mechanism = model.network, model.mechanism
    divisor = mechanism.expected_batch_size
    variables = network.trainable_variables

    outputs, pull_back = backend.pull_back(network, x)
    losses, gradients = gradient(lambda z: per_example(model.private_loss, y, z), outputs)
    clip = model.current_clip()
    rows, within = clip_rows(gradients, clip, mask)
    weights = None
    if "weights" in features:
        # Behind the clip, which would undo them, and up to the maximum that the bounds start at.
        rows, weights = weigh_rows(rows, features["weights"], model.largest_weight)
    sums = pull_back(rows)

    # Read from the weights that the forward pass used, before they change.
    bounds = gradient_bounds(network, clip * model.largest_weight, as_tensors=True)
    stds = standard_deviations(
        [bounds[v.path] for v in variables],
        [math.prod(v.shape) for v in variables],
        mechanism.gradient_noise_multiplier,
        model.allocation,
    )
    if any(ops.is_tensor(std) for std in stds):
        stds = _together(stds)
    updates = []
    for index, (variable, total, std) in enumerate(zip(variables, sums, stds, strict=True)):
        noise = backend.normal(key, index, tuple(variable.shape))
        update = total * (1.0 / divisor) + noise * (std / divisor)
        if variable.regularizer is not None:
            # A penalty on the weights depends on no data: it comes after the noise.
            update = update + gradient(variable.regularizer, variable.value)[1]
        updates.append(update)

    # Probes are numbered behind the weights: no draw shares its stream with the noise.
    streams = iter(range(len(variables), 1_000_000))

    def certificate(matrix, expected):
        probe = backend.normal(key, next(streams), norms.probe_shape(matrix.shape))
        return backend.compiled(norms.probable_norm_bound)(matrix, probe, expected)

    with certified_by(certificate):
        model.optimizer.apply(updates, variables)

    if model.adaptive is not None:
        noise = 0.5 * mechanism.count_noise_multiplier * backend.normal(key, next(streams), ())
        centred = ops.sum(within - 0.5 * ops.cast(mask, within.dtype))
        fraction = (centred + noise) / divisor + 0.5
        model.move_clip(fraction)

    return model.update_metrics(y, outputs, losses, mask, weights)


def _together(stds):
    """The same numbers, each of which depends on all: no weight changes before every bound that
    was measured on weights is there. TensorFlow's graph optimisers were seen to lose the order
    between the read of a weight and its update, and a bound came out of weights that were
    already new. What is not finite becomes NaN everywhere, and with it the weights.
    """
    whole = ops.isfinite(sum(stds))
    return [ops.where(whole, std, math.nan) for std in stds]
