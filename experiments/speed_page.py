"""The page and the plot of `experiments.speed`, made from its JSON."""

import textwrap

from experiments import pages
from experiments.baselines import worker

NETWORKS = tuple(worker.SHAPES)

_TITLES = {
    "convnet": "ConvNet: two convolutions, dense layers of 1,024 and 10, on 28×28×1",
    "vgg5": "VGG5: three convolutions (32, 64, 128), dense layers of 256 and 10, on 32×32×3",
    "mlp": "MLP: three dense layers of 1,024 and one of 10, on 28×28×1",
    "mixer": "Mixer: patches of 4, two blocks of 64 features, on 32×32×3",
    "scattering": "Scattering head: a dense layer of 10 on 2,187 features",
}

_HEAD = """# Speed

Made by `python -m experiments.speed --against=all` from `{json}`, which says of each figure with
which versions and on which day it was measured; all on {device}, each process on {threads}.

- A private step beside the plain step of the same network and framework: random rows, optimizer
  (SGD with momentum) and noise included, and of lipdp the Poisson draw, the projections and their
  certificates. What trains in Keras is timed in `fit`, with the accuracy as a metric; what does not
  in the shortest loop, without one.
- Each kind of step has a process of its own; private and plain ones take turns, step by step. CPU
  time of all threads, medians of {least} to {steps} steps, after 2 to {warmup} that are not timed
  (of lipdp on JAX 2 to {shapes_warmup}); a median says nothing about compilation, which the first
  steps pay, on JAX for each new shape of a batch.
- The baselines have the fastest layers they offer, ReLU and maximum pooling, and batches of a fixed
  size, drawn more cheaply than their own loaders do. lipdp has its own layers: sorting activations,
  norm pooling, centering. Its ratio is over the plain step of *those* layers; the plain step with
  ReLU and maximum pooling stands beside it.
- Where libraries took turns with each other as well (`--together`), a † marks what was measured by
  itself, at another time: its ratio can be compared, its milliseconds hardly.{note}
- Memory is the peak of the process, framework and data (four batches) included. A method that
  needs more than {gib:g} GiB, or {seconds} s of CPU to get ready, has a dash; so have larger
  batches then. The reasons are below. What is empty has not been measured.
- JAX-Privacy's Keras interface has micro-batches of 32, as "micro-batches" has. TF Privacy's fast
  clipping knows, of these layers, the dense ones only, so it is timed where there are no
  others.{kept}

![ratio and CPU time over the batch size](speed.svg)

## Who is ahead

CPU milliseconds of a private step: lipdp on the backend that is faster there, and the fastest of
the others.

{ahead}
"""

_KEPT = """
- {which}
  keep the memory that they have freed (`--nokeep_memory` leaves that out): those of TensorFlow with
  `TF_CPU_ALLOCATOR_USE_BFC=true` in the environment, all with
  `MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000`, for glibc. Without,
  how many pages a step hands back and fetches anew depends on its tensors' sizes and on chance:
  batches of varying size suffer, large ones, JAX, whose threads have arenas to themselves, and
  everything once a data set `from_generator` was made, for which TensorFlow tells glibc."""


