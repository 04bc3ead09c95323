"""Curves from a metrics file as runs leave it: cut off, with NaN, or empty."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from efficient_nets import analysis


@pytest.fixture
def metrics(tmp_path):
    def write(*records, tail=""):
        path = tmp_path / "metrics.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
        return path

    return write


def colors(path, box=(0, 0, 1, 1)):
    """Colors in a part of a plot: left, top, right, bottom as shares of its size."""
    image = Image.open(path).convert("RGB")
    image = image.crop([share * side for share, side in zip(box, 2 * image.size, strict=True)])
    return set(map(tuple, np.asarray(image).reshape(-1, 3).tolist()))


BLUE, ORANGE = (31, 119, 180), (255, 127, 14)


def test_each_metric_gets_a_plot_with_a_curve_a_split(metrics, tmp_path):
    path = metrics(
        {"step": 1, "train/loss": 2.0, "train/learning_rate": 0.1},
        {"step": 2, "train/loss": 1.0, "train/learning_rate": 0.0},
        {"step": 2, "validation/loss": 1.5, "validation/accuracy": 0.5},
    )
    plots = analysis.plot_curves(path, tmp_path / "new" / "plots")
    assert [plot.name for plot in plots] == ["accuracy.png", "learning_rate.png", "loss.png"]
    accuracy, learning_rate, loss = map(colors, plots)
    assert BLUE in learning_rate and ORANGE not in learning_rate
    assert ORANGE in accuracy and BLUE not in accuracy
    assert {BLUE, ORANGE} <= loss
    middle = (0.4, 0.4, 0.7, 0.6)  # far from the legend
    assert ORANGE in colors(plots[0], middle)  # a lone point is seen


def test_a_cut_off_line_is_left_out_and_null_is_nan(metrics):
    path = metrics(
        {"step": 1, "train/loss": 2.0},
        {"step": 2, "train/loss": None},
        tail='{"step": 3, "train/lo',
    )
    steps, values = analysis.read_metrics(path)["loss"]["train"]
    assert steps == [1, 2] and values[0] == 2.0 and math.isnan(values[1])


def test_values_that_are_not_finite_leave_a_gap(metrics, tmp_path):
    path = metrics(
        *(
            {"step": s, "train/loss": 100.0 / s, "train/gradient_norm": math.nan}
            for s in range(1, 99)
        ),
        {"step": 99, "train/loss": math.nan},
        {"step": 100, "train/loss": math.inf},
    )
    (plot,) = analysis.plot_curves(path, tmp_path)  # no gradient norm is finite: no plot of it
    assert plot.name == "loss.png" and BLUE in colors(plot)


def test_no_metrics_no_plots(metrics, tmp_path):
    assert analysis.plot_curves(metrics(), tmp_path) == []
