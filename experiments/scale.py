"""Costs that grow with the data, the network and the steps: `python -m experiments.scale`.

Writes `docs/scale.json` and, from it, `docs/scale.md`: 1,000 Poisson batches drawn from 10⁹ indices
and tested, what other schemes keep of every example, the privacy overhead of dense layers over
their width, the ledger, imports, and bounds of a network with 100 layers. Each part runs in a
process of its own; `--parts` measures only some again.
"""

import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

from experiments import frame, pages, record, timing
from experiments.baselines import worker

# --- parts: each measures, and returns what goes into the JSON ------------------------------------


class Indices:
    """Examples that are their own numbers, of which none is kept."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def take(self, rows, size):
        padded = np.pad(rows, (0, size - len(rows)))
        return padded, padded


def batches_of(sampling, examples, steps, seed=None):
    """Batches of row numbers, drawn as a model draws them; without a seed from fresh entropy."""
    from lipdp.data.batches import DrawnBatches
    from lipdp.randomness import RandomSource

    drawn = DrawnBatches(Indices(examples), sampling, RandomSource(seed), (0, 0), steps)
    drawn.on_epoch_begin()
    return drawn


def draws(examples, batch_size, count, seed=None):
    """Poisson batches: time, memory, and whether they are what they should be.

    Raises:
        ValueError: a batch is not sorted, holds an index twice, or one out of range.
    """
    from rich.console import Console
    from rich.progress import track
    from scipy import stats

    import accountants

    sampling = accountants.PoissonSampling(batch_size)
    drawn = batches_of(sampling, examples, count, seed)
    before, sizes, spent = worker.peak_mib(), [], []
    bins = np.zeros(1000, int)
    for index in track(range(count), description="drawing", console=Console(stderr=True)):
        start = time.process_time()
        batch = drawn.draw(index)
        spent.append(1e3 * (time.process_time() - start))
        rows = batch.targets[batch.mask == 1]
        if len(rows) and not (0 <= rows[0] and rows[-1] < examples and (np.diff(rows) > 0).all()):
            raise ValueError(f"Batch {index} is not sorted, or not in range, or repeats an index.")
        sizes.append(len(rows))
        bins += np.bincount(rows * len(bins) // examples, minlength=len(bins))
    q = batch_size / examples
    # Sizes are binomial, and indices uniform: sums of squares that are chi-square distributed.
    of_sizes = float(np.square(np.array(sizes) - batch_size).sum() / (batch_size * (1 - q)))
    return {
        "examples": examples,
        "batch_size": batch_size,
        "draws": count,
        "median_ms": statistics.median(spent),
        "total_s": sum(spent) / 1e3,
        "grown_mib": worker.peak_mib() - before,
        "mean_size": statistics.mean(sizes),
        "p_value_sizes": _two_sided(stats.chi2(count), of_sizes),
        "p_value_positions": float(stats.chisquare(bins).pvalue),
    }


def _two_sided(distribution, value):
    return float(2 * min(distribution.cdf(value), distribution.sf(value)))


def schemes(examples, batch_size):
    """Bytes that schemes keep of every example, and times of the first and the next draw."""
    import accountants

    found = {}
    for sampling in (
        accountants.PoissonSampling(batch_size),
        accountants.FixedSize(batch_size),
        accountants.CyclicPoisson(batch_size, bands=8),
        accountants.RandomAllocation(1000),
        accountants.ShuffledEpochs(batch_size),
    ):
        drawn = batches_of(sampling, examples, 1000)
        seconds = []
        for index in range(4):
            start = time.process_time()
            drawn.draw(index)
            seconds.append(time.process_time() - start)
        kept = sum(array.nbytes for array in drawn.draws.kept)
        found[type(sampling).__name__] = {
            "bytes_an_example": kept / examples,
            "first_s": seconds[0],
            "next_ms": 1e3 * statistics.median(seconds[1:]),
        }
    return {"examples": examples, "batch_size": batch_size, "schemes": found}


def overhead(widths, batch_sizes=(64, 512), steps=15):
    """CPU ms of private and plain steps of a square dense layer, over its width."""
    found = []
    for width in widths:
        row = {"width": width}
        for batch_size in batch_sizes:
            for kind in ("private", "plain"):
                step = _stepper(kind, width, batch_size)
                row[f"{kind}_{batch_size}"] = _median_ms(step, steps)
        row["noise"] = _median_ms(_noise(width), steps)
        found.append(row)
    return found


def _median_ms(step, count, warmup=5):
    spent = []
    for _ in range(warmup + count):
        start = time.process_time()
        step()
        spent.append(1e3 * (time.process_time() - start))
    return statistics.median(spent[warmup:])


def _noise(width):
    """Draws the noise of a square matrix on TensorFlow, as a step does."""
    import tensorflow as tf

    from lipdp.noise import GaussianNoise
    from lipdp.training import steps

    sums, key = tf.zeros((width, width)), tf.constant([1, 2, 3, 4], tf.uint32)
    add = tf.function(GaussianNoise().add)
    return lambda: add(steps.backend(), {"key": key}, [sums], [1.0])[0].numpy()


def _stepper(kind, width, batch_size):
    import keras

    import lipdp
    from lipdp import layers
    from lipdp.training import steps

    body = [layers.BallProjection(1.0), layers.SpectralDense(width, use_bias=False)]
    body += [layers.GroupSort(), layers.SpectralDense(10, use_bias=False)]
    network = keras.Sequential([keras.Input((width,)), *body])
    optimizer = keras.optimizers.SGD(0.05, momentum=0.9)
    generator = np.random.default_rng(0)
    x = generator.random((4 * batch_size, width), dtype="float32")
    y = generator.integers(0, 10, len(x))
    if kind == "private":
        # Fixed batches, so that both kinds see as many examples.
        sampling = lipdp.FixedSize(batch_size)
        model = lipdp.PrivateModel(network, noise_multiplier=1.0, sampling=sampling)
        model.compile(optimizer, loss="sparse_categorical_crossentropy")
        batches = model.batches(x, y, steps_per_epoch=10**6)
        return lambda: model.train_on_batch(next(batches))
    for variable in network.trainable_variables:
        variable.constraint = None
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    network.compile(optimizer, loss=loss, jit_compile=steps.backend().default_jit_compile())

    def step():
        rows = generator.integers(0, len(x), batch_size)
        network.train_on_batch(x[rows], y[rows])

    return step


def ledger(steps):
    """Bytes and CPU time of a step in the ledger, and how long ε takes at 10⁹ examples."""
    import accountants

    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "spent.ledger")
        sampling = accountants.PoissonSampling(4096)
        with accountants.Ledger(path).open_run(
            noise_multiplier=1.0, sampling=sampling, num_examples=10**9
        ) as run:
            opened, start = path.stat().st_size, time.process_time()
            for _ in range(steps):
                run.pay()
            spent = time.process_time() - start
        grown = path.stat().st_size - opened
        start = time.process_time()
        epsilon = accountants.Ledger(path).epsilon(delta=5e-10)
        reading = time.process_time() - start
    return {
        "steps": steps,
        "bytes": grown,
        "ms_a_step": 1e3 * spent / steps,
        "epsilon": float(epsilon),
        "epsilon_s": reading,
    }


def imports():
    """CPU seconds, medians of five processes each."""
    code = (
        "import time, {first}; start = time.process_time(); import {then};"
        "print(time.process_time() - start)"
    )
    found = {}
    for first, then in (("sys", "accountants"), ("keras", "lipdp")):
        command = [sys.executable, "-c", code.format(first=first, then=then)]
        spent = [float(subprocess.check_output(command, text=True)) for _ in range(5)]
        found[f"{then} after {first}" if first != "sys" else then] = statistics.median(spent)
    return found


def bounds(depth):
    """CPU seconds of the bounds and of the report of a deep network."""
    import keras

    import lipdp
    from lipdp import layers

    body = [layers.BallProjection(1.0)]
    for _ in range(depth - 1):
        body += [layers.SpectralConv2D(16, 3, padding="same", use_bias=False), layers.GroupSort()]
    body += [keras.layers.Flatten(), layers.SpectralDense(10, use_bias=False)]
    network = keras.Sequential([keras.Input((16, 16, 3)), *body])
    model = lipdp.PrivateModel(
        network, noise_multiplier=1.0, sampling=lipdp.PoissonSampling(64)
    )  # fmt: skip
    model.compile("sgd", loss="sparse_categorical_crossentropy")
    found = {"depth": depth}
    for name, call in (
        ("gradient_bounds", lambda: lipdp.gradient_bounds(network)),
        ("report", model.report),
    ):
        start = time.process_time()
        call()
        found[f"{name}_s"] = time.process_time() - start
    return found


PARTS = {
    "draws": lambda values: draws(values.examples, values.batch_size, values.draws),
    "schemes": lambda values: schemes(values.examples // 10, values.batch_size),
    "overhead": lambda _: overhead([256, 512, 1024, 2048]),
    "ledger": lambda _: ledger(100_000),
    "imports": lambda _: imports(),
    "bounds": lambda _: bounds(100),
}


# --- the page -------------------------------------------------------------------------------------

_PAGE = """# Scale

