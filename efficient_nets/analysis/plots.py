"""Pictures of an `Analysis`: a function each, from the analysis to a Matplotlib figure.

Layers go from top to bottom in the order of their calls. `plot_analysis` saves all of them.
"""

import math
import pathlib
from collections.abc import Callable, Mapping

import numpy as np
from tqdm import tqdm

from efficient_nets.analysis import maps
from efficient_nets.analysis.analyze import Analysis, LayerAnalysis
from efficient_nets.analysis.figures import grid, new_figure, patch
from efficient_nets.analysis.histogram import Histogram
from efficient_nets.analysis.reference import Reference
from efficient_nets.analysis.terms import FIRST_ORDER, KINDS, OTHER

TERM_COLORS = dict(
    zip(
        (*KINDS, OTHER),
        ("tab:orange", "tab:red", "gold", "tab:blue", "tab:gray", "tab:purple"),
        strict=True,
    )
)
LOWEST = 1e-5  # share of values in a bin at which histograms are cut off
SCALE = f"height: share of the values, from {LOWEST:g} to 1 on a log scale"
SPECTRA_A_ROW = 3


def plot_analysis(
    found: Analysis, folder: pathlib.Path, reference: Reference | None = None
) -> list[pathlib.Path]:
    """Saves every picture that the net has something for, and returns the files.

    Args:
      found: Of `analyze`.
      folder: Where they go; it is made if need be.
      reference: Another net, to stand beside this one.
    """
    pictures: dict[str, Callable] = {
        "histograms": histograms,
        "term_shares": term_shares,
        "product_magnitude": product_magnitude,
        "spectra": spectra,
        "feature_maps": maps.feature_maps,
        "kernel_maps": maps.kernel_maps,
        "first_and_second_order": maps.first_and_second_order,
    }
    if reference is not None:
        pictures["beside_reference"] = lambda found: beside_reference(found, reference)
        pictures["maps_beside_reference"] = lambda found: maps.beside_reference(found, reference)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw in tqdm(pictures.items(), "plots", leave=False, delay=5):
        if (figure := draw(found)) is not None:
            written.append(folder / f"{name}.png")
            figure.savefig(written[-1])
    return written


def histograms(found: Analysis):
    """Activations, weights and gradients of each layer, every one on a scale of its own."""
    names = [layer.name for layer in found.layers]
    figure = new_figure(11, 0.6 + 0.95 * len(names))
    axes = grid(figure, names, ["activations", "weights", "gradients"])
    branches = list(dict.fromkeys(name for layer in found.layers for name in layer.weights))
    colors = {name: f"C{index % 10}" for index, name in enumerate(branches)}
    for row, layer in zip(axes, found.layers, strict=True):
        _draw_histograms(row[0], {"": layer.activations}, {"": "dimgray"})
        _draw_histograms(row[1], layer.weights, colors)
        _draw_histograms(row[2], layer.gradients, colors)
    handles = [patch(colors[name], name) for name in branches]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), fontsize=8)
    figure.supxlabel(SCALE, fontsize=9)
    return figure


def _draw_histograms(axis, by_name: Mapping[str, Histogram], colors) -> None:
    bad = sum(histogram.nonfinite for histogram in by_name.values())
    for name, histogram in by_name.items():
        shares = histogram.counts / max(histogram.counts.sum(), 1)
        style = dict(color=colors[name], baseline=LOWEST)
        shares = np.maximum(shares, LOWEST)
        axis.stairs(shares, histogram.edges, fill=True, alpha=0.15, **style)
        axis.stairs(shares, histogram.edges, lw=0.8, **style)
    axis.set_yscale("log")
    axis.set_ylim(LOWEST, 1)
    axis.set_yticks([])
    axis.minorticks_off()
    axis.locator_params(axis="x", nbins=5)
    axis.tick_params(labelsize=7)
    axis.xaxis.get_offset_text().set_fontsize(7)
    axis.axvline(0, color="black", lw=0.5, alpha=0.4)
    if bad:
        axis.text(0.98, 0.9, f"{bad:,} not finite", color="red", fontsize=7, ha="right", va="top")
        axis.texts[-1].set_transform(axis.transAxes)


def _bars(names: list[str], height: float = 0.3):
    """A figure with one axis of horizontal bars, a name a bar."""
    figure = new_figure(8, 1.2 + height * len(names))
    axis = figure.add_subplot()
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_ylim(len(names) - 0.4, -0.6)
    return figure, axis


