"""The pages' blocks of Python run, and print what the page says."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.any_backend

DOCS = Path(__file__).parents[1] / "docs"
# A block, whether it is marked as not to be run, and the output that may follow it.
BLOCK = re.compile(
    r"(?P<mark><!-- not run -->\n)?```python\n(?P<code>.*?)```\n"
    r"(?:\n```text\n(?P<output>.*?)```\n)?",
    re.DOTALL,
)


@pytest.mark.parametrize(
    "page",
    [
        "index.md",
        "defaults.md",
        "per_layer.md",
        "tutorials/digits.md",
        "tutorials/make_private.md",
        "bounds.md",
        "signal.md",
        "spending.md",
        "how_to_serving.md",
        pytest.param("how_to_public_start.md", marks=pytest.mark.slow),
    ],
)
def test_blocks_of_a_page(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    blocks = [b for b in BLOCK.finditer((DOCS / page).read_text("utf-8")) if not b["mark"]]
    assert blocks
    for block in blocks:
        capsys.readouterr()
        exec(compile(block["code"], page, "exec"), names)
        printed = capsys.readouterr().out
        if block["output"] is not None:
            # Lines may be broken elsewhere on the page.
            assert printed.split() == block["output"].split()


def test_the_quick_start_of_the_readme(tmp_path, monkeypatch, capsys):
    generator = np.random.default_rng(0)
    part = generator.integers(0, 256, (60, 28, 28)), generator.integers(0, 10, 60)
    monkeypatch.setattr("keras.datasets.mnist.load_data", lambda: (part, part))
    monkeypatch.setattr("lipdp.training.defaults._STEPS", 4)
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in BLOCK.finditer((DOCS.parent / "README.md").read_text("utf-8")):
        code = block["code"].replace("epochs=10", "epochs=1").replace("=1024", "=16")
        exec(compile(code.replace("fit(x, y", "fit(x, y, verbose=0"), "README.md", "exec"), names)
    assert "learning rate" in capsys.readouterr().out and (tmp_path / "private.keras").exists()


def test_modules_that_pages_tell_to_run_exist():
    for page in DOCS.rglob("*.md"):
        for name in re.findall(r"python -m\s+([\w.]+)", page.read_text("utf-8")):
            assert importlib.util.find_spec(name) is not None, f"{page}: {name}"


def test_pages_of_the_site_exist():
    pages = re.findall(r": ([\w/]+\.md)$", (DOCS.parent / "mkdocs.yml").read_text("utf-8"), re.M)
    assert len(pages) > 20
    found = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    assert {path for path in found if path != "results/notes.md"} == set(pages)
