"""What a release needs: versions that agree, and distributions that hold what they should."""

import pathlib
import re
import tomllib

import pytest
import yaml
from setuptools.config.setupcfg import read_configuration

import lipdp

pytestmark = pytest.mark.any_backend

ROOT = pathlib.Path(__file__).parents[1]
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")


def text(name):
    return (ROOT / name).read_text("utf-8")


@pytest.fixture(scope="module")
def setup():
    return read_configuration(ROOT / "setup.cfg")


def test_versions_agree(setup):
    headings = re.findall(r"^## \[([^\]]+)\]", text("CHANGELOG.md"), re.M)
    assert headings[0] == "Unreleased" and headings[1] == lipdp.__version__
    assert setup["metadata"]["version"] == lipdp.__version__
    assert yaml.safe_load(text("CITATION.cff"))["version"] == lipdp.__version__


def test_licences_agree():
    assert text("LICENSE").count("The lipdp authors") == 1
    assert "license_expression = Apache-2.0\n" in text("setup.cfg")
    assert yaml.safe_load(text("CITATION.cff"))["license"] == "Apache-2.0"


def test_the_wheel_holds_both_packages_and_nothing_else(setup):
    folders = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for package in ("accountants", "lipdp")
        for path in (ROOT / package).rglob("*.py")
    }
    assert set(setup["options"]["packages"]) == folders


def test_the_source_distribution_holds_all_else():
    grafted = set(re.findall(r"^graft (\w+)$", text("MANIFEST.in"), re.M))
    assert grafted == {"docs", "experiments", "tests"}
    (included,) = re.findall(r"^include (.*)$", text("MANIFEST.in"), re.M)
    listed = {path.name for pattern in included.split() for path in ROOT.glob(pattern)}
    assert {"CHANGELOG.md", "CONTRIBUTING.md", "README.md", "LICENSE", "Makefile"} <= listed
    assert {"mkdocs.yml", "pyproject.toml", "setup.cfg", "SECURITY.md", "CITATION.cff"} <= listed
    assert "setuptools" in tomllib.loads(text("pyproject.toml"))["build-system"]["requires"][0]


def test_the_description_reads_well_outside_of_the_repository(setup):
    description = setup["metadata"]["long_description"]
    assert description == text("DESCRIPTION.md") and not LINK.findall(description)
    block = re.compile(r"```python\n.*?```", re.DOTALL)
    # The pages' own block, which test_docs runs.
    assert block.findall(description) == block.findall(text("docs/index.md"))


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"])
def test_links_lead_somewhere(name):
    for target in LINK.findall(text(name)):
        assert (ROOT / target).exists(), target
