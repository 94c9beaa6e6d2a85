"""What a model spends: planned, paid for before each step, never beyond the budget."""

import dataclasses
import math
import os
from collections.abc import Callable, Sequence

import keras
import numpy as np

import accountants
from accountants import Budget, TrainingRun
from accountants.sampling import Sampling
from lipdp.bounds import norms
from lipdp.bounds.projections import Projection
from lipdp.training.history import History

__all__ = ["BudgetExceeded", "Spending", "Spent", "certificates"]

# Share of delta that is set aside for randomised certificates, where there are any.
_RESERVE = 1e-3


class BudgetExceeded(RuntimeError):
    """The next step would overspend the privacy budget; it has not run."""


@dataclasses.dataclass(frozen=True)
class Spent:
    """What has been spent: an (epsilon, delta) guarantee under a neighbouring relation."""

    epsilon: float
    delta: float
    relation: str
    steps: int


class Spending:
    """The account of one model: what trained its network before, its ledger, and the run that is
    being paid for.

    Args:
        budget: what may be spent, or None for no cap.
        noise_multiplier: std over sensitivity, or None to calibrate it at the first run.
        ledger: path of a file that keeps what was spent, across processes, or None.
        certificates: tells how many randomised certificates a step takes.
        history: the runs that trained the network, those of other models, too.

    Raises:
        TypeError: `budget` is not a Budget.
        ValueError: neither budget nor noise multiplier, or one out of range.

    >>> spending = Spending(None, 2.0, None, lambda: 0)
    >>> spending.begin(spending.plan(accountants.FullBatch(), 100, planned=3, per_epoch=1))
    >>> spending.pay()
    >>> spending.settle()
    >>> [run.steps for run in spending.runs]
    [1]
    """

    def __init__(
        self,
        budget: Budget | None,
        noise_multiplier: float | None,
        ledger: str | os.PathLike[str] | None,
        certificates: Callable[[], int],
        history: History | None = None,
    ) -> None:
        if budget is not None and not isinstance(budget, Budget):
            raise TypeError(
                f"`budget` must be lipdp.Budget(epsilon=..., delta=...); got {budget!r}."
            )
        self.budget = budget
        self.noise_multiplier = _check_noise(noise_multiplier, budget)
        self.ledger = None if ledger is None else accountants.Ledger(os.fspath(ledger))
        self.run = None
        self._certificates = certificates
        self._history = History() if history is None else history
        self._followed = None  # what another process has spent, which counts for this one

    # --- what has been spent ------------------------------------------------------------------

    @property
    def runs(self) -> list[TrainingRun]:
        """All that was paid for so far."""
        if self.run is None:
            if self._followed is not None:
                return list(self._followed)
            entries = [] if self.ledger is None else self.ledger.entries
            return [*self._beside(entries), *(e.run for e in entries if e.run.steps)]
        # The file holds what the open run reserved; what it paid for is what counts.
        return [*self.run.earlier, *([self.run.spent] if self.run.paid else [])]

    @property
    def beside_ledger(self) -> list[TrainingRun]:
        """What trained the network and is not in the ledger's file."""
        reads = self.ledger is not None and any(True for _ in self._history)
        return self._beside(self.ledger.entries if reads else ())

    def _beside(self, entries):
        written = {entry.run_id for entry in entries}
        return [run.spent for run in self._history if run.paid and run.run_id not in written]

    def epsilon(self, runs: Sequence[TrainingRun], delta: float) -> float:
        """Epsilon of the runs; the randomised certificates are paid for out of delta.

        A step whose certificates hold is the mechanism that is accounted; they fail with
        probability p in all. Then the release is (ε, δ' + (1 + e^ε)·p)-private.
        """
        failure = norms.FAILURE_PROBABILITY * self._certificates() * sum(r.steps for r in runs)
        reserve = _RESERVE * delta if failure else 0.0
        epsilon = accountants.epsilon(runs=runs, delta=delta - reserve)
        if failure and (epsilon > 500 or (1 + math.exp(epsilon)) * failure > reserve):
            return math.inf
        return epsilon

    def spent(self, delta: float | None, sampling: Sampling) -> Spent:
        """What was spent at a delta, by default the budget's; `sampling` names the relation of
        a model that has not trained.

        Raises:
            ValueError: no delta, and no budget to take it from.
        """
        if delta is None:
            if self.budget is None:
                raise ValueError("`delta` must be given where the model has no budget.")
            delta = self.budget.delta
        runs = self.runs
        epsilon = self.epsilon(runs, delta)
        relation = getattr(epsilon, "relation", sampling.relations[0])
        return Spent(float(epsilon), float(delta), relation, sum(run.steps for run in runs))

    # --- a run --------------------------------------------------------------------------------

    def plan(
        self, sampling: Sampling, num_examples: int, planned: int, per_epoch: int, group: int = 1
    ) -> "ActiveRun":
        """A run of at most `planned` steps, as many whole groups of them as the budget allows; the
        first of a budget without noise multiplier calibrates it. Nothing is open yet.

        Raises:
            BudgetExceeded: not one step is left.
            ValueError: nothing is planned and the noise is to be calibrated.
        """
        prior = self.runs
        constants = {"sampling": sampling, "num_examples": num_examples}
        if self.noise_multiplier is None:
            if planned == 0:
                raise ValueError("`epochs` must be above `initial_epoch`: no step is planned.")
            try:
                self.noise_multiplier = accountants.calibrate_noise_multiplier(
                    epsilon=self.budget.epsilon,
                    delta=self._accounted_delta(),
                    steps=planned,
                    prior=prior,
                    **constants,
                )
            except ValueError as error:
                if prior and self.epsilon(prior, self.budget.delta) >= self.budget.epsilon:
                    raise BudgetExceeded(self._exceeded()) from error
                raise
        run = TrainingRun(self.noise_multiplier, steps=0, **constants)
        allowed = self._allowed(prior, run, planned)
        allowed -= allowed % group
        if planned and allowed == 0:
            raise BudgetExceeded(self._exceeded())
        return ActiveRun(prior, run, allowed, allowed < planned, per_epoch)

    def follow(self, runs: Sequence[TrainingRun]) -> None:
        """Counts what another process has spent, which keeps the ledger: a ledger has one writer.
        Here nothing is written from now on.
        """
        self.ledger = None
        self._followed = list(runs)

    def begin(self, run: "ActiveRun") -> None:
        """Opens a planned run."""
        self.run = run  # first: an interrupt while the ledger opens leaves something to close
        try:
            run.open(self.ledger)
        except BaseException:
            self.run = None
            run.close()
            raise
        for other in self._history:
            other.overtaken = True
        self._history.append(run)

    def _allowed(self, prior, run, planned):
        """How many of the planned steps are within the budget."""
        if self.budget is None or planned == 0:
            return planned
        budget = self.budget
        whole = dataclasses.replace(run, steps=planned)
        if self.epsilon([*prior, whole], budget.delta) <= budget.epsilon:
            return planned
        if prior and self.epsilon(prior, budget.delta) >= budget.epsilon:
            return 0
        return accountants.calibrate_steps(
            epsilon=budget.epsilon,
            delta=self._accounted_delta(),
            noise_multiplier=run.noise_multiplier,
            sampling=run.sampling,
            num_examples=run.num_examples,
            prior=prior,
            max_steps=planned,
        )

    def check_left(self, steps: int = 1) -> None:
        """Raises `BudgetExceeded` where so many more steps are not within the budget."""
        if self.run is not None:
            if self.run.limited and self.run.paid + steps > self.run.allowed:
                raise BudgetExceeded(self._exceeded())
        elif self.budget is not None and self.noise_multiplier is not None and self.runs:
            runs = self.runs
            more = dataclasses.replace(runs[-1], steps=runs[-1].steps + 1)
            if self.epsilon([*runs[:-1], more], self.budget.delta) > self.budget.epsilon:
                raise BudgetExceeded(self._exceeded())

    def pay(self, steps: int = 1) -> None:
        """Pays for steps, before they run.

        Raises:
            BudgetExceeded: they would overspend.
            RuntimeError: no run is open.
        """
        self.check_left(steps)
        if self.run is None:
            raise RuntimeError("Only fit, or train_on_batch within `batches`, can train.")
        self.run.pay(steps)

    def settle(self) -> None:
        """Closes the run, if one is open."""
        if self.run is not None:
            run, self.run = self.run, None
            run.close()
            if run.paid and self._followed is not None:
                self._followed.append(run.spent)

    def epsilon_at_epoch_end(self) -> float:
        """Epsilon at the end of the epoch that is running: exact there, an upper bound before;
        at the budget's delta, or at 1e-5 without a budget.
        """
        run = self.run
        end = min(-(-run.paid // run.per_epoch) * run.per_epoch, run.allowed)
        if end not in run.shown:
            delta = self.budget.delta if self.budget else 1e-5
            spent = dataclasses.replace(run.spent, steps=end)
            run.shown[end] = float(self.epsilon([*run.earlier, spent], delta))
        return run.shown[end]

    def _accounted_delta(self):
        return self.budget.delta * (1 - _RESERVE if self._certificates() else 1.0)

    def _exceeded(self):
        runs = self.runs
        return (
            f"The next step would overspend the budget (ε = {self.budget.epsilon:g}, "
            f"δ = {self.budget.delta:g}); ε = {self.epsilon(runs, self.budget.delta):.4f} is spent "
            f"in {sum(run.steps for run in runs)} steps. It has not run."
        )


class ActiveRun:
    """A run of steps that is paid for one by one."""

    def __init__(self, earlier, constants, allowed, limited, per_epoch):
        self.earlier = earlier
        self.constants = constants
        self.allowed = allowed  # steps that may be paid for
        self.limited = limited  # whether that is the budget's word, or just the plan
        self.per_epoch = per_epoch
        self.paid = 0
        self.shown = {}
        self.overtaken = False  # by a later run on the same network
        self._entry = None

    def open(self, ledger):
        if ledger is not None:
            self._entry = ledger.open_run(
                noise_multiplier=self.constants.noise_multiplier,
                sampling=self.constants.sampling,
                num_examples=self.constants.num_examples,
                max_steps=self.allowed,
            )

    @property
    def spent(self):
        return dataclasses.replace(self.constants, steps=self.paid)

    @property
    def run_id(self):
        """That of its entry in a ledger, if there is one."""
        return None if self._entry is None else self._entry.run_id

    def pay(self, steps):
        if self.overtaken:
            raise RuntimeError(
                "Another run has begun to train this network, of which this run's plan knows "
                "nothing: begin a new run. The step has not run."
            )
        if self._entry is not None:
            self._entry.pay(steps)
        self.paid += steps

    def close(self):
        if self._entry is not None:
            self._entry.close()


def certificates(network: keras.Model) -> int:
    """How many randomised certificates a step on the network takes."""
    return sum(
        v.constraint.certifications(v.shape)
        for v in network.trainable_variables
        if isinstance(v.constraint, Projection)
    )


def _check_noise(noise_multiplier, budget):
    if noise_multiplier is None:
        if budget is None:
            raise ValueError(
                "Give `budget=lipdp.Budget(epsilon, delta)`, from which the noise is calibrated, "
                "or `noise_multiplier`."
            )
        return None
    if (
        isinstance(noise_multiplier, bool)
        or not isinstance(noise_multiplier, (int, float, np.floating, np.integer))
        or not 0 <= noise_multiplier < math.inf
    ):
        raise ValueError(
            "`noise_multiplier` must be a finite number of at least 0 (0 is no privacy); got "
            f"{noise_multiplier!r}."
        )
    return float(noise_multiplier)
