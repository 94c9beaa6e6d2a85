"""What is done with a ledger on the command line: shown, verified, repaired, added to."""

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any

from accountants.accounting import Budget, epsilon, unit_of
from accountants.calibration import calibrate_steps
from accountants.flags import Flags, UsageError, command, write
from accountants.ledger import Ledger, LedgerEntry, LedgerError
from accountants.mechanisms import UNITS, Mechanism, TrainingRun
from accountants.queries import Query, event_from_dict
from accountants.sampling import RELATIONS


def _ledger_flags() -> Flags:
    values = Flags()
    values.number("epsilon", "Epsilon of a budget, to see what is left of it.")
    values.accounting()
    values["delta"].value = values["delta"].default = 1e-5
    return values


def _ledger(values: Flags, arguments: list[str]) -> None:
    actions = {"verify": _verify, "repair": _repair}
    if len(arguments) == 2 and arguments[0] in actions:
        values.refuse("epsilon", reason=f"with ledger {arguments[0]}")
        return actions[arguments[0]](values, Ledger(arguments[1]))
    if len(arguments) != 1 or (arguments[0] in actions and not os.path.exists(arguments[0])):
        raise UsageError(f"one PATH is needed, got {' '.join(arguments) or 'none'}.")
    return _show(values, Ledger(arguments[0]))


def _verify(values: Flags, ledger: Ledger) -> None:
    if not os.path.exists(ledger.path):
        raise LedgerError(f"{ledger.path} does not exist.")
    entries, torn = ledger.entries, ledger.torn_steps
    record = {
        "path": ledger.path,
        "runs": sum(isinstance(entry.run, TrainingRun) for entry in entries),
        "queries": sum(isinstance(entry.run, Query) for entry in entries),
        "steps": sum(entry.run.steps for entry in entries),
        "not_settled": sum(not entry.settled for entry in entries),
        "torn_steps": torn,
    }
    others = ", {queries} queries.".format(**record) if record["queries"] else "."
    lines = ["{path}: every line is sound; {runs} runs, {steps} steps".format(**record) + others]
    if record["not_settled"]:
        lines.append(
            "{not_settled} of them did not end, or are going on: what they reserved is "
            "charged.".format(**record)
        )
    if torn is not None:
        lines.append(
            f"The last line was cut while it was written. It is charged with {torn} steps, the "
            "most that it can have said; the next run, or `lipdp ledger repair`, records that."
        )
    write(values, record, "\n".join(lines))


def _repair(values: Flags, ledger: Ledger) -> None:
    repaired = ledger.repair()
    record = {"path": ledger.path, "repaired": repaired and dataclasses.asdict(repaired)}
    if repaired is None:
        write(values, record, f"{ledger.path}: nothing to repair, every line is sound.")
        return
    text = (
        f"{ledger.path}, line {repaired.line}: could not be read. It is charged with "
        f"{repaired.steps} steps, the most that it can have said.\n"
        f"The file as it was is in {repaired.backup}."
    )
    write(values, record, text)


def _show(values: Flags, ledger: Ledger) -> None:
    delta = values.needed("delta")
    budget = None if values.epsilon is None else Budget(values.epsilon, delta)
    how = {"accountant": values.accountant, "relation": values.relation}
    entries = ledger.entries
    charged = [entry.run for entry in entries if entry.run.count]
    # As `Ledger.epsilon` has it; the relation of all that is charged, also on the way.
    relation = epsilon(runs=charged, delta=delta, **how).relation
    rows: list[tuple[LedgerEntry, float]] = []
    so_far: list[Mechanism] = []
    for entry in entries:
        so_far += [entry.run] if entry.run.count else []
        found = epsilon(runs=so_far, delta=delta, accountant=values.accountant, relation=relation)
        rows.append((entry, float(found)))
    spent = rows[-1][1] if rows else 0.0
    record: dict[str, Any] = {
        "path": ledger.path,
        "steps": sum(entry.run.steps for entry in entries),
        "delta": delta,
        "epsilon": spent,
        "relation": relation,
        "unit": unit_of(charged),
        "runs": [
            {
                "run_id": entry.run_id,
                "time": entry.time,
                "settled": entry.settled,
                **entry.run.to_dict(),
                "about": entry.about,
                "epsilon_so_far": cost,
            }
            for entry, cost in rows
        ],
    }
    missing = "" if os.path.exists(ledger.path) else f": {ledger.path} does not exist"
    lines = [_line(*row) for row in rows] or [f"no runs{missing}"]
    under = f", under {relation}, for one {unit_of(charged)}" if charged else ""
    lines.append(f"spent: epsilon = {spent:.6g} at delta = {delta:g}{under}")
    if budget is not None:
        left = max(0.0, budget.epsilon - spent)
        record["budget"] = {"epsilon": budget.epsilon, "left": left}
        lines.append(f"left of epsilon = {budget.epsilon:g}: {left:.6g}")
        if training := [entry.run for entry in entries if isinstance(entry.run, TrainingRun)]:
            more = _more_steps(charged, training[-1], budget, how)
            record["budget"]["more_steps_like_the_last_run"] = more
            lines.append(f"more steps like those of the last run: {more}")
    write(values, record, "\n".join(lines))


