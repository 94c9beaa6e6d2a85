import errno
import glob
import json
import linecache
import multiprocessing
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
import types
import zipfile

import pytest

from accountants import (
    FullBatch,
    Ledger,
    LedgerError,
    PoissonSampling,
    ShuffledEpochs,
    TrainingRun,
    epsilon,
)
from accountants.ledger import files, records, writing

MECHANISM = {"noise_multiplier": 1.5, "sampling": PoissonSampling(10), "num_examples": 100}


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "spent.ledger")


def pay(path, steps, *, reserve=8, mechanism=MECHANISM):
    with Ledger(path).open_run(**mechanism, reserve=reserve) as run:
        for _ in range(steps):
            run.pay()


def abandon(run):
    """What a killed process leaves: the lock is gone, nothing is settled."""
    run._writer.close()


def test_a_missing_file_is_an_empty_ledger(path):
    ledger = Ledger(path)
    assert ledger.steps == 0 and ledger.entries == [] and ledger.epsilon(delta=1e-5) == 0.0
    assert not os.path.exists(path)


def test_counts_exactly_after_a_clean_end(path):
    for steps in (0, 1, 7, 8, 9, 100):
        before = Ledger(path).steps
        pay(path, steps)
        assert Ledger(path).steps == before + steps
    assert all(entry.settled for entry in Ledger(path).entries)
    assert [run.steps for run in Ledger(path).runs] == [1, 7, 8, 9, 100]


def test_different_runs_are_composed(path):
    mechanisms = [
        MECHANISM,
        {"noise_multiplier": 0.7, "sampling": ShuffledEpochs(20), "num_examples": 100},
        {"noise_multiplier": 9.0, "sampling": FullBatch(), "num_examples": 120},
    ]
    runs = []
    for steps, mechanism in enumerate(mechanisms, start=5):
        pay(path, steps, mechanism=mechanism)
        runs.append(TrainingRun(**mechanism, steps=steps))
    assert Ledger(path).runs == runs
    assert Ledger(path).epsilon(1e-5) == epsilon(runs=runs, delta=1e-5)
    assert Ledger(path).epsilon(1e-5).relation == "zero_out"
    first, *_ = Ledger(path).entries
    assert first.time.endswith("+00:00") and len(first.run_id) == 16


def test_the_record_is_there_before_the_step(path):
    run = Ledger(path).open_run(**MECHANISM, reserve=8)
    for step in range(1, 30):
        run.pay()
        assert step <= Ledger(path).steps < step + 8
        assert run.paid == step and run.run == TrainingRun(**MECHANISM, steps=step)
    run.pay(100)
    assert Ledger(path).steps >= run.paid == 129
    abandon(run)
    assert Ledger(path).steps >= 129
    pay(path, 3)
    assert Ledger(path).steps >= 132


def test_fsync_comes_before_the_step(path, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_size), real(fd)))
    run = Ledger(path).open_run(**MECHANISM, reserve=4)
    for _ in range(9):
        run.pay()
        assert synced[-1] == os.path.getsize(path)
    run.close()
    assert synced[-1] == os.path.getsize(path)


@pytest.mark.parametrize("fault", ["write", "fsync"])
def test_a_failing_disk_releases_no_step(path, monkeypatch, fault):
    run = Ledger(path).open_run(**MECHANISM, reserve=4)
    run.pay(4)

    def broken(file, data):
        if fault == "write":
            file.write(data[:11])
        else:
            file.write(data)
        raise OSError("No space left on device")

    monkeypatch.setattr(files, "write", broken)
    with pytest.raises(OSError, match="space"):
        run.pay()
    monkeypatch.undo()
    with pytest.raises(LedgerError, match="closed"):
        run.pay()
    run.close()
    assert 4 <= Ledger(path).steps <= 8
    pay(path, 2)
    assert 6 <= Ledger(path).steps <= 10


def test_max_steps_bounds_even_what_is_reserved(path):
    run = Ledger(path).open_run(**MECHANISM, reserve=64, max_steps=70)
    for _ in range(70):
        run.pay()
        assert Ledger(path).steps <= 70
    with pytest.raises(LedgerError, match="70"):
        run.pay()
    assert run.paid == 70
    with open(path, "ab") as file:
        file.write(b'{"type": "rese')
    assert Ledger(path).steps == 70
    abandon(run)
    with pytest.raises(LedgerError, match="0 steps"):
        Ledger(path).open_run(**MECHANISM, max_steps=0).pay()