Made by `python -m experiments.scale`, which measures the figures of this page and keeps them in
`scale.json`, with commit and versions. CPU time, one thread, on {device}.

## What a step costs

A dense layer of n × n weights, batch B. The plain step makes three matrix products, `6·B·n²`
operations. What privacy adds does not grow with the batch, so its share falls as `1/B`:

- noise for `n²` weights;
- a projection with its certificate. With a side above 256 that is 14 or 16 products with a block of
  16 vectors, `O(n² log n)` (`lipdp.bounds.norms.probable_norm_bound`). Smaller matrices, and all
  of them
  before the first step, are certified by a few products of whole matrices, `O(n³)`; orthogonal
  layers take such products at each step;
- work that depends on neither: the draw of the batch, the mask, the ledger.

So for wide layers the batch beyond which the share is small hardly depends on n; if the projection
took `O(n³)`, it would grow as n.

Measured: one layer of n × n with sorted features and a layer of 10 behind it, SGD with momentum,
TensorFlow, batches of a fixed size. CPU ms; the overhead is the mean of the two batch sizes.

{overhead}

For a weight the overhead is {before:.0f} ns at n = {narrower:,} and {after:.0f} ns at {widest:,}.
There the plain step takes {each:.3g} ns a weight for an example, in three products: a single
product of two n × n matrices would take {whole:.0f} ns a weight, and twice that at twice the width.

