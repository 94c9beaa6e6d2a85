"""Tables and plots of the comparisons: `python -m experiments.curves [folder]`.

In the folder, by default `docs`: `clipping.md` and `clipping.svg` from `results/clipping.jsonl`
(made by `experiments.dpsgd`) beside the private runs of the same networks and data in
`results/images.jsonl` (made by `experiments.images`) and `results/robustness.jsonl` (made by
`experiments.robustness`); `robustness.md` and `robustness.svg` from the latter.
"""

import math
import pathlib
import statistics

from experiments import frame, pages, record

__all__ = ["clipping", "robustness"]

#: Certified accuracy on CIFAR-10 at ε = 8 in per cent, Béthune et al., ICLR 2024, by radius in
#: 255ths.
PUBLISHED = {1: 35.2, 2: 32.1, 4: 28.0, 8: 24.0, 16: 18.1}


def read(path: pathlib.Path) -> list[dict]:
    """The results of a file on test sets; none where there is no such file.

    Raises:
        ValueError: a line is no result, or was not evaluated on a test set.
    """
    found = record.read(path) if path.exists() else []
    for number, result in enumerate(found, 1):
        if result["evaluated_on"] != "test set":
            raise ValueError(
                f"Line {number} of {path.name} was evaluated on {result['evaluated_on']}."
            )
    return found


def _spread(shares):
    if len(shares) == 1:
        return f"{100 * shares[0]:.2f}"
    return pages.spread(shares, 2, between=" to ")


# --- with and without clipping --------------------------------------------------------------------


def clipping(folder: pathlib.Path) -> None:
    """Accuracy over ε of DP-SGD and of this library on the same network and data."""
    groups = {}
    for part in ("clipping", "robustness", "images"):
        method = "clipping" if part == "clipping" else "lipdp"
        for result in read(folder / "results" / f"{part}.jsonl"):
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
    head = ["data", "network", "ε", "DP-SGD, clipping", "lipdp", "seeds", "DP-SGD's command"]
    rows = []
    for (name, network), of in groups.items():
        for epsilon, runs in sorted(of["clipping"].items()):
            ours = of.get("lipdp", {}).get(epsilon, [])
            rows.append(
                [
                    pages.NAMES.get(name, name),
                    network,
                    f"{epsilon:g}",
                    _spread([r["accuracy"] for r in runs]),
                    _spread([r["accuracy"] for r in ours]) if ours else "–",
                    f"{len(runs)} / {len(ours)}",
                    f"`{runs[0]['command']}`",
                ]
            )
    _page(folder / "clipping.md", _CLIPPING, [pages.markdown(head, rows)])

    panels = pages.panels(folder / "clipping.svg", len(groups), _SIZE, columns=2, salt="curves")
    with panels as axes:
        for axis, ((name, network), of) in zip(axes, groups.items(), strict=True):
            axis.grid(alpha=0.3)
            for method, label, colour in (
                ("clipping", "DP-SGD, per-example clipping", "C1"),
                ("lipdp", "lipdp", "C0"),
            ):
                points = [
                    (epsilon, [100 * r["accuracy"] for r in runs])
                    for epsilon, runs in sorted(of.get(method, {}).items())
                ]
                if points:
                    pages.errorbars(axis, points, marker="o", label=label, color=colour)
            axis.set_title(f"{pages.NAMES.get(name, name)}, {network}")
            pages.over_epsilon(axis)
        axes[0].set_ylabel("test accuracy, %")


# --- certified accuracy ---------------------------------------------------------------------------


