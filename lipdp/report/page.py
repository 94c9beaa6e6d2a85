"""The report as one HTML page that loads nothing: for a browser, a phone, or print."""

import json
import math
from html import escape

import accountants
from lipdp.report import plots
from lipdp.report.drawing import drawing
from lipdp.report.numbers import Figures, short


def page(report: Figures) -> str:
    """The page's text.

    Raises:
        ImportError: matplotlib is missing.
    """
    parts = [_section("", _cards(report))]
    if report.clipped:
        parts.append(
            _section(
                "Signal and noise of each layer",
                "<p>An example adds at most its threshold to the sum of a layer's gradients. The "
                "signal is what a batch attains where all its examples pull a layer the same way; "
                "a layer whose noise is longer learns slowly.</p>"
                + plots.signals(
                    [row.name for row in report.clipped],
                    [row.sensitivity for row in report.clipped],
                    [row.noise_std and row.noise_std * row.size**0.5 for row in report.clipped],
                ),
            )
        )
        parts.append(_section("Layers that clip", _clipped(report)))
    else:
        parts.append(
            _section(
                "Where each sensitivity comes from",
                "<p>X bounds what a layer reads, G the loss gradient that comes back to it; boxes "
                "in colour have weights. An example's gradient of a weight is at most a known "
                f'multiple of X·G.</p><div class="scroll">{drawing(report.layers)}</div>',
            )
        )
        parts.append(_section("Weights", _weights(report)))
    if report.runs and report.delta is not None and math.isfinite(report.epsilon):
        parts.append(
            _section("What is planned" if report.planned else "What was spent", _spent(report))
        )
        curve = accountants.tradeoff(runs=report.runs)
        parts.append(
            _section(
                "What an attacker can gain",
                "<p>The best that anybody can do who knows everything but whether one example took "
                f"part: advantage {curve.advantage:.3f}, and "
                f"{curve.true_positive_rate(0.01):.1%} of members found at 1 % false "
                f"alarms.</p>{plots.trade_off(curve)}",
            )
        )
        if report.uses:
            parts.append(_section("Statement of differential privacy", _statement(report)))
        parts.append(_what_if(report))
    if report.attained is not None:
        parts.append(_attained(report))
    return _FRAME.format(
        title=f"Sensitivity report: {escape(report.network)}", style=_STYLE, body="".join(parts)
    )


def _section(title, body, kind=""):
    heading = f"<h2>{title}</h2>" if title else ""
    return f'<section class="{kind}">{heading}{body}</section>'


def _cards(report):
    cards = []
    if report.epsilon is not None:
        note = ", ".join(filter(None, [f"δ = {report.delta:g}", report.relation]))
        name = "ε planned" if report.planned else "ε spent"
        cards.append((name, short(report.epsilon), note.replace("_", " ")))
    cards += [
        ("sensitivity Δ", short(report.sensitivity), "of one example, all together"),
        ("noise multiplier", short(report.noise_multiplier), "std over sensitivity"),
        ("expected batch", short(report.expected_batch_size), "the divisor of every sum"),
        ("norm of the noise", short(report.total_noise), "expected, of the mean gradient"),
    ]
    if not report.clipped:
        cards += [
            ("Lipschitz constant", f"≤ {short(report.lipschitz)}", "of the whole network"),
            ("loss gradient", f"≤ {short(report.loss_gradient_bound)}", "of one example, clipped"),
        ]
    return (
        '<div class="cards">'
        + "".join(
            f'<div class="card"><span>{name}</span><b>{value}</b><small>{note}</small></div>'
            for name, value, note in cards
        )
        + "</div>"
    )


def _weights(report):
    head = ("weight", "shape", "X", "G", "Δ")
    rows = [
        (
            f"{escape(row.weight)}<small>{escape(row.layer)}</small>",
            "×".join(map(str, row.shape)) or "scalar",
            short(row.input_bound),
            short(row.cotangent_bound),
            short(row.sensitivity),
        )
        for row in report.weights
    ]
    return _table(report, head, rows, "a weight as far as its bound")


def _clipped(report):
    head = ("layer", "norm", "weights", "threshold")
    rows = [
        (
            f"{escape(row.layer)}<small>{escape(row.kind)}</small>",
            f"{'exact' if row.exact else 'upper bound'}<small>{escape(row.measured)}</small>",
            f"{row.size:,}",
            short(row.threshold),
        )
        for row in report.clipped
    ]
    return _table(report, head, rows, "a layer as far as its threshold")


