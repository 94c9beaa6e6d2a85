"""What is no training: bounds that hold, composed with training; from files and flags, too."""

import json
import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting import dp_event

from accountants import (
    FullBatch,
    Ledger,
    LedgerError,
    PoissonSampling,
    Query,
    ShuffledEpochs,
    TrainingRun,
    calibrate_noise_multiplier,
    delta,
    epsilon,
    numerics,
    queries,
    tradeoff,
)
from accountants.cli import main
from accountants.curves import GaussianCurve, RdpCurve
from accountants.ledger import files, records
from accountants.numerics import ORDERS, event_rdp

RUN = TrainingRun(1.0, PoissonSampling(60), num_examples=6000, steps=100)
STATED = {
    "laplace": {"laplace": 2.0},
    "gaussian": {"gaussian": 5.0},
    "pure": {"epsilon": 0.5},
    "approximate": {"epsilon": 0.5, "delta": 1e-8},
    "zcdp": {"rho": 0.02},
    "event": {"event": dp_event.LaplaceDpEvent(2.0)},
}
GAUSSIAN = dp_event.GaussianDpEvent


def query(relation="add_or_remove_one", times=1, **stated):
    return Query(description="a query", relation=relation, times=times, **stated)


# --- bounds ---------------------------------------------------------------------------------------


def laplace_delta(noise, at):
    """Of one Laplace release: 1 - exp((ε - 1/b) / 2), Balle, Barthe and Gaboardi 2018."""
    return max(0.0, -math.expm1((at - 1 / noise) / 2))


@pytest.mark.parametrize("noise", [0.3, 1.0, 7.0])
def test_laplace_has_its_closed_form(noise):
    for at in (0.0, 0.4 / noise, 0.9 / noise):
        true = laplace_delta(noise, at)
        assert true <= delta(runs=[query(laplace=noise)], epsilon=at) <= true + 1e-5 + 2e-3 / noise
    for order, mine in zip(ORDERS, queries.LaplaceRelease(noise).rdp(), strict=True):
        if order in (1.1, 2.0, 32.0):
            assert mine == pytest.approx(event_rdp(dp_event.LaplaceDpEvent(noise))[ORDERS == order])


@pytest.mark.parametrize("parts", [(0.5, 0.5), (0.1, 0.9), (0.2,) * 5])
def test_a_distance_split_over_coordinates_is_no_worse(parts):
    split = [query(laplace=1 / part) for part in parts]
    for at in np.linspace(0.0, 0.95, 6):
        assert delta(runs=split, epsilon=at) <= laplace_delta(1.0, at) + 1e-6


def kairouz_delta(epsilon, delta, times, at):
    """The least delta of so many (ε, δ)-private mechanisms (Theorem 3.3), summed up as it is."""
    total = 0.0
    for i in range(times + 1):
        loss = (times - 2 * i) * epsilon
        if loss > at:
            total += math.comb(times, i) * (
                math.exp((times - i) * epsilon) - math.exp(at + i * epsilon)
            )
    total /= (1 + math.exp(epsilon)) ** times
    return 1 - (1 - delta) ** times * (1 - total)


@pytest.mark.parametrize("times", [1, 2, 7])
@pytest.mark.parametrize(("loss", "failure"), [(0.3, 0.0), (0.3, 1e-6), (0.0, 0.01), (1.0, 0.3)])
def test_pairs_compose_as_the_worst_of_them(times, loss, failure):
    found = query(epsilon=loss, delta=failure, times=times) if loss or failure else None
    for at in (0.0, 0.5 * times * loss, times * loss):
        true = kairouz_delta(loss, failure, times, at)
        assert true - 1e-12 <= delta(runs=[found], epsilon=at) <= true + 1e-3 * times
    # And never worse than basic composition.
    basic = min(1.0, times * failure)
    assert delta(runs=[found], epsilon=times * (loss + 1e-3)) <= basic + 1e-11


