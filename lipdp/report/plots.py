"""The plots of the page, as SVG whose colours are the page's."""

import io
import re
from collections.abc import Sequence

import numpy as np

# Stand-ins that become the page's own colours, light or dark.
_INK, _ACCENT, _SECOND = "#010203", "#040506", "#070809"


def _figure(rows=1, columns=1, height=3.0):
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "The page of a report draws with matplotlib: pip install 'lipdp[report]'. "
            "Text and JSON need nothing."
        ) from error
    figure = Figure(figsize=(6.4, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _svg(figure, label):
    import matplotlib

    for axes in figure.axes:
        for spine in axes.spines.values():
            spine.set_color(_INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=_INK, which="both")
        axes.set_facecolor("none")
        for text in (axes.xaxis.label, axes.yaxis.label, axes.title):
            text.set_color(_INK)
        legend = axes.get_legend()
        if legend is not None:
            legend.get_frame().set_facecolor("none")
            for text in legend.get_texts():
                text.set_color(_INK)
    figure.patch.set_alpha(0)
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for stand_in, colour in (
        (_INK, "currentColor"),
        (_ACCENT, "var(--accent)"),
        (_SECOND, "var(--second)"),
    ):
        text = text.replace(stand_in, colour)
    # One page holds several plots: what they define must not share names.
    prefix = re.sub(r"\W", "", label)
    text = re.sub(r'(id="|url\(#|href="#)', rf"\1{prefix}-", text)
    text = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg class="plot" viewBox="\1">', text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def epsilon_over_steps(points: Sequence[tuple[int, float]], budget: float | None = None) -> str:
    """Epsilon after each of some numbers of steps."""
    figure, ((axes,),) = _figure()
    axes.plot(*zip(*points, strict=True), color=_ACCENT, marker="o", markersize=3)
    if budget is not None:
        axes.axhline(budget, color=_SECOND, linestyle="--", label="budget")
        axes.legend()
    axes.set(xlabel="steps", ylabel="ε", ylim=(0, None), xlim=(0, None))
    return _svg(figure, "epsilon over steps")


def trade_off(curve) -> str:
    """The attacker's best true positive rate over its false positive rate."""
    rates = np.concatenate([[0.0], np.logspace(-5, 0, 80)])
    best = [curve.true_positive_rate(float(rate)) for rate in rates]
    figure, axes = _figure(1, 2)
    for (panel,), scale in zip(axes.T, ("linear", "log"), strict=True):
        panel.plot(rates, best, color=_ACCENT, label="best attack")
        panel.plot(rates, rates, color=_INK, linestyle=":", label="guessing")
        panel.set(xlabel="false positives", xscale=scale, yscale=scale)
        low = (0.0, 0.0) if scale == "linear" else (1e-5, 1e-5)
        panel.set(xlim=(low[0], 1), ylim=(low[1], 1.02))
    axes[0, 0].set_ylabel("true positives")
    axes[0, 0].legend(loc="lower right")
    return _svg(figure, "what an attacker can gain")


def signals(names: Sequence[str], signals: Sequence[float], noises: Sequence[float | None]) -> str:
    """For each layer the most that its mean gradient can be, and the norm of its noise."""
    figure, ((axes,),) = _figure(height=1.0 + 0.25 * len(names))
    places = range(len(names))
    axes.plot(signals, places, "o", color=_ACCENT, label="signal, at most")
    known = [(n, i) for i, n in enumerate(noises) if n]
    if known:
        axes.plot(*zip(*known, strict=True), "|", color=_SECOND, markersize=12, label="noise")
    axes.set(xscale="log", xlabel="norm in the mean gradient", ylim=(len(names) - 0.5, -0.5))
    axes.set_yticks(places, [_plain(name) for name in names], fontsize=9)
    axes.legend()
    return _svg(figure, "signal and noise of each layer")


def attained(names: Sequence[str], ratios: Sequence[Sequence[float]]) -> str:
    """Histograms of gradient norms over their bounds, one a weight."""
    bins = np.linspace(0, 1, 51)
    return _histograms(names, ratios, bins, "norm of an example's gradient / its bound Δ")


def beside_thresholds(names: Sequence[str], ratios: Sequence[Sequence[float]]) -> str:
    """Histograms of gradient norms over thresholds, one a layer that clips."""
    bins = np.logspace(-3, 3, 61)
    ratios = [np.clip(values, bins[0], bins[-1]) for values in ratios]
    label = "norm of an example's gradient / its threshold"
    return _histograms(names, ratios, bins, label, xscale="log")


def _histograms(names, ratios, bins, label, **settings):
    figure, axes = _figure(len(names), 1, height=1.3)
    for axis, name, values in zip(axes[:, 0], names, ratios, strict=True):
        axis.hist(values, bins=bins, color=_ACCENT)
        axis.axvline(1.0, color=_SECOND)
        axis.set_title(_plain(name), fontsize=9, loc="left", color=_INK)
        axis.set(xlim=(bins[0], 1.02 * bins[-1]), yticks=[], **settings)
    axes[-1, 0].set_xlabel(label)
    return _svg(figure, "attained gradient norms")


def _plain(name):
    return name.replace("$", r"\$")
