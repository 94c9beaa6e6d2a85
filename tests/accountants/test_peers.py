"""Mistakes found in other libraries, as far as they are about accounting: one test each.

Further ones are tested where they belong: relations that mean different things to different
accountants in test_accounting.py, fixed batches in sampling/test_fixed_size.py, noise multipliers
that overshoot in test_calibration.py, and checks by assertions, with all that is about training, in
tests/lipdp/test_peers.py.
"""

import math
import pathlib

import pytest

import accountants
from accountants import (
    FixedSize,
    FullBatch,
    Ledger,
    LedgerError,
    PoissonSampling,
    RandomAllocation,
    ShuffledEpochs,
    TrainingRun,
    TruncatedPoisson,
    calibrate_noise_multiplier,
    epsilon,
    published_epsilon_not_a_guarantee,
    support,
)
from accountants.published import NotAGuaranteeWarning

N = 60_000
SHUFFLED = TrainingRun(1.0, ShuffledEpochs(600), N, 1000)


def test_shuffled_batches_are_not_accounted_as_poisson(capsys):
    poisson = TrainingRun(1.0, PoissonSampling(600), N, 1000)
    assert epsilon(runs=[SHUFFLED], delta=1e-5) > 5 * epsilon(runs=[poisson], delta=1e-5)
    assert not capsys.readouterr().err
    # As others have it, only under a name that says what it is, and it says so again.
    with pytest.warns(NotAGuaranteeWarning, match="NOT a privacy guarantee"):
        claimed = published_epsilon_not_a_guarantee([SHUFFLED], delta=1e-5, accountant="pld")
    assert "NOT a privacy guarantee" in capsys.readouterr().err
    assert claimed == epsilon(runs=[poisson], delta=1e-5)
    # A figure that cannot be taken for what `epsilon` returns.
    assert type(claimed) is float and not isinstance(claimed, accountants.Epsilon)


def test_published_figures_are_what_others_computed():
    # Noise 2 and batches of 1000 for 64 epochs: 2.483, which charges one epoch more.
    run = TrainingRun(2.0, ShuffledEpochs(1000), N, 60 * 65)
    with pytest.warns(NotAGuaranteeWarning):
        claimed = published_epsilon_not_a_guarantee([run], delta=1e-5)
    assert claimed == pytest.approx(2.483, abs=0.02)


@pytest.mark.parametrize(
    "sampling",
    [PoissonSampling(60), TruncatedPoisson(60, 80), FixedSize(60), ShuffledEpochs(60)],
)
def test_the_divisor_is_no_realised_size(sampling):
    # 1000 = 16 batches of 60 and one of 40; a Poisson batch has any size.
    assert sampling.expected_batch_size(1000) == 60.0
    assert sampling.expected_batch_size(999) == 60.0


def test_a_partial_epoch_is_not_rounded_down():
    """Budgets by floor(N / B) · epochs: the step that does not fit a whole epoch was free."""
    for sampling in (ShuffledEpochs(600), RandomAllocation(100)):
        assert sampling.participations(N, 1) == 1
        assert sampling.participations(N, 101) == 2
    assert PoissonSampling(700).steps_per_epoch(N) == 86 == ShuffledEpochs(700).steps_per_epoch(N)


def test_accumulated_draws_are_not_one_draw_of_their_union():
    """k draws at rate q, one noise each of their sum, are not one draw at rate kq."""
    # Each draw with its own noise is k steps; one draw that is split is one step.
    split = TrainingRun(2.0, PoissonSampling(1200), N, 100)
    drawn = TrainingRun(2.0, PoissonSampling(300), N, 400)
    assert epsilon(runs=[split], delta=1e-5) > epsilon(runs=[drawn], delta=1e-5)
    # The same example in several of k draws would move their noised sum k times as far.
    accumulated = epsilon(
        noise_multiplier=2.0 / 4, sampling=FullBatch(), num_examples=N, steps=1, delta=1e-5
    )
    assert accumulated > epsilon(runs=[TrainingRun(2.0, FullBatch(), N, 1)], delta=1e-5)


def test_a_second_run_does_not_forget_the_first(tmp_path):
    path = str(tmp_path / "spent.ledger")
    run = {"noise_multiplier": 1.5, "sampling": PoissonSampling(10), "num_examples": 1000}
    spent = []
    for _ in range(3):
        with Ledger(path).open_run(**run) as paying:
            paying.pay(50)
        spent.append(Ledger(path).epsilon(1e-5))
    assert spent[0] < spent[1] < spent[2]
    once = epsilon(runs=[TrainingRun(**run, steps=150)], delta=1e-5)
    assert spent[2] == pytest.approx(once, rel=1e-3)


def test_the_step_that_overspends_is_not_paid_for(tmp_path):
    path = str(tmp_path / "spent.ledger")
    run = {"noise_multiplier": 1.5, "sampling": PoissonSampling(10), "num_examples": 1000}
    with Ledger(path).open_run(**run, max_steps=3) as paying:
        paying.pay(3)
        with pytest.raises(LedgerError, match="3 steps"):
            paying.pay()
    assert Ledger(path).steps == 3


def test_epsilon_is_never_negative_and_fine_before_the_first_step():
    for accountant in ("pld", "rdp"):
        for sampling in (PoissonSampling(6), TruncatedPoisson(6, 9), FixedSize(6), FullBatch()):
            run = {"sampling": sampling, "num_examples": N, "accountant": accountant}
            assert epsilon(**run, noise_multiplier=1.0, steps=0, delta=1e-5) == 0.0
            for noise_multiplier in (1e3, 1e8):
                spent = epsilon(**run, noise_multiplier=noise_multiplier, steps=1, delta=0.1)
                assert 0.0 <= spent < 0.1


def test_steps_are_steps_and_not_rows():
    # 100 steps are an epoch here; a count of rows would be 600 times as many.
    run = {"noise_multiplier": 1.0, "sampling": PoissonSampling(600), "num_examples": N}
    assert epsilon(**run, steps=100, delta=1e-5) < 1.0 < epsilon(**run, steps=60_000, delta=1e-5)
    assert TrainingRun(**run, steps=100).participations == 100


def test_unknown_keyword_arguments_are_not_swallowed():
    run = {"sampling": PoissonSampling(600), "num_examples": N, "steps": 10, "delta": 1e-5}
    with pytest.raises(TypeError, match="momentum"):
        epsilon(noise_multiplier=1.0, momentum=0.9, **run)
    with pytest.raises(TypeError, match="tolerance"):
        calibrate_noise_multiplier(epsilon=1.0, tolerance=0.1, **run)
    with pytest.raises(TypeError):
        PoissonSampling(600, True)


def test_no_noise_is_no_privacy_for_any_scheme():
    schemes = [TruncatedPoisson(6, 9), FixedSize(6), RandomAllocation(10), ShuffledEpochs(6)]
    for sampling in schemes:
        run = TrainingRun(0.0, sampling, N, 1)
        assert epsilon(runs=[run], delta=1e-5) == math.inf


def test_the_table_of_the_docs_is_what_the_code_does():
    text = pathlib.Path(__file__).parents[2].joinpath("docs/accounting.md").read_text()
    _, rest = text.split("<!-- table -->\n")
    assert rest.split("\n<!-- end of table -->")[0] == support.table()
    rows = [line.split("|")[1:-1] for line in support.table().splitlines()[2:]]
    # What is refused has no source, and everything else has one.
    assert all(bool(row[6].strip()) != ("refused" in row[5]) for row in rows) and len(rows) == 24
