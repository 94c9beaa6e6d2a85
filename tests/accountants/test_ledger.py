import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

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
    run._release()


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
    from accountants import ledger as module

    def broken(file, data):
        if fault == "write":
            file.write(data[:11])
        else:
            file.write(data)
        raise OSError("No space left on device")

    monkeypatch.setattr(module, "_write", broken)
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
    for length in range(len(data) + 1):
        with open(path, "wb") as file:
            file.write(data[:length])
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
    with pytest.raises(FileNotFoundError):
        Ledger(os.path.join(os.path.dirname(path), "no", "where")).open_run(**MECHANISM)


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
