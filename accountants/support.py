"""The schemes, relations and accountants that go together: found out by asking."""

from accountants.accounting import ACCOUNTANTS, Accountant, epsilon
from accountants.mechanisms import TrainingRun
from accountants.releases import Gaussian
from accountants.sampling import RELATIONS, SCHEMES, Relation


def table() -> str:
    """The table of `docs/accounting.md`, in Markdown.

    Every cell is computed: a combination is supported if an epsilon comes out.

    >>> print(table())  # doctest: +ELLIPSIS
    | scheme | relation | pld | rdp | zcdp, exact | what is accounted | source |
    ...
    """
    lines = [
        "| scheme | relation | pld | rdp | zcdp, exact | what is accounted | source |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in SCHEMES.values():
        run = TrainingRun(2.0, kind.example(), num_examples=100, steps=10)
        for relation in RELATIONS:
            supported = {
                accountant: _is_supported(run, relation, accountant) for accountant in ACCOUNTANTS
            }
            name = kind.__name__
            if not any(supported.values()):
                lines.append(f"| `{name}` | `{relation}` | – | – | – | refused | |")
                continue
            release = run.release(relation)
            if isinstance(release, Gaussian):
                what = f"an unsampled Gaussian, {kind.rate}"
            else:
                what = f"`{type(release).__name__}`, {kind.rate}"
            unsampled = supported["zcdp"] and supported["exact"]
            columns = (supported["pld"], supported["rdp"], unsampled)
            marks = " | ".join("yes" if column else "–" for column in columns)
            lines.append(f"| `{name}` | `{relation}` | {marks} | {what} | {release.source} |")
    return "\n".join(lines)


def _is_supported(run: TrainingRun, relation: Relation, accountant: Accountant) -> bool:
    try:
        epsilon(runs=[run], delta=1e-5, relation=relation, accountant=accountant)
    except ValueError:
        return False
    return True


if __name__ == "__main__":
    print(table())
