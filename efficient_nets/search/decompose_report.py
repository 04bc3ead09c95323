"""What `--mode=decompose` leaves to read: a table, a picture, JSON and a config."""

import pathlib
from typing import Any

from ml_collections import ConfigDict

from efficient_nets import reporting
from efficient_nets.search import config_file

HEADER = ("layer", "kernel", "parameters", "share", "error")


def write(report: dict[str, Any], workdir: pathlib.Path) -> None:
    """decompose.json, decompose.txt and plots/decompose.png; prints the table."""
    reporting.write_report(workdir, "decompose", report, table(report), plot)
    print(f"chosen net   {workdir / 'built_config.py'}", flush=True)


def write_config(config: ConfigDict, report: dict[str, Any], workdir: pathlib.Path) -> None:
    """built_config.py, which trains the net from its cores."""
    path = workdir / "built_config.py"
    share = report["factorized_cost"]["params"] / report["dense_cost"]["params"]
    lines = (
        f"Factorized kernels of a trained net, with {share:.2%} of its parameters.",
        "",
        f"    python -m efficient_nets.main --config={path} --workdir={workdir / 'built'}",
        "",
        "Ranks by --mode=decompose; trained from the cores of the net that was decomposed.",
        "",
    )
    config_file.write(path, config, lines)


def table(report: dict[str, Any]) -> str:
    """A line a layer, and what becomes of the net; errors are relative, in Frobenius norms."""
    rows = []
    for name, found in report["layers"].items():
        share = found["params"] / found["dense_params"]
        rows.append(
            (name, found["kernel"], f"{found['params']:,}", f"{share:.1%}", f"{found['error']:.3f}")
        )
    rows += [(name, "dense: no gain", "", "", "") for name in report["dense"]]
    found = verdict(
        report["dense_cost"], report["factorized_cost"], report["before"], report["after"]
    )
    return ruled(HEADER, rows, found)


def ruled(header: tuple[str, ...], rows: list[tuple[str, ...]], verdict: str) -> str:
    """A table of lines, two columns of words and others of numbers, with rules around them."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = ["  ".join(_aligned(row, widths)).rstrip() for row in (header, *rows)]
    rule = "-" * max(map(len, lines))
    return "\n".join([lines[0], rule, *lines[1:], rule, verdict])


def _aligned(row, widths) -> list[str]:
    pairs = zip(row, widths, strict=True)
    return [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(pairs)]


def verdict(large: dict, small: dict, before: dict, after: dict) -> str:
    """What becomes of a net: its costs, and its scores while nothing is trained."""
    counts = "  ".join(
        f"{name} {small[key]:,} of {large[key]:,}"
        for name, key in (("parameters", "params"), ("MACs", "macs"))
    )
    scores = "  ".join(
        f"{name} {before[name]:.2%} before, {after[name]:.2%} after"
        for name in before
        if name.endswith("accuracy")
    )
    return f"{counts}\n{scores}, nothing being trained"


def plot(report: dict[str, Any], path: pathlib.Path) -> None:
    """The error of each layer by its share of the parameters; what was chosen is ringed."""
    from matplotlib.figure import Figure  # the import costs more than half a second

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for name, found in report["layers"].items():
        shares = [float(share) for share in found["errors"]]
        (line,) = axes.plot(shares, found["errors"].values(), marker=".", label=name, alpha=0.8)
        axes.plot(
            [found["params"] / found["dense_params"]],
            [found["error"]],
            **dict(marker="o", markersize=10, markerfacecolor="none", linestyle=""),
            color=line.get_color(),
        )
    axes.set_xlabel("share of the dense kernel's parameters")
    axes.set_ylabel("relative error of the kernel")
    axes.set_ylim(bottom=0)
    axes.set_title("Kernels as cores, before training; ringed: chosen", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2 if len(report["layers"]) > 8 else 1)
    figure.savefig(path)