def test_one_writer_at_a_time(path):
    with Ledger(path).open_run(**MECHANISM) as run:
        with pytest.raises(LedgerError, match="spent.ledger.*one writer"):
            Ledger(path).open_run(**MECHANISM)
        code = (
            "from accountants import *\n"
            f"Ledger({path!r}).open_run(noise_multiplier=1., sampling=FullBatch(), num_examples=9)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "LedgerError" in done.stderr and "one writer" in done.stderr
        run.pay()
    run.close()
    with pytest.raises(LedgerError, match="closed"):
        run.pay()
    pay(path, 1)
    assert Ledger(path).steps == 2


def test_a_forked_child_can_neither_pay_nor_settle(path):
    def child(run, results):
        try:
            run.pay()
        except LedgerError as error:
            results.put(str(error))
        run.close()

    run = Ledger(path).open_run(**MECHANISM, reserve=4)
    run.pay(3)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=child, args=(run, results))
    process.start()
    assert "forked" in results.get(timeout=300)
    process.join()
    run.pay(3)
    run.close()
    assert Ledger(path).steps == 6


def test_a_dropped_run_lets_the_next_writer_in(path):
    run = Ledger(path).open_run(**MECHANISM)
    run.pay()
    with pytest.warns(ResourceWarning):
        del run
    pay(path, 1)
    assert Ledger(path).steps == 65


@pytest.fixture
def history(path):
    """A ledger with a clean run, a killed one, a sealed torn line and an open one.

    Returns its bytes, and for every length it has had the steps released by then.
    """
    released = []

    def note(steps):
        released.append((os.path.getsize(path), steps))

    total = 0
    with Ledger(path).open_run(**MECHANISM, reserve=3) as run:
        for _ in range(7):
            run.pay()
            note(total := total + 1)
    killed = Ledger(path).open_run(**MECHANISM | {"noise_multiplier": 1.1}, reserve=4)
    for _ in range(6):
        killed.pay()
        note(total := total + 1)
    abandon(killed)
    with open(path, "ab") as file:
        file.write(b'{"type": "reserve", "st')
    run = Ledger(path).open_run(**MECHANISM, reserve=3)
    for _ in range(5):
        run.pay()
        note(total := total + 1)
    abandon(run)
    with open(path, "rb") as file:
        return file.read(), released


def test_truncation_anywhere_never_loses_a_step(path, history):
    data, released = history
    header = data.index(b"\n") + 1
    for length in range(len(data) + 1):
        with open(path, "wb") as file:
            file.write(data[:length])
        if length < header:  # a ledger is made with its first line: there was more in it
            with pytest.raises(LedgerError, match=f"{path}, line 1.*(empty|cut)"):
                _ = Ledger(path).steps
            with pytest.raises(LedgerError, match=f"{path}, line 1.*(empty|cut)"):
                Ledger(path).open_run(**MECHANISM)
            continue
        owed = max((steps for size, steps in released if size <= length), default=0)
        counted = Ledger(path).steps
        assert counted >= owed, length
        if length % 9:
            continue
        # The next writer seals the torn line, and nothing is forgotten or counted twice.
        pay(path, 1, reserve=3)
        assert Ledger(path).steps == counted + 1, length


def test_a_seal_that_is_torn_is_sealed_again(path, history):
    data, _ = history
    torn = data[:-5]
    with open(path, "wb") as file:
        file.write(torn)
    counted = Ledger(path).steps
    pay(path, 0)
    with open(path, "rb") as file:
        sealed = file.read()
    assert sealed.startswith(torn)
    end = sealed.index(b"\n", len(torn)) + 1
    for length in range(len(torn), end):
        with open(path, "wb") as file:
            file.write(sealed[:length])
        assert Ledger(path).steps == counted
        pay(path, 0)
        assert Ledger(path).steps == counted


@pytest.mark.parametrize("rubbish", [b"\0" * 300, b"\xff\xfe", b" <torn> ", b"}{", b"x" * 5000])
def test_rubbish_of_any_kind_at_the_end_is_a_torn_line(path, rubbish):
    run = Ledger(path).open_run(**MECHANISM, reserve=5)
    run.pay(2)
    abandon(run)
    with open(path, "ab") as file:
        file.write(rubbish)
    assert Ledger(path).steps == 10
    pay(path, 4)
    assert Ledger(path).steps == 14


