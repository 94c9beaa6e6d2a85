"""Norms of each example's own gradient, from what a layer reads and the cotangents that it gets.

The gradient of a linear layer's weights is, for one example, a sum of outer products over the
positions that share them. A function here gives the squares of its norm, a row an example, and a
`pull`: given a factor for each example it returns the sum of the gradients times their factors.
What is measured may exceed the norm by rounding, and is never below that of what `pull` adds up.

An example whose square is not finite takes no part, whatever its rows hold; its factor must be 0.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from keras import ops

__all__ = [
    "cleaned",
    "count_of",
    "entrywise",
    "gram_is_cheaper",
    "outer",
    "row_squares",
    "taps",
    "twice_summed",
    "written",
]

Tensor = Any
Pull = Callable[[Tensor], list[Tensor]]

# Unit roundoff of float32.
_U = 2.0**-24
# Added to sums of squares, whose terms may underflow: float32 knows nothing below 2⁻¹²⁶.
_TINY = 2.0**-90
# Most entries of one example's gradient that are written out.
_LARGEST_PRODUCT = 2**22


def cleaned(squares: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, with zeros in the rows whose square is not finite: 0 times infinity is NaN."""
    finite = ops.isfinite(squares)

    def zeroed():
        return [ops.where(_beside(finite, t), t, ops.zeros_like(t)) for t in tensors]

    # Almost always there is none, and nothing needs to be read.
    return ops.cond(ops.all(finite), lambda: list(tensors), zeroed)


def row_squares(rows: Tensor) -> Tensor:
    """An upper bound of each row's sum of squares, `(batch, ...)` to `(batch,)`.

    Summed axis by axis: the error of a sum of n terms is up to `n·u` of it, in whatever order they
    come. Many small terms that a large one swallows, one by one, do reach that.
    """
    squares = ops.square(rows)
    terms = 8.0
    for axis in reversed(range(1, len(rows.shape))):
        squares = _apart(ops.sum(squares, axis=-1))
        terms += count_of(rows.shape[axis], rows, axis)
    return squares * (1 + terms * _U) + _TINY


def twice_summed(terms: Tensor) -> Tensor:
    """Sums over the last axis, then over the one before: n + m terms round, not n·m."""
    return ops.sum(_apart(ops.sum(terms, axis=-1)), axis=-1)


def count_of(size: int | None, tensor: Tensor, axis: int) -> Any:
    """The size of an axis, a tensor where it is not known in advance."""
    return float(size) if size is not None else ops.cast(ops.shape(tensor)[axis], "float32")


def _apart(sums):
    """The same sums. XLA makes one sum of two that follow each other, whose error is that of all
    terms together; it cannot where the smaller ones among the inner sums might be replaced.
    Infinity stays, and -infinity comes with a bound that is infinite.
    """
    return ops.maximum(sums, -3e38)


def outer(x: Tensor, g: Tensor, bias: bool = False) -> tuple[Tensor, Pull]:
    """Gradients `Σ_t x_t ⊗ g_t` of a matrix, and `Σ_t g_t` of a bias, of each example.

    Where there is one position, the norm is `‖x‖·‖g‖`. Otherwise either the product is formed, or
    the Gram matrices: `Σ_ts (x_t·x_s)(g_t·g_s)`, whichever is cheaper. Terms of that sum may
    cancel, so a bound of their rounding is added.

    Args:
        x: `(batch, groups, positions, p)`.
        g: `(batch, groups, positions, c)`.
        bias: whether there is one, `(groups, c)`.

    Returns:
        `(batch,)` squares of the norms, and the pull: `(groups, p, c)` and `(groups, c)`.
    """
    # Integers would be measured as such: their squares wrap.
    x, g = (ops.cast(v, "float32") for v in (x, g))
    _, groups, positions, p = x.shape
    c = g.shape[-1]
    if positions == 1:
        x, g = ops.squeeze(x, 2), ops.squeeze(g, 2)
        # Groups are matrices of their own.
        squares = ops.sum((_last_squares(x) + float(bias)) * _last_squares(g), axis=-1)
        squares = squares * (1 + (8 + groups) * _U)

        def pull(factors):
            a, b = cleaned(squares, [x, g])
            b = b * _beside(factors, b)
            if groups == 1:
                kernel = ops.expand_dims(ops.matmul(ops.transpose(a[:, 0]), b[:, 0]), 0)
            else:
                kernel = ops.einsum("bgp,bgc->gpc", a, b)
            return [kernel, ops.sum(b, axis=0)][: 1 + bias]

        return squares, pull
    if gram_is_cheaper(positions, p, c):
        return _by_gram(x, g, bias)
    product = ops.matmul(ops.transpose(x, (0, 1, 3, 2)), g)
    return entrywise([product, ops.sum(g, axis=2)][: 1 + bias])


