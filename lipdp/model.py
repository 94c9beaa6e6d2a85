"""PrivateModel: `compile`, `fit`, `spent`, `report`."""

import dataclasses
import math
import os
import warnings
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

import accountants
from accountants import Budget, ShuffledEpochs, TrainingRun
from accountants.sampling import Sampling
from lipdp import losses, norms, steps
from lipdp.batches import DrawnBatch, DrawnBatches, check_data
from lipdp.bounds import gradient_bounds
from lipdp.clipping import AdaptiveClip
from lipdp.noise import ALLOCATIONS, RandomSource
from lipdp.projections import Projection
from lipdp.report import Report

__all__ = ["BudgetExceeded", "Mechanism", "PrivateModel", "Spent"]


class BudgetExceeded(RuntimeError):
    """The next step would overspend the privacy budget; it has not run."""


@dataclasses.dataclass(frozen=True)
class Spent:
    """What has been spent: an (epsilon, delta) guarantee under a neighbouring relation."""

    epsilon: float
    delta: float
    relation: str
    steps: int


@dataclasses.dataclass(frozen=True)
class Mechanism:
    """The constants of every private step; public, and never a function of a batch.

    Attributes:
        noise_multiplier: of the joint release; what is accounted.
        gradient_noise_multiplier, count_noise_multiplier: of its two parts; the second is 0
            without adaptive clipping.
        expected_batch_size: the divisor of the sums.
    """

    noise_multiplier: float
    gradient_noise_multiplier: float
    count_noise_multiplier: float
    expected_batch_size: float


