import json
import os
import subprocess
import sys

import pytest

from accountants import (
    FixedSize,
    FullBatch,
    Ledger,
    PoissonSampling,
    ShuffledEpochs,
    TruncatedPoisson,
    calibrate_noise_multiplier,
    cli,
    epsilon,
)
from accountants.cli import COMMANDS, main

RUN = ["--delta=1e-5", "--noise_multiplier=1", "--num_examples=60000", "--batch_size=600"]


def command(capsys, *arguments):
    """The exit code, and what was printed to stdout and stderr."""
    code = main(["accountants", *arguments])
    return (code, *capsys.readouterr())


def as_json(capsys, *arguments):
    code, out, err = command(capsys, *arguments, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def test_epsilon(capsys):
    code, out, err = command(capsys, "epsilon", *RUN, "--steps=10000")
    assert code == 0 and not err
    assert out.startswith("epsilon = 6.19098 at delta = 1e-05, under add_or_remove_one, by pld")
    found = as_json(capsys, "epsilon", *RUN, "--epochs=100", "--relation=zero_out")
    run = {"noise_multiplier": 1.0, "sampling": PoissonSampling(600), "num_examples": 60_000}
    assert found["epsilon"] == epsilon(**run, steps=10_000, delta=1e-5)
    assert found["relation"] == "zero_out" and found["run"]["steps"] == 10_000
    rdp = as_json(capsys, "epsilon", *RUN, "--steps=10000", "--accountant=rdp")
    assert rdp["epsilon"] == pytest.approx(6.7128, abs=1e-4)
    common = [*RUN, "--steps=100"]
    cut = ["--sampling=truncated_poisson", "--physical_batch_size=650"]
    run = run | {"sampling": TruncatedPoisson(600, 650), "steps": 100}
    assert as_json(capsys, "epsilon", *common, *cut)["epsilon"] == epsilon(**run, delta=1e-5)
    bins = ["--sampling=random_allocation", "--steps_per_epoch=100"]
    assert as_json(capsys, "epsilon", *RUN[:3], *bins, "--epochs=1")["run"]["steps"] == 100
    bands = ["--sampling=cyclic_poisson", "--bands=10"]
    run = as_json(capsys, "epsilon", *common, *bands)["run"]
    assert run["sampling"] == {"scheme": "cyclic_poisson", "batch_size": 600, "bands": 10}
    order = ["--sampling=fixed_epochs", "--run_epochs=3"]
    one, two = (as_json(capsys, "epsilon", *RUN, *order, f"--epochs={n}") for n in (3, 4))
    assert one["relation"] == "zero_out" and one["epsilon"] < two["epsilon"]
    assert command(capsys, "epsilon", *common, *order, "--bands=2")[0] == 2
    group = as_json(capsys, "epsilon", *common, "--group_size=2")
    assert group["group_size"] == 2 and group["epsilon"] > 1.0
    no_noise = ["--delta=1e-5", "--noise_multiplier=0", "--num_examples=9", "--steps=1"]
    found = as_json(capsys, "epsilon", *no_noise, "--sampling=full_batch")
    assert found["epsilon"] == "inf"


def test_calibrate(capsys):
    budget = ["--epsilon=3", "--delta=1e-5", "--num_examples=60000"]
    size = "--batch_size=600"
    found = as_json(capsys, "calibrate", *budget, size, "--steps=100")
    assert found["noise_multiplier"] == calibrate_noise_multiplier(
        epsilon=3, delta=1e-5, sampling=PoissonSampling(600), num_examples=60_000, steps=100
    )
    noise = "--noise_multiplier=1.5"
    steps = as_json(capsys, "calibrate", *budget, size, noise, "--solve_for=steps")["steps"]
    epochs = as_json(capsys, "calibrate", *budget, size, noise, "--solve_for=epochs")["epochs"]
    assert epochs == steps // 100 > 0
    largest = ["--solve_for=batch_size", "--epochs=20", "--accountant=rdp"]
    assert as_json(capsys, "calibrate", *budget, noise, *largest)["batch_size"] > 600
    code, out, _ = command(capsys, "calibrate", *budget, noise, *largest)
    assert code == 0 and out.startswith("batch_size = ")


def test_calibrate_to_a_risk(capsys):
    run = ["--sampling=full_batch", "--num_examples=100", "--steps=1"]
    found = as_json(capsys, "calibrate", *run, "--advantage=0.1")
    assert found["advantage"] == 0.1 and found["noise_multiplier"] == pytest.approx(3.979, rel=1e-3)
    code, out, _ = command(capsys, "calibrate", *run, "--tpr=0.1", "--at_fpr=0.01")
    assert code == 0 and out.endswith("for tpr = 0.1 and at_fpr = 0.01\n")


def test_ledger(capsys, tmp_path):
    path = str(tmp_path / "spent.ledger")
    code, out, _ = command(capsys, "ledger", path)
    assert code == 0 and f"no runs: {path} does not exist" in out
    for noise_multiplier in (1.5, 3.0):
        with Ledger(path).open_run(
            noise_multiplier=noise_multiplier, sampling=PoissonSampling(10), num_examples=1000
        ) as run:
            run.pay(20)
    code, out, _ = command(capsys, "ledger", path, "--epsilon=2", "--delta=1e-6")
    assert code == 0 and out.count("20 steps") == 2 and "left of epsilon = 2" in out
    found = as_json(capsys, "ledger", path, "--epsilon=2", "--delta=1e-6")
    spent = Ledger(path).epsilon(1e-6)
    assert found["epsilon"] == spent and found["steps"] == 40
    assert found["runs"][0]["epsilon_so_far"] < found["runs"][1]["epsilon_so_far"] == spent
    assert found["budget"]["left"] == pytest.approx(2 - spent)
    more = found["budget"]["more_steps_like_the_last_run"]
    runs = Ledger(path).runs
    last = {"noise_multiplier": 3.0, "sampling": PoissonSampling(10), "num_examples": 1000}

    def after(steps):
        from accountants import TrainingRun

        return epsilon(runs=[*runs, TrainingRun(**last, steps=steps)], delta=1e-6)

    assert after(more) <= 2 < after(more + 1)
    over = as_json(capsys, "ledger", path, "--epsilon=0.01")
    assert over["budget"] == {"epsilon": 0.01, "left": 0.0, "more_steps_like_the_last_run": 0}
    # A run that has died is charged with what it reserved, and that is said.
    run = Ledger(path).open_run(noise_multiplier=9.0, sampling=FullBatch(), num_examples=1000)
    run.pay()
    run._writer.close()
    assert "not settled" in command(capsys, "ledger", path)[1]
    assert as_json(capsys, "ledger", path)["runs"][2]["steps"] == 64


def test_a_ledger_and_its_command_say_the_same(capsys, tmp_path):
    path = str(tmp_path / "spent.ledger")
    # The schemes of runs that took no step have other relations, which do not matter.
    for sampling, steps in [(FixedSize(10), 0), (PoissonSampling(10), 30), (ShuffledEpochs(10), 0)]:
        with Ledger(path).open_run(
            noise_multiplier=1.5, sampling=sampling, num_examples=1000
        ) as run:
            if steps:
                run.pay(steps)
        found = as_json(capsys, "ledger", path, "--delta=1e-6", "--epsilon=5")
        spent = Ledger(path).epsilon(1e-6)
        assert (found["epsilon"], found["relation"]) == (spent, spent.relation)
        assert found["budget"]["more_steps_like_the_last_run"] > 0
    assert spent.relation == "add_or_remove_one"
    asked = as_json(capsys, "ledger", path, "--delta=1e-6", "--relation=replace_one")
    assert asked["epsilon"] == Ledger(path).epsilon(1e-6, relation="replace_one") > spent


def test_verify_and_repair(capsys, tmp_path):
    path = str(tmp_path / "spent.ledger")
    for action in ("verify", "repair"):
        code, out, err = command(capsys, "ledger", action, path)
        assert code == 1 and not out and f"{path} does not exist" in err
    with Ledger(path).open_run(
        noise_multiplier=1.5, sampling=PoissonSampling(10), num_examples=1000
    ) as run:
        run.pay(20)
    code, out, _ = command(capsys, "ledger", "verify", path)
    assert code == 0 and out == f"{path}: every line is sound; 1 runs, 20 steps.\n"
    assert "nothing to repair" in command(capsys, "ledger", "repair", path)[1]
    run = Ledger(path).open_run(noise_multiplier=9.0, sampling=FullBatch(), num_examples=1000)
    run.pay()
    run._writer.close()
    with open(path, "ab") as file:
        file.write(b'{"type": "res')
    found = as_json(capsys, "ledger", "verify", path)
    assert found["runs"] == 2 and found["not_settled"] == 1
    assert found["steps"] == 20 + 64 + 64 and found["torn_steps"] == 64
    assert "charged with 64 steps" in command(capsys, "ledger", "verify", path)[1]
    repaired = as_json(capsys, "ledger", "repair", path)["repaired"]
    assert repaired["line"] == 7 and repaired["steps"] == 64 and os.path.exists(repaired["backup"])
    assert as_json(capsys, "ledger", "verify", path)["torn_steps"] is None
    with open(path, "r+b") as file:
        file.seek(200)
        file.write(b"?")
    for action in ("verify", "repair"):
        code, out, err = command(capsys, "ledger", action, path)
        assert code == 1 and not out and f"{path}, line 2" in err
    assert command(capsys, "ledger", "verify", path, "--epsilon=3")[0] == 2


def test_a_broken_ledger(capsys, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("shopping\nlist\n" * 10)
    code, out, err = command(capsys, "ledger", str(path))
    assert code == 1 and not out and "line 1" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["spend"], "'spend'"),
        (["epsilon"], "--delta is needed"),
        (["epsilon", *RUN], "--steps and --epochs"),
        (["epsilon", *RUN, "--steps=1", "--epochs=1"], "--steps and --epochs"),
        (["epsilon", *RUN, "--steps=one"], "steps"),
        (["epsilon", *RUN, "--steps=-1"], "steps"),
        (["epsilon", *RUN, "--steps=1", "more"], "more"),
        (["epsilon", *RUN, "--steps=1", "--sigma=3"], "sigma"),
        (["epsilon", *RUN, "--steps=1", "--accountant=magic"], "accountant"),
        (["epsilon", *RUN, "--steps=1", "--accountant=exact"], "unsampled"),
        (["epsilon", *RUN, "--steps=1", "--delta=2"], "delta"),
        (["epsilon", *RUN, "--steps=1", "--batch_size=nan"], "batch_size"),
        (["epsilon", *RUN, "--steps=1", "--physical_batch_size=9"], "physical_batch_size"),
        (["epsilon", *RUN, "--steps=1", "--sampling=full_batch"], "batch_size"),
        (["epsilon", *RUN, "--steps=1", "--sampling=fixed_size", "--batch_size=1.5"], "integer"),
        (["epsilon", *RUN, "--steps=1", "--sampling=truncated_poisson"], "physical_batch_size"),
        (["calibrate", *RUN, "--epsilon=3", "--steps=1"], "noise_multiplier"),
        (["calibrate", "--epsilon=-3", "--delta=1e-5", "--num_examples=9"], "batch_size"),
        (["calibrate", "--epsilon=3", "--solve_for=magic"], "solve_for"),
        (["calibrate", "--advantage=0.1", "--epsilon=3"], "--epsilon cannot be given"),
        (["calibrate", "--advantage=0.1", "--delta=3"], "--delta cannot be given"),
        (["calibrate", "--advantage=0.1", "--tpr=0.2"], "--advantage cannot be given"),
        (["calibrate", "--tpr=0.2"], "--at_fpr is needed"),
        (["calibrate", "--at_fpr=0.2"], "--tpr is needed"),
        (["calibrate", "--advantage=0.1", "--solve_for=steps"], "--advantage cannot be given"),
        (["ledger"], "PATH"),
        (["ledger", "a", "b"], "PATH"),
        (["ledger", "verify"], "PATH"),
        (["ledger", "repair", "a", "b"], "PATH"),
        (["ledger", "nowhere", "--epsilon=-1"], "epsilon"),
    ],
)
def test_bad_flags_are_explained(capsys, arguments, message):
    code, out, err = command(capsys, *arguments)
    assert code == 2 and not out
    assert message in err and "Traceback" not in err


