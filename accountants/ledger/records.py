"""What the lines of a ledger say: their records, their checks, and the entries they add up to."""

import dataclasses
import datetime
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from accountants.ledger.files import LedgerError
from accountants.mechanisms import Mechanism
from accountants.queries import check_description, mechanism_from_dict
from accountants.validation import argument_message, check_integer

_CHECK_LENGTH = 16
SEAL = b" <torn> "


@dataclasses.dataclass(frozen=True)
class LedgerEntry:
    """One training run of a ledger, or one query.

    Attributes:
        run_id: a random name.
        time: when it was opened, in UTC, ISO 8601.
        run: its mechanism, a `TrainingRun` or a `Query`, with the steps or times that are charged
            for it.
        settled: whether it ended cleanly, so that these are the steps it took. Otherwise it is
            still going on or has died, and what it had reserved is charged.
        about: what else was written down of it, texts by their names.
    """

    run_id: str
    time: str
    run: Mechanism
    settled: bool
    about: Mapping[str, str] = dataclasses.field(default_factory=dict)


def encode(record: dict[str, Any], previous: str) -> tuple[bytes, str]:
    """A record as a line, and its check, chained to that of the line before."""
    text = json.dumps(record, ensure_ascii=True, allow_nan=False).encode()
    check = checksum(previous, text)
    return text + b" " + check.encode() + b"\n", check


def checksum(previous: str, text: bytes) -> str:
    return hashlib.sha256(previous.encode() + text).hexdigest()[:_CHECK_LENGTH]


# Always the same bytes, so that any other beginning is recognised.
HEADER, HEADER_CHECK = encode({"type": "privacy ledger", "version": 1}, "")


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def charged(entries: list[LedgerEntry]) -> list[Mechanism]:
    """What of the entries is to be accounted for."""
    return [entry.run for entry in entries if entry.run.count]


def settings(run: Mechanism) -> dict[str, Any]:
    """The values of the record that opens a run: what it is, and not how much of it there was."""
    return {key: value for key, value in run.to_dict().items() if key not in ("steps", "times")}


def check_limits(reserve: int, max_steps: int | None) -> tuple[int, int | None]:
    reserve = check_integer(reserve, "reserve")
    return reserve, None if max_steps is None else check_integer(max_steps, "max_steps", 0)


def check_about(about: Mapping[str, str]) -> dict[str, str]:
    """What is written down of a run beside its mechanism: texts of one line each."""
    if not isinstance(about, Mapping):
        raise TypeError(argument_message("about", "a mapping of names to texts", about))
    for name, text in about.items():
        check_description(name, "about")
        check_description(text, f"about[{name!r}]")
    return dict(about)


@dataclasses.dataclass
class _Entry:
    """A run while it is read."""

    run_id: str
    time: str
    run: Mechanism
    reserve: int
    max_steps: int | None
    about: dict[str, str]
    charged: int = 0
    open: bool = True
    settled: bool = False

    def torn_steps(self) -> int:
        """The steps that an unreadable record may have reserved for this run."""
        if not self.open:
            return 0
        if self.max_steps is None:
            return self.reserve
        return min(self.reserve, self.max_steps - self.charged)