def test_changed_bytes_are_found(path, history):
    data, released = history
    owed = released[-1][1]
    generator = random.Random(1)
    last_line = data.rindex(b"\n", 0, -1) + 1
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << generator.randrange(8)
        with open(path, "wb") as file:
            file.write(flipped)
        line = data.count(b"\n", 0, position) + 1
        try:
            counted = Ledger(path).steps
        except LedgerError as error:
            assert path in str(error)
            # A changed newline joins a line to the next, or splits one: at most one further.
            assert any(f"line {number}" in str(error) for number in (line, line + 1))
            if position % 9 == 0:
                with pytest.raises(LedgerError):
                    Ledger(path).open_run(**MECHANISM)
                with open(path, "rb") as file:
                    assert file.read() == flipped
        else:
            # Only the last newline may be mistaken for a torn end, which counts for more.
            assert position >= last_line and counted >= owed


def test_lines_removed_doubled_or_swapped_are_found(path, history):
    lines = history[0].splitlines(keepends=True)
    for i in range(len(lines) - 1):
        removed = lines[:i] + lines[i + 1 :]
        doubled = lines[: i + 1] + lines[i:]
        swapped = lines[:i] + [lines[i + 1], lines[i]] + lines[i + 2 :]
        for changed in (removed, doubled, swapped):
            with open(path, "wb") as file:
                file.write(b"".join(changed))
            with pytest.raises(LedgerError, match=f"line ({i + 1}|{i + 2})"):
                _ = Ledger(path).steps


def test_other_files_are_left_alone(path):
    for content in (b"weights", b'{"type": "privacy ledger", "version": 2} 0123456789abcdef\n'):
        with open(path, "wb") as file:
            file.write(content)
        with pytest.raises(LedgerError, match="line 1.*version 1"):
            _ = Ledger(path).entries
        with pytest.raises(LedgerError, match="line 1"):
            Ledger(path).open_run(**MECHANISM)
        with open(path, "rb") as file:
            assert file.read() == content


def test_bad_arguments(path):
    for change, error in [
        ({"noise_multiplier": -1.0}, ValueError),
        ({"sampling": None}, TypeError),
        ({"num_examples": 5}, ValueError),
        ({"reserve": 0}, ValueError),
        ({"reserve": 1.5}, TypeError),
        ({"max_steps": -1}, ValueError),
    ]:
        with pytest.raises(error):
            Ledger(path).open_run(**(MECHANISM | change))
    assert not os.path.exists(path)
    with Ledger(path).open_run(**MECHANISM) as run:
        for steps in (0, -1, 1.0, True):
            with pytest.raises((ValueError, TypeError), match="steps"):
                run.pay(steps)


def pay_until_killed(path, pipe):
    run = Ledger(path).open_run(**MECHANISM, reserve=5)
    while True:
        run.pay()
        # The step: what has been released is what got through the pipe.
        os.write(pipe, b".")


def fork(path):
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        try:
            pay_until_killed(path, writer)
        finally:
            os._exit(1)
    os.close(writer)
    return child, reader


def spawn(path):
    reader, writer = os.pipe()
    code = f"import test_ledger; test_ledger.pay_until_killed({path!r}, {writer})"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        pass_fds=[writer],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])},
    )
    os.close(writer)
    return process.pid, reader


@pytest.mark.parametrize(
    ("start", "times", "moment"),
    [
        pytest.param(fork, 60, 0.01, id="forked"),
        pytest.param(spawn, 200, 0.7, id="spawned", marks=pytest.mark.slow),
    ],
)
def test_killed_at_random_moments(path, start, times, moment):
    generator = random.Random(0)
    released = 0
    for _ in range(times):
        before = Ledger(path).steps
        child, reader = start(path)
        with open(reader, "rb", buffering=0) as pipe:
            # At any instant, the opening of the file included, or after the first step.
            seen = pipe.read(1) if generator.random() < 0.7 else b""
            time.sleep(generator.random() * moment)
            os.kill(child, signal.SIGKILL)
            while some := pipe.read(1 << 20):
                seen += some
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        released += len(seen)
        # Of this run: never below what was released, nor above it by more than the step between
        # payment and release and two reservations, one of them torn.
        assert len(seen) <= Ledger(path).steps - before <= len(seen) + 1 + 2 * 5
    # In 70 % of the cases a step was waited for.
    assert Ledger(path).steps >= released > times / 2
    pay(path, 1)


# --- one writer, before anything depends on what was read -----------------------------------------


def locked_by(path, code):
    """Runs code in a process of its own that imports the package; its standard error."""
    done = subprocess.run(
        [sys.executable, "-c", f"from accountants import *\npath = {path!r}\n{code}"],
        capture_output=True,
        text=True,
    )
    return done.stderr


