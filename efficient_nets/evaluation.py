"""Scores of a train state over a whole split: every sample once, none augmented."""

import functools
import pathlib
import time
from typing import Protocol

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from efficient_nets import (
    data,
    detection_evaluation,
    experiment,
    generation_evaluation,
    reporting,
    sharding,
    workdirs,
)
from efficient_nets.experiment import Experiment, TrainState
from efficient_nets.feeding import eval_batches, put_resident
from efficient_nets.tasks import classification


class Evaluator:
    """Evaluates a classifier on one split. A split that fits lies on the devices.

    Args:
      run: The experiment.
      split: Its name.
      step: `Evaluator.compiled(run)`, which several evaluators may share.
    """

    def __init__(self, run: Experiment, split: str, step=None):
        self.split = split
        self._run = run
        self._resident = put_resident(run, split)
        self._step, self._gather = step or self.compiled(run), jax.jit(data.gather)

    @staticmethod
    def compiled(run: Experiment):
        """What scores one batch's images: one program for batches of all splits."""
        return jax.jit(functools.partial(_step, run), donate_argnums=2)

    def __call__(self, state: TrainState) -> dict[str, float]:
        """`{'<split>/loss': x, '<split>/accuracy': y}`, of the averaged net if there is one."""
        net, scores = state.net, self._empty_scores()
        for batch in eval_batches(self._run, self.split):
            scores = self._step(net, self._gather(self._resident, batch), scores)
        return {f"{self.split}/{k}": v for k, v in classification.summarise(scores).items()}

    def pictures(self) -> dict[str, np.ndarray]:
        """Of the last call, `{name: uint8 (H, W, 3)}`: here none."""
        return {}

    def seconds(self, state: TrainState, repeats: int = 10) -> float:
        """Time of one batch of `config.evaluate.batch_size`, forward: the least of `repeats`.

        The least, as whatever else the machine does can only add to it.
        """
        batches, net, times = eval_batches(self._run, self.split), state.net, []
        batch = self._gather(self._resident, next(batches))
        batches.close()
        for _ in range(1 + repeats):  # the first may compile
            scores = jax.block_until_ready(self._empty_scores())
            begin = time.perf_counter()
            jax.block_until_ready(self._step(net, batch, scores))
            times.append(time.perf_counter() - begin)
        return min(times[1:])

    def _empty_scores(self):
        scores = jax.device_get(self._run.task.empty_scores())
        return sharding.put_replicated(scores, self._run.mesh)


# By task: each is made and called as `Evaluator` is, with what `compiled` gives for all splits.
EVALUATORS = {
    "classification": Evaluator,
    "detection": detection_evaluation.Evaluator,
    "generation": generation_evaluation.Evaluator,
}
# By task, of those whose --mode=eval leaves more than scores: `(run, state, workdir)` gives a path.
WRITERS = {"generation": generation_evaluation.write_samples}


def evaluate(config: ConfigDict, workdir: pathlib.Path, folder: pathlib.Path, which: str) -> None:
    """Evaluates a saved state on all splits, on any number of devices; prints, writes eval.json.

    Args:
      workdir: Where eval.json goes.
      folder, which: The checkpoint, as of `workdirs.restore_for_evaluation`.
    """
    run = experiment.build(config, data.load(config.data, config.task), training=False)
    state = workdirs.restore_for_evaluation(run, folder, which)
    step = int(state.step)
    evaluation = evaluators(run)
    scores = evaluate_all(evaluation, state)
    if jax.process_index() == 0:
        print(reporting.evaluation_line(step / run.epoch_steps, step, scores))
        pictures = {}
        for evaluator in evaluation:
            pictures |= evaluator.pictures()
        for path in reporting.save_pictures(workdir, pictures):
            print(f"pictures     {path}")
    if (write := WRITERS.get(run.task.name)) is not None:
        path = write(run, state, workdir)
        if jax.process_index() == 0:
            print(f"samples      {path}")
    named = {"step": step, "checkpoint": str(folder)}
    workdirs.write_eval(workdir, named | scores | features_of(run))


def _step(run: Experiment, net, batch, scores):
    model = nnx.merge(run.graph, net["params"], net["stats"])
    model.eval()
    logits = model(data.normalise(batch["image"], run.dataset.info))
    new = run.task.scores(logits, batch["label"], batch["weight"])
    return scores.merge(new)


class Evaluate(Protocol):
    """Of a state, `{'<split>/<metric>': x}`, the same on every process; then what it looks like."""

    def __call__(self, state: TrainState) -> dict[str, float]: ...

    def pictures(self) -> dict[str, np.ndarray]:
        """Of the last call, `{name: uint8 (H, W, 3)}`."""


def evaluators(run: Experiment) -> list[Evaluate]:
    """One for each split there is; the first is the one that selects the best checkpoint."""
    splits = [name for name in ("validation", "test") if getattr(run.dataset, name) is not None]
    kind = EVALUATORS[run.task.name]
    step = kind.compiled(run)
    return [kind(run, split, step) for split in splits]


def features_of(run: Experiment) -> dict[str, str]:
    """What a generator's scores are by, for the files that hold them."""
    features = run.config.generation.features
    return {"features": features} if features else {}


def evaluate_all(evaluators: list[Evaluate], state: TrainState) -> dict[str, float]:
    """Scores on all splits."""
    scores = {}
    for evaluator in evaluators:
        scores |= evaluator(state)
    return scores
