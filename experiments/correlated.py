"""What correlated noise gains: `python -m experiments.correlated --out=JSON --plot=SVG`.

Nothing is trained: the noise of each kind is calibrated to the same budgets, and compared by the
root mean square, over the steps of a run, of its sum up to that step (see
`lipdp.noise.correlated.mean_error`). The network is, roughly, the sum of its updates.
"""

import json
import math
import pathlib

from absl import app, flags

FLAGS = flags.FLAGS


def rms_noise(sampling, noise, epsilon, steps):
    """Of the sums of all noise so far, in units of the sensitivity of a step."""
    import numpy as np

    import accountants
    from lipdp.noise.correlated import mean_error

    multiplier = accountants.calibrate_noise_multiplier(
        epsilon=epsilon,
        delta=FLAGS.delta,
        sampling=sampling,
        num_examples=FLAGS.num_examples,
        steps=steps,
    )
    if noise is None:
        column = np.eye(1, steps)[0]
    else:
        column = noise.coefficients(sampling, FLAGS.num_examples, steps)
    return multiplier * math.sqrt(mean_error(column))


def compute():
    """Settings, and for each epsilon the ratios to independent noise by the number of bands."""
    import lipdp

    size, epochs = FLAGS.batch_size, FLAGS.epochs
    independent = lipdp.PoissonSampling(size)
    steps = epochs * independent.steps_per_epoch(FLAGS.num_examples)
    curves = {}
    for epsilon in map(float, FLAGS.epsilons):
        base = rms_noise(independent, None, epsilon, steps)
        ratios = {}
        for bands in map(int, FLAGS.bands):
            scheme = lipdp.CyclicPoisson(size, bands=bands)
            ratios[bands] = rms_noise(scheme, lipdp.BandedNoise(), epsilon, steps) / base
        scheme = lipdp.FixedEpochs(size, epochs=epochs)
        whole = rms_noise(scheme, lipdp.ToeplitzNoise(), epsilon, steps) / base
        curves[f"{epsilon:g}"] = {**ratios, "whole run": whole}
        print(f"epsilon {epsilon:g}:", {k: round(v, 3) for k, v in curves[f"{epsilon:g}"].items()})
    names = ("num_examples", "batch_size", "epochs", "delta")
    return {"settings": {n: getattr(FLAGS, n) for n in names}, "steps": steps, "curves": curves}


def plot(found, path):
    """The ratios over the bands, a line for each epsilon; dashed, that of the whole run."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    axes.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
    for index, (epsilon, curve) in enumerate(found["curves"].items()):
        colour = f"C{index % 10}"
        bands = [int(b) for b in curve if b != "whole run"]
        ratios = [curve[b] for b in curve if b != "whole run"]
        axes.plot(bands, ratios, marker="o", color=colour, label=f"ε = {epsilon}")
        axes.axhline(curve["whole run"], color=colour, linestyle="--", linewidth=1)
    axes.set(
        xscale="log", xticks=bands, xticklabels=bands, xlabel="bands (dashed: whole run, 3 buffers)"
    )
    axes.minorticks_off()
    axes.set_ylabel("noise in sums of updates,\nover independent noise")
    axes.set_ylim(0, None)
    axes.legend(frameon=False)
    # Text stays text, and the same results make the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lipdp"}):
        figure.savefig(path, format="svg", metadata={"Date": None})


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments: {' '.join(argv[1:])}")
    found = json.loads(json.dumps(compute()))
    if FLAGS.out:
        pathlib.Path(FLAGS.out).write_text(json.dumps(found, indent=1) + "\n")
    if FLAGS.plot:
        plot(found, FLAGS.plot)


if __name__ == "__main__":
    flags.DEFINE_list("epsilons", ["1", "3", "8"], "Privacy budgets.")
    flags.DEFINE_float("delta", 1e-5, "Of each of them.", 0.0, 1.0)
    flags.DEFINE_list("bands", ["1", "2", "4", "8", "16", "32"], "Of banded noise.")
    flags.DEFINE_integer("num_examples", 60_000, "Of the data set.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 1024, "Expected size of a batch.", lower_bound=1)
    flags.DEFINE_integer("epochs", 5, "Passes over the data.", lower_bound=1)
    flags.DEFINE_string("out", None, "JSON file of the result.")
    flags.DEFINE_string("plot", None, "SVG file of the figure.")
    app.run(main)
