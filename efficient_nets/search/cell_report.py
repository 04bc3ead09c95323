"""What a search for an architecture tells as it goes on, and what it leaves to read."""

import math
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from efficient_nets import reporting
from efficient_nets.analysis import figures
from efficient_nets.errors import TrainingDiverged
from efficient_nets.search import cell_drawing, config_file

LINE_EVERY = 10  # updates
SHORT = {"learning_rate": "lr", "gradient_norm": "|g|"}


def space_line(search) -> str:
    """What is searched, in a line or two."""
    space, config = search.space, search.run.config
    shared = ", one for all operands" if space.shared_precision else ""
    params = sum(x.size for x in jax.tree.leaves(search.run.abstract.params))
    return (
        f"space: 2 cells of {space.nodes} nodes; ops {', '.join(space.ops)}; precisions "
        f"{', '.join(space.precisions)}{shared}; {space.size:.3g} architectures\n"
        f"shared net: {config.model.layers + 2} cells, {params:,} parameters; strategy "
        f"{config.search.strategy}; {config.search.cost} {search.mean_cost:,.4g} on "
        f"average, target {search.target:,.4g}"
    )


class Log:
    """Lines, metrics and the history of a search.

    Args:
      search: A `cell_steps.Search`.
      reporter: Gets lines and scalars.
      meta: What `meta()` gave when the checkpoint was saved that the search goes on from.
    """

    def __init__(self, search, reporter: reporting.Reporter, meta: Mapping):
        self._search, self._reporter = search, reporter
        self._history = list(meta.get("history", []))
        self._measured = meta.get("architectures", 0)
        self._timed, self._seconds = meta.get("timed", (0, 0.0))
        self._means, self._summed = dict(meta.get("means", {})), meta.get("summed_updates", 0)
        self._begin = time.perf_counter() - meta.get("seconds", 0.0)
        self._updates = meta.get("updates", 0)
        self._pending: list[tuple[int, Mapping]] = []
        self._is_first = True

    def training_line(self, step: int, means: Mapping[str, float]) -> str:
        """Of the shared weights, over the last steps."""
        shown = {name: means[name] for name in ("loss", "learning_rate", "gradient_norm")}
        return (
            f"epoch {step / self._search.run.epoch_steps:.2f}  step {step:,}  {_values(shown)}  "
            f"train accuracy {means['accuracy']:.2%}  minutes {self._minutes():.1f}"
        )

    def _minutes(self) -> float:
        return (time.perf_counter() - self._begin) / 60

    def push(self, step: int, metrics: Mapping) -> None:
        """Takes the metrics of an update or a step of the strategy, which may be on their way."""
        self._pending.append((step, metrics))

    def timed(self, seconds: float) -> None:
        """Counts what the updates of a phase took, all of them settled."""
        options = self._search.run.config.search
        measured = options.updates * options.proposals
        self._measured += measured
        if not self._is_first:  # which compiles
            self._timed += measured
            self._seconds += seconds
        self._is_first = False

    def settle(self, but: int = 0) -> None:
        """Waits for all metrics but so many of the last ones.

        Raises:
          TrainingDiverged: if the gradient to a strategy's logits is not finite.
        """
        taken = len(self._pending) - but
        found, self._pending = jax.device_get(self._pending[:taken]), self._pending[taken:]
        for step, one in found:
            one = {name: float(value) for name, value in one.items()}
            self._updates += 1
            if self._search.by_gradient and not all(map(math.isfinite, one.values())):
                raise TrainingDiverged(f"step {self._updates} of the strategy gives {one}")
            for name, value in one.items():
                self._means[name] = self._means.get(name, 0.0) + value
            self._summed += 1
            if self._updates % LINE_EVERY == 0 and not self._search.by_gradient:
                self._reporter.line(f"  update {self._updates:,}  {_values(one)}")
                of_one = {f"update/{name}": value for name, value in one.items()}
                self._reporter.record(step, {"update": self._updates, **of_one})

    def evaluation(self, step: int, architectures, accuracies, scores: dict) -> dict[str, float]:
        """Prints some architectures and the scores of the best; keeps them; gives the scores."""
        space, run = self._search.space, self._search.run
        self.settle()
        means = {name: total / self._summed for name, total in self._means.items()}
        self._means, self._summed = {}, 0
        epoch = step / run.epoch_steps
        lines = [f"Here are {len(architectures)} architectures"]
        for tokens, accuracy in zip(architectures, accuracies, strict=True):
            lines += [*space.lists(tokens), f"val_acc={accuracy:.4f}", "-" * 8]
        lines.append(
            f"{reporting.evaluation_line(epoch, step, scores)}  minutes {self._minutes():.1f}"
        )
        if means:
            lines.insert(0, f"strategy  {_values(means)}")
        self._reporter.line("\n".join(lines))
        best = architectures[accuracies.argmax()]
        record = {
            "step": step,
            "epoch": epoch,
            "arc": space.text(best),
            "shown": [
                {"arc": space.text(tokens), "val_acc": float(accuracy)}
                for tokens, accuracy in zip(architectures, accuracies, strict=True)
            ],
            "shown_accuracy": float(np.mean(accuracies)),
            **scores,
            **{f"strategy/{name}": value for name, value in means.items()},
        }
        self._history.append(record)
        texts = ("step", "epoch", "arc", "shown")
        self._reporter.scalars(step, {n: x for n, x in record.items() if n not in texts})
        self._reporter.record(step, {"architectures": record["shown"]})
        return scores

    def meta(self) -> dict[str, Any]:
        self.settle()
        return {
            "updates": self._updates,
            "history": self._history,
            "architectures": self._measured,
            "timed": (self._timed, self._seconds),
            "architectures_per_second": self._timed / self._seconds if self._seconds else 0.0,
            "means": self._means,
            "summed_updates": self._summed,
        }


