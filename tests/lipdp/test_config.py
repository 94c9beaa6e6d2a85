"""Training from a file, and the commands that go with it."""

import json

import keras
import numpy as np
import pytest

import accountants
import lipdp
from accountants.cli import main
from lipdp.cli import COMMANDS
from lipdp.config import read_config, train

pytestmark = pytest.mark.any_backend

CONFIG = """
data: {train: data.npz, test_x: x, test_y: y}
network: {name: mlp, input_shape: [6], classes: 3, width: 8}
privacy: {epsilon: 3, delta: 1e-5, clip: 0.5, ledger: spent.ledger}
sampling: {scheme: poisson, batch_size: 16}
training:
  epochs: 2
  loss: {name: sparse_categorical_crossentropy, temperature: 2}
  optimizer: {name: sgd, learning_rate: 0.5, momentum: 0.9, decay: cosine}
output: {model: private.keras, report: report.html, result: result.json}
"""


@pytest.fixture
def folder(tmp_path):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(64, 6)).astype("float32")
    np.savez(tmp_path / "data.npz", x=x, y=generator.integers(0, 3, 64))
    (tmp_path / "run.yaml").write_text(CONFIG)
    return tmp_path


def run(capsys, *arguments):
    code = main(["lipdp", *map(str, arguments)], "lipdp", COMMANDS)
    return code, capsys.readouterr()


def test_a_file_trains_a_private_model(folder, capsys):
    code, said = run(capsys, "train", folder / "run.yaml", "--json")
    assert code == 0, said.err
    result = json.loads(said.out)
    assert result == json.loads((folder / "result.json").read_text())
    assert 2.9 < result["epsilon"] <= 3.0 and result["delta"] == 1e-5
    assert result["steps"] == 8 and 0 <= result["test_accuracy"] <= 1
    assert (folder / "report.html").exists() and (folder / "spent.ledger").exists()
    network = keras.saving.load_model(folder / "private.keras", compile=False)
    assert network.output_shape == (None, 3)


def trained(home, capsys):
    """By the file, and by a mapping that names paths."""
    config = read_config("~/run.yaml")
    assert config["privacy"]["ledger"] == str(home / "spent.ledger")
    train(config | {"data": {"train": "~/data.npz"}, "output": {"result": "~/other.json"}}, False)
    assert (home / "other.json").exists()


def commanded(home, capsys):
    text = CONFIG.replace("train: data.npz", "train: ~/data.npz").replace(": spent", ": ~/spent")
    for name in ("private.keras", "report.html", "result.json"):
        text = text.replace(name, f"~/{name}")
    (home / "sub").mkdir()
    (home / "sub" / "run.yaml").write_text(text)
    for command in (
        ["train", "~/sub/run.yaml"],
        ["check", "~/private.keras"],
        ["repair", "~/private.keras", "~/repaired.keras"],
        ["audit", "~/private.keras", "--members=~/data.npz", "--nonmembers=~/data.npz"],
        [
            "report",
            "~/private.keras",
            "--batch_size=4",
            "--html=~/page.html",
            "--sample=~/data.npz",
        ],
        ["statement", "~/spent.ledger"],
        ["ledger", "~/spent.ledger"],
        ["ledger", "verify", "~/spent.ledger"],
    ):
        code, said = run(capsys, *command)
        assert code == 0, (command, said.err)
    for name in ("private.keras", "report.html", "result.json", "repaired.keras", "page.html"):
        assert (home / name).exists(), name


def modelled(home, capsys):
    model = lipdp.PrivateModel(
        lipdp.models.mlp((6,), 3, width=4),
        noise_multiplier=1.0,
        sampling=lipdp.PoissonSampling(16),
        ledger="~/own.ledger",
    )
    assert model.ledger.path == str(home / "own.ledger")
    model.compile("sgd", "sparse_categorical_crossentropy")
    model.save("~/model.keras")
    model.save_weights("~/model.weights.h5")
    model.load_weights("~/model.weights.h5")
    model.report().to_html("~/model.html")
    x = np.ones((2, 6), "float32")
    lipdp.layers.cached_features(model.network, x, "~/features.npy", progress=False)
    for name in ("model.keras", "model.weights.h5", "model.html", "features.npy"):
        assert (home / name).exists(), name


