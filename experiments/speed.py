"""Cost of privacy: a private step beside the plain step of the same network.

`python -m experiments.speed` times, step by step in turns, a step of `PrivateModel` (draw, noise,
certificates and projections included), the plain Keras step of the same layers without
projections, and the plain step of the same network with ReLU and max pooling; with `--secure`
also a private step with noise="secure".

`python -m experiments.speed --against=all` does so for other libraries as well, each in a virtual
environment that is made for it, and for five networks. It writes a JSON, and from it a page and a
plot; those of the documentation with `--out=docs/speed.json`. What the JSON has is not measured
again, but for `--again`: `--only=lipdp --again` measures lipdp anew, and nothing else;
`--only=lipdp,opacus:ghost` one of Opacus' ways beside it. With `--together` all methods take turns
with each other, too: on a machine whose speed drifts, what is measured minutes apart tells little
of who is faster.

Each kind of step has a process of its own (`experiments.timing`), so that its peak memory is known;
they take turns, step by step, those of Keras within `fit`. CPU time counts all threads, draws of
noise and of batches too. Medians.
"""

import dataclasses
import datetime
import json
import pathlib
import subprocess
import sys
import types

from absl import app, flags

from experiments import frame, record, speed_page
from experiments.timing import LEAST, Failure, Limits, Method, machine, measure, rounds

FLAGS = flags.FlagValues()

NETWORKS = speed_page.NETWORKS
WARMUP = 5  # steps that are not timed, fewer if they are slow
SHAPES_WARMUP = 15  # where each new shape of a batch is compiled

_OURS = {"private": "private", "plain": "plain", "relu": "relu"}
_PER_LAYER = {"private": "per_layer", "plain": "relu"}
_TENSORFLOW, _JAX = {"KERAS_BACKEND": "tensorflow"}, {"KERAS_BACKEND": "jax"}


def _ours(name, variables, kinds=_OURS):
    warmup = SHAPES_WARMUP if variables == _JAX else WARMUP
    worker = "experiments.baselines.ours"
    return Method("lipdp", name, worker, kinds, NETWORKS, warmup, variables)


def _baseline(library, name, private, plain="plain", networks=NETWORKS, **more):
    kinds = {"private": private, "plain": plain}
    worker = f"experiments.baselines.{library}"
    return Method(library, name, worker, kinds, networks, WARMUP, **more)


METHODS = (
    _ours("lipdp, TensorFlow", _TENSORFLOW),
    _ours("lipdp, JAX", _JAX),
    _ours("lipdp per layer, TensorFlow", _TENSORFLOW, _PER_LAYER),
    _ours("lipdp per layer, JAX", _JAX, _PER_LAYER),
    _baseline("opacus", "Opacus, ghost clipping", "ghost"),
    _baseline("opacus", "Opacus, hooks", "hooks"),
    # Of the layers that these networks have, it knows the dense ones. With any other it does what
    # DPModel does.
    _baseline("tf_privacy", "TF Privacy, fast clipping", "fast", networks=("mlp", "scattering")),
    _baseline("tf_privacy", "TF Privacy, DPModel", "dpmodel"),
    _baseline("tf_privacy", "TF Privacy, vectorized", "vectorized"),
    _baseline("jax_privacy", "JAX-Privacy, Keras", "keras", "keras_plain", variables=_JAX),
    _baseline("jax_privacy", "JAX-Privacy, micro-batches", "microbatches", variables=_JAX),
    _baseline("jax_privacy", "JAX-Privacy, vmap", "vmap", variables=_JAX),
)

#: What is installed, one call of pip after the other. TF Privacy asks for the large TensorFlow, and
#: the torch of PyPI brings CUDA, some GB, unless pip is told of wheels for CPUs (PIP_FIND_LINKS,
#: PIP_EXTRA_INDEX_URL). TF Privacy needs Python 3.11 at most.
ENVIRONMENTS = types.MappingProxyType(
    {
        "opacus": [["opacus==1.6.0", "torch==2.13.0"]],
        "tf_privacy": [
            ["tensorflow-cpu==2.15.1", "tensorflow-probability==0.22.1", "dp-accounting==0.4.3",
             "dm-tree==0.1.8", "numpy==1.26.4", "packaging==22.0", "scikit-learn<2", "scipy<2"],
            ["--no-deps", "tensorflow-privacy==0.9.0", "tensorflow-estimator==2.15.0"],
        ],
        "jax_privacy": [["jax-privacy==2.0.0", "jax==0.10.2", "keras==3.15.1"]],
    }
)  # fmt: skip
LIBRARIES = tuple(ENVIRONMENTS)


def _limits():
    names = [field.name for field in dataclasses.fields(Limits)]
    return Limits(**{name: getattr(FLAGS, name) for name in names})


# --- the whole matrix -----------------------------------------------------------------------------


