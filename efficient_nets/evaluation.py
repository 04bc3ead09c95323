"""Accuracy of a train state over a whole split: every sample once, none augmented."""

import functools
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
        self._step = jax.jit(functools.partial(_step, experiment), donate_argnums=2)

    def __call__(self, state: TrainState) -> dict[str, float]:
        """`{'<split>/loss': x, '<split>/accuracy': y}`, of the averaged net if there is one."""
        net = state.ema or {"params": state.params, "stats": state.stats}
        scores = sharding.put_replicated(
            jax.device_get(self._experiment.task.empty_scores()), self._experiment.mesh
        )
        for batch in self._batches():
            scores = self._step(net, batch, scores, self._resident)
        return {f"{self.split}/{k}": v for k, v in classification.summarise(scores).items()}

    def _batches(self) -> Iterator[dict]:
        mesh = self._experiment.mesh
        size = sharding.round_up(self._experiment.config.evaluate.batch_size, mesh)
        batches = data.eval_batches(self._source, size, rows=sharding.process_rows(size))
        total = -(-len(self._source) // size)
        hidden = jax.process_index() > 0
        for batch in tqdm(batches, self.split, total, leave=False, delay=5, disable=hidden):
            yield sharding.put_batch(batch, mesh)


def _step(experiment: Experiment, net, batch, scores, resident):
    batch = data.gather(resident, batch)
    model = nnx.merge(experiment.graph, net["params"], net["stats"])
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
