"""What `--mode=analyze` leaves: numbers, maps, plots/analysis/, tensorboard/analysis/, a table."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from efficient_nets.analysis.analyze import Analysis, LayerAnalysis
from efficient_nets.analysis.histogram import Histogram
from efficient_nets.analysis.plots import plot_analysis
from efficient_nets.analysis.reference import NUMBERS, Reference, save_maps

DIGITS = 7  # significant ones, of float32


def as_dict(found: Analysis) -> dict[str, Any]:
    """All numbers but the images' as plain values: what analysis.json holds. NaN is None."""
    return _plain(
        {
            "loss": found.loss,
            "images": found.images,
            "layers": [_layer_dict(layer) for layer in found.layers],
        }
    )


def _layer_dict(layer: LayerAnalysis) -> dict[str, Any]:
    histograms = {
        "activations": _histogram_dict(layer.activations),
        "weights": {name: _histogram_dict(h) for name, h in layer.weights.items()},
        "gradients": {name: _histogram_dict(h) for name, h in layer.gradients.items()},
    }
    spectrum = None if layer.spectrum is None else dataclasses.asdict(layer.spectrum)
    fields = ("name", "neuron", "norm", "shares", "cross", "moments", "moment")
    more = ("product_max", "product_rms", "nonfinite")
    plain = {field: getattr(layer, field) for field in fields + more}
    return plain | {"spectrum": spectrum} | histograms


def _histogram_dict(histogram: Histogram) -> dict[str, Any]:
    edges = {"low": histogram.edges[0], "high": histogram.edges[-1]}
    return edges | {k: v for k, v in dataclasses.asdict(histogram).items() if k != "edges"}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value


def write_analysis(
    found: Analysis,
    workdir: pathlib.Path,
    step: int = 0,
    reference: Reference | None = None,
) -> list[pathlib.Path]:
    """Writes numbers, maps, pictures and TensorBoard events of an analysis; returns the pictures.

    Args:
      step: Of the checkpoint.
      reference: Another net, see `read_reference`.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    temporary = workdir / f"{NUMBERS}.tmp"
    temporary.write_text(json.dumps({"step": step} | as_dict(found)) + "\n")
    temporary.replace(workdir / NUMBERS)
    save_maps(found, workdir)
    pictures = plot_analysis(found, workdir / "plots" / "analysis", reference)
    _write_events(found, pictures, workdir / "tensorboard" / "analysis", step)
    return pictures


def _write_events(found: Analysis, pictures, folder: pathlib.Path, step: int) -> None:
    from PIL import Image
    from tensorboardX import SummaryWriter  # slow to import

    with SummaryWriter(str(folder)) as board:
        for path in pictures:
            pixels = np.asarray(Image.open(path).convert("RGB"))
            board.add_image(f"analysis/{path.stem}", pixels, step, dataformats="HWC")
        for layer in found.layers:
            add_histogram(board, f"activations/{layer.name}", layer.activations, step)
            for kind in ("weights", "gradients"):
                for branch, histogram in getattr(layer, kind).items():
                    add_histogram(board, f"{kind}/{layer.name}/{branch}", histogram, step)


def add_histogram(board, name: str, histogram: Histogram, step: int) -> None:
    """Writes a histogram to a tensorboardX SummaryWriter."""
    count = int(histogram.counts.sum())
    board.add_histogram_raw(
        name,
        min=float(histogram.edges[0]),
        max=float(histogram.edges[-1]),
        num=count,
        sum=histogram.mean * count,
        sum_squares=(histogram.std**2 + histogram.mean**2) * count,
        bucket_limits=histogram.edges[1:].tolist(),
        bucket_counts=histogram.counts.tolist(),
        global_step=step,
    )


def analysis_table(found: Analysis) -> str:
    """A line a layer: the terms' shares, products, rank, and what is not finite."""
    header = ("name", "neuron", "shares", "cross", "product rms", "max", "rank", "not finite")
    table = [header, *map(_row, found.layers)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    padded = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
    figures = f"loss {found.loss:.4f} in training mode, {found.images} images"
    return "\n".join([padded[0], "-" * max(map(len, padded)), *padded[1:], figures])


def _row(layer: LayerAnalysis) -> tuple[str, ...]:
    several, products = len(layer.moments) > 1, layer.second_map is not None
    rank = ""
    if layer.spectrum is not None:
        rank = f"{layer.spectrum.rank.mean():.3g} of {layer.spectrum.inputs}"
    return (
        layer.name,
        layer.neuron,
        " + ".join(f"{kind} {share:.0%}" for kind, share in layer.shares.items()),
        f"{layer.cross:+.2f}" if several else "",
        f"{layer.product_rms:.3g}" if products else "",
        f"{layer.product_max:.3g}" if products else "",
        rank,
        ", ".join(f"{name} {count:,}" for name, count in layer.nonfinite.items() if count),
    )
