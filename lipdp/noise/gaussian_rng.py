"""Standard normal numbers by the million: a function of a key and a position.

Threefry-2x32 with 20 rounds gives 64 random bits for each two numbers (Salmon, Moraes, Dror & Shaw,
"Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011), and the transform of Box & Muller (1958)
makes two normal numbers of them. All of it is additions, shifts and short polynomials on whole
arrays, the same for both backends, which XLA fuses into one pass: noise costs a few nanoseconds an
entry.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from keras import ops

Tensor = Any

__all__ = ["add_noise", "draw_grouped", "standard_normal", "standard_normals"]

# Entries below which a tensor shares its draw with others: to compile a draw takes longer than to
# make so many numbers.
_FEW = 2**16

_ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
_PARITY = 0x1BD11BDA
# sin(x) = x·P(x²) and cos(x) = Q(x²), up to 2e-9 for |x| ≤ π/4.
_SINE = [(-1) ** i / math.factorial(2 * i + 1) for i in range(5)]
_COSINE = [(-1) ** i / math.factorial(2 * i) for i in range(6)]


def threefry(key: tuple[Tensor, Tensor], counter: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The two random words of each counter under a key: a bijection of pairs of words.

    Args:
        key: two uint32 tensors.
        counter: two uint32 tensors of one shape.

    Returns:
        Two uint32 tensors of that shape.

    >>> zero = ops.zeros((1,), "uint32")
    >>> [f"{int(word[0]):08x}" for word in threefry((zero, zero), (zero, zero))]
    ['6b200159', '99ba4efe']
    """
    xor, word = ops.bitwise_xor, np.uint32
    keys = (*key, xor(xor(*key), word(_PARITY)))
    first, second = counter[0] + key[0], counter[1] + key[1]
    for i in range(20):
        turn = _ROTATIONS[i % 8]
        first = first + second
        second = ops.bitwise_or(
            ops.left_shift(second, word(turn)), ops.right_shift(second, word(32 - turn))
        )
        second = xor(second, first)
        if i % 4 == 3:
            block = i // 4 + 1
            first = first + keys[block % 3]
            second = second + keys[(block + 1) % 3] + word(block)
    return first, second


