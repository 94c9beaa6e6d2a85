"""The table and the plot of the runs on images: `python -m experiments.results [folder]`.

Reads the folder's `images.jsonl` (by default in `docs/results`), each line of which `python -m
experiments.images --out=images.jsonl` made on a test set, and writes `docs/results.md` and
`docs/results.svg` beside the folder, as `FOLDER.md` and `FOLDER.svg`. The page ends with the
folder's `notes.md`, if there is one.
"""

import pathlib
import statistics

from experiments import frame, pages, record

__all__ = ["collect", "markdown", "plot"]

_KEYS = ("data", "network", "epsilon", "delta", "seed", "evaluated_on", "accuracy", "command")

# Test accuracy in per cent at δ = 1e-5, trained from scratch without other data, by ε.
_CLIPLESS = "clipless, Béthune et al., ICLR 2024"
_CLIPPING = "best published with clipping of each example's gradient"
PUBLISHED = {
    _CLIPLESS: {
        "mnist": {1: 95.0, 2: 96.5},
        "fashion_mnist": {1: 75.0, 2: 77.0},
        "cifar10": {1: 32.3, 3: 39.1, 8: 43.6},
    },
    _CLIPPING: {
        "mnist": {1: 97.9, 2: 98.7, 3: 98.9},
        "fashion_mnist": {1: 88.4, 2: 89.3, 3: 89.7},
        "cifar10": {1: 64.4, 3: 70.8, 8: 81.4},
    },
}


def collect(path: pathlib.Path) -> dict:
    """The runs of a file: `{(data, network, epsilon, delta): [result, ...]}`, sorted.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: there is no result, a line is none, two are of one seed, runs of one group have
            other settings, or one was evaluated on anything but the test set.
    """
    groups = {}
    for number, result in enumerate(record.read(path), 1):
        line = f"Line {number} of {path.name}"
        if missing := [k for k in _KEYS if k not in result]:
            raise ValueError(f"{line} lacks {', '.join(missing)}.")
        if result["evaluated_on"] != "test set":
            raise ValueError(f"{line} was evaluated on {result['evaluated_on']}.")
        key = (result["data"]["name"], result["network"], result["epsilon"], result["delta"])
        for other in groups.setdefault(key, []):
            if other["seed"] == result["seed"]:
                raise ValueError(f"{line} repeats seed {result['seed']} of {key}.")
            if other["settings"] != result["settings"]:
                raise ValueError(f"{line} has other settings than the rest of {key}.")
        groups[key].append(result)
    order = list(pages.NAMES)
    return dict(
        sorted(groups.items(), key=lambda g: (*_place(order, g[0][0]), g[0][1:])),
    )


def markdown(groups: dict) -> str:
    """A table with a row for each group: median and spread of the accuracy over seeds."""
    columns = ["data", "network", "ε", "test accuracy, median (least to most)", "seeds"]
    columns += ["published: clipless / clipping", "training, s", "command"]
    lines = []
    for (name, network, epsilon, _), results in groups.items():
        published = " / ".join(
            f"{table[name][epsilon]}" if epsilon in table.get(name, {}) else "–"
            for table in PUBLISHED.values()
        )
        seconds = statistics.median(r["training_seconds"] for r in results)
        command = min(results, key=lambda r: str(r["seed"]))["command"]
        spread = pages.spread([r["accuracy"] for r in results], 2, between=" to ")
        about = [pages.NAMES.get(name, name), network, f"{epsilon:g}", spread, str(len(results))]
        lines.append([*about, published, f"{seconds:.0f}", f"`{command}`"])
    return pages.markdown(columns, lines) + "\n"


def plot(groups: dict, path: pathlib.Path) -> None:
    """Test error over ε for each data set, beside the published figures; accuracy grows upwards."""
    import matplotlib
    from matplotlib import ticker

    names = list(dict.fromkeys(key[0] for key in groups))
    networks = sorted({key[1] for key in groups})
    with pages.panels(path, len(names), (4.2, 5.4), columns=4, salt="results") as axes:
        for axis, name in zip(axes, names, strict=True):
            for index, network in enumerate(networks):
                points = [
                    (key[2], [100 - 100 * r["accuracy"] for r in runs])
                    for key, runs in groups.items()
                    if key[:2] == (name, network)
                ]
                if points:
                    colour = matplotlib.colormaps["tab20"](index)
                    pages.errorbars(axis, points, marker="o", color=colour, label=network)
            for (source, table), marker in zip(PUBLISHED.items(), "x+", strict=True):
                if published := table.get(name):
                    errors = [100 - accuracy for accuracy in published.values()]
                    axis.plot(list(published), errors, marker, color="0.35", ms=8, label=source)
            axis.set_title(pages.NAMES.get(name, name))
            pages.over_epsilon(axis)
            # Networks differ by half a point at the top, and by twenty at the bottom.
            axis.set_yscale("log", subs=[2, 3, 5, 7])
            for which in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
                which(ticker.FormatStrFormatter("%g"))
            axis.invert_yaxis()
            axis.grid(alpha=0.3, which="both")
        axes[0].set_ylabel("test error, %: median and spread of seeds")


def _place(order, name):
    return (order.index(name), "") if name in order else (len(order), name)


_HEAD = """# Results on images

Made by `python -m experiments.results` from `{file}`, each line of which says with
which commit, data, settings and versions it was made. Every ε is that of the Poisson sampling that
was really drawn, by the PLD accountant, at δ = 1e-5 unless the command says otherwise; published
figures are those of the plot's legend, and hold for their own accounting. Settings were chosen on
held-out training examples (`experiments/settings.py`), and each choice was run on the test set once
per seed. Choosing costs privacy too, which no ε here counts.

![test error over ε]({plot})

"""


def main(values, folder="docs/results"):
    folder = pathlib.Path(folder)
    with frame.explained():
        groups = collect(folder / "images.jsonl")
    page, picture = folder.with_suffix(".md"), folder.with_suffix(".svg")
    notes = folder / "notes.md"
    head = _HEAD.format(file=f"{folder.name}/images.jsonl", plot=picture.name)
    text = head + markdown(groups)
    page.write_text(text + (f"\n{notes.read_text()}" if notes.exists() else ""))
    plot(groups, picture)
    print(f"{page} and {picture}: {sum(map(len, groups.values()))} runs.")


if __name__ == "__main__":
    frame.start(main, positional=1)
