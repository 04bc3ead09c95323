"""What is written while a run goes on, and what becomes of it where that fails."""

import contextlib
import errno
import json
import math
import time

import jax.numpy as jnp
import pytest

from efficient_nets import reporting
from efficient_nets.errors import TrainingDiverged


@pytest.fixture
def reporter(tmp_path):
    reporter = reporting.Reporter(tmp_path, 0, 100, tensorboard=True)
    yield reporter
    with contextlib.suppress(OSError):
        reporter.close()


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_value_that_is_not_finite_is_null(tmp_path):
    file = reporting.MetricsFile(tmp_path / "metrics.jsonl", 0)
    file.write(3, {"test/loss": math.nan, "test/accuracy": 0.5, "train/loss": math.inf})
    file.close()
    line = (tmp_path / "metrics.jsonl").read_text()
    expected = {"step": 3, "test/loss": None, "test/accuracy": 0.5, "train/loss": None}
    assert json.loads(line, parse_constant=lambda name: 1 / 0) == expected


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_tensorboard_that_cannot_write_is_an_error_and_no_deadlock(reporter, tmp_path):
    events = reporter._board.file_writer.event_writer
    events._ev_writer.write_event = full
    reporter.scalars(1, {f"test/{number}": 0.5 for number in range(50)})
    events._worker.join(timeout=60)
    with pytest.raises(OSError, match=f"writer has died.*{tmp_path}/tensorboard"):
        reporter.scalars(2, {"test/loss": 0.5})


@pytest.mark.parametrize("part", ["_board", "_file", "bar"])
def test_each_part_is_closed_also_where_another_fails(reporter, monkeypatch, tmp_path, part):
    files = reporter._file._file, reporter._board.file_writer.event_writer
    with monkeypatch.context() as patch:
        patch.setattr(getattr(reporter, part), "close", full)
        with pytest.raises(OSError, match="No space left on device"):
            reporter.close()
    closed = {"_file": files[0].closed, "_board": files[1]._closed, "bar": reporter.bar.disable}
    assert closed == {name: name != part for name in closed}


def test_a_full_disk_is_named_where_metrics_are_written(reporter, tmp_path):
    reporter._file._file.close()
    with contextlib.suppress(OSError), open("/dev/full", "w", buffering=1) as reporter._file._file:
        with pytest.raises(OSError, match=f"No space left.*{tmp_path}/metrics.jsonl"):
            reporter.scalars(1, {"test/loss": 0.5})


def test_a_line_of_scores_has_no_room_for_many_classes():
    few = {f"{split}/ap50_{k}": 0.5 for split in ("validation", "test") for k in range(10)}
    assert reporting.scores_line(few).count("%") == 20
    many = few | {"test/ap50_10": 0.5, "test/ap50": 0.5, "test/ap50_voc07": 0.25}
    assert reporting.scores_line(many) == "test/ap50 50.00%  test/ap50_voc07 25.00%"


def test_a_line_of_scores_has_shares_in_percent():
    scores = {"test/loss": 0.5, "test/accuracy": 0.91234, "test/ap50": 0.5, "test/ap": 0.25}
    scores |= {"test/ap50_car": 1.0, "test/fid": 31.25, "test/apart": 1.0}
    assert reporting.evaluation_line(0.5, 1170, scores) == (
        "epoch 0.5  step 1,170  test/loss 0.5000  test/accuracy 91.23%  test/ap50 50.00%  "
        "test/ap 25.00%  test/ap50_car 100.00%  test/fid 31.2500  test/apart 1.0000"
    )


def test_of_several_losses_each_is_told_and_must_be_finite(reporter):
    meter = reporting.Meter({}, reporter, batch_size=10, every_steps=50)
    names = ("a_loss", "b_loss", "gradient_norm", "parameter_norm", "learning_rate")
    metrics = {name: jnp.ones(()) for name in names}
    meter.push(0, 1, metrics)
    meter.settle()
    assert reporter.bar.postfix == "a_loss 1.0000  b_loss 1.0000"
    meter.push(1, 1, metrics | {"b_loss": jnp.full((), jnp.nan)})
    with pytest.raises(TrainingDiverged, match="b_loss is nan at step 2"):
        meter.settle()


def test_rates_leave_out_compiling_and_evaluation(reporter):
    meter = reporting.Meter({}, reporter, batch_size=10, every_steps=50)
    names = ("loss", "gradient_norm", "parameter_norm", "learning_rate")
    metrics = {name: jnp.ones(()) for name in names}

    def step(number):
        meter.push(number, 1, metrics)
        meter.settle()

    time.sleep(0.5)  # the first step compiles
    step(0)
    assert "loss" in reporter.bar.postfix and "images/s" not in reporter.bar.postfix
    with meter.paused():
        time.sleep(0.5)
    step(1)
    assert "images/s" in reporter.bar.postfix
    assert reporter.bar.format_dict["elapsed"] < 0.4 and meter.images_per_second > 10 / 0.4
