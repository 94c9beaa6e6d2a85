"""The command `lipdp`: what a network's bounds are, and all commands of the accountants."""

import sys
import zipfile

import keras
import numpy as np

import accountants
from accountants import cli
from lipdp import audit, losses
from lipdp.config import read_config, train
from lipdp.inspection.check import check
from lipdp.inspection.repair import repair
from lipdp.noise import ALLOCATIONS
from lipdp.report import Report
from lipdp.training.attained import attained_gradients
from lipdp.training.model import PrivateModel
from lipdp.training.spending import BudgetExceeded

__all__ = ["COMMANDS", "main"]


def _load(path):
    # Keras' own message names no file for what is no model.
    try:
        return keras.saving.load_model(path, compile=False)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be loaded as a Keras model: {error}") from error


def _check(values, arguments):
    if len(arguments) != 1:
        raise cli.UsageError(f"one MODEL.keras is needed, got {len(arguments)}.")
    found = check(_load(arguments[0]))
    cli.write(values, found.to_dict(), str(found).rstrip())
    return 0 if found.private else 1


def _audit_flags():
    values = cli.Flags()
    values.text("members", "File with examples that the model was trained on, as arrays x and y.")
    values.text("nonmembers", "File with other examples of the same distribution.")
    values.number("epsilon", "Epsilon that the training claims, to hold the attacks against.")
    values.number("delta", "Delta that the training claims.")
    values.number("temperature", "Factor of the logits, as in the loss of the training.", 1.0)
    values.number("confidence", "Of each interval.", 0.95)
    return values


def _examples(path):
    try:
        with np.load(path) as file:
            return file["x"], file["y"]
    except (KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} must be an .npz file of arrays x and y: {error}") from error


def _audit(values, arguments):
    if len(arguments) != 1:
        raise cli.UsageError(f"one MODEL.keras is needed, got {len(arguments)}.")
    if (values.epsilon is None) != (values.delta is None):
        raise cli.UsageError("--epsilon and --delta are needed together.")
    claim = None if values.epsilon is None else audit.Claim(values.epsilon, values.delta)
    found = audit.infer_membership(
        _load(arguments[0]),
        _examples(values.needed("members")),
        _examples(values.needed("nonmembers")),
        claim=claim,
        confidence=values.confidence,
        temperature=values.temperature,
    )
    cli.write(values, found.to_dict(), str(found).rstrip())
    return 1 if found.violated else 0


def _repair_flags():
    values = cli.Flags()
    values.number("radius", "Radius of the ball of the input.", 1.0)
    return values


def _repair(values, arguments):
    if len(arguments) != 2:
        raise cli.UsageError(f"MODEL.keras and REPAIRED.keras are needed, got {len(arguments)}.")
    source, target = arguments
    if not target.endswith(".keras"):
        raise cli.UsageError(f"REPAIRED must end in .keras, got {target!r}.")
    repaired = repair(_load(source), radius=values.radius, verbose=not values.json)
    repaired.save(target)
    cli.write(values, {"path": target, **check(repaired).to_dict()}, f"written to {target}")


def _report_flags():
    values = cli.Flags()
    values.number("epsilon", "Epsilon of a budget, from which the noise is calibrated.")
    values.number("delta", "Delta of the budget.")
    values.mechanism()
    values.text("loss", "Name of the loss, on logits.", "sparse_categorical_crossentropy")
    values.number("clip", "Clip of an example's loss gradient; by default the loss' own bound.")
    values.one_of("allocation", ALLOCATIONS, "How noise is shared over the weights.", "global")
    values.text("sample", "An .npz file with x and y, whose gradients are shown; NOT private.")
    values.text("html", "Write a page to this file.")
    return values