def write(rows, path, warmup, shapes_warmup, gib, seconds, note=""):
    """Writes the page and the plot that belong to a JSON, beside it.

    Args:
        rows: the measurements.
        path: of the JSON.
        warmup, shapes_warmup, gib, seconds: what they were taken with: steps that were not timed,
            where each shape is compiled, too, and limits.
        note: what the JSON says of them in words.
    """
    measured = [row for row in rows if "failed" not in row]
    if not measured:
        return
    batches = sorted({row["batch_size"] for row in rows})
    threads = sorted({row["threads"] for row in measured})
    kept = [bool(row.get("keep_memory")) for row in measured]
    which = "All processes" if all(kept) else "Processes of rows with `keep_memory` in the JSON"
    text = _HEAD.format(
        json=path.name,
        device=" and on ".join(sorted({row["device"] for row in measured})),
        threads={(1,): "one thread"}.get(tuple(threads), f"{threads} threads (0: as it likes)"),
        steps=max(row["steps"] for row in measured),
        least=min(row["steps"] for row in measured),
        warmup=warmup,
        shapes_warmup=shapes_warmup,
        gib=gib,
        seconds=seconds,
        ahead=_ahead(measured, batches),
        kept=_KEPT.format(which=which) if any(kept) else "",
        note=note and textwrap.fill(note, 98, initial_indent="\n  ", subsequent_indent="  "),
    )
    for network in NETWORKS:
        of_it = [row for row in rows if row["network"] == network]
        if any("failed" not in row for row in of_it):
            text += f"\n## {_TITLES[network]}\n\n{_tables(of_it, batches, gib)}"
    text += _failures(rows) + "\n## Versions\n\n"
    versions = {}
    for row in measured:
        for name, version in row["versions"].items():
            if name in ("commit", "python", "numpy", "dp_accounting"):
                continue
            versions.setdefault(row["library"], {}).setdefault(name, set()).add(version)
    for library, found in versions.items():
        listed = ", ".join(f"{name} {' and '.join(sorted(v))}" for name, v in found.items())
        text += f"- `{library}`: {listed}\n"
    path.with_suffix(".md").write_text(text)
    plot(measured, path.with_suffix(".svg"))


def _apart(rows):
    """The rows of a case whose others were measured in turns."""
    together = {(r["network"], r["batch_size"]) for r in rows if r.get("together")}
    return [
        r for r in rows if (r["network"], r["batch_size"]) in together and not r.get("together")
    ]


def _ahead(rows, batches):
    apart = _apart(rows)
    rows = [row for row in rows if row not in apart]

    def best(network, batch_size, ours):
        found = [
            (row["private"]["cpu_ms"], row["method"])
            for row in rows
            if (row["network"], row["batch_size"]) == (network, batch_size)
            and (row["library"] == "lipdp") == ours
        ]
        return min(found, default=None)

    lines = []
    for network in NETWORKS:
        cells = []
        for batch_size in batches:
            mine, other = (best(network, batch_size, ours) for ours in (True, False))
            if mine is None or other is None:
                cells.append("–")
            else:
                winner = "**" if mine[0] <= other[0] else ""
                cells.append(f"{winner}{_ms(mine[0])}{winner} / {_ms(other[0])} ({other[1]})")
        if any(cell != "–" for cell in cells):
            lines.append([_TITLES[network].split(":")[0], *cells])
    return pages.markdown(["lipdp / the fastest other", *map(_count, batches)], lines)


def _tables(rows, batches, gib):
    by_case = {(row["method"], row["batch_size"]): row for row in rows}
    apart = _apart(rows)
    names = list(dict.fromkeys(row["method"] for row in rows))
    relu = any("relu" in row for row in rows)

    def table(cell):
        return [[name, *(show(cell, by_case.get((name, b))) for b in batches)] for name in names]

    def show(cell, row):
        return "" if row is None else "–" if "failed" in row else cell(row)

    def times(row):
        private, plain = row["private"]["cpu_ms"], row["plain"]["cpu_ms"]
        fast = f" ({_ms(row['relu']['cpu_ms'])})" if "relu" in row else ""
        mark = "†" if row in apart else ""
        return f"{_ms(private)} / {_ms(plain)}{fast} = {private / plain:.2f}{mark}"

    def memory(row):
        private, plain = row["private"]["mib"], row["plain"]["mib"]
        return f"{private:,.0f} / {plain:,.0f} = {private / plain:.2f}"

    head = [*map(_count, batches)]
    text = "CPU ms, private / plain = ratio"
    text += "; in brackets the plain step with ReLU and maximum pooling.\n\n" if relu else ".\n\n"
    text += pages.markdown(["batch", *head], table(times))
    text += "\n\nPeak MiB, private / plain = ratio.\n\n"
    text += pages.markdown(["batch", *head], table(memory)) + "\n"
    lines = []
    for name in names:
        of_it = [row for row in rows if row["method"] == name and "failed" not in row]
        fits = [_largest(of_it, kind, gib) for kind in ("private", "plain")]
        if all(fits):
            lines.append([name, *map(_count, fits), f"{fits[1] / fits[0]:.2f}"])
    if lines:
        text += (
            f"\nBatches that fit into {gib:g} GiB, by the line through the two largest that "
            "were measured alike.\n\n"
        )
        text += pages.markdown(["", "private", "plain", "plain over private"], lines) + "\n"
    return text