def environment(library):
    """The Python of a library's environment, which is made where there is none.

    Raises:
        Failure: a package cannot be installed.
    """
    if library == "lipdp":
        return sys.executable
    folder = pathlib.Path(FLAGS.environments) / library
    python, done = folder / "bin" / "python", folder / "installed.json"
    calls = ENVIRONMENTS[library]
    if not done.exists() or json.loads(done.read_text()) != calls:
        made = [[sys.executable, "-m", "venv", "--clear", str(folder)]]
        made += [[str(python), "-m", "pip", "install", "--quiet", *call] for call in calls]
        for command in made:
            run = subprocess.run(command, capture_output=True, text=True)
            if run.returncode:
                errors = [line for line in run.stderr.splitlines() if "ERROR" in line]
                raise Failure(f"not installed: {' '.join(errors)[:300] or run.stderr[-300:]}")
        record.write(done, calls)
    return str(python.absolute())


def chosen(names):
    """The methods of a flag: of a library, or `library:private kind`, such as `opacus:ghost`.

    Raises:
        UsageError: a name is none.
    """
    found = [m for m in METHODS if {m.library, _short(m)} & set(names)]
    known = {m.library for m in METHODS} | {_short(m) for m in METHODS}
    if unknown := set(names) - known:
        raise app.UsageError(
            f"--only takes {', '.join(sorted(known))}; got {', '.join(sorted(unknown))}."
        )
    return found


def _short(method):
    return f"{method.library}:{method.kinds['private']}"


def compare(methods):
    """Measures of these methods what the JSON lacks, and keeps it after each measurement."""
    from rich.console import Console
    from rich.progress import Progress

    path = pathlib.Path(FLAGS.out or "build/speed.json")
    found = json.loads(path.read_text()) if path.exists() else {}
    rows = found.get("measurements", [])
    done = {(row["method"], row["network"], row["batch_size"]) for row in rows}
    cases = [
        (method, network, int(batch_size))
        for batch_size in FLAGS.batch_sizes or ["64", "256", "1024", "4096"]
        for network in FLAGS.networks
        for method in methods
        if network in method.networks
    ]
    if FLAGS.again:
        names = [method.name for method in methods]
        rows = [row for row in rows if row["method"] not in names or "failed" not in row]
    else:
        cases = [c for c in cases if (c[0].name, *c[1:]) not in done]
    pythons, together = {}, {}
    for method, network, batch_size in cases:
        which = None if FLAGS.together else method.name
        together.setdefault((network, batch_size, which), []).append(method)
    console = Console(stderr=True)
    with Progress(console=console) as progress:
        task = progress.add_task("measuring", total=len(cases))
        for library in dict.fromkeys(method.library for method, *_ in cases):
            progress.update(task, description=f"setting up {library}")
            try:
                pythons[library] = environment(library)
            except Failure as failure:
                pythons[library] = failure
        for (network, batch_size, _), group in together.items():
            names = ", ".join(method.name for method in group)
            progress.update(task, description=f"{names}: {network}, {batch_size}")
            for row in _measured(group, network, batch_size, pythons, rows):
                if "failed" in row:
                    progress.print(f"{row['method']}, {network}, {batch_size}: {row['failed']}")
                rows = sorted([r for r in rows if _place(r) != _place(row)] + [row], key=_place)
                record.write(path, found | {"measurements": rows})
                progress.advance(task)
    Console().print(_table(rows))
    steps = WARMUP, SHAPES_WARMUP
    speed_page.write(rows, path, *steps, FLAGS.gib, FLAGS.seconds, found.get("note", ""))


def _measured(methods, network, batch_size, pythons, rows):
    """A row of each method, as soon as it is there; the methods take turns.

    Args:
        methods, network, batch_size: what to measure.
        pythons: of each library's environment, or the `Failure` that there was in its place.
        rows: of earlier measurements.
    """
    limits, running = _limits(), []
    for method in methods:
        row = {
            "library": method.library,
            "method": method.name,
            "network": network,
            "batch_size": batch_size,
            "device": machine(),
            "threads": limits.threads,
            "together": FLAGS.together,
            "keep_memory": limits.keep_memory,
            "date": datetime.date.today().isoformat(),
        }
        try:
            for other in rows:
                # A batch that did not fit, or took too long, leaves no hope for larger ones.
                if (
                    "failed" in other
                    and (other["method"], other["network"]) == (method.name, network)
                    and other["batch_size"] < batch_size
                ):
                    reason = other["failed"].split(" (at batch ")[0]
                    raise Failure(f"{reason} (at batch {other['batch_size']})")
            python = pythons[method.library]
            if isinstance(python, Failure):
                raise python
            running.append((row, rounds(python, method, network, batch_size, limits)))
        except Failure as failure:
            yield row | {"failed": str(failure)}
    while running:
        for row, steps in [*running]:
            try:
                next(steps)
                continue
            except StopIteration as end:
                yield row | end.value
            except Failure as failure:
                yield row | {"failed": str(failure)}
            running.remove((row, steps))


def _place(row):
    names = [method.name for method in METHODS]
    method = names.index(row["method"]) if row["method"] in names else len(names)
    return NETWORKS.index(row["network"]), method, row["batch_size"]