def robustness(folder: pathlib.Path) -> None:
    """Certified accuracy, and accuracy under attack, over the radius."""
    groups = {}
    for result in read(folder / "results" / "robustness.jsonl"):
        key = (result["data"]["name"], result["network"], result["epsilon"] or math.inf)
        groups.setdefault(key, []).append(result)
    groups = dict(sorted(groups.items(), key=lambda g: (g[0][0] != "mnist", g[0])))
    radii = next(iter(groups.values()))[0]["radii_in_255ths"]
    shown = [r for r in radii if r <= 144]
    head = ["data", "network", "ε", "seeds", *(f"{r}/255" for r in shown)]
    rows = []
    for (name, network, epsilon), runs in groups.items():
        kinds = ("certified_accuracy", "certified_accuracy_of_attacked", "accuracy_under_attack")
        cells = []
        for place in range(len(shown)):
            whole, part, left = (
                statistics.median(100 * r[kind][place] for r in runs) for kind in kinds
            )
            cells.append(f"{whole:.1f} ({part:.1f}, {left:.1f})")
        label = "none" if math.isinf(epsilon) else f"{epsilon:g}"
        rows.append([pages.NAMES.get(name, name), network, label, str(len(runs)), *cells])
    published = [f"{PUBLISHED[r]}" if r in PUBLISHED else "–" for r in shown]
    rows.append(["CIFAR-10", "published, clipless", "8", "", *published])
    lines = [pages.markdown(head, rows), "", "Commands of the first seeds:", ""]
    lines += [f"- `{runs[0]['command']}`" for runs in groups.values()]
    broken = sum(r["certified_images_broken"] for runs in groups.values() for r in runs)
    attacked = sum(r["attacked_images"] * len(radii) for runs in groups.values() for r in runs)
    lines += ["", f"In {attacked:,} attacks {broken} certificates were broken."]
    _page(folder / "robustness.md", _ROBUSTNESS, lines)

    names = list(dict.fromkeys(key[0] for key in groups))
    epsilons = sorted({key[2] for key in groups})
    ticks = [r for r in radii if r not in (144, 510)]  # which leave no room for their numbers
    panels = pages.panels(folder / "robustness.svg", len(names), _SIZE, columns=2, salt="curves")
    with panels as axes:
        for axis, name in zip(axes, names, strict=True):
            axis.grid(alpha=0.3)
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
                label = "certified at ε = 8, Béthune et al., ICLR 2024"
                axis.plot(list(PUBLISHED), list(PUBLISHED.values()), "x", color="0.35", label=label)
            axis.set_xscale("symlog", linthresh=1.0)
            axis.set(xlabel="radius in 255ths", title=pages.NAMES.get(name, name), ylim=(0, 100))
            axis.set_xticks(ticks, list(map(str, ticks)))
            axis.minorticks_off()
        axes[0].set_ylabel("test accuracy, %")


def _median(shares):
    return statistics.median(100 * share for share in shares)


def _gap(result):
    """The gap between certificate and attack, on the images that were attacked."""
    both = result["accuracy_under_attack"], result["certified_accuracy_of_attacked"]
    return [left - proven for left, proven in zip(*both, strict=True)]


_SIZE = (4.6, 4.4)  # of a plot, in inches


# --- pages ----------------------------------------------------------------------------------------

_CLIPPING = """# Beside DP-SGD with clipping

Made by `python -m experiments.curves` from `clipping.jsonl`, `images.jsonl` and `robustness.jsonl`
in `results/`, each line of which says with which command, commit, data and versions it was made.
Both methods draw Poisson batches, are accounted by PLD at δ = 1e-5, and read the same images;
median over seeds, least and largest in brackets. DP-SGD (`experiments.dpsgd`) clips the gradient of
each example over all weights together and trains ordinary layers with biases and ReLU, lipdp their
Lipschitz counterparts. The settings of each were chosen on 5,000 held-out training examples, which
no ε here counts; where lipdp has runs of two kinds, those are shown that are as long as the ones
with clipping.

A linear layer without bias on features of norm one has per-example gradients whose norm *is* that
of the loss gradient: there the two methods are the same mechanism, and differ by luck and by
settings alone.

![accuracy over ε](clipping.svg)

"""

_ROBUSTNESS = """# Certified robustness

Made by `python -m experiments.curves` from `results/robustness.jsonl`. Each cell is the share of
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


def main(values, folder="docs"):
    folder = pathlib.Path(folder)
    with frame.explained():
        for make in (clipping, robustness):
            if (folder / "results" / f"{make.__name__}.jsonl").exists():
                make(folder)
                print(f"{folder / make.__name__}.md and .svg")


if __name__ == "__main__":
    frame.start(main, positional=1)
