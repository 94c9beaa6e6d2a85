"""Tables and plots of the comparisons: `python -m experiments.curves [folder]`.

In the folder, by default `docs`: `clipping.md` and `clipping.svg` from `clipping/*.json` (made by
`experiments.dpsgd`) beside the private runs of the same networks and data in `results/*.json`
(made by `experiments.images`) and `robustness/*.json` (made by `experiments.robustness`);
`robustness.md` and `robustness.svg` from the latter.
"""

import json
import math
import pathlib
import statistics

from absl import app

__all__ = ["clipping", "robustness"]

_NAMES = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST", "cifar10": "CIFAR-10"}

#: Certified accuracy on CIFAR-10 at ε = 8 in per cent, Béthune et al., ICLR 2024, by radius in
#: 255ths.
PUBLISHED = {1: 35.2, 2: 32.1, 4: 28.0, 8: 24.0, 16: 18.1}


def read(folder: pathlib.Path) -> list[dict]:
    """The results of a folder's files on test sets.

    Raises:
        ValueError: a file is no JSON, or was not evaluated on a test set.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            found.append(json.loads(path.read_text()))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path.name} is no JSON: {error}.") from error
        if found[-1]["evaluated_on"] != "test set":
            raise ValueError(f"{path.name} was evaluated on {found[-1]['evaluated_on']}.")
    return found


def _spread(values, digits=2):
    values = sorted(100 * v for v in values)
    middle = statistics.median(values)
    if len(values) == 1:
        return f"{middle:.{digits}f}"
    return f"{middle:.{digits}f} ({values[0]:.{digits}f} to {values[-1]:.{digits}f})"


# --- with and without clipping --------------------------------------------------------------------


def clipping(folder: pathlib.Path) -> None:
    """Accuracy over ε of DP-SGD and of this library on the same network and data."""
    groups = {}
    for part in ("clipping", "robustness", "results"):
        method = "clipping" if part == "clipping" else "lipdp"
        for result in read(folder / part):
            if result["epsilon"] is None:
                continue
            key = (result["data"]["name"], result["network"])
            runs = groups.setdefault(key, {}).setdefault(method, {})
            # Runs of one kind, which have the same settings. Those of robustness are as long as
            # those with clipping; the third kind fills what they lack.
            source, found = runs.setdefault(result["epsilon"], (part, []))
            if source == part:
                found.append(result)
    groups = {
        key: {m: {e: runs for e, (_, runs) in by.items()} for m, by in of.items()}
        for key, of in groups.items()
    }
    groups = {key: of for key, of in sorted(groups.items()) if "clipping" in of}
    lines = [
        "| data | network | ε | DP-SGD, clipping | lipdp | seeds | DP-SGD's command |",
        "|---|---|---|---|---|---|---|",
    ]
    for (name, network), of in groups.items():
        for epsilon, runs in sorted(of["clipping"].items()):
            ours = of.get("lipdp", {}).get(epsilon, [])
            lines.append(
                f"| {_NAMES.get(name, name)} | {network} | {epsilon:g} "
                f"| {_spread([r['accuracy'] for r in runs])} "
                f"| {_spread([r['accuracy'] for r in ours]) if ours else '–'} "
                f"| {len(runs)} / {len(ours)} | `{runs[0]['command']}` |"
            )
    _page(folder / "clipping.md", _CLIPPING, lines)

    figure, axes, pyplot = _axes(len(groups))
    for axis, ((name, network), of) in zip(axes, groups.items(), strict=True):
        for method, label, colour in (
            ("clipping", "DP-SGD, per-example clipping", "C1"),
            ("lipdp", "lipdp", "C0"),
        ):
            points = sorted(of.get(method, {}).items())
            shares = [[100 * r["accuracy"] for r in runs] for _, runs in points]
            if not points:
                continue
            middle = [statistics.median(s) for s in shares]
            spread = [
                [m - min(s) for m, s in zip(middle, shares, strict=True)],
                [max(s) - m for m, s in zip(middle, shares, strict=True)],
            ]
            axis.errorbar(
                [e for e, _ in points], middle, yerr=spread, marker="o", capsize=3, label=label,
                color=colour,
            )  # fmt: skip
        axis.set(xscale="log", xlabel="ε (δ = 1e-5)", title=f"{_NAMES.get(name, name)}, {network}")
        axis.set_xticks([0.5, 1, 2, 3, 8], ["0.5", "1", "2", "3", "8"])
        axis.minorticks_off()
    axes[0].set_ylabel("test accuracy, %")
    _save(figure, axes, folder / "clipping.svg", pyplot)


# --- certified accuracy ---------------------------------------------------------------------------


def robustness(folder: pathlib.Path) -> None:
    """Certified accuracy, and accuracy under attack, over the radius."""
    groups = {}
    for result in read(folder / "robustness"):
        key = (result["data"]["name"], result["network"], result["epsilon"] or math.inf)
        groups.setdefault(key, []).append(result)
    groups = dict(sorted(groups.items(), key=lambda g: (g[0][0] != "mnist", g[0])))
    radii = next(iter(groups.values()))[0]["radii_in_255ths"]
    shown = [r for r in radii if r <= 144]
    lines = [
        "| data | network | ε | seeds | " + " | ".join(f"{r}/255" for r in shown) + " |",
        "|---|---|---|---|" + "---|" * len(shown),
    ]
    for (name, network, epsilon), runs in groups.items():
        kinds = ("certified_accuracy", "certified_accuracy_of_attacked", "accuracy_under_attack")
        cells = []
        for place in range(len(shown)):
            whole, part, left = (
                statistics.median(100 * r[kind][place] for r in runs) for kind in kinds
            )
            cells.append(f"{whole:.1f} ({part:.1f}, {left:.1f})")
        label = "none" if math.isinf(epsilon) else f"{epsilon:g}"
        lines.append(
            f"| {_NAMES.get(name, name)} | {network} | {label} | {len(runs)} | "
            + " | ".join(cells)
            + " |"
        )
    published = " | ".join(f"{PUBLISHED[r]}" if r in PUBLISHED else "–" for r in shown)
    lines.append(f"| CIFAR-10 | published, clipless | 8 | | {published} |")
    lines += ["", "Commands of the first seeds:", ""]
    lines += [f"- `{runs[0]['command']}`" for runs in groups.values()]
    broken = sum(r["certified_images_broken"] for runs in groups.values() for r in runs)
    attacked = sum(r["attacked_images"] * len(radii) for runs in groups.values() for r in runs)
    lines += ["", f"In {attacked:,} attacks {broken} certificates were broken."]
    _page(folder / "robustness.md", _ROBUSTNESS, lines)

    names = list(dict.fromkeys(key[0] for key in groups))
    epsilons = sorted({key[2] for key in groups})
    ticks = [r for r in radii if r not in (144, 510)]  # which leave no room for their numbers
    figure, axes, pyplot = _axes(len(names))
    for axis, name in zip(axes, names, strict=True):
        for (data, _, epsilon), runs in groups.items():
            if data != name:
                continue
            colour = f"C{epsilons.index(epsilon)}"
            label = "without noise" if math.isinf(epsilon) else f"ε = {epsilon:g}"
            certified = [
                _median(v) for v in zip(*(r["certified_accuracy"] for r in runs), strict=True)
            ]
            gaps = [_median(v) for v in zip(*map(_gap, runs), strict=True)]
            left = [c + g for c, g in zip(certified, gaps, strict=True)]
            axis.plot(radii, certified, ".-", color=colour, label=f"{label}, certified")
            axis.plot(radii, left, ":", color=colour, label=f"{label}, not broken by an attack")
        if name == "cifar10":
            axis.plot(
                list(PUBLISHED), list(PUBLISHED.values()), "x", color="0.35",
                label="certified at ε = 8, Béthune et al., ICLR 2024",
            )  # fmt: skip
        axis.set_xscale("symlog", linthresh=1.0)
        axis.set(xlabel="radius in 255ths", title=_NAMES.get(name, name), ylim=(0, 100))
        axis.set_xticks(ticks, list(map(str, ticks)))
        axis.minorticks_off()
    axes[0].set_ylabel("test accuracy, %")
    _save(figure, axes, folder / "robustness.svg", pyplot)


def _median(shares):
    return statistics.median(100 * share for share in shares)


def _gap(result):
    """What lies between certificate and attack, on the images that were attacked."""
    both = result["accuracy_under_attack"], result["certified_accuracy_of_attacked"]
    return [left - proven for left, proven in zip(*both, strict=True)]


# --- pages ----------------------------------------------------------------------------------------

_CLIPPING = """# Beside DP-SGD with clipping

