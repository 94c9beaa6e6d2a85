"""A crash-safe record of the privacy that has been spent on one data set.

A ledger is a text file that is only ever appended to, one JSON record a line. A training run is
opened with its mechanism. Before steps are taken they are *reserved*, some ahead, with the record
on disk (fsync) before the first of them; a clean end *settles* the run at the steps really taken.
Where the process dies the reservation stands, so the ledger may say too much, never too little.

Each line ends with a check: the start of the SHA-256 of the line and of the check before it. A
line altered, removed, doubled or moved is found by its number. (Whole lines missing at the end
are the one thing that a file cannot know of itself. A file without even its first line is refused:
a ledger is made whole, so something has been lost.)

A last line without its newline is *torn*: the process died while it wrote. Nothing was released
on its account, as steps wait for the fsync, but it is counted for as much as it could have said:
a full reservation of the run that was open. Where no run was open it can only have been the
opening of one, which spends nothing. The next writer seals the torn line by appending to it, on
the same line, the record of what it was counted for. Until that is complete the line is torn, so
a crash in between changes nothing.

There is one writer at a time. It takes the file's lock (`flock`, which ends with the process)
before it reads, so that what a run is planned on is what it is paid on. What it has read and
written is kept in memory, and the file is held against that before each payment.
"""

import contextlib
import dataclasses
import datetime
import errno
import hashlib
import io
import json
import os
import secrets
import stat
import time
import weakref
from types import TracebackType
from typing import Any

from accountants.accounting import Accountant, Epsilon, epsilon
from accountants.mechanisms import TrainingRun
from accountants.sampling import Relation, Sampling
from accountants.validation import check_integer

_CHECK_LENGTH = 16
_SEAL = b" <torn> "
# Seconds within which two writes may have the same time stamp.
_TICK = 0.05


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