def test_deltas_that_add_up_beyond_one_leave_nothing():
    half = query(epsilon=0.1, delta=0.6)
    assert epsilon(runs=[half, half, RUN], delta=1e-5) == math.inf
    assert delta(runs=[half, half, half], epsilon=1.0) <= 1.0
    assert tradeoff(runs=[half, half]).true_positive_rate(0.01) <= 1.0
    assert epsilon(runs=[query(epsilon=0.1, delta=0.6, times=50)], delta=0.5) == math.inf


@pytest.mark.parametrize("rho", [1e-4, 0.02, 1.0, 30.0])
@pytest.mark.parametrize("grid", [1e-4, 1e-3, 1e-2])
def test_zcdp_dominates_the_gaussian_and_is_no_worse_than_rdp(rho, grid):
    found = numerics.renyi_pld(rho * ORDERS, grid)
    gaussian, rdp = GaussianCurve(math.sqrt(2 * rho)), RdpCurve(rho * ORDERS)
    pmf = found._pmf_remove.to_dense_pmf()
    assert pmf._infinity_mass + pmf._probs.sum() >= 1 - 1e-15
    for at in np.linspace(0.0, rho + 5 * math.sqrt(2 * rho), 12):
        held = found.get_delta_for_epsilon(float(at))
        assert gaussian.delta(at) <= held
        if grid <= math.sqrt(2 * rho) / 4:
            assert held <= rdp.delta(at) * 1.01 + 1e-10


def test_what_rdp_says_of_others_is_an_upper_bound_too():
    # Laplace, known by its divergences alone.
    found = numerics.renyi_pld(queries.LaplaceRelease(1.0).rdp(), 1e-3)
    for at in (0.0, 0.3, 0.9):
        assert found.get_delta_for_epsilon(at) >= laplace_delta(1.0, at)


def with_half_the_deltas(patch):
    patch.setattr(numerics, "_convex", lambda x, y: y * np.where(x > 1, 0.5, 1.0))


def without_the_second_change(patch):
    release = Query._release
    patch.setattr(Query, "_release", lambda self, twice: release(self, 1))


def without_infinite_losses(patch):
    pld = queries.PairRelease.pld
    patch.setattr(
        queries.PairRelease,
        "pld",
        lambda self, grid: pld(queries.PairRelease(self.epsilon, 0.0), grid),
    )


def replaced_costs_two_changes():
    gaussian = epsilon(runs=[query(gaussian=5.0)], delta=1e-6, relation="replace_one")
    assert gaussian == epsilon(runs=[query(gaussian=2.5)], delta=1e-6)
    laplace = epsilon(runs=[query(laplace=5.0)], delta=1e-6, relation="replace_one")
    assert laplace == epsilon(runs=[query(laplace=2.5)], delta=1e-6)
    rho = epsilon(runs=[query(rho=0.1)], delta=1e-6, relation="replace_one")
    assert rho == epsilon(runs=[query(rho=0.4)], delta=1e-6)
    pair = delta(runs=[query(epsilon=0.5, delta=1e-4)], epsilon=1.0, relation="replace_one")
    assert pair >= 1e-4 * (1 + math.exp(0.5)) * (1 - 1e-9)


def test_replaced_costs_two_changes():
    replaced_costs_two_changes()


@pytest.mark.parametrize(
    ("mutant", "test"),
    [
        (
            with_half_the_deltas,
            lambda: test_zcdp_dominates_the_gaussian_and_is_no_worse_than_rdp(1.0, 1e-3),
        ),
        (without_the_second_change, replaced_costs_two_changes),
        (without_infinite_losses, lambda: test_pairs_compose_as_the_worst_of_them(2, 1.01, 0.3)),
    ],
)
def test_mutants_are_caught(monkeypatch, mutant, test):
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        test()


