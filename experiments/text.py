"""Private sentiment of reviews: `python -m experiments.text --data=imdb_tokens.npz --epsilon=1`.

`--data` is an `.npz` with token ids `x_train`, `x_test` `(reviews, length)`, labels 0 and 1
`y_train`, `y_test`, and optionally `words`, whose number is the vocabulary. Ids 0 to 2 are padding,
start and out of vocabulary, and are left out.

Two networks. `bag`: which words a review has, brought to norm one, and a linear model; one review
moves its gradient by exactly the bound. `embedding`: `lipdp.models.text_classifier`, the mean of
learnt vectors; its bound is met by a review that repeats a single word, real ones stay near a
seventh of it. In the bag frequent words weigh less, by the number of reviews that have a word;
these numbers are released with noise out of the same budget.

No use is made of the order of the ids. But which words have an id at all was counted in the
training reviews by whoever made the file: that choice is not covered by the guarantee.
"""

import dataclasses
import math
import pathlib
import statistics
import tempfile
import time

import numpy as np

from experiments import frame, pages, record, sums

NETWORKS = ("bag", "embedding")
_SPECIAL = 3  # ids that are no words


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of one run, all public; chosen at ε = 1 on the last 5,000 training reviews.

    Attributes:
        share: of the budget (of 1/σ²) that the release of frequencies takes; `bag` only.
        power: a word weighs its number of reviews to the power of minus this; `bag` only.
        width, depth: of `embedding`.
        batch_size: expected size of a Poisson batch.
        steps, learning_rate: of SGD, decayed to zero along a cosine.
        clip: of an example's loss gradient.
        temperature: of the cross-entropy.
    """

    share: float = 0.1
    power: float = 0.5
    width: int = 16
    depth: int = 1
    batch_size: int = 4096
    steps: int = 20
    learning_rate: float = 256.0
    clip: float = 0.5
    temperature: float = 1.0


#: What a network changes of the settings.
CHANGES = {"bag": {}, "embedding": {"learning_rate": 32.0, "clip": 0.7, "temperature": 20.0}}


def load(path):
    """Token ids, int32, and labels, of the training and the test part; size of the vocabulary.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an array is missing or not what it should be.
    """
    path = pathlib.Path(path)
    arrays = {}
    with np.load(path) as data:
        keys = ("x_train", "y_train", "x_test", "y_test")
        if missing := [key for key in keys if key not in data]:
            raise ValueError(f"{path.name} lacks {', '.join(missing)}; it must hold {keys}.")
        arrays = {key: data[key] for key in keys}
        # Without a list of words the largest id says how many there are, and is taken as public.
        vocabulary = len(data["words"]) if "words" in data else None
    for part in ("train", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if x.ndim != 2 or x.dtype.kind not in "iu" or not x.size or x.min() < 0:
            raise ValueError(
                f"x_{part} must be token ids (reviews, length), integers from 0 on; got "
                f"{x.dtype} of shape {x.shape}."
            )
        if y.shape != x.shape[:1] or not np.isin(y, (0, 1)).all():
            raise ValueError(f"y_{part} must be {len(x)} labels 0 and 1; got shape {y.shape}.")
    largest = max(int(arrays["x_train"].max()), int(arrays["x_test"].max())) + 1
    if vocabulary is not None and largest > vocabulary:
        raise ValueError(f"{path.name} has ids up to {largest - 1} but {vocabulary} words.")
    parts = [
        (arrays[f"x_{part}"].astype(np.int32), arrays[f"y_{part}"].astype(np.int32))
        for part in ("train", "test")
    ]
    return *parts, vocabulary or largest


def bags(tokens, vocabulary):
    """The words that a review has: `(reviews, words)`, 0 and 1 in half precision."""
    result = np.zeros((len(tokens), vocabulary), np.float16)
    result[np.arange(len(tokens))[:, None], tokens] = 1
    return result[:, _SPECIAL:]


def weights_of(noisy, std, power):
    """Weights of words, from released numbers of reviews; below two deviations these are noise."""
    return np.maximum(noisy, 2 * std) ** -power


def build_network(name, length, vocabulary, settings):
    import keras

    from lipdp import layers, models

    if name == "embedding":
        return models.text_classifier(
            vocabulary, length, 1, width=settings.width, depth=settings.depth
        )
    return keras.Sequential(
        [
            keras.Input((vocabulary - _SPECIAL,)),
            layers.FlooredNormalization(1.0, 1e-3, center=False),
            keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros"),
        ],
        name="bag",
    )


def train(data, name, epsilon, delta, settings, seed=None):
    """Trains on the first part of the data and evaluates on the second.

    Args:
        data: `(x, y), (x_test, y_test), vocabulary`.
        name: of `NETWORKS`.
        epsilon, delta: the budget.
        settings: `Settings`.
        seed: of noise, batches and initial weights; None reads fresh entropy.

    Returns:
        What a result says of a run, a dict.
    """
    import keras

    import lipdp

    start = time.perf_counter()
    keras.backend.clear_session()
    if seed is not None:
        keras.utils.set_random_seed(seed)
    (x, y), (x_test, y_test), vocabulary = data
    network = build_network(name, x.shape[1], vocabulary, settings)
    budget = lipdp.Budget(epsilon, delta)
    release = None
    with tempfile.TemporaryDirectory() as folder:
        ledger = pathlib.Path(folder) / "spent.ledger"
        if name == "bag":
            # A review has `length` words at most, each once.
            sensitivity = math.sqrt(x.shape[1])
            x, x_test = bags(x, vocabulary), bags(x_test, vocabulary)
            noisy, noise_multiplier = sums.release(
                x.sum(axis=0, dtype=np.float64),
                sensitivity,
                examples=len(y),
                budget=budget,
                share=settings.share,
                ledger=ledger,
                seed=seed,
            )
            weights = weights_of(noisy, noise_multiplier * sensitivity, settings.power)
            for part in (x, x_test):
                part *= (weights / weights.max()).astype(np.float16)
            release = {"noise_multiplier": noise_multiplier, "sampling": {"scheme": "full_batch"}}
        model = lipdp.PrivateModel(
            network,
            budget=budget,
            sampling=lipdp.PoissonSampling(min(settings.batch_size, len(y))),
            clip=settings.clip,
            physical_batch_size=512,
            allocation="least",
            ledger=ledger,
            seed=seed,
        )
        model.compile(
            keras.optimizers.SGD(
                keras.optimizers.schedules.CosineDecay(settings.learning_rate, settings.steps)
            ),
            loss=lipdp.losses.BinaryCrossentropy(settings.temperature),
        )
        targets = y[:, None].astype("float32")
        model.fit(x, targets, steps_per_epoch=settings.steps, verbose=0)
        spent = record.spending(model)
    logits = network.predict(x_test, batch_size=2000, verbose=0)[:, 0]
    return {
        "accuracy": round(float(np.mean((logits > 0) == (y_test == 1))), 5),
        **spent,
        "release": release,
        "seed": seed,
        "seconds": round(time.perf_counter() - start, 1),
    }


def measure(values):
    """The result, kept: a run for each seed."""
    path, held_out = frame.needed(values, "data"), values.validation
    with frame.explained():
        (x, y), test, vocabulary = load(path)
        digest = record.sha256(path)
        if held_out:
            if not held_out < len(y):
                raise ValueError(f"--validation must be below {len(y)}, the training reviews.")
            test = (x[-held_out:], y[-held_out:])
            x, y = x[:-held_out], y[:-held_out]
    data = ((x, y), test, vocabulary)
    settings = EXPERIMENT.chosen(values, Settings(**CHANGES[values.network]))
    with EXPERIMENT.recorded(
        values,
        data={"file": pathlib.Path(path).name, "sha256": digest},
        network=values.network,
        trained_on=len(y),
        epsilon=values.epsilon,
        delta=values.delta,
        evaluated_on=f"{held_out} training reviews, held out" if held_out else "test set",
        settings=settings,
    ) as result:
        budget = (values.epsilon, values.delta)
        runs = [
            train(data, values.network, *budget, settings, seed) for seed in range(values.seeds)
        ]
        result["accuracy_median"] = statistics.median(run["accuracy"] for run in runs)
        result["runs"] = runs
    return result


# --- the table ------------------------------------------------------------------------------------


def write_table(results, path):
    """A Markdown table of the results, and a plot beside it."""
    results = sorted(results, key=lambda r: (r["network"], r["epsilon"]))
    text = (
        "Made by `python -m experiments.text --out=text.jsonl --table=text.md` of the results that "
        "`python -m experiments.text --data=imdb_tokens.npz --out=text.jsonl --epsilon=…` gave. "
        "Accuracy on the test set: median (least–largest) over the seeds. Which words have "
        "an id was counted in the training reviews by whoever made the file; no ε covers that."
    )
    rows = []
    for result in results:
        accuracies = [run["accuracy"] for run in result["runs"]]
        numbers = [f"{result['epsilon']:g}", f"{result['delta']:.0e}", str(len(accuracies))]
        rows.append([result["network"], *numbers, pages.spread(accuracies)])
    table = pages.markdown(["network", "ε", "δ", "seeds", "accuracy"], rows, left=1)
    pages.write(path, "Sentiment of reviews", text, "accuracy over ε", table)
    with pages.plot(pathlib.Path(path).with_suffix(".svg"), (5, 3.2)) as axes:
        for name in NETWORKS:
            points = [
                (r["epsilon"], [100 * run["accuracy"] for run in r["runs"]])
                for r in results
                if r["network"] == name
            ]
            if points:
                pages.errorbars(axes, points, fmt="o-", label=name)
        axes.set_xlabel("ε")
        axes.set_ylabel("accuracy, % (median, least to largest seed)")
        axes.grid(alpha=0.3)
        axes.legend()


# --- the command ----------------------------------------------------------------------------------

EXPERIMENT = frame.Experiment("text", Settings)


def main(values):
    if values.table:
        write_table(frame.stored(values), values.table)
        return
    result = measure(values)
    accuracies = [run["accuracy"] for run in result["runs"]]
    seconds = sum(run["seconds"] for run in result["runs"])
    print(
        f"{values.network}, ε = {values.epsilon:g}: accuracy {pages.spread(accuracies)} on the "
        f"{result['evaluated_on']}, {seconds:.0f} s"
    )


def define_flags(define):
    EXPERIMENT.define_flags(
        define, "An .npz file of token ids.", epsilon=1.0, networks=NETWORKS, network="bag"
    )
    define.seeds_and_table()
    define.integer("validation", 0, "Training reviews to hold out.", least=0)


if __name__ == "__main__":
    frame.start(main, define_flags)
