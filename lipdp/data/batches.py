"""Batches of a data source, drawn as the sampling scheme says."""

import concurrent.futures
import dataclasses
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from keras import tree
from keras.src.trainers.data_adapters.data_adapter import DataAdapter

from accountants.sampling import Draws, Sampling
from lipdp.data.groups import Groups
from lipdp.data.opening import as_array
from lipdp.data.sources import Arrays, Records, Stream, as_type, padded
from lipdp.devices import SINGLE_DEVICE, Devices
from lipdp.randomness import RandomSource

__all__ = ["DrawnBatch", "DrawnBatches", "KerasBatches", "padding_multiple", "check_weights"]


@dataclasses.dataclass
class DrawnBatch:
    """A batch that a model drew for itself, good for one step.

    Attributes:
        inputs: `(rows, ...)`, padded with zeros; a structure of such arrays for several inputs.
        targets: `(rows, ...)`; for several outputs a dict of such arrays.
        mask: `(rows,)` float32, 1 for examples, 0 for padding.
        key: uint32 `(4,)`, the key of the step's noise.
        weights: `(rows,)` float32, or None where every example weighs 1.
        shares: `(rows,)` float32, what a row counts of its group, or None where examples are drawn.
        noise: the step's noise where the host draws it, or None.
    """

    inputs: Any
    targets: Any
    mask: np.ndarray
    key: np.ndarray
    weights: np.ndarray | None = None
    noise: np.ndarray | None = None
    shares: np.ndarray | None = None

    def as_data(self) -> tuple:
        """The tuple that Keras' loops hand to `train_step`.

        Key, weights, shares and noise travel with the inputs.
        """
        features = {"inputs": self.inputs, "key": self.key}
        for name in ("weights", "shares", "noise"):
            if (value := getattr(self, name)) is not None:
                features[name] = value
        return (features, self.targets, self.mask)

    def parts(self, number: int, first: bool = True) -> list["DrawnBatch"]:
        """The rows, cut into equal parts for the devices.

        All parts have the key. Noise of the host goes with the first of all, to be added once.

        Args:
            number: how many, a divisor of the rows.
            first: whether these parts begin the batch; another process may have its beginning.
        """
        size = len(self.mask) // number

        def part(i):
            rows = slice(i * size, (i + 1) * size)
            noise = self.noise
            if noise is not None and (i > 0 or not first):
                noise = np.zeros_like(noise)
            return DrawnBatch(
                *tree.map_structure(lambda a: a[rows], (self.inputs, self.targets)),
                self.mask[rows],
                self.key,
                None if self.weights is None else self.weights[rows],
                noise,
                None if self.shares is None else self.shares[rows],
            )

        return [part(i) for i in range(number)]


