"""Private anomaly classifiers on tables: `python -m experiments.tabular --data=FOLDER`.

`--data` is an `.npz` file with `X` (examples × features) and `y` (1 is an anomaly), as ADBench
publishes them, or a folder of such files. Each is split 80/20 by label; AUROC on the 20 %.
The same defaults serve every set. They follow from its size alone, and were chosen on parts of the
training examples of the sets in `TUNED_ON`, which `--validation` evaluates on; nobody looked at
the other sets for it.

Nothing of the private table is used for free. One noisy release, of a tenth of the budget,
counts each feature's values in cells of a public grid, and the anomalies; it stands in the ledger
beside the training. Features are then what the released counts make of an example: waves along
each feature's quantiles, and random waves across all of them, of norm one together. So a linear
model on them meets its bound with every example, and is not linear in the table.

`--out`, a `.jsonl` file, gets a line for each set; a set that has one already is left out.
`--table` makes `FILE.md` and `FILE.svg` of those in `--out`, without training.
"""

import dataclasses
import math
import pathlib
import statistics
import tempfile
import time

import numpy as np
from absl import app

from experiments import frame, pages, record, sums

#: Sets on whose training examples the defaults were chosen.
TUNED_ON = ("annthyroid", "cardio", "magic.gamma", "Pima", "satellite", "SpamBase")

