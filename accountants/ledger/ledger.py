"""The ledger as its readers see it."""

import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from accountants.accounting import Accountant, Epsilon, epsilon
from accountants.ledger import files, records
from accountants.ledger.files import LedgerError
from accountants.ledger.records import LedgerEntry
from accountants.ledger.writing import LedgerRepair, LedgerRun, LedgerWriter
from accountants.mechanisms import Mechanism, TrainingRun
from accountants.queries import Query
from accountants.sampling import Relation, Sampling
from accountants.statement import Statement, Use
from accountants.validation import check_integer

if TYPE_CHECKING:
    import dp_accounting


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
    def runs(self) -> list[Mechanism]:
        """What is to be accounted for: the runs that are charged any step, and the queries."""
        return records.charged(self.entries)

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
        about: Mapping[str, str] = MappingProxyType({}),
        unit: str = "example",
    ) -> LedgerRun:
        """Opens a run to be paid for; a context manager that settles it at the end.

        Args:
            noise_multiplier, sampling, num_examples, unit: the mechanism of each step, as
                `TrainingRun` explains it.
            reserve: how many steps to reserve at a time. Reserving waits for the disk, some
                milliseconds; a process that dies wastes at most this many steps.
            max_steps: the most steps that may be paid for, so that not even a reservation
                surpasses what a budget allows.
            about: what else to write down of it, texts of one line each by their names, such as
                the kind of noise; statements quote it.

        Raises:
            LedgerError: as for `lock`.
            OSError: the record could not be written.
            TypeError, ValueError: an argument is of another type or out of range, or no unit and
                neighbouring relation would hold for all that the file has.
        """
        run = TrainingRun(noise_multiplier, sampling, num_examples, steps=0, unit=unit)
        records.check_limits(reserve, max_steps)  # before a file is made
        records.check_about(about)
        writer = self.lock()
        try:
            return writer.open_run(run, reserve, max_steps, about)
        except BaseException:  # an interrupt on the way there
            writer.close()
            raise

    def add(
        self,
        description: str,
        *,
        laplace: float | None = None,
        gaussian: float | None = None,
        epsilon: float | None = None,
        delta: float | None = None,
        rho: float | None = None,
        event: "dp_accounting.DpEvent | None" = None,
        relation: Relation = "add_or_remove_one",
        times: int = 1,
        unit: str = "example",
    ) -> None:
        """Pays for a use of the data that is no training: a statistic with noise, a table.

        What it releases may be released when this has returned. It is composed with the runs of the
        file, as `accountants.queries` explains.

        >>> import tempfile, pathlib
        >>> ledger = Ledger(pathlib.Path(tempfile.mkdtemp(), "spent.ledger"))
        >>> ledger.add("column means", laplace=2.0)
        >>> ledger.add("a table of counts", epsilon=0.3, delta=1e-7)
        >>> round(ledger.epsilon(delta=1e-6), 2)
        0.8

        Args:
            description: what it is, in one line.
            laplace, gaussian, epsilon, delta, rho, event, relation, times, unit: what is known of
                its privacy, as for `accountants.Query`.

        Raises:
            LedgerError: as for `lock`.
            OSError: the record could not be written.
            TypeError, ValueError: as for `accountants.Query`, or no neighbouring relation would
                hold for all that the file has; nothing has been written.
        """
        query = Query(
            description=description,
            laplace=laplace,
            gaussian=gaussian,
            epsilon=epsilon,
            delta=delta,
            rho=rho,
            event=event,
            relation=relation,
            times=check_integer(times, "times"),
            unit=unit,
        )
        with self.lock() as writer:
            with writer.open_run(query, query.times, query.times) as paying:
                paying.pay(query.times)

    def statement(
        self,
        delta: float,
        *,
        accountant: Accountant = "pld",
        relation: Relation | None = None,
        software: str | None = None,
    ) -> Statement:
        """What can be filed about all that the file has: an `accountants.Statement`.

        Args:
            delta, accountant, relation: as for `accountants.epsilon`.
            software: what accounts for it, to be named.

        Raises:
            LedgerError: as for `entries`.
            TypeError, ValueError: as for `accountants.epsilon`.
        """
        return Statement.of(
            [Use(entry.run, entry.about, entry.settled) for entry in self.entries],
            delta,
            subject=f"all that the ledger {os.path.basename(self.path)} holds",
            software=software,
            accountant=accountant,
            relation=relation,
        )

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


def _read(path: str) -> records.State:
    files.check_regular(path)
    try:
        with open(path, "rb") as file:
            start = file.read(len(records.HEADER))
            # Nothing of a file that is something else.
            return records.parse(path, start + file.read() if start == records.HEADER else start)
    except FileNotFoundError:
        return records.State()
    except OSError as error:
        raise LedgerError(f"{path} cannot be read: {error.strerror}.") from error
