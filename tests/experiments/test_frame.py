"""The frame of the scripts, and the files of their records."""

import dataclasses
import doctest
import json
import multiprocessing
import os
import subprocess
import sys

import pytest
from absl import flags

from experiments import frame, pages, record

pytestmark = pytest.mark.any_backend


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a pretended run."""

    rate: float = 0.5
    steps: int = 0
    width: int | None = None
    mirror: bool = False
    kind: str = ""


EXPERIMENT = frame.Experiment("pretended", Settings, ("rate", "steps", "width", "mirror", "kind"))


def define_flags(define):
    EXPERIMENT.define_flags(define, "A file.", 3.0, networks=("mlp", "vgg"), network="mlp")
    define.seed(1)
    define.switch("plain", False, "Without noise.")
    define.names("parts", None, "Of it all.", choices=("one", "two"))
    define.numbers("epsilons", None, "Of budgets.")


def main(values):
    frame.needed(values, "data")
    settings = EXPERIMENT.chosen(values, Settings(kind="round"))
    about = {"network": values.network, "seed": values.seed, "settings": settings}
    with EXPERIMENT.recorded(values, **about) as result:
        result["accuracy"] = 1.0
    return result


MODULE = sys.modules[__name__]


def test_a_record_has_settings_results_provenance_and_its_command(run, tmp_path):
    result = run(MODULE, "--data=here/x.npz", "--rate=0.25", "--mirror", "--out=kept")
    (kept,) = record.read(tmp_path / "kept.jsonl")
    assert kept == result
    assert result["settings"] == dataclasses.asdict(Settings(0.25, mirror=True, kind="round"))
    assert result["accuracy"] == 1.0 and {"commit", "backend", "versions"} <= set(result)
    command = "python -m experiments.pretended --data=x.npz --network=mlp --epsilon=3.0"
    assert result["command"] == f"{command} --delta=1e-05 --rate=0.25 --mirror=True --seed=1"
    again = run(MODULE, *result["command"].split()[3:])
    assert again == result
    plain = run(MODULE, "--data=x.npz", "--plain", "--width=3", "--steps=0")["command"]
    assert plain.endswith("--network=mlp --steps=0 --width=3 --seed=1 --plain=True")


def test_the_same_run_is_not_kept_twice(run, refused, tmp_path):
    run(MODULE, "--data=x", "--out=kept.jsonl")
    run(MODULE, "--data=x", "--out=kept.jsonl", "--seed=2")
    assert "has this run already, in line 2" in refused(
        MODULE, "--data=x", "--out=kept.jsonl", "--seed=2"
    )
    assert [kept["seed"] for kept in record.read(tmp_path / "kept.jsonl")] == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--data is needed: A file."),
        (("--data=x", "more"), "Unknown arguments: more"),
        (("--nonsense",), "nonsense"),
        (("--rate=-1",), "rate"),
        (("--rate=fast",), "rate"),
        (("--width=0",), "width"),
        (("--delta=0",), "delta"),
        (("--delta=1",), "delta"),
        (("--steps=-1",), "steps"),
        (("--network=lenet",), "network"),
        (("--parts=three",), "one, two; got three"),
        (("--epsilons=1,many",), "positive numbers"),
        (("--epsilons=0",), "positive numbers"),
        (("--data=x", "--out=x.json"), "must be a .jsonl file"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(refused, arguments, message):
    said = refused(MODULE, *arguments)
    assert message in said and "--help" in said


def test_help_lists_the_flags_of_the_script(run, capsys):
    with pytest.raises(SystemExit) as end:
        run(MODULE, "--help")
    said = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0 and said.startswith("The frame of the scripts")
    assert "--epsilon (default: 3.0)" in said and "[positive integer]" in said


def test_flags_that_libraries_add_are_not_the_scripts(tmp_path, monkeypatch, capsys):
    name = "added_by_a_library"
    flags.DEFINE_integer(name, 3, "Of the log.")
    try:
        monkeypatch.setattr(sys, "argv", ["it", "--data=x"])
        assert name not in frame.start(main, define_flags)["command"]
        monkeypatch.setattr(sys, "argv", ["it", "--help"])
        with pytest.raises(SystemExit):
            frame.start(main, define_flags)
        assert name not in capsys.readouterr().out
    finally:
        delattr(flags.FLAGS, name)


# --- files ----------------------------------------------------------------------------------------


def append_many(path, first):
    for number in range(first, first + 20):
        record.append(path, {"number": number, "ε": "much\u2028more" * 100})


def test_processes_that_append_at_once_lose_nothing(tmp_path):
    path = tmp_path / "all.jsonl"
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=append_many, args=(path, 20 * k)) for k in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert sorted(kept["number"] for kept in record.read(path)) == list(range(60))
    assert [file.name for file in tmp_path.iterdir()] == ["all.jsonl"]


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "all.jsonl"
    path.write_text('{"number": 1}')  # somebody's editor left out the last end of line
    record.append(path, {"number": 2})
    before = path.read_bytes()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="power"):

        def fails(*_):
            raise OSError("no power")

        patch.setattr(record.os, "replace", fails)
        record.append(path, {"number": 3})
    assert path.read_bytes() == before == b'{"number": 1}\n{"number": 2}\n'
    record.append(path, {"number": 4})
    assert [kept["number"] for kept in record.read(path)] == [1, 2, 4]


def test_what_is_no_record_is_refused(tmp_path):
    path = tmp_path / "all.jsonl"
    with pytest.raises(FileNotFoundError):
        record.read(path)
    for text, message in (("", "no results"), ('{}\n{"a":', "Line 2 .* no JSON"), ("[]", "object")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            record.read(path)


def test_one_json_is_written_whole(tmp_path):
    record.write(tmp_path / "folder" / "a.json", {"ε": 1})
    assert json.loads((tmp_path / "folder" / "a.json").read_text()) == {"ε": 1}


@pytest.mark.parametrize("module", [record, pages])
def test_examples_in_docstrings(module):
    assert doctest.testmod(module).failed == 0


def test_a_run_that_is_recorded_starts_without_log_lines():
    """Every run that is recorded begins with its provenance."""
    code = "from experiments import record; print(record.provenance()['backend'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "2"},
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("tensorflow\n", "")


def test_a_reader_that_has_gone_ends_a_script_quietly():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "experiments.ledger", "--help"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")
