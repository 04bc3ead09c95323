"""Weights and running statistics over training: a file of histograms a step, and a picture.

`histograms/STEP.npz` holds, for L arrays of the net: `names` `(L,)`, such as
`params/stage1/0/conv1/a/kernel`, `edges` `(L, B + 1)`, `counts` `(L, B)`, and `mean`, `std` and
`nonfinite` `(L,)`. A run that goes on from a checkpoint writes the same files again.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from efficient_nets import paths
from efficient_nets.analysis.figures import grid, new_figure
from efficient_nets.analysis.histogram import Histogram, histogram

FIELDS = [field.name for field in dataclasses.fields(Histogram)]
BANDS = ((0.0, 1.0), (0.05, 0.95), (0.25, 0.75))


def histograms_of(arrays: Any) -> dict[str, Histogram]:
    """A histogram of each floating array of a tree, by path."""
    leaves = paths.named_leaves(arrays)
    return {k: histogram(x) for k, x in leaves.items() if jnp.issubdtype(x.dtype, jnp.floating)}


def save_histograms(workdir: pathlib.Path, step: int, found: Mapping[str, Histogram]) -> None:
    """Writes `histograms/STEP.npz`, whole or not at all."""
    folder = workdir / "histograms"
    folder.mkdir(exist_ok=True)
    columns = {field: [getattr(h, field) for h in found.values()] for field in FIELDS}
    temporary = folder / "histograms.tmp"
    with temporary.open("wb") as file:
        np.savez_compressed(file, names=list(found), **columns)
    temporary.replace(folder / f"{step:08d}.npz")


def read_history(workdir: pathlib.Path) -> dict[str, tuple[list[int], list[Histogram]]]:
    """Steps and histograms of each array, by name; empty if there are none."""
    history: dict[str, tuple[list[int], list[Histogram]]] = {}
    for path in sorted((workdir / "histograms").glob("*.npz")):
        with np.load(path) as file:
            columns = [file[field] for field in FIELDS]
            for name, *fields in zip(file["names"].tolist(), *columns, strict=True):
                steps, histograms = history.setdefault(name, ([], []))
                steps.append(int(path.stem))
                histograms.append(Histogram(*fields))
    return history


def plot_history(workdir: pathlib.Path) -> list[pathlib.Path]:
    """Draws `plots/weights_over_training.png`: every kernel's distribution against the step.

    Returns:
      Its path, or nothing where there are no histograms.
    """
    kernels: dict[str, dict[str, tuple]] = {}  # by layer and branch
    for name, values in read_history(workdir).items():
        if match := re.fullmatch(r"params/(.+)/(\w+)/kernel", name):
            kernels.setdefault(match[1], {})[match[2]] = values
    if not kernels:
        return []
    names = _in_order_of_calls(workdir, kernels)
    most = max(map(len, kernels.values()))
    figure = new_figure(2 + 2.8 * most, 0.6 + 1.3 * len(names))
    axes = grid(figure, names, [""] * most)
    for row, name in zip(axes, names, strict=True):
        branches = kernels[name]
        for axis, (branch, values) in zip(row, branches.items(), strict=False):
            _draw(axis, branch, *values)
        for axis in row[len(branches) :]:
            axis.set_axis_off()
    figure.supxlabel("step; line: median, bands: 25 to 75%, 5 to 95%, all", fontsize=9)
    path = workdir / "plots" / "weights_over_training.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)
    return [path]


def _in_order_of_calls(workdir: pathlib.Path, kernels: Mapping) -> list[str]:
    """Names of layers as summary.json lists them, those that it does not list last."""
    path = workdir / "summary.json"
    layers = json.loads(path.read_text())["layers"] if path.exists() else []
    called = [layer["name"] for layer in layers if layer["name"] in kernels]
    return called + sorted(set(kernels) - set(called))


def _draw(axis, branch: str, steps, histograms) -> None:
    for low, high in BANDS:
        band = np.array([histogram.quantiles([low, high]) for histogram in histograms])
        axis.fill_between(steps, *band.T, color="tab:blue", alpha=0.2, lw=0)
    axis.plot(steps, [histogram.quantiles(0.5) for histogram in histograms], color="tab:blue", lw=1)
    axis.set_title(branch, fontsize=8, pad=2)
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.3)
