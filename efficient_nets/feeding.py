"""A split of an experiment's data on its devices."""

from collections.abc import Iterator

import jax
from tqdm import tqdm

from efficient_nets import data, sharding
from efficient_nets.experiment import Experiment


def put_resident(run: Experiment, split: str) -> dict | None:
    """A split's arrays on every device, or None where it streams."""
    resident = getattr(run.dataset, split).resident
    return None if resident is None else sharding.put_replicated(resident, run.mesh)


def eval_batches(run: Experiment, split: str) -> Iterator[dict]:
    """`data.eval_batches` of a split, cut over the devices, for `data.gather`; with a bar.

    Of `config.evaluate.batch_size`, rounded up to what the devices divide.
    """
    source = getattr(run.dataset, split)
    size = sharding.round_up(run.config.evaluate.batch_size, run.mesh)
    batches = data.eval_batches(source, size, rows=sharding.process_rows(size))
    total = -(-len(source) // size)
    hidden = jax.process_index() > 0
    for batch in tqdm(batches, split, total, leave=False, delay=5, disable=hidden):
        yield sharding.put_batch(batch, run.mesh)