@pytest.mark.parametrize("name", COMMANDS)
def test_help(capsys, name):
    code, out, err = command(capsys, name, "--help")
    assert code == 0 and not err
    assert "--delta" in out and "--json" in out
    function, line = COMMANDS[name]
    assert callable(function) and line in command(capsys, "--help")[1]
    assert line and "\n" not in line
    # As another program would mount it.
    assert function([f"lipdp {name}", "--help"]) == 0
    assert capsys.readouterr().out == out


def test_as_a_module_and_light():
    found = subprocess.run(
        [sys.executable, "-m", "accountants", "epsilon", "--delta=x"],
        capture_output=True,
        text=True,
    )
    assert found.returncode == 2 and "delta" in found.stderr and "Traceback" not in found.stderr
    code = (
        "import sys, accountants.cli;"
        "assert not {'keras', 'tensorflow', 'jax', 'dp_accounting', 'scipy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("arguments", [["--help"], ["epsilon", "--help"], ["calibrate", "--delta"]])
def test_a_reader_that_has_gone_ends_a_command_quietly(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "accountants", *arguments]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    if "--help" in arguments:
        assert done.returncode == 141 and done.stderr == b""
    else:  # writes to stderr only
        assert done.returncode == 2 and b"Traceback" not in done.stderr


def test_every_scheme_has_a_flag():
    from accountants.sampling import SCHEMES

    values = cli._epsilon_flags()
    assert values["sampling"].parser.enum_values == list(SCHEMES)
    for name, kind in SCHEMES.items():
        settings = kind.settings()
        assert set(settings) <= set(values)
        for flag, field in settings.items():
            assert field.metadata["help"] == values[flag].help.split(": ", 1)[-1]
        given = [f"--{flag}={field.metadata['example']}" for flag, field in settings.items()]
        values = cli._epsilon_flags()
        values(["epsilon", f"--sampling={name}", *given])
        assert cli.sampling_of(values) == kind.example()
