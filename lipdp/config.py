"""A training run that a file describes: `lipdp train CONFIG.yaml`."""

import contextlib
import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from accountants import Budget
from accountants.sampling import Sampling
from lipdp import losses, models
from lipdp.training.clipping import AdaptiveClip, PerLayerClip
from lipdp.training.model import PrivateModel

__all__ = ["clip_of", "read_config", "train"]

_SECTIONS = {
    "data": {"train", "x", "y", "test", "test_x", "test_y"},
    "network": None,
    "privacy": {"epsilon", "delta", "noise_multiplier", "clip", "allocation", "noise", "ledger"},
    "sampling": None,
    "training": {"epochs", "loss", "optimizer", "physical_batch_size", "metrics"},
    "output": {"model", "report", "result"},
}
_OPTIONAL = ("output",)
_PATHS = {
    "data": ("train", "test"),
    "privacy": ("ledger",),
    "output": ("model", "report", "result"),
}


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The sections of a file, checked; paths in it are relative to its folder,
    and `~` is the home of the user.

    Args:
        path: a YAML (or JSON) file with the sections

            - `data`: `train`, an .npz file, and the names of its arrays, `x` and `y`;
              optionally `test` (by default the same file), `test_x`, `test_y`.
            - `network`: path of a `.keras` file, or `name` of a function of `lipdp.models` and its
              arguments.
            - `privacy`: `epsilon` and `delta`, or `noise_multiplier`; optionally `clip` (as
              `clip_of` takes it), `allocation`, `noise`, `ledger`.
            - `sampling`: `scheme` and its arguments, as `Sampling.from_dict` takes them.
            - `training`: `epochs`, `loss`, `optimizer` (names, or `name` and arguments; an
              optimizer's `decay: cosine` lets its rate fall to zero over the run); optionally
              `physical_batch_size`, `metrics`.
            - `output`, optional: where to write the `model`, the `report` (a page), the `result`.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such file.
    """
    import yaml

    path = pathlib.Path(path).expanduser()
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a YAML file: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold the sections {', '.join(_SECTIONS)}.")
    if unknown := set(config) - set(_SECTIONS):
        raise ValueError(
            f"{path}: unknown section {', '.join(sorted(map(str, unknown)))}; known are "
            f"{', '.join(_SECTIONS)}."
        )
    if missing := [s for s in _SECTIONS if s not in config and s not in _OPTIONAL]:
        raise ValueError(f"{path} has no section {', '.join(missing)}.")
    for section, known in _SECTIONS.items():
        values = config.setdefault(section, {})
        if section == "network" and isinstance(values, str):
            continue
        if not isinstance(values, dict):
            raise ValueError(f"{path}: section {section!r} must hold names and values.")
        if known is not None and (unknown := set(values) - known):
            raise ValueError(
                f"{path}: {section} has no {', '.join(sorted(map(str, unknown)))}; known are "
                f"{', '.join(sorted(known))}."
            )
    config = _numbers(config)
    return _in_folder(config, path.parent)


def _in_folder(config, folder):
    """A copy whose paths are found from a folder, or from the home of the user after `~`."""

    def place(path):
        return os.path.join(folder, os.path.expanduser(str(path)))

    config = {
        key: value if isinstance(value, str) else dict(value) for key, value in config.items()
    }
    for section, names in _PATHS.items():
        for name in names:
            if name in config.get(section, ()):
                config[section][name] = place(config[section][name])
    if isinstance(config["network"], str):
        config["network"] = place(config["network"])
    return config


def train(config: Mapping[str, Any], verbose: bool = True) -> dict[str, Any]:
    """Trains as `read_config` says.

    Args:
        config: the sections.
        verbose: whether to show progress.

    Returns:
        What was spent and attained: epsilon, delta, relation, steps, noise multiplier, and, where
        there is test data, its loss and metrics.

    Raises:
        OSError: a file cannot be read or written.
        TypeError, ValueError: a value is not what it should be.
        BudgetExceeded: nothing is left of the ledger's budget.
    """
    config = _in_folder(config, "")
    data, privacy, training = config["data"], config["privacy"], config["training"]
    output = config.get("output", {})
    _check_output(output, privacy.get("ledger"))
    x, y = _load(_needed(data, "train", "data"), data.get("x", "x"), data.get("y", "y"))
    test = None
    if "test" in data or "test_x" in data:
        test = _load(
            data.get("test", data["train"]), data.get("test_x", "x"), data.get("test_y", "y")
        )
    sampling = Sampling.from_dict(config["sampling"])
    epochs = _needed(training, "epochs", "training")
    budget = None
    if "epsilon" in privacy or "delta" in privacy:
        budget = Budget(
            _needed(privacy, "epsilon", "privacy"), _needed(privacy, "delta", "privacy")
        )
    settings = {
        key: privacy[key]
        for key in ("noise_multiplier", "allocation", "noise", "ledger")
        if key in privacy
    }
    model = PrivateModel(
        _network(config["network"]),
        budget=budget,
        sampling=sampling,
        clip=clip_of(privacy.get("clip")),
        physical_batch_size=training.get("physical_batch_size"),
        **settings,
    )
    steps = int(epochs) * sampling.steps_per_epoch(len(y))
    model.compile(
        _optimizer(training.get("optimizer", "sgd"), steps),
        loss=_loss(_needed(training, "loss", "training")),
        metrics=training.get("metrics", ["accuracy"]),
    )
    model.fit(x, y, epochs=epochs, verbose="auto" if verbose else 0)
    spent = model.spent(None if budget else 1e-5)
    result = {
        "epsilon": spent.epsilon,
        "delta": spent.delta,
        "relation": spent.relation,
        "steps": spent.steps,
        "noise_multiplier": model.noise_multiplier,
    }
    if test is not None:
        scores = model.evaluate(*test, verbose=0, return_dict=True)
        result |= {f"test_{name}": float(value) for name, value in scores.items()}
    if "model" in output:
        model.network.save(output["model"])
    if "report" in output:
        model.report().to_html(output["report"])
    if "result" in output:
        pathlib.Path(output["result"]).write_text(json.dumps(result) + "\n")
    return result


def clip_of(value: Any) -> float | AdaptiveClip | PerLayerClip | None:
    """A clip that a file or a flag describes.

    Args:
        value: None; a number; `"per_layer"` or `"adaptive"`; or such a name with settings,
            `{"per_layer": {"quantile": 0.7}}`.

    Raises:
        TypeError, ValueError: it is nothing of that.

    >>> clip_of("0.5"), clip_of({"per_layer": {"quantile": 0.7}}).quantile
    (0.5, 0.7)
    """
    kinds = {"per_layer": PerLayerClip, "adaptive": AdaptiveClip}
    if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        return value
    if isinstance(value, str) and value not in kinds:
        with contextlib.suppress(ValueError):
            return float(value)
    name, settings = value, {}
    if isinstance(value, Mapping) and len(value) == 1:
        ((name, settings),) = value.items()
    if (
        not isinstance(name, str)
        or name not in kinds
        or not isinstance(settings, (Mapping, type(None)))
    ):
        raise ValueError(
            "`clip` must be a number, per_layer or adaptive, or {per_layer: {quantile: 0.5}}; got "
            f"{value!r}."
        )
    return kinds[name](**(settings or {}))


def _check_output(output, ledger):
    """Refuses, before anything is spent, files that cannot be written, or that are the ledger."""
    for name, path in output.items():
        if not os.path.isdir(os.path.dirname(path) or "."):
            raise ValueError(f"`{name}` in section 'output': the folder of {path} does not exist.")
        if name == "model" and not path.endswith((".keras", ".h5", ".hdf5")):
            raise ValueError(f"`model` in section 'output' must end in .keras; got {path}.")
        if ledger is not None and os.path.realpath(path) == os.path.realpath(ledger):
            raise ValueError(f"`{name}` in section 'output' would overwrite the ledger, {path}.")


def _needed(values, name, section):
    if name not in values:
        raise ValueError(f"`{name}` is missing in section {section!r}.")
    return values[name]


def _load(path, *keys):
    with np.load(path) as data:
        if missing := [key for key in keys if key not in data]:
            raise ValueError(f"{path} has no {', '.join(missing)}; it has {', '.join(data)}.")
        return tuple(data[key] for key in keys)


def _network(config):
    if isinstance(config, str):
        return keras.saving.load_model(config, compile=False)
    arguments = dict(config)
    name = arguments.pop("name", None)
    if name not in models.__all__:
        raise ValueError(
            f"`network` must be the path of a .keras file, or have a `name` among "
            f"{', '.join(models.__all__)}; got {name!r}."
        )
    return getattr(models, name)(**arguments)


def _optimizer(config, steps):
    if isinstance(config, str):
        return config
    arguments = dict(config)
    name, decay = arguments.pop("name", None), arguments.pop("decay", None)
    if decay == "cosine":
        rate = _needed(arguments, "learning_rate", "optimizer")
        arguments["learning_rate"] = keras.optimizers.schedules.CosineDecay(rate, steps)
    elif decay is not None:
        raise ValueError(f"`decay` must be 'cosine' or left out; got {decay!r}.")
    return type(keras.optimizers.get(name))(**arguments)


def _loss(config):
    if isinstance(config, str):
        return config
    arguments = dict(config)
    return type(losses.get(arguments.pop("name", None)))(**arguments)


def _numbers(value):
    """YAML reads 1e-5 as text."""
    if isinstance(value, dict):
        return {key: _numbers(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_numbers(v) for v in value]
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)
    return value
