"""Checks of what `PrivateModel`, `compile` and `fit` are given, before anything is planned."""

import math
import os
import warnings
from collections.abc import Mapping
from typing import Any

import keras

from accountants.sampling import Sampling
from accountants.validation import check_number
from lipdp import losses
from lipdp.data.augmentation import Augmentation
from lipdp.inspection.check import check_trainable, final_activation, head_advice
from lipdp.outputs import Outputs
from lipdp.training.clipping import PerLayerClip
from lipdp.training.defaults import CERTIFIED_CLIP, default_loss

__all__ = [
    "at_home",
    "check_augmentation",
    "check_keras_batches",
    "check_loss",
    "check_loss_bound",
    "check_max_sample_weight",
    "check_optimizer",
    "default_clip",
    "warn_of_monitors",
]


def check_augmentation(augmentation: Any, network: keras.Model) -> Augmentation | None:
    """The augmentation of a network's inputs, or None.

    Raises:
        TypeError: it is something else.
        ValueError: the network has several inputs.
    """
    if augmentation is None:
        return None
    if not isinstance(augmentation, Augmentation):
        raise TypeError(
            f"`augmentation` must be lipdp.Augmentation(layers, views=...); got {augmentation!r}."
        )
    if len(network.inputs) > 1:
        raise ValueError("`augmentation` is for networks with one input.")
    return augmentation


def default_clip(network: keras.Model, left_open: bool) -> PerLayerClip | float | None:
    """The clip of a network that none was said for: None where its bounds are certified.

    A network that has no layer of lipdp, and no certified bounds, clips layer by layer.

    Args:
        network: what is to be trained.
        left_open: whether the sampling is to be chosen, too, and the noise with it.
    """
    if isinstance(network, keras.Model):
        kinds = {type(layer).__module__ for layer in network._flatten_layers()}
        if not any(kind.startswith("lipdp.") for kind in kinds):
            try:
                check_trainable(network)
            except (TypeError, ValueError):
                return PerLayerClip()
    return CERTIFIED_CLIP if left_open else None


def at_home(path: Any) -> Any:
    """A path with the home of the user in place of `~`; an open file, or None, as it is."""
    return os.path.expanduser(path) if isinstance(path, (str, os.PathLike)) else path


def check_loss(
    loss: Any, weights: Any, network: keras.Model, outputs: Outputs | None, way: str
) -> losses.Loss:
    """The loss of a network: of several outputs a `losses.Joint`.

    Args:
        loss, weights: `loss` and `loss_weights` of `compile`.
        network: a functional one, whose ends are looked at.
        outputs: of the network, where it has several.
        way: as for `default_loss`.

    Raises:
        TypeError, ValueError: no loss, none that fits the network's end, or weights of what is no
            loss.
    """
    if outputs is None:
        if weights is not None:
            raise ValueError("`loss_weights` is for networks with several outputs; this has one.")
        return _fitting(loss, way, *final_activation(network))
    several = isinstance(loss, (Mapping, list, tuple))
    given = outputs.named(loss, "loss") if several else dict.fromkeys(outputs.names, loss)
    without = [name for name, one in given.items() if one is None]
    if without and several:
        raise ValueError(
            f"Each output needs a loss; {without} of `loss` have None. Leave an output out of the "
            "network, keras.Model(network.inputs, ...), or say loss_weights={name: 0.0}."
        )
    found = {
        name: _fitting(given[name], way, *final_activation(network, number))
        for number, name in enumerate(outputs.names)
    }
    return losses.Joint(
        outputs, found, None if weights is None else outputs.named(weights, "loss_weights")
    )


def _fitting(loss, way, layer, activation):
    loss = default_loss(loss, way, activation)
    _check_head(loss, layer, activation)
    return loss


