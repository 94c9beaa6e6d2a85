"""Private classifiers and two groups of people: `python -m experiments.fairness --data=FILE`.

`--data` is one of `adult`, `german_credit`, `law_school`, `compas_two_years`, as `.csv` or
`.csv.gz`. Accuracy, and by fairlearn the differences between the groups in demographic parity and
equalised odds, of a private model at `--epsilon` or, with `--plain`, of the same network trained
without privacy. The sensitive attribute is no feature, unless `--with_sensitive`; others still tell
much about it (in Adult `relationship` names wives and husbands).

Nothing is fitted to the private table beside the network: the ranges of numbers are written
here, from what the columns mean, and categories are hashed. One setting serves all tables and all
ε; it is that of the other tabular experiment, not tuned on these.

The networks are Lipschitz, which bounds how differently two people, or the mean members of two
groups, are scored: `certificate`.
"""

import csv
import dataclasses
import gzip
import math
import pathlib
import statistics
import time
import zlib

import numpy as np

from experiments import frame, pages, record
from experiments.tabular import split


@dataclasses.dataclass(frozen=True)
class Table:
    """The meaning of a table's columns; those not named are categories.

    Attributes:
        label: column, and the value that counts as positive.
        sensitive: column, the values of the one group, and the names of that and of the other.
        numbers: column and its range; beyond it a number is held at its end. A name with the
            prefix `log ` has its logarithm taken, of one more than it.
        dropped: columns that are no features.
    """

    label: tuple[str, str]
    sensitive: tuple[str, frozenset[str], tuple[str, str]]
    numbers: dict[str, tuple[float, float]]
    dropped: frozenset[str] = frozenset()


