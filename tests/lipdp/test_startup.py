"""How quickly things start, and that classes of saved networks are found all the same."""

import ast
import importlib
import os
import pathlib
import pkgutil
import subprocess
import sys

import pytest

import lipdp
from lipdp import _loading, cli, noise, startup

pytestmark = pytest.mark.any_backend

ROOT = pathlib.Path(lipdp.__file__).parents[1]


def run(code, **environment):
    """Runs Python code in a fresh process; JAX starts faster than TensorFlow."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "KERAS_BACKEND": "jax", **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )


def test_no_help_and_no_accounting_imports_a_backend(tmp_path):
    ledger = str(tmp_path / "ledger")
    mechanism = ["--noise_multiplier=2", "--num_examples=9", "--sampling=full_batch", "--steps=1"]
    commands = [["--help"], *([name, "--help"] for name in cli.COMMANDS), ["ledger", ledger]]
    commands += [["check"], ["repair", "one"], ["epsilon", "--delta=1e-5", *mechanism]]
    code = f"""
import sys, lipdp
from lipdp import cli
for sys.argv in {[["lipdp", *command] for command in commands]}:
    cli.main()
loaded = {{"keras", "tensorflow", "jax"}} & set(sys.modules)
assert not loaded, loaded
assert {{"PrivateModel", "layers", "Budget"}} <= set(dir(lipdp))
"""
    assert "epsilon = " in run(code).stdout


SAVED = "tests/lipdp/saved/network.keras"


@pytest.mark.parametrize(
    "imports",
    [
        "import lipdp, keras",
        # A module of lipdp imports Keras first.
        "import lipdp.bounds.norms, keras",
        # Each starts a process; these two differ little from those above.
        pytest.param("import keras, lipdp", marks=pytest.mark.slow),
        pytest.param(
            "from lipdp import Augmentation, robustness; import keras", marks=pytest.mark.slow
        ),
    ],
)
def test_saved_networks_load_whatever_is_imported_first(imports):
    run(f"{imports}; keras.saving.load_model({SAVED!r})")


def test_a_failed_import_says_so_and_leaves_stderr_as_it_was():
    code = """
import os, sys
from lipdp import startup
try:
    with startup._without_log_lines():
        os.write(2, b"WARNING: All log messages before absl::InitializeLog() is called are ...\\n")
        os.write(2, b"kept\\n")
        raise ImportError("no backend")
except ImportError:
    print("after", file=sys.stderr)
"""
    assert run(code).stderr == "kept\nafter\n"


def test_commands_write_no_log_lines():
    code = (
        f'import sys; sys.argv = ["lipdp", "check", {SAVED!r}]; from lipdp import cli; cli.main()'
    )
    found = run(code, KERAS_BACKEND="tensorflow", TF_CPP_MIN_LOG_LEVEL="2")
    assert found.stderr == "" and "can be trained privately" in found.stdout


@pytest.mark.parametrize(
    "line, dropped",
    [
        (b"I0000 00:00:1796091386.531515    7466 port.cc:153] oneDNN custom operations", True),
        (b"E0000 00:00:17960.822694    7466 cuda_platform.cc:52] failed call to cuInit: x", True),
        (b"E0000 00:00:17960.822694    7466 cuda_dnn.cc:52] no memory", False),
        (b"2026-12-01 00:00:00.531515: I tensorflow/core/util/port.cc:153] oneDNN", True),
        (b"2026-12-01 00:00:00.531515: E tensorflow/core/util/port.cc:153] oneDNN", False),
        (b"Traceback (most recent call last):", False),
        (b"Illegal instruction", False),
        (b"", False),
    ],
)
def test_usual_log_lines(line, dropped):
    assert startup.is_usual_log_line(line) is dropped


def test_a_device_that_is_not_used_is_worth_a_line():
    line = b"I0000 00:00:1796091386.531515    7466 cudart_stub.cc:31] Could not find cuda drivers"
    assert startup.is_usual_log_line(line) and not startup.is_usual_log_line(line, nvidia=True)


def test_every_module_that_registers_classes_is_known():
    for module in pkgutil.walk_packages(lipdp.__path__, "lipdp."):
        path = ROOT.joinpath(*module.name.split(".")).with_suffix(".py")
        if path.exists() and "@keras.saving.register_keras_serializable" in path.read_text("utf-8"):
            assert any(f"{module.name}.".startswith(f"{name}.") for name in _loading.REGISTERING)


def test_public_names_are_listed_alike():
    tree = ast.parse(pathlib.Path(lipdp.__file__).read_text("utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imported = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    modules = {name for name, module in imported.items() if module == "lipdp"}
    assert {n: m for n, m in imported.items() if n not in modules} == lipdp._HOMES
    assert imported.keys() <= set(lipdp.__all__)
    assert set(lipdp.__all__) <= set(dir(lipdp))
    for name in lipdp.__all__:
        getattr(lipdp, name)
    assert lipdp.audit is importlib.import_module("lipdp.audit")
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = lipdp.nonsense


def test_the_command_knows_all_allocations():
    assert cli._ALLOCATIONS == noise.ALLOCATIONS