#: Published AUROC at ε = 1: best run with clipping, and without (Béthune et al., ICLR 2024).
PUBLISHED = {
    "ALOI": (56.5, 56.2),
    "campaign": (90.0, 82.2),
    "celeba": (96.6, 96.5),
    "donors": (100.0, 100.0),
    "magic.gamma": (90.7, 89.7),
    "shuttle": (98.3, 99.4),
    "skin": (100.0, 99.8),
    "yeast": (66.8, 75.1),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of one run, all public.

    Attributes:
        share: of the budget (of 1/σ²) that the release of counts takes.
        cells: of the grid for each doubling of a feature's size.
        terms: waves along each feature.
        waves: random waves across all features.
        scale: standard deviation of the frequencies of those, over the root of the features.
        across: share of the squared norm that those have.
        batch_size: expected size of a Poisson batch: half of the examples, or this if it is less.
        steps, learning_rate: of SGD, decayed to zero along a cosine; 0 chooses by the examples.
        clip: of an example's loss gradient.
    """

    share: float = 0.1
    cells: int = 4
    terms: int = 6
    waves: int = 512
    scale: float = 2.0
    across: float = 0.5
    batch_size: int = 4096
    steps: int = 0
    learning_rate: float = 0.0
    clip: float = 0.3

    def for_size(self, examples: int) -> "Settings":
        """Completes the settings by the number of examples, which is public."""
        return dataclasses.replace(
            self,
            batch_size=min(self.batch_size, max(1, examples // 2)),
            steps=self.steps or min(max(60, examples // 60), 200),
            learning_rate=self.learning_rate or min(max(16.0, examples / 40), 256.0),
        )


# --- data -----------------------------------------------------------------------------------------


def load(path):
    """`X`, float64, and `y`, integers 0 and 1.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it does not hold a table with labels.
    """
    path = pathlib.Path(path)
    with np.load(path) as data:
        if missing := [key for key in ("X", "y") if key not in data]:
            raise ValueError(f"{path.name} lacks {', '.join(missing)}; it must hold X and y.")
        x, y = data["X"], data["y"]
    if x.ndim != 2 or x.dtype.kind not in "buif" or not np.isfinite(x).all():
        raise ValueError(
            f"X of {path.name} must be finite numbers (examples, features); got {x.dtype} of "
            f"shape {x.shape}."
        )
    if y.shape != x.shape[:1] or not np.isin(y, (0, 1)).all() or min(np.bincount(y, None, 2)) < 2:
        raise ValueError(
            f"y of {path.name} must be {len(x)} labels 0 and 1, at least two of each; got "
            f"shape {y.shape}."
        )
    return x.astype(np.float64), y.astype(np.int32)


def split(y, seed, share=0.2):
    """Masks of the examples to train on and of those held out, a share of either label."""
    generator = np.random.default_rng(seed)
    held_out = np.zeros(len(y), bool)
    for label in (0, 1):
        of_label = generator.permutation(np.flatnonzero(y == label))
        held_out[of_label[: max(1, round(share * len(of_label)))]] = True
    return ~held_out, held_out


# --- features -------------------------------------------------------------------------------------


def edges(cells):
    """Edges of the cells: both signs, from 2⁻¹⁴ to 2²⁴, so many for each doubling."""
    sizes = 2.0 ** (np.arange(-14 * cells, 24 * cells + 1) / cells)
    return np.concatenate([-sizes[::-1], sizes])


def count(x, y, cells):
    """Numbers of examples in each cell of each feature, and of anomalies behind them, in one array.

    An example adds one to a cell of each feature and at most one to the anomalies: it moves the
    array by `√(features + 1)` at most, whatever it is.
    """
    grid = edges(cells)
    counts = [np.bincount(np.searchsorted(grid, v), minlength=len(grid) + 1) for v in x.T]
    return np.append(np.ravel(counts), y.sum()).astype(np.float64)


def significant(noisy, features, std):
    """Released counts `(features, cells)` that exceed three standard deviations, others being 0;
    and the number of anomalies.
    """
    counts = noisy[:-1].reshape(features, -1)
    return np.where(counts > 3 * std, counts, 0.0), float(noisy[-1])


def quantiles(x, counts, cells):
    """Each value's place among the released counts, from 0 to 1; `(examples, features)`.

    Within a cell it grows along a line. Of a feature without counts it is public: `x/(1 + |x|)`
    brought to that range.
    """
    grid = edges(cells)
    places = np.empty(x.shape, np.float32)
    for feature, (values, count) in enumerate(zip(x.T, counts, strict=True)):
        if total := count.sum():
            places[:, feature] = np.interp(values, grid, np.cumsum(count)[:-1] / total)
        else:
            places[:, feature] = 0.5 + 0.5 * values / (1.0 + np.abs(values))
    return places


def waves(places, settings):
    """Features for a linear model, `(examples, d·terms + waves)`, half precision.

    Cosines of 1 to `terms` half waves along each place, the k-th weighed by 1/k; and cosines in
    random directions (Rahimi & Recht, 2007), always the same ones.
    """
    d = places.shape[1]
    generator = np.random.default_rng(0)
    directions = generator.normal(size=(d, settings.waves)) * 2 * settings.scale / math.sqrt(d)
    phases = generator.uniform(0, 2 * math.pi, settings.waves)
    k = np.arange(1, settings.terms + 1)
    along = math.sqrt((1 - settings.across) / (d * np.sum(0.5 / k**2)))
    across = math.sqrt(2 * settings.across / settings.waves)
    result = np.empty((len(places), d * settings.terms + settings.waves), np.float16)
    for start in range(0, len(places), 4096):
        part = places[start : start + 4096]
        single = np.cos(math.pi * part[:, :, None] * k) * (along / k)
        random = np.cos(part @ directions + phases) * across
        result[start : start + 4096] = np.hstack([single.reshape(len(part), -1), random])
    return result


# --- training -------------------------------------------------------------------------------------


def build_network(features, share):
    """A linear model on features of norm one, and the log-odds of a share of anomalies."""
    import keras

    from lipdp import layers

    inputs = keras.Input((features,))
    x = layers.FlooredNormalization(1.0, 0.1, center=False)(inputs)
    x = keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")(x)
    return keras.Model(inputs, keras.ops.add(x, math.log(share / (1 - share))), name="tabular")


def train(x, y, x_test, y_test, epsilon, delta, settings, seed=None):
    """Releases the counts, trains, and evaluates on the test part.

    Args:
        x, y: the private table.
        x_test, y_test: what it is evaluated on.
        epsilon, delta: the budget of both together.
        settings: `Settings`.
        seed: of noise and batches; None reads fresh entropy.

    Returns:
        What a result says of a run, a dict.
    """
    import keras
    from sklearn.metrics import roc_auc_score

    import lipdp

    start = time.perf_counter()
    keras.backend.clear_session()
    settings = settings.for_size(len(y))
    budget = lipdp.Budget(epsilon, delta)
    d = x.shape[1]
    with tempfile.TemporaryDirectory() as folder:
        ledger = pathlib.Path(folder) / "spent.ledger"
        sensitivity = math.sqrt(d + 1)
        noisy, noise_multiplier = sums.release(
            count(x, y, settings.cells),
            sensitivity,
            examples=len(y),
            budget=budget,
            share=settings.share,
            ledger=ledger,
            seed=seed,
        )
        counts, anomalies = significant(noisy, d, noise_multiplier * sensitivity)
        places = (quantiles(part, counts, settings.cells) for part in (x, x_test))
        features, test_features = (waves(part, settings) for part in places)
        model = lipdp.PrivateModel(
            build_network(features.shape[1], min(max(anomalies / len(y), 0.01), 0.5)),
            budget=budget,
            sampling=lipdp.PoissonSampling(settings.batch_size),
            clip=settings.clip,
            ledger=ledger,
            seed=seed,
        )
        model.compile(
            keras.optimizers.SGD(
                keras.optimizers.schedules.CosineDecay(settings.learning_rate, settings.steps)
            ),
            loss=lipdp.losses.BinaryCrossentropy(),
        )
        targets = y[:, None].astype("float32")
        model.fit(features, targets, steps_per_epoch=settings.steps, verbose=0)
        spent = record.spending(model)
    scores = model.network.predict(test_features, batch_size=8192, verbose=0)[:, 0]
    return {
        "auroc": round(float(roc_auc_score(y_test, scores)), 5),
        **spent,
        "release": {"noise_multiplier": noise_multiplier, "sampling": {"scheme": "full_batch"}},
        "settings": dataclasses.asdict(settings),
        "seed": seed,
        "seconds": round(time.perf_counter() - start, 1),
    }


def measure(path, values):
    """The result of one set, kept: a run for each seed, which also makes the split."""
    with frame.explained():
        x, y = load(path)
        digest = record.sha256(path)
    settings = EXPERIMENT.chosen(values)
    delta = values.delta or record.delta_of(len(y))
    on = "20 % of the training part" if values.validation else "20 %, held out by label"
    with EXPERIMENT.recorded(
        values,
        data={"name": name_of(path), "file": path.name, "sha256": digest},
        epsilon=values.epsilon,
        delta=delta,
        evaluated_on=on,
    ) as result:
        runs = []
        for seed in range(values.seeds):
            inside, outside = split(y, seed)
            x_train, y_train, x_test, y_test = x[inside], y[inside], x[outside], y[outside]
            if values.validation:
                inside, outside = split(y_train, seed)
                x_test, y_test = x_train[outside], y_train[outside]
                x_train, y_train = x_train[inside], y_train[inside]
            of_seed = (x_train, y_train, x_test, y_test, values.epsilon, delta, settings, seed)
            runs.append(train(*of_seed))
        result |= {
            "examples": len(y),
            "trained_on": len(y_train),
            "features": x.shape[1],
            "anomalies": round(float(y.mean()), 5),
            "auroc_median": statistics.median(run["auroc"] for run in runs),
            "runs": runs,
        }
    return result


def name_of(path):
    """`5_campaign.npz` is campaign."""
    return pathlib.Path(path).stem.partition("_")[2] or pathlib.Path(path).stem


# --- the table ------------------------------------------------------------------------------------


def write_table(results, path):
    """A Markdown table, and beside it a plot, of the results."""
    published = [r for r in results if r["data"]["name"] in PUBLISHED]
    others = [r for r in results if r["data"]["name"] not in PUBLISHED]
    results = published + sorted(others, key=lambda r: -r["examples"])
    seeds = min(len(r["runs"]) for r in results)
    text = (
        "Made by `python -m experiments.tabular --out=tabular.jsonl --table=tabular.md` "
        "of the results of `python -m experiments.tabular --data=adbench --out=tabular.jsonl`. "
        f"AUROC on held-out examples at ε = {results[0]['epsilon']:g}: median (least–largest) of "
        f"{seeds} seeds or more, each with a split of its own; * defaults were chosen on training "
        "examples of this set (which costs privacy, too, and is counted by no ε here), all others "
        "were left untouched. Published: best run with clipping, and without (Béthune et al., ICLR "
        "2024)."
    )
    head = ["set", "examples", "features", "anomalies", "δ", "lipdp", "best with clipping"]
    rows = [
        [
            f"{result['data']['name']}{'*' * (result['data']['name'] in TUNED_ON)}",
            f"{result['examples']:,}",
            f"{result['features']}",
            f"{100 * result['anomalies']:.1f} %",
            f"{result['delta']:.0e}",
            pages.spread([run["auroc"] for run in result["runs"]]),
            *map(str, PUBLISHED.get(result["data"]["name"], ("", ""))),
        ]
        for result in results
    ]
    table = pages.markdown([*head, "reference"], rows, left=1)
    pages.write(path, "Anomalies in tables", text, "AUROC of each set", table)
    _plot(results, pathlib.Path(path).with_suffix(".svg"))


def _plot(results, path):
    marks = (("x", "published, clipping"), ("+", "published, clipless"))
    places = np.arange(len(results))[::-1]
    with pages.plot(path, (7, 0.8 + 0.26 * len(results))) as axes:
        for place, result in zip(places, results, strict=True):
            values = [100 * run["auroc"] for run in result["runs"]]
            axes.plot([min(values), max(values)], [place, place], color="tab:blue", linewidth=2)
            axes.plot(statistics.median(values), place, "o", color="tab:blue", label="lipdp")
            published = PUBLISHED.get(result["data"]["name"], ())
            for value, (mark, label) in zip(published, marks, strict=False):
                axes.plot(value, place, mark, color="black", label=label)
        axes.set_yticks(places, [result["data"]["name"] for result in results])
        axes.set_xlabel(f"AUROC at ε = {results[0]['epsilon']:g} (median, least to largest seed)")
        axes.grid(axis="x", alpha=0.3)
        handles, labels = axes.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        axes.figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=3)


# --- the command ----------------------------------------------------------------------------------

EXPERIMENT = frame.Experiment("tabular", Settings)


def main(values):
    if values.table:
        write_table(frame.stored(values), values.table)
        return
    source, out = pathlib.Path(frame.needed(values, "data")), frame.results_file(values)
    paths = sorted(source.glob("*.npz")) if source.is_dir() else [source]
    if not paths:
        raise app.UsageError(f"--data={source} holds no .npz file.")
    # The large ones first: what fails for want of memory fails early.
    paths.sort(key=lambda path: -path.stat().st_size if path.exists() else 0)
    done = frame.stored(values) if out is not None and out.exists() else []
    done = {result["data"]["name"] for result in done}
    for number, path in enumerate(paths, start=1):
        name = name_of(path)
        progress = f"[{number}/{len(paths)}] {name}"
        if name in done:
            print(f"{progress}: has a result already", flush=True)
            continue
        runs = measure(path, values)["runs"]
        seconds = sum(run["seconds"] for run in runs)
        auroc = pages.spread([run["auroc"] for run in runs])
        print(f"{progress}: AUROC {auroc}, {seconds:.0f} s", flush=True)


def define_flags(define):
    EXPERIMENT.define_flags(
        define, "An .npz file with X and y, or a folder of them.", epsilon=1.0, delta=None
    )
    define.seeds_and_table()
    define.switch("validation", False, "Evaluate on a part of the training examples.")


if __name__ == "__main__":
    frame.start(main, define_flags)
