"""The table of docs/how_to_public_start.md: `python -m experiments.public_start`.

Runs the code of the page, five times for each cell: without the public training, with it on the
five digits as they are, and with it on turned ones, too; frozen up to each layer. The accuracies
are those on the private test images.
"""

import pathlib
import re

import numpy as np

from experiments import pages

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "how_to_public_start.md"
RUNS = 5
#: Layers of the page's network up to which it is frozen; None: nothing is.
FROZEN = (None, "edges", "parts", "features")


def codes():
    """The page's blocks of code: the data, the public start, the private finish."""
    return re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)


def variant(turns, frozen):
    """The blocks of code of one cell.

    Args:
        turns: in how many directions the public digits are learnt; 0: there is no public training.
        frozen: a name of `FROZEN`.
    """
    data, start, finish = codes()
    if turns == 0:
        start = _replaced(start, "epochs=10", "epochs=0")
    else:
        start = _replaced(start, "range(4)", f"range({turns})")
    if frozen is None:
        finish = _replaced(finish, "names.index(last_frozen) + 1", "0")
    else:
        finish = _replaced(finish, 'last_frozen = "features"', f'last_frozen = "{frozen}"')
    return data, start, finish


def accuracy(turns, frozen, seed):
    """The accuracy of one run, whose weights and public training have a seed."""
    import keras

    keras.utils.set_random_seed(seed)
    names = {}
    for code in variant(turns, frozen):
        exec(compile(code, PAGE.name, "exec"), names)
    return float(names["accuracy"])


def _replaced(code, old, new):
    if old not in code:
        raise ValueError(f"The page has no {old!r} where it was expected.")
    return code.replace(old, new)


def main():
    rows = []
    for frozen in FROZEN:
        row = ["nothing" if frozen is None else f"`{frozen}`"]
        for turns in (0, 1, 4):
            found = [100 * accuracy(turns, frozen, seed) for seed in range(RUNS)]
            row.append(f"{np.mean(found):.1f} ({min(found):.1f} to {max(found):.1f})")
        rows.append(row)
    head = ["frozen up to", "random start", "public start, 5 classes", "public start, 20 classes"]
    print(pages.markdown(head, rows, left=1))


if __name__ == "__main__":
    main()
