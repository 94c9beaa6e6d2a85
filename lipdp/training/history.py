"""What has trained a network, whatever model it was trained by."""

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras

__all__ = ["History"]

# The runs that trained a layer, kept as long as the layer is.
_RUNS: weakref.WeakKeyDictionary[keras.layers.Layer, list] = weakref.WeakKeyDictionary()


class History:
    """The runs that trained any of some layers, those of other models, too.

    The weights carry what they were trained with, not the model that trained them: a second
    `PrivateModel` of a network, or of one that shares layers with it, goes on from what was spent.
    Layers that are built or cloned anew have no history.

    Args:
        layers: tells the layers; composite ones may be among them.

    >>> layer = keras.layers.Dense(2)
    >>> layer.build((None, 3))
    >>> first, second = History(lambda: [layer]), History(lambda: [layer])
    >>> first.append("a run")
    >>> list(second)
    ['a run']
    """

    def __init__(self, layers: Callable[[], Iterable[keras.layers.Layer]] = tuple) -> None:
        self._layers = layers
        self._own = []

    def __iter__(self) -> Iterator[Any]:
        runs = [*self._own, *(run for layer in self._layers() for run in _RUNS.get(layer, ()))]
        return iter({id(run): run for run in runs}.values())

    def append(self, run: Any) -> None:
        """Notes a run that begins, for each of the layers that it trains."""
        self._own.append(run)
        for layer in self._layers():
            if layer.trainable_variables:
                _RUNS.setdefault(layer, []).append(run)
