"""PrivateModel: what Keras calls, and what its users ask."""

import contextlib
import functools
import inspect
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
from keras import ops
from keras.src.utils.tracking import DotNotTrackScope

import accountants
from accountants import Budget
from accountants.mechanisms import UNITS
from accountants.sampling import Sampling
from accountants.validation import check_choice, check_integer
from lipdp import losses
from lipdp.bounds.projections import project
from lipdp.data.augmentation import Augmentation
from lipdp.data.batches import DrawnBatch, DrawnBatches
from lipdp.data.opening import held_out
from lipdp.devices import SINGLE_DEVICE
from lipdp.inspection.check import as_graph, check_trainable, check_units
from lipdp.metrics import MetricsOfLogits
from lipdp.noise import SecureNoise, make_noise
from lipdp.outputs import side_by_side
from lipdp.randomness import RandomSource
from lipdp.report import Report
from lipdp.training import steps
from lipdp.training.arguments import (
    at_home,
    check_augmentation,
    check_keras_batches,
    check_loss,
    check_loss_bound,
    check_max_sample_weight,
    check_optimizer,
    default_clip,
    warn_of_monitors,
)
from lipdp.training.attained import attained_gradients
from lipdp.training.clipping import AdaptiveClip, PerLayerClip, check_clip, clip_state
from lipdp.training.defaults import default_optimizer
from lipdp.training.history import History
from lipdp.training.plan import Plan, allocation_of, make_plan, step_of
from lipdp.training.settings import changed_settings, settings_of
from lipdp.training.spending import Spending, Spent, certificates
from lipdp.training.statements import circumstances, statement_of
from lipdp.training.trial import over_positions, try_loss

__all__ = ["PrivateModel"]

