"""Labelled images: an `.npz` file, or a data set that Keras can fetch."""

import dataclasses
import hashlib
import io
import pathlib
from collections.abc import Iterable

import numpy as np
from absl import flags

from experiments import frame

__all__ = ["Images", "about", "asked_for", "define_flags", "load"]

_KEYS = ("x_train", "y_train", "x_test", "y_test")
_OF_KERAS = ("mnist", "fashion_mnist", "cifar10")


@dataclasses.dataclass(frozen=True)
class Images:
    """Images `(examples, height, width, channels)`, uint8, and labels `(examples,)`, int32.

    Attributes:
        name: of the data set; settings are looked up by it.
        sha256: of the file, or of the arrays where Keras has fetched them.
    """

    name: str
    sha256: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray

    @property
    def classes(self) -> int:
        return int(max(self.y_train.max(), self.y_test.max())) + 1

    def held_out(self, count: int) -> "Images":
        """The last `count` training examples in place of the test set, which is dropped.

        Raises:
            ValueError: not both parts would have an example.
        """
        if not 0 < count < len(self.y_train):
            raise ValueError(
                f"`count` must be from 1 to {len(self.y_train) - 1}, the training examples but "
                f"one; got {count}."
            )
        x, y = self.x_train, self.y_train
        return dataclasses.replace(
            self, x_train=x[:-count], y_train=y[:-count], x_test=x[-count:], y_test=y[-count:]
        )


def load(source: str) -> Images:
    """Images from a file, or of a name that Keras knows.

    Args:
        source: path of an `.npz` with Keras' keys `x_train`, `y_train`, `x_test`, `y_test`, where
            in place of `x_…` there may be `x_…_webp`: one WebP mosaic of square images, as wide as
            their side times a whole number (32 pixels each way; needs Pillow). The file's stem is
            the data set's name. Or one of `mnist`, `fashion_mnist`, `cifar10`, for Keras' loader.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a key is missing, or an array is not what it should be.
    """
    path = pathlib.Path(source)
    if source in _OF_KERAS and not path.exists():
        from lipdp import startup

        startup.import_keras()
        import keras

        train, test = getattr(keras.datasets, source).load_data()
        arrays = dict(zip(_KEYS, (*train, *test), strict=True))
        digest = hashlib.sha256(b"".join(np.ascontiguousarray(arrays[k]).data for k in _KEYS))
    else:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        arrays = _read(path)
    for part in ("train", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        x, y = x.reshape(*x.shape[:3], -1), y.reshape(-1)
        if x.ndim != 4 or x.dtype != np.uint8 or not len(x):
            raise ValueError(
                f"x_{part} must be uint8 images (examples, height, width[, channels]); got "
                f"{x.dtype} of shape {arrays[f'x_{part}'].shape}."
            )
        if len(y) != len(x) or y.dtype.kind not in "iu" or y.min() < 0:
            raise ValueError(
                f"y_{part} must be {len(x)} integer labels from 0 on; got {y.dtype} of shape "
                f"{arrays[f'y_{part}'].shape}."
            )
        arrays[f"x_{part}"], arrays[f"y_{part}"] = x, y.astype(np.int32)
    return Images(path.stem, digest.hexdigest(), **arrays)


def _read(path):
    arrays = {}
    with np.load(path) as stored:
        for key in _KEYS:
            if key in stored:
                arrays[key] = stored[key]
            elif f"{key}_webp" in stored:
                arrays[key] = _tiles(stored[f"{key}_webp"])
    if missing := [key for key in _KEYS if key not in arrays]:
        raise ValueError(f"{path.name} lacks {', '.join(missing)}; it must hold {_KEYS}.")
    return arrays


def _tiles(encoded, side=32):
    """Images of a mosaic, row by row."""
    from PIL import Image

    mosaic = np.asarray(Image.open(io.BytesIO(encoded.tobytes())).convert("RGB"))
    rows, columns = (n // side for n in mosaic.shape[:2])
    mosaic = mosaic[: rows * side, : columns * side].reshape(rows, side, columns, side, 3)
    return mosaic.swapaxes(1, 2).reshape(-1, side, side, 3)


# --- flags of scripts that train on images --------------------------------------------------------


def define_flags(
    define: frame.Flags,
    experiment: frame.Experiment,
    networks: Iterable[str],
    network: str,
    epsilon: float,
    seed: int | None,
) -> None:
    """Defines the flags that all scripts on images have.

    Args:
        define: defines them.
        experiment: whose settings are flags.
        networks: what can be trained.
        network, epsilon, seed: by default.
    """
    text = "An .npz file, or a name that Keras knows."
    experiment.define_flags(define, text, epsilon, networks=networks, network=network)
    define.seed(seed)
    text = "Training examples to hold out, in place of the test set."
    define.integer("validation", 0, text, least=0)


def asked_for(values: flags.FlagValues) -> Images:
    """The data of a run: `--data`, with `--validation` examples held out.

    Raises:
        app.UsageError: they cannot be had.
    """
    source = frame.needed(values, "data")
    with frame.explained():
        loaded = load(source)
        return loaded.held_out(values.validation) if values.validation else loaded


def about(values: flags.FlagValues, images: Images) -> dict:
    """The facts that tell a run on images from others, for its record."""
    plain = "plain" in values and values.plain
    held_out = f"{values.validation} held-out training examples"
    return {
        "data": {"name": images.name, "sha256": images.sha256},
        "network": values.network,
        "epsilon": None if plain else values.epsilon,
        "delta": None if plain else values.delta,
        "seed": values.seed,
        "evaluated_on": held_out if values.validation else "test set",
    }
