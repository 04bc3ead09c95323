"""What the auto-builder leaves to read: a table, a plot, JSON."""

import pathlib
from collections.abc import Sequence
from typing import Any

from efficient_nets import reporting

STOPPED = {
    "budget": "the budget is met",
    "floor": "the last round fell below the accuracy floor, so the one before is the answer",
    "diverged": "training the next net diverged",
    "candidates": "no layer is left that may go, and the budget is not met",
}
UNITS = {"params": "parameters", "macs": "MACs", "seconds": "seconds of a forward batch"}
COLUMNS = 4  # of RI panels


def write(report: dict[str, Any], workdir: pathlib.Path) -> None:
    """report.json, report.txt and plots/auto_builder.png; prints the table and where they are."""
    reporting.write_report(workdir, "report", report, table(report), plot, "auto_builder")
    print(f"weights      {workdir / 'round_'}{report['answer']}")
    print(f"built net    {workdir / 'built_config.py'}", flush=True)


def table(report: dict[str, Any]) -> str:
    """A line a round; `kept` is the share of the budgeted cost, `*` marks the answer."""
    kind, first = report["budget"]["kind"], report["budget"]["first"]
    header = ("round", "removed", "RI", "params", "MACs", "kept")
    header += ("validation", "test", "forward", "trained")
    rows = [header]
    for record, ri in zip(report["rounds"], _removed_ri(report), strict=True):
        mark = "*" if record["round"] == report["answer"] else ""
        rows.append(
            (
                f"{record['round']}{mark}",
                " ".join(record["removed"]) or "-",
                " ".join(f"{value:.3g}" for value in ri) or "-",
                f"{record['params']:,}",
                f"{record['macs']:,}",
                _percent(record[kind] / first),
                _percent(record["validation/accuracy"]),
                _percent(record.get("test/accuracy")),
                f"{1e3 * record['seconds']:.1f} ms",
                f"{record['train_seconds']:.0f} s",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(_aligned(row, widths)).rstrip() for row in rows]
    rule = "-" * max(map(len, lines))
    return "\n".join([lines[0], rule, *lines[1:], rule, _verdict(report)])


def _aligned(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [
        cell.ljust(width) if index == 1 else cell.rjust(width)
        for index, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]


def _verdict(report: dict[str, Any]) -> str:
    budget, record = report["budget"], report["rounds"][report["answer"]]
    kept, removed = record[budget["kind"]] / budget["first"], len(report["removed"])
    return (
        f"Built: the net of round {report['answer']}, without {removed} "
        f"layer{'' if removed == 1 else 's'}, with {_percent(kept)} of the "
        f"{UNITS[budget['kind']]} (budget {_percent(budget['keep'])}). "
        f"Stopped as {STOPPED[report['stopped']]}."
    )


def docstring(report: dict[str, Any], workdir: pathlib.Path) -> str:
    """Of built_config.py: what the net is, how to train it, how to evaluate the built weights."""
    record, here = report["rounds"][report["answer"]], workdir / "built_config.py"
    command = f"python -m efficient_nets.main --config={here}"
    return "\n".join(
        [
            f"The net of the auto-builder's round {report['answer']}.",
            "",
            f"    {command} --workdir={workdir / 'built'}",
            f"    {command} --mode=eval --checkpoint={workdir / 'round_'}{report['answer']}"
            f" --workdir={workdir / 'eval'}",
            "",
            "The first trains it from scratch, the second evaluates the weights of the round.",
            f"{record['params']:,} parameters, {record['macs']:,} MACs; validation accuracy "
            f"{_percent(record['validation/accuracy'])} there.",
            "",
        ]
    )


def plot(report: dict[str, Any], path: pathlib.Path) -> None:
    """Accuracy against the budgeted cost by round; below, RI by layer of each scored round."""
    from matplotlib.figure import Figure  # the import costs more than half a second

    scored = [record for record in report["rounds"] if "scores" in record]
    rows = -(-len(scored) // COLUMNS)
    layers = [score["layer"] for score in scored[0]["scores"]] if scored else []
    height = 0.6 + 0.22 * len(layers)
    figure = Figure(figsize=(11, 4 + rows * height), dpi=120, layout="constrained")
    if not rows:
        _draw_accuracy(figure.add_subplot(), report)
    else:
        top, bottom = figure.subfigures(2, 1, height_ratios=(4, rows * height))
        _draw_accuracy(top.add_subplot(), report)
        axes = bottom.subplots(rows, min(COLUMNS, len(scored)), sharex=True, sharey=True)
        panels = axes.ravel() if hasattr(axes, "ravel") else [axes]
        for axis in panels[len(scored) :]:
            axis.set_visible(False)
        for axis, record in zip(panels, scored, strict=False):
            after = report["rounds"][record["round"] + 1 :]  # none, where that diverged
            removed = after[0]["removed"] if after else []
            _draw_importance(axis, record, layers, removed)
    figure.savefig(path)


def _draw_accuracy(axes, report: dict[str, Any]) -> None:
    budget, rounds = report["budget"], report["rounds"]
    kept = [record[budget["kind"]] / budget["first"] for record in rounds]
    for split, color in (("validation", "tab:orange"), ("test", "tab:green")):
        if f"{split}/accuracy" in rounds[0]:
            values = [record[f"{split}/accuracy"] for record in rounds]
            axes.plot(kept, values, marker="o", color=color, label=split)
    for x, record in zip(kept, rounds, strict=True):
        text = "\n".join([f"round {record['round']}", *(f"- {name}" for name in record["removed"])])
        lowest = min(value for name, value in record.items() if name.endswith("/accuracy"))
        axes.annotate(  # slanted and below the curves, where neighbours leave each other room
            text,
            (x, lowest),
            xytext=(-2, -8),
            textcoords="offset points",
            ha="left",
            va="top",
            rotation=-40,
            rotation_mode="anchor",
            fontsize=7,
        )
    axes.axvline(budget["keep"], color="gray", linestyle="--", label="budget")
    if floor := report["builder"]["accuracy_floor"]:
        axes.axhline(floor, color="gray", linestyle=":", label="accuracy floor")
    answer = report["answer"]
    axes.plot(
        kept[answer],
        rounds[answer]["validation/accuracy"],
        **dict(marker="o", markersize=13, markerfacecolor="none", color="tab:red", linestyle=""),
        label="built net",
    )
    axes.margins(x=0.08, y=0.25)
    axes.invert_xaxis()
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    axes.set_xlabel(f"{UNITS[budget['kind']]} kept, of the first net's {amount(budget['first'])}")
    axes.set_ylabel("accuracy")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _draw_importance(axes, record: dict, layers: list[str], removed: list[str]) -> None:
    """Layers that are gone have no bar; those that go next are red."""
    found = {score["layer"]: score["ri"] for score in record["scores"]}
    places = [place for place, layer in enumerate(layers) if layer in found]
    colors = ["tab:red" if layers[place] in removed else "tab:blue" for place in places]
    axes.barh(places, [found[layers[place]] for place in places], color=colors)
    axes.set_xscale("log")
    axes.set_yticks(range(len(layers)), layers, fontsize=7)
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.set_title(f"RI after round {record['round']}", fontsize=9)
    axes.grid(alpha=0.3, axis="x")


def _removed_ri(report: dict[str, Any]) -> list[list[float]]:
    """For each round, RI of the layers that it removed, as scored after the round before."""
    found = [[]]
    for before, record in zip(report["rounds"], report["rounds"][1:], strict=False):
        ri = {score["layer"]: score["ri"] for score in before["scores"]}
        found.append([ri[layer] for layer in record["removed"]])
    return found


def amount(cost: float) -> str:
    """A number of parameters or MACs, or seconds."""
    return f"{cost:,}" if isinstance(cost, int) else f"{cost:.3g}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}%"
