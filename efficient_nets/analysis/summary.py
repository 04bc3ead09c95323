"""The layer table that a run prints first, and the same figures for scripts."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

from flax import nnx

from efficient_nets.analysis.cost import LayerCost, model_cost

HEADER = (
    *("name", "parameter", "input", "neuron", "kernel", "algorithm", "precision"),
    *("bits", "size", "share", "MACs", "BOPs"),
)
FIRST_NUMBER = HEADER.index("bits")  # numbers are flush right


def summary_dict(model: nnx.Module, image_shape: Sequence[int]) -> dict[str, Any]:
    """What summary.json holds: what `cost.model_cost` gives, with a dict a layer in `layers`.

    Args:
      model: See `cost.layer_costs`.
      image_shape: `(H, W, C)`.
    """
    cost = model_cost(model, image_shape)
    return cost | {"layers": [dataclasses.asdict(layer) for layer in cost["layers"]]}


def layer_table(model: nnx.Module, image_shape: Sequence[int]) -> str:
    """A text table with a line a layer in the order of the calls, and totals.

    `parameter` is the shape of a kernel, with `*3` where the neuron has three of it; `neuron` is
    `ours+branch` where its branches are normed; `bits` is that of weights and, behind a slash, of
    inputs if another, `o8` that of rounded outputs, `g6` of gradients; `size` is in the file for
    use, `share` of the net's; MACs and, where anything is rounded, bit operations (BOPs) are for
    one image. Arrays outside of these layers, such as the norms between them, share one line.

    Args:
      model: See `cost.layer_costs`.
      image_shape: `(H, W, C)`.
    """
    cost = model_cost(model, image_shape)
    size = cost["packed_bytes"]
    rows = [_row(layer, size) for layer in cost["layers"]]
    if others := size - sum(layer.packed_bytes for layer in cost["layers"]):
        rows.append(_sparse_row("other arrays", others, size))
    counts = (_short(cost["macs"]), _short(cost["bops"]))
    table = [HEADER, *rows, _sparse_row("total", size, size, counts)]
    rounded = any(layer.precision != "float" for layer in cost["layers"])
    if not rounded:
        table = [row[:-1] for row in table]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(_aligned(row, widths)).rstrip() for row in table]
    rule = "-" * max(map(len, lines))
    figures = f"{cost['params']:,} parameters, {cost['macs']:,} MACs"
    if rounded:
        figures += f", {_short(cost['bops'])} bit operations"
    if size != cost["bytes"]:
        figures += f", {size:,} of {cost['bytes']:,} bytes"
    figures += f" for an image of {_shape(image_shape)}"
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1], figures])


def _row(layer: LayerCost, total_bytes: int) -> tuple[str, ...]:
    counts = Counter(layer.kernels)
    shapes = [_shape(s) + (f" *{count}" if count > 1 else "") for s, count in counts.items()]
    return (
        layer.name,
        " + ".join(shapes),
        _shape(layer.input_shape),
        layer.neuron if layer.norm == "none" else f"{layer.neuron}+{layer.norm}",
        layer.kernel,
        layer.algorithm,
        layer.precision,
        _bits(layer),
        _size(layer.packed_bytes),
        _share(layer.packed_bytes, total_bytes),
        _short(layer.macs),
        _short(layer.bops),
    )


def _bits(layer: LayerCost) -> str:
    """`32`, `2/4`, `4 o8 g6`."""
    shown = str(layer.bits)
    if layer.input_bits != layer.bits:
        shown += f"/{layer.input_bits}"
    others = (("o", layer.output_bits), ("g", layer.gradient_bits))
    return shown + "".join(f" {letter}{bits}" for letter, bits in others if bits)


def _sparse_row(name: str, size: int, whole: int, counts=("", "")) -> tuple[str, ...]:
    gap = ("",) * (len(HEADER) - 5)
    return (name, *gap, _size(size), _share(size, whole), *counts)


def _aligned(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [
        cell.ljust(width) if index < FIRST_NUMBER else cell.rjust(width)
        for index, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _three_digits(value: float) -> str:
    """`1.69`, `27.0`, `434`: three digits, or all those before the point."""
    return f"{value:.{max(3 - len(str(int(value))), 0)}f}"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%"


def _size(size: int) -> str:
    """Bytes in KiB or MiB."""
    unit, scale = ("MiB", 2**20) if size >= 2**20 else ("KiB", 2**10)
    return f"{_three_digits(size / scale)} {unit}"


def _short(count: int) -> str:
    """A count in thousands, millions or billions: `4.72 M`."""
    for unit, scale in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= scale:
            return f"{_three_digits(count / scale)} {unit}"
    return str(count)
