"""Makes the table of attained ratios: `python -m tests.lipdp.tightness` writes docs/tightness.md.

Every case of the catalogue is attacked, which takes some minutes; with a path as its argument the
results are kept there as JSON, and read from there the next time. A ratio above 1 stops it, and
one below 0.85 needs its reason in `GAPS`.
"""

import json
import os
import sys
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs" / "tightness.md"

#: Why the best ratio found for a quantity of a kind is below 0.85: `{kind: {quantity: reason}}`.
GAPS: dict[str, dict[str, str]] = {}

HEADER = """# How tight the bounds are

For each layer the largest ratio (norm attained) / (norm claimed) that the search of
`lipdp.audit.attack_bounds` found, over all configurations of the test catalogue (kernel sizes,
strides, paddings, shapes, radii), in float32 on TensorFlow. 1 is a bound that is attained; none is
above 1 + 1e-5. `output` is the forward norm, `input` the cotangent that is handed on, the others
are gradients of weights. Made by `python -m tests.lipdp.tightness`.

| layer | configurations | attained | where below 0.85: why |
|---|---|---|---|
"""


def attained(name: str) -> dict[str, float]:
    """The ratios of one case, by the last part of a quantity's name."""
    from tests.lipdp.cases import CASES

    (case,) = [c for c in CASES if c.name == name]
    result = case.attack()
    ratios = defaultdict(float)
    for quantity, ratio in result.attained.items():
        end = "input" if quantity.startswith("input") else quantity.rpartition("/")[2]
        if end != "other examples" or ratio:
            ratios[end] = max(ratios[end], ratio)
    return dict(ratios)


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """The rows of the table.

    Raises:
        ValueError: a ratio below 0.85 without a reason.
    """
    rows, missing = [], []
    for kind, results in found.items():
        best = defaultdict(float)
        for result in results:
            for quantity, ratio in result.items():
                best[quantity] = max(best[quantity], ratio)
        reasons = []
        for quantity, ratio in best.items():
            if round(ratio, 2) < 0.85:
                reason = GAPS.get(kind, {}).get(quantity)
                if reason is None:
                    missing.append(f"{kind}: {quantity} {ratio:.3f}")
                else:
                    reasons.append(f"{quantity}: {reason}")
        ratios = ", ".join(f"{q} {r:.2f}" for q, r in best.items())
        rows.append(f"| {kind} | {len(results)} | {ratios} | {'; '.join(reasons)} |")
    if missing:
        raise ValueError("GAPS gives no reason for:\n" + "\n".join(missing))
    return "\n".join(rows) + "\n"


def attack() -> dict[str, dict[str, float]]:
    """The ratios of all cases, by name."""
    from rich.progress import track

    from tests.lipdp.cases import CASES

    names = [case.name for case in CASES]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(attained, names, chunksize=8)
        return dict(zip(names, track(results, "attacking", len(names)), strict=True))


def main(path: str | None = None) -> None:
    if path and os.path.exists(path):
        results = json.loads(Path(path).read_text())
    else:
        results = attack()
        if path:
            Path(path).write_text(json.dumps(results))
    broken = {n: r for n, r in results.items() if max(r.values(), default=0.0) > 1 + 1e-5}
    if broken:
        raise AssertionError(f"broken bounds: {broken}")
    found = defaultdict(list)
    for name, ratios in results.items():
        found[name.partition(":")[0]].append(ratios)
    DOCS.write_text(HEADER + table(found), encoding="utf-8")


if __name__ == "__main__":
    # Fresh processes: a backend does not survive a fork.
    import multiprocessing

    multiprocessing.set_start_method("spawn")
    main(*sys.argv[1:2])
