"""Certified robustness: how far an input may move before a prediction can change.

A network whose norms are known cannot change its logits by more than its Lipschitz constant times
the distance its input moves. What that certifies needs no attack to be believed, and no attack
breaks it: `attack` tries. All distances are Euclidean, over all axes of an example, in the units
of what the network reads: put a `Rescaling`, or a `Normalization` with public statistics, into
the network, and a radius is one of pixels.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from accountants.validation import check_number
from lipdp.autodiff import compiled, gradient
from lipdp.bounds.rule import as_float, measuring
from lipdp.bounds.walk import UNIT, network_bounds, trace
from lipdp.layers import BallProjection, FrobeniusDense, SpectralDense

__all__ = ["attack", "certified_accuracy", "certified_radii"]

# Dense layers whose kernel is the matrix that they multiply with; subclasses may compute another.
_DENSE = (keras.layers.Dense, SpectralDense, FrobeniusDense)
# Relative float32 rounding error of what a layer computes; 17 times what one operation makes.
_ROUNDING = 1e-6


def certified_radii(
    network: keras.Model, x: np.ndarray, y: np.ndarray, *, batch_size: int = 1000
) -> np.ndarray:
    """The radius around each example within which its label is provably what is predicted.

    **From margins to radii.** Let `z` be the logits and `L` the Lipschitz constant of the network.
    `z_y − z_c` is `√2·L`-Lipschitz, since `‖e_y − e_c‖ = √2`: within `(z_y − z_c)/(√2·L)` class `c`
    cannot overtake. If the last layer is dense with columns `w_c` and `L'` is the constant of what
    is before it, `z_y − z_c` is also `‖w_y − w_c‖·L'`-Lipschitz, which is never worse where
    `L = s(W)·L'`. The norms are measured on the weights as they are.

    **Where the input is projected.** If a `BallProjection` of radius `r` projects `v`, which is
    made of the input by layers in a chain, what follows can be certified for a distance `M` on the
    ball, which `v` attains only by moving at least as far, and further where it is outside: a move
    by `t < ‖v‖` turns it by at most `θ = arcsin(t/‖v‖)`, and projections of two points outside the
    ball are at most `2r·sin(θ/2)` apart. That is `M` for `t = ‖v‖·q·√(1 − q²/4)`, `q = M/r`, and
    holds as long as `t ≤ ‖v‖ − r` keeps all of them outside.

    **Rounding.** The logits are computed in float32. Each layer is granted an error of 1e-6 of its
    output's bound, carried on by the Lipschitz constant of what follows; behind the projection it
    is taken off the margins, before it off the radii. That is an allowance (tests hold it against
    float64), not a proof.

    Args:
        network: a Sequential or functional model with one input of floating-point numbers and
            logits `(batch, classes)`; as it predicts, without dropout.
        x: examples `(examples, ...)`, finite.
        y: labels `(examples,)`, integers from 0 to `classes − 1`.
        batch_size: examples that are computed at once.

    Returns:
        Radii `(examples,)`: 0 where the prediction is wrong, and never above the longest example's
        norm.

    Raises:
        UnknownLayerError: a layer has no bound.
        TypeError: the network is not Sequential or functional.
        ValueError: another shape, NaN, labels out of range, or a layer whose cotangents do not
            tell how its output moves: tokens, masks, `stop_gradient`.

    >>> layer = keras.layers.Dense(2, use_bias=False, kernel_initializer="identity")
    >>> network = keras.Sequential([keras.Input((2,)), layer])
    >>> x = np.array([[3.0, 1.0], [0.0, 1.0]])
    >>> [round(float(r), 3) for r in certified_radii(network, x, np.array([0, 0]))]  # 2/√2, wrong
    [1.414, 0.0]
    """
    x, y = _check_data(network, x, y)
    reach = max(float(np.linalg.norm(x.reshape(len(x), -1).astype("float64"), axis=1).max()), 1e-30)
    certificate = _certify(network, 2.0 * reach)  # within `reach` of an example
    radii = []
    for start in range(0, len(x), batch_size):
        rows, labels = x[start : start + batch_size], y[start : start + batch_size]
        logits = ops.convert_to_numpy(network(rows, training=False)).astype("float64")
        radii.append(certificate.radii(logits, labels, certificate.lengths(rows)))
    return np.minimum(np.concatenate(radii), reach)


def certified_accuracy(
    network: keras.Model,
    x: np.ndarray,
    y: np.ndarray,
    radii: Sequence[float],
    *,
    batch_size: int = 1000,
) -> np.ndarray:
    """Share of the examples that are predicted rightly wherever they move within each radius.

    Args:
        network, x, y, batch_size: as for `certified_radii`.
        radii: not negative; 0 gives the share whose margin is above rounding.

    Returns:
        A share for each radius.

    Raises:
        ValueError: a radius is negative or NaN; and as `certified_radii`.

    >>> layer = keras.layers.Dense(2, use_bias=False, kernel_initializer="identity")
    >>> network = keras.Sequential([keras.Input((2,)), layer])
    >>> x, y = np.array([[3.0, 1.0], [0.0, 1.0]]), np.array([0, 1])
    >>> [float(share) for share in certified_accuracy(network, x, y, [0.0, 1.0, 2.0])]
    [1.0, 0.5, 0.0]
    """
    radii = [check_number(radius, "radii", zero=True) for radius in radii]
    found = certified_radii(network, x, y, batch_size=batch_size)
    return np.array([np.mean(found > radius) for radius in radii])


# --- the certificate --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Certificate:
    """Constants of a network.

    Attributes:
        front: layers before the projection, in their order; empty where there is none.
        slope: Lipschitz constant of the front.
        ball: radius of the projection, or None.
        constants: `(classes, classes)`, of the differences of logits behind the projection.
        front_error, error: rounding, of the projected vector and of a difference of logits.
    """

    front: list
    slope: float
    ball: float | None
    constants: np.ndarray
    front_error: float
    error: float

    def lengths(self, x):
        """Norms of what is projected."""
        for layer in self.front:
            x = layer(x)
        x = ops.convert_to_numpy(x)
        return np.linalg.norm(x.reshape(len(x), -1).astype("float64"), axis=1)

    def radii(self, logits, labels, lengths):
        own = np.take_along_axis(logits, labels[:, None], axis=1)
        margins = own - logits - self.error
        constants = self.constants[labels]
        with np.errstate(divide="ignore", invalid="ignore"):
            room = np.where(margins > 0, margins / constants, 0.0)
        np.put_along_axis(room, labels[:, None], np.inf, axis=1)
        room = room.min(axis=1)
        if self.ball is not None:
            q = np.minimum(room / self.ball, math.sqrt(2.0))
            outside = np.minimum(lengths * q * np.sqrt(1.0 - q * q / 4.0), lengths - self.ball)
            room = np.maximum(room, outside)
        room = np.maximum(room - self.front_error, 0.0)
        return room / self.slope if self.slope > 0 else np.where(room > 0, np.inf, 0.0)


def _certify(network, input_bound):
    """The certificate, for inputs of that norm at most."""
    traced = trace(network)
    with measuring():
        found = network_bounds(traced, UNIT, input_bound)
    for layer in found.layers:
        blind = any(isinstance(g, (int, float)) and g == 0 for g in layer.input_cotangents)
        if blind and not (isinstance(layer.cotangent, (int, float)) and layer.cotangent == 0):
            raise ValueError(
                f"Layer {layer.name!r} ({layer.kind}) hands no cotangent back, which does not tell "
                "how its output moves with its input: no radius can be certified through it."
            )
    if any(call.signature.masked for call in traced.calls):
        raise ValueError(
            f"Network {network.name!r} works with masks, which jump where an input moves: no "
            "radius can be certified through them."
        )
    place = _projection(traced)
    layers = found.layers
    errors = [_ROUNDING * as_float(layer.output * layer.cotangent) / UNIT for layer in layers]
    if place is None:
        front, ball, slope, before = [], None, 1.0, 0.0
        behind = as_float(sum(found.input_cotangents)) / UNIT
        error = sum(errors)
    else:
        front = [call.operation for call in traced.calls[:place]]
        ball = traced.calls[place].operation.radius
        behind = as_float(layers[place].cotangent) / UNIT
        slope = as_float(sum(found.input_cotangents)) / UNIT / behind if behind > 0 else 0.0
        before = sum(errors[:place]) / behind if behind > 0 else 0.0
        error = sum(errors[place:])
    classes = network.output_shape[-1]
    constants = np.full((classes, classes), math.sqrt(2.0) * behind)
    rows = _last_rows(traced)
    if rows is not None and as_float(layers[-1].input_cotangents[0]) > 0:
        norm = as_float(layers[-1].input_cotangents[0]) / UNIT
        between = np.linalg.norm(rows[:, None] - rows[None], axis=-1)
        constants = np.minimum(constants, between * (behind / norm))
    return _Certificate(
        front,
        slope * (1.0 + _ROUNDING),
        ball,
        constants * (1.0 + _ROUNDING),
        before,
        math.sqrt(2.0) * error,
    )


def _projection(traced):
    """Place of the first projection among the calls, if a chain of layers leads there."""
    (current,) = traced.inputs
    for place, call in enumerate(traced.calls):
        readers = sum(other.inputs.count(current) for other in traced.calls)
        layer = call.operation
        if call.inputs != [current] or readers != 1 or not isinstance(layer, keras.layers.Layer):
            return None
        if type(layer) is BallProjection and not layer.per_position:
            return place
        if len(call.signature.args) > 1 or call.signature.kwargs:
            return None
        (current,) = call.outputs
    return None


def _last_rows(traced):
    """The columns `(classes, features)` of the dense layer that makes the logits, or None."""
    call = traced.calls[-1]
    layer = call.operation
    if (
        type(layer) not in _DENSE
        or call.outputs != traced.outputs
        or layer.activation is not keras.activations.linear
        or len(call.signature.input_shape) != 1
    ):
        return None
    return ops.convert_to_numpy(layer.kernel).astype("float64").T


def _check_data(network, x, y):
    shapes = getattr(network, "input_shape", None), getattr(network, "output_shape", None)
    if not isinstance(shapes[0], tuple) or not isinstance(shapes[1], tuple):
        raise ValueError("`network` must be built and have one input and one output.")
    if "float" not in str(network.inputs[0].dtype):
        raise ValueError(
            f"`network` must read floating-point numbers; {network.name!r} reads "
            f"{network.inputs[0].dtype}."
        )
    if len(shapes[1]) != 2 or shapes[1][1] < 2:
        raise ValueError(
            f"`network` must have logits (batch, classes), two or more; got {shapes[1]}."
        )
    x, y = np.asarray(x), np.asarray(y)
    if x.ndim != len(shapes[0]) or not len(x) or x.dtype.kind not in "fiu":
        raise ValueError(f"`x` must be numbers of shape {shapes[0]}; got {x.dtype} {x.shape}.")
    x = x.astype("float32")
    if not np.isfinite(x).all():
        raise ValueError("`x` must be finite; got NaN or infinite entries.")
    if y.shape != (len(x),) or y.dtype.kind not in "iu" or y.min() < 0 or y.max() >= shapes[1][1]:
        raise ValueError(
            f"`y` must be {len(x)} integer labels from 0 to {shapes[1][1] - 1}; got {y.dtype} of "
            f"shape {y.shape}."
        )
    return x, y.astype("int64")


# --- the attack -------------------------------------------------------------------------------


def attack(
    network: keras.Model,
    x: np.ndarray,
    y: np.ndarray,
    radius: float | np.ndarray,
    *,
    steps: int = 20,
    restarts: int = 2,
    seed: int = 0,
    batch_size: int = 500,
) -> np.ndarray:
    """Inputs within a Euclidean ball around each example on which the network does worst.

    Projected ascent (PGD, Madry et al., ICLR 2018) of `max_c z_c − z_y` over the other classes,
    with steps of a length that shrinks to nothing along the normalised gradient; first from the
    example itself, then from random points. Like the certificate it does not keep to the range
    that pixels have.

    Args:
        network, x, y, batch_size: as for `certified_radii`.
        radius: of the balls; one for all, or one for each example.
        steps: of each ascent.
        restarts: number of ascents.
        seed: of the random points.

    Returns:
        The worst inputs that were found, of the shape of `x`, float32.

    Raises:
        ValueError: a radius is negative or NaN; and as `certified_radii`.

    >>> layer = keras.layers.Dense(2, use_bias=False, kernel_initializer="identity")
    >>> network = keras.Sequential([keras.Input((2,)), layer])
    >>> found = attack(network, np.array([[3.0, 1.0]]), np.array([0]), radius=2**0.5)
    >>> [round(float(v), 2) for v in found[0]]
    [2.0, 2.0]
    """
    x, y = _check_data(network, x, y)
    radius = np.asarray(radius, dtype="float32")
    if radius.shape not in ((), (len(x),)) or not (radius >= 0).all():
        raise ValueError(
            f"`radius` must be a number of at least 0, or {len(x)} of them; got {radius!r}."
        )
    # A little inside, for what rounding moves.
    radius = np.broadcast_to(radius * (1.0 - 1e-6), (len(x),)).astype("float32")
    random = np.random.default_rng(seed)
    classes = network.output_shape[-1]

    def lead(x, own):
        logits = network(x, training=False)
        others = ops.where(own > 0, -math.inf, logits)
        return ops.max(others, axis=-1) - ops.sum(own * logits, axis=-1)

    @compiled
    def ascend(x, move, own, radius, length):
        """One step, and how far the best other class is ahead before it."""
        ahead, slope = gradient(lambda v: lead(v, own), x + move)
        moved = move + length * radius * slope / ops.maximum(_norms(slope), 1e-30)
        return ahead, moved * ops.minimum(1.0, radius / ops.maximum(_norms(moved), 1e-30))

    worst = []
    for start in range(0, len(x), batch_size):
        rows = slice(start, start + batch_size)
        own = np.eye(classes, dtype="float32")[y[rows]]
        shape = (-1, *[1] * (x.ndim - 1))
        ball = radius[rows].reshape(shape)
        best, found = np.full(len(own), -np.inf), x[rows].copy()
        for restart in range(restarts):
            move = random.normal(size=x[rows].shape).astype("float32")
            move *= 0.0 if restart == 0 else ball / np.asarray(_norms(move))
            for step in range(steps + 1):
                length = np.float32(2.0 * (1.0 - step / steps))
                ahead, further = ascend(x[rows], move, own, ball, length)
                better = ops.convert_to_numpy(ahead) > best
                best = np.where(better, ops.convert_to_numpy(ahead), best)
                found[better] = (x[rows] + ops.convert_to_numpy(move))[better]
                move = further
        worst.append(found)
    return np.concatenate(worst)


def _norms(x: Any):
    return ops.sqrt(ops.sum(ops.square(x), axis=tuple(range(1, len(x.shape))), keepdims=True))