def _table(report, head, rows, most):
    """A table of the report's rows: the first cells of each, and those of its noise."""
    lines = []
    for row, cells in zip(report.rows, rows, strict=True):
        share = row.noise_share or 0.0
        bar = (
            f'<span class="bar"><i style="width:{share:.1%}"></i></span> {share:.1%}'
            if row.noise_share is not None
            else "–"
        )
        ratio = "–" if row.signal_to_noise is None else f"≤ {short(row.signal_to_noise)}"
        cells = (*cells, short(row.noise_std), bar, ratio)
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = (*head, "noise std", "share of the noise", "signal / noise")
    return (
        f"<p>Noise is shared as {escape(repr(report.allocation))}. Signal over noise is at most "
        f"what is shown: where all examples of a batch pull {most}, the same way.</p>"
        '<div class="scroll"><table><thead><tr>'
        + "".join(f"<th>{name}</th>" for name in head)
        + f"</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _spent(report):
    """Epsilon after each part of the runs; queries take no steps."""
    points, done = [(0, 0.0)], []
    for run in report.runs:
        before = sum(r.steps for r in done)
        for count in sorted({math.ceil(run.count * part / 12) for part in range(1, 13)}):
            part = run.counted(count)
            epsilon = accountants.epsilon(runs=[*done, part], delta=report.delta)
            points.append((before + part.steps, float(epsilon)))
        done.append(run)
    lines = "".join(f"<li>{escape(run.words)}</li>" for run in report.runs)
    return f"<ul>{lines}</ul>{plots.epsilon_over_steps(points)}"


def _statement(report):
    """What can be filed, as `accountants.Statement` has it."""
    statement = accountants.Statement.of(
        report.uses,
        report.delta,
        subject=f"the network {report.network!r}",
        software=report.uses[-1].about.get("software"),
        spent=report.epsilon,
    )
    parts = []
    for title, said in statement.paragraphs():
        parts.append(f"<h3>{escape(title)}</h3>")
        if isinstance(said, str):
            parts.append(f"<p>{escape(said)}</p>")
        else:
            parts.append(f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in said)}</ul>")
    return "".join(parts)


def _what_if(report):
    """Sliders over a table of epsilons around the last run, where a batch size describes it."""
    *_, run = (None, *(run for run in report.runs if run.steps))
    if run is None:
        return ""
    size = run.sampling.expected_batch_size(run.num_examples)
    size = int(size) if size.is_integer() else size
    if run.noise_multiplier == 0 or run.sampling.with_batch_size(size) is None:
        return ""
    sizes = {round(size * f) for f in (0.25, 0.5, 2.0, 4.0)} | {size}
    sizes = sorted(s for s in sizes if s >= 1 and _can_draw(run, s))
    epochs = [run.steps * size / run.num_examples * f for f in (0.5, 1.0, 2.0)]
    noises = [run.noise_multiplier * f for f in (0.5, 0.7, 1.0, 1.4, 2.0)]
    table = []
    for batch in sizes:
        sampling = run.sampling.with_batch_size(batch)
        for passes in epochs:
            steps = max(1, round(passes * run.num_examples / batch))
            for noise in noises:
                other = accountants.TrainingRun(noise, sampling, run.num_examples, steps, run.unit)
                epsilon = accountants.epsilon(runs=[other], delta=report.delta)
                table.append(round(float(epsilon), 4) if math.isfinite(epsilon) else None)
    data = {"sizes": sizes, "epochs": epochs, "noises": noises, "epsilons": table}
    # Noise of the mean gradient, for a noise multiplier and a batch size of one.
    data["noise"] = (report.total_noise or 0.0) * size / run.noise_multiplier
    sliders = "".join(
        f'<label>{label} <output id="{key}-value"></output><input type="range" id="{key}" min="0" '
        f'max="{len(values) - 1}" value="{now}"></label>'
        for label, key, values, now in (
            ("batch size", "sizes", sizes, sizes.index(size)),
            ("epochs", "epochs", epochs, 1),
            ("noise multiplier", "noises", noises, 2),
        )
    )
    return _section(
        "What if",
        "<p>One run in place of the last one, alone; δ as above. Settings chosen after a look at "
        "results cost privacy that no slider shows.</p>"
        f'<div class="sliders">{sliders}</div><p class="answer">ε = <b id="answer"></b>, expected '
        'norm of the noise <b id="noise"></b></p>'
        f"<script>const D={json.dumps(data)};{_SCRIPT}</script>",
        "screen",
    )


