"""The table and the plot of the runs on images: `python -m experiments.results [folder]`.

Reads the folder's `*.json` (by default `docs/results`), each made by `python -m
experiments.images --out=...` on a test set, and writes `docs/results.md` and
`docs/results.svg` beside it, as `FOLDER.md` and `FOLDER.svg`. The page ends with the folder's
`notes.md`, if there is one.
"""

import json
import pathlib
import statistics

from absl import app

from experiments import record

__all__ = ["collect", "markdown", "plot"]

_KEYS = ("data", "network", "epsilon", "delta", "seed", "evaluated_on", "accuracy", "command")
_NAMES = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST", "cifar10": "CIFAR-10"}

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


def collect(folder: pathlib.Path) -> dict:
    """The runs of a folder's files: `{(data, network, epsilon, delta): [result, ...]}`, sorted.

    Raises:
        ValueError: there is no result, a file is none, two are of one seed, runs of one group have
            other settings, or one was evaluated on anything but the test set.
    """
    groups = {}
    for path in sorted(folder.glob("*.json")):
        try:
            result = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path.name} is no JSON: {error}.") from error
        if missing := [k for k in _KEYS if not isinstance(result, dict) or k not in result]:
            raise ValueError(f"{path.name} lacks {', '.join(missing)}.")
        if result["evaluated_on"] != "test set":
            raise ValueError(f"{path.name} was evaluated on {result['evaluated_on']}.")
        key = (result["data"]["name"], result["network"], result["epsilon"], result["delta"])
        for other in groups.setdefault(key, []):
            if other["seed"] == result["seed"]:
                raise ValueError(f"{path.name} repeats seed {result['seed']} of {key}.")
            if other["settings"] != result["settings"]:
                raise ValueError(f"{path.name} has other settings than the rest of {key}.")
        groups[key].append(result)
    if not groups:
        raise ValueError(f"{folder} holds no results.")
    order = list(_NAMES)
    return dict(
        sorted(groups.items(), key=lambda g: (*_place(order, g[0][0]), g[0][1:])),
    )


def markdown(groups: dict) -> str:
    """A table with a row for each group: median and spread of the accuracy over seeds."""
    columns = ["data", "network", "ε", "test accuracy, median (least to most)", "seeds"]
    columns += ["published: clipless / clipping", "training, s", "command"]
    lines = []
    for (name, network, epsilon, _), results in groups.items():
        accuracies = sorted(100 * r["accuracy"] for r in results)
        published = " / ".join(
            f"{table[name][epsilon]}" if epsilon in table.get(name, {}) else "–"
            for table in PUBLISHED.values()
        )
        seconds = statistics.median(r["training_seconds"] for r in results)
        command = min(results, key=lambda r: str(r["seed"]))["command"]
        middle, least, most = statistics.median(accuracies), accuracies[0], accuracies[-1]
        spread = f"{middle:.2f} ({least:.2f} to {most:.2f})"
        about = [_NAMES.get(name, name), network, f"{epsilon:g}", spread, str(len(results))]
        lines.append([*about, published, f"{seconds:.0f}", f"`{command}`"])
    return record.markdown(columns, lines) + "\n"


def plot(groups: dict, path: pathlib.Path) -> None:
    """Test error over ε for each data set, beside the published figures; accuracy grows upwards."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot, ticker

    names = list(dict.fromkeys(key[0] for key in groups))
    networks = sorted({key[1] for key in groups})
    figure, axes = pyplot.subplots(
        1, len(names), figsize=(4.2 * len(names), 5.4), squeeze=False, layout="constrained"
    )
    for axis, name in zip(axes[0], names, strict=True):
        for index, network in enumerate(networks):
            rows = [(k[2], [100 - 100 * r["accuracy"] for r in g]) for k, g in groups.items()
                    if k[:2] == (name, network)]  # fmt: skip
            if not rows:
                continue
            middle = [statistics.median(errors) for _, errors in rows]
            spread = [
                [m - min(errors) for m, (_, errors) in zip(middle, rows, strict=True)],
                [max(errors) - m for m, (_, errors) in zip(middle, rows, strict=True)],
            ]
            axis.errorbar(
                [e for e, _ in rows], middle, yerr=spread, marker="o", capsize=3,
                color=pyplot.get_cmap("tab20")(index), label=network,
            )  # fmt: skip
        for (source, table), marker in zip(PUBLISHED.items(), "x+", strict=True):
            if points := table.get(name):
                errors = [100 - accuracy for accuracy in points.values()]
                axis.plot(list(points), errors, marker, color="0.35", ms=8, label=source)
        axis.set(xscale="log", xlabel="ε (δ = 1e-5)", title=_NAMES.get(name, name))
        axis.set_xticks([0.5, 1, 2, 3, 8], ["0.5", "1", "2", "3", "8"])
        axis.minorticks_off()
        # Networks differ by half a point at the top, and by twenty at the bottom.
        axis.set_yscale("log", subs=[2, 3, 5, 7])
        for which in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            which(ticker.FormatStrFormatter("%g"))
        axis.invert_yaxis()
        axis.grid(alpha=0.3, which="both")
    axes[0][0].set_ylabel("test error, %: median and spread of seeds")
    labelled = {}
    for axis in axes[0]:
        handles, labels = axis.get_legend_handles_labels()
        labelled |= dict(zip(labels, handles, strict=True))
    figure.legend(
        labelled.values(), labelled.keys(), loc="outside lower center", fontsize=8, ncols=4
    )
    # Text stays text, and the same results give the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "results"}):
        figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _place(order, name):
    return (order.index(name), "") if name in order else (len(order), name)


_HEAD = """# Results on images

Made by `python -m experiments.results` from the files in `{folder}`, each of which says with which
commit, data, settings and versions it was made. Every ε is that of the Poisson sampling that was
really drawn, by the PLD accountant, at δ = 1e-5 unless the command says otherwise; published
figures are those of the plot's legend, and hold for their own accounting. Settings were chosen on
held-out training examples (`experiments/settings.py`), and each choice was run on the test set once
per seed. Choosing costs privacy too, which no ε here counts.

![test error over ε]({plot})

"""


def main(argv):
    if len(argv) > 2:
        raise app.UsageError(f"Unknown arguments: {' '.join(argv[2:])}")
    folder = pathlib.Path(argv[1] if len(argv) == 2 else "docs/results")
    if not folder.is_dir():
        raise app.UsageError(f"{folder} is no folder.")
    try:
        groups = collect(folder)
    except ValueError as error:
        raise app.UsageError(str(error)) from error
    page, picture = folder.with_suffix(".md"), folder.with_suffix(".svg")
    notes = folder / "notes.md"
    head = _HEAD.format(folder=f"{folder.name}/", plot=picture.name)
    text = head + markdown(groups)
    page.write_text(text + (f"\n{notes.read_text()}" if notes.exists() else ""))
    plot(groups, picture)
    print(f"{page} and {picture}: {sum(map(len, groups.values()))} runs.")


if __name__ == "__main__":
    app.run(main)
