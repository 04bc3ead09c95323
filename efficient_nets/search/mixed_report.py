"""What `--mode=sensitivity` leaves to read: a table, a picture, JSON and a config."""

import pathlib
from typing import Any

from ml_collections import ConfigDict

from efficient_nets import reporting
from efficient_nets.search import config_file

LOWEST = 1e-4  # loss below which the picture shows no difference


def write(report: dict[str, Any], workdir: pathlib.Path) -> None:
    """sensitivity.json, sensitivity.txt and plots/sensitivity.png; prints the table."""
    reporting.write_report(workdir, "sensitivity", report, table(report), plot)
    if "assignment" in report:
        print(f"chosen net   {workdir / 'built_config.py'}", flush=True)


def write_config(config: ConfigDict, report: dict[str, Any], workdir: pathlib.Path) -> None:
    """built_config.py, which trains what was chosen."""
    of = report["assignment"]
    path = workdir / "built_config.py"
    whole = report["costs"]["float"][of["budget"]]
    docstring = "\n".join(
        [
            f"A precision for each layer, {of['costs'][of['budget']] / whole:.2%} of the float "
            f"net's {of['budget']}.",
            "",
            f"    python -m efficient_nets.main --config={path} --workdir={workdir / 'built'}",
            "",
            f"Chosen by --mode=sensitivity from {', '.join(report['choices'])}; trained from the "
            "net in float.",
            "",
        ]
    )
    workdir.mkdir(parents=True, exist_ok=True)
    path.write_text(config_file.source(config, docstring))


def table(report: dict[str, Any]) -> str:
    """A line a layer: how much each choice alone lowers the accuracy and raises the loss.

    In percentage points and in nats; `*` marks what was chosen.
    """
    before, chosen = report["float"], report.get("assignment", {}).get("layers", {})
    rows = [("layer", *report["choices"])]
    for name, own in report["layers"].items():
        cells = [
            _change(own[choice], before) + ("*" if chosen.get(name) == choice else " ")
            for choice in report["choices"]
        ]
        rows.append((name, *cells))
    totals = [("all of them", *(_change(report["all"][c], before) + " " for c in rows[0][1:]))]
    for budget in ("packed_bytes", "bops"):
        whole = report["costs"]["float"][budget]
        shares = (report["costs"]["all"][choice][budget] / whole for choice in report["choices"])
        totals.append((budget, *(f"{share:.2%} " for share in shares)))
    widths = [max(map(len, column)) for column in zip(*rows, *totals, strict=True)]
    lines = ["  ".join(_aligned(row, widths)).rstrip() for row in (*rows, *totals)]
    rule = "-" * max(map(len, lines))
    end = [rule, *lines[len(rows) :], _verdict(report)]
    return "\n".join([lines[0], rule, *lines[1 : len(rows)], *end])


def _aligned(row, widths) -> list[str]:
    first, *others = zip(row, widths, strict=True)
    return [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]


def _change(scores: dict[str, float], before: dict[str, float]) -> str:
    accuracy = 100 * (scores["accuracy"] - before["accuracy"])
    return f"{accuracy:+.2f} ({scores['loss'] - before['loss']:+.4f})"


def _verdict(report: dict[str, Any]) -> str:
    text = f"Accuracy in float {report['float']['accuracy']:.2%} on {report['images']} images."
    if "assignment" not in report:
        return text
    of = report["assignment"]
    share = of["costs"][of["budget"]] / report["costs"]["float"][of["budget"]]
    return (
        f"{text} Chosen: {share:.2%} of {of['budget']} (budget {of['keep']:.2%}), accuracy "
        f"{of['before_training']['accuracy']:.2%} before training."
    )


def plot(report: dict[str, Any], path: pathlib.Path) -> None:
    """The loss that each layer alone adds, by choice; what was chosen is ringed."""
    from matplotlib.figure import Figure  # the import costs more than half a second

    layers, before = list(report["layers"]), report["float"]["loss"]
    width = min(4 + 0.35 * len(layers), 40)
    figure = Figure(figsize=(width, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for choice in report["choices"]:
        added = [max(report["layers"][name][choice]["loss"] - before, LOWEST) for name in layers]
        (line,) = axes.plot(range(len(layers)), added, marker="o", label=choice, alpha=0.8)
        ringed = [
            place
            for place, name in enumerate(layers)
            if report.get("assignment", {}).get("layers", {}).get(name) == choice
        ]
        axes.plot(
            ringed,
            [added[place] for place in ringed],
            **dict(linestyle="", marker="o", markersize=12, markerfacecolor="none"),
            color=line.get_color(),
        )
    axes.set_yscale("log")
    axes.set_xticks(range(len(layers)), layers, rotation=60, ha="right", fontsize=8)
    axes.set_ylabel(f"loss added on {report['images']} images ({LOWEST:g}: none)")
    ring = ", ringed: chosen" if "assignment" in report else ""
    axes.set_title(f"Each layer rounded alone{ring}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path)