def _line(entry: LedgerEntry, so_far: float) -> str:
    state = "" if entry.settled else "  (not settled: what it reserved is charged)"
    return f"{entry.time}  {entry.run_id}  {entry.run.words}  epsilon so far {so_far:.6g}{state}"


def _more_steps(
    charged: list[Mechanism], last: TrainingRun, budget: Budget, how: dict[str, Any]
) -> int:
    idle = dataclasses.replace(last, steps=0)  # whose relation counts, too
    if epsilon(runs=[*charged, idle], delta=budget.delta, **how) > budget.epsilon:
        return 0
    return calibrate_steps(
        epsilon=budget.epsilon,
        delta=budget.delta,
        noise_multiplier=last.noise_multiplier,
        sampling=last.sampling,
        num_examples=last.num_examples,
        prior=charged,
        **how,
    )


# --- add ------------------------------------------------------------------------------------------

# The numbers that state a query, as `Query` has them.
_STATED = {
    "laplace": "Scale of Laplace noise over the l1 sensitivity.",
    "gaussian": "Standard deviation of Gaussian noise over the l2 sensitivity.",
    "epsilon": "It is (epsilon, delta)-differentially private.",
    "delta": "The delta of --epsilon, by default 0.",
    "rho": "It is rho-zero-concentrated differentially private.",
}


def _add_flags() -> Flags:
    values = Flags()
    values.text("description", "What it is, in one line.")
    for name, help in _STATED.items():
        values.number(name, help)
    values.text("event", "A DpEvent of dp_accounting, as JSON: its name, and its fields.")
    values.one_of("relation", RELATIONS, "What this is true for.", "add_or_remove_one")
    values.one_of("unit", UNITS, "Whom it protects.", "example")
    values.integer("times", "How often it takes place.", 1)
    return values


def _add(values: Flags, arguments: list[str]) -> None:
    if len(arguments) != 1:
        raise UsageError(f"one PATH is needed, got {' '.join(arguments) or 'none'}.")
    stated = {name: values[name].value for name in _STATED}
    if values.event is not None:
        stated["event"] = event_from_dict(json.loads(values.event))
    stated |= {"relation": values.relation, "times": values.times, "unit": values.unit}
    description = values.needed("description")
    query = Query(description=description, **stated)
    ledger = Ledger(arguments[0])
    ledger.add(description, **stated)
    record = {"path": ledger.path, **query.to_dict(), "accounted": query.accounted}
    write(values, record, f"{ledger.path}: added {query.words}; accounted {query.accounted}.")


_show_command = command(
    "ledger",
    "ledger PATH [--epsilon=... --delta=...]\nledger add PATH --description=... --laplace=...\n"
    "ledger verify PATH\nledger repair PATH\n\n"
    "What ran when, epsilon over time, and what is left of a budget. `add` charges a use of the "
    "data\nthat is no training; see ledger add --help. `verify` reads every line and says what is "
    "wrong,\nwith exit code 1; `repair` counts a last line that cannot be read as the most that it "
    "can have\nsaid, and keeps a copy of the file.",
    _ledger_flags,
    _ledger,
)
_add_command = command(
    "ledger add",
    "ledger add PATH --description=... and one of --laplace, --gaussian, --epsilon, --rho, --event"
    "\n\nCharges a use of the data that is no training, such as a statistic with noise: before it "
    "is\nreleased.",
    _add_flags,
    _add,
)


def ledger(argv: Sequence[str]) -> int:
    """The command `ledger`; adding has flags of its own."""
    adds = len(argv) > 2 and argv[1] == "add"
    return _add_command(argv[1:]) if adds else _show_command(argv)