def _largest(rows, kind, gib):
    """The batch at which the line through the last two peaks meets the limit; None without two
    that were measured alike, and where they say too little.
    """
    alike = (
        [row for row in rows if bool(row.get("keep_memory")) == kept] for kept in (True, False)
    )
    rows = max(alike, key=len)
    if len(rows) < 2 or rows[-1]["batch_size"] < 1024:
        return None
    (b1, m1), (b2, m2) = ((row["batch_size"], row[kind]["mib"]) for row in rows[-2:])
    slope = (m2 - m1) / (b2 - b1)
    if m2 - m1 < 50:
        return None
    return int(b2 + (1024 * gib - m2) / slope)


def _failures(rows):
    failed = [row for row in rows if "failed" in row]
    if not failed:
        return ""
    lines = [
        [row["method"], row["network"], _count(row["batch_size"]), row["failed"].replace("|", "/")]
        for row in failed
    ]
    table = pages.markdown(["method", "network", "batch", "reason"], lines)
    return f"\n## Not measured\n\n{table}\n"


def _ms(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _count(value):
    return f"{value:,}"


def plot(rows, path):
    """Ratio and CPU time over the batch size, for each network."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    networks = [name for name in NETWORKS if any(row["network"] == name for row in rows)]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure = Figure(figsize=(3.1 * len(networks) + 0.4, 6.6), layout="constrained")
    axes = figure.subplots(2, len(networks), squeeze=False, sharex=True)
    labelled = {}
    for column, network in enumerate(networks):
        for index, method in enumerate(methods):
            of_it = [r for r in rows if (r["network"], r["method"]) == (network, method)]
            if not of_it:
                continue
            batches = [r["batch_size"] for r in of_it]
            private, plain = ([r[k]["cpu_ms"] for r in of_it] for k in ("private", "plain"))
            ours = of_it[0]["library"] == "lipdp"
            style = {"color": f"C{index}", "marker": "o" if ours else ".", "lw": 2.2 if ours else 1}
            ratios = [a / b for a, b in zip(private, plain, strict=True)]
            axes[0][column].plot(batches, ratios, **style)
            labelled[method] = axes[1][column].plot(batches, private, **style)[0]
            axes[1][column].plot(batches, plain, ":", color=style["color"], lw=1)
        axes[0][column].axhline(1.0, color="0.5", lw=0.8)
        axes[0][column].set_title(_TITLES[network].split(":")[0])
        axes[1][column].set_xlabel("batch size")
        for axis in (axes[0][column], axes[1][column]):
            axis.set(xscale="log", yscale="log")
            axis.grid(alpha=0.3)
            axis.yaxis.set_major_formatter(LogFormatter())
            axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
        sizes = sorted({r["batch_size"] for r in rows})
        axes[1][column].set_xticks(sizes, [str(size) for size in sizes])
        axes[1][column].minorticks_off()
    axes[0][0].set_ylabel("private / plain, CPU time")
    axes[1][0].set_ylabel("private, CPU ms (dotted: plain)")
    figure.legend(labelled.values(), labelled.keys(), loc="outside lower center", ncols=4)
    # Text stays text, and the same results make the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lipdp"}):
        figure.savefig(path, format="svg", metadata={"Date": None})