@dataclasses.dataclass
class State:
    """A ledger as read: its entries, the last check, and what is wrong with its end.

    A torn line is charged in `entries` already, with `torn_steps`.
    """

    entries: list[_Entry] = dataclasses.field(default_factory=list)
    names: set[str] = dataclasses.field(default_factory=set)
    check: str = HEADER_CHECK
    torn: bytes | None = None
    torn_steps: int = 0

    def public(self) -> list[LedgerEntry]:
        return [
            LedgerEntry(e.run_id, e.time, e.run.counted(e.charged), e.settled, e.about)
            for e in self.entries
        ]

    def tear(self, line: bytes) -> None:
        """Takes in a last line that cannot be read."""
        self.torn = line
        if self.entries:
            self.torn_steps = self.entries[-1].torn_steps()
            self.entries[-1].charged += self.torn_steps

    def apply(self, record: dict[str, Any], damaged: bytes | None) -> None:
        """Takes in the record of one line; any exception says that it makes no sense here."""
        kind = record["type"]
        last = self.entries[-1] if self.entries else None
        if (kind == "torn") != (damaged is not None):
            raise ValueError("a seal without a torn line")
        if kind == "open":
            self._open(record)
        elif kind == "torn":
            if damaged is None or record["sha256"] != digest(damaged):
                raise ValueError("a torn line was altered")
            steps = check_integer(record["steps"], "steps", last.torn_steps() if last else 0)
            if last is not None:
                last.charged += steps
                last.open = False
        elif kind == "reserve" and last is not None and last.open:
            steps = check_integer(record["steps"], "steps")
            if steps > last.torn_steps():
                raise ValueError(f"{steps} steps are reserved, more than the run may reserve")
            last.charged += steps
        elif kind == "settle" and last is not None and last.open:
            steps = check_integer(record["steps"], "steps", 0)
            if steps > last.charged:
                raise ValueError("more settled than reserved")
            last.charged = steps
            last.open, last.settled = False, True
        else:
            raise ValueError("a record out of place")

    def _open(self, record: dict[str, Any]) -> None:
        if self.entries:
            # Its process has died: what it reserved stays charged.
            self.entries[-1].open = False
        name = record["run_id"]
        if not isinstance(name, str) or name in self.names:
            raise ValueError(f"`run_id` must be a text of its own for each run; got {name!r}")
        self.names.add(name)
        datetime.datetime.fromisoformat(record["time"])
        if "query" in record:
            values = {"query": record["query"], "times": 0}
        else:
            names = ("noise_multiplier", "sampling", "num_examples")
            values = {key: record[key] for key in names} | {"steps": 0}
            values |= {"unit": record["unit"]} if "unit" in record else {}
        run = mechanism_from_dict(values)
        limits = check_limits(record["reserve"], record["max_steps"])
        about = check_about(record.get("about", {}))
        self.entries.append(_Entry(name, record["time"], run, *limits, about))


def parse(path: str, data: bytes, repair: bool = False) -> State:
    """What the bytes of a ledger say; to `repair`, any last line may be one that cannot be read."""
    if not data.startswith(HEADER):
        raise LedgerError(_not_a_ledger(path, data))
    state = State()
    *lines, rest = data.split(b"\n")
    for number, line in enumerate(lines[1:], start=2):
        last = number == len(lines) and not rest
        try:
            _apply_line(state, line)
        except _Unreadable as error:
            if repair and last:
                state.tear(line)
                break
            advice = (
                f"`lipdp ledger repair {path}` counts it as the most that it can have said."
                if last
                else "Put back a copy of the file; what was spent is not known without this line."
            )
            raise LedgerError(f"{path}, line {number}: {error} {advice}") from error.__cause__
    if rest:
        state.tear(rest)
    return state


class _Unreadable(Exception):
    """A line that says nothing, or nothing that can be."""


def _apply_line(state: State, line: bytes) -> None:
    damaged: bytes | None = None
    if SEAL in line:
        damaged, _, line = line.rpartition(SEAL)
    text, _, check = line.rpartition(b" ")
    if checksum(state.check, text).encode() != check:
        raise _Unreadable(
            "the check of the line does not match. The file was altered or damaged; what it says "
            "cannot be relied on."
        )
    try:
        record = json.loads(text)
        if not isinstance(record, dict):
            raise TypeError("no record")
        state.apply(record, damaged)
    except KeyError as error:
        raise _Unreadable(f"the record has no {error}.") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise _Unreadable(f"{str(error).rstrip('.')}.") from error
    state.check = check.decode()


def _not_a_ledger(path: str, data: bytes) -> str:
    start = data[: len(HEADER)]
    if not start:
        return (
            f"{path}, line 1: the file is empty; a ledger has a first line from the beginning. If "
            "nothing was ever paid for in it, delete it; otherwise put back a copy."
        )
    if HEADER.startswith(start):
        return (
            f"{path}, line 1: the file was cut within its first line. Put back a copy; if nothing "
            "was ever paid for in it, delete it."
        )
    return (
        f"{path}, line 1: not the header of a privacy ledger of version 1; it starts with "
        f"{start[:40]!r}. Name another file as the ledger; this one was left as it is."
    )