def test_what_was_read_is_what_is_paid_on(path):
    pay(path, 5)
    with Ledger(path).lock() as writer:
        assert [run.steps for run in writer.runs] == [5]
        with pytest.raises(LedgerError, match="another run of this process.*one writer"):
            pay(path, 1)
        assert "another process" in locked_by(path, "Ledger(path).lock()")
        run = writer.open_run(TrainingRun(**MECHANISM, steps=9), max_steps=3)
        run.pay(3)
        with pytest.raises(LedgerError, match="this process"):
            Ledger(path).lock()
        run.close()  # which lets others in
        pay(path, 2)
    assert [run.steps for run in Ledger(path).runs] == [5, 3, 2]
    assert Ledger(path).entries[1].run_id == run.run_id


def test_a_lock_without_a_run_leaves_nothing_behind(path):
    with Ledger(path).lock():
        pass
    assert Ledger(path).entries == [] and os.listdir(os.path.dirname(path)) == ["spent.ledger"]
    with Ledger(path).lock() as writer, pytest.raises(ValueError, match="max_steps"):
        writer.open_run(TrainingRun(**MECHANISM, steps=0), max_steps=-1)
    with pytest.raises(LedgerError, match="closed"):
        writer.open_run(TrainingRun(**MECHANISM, steps=0))
    pay(path, 1)