def standard_normal(key: Tensor, stream: Tensor, shape: Sequence[int]) -> Tensor:
    """Standard normal numbers, a function of the key, the stream and the place in the tensor.

    Two numbers are `√(−2·ln u)·(cos φ, sin φ)`, with 40 bits in `u` and 24 in `φ`: they reach 7.5
    (a normal number goes beyond with probability 5e-14), and none is zero. One is in the first half
    of the tensor, the other as far into the second.

    Args:
        key: uint32 `(4,)`, 128 random bits; the same bits give the same numbers.
        stream: uint32 scalar; the streams of a key have no number in common.
        shape: of the result.

    Returns:
        A float32 tensor. Of a key of zeros, which nobody has drawn, all numbers are NaN.

    Raises:
        ValueError: 2³¹ entries or more, whose places would repeat.

    >>> key = ops.convert_to_tensor(np.arange(4, dtype="uint32"))
    >>> z = standard_normal(key, np.uint32(0), (100, 100))
    >>> z.shape == (100, 100), round(float(ops.std(z)), 1)
    (True, 1.0)
    """
    entries = math.prod(shape)
    if entries >= 2**31:
        raise ValueError(f"`shape` must have fewer than 2**31 entries; got {tuple(shape)}.")
    half = -(-entries // 2)
    # Behind a condition XLA computes a pair once: fused into what reads its two parts it would be
    # computed for each of them.
    numbers = ops.cond(
        ops.any(ops.not_equal(key, np.uint32(0))),
        lambda: _pairs(key, stream, half),
        lambda: ops.full((half,), complex(math.nan, math.nan), "complex64"),
    )
    if shape and shape[0] % 2 == 0:
        numbers = ops.reshape(numbers, (shape[0] // 2, *shape[1:]))
        return ops.concatenate([ops.real(numbers), ops.imag(numbers)], axis=0)
    numbers = ops.concatenate([ops.real(numbers), ops.imag(numbers)], axis=0)
    return ops.reshape(numbers[:entries], shape)


def _pairs(key, stream, count):
    """So many pairs of normal numbers, as the parts of complex ones: XLA computes one array at a
    time, and two would cost twice as much.
    """
    word = np.uint32
    place = ops.cast(ops.arange(count, dtype="int32"), "uint32")
    counter = (place + key[2], ops.zeros_like(place) + ops.bitwise_xor(key[3], stream))
    first, second = threefry((key[0], key[1]), counter)

    def number(bits, least, count):
        part = ops.bitwise_and(ops.right_shift(bits, word(least)), word(2**count - 1))
        return ops.cast(ops.cast(part, "int32"), "float32")  # signed numbers are cast faster

    low = number(first, 0, 8) + (number(second, 0, 8) + 0.5) * 2.0**-8
    u = number(first, 8, 24) * 2.0**-24 + low * 2.0**-32
    # `u` may round to 1, and the root must not be 0.
    radius = ops.sqrt(2.0**-25 - 2.0 * ops.log(u))
    # An odd multiple of π/2²⁴ between −π/4 and π/4, which two bits more turn by quarters: to the
    # opposite point, and across the diagonal.
    angle = (number(second, 10, 22) * 2.0 + (1.0 - 2.0**22)) * (math.pi * 2.0**-24)
    radius = radius * (1.0 - 2.0 * number(second, 9, 1))
    across = ops.not_equal(ops.bitwise_and(second, word(2**8)), word(0))
    square = angle * angle
    sine, cosine = angle * _polynomial(_SINE, square), _polynomial(_COSINE, square)
    pair = [ops.where(across, sine, cosine), ops.where(across, cosine, sine)]
    return ops.view_as_complex(ops.stack([radius * part for part in pair], axis=-1))


def _polynomial(coefficients, x):
    value = 0.0
    for coefficient in reversed(coefficients):
        value = value * x + coefficient
    return value


def draw_grouped(
    draw: Callable[[list[int], Tensor], list[Tensor]], shapes: Sequence[Sequence[int]]
) -> list[Tensor]:
    """What is drawn for tensors of these shapes: those of few entries by one call, the others by a
    call each.

    Args:
        draw: of the positions of some of them, and a stream that no other call has: the first of
            the positions.
        shapes: of all.

    Returns:
        What the calls gave, in the order of the shapes.

    >>> draw_grouped(lambda few, stream: [len(few)] * len(few), [(3, 16), (1024, 1024), (16,)])
    [2, 1, 2]
    """
    few = [i for i, shape in enumerate(shapes) if math.prod(shape) < _FEW]
    groups = [[i] for i in range(len(shapes)) if i not in few] + ([few] if few else [])
    drawn = {}
    for group in groups:
        drawn.update(zip(group, draw(group, np.uint32(group[0])), strict=True))
    return [drawn[i] for i in range(len(shapes))]


def standard_normals(key: Tensor, stream: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Tensors of `standard_normal` numbers that are parts of one draw, one after the other.

    >>> key = ops.convert_to_tensor(np.arange(4, dtype="uint32"))
    >>> [tuple(z.shape) for z in standard_normals(key, np.uint32(0), [(2, 3), ()])]
    [(2, 3), ()]
    """
    if len(shapes) == 1:
        return [standard_normal(key, stream, shapes[0])]
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    numbers = standard_normal(key, stream, (int(ends[-1]),))
    parts = zip(shapes, [0, *ends], ends, strict=False)
    return [ops.reshape(numbers[start:end], shape) for shape, start, end in parts]


def add_noise(
    totals: Sequence[Tensor], stds: Sequence[Tensor], key: Tensor, stream: Tensor
) -> list[Tensor]:
    """`total + std·z` of each, with `z` the `standard_normals` numbers of these shapes.

    >>> key = ops.convert_to_tensor(np.arange(4, dtype="uint32"))
    >>> [float(v) for v in add_noise([ops.ones((2,))], [0.0], key, np.uint32(0))[0]]
    [1.0, 1.0]
    """
    numbers = standard_normals(key, stream, [tuple(total.shape) for total in totals])
    return [total + std * z for total, std, z in zip(totals, stds, numbers, strict=True)]
