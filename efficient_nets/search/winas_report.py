"""What `--mode=search` leaves to read: a table, a picture, JSON and a config."""

import pathlib
from typing import Any

from ml_collections import ConfigDict

from efficient_nets import reporting
from efficient_nets.analysis import figures
from efficient_nets.search import config_file


def write(report: dict[str, Any], workdir: pathlib.Path) -> None:
    """winas.json, winas.txt and plots/winas.png; prints the table."""
    reporting.write_report(workdir, "winas", report, table(report), plot)
    print(f"chosen net   {workdir / 'built_config.py'}", flush=True)


def write_config(config: ConfigDict, report: dict[str, Any], workdir: pathlib.Path) -> None:
    """built_config.py, which trains what was chosen."""
    path = workdir / "built_config.py"
    docstring = "\n".join(
        [
            f"An algorithm and a precision for each layer, by wiNAS: {_share(report)}.",
            "",
            f"    python -m efficient_nets.main --config={path} --workdir={workdir / 'built'}",
            "",
            "Chosen by --mode=search; it is trained anew, not from the weights of the search.",
            "",
        ]
    )
    path.write_text(config_file.source(config, docstring))


def _share(report: dict[str, Any]) -> str:
    return f"{report['chosen_cost']:.2%} of the {report['cost']} of direct convolutions in float"


def table(report: dict[str, Any]) -> str:
    """A line a layer: its most probable candidate, how probable, and its share of the cost.

    Costs are shares of what all searched layers cost where they are direct and in float; behind the
    chosen one's is the layer's expected one.
    """
    rows = [("layer", "candidate", "probability", "cost", "expected")]
    for name, layer in report["layers"].items():
        index = report["candidates"].index(layer["chosen"])
        pairs = zip(layer["probabilities"], layer["costs"], strict=True)
        expected = sum(p * cost for p, cost in pairs)
        numbers = (layer["probabilities"][index], layer["costs"][index], expected)
        rows.append((name, layer["chosen"], *(f"{number:.2%}" for number in numbers)))
    totals = (report["chosen_cost"], report["expected_cost"])
    rows.append(("all of them", "", "", *(f"{number:.2%}" for number in totals)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if place < 2 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    rule = "-" * max(map(len, lines))
    scores = "  ".join(
        f"{name} {value:.2%}"
        for name, value in report["shared_weights"].items()
        if name.endswith("accuracy")
    )
    end = [rule, lines[-1], f"Chosen: {_share(report)}. With the search's own weights: {scores}"]
    return "\n".join([lines[0], rule, *lines[1:-1], *end])


def plot(report: dict[str, Any], path: pathlib.Path) -> None:
    """Probabilities by layer and candidate, the chosen ones framed; and the course of the cost."""
    from matplotlib.patches import Rectangle  # the import costs more than half a second

    names, candidates = list(report["layers"]), report["candidates"]
    values = [layer["probabilities"] for layer in report["layers"].values()]
    width, height = 4.5 + 0.62 * len(candidates), 5.2 + 0.3 * len(names)
    figure = figures.new_figure(width, height)
    axes, below = figure.subplots(2, 1, height_ratios=[0.5 + 0.3 * len(names), 2.2])
    image = axes.imshow(values, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for row, layer in enumerate(report["layers"].values()):
        for column, value in enumerate(layer["probabilities"]):
            color = "white" if value > 0.6 else "black"
            axes.text(
                column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color
            )
        column = candidates.index(layer["chosen"])
        frame = dict(fill=False, edgecolor="tab:red", linewidth=1.5)
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, **frame))
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xticks(range(len(candidates)), candidates, rotation=35, ha="right", fontsize=7)
    axes.set_title("Probability of each candidate, chosen ones framed", fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.9)
    epochs = [record["epoch"] for record in report["history"]]
    expected = [record["expected_cost"] for record in report["history"]]
    below.plot(epochs, expected, marker=".")
    below.set_ylabel(f"expected {report['cost']}\n(direct in float: 1)", fontsize=8)
    below.set_xlabel("epoch")
    below.set_ylim(0, 1.05 * max(1, *expected))
    below.grid(alpha=0.3)
    figure.savefig(path)
