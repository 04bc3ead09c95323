"""What a person and a script see of a run: progress bar, metrics.jsonl, TensorBoard."""

import contextlib
import errno
import json
import math
import pathlib
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from efficient_nets import analysis
from efficient_nets.analysis.curves import is_share
from efficient_nets.errors import TrainingDiverged

MOST_CLASSES = 10  # whose scores a line shows


class MetricsFile:
    """`metrics.jsonl`: one object a line, `step` and names such as `train/loss`; null is no number.

    On resuming, lines of steps after the restored one are cut off: they will be written again.
    """

    def __init__(self, path: pathlib.Path, first_step: int):
        lines = _complete_lines(path) if first_step else []
        kept = [line for line in lines if json.loads(line)["step"] <= first_step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept))
        temporary.replace(path)
        self._path, self._file = path, path.open("a", buffering=1)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        with _naming(self._path):
            self._file.write(json.dumps({"step": step, **_plain(scalars)}) + "\n")

    def close(self) -> None:
        with _naming(self._path):
            self._file.close()


@contextlib.contextmanager
def _naming(path: pathlib.Path):
    """Errors of writing, which do not say where."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _complete_lines(path: pathlib.Path) -> list[str]:
    """A kill can leave half a line, or a line with nothing but zero bytes, at the end."""
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return [line for line in lines if line.startswith("{") and line.endswith("}")]


def progress(total: int, **options) -> tqdm:
    """A progress bar of process 0, with few lines where nobody looks on; options are tqdm's."""
    interval = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(total=total, mininterval=interval, disable=jax.process_index() > 0, **options)