A convolution on p positions multiplies p rows for each example, and its matrix has
`kernel² · channels` rows or columns: it gets there p times sooner. Token layers and patches do too.

## Many devices

With k workers that each take a share of the batch, a step exchanges what plain training exchanges,
the sum of the gradients: `2·(k − 1)/k · 4·P` bytes from each worker for P float32 weights with a
ring. Privacy adds no traffic that grows with weights or examples: there is no per-example gradient
and no norm of one to exchange, batches and noise come from keys that all have, and adaptive
clipping adds one number. That is {communication}

Projections are repeated by every worker, at the cost above, which does not shrink with k: what
counts for the share is the batch of *one* worker.

## Drawing from 10⁹ examples

`PoissonSampling` draws the size of a batch from a binomial distribution and then that many distinct
indices, which is what independent coins for all examples give. NumPy draws them with Floyd's
algorithm and a set of what was drawn, in at most 25 bytes for each example drawn. Only where a
batch holds more than a twentieth of the data, or the data no more than 10,000 examples, it makes an
array of all indices: at most 168 bytes for each example drawn in the first case, 80 kB in the
second.
`TruncatedPoisson` and `FixedSize` draw in the same way.

{draws}

The sizes were compared with the binomial distribution, and the indices, in 1,000 bins, with the
uniform one, by χ² tests (p = {p_sizes:.2f} and {p_positions:.2f}); each batch was sorted, in
range, and without repetition.

The other schemes decide once, an epoch or a run, about every example, and keep that in the smallest
integers that hold it. Measured with {scheme_examples} examples, expected batches of {scheme_batch}
(of a thousandth of the examples with `RandomAllocation`):

{schemes}

At an epoch's end the last one is kept beside the new one. `RandomAllocation` reads through all
examples for each batch. A keyed permutation, computed index by index, would need no memory; it is
not used, since the accounting assumes an order drawn uniformly from all, and no cheap one that is
provably close to it on the whole domain is at hand. All draws come from a pseudorandom generator
(Philox, seeded with 256 bits from the operating system), which the accounting takes for ideal.

## The ledger and ε

{ledger}

Neither depends on the number of examples, weights or workers.

## Imports, bounds, reports

