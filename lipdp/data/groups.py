"""Groups of examples, such as those of one person, as what is drawn and protected."""

from typing import Any

import numpy as np

from accountants.validation import argument_message
from lipdp.data.sources import Stream
from lipdp.devices import digest

__all__ = ["Groups", "check_groups"]

# What NumPy, pandas and CSV files write where a text is missing.
_MISSING = ("", "nan", "NaN", "None", "<NA>", "NaT")


class Groups:
    """The examples of each group, and which of them enter a step in which their group is drawn.

    Of a drawn group with `c` examples `m = min(c, most)` enter, chosen afresh, uniformly, and each
    counts `1/m`. Whatever they are, a group then adds to a sum at most what one example can: the
    norm of a mean of vectors of norm at most `C` is at most `C` (triangle inequality).

    Args:
        ids: `(examples,)`, integers or texts: which group each example belongs to.
        examples: how many there must be.
        most: examples of a group that may enter one step.

    Raises:
        TypeError: `ids` are neither integers nor texts.
        ValueError: they are not one for each example, or some are missing: hidden by a mask, or a
            text such as `""` and `"nan"`.

    >>> groups = Groups(["ann", "bob", "ann", "ann"], examples=4, most=2)
    >>> len(groups)
    2
    >>> rows, shares = groups.rows(np.array([0, 1]), np.random.default_rng(0))
    >>> [int(row) in (0, 2, 3) for row in rows], shares.tolist()
    ([True, True, False], [0.5, 0.5, 1.0])
    """

    def __init__(self, ids: Any, examples: int, most: int) -> None:
        ids = _checked(ids, examples)
        _, group_of, self._counts = np.unique(ids, return_inverse=True, return_counts=True)
        # The examples group by group, and where each group begins.
        self._order = np.argsort(group_of, kind="stable")
        self._starts = np.cumsum(self._counts) - self._counts
        self.most = most

    def __len__(self) -> int:
        return len(self._counts)

    def rows(
        self, groups: np.ndarray, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """The examples that enter a step, and what each of them counts.

        Args:
            groups: those that were drawn, as distinct numbers from 0.
            generator: of this step alone.

        Returns:
            Distinct numbers of examples, group by group; and float32 shares, which add up to at
            most 1 for each group, and to 1 but for their rounding.
        """
        counts = self._counts[groups]
        chosen = _distinct(counts, self.most, generator)
        taken = np.arange(chosen.shape[1]) < np.minimum(counts, self.most)[:, None]
        rows = self._order[(self._starts[groups][:, None] + chosen)[taken]]
        entering = np.minimum(counts, self.most)
        # Rounded down: up to 1 / m, the nearest float32 may lie above, and m of them above 1.
        shares = (1.0 / entering).astype("float32")
        above = shares.astype("float64") * entering > 1.0
        shares = np.where(above, np.nextafter(shares, np.float32(0.0)), shares)
        return rows, np.repeat(shares, entering)

    def digest(self) -> str:
        """Of which examples belong together, for agreement of processes."""
        return digest(self._order, self._counts)


def check_groups(ids: Any, examples: Any, unit: str, most: int) -> Groups | None:
    """The groups of a source of examples; None where single examples are protected.

    Args:
        ids: `groups` of `fit`.
        examples: the source.
        unit: of the model.
        most: examples of a group that may enter one step.

    Raises:
        TypeError: as `Groups`.
        ValueError: as `Groups`; or the model protects something else, or the examples come in an
            order of their own.
    """
    if unit == "example":
        if ids is not None:
            raise ValueError(
                "`groups` are for a model that protects groups of examples, such as all those of a "
                'person: PrivateModel(..., unit="group"). This one protects single examples.'
            )
        return None
    if ids is None:
        raise ValueError(
            '`groups` must be given where unit="group": one id for each example, such as the id '
            "of the person that it is of."
        )
    if isinstance(examples, Stream):
        raise ValueError(
            "`groups` need examples of which any can be read, as arrays or records: the examples "
            "of one group lie all over a stream."
        )
    return Groups(ids, len(examples), most)


def _distinct(counts, most, generator):
    """For each count `c` distinct numbers below it, `min(c, most)` of them at the beginning of a
    row, all choices alike: Floyd's algorithm (Bentley and Floyd 1987), for all rows at once.
    """
    size = np.minimum(counts, most)
    columns = int(size.max(initial=0))
    chosen = np.full((len(counts), columns), -1)
    for column in range(columns):
        last = counts - size + column  # below it all were possible before
        active = column < size
        drawn = generator.integers(0, np.where(active, last, 0) + 1)
        again = (chosen[:, :column] == drawn[:, None]).any(axis=1)
        chosen[:, column] = np.where(active, np.where(again, last, drawn), -1)
    return chosen


def _checked(ids, examples):
    accepted = "one integer or text for each example, such as the ids of people"
    hidden = np.ma.getmaskarray(ids).any() if isinstance(ids, np.ma.MaskedArray) else False
    ids = np.asarray(ids.to_numpy() if hasattr(ids, "to_numpy") else ids)
    if ids.dtype.kind == "O" and all(isinstance(value, str) for value in ids.flat):
        ids = ids.astype(str)
    if ids.dtype.kind == "f" and np.isfinite(ids).all() and (ids == np.floor(ids)).all():
        ids = ids.astype("int64")
    if ids.dtype.kind not in "iuUS":
        raise TypeError(
            f"`groups` must be {accepted}, none of them missing; got dtype {ids.dtype}."
        )
    # As one group they would hold rows of people who have a group of their own, too.
    got = "a masked array that hides some" if hidden else None
    if ids.dtype.kind in "US":
        for text in np.array(_MISSING, ids.dtype.kind):
            got = f"the text {text.item()!r}" if (ids == text).any() else got
    if got is not None:
        raise ValueError(
            f"`groups` must be {accepted}, none of them missing; got {got}. Give each row without "
            "an id one of its own if no two are of one person, or leave these rows out."
        )
    if ids.shape != (examples,):
        raise ValueError(argument_message("groups", f"{accepted} ({examples})", ids.shape))
    return ids