TABLES = {
    "adult": Table(
        ("income", ">50K"),
        ("sex", frozenset({"Male"}), ("men", "women")),
        {
            "age": (15, 90),
            "education-num": (1, 16),
            "log capital-gain": (0, 100_000),
            "log capital-loss": (0, 5000),
            "hours-per-week": (0, 100),
        },
        frozenset({"fnlwgt", "split"}),
    ),
    "german_credit": Table(
        ("credit", "1"),
        ("personal_status", frozenset({"A91", "A93", "A94"}), ("men", "women")),
        {
            "month": (0, 72),
            "log credit_amount": (100, 20_000),
            "investment_as_income_percentage": (1, 4),
            "residence_since": (1, 4),
            "age": (15, 90),
            "number_of_credits": (1, 4),
            "people_liable_for": (1, 2),
        },
    ),
    "law_school": Table(
        ("pass_bar", "1"),
        ("race", frozenset({"White"}), ("white", "non-white")),
        {
            "decile1b": (1, 10),
            "decile3": (1, 10),
            "lsat": (10, 48),
            "ugpa": (0, 4),
            "zfygpa": (-4, 4),
            "zgpa": (-4, 4),
        },
    ),
    "compas_two_years": Table(
        ("two_year_recid", "1"),
        ("race", frozenset({"African-American"}), ("African-American", "others")),
        {
            "age": (15, 90),
            "log juv_fel_count": (0, 10),
            "log juv_misd_count": (0, 10),
            "log juv_other_count": (0, 10),
            "log priors_count": (0, 40),
        },
        # Outcomes, the scores of the product that was studied, and dates of the case.
        frozenset(
            "is_recid is_violent_recid decile_score score_text v_decile_score v_score_text "
            "days_b_screening_arrest c_days_from_compas age_cat".split()
        ),
    ),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of one run, all public.

    Attributes:
        knots: hat functions over the range of a number.
        buckets: that the categories of a column are hashed to.
        width, depth: of the network; depth 1 is linear.
        temperature: of the cross-entropy; the logits lie between -1 and 1.
        batch_size: expected size of a Poisson batch: half of the examples, or this if it is less.
        steps, learning_rate: of SGD, decayed to zero along a cosine.
        clip: of an example's loss gradient.
    """

    knots: int = 8
    buckets: int = 64
    width: int = 32
    depth: int = 1
    temperature: float = 20.0
    batch_size: int = 4096
    steps: int = 60
    learning_rate: float = 4.0
    clip: float = 0.5


# --- data -----------------------------------------------------------------------------------------


def name_of(path):
    """`adult.csv.gz` is adult.

    Raises:
        ValueError: it is none of the tables known here.
    """
    name = pathlib.Path(path).name.partition(".")[0]
    if name not in TABLES:
        raise ValueError(
            f"--data must be a file named after one of {', '.join(TABLES)}; got {path}."
        )
    return name


def load(path):
    """The columns of a file, a dict of lists of strings.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column is missing, a row too short, or there are no rows.
    """
    table = TABLES[name_of(path)]
    opened = gzip.open if str(path).endswith(".gz") else open
    with opened(path, "rt", newline="", encoding="utf8") as file:
        header, *rows = list(csv.reader(file)) or [[]]
    needed = [table.label[0], table.sensitive[0], *(n.removeprefix("log ") for n in table.numbers)]
    if missing := [name for name in needed if name not in header]:
        raise ValueError(f"{pathlib.Path(path).name} lacks the columns {', '.join(missing)}.")
    if not rows or any(len(row) != len(header) for row in rows):
        raise ValueError(f"{pathlib.Path(path).name} must hold rows of {len(header)} values.")
    return dict(zip(header, map(list, zip(*rows, strict=True)), strict=True))


def encode(columns, table, settings, with_sensitive=False):
    """Features `(rows, ...)`, labels and membership of the first group, both 0 and 1.

    A number is spread over the two nearest of evenly spaced knots, a category sets one of the
    column's buckets to 1, and there is a constant. A number that is missing, or none, sets none.
    """
    label, positive = table.label
    sensitive, members, _ = table.sensitive
    same = np.array([value.removesuffix(".0") for value in columns[label]])
    parts = [np.ones((len(same), 1), np.float32)]
    numbers = {name.removeprefix("log "): name for name in table.numbers}
    for name, values in columns.items():
        if name == label or name in table.dropped or (name == sensitive and not with_sensitive):
            continue
        if name in numbers:
            low, high = table.numbers[numbers[name]]
            x = np.array([_number(value) for value in values])
            x = np.clip(x, low, high)
            if numbers[name] != name:
                x, low, high = np.log1p(x), math.log1p(low), math.log1p(high)
            place = (x - low) / (high - low) * (settings.knots - 1)
            hats = np.maximum(0.0, 1.0 - np.abs(place[:, None] - np.arange(settings.knots)))
            parts.append(np.nan_to_num(hats).astype(np.float32))
        else:
            buckets = [zlib.crc32(f"{name}={v}".encode()) % settings.buckets for v in values]
            parts.append(np.eye(settings.buckets, dtype=np.float32)[buckets])
    group = np.isin(columns[sensitive], list(members))
    return np.hstack(parts), (same == positive).astype(np.int32), group.astype(np.int32)


def _number(value):
    try:
        return float(value)
    except ValueError:
        return math.nan


# --- the certificate ------------------------------------------------------------------------------


def certificate(network, x, group, most=500, seed=0):
    """Bounds how far the mean scores of two groups can be apart, and says how far they are.

    Let f be the network, L its Lipschitz constant, and P the projection of inputs at its front,
    with `f(P(x)) = f(x)`. For any pairing of equally many members of either group

        |mean f(a) − mean f(b)| ≤ mean |f(Pa) − f(Pb)| ≤ L·mean ‖Pa − Pb‖,

    which the cheapest pairing makes L times the Wasserstein distance of the two samples. It holds
    for whatever weights training ends with, private or not, and so does the bound for any two
    people, `|f(a) − f(b)| ≤ L·‖Pa − Pb‖`.

    Args:
        network: a Keras model of one logit whose first layer is a `BallProjection`.
        x: inputs `(examples, ...)`.
        group: `(examples,)`, 1 for members of the first group, 0 for those of the second.
        most: members of a group that are compared, drawn at random, as many of either.
        seed: of that draw.

    Returns:
        A dict: `lipschitz`, `distance` of the samples, their `bound`, the `gap` of their means,
        `members` of either group, and `worst_pair`, the largest `|f(a) − f(b)|/(L·‖Pa − Pb‖)` of
        the pairs.

    Raises:
        ValueError: a group has no member, or the network does not begin with a ball projection.
    """
    from scipy import optimize, spatial

    from lipdp import bounds, layers

    front = network.layers[0]
    if not isinstance(front, layers.BallProjection):
        raise ValueError(
            f"`network` must begin with a BallProjection; it begins with {type(front).__name__}."
        )
    generator = np.random.default_rng(seed)
    rows = [np.flatnonzero(np.asarray(group) == member) for member in (1, 0)]
    count = min(len(rows[0]), len(rows[1]), most)
    if count == 0:
        raise ValueError("`group` must have members of both groups.")
    samples = [x[generator.choice(of, count, replace=False)] for of in rows]
    scores = [network.predict(s, verbose=0)[:, 0].astype(np.float64) for s in samples]
    projected = [np.asarray(front(s), np.float64).reshape(count, -1) for s in samples]
    lengths = spatial.distance.cdist(*projected)
    first, second = optimize.linear_sum_assignment(lengths)
    distance = float(lengths[first, second].mean())
    constant = float(bounds.network_bounds(network).lipschitz)
    differences = np.abs(scores[0][first] - scores[1][second])
    pairs = differences / np.maximum(constant * lengths[first, second], 1e-6)
    return {
        "lipschitz": constant,
        "distance": distance,
        "bound": constant * distance,
        "gap": float(abs(scores[0].mean() - scores[1].mean())),
        "worst_pair": float(pairs.max()),
        "members": count,
    }


# --- training -------------------------------------------------------------------------------------


def parts_of(columns, y, seed):
    """Masks of training and test rows: the table's own, or 80/20 by label."""
    if "split" in columns:
        inside = np.array(columns["split"]) == "train"
        return inside, ~inside
    return split(y, seed)


def train(data, test, epsilon, delta, settings, seed=None):
    """Trains and evaluates; without privacy where `epsilon` is None.

    Args:
        data, test: `(x, y, group)` each.
        epsilon, delta: the budget.
        settings: `Settings`.
        seed: of noise, batches and initial weights; None reads fresh entropy.

    Returns:
        What a result says of a run, a dict; and the network.
    """
    import keras
    from fairlearn import metrics

    import lipdp

    start = time.perf_counter()
    keras.backend.clear_session()
    if seed is not None:
        keras.utils.set_random_seed(seed)
    (x, y, _), (x_test, y_test, group) = data, test
    network = lipdp.models.mlp(x.shape[1:], 1, width=settings.width, depth=settings.depth)
    rate = keras.optimizers.schedules.CosineDecay(settings.learning_rate, settings.steps)
    loss = lipdp.losses.BinaryCrossentropy(settings.temperature)
    targets = y[:, None].astype("float32")
    batch_size = min(settings.batch_size, len(y) // 2)
    run = {}
    if epsilon is None:
        network.compile(keras.optimizers.SGD(rate), loss=loss)
        epochs = math.ceil(settings.steps * batch_size / len(y))
        network.fit(x, targets, batch_size=batch_size, epochs=epochs, verbose=0)
    else:
        model = lipdp.PrivateModel(
            network,
            budget=lipdp.Budget(epsilon, delta),
            sampling=lipdp.PoissonSampling(batch_size),
            clip=settings.clip,
            allocation="least",
            seed=seed,
        )
        model.compile(keras.optimizers.SGD(rate), loss=loss)
        model.fit(x, targets, steps_per_epoch=settings.steps, verbose=0)
        run = record.spending(model)
    says = (network.predict(x_test, batch_size=4096, verbose=0)[:, 0] > 0).astype(np.int32)
    differences = {
        name: round(float(metric(y_test, says, sensitive_features=group)), 5)
        for name, metric in (
            ("demographic_parity_difference", metrics.demographic_parity_difference),
            ("equalized_odds_difference", metrics.equalized_odds_difference),
        )
    }
    result = {
        "accuracy": round(float(np.mean(says == y_test)), 5),
        "majority": round(float(max(y_test.mean(), 1 - y_test.mean())), 5),
        **differences,
        "certificate": certificate(network, x_test, group),
        **run,
        "seed": seed,
        "seconds": round(time.perf_counter() - start, 1),
    }
    return result, network


def measure(values):
    """The result of one table, kept: a run for each seed."""
    path = frame.needed(values, "data")
    settings = EXPERIMENT.chosen(values)
    with frame.explained():
        name = name_of(path)
        columns = load(path)
        digest = record.sha256(path)
    x, y, group = encode(columns, TABLES[name], settings, values.with_sensitive)
    epsilon = None if values.plain else values.epsilon
    delta = values.delta or record.delta_of(len(y))
    privacy = {"epsilon": None} if values.plain else {"epsilon": epsilon, "delta": delta}
    with EXPERIMENT.recorded(
        values,
        data={"name": name, "sha256": digest},
        groups=TABLES[name].sensitive[2],
        examples=len(y),
        **privacy,
        with_sensitive=values.with_sensitive,
        settings=settings,
    ) as result:
        runs = []
        for seed in range(values.seeds):
            parts = parts_of(columns, y, seed)
            data, test = ((x[rows], y[rows], group[rows]) for rows in parts)
            runs.append(train(data, test, epsilon, delta, settings, seed)[0])
        result |= {
            "trained_on": int(parts[0].sum()),
            "accuracy_median": statistics.median(run["accuracy"] for run in runs),
            "runs": runs,
        }
    return result


# --- the table ------------------------------------------------------------------------------------

_COLUMNS = {
    "accuracy": "accuracy",
    "demographic_parity_difference": "demographic parity difference",
    "equalized_odds_difference": "equalised odds difference",
}


def write_table(results, path):
    """A Markdown table of the results, and a plot beside it."""
    order = {name: place for place, name in enumerate(TABLES)}
    results = sorted(results, key=lambda r: (order[r["data"]["name"]], r["epsilon"] or math.inf))
    text = (
        "Made by `python -m experiments.fairness --out=fairness.jsonl --table=fairness.md` of the "
        "results that `python -m experiments.fairness --data=adult.csv.gz --out=fairness.jsonl` "
        "and the like gave. Test set, in per cent: median (least–largest) over the seeds. Gap and "
        "bound are those of the groups' mean scores, of -1 to 1; medians."
    )
    rows = []
    for result in results:
        runs = result["runs"]
        spreads = [pages.spread([run[name] for run in runs]) for name in _COLUMNS]
        ends = [
            f"{statistics.median(run['certificate'][name] for run in runs):.3f}"
            for name in ("gap", "bound")
        ]
        epsilon = "plain" if result["epsilon"] is None else f"{result['epsilon']:g}"
        about = [result["data"]["name"], ", ".join(result["groups"]), epsilon]
        rows.append([*about, *spreads, *ends])
    head = ["table", "groups", "ε", *_COLUMNS.values(), "gap of scores", "certified ≤"]
    table = pages.markdown(head, rows, left=2)
    caption = "accuracy over demographic parity difference"
    pages.write(path, "Two groups of people", text, caption, table)
    with pages.plot(pathlib.Path(path).with_suffix(".svg"), (6, 4)) as axes:
        for name in order:
            of_table = [r for r in results if r["data"]["name"] == name]
            middles = [
                [100 * statistics.median(run[key] for run in r["runs"]) for r in of_table]
                for key in ("demographic_parity_difference", "accuracy")
            ]
            if of_table:
                axes.plot(*middles, "o-", label=name)
            for result, *place in zip(of_table, *middles, strict=True):
                epsilon = result["epsilon"]
                axes.annotate("plain" if epsilon is None else f"ε={epsilon:g}", place, fontsize=7)
        axes.set_xlabel("demographic parity difference, % (median)")
        axes.set_ylabel("accuracy, % (median)")
        axes.grid(alpha=0.3)
        axes.legend()


# --- the command ----------------------------------------------------------------------------------

EXPERIMENT = frame.Experiment("fairness", Settings)


def main(values):
    if values.table:
        write_table(frame.stored(values), values.table)
        return
    result = measure(values)
    said = [
        f"{shown} {pages.spread([run[name] for run in result['runs']])}"
        for name, shown in _COLUMNS.items()
    ]
    how = "plain" if values.plain else f"ε = {values.epsilon:g}"
    print(f"{result['data']['name']}, {how}:", *said)


def define_flags(define):
    EXPERIMENT.define_flags(
        define, f"One of the tables {', '.join(TABLES)}, .csv or .csv.gz.", epsilon=1.0, delta=None
    )
    define.seeds_and_table()
    define.switch("plain", False, "Train without privacy instead.")
    define.switch("with_sensitive", False, "Use the sensitive attribute as a feature.")


if __name__ == "__main__":
    frame.start(main, define_flags)