@pytest.mark.parametrize("use", [trained, commanded, modelled], ids=["file", "command", "model"])
def test_home_in_paths(use, folder, capsys, monkeypatch):
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(elsewhere)
    use(folder, capsys)
    assert not list(elsewhere.iterdir())  # no folder of the name ~


def test_a_used_up_budget_leaves_what_was_trained(folder, capsys):
    assert run(capsys, "train", folder / "run.yaml")[0] == 0
    written = {path: path.read_bytes() for path in folder.iterdir()}
    code, said = run(capsys, "train", folder / "run.yaml")
    assert code == 1 and "used up" in said.err and "noise_multiplier" in said.err
    assert {path: path.read_bytes() for path in folder.iterdir()} == written
    # What a larger budget leaves is calibrated to.
    (folder / "run.yaml").write_text(CONFIG.replace("epsilon: 3", "epsilon: 6"))
    code, said = run(capsys, "train", folder / "run.yaml", "--json")
    result = json.loads(said.out)
    assert code == 0 and 5.9 < result["epsilon"] <= 6.0 and result["steps"] == 16


def test_a_spent_budget_is_told(folder, capsys):
    (folder / "run.yaml").write_text(
        CONFIG.replace("{epsilon: 3", "{noise_multiplier: 2, epsilon: 1.5")
    )
    for expected in (0, 1):  # the first one ends at the budget
        code, said = run(capsys, "train", folder / "run.yaml")
        assert code == expected
    assert "overspend" in said.err


