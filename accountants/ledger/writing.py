"""The one who writes a ledger: locks it, pays for steps ahead, and seals what was torn."""

import abc
import contextlib
import dataclasses
import io
import os
import secrets
import time
import weakref
from collections.abc import Mapping
from types import MappingProxyType, TracebackType
from typing import Any, Self

from accountants.accounting import resolve_relation
from accountants.ledger import files, records
from accountants.ledger.files import LedgerError
from accountants.mechanisms import Mechanism
from accountants.validation import check_integer

# Seconds within which two writes may have the same time stamp.
_TICK = 0.05


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


class _Closing(abc.ABC):
    """A scope at whose end something is closed."""

    @abc.abstractmethod
    def close(self) -> None:
        """Harmless if repeated."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class LedgerWriter(_Closing):
    """A ledger that no one else can write; made by `Ledger.lock`, for one run.

    >>> import tempfile, pathlib
    >>> from accountants import FullBatch, Ledger, TrainingRun
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
            self._file = files.open_locked(path, records.HEADER, _is_open)
            self._identity = files.identity(os.fstat(self._file.fileno()))
            _WRITERS.add(self)
            self._content = bytearray(files.whole(self._file))
            self._seen: tuple[int, ...] | None = None
            self._written = time.monotonic()
            self.check_unchanged()
            state = records.parse(path, bytes(self._content), repair)
            self.entries = state.public()
            self._check = state.check
            if state.torn is not None:
                self._seal(state, repair)
        except BaseException:
            self.close()
            raise

    @property
    def runs(self) -> list[Mechanism]:
        """What was spent when the file was locked, as `Ledger.runs`."""
        return records.charged(self.entries)

    def open_run(
        self,
        run: Mechanism,
        reserve: int = 64,
        max_steps: int | None = None,
        about: Mapping[str, str] = MappingProxyType({}),
    ) -> "LedgerRun":
        """Opens the run, whose end lets other writers in, as does an error; its `steps` do not
        matter. `about` is written down with it.

        Raises:
            LedgerError: this is closed, or the file has changed.
            OSError: the record could not be written.
            TypeError, ValueError: an argument is of another type or out of range, or no unit and
                neighbouring relation would hold for all that the file has.
        """
        try:
            resolve_relation([*self.runs, run], None)  # nobody could say what is spent
            limits = records.check_limits(reserve, max_steps)
            return LedgerRun(self, run, *limits, records.check_about(about))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Lets other writers in. Harmless if repeated."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

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
            if files.identity(now) != self._identity:
                self._lose("replaced by another file")
            elif files.whole(self._file) != self._content:
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
        line, check = records.encode(record, self._check)
        self._write(line)
        self._check = check

    def _write(self, data: bytes) -> None:
        try:
            self._seen = None
            files.write(self._file, data)
            self._content += data
            self._written = time.monotonic()
        except BaseException:
            # A part of the line may be in the file: nothing may be appended behind it.
            self.close()
            raise

    def _seal(self, state: "records.State", repair: bool) -> None:
        """Makes the torn end of the file a line that says what it is counted for."""
        if repair:
            backup = files.saved(self._path, "backup", bytes(self._content))
            line = self._content.rstrip(b"\n").count(b"\n") + 1
            self.repaired = LedgerRepair(backup, line, state.torn_steps)
        if self._content.endswith(b"\n"):
            # Without its newline a line that cannot be read is a torn one.
            self._file.truncate(len(self._content) - 1)
            del self._content[-1:]
        record = {
            "type": "torn",
            "time": records.now(),
            "sha256": records.digest(state.torn),
            "steps": state.torn_steps,
        }
        line, self._check = records.encode(record, state.check)
        self._write(records.SEAL + line)

    def _lose(self, what: str) -> None:
        """Gives the file up: what this run has reserved is kept beside it."""
        self.close()
        kept = "What it held until then could not be saved."
        with contextlib.suppress(OSError):
            saved = files.saved(self._path, "saved", bytes(self._content))
            kept = f"What it held until then, with the steps of this run, is saved in {saved}."
        raise LedgerError(
            f"{self._path} was {what} while a run was paying into it. No further step may run. "
            f"{kept} Put that back, and start again."
        )


# Those of this process that are open.
_WRITERS: "weakref.WeakSet[LedgerWriter]" = weakref.WeakSet()


def _is_open(identity: tuple[int, int]) -> bool:
    return any(not writer.closed and writer._identity == identity for writer in _WRITERS)


def _close_in_child() -> None:
    """A forked process must not keep the lock of a parent that dies."""
    for writer in list(_WRITERS):
        writer.close()


os.register_at_fork(after_in_child=_close_in_child)


class LedgerRun(_Closing):
    """A run that is being paid for; made by `Ledger.open_run`. Not for several threads at once.

    Attributes:
        run_id: its name in the file.
    """

    def __init__(
        self,
        writer: LedgerWriter,
        run: Mechanism,
        reserve: int,
        max_steps: int | None,
        about: dict[str, str],
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
                "time": records.now(),
                **records.settings(run),
                "reserve": reserve,
                "max_steps": max_steps,
                **({"about": about} if about else {}),
            }
        )

    @property
    def paid(self) -> int:
        """The number of steps paid for."""
        return self._paid

    @property
    def run(self) -> Mechanism:
        """The run as paid for so far."""
        return self._run.counted(self._paid)

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
