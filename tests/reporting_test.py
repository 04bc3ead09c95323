"""What is written while a run goes on, and what becomes of it where that fails."""

import json
import math

from efficient_nets import reporting


def test_a_value_that_is_not_finite_is_null(tmp_path):
    file = reporting.MetricsFile(tmp_path / "metrics.jsonl", 0)
    file.write(3, {"test/loss": math.nan, "test/accuracy": 0.5, "train/loss": math.inf})
    file.close()
    line = (tmp_path / "metrics.jsonl").read_text()
    expected = {"step": 3, "test/loss": None, "test/accuracy": 0.5, "train/loss": None}
    assert json.loads(line, parse_constant=lambda name: 1 / 0) == expected
