"""What a model spends: planned, paid for before each step, never beyond the budget."""

import dataclasses
import math
import os
import warnings
from collections.abc import Callable, Sequence

import keras
import numpy as np

import accountants
from accountants import Budget, LedgerError, TrainingRun, Use
from accountants.accounting import resolve_relation, unit_of
from accountants.ledger import LedgerEntry
from accountants.mechanisms import Mechanism
from accountants.sampling import Sampling
from lipdp.bounds import norms
from lipdp.bounds.projections import Projection
from lipdp.training.history import History

__all__ = ["BudgetExceeded", "Spending", "Spent", "certificates"]

# Share of delta that is set aside for randomised certificates, where there are any.
_RESERVE = 1e-3
# Share of a budget's epsilon below which nothing is calibrated to what is left.
_USED_UP = 0.01


class BudgetExceeded(RuntimeError):
    """The next step would overspend the privacy budget; it has not run."""


@dataclasses.dataclass(frozen=True)
class Spent:
    """What has been spent: an (epsilon, delta) guarantee under a neighbouring relation, for one
    `unit`: an example, or a group of them.
    """

    epsilon: float
    delta: float
    relation: str
    steps: int
    unit: str = "example"


class Spending:
    """The account of one model: what trained its network before, its ledger, and the run that is
    being paid for.

    Args:
        budget: what may be spent, or None for no cap.
        noise_multiplier: std over sensitivity, or None to calibrate it at the first run.
        ledger: path of a file that keeps what was spent, across processes, or None.
        certificates: tells how many randomised certificates a step takes.
        history: the runs that trained the network, those of other models, too.
        unit: what is protected, as for `TrainingRun`.

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
        unit: str = "example",
    ) -> None:
        if budget is not None and not isinstance(budget, Budget):
            raise TypeError(
                f"`budget` must be lipdp.Budget(epsilon=..., delta=...); got {budget!r}."
            )
        self.budget = budget
        self.noise_multiplier = _check_noise(noise_multiplier, budget)
        self.ledger = None if ledger is None else accountants.Ledger(os.fspath(ledger))
        self.run = None
        self.unit = unit
        self._certificates = certificates
        self._history = History() if history is None else history
        self._followed = None  # what another process has spent, which counts for this one
        self._writer = None  # of the ledger, from before a run is planned to its end
        self._own = {}  # what this model paid for in the ledger, by the names of the runs

    # --- what has been spent ------------------------------------------------------------------

    @property
    def runs(self) -> list[Mechanism]:
        """All that was paid for so far, and the ledger's queries."""
        return [use.run for use in self.uses]

    @property
    def uses(self) -> list[Use]:
        """The `runs`, each with what else is known of it."""
        if self.run is not None:
            # The file holds what the open run reserved; what it paid for is what counts.
            return [*self.run.earlier_uses, *([self.run.use] if self.run.paid else [])]
        if self._followed is not None:
            return list(self._followed)
        entries = self._entries()
        self._check_own(entries)
        kept = [Use(e.run, e.about, e.settled) for e in entries if e.run.count]
        return [*self._beside(entries), *kept]

    @property
    def beside_ledger(self) -> list[Use]:
        """What trained the network and is not in the ledger's file."""
        reads = self.ledger is not None and any(True for _ in self._history)
        return self._beside(self._entries() if reads else ())

    def _entries(self):
        """Those of the ledger: as it was read when it was locked, while it is."""
        if self.ledger is None:
            return []
        locked = self._writer is not None and not self._writer.closed
        return self._writer.entries if locked else self.ledger.entries

    def _beside(self, entries):
        written = {entry.run_id for entry in entries}
        return [run.use for run in self._history if run.paid and run.run_id not in written]

    def epsilon(self, runs: Sequence[TrainingRun], delta: float) -> float:
        """Epsilon of the runs; the randomised certificates are paid for out of delta.

        A step whose certificates hold is the mechanism that is accounted; they fail with
        probability p in all. Then the release is (ε, δ' + (1 + e^ε)·p)-private.
        """
        failure = norms.FAILURE_PROBABILITY * self._certificates() * sum(r.steps for r in runs)
        if not failure:
            return accountants.epsilon(runs=runs, delta=delta)
        most = _RESERVE * delta
        # An ordinary ε needs far less than is set aside, and is all but the ledger's.
        for reserve in (min(1e3 * failure, most), most):
            epsilon = accountants.epsilon(runs=runs, delta=delta - reserve)
            if epsilon < 500 and (1 + math.exp(epsilon)) * failure <= reserve:
                return epsilon
        return math.inf

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
        if runs:
            most = max((run.num_examples for run in _training(runs)), default=0)
            _warn_of_delta(delta, most, unit_of(runs))
        epsilon = self.epsilon(runs, delta)
        relation = resolve_relation(runs, None) if runs else sampling.relations[0]
        unit = unit_of(runs) if runs else self.unit
        return Spent(float(epsilon), float(delta), relation, sum(run.steps for run in runs), unit)

    def _check_own(self, entries: Sequence[LedgerEntry]) -> None:
        """Raises LedgerError where the ledger has forgotten what this model paid for in it."""
        steps = {entry.run_id: entry.run.steps for entry in entries}
        if any(steps.get(name, 0) < paid for name, paid in self._own.items()):
            raise LedgerError(
                f"{self.ledger.path} lacks steps that this model has paid for in it: it was "
                "removed, or replaced by an older copy. Put the newer one back."
            )

    # --- a run --------------------------------------------------------------------------------

    def lock(self) -> None:
        """Keeps others from writing the ledger until `settle`, so that what a run is planned on
        is what it is paid on.

        Raises:
            LedgerError: another run has it, or it cannot be read or written.
        """
        if self.ledger is not None and (self._writer is None or self._writer.closed):
            self._writer = self.ledger.lock()

    def plan(
        self, sampling: Sampling, num_examples: int, planned: int, per_epoch: int, group: int = 1
    ) -> "ActiveRun":
        """A run of at most `planned` steps, as many whole groups of them as the budget allows; the
        first of a budget without noise multiplier calibrates it. The ledger is locked from here
        on, and has no run of it yet.

        Raises:
            BudgetExceeded: not one step is left, or too little to calibrate noise to.
            LedgerError: the ledger cannot be locked, read or written.
            ValueError: nothing is planned and the noise is to be calibrated; the budget is too
                small for these steps to learn anything; or earlier runs protect another unit, or
                have no relation in common with this one.
        """
        try:
            self.lock()
            uses = self.uses
            prior = [use.run for use in uses]
            run = TrainingRun(0.0, sampling, num_examples, planned, self.unit)
            resolve_relation([*prior, run], None)  # what has none together fails here
            if self.budget is not None:
                _warn_of_delta(self.budget.delta, num_examples, self.unit)
            if self.noise_multiplier is None:
                self.noise_multiplier = self._calibrate(prior, run)
            run = dataclasses.replace(run, noise_multiplier=self.noise_multiplier, steps=0)
            allowed = self._allowed(prior, run, planned)
            allowed -= allowed % group
            if planned and allowed == 0:
                raise BudgetExceeded(self._exceeded())
            return ActiveRun(uses, run, allowed, allowed < planned, per_epoch, self._writer)
        except BaseException:
            self.settle()
            raise

    def _calibrate(self, prior, run):
        """The noise multiplier with which the run spends what is left of the budget."""
        if run.steps == 0:
            raise ValueError("`epochs` must be above `initial_epoch`: no step is planned.")
        budget = self.budget
        spent = self.epsilon(prior, budget.delta) if prior else 0.0
        # Gaussian noise grows as one over the root of what is left, and calibration leaves 0.05 %
        # at most: a share so small is what a run left over, and no run of its own.
        if spent > (1 - _USED_UP) * budget.epsilon:
            raise BudgetExceeded(
                f"The budget (ε = {budget.epsilon:g}, δ = {budget.delta:g}) is used up: ε = "
                f"{spent:.4f} is spent in {sum(r.steps for r in prior)} steps, so less than "
                f"{_USED_UP:.0%} is left, and the noise for that would drown what a step learns. "
                "Nothing has run. Give a larger budget; or a `noise_multiplier`, with which to "
                "take as many steps as are left."
            )
        noise_multiplier = accountants.calibrate_noise_multiplier(
            epsilon=budget.epsilon,
            delta=self._accounted_delta(),
            sampling=run.sampling,
            num_examples=run.num_examples,
            steps=run.steps,
            prior=prior,
        )
        if noise_multiplier > (most := _most_signal(run)):
            raise ValueError(
                f"The budget (ε = {budget.epsilon:g}, δ = {budget.delta:g}) is too small for "
                f"{run.steps} steps of {run.sampling!r}: its noise multiplier would be "
                f"{noise_multiplier:.4g}, and above {most:.4g} the noise of all steps together "
                "exceeds what they can add up to if every example agrees. Give a larger budget, "
                "larger batches or more epochs; or this `noise_multiplier`, to train all the same."
            )
        return noise_multiplier

    def follow(self, runs: Sequence[TrainingRun]) -> None:
        """Counts what another process has spent, which keeps the ledger: a ledger has one writer.
        Here nothing is written from now on.
        """
        self.ledger = None
        self._followed = [Use(run) for run in runs]

    def begin(self, run: "ActiveRun") -> None:
        """Opens a planned run."""
        self.run = run  # first: an interrupt while the ledger opens leaves something to close
        try:
            run.open()
        except BaseException:
            self.settle()
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
        """Raises `BudgetExceeded` where so many more steps are not within the budget, and
        `RuntimeError` where another run has begun on the same network.
        """
        if self.run is not None:
            if self.run.overtaken:
                raise RuntimeError(
                    "Another run has begun to train this network, of which this run's plan knows "
                    "nothing: begin a new run. The step has not run."
                )
            if self.run.limited and self.run.paid + steps > self.run.allowed:
                raise BudgetExceeded(self._exceeded())
        elif self.budget is not None and self.noise_multiplier is not None:
            runs = self.runs
            for last in _training(runs)[-1:]:
                runs[runs.index(last)] = last.counted(last.steps + 1)
                if self.epsilon(runs, self.budget.delta) > self.budget.epsilon:
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
        """Closes the run, if one is open, and lets others write the ledger."""
        run, self.run = self.run, None
        writer, self._writer = self._writer, None
        try:
            if run is not None:
                if run.paid and self._followed is not None:
                    self._followed.append(run.use)
                elif run.paid and run.run_id is not None:
                    self._own[run.run_id] = run.paid
                run.close()
        finally:
            if writer is not None:
                writer.close()

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

    def __init__(self, earlier, constants, allowed, limited, per_epoch, writer):
        self.earlier_uses = earlier
        self.earlier = [use.run for use in earlier]
        self.about = {}
        self.constants = constants
        self.allowed = allowed  # steps that may be paid for
        self.limited = limited  # whether that is the budget's word, or just the plan
        self.per_epoch = per_epoch
        self.paid = 0
        self.shown = {}
        self._writer = writer  # of the ledger that this was planned on, or None
        self.overtaken = False  # by a later run on the same network
        self._entry = None

    def open(self):
        if self._writer is not None:
            self._entry = self._writer.open_run(
                self.constants, max_steps=self.allowed, about=self.about
            )

    @property
    def spent(self):
        return dataclasses.replace(self.constants, steps=self.paid)

    @property
    def use(self):
        return Use(self.spent, self.about)

    @property
    def run_id(self):
        """That of its entry in a ledger, if there is one."""
        return None if self._entry is None else self._entry.run_id

    def pay(self, steps):
        if self._entry is not None:
            self._entry.pay(steps)
        self.paid += steps

    def close(self):
        if self._entry is not None:
            self._entry.close()
        elif self._writer is not None:
            self._writer.close()


def _training(runs):
    """The training runs among what was paid for."""
    return [run for run in runs if isinstance(run, TrainingRun)]


def certificates(network: keras.Model) -> int:
    """How many randomised certificates a step on the network takes."""
    return sum(
        v.constraint.certifications(v.shape)
        for v in network.trainable_variables
        if isinstance(v.constraint, Projection)
    )


def _most_signal(run):
    """The noise multiplier above which a run learns nothing, whatever the data.

    A step adds at most the expected batch, in units of one example's bound, to the direction in
    which all examples pull; the noise there is the multiplier. Over the steps the one grows with
    their number, the other with its root. A whole run that is one release is a sum over all
    examples, each of which moves it by 1.
    """
    if run.sampling.whole_run:
        return run.num_examples
    return run.sampling.expected_batch_size(run.num_examples) * math.sqrt(run.steps)


def _warn_of_delta(delta, number, unit):
    if delta * number > 1:
        warnings.warn(
            f"δ = {delta:g} is above 1 / {number}, one over the number of {unit}s: even a "
            f"mechanism that publishes one random {unit} in full has a δ of that size. Choose it "
            "well below.",
            stacklevel=3,
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