{small}
"""


def write_page(found, path):
    """Writes the page that belongs to the JSON, beside it."""
    table = pages.markdown
    rows = found["overhead"]
    widths = np.array([row["width"] for row in rows], float)
    added = [[row[f"private_{b}"] - row[f"plain_{b}"] for b in (64, 512)] for row in rows]
    added = np.mean(added, axis=1)
    per_example = np.array([(row["plain_512"] - row["plain_64"]) / 448 for row in rows])
    before, after = 1e6 * added[-2:] / widths[-2:] ** 2
    each = 1e6 * per_example[-1] / widths[-1] ** 2
    lines = [
        [
            f"{row['width']:,}",
            *(f"{row[f'private_{b}']:.1f} / {row[f'plain_{b}']:.1f}" for b in (64, 512)),
            f"{more:.1f}",
            f"{row['noise']:.1f}",
            f"{example:.3f}",
            *(f"{share * more / example:,.0f}" for share in (20, 100)),
        ]
        for row, more, example in zip(rows, added, per_example, strict=True)
    ]
    head = ["n", "private / plain, B = 64", "B = 512", "overhead", "of which noise"]
    head += ["plain, an example", "under 5 % beyond B =", "1 %"]
    weights = 25_000_000
    traffic = 2 * 7 / 8 * 4 * weights / 2**20
    drawn, kept, paid = found["draws"], found["schemes"], found["ledger"]
    text = _PAGE.format(
        device=found["device"],
        overhead=table(head, lines),
        before=before,
        after=after,
        each=each,
        narrower=int(widths[-2]),
        widest=int(widths[-1]),
        whole=each * widths[-1] / 3,
        communication=f"{traffic:,.0f} MiB a step with 8 workers and {weights:,} weights.",
        draws=table(
            ["examples", "expected batch", "draws", "CPU ms each", "memory that it took, MiB"],
            [
                [
                    f"{drawn['examples']:,}",
                    f"{drawn['batch_size']:,}",
                    f"{drawn['draws']:,}",
                    f"{drawn['median_ms']:.2f}",
                    f"{drawn['grown_mib']:.1f}",
                ]
            ],
        ),
        p_sizes=drawn["p_value_sizes"],
        p_positions=drawn["p_value_positions"],
        scheme_examples=f"{kept['examples']:,}",
        scheme_batch=f"{kept['batch_size']:,}",
        schemes=table(
            ["scheme", "bytes an example", "at 10⁹ examples, GB", "first draw, s", "next, ms"],
            [
                [
                    f"`{name}`",
                    f"{of['bytes_an_example']:.0f}",
                    f"{of['bytes_an_example']:.0f}",
                    f"{of['first_s']:.2f}",
                    f"{of['next_ms']:.2f}",
                ]
                for name, of in kept["schemes"].items()
            ],
        ),
        ledger=f"""A step is paid for in {paid["ms_a_step"]:.4f} ms of CPU (without waiting for the
disk), and {paid["steps"]:,} steps take {paid["bytes"]:,} bytes of the file: many are reserved at a
time, by one line. ε of that ledger at δ = 5e-10, for 10⁹ examples, takes {paid["epsilon_s"]:.2f} s.
The PLD accountant refuses a much smaller δ at so many steps, as its sums round; RDP takes any.""",
        small=table(
            ["", "CPU s"],
            [
                *([f"`import {name}`", f"{s:.2f}"] for name, s in found["imports"].items()),
                [
                    f"`gradient_bounds` of {found['bounds']['depth']} layers",
                    f"{found['bounds']['gradient_bounds_s']:.3f}",
                ],
                [
                    f"`PrivateModel.report` of {found['bounds']['depth']} layers",
                    f"{found['bounds']['report_s']:.3f}",
                ],
            ],
        ),
    )
    path.with_suffix(".md").write_text(text)


def main(values):
    if values.worker:
        from lipdp import startup

        startup.import_keras()
        print(json.dumps({"result": PARTS[values.worker](values), **record.provenance()}))
        return
    path = pathlib.Path(values.out)
    found = json.loads(path.read_text()) if path.exists() else {}
    for part in values.parts or [p for p in PARTS if p not in found]:
        print(part, file=sys.stderr)
        flags_of_it = [f"--{n}={values[n].value}" for n in ("examples", "batch_size", "draws")]
        command = [sys.executable, "-m", "experiments.scale", f"--worker={part}", *flags_of_it]
        output = subprocess.check_output(command, text=True, env=timing.variables())
        made = json.loads(output.splitlines()[-1])
        found[part] = made.pop("result")
        found.setdefault("made_with", {})[part] = made
        found["device"] = timing.machine()
        record.write(path, found)
    if set(PARTS) <= set(found):
        write_page(found, path)


def define_flags(define):
    text = f"To measure again: {', '.join(PARTS)}; or what is missing."
    define.names("parts", None, text, choices=tuple(PARTS))
    define.integer("examples", 10**9, "Of the simulated data set.", least=1)
    define.integer("batch_size", 4096, "Expected size of its batches.", least=1)
    define.integer("draws", 1000, "Number of batches drawn.", least=2)
    define.text("out", "docs/scale.json", "The JSON; the page is written beside it.")
    define.one_of("worker", None, list(PARTS), "Internal: one part, printed as JSON.")


if __name__ == "__main__":
    frame.start(main, define_flags)
