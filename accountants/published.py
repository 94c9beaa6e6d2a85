"""Figures as many papers compute them, for comparison with theirs. They are no guarantee."""

import dataclasses
import sys
import warnings
from collections.abc import Iterable

from accountants.accounting import Accountant, check_runs, epsilon
from accountants.mechanisms import TrainingRun
from accountants.sampling import PoissonSampling, ShuffledEpochs


class NotAGuaranteeWarning(UserWarning):
    """An epsilon was computed for a scheme that is not the one that drew the batches."""


def published_epsilon_not_a_guarantee(
    runs: Iterable[TrainingRun], *, delta: float, accountant: Accountant = "rdp"
) -> float:
    """The epsilon that shuffled runs would have if their batches were Poisson samples. They aren't.

    Much published work shuffles and accounts so. What was really spent may be several times as
    much (Chua et al. 2024), and is `accountants.epsilon`, which claims no amplification.
    The figure is a plain float, and both a warning and a line on stderr say what it is.

    >>> import warnings
    >>> run = TrainingRun(1.0, ShuffledEpochs(600), num_examples=60_000, steps=10_000)
    >>> with warnings.catch_warnings(action="ignore"):
    ...     claimed = published_epsilon_not_a_guarantee([run], delta=1e-5)
    >>> round(claimed, 2), round(epsilon(runs=[run], delta=1e-5), 2)
    (6.71, 91.82)

    Args:
        runs: the runs; those of `ShuffledEpochs` are accounted as `PoissonSampling`.
        delta, accountant: as for `accountants.epsilon`, under add/remove.

    Raises:
        TypeError, ValueError: as for `accountants.epsilon`.
    """
    pretended = [
        dataclasses.replace(run, sampling=PoissonSampling(run.sampling.batch_size))
        if isinstance(run.sampling, ShuffledEpochs)
        else run
        for run in check_runs("runs", runs)
    ]
    value = epsilon(
        runs=pretended, delta=delta, accountant=accountant, relation="add_or_remove_one"
    )
    message = (
        f"epsilon={float(value):.4g} is NOT a privacy guarantee: shuffled batches were accounted "
        "as Poisson samples, for comparison with published figures. accountants.epsilon() gives "
        "what holds."
    )
    print(message, file=sys.stderr)
    warnings.warn(message, NotAGuaranteeWarning, stacklevel=2)
    return float(value)
