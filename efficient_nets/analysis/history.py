"""Weights, activations and gradients over training: a file of histograms a step, and pictures.

`histograms/STEP.npz` holds, for L arrays: `names` `(L,)`, `edges` `(L, B + 1)`, `counts` `(L, B)`,
and `mean`, `std` and `nonfinite` `(L,)`. A run that goes on from a checkpoint writes the same files
again. Names are

    params/stage1/0/conv1/a/kernel   a parameter; `stats/...` a running statistic
    activations/stage1/0/conv1       what the layer gives for a batch that is the same at each step,
                                     in training mode
    gradients/stage1/0/conv1/a       of the loss on that batch, with respect to the kernel
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
PICTURES = {  # layer, and branch if any
    "weights": r"params/(.+)/(\w+)/kernel",
    "activations": r"activations/(.+)()",
    "gradients": r"gradients/(.+)/(\w+)",
}
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
    """Draws `plots/weights_over_training.png`, and those of activations and gradients.

    Every kernel's, output's and kernel gradient's distribution against the step.

    Returns:
      Paths of those there are histograms for.
    """
    history = read_history(workdir)
    drawn = []
    for kind, pattern in PICTURES.items():
        found: dict[str, dict[str, tuple]] = {}  # by layer and branch
        for name, values in history.items():
            if match := re.fullmatch(pattern, name):
                found.setdefault(match[1], {})[match[2]] = values
        if found:
            drawn.append(workdir / "plots" / f"{kind}_over_training.png")
            drawn[-1].parent.mkdir(exist_ok=True)
            _over_training(found, _in_order_of_calls(workdir, found)).savefig(drawn[-1])
    return drawn


def _over_training(found: Mapping[str, Mapping[str, tuple]], names: list[str]):
    """A row a layer and a column a branch."""
    most = max(map(len, found.values()))
    figure = new_figure(2 + max(2.8 * most, 5), 0.6 + 1.3 * len(names))
    axes = grid(figure, names, [""] * most)
    for row, name in zip(axes, names, strict=True):
        branches = found[name]
        for axis, (branch, values) in zip(row, branches.items(), strict=False):
            _draw(axis, branch, *values)
        for axis in row[len(branches) :]:
            axis.set_axis_off()
    figure.supxlabel("step; line: median, bands: 25 to 75%, 5 to 95%, all", fontsize=9)
    return figure


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
    axis.yaxis.get_offset_text().set_fontsize(7)
    axis.grid(alpha=0.3)
