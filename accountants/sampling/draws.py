"""The random draws of a run, with which a scheme chooses the examples of each step."""

import dataclasses
import functools
import threading
from collections.abc import Callable

import numpy as np


class Draws:
    """The draws of one run: random numbers for each of its steps, and what steps share.

    Schemes draw some things once an epoch, or once a run, such as an order of the examples. That
    is kept here, so that with two draws no example takes part twice. Several threads may draw.

    Args:
        num_examples: size of the data set.
        steps: steps of an epoch.
        generator: gives the random generator of a place in the run: `generator()` is for what is
            drawn once a run, `generator(epoch)` once an epoch, `generator(epoch, index)` in one
            step. No two places may share random numbers.
        in_order: whether examples come in an order of their own, which is not to be changed; for
            schemes that are `streamable`.

    >>> from accountants import ShuffledEpochs
    >>> draws = Draws(6, 3, lambda *place: np.random.default_rng([8, *place]))
    >>> batches = [ShuffledEpochs(2).rows(draws.step(1, index)) for index in range(3)]
    >>> sorted(np.concatenate(batches).tolist())
    [0, 1, 2, 3, 4, 5]
    """

    def __init__(
        self,
        num_examples: int,
        steps: int,
        generator: Callable[..., np.random.Generator],
        in_order: bool = False,
    ) -> None:
        self.num_examples = num_examples
        self.steps = steps
        self.generator = generator
        self.in_order = in_order
        self._kept: dict[tuple[int, ...], np.ndarray] = {}
        self._lock = threading.Lock()

    @property
    def kept(self) -> tuple[np.ndarray, ...]:
        """The arrays that were drawn once and are kept: the latest two at most."""
        return tuple(self._kept.values())

    def step(self, epoch: int, index: int) -> "Draw":
        """The draw of step `index` (from 0) of an epoch (from 1)."""
        return Draw(self, epoch, index)

    def once(
        self, place: tuple[int, ...], draw: Callable[[np.random.Generator], np.ndarray]
    ) -> np.ndarray:
        """The array that is drawn at a place, drawn at the first request; see `Draw`."""
        with self._lock:
            if place not in self._kept:
                drawn = draw(self.generator(*place))
                last = dict([*self._kept.items()][-1:])  # a loop may still ask for it
                self._kept = {**last, place: drawn}
            return self._kept[place]


@dataclasses.dataclass(frozen=True, eq=False)
class Draw:
    """The draw of one step, as a scheme sees it: the step's place, and random numbers.

    Attributes:
        epoch: the number of the epoch, from 1.
        index: the number of the step in its epoch, from 0.
    """

    _draws: Draws
    epoch: int
    index: int

    @property
    def num_examples(self) -> int:
        """The size of the data set."""
        return self._draws.num_examples

    @property
    def step(self) -> int:
        """The number of the step in its run, from 0."""
        return (self.epoch - 1) * self._draws.steps + self.index

    @property
    def in_order(self) -> bool:
        """Tells whether the examples come in an order of their own, which is not to be changed."""
        return self._draws.in_order

    @functools.cached_property
    def generator(self) -> np.random.Generator:
        """The random numbers of this step alone."""
        return self._draws.generator(self.epoch, self.index)

    def once_per_epoch(self, draw: Callable[[np.random.Generator], np.ndarray]) -> np.ndarray:
        """The array that the first step to ask for it in this epoch draws with `draw`.

        `draw` gets random numbers that belong to the epoch. A scheme keeps one array an epoch.
        """
        return self._draws.once((self.epoch,), draw)

    def once_per_run(self, draw: Callable[[np.random.Generator], np.ndarray]) -> np.ndarray:
        """The array that the first step to ask for it in this run draws with `draw`.

        `draw` gets random numbers that belong to the run. A scheme keeps one array a run.
        """
        return self._draws.once((), draw)


def distinct_rows(draw: Draw, count: int) -> np.ndarray:
    """`count` distinct examples, chosen uniformly by the step's own generator; sorted."""
    chosen = draw.generator.choice(draw.num_examples, count, replace=False, shuffle=False)
    return np.sort(chosen)


# What is kept of every example is as small as its range allows: 10⁹ of them are 1 to 4 GB.


def assigned_parts(generator: np.random.Generator, num_examples: int, parts: int) -> np.ndarray:
    """Assigns each example to one of so many parts, uniformly and independently."""
    return generator.integers(parts, size=num_examples, dtype=np.min_scalar_type(parts - 1))


def shuffled_order(generator: np.random.Generator, num_examples: int) -> np.ndarray:
    """The examples in a random order."""
    order = np.arange(num_examples, dtype=np.min_scalar_type(max(num_examples - 1, 0)))
    generator.shuffle(order)
    return order
