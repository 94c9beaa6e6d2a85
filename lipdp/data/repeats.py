"""Whether the rows of arrays repeat, as where one person has many."""

from collections.abc import Sequence

import numpy as np

__all__ = ["repeats"]

# So many words of a row name it; rows of the same name are compared as they are.
_WORDS = 1024


def repeats(arrays: Sequence[np.ndarray], times: int) -> bool:
    """Whether some row, over all the arrays together, occurs so many times or more.

    What it finds is a fact about the data: it may be shown to who holds them, and to nobody else.

    Args:
        arrays: one or several, each with a row for each example.
        times: at least 2.

    >>> x = np.arange(12.0).reshape(6, 2)
    >>> repeats([x, np.zeros(6)], 2), repeats([x[[0, 1, 1]], np.zeros(3)], 2)
    (False, True)
    """
    names = sum(_names(array) for array in arrays)
    ordered = np.sort(names)
    for name in np.unique(ordered[times - 1 :][ordered[times - 1 :] == ordered[: 1 - times]]):
        rows = np.flatnonzero(names == name)
        alike = np.ones(len(rows), bool)
        for array in arrays:
            same = array[rows] == array[rows[:1]]
            alike &= same.reshape(len(rows), -1).all(axis=1)
        if alike.sum() >= times:
            return True
    return False


def _names(array):
    """A number for each row, the same for the same bytes: multilinear hashing."""
    count = len(array)
    width = array[:1].nbytes
    names = np.zeros(count, np.uint64)
    stride = max(1, width // 4 // _WORDS)
    factors = np.random.default_rng(0).integers(2**64, size=-(-width // 4), dtype=np.uint64)
    rows = max(1, 2**22 // max(1, width))
    for start in range(0, count, rows):
        part = np.ascontiguousarray(array[start : start + rows])
        words = part.reshape(len(part), -1).view(np.uint8)
        if width % 4:
            words = np.pad(words, ((0, 0), (0, -width % 4)))
        words = words.view(np.uint32)[:, ::stride]
        names[start : start + rows] = words.astype(np.uint64) @ factors[: words.shape[1]]
    return names