def padding_multiple(
    sampling: Sampling,
    expected_batch_size: float,
    physical_batch_size: int | None = None,
    compiled: bool = False,
    replicas: int = 1,
    group: int = 1,
) -> int:
    """The number to a multiple of which the rows of a batch are padded: a constant of the scheme.

    Args:
        sampling: how batches are drawn.
        expected_batch_size: how many examples or groups are drawn, on average.
        physical_batch_size: most rows that a device computes at once.
        compiled: whether each shape of a batch is compiled.
        replicas: devices that share out the rows.
        group: rows of a drawn group at most.

    >>> from accountants import FullBatch, PoissonSampling
    >>> padding_multiple(PoissonSampling(1000), 1000.0, compiled=True)
    32
    >>> padding_multiple(FullBatch(), 1000.0)
    1
    """
    if physical_batch_size is not None:
        return physical_batch_size * replicas
    bucket = (sampling.padded_size or 1) * group
    if sampling.padded_size is None and sampling.varying_size and compiled:
        # XLA compiles for each shape: about six lie within the batch size's spread.
        bucket = 2 ** max(0, math.ceil(math.log2(math.sqrt(expected_batch_size * group))))
    return -(-bucket // replicas) * replicas


def check_weights(
    sample_weight: Any,
    class_weight: dict[int, float] | None,
    examples: Arrays | Records | Stream,
    largest: float | None,
) -> np.ndarray | None:
    """The weight of each example, or None where none are given.

    What an example weighs may depend on public knowledge and on the example itself. Weights that
    are counted in the private data, as "balanced" class weights are, change with every label:
    no maximum of theirs makes the guarantee hold.

    Args:
        sample_weight: `(examples,)`, from 0 to `largest`.
        class_weight: weight of each class; 1 for a class that is missing, as in Keras.
        examples: the source of the examples; `class_weight` is for arrays.
        largest: the maximum that `compile` declared.

    Returns:
        A float32 array `(examples,)`, or None.

    Raises:
        TypeError: not an array of numbers, or not a dict.
        ValueError: no maximum is declared, both kinds are given, a weight is out of range, or the
            targets have no classes.

    >>> check_weights(None, {1: 2.0}, Arrays(np.ones(3), np.array([0, 1, 1])), 2.0)
    array([1., 2., 2.], dtype=float32)
    """
    if sample_weight is None and class_weight is None:
        return None
    if sample_weight is not None and class_weight is not None:
        raise ValueError("`sample_weight` and `class_weight` cannot both be given.")
    name = "class_weight" if sample_weight is None else "sample_weight"
    if isinstance(examples, Stream):
        raise ValueError(f"`{name}` needs examples that keep their places; a stream has its own.")
    if largest is None:
        raise ValueError(
            f"`{name}` needs a public maximum: compile(..., max_sample_weight=2.0), say. One "
            "example moves a gradient up to that many times further, and the noise grows with it. "
            "Weights may come from public knowledge, or each from its own example; class weights "
            "computed from the private labels (class counts, 'balanced') are not covered by the "
            "guarantee."
        )
    if sample_weight is not None:
        weights = as_array(sample_weight, name).astype("float64")
        if weights.shape != (len(examples),):
            raise ValueError(
                f"`sample_weight` must hold one number for each of the {len(examples)} examples; "
                f"got shape {weights.shape}."
            )
    elif isinstance(examples, Records):
        raise ValueError("`class_weight` needs arrays; give `sample_weight` with records.")
    elif isinstance(examples.y, dict):
        raise ValueError("`class_weight` needs one output; give `sample_weight` with several.")
    else:
        weights = _class_weights(class_weight, examples.y)
    # Written so that NaN is refused.
    if not ((weights >= 0) & (weights <= largest)).all():
        raise ValueError(
            f"`{name}` must lie between 0 and `max_sample_weight` = {largest:g}; got weights from "
            f"{weights.min()} to {weights.max()}"
            + (" (a class that is not named weighs 1)." if sample_weight is None else ".")
        )
    return weights.astype("float32")


def _class_weights(class_weight, y):
    if not isinstance(class_weight, dict):
        raise TypeError(
            "`class_weight` must be a dict of public constants, label: weight; got "
            f"{class_weight!r}. Weights that balance the classes of the private data are not "
            "covered by the guarantee."
        )
    labels = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    if labels.ndim == 2 and np.allclose(labels.sum(axis=1), 1.0, atol=1e-3):
        labels = labels.argmax(axis=1)
    if labels.ndim != 1 or (labels != np.floor(labels)).any():
        raise ValueError(
            "`class_weight` needs one label, or one distribution over the classes, an example; "
            f"got targets of shape {y.shape}. Give `sample_weight` instead."
        )
    weights = np.ones(len(labels))
    for label, weight in class_weight.items():
        try:
            weights[labels == int(label)] = float(weight)
        except (TypeError, ValueError):
            raise TypeError(
                "`class_weight` must be a dict of public constants, label: weight; got "
                f"{label!r}: {weight!r}."
            ) from None
    return weights


class DrawnBatches:
    """Batches of one data set, one epoch long, drawn as `sampling` says.

    Each request draws: Poisson batches are independent however often and in whichever order
    they are asked for, so a loop that peeks at the data changes nothing. Only batches that a
    step was paid for are ever used.

    While a step runs, a thread draws and gathers the batch behind it. It is handed out once, to
    the request for its own step; what nobody asks for is dropped, with its key.

    Args:
        examples: where they come from, as `lipdp.data.opening.open_source` returns it.
        sampling: a scheme of `accountants`.
        source: of randomness, a `lipdp.randomness.RandomSource`.
        position: integers that set these draws apart from all others of the source.
        steps: steps an epoch.
        bucket: rows are padded to a multiple of this, so that few shapes occur.
        weights: `(examples,)`, or None where every example weighs 1.
        draw_noise: draws what a batch carries as its noise.
        steps_taken: tells how many steps of the run were taken.
        devices: which share out the rows. Every process draws the same batch, and reads from it
            the rows of its own devices.
        groups: of the examples, where these are what is drawn.
    """

    def __init__(
        self,
        examples: Arrays | Records | Stream,
        sampling: Sampling,
        source: RandomSource,
        position: Sequence[int],
        steps: int,
        bucket: int = 1,
        weights: np.ndarray | None = None,
        draw_noise: Callable[[], np.ndarray | None] = lambda: None,
        steps_taken: Callable[[], int] | None = None,
        devices: Devices = SINGLE_DEVICE,
        groups: Groups | None = None,
    ) -> None:
        self.examples, self.weights, self.groups = examples, weights, groups
        self.sampling = sampling
        self.source = source
        self.position = tuple(position)
        self.steps = steps
        self.bucket = bucket
        self.draw_noise = draw_noise
        self.epoch = 0
        self.steps_taken = steps_taken
        self.devices = devices
        self.draws = Draws(
            len(examples if groups is None else groups),
            steps,
            lambda *place: self.source.generator(*self.position, *place),
            in_order=isinstance(examples, Stream),
        )
        self._lock = threading.Lock()
        self._ahead = (None, None)  # (epoch, index), and the future of that batch
        self._worker = concurrent.futures.ThreadPoolExecutor(1)
        self._closed = False

    def __len__(self):
        return self.steps

    def on_epoch_begin(self):
        if self.steps_taken is not None and self.steps_taken() == 0:
            self.epoch = 0  # a loop may look at batches before it trains
        else:
            self.check_taken(self.steps)
        self.epoch += 1

    def check_taken(self, steps: int) -> None:
        """Checks that `steps` steps of this epoch were taken, and all of those before.

        Schemes that tell in how many steps of a run an example may take part, or how far apart,
        hold for steps in the order in which they are drawn, with none left out.

        Raises:
            RuntimeError: a batch was drawn and left out.
        """
        expected = self.draws.step(self.epoch, steps).step
        if self.steps_taken is None or self.steps_taken() == expected or self._independent():
            return
        raise RuntimeError(
            f"{self.sampling!r} counts on every batch being trained on, in order: {expected} were "
            f"drawn in this run and {self.steps_taken()} trained on. The run has to end here."
        )

    def _independent(self):
        """Tells whether any choice of the steps is accounted as so many steps are."""
        n, steps = self.draws.num_examples, 2 * self.steps
        return self.sampling.participations(n, steps) == steps

    def request(self, index: int) -> DrawnBatch:
        """The `DrawnBatch` of step `index` of the epoch; the next one begins to be drawn."""
        epoch = self.epoch
        with self._lock:
            (place, future), self._ahead = self._ahead, (None, None)
        if place == (epoch, index):
            batch = future.result()
        else:
            # What was drawn for another place belongs to a loop that was left: it is dropped.
            concurrent.futures.wait([future] if future is not None else [])
            batch = self.draw(index, epoch)
        with self._lock:
            if index + 1 < self.steps and not self._closed:
                future = self._worker.submit(self.draw, index + 1, epoch)
                self._ahead = (epoch, index + 1), future
        return batch

    def close(self) -> None:
        """Ends the thread. What it has drawn ahead is dropped."""
        with self._lock:
            self._closed, self._ahead = True, (None, None)
        self._worker.shutdown(wait=True, cancel_futures=True)

    def draw(self, index: int, epoch: int | None = None) -> DrawnBatch:
        """The `DrawnBatch` of step `index` of an epoch, by default the one that runs.

        Raises:
            TypeError: `sampling` is no scheme.
        """
        if not isinstance(self.sampling, Sampling):
            raise TypeError(f"No batches can be drawn as {self.sampling!r} says.")
        epoch = self.epoch if epoch is None else epoch
        draw = self.draws.step(epoch, index)
        rows, shares = self.sampling.rows(draw), None
        if self.groups is not None:
            rows, shares = self.groups.rows(rows, draw.generator)
        size = max(1, -(-len(rows) // self.bucket)) * self.bucket
        size //= self.devices.processes
        own = slice(self.devices.process * size, (self.devices.process + 1) * size)
        key = self.source.key(*self.position, epoch, index)
        return self._batch(rows[own], size, key, None if shares is None else shares[own])

    def _batch(self, rows, size, key, shares):
        mask = np.zeros(size, np.float32)
        mask[: len(rows)] = 1.0
        weights = None if self.weights is None else padded(self.weights, rows, size)
        inputs, targets = tree.map_structure(_single, self.examples.take(rows, size))
        if shares is not None:
            shares = np.pad(shares, (0, size - len(rows)))
        return DrawnBatch(inputs, targets, mask, key, weights, self.draw_noise(), shares)


def _single(array):
    return as_type(array, np.float32) if array.dtype == np.float64 else array


class KerasBatches(DataAdapter):
    """Drawn batches as Keras' loops take them; each backend's step file says how they are read.

    Args:
        model: the `PrivateModel`.
        drawn: its `DrawnBatches`.
    """

    batch_size = has_partial_batch = partial_batch_size = None

    def __init__(self, model: Any, drawn: DrawnBatches) -> None:
        self.model, self.drawn = model, drawn

    @property
    def num_batches(self):
        return len(self.drawn)

    def on_epoch_begin(self):
        self.drawn.on_epoch_begin()
