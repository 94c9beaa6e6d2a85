"""How large the gradients of real examples are, beside their bounds. For the owner's eyes only."""

from typing import Any

import keras
import numpy as np
from keras import ops

from lipdp import losses
from lipdp.data.opening import open_source
from lipdp.data.sources import Arrays
from lipdp.report.numbers import Attained
from lipdp.training import steps
from lipdp.training.steps.private_step import gradient_sums

# A threshold that no gradient of float32 reaches.
_NO_CLIP = 1e15


def attained_gradients(model, x: Any, y: Any, verbose: bool = True) -> tuple[Attained, ...]:
    """The gradient of each example of a sample, as the private step computes it before the noise.

    One example after the other: some hundred are enough, and take as many small steps.

    Args:
        model: a compiled `PrivateModel`.
        x, y: the sample, as for `fit`.
        verbose: whether to show progress.

    Returns:
        An `Attained` for each trainable weight, or each layer that clips. **Not** covered by the
        guarantee.

    Raises:
        TypeError, ValueError: the sample does not fit the network.
    """
    source = open_source(x, y, model.graph, model.outputs)
    if isinstance(source, Arrays):
        losses.check_targets(model.private_loss, source.y, model.graph.output_shape[1:])
    variables = model.network.trainable_variables
    if model.units is None:
        names, groups = [v.path for v in variables], [[i] for i in range(len(variables))]
    else:
        names = [unit.layer.name for unit in model.units.units]
        groups = model.units.groups()

    def of_row(row, clip):
        inputs, targets = source.take(np.array([row]), 1)
        mask = np.ones(1, np.float32)
        sums, (_, _, within) = gradient_sums(
            model.step, steps.backend(), clip, inputs, targets, mask
        )
        sums = [ops.convert_to_numpy(total).astype("float64").ravel() for total in sums]
        return [np.concatenate([sums[i] for i in group]) for group in groups], within

    clip = model.current_clip()
    norms, totals, inside = [], None, []
    progress = keras.utils.Progbar(len(source), verbose=int(verbose), unit_name="example")
    for row in range(len(source)):
        sums, within = of_row(row, clip)
        totals = sums if totals is None else [a + b for a, b in zip(totals, sums, strict=True)]
        if model.units is not None:
            inside.append(ops.convert_to_numpy(within)[0])
            sums, _ = of_row(row, ops.full_like(clip, _NO_CLIP))
        norms.append([np.linalg.norm(total) for total in sums])
        progress.update(row + 1)
    return tuple(
        Attained(
            name,
            tuple(float(n[index]) for n in norms),
            float(np.linalg.norm(total / len(source))),
            float(np.mean([row[index] for row in inside])) if inside else None,
        )
        for index, (name, total) in enumerate(zip(names, totals, strict=True))
    )
