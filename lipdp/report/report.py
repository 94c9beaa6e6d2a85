"""The sensitivity report of a model: its figures, measured, and the page made of them."""

import math
import os
from collections.abc import Sequence

from keras import ops

from accountants import TrainingRun
from lipdp.bounds.rule import as_float
from lipdp.bounds.walk import ROUNDING, network_bounds
from lipdp.noise import standard_deviations
from lipdp.report.numbers import Attained, ClippedLayer, Figures, LayerRow, WeightRow
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
        network = model.graph  # one output, also where the model has several
        variables = network.trainable_variables
        found = None
        if model.units is None:
            clip = as_float(model.current_clip()) * model.sample_weight_bound
            found = network_bounds(network, clip)
            by_path = found.sensitivities()
            bounds, sizes = [by_path[v.path] for v in variables], [_size(v) for v in variables]
        else:
            thresholds = [float(c) for c in ops.convert_to_numpy(model.current_clip())]
            bounds = [c * model.sample_weight_bound * ROUNDING for c in thresholds]
            sizes = [sum(map(_size, unit.variables)) for unit in model.units.units]
        noise, divisor = model.noise_multiplier, expected_batch_size
        if noise is not None:
            noise = model.noise.multiplier(noise, model.step.entries)
        if model.step.constants is not None:
            noise = model.step.constants.gradient_noise_multiplier
            divisor = divisor or model.step.constants.expected_batch_size
        divisor = divisor or getattr(model.sampling, "batch_size", None)
        stds = [None] * len(bounds)
        total = None
        if noise is not None and divisor is not None:
            if model.step.constants is None:
                noise, _ = model.clip_state.split(noise, divisor)
            sums = standard_deviations(bounds, sizes, noise, model.step.allocation)
            stds = [float(s) / divisor for s in sums]
            total = math.sqrt(sum(s * s * size for s, size in zip(stds, sizes, strict=True)))
        # Of each row: sensitivity, std of the noise, share of it, most that signal is over it.
        noises = [
            (
                bound,
                std,
                std**2 * size / total**2 if total else None,
                bound / (std * size**0.5) if std else None,
            )
            for bound, std, size in zip(bounds, stds, sizes, strict=True)
        ]
        planned = runs is not None
        uses = () if planned else tuple(model.spending.uses)
        runs = tuple(runs if planned else [use.run for use in uses])
        if delta is None and model.budget is not None:
            delta = model.budget.delta
        epsilon = None if delta is None else model.spending.epsilon(runs, delta)
        if found is not None:
            rows = {
                "weights": tuple(
                    _weight_row(variable, found.layers, *numbers)
                    for variable, numbers in zip(variables, noises, strict=True)
                ),
                "layers": tuple(_layer_rows(found)),
                "clipped": (),
                "loss_gradient_bound": clip,
                "lipschitz": as_float(found.lipschitz),
                "output_bound": as_float(found.output),
            }
        else:
            rows = {
                "weights": (),
                "layers": (),
                "clipped": tuple(_clipped_layers(model.units, thresholds, sizes, noises)),
                "loss_gradient_bound": math.inf,
                "lipschitz": math.inf,
                "output_bound": math.inf,
            }
        return cls(
            network=model.network.name,
            **rows,
            sensitivity=math.sqrt(sum(b * b for b in bounds)),
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
            uses=uses,
        )

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Writes one page that needs nothing else: drawings, plots, what-if sliders.

        Raises:
            ImportError: matplotlib is missing.
            OSError: the file cannot be written.
        """
        text = page(self)
        with open(os.path.expanduser(path), "w", encoding="utf-8") as file:
            file.write(text)


def _size(variable):
    return math.prod(variable.shape)


def _weight_row(variable, layers, bound, std, share, ratio):
    calls = [layer for layer in layers if variable.path in dict(layer.gradients)]
    return WeightRow(
        weight=variable.path,
        layer=calls[0].kind,
        shape=tuple(variable.shape),
        input_bound=max(as_float(x) for call in calls for x in call.inputs),
        cotangent_bound=max(as_float(call.cotangent) for call in calls),
        sensitivity=bound,
        noise_std=std,
        noise_share=share,
        signal_to_noise=ratio,
    )


def _clipped_layers(units, thresholds, sizes, noises):
    for unit, threshold, size, numbers in zip(units.units, thresholds, sizes, noises, strict=True):
        bound, std, share, ratio = numbers
        yield ClippedLayer(
            layer=unit.layer.name,
            kind=type(unit.layer).__name__,
            weights=tuple(v.path for v in unit.variables),
            size=size,
            threshold=threshold,
            sensitivity=bound,
            calls=sum(call.layer is unit.layer for call in units.order),
            exact=unit.exact,
            measured=unit.measured,
            noise_std=std,
            noise_share=share,
            signal_to_noise=ratio,
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