def _values(metrics: Mapping[str, float]) -> str:
    return "  ".join(f"{SHORT.get(name, name)} {value:.4g}" for name, value in metrics.items())


def write(search, report: dict[str, Any], built: ConfigDict, workdir: pathlib.Path) -> None:
    """result.json, search.txt, plots/search.png, plots/cells.png and built_config.py."""
    space, plots = search.space, workdir / "plots"
    title = f"{report['strategy']}: {report['validation/accuracy']:.2%} of the validation split"
    cell_drawing.draw(space, space.parse(report["arc"]), plots / "cells.png", title)
    plot(report, plots / "search.png")
    (workdir / "search.txt").write_text(table(report) + "\n")
    _write_config(search.judged.config.model, built, report, workdir)
    reporting.write_json(workdir / "result.json", report)
    print(table(report))
    print(f"result       {workdir / 'result.json'}, {workdir / 'search.txt'}")
    print(f"plots        {plots / 'search.png'}, {plots / 'cells.png'}")
    print(f"found net    {workdir / 'built_config.py'}", flush=True)


def _write_config(
    searched: ConfigDict, built: ConfigDict, report: dict[str, Any], workdir: pathlib.Path
) -> None:
    path = workdir / "built_config.py"
    command = f"python -m efficient_nets.main --config={path} --workdir={workdir / 'built'}"
    same = [
        f"--config.model.{name}={searched[name]}"
        for name in ("layers", "features")
        if searched[name] != built.model[name]
    ]
    lines = [
        f"The architecture that {report['strategy']} found on {report['dataset']}.",
        "",
        f"    {command}",
        "",
        *report["lists"],
        "",
        f"With the shared net's weights {report['validation/accuracy']:.2%} of the validation",
        "split. It is trained anew; with the depth and width of the search it can go on from these",
        "weights instead, behind the command:",
        "",
        *([f"    {' '.join(same)}"] if same else []),
        f"    --config.checkpoint.convert_from={workdir} --config.calibration.norm_batches=20",
        "",
    ]
    config_file.write(path, built, lines)


def table(report: dict[str, Any]) -> str:
    """A line a finalist, the best first."""
    rows = [("", "validation", report["cost"], "front", "architecture")]
    for finalist in report["finalists"]:
        rows.append(
            (
                "*" if finalist["chosen"] else "",
                f"{finalist['validation/accuracy']:.2%}",
                f"{finalist['cost']:,.4g}",
                "x" if finalist["on_front"] else "",
                finalist["arc"],
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if place in (1, 2) else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    costs = ", ".join(f"{value:,} {kind}" for kind, value in report["costs"].items())
    scores = "  ".join(
        f"{split} {report[f'{split}/accuracy']:.2%}"
        for split in ("validation", "test")
        if f"{split}/accuracy" in report
    )
    measured = f"{report['steps']:,} steps"
    if report["architectures"]:
        rate = report["architectures_per_second"]
        measured = f"{report['architectures']:,} architectures measured, {rate:.3g} a second"
    return "\n".join(
        [
            lines[0],
            "-" * len(lines[0]),
            *lines[1:],
            "-" * len(lines[0]),
            f"Found (*) with the shared net's weights: {scores}",
            f"The net to be trained, but for its norms: {costs}",
            f"{measured}; {report['seconds'] / 60:.1f} minutes in all",
        ]
    )


def plot(report: dict[str, Any], path: pathlib.Path) -> None:
    """Accuracy over the search, and the finalists' accuracy against their cost."""
    figure = figures.new_figure(9.6, 3.8)
    left, right = figure.subplots(1, 2)
    history = report["history"]
    epochs = [record["epoch"] for record in history]
    for name, label in (
        ("strategy/accuracy", "proposed, a batch each"),
        ("shown_accuracy", "shown, mean"),
        ("validation/accuracy", "best of these, whole split, norms anew"),
    ):
        points = [
            (e, record[name]) for e, record in zip(epochs, history, strict=True) if name in record
        ]
        if points:
            left.plot(*zip(*points, strict=True), marker=".", label=label)
    left.set_xlabel("epoch")
    left.set_ylabel("validation accuracy, shared weights", fontsize=9)
    left.legend(fontsize=8, loc="lower right")
    left.grid(alpha=0.3)
    for on_front, color, label in (
        (False, "tab:gray", "finalists"),
        (True, "tab:blue", "Pareto front"),
    ):
        some = [f for f in report["finalists"] if f["on_front"] == on_front]
        if some:
            x, y = [f["cost"] for f in some], [f["validation/accuracy"] for f in some]
            right.scatter(x, y, color=color, label=label, s=22)
    chosen = next(f for f in report["finalists"] if f["chosen"])
    right.scatter(
        [chosen["cost"]],
        [chosen["validation/accuracy"]],
        s=90,
        facecolors="none",
        edgecolors="tab:red",
        label="found",
    )
    right.set_xlabel(report["cost"].replace("_", " "))
    right.set_ylabel("validation accuracy", fontsize=9)
    right.legend(fontsize=8)
    right.grid(alpha=0.3)
    figure.savefig(path)
