"""The command `lipdp`: what a network's bounds are, and all commands of the accountants."""

import sys

import keras

from accountants import cli
from lipdp.check import check
from lipdp.repair import repair

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


COMMANDS = {
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
    **cli.COMMANDS,
}


def main() -> int:
    """Runs the command line; returns the exit code."""
    return cli.main(sys.argv, "lipdp", COMMANDS)
