"""How large the gradients of real examples are, beside their bounds. For the owner's eyes only."""

from typing import Any

import keras
import numpy as np
from keras import ops

from lipdp import losses
from lipdp.data.sources import Arrays, open_source
from lipdp.report.numbers import Attained
from lipdp.training import steps
from lipdp.training.steps.private_step import gradient_sums


def attained_gradients(model, x: Any, y: Any, verbose: bool = True) -> tuple[Attained, ...]:
    """The gradient of each example of a sample, as the private step computes it before the noise.

    One example after the other: some hundred are enough, and take as many small steps.

    Args:
        model: a compiled `PrivateModel`.
        x, y: the sample, as for `fit`.
        verbose: whether to show progress.

    Returns:
        An `Attained` for each trainable weight. **Not** covered by the guarantee.

    Raises:
        TypeError, ValueError: the sample does not fit the network.
    """
    source = open_source(x, y, model.graph)
    if isinstance(source, Arrays):
        losses.check_targets(model.private_loss, source.y, model.graph.output_shape[1:])
    variables = model.network.trainable_variables
    clip = model.current_clip()
    norms, totals = [], None
    progress = keras.utils.Progbar(len(source), verbose=int(verbose), unit_name="example")
    for row in range(len(source)):
        inputs, targets = source.take(np.array([row]), 1)
        sums, _ = gradient_sums(
            model.step, steps.backend(), clip, inputs, targets, np.ones(1, np.float32), None
        )
        sums = [ops.convert_to_numpy(total).astype("float64") for total in sums]
        norms.append([np.sqrt(np.sum(np.square(total))) for total in sums])
        totals = sums if totals is None else [a + b for a, b in zip(totals, sums, strict=True)]
        progress.update(row + 1)
    return tuple(
        Attained(
            variable.path,
            tuple(float(n[index]) for n in norms),
            float(np.sqrt(np.sum(np.square(total / len(source))))),
        )
        for index, (variable, total) in enumerate(zip(variables, totals, strict=True))
    )