# --- composition ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", STATED)
def test_composed_with_training(kind):
    alone, training = query(**STATED[kind]), epsilon(runs=[RUN], delta=1e-6)
    both = epsilon(runs=[RUN, alone], delta=2e-6)
    assert training < epsilon(runs=[RUN, alone], delta=1e-6)
    # No more than basic composition.
    assert both <= training + epsilon(runs=[alone], delta=1e-6)
    assert epsilon(runs=[alone, RUN], delta=2e-6) == pytest.approx(both, rel=1e-3)
    thrice = epsilon(runs=[query(**STATED[kind], times=3)], delta=1e-6)
    assert thrice == pytest.approx(epsilon(runs=[alone] * 3, delta=1e-6), rel=1e-6)
    assert epsilon(runs=[RUN, query(**STATED[kind], times=0)], delta=1e-6) == training
    if kind == "approximate":
        with pytest.raises(ValueError, match="rdp.*1e-08"):
            epsilon(runs=[RUN, alone], delta=1e-6, accountant="rdp")
    else:
        assert epsilon(runs=[RUN, alone], delta=1e-6, accountant="rdp") > training


def test_calibration_counts_queries():
    prior = [query(laplace=2.0), query(rho=0.02)]
    common = {"sampling": RUN.sampling, "num_examples": 6000, "steps": 50}
    noise = calibrate_noise_multiplier(epsilon=3.0, delta=1e-6, prior=prior, **common)
    run = TrainingRun(noise, RUN.sampling, 6000, 50)
    assert 2.99 < epsilon(runs=[*prior, run], delta=1e-6) <= 3.0


@pytest.mark.parametrize(("shift", "noise"), [(0.3, 2.0), (1.0, 1.0), (2.0, 0.5)])
def test_a_gaussian_and_a_laplace_release_together(shift, noise):
    """Their loss is a sum, so delta is the mean of Laplace's over the loss of the Gaussian."""
    full = TrainingRun(1 / shift, FullBatch(), num_examples=10, steps=1)
    losses = shift**2 / 2 + shift * np.linspace(-9.0, 9.0, 20_001)
    weights = np.exp(-(((losses - shift**2 / 2) / shift) ** 2) / 2)
    for at in (0.0, 0.5, 1.0, 2.0):
        left = at - losses
        alone = -np.expm1(np.minimum(np.where(left < -1 / noise, left, (left - 1 / noise) / 2), 0))
        true = np.average(alone, weights=weights)
        found = delta(runs=[full, query(laplace=noise)], epsilon=at)
        assert true - 1e-9 <= found <= true * 1.002 + 1e-9


def test_a_gaussian_query_is_a_full_batch():
    run = TrainingRun(5.0, FullBatch(), num_examples=100, steps=1)
    for accountant in ("pld", "exact", "zcdp", "rdp"):
        found = epsilon(runs=[query(gaussian=5.0)], delta=1e-6, accountant=accountant)
        assert found == epsilon(runs=[run], delta=1e-6, accountant=accountant)
    with pytest.raises(ValueError, match="'a query'"):
        epsilon(runs=[query(laplace=5.0)], delta=1e-6, accountant="exact")


def test_relations_that_follow():
    shuffled = TrainingRun(4.0, ShuffledEpochs(10), num_examples=100, steps=10)
    added, blanked = query(laplace=1.0), query(laplace=1.0, relation="zero_out")
    replaced = query(laplace=1.0, relation="replace_one")
    assert epsilon(runs=[shuffled, added], delta=1e-6).relation == "zero_out"
    assert epsilon(runs=[RUN, blanked], delta=1e-6).relation == "zero_out"
    assert epsilon(runs=[RUN, replaced], delta=1e-6).relation == "replace_one"
    # Nothing about adding follows from replacing.
    for relation, refused in [("add_or_remove_one", replaced), ("add_or_remove_one", blanked)]:
        with pytest.raises(ValueError, match=f"{relation}.*does not hold for 'a query'"):
            epsilon(runs=[RUN, refused], delta=1e-6, relation=relation)
    event = query(event=GAUSSIAN(2.0))
    with pytest.raises(ValueError, match="replace_one.*does not hold"):
        epsilon(runs=[event], delta=1e-6, relation="replace_one")
    grouped = epsilon(runs=[added], delta=1e-6, group_size=3)
    assert grouped == pytest.approx(3.0, abs=1e-2) and grouped > 2.99