def _report(values, arguments):
    if len(arguments) != 1:
        raise cli.UsageError(f"one MODEL.keras is needed, got {len(arguments)}.")
    network, sampling = _load(arguments[0]), cli.sampling_of(values)
    examples, delta, noise = values.num_examples, values.delta, values.noise_multiplier
    planned = values.steps is not None or values.epochs is not None
    if planned:
        steps = cli.steps_of(values, sampling, values.needed("num_examples"))
    if values.epsilon is not None:
        values.refuse("noise_multiplier", reason="with --epsilon, from which it is calibrated")
        if not planned:
            raise cli.UsageError("--epsilon needs --steps or --epochs.")
        noise = accountants.calibrate_noise_multiplier(
            epsilon=values.epsilon,
            delta=values.needed("delta"),
            sampling=sampling,
            num_examples=examples,
            steps=steps,
        )
    model = PrivateModel(
        network,
        noise_multiplier=1.0 if noise is None else noise,
        sampling=sampling,
        clip=values.clip,
        allocation=values.allocation,
    )
    model.compile("sgd", loss=losses.get(values.loss))
    runs, sample = [], None
    if planned and delta is not None:
        runs = [accountants.TrainingRun(model.noise_multiplier, sampling, examples, steps)]
    if values.sample is not None:
        sample = attained_gradients(model, *_examples(values.sample), verbose=not values.json)
    batch = None if examples is None else sampling.expected_batch_size(examples)
    report = Report.of(model, batch, runs, delta if runs else None, sample)
    if values.html is not None:
        report.to_html(values.html)
    cli.write(values, report.to_dict(), str(report).rstrip())


def _train(values, arguments):
    if len(arguments) != 1:
        raise cli.UsageError(f"one CONFIG.yaml is needed, got {len(arguments)}.")
    try:
        result = train(read_config(arguments[0]), verbose=not values.json)
    except BudgetExceeded as error:
        print(f"train: {error}", file=sys.stderr)
        return 1
    cli.write(values, result, "\n".join(f"{key}: {value}" for key, value in result.items()))
    return 0


COMMANDS = {
    "audit": (
        cli.command(
            "audit",
            "audit MODEL.keras --members=IN.npz --nonmembers=OUT.npz [--epsilon=... --delta=...]"
            "\n\nHow well attacks tell training examples from others, and the ceiling that a "
            "privacy claim puts on them; exit code 1 if one is beyond it.",
            _audit_flags,
            _audit,
        ),
        "how well attacks tell training examples from others",
    ),
    "check": (
        cli.command(
            "check",
            "check MODEL.keras\n\nWhether a network can be trained privately, and what each layer "
            "costs; exit code 1 if it cannot.",
            cli.Flags,
            _check,
        ),
        "whether a network can be trained privately, and what each layer costs",
    ),
    "repair": (
        cli.command(
            "repair",
            "repair MODEL.keras REPAIRED.keras [--radius=...]\n\nWrites a private network with the "
            "layers replaced that cannot be private.",
            _repair_flags,
            _repair,
        ),
        "writes a private network with the layers replaced that cannot be private",
    ),
    "report": (
        cli.command(
            "report",
            "report MODEL.keras --batch_size=... [--noise_multiplier=...] [--html=PAGE.html]\n"
            "report MODEL.keras --batch_size=... --epsilon=... --delta=... --num_examples=... "
            "--epochs=...\n\nThe bound of each weight, where it comes from, and its noise; for a "
            "noise multiplier of 1 where nothing says another.",
            _report_flags,
            _report,
        ),
        "the bound of each weight, where it comes from, and its noise",
    ),
    "train": (
        cli.command(
            "train",
            "train CONFIG.yaml\n\nTrains as a YAML file says: sections data, network, privacy, "
            "sampling, training, output. docs/train.md has an example.",
            cli.Flags,
            _train,
        ),
        "trains a private model as a file says",
    ),
    **cli.COMMANDS,
}


def main() -> int:
    """Runs the command line; returns the exit code."""
    return cli.main(sys.argv, "lipdp", COMMANDS)
