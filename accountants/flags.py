"""The flags of commands, and how a command is made of them and of what it does."""

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from accountants.accounting import ACCOUNTANTS
from accountants.ledger import LedgerError
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
        for name, fields in scheme_flags().items():
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


def scheme_flags() -> dict[str, list[dataclasses.Field[Any]]]:
    """The fields that each flag of a scheme stands for, one for each scheme that has it."""
    found: dict[str, list[dataclasses.Field[Any]]] = {}
    for kind in SCHEMES.values():
        for name, field in kind.settings().items():
            found.setdefault(name, []).append(field)
    return found


def sampling_of(values: Flags) -> Sampling:
    """The scheme that the flags of `Flags.mechanism` describe."""
    settings = SCHEMES[values.sampling].settings()
    others = [name for name in scheme_flags() if name not in settings]
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