class PrivateModel(keras.Model):
    """A Keras network with private training.

    `compile`, `fit`, `evaluate`, `predict` and callbacks are Keras' own. `fit` draws the batches
    itself, so that what is accounted is what is sampled. What is guaranteed to be private is the
    network's weights, at the end and after each step; training metrics are computed on private
    batches and are not covered, nor is a choice among runs made by looking at their results.

    Give a `budget` and the noise is calibrated at the first `fit` so that its planned steps spend
    it; or a `noise_multiplier` and read `spent()`; or both: that noise, and the budget as a cap.

    Args:
        network: a Sequential or functional model whose layers all have bounds, with a
            `BallProjection` in front. It stays an ordinary Keras model: save and serve that one.
        budget: `lipdp.Budget(epsilon, delta)`.
        noise_multiplier: std of the noise over the sensitivity.
        sampling: how batches are drawn: `lipdp.PoissonSampling(batch_size)`, `FullBatch()` or
            `ShuffledEpochs(batch_size)`.
        clip: largest norm of an example's loss gradient, or `lipdp.AdaptiveClip(...)`. By
            default the loss' own bound; a loss without one needs a clip.
        allocation: how noise is shared over the weights: `"global"`, `"per_weight"` or
            `"least"` (least total noise).
        ledger: path of a file that keeps what was spent, across processes.
        seed: for tests only: whoever knows it can subtract the noise.

    Raises:
        TypeError: an argument is not what it should be.
        ValueError: a value out of range, or a network without bounds.
        UnknownLayerError: a layer has no bound, or cannot be private.

    >>> from lipdp import layers
    >>> network = keras.Sequential([
    ...     keras.Input((4,)), layers.BallProjection(1.0), layers.SpectralDense(2)])
    >>> model = PrivateModel(network, noise_multiplier=4.0,
    ...                      sampling=accountants.PoissonSampling(batch_size=16))
    >>> model.compile("sgd", loss="sparse_categorical_crossentropy")
    >>> history = model.fit(np.ones((64, 4)), np.zeros(64, int), epochs=2, verbose=0)
    >>> round(model.spent(delta=1e-3).epsilon, 1)
    0.4
    """

    def __init__(
        self,
        network: keras.Model,
        *,
        budget: Budget | None = None,
        noise_multiplier: float | None = None,
        sampling: Sampling | None = None,
        clip: float | AdaptiveClip | None = None,
        allocation: str = "global",
        ledger: str | os.PathLike[str] | None = None,
        seed: int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        self.budget = _check_budget(budget)
        self.noise_multiplier = _check_noise(noise_multiplier, budget)
        if not isinstance(sampling, Sampling):
            raise TypeError(
                "`sampling` must say how batches are drawn, for instance "
                f"lipdp.PoissonSampling(batch_size=256); got {sampling!r}."
            )
        self.sampling = sampling
        if allocation not in ALLOCATIONS:
            raise ValueError(f"`allocation` must be one of {ALLOCATIONS}; got {allocation!r}.")
        self.allocation = allocation
        self.clip, self.adaptive = _check_clip(clip)

        _check_network(network)
        self.network = network
        self._source = RandomSource(seed)
        self.ledger = None if ledger is None else accountants.Ledger(os.fspath(ledger))
        self._runs = []  # what this model spent, in runs that have ended
        self._run = None  # the one that is being paid for
        self._fits = 0
        self._paying = False
        self.mechanism = None
        self.private_loss = None
        self._clip_weight = None
        self.built = True

    # --- Keras -------------------------------------------------------------------------------

    def call(self, inputs, training=None):
        # A drawn batch carries the key of its noise beside the inputs.
        if isinstance(inputs, dict) and set(inputs) == {"inputs", "key"}:
            inputs = inputs["inputs"]
        return self.network(inputs, training=training)

    def compile(
        self,
        optimizer: str | keras.optimizers.Optimizer = "rmsprop",
        loss: str | losses.Loss | None = None,
        metrics: list | None = None,
        run_eagerly: bool = False,
        jit_compile: bool | str = "auto",
    ) -> None:
        """Configures training, as Keras' `compile` does.

        Args:
            optimizer: any Keras optimizer or its name. It sees noisy gradients only.
            loss: a name (cross-entropies are those on logits), a Keras loss or a function
                `(y_true, y_pred)`. Its reduction is ignored: an example's loss is the mean over
                its positions. Without a known gradient bound it needs a `clip`.
            metrics: Keras metrics; on training data not covered by the guarantee.
            run_eagerly, jit_compile: as in Keras; `"auto"` uses XLA on JAX, and on TensorFlow
                where there is a GPU.

        Raises:
            TypeError, ValueError: an argument is not one of these.
        """
        loss = losses.get(loss)
        self._check_head(loss)
        optimizer = keras.optimizers.get(optimizer)
        if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            raise ValueError(
                "`optimizer` must not scale losses: the noise would be divided by its scale."
            )
        bound = losses.gradient_bound(loss, self.network.output_shape[1:])
        if math.isinf(bound) and self.clip is None and self.adaptive is None:
            name = getattr(loss, "name", getattr(loss, "__name__", type(loss).__name__))
            raise ValueError(
                f"The gradient of the loss {name!r} has no known bound: give PrivateModel a "
                "`clip`, a number or lipdp.AdaptiveClip(...)."
            )
        if jit_compile == "auto":
            jit_compile = not run_eagerly and steps.backend().default_jit_compile()
        super().compile(
            optimizer=optimizer,
            loss=loss,
            # Weighted, so that the mask keeps padding out of them.
            weighted_metrics=metrics,
            run_eagerly=run_eagerly,
            jit_compile=jit_compile,
        )
        self.private_loss = loss
        self.loss_gradient_bound = bound
        self._make_clip()
        optimizer.build(self.network.trainable_variables)

    def fit(
        self,
        x: Any = None,
        y: Any = None,
        epochs: int = 1,
        verbose: str | int = "auto",
        callbacks: Any = None,
        validation_data: Any = None,
        initial_epoch: int = 0,
        steps_per_epoch: int | None = None,
        validation_steps: int | None = None,
        validation_batch_size: int | None = None,
        validation_freq: int = 1,
    ) -> keras.callbacks.History:
        """Trains privately. Batches are drawn from `x`, `y` as `sampling` says.

        Training ends before the step that would overspend the budget. A further call goes on
        from what has been spent.

        Args:
            x: inputs, one array `(examples, ...)`, finite.
            y: targets, one array `(examples, ...)`.
            epochs, verbose, callbacks, validation_*, initial_epoch: as in Keras.
            steps_per_epoch: steps an epoch, where the scheme does not fix them.

        Returns:
            Keras' `History`; `epsilon` is in its logs (exact at the end of each epoch), at the
            budget's delta, or at 1e-5 without a budget.

        Raises:
            BudgetExceeded: not one step is left.
            TypeError, ValueError: data or arguments that cannot be trained on; nothing is spent.
        """
        epochs = _check_count(epochs, "epochs")
        initial_epoch = _check_count(initial_epoch, "initial_epoch", least=0)
        batches = self._prepare(x, y, steps_per_epoch, max(0, epochs - initial_epoch))
        try:
            asked = len(batches) * (epochs - initial_epoch)
            if self._run.limited:
                warnings.warn(
                    f"The budget allows {self._run.allowed} of the {asked} steps that were asked "
                    "for; training will end there.",
                    stacklevel=2,
                )
            return super().fit(
                batches,
                epochs=epochs,
                verbose=verbose,
                callbacks=callbacks,
                validation_data=validation_data,
                initial_epoch=initial_epoch,
                validation_steps=validation_steps,
                validation_batch_size=validation_batch_size,
                validation_freq=validation_freq,
                shuffle=False,
            )
        finally:
            self._settle()

    def batches(
        self, x: Any, y: Any, epochs: int = 1, steps_per_epoch: int | None = None
    ) -> Iterator[DrawnBatch]:
        """Batches for a loop of your own: `for batch in model.batches(x, y): ...`.

        Each is good for one `train_on_batch(batch)`. Arguments and errors as for `fit`; the
        generator ends before the step that would overspend.

        Yields:
            `DrawnBatch`.
        """
        drawn = self._prepare(x, y, steps_per_epoch, _check_count(epochs, "epochs"))
        try:
            for _ in range(epochs):
                drawn.on_epoch_begin()
                for index in range(len(drawn)):
                    if self._run.allowed <= self._run.paid:
                        return
                    self._open_batch = drawn.draw(index)
                    yield self._open_batch
        finally:
            self._open_batch = None
            self._settle()

    def train_on_batch(self, batch: DrawnBatch, y: None = None, return_dict: bool = False) -> Any:
        """One private step on a batch that `batches` drew.

        Raises:
            BudgetExceeded: the step would overspend.
            ValueError: the batch was drawn by somebody else, or has been used: no scheme would
                describe what was sampled.
        """
        self._check_left()
        if not isinstance(batch, DrawnBatch) or y is not None or batch is not self._open_batch:
            raise ValueError(
                "train_on_batch takes the batch that `for batch in model.batches(x, y)` has just "
                "drawn, once: the guarantee holds for batches drawn as `sampling` says, and "
                "nothing is known of others."
            )
        self._open_batch = None
        features, targets, mask = batch.as_data()
        return super().train_on_batch(
            features, targets, sample_weight=mask, return_dict=return_dict
        )

    _open_batch = None

    def make_train_function(self, force=False):
        if self.train_function is not None and not force:
            return
        super().make_train_function(force)
        inner = self.train_function

        def pay_and_step(*args):
            # Paid for before it runs; every entrance of Keras comes by here.
            self._pay()
            self._paying = True
            try:
                result = inner(*args)
            finally:
                self._paying = False
            # TensorFlow returns the logs, JAX (logs, state).
            logs = result[0] if isinstance(result, tuple) else result
            logs["epsilon"] = self._shown_epsilon()
            if self._run.limited and self._run.paid == self._run.allowed:
                self.stop_training = True
            return result

        self.train_function = pay_and_step

    def train_step(self, *args):
        if not self._paying:
            raise RuntimeError(
                "train_step was called directly, and nobody paid for it. Use fit, or "
                "`for batch in model.batches(x, y): model.train_on_batch(batch)`."
            )
        return steps.backend().train_step(self, *args)

    def update_metrics(self, x, y, outputs, per_example_losses, mask):
        """Updates loss and metrics with the real examples of a batch; returns their results."""
        self._loss_tracker.update_state(per_example_losses, sample_weight=mask)
        return self.compute_metrics(x, y, outputs, sample_weight=mask)

    # --- the clip ----------------------------------------------------------------------------

    def _make_clip(self):
        if self.adaptive is None or self._clip_weight is not None:
            return
        initial = self.adaptive.initial
        if initial is None:
            initial = self.loss_gradient_bound if math.isfinite(self.loss_gradient_bound) else 1.0
        self._clip_weight = self.add_weight(
            shape=(), initializer=keras.initializers.Constant(initial), trainable=False, name="clip"
        )

    def current_clip(self):
        """The norm to which rows of the loss gradient are clipped: a float, or a scalar tensor."""
        if self.adaptive is not None:
            return ops.minimum(self._clip_weight.value, self.loss_gradient_bound)
        if self.clip is None:
            return self.loss_gradient_bound
        return min(self.clip, self.loss_gradient_bound)

    def move_clip(self, fraction):
        """The adaptive clip's move towards its quantile, from the noisy fraction within it."""
        moved = self._clip_weight * ops.exp(
            -self.adaptive.learning_rate * (fraction - self.adaptive.quantile)
        )
        ceiling = min(self.loss_gradient_bound, 1e30)
        self._clip_weight.assign(ops.clip(moved, 1e-12, ceiling))

    # --- what is spent -----------------------------------------------------------------------

    def spent(self, delta: float | None = None) -> Spent:
        """Privacy spent so far, by this model and in its ledger.

        Args:
            delta: by default the budget's.

        Returns:
            `Spent`, with `.epsilon`, `.delta`, `.relation` and `.steps`.

        Raises:
            ValueError: no delta, and no budget to take it from.
        """
        if delta is None:
            if self.budget is None:
                raise ValueError("`delta` must be given where the model has no budget.")
            delta = self.budget.delta
        runs = self._spent_runs()
        epsilon = self._epsilon(runs, delta)
        return Spent(
            float(epsilon),
            float(delta),
            getattr(epsilon, "relation", self.sampling.relations[0]),
            sum(run.steps for run in runs),
        )

    def get_config(self):
        raise TypeError(
            "A PrivateModel is not saved: it stands for a training run and what it spent. Save "
            "`model.network`, and keep what was spent with `ledger=`."
        )

    def report(self, expected_batch_size: float | None = None) -> Report:
        """The sensitivity report: where every Δ comes from and how much noise it gets.

        Args:
            expected_batch_size: for a scheme whose batch is the data set, before `fit`.

        Returns:
            `lipdp.report.Report`: print it, or take `to_dict()`.

        Raises:
            RuntimeError: the model is not compiled: the loss' gradient bound is not known.
        """
        if self.private_loss is None:
            raise RuntimeError("Call compile(...) first: the bounds start at the loss.")
        return Report.of(self, expected_batch_size)

    def _spent_runs(self):
        if self.ledger is not None:
            # With a run open, the file holds what it reserved; what it paid for is what counts.
            earlier = self._run.earlier if self._run else self.ledger.runs
        else:
            earlier = self._runs
        now = [self._run.spent] if self._run and self._run.paid else []
        return [*earlier, *now]

    def _epsilon(self, runs, delta):
        """Epsilon of the runs; the randomised certificates are paid for out of delta.

        A step whose certificates hold is the mechanism that is accounted; they fail with
        probability p in all. Then the release is (ε, δ' + (1 + e^ε)·p)-private.
        """
        failure = norms.FAILURE_PROBABILITY * self._certificates() * sum(r.steps for r in runs)
        reserve = 1e-3 * delta if failure else 0.0
        epsilon = accountants.epsilon(runs=runs, delta=delta - reserve)
        if failure and (epsilon > 500 or (1 + math.exp(epsilon)) * failure > reserve):
            return math.inf
        return epsilon

    def _certificates(self):
        return sum(
            v.constraint.certifications(v.shape)
            for v in self.network.trainable_variables
            if isinstance(v.constraint, Projection)
        )

    def _accounted_delta(self):
        return self.budget.delta * (1 - 1e-3 if self._certificates() else 1.0)

    def _check_left(self):
        """Raises `BudgetExceeded` where not one more step is within the budget."""
        if self._run is not None:
            if self._run.limited and self._run.paid >= self._run.allowed:
                raise BudgetExceeded(self._exceeded())
        elif self.budget is not None and self.noise_multiplier is not None and self._spent_runs():
            runs = self._spent_runs()
            more = dataclasses.replace(runs[-1], steps=runs[-1].steps + 1)
            if self._epsilon([*runs[:-1], more], self.budget.delta) > self.budget.epsilon:
                raise BudgetExceeded(self._exceeded())

    def _exceeded(self):
        spent = self.spent()
        return (
            f"The next step would overspend the budget (ε = {self.budget.epsilon:g}, "
            f"δ = {self.budget.delta:g}); ε = {spent.epsilon:.4f} is spent in {spent.steps} steps. "
            "It has not run."
        )

    def _prepare(self, x, y, steps_per_epoch, epochs):
        """Checks everything, calibrates, opens the run; returns the batches of an epoch."""
        if self.private_loss is None:
            raise RuntimeError("Call compile(optimizer, loss) before training.")
        if self._run is not None:
            raise RuntimeError("This model is training already; a run has one loop at a time.")
        x, y = check_data(x, y, self.network.input_shape[1:])
        output_shape = self.network.output_shape[1:]
        losses.check_targets(self.private_loss, y, output_shape)
        n = len(x)
        self.sampling.validate(n)
        per_epoch = self.sampling.steps_per_epoch(n)
        if steps_per_epoch is not None:
            if isinstance(self.sampling, ShuffledEpochs):
                raise ValueError(
                    f"`steps_per_epoch` is fixed by {self.sampling!r}: {per_epoch} for {n} "
                    "examples."
                )
            per_epoch = _check_count(steps_per_epoch, "steps_per_epoch")
        _check_network(self.network)
        planned = per_epoch * epochs

        prior = self._spent_runs()
        constants = {"sampling": self.sampling, "num_examples": n}
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
                if prior and self._epsilon(prior, self.budget.delta) >= self.budget.epsilon:
                    raise BudgetExceeded(self._exceeded()) from error
                raise
        allowed = planned
        if self.budget is not None and planned:
            spends = self._epsilon(
                [*prior, TrainingRun(self.noise_multiplier, steps=planned, **constants)],
                self.budget.delta,
            )
            if spends > self.budget.epsilon:
                allowed = 0
                if not prior or self._epsilon(prior, self.budget.delta) < self.budget.epsilon:
                    allowed = accountants.calibrate_steps(
                        epsilon=self.budget.epsilon,
                        delta=self._accounted_delta(),
                        noise_multiplier=self.noise_multiplier,
                        prior=prior,
                        max_steps=planned,
                        **constants,
                    )
            if allowed == 0:
                raise BudgetExceeded(self._exceeded())

        divisor = self.sampling.expected_batch_size(n)
        gradient_noise, count_noise = self.noise_multiplier, 0.0
        if self.adaptive is not None:
            gradient_noise, count_noise = self.adaptive.split(self.noise_multiplier, divisor)
        mechanism = Mechanism(self.noise_multiplier, gradient_noise, count_noise, divisor)
        if mechanism != self.mechanism:
            self.mechanism = mechanism
            self.train_function = None  # its constants are compiled in

        # Loaded or assigned weights need not be in the set in which the bounds hold.
        for variable in self.network.trainable_variables:
            if isinstance(variable.constraint, Projection):
                variable.assign(variable.constraint(variable))
        position = (sum(run.steps for run in prior), self._fits)
        self._fits += 1
        run = TrainingRun(self.noise_multiplier, steps=0, **constants)
        self._run = _Run(self.ledger, prior, run, allowed, allowed < planned, per_epoch)
        bucket = 1
        compiled = self.jit_compile or keras.backend.backend() == "jax"
        if compiled and isinstance(self.sampling, accountants.PoissonSampling):
            # XLA compiles for each shape: about six lie within the batch size's spread.
            bucket = 2 ** max(0, math.ceil(math.log2(math.sqrt(divisor))))
        return DrawnBatches(x, y, self.sampling, self._source, position, per_epoch, bucket)

    def _pay(self):
        if self._run is None:
            self._check_left()
            raise RuntimeError("Only fit, or train_on_batch within `batches`, can train.")
        self._check_left()
        self._run.pay()

    def _settle(self):
        if self._run is not None:
            run, self._run = self._run, None
            run.close()
            if run.paid and self.ledger is None:
                self._runs.append(run.spent)

    def _shown_epsilon(self):
        """Epsilon at the end of the epoch that is running: exact there, an upper bound before."""
        run = self._run
        end = min(-(-run.paid // run.per_epoch) * run.per_epoch, run.allowed)
        if end not in run.shown:
            delta = self.budget.delta if self.budget else 1e-5
            spent = dataclasses.replace(run.spent, steps=end)
            run.shown[end] = float(self._epsilon([*run.earlier, spent], delta))
        return run.shown[end]

    def _check_head(self, loss):
        last = self.network.layers[-1]
        activation = getattr(getattr(last, "activation", None), "__name__", type(last).__name__)
        if activation.lower() in ("softmax", "sigmoid") and isinstance(
            loss,
            (
                losses.SparseCategoricalCrossentropy,
                losses.CategoricalCrossentropy,
                losses.BinaryCrossentropy,
            ),
        ):
            raise ValueError(
                f"The network ends in a {activation.lower()}, and this loss takes logits: remove "
                f"it from layer {last.name!r}."
            )


class _Run:
    """A run of steps that is being paid for."""

    def __init__(self, ledger, earlier, run, allowed, limited, per_epoch):
        self.earlier = list(earlier)
        self.run = run
        self.allowed = allowed  # steps that may be paid for
        self.limited = limited  # whether that is the budget's word, or just the plan
        self.per_epoch = per_epoch
        self.paid = 0
        self.shown = {}
        self._entry = None
        if ledger is not None:
            self._entry = ledger.open_run(
                noise_multiplier=run.noise_multiplier,
                sampling=run.sampling,
                num_examples=run.num_examples,
                max_steps=allowed,
            )

    @property
    def spent(self):
        return dataclasses.replace(self.run, steps=self.paid)

    def pay(self):
        if self._entry is not None:
            self._entry.pay()
        self.paid += 1

    def close(self):
        if self._entry is not None:
            self._entry.close()


def _check_budget(budget):
    if budget is not None and not isinstance(budget, Budget):
        raise TypeError(f"`budget` must be lipdp.Budget(epsilon=..., delta=...); got {budget!r}.")
    return budget


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


def _check_clip(clip):
    if clip is None:
        return None, None
    if isinstance(clip, AdaptiveClip):
        return None, clip
    if isinstance(clip, bool) or not isinstance(clip, (int, float)) or not 0 < clip < math.inf:
        raise ValueError(
            f"`clip` must be a positive, finite number or lipdp.AdaptiveClip(...); got {clip!r}."
        )
    return float(clip), None


def _check_count(value, name, least=1):
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"`{name}` must be an integer of at least {least}; got {value!r}.")
    return int(value)


def _check_network(network):
    """Refuses a network that cannot be trained privately, by its own words."""
    if not isinstance(network, keras.Model) or isinstance(network, PrivateModel):
        raise TypeError(
            "`network` must be a keras.Sequential or functional keras.Model; got "
            f"{type(network).__name__}."
        )
    if getattr(network, "inputs", None) and all(n is not None for n in network.input_shape[1:]):
        # `add_loss` shows only in a call; the walk below then finds what it left.
        probe = ops.zeros((1, *network.input_shape[1:]), dtype=network.inputs[0].dtype)
        network(probe, training=True)
    gradient_bounds(network, 1.0)
    if not network.trainable_variables:
        raise ValueError(f"`network` {network.name!r} has no trainable weights.")
    if len(network.inputs) != 1:
        raise ValueError(f"`network` must have one input; {network.name!r} has several.")
