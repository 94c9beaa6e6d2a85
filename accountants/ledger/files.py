"""The file of a ledger: made whole, locked by one writer, read and written to the disk."""

import contextlib
import datetime
import errno
import io
import os
import secrets
import stat
from collections.abc import Callable


class LedgerError(Exception):
    """The ledger is corrupt, of another version, in use by another writer, or misused."""


def write(file: io.FileIO, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
    os.fsync(file.fileno())


def whole(file: io.FileIO) -> bytes:
    file.seek(0)
    return file.readall()


def identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def open_locked(path: str, header: bytes, is_ours: Callable[[tuple[int, int]], bool]) -> io.FileIO:
    """The file, made where there is none, that no one else can lock until it is closed.

    Args:
        path: the file.
        header: what a new file holds.
        is_ours: whether a writer of this process has the file of this identity open.

    Raises:
        LedgerError: it is locked, or cannot be written. The message says what to do.
    """
    import fcntl  # POSIX only; reading and accounting work without

    check_regular(path)
    try:
        if not os.path.exists(path):
            _create(os.path.realpath(path), header)
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
        own = identity(os.fstat(file.fileno()))
        file.close()  # also on an interrupt, whose traceback may keep the file open, and its lock
        if isinstance(error, BlockingIOError):
            raise LedgerError(_in_use(path, is_ours(own))) from None
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


def _create(path: str, content: bytes) -> None:
    """Makes a new ledger, whole or not at all: an empty file could have lost what it held."""
    draft = f"{path}.{secrets.token_hex(4)}.new"
    try:
        with open(draft, "xb", buffering=0) as file:
            write(file, content)
        try:
            os.link(draft, path)
        except FileExistsError:
            pass  # another process was faster
        except OSError:  # no hard links here
            os.rename(draft, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(draft)


def saved(path: str, kind: str, content: bytes) -> str:
    """The path of a new file with the content, beside another."""
    name = f"{path}.{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%S}.{secrets.token_hex(2)}"
    with open(f"{name}.{kind}", "xb", buffering=0) as file:
        write(file, content)
    return file.name


def check_regular(path: str) -> None:
    with contextlib.suppress(OSError):
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            kind = "a directory" if stat.S_ISDIR(mode) else "no ordinary file"
            raise LedgerError(f"{path} is {kind}; a ledger is a file: name one in it or elsewhere.")
