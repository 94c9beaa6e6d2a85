"""What the commands of `lipdp` do. Their flags and help are in `lipdp.cli`, which imports this
module, and with it Keras, only when a command runs.

Each function takes the flags and the paths of the command line, and may return an exit code.
"""

import os
import sys
import zipfile

import keras
import numpy as np

import accountants
from accountants import cli
from lipdp import config, losses
from lipdp.audit import Claim, infer_membership
from lipdp.inspection.check import check as check_network
from lipdp.inspection.repair import repair as repair_network
from lipdp.report import Report
from lipdp.training.attained import attained_gradients
from lipdp.training.model import PrivateModel
from lipdp.training.spending import BudgetExceeded

__all__ = ["audit", "check", "repair", "report", "train"]


def _load(path):
    # Keras' own message names no file for what is no model.
    try:
        return keras.saving.load_model(path, compile=False)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be loaded as a Keras model: {error}") from error


def _examples(path):
    try:
        with np.load(os.path.expanduser(path)) as file:
            return file["x"], file["y"]
    except (KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} must be an .npz file of arrays x and y: {error}") from error


def check(values: cli.Flags, paths: list[str]) -> int:
    found = check_network(_load(paths[0]))
    cli.write(values, found.to_dict(), str(found).rstrip())
    return 0 if found.private or found.per_layer else 1


def audit(values: cli.Flags, paths: list[str]) -> int:
    if (values.epsilon is None) != (values.delta is None):
        raise cli.UsageError("--epsilon and --delta are needed together.")
    claim = None if values.epsilon is None else Claim(values.epsilon, values.delta)
    found = infer_membership(
        _load(paths[0]),
        _examples(values.needed("members")),
        _examples(values.needed("nonmembers")),
        claim=claim,
        confidence=values.confidence,
        temperature=values.temperature,
    )
    cli.write(values, found.to_dict(), str(found).rstrip())
    return 1 if found.violated else 0


def repair(values: cli.Flags, paths: list[str]) -> None:
    source, target = paths
    if not target.endswith(".keras"):
        raise cli.UsageError(f"REPAIRED must end in .keras, got {target!r}.")
    repaired = repair_network(
        _load(source), certified=values.certified, radius=values.radius, verbose=not values.json
    )
    repaired.save(target)
    cli.write(values, {"path": target, **check_network(repaired).to_dict()}, f"written to {target}")


def report(values: cli.Flags, paths: list[str]) -> None:
    network, sampling = _load(paths[0]), cli.sampling_of(values)
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
        clip=config.clip_of(values.clip),
        allocation=values.allocation,
    )
    model.compile("sgd", loss=losses.get(values.loss))
    runs, sample = [], None
    if planned and delta is not None:
        runs = [accountants.TrainingRun(model.noise_multiplier, sampling, examples, steps)]
    if values.sample is not None:
        sample = attained_gradients(model, *_examples(values.sample), verbose=not values.json)
    batch = None if examples is None else sampling.expected_batch_size(examples)
    made = Report.of(model, batch, runs, delta if runs else None, sample)
    if values.html is not None:
        made.to_html(values.html)
    cli.write(values, made.to_dict(), str(made).rstrip())


def train(values: cli.Flags, paths: list[str]) -> int:
    try:
        result = config.train(config.read_config(paths[0]), verbose=not values.json)
    except BudgetExceeded as error:
        print(f"train: {error}", file=sys.stderr)
        return 1
    cli.write(values, result, "\n".join(f"{key}: {value}" for key, value in result.items()))
    return 0
