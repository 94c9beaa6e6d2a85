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

from accountants.ledger.files import LedgerError
from accountants.ledger.ledger import Ledger
from accountants.ledger.records import LedgerEntry
from accountants.ledger.writing import LedgerRepair, LedgerRun, LedgerWriter

__all__ = ["Ledger", "LedgerEntry", "LedgerError", "LedgerRepair", "LedgerRun", "LedgerWriter"]
