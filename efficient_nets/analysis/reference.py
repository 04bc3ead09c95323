"""Another net to compare with: what is kept of an analysis for that, in files of its workdir.

`analysis_maps.npz` holds the first image as `image`, the L layers' `names`, and for the layer of
index i `map_i`, its first channels for that image, `(*spatial, channels)`.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping

import numpy as np

from efficient_nets.analysis.analyze import Analysis
from efficient_nets.analysis.histogram import Histogram
from efficient_nets.errors import UserError

NUMBERS, MAPS = "analysis.json", "analysis_maps.npz"
CHANNELS = 6  # of which maps are kept


@dataclasses.dataclass(frozen=True)
class Reference:
    """An analysed net: its first image, and by layer histograms of activations, and maps."""

    image: np.ndarray
    activations: dict[str, Histogram]
    maps: dict[str, np.ndarray]


def save_maps(found: Analysis, workdir: pathlib.Path) -> None:
    """Writes `analysis_maps.npz`, whole or not at all."""
    maps = {f"map_{i}": layer.map[..., :CHANNELS] for i, layer in enumerate(found.layers)}
    temporary = workdir / "analysis_maps.tmp"
    with temporary.open("wb") as file:
        names = [layer.name for layer in found.layers]
        np.savez_compressed(file, image=found.image, names=names, **maps)
    temporary.replace(workdir / MAPS)


def read_reference(workdir: pathlib.Path) -> Reference:
    """Of a workdir that was analysed.

    Raises:
      UserError: if it has no analysis.json, or no analysis_maps.npz.
    """
    for name in (NUMBERS, MAPS):
        if not (workdir / name).is_file():
            raise UserError(f"--reference={workdir} holds no {name}: --mode=analyze writes it")
    layers = json.loads((workdir / NUMBERS).read_text())["layers"]
    with np.load(workdir / MAPS) as file:
        maps = {name: file[f"map_{i}"] for i, name in enumerate(file["names"].tolist())}
        image = file["image"]
    activations = {layer["name"]: _histogram(layer["activations"]) for layer in layers}
    return Reference(image, activations, maps)


def _histogram(plain: Mapping) -> Histogram:
    edges = np.linspace(plain["low"], plain["high"], len(plain["counts"]) + 1)
    rest = {name: plain[name] for name in ("mean", "std", "nonfinite")}
    return Histogram(edges, np.asarray(plain["counts"]), **rest)
