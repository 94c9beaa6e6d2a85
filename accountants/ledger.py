"""A crash-safe record of the privacy that has been spent on one data set.

A ledger is a text file that is only ever appended to, one JSON record a line. A training run is
opened with its mechanism. Before steps are taken they are *reserved*, some ahead, with the record
on disk (fsync) before the first of them; a clean end *settles* the run at the steps really taken.
Where the process dies the reservation stands, so the ledger may say too much, never too little.

Each line ends with a check: the start of the SHA-256 of the line and of the check before it. A
line altered, removed, doubled or moved is found by its number. (Whole lines missing at the end
are the one thing that a file cannot know of itself.)

A last line without its newline is *torn*: the process died while it wrote. Nothing was released
on its account, as steps wait for the fsync, but it is counted for as much as it could have said:
a full reservation of the run that was open. Where no run was open it can only have been the
opening of one, which spends nothing. The next writer seals the torn line by appending to it, on
the same line, the record of what it was counted for. Until that is complete the line is torn, so
a crash in between changes nothing.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import io
import json
import os
import secrets
from types import TracebackType
from typing import Any

from accountants.accounting import Accountant, Epsilon, epsilon
from accountants.mechanisms import TrainingRun
from accountants.sampling import Relation, Sampling
from accountants.validation import check_integer

_CHECK_LENGTH = 16
_SEAL = b" <torn> "


class LedgerError(Exception):
    """The ledger is corrupt, of another version, in use by another writer, or misused."""


@dataclasses.dataclass(frozen=True)
class LedgerEntry:
    """One training run of a ledger.

    Attributes:
        run_id: a random name.
        time: when it was opened, in UTC, ISO 8601.
        run: its mechanism, with the steps that are charged for it.
        settled: whether it ended cleanly, so that these are the steps it took. Otherwise it is
            still going on or has died, and what it had reserved is charged.
    """

    run_id: str
    time: str
    run: TrainingRun
    settled: bool


class Ledger:
    """The privacy spent on one data set by all the runs that name the same file.

    Reading takes no lock and may go on beside a writer. A file that does not exist is an empty
    ledger; it is created by the first run. One writer at a time, also within a process.

    >>> import tempfile, pathlib
    >>> from accountants import FullBatch
    >>> path = pathlib.Path(tempfile.mkdtemp(), "spent.ledger")
    >>> ledger = Ledger(path)
    >>> with ledger.open_run(noise_multiplier=4.0, sampling=FullBatch(), num_examples=100) as run:
    ...     for _ in range(3):
    ...         run.pay()  # then the step may be taken
    >>> ledger.steps
    3
    >>> ledger.epsilon(delta=1e-5) == epsilon(runs=ledger.runs, delta=1e-5)
    True

    Args:
        path: the file; its folder has to exist.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)

    def __repr__(self) -> str:
        return f"Ledger({self.path!r})"

    @property
    def entries(self) -> list[LedgerEntry]:
        """The runs in the order in which they were opened; read from the file at each access.

        Raises:
            LedgerError: the file is corrupt (the line is named), no ledger, or of another version.
        """
        return [entry.public() for entry in _read(self.path).entries]

    @property
    def runs(self) -> list[TrainingRun]:
        """The runs to account for: those of the entries that are charged any step."""
        return [entry.run for entry in self.entries if entry.run.steps]

    @property
    def steps(self) -> int:
        """The number of steps charged in all; raises as `entries` does."""
        return sum(entry.run.steps for entry in self.entries)

    def epsilon(
        self, delta: float, *, accountant: Accountant = "pld", relation: Relation | None = None
    ) -> Epsilon:
        """The epsilon of everything spent, at `delta`: `accountants.epsilon` of `runs`.

        Raises:
            LedgerError: as for `entries`.
            TypeError, ValueError: as for `accountants.epsilon`.
        """
        return epsilon(runs=self.runs, delta=delta, accountant=accountant, relation=relation)

    def open_run(
        self,
        *,
        noise_multiplier: float,
        sampling: Sampling,
        num_examples: int,
        reserve: int = 64,
        max_steps: int | None = None,
    ) -> "LedgerRun":
        """Opens a run to be paid for; a context manager that settles it at the end.

        Args:
            noise_multiplier, sampling, num_examples: the mechanism of each step, as `TrainingRun`
                explains it.
            reserve: how many steps to reserve at a time. Reserving waits for the disk, some
                milliseconds; a process that dies wastes at most this many steps.
            max_steps: the most steps that may be paid for, so that not even a reservation
                surpasses what a budget allows.

        Raises:
            LedgerError: another writer has it open, or the file is corrupt or no ledger.
            OSError: the file cannot be opened or written.
            TypeError, ValueError: an argument is of another type or out of range.
        """
        run = TrainingRun(noise_multiplier, sampling, num_examples, steps=0)
        reserve = check_integer(reserve, "reserve")
        if max_steps is not None:
            max_steps = check_integer(max_steps, "max_steps", 0)
        return LedgerRun(self.path, run, reserve, max_steps)


