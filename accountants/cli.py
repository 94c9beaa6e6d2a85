"""Commands: what a run costs, what a budget allows, what a ledger says.

`COMMANDS` maps each name to a function of an argument list (the command's name first, as in
``sys.argv``), which returns an exit code, and to a line of help; other programs can mount them.
Bad flags are explained on stderr, with exit code 2.
"""

import dataclasses
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from accountants.accounting import ACCOUNTANTS, Budget, epsilon
from accountants.calibration import (
    calibrate_batch_size,
    calibrate_epochs,
    calibrate_noise_multiplier,
    calibrate_steps,
)
from accountants.ledger import Ledger, LedgerEntry, LedgerError
from accountants.mechanisms import TrainingRun
from accountants.sampling import RELATIONS, SCHEMES, Sampling
from accountants.validation import check_integer


class UsageError(Exception):
    """Flags that make no sense together."""


class Flags(flags.FlagValues):
    """The flags of one command."""

    def __init__(self) -> None:
        super().__init__()
        flags.DEFINE_bool("json", False, "Print one JSON object.", flag_values=self)
        flags.DEFINE_bool("help", False, "Print this.", short_name="h", flag_values=self)

    def number(self, name: str, help: str, default: float | None = None) -> None:
        flags.DEFINE_float(name, default, help, flag_values=self)

    def integer(self, name: str, help: str, default: int | None = None) -> None:
        flags.DEFINE_integer(name, default, help, flag_values=self)

    def text(self, name: str, help: str, default: str | None = None) -> None:
        flags.DEFINE_string(name, default, help, flag_values=self)

    def switch(self, name: str, help: str, default: bool) -> None:
        flags.DEFINE_bool(name, default, help, flag_values=self)

    def one_of(self, name: str, values: Sequence[str], help: str, default: str | None) -> None:
        flags.DEFINE_enum(name, default, list(values), help, flag_values=self)

    def accounting(self) -> None:
        self.number("delta", "Delta; well below 1 / num_examples.")
        self.one_of("accountant", ACCOUNTANTS, "How to account.", "pld")
        self.one_of(
            "relation",
            RELATIONS,
            "What neighbouring data sets differ by; by default the first that the sampling has.",
            None,
        )

    def mechanism(self) -> None:
        self.number("noise_multiplier", "Standard deviation of the noise over the sensitivity.")
        self.integer("num_examples", "Size of the data set.")
        self.one_of("sampling", list(SCHEMES), "How batches are drawn.", "poisson")
        for name, fields in _scheme_flags().items():
            # A number where it is one to any scheme; the others check for integers themselves.
            whole = all(field.type is int for field in fields)
            define = self.integer if whole else self.number
            define(name, fields[0].metadata["help"])
        self.integer("steps", "Number of steps.")
        self.integer("epochs", "Number of epochs, instead of steps.")

    def needed(self, name: str) -> Any:
        value = self[name].value
        if value is None:
            raise UsageError(f"--{name} is needed.")
        return value

    def refuse(self, *names: str, reason: str) -> None:
        for name in names:
            if self[name].value is not None:
                raise UsageError(f"--{name} cannot be given {reason}.")


def _scheme_flags() -> dict[str, list[dataclasses.Field[Any]]]:
    """The fields that each flag of a scheme stands for, one for each scheme that has it."""
    found: dict[str, list[dataclasses.Field[Any]]] = {}
    for kind in SCHEMES.values():
        for name, field in kind.settings().items():
            found.setdefault(name, []).append(field)
    return found


def _schemes_of_a_batch_size() -> dict[str, type[Sampling]]:
    """The schemes that a batch size alone describes."""
    return {name: kind for name, kind in SCHEMES.items() if list(kind.settings()) == ["batch_size"]}


def sampling_of(values: Flags) -> Sampling:
    """The scheme that the flags of `Flags.mechanism` describe."""
    settings = SCHEMES[values.sampling].settings()
    others = [name for name in _scheme_flags() if name not in settings]
    values.refuse(*others, reason=f"with --sampling={values.sampling}")
    given = {field.name: _whole(values.needed(name)) for name, field in settings.items()}
    return SCHEMES[values.sampling](**given)


def _whole(number: float) -> float:
    """The number, as an int where it is whole."""
    return int(number) if math.isfinite(number) and number == int(number) else number


