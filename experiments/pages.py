"""Pages of results: Markdown tables, and plots that only their content changes."""

import contextlib
import os
import pathlib
import statistics
from collections.abc import Iterator, Sequence

__all__ = ["NAMES", "errorbars", "markdown", "over_epsilon", "panels", "plot", "spread", "write"]

#: Data sets of images, as people call them.
NAMES = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST", "cifar10": "CIFAR-10"}


def spread(
    values: Sequence[float], digits: int = 1, scale: float = 100.0, between: str = "–"
) -> str:
    """Median, least and largest.

    >>> spread([0.5, 0.7, 0.625])
    '62.5 (50.0–70.0)'
    """
    numbers = (statistics.median(values), min(values), max(values))
    middle, low, high = (f"{scale * v:.{digits}f}" for v in numbers)
    return f"{middle} ({low}{between}{high})"


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]], left: int | None = None) -> str:
    """A table of Markdown.

    Args:
        head: the names of the columns.
        lines: as many cells each.
        left: columns that are aligned left, the rest being numbers; None says nothing of it.
    """
    rule = ["---" if left is None or i < left else "--:" for i in range(len(head))]
    rows = [f"| {' | '.join(row)} |" for row in lines]
    return "\n".join([f"| {' | '.join(head)} |", f"|{'|'.join(rule)}|", *rows])


def write(path: str | os.PathLike[str], title: str, text: str, caption: str, table: str) -> None:
    """Writes a page of results: what they are, the plot of the same name, and the table."""
    path = pathlib.Path(path)
    picture = f"![{caption}]({path.with_suffix('.svg').name})"
    parts = (f"# {title}", text, picture, table)
    path.with_suffix(".md").write_text("\n\n".join(parts) + "\n", "utf-8")


# --- plots ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def plot(path: str | os.PathLike[str], size: tuple[float, float], **settings) -> Iterator:
    """The axes of a plot that is written at the end, as an SVG that only its content changes.

    Args:
        path: of the SVG.
        size: in inches.
        settings: of matplotlib for SVG: `fonttype="none"` keeps text as text.
    """
    with _figure(path, 1, size, **settings) as axes:
        yield axes[0]


@contextlib.contextmanager
def panels(
    path: str | os.PathLike[str], count: int, size: tuple[float, float], columns: int, salt: str
) -> Iterator:
    """The axes of so many plots side by side, with one legend below them.

    Args:
        path: of the SVG.
        count: of plots.
        size: of each, in inches.
        columns: of the legend.
        salt: from which the names inside the SVG are made.
    """
    width, height = size
    with _figure(path, count, (width * count, height), fonttype="none", hashsalt=salt) as axes:
        yield axes
        labelled = {}
        for axis in axes:
            handles, labels = axis.get_legend_handles_labels()
            labelled |= dict(zip(labels, handles, strict=True))
        axes[0].figure.legend(
            labelled.values(),
            labelled.keys(),
            loc="outside lower center",
            fontsize=8,
            ncols=columns,
        )


@contextlib.contextmanager
def _figure(path, count, size, hashsalt="lipdp", **settings):
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, count, figsize=size, squeeze=False, layout="constrained")
    try:
        yield axes[0]
        settings = {f"svg.{name}": value for name, value in settings.items()}
        with matplotlib.rc_context({"svg.hashsalt": hashsalt, **settings}):
            figure.savefig(path, metadata={"Date": None}, format="svg")
    finally:
        pyplot.close(figure)


def errorbars(axis, points: Sequence[tuple[float, Sequence[float]]], **style) -> None:
    """Draws medians of several seeds, from least to largest.

    Args:
        axis: what is drawn on.
        points: place, and values there.
        style: as matplotlib takes it.
    """
    middle = [statistics.median(values) for _, values in points]
    ends = [
        [m - min(values) for m, (_, values) in zip(middle, points, strict=True)],
        [max(values) - m for m, (_, values) in zip(middle, points, strict=True)],
    ]
    axis.errorbar([place for place, _ in points], middle, yerr=ends, capsize=3, **style)


def over_epsilon(axis) -> None:
    """Makes the horizontal axis one of ε, from 0.5 to 8."""
    axis.set(xscale="log", xlabel="ε (δ = 1e-5)")
    axis.set_xticks([0.5, 1, 2, 3, 8], ["0.5", "1", "2", "3", "8"])
    axis.minorticks_off()
