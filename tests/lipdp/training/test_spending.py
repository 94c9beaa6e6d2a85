"""What is read of a ledger is what is paid on; what is left of a budget, and what is warned of."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings

import keras
import numpy as np
import pytest

import accountants
import lipdp
from accountants import Budget, Ledger, LedgerError
from lipdp import cli
from lipdp.data.repeats import repeats
from lipdp.training import spending as module
from lipdp.training.spending import BudgetExceeded, Spending
from tests.lipdp.helpers import data, private, weights

pytestmark = pytest.mark.any_backend

SAMPLING = accountants.PoissonSampling(256)
BUDGET = Budget(3.0, 1e-5)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "spent.ledger"


def spending(path=None, budget=BUDGET, noise_multiplier=None):
    return Spending(budget, noise_multiplier, path, lambda: 0)


def plan(account, steps=400, examples=10_000, sampling=SAMPLING):
    return account.plan(sampling, examples, steps, 40)


def use(account, steps=400, **kwargs):
    account.begin(plan(account, steps, **kwargs))
    account.pay(steps)
    account.settle()


# --- one writer -----------------------------------------------------------------------------------


def test_a_plan_keeps_others_from_paying(path):
    first, second = spending(path), spending(path)
    planned = plan(first)
    with pytest.raises(LedgerError, match="another run of this process"):
        plan(second)
    first.begin(planned)
    with pytest.raises(LedgerError, match="another run of this process"):
        plan(second)
    first.pay(400)
    first.settle()
    with pytest.raises(BudgetExceeded, match="used up"):
        plan(second)
    assert first.spent(None, SAMPLING).epsilon <= 3.0 and Ledger(path).steps == 400


def test_two_processes_do_not_overspend(path):
    account = spending(path)
    planned = plan(account)
    code = (
        "import sys, accountants as a\n"
        "with a.Ledger(sys.argv[1]).open_run(\n"
        "    noise_multiplier=1.0, sampling=a.PoissonSampling(256), num_examples=10_000) as run:\n"
        "    run.pay(400)\n"
    )
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "being written by another process" in done.stderr
    account.begin(planned)
    account.pay(400)
    account.settle()
    assert subprocess.run(command).returncode == 0
    assert account.spent(None, SAMPLING).steps == 800


def test_a_plan_that_fails_lets_the_ledger_go(path):
    model = private(budget=BUDGET, ledger=path)
    x, y = data()
    bad = np.where(np.arange(6) == 3, np.nan, x)
    for arguments, error in [
        ((bad, y), ValueError),
        ((x, y, 0), ValueError),
        ((x[:8], y[:8]), ValueError),
    ]:
        with pytest.raises(error) as kept:
            model.fit(*arguments, verbose=0)
        Ledger(path).lock().close()
        assert kept is not None
    small = private(budget=Budget(1e-6, 1e-9), ledger=path)
    with pytest.raises(ValueError, match="too small") as kept:
        small.fit(x, y, verbose=0)
    Ledger(path).lock().close()
    # Whatever fails behind the plan, too.
    model = private(noise_multiplier=2.0, ledger=path)
    for broken in (model.noise, model):
        name = "begin" if broken is model.noise else "_follow"
        original = getattr(broken, name)

        def fail(*args):
            raise RuntimeError("broken")

        object.__setattr__(broken, name, fail)
        with pytest.raises(RuntimeError, match="broken"):
            model.fit(x, y, verbose=0)
        Ledger(path).lock().close()
        object.__setattr__(broken, name, original)
    model.fit(x, y, verbose=0)
    assert Ledger(path).steps == 4


def test_a_loop_that_was_left_does_not_end_a_later_run(path):
    model = private(ledger=path)
    left = model.batches(*data())
    next(left)
    model.end_run()
    later = model.batches(*data())
    model.train_on_batch(next(later))
    left.close()
    model.train_on_batch(next(later))
    model.end_run()
    assert Ledger(path).steps == 2


# --- a ledger that is changed ---------------------------------------------------------------------


def replace(path):
    shutil.copy(path, f"{path}.new")
    os.replace(f"{path}.new", path)


class Change(keras.callbacks.Callback):
    def __init__(self, change):
        super().__init__()
        self.change, self.begun = change, 0

    def on_train_batch_begin(self, batch, logs=None):
        self.begun += 1
        if self.begun == 3:
            self.change()
            self.before = weights(self.model)


@pytest.mark.parametrize("change", [os.unlink, replace, lambda p: os.truncate(p, 0)])
def test_a_step_does_not_run_on_a_changed_ledger(path, change):
    model = private(ledger=path)
    watched = Change(lambda: change(path))
    with pytest.raises(LedgerError, match="while a run was paying into it"):
        model.fit(*data(), verbose=0, callbacks=[watched])
    assert watched.begun == 3
    for now, before in zip(weights(model), watched.before, strict=True):
        np.testing.assert_array_equal(now, before)
    # What this model knows to have paid for is not forgotten with the file.
    if change is not replace:  # by a copy that has what was reserved
        with pytest.raises(LedgerError):
            model.spent(1e-5)
    (saved,) = [p for p in path.parent.iterdir() if p.suffix == ".saved"]
    os.replace(saved, path)
    assert model.spent(1e-5).steps >= 2
    model.fit(*data(), verbose=0)


def test_a_ledger_that_is_removed_between_fits_is_missed(path):
    model = private(ledger=path)
    model.fit(*data(), verbose=0)
    copy = path.read_bytes()
    model.fit(*data(), verbose=0)
    newer = path.read_bytes()
    path.unlink()
    for content in (None, copy):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(LedgerError, match="lacks steps"):
            model.spent(1e-5)
        with pytest.raises(LedgerError, match="lacks steps"):
            model.fit(*data(), verbose=0)
    path.write_bytes(newer)
    model.fit(*data(), verbose=0)
    assert model.spent(1e-5).steps == 12


# --- what is left of a budget ---------------------------------------------------------------------


def test_a_used_up_budget_is_refused(path):
    use(spending(path))
    before = path.read_bytes()
    for steps, sampling in [(400, SAMPLING), (1, SAMPLING), (40, accountants.FullBatch())]:
        account = spending(path)
        with pytest.raises(BudgetExceeded, match=r"used up: ε = 2\.99\d* .* 400 steps.*1%"):
            plan(account, steps, sampling=sampling)
        assert account.noise_multiplier is None
    assert path.read_bytes() == before
    # What somebody asks for is done, within the budget.
    asked = spending(path, noise_multiplier=100.0)
    run = plan(asked, 400)
    assert run.allowed > 0
    asked.settle()
    # A larger budget is another one.
    use(spending(path, Budget(3.2, 1e-5)))
    assert 3.19 < spending(path, Budget(3.2, 1e-5)).spent(None, SAMPLING).epsilon <= 3.2


@pytest.mark.parametrize("left, refused", [(0.5, False), (0.02, False), (0.005, True)])
def test_what_counts_as_used_up(path, left, refused):
    use(spending(path, Budget(3.0 * (1 - left), 1e-5)))
    account = spending(path)
    if refused:
        with pytest.raises(BudgetExceeded, match="used up"):
            plan(account)
    else:
        use(account)
        whole = spending()
        use(whole)
        # The noise that is accepted is at most about 1 / sqrt(share) times the whole budget's.
        assert account.noise_multiplier < whole.noise_multiplier / np.sqrt(left)


@pytest.mark.parametrize(
    "sampling, most",
    [
        (SAMPLING, 256 * 20),
        (accountants.FullBatch(), 10_000 * 20),
        (accountants.FixedEpochs(100, 4), 10_000),
    ],
)
def test_noise_above_all_signal_is_refused(sampling, most):
    small = spending(budget=Budget(1e-5, 1e-9))
    with pytest.raises(ValueError, match=f"too small.*above {re.escape(f'{most:.4g}')}.*`noise"):
        plan(small, sampling=sampling)
    assert small.noise_multiplier is None
    use(spending(budget=Budget(1e-5, 1e-9), noise_multiplier=1e8), sampling=sampling)


# --- one number -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", accountants.sampling.SCHEMES.values(), ids=lambda s: s.scheme)
def test_the_relation_is_the_schemes_before_training(scheme, path):
    sampling = scheme.example()
    fresh = spending(path, None, 2.0).spent(1e-5, sampling)
    assert (fresh.epsilon, fresh.steps) == (0.0, 0)
    assert fresh.relation == sampling.relations[0]
    use(spending(path, None, 2.0), 3, examples=100, sampling=sampling)
    after = spending(path, None, 2.0).spent(1e-5, sampling)
    assert after.relation == fresh.relation and after.epsilon > 0
    # What is spent is the ledger's, whatever the scheme of the model that asks.
    for other in accountants.sampling.SCHEMES.values():
        assert spending(path, None, 2.0).spent(1e-5, other.example()) == after


def test_model_ledger_and_command_say_the_same(path, capsys):
    x, y = data()
    for sampling in (lipdp.FixedSize(16), lipdp.ShuffledEpochs(16)):
        private(sampling=sampling, ledger=path).fit(x, y, verbose=0)
    with Ledger(path).open_run(noise_multiplier=1.0, sampling=lipdp.FullBatch(), num_examples=64):
        pass  # and a run without a step
    said = private(sampling=lipdp.FullBatch(), ledger=path).spent(1e-4)
    found = Ledger(path).epsilon(1e-4)
    assert cli.cli.main(["lipdp", "ledger", str(path), "--delta=1e-4", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert said.epsilon == found == told["epsilon"]
    assert said.relation == found.relation == told["relation"] == "replace_one"
    assert said.steps == Ledger(path).steps == told["steps"] == 8


def test_certificates_are_paid_for_out_of_delta(path):
    use(spending(path, None, 0.8))
    plain = spending(path, None, 1.0).spent(1e-5, SAMPLING)

    def with_certificates(count):
        return Spending(None, 1.0, path, lambda: count).spent(1e-5, SAMPLING).epsilon

    assert plain.epsilon < with_certificates(10) < plain.epsilon * (1 + 1e-8)
    # So many that the larger share is needed, and more than that.
    failure = 400 * 1e-20
    needed = (1 + np.exp(plain.epsilon)) * failure
    many = with_certificates(int(0.9e-8 / needed))
    assert plain.epsilon * (1 + 1e-8) < many < plain.epsilon * (1 + 1e-3)
    assert with_certificates(int(1.1e-8 / needed)) == np.inf


# --- warnings -------------------------------------------------------------------------------------


def test_a_delta_above_one_over_n():
    x, y = data()
    with pytest.warns(UserWarning, match="δ = 0.02 is above 1 / 64"):
        private(budget=Budget(3.0, 0.02)).fit(x, y, verbose=0)
    model = private()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.spent(0.02)  # nothing is spent
        private(budget=Budget(3.0, 1 / 64)).fit(x, y, verbose=0)
        model.fit(x, y, verbose=0)
        model.spent(1 / 64)
    with pytest.warns(UserWarning, match="above 1 / 64"):
        model.spent(0.02)


@pytest.mark.parametrize("times, warned", [(9, False), (10, True)])
@pytest.mark.parametrize("kind", ["array", "dict", "not contiguous", "tensor"])
def test_a_row_that_occurs_often(times, warned, kind, tmp_path):
    x, y = data()
    rows = np.arange(64)
    rows[np.arange(times) * 5] = 5
    x, y = x[rows], y[rows]
    if kind == "tensor":
        x = keras.ops.convert_to_tensor(x)
    elif kind == "not contiguous":
        x = np.asfortranarray(x)
    model = private()
    if kind == "dict":
        x = {model.network.inputs[0].name: x}
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        model.fit(x, y, verbose=0)
    assert any("group_size" in str(w.message) for w in found) == warned


def test_a_file_is_not_read_for_its_rows(tmp_path):
    x, y = data()
    np.save(tmp_path / "x.npy", np.repeat(x[:1], 64, axis=0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        private().fit(np.load(tmp_path / "x.npy", mmap_mode="r"), y * 0, verbose=0)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int64", "uint8", "bool"])
@pytest.mark.parametrize("width", [1, 3, 4, 5000])
def test_repeated_rows_are_found_whatever_they_are(dtype, width):
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 2, (300, 16 + width))  # whole numbers, in which few bits differ
    bits = np.unique(bits, axis=0)
    x, y = bits[:, : width + 10].astype(dtype), bits[:, width + 10 :]
    assert not repeats([x, y], 2)
    rows = np.arange(len(x))
    rows[[7, 50, 200]] = 7
    assert repeats([x[rows], y[rows]], 3) and not repeats([x[rows], y[rows]], 4)
    other = y[rows].copy()
    other[50] += 1  # the same features, and another label
    assert not repeats([x[rows], other], 3)


# --- each check matters ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "name", "value", "test"),
    [
        (Spending, "lock", lambda self: None, test_a_plan_keeps_others_from_paying),
        (Spending, "lock", lambda self: None, test_two_processes_do_not_overspend),
        (
            *(Spending, "_check_own", lambda self, entries: None),
            test_a_ledger_that_is_removed_between_fits_is_missed,
        ),
        (module, "_USED_UP", 0.0, test_a_used_up_budget_is_refused),
        (
            *(module, "_most_signal", lambda run: np.inf),
            lambda path: test_noise_above_all_signal_is_refused(SAMPLING, 5120),
        ),
    ],
)
def test_mutants_are_caught(target, name, value, test, path, monkeypatch):
    monkeypatch.setattr(target, name, value)
    with pytest.raises((AssertionError, LedgerError, BudgetExceeded, pytest.fail.Exception)):
        test(path)