def _can_draw(run, size):
    try:
        run.sampling.with_batch_size(size).validate(run.num_examples)
    except ValueError:
        return False
    return True


def _attained(report):
    names = [found.name for found in report.attained]
    if report.clipped:
        most = [row.threshold for row in report.clipped]
        names = [
            f"{name}: {found.within:.0%} within the threshold"
            for name, found in zip(names, report.attained, strict=True)
        ]
        said = (
            "Norms are those before the clip. Where few gradients are within the threshold, most "
            "are cut to one length; where all are, noise is wasted."
        )
    else:
        most = [row.sensitivity for row in report.weights]
        said = (
            "Where gradients stay far below their bound, noise is wasted: a tighter layer, inputs "
            "of constant norm or a smaller clip would save it."
        )
    ratios = [
        [n / bound for n in found.norms] for bound, found in zip(most, report.attained, strict=True)
    ]
    return _section(
        "Not private: gradients of a sample",
        f"<p>From {len(report.attained[0].norms)} private examples, which no guarantee covers: do "
        f"not publish this page. {said}</p>"
        + (plots.beside_thresholds if report.clipped else plots.attained)(names, ratios),
        "private",
    )


_SCRIPT = """
const get=k=>document.getElementById(k),keys=["sizes","epochs","noises"];
function show(){const [i,j,k]=keys.map(n=>+get(n).value);
keys.forEach((n,m)=>get(n+"-value").textContent=(+[D.sizes[i],D.epochs[j],D.noises[k]][m]
.toPrecision(4)));
const e=D.epsilons[(i*D.epochs.length+j)*D.noises.length+k];
get("answer").textContent=e===null?"∞":e.toPrecision(4);
get("noise").textContent=(D.noise*D.noises[k]/D.sizes[i]).toPrecision(4);}
keys.forEach(n=>get(n).addEventListener("input",show));show();
"""

_STYLE = """
:root{--ink:#1c2430;--soft:#5c6878;--line:#d9dfe7;--paper:#fff;--card:#f5f7fa;--accent:#2563c9;
--second:#c2410c;--weighted:#e3edfb;color-scheme:light dark}
@media(prefers-color-scheme:dark){:root{--ink:#e6ebf2;--soft:#9aa7b8;--line:#364152;
--paper:#12171e;--card:#1b222c;--accent:#7fb0ff;--second:#ff9d66;--weighted:#1d3150}}
@media print{:root{--ink:#000;--soft:#444;--line:#bbb;--paper:#fff;--card:#fff;--accent:#2563c9;
--second:#c2410c;--weighted:#e3edfb}.screen{display:none}section{break-inside:avoid}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:60rem;padding:1rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.5rem;margin:.5rem 0 1rem;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2rem 0 .5rem}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.6rem}
.card{background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:.6rem .8rem}
.card span,.card small,td small{display:block;color:var(--soft);font-size:.8rem}
.card b{font-size:1.35rem;font-weight:600}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .5rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left;white-space:normal;overflow-wrap:anywhere;
min-width:9rem}
.bar{display:inline-block;width:4rem;height:.6rem;background:var(--line);border-radius:.3rem;
overflow:hidden}
.bar i{display:block;height:100%;background:var(--accent)}
svg{display:block;width:100%;height:auto;margin:.5rem auto}
svg.plot{max-width:42rem}
.network text{fill:var(--ink);font:13px system-ui,sans-serif}
.network .name{font-weight:600}
.network .bound{fill:var(--soft);font-size:12px}
.network rect{fill:var(--card);stroke:var(--line)}
.network .weighted rect{fill:var(--weighted);stroke:var(--accent)}
.network .edge{fill:none;stroke:var(--soft)}
.sliders{display:grid;grid-template-columns:repeat(auto-fit,minmax(14rem,1fr));gap:1rem}
.sliders input{width:100%;accent-color:var(--accent)}
.answer{font-size:1.1rem}
.private{border:2px solid var(--second);border-radius:.6rem;padding:0 1rem 1rem;margin-top:2rem}
footer{margin-top:2rem;color:var(--soft);font-size:.85rem}
"""

_FRAME = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body><h1>{title}</h1>{body}
<footer>Bounds are upper bounds for any example. What is guaranteed is the privacy of the weights;
metrics on training data, validation data and the choice of settings are not covered.</footer>
</body></html>
"""
