"""Pictures of what layers make of one image: channels side by side, layers from top to bottom."""

import numpy as np

from efficient_nets.analysis.analyze import Analysis
from efficient_nets.analysis.figures import grid, new_figure
from efficient_nets.analysis.reference import Reference

WIDTH = 48  # of a map, in pixels, at least
FEW = 6  # channels, where two orders share a line


def mosaic(maps: np.ndarray) -> np.ndarray:
    """Channels side by side, with a gap of NaN between them: `(*spatial, C)` to two axes.

    A vector `(C,)` is a line of C pixels; of one spatial axis each channel is a line of its own; of
    three the middle of the first one is taken.
    """
    if maps.ndim == 1:
        return maps[None]
    if maps.ndim == 2:
        return maps.T
    if maps.ndim > 3:
        return mosaic(maps[len(maps) // 2])
    # A pixel becomes several, so that the gap is as narrow beside small maps as beside large ones.
    maps = maps.repeat(max(WIDTH // maps.shape[1], 1), axis=1)
    height, width, channels = maps.shape
    gap = max(width // 12, 1)
    padded = np.pad(maps, ((0, 0), (0, gap), (0, 0)), constant_values=np.nan)
    return np.moveaxis(padded, -1, 1).reshape(height, channels * (width + gap))[:, :-gap]


def _show(axis, maps: np.ndarray, **options) -> None:
    """Every map as wide as any other of the figure, whatever its resolution."""
    picture = mosaic(maps)
    # Stretched to the axis, so that small maps of late layers are as large as those of early ones.
    axis.imshow(picture, aspect="auto", interpolation="nearest", **options)
    axis.set_xticks([])
    axis.set_yticks([])
    for side in axis.spines.values():
        side.set_visible(False)


def _finite_range(*maps: np.ndarray | None) -> tuple[float, float]:
    values = np.concatenate([m[np.isfinite(m)].ravel() for m in maps if m is not None] + [[0.0]])
    return float(values.min()), float(values.max())


def _beside(axis, text: str) -> None:
    axis.text(1.005, 0.5, text, transform=axis.transAxes, fontsize=7, va="center")


def _height(image: np.ndarray, width: float) -> float:
    """Of a line of maps this wide each, in inches."""
    return width * (image.shape[0] / image.shape[1] if image.ndim == 3 else 0.5)


def feature_maps(found: Analysis):
    """The first image, and each layer's first channels for it, on a scale a layer."""
    most = max(layer.map.shape[-1] for layer in found.layers)
    width = 9 / most
    height = 0.08 + _height(found.image, width)
    figure = new_figure(11, 0.5 + height * (1 + len(found.layers)))
    names = ["image", *(layer.name for layer in found.layers)]
    shown = [found.image, *(layer.map for layer in found.layers)]
    axes = grid(figure, names, ["first channels, for the first image"])[:, 0]
    for axis, maps in zip(axes, shown, strict=True):
        low, high = _finite_range(maps)
        _show(axis, _filled(maps, most), vmin=low, vmax=high)
        _beside(axis, f"{low:.3g} to {high:.3g}")
    return figure


def _filled(maps: np.ndarray, channels: int) -> np.ndarray:
    """Maps with spatial axes get empty channels, so that all layers' are of one size."""
    missing = channels - maps.shape[-1]
    if maps.ndim < 3 or missing <= 0:
        return maps
    return np.pad(maps, [(0, 0)] * (maps.ndim - 1) + [(0, missing)], constant_values=np.nan)


def first_and_second_order(found: Analysis):
    """The terms of second order beside those of first, for the first image.

    On one scale a layer, blue below 0 and red above; None for a net without terms of second order.
    """
    quadratic = [layer for layer in found.layers if layer.second_map is not None]
    if not quadratic:
        return None
    height = 0.08 + _height(found.image, 5 / FEW)
    figure = new_figure(12.5, 0.5 + height * len(quadratic))
    figure.get_layout_engine().set(wspace=0.06)
    titles = ["second order (products, squares)", "first order (linear)"]
    axes = grid(figure, [layer.name for layer in quadratic], titles)
    for row, layer in zip(axes, quadratic, strict=True):
        largest = max(map(abs, _finite_range(layer.second_map, layer.first_map)))
        for axis, maps in zip(row, (layer.second_map, layer.first_map), strict=True):
            if maps is None:
                axis.set_axis_off()
                axis.text(0.5, 0.5, "none", ha="center", va="center", fontsize=8)
            else:
                maps = _filled(maps[..., :FEW], FEW)
                _show(axis, maps, cmap="RdBu_r", vmin=-largest, vmax=largest)
        _beside(row[1], f"within ±{largest:.3g}")
    return figure


def kernel_maps(found: Analysis):
    """Kernels beside their gradients, a line a branch; each on a scale of its own.

    Blue below 0 and red above. Of the first input channel, to the first output channels.
    """
    lines = [(layer, branch) for layer in found.layers for branch in layer.weight_maps]
    figure = new_figure(12.5, 0.5 + 0.62 * len(lines))
    figure.get_layout_engine().set(wspace=0.12)
    names = [f"{layer.name} {branch}" for layer, branch in lines]
    axes = grid(figure, names, ["weights", "gradients of the loss"])
    for row, (layer, branch) in zip(axes, lines, strict=True):
        pair = layer.weight_maps[branch], layer.gradient_maps[branch]
        for axis, maps in zip(row, pair, strict=True):
            largest = max(map(abs, _finite_range(maps))) or 1.0
            maps = _filled(maps[..., :FEW], FEW) if maps.ndim > 2 else maps
            _show(axis, maps, cmap="RdBu_r", vmin=-largest, vmax=largest)
            _beside(axis, f"within\n±{largest:.3g}")
    return figure


def beside_reference(found: Analysis, reference: Reference):
    """The outputs of the layers that another net has too, beside that net's, for its first image.

    Each on a scale of its own; None where no layer is in both.
    """
    both = [layer for layer in found.layers if layer.name in reference.maps]
    if not both:
        return None
    height = 0.08 + _height(found.image, 5 / FEW)
    figure = new_figure(13.5, 0.5 + height * (1 + len(both)))
    figure.get_layout_engine().set(wspace=0.1)
    names = ["image", *(layer.name for layer in both)]
    axes = grid(figure, names, ["outputs", "outputs of the reference"])
    shown = [(found.image, reference.image)]
    shown += [(layer.map, reference.maps[layer.name]) for layer in both]
    for row, pair in zip(axes, shown, strict=True):
        for axis, maps in zip(row, pair, strict=True):
            low, high = _finite_range(maps)
            _show(axis, _filled(maps[..., :FEW], FEW), vmin=low, vmax=high)
            _beside(axis, f"{low:.3g} to\n{high:.3g}")
    return figure