# What a subclass must leave alone: each is a part of the step, or decides what is paid for.
_STEP_METHODS = (
    "batches",
    "compile",
    "compute_loss",
    "compute_metrics",
    "current_clip",
    "fit",
    "make_train_function",
    "non_trainable_variables",
    "sample_weight_bound",
    "spent",
    "train_on_batch",
    "train_step",
    "trainable_variables",
    "update_metrics",
)


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
        sampling: how batches are drawn: `lipdp.PoissonSampling(batch_size)`, `TruncatedPoisson`,
            `FixedSize`, `RandomAllocation`, `ShuffledEpochs` or `FullBatch`, each accounted as it
            is drawn; `CyclicPoisson` or `FixedEpochs` for correlated noise. By default Poisson
            batches whose size is chosen at the first `fit`; `plan` then says what was chosen.
        clip: largest norm of an example's loss gradient, or `lipdp.AdaptiveClip(...)`. By
            default the loss' own bound; a loss without one needs a clip. Or
            `lipdp.PerLayerClip(...)`: each layer clips its own gradient, and none needs a bound.
            That is the default for a network that has no layer of lipdp and no certified bounds.
        augmentation: `lipdp.Augmentation(layers, views)`: random views of each example.
        physical_batch_size: most rows that are computed at once: a drawn batch is split into
            pieces of this size, whose gradients are summed before the noise, once. Same result,
            less memory.
        allocation: how noise is shared over the weights: `"global"` (the default), `"per_weight"`,
            `"least"` (least total noise), or a dict: for the path of each trainable weight its
            share of the budget (of `1/σ²`), up to a factor. With `PerLayerClip` it is shared over
            the layers with trained weights, `"per_weight"` (equal shares) is the default, and a
            dict names layers: by their names, or their paths where two share a name.
        noise: `"gaussian"`, floating-point noise, independent in every step; `"secure"`, discrete
            Gaussian noise on a grid, from the operating system's cryptographic generator, which
            leaves no traces in the last bits (`lipdp.noise.SecureNoise` has its guarantee and its
            limits); or correlated over steps: `lipdp.BandedNoise()` with `CyclicPoisson`,
            `lipdp.ToeplitzNoise()` with `FixedEpochs`.
        unit: what ε is for: `"example"`, a row of the data; or `"group"`, all rows of one person,
            say, whose ids `fit` takes as `groups`. The sampling then draws groups, and a batch size
            counts them.
        examples_per_group: of a drawn group so many examples enter a step at most, chosen afresh
            each time; their mean counts as one example. By default 4; more make a step less noisy
            and slower.
        ledger: path of a file that keeps what was spent, across processes.
        seed: for tests only: whoever knows it can subtract the noise.

    Raises:
        TypeError: an argument is not what it should be.
        ValueError: a value out of range, or a network without bounds.
        UnknownLayerError: a layer has no bound, or cannot be private.

    >>> import numpy as np
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

    _plan = None  # of the run that is open

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in _STEP_METHODS:
            # Inherited ones count: a class that is mixed in replaces a method as well.
            found, own = (inspect.getattr_static(c, name) for c in (cls, PrivateModel))
            if found is not own:
                raise TypeError(
                    f"{cls.__name__}.{name} would replace a part of the private step, and what is "
                    "claimed would not be what runs. Leave it out: a loss of your own goes to "
                    "`compile(loss=...)`, a loop of your own is `for batch in model.batches(x, "
                    "y): model.train_on_batch(batch)`."
                )

    def __init__(
        self,
        network: keras.Model,
        *,
        budget: Budget | None = None,
        noise_multiplier: float | None = None,
        sampling: Sampling | None = None,
        noise: Any = "gaussian",
        clip: float | AdaptiveClip | PerLayerClip | None = None,
        augmentation: Augmentation | None = None,
        physical_batch_size: int | None = None,
        allocation: str | Mapping[str, float] | None = None,
        unit: str = "example",
        examples_per_group: int | None = None,
        ledger: str | os.PathLike[str] | None = None,
        seed: int | None = None,
        name: str | None = None,
    ) -> None:
        # Whatever the policy of the day: what it adds to the network is computed in float32.
        super().__init__(name=name, dtype="float32")
        self.unit = check_choice(unit, "unit", UNITS)
        if unit == "example" and examples_per_group is not None:
            raise ValueError('`examples_per_group` goes with unit="group".')
        most = 4 if examples_per_group is None else examples_per_group
        self.examples_per_group = check_integer(most, "examples_per_group")
        self.spending = Spending(
            budget,
            noise_multiplier,
            ledger,
            lambda: certificates(self.network),
            History(lambda: self.network._flatten_layers()),
            unit,
        )
        if sampling is not None and not isinstance(sampling, Sampling):
            raise TypeError(
                "`sampling` must say how batches are drawn, for instance "
                f"lipdp.PoissonSampling(batch_size=256); got {sampling!r}."
            )
        self.sampling = sampling  # None: chosen at the first `fit`
        self.noise = make_noise(noise, sampling)
        if seed is not None and isinstance(self.noise, SecureNoise):
            raise ValueError(
                f"noise='secure' cannot be repeated: leave `seed` out; got seed={seed!r}."
            )
        self.plan = None
        self.chosen_epochs = None  # together with the sampling
        self._left_open = sampling is None and clip is None
        clip = default_clip(network, self._left_open) if clip is None else check_clip(clip)
        self.clip = clip
        if self.noise.correlated and getattr(clip, "adaptive", False):
            raise ValueError(
                "`clip` must be fixed with correlated noise, a number or "
                "lipdp.PerLayerClip(threshold=...): what an adaptive one counts in each step would "
                f"need noise of its own; got {clip!r}."
            )
        if physical_batch_size is not None:
            physical_batch_size = check_integer(physical_batch_size, "physical_batch_size")
        self.physical_batch_size = physical_batch_size

        self.units = None  # layers that clip their own gradients
        if isinstance(clip, PerLayerClip):
            self.units = check_units(network)
        else:
            check_trainable(network)
        # The same weights, with inputs that are known, and one output in which all of them are.
        self.graph, self.outputs = side_by_side(as_graph(network))
        if self.units is not None and self.graph is not network:
            self.units = check_units(self.graph)  # which may call its layers in another order
        if self.outputs is not None:
            self.output_names = list(self.outputs.names)  # where Keras looks for them
        self.augmentation = check_augmentation(augmentation, self.graph)
        self.network = network
        if allocation is None:
            allocation = "global" if self.units is None else "per_weight"
        self.allocation = allocation if isinstance(allocation, str) else dict(allocation)
        allocation_of(self)
        self.random_source = RandomSource(seed)
        self.fits = 0  # runs that were begun
        self.devices = SINGLE_DEVICE
        self.private_loss = None
        self.max_sample_weight = None
        self.clip_state = None
        self.step = None  # a PrivateStep: all that a private step reads
        self.step_halves = self.half_step = None  # on JAX
        self.settings = None  # those that `compile` saw
        self.tried = None  # for which targets losses and metrics were tried
        self._steps_per_call = 1
        self._paying = False
        self._open_batch = None
        self._held_weights = None  # those that steps rely on, as the last one left them
        self.built = True
        before = sum(use.run.steps for use in self.spending.beside_ledger)
        if before:
            warnings.warn(
                f"This network was trained privately before, in {before} steps that count: "
                "spent() and the budget begin with them. To start anew, build the network again, "
                "or take keras.models.clone_model(network).",
                stacklevel=2,
            )

    # --- Keras -------------------------------------------------------------------------------

    def call(self, inputs, training=None):
        # A drawn batch carries the key of its noise, and weights, beside the inputs.
        if isinstance(inputs, dict) and {"inputs", "key"} <= set(inputs):
            inputs = inputs["inputs"]
        return self.network(inputs, training=training)

    # While a run is open, the lists of variables are those that it began with: Keras pairs them by
    # their order with the values of the step, and `trainable` may change in between.

    @property
    def trainable_variables(self):
        return self._plan.trainable_variables if self._plan else super().trainable_variables

    @property
    def non_trainable_variables(self):
        if self._plan:
            return self._plan.non_trainable_variables
        # The memory of correlated noise is state of the step, but no weight: it is never saved.
        return [*super().non_trainable_variables, *self.noise.variables]

    def compile(
        self,
        optimizer: str | keras.optimizers.Optimizer | None = None,
        loss: str | losses.Loss | Mapping | Sequence | None = None,
        metrics: list | Mapping | None = None,
        weighted_metrics: list | Mapping | None = None,
        loss_weights: Mapping[str, float] | Sequence[float] | None = None,
        max_sample_weight: float | None = None,
        run_eagerly: bool = False,
        steps_per_execution: int = 1,
        jit_compile: bool | str = "auto",
    ) -> None:
        """Configures training, as Keras' `compile` does.

        Args:
            optimizer: any Keras optimizer or its name. It sees noisy gradients only. By default SGD
                with momentum and averaged weights, whose learning rate is chosen in `fit`, when
                the noise is known, and decays to zero.
            loss: a name, a Keras loss or a function `(y_true, y_pred)`. Names of cross-entropies
                mean those on logits; with `PerLayerClip`, on the probabilities of a network that
                ends in the softmax or sigmoid that belongs to them. Its reduction is ignored: an
                example's loss is the mean over its positions. Without a known gradient bound it
                needs a `clip`. Of several outputs a dict with one for each, by name, or a list; or
                one for all.
            metrics: Keras metrics; on training data not covered by the guarantee. Of several
                outputs a dict of lists, by name.
            weighted_metrics: the same, weighted by the sample weights where `fit` is given any.
            loss_weights: of several outputs, what the loss of each is multiplied by: public
                constants, as the losses have them.
            max_sample_weight: largest weight of an example that `fit` may be given, a public
                constant; without it weights are refused. The bounds start at the clip times this,
                so noise grows with it. Weights may lie between 0 and it.
            steps_per_execution: steps of `fit` that run, and are paid for, together; divides the
                steps of an epoch.
            run_eagerly, jit_compile: as in Keras; `"auto"` uses XLA on JAX, and on TensorFlow
                where there is a GPU.

        Raises:
            TypeError, ValueError: an argument is not one of these.
        """
        if self.spending.run is not None:
            raise RuntimeError("This model is training: end the run before compile(...).")
        if self.units is not None:
            self.units = check_units(self.graph)  # of the weights that are trained now
        way = "per layer" if self.units is not None else "certified" if self._left_open else ""
        loss = check_loss(loss, loss_weights, as_graph(self.network), self.outputs, way)
        max_sample_weight = check_max_sample_weight(max_sample_weight)
        optimizer = check_optimizer(
            default_optimizer() if optimizer is None else optimizer, self.network
        )
        bound = check_loss_bound(loss, self.graph, self.clip)
        try_loss(loss, self.graph.output_shape[1:])
        if jit_compile == "auto":
            jit_compile = not run_eagerly and steps.backend().default_jit_compile()
        several = isinstance(loss, losses.Joint)
        super().compile(
            optimizer=optimizer,
            loss=self.outputs.as_given(loss.losses) if several else loss,
            loss_weights=self.outputs.as_given(loss.weights) if several else None,
            metrics=metrics,
            weighted_metrics=weighted_metrics,
            run_eagerly=run_eagerly,
            steps_per_execution=check_integer(steps_per_execution, "steps_per_execution"),
            jit_compile=jit_compile,
            auto_scale_loss=False,
        )
        if metrics is not None or weighted_metrics is not None:
            with DotNotTrackScope():  # Keras finds them in this attribute
                self._compile_metrics = MetricsOfLogits(
                    metrics, weighted_metrics, loss, getattr(self, "output_names", None)
                )
        self.tried = None
        self.private_loss = loss
        self.max_sample_weight = max_sample_weight
        self.clip_state = clip_state(self, bound)
        self.step = step_of(self)
        self.settings = settings_of(self)

    def fit(
        self,
        x: Any = None,
        y: Any = None,
        epochs: int | None = None,
        verbose: str | int = "auto",
        callbacks: Any = None,
        validation_data: Any = None,
        initial_epoch: int = 0,
        steps_per_epoch: int | None = None,
        validation_steps: int | None = None,
        validation_batch_size: int | None = None,
        validation_freq: int | Sequence[int] = 1,
        sample_weight: Any = None,
        class_weight: dict[int, float] | None = None,
        batch_size: int | None = None,
        validation_split: float = 0.0,
        shuffle: bool = True,
        groups: Any = None,
    ) -> keras.callbacks.History:
        """Trains privately. Batches are drawn from `x`, `y` as `sampling` says.

        Training ends before the step that would overspend the budget. A further call goes on
        from what has been spent, with the sampling of the first. A learning rate that was left
        open is chosen anew for each call, and decays to zero over its steps.

        Args:
            x: inputs, an array `(examples, ...)`, finite; for several inputs a dict by their names
                or a list in their order. Or, without `y`: a finite `tf.data.Dataset` or
                `PyDataset` of batches, which is read into memory (under `ShuffledEpochs` a
                `tf.data.Dataset` is read in its own order, a pass an epoch, and never kept; its
                order must not depend on what the examples hold); or anything with `len()` whose
                items are pairs `(x, y)`, of which only drawn ones are read, in another thread.
            y: targets, an array `(examples, ...)`; for several outputs a dict by their names, or a
                list in their order.
            epochs: passes over the data, on average; by default as many as were chosen together
                with the sampling, and one where the sampling was given.
            verbose, callbacks, validation_*, initial_epoch: as in Keras. What may be
                endless, such as a generator, needs `validation_steps`.
            steps_per_epoch: steps an epoch, where the scheme does not fix them.
            sample_weight: `(examples,)`, each from 0 to compile's `max_sample_weight`, and made of
                public knowledge or of its own example: the gradient of an example, once clipped,
                is multiplied by its weight.
            class_weight: `{label: weight}` of public constants; not counted in the private labels.
            batch_size: that of `sampling`; where none was given, of Poisson batches.
            validation_split: share of the arrays' last rows that is evaluated on. They are not
                trained on, and no part of the examples that ε is about.
            shuffle: True: `sampling` says how batches are drawn.
            groups: `(examples,)` where `unit="group"`: the id of each example's group, an integer
                or a text. How many groups there are is public, as the number of examples is else.

        Returns:
            Keras' `History`; `epsilon` is in its logs (exact at the end of each epoch), at the
            budget's delta, or at 1e-5 without a budget.

        Raises:
            BudgetExceeded: not one step is left.
            TypeError, ValueError: data or arguments that cannot be trained on, or metrics or
                validation data that do not fit; nothing is spent.
        """
        initial_epoch = check_integer(initial_epoch, "initial_epoch", least=0)
        if epochs is not None:
            epochs = max(0, check_integer(epochs, "epochs") - initial_epoch)
        if isinstance(validation_freq, (list, tuple)):
            validation_freq = [check_integer(epoch, "validation_freq") for epoch in validation_freq]
        else:
            check_integer(validation_freq, "validation_freq")
        if validation_batch_size is not None:
            check_integer(validation_batch_size, "validation_batch_size")
        if validation_steps is not None:
            check_integer(validation_steps, "validation_steps")
        sampling = self.sampling
        if sampling is None and batch_size is not None:
            sampling = accountants.PoissonSampling(batch_size)
        check_keras_batches(batch_size, shuffle, sampling)
        if validation_split:
            if validation_data is not None:
                raise ValueError("`validation_split` and `validation_data` cannot both be given.")
            if groups is not None:
                raise ValueError(
                    "`validation_split` could hold out some examples of a group and train on "
                    "others: give `validation_data` of other groups."
                )
            (x, y, sample_weight), validation_data = held_out(x, y, sample_weight, validation_split)
        warn_of_monitors(callbacks)
        with self._running(
            *(x, y, epochs, steps_per_epoch, sample_weight, class_weight, groups),
            self.steps_per_execution,
            (validation_data, validation_batch_size, validation_steps),
            sampling=sampling,
        ) as batches:
            if validation_data is not None and self.devices.processes > 1:
                raise ValueError(
                    "`validation_data` is for one process; with several, save the network and "
                    "evaluate it by itself."
                )
            run, epochs = self.spending.run, self._plan.epochs
            if run.limited:
                warnings.warn(
                    f"The budget allows {run.allowed} of the {len(batches) * epochs} steps that "
                    "were asked for; training will end there.",
                    stacklevel=2,
                )
            with steps.backend().keep_weights(self):
                history = super().fit(
                    steps.backend().keras_batches(self, batches),
                    epochs=initial_epoch + epochs,
                    verbose=verbose,
                    callbacks=callbacks,
                    validation_data=self._plan.validation_data,
                    initial_epoch=initial_epoch,
                    validation_steps=validation_steps,
                    validation_batch_size=validation_batch_size,
                    validation_freq=validation_freq,
                    shuffle=False,
                )
            if self.optimizer.use_ema:
                # Keras averages weights as they are before their projection. On JAX it also lets a
                # weight and its average share memory, which the next run could not give away twice.
                for variable in self.network.trainable_variables:
                    variable.assign(ops.copy(variable.value))
                project(self.network.trainable_variables)
            return history

    def batches(
        self,
        x: Any,
        y: Any,
        epochs: int | None = None,
        steps_per_epoch: int | None = None,
        sample_weight: Any = None,
        class_weight: dict[int, float] | None = None,
        groups: Any = None,
    ) -> Iterator[DrawnBatch]:
        """Batches for a loop of your own: `for batch in model.batches(x, y): ...`.

        Each is good for one `train_on_batch(batch)`. Arguments and errors as for `fit`; the
        generator ends before the step that would overspend.

        Yields:
            `DrawnBatch`.

        Raises:
            RuntimeError: a batch was left out, and the scheme counts on steps in their order.
        """
        if epochs is not None:
            epochs = check_integer(epochs, "epochs")
        data = (x, y, epochs, steps_per_epoch, sample_weight, class_weight, groups)
        with self._running(*data) as drawn:
            for _ in range(self._plan.epochs):
                drawn.on_epoch_begin()
                for index in range(len(drawn)):
                    if self.spending.run.allowed <= self.spending.run.paid:
                        return
                    self._open_batch = drawn.request(index)
                    yield self._open_batch
                    drawn.check_taken(index + 1)

    def end_run(self) -> None:
        """Ends the run that is open, if one is: what it paid for counts as spent.

        `fit`, and a loop over `batches`, end theirs themselves, also where an error or an interrupt
        ends them. This is for a loop that was left while its generator is still kept somewhere.
        """
        self._open_batch = self._plan = self._held_weights = None
        self.spending.settle()

    def train_on_batch(self, batch: DrawnBatch, y: None = None, return_dict: bool = False) -> Any:
        """One private step on a batch that `batches` drew.

        Raises:
            BudgetExceeded: the step would overspend.
            ValueError: the batch was drawn by somebody else, or has been used: no scheme would
                describe what was sampled.
        """
        self.spending.check_left()
        if not isinstance(batch, DrawnBatch) or y is not None or batch is not self._open_batch:
            raise ValueError(
                "train_on_batch takes the batch that `for batch in model.batches(x, y)` has just "
                "drawn, once: the guarantee holds for batches drawn as `sampling` says, and "
                "nothing is known of others."
            )
        self._open_batch = None
        features, targets, mask = steps.backend().to_device(self, batch)
        return super().train_on_batch(
            features, targets, sample_weight=mask, return_dict=return_dict
        )

    def make_train_function(self, force=False):
        if self.train_function is not None and not force:
            return
        make = functools.partial(super().make_train_function, force=True)
        steps.backend().make_train_function(self, make)
        inner = self.train_function

        def pay_and_step(*args):
            try:
                args = steps.backend().prefetch(args, self._steps_per_call)
                self._check_settings()
                self.spending.check_left(self._steps_per_call)  # before a weight is touched
                # Released, so that the step may write into the memory of the weights.
                held, self._held_weights = self._held_weights, None
                if self._plan is not None:  # otherwise nobody can pay
                    args = steps.backend().put_inside(self._plan, args, held)
                del held
                # Paid for before it runs; every entrance of Keras comes by here.
                self.spending.pay(self._steps_per_call)
                self._paying = True
                result = inner(*args)
                self._held_weights = steps.backend().held_weights(self._plan, result)
            except BaseException:
                steps.backend().give_back(self, args)
                raise
            finally:
                self._paying = False
            # TensorFlow returns the logs, JAX (logs, state).
            logs = result[0] if isinstance(result, tuple) else result
            logs["epsilon"] = self.spending.epsilon_at_epoch_end()
            run = self.spending.run
            if run.limited and run.paid == run.allowed:
                self.stop_training = True
            return result

        self.train_function = pay_and_step

    # Everything is built when a run is planned. Keras would draw a batch to see its shapes, average
    # it over the devices, with its key, and hand the mask to the loss as if it weighed positions.

    def _symbolic_build(self, iterator=None, data_batch=None):
        if self.spending.run is None:
            super()._symbolic_build(iterator=iterator, data_batch=data_batch)

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        if self.spending.run is None:
            super()._maybe_symbolic_build(iterator=iterator, data_batch=data_batch)

    def train_step(self, *args):
        if not self._paying:
            raise RuntimeError(
                "train_step was called directly, and nobody paid for it. Use fit, or "
                "`for batch in model.batches(x, y): model.train_on_batch(batch)`."
            )
        return steps.backend().train_step(self, *args)

    def update_metrics(self, y, outputs, per_example_losses, mask, weights=None):
        """Updates loss and metrics with the real examples of a batch; returns their results.

        As in Keras, weights scale the losses, and count in `weighted_metrics` alone.
        """
        weighted = mask
        if weights is not None:
            weighted = mask * ops.cast(weights, mask.dtype)
            per_example_losses = per_example_losses * weights
        self._loss_tracker.update_state(per_example_losses, sample_weight=mask)
        y, outputs = {None: y}, {None: outputs}
        if self.outputs is not None:
            y, outputs = y[None], self.outputs.apart(outputs[None])
            trackers = zip(self.private_loss.parts(), self._compile_loss.metrics, strict=True)
            for (name, loss, *_), tracker in trackers:
                values = losses.per_example(loss, y[name], outputs[name])
                tracker.update_state(values, sample_weight=mask)
        if self._compile_metrics is not None:
            for name, *lists in self._compile_metrics.of_outputs():
                # Keras would let padding into the unweighted ones.
                for metric, weight in zip(lists, (mask, weighted), strict=True):
                    if metric is not None:
                        weight = over_positions(weight, outputs[name])
                        metric.update_state(y[name], outputs[name], sample_weight=weight)
        return self.get_metrics_result()

    @property
    def sample_weight_bound(self) -> float:
        """What an example can weigh at most: the bounds start at the clip times this."""
        return 1.0 if self.max_sample_weight is None else self.max_sample_weight

    def current_clip(self) -> Any:
        """The norm to which rows of the loss gradient are clipped: a float, or a scalar tensor."""
        return self.clip_state.current()

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
        sampling = accountants.PoissonSampling(1) if self.sampling is None else self.sampling
        return self.spending.spent(delta, sampling)

    def statement(self, delta: float | None = None) -> accountants.Statement:
        """What can be filed about the privacy of this network: who is protected, how far, from
        what, and what is not covered. With a ledger: of all that is in it.

        Args:
            delta: by default the budget's.

        Returns:
            `accountants.Statement`: print it, or take `to_dict()`.

        Raises:
            ValueError: no delta, and no budget to take it from.
        """
        return statement_of(self, delta)

    def save(self, filepath: Any, overwrite: bool = True, zipped: bool | None = None) -> None:
        """Saves the network, which is what a run is for; `ModelCheckpoint` does so, too.

        The run itself is not saved: keep what was spent with `ledger=`.
        """
        self.network.save(at_home(filepath), overwrite=overwrite, zipped=zipped)

    def save_weights(self, filepath: Any, *args: Any, **kwargs: Any) -> None:
        """Saves the weights of the network and the state of this run, as Keras does."""
        super().save_weights(at_home(filepath), *args, **kwargs)

    def load_weights(self, filepath: Any, *args: Any, **kwargs: Any) -> None:
        """Loads what `save_weights` wrote, as Keras does."""
        super().load_weights(at_home(filepath), *args, **kwargs)

    def export(self, filepath: Any, *args: Any, **kwargs: Any) -> Any:
        """Exports the network for serving, as Keras' `export` does."""
        return self.network.export(at_home(filepath), *args, **kwargs)

    def get_config(self):
        raise TypeError(
            "A PrivateModel is not saved: it stands for a training run and what it spent. Save "
            "`model.network`, and keep what was spent with `ledger=`."
        )

    def report(
        self, expected_batch_size: float | None = None, *, sample: tuple | None = None
    ) -> Report:
        """The sensitivity report: where every Δ comes from and how much noise it gets.

        Args:
            expected_batch_size: for a scheme whose batch is the data set, before `fit`.
            sample: some examples `(x, y)`, whose gradients are put beside their bounds. That part
                of the report is **not** private.

        Returns:
            `lipdp.report.Report`: print it, or take `to_dict()` or `to_html(path)`.

        Raises:
            RuntimeError: the model is not compiled: the loss' gradient bound is not known.
            TypeError, ValueError: the sample does not fit the network.
        """
        if self.private_loss is None:
            raise RuntimeError("Call compile(...) first: the bounds start at the loss.")
        if self.sampling is None and expected_batch_size is None:
            raise RuntimeError(
                "The sampling is chosen at the first fit(...). Before, give `expected_batch_size`."
            )
        if sample is not None:
            if not isinstance(sample, tuple) or len(sample) != 2:
                raise TypeError(f"`sample` must be a pair (x, y); got {type(sample).__name__}.")
            sample = attained_gradients(self, *sample)
        return Report.of(self, expected_batch_size, attained=sample)

    @property
    def budget(self) -> Budget | None:
        """What may be spent."""
        return self.spending.budget

    @property
    def noise_multiplier(self) -> float | None:
        """Std of the noise over the sensitivity; None until it is calibrated."""
        return self.spending.noise_multiplier

    @property
    def ledger(self) -> accountants.Ledger | None:
        """The file that keeps what was spent."""
        return self.spending.ledger

    def take_sampling(self, sampling: Sampling) -> None:
        """Settles the sampling that was left open, after `_check_settings`."""
        self.sampling = sampling
        self.settings = settings_of(self)

    @contextlib.contextmanager
    def _running(self, *data: Any, sampling: Sampling | None = None) -> Iterator[DrawnBatches]:
        """Plans a run, as `make_plan` does, and keeps it open while the scope lasts.

        Where planning fails, a sampling that was left open stays open: what was chosen for the data
        of a call that failed is not for those of the next.
        """
        if self.private_loss is None:
            raise RuntimeError("Call compile(optimizer, loss) before training.")
        if self.spending.run is not None:
            raise RuntimeError(
                "This model is training already; a run has one loop at a time. If that loop was "
                "left, call model.end_run()."
            )
        self._check_settings()
        before = self.sampling, self.settings, self.chosen_epochs
        try:
            if self.sampling is None and sampling is not None:
                self.take_sampling(sampling)
            plan = make_plan(self, *data)
        except BaseException:
            self.spending.settle()
            self.sampling, self.settings, self.chosen_epochs = before
            raise
        try:
            self._follow(plan)
            plan.run.about = circumstances(self)
            self.spending.begin(plan.run)
            self._plan = plan
            yield plan.batches
        finally:
            try:
                plan.batches.close()
            finally:
                if self.spending.run is plan.run:
                    self.end_run()
                plan.run.close()  # where it has not begun

    def _check_settings(self) -> None:
        """Refuses a step whose program has other constants than what Python says now."""
        changed = changed_settings(self.settings, settings_of(self))
        changed += [f"`{name}` of this model" for name in _STEP_METHODS if name in vars(self)]
        if changed:
            raise RuntimeError(
                f"Settings have changed since compile(...): {', '.join(changed)}. A step that is "
                "compiled keeps the old ones, and its noise would not fit the new: call "
                "compile(...) again. The step has not run."
            )

    def _follow(self, plan: Plan) -> None:
        """Takes over what is planned; a train function that was compiled for other steps goes."""
        now = plan.step, plan.devices, plan.steps_per_call
        before = self.step, self.devices, self._steps_per_call
        # A learning rate that was chosen is a constant of the compiled step.
        new_rate = plan.training is not None and not plan.training.own_optimizer
        if now != before or plan.new_memory or new_rate:
            self.train_function = None
        self.step, self.devices, self._steps_per_call = now
        self.plan = plan.training
        self.fits += 1
