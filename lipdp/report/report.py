"""The sensitivity report of a model: its figures, measured, and the page made of them."""

import math
import os
from collections.abc import Sequence

from accountants import TrainingRun
from lipdp.bounds.rule import as_float
from lipdp.bounds.walk import network_bounds
from lipdp.noise import resolve_allocation, standard_deviations
from lipdp.report.numbers import Attained, Figures, LayerRow, WeightRow
from lipdp.report.page import page

__all__ = ["Report"]


class Report(Figures):
    """The figures of a model's sensitivities and noise: print them, or write a page of them."""

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
        clip = as_float(model.current_clip()) * model.sample_weight_bound
        network = model.network
        variables = network.trainable_variables
        found = network_bounds(network, clip)
        bounds = found.sensitivities()
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
                resolve_allocation(model.allocation, [v.path for v in variables]),
            )
            stds = [s / divisor for s in sums]
            total = math.sqrt(
                sum(s * s * math.prod(v.shape) for s, v in zip(stds, variables, strict=True))
            )
        planned = runs is not None
        runs = tuple(runs if planned else model.spending.runs)
        if delta is None and model.budget is not None:
            delta = model.budget.delta
        epsilon = None if delta is None else model.spending.epsilon(runs, delta)
        return cls(
            network=network.name,
            weights=tuple(
                _weight_row(variable, found.layers, bounds[variable.path], std, total)
                for variable, std in zip(variables, stds, strict=True)
            ),
            layers=tuple(_layer_rows(found)),
            loss_gradient_bound=clip,
            lipschitz=as_float(found.lipschitz),
            output_bound=as_float(found.output),
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

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Writes one page that needs nothing else: drawings, plots, what-if sliders.

        Raises:
            ImportError: matplotlib is missing.
            OSError: the file cannot be written.
        """
        text = page(self)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)


def _weight_row(variable, layers, bound, std, total):
    """The row of a weight; `total` is the norm of the noise of all weights."""
    size = math.prod(variable.shape)
    calls = [layer for layer in layers if variable.path in dict(layer.gradients)]
    return WeightRow(
        weight=variable.path,
        layer=calls[0].kind,
        shape=tuple(variable.shape),
        input_bound=max(as_float(x) for call in calls for x in call.inputs),
        cotangent_bound=max(as_float(call.cotangent) for call in calls),
        sensitivity=bound,
        noise_std=std,
        noise_share=std**2 * size / total**2 if total else None,
        signal_to_noise=bound / (std * size**0.5) if std else None,
    )


def _layer_rows(found):
    """Rows of the calls; the sources by the numbers of the tensors that they make and read."""
    traced = found.trace
    trainable = {v.path for v in traced.network.trainable_variables}
    made = {tensor: -1 - i for i, tensor in enumerate(traced.inputs)}
    for index, (call, layer) in enumerate(zip(traced.calls, found.layers, strict=True)):
        yield LayerRow(
            layer=layer.name,
            kind=layer.kind,
            sources=tuple(made[s] for s in call.inputs),
            input_bounds=tuple(as_float(x) for x in layer.inputs),
            output_bound=as_float(layer.output),
            cotangent_bound=as_float(layer.cotangent),
            input_cotangents=tuple(as_float(g) for g in layer.input_cotangents),
            weights=tuple(path for path, _ in layer.gradients if path in trainable),
            note=layer.note,
        )
        made.update(dict.fromkeys(call.outputs, index))
