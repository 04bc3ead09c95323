"""Accuracy of a train state over a whole split: every sample once, none augmented."""

import functools
import time
from collections.abc import Iterator

import jax
from flax import nnx
from tqdm import tqdm

from efficient_nets import data, sharding
from efficient_nets.experiment import Experiment, TrainState
from efficient_nets.tasks import classification


class Evaluator:
    """Evaluates one split. Compiled once; a split that fits lies on the devices."""

    def __init__(self, experiment: Experiment, split: str):
        self.split = split
        self._experiment = experiment
        self._source = getattr(experiment.dataset, split)
        self._resident = put_resident(experiment, split)
        self._step = jax.jit(functools.partial(_step, experiment), donate_argnums=3)

    def __call__(self, state: TrainState) -> dict[str, float]:
        """`{'<split>/loss': x, '<split>/accuracy': y}`, of the averaged weights if any."""
        weights, scores = state.ema or state.params, self._empty_scores()
        for batch in self._batches():
            scores = self._step(weights, state.stats, batch, scores, self._resident)
        return {f"{self.split}/{k}": v for k, v in classification.summarise(scores).items()}

    def seconds(self, state: TrainState, repeats: int = 10) -> float:
        """Time of one batch of `config.evaluate.batch_size`, forward: the least of `repeats`.

        The least, as whatever else the machine does can only add to it.
        """
        batches, weights, times = self._batches(), state.ema or state.params, []
        batch = next(batches)
        batches.close()
        for _ in range(1 + repeats):  # the first may compile
            scores = jax.block_until_ready(self._empty_scores())
            begin = time.perf_counter()
            jax.block_until_ready(self._step(weights, state.stats, batch, scores, self._resident))
            times.append(time.perf_counter() - begin)
        return min(times[1:])

    def _empty_scores(self):
        scores = jax.device_get(self._experiment.task.empty_scores())
        return sharding.put_replicated(scores, self._experiment.mesh)

    def _batches(self) -> Iterator[dict]:
        size = self._experiment.config.evaluate.batch_size
        batches = data.eval_batches(self._source, size, rows=sharding.process_rows(size))
        total = -(-len(self._source) // size)
        hidden = jax.process_index() > 0
        for batch in tqdm(batches, self.split, total, leave=False, delay=5, disable=hidden):
            yield sharding.put_batch(batch, self._experiment.mesh)


def _step(experiment: Experiment, params, stats, batch, scores, resident):
    batch = data.gather(resident, batch)
    model = nnx.merge(experiment.graph, params, stats)
    model.eval()
    logits = model(data.normalise(batch["image"], experiment.dataset.info))
    new = experiment.task.scores(logits, batch["label"], batch["weight"])
    return scores.merge(new)


def put_resident(experiment: Experiment, split: str) -> dict | None:
    """A split's uint8 arrays on every device, or None where it streams."""
    resident = getattr(experiment.dataset, split).resident
    return None if resident is None else sharding.put_replicated(resident, experiment.mesh)


def evaluators(run: Experiment) -> list[Evaluator]:
    """One for each split there is; the first is the one that selects the best checkpoint."""
    splits = [name for name in ("validation", "test") if getattr(run.dataset, name) is not None]
    return [Evaluator(run, split) for split in splits]


def evaluate_all(evaluators: list[Evaluator], state: TrainState) -> dict[str, float]:
    """Scores on all splits."""
    scores = {}
    for evaluator in evaluators:
        scores |= evaluator(state)
    return scores
