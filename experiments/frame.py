"""The frame of the scripts: flags, the command line, and the record of a run.

A script says what its flags are and what it does with them, and ends with `start(main,
define_flags)`. What trains with settings has an `Experiment`: it makes flags of the settings, and
keeps a record of each run.
"""

import contextlib
import dataclasses
import json
import pathlib
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from absl import app, flags

from accountants.cli import drop_output
from experiments import record

__all__ = [
    "Experiment",
    "Flags",
    "explained",
    "folder",
    "needed",
    "results_file",
    "start",
    "stored",
]

# Flags that say where things lie on this machine, not what is run.
_PLACES = ("data", "public", "folder", "out", "table")


# --- the command line -----------------------------------------------------------------------------


def start(
    main: Callable[..., object],
    define_flags: Callable[["Flags"], None] | None = None,
    values: flags.FlagValues | None = None,
    argv: Sequence[str] | None = None,
    positional: int = 0,
) -> object:
    """Runs a script.

    Args:
        main: takes the values of the flags, and the positional arguments.
        define_flags: defines the flags.
        values: of the flags, by default new ones: libraries add some to absl's own.
        argv: by default that of the process.
        positional: arguments without a name, at most.

    Returns:
        What `main` does.

    Raises:
        SystemExit: `--help`, with status 0; or what is asked for cannot be done, with a message
            on stderr and status 2.
    """
    argv = sys.argv if argv is None else argv
    values = flags.FlagValues() if values is None else values
    if define_flags is not None:
        define_flags(Flags(values))
    try:
        result = _started(main, values, argv, positional)
        sys.stdout.flush()
        return result
    except BrokenPipeError as error:
        raise SystemExit(drop_output()) from error


def _started(main, values, argv, positional):
    module = sys.modules[main.__module__]
    if {"-h", "--h", "-help", "--help"} & set(argv[1:]):
        print(_help(module, values), flush=True)
        raise SystemExit(0)
    try:
        rest = values(argv)[1:]
        if len(rest) > positional:
            raise app.UsageError(f"Unknown arguments: {' '.join(rest[positional:])}")
        return main(values, *rest)
    except (flags.Error, app.UsageError) as error:
        name = module.__spec__.name if module.__spec__ else module.__name__
        print(f"{name}: {error}\n`python -m {name} --help` lists all flags.", file=sys.stderr)
        raise SystemExit(2) from error


