"""Fixtures of the tests of the experiments."""

import numpy as np
import pytest

from experiments import features, frame


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a script of the experiments in an empty folder: `run(images, "--data=...")`.

    Flags are as good as new in each call. Returns what the script's `run` does, or its `main` where
    it has no `run`.
    """
    monkeypatch.chdir(tmp_path)

    def call(module, *arguments):
        main = getattr(module, "run", module.main)
        argv = [module.__name__, *map(str, arguments)]
        define_flags = getattr(module, "define_flags", None)
        positional = 0 if define_flags else 1
        return frame.start(main, define_flags, argv=argv, positional=positional)

    return call


@pytest.fixture
def refused(run, capsys):
    """Runs a script that must refuse its flags, with status 2; returns what it says on stderr."""

    def call(module, *arguments):
        with pytest.raises(SystemExit) as end:
            run(module, *arguments)
        assert end.value.code == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return said

    return call


@pytest.fixture
def corners(tmp_path, rng):
    """A file of images: squares in one of two corners, 90 to train on and 30 to test on."""
    arrays = {}
    for part, count in (("train", 90), ("test", 30)):
        y = rng.integers(2, size=count).astype("uint8")
        x = rng.integers(30, size=(count, 8, 8)).astype("uint8")
        x[y == 0, :4, :4] += 200
        x[y == 1, 4:, 4:] += 200
        arrays |= {f"x_{part}": x, f"y_{part}": y}
    path = tmp_path / "corners.npz"
    np.savez(path, **arrays)
    return path


@pytest.fixture
def few_drawings(monkeypatch):
    """Features that are made from so few drawings that it takes no time."""
    drawings = features.drawings

    def few(kind, shape, count=500):
        return drawings(kind, shape, min(count, 40))

    monkeypatch.setattr(features, "drawings", few)