Made by `python -m experiments.curves` from the files in `clipping/`, `results/` and `robustness/`,
each of which says with which command, commit, data and versions it was made. Both methods draw
Poisson batches, are accounted by PLD at δ = 1e-5, and read the same images; median over seeds,
least and largest in brackets. DP-SGD (`experiments.dpsgd`) clips the gradient of each example over
all weights together and trains ordinary layers with biases and ReLU, lipdp their Lipschitz
counterparts. The settings of each were chosen on 5,000 held-out training examples, which no ε here
counts; where lipdp has runs of two kinds, those are shown that are as long as the ones with
clipping.

A linear layer without bias on features of norm one has per-example gradients whose norm *is* that
of the loss gradient: there the two methods are the same mechanism, and differ by luck and by
settings alone.

![accuracy over ε](clipping.svg)

"""

_ROBUSTNESS = """# Certified robustness

Made by `python -m experiments.curves` from the files in `robustness/`. Each cell is the share of
test images, in per cent, that are provably classified rightly wherever they move within the radius;
in brackets the same for the first images alone, and how many of those an attack (projected
gradient ascent, 12 steps) leaves right. Medians over seeds. Radii are Euclidean, over all pixels
and channels of an image with values from 0 to 1. Networks read the pixels themselves, so that no
scale comes between; the attack, like the certificate, may leave the range of pixels. "none" is the
same network, its projections included, trained without noise and clip. Dotted in the plot: the
certified share of all images, and above it the gap to the attack on the attacked ones.