# --- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stated",
    [
        {"laplace": 1e-300},
        {"gaussian": 1e-300},
        {"epsilon": 1e300},
        {"rho": 1e300},
        {"epsilon": 1e-9, "delta": 1 - 1e-16},
        {"event": GAUSSIAN(1e-300)},
        {"event": dp_event.SelfComposedDpEvent(dp_event.LaplaceDpEvent(1.0), 10**18)},
    ],
)
def test_hardly_any_privacy_is_none(stated):
    for runs in ([query(**stated)], [query(**stated), RUN], [query(**stated)] * 2):
        assert epsilon(runs=runs, delta=1e-6) == math.inf


@pytest.mark.parametrize("stated", [{"laplace": 1e300}, {"gaussian": 1e300}, {"epsilon": 5e-324}])
def test_much_privacy_costs_next_to_nothing(stated):
    assert epsilon(runs=[query(**stated)] * 2, delta=1e-6) < 1e-4
    assert epsilon(runs=[RUN], delta=1e-6) <= epsilon(runs=[query(**stated), RUN], delta=1e-6)


REFUSED = {
    "nothing": ({}, TypeError, "none"),
    "two": ({"laplace": 1.0, "rho": 0.1}, TypeError, "laplace and rho"),
    "delta alone": ({"laplace": 1.0, "delta": 1e-6}, TypeError, "delta"),
    "no noise": ({"laplace": 0.0}, ValueError, "laplace"),
    "negative": ({"gaussian": -1.0}, ValueError, "gaussian"),
    "no number": ({"epsilon": math.nan}, ValueError, "epsilon"),
    "infinite": ({"rho": math.inf}, ValueError, "rho"),
    "text": ({"laplace": "1"}, TypeError, "laplace"),
    "truth": ({"laplace": True}, TypeError, "laplace"),
    "nothing spent": ({"epsilon": 0.0}, ValueError, "epsilon"),
    "delta of one": ({"epsilon": 1.0, "delta": 1.0}, ValueError, "delta"),
    "negative delta": ({"epsilon": 1.0, "delta": -1e-9}, ValueError, "delta"),
    "relation": ({"laplace": 1.0, "relation": "other"}, ValueError, "relation"),
    "part of a time": ({"laplace": 1.0, "times": 0.5}, TypeError, "times"),
    "negative times": ({"laplace": 1.0, "times": -1}, ValueError, "times"),
    "no event": ({"event": "GaussianDpEvent"}, TypeError, "event"),
    "no privacy": ({"event": dp_event.NonPrivateDpEvent()}, TypeError, "NonPrivate"),
    "unknown": ({"event": dp_event.UnsupportedDpEvent()}, TypeError, "epsilon="),
    "no noise in it": ({"event": GAUSSIAN(0)}, ValueError, "noise_multiplier"),
    "no number in it": ({"event": GAUSSIAN(math.nan)}, ValueError, "noise_multiplier"),
    "part of a count": (
        {"event": dp_event.SelfComposedDpEvent(GAUSSIAN(9.0), 0.5)},
        TypeError,
        "count",
    ),
    "no chance": (
        {"event": dp_event.PoissonSampledDpEvent(1.1, GAUSSIAN(1.0))},
        ValueError,
        "0 to",
    ),
    "chances": (
        {"event": dp_event.MixtureOfGaussiansDpEvent(1.0, (0.0, 1.0), (0.5, 0.4))},
        ValueError,
        "add up to 1",
    ),
    "unaccounted": (
        {"event": dp_event.PoissonSampledDpEvent(0.1, dp_event.ZCDpEvent(0.1))},
        ValueError,
        "no account",
    ),
    "what cannot be evaluated": (
        {"event": dp_event.RepeatAndSelectDpEvent(GAUSSIAN(10.0), 0.5, 1.0)},
        ValueError,
        "Mean of number",
    ),
    "another relation": (
        {
            "event": dp_event.PoissonSampledDpEvent(0.1, GAUSSIAN(1.0)),
            "relation": "replace_one",
        },
        ValueError,
        "replace_one",
    ),
    "something inside": (
        {"event": dp_event.ComposedDpEvent([GAUSSIAN(9.0), dp_event.UnsupportedDpEvent()])},
        TypeError,
        "Unsupported",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_query_is_refused_before_a_file_is_made(tmp_path, case):
    stated, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        Ledger(tmp_path / "spent.ledger").add("a query", **stated)
    assert not list(tmp_path.iterdir())


def test_an_event_that_only_looks_like_one():
    class GaussianDpEvent(dp_accounting.DpEvent):
        noise_multiplier = 100.0

    with pytest.raises(TypeError, match="event"):
        query(event=GaussianDpEvent())


@pytest.mark.parametrize(
    "description",
    ["", "  ", "two\nlines", "two\rlines", "\x1b[2K", "a\u2028b", "tab\t", "x" * 201, 3, None],
)
def test_a_description_is_one_line(tmp_path, description):
    with pytest.raises((TypeError, ValueError), match="description"):
        Ledger(tmp_path / "spent.ledger").add(description, laplace=1.0)


@pytest.mark.parametrize(
    "event",
    [
        dp_event.ComposedDpEvent([GAUSSIAN(10), dp_event.LaplaceDpEvent(5.0)]),
        dp_event.PoissonSampledDpEvent(0.1, GAUSSIAN(1.0)),
        dp_event.SelfComposedDpEvent(dp_event.DiscreteLaplaceDpEvent(1.0, 1), 3),
        dp_event.RepeatAndSelectDpEvent(GAUSSIAN(10.0), 5.0, 1.0),
        dp_event.ZCDpEvent(0.1, 0.1),
        dp_event.NoOpDpEvent(),
    ],
)
def test_events_are_as_dp_accounting_has_them(event):
    found = query(event=event)
    again = Query.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again == found
    accountant = dp_accounting.pld.PLDAccountant(value_discretization_interval=1e-3)
    if not accountant.supports(event):
        accountant = dp_accounting.rdp.RdpAccountant(ORDERS)
    theirs = accountant.compose(event).get_epsilon(1e-6)
    mine = epsilon(runs=[again], delta=1e-6)
    assert mine == pytest.approx(theirs, rel=0.01, abs=1e-4)


# --- the ledger -----------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "spent.ledger")


def train(path, steps=5):
    with Ledger(path).open_run(
        noise_multiplier=1.0, sampling=PoissonSampling(60), num_examples=6000
    ) as run:
        run.pay(steps)


def test_a_ledger_holds_both(path):
    train(path)
    for stated in STATED.values():
        Ledger(path).add("a query", **stated)
    Ledger(path).add("five", laplace=30.0, times=5)
    train(path)
    ledger = Ledger(path)
    assert ledger.steps == 10 and len(ledger.entries) == 9
    assert all(entry.settled for entry in ledger.entries)
    kept = [query(**stated) for stated in STATED.values()]
    assert ledger.runs[1:-2] == kept and ledger.runs[-2].times == 5
    assert ledger.epsilon(1e-5) == epsilon(runs=ledger.runs, delta=1e-5)
    with pytest.raises(LedgerError, match="one writer"), Ledger(path).lock():
        Ledger(path).add("meanwhile", laplace=1.0)


def test_a_query_that_would_leave_no_relation_is_refused(path):
    Ledger(path).add("sampled", event=dp_event.PoissonSampledDpEvent(0.1, GAUSSIAN(1.0)))
    before = open(path, "rb").read()
    with pytest.raises(ValueError, match="no relation.*'sampled', 'replaced'"):
        Ledger(path).add("replaced", laplace=1.0, relation="replace_one")
    assert open(path, "rb").read() == before
    Ledger(path).add("added", laplace=1.0)
    assert Ledger(path).epsilon(1e-6) > 1.0


# As it was written before there were queries.
OLD = (
    b'{"type": "privacy ledger", "version": 1} 4c8c76707f4e48cf\n'
    b'{"type": "open", "run_id": "705596b391c7dcf1", "time": "2026-12-01T10:20:23+00:0'
    b'0", "noise_multiplier": 1.5, "sampling": {"scheme": "poisson", "batch_size": 10}'
    b', "num_examples": 100, "reserve": 64, "max_steps": null} 5f7b9f554d83ba85\n'
    b'{"type": "reserve", "steps": 64} dc00b22fd53afe16\n'
    b'{"type": "settle", "steps": 3} 13251b81e69d014a\n'
    b'{"type": "open", "run_id": "d874046282d521de", "time": "2026-12-01T10:20:23+00:0'
    b'0", "noise_multiplier": 2.0, "sampling": {"scheme": "poisson", "batch_size": 10}'
    b', "num_examples": 100, "reserve": 64, "max_steps": null} 26753ea33604581c\n'
    b'{"type": "reserve", "steps": 64} 9a1571609a632798\n'
    b'{"type": "settle", "steps": 3} 9c8bdb952f2a15f9\n'
)


def test_an_old_file_is_read_and_goes_on(path):
    with open(path, "wb") as file:
        file.write(OLD)
    assert [run.steps for run in Ledger(path).runs] == [3, 3]
    Ledger(path).add("a query", laplace=1.0)
    assert len(Ledger(path).runs) == 3 and Ledger(path).steps == 6


def test_a_crash_charges_a_query_that_may_have_been_released(path, monkeypatch):
    """Cut at any byte: what `add` has returned from is charged, whatever happens to the rest."""
    train(path)
    begin = len(open(path, "rb").read())
    Ledger(path).add("a query", laplace=1.0)
    content = open(path, "rb").read()
    settled = content.rindex(b'{"type": "settle"')
    for length in range(begin, len(content) + 1, 29):
        with open(path, "wb") as file:
            file.write(content[:length])
        charged = sum(isinstance(run, Query) for run in Ledger(path).runs)
        assert charged == 1 or length < settled
    with open(path, "wb") as file:  # the last line damaged, with its newline
        file.write(content[:settled] + b"\0" * 20 + b"\n")
    Ledger(path).repair()
    assert isinstance(Ledger(path).runs[-1], Query)


def test_a_failing_disk_charges_and_releases_nothing(path, monkeypatch):
    train(path)

    def broken(file, data):
        raise OSError("No space left on device")

    monkeypatch.setattr(files, "write", broken)
    with pytest.raises(OSError, match="space"):
        Ledger(path).add("a query", laplace=1.0)
    monkeypatch.undo()
    Ledger(path).add("a query", laplace=1.0)
    assert len(Ledger(path).runs) == 2


OPEN = {
    "type": "open",
    "run_id": "a",
    "time": "2026-12-01T00:00:00+00:00",
    "query": {"description": "a", "laplace": 1.0, "relation": "add_or_remove_one"},
    "reserve": 1,
    "max_steps": 1,
}


def opened(**changes):
    return [OPEN | {"query": OPEN["query"] | changes}]


FORGED = {
    "negative noise": opened(laplace=-1.0),
    "no number": opened(laplace=math.nan),
    "infinite noise": opened(laplace=math.inf),
    "noise as text": opened(laplace="1"),
    "two statements": opened(rho=1.0),
    "none": opened(laplace=None),
    "an unknown field": opened(free=True),
    "times in it": opened(times=-3),
    "a relation": opened(relation="none"),
    "line breaks": opened(description="a\n2026-12-01 spent: epsilon = 0"),
    "no description": opened(description=None),
    "an unknown event": opened(laplace=None, event={"name": "FreeDpEvent"}),
    "no privacy": opened(laplace=None, event={"name": "NonPrivateDpEvent"}),
    "no event": opened(laplace=None, event=[1]),
    "a field too many": opened(laplace=None, event={"name": "NoOpDpEvent", "x": 1}),
    "a field missing": opened(laplace=None, event={"name": "GaussianDpEvent"}),
    "negative noise in it": opened(
        laplace=None, event={"name": "GaussianDpEvent", "noise_multiplier": -9.0}
    ),
    "negative count": opened(
        laplace=None,
        event={"name": "SelfComposedDpEvent", "event": {"name": "NoOpDpEvent"}, "count": -1},
    ),
    "a list": [OPEN | {"query": [1]}],
    "twice": [OPEN, OPEN],
    "less than charged": [OPEN, {"type": "reserve", "steps": -1}],
    "more than it may": [OPEN, {"type": "reserve", "steps": 2}],
}


def forge(path, *lines):
    data, check = records.HEADER, records.HEADER_CHECK
    for line in lines:
        text = json.dumps(line).encode()
        check = records.checksum(check, text)
        data += text + b" " + check.encode() + b"\n"
    with open(path, "wb") as file:
        file.write(data)


@pytest.mark.parametrize("kind", FORGED)
def test_forged_queries_are_named(path, kind):
    forge(path, *FORGED[kind])
    with pytest.raises(LedgerError, match=f"{path}, line {len(FORGED[kind]) + 1}: "):
        _ = Ledger(path).entries
    with pytest.raises(LedgerError, match="line"):
        Ledger(path).add("more", laplace=1.0)


def test_what_is_forged_is_sound_otherwise(path):
    forge(path, OPEN, {"type": "reserve", "steps": 1}, {"type": "settle", "steps": 1})
    assert Ledger(path).epsilon(1e-6) == epsilon(runs=[query(laplace=1.0)], delta=1e-6)


# --- the command ----------------------------------------------------------------------------------


def run(capsys, *arguments):
    code = main(["accountants", *arguments])
    return (code, *capsys.readouterr())


def test_add_and_show(capsys, path):
    train(path)
    code, out, err = run(capsys, "ledger", "add", path, "--laplace=2", "--description=column means")
    assert code == 0 and not err and "'column means': Laplace noise of 2" in out
    event = '{"name": "GaussianDpEvent", "noise_multiplier": 9}'
    assert run(capsys, "ledger", "add", path, "--description=b", f"--event={event}")[0] == 0
    pair = ["--epsilon=0.1", "--delta=1e-9", "--times=2", "--relation=zero_out"]
    code, out, _ = run(capsys, "ledger", "add", path, "--description=c", *pair, "--json")
    added = json.loads(out)
    assert added["query"]["delta"] == 1e-9 and "worst" in added["accounted"]
    code, out, _ = run(capsys, "ledger", path, "--epsilon=3")
    assert code == 0 and out.count("epsilon so far") == 4 and "more steps like" in out
    found = json.loads(run(capsys, "ledger", path, "--json")[1])
    assert found["epsilon"] == Ledger(path).epsilon(1e-5) and found["steps"] == 5
    assert found["runs"][1]["query"]["description"] == "column means"
    assert "1 runs, 5 steps, 3 queries" in run(capsys, "ledger", "verify", path)[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--laplace=1"], "--description"),
        (["--description=a"], "none"),
        (["--description=a", "--laplace=-1"], "laplace"),
        (["--description=a", "--laplace=nan"], "laplace"),
        (["--description=a\nb", "--laplace=1"], "description"),
        (["--description=a", "--event={"], "ledger add"),
        (["--description=a", '--event={"name": "x"}'], "name"),
        (["--description=a", "--event=3"], "event"),
        (["--description=a", "--rho=1", "--times=0"], "times"),
        (["more", "--description=a", "--rho=1"], "PATH"),
    ],
)
def test_bad_flags_of_add(capsys, path, flags, message):
    code, out, err = run(capsys, "ledger", "add", path, *flags)
    assert code == 2 and not out and message in err and "Traceback" not in err
    with pytest.raises(FileNotFoundError):
        open(path)
