"""Makes the table of attained ratios, docs/tightness.md: `python -m tests.lipdp.bounds.tightness`.

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

DOCS = Path(__file__).parents[3] / "docs" / "tightness.md"

_TOGETHER = "the slope and the offset, or both operands, are not extreme at one point"
_TIES = "at exactly 0 TensorFlow's slope is 2, twice what any output attains"
_ALIKE = "the two operands are the same tensor, of which the rule does not know"
_DRAW = "an attack sees one draw, and this one dropped all channels of the example"
_SPREAD = "taps overlap: no kernel reaches all windows with all taps"
#: Why the best ratio found for a quantity of a kind is below 0.85: `{kind: {quantity: reason}}`.
GAPS: dict[str, dict[str, str]] = {
    "ConvexPotentialConv2D": {"kernel": _SPREAD, "bias": _SPREAD},
    "Activation(celu)": {"output": _TIES},
    "Activation(hard_silu)": {
        "output": "the steepest slope is at one end of a short piece",
        "input": "the steepest slope is at one end of a short piece",
    },
    "AdaptiveMaxPooling3D": {"input": "windows of these sizes overlap less than they may"},
    "SpatialDropout2D": {
        "output": _DRAW,
        "input": _DRAW,
    },
    "LayerNormalization(axis=1)": {"gamma": "a row of few entries cannot be all in one of them"},
    "Minimum": {"output": "the minimum is the smaller of what may be equal"},
    "operation softsign": {"output": _TOGETHER},
    "operation concatenate": {"input": _ALIKE},
    "operation stack": {"input": _ALIKE},
    "operation x - mean": {"output": _ALIKE, "input": _ALIKE},
    "operation min": {"output": "the root of the length is for entries that all attain it"},
    "operation maximum(x, -x)": {"output": _ALIKE, "input": _ALIKE},
    "operation minimum(x, relu)": {"output": _ALIKE, "input": _ALIKE},
    "operation clip the wrong way": {"output": _TOGETHER},
    "operation where, constant mask": {"output": _ALIKE, "input": _ALIKE},
    "operation where, three tensors": {"input": _ALIKE},
    "operation softplus": {"input": "the extreme slope lies far out"},
    "operation log_sigmoid": {"input": "the extreme slope lies far out"},
    "operation celu": {"output": _TIES},
    "operation hard_silu": {
        "output": "the steepest slope is at one end of a short piece",
        "input": "the steepest slope is at one end of a short piece",
    },
    "operation tanh_shrink": {"output": "the extreme slope lies far out"},
    "operation squareplus": {"input": "the extreme slope lies far out"},
    "operation cos": {"output": _TOGETHER},
    "operation log_softmax": {"output": _TOGETHER},
    "operation x * sigmoid(x)": {"output": _ALIKE, "input": _ALIKE},
    "operation gate": {"output": _ALIKE, "input": _ALIKE},
    "operation x - tanh(x)": {"output": _ALIKE, "input": _ALIKE},
    "LipschitzAttention": {
        "input": "what reaches queries, keys and values is not extreme together"
    },
}
#: Of kinds that begin so: compositions of layers.
COMPOSED = ("model ", "network ")
_COMPOSED = "layers are not extreme together"

HEADER = """# How tight the bounds are

For each layer the largest ratio (norm attained) / (norm claimed) that the search of
`lipdp.audit.attack_bounds` found, from the least to the most attained of the configurations in the
test catalogue (kernel sizes, strides, paddings, shapes, radii), in float32 on TensorFlow. 1 is a
bound that is attained; none is above 1 + 1e-5. `output` is the forward norm, `input` the cotangent
that is handed on, the others are gradients of weights. 0 stands for a bound of 0, and what is
exactly so. Made by `python -m tests.lipdp.bounds.tightness`.

Where configurations differ: of convolutions, 1×1 kernels and strides without overlap attain all
bounds, overlapping taps do not (no kernel uses each of them fully in all windows, and borders have
fewer); activations attain theirs in the ball that holds their extreme slope; overlapping pooling
counts the windows over an inner cell for all cells.

| layer | configurations | least to most attained | where below 0.85: why |
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
        if end not in ("frozen weights", "other examples") or ratio > 1.0 + 1e-5:
            ratios[end] = max(ratios[end], ratio)
    return dict(ratios)


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """The rows of the table.

    Raises:
        ValueError: a ratio below 0.85 without a reason.
    """
    rows, missing = [], []
    for kind, results in found.items():
        ratios = defaultdict(list)
        for result in results:
            for quantity, ratio in result.items():
                ratios[quantity].append(ratio)
        best = {quantity: max(values) for quantity, values in ratios.items()}
        reasons = defaultdict(list)
        for quantity, ratio in best.items():
            if 0 < round(ratio, 2) < 0.85:  # 0 is exact: nothing passes
                reason = GAPS.get(kind, {}).get(quantity)
                if reason is None and kind.startswith(COMPOSED):
                    reason = _COMPOSED
                if reason is None:
                    missing.append(f"{kind}: {quantity} {ratio:.3f}")
                else:
                    reasons[reason].append(quantity)
        shown = ", ".join(f"{q} {_range(r)}" for q, r in ratios.items())
        why = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())
        rows.append(f"| {kind} | {len(results)} | {shown} | {why} |")
    if missing:
        raise ValueError("GAPS gives no reason for:\n" + "\n".join(missing))
    return "\n".join(rows) + "\n"


def _range(values):
    least, most = f"{min(values):.2f}", f"{max(values):.2f}"
    return most if least == most else f"{least}–{most}"


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
        found[name.partition(": ")[0]].append(ratios)
    DOCS.write_text(HEADER + table(found), encoding="utf-8")


if __name__ == "__main__":
    # Fresh processes: a backend does not survive a fork.
    import multiprocessing

    multiprocessing.set_start_method("spawn")
    main(*sys.argv[1:2])
