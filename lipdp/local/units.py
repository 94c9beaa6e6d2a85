"""Units: layers whose own trainable weights are clipped together, example by example.

A unit calls its layer so that the cotangents of the part with the weights can be asked for (`run`),
and tells, from what that part read and from those cotangents, the norm of each example's gradient
(`measure`). A unit without a formula of its own has each example's gradient computed by itself.
"""

import abc
import contextlib
import itertools
import math
import string
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
from keras import layers as K
from keras import ops, tree

from lipdp.autodiff import in_pieces, per_row, vjp
from lipdp.bounds import UnknownLayerError
from lipdp.local.products import (
    Pull,
    Tensor,
    cleaned,
    count_of,
    entrywise,
    gram_is_cheaper,
    outer,
    taps,
    twice_summed,
    written,
)

__all__ = ["Unit", "find_units", "patched"]

Measured = tuple[Tensor, Pull]

#: Bytes that the gradients of single examples may take, for one layer.
MEMORY = 2**28
# Rows for which gradients are written out at once, where their number is not known in advance.
_UNKNOWN_BATCH = 2**12


class Unit(abc.ABC):
    """A layer, and the gradients of its trainable weights.

    Attributes:
        layer: the layer.
        variables: its trainable weights, those of layers within it included.
        exact: whether norms are exact but for rounding, or upper bounds.
        measured: how norms are found, for the report.
    """

    exact = True
    measured = "from what it reads and its cotangents"

    def __init__(self, layer: keras.layers.Layer) -> None:
        self.layer = layer
        self.variables = list(layer.trainable_variables)

    @classmethod
    def fits(cls, layer: keras.layers.Layer) -> bool:
        """Whether the formula is that of the layer with its settings."""
        return True

    def run(self, call: Callable, tap: Callable, args: tuple, kwargs: dict) -> Any:
        """The layer's output.

        Args:
            call: the layer's own `call`.
            tap: `tap(value, saved, static=None)` gives the value back; `measure` gets its cotangent
                with what was saved, a list of tensors that may grow until the call ends, and with
                what else it needs to know. Called once. The value may be a list.
            args, kwargs: of the call.
        """
        return tap(call(*args, **kwargs), [_first(args, kwargs)])

    @abc.abstractmethod
    def measure(self, saved: list[Tensor], g: Any, static: Any = None) -> tuple[Tensor, Pull]:
        """Squares of the norms of the examples' gradients, `(batch,)`, and the function that gives
        the sum of the gradients times a factor each, in the order of `variables`.
        """

    def with_rows(self, saved: list[Tensor], static: Any) -> int:
        """How many of the saved tensors, the first ones, have a row an example."""
        return len(saved)

    def entries(self, saved: list[Tensor], g: Any) -> int:
        """How many numbers `measure` writes out for one example."""
        return sum(math.prod(v.shape) for v in self.variables)

    def clipped(
        self, saved: list[Tensor], g: Any, static: Any, scales: Callable, factors: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """The sum of the examples' gradients, each times what `scales` gives for it.

        Where the gradients of all examples would take more than `MEMORY` bytes, they are computed
        for some examples at a time.

        Args:
            saved, g, static: as for `measure`.
            scales: of squares and factors, `(batch,)` each, the number that multiplies each
                example's gradient.
            factors: `(batch,)`.

        Returns:
            The sums, in the order of `variables`, and the squares of the norms.
        """
        known = self.with_rows(saved, static)
        many = isinstance(g, list)

        def part(factors, *rows):
            own = [*rows[:known], *saved[known:]]
            squares, pull = self.measure(own, list(rows[known:]) if many else rows[-1], static)
            return pull(scales(squares, factors)), squares

        rows = [factors, *saved[:known], *(g if many else [g])]
        size = max(1, MEMORY // (4 * max(1, self.entries(saved, g))))
        if size >= (factors.shape[0] or _UNKNOWN_BATCH):
            return part(*rows)
        return in_pieces(part, rows, size, [v.shape for v in self.variables])

    def trains(self, variable: Any) -> bool:
        """Whether this is one of the weights that are trained."""
        return any(variable is v for v in self.variables)

    def joined(self, parts: Sequence[tuple[Sequence, Measured]]) -> Measured:
        """What `measure` gives, of weights in several parts.

        The squares of the parts' norms add up: they are of different entries.

        Args:
            parts: variables, and the squares and the pull of their gradients. A variable in several
                parts is joined along its last axis.
        """
        squares = sum(squares for _, (squares, _) in parts)

        def pull(factors):
            found = {}
            for variables, (_, pull_part) in parts:
                for v, value in zip(variables, pull_part(factors), strict=True):
                    found.setdefault(id(v), []).append(value)
            return [ops.reshape(_one(found[id(v)]), v.shape) for v in self.variables]

        return squares, pull

    def matrices(self, pairs: Sequence[tuple[Any, Tensor]], g: Tensor, bias: Any = None) -> list:
        """Parts of `joined`: matrices whose products with what they read are added up.

        With `y_t = Σ_k x_kt @ W_k + b`, the gradient of all together is `Σ_t (x_1t ‖ x_2t ‖ … ‖ 1)
        ⊗ g_t`, that of one matrix. Those that are not trained are left out.

        Args:
            pairs: variables, and what each reads, `(batch, positions, p)`.
            g: `(batch, positions, c)`.
            bias: variable, or None.
        """
        pairs = [(v, x) for v, x in pairs if self.trains(v)]
        biases = [bias] if self.trains(bias) else []
        if not pairs:
            return [(biases, entrywise([ops.sum(g, axis=1)]))] if biases else []
        x = _one([x for _, x in pairs])
        squares, pull = outer(ops.expand_dims(x, 1), ops.expand_dims(g, 1), bool(biases))

        def split(factors):
            kernel, *offset = (v[0] for v in pull(factors))
            ends = list(itertools.accumulate(x.shape[-1] for _, x in pairs))
            starts = [0, *ends[:-1]]
            return [kernel[i:j] for i, j in zip(starts, ends, strict=True)] + offset

        return [([*(v for v, _ in pairs), *biases], (squares, split))]

    def offset(self, bias: Any, g: Tensor) -> list:
        """Parts of `joined`: a bias, whose gradient is the sum of the cotangents that it meets."""
        return [([bias], entrywise([_to_shape_of(bias, g)]))] if self.trains(bias) else []


class _Weighted(Unit):
    """A layer with a kernel and perhaps a bias and an activation.

    With LoRA the kernel is `W + s·A@B`, where W is frozen. Of `y = x·W + (s·x·A)·B` the gradient of
    A is that of a kernel that reads x and gets the cotangent `s·g·Bᵀ`; the gradient of B is that of
    a kernel that reads `s·x·A` and gets g.
    """

    def __init__(self, layer):
        super().__init__(layer)
        self.lora = getattr(layer, "lora_enabled", False)

    @classmethod
    def fits(cls, layer):
        """Whether the weights are just those, and none is computed from others."""
        own = [getattr(layer, "bias", None)]
        if getattr(layer, "lora_enabled", False):
            own += [layer.lora_kernel_a, layer.lora_kernel_b]
        else:
            own += [layer.kernel]
        return all(any(w is v for w in own) for v in layer.trainable_variables)

    def run(self, call, tap, args, kwargs):
        activation = self.layer.activation
        # Integers would be measured as such: their squares wrap.
        x = ops.cast(_first(args, kwargs), self.layer.compute_dtype)
        with patched(self.layer, activation=None):
            value = call(x)
        value = tap(value, [x])
        return value if activation is None else activation(value)

    def _low_rank(self):
        """A and B of LoRA, and the scale."""
        layer = self.layer
        return layer.lora_kernel_a, layer.lora_kernel_b, layer.lora_alpha / layer.lora_rank


class DenseUnit(_Weighted):
    """`x @ kernel + bias`, at each position."""

    def entries(self, saved, g):
        if self.lora:
            return super().entries(saved, g)
        return written(_positions(g), saved[0].shape[-1], g.shape[-1])

    def measure(self, saved, g, static=None):
        (x,) = saved
        layer, bias = self.layer, getattr(self.layer, "bias", None)
        x, g = _flat(x), _flat(g)
        if not self.lora:
            return self.joined(self.matrices([(layer.kernel, x)], g, bias))
        a, b, scale = self._low_rank()
        down = scale * ops.matmul(g, ops.transpose(b))
        up = scale * ops.matmul(x, a)
        return self.joined(self.matrices([(a, x)], down) + self.matrices([(b, up)], g, bias))


class ConvUnit(_Weighted):
    """A convolution: a matrix that acts on the window at each position."""

    @classmethod
    def fits(cls, layer):
        plain = not getattr(layer, "lora_enabled", False) or layer.groups == 1
        return super().fits(layer) and plain

    def entries(self, saved, g):
        """As many as weights; the Gram way is taken where it needs less than some times that."""
        return 2 * super().entries(saved, g)

    def measure(self, saved, g, static=None):
        layer = self.layer
        parts, g = self._windows(saved[0]), self._flat(g)
        found = self.offset(layer.bias, g)
        if not self.lora:
            if self.trains(layer.kernel):
                found.append(([layer.kernel], _windowed(parts, g, layer.groups)))
            return self.joined(found)
        a, b, scale = self._low_rank()
        if self.trains(a):
            down = scale * ops.matmul(g, ops.transpose(b))
            found.append(([a], _windowed(parts, down, 1)))
        taps_of_a = ops.unstack(ops.reshape(a, (len(parts), -1, a.shape[-1])), len(parts))
        up = scale * sum(ops.matmul(x, w) for x, w in zip(parts, taps_of_a, strict=True))
        return self.joined(found + self.matrices([(b, up)], g))

    def _windows(self, x):
        """What each tap reads, `(batch, positions, channels)`; more axes of x than a map has are
        positions, too.
        """
        layer = self.layer
        x = self._channels_last(x)
        if None in x.shape[1:]:
            raise UnknownLayerError(
                f"Layer {layer.name!r} reads maps of unknown size; give keras.Input all sizes."
            )
        steps = math.prod(x.shape[1 : -1 - layer.rank])
        x = ops.reshape(x, (-1, *x.shape[-1 - layer.rank :]))
        parts = taps(x, layer.kernel_size, layer.strides, layer.padding, layer.dilation_rate)
        return [ops.reshape(v, (-1, steps * v.shape[1], v.shape[2])) for v in parts]

    def _flat(self, v):
        return _flat(self._channels_last(v))

    def _channels_last(self, v):
        if self.layer.data_format == "channels_last":
            return v
        return ops.moveaxis(v, -1 - self.layer.rank, -1)


def _windowed(parts, g, groups):
    """Squares and pull of a kernel `(taps, p / groups, c)`, `Σ_t part_t ⊗ g_t` for each tap.

    Args:
        parts: `(batch, positions, p)` for each tap.
        g: `(batch, positions, c)`.
        groups: of channels, each with a kernel of its own.
    """
    positions, p, c = parts[0].shape[1], parts[0].shape[2] // groups, g.shape[2] // groups
    if gram_is_cheaper(positions, len(parts) * p, c):

        def split(v):
            v = ops.reshape(v, (-1, positions, groups, v.shape[-1] // groups))
            return ops.transpose(v, (0, 2, 1, 3))

        squares, pull = outer(ops.concatenate([split(v) for v in parts], axis=-1), split(g))
        return squares, lambda factors: [ops.transpose(pull(factors)[0], (1, 0, 2))]
    if groups == 1:
        gradients = [ops.matmul(ops.transpose(part, (0, 2, 1)), g) for part in parts]
    else:
        g = ops.reshape(g, (-1, positions, groups, c))
        parts = [ops.reshape(part, (-1, positions, groups, p)) for part in parts]
        gradients = [ops.einsum("btgp,btgc->bpgc", part, g) for part in parts]
    return _by_taps(gradients)


def _by_taps(gradients):
    """`entrywise` of the taps of one kernel."""
    squares, pull = entrywise(gradients)
    return squares, lambda factors: [ops.stack(pull(factors))]


class TransposedUnit(ConvUnit):
    """A transposed convolution: `y[s·t + k] = Σ_t x[t] @ kernel[k]ᵀ`.

    It is the adjoint of a convolution that reads maps like y. So the kernel's gradient is that
    convolution's: x and g change places, and the windows are those of g.
    """

    @classmethod
    def fits(cls, layer):
        return super().fits(layer) and layer.output_padding is None

    def measure(self, saved, g, static=None):
        layer = self.layer
        x = self._flat(saved[0])
        found = self.offset(layer.bias, self._flat(g))
        if self.trains(layer.kernel):
            found.append(([layer.kernel], _windowed(self._windows(g), x, 1)))
        return self.joined(found)


class DepthwiseUnit(ConvUnit):
    """A depthwise convolution: a small matrix for each channel."""

    def measure(self, saved, g, static=None):
        layer = self.layer
        parts, g = self._windows(saved[0]), self._flat(g)
        found = self.offset(layer.bias, g)
        if self.trains(layer.kernel):
            found.append(([layer.kernel], self._depthwise(parts, g)))
        return self.joined(found)

    def _depthwise(self, parts, g):
        """Squares and pull of the kernel, `Σ_t part_t·g_t` for each channel."""
        multiplier = self.layer.depth_multiplier
        if multiplier == 1:
            return _by_taps([ops.sum(part * g, axis=1) for part in parts])
        g = ops.reshape(g, (-1, *parts[0].shape[1:], multiplier))
        return _by_taps([ops.sum(ops.expand_dims(part, -1) * g, axis=1) for part in parts])


class SeparableUnit(DepthwiseUnit):
    """A depthwise convolution, and a matrix that acts on its channels at each position.

    The matrix P reads the depthwise output and gets g; the depthwise kernel gets `g @ Pᵀ`.
    """

    @classmethod
    def fits(cls, layer):
        own = [layer.depthwise_kernel, layer.pointwise_kernel, layer.bias]
        return all(any(w is v for w in own) for v in layer.trainable_variables)

    def run(self, call, tap, args, kwargs):
        layer, x = self.layer, _first(args, kwargs)
        options = {"padding": layer.padding, "data_format": layer.data_format}
        strides, rates = layer.strides, layer.dilation_rate
        inner = ops.depthwise_conv(
            x, layer.depthwise_kernel, strides, dilation_rate=rates, **options
        )
        options["padding"] = "valid"
        value = ops.conv(inner, layer.pointwise_kernel, **options)
        if layer.bias is not None:
            last = layer.data_format == "channels_last"
            shape = (layer.filters,) if last else (layer.filters,) + (1,) * layer.rank
            value = value + ops.reshape(layer.bias, (1,) * (len(value.shape) - len(shape)) + shape)
        value = tap(value, [x, inner])
        return value if layer.activation is None else layer.activation(value)

    def measure(self, saved, g, static=None):
        layer = self.layer
        x, inner = saved
        g, inner = self._flat(g), self._flat(inner)
        found = self.matrices([(layer.pointwise_kernel, inner)], g, layer.bias)
        if self.trains(layer.depthwise_kernel):
            matrix = ops.reshape(layer.pointwise_kernel, (-1, layer.filters))
            back = ops.matmul(g, ops.transpose(matrix))
            found.append(([layer.depthwise_kernel], self._depthwise(self._windows(x), back)))
        return self.joined(found)


class EinsumUnit(_Weighted):
    """`einsum(equation, x, kernel) + bias`."""

    @classmethod
    def fits(cls, layer):
        left, output = layer.equation.split("->")
        inputs, weights = left.split(",")
        simple = "." not in layer.equation and inputs[0] == output[0] and inputs[0] not in weights
        once = all(len(set(axes)) == len(axes) for axes in (inputs, weights, output))
        # LoRA's B acts on the last axis, which must be an output of a matrix.
        last = not getattr(layer, "lora_enabled", False) or weights[-1] not in inputs
        known = set(weights) <= set(inputs + output)
        return super().fits(layer) and simple and once and last and known

    def measure(self, saved, g, static=None):
        (x,) = saved
        layer = self.layer
        found = self.offset(layer.bias, g)
        left, output = layer.equation.split("->")
        inputs, weights = left.split(",")
        if not self.lora:
            if self.trains(layer.kernel):
                found.append(([layer.kernel], _einsum(inputs, weights, output, x, g)))
            return self.joined(found)
        a, b, scale = self._low_rank()
        last = weights[-1]
        rank = next(axis for axis in string.ascii_letters if axis not in layer.equation)
        narrow, weights = output.replace(last, rank), weights.replace(last, rank)
        if self.trains(a):
            down = scale * ops.einsum(f"{output},{rank}{last}->{narrow}", g, b)
            found.append(([a], _einsum(inputs, weights, narrow, x, down)))
        if self.trains(b):
            up = scale * ops.einsum(f"{inputs},{weights}->{narrow}", x, a)
            found.append(([b], _einsum(narrow, rank + last, output, up, g)))
        return self.joined(found)


def _einsum(inputs, weights, output, x, g):
    """Squares and pull of the kernel of `einsum("inputs,weights->output", x, kernel)`.

    Axes of the kernel that are in both are groups, matrices of their own; axes that the kernel
    lacks are positions, or summed over before the kernel is met.
    """
    sizes = dict(zip(inputs, x.shape, strict=True)) | dict(zip(output, g.shape, strict=True))
    shared = [a for a in inputs[1:] if a in output and a not in weights]
    lost = [a for a in inputs if a not in output and a not in weights]
    groups = [a for a in weights if a in inputs and a in output]
    old = [a for a in weights if a in inputs and a not in output]
    new = [a for a in weights if a not in inputs]
    batch = inputs[0]
    if lost:
        kept = "".join(a for a in inputs if a not in lost)
        x, inputs = ops.einsum(f"{inputs}->{kept}", x), kept

    def arranged(value, axes, last):
        order = [axes.index(a) for a in (batch, *groups, *shared, *last)]
        shape = [_product(sizes, part) for part in (groups, shared, last)]
        return ops.reshape(ops.transpose(value, order), (-1, *shape))

    squares, pull = outer(arranged(x, inputs, old), arranged(g, output, new))

    def kernel(factors):
        order = [*groups, *old, *new]
        whole = ops.reshape(pull(factors)[0], [sizes[a] for a in order])
        return [ops.transpose(whole, [order.index(a) for a in weights])]

    return squares, kernel


class EmbeddingUnit(Unit):
    """Rows of a table: `Σ_ts [id_t = id_s] g_t·g_s`, the Gram sum of one-hot rows.

    With LoRA the table is `W + s·A@B`, where W is frozen: A is a table that gets `s·g·Bᵀ`, and B a
    matrix that reads `s·A[id_t]`.
    """

    LONGEST = 1024  # positions, whose Gram matrix is formed
    measured = f"from its cotangents; an upper bound beyond {LONGEST:,} positions"

    @classmethod
    def fits(cls, layer):
        own = [layer.embeddings]
        if layer.lora_enabled:
            own = [layer.lora_embeddings_a, layer.lora_embeddings_b]
        return all(any(w is v for w in own) for v in layer.trainable_variables)

    def entries(self, saved, g):
        return 3 * (_positions(g) or self.LONGEST) ** 2

    def measure(self, saved, g, static=None):
        ids, layer = saved[0], self.layer
        ids, g = ops.cast(ids, "int32"), _flat(g)
        ids = ops.reshape(ids, ops.shape(g)[:2])
        if not layer.lora_enabled:
            return self.joined([([layer.embeddings], self._table(ids, g))])
        a, b = layer.lora_embeddings_a, layer.lora_embeddings_b
        scale, found = layer.lora_alpha / layer.lora_rank, []
        if self.trains(a):
            found.append(([a], self._table(ids, scale * ops.matmul(g, ops.transpose(b)))))
        up = scale * ops.take(a, ids, axis=0)
        return self.joined(found + self.matrices([(b, up)], g))

    def _table(self, ids, g):
        """Squares and pull of the table.

        Rounding: the Gram sum's error is at most `(d + 2T)·u` times `whole`, the same sum of the
        lengths' products. For one id the rows that `pull` adds up round by `T·u·Σ|g_t|`, so that
        all ids together change the square by `2T·u·whole` at most. Twice the first covers both.
        """
        positions = g.shape[1]
        equal = ops.cast(ops.equal(ids[:, :, None], ids[:, None, :]), g.dtype)
        lengths = ops.sqrt(ops.sum(ops.square(g), axis=-1) + 2.0**-90)
        whole = twice_summed(equal * (lengths[:, :, None] * lengths[:, None, :]))
        terms = g.shape[-1] + 2.0 * count_of(positions, g, 1) + 8
        if positions is not None and positions > self.LONGEST:
            squares = whole * (1 + 4 * terms * 2.0**-24)  # rows of an id, as of one direction
        else:
            exact = twice_summed(equal * ops.matmul(g, ops.swapaxes(g, 1, 2)))
            squares = ops.maximum(exact, 0.0) + 2 * terms * 2.0**-24 * whole

        def pull(factors):
            (rows,) = cleaned(squares, [g])
            rows = ops.reshape(rows * ops.reshape(factors, (-1, 1, 1)), (-1, g.shape[-1]))
            flat = ops.reshape(ids, (-1,))
            return [ops.segment_sum(rows, flat, num_segments=self.layer.input_dim)]

        return squares, pull


class RecurrentUnit(Unit):
    """LSTM, GRU and SimpleRNN: all steps' products with the kernels, and one backward pass in time.

    What the kernel adds at all steps, `z_t = x_t @ kernel + bias`, is computed before the loop, and
    the loop runs on that. The gates are functions of `z_t + h_{t−1} @ recurrent_kernel`, so the
    cotangents `δ_t` of `z_t` are those of that sum. The gradient of kernel, recurrent kernel and
    bias is then that of one matrix: `Σ_t (x_t ‖ h_{t−1} ‖ 1) ⊗ δ_t`. At a step that is masked,
    `δ_t = 0`.

    A GRU's candidate reads the state through the gate r. With `reset_after` that is `r ∘ (h @ R +
    b)`, whose matrix gets the cotangent `r ∘ δ`; otherwise it is `(r ∘ h) @ R`.
    """

    @classmethod
    def fits(cls, layer):
        return type(layer) in (K.LSTM, K.GRU, K.SimpleRNN, K.RNN) and type(layer.cell) in _STEPS

    def entries(self, saved, g):
        if self.trains(self.layer.cell.kernel):
            return super().entries(saved, g)
        return 2 * super().entries(saved, g)

    def run(self, call, tap, args, kwargs):
        layer, cell = self.layer, self.layer.cell
        given = layer._call_signature.bind(*args, **kwargs).arguments
        x, mask = given["sequences"], given.get("mask")
        mask = mask[0] if isinstance(mask, (list, tuple)) else mask
        start = given.get("initial_state")
        if layer.go_backwards:
            x = ops.flip(x, axis=1)
            mask = None if mask is None else ops.flip(mask, axis=1)
        z = ops.matmul(x, cell.kernel)
        if cell.bias is not None:
            z = z + (cell.bias[0] if len(cell.bias.shape) == 2 else cell.bias)
        saved = [x, z]
        z = tap(z, saved)

        step = _STEPS[type(cell)]
        whole = {"return_sequences": True, "return_state": True, "zero_output_for_mask": False}
        with (
            patched(layer, go_backwards=False, use_cudnn=False, **whole),
            patched(cell, call=lambda z, states, training=False: step(cell, z, states)),
        ):
            outputs, *states = K.RNN.call(layer, z, initial_state=start, mask=mask)

        # What each step read: what the one before gave.
        first = tree.flatten(start)[0] if start is not None else ops.zeros_like(outputs[:, 0])
        first = ops.expand_dims(ops.cast(first, outputs.dtype), 1)
        before = ops.concatenate([first, outputs[:, :-1]], axis=1)
        if mask is not None:
            mask = ops.expand_dims(ops.cast(mask, "bool"), -1)
            if start is not None:  # outputs may be zeros until the first step that is not masked
                seen = ops.cumsum(ops.cast(mask, "int32"), axis=1) > 0
                seen = ops.concatenate([ops.zeros_like(seen[:, :1]), seen[:, :-1]], axis=1)
                before = ops.where(seen, before, first)
            if layer.zero_output_for_mask:
                outputs = ops.where(mask, outputs, ops.zeros_like(outputs))
        saved.append(before)
        outputs = outputs if layer.return_sequences else outputs[:, -1]
        return (outputs, *states) if layer.return_state else outputs

    def measure(self, saved, g, static=None):
        x, z, h = saved
        cell, u = self.layer.cell, self.layer.cell.units
        kernel, recurrent, bias = cell.kernel, cell.recurrent_kernel, cell.bias
        if type(cell) is not K.GRUCell:
            return self.joined(self.matrices([(kernel, x), (recurrent, h)], g, bias))
        found = self.matrices([(kernel, x)], g, bias)
        r = ops.matmul(h, recurrent[:, u : 2 * u]) + z[..., u : 2 * u]
        if cell.reset_after:
            r = r if bias is None else r + bias[1, u : 2 * u]
            through = cell.recurrent_activation(r) * g[..., 2 * u :]
            g = ops.concatenate([g[..., : 2 * u], through], axis=-1)
            return self.joined(found + self.matrices([(recurrent, h)], g, bias))
        found += self.matrices([(recurrent, h)], g[..., : 2 * u])
        h = cell.recurrent_activation(r) * h
        return self.joined(found + self.matrices([(recurrent, h)], g[..., 2 * u :]))


def _lstm(cell, z, states):
    h, c = states
    z = ops.split(z + ops.matmul(h, cell.recurrent_kernel), 4, axis=1)
    c, o = cell._compute_carry_and_output_fused(z, c)
    h = o * cell.activation(c)
    return h, [h, c]


def _gru(cell, z, states):
    h, u, recurrent = tree.flatten(states)[0], cell.units, cell.recurrent_kernel
    inner = ops.matmul(h, recurrent if cell.reset_after else recurrent[:, : 2 * u])
    if cell.reset_after and cell.bias is not None:
        inner = inner + cell.bias[1]
    update, r = (cell.recurrent_activation(z[:, i : i + u] + inner[:, i : i + u]) for i in (0, u))
    inner = r * inner[:, 2 * u :] if cell.reset_after else ops.matmul(r * h, recurrent[:, 2 * u :])
    h = update * h + (1 - update) * cell.activation(z[:, 2 * u :] + inner)
    return h, [h]


def _simple(cell, z, states):
    h = z + ops.matmul(tree.flatten(states)[0], cell.recurrent_kernel)
    h = h if cell.activation is None else cell.activation(h)
    return h, [h]


# Cells to a step that is given what the kernel adds.
_STEPS = {K.LSTMCell: _lstm, K.GRUCell: _gru, K.SimpleRNNCell: _simple}


class DistributedUnit(Unit):
    """A layer that is called at each time: times are more positions."""

    def __init__(self, layer):
        super().__init__(layer)
        self.inner = _kind(layer.layer)(layer.layer)

    @classmethod
    def fits(cls, layer):
        return issubclass(_kind(layer.layer), (DenseUnit, ConvUnit))

    def run(self, call, tap, args, kwargs):
        x, layer = _first(args, kwargs), self.layer.layer
        steps = ops.shape(x)[1]

        def back(v):
            return ops.reshape(v, (-1, steps, *v.shape[1:]))

        def tapped(value, saved, static=None):
            value = tap(back(value), [back(v) for v in saved], static)
            return ops.reshape(value, (-1, *value.shape[2:]))

        rows = ops.reshape(x, (-1, *x.shape[2:]))
        return back(self.inner.run(layer.call, tapped, (rows,), {}))

    def entries(self, saved, g):
        return self.inner.entries(saved, g)

    def measure(self, saved, g, static=None):
        return self.inner.measure(saved, g, static)


class PReLUUnit(Unit):
    """Slopes where x is negative: the gradient is `min(x, 0)·g`, summed where a slope is shared."""

    def measure(self, saved, g, static=None):
        return self.joined(self.offset(self.layer.alpha, ops.minimum(saved[0], 0.0) * g))


class AffineUnit(Unit):
    """A normaliser's scale and offset: the layer is called without them, and they are applied."""

    # Class to the names of scale and offset.
    NAMES = {
        K.LayerNormalization: ("gamma", "beta"),
        K.GroupNormalization: ("gamma", "beta"),
        K.BatchNormalization: ("gamma", "beta"),
        K.RMSNormalization: ("scale", None),
    }

    @classmethod
    def fits(cls, layer):
        return not getattr(layer, "rms_scaling", False)

    def run(self, call, tap, args, kwargs):
        layer = self.layer
        names = next(n for c, n in self.NAMES.items() if type(layer).call is c.call)
        scale, offset = (getattr(layer, n, None) if isinstance(n, str) else None for n in names)
        mapping = []
        if isinstance(scale, keras.Variable):
            mapping.append((scale, ops.ones(scale.shape, scale.dtype)))
        if isinstance(offset, keras.Variable):
            mapping.append((offset, ops.zeros(offset.shape, offset.dtype)))
        others = [v for v in layer.variables if not any(v is w for w, _ in mapping)]
        with keras.StatelessScope(mapping + [(v, v.value) for v in others]):
            normal = call(*args, **kwargs)
        axes = layer.axis if isinstance(layer.axis, (list, tuple)) else [layer.axis]
        shape = [1] * len(normal.shape)
        for axis in axes:
            shape[axis] = normal.shape[axis]
        value, saved = normal, []
        if isinstance(scale, keras.Variable):
            value = value * ops.reshape(scale, shape)
            saved.append(normal)
        if isinstance(offset, keras.Variable):
            value = value + ops.reshape(offset, shape)
        return tap(value, saved or [normal])

    def measure(self, saved, g, static=None):
        layer = self.layer
        axes = layer.axis if isinstance(layer.axis, (list, tuple)) else [layer.axis]
        kept = sorted(axis % len(g.shape) for axis in axes)
        away = tuple(a for a in range(1, len(g.shape)) if a not in kept)
        gradients = []
        for variable in self.variables:
            scale = variable.path.rsplit("/", 1)[-1] in ("gamma", "scale")
            rows = saved[0] * g if scale else g
            rows = ops.sum(rows, axis=away) if away else rows
            gradients.append(ops.reshape(rows, (-1, *variable.shape)))
        return entrywise(gradients)


class AnyUnit(Unit):
    """Any layer: each example's gradient by itself."""

    measured = "of each example's gradient by itself"

    def run(self, call, tap, args, kwargs):
        # A state that moves on in the call: as it was before.
        others = [v for v in self.layer.variables if not self.trains(v)]
        state = [ops.convert_to_tensor(v) for v in others]
        tensors = _Tensors(args, kwargs)
        value = call(*args, **kwargs)
        tapped = iter(tap(_floats(value), tensors.rows + state, (call, tensors, others)))
        return tree.map_structure(lambda v: next(tapped) if _is_float(v) else v, value)

    def with_rows(self, saved, static):
        return len(static[1].rows)

    def measure(self, saved, g, static=None):
        call, tensors, others = static
        rows, state = saved[: len(tensors.rows)], saved[len(tensors.rows) :]
        known = list(zip(others, state, strict=True))

        def one(*values):
            values = [ops.expand_dims(v, 0) for v in values]
            args, kwargs = tensors.filled(values[: len(rows)])

            def f(*weights):
                mapping = list(zip(self.variables, weights, strict=True))
                with keras.StatelessScope(mapping + known):
                    return _floats(call(*args, **kwargs))

            weights = [ops.convert_to_tensor(v) for v in self.variables]
            return vjp(f, weights, lambda _: values[len(rows) :])[1]

        return entrywise(per_row(one, [*rows, *g]))


def _is_float(value):
    return ops.is_tensor(value) and keras.backend.is_float_dtype(
        keras.backend.standardize_dtype(value.dtype)
    )


def _floats(value):
    return [v for v in tree.flatten(value) if _is_float(v)]


class _Tensors:
    """Arguments of a call, apart in tensors and the rest."""

    def __init__(self, args, kwargs):
        self.rows = [v for v in tree.flatten((args, kwargs)) if ops.is_tensor(v)]
        self.like = tree.map_structure(lambda v: _Row if ops.is_tensor(v) else v, (args, kwargs))

    def filled(self, rows):
        rows = iter(rows)
        return tree.map_structure(lambda v: next(rows) if v is _Row else v, self.like)


class _Row:
    """Stands for a tensor."""


# By the function that is the layer's call: a subclass that keeps it computes the same.
_KINDS = {
    K.Dense.call: DenseUnit,
    K.EinsumDense.call: EinsumUnit,
    K.Conv1D.call: ConvUnit,
    K.Conv2D.call: ConvUnit,
    K.Conv3D.call: ConvUnit,
    K.Conv2DTranspose.call: TransposedUnit,
    K.DepthwiseConv2D.call: DepthwiseUnit,
    K.SeparableConv2D.call: SeparableUnit,
    K.Embedding.call: EmbeddingUnit,
    K.LayerNormalization.call: AffineUnit,
    K.GroupNormalization.call: AffineUnit,
    K.BatchNormalization.call: AffineUnit,
    K.RMSNormalization.call: AffineUnit,
    K.PReLU.call: PReLUUnit,
    K.TimeDistributed.call: DistributedUnit,
    K.LSTM.call: RecurrentUnit,
    K.GRU.call: RecurrentUnit,
    K.SimpleRNN.call: RecurrentUnit,
    K.RNN.call: RecurrentUnit,
}


# What a subclass may define and still compute as its base does.
_HARMLESS = frozenset(
    ("__init__", "build", "get_config", "from_config", "compute_output_shape", "bound")
)
_OF_EVERY_LAYER = frozenset(vars(K.Layer()))


def _kind(layer):
    kind = _KINDS.get(type(layer).call, AnyUnit)
    return kind if _computes_as_keras(layer) and kind.fits(layer) else AnyUnit


def _computes_as_keras(layer):
    """Whether nothing that its `call` may call is the layer's own, such as a `convolution_op`."""
    cls = type(layer)
    hidden = vars(layer).keys() - _OF_EVERY_LAYER
    if any(callable(getattr(cls, name, None)) for name in hidden):
        return False
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] in ("keras", "lipdp"):
            return True
        own = {name for name, value in vars(base).items() if callable(value)}
        if not own <= _HARMLESS or any(isinstance(v, property) for v in vars(base).values()):
            return False
    return True


def find_units(network: keras.Model) -> list[Unit]:
    """The units of a network: each trainable weight is in one of them.

    A layer that owns trainable weights is a unit, with all that is in it; so is a recurrent layer,
    whose cell is called many times.

    Raises:
        UnknownLayerError: a weight is owned by two layers, or a unit draws random numbers.
    """
    found, seen = [], set()

    def visit(layer):
        if id(layer) in seen:
            return
        seen.add(id(layer))
        if _is_unit(layer):
            _check_repeatable(layer)
            found.append(_kind(layer)(layer))
            return
        for inner in layer._layers:
            visit(inner)

    visit(network)
    owners = {}
    for unit in found:
        for variable in unit.variables:
            other = owners.setdefault(id(variable), unit)
            if other is not unit:
                raise UnknownLayerError(
                    f"The weight {variable.path!r} belongs to {other.layer.name!r} and to "
                    f"{unit.layer.name!r}; give each layer weights of its own."
                )
    return found


def _is_unit(layer):
    own = any(v.trainable for v in layer._trainable_variables)
    return layer.trainable and (own or _composite(layer) and bool(layer.trainable_variables))


def _composite(layer):
    return isinstance(layer, (K.RNN, K.TimeDistributed, K.Wrapper)) and not isinstance(
        layer, K.Bidirectional
    )


def _check_repeatable(unit):
    for layer in unit._flatten_layers():
        if not layer._seed_generators:
            continue
        rates = [getattr(layer, n, None) for n in ("rate", "dropout", "recurrent_dropout")]
        rates = [rate for rate in rates if rate is not None]
        if rates and not any(rates) and type(layer).__module__.startswith("keras."):
            continue
        where = "" if layer is unit else f", which is part of {unit.name!r}"
        raise UnknownLayerError(
            f"Layer {layer.name!r} ({type(layer).__name__}){where}, draws random numbers where the "
            "weights are used, and would draw others when each example's gradient is computed. "
            "Set its rates to 0, and put a keras.layers.Dropout of its own before it."
        )


@contextlib.contextmanager
def patched(owner: Any, **values: Any) -> Iterator[None]:
    """While the scope lasts, an object has these attributes."""
    own = vars(owner)
    before = {name: own[name] for name in values if name in own}
    own.update(values)
    try:
        yield
    finally:
        for name in values:
            del own[name]
        own.update(before)


def _one(values):
    return values[0] if len(values) == 1 else ops.concatenate(values, axis=-1)


def _first(args, kwargs):
    return args[0] if args else next(iter(kwargs.values()))


def _positions(value):
    shape = tuple(value.shape[1:-1])
    return None if None in shape else math.prod(shape)


def _flat(value):
    """All axes between the first and the last as one, that of the positions."""
    if len(value.shape) == 3:
        return value
    return ops.reshape(value, (-1, math.prod(ops.shape(value)[1:-1]), value.shape[-1]))


def _product(sizes, axes):
    return math.prod(sizes[a] for a in axes)


def _to_shape_of(variable, g):
    """Row by row the sum over what a weight of this shape was broadcast over."""
    shape = (1,) * (len(g.shape) - 1 - len(variable.shape)) + tuple(variable.shape)
    away = tuple(i + 1 for i, n in enumerate(shape) if n == 1 and g.shape[i + 1] != 1)
    rows = ops.sum(g, axis=away, keepdims=True) if away else g
    return ops.reshape(rows, (-1, *variable.shape))