@dataclasses.dataclass(frozen=True)
class LedgerRepair:
    """What `Ledger.repair` did.

    Attributes:
        backup: path of a copy of the file as it was.
        line: number of the line that could not be read.
        steps: what it is counted for.
    """

    backup: str
    line: int
    steps: int


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
        path: the file; its folder has to exist. A `~` at its start is the home directory.

    Attributes:
        path: the file, as an absolute path.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.path.abspath(os.path.expanduser(os.fspath(path)))

    def __repr__(self) -> str:
        return f"Ledger({self.path!r})"

    @property
    def entries(self) -> list[LedgerEntry]:
        """The runs in the order in which they were opened; read from the file at each access.

        Raises:
            LedgerError: the file is corrupt (the line is named), no ledger, of another version,
                or cannot be read.
        """
        return _read(self.path).public()

    @property
    def runs(self) -> list[TrainingRun]:
        """The runs to account for: those of the entries that are charged any step."""
        return _charged(self.entries)

    @property
    def steps(self) -> int:
        """The number of steps charged in all; raises as `entries` does."""
        return sum(entry.run.steps for entry in self.entries)

    @property
    def torn_steps(self) -> int | None:
        """What a last line that was cut is counted for; None if the file ends with a whole line.

        Raises:
            LedgerError: as for `entries`.
        """
        state = _read(self.path)
        return None if state.torn is None else state.torn_steps

    def epsilon(
        self, delta: float, *, accountant: Accountant = "pld", relation: Relation | None = None
    ) -> Epsilon:
        """The epsilon of everything spent, at `delta`: `accountants.epsilon` of `runs`.

        Raises:
            LedgerError: as for `entries`.
            TypeError, ValueError: as for `accountants.epsilon`.
        """
        return epsilon(runs=self.runs, delta=delta, accountant=accountant, relation=relation)

    def lock(self) -> "LedgerWriter":
        """Keeps other writers out, and reads what was spent: for a run that depends on it.

        Raises:
            LedgerError: another writer has the file, or it is corrupt, no ledger, or cannot be
                written. The message says what to do.
        """
        return LedgerWriter(self.path)

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
            LedgerError: as for `lock`.
            OSError: the record could not be written.
            TypeError, ValueError: an argument is of another type or out of range.
        """
        run = TrainingRun(noise_multiplier, sampling, num_examples, steps=0)
        _check_limits(reserve, max_steps)  # before a file is made
        writer = self.lock()
        try:
            return writer.open_run(run, reserve, max_steps)
        except BaseException:  # an interrupt on the way there
            writer.close()
            raise

    def repair(self) -> LedgerRepair | None:
        """Counts a last line that cannot be read as the most that it can have said.

        What was spent never becomes less. The file is copied first. Damage elsewhere cannot be
        repaired: what such a line said is not known.

        Returns:
            What was done, or None if there is nothing to repair.

        Raises:
            LedgerError: as for `lock`, or the damage is not in the last line.
            OSError: the copy or the record could not be written.
        """
        if not os.path.exists(self.path):
            raise LedgerError(f"{self.path} does not exist: there is nothing to repair.")
        with LedgerWriter(self.path, repair=True) as writer:
            return writer.repaired


class LedgerWriter:
    """A ledger that no one else can write; made by `Ledger.lock`, for one run.

    >>> import tempfile, pathlib
    >>> from accountants import FullBatch
    >>> path = pathlib.Path(tempfile.mkdtemp(), "spent.ledger")
    >>> with Ledger(path).lock() as writer:
    ...     run = TrainingRun(4.0, FullBatch(), num_examples=100, steps=3 - len(writer.runs))
    ...     with writer.open_run(run) as paying:
    ...         paying.pay(run.steps)
    >>> Ledger(path).steps
    3

    Attributes:
        entries: the runs when the file was locked, as `Ledger.entries`.
        repaired: what was repaired, if that was asked for.
    """

    def __init__(self, path: str, repair: bool = False) -> None:
        self.repaired: LedgerRepair | None = None
        self._path = path
        self._process = os.getpid()
        # Unbuffered; if this object is dropped, the file closes and other writers get in.
        self._file: io.FileIO | None = None
        try:
            self._file = _open_locked(path)
            self._identity = _identity(os.fstat(self._file.fileno()))
            _WRITERS.add(self)
            self._content = bytearray(_whole(self._file))
            self._seen: tuple[int, ...] | None = None
            self._written = time.monotonic()
            self.check_unchanged()
            state = _parse(path, bytes(self._content), repair)
            self.entries = state.public()
            self._check = state.check
            if state.torn is not None:
                self._seal(state, repair)
        except BaseException:
            self.close()
            raise

    @property
    def runs(self) -> list[TrainingRun]:
        """What was spent when the file was locked, as `Ledger.runs`."""
        return _charged(self.entries)

    def open_run(
        self, run: TrainingRun, reserve: int = 64, max_steps: int | None = None
    ) -> "LedgerRun":
        """Opens the run, whose end lets other writers in, as does an error; its `steps` do not
        matter.

        Raises:
            LedgerError: this is closed, or the file has changed.
            OSError: the record could not be written.
            TypeError, ValueError: an argument is of another type or out of range.
        """
        try:
            return LedgerRun(self, run, *_check_limits(reserve, max_steps))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Lets other writers in. Harmless if repeated."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def __enter__(self) -> "LedgerWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        """Whether nothing can be written any more."""
        return self._file is None

    def check_open(self) -> None:
        """Raises LedgerError where nothing can be written by this process."""
        if os.getpid() != self._process:
            raise LedgerError(
                f"the run in {self._path} is open in the process that forked this one; nothing "
                "can be paid by it here."
            )
        if self._file is None:
            raise LedgerError(f"the run in {self._path} is closed; nothing can be paid by it.")

    def check_unchanged(self) -> None:
        """Raises LedgerError, and closes, unless the file is what this process has left.

        That is at the same path the same file, with the same content. It is read again where its
        size or time stamps are others than at the last look, or too young to tell.
        """
        try:
            now = os.stat(self._path)
            seen = (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)
            if seen == self._seen:
                return
            self.check_open()
            if _identity(now) != self._identity:
                self._lose("replaced by another file")
            elif _whole(self._file) != self._content:
                self._lose("changed by somebody else")
        except FileNotFoundError:
            self._lose("removed")
        except OSError:
            self.close()
            raise
        self._seen = seen if time.monotonic() - self._written > _TICK else None

    def append(self, record: dict[str, Any]) -> None:
        """Writes a record and waits for the disk.

        Raises:
            LedgerError: this is closed, or the file has changed.
            OSError: the record could not be written. Nothing more can be.
        """
        self.check_open()
        self.check_unchanged()
        line, check = _encode(record, self._check)
        self._write(line)
        self._check = check

    def _write(self, data: bytes) -> None:
        try:
            self._seen = None
            _write(self._file, data)
            self._content += data
            self._written = time.monotonic()
        except BaseException:
            # A part of the line may be in the file: nothing may be appended behind it.
            self.close()
            raise

    def _seal(self, state: "_State", repair: bool) -> None:
        """Makes the torn end of the file a line that says what it is counted for."""
        if repair:
            backup = _saved(self._path, "backup", bytes(self._content))
            line = self._content.rstrip(b"\n").count(b"\n") + 1
            self.repaired = LedgerRepair(backup, line, state.torn_steps)
        if self._content.endswith(b"\n"):
            # Without its newline a line that cannot be read is a torn one.
            self._file.truncate(len(self._content) - 1)
            del self._content[-1:]
        record = {
            "type": "torn",
            "time": _now(),
            "sha256": _digest(state.torn),
            "steps": state.torn_steps,
        }
        line, self._check = _encode(record, state.check)
        self._write(_SEAL + line)

    def _lose(self, what: str) -> None:
        """Gives the file up: what this run has reserved is kept beside it."""
        self.close()
        kept = "What it held until then could not be saved."
        with contextlib.suppress(OSError):
            saved = _saved(self._path, "saved", bytes(self._content))
            kept = f"What it held until then, with the steps of this run, is saved in {saved}."
        raise LedgerError(
            f"{self._path} was {what} while a run was paying into it. No further step may run. "
            f"{kept} Put that back, and start again."
        )


# Those of this process that are open.
_WRITERS: "weakref.WeakSet[LedgerWriter]" = weakref.WeakSet()


def _close_in_child() -> None:
    """A forked process must not keep the lock of a parent that dies."""
    for writer in list(_WRITERS):
        writer.close()


os.register_at_fork(after_in_child=_close_in_child)


class LedgerRun:
    """A run that is being paid for; made by `Ledger.open_run`. Not for several threads at once.

    Attributes:
        run_id: its name in the file.
    """

    def __init__(
        self, writer: LedgerWriter, run: TrainingRun, reserve: int, max_steps: int | None
    ) -> None:
        self.run_id = secrets.token_hex(8)
        self._writer = writer
        self._run = run
        self._reserve = reserve
        self._max_steps = max_steps
        self._paid = 0
        self._reserved = 0
        writer.append(
            {
                "type": "open",
                "run_id": self.run_id,
                "time": _now(),
                **_without_steps(run),
                "reserve": reserve,
                "max_steps": max_steps,
            }
        )

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
                exceeded (then nothing has been paid); or the file was removed, replaced or changed
                meanwhile (then the run takes no more payments).
            OSError: the record could not be written. The run takes no more payments.
            TypeError, ValueError: `steps` is no positive integer.
        """
        # The common case, a step within the reservation, is kept short.
        if not (type(steps) is int and steps > 0):
            steps = check_integer(steps, "steps")
        self._writer.check_open()
        needed = self._paid + steps
        if self._max_steps is not None and needed > self._max_steps:
            raise LedgerError(
                f"the run in {self._writer._path} may pay for {self._max_steps} steps; "
                f"{self._paid} are paid for and {steps} more were asked for."
            )
        self._writer.check_unchanged()
        while self._reserved < needed:
            # Never more than `reserve` at once: a torn line is counted for no more than that.
            amount = self._reserve
            if self._max_steps is not None:
                amount = min(amount, self._max_steps - self._reserved)
            try:
                self._writer.append({"type": "reserve", "steps": amount})
                self._reserved += amount
            except BaseException:
                self._writer.close()  # an interrupt in between: the two counts may differ
                raise
        self._paid = needed

    def close(self) -> None:
        """Settles the run at the steps paid for and lets other writers in. Harmless if repeated.

        Raises:
            LedgerError: the file was removed, replaced or changed meanwhile.
            OSError: the record could not be written; the reservation stands.
        """
        if self._writer.closed:
            return
        try:
            self._writer.append({"type": "settle", "steps": self._paid})
        finally:
            self._writer.close()

    def __enter__(self) -> "LedgerRun":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _charged(entries: list[LedgerEntry]) -> list[TrainingRun]:
    return [entry.run for entry in entries if entry.run.steps]