def gram_is_cheaper(positions: int | None, p: int, c: int) -> bool:
    """Whether `outer` forms Gram matrices in place of the products of each example.

    Products come out weighted and summed: the layer's own product is not needed any more, and what
    remains is to read them a few times, which takes as long as some 32 multiplications an entry.
    """
    if positions is None:
        return False
    large = p * c > _LARGEST_PRODUCT and positions**2 < p * c
    return large or positions**2 * (p + c) < 32 * p * c


def written(positions: int | None, p: int, c: int) -> int:
    """How many numbers `outer` writes out for one example and group."""
    if positions == 1:
        return 0
    return 3 * positions**2 if gram_is_cheaper(positions, p, c) else p * c


def _by_gram(x, g, bias):
    positions, p = x.shape[2:]
    c = g.shape[-1]
    xx, gg = (ops.matmul(v, ops.swapaxes(v, 2, 3)) for v in (x, g))
    # Product of two roots: the squares' own product may overflow, or vanish.
    lengths = ops.sqrt(_last_squares(x)) * ops.sqrt(_last_squares(g))
    whole = ops.sum(lengths, axis=-1)
    if bias:
        # The same with a 1 behind each x_t.
        xx = xx + 1.0
        whole = whole + ops.sum(ops.sqrt(_last_squares(g)), axis=-1)
    terms = p + c + 2 * positions + 8
    exact = twice_summed(xx * gg)
    squares = ops.maximum(exact, 0.0) + terms * _U * ops.square(whole)
    # What `pull` adds up for one example rounds, too, by this much of the terms' lengths.
    norms = ops.sqrt(squares) + terms * _U * whole
    squares = ops.sum(ops.square(norms), axis=-1) * (1 + 16 * _U)

    def pull(factors):
        a, b = cleaned(squares, [x, g])
        b = b * _beside(factors, b)
        found = [ops.einsum("bgtp,bgtc->gpc", a, b), ops.sum(b, axis=(0, 2))]
        return found[: 1 + bias]

    return squares, pull


def entrywise(gradients: Sequence[Tensor]) -> tuple[Tensor, Pull]:
    """The gradients of each example, written out.

    Args:
        gradients: `(batch, ...)` for each weight, or part of a weight.
    """
    squares = sum(row_squares(g) for g in gradients)

    def pull(factors):
        return [_weighted_sum(factors, g) for g in cleaned(squares, gradients)]

    return squares, pull


def taps(
    x: Tensor,
    kernel_size: Sequence[int],
    strides: Sequence[int],
    padding: str,
    dilation_rate: Sequence[int],
) -> list[Tensor]:
    """What each tap of a convolution reads, at each position.

    Args:
        x: `(batch, ..., channels)`.
        kernel_size, strides, padding, dilation_rate: of the convolution; padding may be "causal".

    Returns:
        `(batch, positions, channels)` for each tap, in the order of the kernel's entries.
    """
    sizes = x.shape[1:-1]
    spans = [(k - 1) * d + 1 for k, d in zip(kernel_size, dilation_rate, strict=True)]
    pads, counts = [], []
    for n, span, stride in zip(sizes, spans, strides, strict=True):
        if padding == "valid":
            before = after = 0
        elif padding == "causal":
            before, after = span - 1, 0
        else:
            whole = max((math.ceil(n / stride) - 1) * stride + span - n, 0)
            before, after = whole // 2, whole - whole // 2
        pads.append((before, after))
        counts.append((n + before + after - span) // stride + 1)
    if any(before or after for before, after in pads):
        x = ops.pad(x, [(0, 0), *pads, (0, 0)])
    found = []
    for tap in itertools.product(*map(range, kernel_size)):
        where = [
            slice(i * d, i * d + (count - 1) * stride + 1, stride)
            for i, d, count, stride in zip(tap, dilation_rate, counts, strides, strict=True)
        ]
        part = x[(slice(None), *where)]
        found.append(ops.reshape(part, (-1, math.prod(counts), x.shape[-1])))
    return found


def _last_squares(x):
    squares = ops.sum(ops.square(x), axis=-1)
    return squares * (1 + (x.shape[-1] + 8) * _U) + _TINY


def _weighted_sum(factors, rows):
    """`Σ_i factors_i·rows_i`."""
    shape = tuple(rows.shape[1:])
    rows = ops.reshape(rows, (-1, math.prod(shape)))
    return ops.reshape(ops.matmul(ops.expand_dims(factors, 0), rows), shape)


def _beside(factors, rows):
    return ops.reshape(factors, (-1,) + (1,) * (len(rows.shape) - 1))