def term_shares(found: Analysis):
    """Each term's part of the terms' second moments, see `LayerAnalysis.shares` and `cross`."""
    figure, axis = _bars([layer.name for layer in found.layers])
    seen = dict.fromkeys(
        kind for kind in TERM_COLORS if any(kind in layer.moments for layer in found.layers)
    )
    for y, layer in enumerate(found.layers):
        left = 0.0
        for kind in seen:
            share = layer.shares.get(kind, 0.0)
            if not math.isfinite(share):
                axis.text(0.01, y, "no finite moment above 0", fontsize=7, va="center", color="red")
                break
            axis.barh(y, share, 0.75, left=left, color=TERM_COLORS[kind])
            left += share
        if len(layer.moments) > 1 and math.isfinite(layer.cross):
            axis.text(1.01, y, f"{layer.neuron}, cross {layer.cross:+.2f}", fontsize=7, va="center")
        else:
            axis.text(1.01, y, layer.neuron, fontsize=7, va="center")
    axis.set_xlim(0, 1.25)
    axis.set_xticks(np.linspace(0, 1, 6), [f"{share:.0%}" for share in np.linspace(0, 1, 6)])
    axis.set_xlabel("share of the terms' second moments")
    handles = [patch(TERM_COLORS[kind], kind) for kind in seen]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=8)
    return figure


def product_magnitude(found: Analysis):
    """Largest and root mean square value of the terms of second order, and of those of first."""
    quadratic = [layer for layer in found.layers if layer.second_map is not None]
    if not quadratic:
        return None
    figure, axis = _bars([layer.name for layer in quadratic])
    series = {
        "second order, max": ([layer.product_max for layer in quadratic], "tab:orange", "|"),
        "second order, rms": ([layer.product_rms for layer in quadratic], "tab:orange", "o"),
        "first order, rms": (list(map(_first_rms, quadratic)), "tab:blue", "o"),
    }
    for label, (values, color, marker) in series.items():
        drawn = [(x, y) for y, x in enumerate(values) if math.isfinite(x) and x > 0]
        if drawn:
            axis.plot(*zip(*drawn, strict=True), marker, color=color, label=label, ms=7, mew=1.5)
    for y, layer in enumerate(quadratic):
        if not math.isfinite(layer.product_rms):
            text = dict(fontsize=7, color="red", va="center", transform=axis.get_yaxis_transform())
            axis.text(0.01, y, "not finite", **text)
    axis.set_xscale("log", subs=[2, 5])
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("{x:g}")
    axis.set_xlabel("value before the norm and activation")
    axis.grid(alpha=0.3, axis="x", which="both")
    figure.legend(loc="outside upper center", ncols=3, fontsize=8)
    return figure


def _first_rms(layer: LayerAnalysis) -> float:
    return math.sqrt(sum(layer.moments.get(kind, 0.0) for kind in FIRST_ORDER))


def spectra(found: Analysis):
    """The eigenvalues of each feature's quadratic form, features by their largest one."""
    quadratic = [layer for layer in found.layers if layer.spectrum is not None]
    if not quadratic:
        return None
    lines = -(-len(quadratic) // SPECTRA_A_ROW)
    figure = new_figure(11, 0.5 + 2.3 * lines)
    axes = figure.subplots(lines, SPECTRA_A_ROW, squeeze=False).ravel()
    for axis, layer in zip(axes, quadratic, strict=False):
        _draw_spectrum(axis, layer)
    for axis in axes[len(quadratic) :]:
        axis.set_axis_off()
    figure.supxlabel("output features, by their largest eigenvalue", fontsize=9)
    figure.supylabel("eigenvalues", fontsize=9)
    return figure


def _draw_spectrum(axis, layer: LayerAnalysis) -> None:
    spectrum = layer.spectrum
    values = spectrum.eigenvalues[np.argsort(-spectrum.eigenvalues[:, 0])]
    shown, width = values.shape
    axis.vlines(range(shown), values[:, -1], values[:, 0], color="lightgray", lw=0.8)
    x = np.repeat(np.arange(shown), width)
    size = 12 if width <= 8 else 3
    axis.scatter(x, values, c=np.sign(values), cmap="coolwarm", s=size, lw=0, vmin=-1, vmax=1)
    axis.axhline(0, color="black", lw=0.6)
    low, high = spectrum.rank.min(), spectrum.rank.max()
    rank = f"rank {low}" if low == high else f"rank {low} to {high}"
    few = "" if shown == spectrum.features else f", {shown} of {spectrum.features} features"
    axis.set_title(f"{layer.name} ({layer.neuron})\nn = {spectrum.inputs}, {rank}{few}", fontsize=8)
    axis.tick_params(labelsize=7)


def beside_reference(found: Analysis, reference: Reference):
    """Activations of the layers that another net has too, beside that net's, on one scale a row."""
    both = [layer for layer in found.layers if layer.name in reference.activations]
    if not both:
        return None
    names = [layer.name for layer in both]
    figure = new_figure(9, 0.6 + 0.95 * len(names))
    axes = grid(figure, names, ["activations", "activations of the reference"], sharex="row")
    for row, layer in zip(axes, both, strict=True):
        _draw_histograms(row[0], {"": layer.activations}, {"": "tab:orange"})
        _draw_histograms(row[1], {"": reference.activations[layer.name]}, {"": "tab:blue"})
    figure.supxlabel(SCALE, fontsize=9)
    return figure
