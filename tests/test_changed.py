"""Which tests belong to a change, and which slow ones a part holds."""

import subprocess

import pytest

from tests.changed import changed, paths_for
from tests.conftest import pytest_collection_modifyitems

pytestmark = pytest.mark.any_backend

HOUSE, DOCS, RELEASE = (f"tests/test_{name}.py" for name in ("architecture", "docs", "release"))


@pytest.mark.parametrize(
    "name, expected",
    [
        (
            "lipdp/noise/secure.py",
            [HOUSE, "lipdp/noise/secure.py", "tests/lipdp/noise/test_secure.py"],
        ),
        ("lipdp/bounds/rule.py", [HOUSE, "lipdp/bounds/rule.py", "tests/lipdp/bounds"]),
        ("lipdp/layers/gone.py", [HOUSE, "tests/lipdp/layers"]),
        ("accountants/nothing/gone.py", [HOUSE, "tests/accountants"]),
        ("lipdp/nothing/__init__.py", [HOUSE, RELEASE, "tests/lipdp"]),
        ("tests/lipdp/bounds/test_norms.py", ["tests/lipdp/bounds/test_norms.py"]),
        ("tests/lipdp/bounds/test_gone.py", []),
        ("tests/lipdp/cases/linear.py", ["tests/lipdp"]),
        ("tests/conftest.py", ["tests"]),
        ("tests/test_docs.py", [DOCS]),
        ("docs/train.md", [DOCS]),
        ("docs/architecture.md", [HOUSE, DOCS]),
        ("docs/index.md", [DOCS, RELEASE]),
        ("docs/speed.svg", []),
        ("mkdocs.yml", [DOCS, RELEASE]),
        ("README.md", [RELEASE]),
        ("setup.cfg", [RELEASE]),
        ("LICENSE", [RELEASE]),
        (".gitignore", []),
    ],
)
def test_paths_for_a_path(name, expected):
    assert paths_for(name) == expected


def test_changed_is_what_differs_from_where_main_was_left(tmp_path):
    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@a", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True)

    def write(name):
        (tmp_path / name).write_text(name)
        git("add", name)

    git("init", "--quiet", "--initial-branch=main")
    write("old")
    git("commit", "--quiet", "--message=first")
    git("switch", "--quiet", "--create=branch")
    write("committed")
    git("commit", "--quiet", "--message=second")
    git("switch", "--quiet", "main")
    write("later on main")
    git("commit", "--quiet", "--message=third")
    git("switch", "--quiet", "branch")
    (tmp_path / "old").write_text("edited")
    (tmp_path / "new").write_text("")
    assert changed(tmp_path) == ["committed", "new", "old"]


class Item:
    def __init__(self, slow):
        self.slow = slow

    def get_closest_marker(self, name):
        return self.slow if name == "slow" else None


class Config:
    """Of the options; what is left out is told to nobody."""

    def __init__(self, **options):
        self.hook, self.options = self, options

    def getoption(self, name):
        return self.options[name.strip("-").replace("-", "_")]

    def pytest_deselected(self, items):
        pass


def test_parts_of_the_slow_tests_are_all_of_them():
    """Any three offsets in a row; and a part is the same for the same offset."""
    items = [Item(slow) for slow in (False, True, True, True, False, True, True, True, True, True)]

    def part(offset):
        kept = items.copy()
        pytest_collection_modifyitems(Config(slow_part=3, slow_offset=offset), kept)
        assert [i for i in kept if not i.slow] == [i for i in items if not i.slow]
        return [i for i in kept if i.slow]

    parts = [part(offset) for offset in (4, 5, 6)]
    assert parts[0] == part(1) and len(parts[0]) in (2, 3)
    assert {*sum(parts, [])} == {i for i in items if i.slow} and sum(map(len, parts)) == 8
