"""Honest runs, audited: `python -m experiments.audit`.

A private linear classifier on scikit-learn's digits within a blank frame, with canaries among
them: one lit pixel of the frame, with each label. No digit reaches those weights, so that nothing
but the noise hides a canary. Full batches, for which the claim is exact. For each epsilon a run,
its claim, and the lower bounds that the canaries prove.
"""

import json
import pathlib
import time

import numpy as np

from experiments import digits, frame

FRAME = 8  # pixels on each side of a digit


def audited(values, epsilon, train_data, test_data):
    """Trains with canaries; returns what the run claims and what the audit proves."""
    import keras

    import lipdp
    from lipdp import audit, layers

    keras.utils.set_random_seed(values.seed)
    side = train_data[0].shape[1]
    network = keras.Sequential(
        [
            keras.Input((side, side)),
            keras.layers.Flatten(),
            layers.BallProjection(1.0),
            layers.SpectralDense(10, use_bias=False),
        ]
    )
    model = lipdp.PrivateModel(
        network,
        budget=lipdp.Budget(epsilon, values.delta),
        sampling=lipdp.FullBatch(),
        clip=0.2,
        seed=values.seed,
    )
    model.compile(
        keras.optimizers.SGD(values.learning_rate),
        loss=lipdp.losses.SparseCategoricalCrossentropy(temperature=20.0),
        metrics=["accuracy"],
        max_sample_weight=1.0,
    )
    x, y = audit.orthogonal_canaries((side, side), classes=10)
    inside = x[:, FRAME:-FRAME, FRAME:-FRAME].any(axis=(1, 2))
    one = audit.OneRun(x[~inside], y[~inside], seed=values.seed)
    x, y, weights = one.blank(*train_data)
    watch = one.watch()
    start = time.perf_counter()
    model.fit(x, y, sample_weight=weights, epochs=values.epochs, callbacks=[watch], verbose=0)
    seconds = time.perf_counter() - start
    _, accuracy = model.evaluate(*test_data, verbose=0)
    found = {"white_box": watch.scores, "black_box": watch.loss_scores}
    found = {name: one.result(scores, model) for name, scores in found.items()}
    members = audit.infer_membership(model, train_data, test_data, claim=model, temperature=20.0)
    for result in (*found.values(), members):
        print(result)
    return {
        "claimed_epsilon": round(model.spent().epsilon, 6),
        "delta": values.delta,
        "steps": model.spent().steps,
        "noise_multiplier": round(model.noise_multiplier, 6),
        "test_accuracy": round(float(accuracy), 4),
        "seconds": round(seconds, 2),
        **{name: result.to_dict() for name, result in found.items()},
        "membership": members.to_dict(),
    }


def main(values):
    from lipdp import startup

    startup.import_keras()
    margins = ((0, 0), (FRAME, FRAME), (FRAME, FRAME))
    train_data, test_data = ((np.pad(x, margins), y) for x, y in digits.load())
    results = [audited(values, float(e), train_data, test_data) for e in values.epsilons]
    line = json.dumps({"dataset": "digits", "seed": values.seed, "runs": results})
    if values.out:
        pathlib.Path(values.out).write_text(line + "\n")
    print(line)


def define_flags(define):
    define.numbers("epsilons", ["1", "3"], "Budgets, one run each.")
    define.delta(1e-5, "Delta of the budgets.")
    define.integer("epochs", 20, "Steps, each on the whole data set.", least=1)
    define.number("learning_rate", 5.0, "Of SGD.", least=0.0)
    define.integer("seed", 0, "Of coins, batches and noise.", least=0)
    define.text("out", None, "File to which the results are written as well.")


if __name__ == "__main__":
    frame.start(main, define_flags)