The published figures are for their authors' own networks and accounting. What makes the difference
is the projection of the input: most images lie far outside of the ball, where it shrinks distances
(`lipdp.robustness.certified_radii` has the proof). Settings were chosen by accuracy on held-out
training images of MNIST at ε = 3, and taken over to CIFAR-10.

![certified accuracy over the radius](robustness.svg)

"""


def _page(path, head, lines):
    path.write_text(head + "\n".join(lines) + "\n")


def _axes(count):
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, count, figsize=(4.6 * count, 4.4), squeeze=False, layout="constrained"
    )
    for axis in axes[0]:
        axis.grid(alpha=0.3)
    return figure, axes[0], pyplot


def _save(figure, axes, path, pyplot):
    import matplotlib

    labelled = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        labelled |= dict(zip(labels, handles, strict=True))
    figure.legend(
        labelled.values(), labelled.keys(), loc="outside lower center", fontsize=8, ncols=2
    )
    # Text stays text, and the same results give the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "curves"}):
        figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main(argv):
    if len(argv) > 2:
        raise app.UsageError(f"Unknown arguments: {' '.join(argv[2:])}")
    folder = pathlib.Path(argv[1] if len(argv) == 2 else "docs")
    try:
        for make in (clipping, robustness):
            if any((folder / make.__name__).glob("*.json")):
                make(folder)
                print(f"{folder / make.__name__}.md and .svg")
    except ValueError as error:
        raise app.UsageError(str(error)) from error


if __name__ == "__main__":
    app.run(main)