def test_the_settings_arrive(folder):
    config = read_config(folder / "run.yaml")
    assert config["privacy"]["delta"] == 1e-5  # YAML has it as text
    config["output"] = {}
    config["privacy"] = {"noise_multiplier": 2.0}
    config["sampling"] = {"scheme": "full_batch"}
    result = train(config, verbose=False)
    assert result["noise_multiplier"] == 2.0 and result["steps"] == 2


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("privacy:", "privcy:", "unknown section privcy"),
        ("clip: 0.5", "clp: 0.5", "no clp"),
        ("epochs: 2", "physical_batch_size: 8", "`epochs` is missing"),
        ("name: mlp", "name: mpl", "got 'mpl'"),
        ("scheme: poisson", "scheme: poison", "poison"),
        ("name: sgd", "name: sdg", "sdg"),
        ("decay: cosine", "decay: sine", "'sine'"),
        ("delta: 1e-5, ", "", "`delta` is missing"),
        ("train: data.npz", "train: data.npz, x: z", "has no z"),
        ("temperature: 2", "temprature: 2", "temprature"),
        ("network: {", "network: [", "not a YAML"),
        ("privacy: {epsilon: 3", "privacy: {epsilon: -3", "epsilon"),
        ("model: private.keras", "model: no/private.keras", "folder"),
        ("model: private.keras", "model: private", ".keras"),
        ("report: report.html", "report: no/report.html", "folder"),
        ("result: result.json", "result: ./spent.ledger", "overwrite the ledger"),
        ("clip: 0.5", "clip: per_layr", "per_layer"),
        ("clip: 0.5", "clip: true", "per_layer"),
        ("clip: 0.5", "clip: {per_layer: 3}", "per_layer"),
        ("clip: 0.5", "clip: {per_layer: {quantile: 2}}", "quantile"),
        ("clip: 0.5", "clip: {per_layer: {quantle: 0.5}}", "quantle"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_spent(folder, capsys, old, new, message):
    assert old in CONFIG
    (folder / "run.yaml").write_text(CONFIG.replace(old, new))
    code, said = run(capsys, "train", folder / "run.yaml")
    assert code == 2 and message in said.err
    assert not (folder / "private.keras").exists()
    path = folder / "spent.ledger"
    assert not path.exists() or not accountants.Ledger(path).runs


def test_missing_files(folder, capsys):
    code, said = run(capsys, "train", folder / "none.yaml")
    assert code == 1 and "none.yaml" in said.err
    (folder / "data.npz").unlink()
    code, said = run(capsys, "train", folder / "run.yaml")
    assert code == 1 and "data.npz" in said.err


@pytest.fixture
def network(folder):
    path = folder / "network.keras"
    lipdp.models.mlp((6,), 3, width=8).save(path)
    return path


def test_report_of_a_planned_run(folder, network, capsys):
    plan = ["--batch_size=16", "--num_examples=64", "--epochs=2"]
    budget = ["--epsilon=3", "--delta=1e-5"]
    page = folder / "page.html"
    code, said = run(capsys, "report", network, *plan, *budget, f"--html={page}", "--json")
    assert code == 0, said.err
    found = json.loads(said.out)
    assert found["planned"] and 2.9 < found["epsilon"] <= 3.0
    assert found["runs"][0]["steps"] == 8 and page.exists()
    assert found["weights"][0]["noise_std"] > 0


@pytest.mark.parametrize("clip", ["per_layer", "{per_layer: {quantile: 0.7}}"])
def test_layers_clip_in_a_run_that_a_file_describes(folder, capsys, clip):
    keras.Sequential(
        [keras.Input((6,)), keras.layers.LayerNormalization(), keras.layers.Dense(3)]
    ).save(folder / "plain.keras")
    text = CONFIG.replace("clip: 0.5", f"clip: {clip}")
    text = text.replace("{name: mlp, input_shape: [6], classes: 3, width: 8}", "plain.keras")
    (folder / "run.yaml").write_text(text)
    code, said = run(capsys, "train", folder / "run.yaml", "--json")
    assert code == 0, said.err
    assert json.loads(said.out)["steps"] == 8
    assert "Layers that clip" in (folder / "report.html").read_text("utf-8")


def test_report_of_layers_that_clip(folder, capsys):
    path = folder / "plain.keras"
    keras.Sequential([keras.Input((6, 2)), keras.layers.GRU(3), keras.layers.Dense(3)]).save(path)
    flags = ["--batch_size=16", "--clip=per_layer", "--json"]
    code, said = run(capsys, "report", path, *flags)
    assert code == 0, said.err
    assert [row["kind"] for row in json.loads(said.out)["clipped"]] == ["GRU", "Dense"]
    again, said = run(capsys, "report", path, "--batch_size=16", "--json")
    assert again == 0 and len(json.loads(said.out)["clipped"]) == 2  # the default for them


def test_report_without_a_plan_is_for_a_noise_multiplier_of_one(network, capsys):
    code, said = run(capsys, "report", network, "--batch_size=16", "--json")
    assert code == 0, said.err
    found = json.loads(said.out)
    assert found["noise_multiplier"] == 1.0 and found["epsilon"] is None
    total = sum(row["sensitivity"] ** 2 for row in found["weights"]) ** 0.5
    assert found["weights"][0]["noise_std"] == pytest.approx(total / 16)


def test_report_of_a_sample(folder, network, capsys):
    code, said = run(
        capsys, "report", network, "--batch_size=16", f"--sample={folder / 'data.npz'}", "--json"
    )
    assert code == 0, said.err
    found = json.loads(said.out)
    assert len(found["attained"][0]["norms"]) == 64


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "--batch_size is needed"),
        (["--batch_size=16", "--epsilon=3"], "--steps or --epochs"),
        (["--batch_size=16", "--epochs=2"], "--num_examples is needed"),
        (["--batch_size=16", "--loss=nothing"], "nothing"),
        (["--batch_size=16", "--loss=mean_squared_error"], "clip"),
        (["--batch_size=16", "--noise_multiplier=-1"], "noise_multiplier"),
    ],
)
def test_bad_flags(network, capsys, flags, message):
    code, said = run(capsys, "report", network, *flags)
    assert code == 2 and message in said.err