def _table(rows):
    from rich.table import Table

    table = Table(title="CPU ms of a step, medians, and peak MiB")
    for column in ("network", "batch", "method", "private", "plain", "ratio", "MiB", "MiB ratio"):
        table.add_column(column, justify="left" if column in ("network", "method") else "right")
    for row in sorted(rows, key=lambda r: (_place(r)[0], r["batch_size"], _place(r)[1])):
        about = [row["network"], str(row["batch_size"]), row["method"]]
        if "failed" in row:
            table.add_row(*about, "–")
            continue
        private, plain = row["private"], row["plain"]
        table.add_row(
            *about,
            f"{private['cpu_ms']:.1f}",
            f"{plain['cpu_ms']:.1f}",
            f"{private['cpu_ms'] / plain['cpu_ms']:.2f}",
            f"{private['mib']:.0f}",
            f"{private['mib'] / plain['mib']:.2f}",
        )
    return table


# --- the quick use --------------------------------------------------------------------------------


def quick():
    """lipdp beside the plain step, on one network; prints a table, and the JSON."""
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    sizes = FLAGS.batch_sizes or ["64", "256", "1024"]
    cases = [(b, int(n)) for b in FLAGS.backends for n in sizes]
    kinds = {**_OURS, "secure": "secure"} if FLAGS.secure else _OURS
    results = []
    for backend, batch_size in track(cases, description="measuring", console=Console(stderr=True)):
        method = dataclasses.replace(_ours(backend, {"KERAS_BACKEND": backend}), kinds=kinds)
        try:
            found = measure(sys.executable, method, "convnet", batch_size, _limits())
        except Failure as failure:
            raise RuntimeError(f"{backend}, batch {batch_size}: {failure}") from failure
        private, plain = found["private"], found["plain"]
        result = {"backend": backend, "batch_size": batch_size, "threads": FLAGS.threads}
        for kind in kinds:
            result |= {f"{kind}_{k}": found[kind][k] for k in ("cpu_ms", "mean_cpu_ms", "wall_ms")}
        result |= {
            "cpu_ratio": round(private["cpu_ms"] / plain["cpu_ms"], 3),
            "private_mib": round(private["mib"]),
            "plain_mib": round(plain["mib"]),
            "memory_ratio": round(private["mib"] / plain["mib"], 3),
        }
        if FLAGS.secure:
            result["secure_over_private"] = round(found["secure"]["cpu_ms"] / private["cpu_ms"], 3)
        results.append(result)
    table = Table(title=f"Medians of up to {FLAGS.steps} steps, CPU ms (all threads)")
    columns = ["backend", "batch", "private", "plain", "ratio", "ReLU plain", "MiB", "MiB ratio"]
    columns += ["secure", "secure/private"] if FLAGS.secure else []
    for column in columns:
        table.add_column(column, justify="right")
    for r in results:
        table.add_row(
            r["backend"],
            str(r["batch_size"]),
            f"{r['private_cpu_ms']:.1f}",
            f"{r['plain_cpu_ms']:.1f}",
            f"{r['cpu_ratio']:.2f}",
            f"{r['relu_cpu_ms']:.1f}",
            str(r["private_mib"]),
            f"{r['memory_ratio']:.2f}",
            *(f"{r[k]:.2f}" for k in ("secure_cpu_ms", "secure_over_private") if k in r),
        )
    Console().print(table)
    line = json.dumps(results)
    if FLAGS.out:
        pathlib.Path(FLAGS.out).write_text(line + "\n")
    print(line)


def main(values):
    if FLAGS.against is None:
        return quick()
    others = list(LIBRARIES) if FLAGS.against == ["all"] else FLAGS.against
    if unknown := set(others) - set(LIBRARIES):
        raise app.UsageError(
            f"--against takes all, {', '.join(LIBRARIES)}; got {', '.join(sorted(unknown))}."
        )
    compare(chosen(FLAGS.only or ["lipdp", *others]))


def define_flags(define):
    define.names("against", None, "Libraries to compare with: all, or names; may be empty.")
    define.names("only", None, "Of the comparison: what to measure now: lipdp,opacus:ghost.")
    define.switch("again", False, "Of the comparison: measures what the JSON has, too.")
    define.switch(
        "together", False, "Of the comparison: all libraries take turns, if memory holds them."
    )
    text = "Of the comparison: networks to time."
    define.names("networks", list(NETWORKS), text, choices=NETWORKS)
    backends = ["tensorflow", "jax"]
    define.names("backends", backends, "Without --against: backends to time.", choices=backends)
    define.numbers("batch_sizes", None, "64, 256, 1024, and 4096 in the comparison.", int)
    define.integer("steps", 30, "Timed steps of each kind, at most.", least=LEAST)
    define.integer("threads", 1, "Of each process; 0 leaves it to the framework.", least=0)
    define.switch("keep_memory", True, "Processes keep the memory that they have freed.")
    define.integer("seconds", 120, "Of CPU, in which to get ready, or to make a step.", least=1)
    define.number("gib", 8.0, "Of memory that a process may use.", least=0.1)
    define.switch("secure", False, 'Without --against: time noise="secure" as well.')
    define.text("environments", "build/environments", "Folder of the environments.")
    define.text("out", None, "The JSON; build/speed.json in the comparison.")


if __name__ == "__main__":
    frame.start(main, define_flags, FLAGS)
