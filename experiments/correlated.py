"""Gains of correlated noise: `python -m experiments.correlated --out=JSON --plot=SVG`.

Nothing is trained: the noise of each kind is calibrated to the same budgets, and compared by the
root mean square, over the steps of a run, of its sum up to that step (see
`lipdp.noise.correlated.mean_error`). The network is, roughly, the sum of its updates.
"""

import json
import math
import pathlib

from experiments import frame, pages


def rms_noise(values, sampling, noise, epsilon, steps):
    """Root mean square of the sums of all noise so far, over the sensitivity of a step."""
    import numpy as np

    import accountants
    from lipdp.noise.correlated import mean_error

    multiplier = accountants.calibrate_noise_multiplier(
        epsilon=epsilon,
        delta=values.delta,
        sampling=sampling,
        num_examples=values.num_examples,
        steps=steps,
    )
    if noise is None:
        column = np.eye(1, steps)[0]
    else:
        column = noise.coefficients(sampling, values.num_examples, steps)
    return multiplier * math.sqrt(mean_error(column))


def compute(values):
    """Settings, and for each epsilon the ratios to independent noise by the number of bands."""
    import lipdp

    size, epochs = values.batch_size, values.epochs
    independent = lipdp.PoissonSampling(size)
    steps = epochs * independent.steps_per_epoch(values.num_examples)
    curves = {}
    for epsilon in map(float, values.epsilons):
        base = rms_noise(values, independent, None, epsilon, steps)
        ratios = {}
        for bands in map(int, values.bands):
            scheme = lipdp.CyclicPoisson(size, bands=bands)
            ratios[bands] = rms_noise(values, scheme, lipdp.BandedNoise(), epsilon, steps) / base
        scheme = lipdp.FixedEpochs(size, epochs=epochs)
        whole = rms_noise(values, scheme, lipdp.ToeplitzNoise(), epsilon, steps) / base
        curves[f"{epsilon:g}"] = {**ratios, "whole run": whole}
        print(f"epsilon {epsilon:g}:", {k: round(v, 3) for k, v in curves[f"{epsilon:g}"].items()})
    names = ("num_examples", "batch_size", "epochs", "delta")
    return {"settings": {n: getattr(values, n) for n in names}, "steps": steps, "curves": curves}


def plot(found, path):
    """The ratios over the bands, a line for each epsilon; dashed, that of the whole run."""
    with pages.plot(path, (6.4, 3.8), fonttype="none") as axes:
        axes.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
        for index, (epsilon, curve) in enumerate(found["curves"].items()):
            colour = f"C{index % 10}"
            bands = [int(b) for b in curve if b != "whole run"]
            ratios = [curve[b] for b in curve if b != "whole run"]
            axes.plot(bands, ratios, marker="o", color=colour, label=f"ε = {epsilon}")
            axes.axhline(curve["whole run"], color=colour, linestyle="--", linewidth=1)
        label = "bands (dashed: whole run, 3 buffers)"
        axes.set(xscale="log", xticks=bands, xticklabels=bands, xlabel=label)
        axes.minorticks_off()
        axes.set_ylabel("noise in sums of updates,\nover independent noise")
        axes.set_ylim(0, None)
        axes.legend(frameon=False)


def main(values):
    from lipdp import startup

    startup.import_keras()
    found = json.loads(json.dumps(compute(values)))
    if values.out:
        pathlib.Path(values.out).write_text(json.dumps(found, indent=1) + "\n")
    if values.plot:
        plot(found, values.plot)


def define_flags(define):
    define.numbers("epsilons", ["1", "3", "8"], "Privacy budgets.")
    define.delta(1e-5, "Of each of them.")
    define.numbers("bands", ["1", "2", "4", "8", "16", "32"], "Of banded noise.", int)
    define.integer("num_examples", 60_000, "Of the data set.", least=1)
    define.integer("batch_size", 1024, "Expected size of a batch.", least=1)
    define.integer("epochs", 5, "Passes over the data.", least=1)
    define.text("out", None, "JSON file of the result.")
    define.text("plot", None, "SVG file of the figure.")


if __name__ == "__main__":
    frame.start(main, define_flags)