def steps_of(values: Flags, sampling: Sampling, num_examples: int) -> int:
    """The number of steps that the flags of `Flags.mechanism` describe."""
    if (values.steps is None) == (values.epochs is None):
        raise UsageError("one of --steps and --epochs is needed.")
    if values.steps is not None:
        return values.steps
    epochs = check_integer(values.epochs, "epochs", 0)
    return epochs * sampling.steps_per_epoch(num_examples)


def write(values: Flags, record: dict[str, Any], text: str) -> None:
    print(json.dumps(_finite(record)) if values.json else text)


def _finite(value: Any) -> Any:
    """The value with the string "inf" for infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return "inf" if isinstance(value, float) and math.isinf(value) else value


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


def _calibrate_flags() -> Flags:
    values = Flags()
    values.number("epsilon", "Epsilon of the budget.")
    values.accounting()
    values.mechanism()
    values.one_of("solve_for", _SOLVE_FOR, "What to find.", "noise_multiplier")
    return values


def _calibrate(values: Flags, arguments: list[str]) -> None:
    no_arguments(arguments)
    unknown = values.solve_for
    values.refuse(unknown, reason="as it is what is searched for (--solve_for)")
    common = {
        "epsilon": values.needed("epsilon"),
        "delta": values.needed("delta"),
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
        others = [name for name in _scheme_flags() if name != "batch_size"]
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
    budget = {"epsilon": common["epsilon"], "delta": common["delta"]}
    text = (
        f"{unknown} = {found:.6g}" if isinstance(found, float) else f"{unknown} = {found}"
    ) + f" for epsilon = {budget['epsilon']:g} at delta = {budget['delta']:g}"
    write(values, {unknown: found, **budget}, text)


# --- ledger ---------------------------------------------------------------------------------------


def _ledger_flags() -> Flags:
    values = Flags()
    values.number("epsilon", "Epsilon of a budget, to see what is left of it.")
    values.accounting()
    values["delta"].value = values["delta"].default = 1e-5
    return values


def _ledger(values: Flags, arguments: list[str]) -> None:
    actions = {"verify": _verify, "repair": _repair}
    if len(arguments) == 2 and arguments[0] in actions:
        values.refuse("epsilon", reason=f"with ledger {arguments[0]}")
        return actions[arguments[0]](values, Ledger(arguments[1]))
    if len(arguments) != 1 or (arguments[0] in actions and not os.path.exists(arguments[0])):
        raise UsageError(f"one PATH is needed, got {' '.join(arguments) or 'none'}.")
    return _show(values, Ledger(arguments[0]))


def _verify(values: Flags, ledger: Ledger) -> None:
    if not os.path.exists(ledger.path):
        raise LedgerError(f"{ledger.path} does not exist.")
    entries, torn = ledger.entries, ledger.torn_steps
    record = {
        "path": ledger.path,
        "runs": len(entries),
        "steps": sum(entry.run.steps for entry in entries),
        "not_settled": sum(not entry.settled for entry in entries),
        "torn_steps": torn,
    }
    lines = ["{path}: every line is sound; {runs} runs, {steps} steps.".format(**record)]
    if record["not_settled"]:
        lines.append(
            "{not_settled} of the runs did not end, or are going on: what they reserved is "
            "charged.".format(**record)
        )
    if torn is not None:
        lines.append(
            f"The last line was cut while it was written. It is charged with {torn} steps, the "
            "most that it can have said; the next run, or `lipdp ledger repair`, records that."
        )
    write(values, record, "\n".join(lines))


def _repair(values: Flags, ledger: Ledger) -> None:
    repaired = ledger.repair()
    record = {"path": ledger.path, "repaired": repaired and dataclasses.asdict(repaired)}
    if repaired is None:
        write(values, record, f"{ledger.path}: nothing to repair, every line is sound.")
        return
    text = (
        f"{ledger.path}, line {repaired.line}: could not be read. It is charged with "
        f"{repaired.steps} steps, the most that it can have said.\n"
        f"The file as it was is in {repaired.backup}."
    )
    write(values, record, text)


def _show(values: Flags, ledger: Ledger) -> None:
    delta = values.needed("delta")
    budget = None if values.epsilon is None else Budget(values.epsilon, delta)
    how = {"accountant": values.accountant, "relation": values.relation}
    entries = ledger.entries
    charged = [entry.run for entry in entries if entry.run.steps]
    # As `Ledger.epsilon` has it; the relation of all that is charged, also on the way.
    relation = epsilon(runs=charged, delta=delta, **how).relation
    rows: list[tuple[LedgerEntry, float]] = []
    so_far: list[TrainingRun] = []
    for entry in entries:
        so_far += [entry.run] if entry.run.steps else []
        found = epsilon(runs=so_far, delta=delta, accountant=values.accountant, relation=relation)
        rows.append((entry, float(found)))
    spent = rows[-1][1] if rows else 0.0
    record: dict[str, Any] = {
        "path": ledger.path,
        "steps": sum(entry.run.steps for entry in entries),
        "delta": delta,
        "epsilon": spent,
        "relation": relation,
        "runs": [
            {
                "run_id": entry.run_id,
                "time": entry.time,
                "settled": entry.settled,
                **entry.run.to_dict(),
                "epsilon_so_far": cost,
            }
            for entry, cost in rows
        ],
    }
    missing = "" if os.path.exists(ledger.path) else f": {ledger.path} does not exist"
    lines = [_line(*row) for row in rows] or [f"no runs{missing}"]
    under = f", under {relation}" if charged else ""
    lines.append(f"spent: epsilon = {spent:.6g} at delta = {delta:g}{under}")
    if budget is not None:
        left = max(0.0, budget.epsilon - spent)
        record["budget"] = {"epsilon": budget.epsilon, "left": left}
        lines.append(f"left of epsilon = {budget.epsilon:g}: {left:.6g}")
        if rows:
            more = _more_steps(charged, entries[-1].run, budget, how)
            record["budget"]["more_steps_like_the_last_run"] = more
            lines.append(f"more steps like those of the last run: {more}")
    write(values, record, "\n".join(lines))


def _line(entry: LedgerEntry, so_far: float) -> str:
    run = entry.run
    state = "" if entry.settled else "  (not settled: what it reserved is charged)"
    return (
        f"{entry.time}  {entry.run_id}  {run.steps} steps, noise {run.noise_multiplier:g}, "
        f"{run.sampling!r} of {run.num_examples}  epsilon so far {so_far:.6g}{state}"
    )


def _more_steps(
    charged: list[TrainingRun], last: TrainingRun, budget: Budget, how: dict[str, Any]
) -> int:
    idle = dataclasses.replace(last, steps=0)  # whose relation counts, too
    if epsilon(runs=[*charged, idle], delta=budget.delta, **how) > budget.epsilon:
        return 0
    return calibrate_steps(
        epsilon=budget.epsilon,
        delta=budget.delta,
        noise_multiplier=last.noise_multiplier,
        sampling=last.sampling,
        num_examples=last.num_examples,
        prior=charged,
        **how,
    )


# --- how commands are run -------------------------------------------------------------------------


def no_arguments(arguments: list[str]) -> None:
    if arguments:
        raise UsageError(f"only flags are taken, got {' '.join(arguments)!r}.")


def command(
    name: str,
    usage: str,
    make_flags: Callable[[], Flags],
    run: Callable[[Flags, list[str]], int | None],
) -> Callable[[Sequence[str]], int]:
    """A command made of its flags and what it does with them; `run` may return an exit code."""

    def command(argv: Sequence[str]) -> int:
        values = make_flags()
        try:
            _, *arguments = values([name, *argv[1:]])
            if values.help:
                print(_help(usage, values))
                return 0
            return run(values, arguments) or 0
        except (flags.Error, UsageError, TypeError, ValueError) as error:
            print(f"{name}: {error}\nTry {name} --help.", file=sys.stderr)
            return 2
        except BrokenPipeError:  # an OSError that `main` knows
            raise
        except (LedgerError, OSError) as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 1

    return command


def _help(usage: str, values: Flags) -> str:
    lines = [usage, ""]
    for name in sorted(values):
        flag = values[name]
        if name != flag.name:  # a short name
            continue
        choices = f" One of {', '.join(flag.parser.enum_values)}." if _choices(flag) else ""
        default = "" if flag.default in (None, False) else f" By default {flag.default}."
        lines.append(f"  --{name}: {flag.help.split(': ', 1)[-1]}{choices}{default}")
    return "\n".join(lines)


def _choices(flag: flags.Flag) -> bool:
    return hasattr(flag.parser, "enum_values")


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
        command(
            "ledger",
            "ledger PATH [--epsilon=... --delta=...]\nledger verify PATH\nledger repair PATH\n\n"
            "What ran when, epsilon over time, and what is left of a budget. `verify` reads every "
            "line\nand says what is wrong, with exit code 1; `repair` counts a last line that "
            "cannot be read as\nthe most that it can have said, and keeps a copy of the file.",
            _ledger_flags,
            _ledger,
        ),
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
