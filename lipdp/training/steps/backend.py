"""The contract of a backend: what the private step, the model and its batches ask of it.

`TensorFlowBackend` and `JaxBackend` fulfil it, each in one file, with another for several devices.
Only those four files, and `lipdp.autodiff`, import a backend.
"""

import abc
import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from lipdp.data.batches import DrawnBatch, DrawnBatches
from lipdp.devices import Devices
from lipdp.local.calls import Call, LayerUnits

__all__ = ["Backend"]

Tensor = Any


class Backend(abc.ABC):
    """What each Keras backend spells in its own way. It keeps no state."""

    # --- within a step ------------------------------------------------------------------------

    @abc.abstractmethod
    def pull_back(
        self, network: keras.Model, x: Any
    ) -> tuple[Tensor, Callable[[Tensor], list[Tensor]]]:
        """Outputs of the network in training mode, and `cotangent -> gradients of its weights`:
        a dense tensor of the weight's shape for each trainable one, zeros where nothing reaches it.
        """

    @abc.abstractmethod
    def pull_back_to_calls(
        self, network: keras.Model, x: Any, units: LayerUnits
    ) -> tuple[Tensor, Callable[[Tensor], tuple[list[Call], list[Tensor]]]]:
        """Outputs of the network in training mode, and `cotangent -> calls and their cotangents`:
        of the units, in the order of the calls. No gradient of a weight is formed.
        """

    @abc.abstractmethod
    def accumulate(self, part: Callable, rows: Sequence[Any], size: int) -> tuple[list, tuple]:
        """`part(*rows)` for `size` rows at a time, one piece after the other.

        Args:
            part: gives `(sums, joined)`.
            rows: structures of tensors with a row an example; their number is a multiple of `size`.
            size: rows of a piece.

        Returns:
            The sums, added up, and what has a row an example, joined in order.
        """

    @abc.abstractmethod
    def compiled(self, function: Callable) -> Callable:
        """The function, fused where it runs inside of a step. The same one for equal functions."""

    @abc.abstractmethod
    def sum_over_replicas(self, sums: list[Tensor]) -> list[Tensor]:
        """Sums over the rows of all devices, the same on each of them."""

    @abc.abstractmethod
    def on_first_replica(self, updates: list[Tensor]) -> list[Tensor]:
        """What each replica hands to an optimizer that adds up what all of them hand in: one of
        them the updates, others zeros. Nothing is rounded or clipped otherwise than on one device.
        """

    # --- a step within Keras' loops -----------------------------------------------------------

    @abc.abstractmethod
    def train_step(self, model: Any, *args: Any) -> Any:
        """Keras' `train_step` of the backend: `private_step`, and the logs."""

    @abc.abstractmethod
    def make_train_function(self, model: Any, make: Callable[[], None]) -> None:
        """Has Keras make the model's train function: `make` does, of `model.train_step`."""

    @abc.abstractmethod
    def prefetch(self, arguments: Sequence[Any], count: int) -> Sequence[Any]:
        """Arguments of Keras' train function, with the batches of its `count` steps read, where
        one that cannot be read would fail after the step has taken the weights' memory.
        """

    @abc.abstractmethod
    def give_back(self, model: Any, arguments: Sequence[Any]) -> None:
        """Puts the state that a train function was handed back into the model's variables, where
        the step is not going to run.
        """

    @abc.abstractmethod
    def held_weights(self, plan: Any, result: Any) -> tuple[Tensor, ...]:
        """The weights that steps rely on (`Plan.relied_on`), as a step has left them.

        While the tensors are held, nothing can be written into their memory. A weight that is
        assigned then lies elsewhere, whoever assigns it and whatever the value is.

        Args:
            plan: of the run.
            result: what the train function returned.
        """

    @abc.abstractmethod
    def put_inside(
        self, plan: Any, arguments: Sequence[Any], held: Sequence[Tensor] | None
    ) -> Sequence[Any]:
        """Puts each weight that is not where `held_weights` has left it, or all of them where
        `held` is None, where the next step may rely on it (`Plan.inside`).

        Returns:
            Arguments of Keras' train function, with the weights where they hold them.
        """

    @abc.abstractmethod
    def keep_weights(self, model: Any) -> contextlib.AbstractContextManager:
        """Has the model's variables hold the state of the last step when `fit` ends, also where an
        error ends it.
        """

    @abc.abstractmethod
    def keras_batches(self, model: Any, drawn: DrawnBatches) -> Any:
        """Drawn batches as the backend's `fit` reads them."""

    @abc.abstractmethod
    def to_device(self, model: Any, batch: DrawnBatch) -> tuple:
        """A drawn batch as arguments of Keras' `train_on_batch`."""

    @abc.abstractmethod
    def default_jit_compile(self) -> bool:
        """What `jit_compile="auto"` means."""

    @abc.abstractmethod
    def check_precision(self, model: Any) -> None:
        """Refuses matrix products of rounded factors, which no bound allows for, and programs in
        which a number of few bits may be another one for its next reader.

        Raises:
            ValueError: an accelerator would compute products with fewer bits than float32 has; or
                XLA might leave out a rounding in one place, and nothing hinders it.
        """

    # --- several devices ----------------------------------------------------------------------

    @abc.abstractmethod
    def devices(self, model: Any) -> Devices:
        """The devices that a model trains on.

        Raises:
            ValueError: the model was made for others, or they cannot be trained on.
        """

    @abc.abstractmethod
    def scope(self, model: Any) -> contextlib.AbstractContextManager:
        """The scope in which variables of a model are made."""

    @abc.abstractmethod
    def all_gather(self, model: Any, array: np.ndarray) -> np.ndarray:
        """An int32 array of this process to those of all processes, `(processes, ...)`."""