class Reporter:
    """Writes scalars of process 0 to metrics.jsonl, TensorBoard and the console.

    Args:
      workdir: Where the files go.
      first_step: Step the run starts from; later lines of an earlier run are cut off.
      total_steps: Length of the progress bar.
      tensorboard: Whether to write TensorBoard events too.
    """

    def __init__(
        self, workdir: pathlib.Path, first_step: int, total_steps: int, *, tensorboard: bool
    ):
        self.active = jax.process_index() == 0
        self._file = self._board = None
        self._workdir = workdir
        if self.active:
            self._file = MetricsFile(workdir / "metrics.jsonl", first_step)
        if self.active and tensorboard:
            from tensorboardX import SummaryWriter  # slow to import

            self._board = SummaryWriter(  # with a queue long enough that nothing waits for it
                str(self._workdir / "tensorboard"), purge_step=first_step + 1, max_queue=1000
            )
        self.bar = progress(total_steps, unit="step", initial=first_step, dynamic_ncols=True)

    def advance(self, steps: int, images_per_second: float, losses: Mapping[str, float]) -> None:
        rate = f"{images_per_second:,.0f} images/s, " if images_per_second else ""
        self.bar.set_postfix_str(f"{rate}{scores_line(losses)}", refresh=False)
        self.bar.update(steps)

    def leave_out(self, seconds: float) -> None:
        """Time that does not count towards the bar's rate and the time left."""
        if not self.bar.disable:
            self.bar.start_t += seconds
            self.bar.last_print_t += seconds

    def scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        if self._file is not None:
            self._file.write(step, scalars)
        if self._board is not None:
            # It writes in a thread, and goes on as if nothing were when that has died.
            if not self._board.file_writer.event_writer._worker.is_alive():
                message = "TensorBoard's writer has died; is the disk full?"
                raise OSError(errno.EIO, message, str(self._workdir / "tensorboard"))
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)

    def record(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes what is not all numbers, to metrics.jsonl alone."""
        if self._file is not None:
            self._file.write(step, values)

    def histograms(self, step: int, histograms: Mapping[str, analysis.Histogram]) -> None:
        """Writes `histograms/STEP.npz`, and TensorBoard's."""
        if self.active:
            analysis.save_histograms(self._workdir, step, histograms)
        if self._board is not None:
            for name, histogram in histograms.items():
                analysis.add_histogram(self._board, name, histogram, step)

    def pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Writes plots/NAME.png, over that of an earlier step, and TensorBoard's of each step.

        A name that ends in the step, as samples-100, is one in TensorBoard without it.
        """
        if self.active:
            save_pictures(self._workdir, pictures)
        if self._board is not None:
            for name, picture in pictures.items():
                name = name.removesuffix(f"-{step}")
                self._board.add_image(name, picture, step, dataformats="HWC")

    def line(self, text: str) -> None:
        if self.active:
            self.bar.write(text, file=sys.stdout)

    def close(self) -> None:
        """Closes each part, also where another one fails."""
        with contextlib.ExitStack() as stack:
            if self._board is not None:
                stack.enter_context(_naming(self._workdir / "tensorboard"))
                stack.callback(self._board.close)
            if self._file is not None:
                stack.callback(self._file.close)
            stack.callback(self.bar.close)


def evaluation_line(epoch: float, step: int, scalars: Mapping[str, float]) -> str:
    """One line an evaluation: `epoch 3  step 1,170  validation/accuracy 91.2%  ...`."""
    return f"epoch {epoch:g}  step {step:,}  {scores_line(scalars)}"


def scores_line(scalars: Mapping[str, float]) -> str:
    """`test/loss 0.3102  test/accuracy 91.20%`: shares in percent, others as they are.

    Of more than ten classes with a score of their own, as ap50_cat, none is shown.
    """
    of_classes = [name for name in scalars if re.search(r"/ap50_(?!voc\d+$)", name)]
    if len(of_classes) > MOST_CLASSES * len({name.partition("/")[0] for name in of_classes}):
        scalars = {name: value for name, value in scalars.items() if name not in of_classes}
    return "  ".join(
        f"{name} {100 * value:.2f}%" if is_share(name.rpartition("/")[2]) else f"{name} {value:.4f}"
        for name, value in scalars.items()
    )


def save_pictures(workdir: pathlib.Path, pictures: Mapping[str, np.ndarray]) -> list[pathlib.Path]:
    """Writes plots/NAME.png of each, uint8 `(H, W, 3)`."""
    written = []
    for name, picture in pictures.items():
        written.append(workdir / "plots" / f"{name}.png")
        written[-1].parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(written[-1])
    return written


def write_report(
    workdir: pathlib.Path,
    name: str,
    report: dict[str, Any],
    text: str,
    plot: Callable[[dict[str, Any], pathlib.Path], None],
    picture: str = "",
) -> None:
    """NAME.json, NAME.txt and plots/PICTURE.png; prints the text, and where they are.

    Args:
      workdir: Is made if it is not there.
      name: Of the files.
      report: Of the JSON file and the picture.
      text: A table.
      plot: `(report, path)`: draws the picture.
      picture: Its name, `name` if it has none of its own.
    """
    path = workdir / "plots" / f"{picture or name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(workdir / f"{name}.json", report)
    (workdir / f"{name}.txt").write_text(text + "\n")
    plot(report, path)
    print(text)
    print(f"report       {workdir / name}.txt, {workdir / name}.json")
    print(f"plot         {path}", flush=True)


def write_json(path: pathlib.Path, value: Mapping) -> None:
    """Written whole or not at all; NaN becomes null, which JSON can hold."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(_plain(value), indent=2) + "\n")
    temporary.replace(path)


def _is_peak(name: str) -> bool:
    """Of whose values over some steps the largest is told, not the mean."""
    return name.endswith("_max")


def _losses(metrics: Iterable[str]) -> list[str]:
    """Names of what a step makes less: its loss, or where several nets have their own, all."""
    names = list(metrics)
    return ["loss"] if "loss" in names else [name for name in names if name.endswith("_loss")]


def _with_split(name: str) -> str:
    """A metric of training, or as it is: `stage1.0.conv1/product_max` is one of that layer."""
    return name if "/" in name else f"train/{name}"


def _where(values: Mapping[str, float]) -> str:
    """The layer whose product overflowed, where `log.products` tells; those behind it have NaN."""
    peaks = {name: x for name, x in values.items() if name.endswith("/product_max")}
    broken = sorted((math.isnan(x), name) for name, x in peaks.items() if not math.isfinite(x))
    return f", from layer {broken[0][1].partition('/')[0]} on" if broken else ""


def _plain(record: Mapping) -> dict:
    def finite(value):
        if isinstance(value, float | np.floating):
            return float(value) if math.isfinite(value) else None
        if isinstance(value, Mapping):
            return _plain(value)
        return list(map(finite, value)) if isinstance(value, list | tuple) else value

    return {key: finite(value) for key, value in record.items()}


class Meter:
    """Looks at the metrics of one dispatch while the next one runs, so that the device never waits.

    Args:
      meta: What `meta()` gave when the checkpoint was saved that the run starts from, or nothing.
      reporter: Gets the means over every `every_steps` steps, and the bar's progress.
      batch_size: Images a step.
      every_steps: Steps between two lines of metrics.
      line: What is printed of the means too, of the step and them.
    """

    def __init__(
        self,
        meta: Mapping,
        reporter: Reporter,
        batch_size: int,
        every_steps: int,
        line: Callable[[int, Mapping], str] | None = None,
    ):
        self._reporter, self._batch_size, self._every = reporter, batch_size, every_steps
        self._line = line
        self._sums = dict(meta.get("sums", {}))
        self._summed = meta.get("summed", 0)
        self._seconds_before = meta.get("seconds", 0.0)
        self._rate_before = meta.get("images_per_second", 0.0)
        self._start = time.perf_counter()
        self._rate_from, self._rate_images = None, 0
        self._pending = None

    def push(self, step: int, count: int, metrics: Mapping) -> None:
        """Takes the metrics of steps `step + 1` to `step + count`, still being computed."""
        previous, self._pending = self._pending, (step, count, metrics)
        self._settle(previous)

    def settle(self) -> None:
        """Waits for all that was pushed.

        Raises:
          TrainingDiverged: at the first step whose loss, gradient or new parameters are not finite.
        """
        previous, self._pending = self._pending, None
        self._settle(previous)

    def _settle(self, pushed) -> None:
        if pushed is None:
            return
        step, count, metrics = pushed
        rows = {name: np.reshape(x, (count,)) for name, x in jax.device_get(metrics).items()}
        for row in range(count):
            self._add(step + row + 1, {name: float(values[row]) for name, values in rows.items()})
        if self._rate_from is None:  # the first dispatch compiles
            self._rate_from = time.perf_counter()
            self._reporter.leave_out(self._rate_from - self._start)
        else:
            self._rate_images += count * self._batch_size
        losses = {name: float(rows[name][-1]) for name in _losses(rows)}
        self._reporter.advance(count, self.images_per_second, losses)

    def _add(self, step: int, values: Mapping[str, float]) -> None:
        for name in (*_losses(values), "gradient_norm", "parameter_norm"):
            if not math.isfinite(values[name]):
                raise TrainingDiverged(f"{name} is {values[name]} at step {step}{_where(values)}")
        for name, value in values.items():
            before = self._sums.get(name, 0.0)
            self._sums[name] = max(before, value) if _is_peak(name) else before + value
        self._summed += 1
        if step % self._every == 0:
            means = {
                name: total if _is_peak(name) else total / self._summed
                for name, total in self._sums.items()
            }
            means["learning_rate"] = values["learning_rate"]
            self._reporter.scalars(step, {_with_split(name): x for name, x in means.items()})
            if self._line is not None:
                self._reporter.line(self._line(step, means))
            self._sums, self._summed = {}, 0

    @property
    def images_per_second(self) -> float:
        """Since the end of the first dispatch, evaluations not counted."""
        if not self._rate_images:
            return self._rate_before
        return self._rate_images / (time.perf_counter() - self._rate_from)

    @contextlib.contextmanager
    def paused(self):
        """Inside, time counts as the run's but not towards the rate."""
        begin = time.perf_counter()
        yield
        seconds = time.perf_counter() - begin
        if self._rate_from is not None:
            self._rate_from += seconds
        self._reporter.leave_out(seconds)

    def meta(self) -> dict:
        """What a resumed run needs so that its metrics are those of one that was not stopped."""
        return {
            "sums": self._sums,
            "summed": self._summed,
            "seconds": self._seconds_before + time.perf_counter() - self._start,
            "images_per_second": self.images_per_second,
        }
