"""What a person and a script see of a run: progress bar, metrics.jsonl, TensorBoard."""

import contextlib
import json
import math
import pathlib
import sys
import time
from collections.abc import Mapping

import jax
import numpy as np
from tqdm import tqdm

from efficient_nets import analysis
from efficient_nets.errors import TrainingDiverged


class MetricsFile:
    """`metrics.jsonl`: one object a line, `step` and names such as `train/loss`.

    On resuming, lines of steps after the restored one are cut off: they will be written again.
    """

    def __init__(self, path: pathlib.Path, first_step: int):
        kept = [line for line in _complete_lines(path) if json.loads(line)["step"] <= first_step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept))
        temporary.replace(path)
        self._file = path.open("a", buffering=1)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **scalars}) + "\n")

    def close(self) -> None:
        self._file.close()


def _complete_lines(path: pathlib.Path) -> list[str]:
    """A kill can leave half a line, or a line with nothing but zero bytes, at the end."""
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return [line for line in lines if line.startswith("{") and line.endswith("}")]


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

            self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step + 1)
        quiet = not sys.stderr.isatty()
        self.bar = tqdm(
            initial=first_step,
            total=total_steps,
            unit="step",
            mininterval=10.0 if quiet else 0.2,
            dynamic_ncols=True,
            disable=not self.active,
        )

    def advance(self, steps: int, images_per_second: float, loss: float) -> None:
        self.bar.set_postfix_str(
            f"{images_per_second:,.0f} images/s, loss {loss:.4f}", refresh=False
        )
        self.bar.update(steps)

    def scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        if self._file is not None:
            self._file.write(step, scalars)
        if self._board is not None:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)

    def histograms(self, step: int, histograms: Mapping[str, analysis.Histogram]) -> None:
        """Writes `histograms/STEP.npz`, and TensorBoard's."""
        if self.active:
            analysis.save_histograms(self._workdir, step, histograms)
        if self._board is not None:
            for name, histogram in histograms.items():
                analysis.add_histogram(self._board, name, histogram, step)

    def line(self, text: str) -> None:
        if self.active:
            self.bar.write(text, file=sys.stdout)

    def close(self) -> None:
        self.bar.close()
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def evaluation_line(epoch: float, step: int, scalars: Mapping[str, float]) -> str:
    """One line an evaluation: `epoch 3  step 1,170  validation/accuracy 91.2%  ...`."""
    parts = [f"epoch {epoch:g}", f"step {step:,}"]
    for name, value in scalars.items():
        percent = name.endswith("accuracy")
        parts.append(f"{name} {100 * value:.2f}%" if percent else f"{name} {value:.4f}")
    return "  ".join(parts)


def write_json(path: pathlib.Path, value: Mapping) -> None:
    """Written whole or not at all; NaN becomes null, which JSON can hold."""
    temporary = path.with_name(path.name + ".tmp")
    plain = {key: _finite(item) for key, item in value.items()}
    temporary.write_text(json.dumps(plain, indent=2) + "\n")
    temporary.replace(path)


def _finite(value):
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value


class Meter:
    """Looks at the metrics of one dispatch while the next one runs, so that the device never waits.

    Args:
      meta: What `meta()` gave when the checkpoint was saved that the run starts from, or nothing.
      reporter: Gets the means over every `every_steps` steps, and the bar's progress.
      batch_size: Images a step.
      every_steps: Steps between two lines of metrics.
    """

    def __init__(self, meta: Mapping, reporter: Reporter, batch_size: int, every_steps: int):
        self._reporter, self._batch_size, self._every = reporter, batch_size, every_steps
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
        else:
            self._rate_images += count * self._batch_size
        self._reporter.advance(count, self.images_per_second, float(rows["loss"][-1]))

    def _add(self, step: int, values: Mapping[str, float]) -> None:
        for name in ("loss", "gradient_norm", "parameter_norm"):
            if not math.isfinite(values[name]):
                raise TrainingDiverged(f"{name} is {values[name]} at step {step}")
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._summed += 1
        if step % self._every == 0:
            means = {name: total / self._summed for name, total in self._sums.items()}
            means["learning_rate"] = values["learning_rate"]
            self._reporter.scalars(step, {f"train/{name}": x for name, x in means.items()})
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
        self._rate_from += time.perf_counter() - begin

    def meta(self) -> dict:
        """What a resumed run needs so that its metrics are those of one that was not stopped."""
        return {
            "sums": self._sums,
            "summed": self._summed,
            "seconds": self._seconds_before + time.perf_counter() - self._start,
            "images_per_second": self.images_per_second,
        }
