"""The command `lipdp`."""

import json

import keras
import pytest

import lipdp
from lipdp import cli, layers

pytestmark = pytest.mark.any_backend

K = keras.layers


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*argv):
        monkeypatch.setattr("sys.argv", ["lipdp", *map(str, argv)])
        code = cli.main()
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def plain(tmp_path):
    path = tmp_path / "plain.keras"
    keras.Sequential([keras.Input((4,)), K.BatchNormalization(), K.Dense(2)]).save(path)
    return path


def test_check(run, plain, tmp_path):
    code, out, _ = run("check", plain)
    assert code == 1 and "BatchNormalization" in out and "Centering" in out
    path = tmp_path / "private.keras"
    keras.Sequential([keras.Input((4,)), layers.BallProjection(1.0), K.Dense(2)]).save(path)
    code, out, _ = run("check", path, "--json")
    assert code == 0 and json.loads(out)["private"] is True
    keras.Sequential([keras.Input((4, 3)), K.LSTM(2)]).save(path)
    code, out, _ = run("check", path, "--json")
    found = json.loads(out)
    assert code == 0 and found["per_layer"] is True and found["private"] is False


def test_repair(run, plain, tmp_path):
    target = tmp_path / "repaired.keras"
    code, out, _ = run("repair", plain, target, "--certified", "--radius=2")
    assert code == 0 and "BallProjection(2)" in out and str(target) in out
    assert lipdp.check(keras.saving.load_model(target)).private
    code, out, _ = run("repair", plain, target)
    assert code == 0 and "GroupNormalization" in out and str(target) in out
    assert lipdp.check(keras.saving.load_model(target)).per_layer
    code, out, _ = run("repair", plain, target, "--json")
    assert code == 0 and json.loads(out)["path"] == str(target)


def test_the_commands_of_the_accountants_are_there(run):
    code, out, _ = run(
        "epsilon", "--delta=1e-5", "--noise_multiplier=2", "--num_examples=100",
        "--sampling=full_batch", "--steps=3", "--json",
    )  # fmt: skip
    assert code == 0 and json.loads(out)["epsilon"] > 0
    code, out, _ = run("--help")
    assert code == 0
    assert all(name in out for name in ("check", "repair", "epsilon", "calibrate", "ledger"))


def test_bad_use(run, plain, tmp_path):
    assert run()[0] == run("train")[0] == run("check")[0] == run("repair", plain)[0] == 2
    code, _, err = run("check", tmp_path / "missing.keras")
    assert code == 2 and "missing.keras" in err
    broken = tmp_path / "broken.keras"
    broken.write_bytes(b"no model")
    code, _, err = run("check", broken)
    assert code == 2 and "broken.keras" in err
    code, _, err = run("repair", plain, tmp_path / "out.h5")
    assert code == 2 and "must end in .keras" in err
    code, _, err = run("repair", plain, tmp_path / "out.keras", "--certified", "--radius=-1")
    assert code == 2 and "`radius`" in err
    code, _, err = run("repair", plain, tmp_path / "out.keras", "--radius=1")
    assert code == 2 and "certified" in err
    code, _, err = run("check", plain, "--colour")
    assert code == 2 and "colour" in err
