"""Commands: what a run costs, what a budget allows, what a ledger says.

`COMMANDS` maps each name to a function of an argument list (the command's name first, as in
``sys.argv``), which returns an exit code, and to a line of help; other programs can mount them.
Bad flags are explained on stderr, with exit code 2.
"""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from accountants.accounting import epsilon
from accountants.calibration import (
    calibrate_batch_size,
    calibrate_epochs,
    calibrate_noise_multiplier,
    calibrate_steps,
)
from accountants.flags import (
    Flags,
    UsageError,
    command,
    no_arguments,
    sampling_of,
    scheme_flags,
    steps_of,
    write,
)
from accountants.ledger_commands import ledger
from accountants.mechanisms import TrainingRun
from accountants.sampling import SCHEMES, Sampling

# --- epsilon --------------------------------------------------------------------------------------


def _epsilon_flags() -> Flags:
    values = Flags()
    values.accounting()
    values.mechanism()
    values.integer("group_size", "How many examples may differ.", 1)
    return values


def _epsilon(values: Flags, arguments: list[str]) -> None:
    no_arguments(arguments)
    delta = values.needed("delta")
    sampling, num_examples = sampling_of(values), values.needed("num_examples")
    run = TrainingRun(
        values.needed("noise_multiplier"),
        sampling,
        num_examples,
        steps_of(values, sampling, num_examples),
    )
    found = epsilon(
        runs=[run],
        delta=delta,
        accountant=values.accountant,
        relation=values.relation,
        group_size=values.group_size,
    )
    record = {
        "epsilon": float(found),
        "delta": delta,
        "relation": found.relation,
        "accountant": found.accountant,
        "group_size": found.group_size,
        "run": run.to_dict(),
    }
    group = f" for groups of {found.group_size}" if found.group_size > 1 else ""
    text = (
        f"epsilon = {float(found):.6g} at delta = {delta:g}{group}, under {found.relation}, "
        f"by {found.accountant}: {run.steps} steps of {run.sampling!r}"
    )
    write(values, record, text)


# --- calibrate ------------------------------------------------------------------------------------

_SOLVE_FOR = ("noise_multiplier", "steps", "epochs", "batch_size")


def _schemes_of_a_batch_size() -> dict[str, type[Sampling]]:
    """The schemes that a batch size alone describes."""
    return {name: kind for name, kind in SCHEMES.items() if list(kind.settings()) == ["batch_size"]}


def _calibrate_flags() -> Flags:
    values = Flags()
    values.number("epsilon", "Epsilon of the budget.")
    values.number(
        "advantage", "Instead of a budget: the most by which an attacker's TPR exceeds the FPR."
    )
    values.number("tpr", "Instead of a budget: the highest true positive rate of an attacker ...")
    values.number("at_fpr", "... at this false positive rate.")
    values.accounting()
    values.mechanism()
    values.one_of("solve_for", _SOLVE_FOR, "What to find.", "noise_multiplier")
    return values


def _calibrate(values: Flags, arguments: list[str]) -> None:
    no_arguments(arguments)
    unknown = values.solve_for
    values.refuse(unknown, reason="as it is what is searched for (--solve_for)")
    target = _calibration_target(values)
    common = {
        **target,
        "num_examples": values.needed("num_examples"),
        "accountant": values.accountant,
        "relation": values.relation,
    }
    found: float
    if unknown == "batch_size":
        values.refuse("steps", reason="with --solve_for=batch_size; give --epochs")
        schemes = _schemes_of_a_batch_size()
        if values.sampling not in schemes:
            raise UsageError(
                f"--solve_for=batch_size is for --sampling={' or '.join(schemes)}, "
                f"got {values.sampling}."
            )
        others = [name for name in scheme_flags() if name != "batch_size"]
        values.refuse(*others, reason=f"with --sampling={values.sampling}")
        found = calibrate_batch_size(
            **common,
            noise_multiplier=values.needed("noise_multiplier"),
            epochs=values.needed("epochs"),
            scheme=schemes[values.sampling],
        )
    else:
        sampling = sampling_of(values)
        common["sampling"] = sampling
        if unknown == "noise_multiplier":
            steps = steps_of(values, sampling, common["num_examples"])
            found = calibrate_noise_multiplier(**common, steps=steps)
        else:
            values.refuse("steps", "epochs", reason=f"with --solve_for={unknown}")
            search = calibrate_steps if unknown == "steps" else calibrate_epochs
            found = search(**common, noise_multiplier=values.needed("noise_multiplier"))
    kept = " and ".join(f"{name} = {value:g}" for name, value in target.items())
    number = f"{found:.6g}" if isinstance(found, float) else str(found)
    write(values, {unknown: found, **target}, f"{unknown} = {number} for {kept}")


def _calibration_target(values: Flags) -> dict[str, float]:
    """The budget, or the risk in place of it."""
    risk = ("advantage", "tpr", "at_fpr")
    given = [name for name in risk if values[name].value is not None]
    if not given:
        return {"epsilon": values.needed("epsilon"), "delta": values.needed("delta")}
    if values.solve_for != "noise_multiplier":
        values.refuse(*given, reason=f"with --solve_for={values.solve_for}")
    values.refuse("epsilon", "delta", reason=f"with --{given[0]}")
    if given == ["advantage"]:
        return {"advantage": values.advantage}
    values.refuse("advantage", reason="with --tpr and --at_fpr")
    return {"tpr": values.needed("tpr"), "at_fpr": values.needed("at_fpr")}


# --- all commands ---------------------------------------------------------------------------------

COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "epsilon": (
        command(
            "epsilon",
            "epsilon --delta=... --noise_multiplier=... --num_examples=... --batch_size=... "
            "--steps=...\n\nThe epsilon of a training run.",
            _epsilon_flags,
            _epsilon,
        ),
        "the epsilon of a training run",
    ),
    "calibrate": (
        command(
            "calibrate",
            "calibrate --epsilon=... --delta=... --solve_for=... and the rest of the run\n\n"
            "The least noise, or the most steps, epochs or examples a batch, within a budget.",
            _calibrate_flags,
            _calibrate,
        ),
        "the least noise, or the most steps, epochs or examples a batch, within a budget",
    ),
    "ledger": (
        ledger,
        "what ran when, epsilon over time, and what is left of a budget",
    ),
}


def main(
    argv: Sequence[str],
    program: str = "python -m accountants",
    commands: dict[str, tuple[Callable[[Sequence[str]], int], str]] = COMMANDS,
) -> int:
    """Runs the command that ``argv[1]`` names; returns its exit code."""
    try:
        code = _main(argv, program, commands)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        return drop_output()


def drop_output() -> int:
    """Drops all output to come, since nobody reads it, as after ``| head``.

    Returns:
        The exit code of a program that a closed pipe has ended.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE


def _main(argv: Sequence[str], program: str, commands: Any) -> int:
    wanted = argv[1] if len(argv) > 1 else None
    if wanted in commands:
        return commands[wanted][0](argv[1:])
    lines = [f"{program} COMMAND [flags]", ""]
    lines += [f"  {name}: {line}" for name, (_, line) in commands.items()]
    asked = wanted in ("--help", "-h", "help")
    if not asked and wanted is not None:
        lines.insert(0, f"no command is named {wanted!r}.")
    print("\n".join(lines), file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2
