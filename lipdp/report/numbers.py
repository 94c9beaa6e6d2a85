"""The sensitivity report: the bound of each weight, where it comes from, and its noise."""

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from keras import ops

from accountants import TrainingRun
from lipdp.bounds import gradient_bounds
from lipdp.bounds.walk import network_bounds, trace
from lipdp.noise import resolve_allocation, standard_deviations

__all__ = ["Attained", "LayerRow", "RichText", "Report", "WeightRow", "number"]


class RichText:
    """Mixin: what rich shows, as text."""

    def to_text(self, width: int = 110) -> str:
        """The same as text, without colours."""
        from rich.console import Console

        console = Console(width=width, no_color=True, force_terminal=False, legacy_windows=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get()

    def __str__(self) -> str:
        return self.to_text()


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
    """How large gradients really are. From private examples, and **not** private.

    Attributes:
        weight: its path.
        norms: of the gradient of each example of the sample, the loss gradient clipped.
        mean_norm: norm of the mean of these gradients: the signal.
    """

    weight: str
    norms: tuple[float, ...]
    mean_norm: float


@dataclasses.dataclass(frozen=True)
class Report(RichText):
    """Sensitivities of a network and the noise they call for.

    Attributes:
        network: its name.
        weights: a `WeightRow` each.
        layers: a `LayerRow` for each call, in the order of computation.
        loss_gradient_bound: the clip, times the largest weight of an example: where the bounds
            start.
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
    """

    network: str
    weights: tuple[WeightRow, ...]
    layers: tuple[LayerRow, ...]
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
    runs: tuple[TrainingRun, ...]
    planned: bool
    attained: tuple[Attained, ...] | None = None

    @classmethod
    def of(
        cls,
        model,
        expected_batch_size: float | None = None,
        runs: Sequence[TrainingRun] | None = None,
        delta: float | None = None,
        attained: tuple[Attained, ...] | None = None,
    ) -> "Report":
        """The report of a compiled `PrivateModel`.

        Args:
            model: the model.
            expected_batch_size: for a scheme whose batch is the data set, before `fit`.
            runs, delta: planned ones, in place of what the model has spent.
            attained: of a sample.
        """
        clip = number(model.current_clip()) * model.sample_weight_bound
        network = model.network
        variables = network.trainable_variables
        bounds = gradient_bounds(network, clip)
        walk, steps = network_bounds(network, clip), trace(network)
        noise, divisor = model.noise_multiplier, expected_batch_size
        if noise is not None:
            noise = model.noise.multiplier(noise, sum(math.prod(v.shape) for v in variables))
        if model.step.constants is not None:
            noise = model.step.constants.gradient_noise_multiplier
            divisor = divisor or model.step.constants.expected_batch_size
        divisor = divisor or getattr(model.sampling, "batch_size", None)
        stds = [None] * len(variables)
        total = None
        if noise is not None and divisor is not None:
            sums = standard_deviations(
                [bounds[v.path] for v in variables],
                [math.prod(v.shape) for v in variables],
                noise,
                resolve_allocation(model.allocation, variables),
            )
            stds = [s / divisor for s in sums]
            total = math.sqrt(
                sum(s * s * math.prod(v.shape) for s, v in zip(stds, variables, strict=True))
            )
        rows = []
        for variable, std in zip(variables, stds, strict=True):
            size = math.prod(variable.shape)
            calls = [c for c in walk.layers if variable.path in dict(c.gradients)]
            rows.append(
                WeightRow(
                    weight=variable.path,
                    layer=calls[0].kind,
                    shape=tuple(variable.shape),
                    input_bound=max(number(x) for c in calls for x in c.inputs),
                    cotangent_bound=max(number(c.cotangent) for c in calls),
                    sensitivity=bounds[variable.path],
                    noise_std=std,
                    noise_share=std**2 * size / total**2 if total else None,
                    signal_to_noise=bounds[variable.path] / (std * size**0.5) if std else None,
                )
            )
        planned = runs is not None
        runs = tuple(runs if planned else model.spending.runs)
        if delta is None and model.budget is not None:
            delta = model.budget.delta
        epsilon = None if delta is None else model.spending.epsilon(runs, delta)
        return cls(
            network=network.name,
            weights=tuple(rows),
            layers=tuple(_layer_rows(steps, walk, {v.path for v in variables})),
            loss_gradient_bound=clip,
            lipschitz=number(walk.lipschitz),
            output_bound=number(walk.output),
            sensitivity=math.sqrt(sum(b * b for b in bounds.values())),
            noise_multiplier=model.noise_multiplier,
            expected_batch_size=divisor,
            total_noise=total,
            allocation=model.allocation,
            epsilon=None if epsilon is None else float(epsilon),
            delta=delta,
            relation=getattr(epsilon, "relation", None) if runs else None,
            runs=runs,
            planned=planned,
            attained=attained,
        )

    def to_dict(self) -> dict:
        """The report as plain lists, numbers and strings, ready for JSON: None for infinities."""
        values = dataclasses.asdict(dataclasses.replace(self, runs=()))
        values["runs"] = [run.to_dict() for run in self.runs]
        return _plain(values)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Writes one page that needs nothing else: drawings, plots, what-if sliders.

        Raises:
            ImportError: matplotlib is missing.
            OSError: the file cannot be written.
        """
        from lipdp.report.page import page

        text = page(self)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)

    def __rich__(self):
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(
            title="Sensitivities: input ≤ X, cotangent ≤ G, one example's gradient ≤ Δ",
            title_justify="left",
        )
        table.add_column("weight", overflow="fold")
        for column in ("shape", "X", "G", "Δ", "noise std", "share", "signal/noise"):
            table.add_column(column, justify="right", no_wrap=True)
        for row in self.weights:
            table.add_row(
                row.weight,
                "×".join(map(str, row.shape)) or "scalar",
                short(row.input_bound),
                short(row.cotangent_bound),
                short(row.sensitivity),
                short(row.noise_std),
                "–" if row.noise_share is None else f"{row.noise_share:.1%}",
                "–" if row.signal_to_noise is None else f"≤ {short(row.signal_to_noise)}",
            )
        lines = [
            f"loss gradient at most {short(self.loss_gradient_bound)}, "
            f"Lipschitz constant ≤ {short(self.lipschitz)}, output ≤ {short(self.output_bound)}",
            f"all weights together: Δ ≤ {short(self.sensitivity)}; noise multiplier "
            f"{short(self.noise_multiplier)}, expected batch size "
            f"{short(self.expected_batch_size)}, allocation {self.allocation!r}, "
            f"expected norm of the noise {short(self.total_noise)}",
        ]
        if self.epsilon is not None:
            state = "planned" if self.planned else "spent so far"
            lines.append(f"{state}: ε = {short(self.epsilon)} at δ = {self.delta:g}")
        parts = [table, Text("\n".join(lines))]
        if self.attained is not None:
            parts.append(self._attained_table())
        return Group(*parts)

    def _attained_table(self):
        from rich.table import Table

        examples = len(self.attained[0].norms)
        table = Table(
            title=f"NOT PRIVATE: gradients of {examples} examples over their bounds",
            title_justify="left",
        )
        table.add_column("weight", overflow="fold")
        for column in ("median", "largest", "norm of the mean", "over its noise"):
            table.add_column(column, justify="right", no_wrap=True)
        for row, found in zip(self.weights, self.attained, strict=True):
            size = math.prod(row.shape)
            noise = row.noise_std * size**0.5 if row.noise_std else None
            table.add_row(
                row.weight,
                f"{np.median(found.norms) / row.sensitivity:.1%}",
                f"{max(found.norms) / row.sensitivity:.1%}",
                short(found.mean_norm),
                "–" if noise is None else short(found.mean_norm / noise),
            )
        return table


def _layer_rows(traced, walk, trainable):
    """Rows of the calls; the sources by the numbers of the tensors that they make and read."""
    made = {tensor: -1 - i for i, tensor in enumerate(traced.inputs)}
    for index, (step, layer) in enumerate(zip(traced.calls, walk.layers, strict=True)):
        yield LayerRow(
            layer=layer.name,
            kind=layer.kind,
            sources=tuple(made[s] for s in step.inputs),
            input_bounds=tuple(number(x) for x in layer.inputs),
            output_bound=number(layer.output),
            cotangent_bound=number(layer.cotangent),
            input_cotangents=tuple(number(g) for g in layer.input_cotangents),
            weights=tuple(path for path, _ in layer.gradients if path in trainable),
            note=layer.note,
        )
        made.update(dict.fromkeys(step.outputs, index))


def number(value: Any) -> float:
    """A float of a float or a scalar tensor."""
    return float(ops.convert_to_numpy(value)) if ops.is_tensor(value) else float(value)


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