def test_two_processes_share_a_file(path):
    """Each pays for its steps, one after the other; whoever comes second is refused."""
    code = (
        "import time\n"
        "run = TrainingRun(1.5, PoissonSampling(10), 100, 0)\n"
        "paid = 0\n"
        "while paid < 5:\n"
        "    try:\n"
        "        with Ledger(path).open_run(noise_multiplier=1.5, num_examples=100,\n"
        "                                   sampling=PoissonSampling(10), reserve=3) as run:\n"
        "            for _ in range(7):\n"
        "                run.pay()\n"
        "        paid += 1\n"
        "    except LedgerError as error:\n"
        "        assert 'another process' in str(error), error\n"
        "    time.sleep(0.001)\n"
    )
    start = [sys.executable, "-c", f"from accountants import *\npath = {path!r}\n{code}"]
    both = [subprocess.Popen(start) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert [run.steps for run in Ledger(path).runs] == [7] * 10


def test_a_killed_writer_lets_the_next_one_in(path):
    child, reader = fork(path)
    with open(reader, "rb", buffering=0) as pipe:
        assert pipe.read(1) == b"."
        with pytest.raises(LedgerError, match="another process"):
            pay(path, 1)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    pay(path, 1)


def test_a_forked_child_does_not_keep_the_lock(path):
    """As the workers of a data loader would, which outlive the process that trains."""
    run = Ledger(path).open_run(**MECHANISM)
    run.pay()
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        os.write(writer, b".")
        time.sleep(20)
        os._exit(0)
    os.close(writer)
    try:
        with open(reader, "rb", buffering=0) as pipe:
            assert pipe.read(1) == b"."  # it is up
        abandon(run)
        pay(path, 1)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_file_system_without_locks(path, monkeypatch):
    import fcntl

    def flock(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(LedgerError, match="cannot be locked.*local disk"):
        Ledger(path).lock()


# --- a file that is changed by somebody else ------------------------------------------------------


def unlink(path):
    os.unlink(path)


def rename(path):
    os.rename(path, f"{path}.old")


def replace_by_a_copy(path):
    shutil.copy(path, f"{path}.new")
    os.replace(f"{path}.new", path)


def replace_by_a_folder(path):
    os.unlink(path)
    os.mkdir(path)


def empty(path):
    os.truncate(path, 0)


def cut(path):
    os.truncate(path, os.path.getsize(path) - 1)


def cut_a_line(path):
    with open(path, "rb") as file:
        content = file.read()
    os.truncate(path, content.rindex(b"\n", 0, -1) + 1)


def append(path):
    with open(path, "ab") as file:
        file.write(b"x")


def flip(path):
    with open(path, "r+b") as file:
        file.seek(10)
        byte = file.read(1)
        file.seek(10)
        file.write(bytes([byte[0] ^ 1]))


def flip_at_the_same_time(path):
    """As if within one tick of the clock of the file system."""
    found = os.stat(path)
    flip(path)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def write_anew(path):
    with open(path, "rb") as file:
        content = file.read()
    with open(path, "wb") as file:
        file.write(content[:-30])


CHANGES = [
    *(unlink, rename, replace_by_a_copy, replace_by_a_folder, empty, cut, cut_a_line),
    *(append, flip, flip_at_the_same_time, write_anew),
]


@pytest.mark.parametrize("moment", ["within a reservation", "at a reservation", "at the end"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_file_that_is_changed_is_noticed(path, change, moment):
    pay(path, 6)
    run = Ledger(path).open_run(**MECHANISM, reserve=4)
    run.pay(3)
    change(path)
    if moment == "at the end":
        with pytest.raises(LedgerError, match=path):
            run.close()
    else:
        with pytest.raises(LedgerError, match=f"{path} was .* No further step"):
            run.pay(1 if moment == "within a reservation" else 2)
        assert run.paid == 3
        with pytest.raises(LedgerError, match="closed"):
            run.pay()
        run.close()
    # Nothing was written into what is there now, and what it was is kept.
    (saved,) = glob.glob(f"{path}.*.saved")
    assert Ledger(saved).steps == 6 + 4
    if os.path.isfile(path):
        os.unlink(path)
        os.rename(saved, path)
        pay(path, 1)
        assert Ledger(path).steps == 11


def test_a_change_within_a_tick_is_noticed(path):
    """Of the clock of the file system, which then gives no other time."""
    real = os.stat

    def coarse(path):
        found = real(path)
        same = {name: getattr(found, name) for name in ("st_dev", "st_ino", "st_size")}
        return types.SimpleNamespace(**same, st_mtime_ns=0, st_ctime_ns=0)

    with pytest.MonkeyPatch.context() as patch:
        run = Ledger(path).open_run(**MECHANISM)
        patch.setattr(os, "stat", coarse)
        run.pay(2)
        run.pay()
        flip(path)
        with pytest.raises(LedgerError, match="changed"):
            run.pay()


def test_a_folder_that_is_removed_is_noticed(path):
    folder = os.path.join(os.path.dirname(path), "folder")
    os.mkdir(folder)
    run = Ledger(os.path.join(folder, "ledger")).open_run(**MECHANISM)
    shutil.rmtree(folder)
    with pytest.raises(LedgerError, match="removed.*could not be saved"):
        run.pay()


@pytest.mark.parametrize(
    "harmless",
    [lambda p: os.utime(p), lambda p: os.chmod(p, 0o600), lambda p: os.link(p, p + ".too")],
    ids=["touched", "mode", "link"],
)
def test_what_does_not_change_a_file_does_not_stop_a_run(path, harmless):
    with Ledger(path).open_run(**MECHANISM, reserve=2) as run:
        for _ in range(5):
            run.pay()
            harmless(path) if not os.path.exists(path + ".too") else None
    assert Ledger(path).steps == 5


def test_a_payment_looks_at_the_file_once(path, monkeypatch):
    """The content is read again where the time stamps cannot tell."""
    looks, reads = [], []
    real_stat, real_whole = os.stat, files.whole
    run = Ledger(path).open_run(**MECHANISM, reserve=100)
    run.pay()
    time.sleep(2 * writing._TICK)
    run.pay()
    monkeypatch.setattr(os, "stat", lambda p: (looks.append(p), real_stat(p))[1])
    monkeypatch.setattr(files, "whole", lambda f: (reads.append(f), real_whole(f))[1])
    for _ in range(50):
        run.pay()
    assert looks == [path] * 50 and reads == []


def test_a_file_that_cannot_be_seen_any_more(path, monkeypatch):
    """A file server that does not answer."""
    run = Ledger(path).open_run(**MECHANISM)
    run.pay()
    real = os.stat

    def stale(path):
        raise OSError(errno.ESTALE, "Stale file handle", path)

    monkeypatch.setattr(os, "stat", stale)
    with pytest.raises(OSError, match="Stale"):
        run.pay()
    monkeypatch.setattr(os, "stat", real)
    with pytest.raises(LedgerError, match="closed"):
        run.pay()
    assert run.paid == 1
    pay(path, 1)


# --- paths and contents that are no ledger --------------------------------------------------------


def test_a_path_is_where_it_was_named(path, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    ledgers = [Ledger("~/spent.ledger"), Ledger("spent.ledger"), Ledger(pathlib.Path(path))]
    os.mkdir("elsewhere")
    with ledgers[1].open_run(**MECHANISM) as run:
        run.pay()
        os.chdir("elsewhere")
        run.pay()
    assert [ledger.path for ledger in ledgers] == [path] * 3
    assert [ledger.steps for ledger in ledgers] == [2] * 3
    os.symlink(path, "link")
    pay("link", 1)
    assert ledgers[0].steps == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (os.mkdir, "is a directory"),
        (os.mkfifo, "no ordinary file"),
        (lambda p: open(p, "wb").close(), "line 1: the file is empty.*delete it.*copy"),
        (lambda p: zipfile.ZipFile(p, "w").close(), r"line 1: not the header.*PK.*another file"),
        (lambda p: pathlib.Path(p).write_text("{}"), "line 1: not the header.*another file"),
        (lambda p: pathlib.Path(p).write_bytes(b"\0" * 500), "line 1: not the header"),
        (lambda p: pathlib.Path(p).write_text('{"type": "priv'), "line 1: the file was cut"),
    ],
    ids=["folder", "pipe", "empty", "zip", "json", "zeros", "cut"],
)
def test_what_is_no_ledger(path, make, message):
    make(path)
    size = os.path.getsize(path)
    actions = (
        lambda: Ledger(path).entries,
        Ledger(path).lock,
        lambda: Ledger(path).open_run(**MECHANISM),
        Ledger(path).repair,
    )
    for action in actions:
        with pytest.raises(LedgerError, match=f"{path}.*{message}"):
            action()
    assert os.path.getsize(path) == size and os.listdir(os.path.dirname(path)) == ["spent.ledger"]


def test_a_place_where_nothing_can_be_written(path, monkeypatch):
    nowhere = os.path.join(os.path.dirname(path), "no", "where")
    with pytest.raises(LedgerError, match=f"{nowhere}.*folder does not exist"):
        Ledger(nowhere).lock()
    pay(path, 1)
    real = open

    def read_only(file, mode="r", **kwargs):  # the tests may run as a user who may do anything
        if mode != "rb":
            raise PermissionError(errno.EACCES, "Permission denied", file)
        return real(file, mode, **kwargs)

    monkeypatch.setattr("builtins.open", read_only)
    for name in (path, path + ".new"):
        with pytest.raises(LedgerError, match=f"{name} cannot be written .Permission denied"):
            Ledger(name).lock()
    assert Ledger(path).steps == 1


def test_a_ledger_is_made_whole_or_not_at_all(path, monkeypatch):
    def broken(file, data):
        file.write(data[:11])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "write", broken)
    with pytest.raises(LedgerError, match="No space"):
        Ledger(path).lock()
    assert os.listdir(os.path.dirname(path)) == []


OPEN = {
    **{"type": "open", "run_id": "a", "time": "2026-12-01T00:00:00+00:00"},
    **{"noise_multiplier": 1.0, "sampling": {"scheme": "poisson", "batch_size": 10}},
    **{"num_examples": 100, "reserve": 8, "max_steps": 20},
}
RESERVE = {"type": "reserve", "steps": 8}


def forge(path, *lines):
    """A ledger whose checks are right, whatever it says."""
    data, check = records.HEADER, records.HEADER_CHECK
    for record in lines:
        text = record if isinstance(record, bytes) else json.dumps(record).encode()
        check = records.checksum(check, text)
        data += text + b" " + check.encode() + b"\n"
    with open(path, "wb") as file:
        file.write(data)


FORGED = {
    "negative noise": [OPEN | {"noise_multiplier": -1.0}],
    "no number": [OPEN | {"noise_multiplier": float("nan")}],
    "infinite noise": [OPEN | {"noise_multiplier": float("inf")}],
    "noise as text": [OPEN | {"noise_multiplier": "1"}],
    "unknown scheme": [OPEN | {"sampling": {"scheme": "magic"}}],
    "scheme as text": [OPEN | {"sampling": "poisson"}],
    "setting of no scheme": [OPEN | {"sampling": {"scheme": "full_batch", "batch_size": 3}}],
    "batch larger than data": [OPEN | {"num_examples": 9}],
    "part of an example": [OPEN | {"num_examples": 99.5}],
    "no reservation": [OPEN | {"reserve": 0}],
    "part of a step reserved": [OPEN, RESERVE | {"steps": 2.5}],
    "negative steps": [OPEN, RESERVE | {"steps": -8}],
    "true as a number": [OPEN, RESERVE | {"steps": True}],
    "more than reserved at once": [OPEN, RESERVE | {"steps": 9}],
    "more than the most": [OPEN, RESERVE, RESERVE, RESERVE],
    "negative limit": [OPEN | {"max_steps": -1}],
    "more settled than reserved": [OPEN, RESERVE, {"type": "settle", "steps": 9}],
    "negative settlement": [OPEN, RESERVE, {"type": "settle", "steps": -1}],
    "settled twice": [OPEN, RESERVE, *2 * [{"type": "settle", "steps": 8}]],
    "a run twice": [OPEN, OPEN],
    "a name that is none": [OPEN | {"run_id": 3}],
    "no time": [OPEN | {"time": "yesterday"}],
    "nothing open": [RESERVE],
    "nothing known": [{"type": "refund", "steps": 8}],
    "a value missing": [{key: value for key, value in OPEN.items() if key != "sampling"}],
    "a list": [[1, 2]],
    "no type": [{}],
    "no JSON": [b"{'type': 1}"],
    "no text": [b"\xff\xfe"],
    "too deep": [b"[" * 100_000],
}


@pytest.mark.parametrize("kind", FORGED)
def test_forged_lines_are_named(path, kind):
    lines = FORGED[kind]
    number = len(lines) + 1
    forge(path, *lines)
    with pytest.raises(LedgerError, match=f"{path}, line {number}: .*ledger repair {path}"):
        _ = Ledger(path).entries
    with pytest.raises(LedgerError, match=f"line {number}"):
        Ledger(path).lock()
    # With more behind it there is nothing that repairs it.
    forge(path, *lines, OPEN | {"run_id": "later"})
    for action in (lambda: Ledger(path).entries, Ledger(path).repair):
        with pytest.raises(LedgerError, match=f"{path}, line {number}: .*Put back a copy"):
            action()


def test_forged_seals_are_named(path):
    """Of a torn line no less may be counted than it can have said."""
    for steps in (-1, 7, 8.5, 8):
        forge(path, OPEN)
        torn = b'{"type": "rese'
        record = {"type": "torn", "time": OPEN["time"], "steps": steps}
        with open(path, "r+b") as file:
            check = file.read().split()[-1].decode()
            line, _ = records.encode(record | {"sha256": records.digest(torn)}, check)
            file.write(torn + records.SEAL + line)
        if steps == 8:
            assert Ledger(path).steps == 8
        else:
            with pytest.raises(LedgerError, match=f"{path}, line 3: `steps`"):
                _ = Ledger(path).steps


# --- repair ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["torn", "zeros", "flipped", "edited", "forged"])
def test_repair_counts_the_most_a_last_line_can_have_said(path, damage):
    pay(path, 6)
    run = Ledger(path).open_run(**MECHANISM, reserve=4)
    run.pay(3)
    if damage == "edited":
        run.close()
    abandon(run)
    with open(path, "rb") as file:
        content = file.read()
    lines = content.splitlines(keepends=True)
    if damage == "torn":
        content = content[:-9]
    elif damage == "zeros":
        content += b"\0" * 40 + b"\n"
    elif damage == "flipped":
        content = content.replace(lines[-1], lines[-1].replace(b"4", b"5"))
    elif damage == "edited":  # settled at less
        content = content.replace(lines[-1], lines[-1].replace(b'"steps": 3', b'"steps": 1'))
    else:
        forge(path, OPEN, RESERVE, {"type": "settle", "steps": -3})
        with open(path, "rb") as file:
            content = file.read()
    with open(path, "wb") as file:
        file.write(content)
    before = {"torn": 6 + 4, "zeros": 6 + 4, "flipped": 6 + 4, "edited": 6 + 3, "forged": 8}[damage]
    repaired = Ledger(path).repair()
    assert Ledger(path).steps >= before and Ledger(path).torn_steps is None
    assert repaired.line == content.rstrip(b"\n").count(b"\n") + 1
    assert repaired.steps == (8 if damage == "forged" else 4)
    with open(repaired.backup, "rb") as file:
        assert file.read() == content
    spent = Ledger(path).steps
    assert Ledger(path).repair() is None and Ledger(path).steps == spent
    pay(path, 2)
    assert Ledger(path).steps == spent + 2


def test_repair_where_it_cannot(path, history):
    with pytest.raises(LedgerError, match="in another|this process"):
        with Ledger(path).open_run(**MECHANISM, reserve=3):
            Ledger(path).repair()
    with open(path, "rb") as file:
        lines = file.readlines()
    with open(path, "wb") as file:
        file.write(b"".join([*lines[:3], lines[3].replace(b"steps", b"stesp"), *lines[4:]]))
    before = os.listdir(os.path.dirname(path))
    with pytest.raises(LedgerError, match="line 4.*Put back a copy"):
        Ledger(path).repair()
    assert os.listdir(os.path.dirname(path)) == before
    with pytest.raises(LedgerError, match="does not exist"):
        Ledger(f"{path}.too").repair()
    assert not os.path.exists(f"{path}.too")


# --- each check matters: without it, these tests fail ---------------------------------------------


def without(patch, target, name, value=lambda *args, **kwargs: None):
    patch.setattr(target, name, value)


def without_lock(patch):
    import fcntl

    without(patch, fcntl, "flock")


def without_look(patch):
    without(patch, writing.LedgerWriter, "check_unchanged")


def without_tick(patch):
    """Size and time stamps alone, trusted at once."""
    without(patch, writing, "_TICK", -1.0)


def without_identity(patch):
    without(patch, files, "identity", lambda found: None)


def without_hook(patch):
    class Nothing(set):
        def add(self, writer):
            pass

    without(patch, writing, "_WRITERS", Nothing())


def without_order(patch):
    """The file is read before it is locked."""
    read = files.whole

    def before(path):
        with open(path, "rb", buffering=0) as file:
            content = read(file)
        pay(path, 1)
        return content

    opened = files.open_locked
    stale = []
    without(patch, files, "open_locked", lambda p, *a: (stale.append(before(p)), opened(p, *a))[1])
    without(patch, files, "whole", lambda file: stale.pop() if stale else read(file))


def stale_read(path):
    pay(path, 5)
    with Ledger(path).lock() as writer:
        assert sum(run.steps for run in writer.runs) == Ledger(path).steps


def without_reservation_limit(patch):
    without(patch, records._Entry, "torn_steps", lambda self: 10**9)


def without_integers(patch):
    without(patch, records, "check_integer", lambda value, *args: value)


def without_names(patch):
    apply = records.State.apply
    without(patch, records.State, "apply", lambda s, *args: (s.names.clear(), apply(s, *args)))


def without_whole_files(patch):
    patch.setattr(files.os, "link", lambda draft, path: open(path, "wb").close())


def seen(change, moment="within a reservation"):
    return lambda path: test_a_file_that_is_changed_is_noticed(path, change, moment)


def forged(kind):
    return lambda path: test_forged_lines_are_named(path, kind)


@pytest.mark.parametrize(
    ("mutant", "test"),
    [
        (without_lock, test_what_was_read_is_what_is_paid_on),
        (without_order, stale_read),
        (without_hook, test_a_forked_child_does_not_keep_the_lock),
        *((without_look, seen(change)) for change in CHANGES),
        (without_tick, test_a_change_within_a_tick_is_noticed),
        (without_identity, seen(replace_by_a_copy)),
        (without_reservation_limit, forged("more than reserved at once")),
        (without_reservation_limit, forged("more than the most")),
        (without_integers, forged("negative steps")),
        (without_integers, forged("negative settlement")),
        (without_names, forged("a run twice")),
        (without_whole_files, lambda path: pay(path, 1)),
    ],
)
def test_mutants_are_caught(path, monkeypatch, mutant, test):
    mutant(monkeypatch)
    with pytest.raises((AssertionError, LedgerError, OSError, ValueError, pytest.fail.Exception)):
        test(path)


# --- interrupts -----------------------------------------------------------------------------------


LEDGER = Ledger.open_run.__code__.co_filename


class Interrupter:
    """Raises at the n-th line that the ledger executes, wherever that is."""

    def __init__(self, lines):
        self.left = lines

    def __call__(self, frame, event, argument):
        name = frame.f_code.co_filename
        if name not in (files.__file__, records.__file__, writing.__file__, LEDGER):
            return None
        source = linecache.getline(name, frame.f_lineno).strip()
        # Where an interrupt is looked at in truth: not between a call and what guards it.
        if event == "line" and source not in ("try:", "finally:"):
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self


def test_interrupts_at_any_instant(path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)  # some thousands of them
    lines, kept = 0, True
    while kept:
        lines += 1
        name, paid, run, kept = f"{path}.{lines}", 0, None, None
        trace = sys.gettrace()
        try:
            sys.settrace(Interrupter(lines))
            run = Ledger(name).open_run(**MECHANISM, reserve=2)
            for _ in range(3):
                run.pay()
                paid += 1
        except KeyboardInterrupt as error:
            kept = error  # as notebooks do, with all that it refers to
        finally:
            sys.settrace(trace)
        assert paid <= Ledger(name).steps <= 4
        if run is not None:
            run.close()
            assert Ledger(name).steps >= paid
        pay(name, 1)  # nobody else has it
    assert lines > 100
