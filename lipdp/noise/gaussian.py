"""Independent Gaussian noise, the default, and what every noise answers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from keras import ops

from accountants.sampling import Sampling
from lipdp.noise.gaussian_rng import add_noise, draw_grouped

__all__ = ["GaussianNoise"]


class GaussianNoise:
    """Independent Gaussian noise in every step, drawn where the gradients are: the default.

    Its floating-point numbers are only nearly Gaussian; see `SecureNoise`.

    Attributes:
        correlated: whether the noise of a step depends on that of others.
        whole_runs: whether it is scaled to the sensitivity of a whole run, not of a step.
        variables: Keras variables that the backend carries from step to step; never saved.
    """

    correlated = False
    whole_runs = False
    variables: Sequence[Any] = ()

    def plan(self, sampling: Sampling, num_examples: int, steps: int) -> tuple[float, ...]:
        """The constants of a run, which are compiled into its steps.

        Raises:
            ValueError: the noise is not for a run of so many steps.
        """
        return ()

    def begin(self, weights: Sequence[Any]) -> bool:
        """Forgets all noise, for a run that begins; returns whether `variables` are others now."""
        return False

    def multiplier(self, noise_multiplier: float, entries: int) -> float:
        """The multiplier of the stds that make a release of so many entries, with all that is done
        to them, the Gaussian mechanism of the given multiplier.
        """
        return noise_multiplier

    def draw(self, entries: int) -> np.ndarray | None:
        """What the batch of one step is to carry as its noise, for so many entries in all."""
        return None

    def add(self, backend: Any, features: dict, sums: list, stds: list) -> list:
        """The sums of one step with their noise.

        Args:
            backend: the backend's step module, of which `compiled` is needed.
            features: what the step's batch carries beside its inputs: `"key"`, and as `"noise"`
                what `draw` gave.
            sums, stds: of each weight, in the order of the trainable variables, and of the count
                of an adaptive clip. Stream `i` of the key belongs to sum `i` and what is drawn
                with it, streams from their number on to others.
        """

        def noisy(group, stream):
            totals = [sums[i] for i in group]
            scales = [ops.convert_to_tensor(stds[i], "float32") for i in group]
            return backend.compiled(add_noise)(totals, scales, features["key"], stream)

        return draw_grouped(noisy, [tuple(total.shape) for total in sums])