def _help(module, values):
    lines = [module.__doc__.strip(), "", "Flags:"] if len(values) else [module.__doc__.strip()]
    for name in values:
        flag = values[name]
        choices = flag.parser.syntactic_help.removeprefix("a ").removeprefix("an ")
        default = "" if flag.default is None else f" (default: {flag.default_as_str})"
        lines.append(f"  --{flag.name}{default}".replace("'", ""))
        text = f"{flag.help} [{choices}]" if choices else flag.help
        lines += textwrap.wrap(text, 92, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Explains on the command line what is wrong with a file or a value, without a traceback."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise app.UsageError(str(error)) from error


def needed(values: flags.FlagValues, name: str) -> Any:
    """The value of a flag that has to be given.

    Raises:
        app.UsageError: it was not.
    """
    if values[name].value is None:
        raise app.UsageError(f"--{name} is needed: {values[name].help}")
    return values[name].value


def folder(values: flags.FlagValues) -> pathlib.Path | None:
    """The folder that `--folder` names; None where it is not given.

    Raises:
        app.UsageError: there is no such folder.
    """
    if values.folder and not pathlib.Path(values.folder).is_dir():
        raise app.UsageError(f"--folder={values.folder} is no folder.")
    return pathlib.Path(values.folder) if values.folder else None


def results_file(values: flags.FlagValues) -> pathlib.Path | None:
    """The JSON Lines file that `--out` names, with its suffix; None where nothing is kept.

    Raises:
        app.UsageError: it has another suffix.
    """
    if not values.out:
        return None
    path = pathlib.Path(values.out)
    if path.suffix not in ("", ".jsonl"):
        raise app.UsageError(f"--out must be a .jsonl file; got {path}.")
    return path.with_suffix(".jsonl")


def stored(values: flags.FlagValues) -> list[dict]:
    """The results in the file of `--out`.

    Raises:
        app.UsageError: there are none, or it is no file of results.
    """
    path = results_file(values)
    if path is None:
        raise app.UsageError("--table needs --out, the file of the results.")
    with explained():
        return record.read(path)


# --- flags ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Flags:
    """Defines flags among values."""

    values: flags.FlagValues

    def number(self, name, default, text, least=None, most=None):
        flags.DEFINE_float(name, default, text, least, most, flag_values=self.values)

    def integer(self, name, default, text, least=None, most=None):
        flags.DEFINE_integer(name, default, text, least, most, flag_values=self.values)

    def text(self, name, default, text):
        flags.DEFINE_string(name, default, text, flag_values=self.values)

    def switch(self, name, default, text):
        flags.DEFINE_boolean(name, default, text, flag_values=self.values)

    def names(self, name, default, text, choices=()):
        flags.DEFINE_list(name, default, text, flag_values=self.values)
        if choices:
            known = f"takes {', '.join(choices)}"

            def check(given):
                if unknown := sorted(set(given or ()) - set(choices)):
                    raise flags.ValidationError(f"{known}; got {', '.join(unknown)}.")
                return True

            flags.register_validator(name, check, flag_values=self.values)

    def numbers(self, name, default, text, kind=float):
        """Defines a flag of numbers, which its value holds as they were written."""
        flags.DEFINE_list(name, default, text, flag_values=self.values)

        def check(given):
            try:
                return all(kind(number) > 0 for number in given or ())
            except ValueError:
                return False

        message = "takes positive numbers, with commas between them."
        flags.register_validator(name, check, message, flag_values=self.values)

    def one_of(self, name, default, choices, text):
        flags.DEFINE_enum(name, default, list(choices), text, flag_values=self.values)

    def delta(self, default: float | None, text: str) -> None:
        """Defines `--delta`."""
        self.number("delta", default, text)
        flags.register_validator(
            "delta",
            lambda delta: delta is None or 0 < delta < 1,
            "must lie between 0 and 1, both excluded.",
            flag_values=self.values,
        )

    def seed(self, default: int | None) -> None:
        """Defines `--seed`."""
        text = "Fixes noise, batches and weights, for benchmarks: who knows it can subtract noise."
        self.integer("seed", default, text, least=0)

    def seeds_and_table(self) -> None:
        """Defines `--seeds` and `--table`, of scripts whose record has a run for each seed."""
        self.integer("seeds", 3, "Runs, with seeds from 0 on.", least=1)
        self.text("table", None, "Makes this page and its plot of the results in --out, no more.")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A script that trains with settings, and keeps a record of each run.

    Attributes:
        name: of its module.
        settings: a dataclass, whose fields are flags.
        fields: those that are, by default all.
    """

    name: str
    settings: type
    fields: Sequence[str] | None = None

    def define_flags(
        self,
        define: Flags,
        data: str,
        epsilon: float,
        delta: float | None = 1e-5,
        networks: Iterable[str] = (),
        network: str | None = None,
    ) -> None:
        """Defines the flags that all experiments have, and one for each of the settings.

        Args:
            define: defines them.
            data: what `--data` is.
            epsilon, delta: of the budget, by default; without a delta it follows from the data.
            networks, network: what can be trained, and what is by default.
        """
        define.text("data", None, data)
        if networks:
            define.one_of("network", network, networks, "What is trained.")
        define.number("epsilon", epsilon, "Privacy budget: epsilon.", least=1e-6)
        by_default = "" if delta else "; by default a power of ten below 1/n"
        define.delta(delta, f"Privacy budget: delta{by_default}.")
        define.text("out", None, "A .jsonl file, to which a run adds a line.")
        for field in self._fields():
            text = f"In place of the setting, which {self._home()} explains."
            kind = _kind(field)
            if kind is bool:
                define.switch(field.name, None, text)
            elif "choices" in field.metadata:
                define.one_of(field.name, None, field.metadata["choices"], text)
            elif kind is str:
                define.text(field.name, None, text)
            elif kind is float:
                define.number(field.name, None, text, least=0.0)
            else:
                least = 0 if field.default == 0 else 1  # 0 stands for something else
                define.integer(field.name, None, text, least)

    def _home(self):
        module = self.settings.__module__
        return f"experiments.{self.name}" if module == "__main__" else module

    def _fields(self):
        every = dataclasses.fields(self.settings)
        return [f for f in every if self.fields is None or f.name in self.fields]

    def chosen(self, values: flags.FlagValues, settings: Any = None) -> Any:
        """Settings, by default those of the dataclass, with what flags change of them."""
        names = [field.name for field in self._fields()]
        given = {name: values[name].value for name in names if values[name].present}
        return dataclasses.replace(settings or self.settings(), **given)

    def command(self, values: flags.FlagValues) -> str:
        """The command that runs it again, but for where files lie on this machine."""
        parts = [f"python -m experiments.{self.name}"]
        for name in ("data", "public"):
            if name in values and values[name].value:
                parts.append(f"--{name}={pathlib.PurePath(values[name].value).name}")
        left_out = (*_PLACES, "epsilon", "delta") if _is_plain(values) else _PLACES
        for name in values:
            if name not in left_out and (values[name].present or values[name].value):
                parts.append(f"--{name}={values[name].value}")
        return " ".join(parts)

    @contextlib.contextmanager
    def recorded(self, values: flags.FlagValues, **about) -> Iterator[dict]:
        """The record of a run, for its results; a block that ends well adds it to `--out`.

        Args:
            values: of the flags.
            about: what tells the run from others, apart from its command.

        Raises:
            app.UsageError: `--out` has such a run already, or is no file of results.
        """
        path = results_file(values)
        about = {name: _plain_json(value) for name, value in about.items()}
        if path is not None and path.exists():
            for number, other in enumerate(stored(values), 1):
                if all(name in other and other[name] == about[name] for name in about):
                    raise app.UsageError(f"--out={path} has this run already, in line {number}.")
        made = record.provenance()  # of the code that runs, whatever is changed meanwhile
        result = {"command": self.command(values), **about}
        yield result
        result |= made
        if path is not None:
            record.append(path, result)


def _is_plain(values):
    return "plain" in values and values.plain


def _plain_json(value):
    """The value as JSON reads what it writes; of settings, a dict."""
    value = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
    return json.loads(json.dumps(value))


def _kind(field):
    """The type of a setting, whether or not it may be None."""
    if isinstance(field.type, types.UnionType):
        return next(kind for kind in typing.get_args(field.type) if kind is not type(None))
    return field.type
