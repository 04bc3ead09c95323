"""Curves of a run, one PNG a metric, from its metrics.jsonl."""

import json
import math
import pathlib
import re
from collections import defaultdict

# {metric: {split: (steps, values)}}
Curves = dict[str, dict[str, tuple[list[int], list[float]]]]

COLORS = {"train": "tab:blue", "validation": "tab:orange", "test": "tab:green"}
LOG_SPAN = 10  # positive losses and norms that span this factor are drawn on a log scale
FEW_POINTS = 50  # up to here points are marked


def plot_curves(metrics_jsonl_path: pathlib.Path, plots_dir: pathlib.Path) -> list[pathlib.Path]:
    """Draws each metric against the step, with a curve a split: loss.png, accuracy.png, ...

    Args:
      metrics_jsonl_path: See `read_metrics`. Values that are not finite leave a gap.
      plots_dir: Where the files go; it is made if need be.

    Returns:
      Paths of the files, sorted by name; none of a metric without a finite value.
    """
    # The import costs more than half a second, which only a run that ends needs to spend.
    from matplotlib.figure import Figure

    plots_dir.mkdir(parents=True, exist_ok=True)
    written = []
    for metric, splits in sorted(read_metrics(metrics_jsonl_path).items()):
        if not _finite(splits):
            continue
        figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
        _draw(figure.add_subplot(), metric, splits)
        path = plots_dir / f"{metric.replace('/', '_')}.png"
        figure.savefig(path)
        written.append(path)
    return written


def read_metrics(path: pathlib.Path) -> Curves:
    """The scalars of a run, as `{"loss": {"train": (steps, values), ...}, ...}`.

    Args:
      path: A metrics.jsonl: one JSON object a line, `step` and names such as `train/loss`. A line
        that was cut off is left out; null counts as NaN.
    """
    curves: Curves = defaultdict(lambda: defaultdict(lambda: ([], [])))
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # a run that is killed while it writes leaves half a line
        for name, value in record.items():
            split, _, metric = name.partition("/")
            if metric:
                steps, values = curves[metric][split]
                steps.append(record["step"])
                values.append(math.nan if value is None else value)
    return {metric: dict(splits) for metric, splits in curves.items()}


def is_share(metric: str) -> bool:
    """Whether it is told in percent: an accuracy, or an average precision as ap50 or ap50_cat."""
    return metric.endswith("accuracy") or bool(re.fullmatch(r"ap\d*(_.*)?", metric))


def _finite(splits) -> list[float]:
    return [v for _, values in splits.values() for v in values if math.isfinite(v)]


def _draw(axes, metric: str, splits) -> None:
    values = _finite(splits)
    if is_share(metric):
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    elif metric.endswith(("loss", "norm")) and max(values) > LOG_SPAN * min(values) > 0:
        axes.set_yscale("log", subs=[2, 5])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    for split, (steps, values) in splits.items():
        marker = "." if len(values) <= FEW_POINTS else None  # a lone point has no line
        axes.plot(steps, values, label=split, color=COLORS.get(split), marker=marker)
    axes.set_xlabel("step")
    axes.set_ylabel(metric.replace("_", " "))
    axes.grid(alpha=0.3, which="both")
    axes.legend()
