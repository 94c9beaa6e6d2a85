"""Says which tests belong to what has changed: `python -m tests.changed`, for `make test-changed`.

Changed is what differs from the branch `main` where this one left it, committed or not. A test file
stands for itself. A module stands for its own examples and, since `tests/` mirrors the packages,
for the test file of its name, or where there is none for the nearest folder of tests; so does what
tests share. Whatever a test of the whole repository reads stands for that test, too.
"""

import re
import subprocess
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parents[1]
PACKAGES = ("accountants", "experiments", "lipdp")
# What the tests of the whole repository read.
WHOLE = {
    "tests/test_architecture.py": r"(accountants|experiments|lipdp)/.*\.py|docs/architecture\.md",
    "tests/test_docs.py": r"docs/.*\.md|mkdocs\.yml",
    "tests/test_release.py": (
        r"[^/]+\.(md|cff|cfg|toml|yml)|LICENSE|Makefile|MANIFEST\.in|docs/index\.md"
        r"|lipdp/_version\.py|(accountants|lipdp)/(.*/)?__init__\.py"
    ),
}


def changed(root: Path = ROOT, main: str = "main") -> list[str]:
    """Paths that differ from where `main` was left, and new ones that git does not ignore."""

    def git(*arguments):
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, check=True)
        return done.stdout.decode().split("\0" if "-z" in arguments else None)

    (base,) = git("merge-base", "HEAD", main)
    found = git("diff", "--name-only", "-z", base)
    found += git("ls-files", "--others", "--exclude-standard", "-z")
    return sorted({name for name in found if name})


def paths_for(name: str, root: Path = ROOT) -> list[str]:
    """What pytest is to run for one changed path.

    >>> paths_for("lipdp/config.py")
    ['tests/test_architecture.py', 'lipdp/config.py', 'tests/lipdp/test_config.py']
    >>> paths_for("lipdp/bounds/builtin/linear.py")
    ['tests/test_architecture.py', 'lipdp/bounds/builtin/linear.py', 'tests/lipdp/bounds']
    >>> paths_for("setup.cfg")
    ['tests/test_release.py']
    """
    return [test for test, read in WHOLE.items() if re.fullmatch(read, name)] + _own(name, root)


def _own(name, root):
    path = PurePosixPath(name)
    if path.suffix != ".py" or path.parts[0] not in (*PACKAGES, "tests"):
        return []
    if path.parts[0] == "tests":
        if path.name.startswith("test_"):
            return [name] if (root / path).exists() else []
        return [_nearest(path.parent, root)]
    twin = "tests" / path.with_name(f"test_{path.name}")
    test = str(twin) if (root / twin).exists() else _nearest(twin.parent, root)
    return [name, test] if (root / path).exists() else [test]


def _nearest(folder, root):
    """The folder or the first above it that holds tests."""
    while folder != PurePosixPath("tests") and not any((root / folder).glob("test_*.py")):
        folder = folder.parent
    return str(folder)


def main() -> None:
    found = {test for name in changed() for test in paths_for(name)}
    within = {test for test in found if any(str(p) in found for p in PurePosixPath(test).parents)}
    print(*sorted(found - within))


if __name__ == "__main__":
    main()
