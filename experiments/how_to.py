"""Accuracies of the examples of docs/how_to_networks.md: `python -m experiments.how_to
--data=mnist.npz --example=convolutional --out=docs/results/how_to.jsonl`.

What runs is the code of the page. It finds `x`, `y`, `x_test` and `y_test` as the page says, and
where a part of it is public also `x_public` and `y_public`, the training images of `--public`.
`--validation=5000` holds so many training examples out, in place of the test set: settings were
chosen so. `--table` prints the page's table of the results in `--out`.
"""

import dataclasses
import pathlib
import re
import time

import numpy as np

from experiments import data, frame, pages, record, text

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "how_to_networks.md"

#: Examples, by the heading of their section.
EXAMPLES = {
    "convolutional": "A convolutional network",
    "frozen": "A frozen backbone with a private head",
    "lstm": "An LSTM",
    "transformer": "A transformer block",
    "lora": "LoRA",
    "subclassed": "A subclassed model",
    "outputs": "Several outputs",
    "autoencoder": "An autoencoder",
    "gan": "A GAN",
}
ON_TEXT = ("lstm", "transformer")
WITH_PUBLIC_PART = ("frozen", "lora")


@dataclasses.dataclass(frozen=True)
class Settings:
    """None: they are on the page."""


EXPERIMENT = frame.Experiment("how_to", Settings)


def codes(example):
    """The blocks of code in the section of an example."""
    page = PAGE.read_text("utf-8")
    section = re.search(rf"^## {EXAMPLES[example]}\n(.*?)(?=^## |\Z)", page, re.M | re.S)
    return re.findall(r"```python\n(.*?)```", section[1], re.S)


def images(path, held_out=0):
    """The arrays that the page's examples read, of a file of images."""
    found = data.load(path)
    found = found.held_out(held_out) if held_out else found
    x, x_test = (v.astype("float32") / 255 for v in (found.x_train, found.x_test))
    return {"x": x, "y": found.y_train, "x_test": x_test, "y_test": found.y_test}


def reviews(path, held_out=0):
    """The same, of a file of texts."""
    (x, y), (x_test, y_test), _ = text.load(path)
    if held_out:
        x, y, x_test, y_test = x[:-held_out], y[:-held_out], x[-held_out:], y[-held_out:]
    return {"x": x, "y": y, "x_test": x_test, "y_test": y_test}


def run(code, arrays):
    """Runs a block of the page; returns what it says, by name."""
    names = dict(arrays)
    exec(compile(code, PAGE.name, "exec"), names)
    return names


def of_generated(generator, x_test, y_test, count=20_000):
    """Accuracy on real images of a classifier that has seen generated ones only."""
    import keras

    digits = np.arange(count) % 10
    seeds = [np.random.default_rng(0).normal(size=(count, 32)), np.eye(10)[digits]]
    fakes = generator.predict(seeds, batch_size=1000, verbose=0)[:, :784]
    dense = keras.layers.Dense
    classifier = keras.Sequential([keras.Input((784,)), dense(128, activation="relu"), dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    classifier.compile("adam", loss, metrics=["accuracy"])
    classifier.fit(fakes, digits, batch_size=128, epochs=3, verbose=0)
    return classifier.evaluate(x_test * 2 - 1, y_test, verbose=0)[1]


def measure(values):
    """The result of an example, kept."""
    import keras

    path, example = frame.needed(values, "data"), values.example
    with frame.explained():
        arrays = (reviews if example in ON_TEXT else images)(path, values.validation)
        digest = record.sha256(path)
        if example in WITH_PUBLIC_PART:
            public = images(frame.needed(values, "public"))
            arrays |= {"x_public": public["x"], "y_public": public["y"]}
    held_out = f"{values.validation} held-out training examples"
    with EXPERIMENT.recorded(
        values,
        example=example,
        data={"file": pathlib.Path(path).name, "sha256": digest},
        evaluated_on=held_out if values.validation else "test set",
        code=codes(example)[0],
    ) as result:
        keras.utils.set_random_seed(values.seed)
        start = time.perf_counter()
        names = run(codes(example)[0], arrays)
        seconds = time.perf_counter() - start
        if example == "gan":
            x_test = arrays["x_test"].reshape(-1, 784)
            names["accuracy"] = of_generated(names["generator"], x_test, arrays["y_test"])
        result["accuracy"] = round(float(names["accuracy"]), 5)
        result |= record.spending(names["model"])
        result["weights"] = sum(int(np.prod(v.shape)) for v in names["model"].trainable_variables)
        result["seconds"] = round(seconds, 1)
    return result


def table(results):
    """The page's table."""
    found = {result["example"]: result for result in results}
    rows = []
    for name, heading in EXAMPLES.items():
        if name in found:
            result = found[name]
            title = f"[{heading}](#{heading.lower().replace(' ', '-')})"
            numbers = f"{result['weights']:,}", f"{100 * result['accuracy']:.1f}"
            rows.append([title, pathlib.Path(result["data"]["file"]).stem, *numbers])
    return pages.markdown(["example", "data", "weights trained", "accuracy, %"], rows, left=2)


def main(values):
    if values.table:
        print(table(frame.stored(values)))
        return
    result = measure(values)
    print(
        f"{result['example']}: {100 * result['accuracy']:.2f} % on the {result['evaluated_on']}, "
        f"{result['seconds']:.0f} s"
    )


def define_flags(define):
    define.text("data", None, "An .npz file: images, or token ids for examples on texts.")
    define.text("public", None, "An .npz file of images for the public part of an example.")
    define.one_of("example", "convolutional", EXAMPLES, "Which example.")
    define.text("out", None, "A .jsonl file, to which a run adds a line.")
    define.seed(0)
    define.integer("validation", 0, "Training examples to hold out.", least=0)
    define.switch("table", False, "Prints the table of the results in --out, no more.")


if __name__ == "__main__":
    frame.start(main, define_flags)