class LedgerRun:
    """A run that is being paid for; made by `Ledger.open_run`. Not for several threads at once."""

    def __init__(self, path: str, run: TrainingRun, reserve: int, max_steps: int | None) -> None:
        self._path = path
        self._run = run
        self._reserve = reserve
        self._max_steps = max_steps
        self._paid = 0
        self._reserved = 0
        self._process = os.getpid()
        self.run_id = secrets.token_hex(8)  # that of its entry
        # Unbuffered; if this object is dropped, the file closes and other writers get in.
        self._file: io.FileIO | None = _open_locked(path)
        try:
            self._check = _prepare(path, self._file)
            self._append(
                {
                    "type": "open",
                    "run_id": self.run_id,
                    "time": _now(),
                    **_without_steps(run),
                    "reserve": reserve,
                    "max_steps": max_steps,
                }
            )
        except BaseException:
            self._release()
            raise

    @property
    def paid(self) -> int:
        """The number of steps paid for."""
        return self._paid

    @property
    def run(self) -> TrainingRun:
        """The run as paid for so far."""
        return dataclasses.replace(self._run, steps=self._paid)

    def pay(self, steps: int = 1) -> None:
        """Pays for steps that are about to be taken. They may begin when this has returned.

        Raises:
            LedgerError: the run is closed, or belongs to a parent process, or `max_steps` would be
                exceeded (then nothing has been paid).
            OSError: the record could not be written. The run takes no more payments.
            TypeError, ValueError: `steps` is no positive integer.
        """
        # The common case, a step within the reservation, is kept short.
        if not (type(steps) is int and steps > 0):
            steps = check_integer(steps, "steps")
        if self._file is None or os.getpid() != self._process:
            state = "closed" if self._file is None else "open in the process that forked this one"
            raise LedgerError(f"the run in {self._path} is {state}; nothing can be paid by it.")
        needed = self._paid + steps
        if self._max_steps is not None and needed > self._max_steps:
            raise LedgerError(
                f"the run in {self._path} may pay for {self._max_steps} steps; {self._paid} are "
                f"paid for and {steps} more were asked for."
            )
        while self._reserved < needed:
            # Never more than `reserve` at once: a torn line is counted for no more than that.
            amount = self._reserve
            if self._max_steps is not None:
                amount = min(amount, self._max_steps - self._reserved)
            self._append({"type": "reserve", "steps": amount})
            self._reserved += amount
        self._paid = needed

    def close(self) -> None:
        """Settles the run at the steps paid for and lets other writers in. Harmless if repeated.

        Raises:
            OSError: the record could not be written; the reservation stands.
        """
        if self._file is None:
            return
        try:
            if os.getpid() == self._process:
                self._append({"type": "settle", "steps": self._paid})
        finally:
            self._release()

    def __enter__(self) -> "LedgerRun":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _append(self, record: dict[str, Any]) -> None:
        file = self._file
        if file is None:
            raise LedgerError(f"the run in {self._path} is closed.")
        try:
            # The check first: an interrupt after the write must not leave that of the line before.
            line, self._check = _encode(record, self._check)
            _write(file, line)
        except BaseException:
            # A part of the line may be in the file: nothing may be appended behind it.
            self._release()
            raise

    def _release(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()


# --- the file -------------------------------------------------------------------------------------


def _encode(record: dict[str, Any], previous: str) -> tuple[bytes, str]:
    """A record as a line, and its check, chained to that of the line before."""
    text = json.dumps(record, ensure_ascii=True, allow_nan=False).encode()
    check = _checksum(previous, text)
    return text + b" " + check.encode() + b"\n", check


def _checksum(previous: str, text: bytes) -> str:
    return hashlib.sha256(previous.encode() + text).hexdigest()[:_CHECK_LENGTH]


# Always the same bytes, so that the beginning of a torn one is recognised.
_HEADER, _HEADER_CHECK = _encode({"type": "privacy ledger", "version": 1}, "")


def _write(file: io.FileIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
    os.fsync(file.fileno())


def _open_locked(path: str) -> io.FileIO:
    import fcntl  # POSIX only; reading and accounting work without

    file = open(path, "ab", buffering=0)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The name of a new file is on disk only when its folder is.
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except BaseException as error:
        file.close()  # also on an interrupt, whose traceback may keep the file open, and its lock
        if isinstance(error, BlockingIOError):
            raise LedgerError(
                f"{path} is being written by another run; a ledger takes one writer at a time."
            ) from None
        raise
    return file


def _prepare(path: str, file: io.FileIO) -> str:
    """Makes the end of a locked ledger fit to be appended to; returns the last check."""
    state = _read(path)
    if state.missing_header:
        _write(file, state.missing_header)
        return _HEADER_CHECK
    if state.torn is None:
        return state.check
    record = {
        "type": "torn",
        "time": _now(),
        "sha256": _digest(state.torn),
        "steps": state.torn_steps,
    }
    line, check = _encode(record, state.check)
    _write(file, _SEAL + line)
    return check


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _without_steps(run: TrainingRun) -> dict[str, Any]:
    values = run.to_dict()
    del values["steps"]
    return values


@dataclasses.dataclass
class _Entry:
    """A run while it is read."""

    run_id: str
    time: str
    run: TrainingRun
    reserve: int
    max_steps: int | None
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

    def public(self) -> LedgerEntry:
        run = dataclasses.replace(self.run, steps=self.charged)
        return LedgerEntry(self.run_id, self.time, run, self.settled)


@dataclasses.dataclass
class _State:
    """A ledger as read: its entries, the last check, and what is wrong with its end.

    A torn line is charged in `entries` already, with `torn_steps`.
    """

    entries: list[_Entry] = dataclasses.field(default_factory=list)
    check: str = _HEADER_CHECK
    torn: bytes | None = None
    torn_steps: int = 0
    missing_header: bytes = b""

    def apply(self, record: dict[str, Any], damaged: bytes | None) -> None:
        """Takes in the record of one line; any exception says that it makes no sense here."""
        kind = record["type"]
        last = self.entries[-1] if self.entries else None
        if (kind == "torn") != (damaged is not None):
            raise ValueError("a seal without a torn line")
        if kind == "open":
            if last is not None:
                # Its process has died: what it reserved stays charged.
                last.open = False
            mechanism = {key: record[key] for key in ("noise_multiplier", "sampling")}
            run = TrainingRun.from_dict(
                mechanism | {"num_examples": record["num_examples"], "steps": 0}
            )
            self.entries.append(
                _Entry(
                    record["run_id"], record["time"], run, record["reserve"], record["max_steps"]
                )
            )
        elif kind == "torn":
            if damaged is None or record["sha256"] != _digest(damaged):
                raise ValueError("a torn line was altered")
            if last is not None:
                last.charged += record["steps"]
                last.open = False
        elif kind == "reserve" and last is not None and last.open:
            last.charged += record["steps"]
        elif kind == "settle" and last is not None and last.open:
            if record["steps"] > last.charged:
                raise ValueError("more settled than reserved")
            last.charged = record["steps"]
            last.open, last.settled = False, True
        else:
            raise ValueError("a record out of place")


def _read(path: str) -> _State:
    data = b""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        data = file.read()
    state = _State()
    if len(data) < len(_HEADER) and _HEADER.startswith(data):
        state.missing_header = _HEADER[len(data) :]
        return state
    *lines, rest = data.split(b"\n")
    if not data.startswith(_HEADER):
        raise LedgerError(
            f"{path}, line 1: not the header of a privacy ledger of version 1; "
            f"it starts with {data[:40]!r}."
        )
    for number, line in enumerate(lines[1:], start=2):
        damaged: bytes | None = None
        if _SEAL in line:
            damaged, _, line = line.rpartition(_SEAL)
        text, _, check = line.rpartition(b" ")
        if _checksum(state.check, text).encode() != check:
            raise LedgerError(
                f"{path}, line {number}: the check of the line does not match. The file was "
                "altered or damaged; what it says cannot be relied on."
            )
        try:
            state.apply(json.loads(text), damaged)
        except (KeyError, TypeError, ValueError) as error:
            raise LedgerError(f"{path}, line {number}: {error}.") from error
        state.check = check.decode()
    if rest:
        state.torn = rest
        if state.entries:
            state.torn_steps = state.entries[-1].torn_steps()
            state.entries[-1].charged += state.torn_steps
    return state
