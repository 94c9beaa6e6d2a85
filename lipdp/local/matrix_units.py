"""Units whose weights are matrices: dense layers, convolutions, einsums and embeddings."""

import math
import string

from keras import ops

from lipdp.bounds import UnknownLayerError
from lipdp.local.products import (
    cleaned,
    count_of,
    entrywise,
    gram_is_cheaper,
    outer,
    taps,
    twice_summed,
    written,
)
from lipdp.local.unit import Unit, first_argument, patched

__all__ = [
    "ConvUnit",
    "DenseUnit",
    "DepthwiseUnit",
    "EinsumUnit",
    "EmbeddingUnit",
    "SeparableUnit",
    "TransposedUnit",
]


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
        x = ops.cast(first_argument(args, kwargs), self.layer.compute_dtype)
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
        layer, x = self.layer, first_argument(args, kwargs)
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
