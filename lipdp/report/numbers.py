"""The figures of a sensitivity report, and their text."""

import dataclasses
import math

import numpy as np

from accountants import Use
from accountants.mechanisms import Mechanism
from lipdp.rich_text import RichText

__all__ = ["Attained", "ClippedLayer", "Figures", "LayerRow", "WeightRow", "short"]


@dataclasses.dataclass(frozen=True)
class WeightRow:
    """One weight.

    Attributes:
        weight: its path.
        layer: class of the layer that uses it.
        shape: of the weight.
        input_bound: bound of the norm of what the layer reads (the largest, if it is shared).
        cotangent_bound: bound of the loss gradient at the layer's output.
        sensitivity: Δ, the most that one example can add to the gradient sum, in norm.
        noise_std: std of the noise of each entry of the *mean* gradient; None before it is known.
        noise_share: this weight's part of the total noise variance.
        signal_to_noise: the most that the norm of the mean gradient can be over the expected norm
            of its noise: where all examples of an expected batch attain Δ in one direction.
    """

    weight: str
    layer: str
    shape: tuple[int, ...]
    input_bound: float
    cotangent_bound: float
    sensitivity: float
    noise_std: float | None
    noise_share: float | None
    signal_to_noise: float | None

    @property
    def name(self) -> str:
        """What the row is of."""
        return self.weight

    @property
    def size(self) -> int:
        """Number of entries of the weight."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class ClippedLayer:
    """One layer that clips its own gradient, example by example.

    Attributes:
        layer, kind: its name and class.
        weights: paths of its trainable weights, whose gradients are clipped together.
        size: number of their entries.
        threshold: to which the norm of an example's gradient is clipped.
        sensitivity: Δ, the most that one example can add to the gradient sum, in norm: the
            threshold, times the largest weight of an example, with room for rounding.
        calls: how often the network calls it; each call has its part of the threshold.
        exact: whether norms are exact but for rounding, or upper bounds.
        measured: how they are found.
        noise_std, noise_share, signal_to_noise: as for a `WeightRow`, for all its weights.
    """

    layer: str
    kind: str
    weights: tuple[str, ...]
    size: int
    threshold: float
    sensitivity: float
    calls: int
    exact: bool
    measured: str
    noise_std: float | None
    noise_share: float | None
    signal_to_noise: float | None

    @property
    def name(self) -> str:
        """What the row is of."""
        return self.layer


@dataclasses.dataclass(frozen=True)
class LayerRow:
    """One call of one layer, and what it reads.

    Attributes:
        layer, kind: its name and class.
        sources: for each input the index of the row that makes it; `-1 - i` for input `i` of the
            network.
        input_bounds: X, bound of the norm of each input.
        output_bound: bound of the norm of the output.
        cotangent_bound: G, bound of the loss gradient at the output.
        input_cotangents: the same at each input, on the way through this layer.
        weights: paths of the trainable weights that it uses.
        note: where its bound is loose.
    """

    layer: str
    kind: str
    sources: tuple[int, ...]
    input_bounds: tuple[float, ...]
    output_bound: float
    cotangent_bound: float
    input_cotangents: tuple[float, ...]
    weights: tuple[str, ...]
    note: str


@dataclasses.dataclass(frozen=True)
class Attained:
    """Norms of real gradients. From private examples, and **not** private.

    Attributes:
        name: path of a weight, or name of a layer that clips.
        norms: of the gradient of each example of the sample: the loss gradient clipped, or, where
            layers clip, without any clip.
        mean_norm: norm of the mean of the clipped gradients: the signal.
        within: where layers clip, the share of examples that are not cut.
    """

    name: str
    norms: tuple[float, ...]
    mean_norm: float
    within: float | None = None


@dataclasses.dataclass(frozen=True)
class Figures(RichText):
    """Sensitivities of a network and the noise they call for, as plain values.

    Attributes:
        network: its name.
        weights: a `WeightRow` each; empty where layers clip.
        layers: a `LayerRow` for each call, in the order of computation; empty where layers clip.
        clipped: a `ClippedLayer` each; empty where bounds are certified.
        loss_gradient_bound: the clip, times the largest weight of an example: where the bounds
            start. Infinite where layers clip, as the next two.
        lipschitz: bound of the network's Lipschitz constant.
        output_bound: bound of the norm of its output.
        sensitivity: of all weights together, `√ΣΔ²`.
        noise_multiplier, expected_batch_size: None before they are known.
        total_noise: expected norm of the noise of the mean gradient.
        allocation: how noise is shared: a name, or the share of each weight.
        epsilon, delta, relation: what has been spent, and for which neighbouring data sets; None
            where nothing says at which delta.
        runs: the runs that spent it.
        planned: whether they are a plan, and nothing has been spent.
        attained: gradients of a sample of the data; not private. None without a sample.
        uses: the runs that spent it with what else is known of them, for the statement.
    """

    network: str
    weights: tuple[WeightRow, ...]
    layers: tuple[LayerRow, ...]
    clipped: tuple[ClippedLayer, ...]
    loss_gradient_bound: float
    lipschitz: float
    output_bound: float
    sensitivity: float
    noise_multiplier: float | None
    expected_batch_size: float | None
    total_noise: float | None
    allocation: str | dict[str, float]
    epsilon: float | None
    delta: float | None
    relation: str | None
    runs: tuple[Mechanism, ...]
    planned: bool
    attained: tuple[Attained, ...] | None = None
    uses: tuple[Use, ...] = ()

    def to_dict(self) -> dict:
        """The report as plain lists, numbers and strings, ready for JSON: None for infinities."""
        values = dataclasses.asdict(dataclasses.replace(self, runs=(), uses=()))
        del values["uses"]
        values["runs"] = [run.to_dict() for run in self.runs]
        return _plain(values)

    @property
    def rows(self) -> tuple[WeightRow, ...] | tuple[ClippedLayer, ...]:
        """What has a sensitivity of its own: weights, or layers that clip."""
        return self.clipped or self.weights

    def __rich__(self):
        from rich.console import Group
        from rich.text import Text

        lines = [
            f"{'all layers' if self.clipped else 'all weights'} together: Δ ≤ "
            f"{short(self.sensitivity)}; noise multiplier "
            f"{short(self.noise_multiplier)}, expected batch size "
            f"{short(self.expected_batch_size)}, allocation {self.allocation!r}, "
            f"expected norm of the noise {short(self.total_noise)}",
        ]
        if not self.clipped:
            lines.insert(
                0,
                f"loss gradient at most {short(self.loss_gradient_bound)}, "
                f"Lipschitz constant ≤ {short(self.lipschitz)}, output ≤ "
                f"{short(self.output_bound)}",
            )
        if self.epsilon is not None:
            state = "planned" if self.planned else "spent so far"
            lines.append(f"{state}: ε = {short(self.epsilon)} at δ = {self.delta:g}")
        table = self._clipped_table() if self.clipped else self._weights_table()
        parts = [table, Text("\n".join(lines))]
        if self.attained is not None:
            parts.append(self._attained_table())
        return Group(*parts)

    def _weights_table(self):
        table = _table(
            "Sensitivities: input ≤ X, cotangent ≤ G, one example's gradient ≤ Δ",
            ("weight",),
            ("shape", "X", "G", "Δ", "noise std", "share", "signal/noise"),
        )
        for row in self.weights:
            table.add_row(
                row.weight,
                "×".join(map(str, row.shape)) or "scalar",
                short(row.input_bound),
                short(row.cotangent_bound),
                short(row.sensitivity),
                *_noise(row),
            )
        return table

    def _clipped_table(self):
        table = _table(
            "Layers that clip: one example's gradient of a layer ≤ its threshold",
            ("layer", "norm"),
            ("weights", "threshold", "noise std", "share", "signal/noise"),
        )
        for row in self.clipped:
            kind = "exact" if row.exact else "upper bound"
            table.add_row(
                f"{row.layer} ({row.kind})",
                f"{kind}, {row.measured}",
                f"{row.size:,}",
                short(row.threshold),
                *_noise(row),
            )
        return table

    def _attained_table(self):
        examples = len(self.attained[0].norms)
        beside = "thresholds" if self.clipped else "bounds"
        columns = ("median", "largest", "norm of the mean", "over its noise")
        table = _table(
            f"NOT PRIVATE: gradients of {examples} examples over their {beside}",
            ("layer" if self.clipped else "weight",),
            (*columns[:2], "within", *columns[2:]) if self.clipped else columns,
        )
        for row, found in zip(self.rows, self.attained, strict=True):
            noise = row.noise_std * row.size**0.5 if row.noise_std else None
            most = row.threshold if self.clipped else row.sensitivity
            table.add_row(
                row.name,
                f"{np.median(found.norms) / most:.1%}",
                f"{max(found.norms) / most:.1%}",
                *([f"{found.within:.0%}"] if self.clipped else []),
                short(found.mean_norm),
                "–" if noise is None else short(found.mean_norm / noise),
            )
        return table


def _table(title, words, numbers):
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in words:
        table.add_column(column, overflow="fold")
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _noise(row):
    """The cells of the noise of a row."""
    return (
        short(row.noise_std),
        "–" if row.noise_share is None else f"{row.noise_share:.1%}",
        "–" if row.signal_to_noise is None else f"≤ {short(row.signal_to_noise)}",
    )


def short(value: float | None) -> str:
    """Four digits, or a dash."""
    if value is None:
        return "–"
    return "∞" if math.isinf(value) else f"{value:.4g}"


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
