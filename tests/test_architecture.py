"""Imports go down only: no circle of files, and no wing imports one above it.

The wings, from top to bottom, and what each may import are the table of docs/architecture.md; this
test reads it there. Imports inside functions count, as do modules that a file names in a string.
"""

import ast
import pathlib
import re

import pytest

pytestmark = pytest.mark.any_backend

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("accountants", "lipdp", "experiments")
# What fills the names of `import lipdp`, when they are first used.
FACE = {"lipdp", "lipdp._loading"}


def files():
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(source, modules):
    """The modules, of those given, that a file imports.

    >>> sorted(imports("import a; from a import b, c", {"a", "a.b"}))
    ['a', 'a.b']
    >>> imports("def f(): from a import b", {"a", "a.b"})
    {'a.b'}
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & modules
            if inner - modules:
                found.add(node.module)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "." in node.value:
            found.add(node.value)
    return found & modules


def all_imports():
    found = files()
    return {
        name: imports(path.read_text("utf-8"), found.keys()) - {name}
        for name, path in found.items()
    }


def circles(edges):
    """The sets of names that reach each other, each given once.

    >>> circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [{"b", "c"}]
    True
    """
    reached = {}
    for name in edges:
        waiting, seen = [name], set()
        while waiting:
            new = edges.get(waiting.pop(), set()) - seen
            seen |= new
            waiting += new
        reached[name] = seen
    around = [{b for b in reached[a] if a in reached.get(b, ())} for a in sorted(edges)]
    return [circle for i, circle in enumerate(around) if circle and circle not in around[:i]]


def wing(name):
    """
    >>> wing("lipdp.layers.dense"), wing("lipdp.cli"), wing("accountants.sampling.poisson")
    ('layers', 'cli', 'accountants')
    """
    package, *inner = name.split(".")
    return inner[0] if package == "lipdp" and inner else package


def table():
    """What each wing may import, from the page; the topmost wing first."""
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \|[^|\n]+\|([^|\n]*)\|$", page, re.M)
    return {name: set(re.findall(r"`(\w+)`", allowed)) for name, allowed in rows}


def test_no_circle_of_imports():
    edges = {name: found for name, found in all_imports().items() if name not in FACE}
    assert circles(edges) == []


def test_the_table_allows_only_what_is_below():
    order = list(table())
    for name, allowed in table().items():
        assert allowed <= set(order[order.index(name) + 1 :]), name


def test_the_table_has_every_wing():
    found = {wing(name) for name in files()} - {wing(name) for name in FACE} - {"experiments"}
    assert found == table().keys()


def test_wings_import_what_the_table_allows():
    allowed = table()
    wrong = [
        f"{name} imports {other}"
        for name, found in all_imports().items()
        for other in found
        if name not in FACE
        and wing(name) not in (wing(other), "experiments")
        and wing(other) not in allowed[wing(name)]
    ]
    assert sorted(wrong) == []


def test_nothing_below_imports_experiments():
    for name, found in all_imports().items():
        if wing(name) != "experiments":
            assert not {other for other in found if wing(other) == "experiments"}, name
