"""Settings of the runs on images, for each data set, network and ε.

Chosen on the last 5,000 training examples, held out, never on a test set. Choosing among settings
by results on private data costs privacy as well, which the ε of a single run does not count; in
that respect these are benchmarks like those they are compared with.
"""

import dataclasses
import types

__all__ = ["NETWORKS", "Settings", "settings_of"]


def _one_of(default, *others):
    """A setting that can have these values."""
    return dataclasses.field(default=default, metadata={"choices": (default, *others)})


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of one run.

    Attributes:
        front: `"pixels"`, `"scattering"` or `"patches"`.
        head: what is trained behind it: a name of `lipdp.models`, or `"linear"`, `"dense"`,
            `"conv"`.
        width, depth, patch_size: of the head, where it has them; `patch_size` is that of patches
            in front, too.
        radius: of the ball in front of pixels; one below the norm of most images makes them
            equally long.
        hidden_radius: of the balls in `mlp`, `conv_net`, `vgg` or a dense head; 0: there are none.
        scales, groups, padding, mirror, views: of the scattering, as in `features.scattering`.
        filters, cells, threshold, whitening, mirror: of the patches, as in `features.patches`.
        drawings: `"strokes"`, `"blobs"` or `"leaves"`: made-up drawings, public constants, by which
            scattering features are steadied (empty: they are not), and with whose patches those
            of images are compared.
        stride, pool, cotangent: of `cosine_net`, which has `filters`, too.
        batch_size: expected size of a Poisson batch.
        physical_batch_size: most rows that are computed at once, or None.
        epochs, learning_rate, momentum: of SGD, decayed to zero along a cosine.
        average: momentum of the running average of the weights that is kept; 0 keeps the last.
        clip: of an example's loss gradient.
        temperature: of the cross-entropy.
        allocation: of the noise over the weights.
        flips: views of each example, flipped left to right at random; 1 is the image itself.
    """

    front: str = "pixels"
    head: str = "mixer"
    width: int = 64
    depth: int = 2
    patch_size: int = 4
    radius: float = 1.0
    hidden_radius: float = 0.0
    scales: int = 2
    groups: int = 27
    padding: str = _one_of("zeros", "reflect")
    mirror: bool = False
    views: bool = False
    filters: int = 512
    cells: int = 3
    threshold: float = 0.25
    whitening: float = 0.3
    drawings: str = _one_of("", "strokes", "blobs", "leaves")
    stride: int = 2
    pool: int = 2
    cotangent: float = 1e-5
    batch_size: int = 4096
    physical_batch_size: int | None = None
    epochs: int = 15
    learning_rate: float = 100.0
    momentum: float = 0.9
    average: float = 0.0
    clip: float = 0.1
    temperature: float = 1.0
    allocation: str = _one_of("least", "global", "per_weight")
    flips: int = 1


#: What each network is, before its settings.
NETWORKS = types.MappingProxyType(
    {
        "scattering-linear": {"front": "scattering", "head": "linear"},
        "scattering-dense": {"front": "scattering", "head": "dense"},
        "scattering-conv": {"front": "scattering", "head": "conv"},
        "patches-linear": {
            "front": "patches",
            "head": "linear",
            "patch_size": 6,
            "drawings": "leaves",
        },
        "mlp": {"head": "mlp"},
        "cosine_net": {"head": "cosine_net", "patch_size": 7, "filters": 24, "radius": 5.0},
        "conv_net": {"head": "conv_net"},
        "vgg5": {"head": "vgg", "depth": 5, "width": 16},
        "vgg8": {"head": "vgg", "depth": 8, "width": 16},
        "resnet6": {"head": "resnet", "depth": 6, "width": 16},
        "resnet8": {"head": "resnet", "depth": 8, "width": 16},
        "resnet10": {"head": "resnet", "depth": 10, "width": 16},
        "mixer": {"head": "mixer"},
        "vision_transformer": {"head": "vision_transformer", "depth": 1},
    }
)

# What suits networks of several layers, whose logits are small.
_DEEP = {"clip": 0.05, "temperature": 100.0}

_MLP = _DEEP | {"learning_rate": 3.0}

_DENSE = _DEEP | {"views": True, "width": 128, "batch_size": 8192, "learning_rate": 10.0}

_CONVOLUTIONS = _DEEP | {"learning_rate": 25.0, "width": 8, "epochs": 8}

_CONV_NET = _CONVOLUTIONS | {"width": 16, "hidden_radius": 0.6}

_MIXER = _DEEP | {"learning_rate": 25.0, "width": 32, "depth": 1, "epochs": 10}

_COSINES = {
    "batch_size": 8192,
    "epochs": 12,
    "learning_rate": 30.0,
    "clip": 0.05,
    "temperature": 50.0,
}

# (data set, network): settings from an ε on, in the order of ε; each changes the one before.
_TABLE = {
    ("mnist", "scattering-linear"): {
        0: {"drawings": "strokes", "views": True, "batch_size": 8192, "learning_rate": 250.0},
        2: {"learning_rate": 600.0, "epochs": 25},
    },
    ("fashion_mnist", "scattering-linear"): {
        0: {
            "drawings": "blobs",
            "mirror": True,
            "views": True,
            "batch_size": 8192,
            "learning_rate": 250.0,
        },
        2: {"learning_rate": 500.0, "epochs": 25},
    },
    ("mnist", "scattering-dense"): {
        0: _DENSE | {"drawings": "strokes"},
        2: {"learning_rate": 30.0, "epochs": 20},
    },
    ("fashion_mnist", "scattering-dense"): {
        0: _DENSE | {"drawings": "blobs", "mirror": True},
        2: {"learning_rate": 30.0, "epochs": 20},
    },
    ("mnist", "scattering-conv"): {0: _DEEP | {"learning_rate": 10.0, "epochs": 10}},
    ("cifar10", "patches-linear"): {
        0: {"mirror": True, "batch_size": 8192, "epochs": 12, "learning_rate": 400.0},
        3: {"epochs": 20, "learning_rate": 450.0},
        8: {"epochs": 30, "learning_rate": 500.0},
    },
    ("fashion_mnist", "patches-linear"): {
        0: {"mirror": True, "batch_size": 8192, "epochs": 20, "learning_rate": 300.0},
        3: {"epochs": 30, "learning_rate": 500.0},
    },
    ("mnist", "patches-linear"): {
        0: {
            "filters": 256,
            "drawings": "strokes",
            "batch_size": 8192,
            "epochs": 20,
            "learning_rate": 300.0,
        },
        3: {"epochs": 30, "learning_rate": 800.0},
    },
    ("mnist", "mlp"): {
        0: _MLP | {"hidden_radius": 0.3, "batch_size": 8192, "epochs": 24, "learning_rate": 8.0}
    },
    ("fashion_mnist", "mlp"): {0: _MLP},
    ("cifar10", "mlp"): {0: _MLP},
    ("mnist", "conv_net"): {0: _CONV_NET | {"learning_rate": 10.0}, 2: {"learning_rate": 25.0}},
    ("cifar10", "conv_net"): {0: _CONV_NET | {"epochs": 10}},
    ("mnist", "vgg5"): {0: _CONVOLUTIONS | {"hidden_radius": 0.4}},
    ("cifar10", "vgg5"): {0: _CONVOLUTIONS},
    ("mnist", "resnet6"): {0: _CONVOLUTIONS},
    ("cifar10", "resnet6"): {0: _CONVOLUTIONS},
    ("mnist", "mixer"): {0: _MIXER | {"patch_size": 7}},
    ("cifar10", "mixer"): {0: _MIXER | {"patch_size": 8}},
    ("mnist", "cosine_net"): {
        0: _COSINES,
        2: {"filters": 14, "clip": 0.1, "batch_size": 16384, "epochs": 36},
    },
    ("fashion_mnist", "cosine_net"): {0: _COSINES},
    ("cifar10", "cosine_net"): {0: _COSINES},
}


def settings_of(dataset: str, network: str, epsilon: float) -> Settings:
    """The settings of a run, those of the nearest ε below where there is none for this one.

    Raises:
        ValueError: the network is unknown.
    """
    if network not in NETWORKS:
        raise ValueError(f"`network` must be one of {', '.join(NETWORKS)}; got {network!r}.")
    chosen = dict(NETWORKS[network])
    for least, changes in _TABLE.get((dataset, network), {}).items():
        if epsilon >= least:
            chosen |= changes
    return Settings(**chosen)
