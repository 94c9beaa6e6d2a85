"""What `fit` reaches where nothing is said: `python -m experiments.defaults --data=mnist.npz`.

The network is made, `PrivateModel` gets a budget, `compile` a loss, `fit` the data. Batches,
epochs, way of bounding, optimizer and learning rate are chosen by lipdp. `--data` is `digits`, from
scikit-learn, or a file that another experiment reads: images, `imdb_tokens.npz` (bags of
words) or `adult.csv.gz`. `--validation=5000` holds so many training examples out, in place of the
test set. `--rate=3` trains with three times the learning rate that is chosen, all else the same: to
see how good the choice is, on held-out examples.
"""

import dataclasses
import pathlib
import statistics
import time

import numpy as np

from experiments import data, digits, fairness, frame, pages, record, text

NETWORKS = ("linear", "mlp", "cnn", "certified linear", "certified mlp")
_WORDS = 5000  # the most frequent ones


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is changed of the choices: nothing, by default.

    Attributes:
        rate: times the learning rate that is chosen.
        epochs: passes over the data; 0 leaves the choice.
        examples: the first so many are trained on; 0 takes all.
    """

    rate: float = 1.0
    epochs: int = 0
    examples: int = 0


# --- data -----------------------------------------------------------------------------------------


def load(source):
    """Name of the data, and `(x, y), (x_test, y_test)` of float32 inputs and integer labels.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it holds something else.
    """
    name = pathlib.Path(source).name.partition(".")[0]
    if name == "digits":
        return name, *digits.load()
    if name in fairness.TABLES:
        columns = fairness.load(source)
        x, y, _ = fairness.encode(columns, fairness.TABLES[name], fairness.Settings())
        return name, *((x[rows], y[rows]) for rows in fairness.parts_of(columns, y, 0))
    if name.startswith("imdb"):
        train, test, vocabulary = text.load(source)
        parts = [
            (text.bags(x, vocabulary)[:, :_WORDS].astype("float32"), y) for x, y in (train, test)
        ]
        return name, *parts
    found = data.load(source)
    scaled = (x.astype("float32") / 255 for x in (found.x_train, found.x_test))
    return name, *zip(scaled, (found.y_train, found.y_test), strict=True)


def build_network(name, shape, classes):
    """A small network of a kind that anybody would try first."""
    import keras

    from lipdp import layers

    K = keras.layers
    flat = [K.Flatten()] if len(shape) > 1 else []
    length = float(np.prod(shape)) ** 0.5 / 4
    bodies = {
        "linear": [*flat, K.Dense(classes)],
        "mlp": [*flat, K.Dense(128, activation="relu"), K.Dense(classes)],
        "certified linear": [*flat, layers.BallProjection(length), layers.SpectralDense(classes)],
        "certified mlp": [
            *(*flat, layers.BallProjection(length), layers.SpectralDense(32), layers.GroupSort()),
            layers.SpectralDense(classes),
        ],
    }
    if name == "cnn":  # that of the classic tutorials
        bodies["cnn"] = [
            K.Conv2D(16, 8, strides=2, padding="same", activation="tanh"),
            K.MaxPooling2D(2, strides=1),
            K.Conv2D(32, 4, strides=2, activation="tanh"),
            K.MaxPooling2D(2, strides=1),
            *(K.Flatten(), K.Dense(32, activation="tanh"), K.Dense(classes)),
        ]
    return keras.Sequential([keras.Input(shape), *bodies[name]], name=name.replace(" ", "_"))


# --- training -------------------------------------------------------------------------------------


def train(train_data, test_data, name, epsilon, delta, settings, seed=None):
    """Trains with the defaults and evaluates; returns what a result says of a run, a dict."""
    import keras

    import lipdp
    from lipdp.training.defaults import default_optimizer

    start = time.perf_counter()
    keras.backend.clear_session()
    if seed is not None:
        keras.utils.set_random_seed(seed)
    x, y = (part[: settings.examples or None] for part in train_data)
    network = build_network(name, x.shape[1:], int(train_data[1].max()) + 1)
    model = lipdp.PrivateModel(network, budget=lipdp.Budget(epsilon, delta), seed=seed)
    loss, optimizer = "sparse_categorical_crossentropy", None
    if settings.rate != 1:
        plan = lipdp.plan(
            network, num_examples=len(y), budget=model.budget, epochs=settings.epochs or None
        )
        decay = keras.optimizers.schedules.CosineDecay(
            settings.rate * plan.learning_rate, plan.steps
        )
        optimizer = default_optimizer(decay)
    model.compile(optimizer, loss=loss, metrics=["accuracy"])
    model.fit(x, y, epochs=settings.epochs or None, verbose=0)
    logits = network.predict(test_data[0], batch_size=1000, verbose=0)
    return {
        "accuracy": round(float(np.mean(logits.argmax(axis=-1) == test_data[1])), 5),
        **record.spending(model),
        "signal": model.plan.signal,
        "seed": seed,
        "seconds": round(time.perf_counter() - start, 1),
    }


EXPERIMENT = frame.Experiment("defaults", Settings)


def measure(values):
    """The result, kept: a run for each seed."""
    held_out = values.validation
    with frame.explained():
        name, (x, y), test = load(frame.needed(values, "data"))
        if held_out:
            if not held_out < len(y):
                raise ValueError(f"--validation must be below {len(y)}, the training examples.")
            test = (x[-held_out:], y[-held_out:])
            x, y = x[:-held_out], y[:-held_out]
    settings = EXPERIMENT.chosen(values)
    trained_on = min(len(y), settings.examples or len(y))
    with EXPERIMENT.recorded(
        values,
        data=name,
        network=values.network,
        trained_on=trained_on,
        epsilon=values.epsilon,
        delta=values.delta,
        evaluated_on=f"{held_out} training examples, held out" if held_out else "test set",
        first_seed=values.first_seed,
        settings=settings,
    ) as result:
        seeds = range(values.first_seed, values.first_seed + values.seeds)
        about = (values.network, values.epsilon, values.delta, settings)
        runs = [train((x, y), test, *about, seed) for seed in seeds]
        result["accuracy_median"] = statistics.median(run["accuracy"] for run in runs)
        result["runs"] = runs
    return result


# --- the table ------------------------------------------------------------------------------------


def table(results):
    """A Markdown table of results; those of one task are put together."""
    tasks = {}
    for result in results:
        rate = result["settings"]["rate"]
        about = (result["data"], result["network"], result["trained_on"], result["epsilon"], rate)
        tasks.setdefault((*about, result["evaluated_on"]), []).extend(result["runs"])
    rows = []
    for (name, network, examples, epsilon, rate, evaluated_on), runs in sorted(tasks.items()):
        accuracies = [run["accuracy"] for run in runs]
        about = [name, network, f"{examples:,}", f"{epsilon:g}", f"{rate:g}", evaluated_on]
        rows.append([*about, str(len(runs)), pages.spread(accuracies)])
    head = ["data", "network", "trained on", "ε", "rate", "evaluated on", "seeds", "accuracy"]
    return pages.markdown(head, rows, left=2)


# --- the command ----------------------------------------------------------------------------------


def main(values):
    if values.table:
        pathlib.Path(values.table).write_text(table(frame.stored(values)) + "\n", "utf-8")
        return
    result = measure(values)
    accuracies = [run["accuracy"] for run in result["runs"]]
    seconds = sum(run["seconds"] for run in result["runs"])
    print(
        f"{result['data']}, {values.network}, ε = {values.epsilon:g}, rate {values.rate or 1:g}: "
        f"accuracy {pages.spread(accuracies)} on the {result['evaluated_on']}, {seconds:.0f} s"
    )


def define_flags(define):
    text = "digits, or the file of images, reviews or a table."
    EXPERIMENT.define_flags(define, text, epsilon=3.0, networks=NETWORKS, network="linear")
    define.seeds_and_table()
    define.integer("first_seed", 0, "The first of the seeds.", least=0)
    define.integer("validation", 0, "Training examples to hold out.", least=0)


if __name__ == "__main__":
    frame.start(main, define_flags)
