"""Batches at any step of any epoch, the same whatever the number of processes.

Training is stateless: the batch of step s is a function of (seed, s), so that resuming at a step is
starting there. Every process works out the same global order and takes its own rows of each batch.
"""

import dataclasses
import functools
import itertools
import signal
import sys
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from efficient_nets.data.sources import Source
from efficient_nets.errors import UserError

# Ends of the seed sequence, so that shuffling and cropping never share random numbers.
_SHUFFLE, _CROP = 0, 1

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class _Order:
    """The positions of a batch's images.

    Attributes:
      length: images of the source.
      batch_size: of the global batch.
      rows: this process's part of it.
    """

    length: int
    batch_size: int
    rows: slice

    def __post_init__(self):
        if self.batch_size < 1:
            raise UserError(f"batch_size={self.batch_size} must be at least 1")
        if not self.row_numbers:
            raise UserError(f"rows={self.rows} selects nothing of a batch of {self.batch_size}")

    @property
    def row_numbers(self) -> range:
        return range(self.batch_size)[self.rows]


@dataclasses.dataclass(frozen=True)
class _TrainOrder(_Order):
    """A new permutation each epoch; what is left after its last whole batch is dropped."""

    seed: int

    def __call__(self, step: int) -> Batch:
        epoch, batch = divmod(step, self.length // self.batch_size)
        start = batch * self.batch_size
        order = _permutation(self.seed, epoch, self.length)
        return {"index": order[start : start + self.batch_size][self.rows]}


@dataclasses.dataclass(frozen=True)
class _EvalOrder(_Order):
    """Every image once, in order; the last batch is filled up with images of weight 0."""

    def __call__(self, step: int) -> Batch:
        position = step * self.batch_size + np.array(self.row_numbers)
        return {
            "index": np.minimum(position, self.length - 1).astype(np.int32),
            "weight": (position < self.length).astype(np.float32),
        }


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_SHUFFLE, epoch)))
    return rng.permutation(np.arange(length, dtype=np.int32))


def train_batches(
    source: Source,
    batch_size: int,
    *,
    seed: int,
    first_step: int = 0,
    rows: slice = slice(None),
) -> Iterator[Batch]:
    """Shuffled batches without end, starting at `first_step`.

    Each epoch has len(source) // batch_size steps: the remainder of its permutation, other images
    each time, is left out.

    Args:
      source: what to read.
      batch_size: B of the global batch, over all processes.
      seed: with the step it determines everything.
      first_step: `first_step=k` gives what is left after taking k batches.
      rows: this process's rows of the global batch, b of them.

    Returns:
      {"index": int32 (b,)} into `source.resident`; where the source streams, {"image": uint8
      (b, H, W, C), "label": int32 (b,)}. Close the iterator to end its workers.

    Raises:
      UserError: batch_size is larger than the source, or rows selects nothing.
    """
    if batch_size > len(source):
        raise UserError(
            f"batch_size={batch_size} is larger than {source.name}, which has {len(source)} images"
        )
    order = _TrainOrder(len(source), batch_size, rows, seed)
    if source.resident is not None:
        return (order(step) for step in itertools.count(first_step))
    return _stream(_Loader(source, order, first_step, sys.maxsize, crop_seed=seed), source.workers)


def eval_batches(source: Source, batch_size: int, *, rows: slice = slice(None)) -> Iterator[Batch]:
    """One pass over the source in its order, each image counted once whatever the batch size.

    The last batch is filled up to full size, so that all have one shape.

    Args:
      source: what to read.
      batch_size: B of the global batch, over all processes; may be larger than the source.
      rows: this process's rows of the global batch, b of them.

    Returns:
      ceil(len(source) / B) batches as of `train_batches`, and in each "weight": float32 (b,), 1 for
      an image and 0 for padding.

    Raises:
      UserError: rows selects nothing.
    """
    order = _EvalOrder(len(source), batch_size, rows)
    steps = -(-len(source) // batch_size)
    if source.resident is not None:
        return (order(step) for step in range(steps))
    return _stream(_Loader(source, order, 0, steps), min(source.workers, steps))


@dataclasses.dataclass(frozen=True)
class _Loader:
    """Decoded batches at random access, as grain wants them; element i is step first_step + i."""

    source: Source
    order: Callable[[int], Batch]
    first_step: int
    steps: int
    crop_seed: int | None = None

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, i: int) -> Batch:
        step = self.first_step + i
        batch = self.order(step)
        return self.source.read(batch.pop("index"), self._rngs(step)) | batch

    def _rngs(self, step: int) -> list[np.random.Generator] | None:
        if self.crop_seed is None:
            return None
        keys = [(_CROP, step, row) for row in self.order.row_numbers]
        seeds = [np.random.SeedSequence(self.crop_seed, spawn_key=key) for key in keys]
        return [np.random.default_rng(seed) for seed in seeds]


def _stream(loader: _Loader, workers: int) -> Iterator[Batch]:
    import grain  # here, as it takes seconds to import and data in memory does not need it
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain's workers read absl flags, also outside absl.app.run
    # An element is a whole batch: its content does not depend on the number of workers.
    threads = 0 if workers else 4
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    batches = grain.MapDataset.source(loader).to_iter_dataset(options)
    if workers:
        options = grain.MultiprocessingOptions(num_workers=workers)
        batches = batches.mp_prefetch(options, worker_init_fn=_ignore_sigterm)
    iterator = iter(batches)
    try:
        yield from iterator
    finally:
        iterator.close()


def _ignore_sigterm(worker: int, workers: int) -> None:
    """Schedulers send SIGTERM to workers too, but the loop still needs a batch, and ends them."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def gather(resident: Mapping[str, jax.Array] | None, batch: Mapping[str, jax.Array]):
    """Turns a batch of either kind into images; to be used inside jit.

    Args:
      resident: `source.resident`, on the device; None where the source streams.
      batch: of `train_batches` or `eval_batches`.

    Returns:
      {"image": uint8 (B, H, W, C), "label": int32 (B,)}, in evaluation also "weight": float32 (B,).
    """
    if "index" not in batch:
        return dict(batch)
    rest = {key: value for key, value in batch.items() if key != "index"}
    # Indices are in range by construction; without a mode XLA would add a check to each.
    take = functools.partial(jnp.take, indices=batch["index"], axis=0, mode="clip")
    return {key: take(values) for key, values in resident.items()} | rest
