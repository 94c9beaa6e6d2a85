"""The command `lipdp`: what a network's bounds are, and all commands of the accountants.

Help and the accountants' commands take a moment, since nothing here imports Keras. What a command
does with a network is in `lipdp.commands`, which is imported when such a command runs.
"""

import os
import sys
from collections.abc import Callable, Sequence

from lipdp import startup

startup.use_one_thread()  # before NumPy is imported, which the next line does

from accountants import Ledger, LedgerError, cli  # noqa: E402
from lipdp._version import __version__  # noqa: E402

__all__ = ["COMMANDS", "main"]

# As in `lipdp.noise`, which imports Keras; a test compares them.
_ALLOCATIONS = ("global", "per_weight", "least")

_Command = tuple[Callable[[Sequence[str]], int], str]


def _audit_flags() -> cli.Flags:
    values = cli.Flags()
    values.text("members", "File with examples that the model was trained on, as arrays x and y.")
    values.text("nonmembers", "File with other examples of the same distribution.")
    values.number("epsilon", "Epsilon that the training claims, to hold the attacks against.")
    values.number("delta", "Delta that the training claims.")
    values.number("temperature", "Factor of the logits, as in the loss of the training.", 1.0)
    values.number("confidence", "Of each interval.", 0.95)
    return values


def _repair_flags() -> cli.Flags:
    values = cli.Flags()
    values.switch("certified", "Whether the network is to have certified bounds.", False)
    values.number("radius", "Radius of the ball of the input, with --certified.")
    return values


def _report_flags() -> cli.Flags:
    values = cli.Flags()
    values.number("epsilon", "Epsilon of a budget, from which the noise is calibrated.")
    values.number("delta", "Delta of the budget.")
    values.mechanism()
    values.text("loss", "Name of the loss, on logits.", "sparse_categorical_crossentropy")
    values.text(
        "clip",
        "per_layer: each layer clips its own gradient. A number, or adaptive: clip of an example's "
        "loss gradient; by default the loss' own bound.",
    )
    values.one_of("allocation", _ALLOCATIONS, "How noise is shared over the weights.", "global")
    values.text("sample", "An .npz file with x and y, whose gradients are shown; NOT private.")
    values.text("html", "Write a page to this file.")
    return values


def _statement_flags() -> cli.Flags:
    values = cli.Flags()
    values.accounting()
    values["delta"].value = values["delta"].default = 1e-5
    return values


def _statement(values: cli.Flags, arguments: list[str]) -> None:
    if len(arguments) != 1:
        raise cli.UsageError(f"one LEDGER is needed, got {' '.join(arguments) or 'none'}.")
    ledger = Ledger(arguments[0])
    if not os.path.exists(ledger.path):
        raise LedgerError(f"{ledger.path} does not exist.")
    found = ledger.statement(
        values.needed("delta"),
        accountant=values.accountant,
        relation=values.relation,
        software=f"lipdp {__version__}",
    )
    cli.write(values, found.to_dict(), str(found))


def _command(
    name: str,
    paths: Sequence[str],
    usage: str,
    line: str,
    make_flags: Callable[[], cli.Flags] = cli.Flags,
) -> _Command:
    """A command that reads files, done by the function of its name in `lipdp.commands`."""

    def run(values: cli.Flags, arguments: list[str]) -> int | None:
        if len(arguments) != len(paths):
            needed = f"one {paths[0]} is" if len(paths) == 1 else f"{' and '.join(paths)} are"
            raise cli.UsageError(f"{needed} needed, got {len(arguments)}.")
        startup.import_keras()
        from lipdp import commands

        return getattr(commands, name)(values, [os.path.expanduser(path) for path in arguments])

    return cli.command(name, f"{name} {' '.join(paths)}{usage}", make_flags, run), line


COMMANDS: dict[str, _Command] = {
    "audit": _command(
        "audit",
        ["MODEL.keras"],
        " --members=IN.npz --nonmembers=OUT.npz [--epsilon=... --delta=...]"
        "\n\nHow well attacks tell training examples from others, and the ceiling that a "
        "privacy claim puts on them; exit code 1 if one is beyond it.",
        "how well attacks tell training examples from others",
        _audit_flags,
    ),
    "check": _command(
        "check",
        ["MODEL.keras"],
        "\n\nWhether a network can be trained privately, with certified bounds or with layers that "
        "clip, and what each layer costs; exit code 1 if it cannot.",
        "whether a network can be trained privately, and what each layer costs",
    ),
    "repair": _command(
        "repair",
        ["MODEL.keras", "REPAIRED.keras"],
        " [--certified [--radius=...]]\n\nWrites a network that can be trained with "
        "--clip=per_layer; with --certified, one that has certified bounds.",
        "writes a network with the layers replaced that cannot be trained privately",
        _repair_flags,
    ),
    "report": _command(
        "report",
        ["MODEL.keras"],
        " --batch_size=... [--noise_multiplier=...] [--clip=per_layer] [--html=PAGE.html]\n"
        "report MODEL.keras --batch_size=... --epsilon=... --delta=... --num_examples=... "
        "--epochs=...\n\nThe bound of each weight, where it comes from, and its noise; for a "
        "noise multiplier of 1 where nothing says another.",
        "the bound of each weight, where it comes from, and its noise",
        _report_flags,
    ),
    "train": _command(
        "train",
        ["CONFIG.yaml"],
        "\n\nTrains as a YAML file says: sections data, network, privacy, "
        "sampling, training, output. docs/train.md has an example.",
        "trains a private model as a file says",
    ),
    **cli.COMMANDS,
    "statement": (
        cli.command(
            "statement",
            "statement LEDGER [--delta=...]\n\nWhat can be filed about all that was done to the "
            "data of a ledger: who is protected, how far,\nfrom what, and what is not covered.",
            _statement_flags,
            _statement,
        ),
        "what can be filed about all that was done to the data of a ledger",
    ),
}


def main() -> int:
    """Runs the command line; returns the exit code."""
    return cli.main(sys.argv, "lipdp", COMMANDS)