def _check_head(loss: losses.Loss, layer: keras.layers.Layer, activation: str) -> None:
    """Raises ValueError where a network ends in probabilities and the loss takes logits; warns
    where it ends in logits, and a cross-entropy of Keras takes probabilities, as it does unless
    told otherwise.
    """
    advice = head_advice(layer, activation)
    if advice and losses.takes_logits(loss):
        raise ValueError(advice)
    if activation == "linear" and getattr(loss, "from_logits", True) is False:
        warnings.warn(
            f"The loss {loss.name!r} takes probabilities, and layer {layer.name!r} makes logits: "
            f"little would be learnt. Say keras.losses.{type(loss).__name__}(from_logits=True).",
            stacklevel=5,
        )


def check_keras_batches(batch_size: int | None, shuffle: Any, sampling: Sampling) -> None:
    """Refuses what `fit` of Keras says of batches, where it is not what the sampling does.

    Raises:
        ValueError: it is not.
    """
    own = getattr(sampling, "batch_size", None)
    if batch_size is not None and batch_size != own:
        raise ValueError(
            f"`batch_size` must be that of the sampling, {own}: what is drawn is accounted. "
            f"Say PrivateModel(..., sampling=lipdp.PoissonSampling(batch_size={batch_size!r}))."
        )
    if not shuffle:
        raise ValueError(
            "`shuffle` must be True: batches are drawn at random, as the sampling says, and the "
            f"noise is scaled for that; got {shuffle!r}."
        )


def check_max_sample_weight(largest: float | None) -> float | None:
    """The largest weight of an example, or None.

    Raises:
        TypeError, ValueError: it is no number from 1e-6 to 1e6.
    """
    if largest is None:
        return None
    largest = check_number(largest, "max_sample_weight")
    if not 1e-6 <= largest <= 1e6:
        raise ValueError(
            "`max_sample_weight` must lie between 1e-6 and 1e6, or products of bounds "
            f"leave the range of float32; got {largest!r}."
        )
    return largest


def check_optimizer(optimizer: Any, network: keras.Model) -> keras.optimizers.Optimizer:
    """The optimizer, built for the weights that are trained now.

    Raises:
        ValueError: it scales losses, or was built for other weights.
    """
    optimizer = keras.optimizers.get(optimizer)
    scaled = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    if scaled or optimizer.loss_scale_factor is not None:
        raise ValueError(
            "`optimizer` must not scale losses: the noise would be divided by its scale."
        )
    optimizer.build(network.trainable_variables)
    built_for = set(map(id, optimizer._trainable_variables))
    if not built_for.issuperset(map(id, network.trainable_variables)):
        raise ValueError(
            "`optimizer` was built for other weights than those that are trained now: make a "
            "new one."
        )
    return optimizer


def check_loss_bound(loss: losses.Loss, network: keras.Model, clip: Any) -> float:
    """The norm of one example's loss gradient at most; infinite where only a clip bounds it.

    Raises:
        ValueError: nothing bounds it.
    """
    bound = losses.gradient_bound(loss, network.output_shape[1:])
    if math.isinf(bound) and clip is None:
        name = getattr(loss, "name", getattr(loss, "__name__", type(loss).__name__))
        raise ValueError(
            f"The gradient of the loss {name!r} has no known bound: give PrivateModel a "
            "`clip`, a number or lipdp.AdaptiveClip(...)."
        )
    return bound


def warn_of_monitors(callbacks: Any) -> None:
    """Names the callbacks that let numbers without noise decide what is released."""
    callbacks = getattr(callbacks, "callbacks", callbacks) or []
    for callback in callbacks if isinstance(callbacks, (list, tuple)) else [callbacks]:
        monitor = getattr(callback, "monitor", None)
        if not isinstance(monitor, str) or monitor.startswith("val_") or monitor == "epsilon":
            continue
        if getattr(callback, "save_best_only", True):  # a plain ModelCheckpoint decides nothing
            warnings.warn(
                f"{type(callback).__name__}(monitor={monitor!r}) acts on a training metric, which "
                "has no noise: what it decides (when to stop, which weights to keep, the learning "
                "rate) tells of the private data, and ε does not cover it. Monitor a metric of "
                "validation data that is not private, 'val_...', or leave the callback out.",
                stacklevel=3,
            )