def _check_limits(reserve: int, max_steps: int | None) -> tuple[int, int | None]:
    reserve = check_integer(reserve, "reserve")
    return reserve, None if max_steps is None else check_integer(max_steps, "max_steps", 0)


# --- the file -------------------------------------------------------------------------------------


def _encode(record: dict[str, Any], previous: str) -> tuple[bytes, str]:
    """A record as a line, and its check, chained to that of the line before."""
    text = json.dumps(record, ensure_ascii=True, allow_nan=False).encode()
    check = _checksum(previous, text)
    return text + b" " + check.encode() + b"\n", check


def _checksum(previous: str, text: bytes) -> str:
    return hashlib.sha256(previous.encode() + text).hexdigest()[:_CHECK_LENGTH]


# Always the same bytes, so that any other beginning is recognised.
_HEADER, _HEADER_CHECK = _encode({"type": "privacy ledger", "version": 1}, "")


def _write(file: io.FileIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
    os.fsync(file.fileno())


def _whole(file: io.FileIO) -> bytes:
    file.seek(0)
    return file.readall()


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _open_locked(path: str) -> io.FileIO:
    import fcntl  # POSIX only; reading and accounting work without

    _check_regular(path)
    try:
        if not os.path.exists(path):
            _create(os.path.realpath(path))
        file = open(path, "a+b", buffering=0, opener=_open_existing)
    except FileNotFoundError as error:
        raise LedgerError(f"{path} cannot be made: its folder does not exist.") from error
    except OSError as error:
        raise LedgerError(
            f"{path} cannot be written ({error.strerror}), so nothing can be paid for. Name a "
            "file that this user may write, in a folder that may be written."
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The name of a new file is on disk only when its folder is.
        folder = os.open(os.path.dirname(path), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return file
    except BaseException as error:
        own = _identity(os.fstat(file.fileno()))
        file.close()  # also on an interrupt, whose traceback may keep the file open, and its lock
        if isinstance(error, BlockingIOError):
            here = any(not writer.closed and writer._identity == own for writer in _WRITERS)
            raise LedgerError(_in_use(path, here)) from None
        if isinstance(error, OSError) and error.errno in _NO_LOCKS:
            raise LedgerError(
                f"{path} cannot be locked ({error.strerror}), so two runs could spend the same "
                "budget. Put the ledger on a file system with locks, such as a local disk."
            ) from error
        raise


def _open_existing(path: str, flags: int) -> int:
    return os.open(path, flags & ~os.O_CREAT)


_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def _in_use(path: str, here: bool) -> str:
    if here:
        advice = (
            "by another run of this process: end that one first (model.end_run(), where its loop "
            "was left)."
        )
    else:
        advice = "by another process: wait for its end, or stop it."
    return f"{path} is being written {advice} A ledger takes one writer at a time."


def _create(path: str) -> None:
    """Makes a new ledger, whole or not at all: an empty file could have lost what it held."""
    draft = f"{path}.{secrets.token_hex(4)}.new"
    try:
        with open(draft, "xb", buffering=0) as file:
            _write(file, _HEADER)
        try:
            os.link(draft, path)
        except FileExistsError:
            pass  # another process was faster
        except OSError:  # no hard links here
            os.rename(draft, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(draft)


def _saved(path: str, kind: str, content: bytes) -> str:
    """The path of a new file with the content, beside another."""
    name = f"{path}.{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%S}.{secrets.token_hex(2)}"
    with open(f"{name}.{kind}", "xb", buffering=0) as file:
        _write(file, content)
    return file.name


def _check_regular(path: str) -> None:
    with contextlib.suppress(OSError):
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            kind = "a directory" if stat.S_ISDIR(mode) else "no ordinary file"
            raise LedgerError(f"{path} is {kind}; a ledger is a file: name one in it or elsewhere.")


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


@dataclasses.dataclass
class _State:
    """A ledger as read: its entries, the last check, and what is wrong with its end.

    A torn line is charged in `entries` already, with `torn_steps`.
    """

    entries: list[_Entry] = dataclasses.field(default_factory=list)
    names: set[str] = dataclasses.field(default_factory=set)
    check: str = _HEADER_CHECK
    torn: bytes | None = None
    torn_steps: int = 0

    def public(self) -> list[LedgerEntry]:
        return [
            LedgerEntry(e.run_id, e.time, dataclasses.replace(e.run, steps=e.charged), e.settled)
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
            if damaged is None or record["sha256"] != _digest(damaged):
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
        mechanism = {key: record[key] for key in ("noise_multiplier", "sampling", "num_examples")}
        run = TrainingRun.from_dict(mechanism | {"steps": 0})
        limits = _check_limits(record["reserve"], record["max_steps"])
        self.entries.append(_Entry(name, record["time"], run, *limits))


def _read(path: str) -> _State:
    _check_regular(path)
    try:
        with open(path, "rb") as file:
            start = file.read(len(_HEADER))
            # Nothing of a file that is something else.
            return _parse(path, start + file.read() if start == _HEADER else start)
    except FileNotFoundError:
        return _State()
    except OSError as error:
        raise LedgerError(f"{path} cannot be read: {error.strerror}.") from error


def _parse(path: str, data: bytes, repair: bool = False) -> _State:
    """What the bytes of a ledger say; to `repair`, any last line may be one that cannot be read."""
    if not data.startswith(_HEADER):
        raise LedgerError(_not_a_ledger(path, data))
    state = _State()
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


def _apply_line(state: _State, line: bytes) -> None:
    damaged: bytes | None = None
    if _SEAL in line:
        damaged, _, line = line.rpartition(_SEAL)
    text, _, check = line.rpartition(b" ")
    if _checksum(state.check, text).encode() != check:
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
    start = data[: len(_HEADER)]
    if not start:
        return (
            f"{path}, line 1: the file is empty; a ledger has a first line from the beginning. If "
            "nothing was ever paid for in it, delete it; otherwise put back a copy."
        )
    if _HEADER.startswith(start):
        return (
            f"{path}, line 1: the file was cut within its first line. Put back a copy; if nothing "
            "was ever paid for in it, delete it."
        )
    return (
        f"{path}, line 1: not the header of a privacy ledger of version 1; it starts with "
        f"{start[:40]!r}. Name another file as the ledger; this one was left as it is."
    )
