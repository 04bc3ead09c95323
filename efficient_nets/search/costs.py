"""What each candidate of each searched layer costs: counted, or looked up in a table of times."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from efficient_nets import analysis, data, experiment, layers, names
from efficient_nets.errors import UserError
from efficient_nets.search import candidates as space
from efficient_nets.search.candidates import Candidate

COSTS = {
    "macs": "multiply-accumulates of one image",
    "bops": "bit operations of one image",
    "latency": "seconds of a forward batch, from the table winas.latency",
}


def costs(config: ConfigDict, paths: Sequence[str], candidates: Sequence[Candidate]) -> np.ndarray:
    """Shares `(L, K)` of what these layers cost together where all are direct and in float.

    Their sum over layers, each weighted by its candidates' probabilities, is the expected cost.

    Args:
      config: `winas.cost` says of what, `winas.latency` is the file of a table of times.
      paths: The L layers.
      candidates: The K candidates.

    Raises:
      UserError: on an unknown cost, or a table that is none, or lacks a layer or a candidate.
    """
    names.pick("winas.cost", config.winas.cost, COSTS)
    if config.winas.cost != "latency" and config.winas.latency:
        raise UserError(
            f"winas.latency={config.winas.latency!r}: only winas.cost='latency' reads it, here "
            f"{config.winas.cost!r}"
        )
    every = [*candidates, space.REFERENCE]
    found = _measured if config.winas.cost == "latency" else _counted
    table = np.array(found(config, paths, every), np.float64).T
    return table[:, :-1] / table[:, -1].sum()


def _counted(config: ConfigDict, paths, candidates) -> list[list[float]]:
    info, found = data.describe(config.data), []
    for candidate in candidates:
        every = space.with_chosen(config, dict.fromkeys(paths, candidate))
        model = experiment.abstract_model(every, info)
        by_name = {cost.name: cost for cost in analysis.layer_costs(model, info.image_shape)}
        found.append([getattr(by_name[path], config.winas.cost) for path in paths])
    return found


def _measured(config: ConfigDict, paths, candidates) -> list[list[float]]:
    field = f"winas.latency={config.winas.latency!r}"
    if not config.winas.latency:
        raise UserError("winas.cost='latency': give winas.latency, a file of --mode=latency")
    table = read(field, pathlib.Path(config.winas.latency))["seconds"]
    keys = shapes(config, paths)
    labels = [space.label(candidate) for candidate in candidates]
    check_times(
        field, table, [(key, label) for key in dict.fromkeys(keys.values()) for label in labels]
    )
    return [[table[keys[path]][label] for path in paths] for label in labels]


def check_times(
    field: str, seconds: Mapping[str, Mapping[str, float]], needed: Sequence[tuple[str, str]]
) -> None:
    """Raises a UserError, of that field, if these times lack a (shape, label) of those needed."""
    missing = [
        f"{shape}: {label}"
        for shape, label in dict.fromkeys(needed)
        if label not in seconds.get(shape, {})
    ]
    if missing:
        few = "; ".join(missing[:5]) + ("; ..." if len(missing) > 5 else "")
        raise UserError(
            f"{field} lacks {len(missing)} of the times, so it is of another net or of others; "
            f"--mode=latency measures them: {few}"
        )


def read(field: str, path: pathlib.Path) -> dict[str, Any]:
    """A table of `latency.measure`.

    Raises:
      UserError: if the file, the value of that field, is none.
    """
    try:
        table = json.loads(path.read_text())
        times = [seconds for row in table["seconds"].values() for seconds in row.values()]
    except OSError as error:
        raise UserError(f"{field} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{field} is no table of --mode=latency") from error
    if not all(isinstance(seconds, float) and 0 < seconds < np.inf for seconds in times):
        raise UserError(f"{field}: every time must be a number of seconds above 0")
    return table


def shapes(config: ConfigDict, paths: Sequence[str]) -> dict[str, str]:
    """By path, what a layer's time depends on: '32x32x16 to 32, 3x3, strides 1x1'."""
    info = data.describe(config.data)
    model = experiment.abstract_model(config, info)
    found = dict(layers.layers(model))
    inputs = {c.name: c.input_shape for c in analysis.layer_costs(model, info.image_shape)}
    return {path: _shape(found[path], inputs[path]) for path in paths}


def _shape(layer: layers.Layer, input_shape) -> str:
    def text(numbers):
        return "x".join(map(str, numbers))

    geometry, spec = layer.geometry, layer.spec
    padding = geometry.padding
    if not isinstance(padding, str):
        padding = text(f"{low}+{high}" for low, high in padding)
    return (
        f"{text(input_shape)} to {geometry.features}, {text(geometry.kernel_size)}, "
        f"strides {text(geometry.strides)}, padding {padding}"
        + (f", groups {geometry.groups}" if geometry.groups > 1 else "")
        + (f", dilation {text(geometry.dilation)}" if max(geometry.dilation) > 1 else "")
        + (f", kernel {spec.kernel}" if spec.kernel != "dense" else "")
        + (f", {spec.neuron}" if spec.neuron != "linear" else "")
        + (f", norm {spec.norm}" if spec.norm != "none" else "")
    )
