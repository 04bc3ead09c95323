"""Where a run's quantizers and norms start: ranges and statistics from training images."""

import contextlib
import functools
import itertools

import jax
from absl import logging
from flax import nnx
from tqdm import tqdm

from efficient_nets import data, experiment, layers, sharding
from efficient_nets.evaluation import put_resident
from efficient_nets.experiment import Experiment, TrainState
from efficient_nets.layers import recalibrate

# Share of an input's magnitude that a quantizer from 0 on loses.
WORTH_A_WARNING = 0.01


def calibrated_start(run: Experiment, state: TrainState, *, trained: bool) -> TrainState:
    """The state with `config.calibration` applied: ranges, if anything is rounded; then norms.

    Ranges that another run brought are made anew too: its steps are those of its own bits.

    Args:
      run: The experiment.
      state: Before its first step.
      trained: Whether its norms have running statistics of their own, which are then used.

    Raises:
      UserError: if norms are asked for, and the net has no batch norm.
    """
    return _with_statistics(run, _with_ranges(run, state, trained))


def _with_ranges(run: Experiment, state: TrainState, trained: bool) -> TrainState:
    config = run.config.calibration
    model = nnx.merge(run.graph, *run.abstract[2:4])
    if not config.batch_size or not any(True for _ in layers.ranges(model)):
        return state
    batch = training_batch(run, config.batch_size)

    def calibrate(params, stats, batch, resident):
        model = nnx.merge(run.graph, params, stats)
        model.eval() if trained else model.train()
        images = data.normalise(data.gather(resident, batch)["image"], run.dataset.info)
        with layers.collecting("lost") as lost:
            found = layers.calibrate(model, images, how=config.how)
        _, params, stats = nnx.split(found, nnx.Param, ...)
        return (nnx.to_pure_dict(params), nnx.to_pure_dict(stats)), dict(lost)

    places = _places(run), sharding.replicated(run.mesh)
    (params, stats), lost = jax.jit(calibrate, out_shardings=places)(
        state.params, state.stats, batch, put_resident(run, "train")
    )
    for path, share in sharding.fetch(lost).items():
        if share > WORTH_A_WARNING:
            logging.warning(
                "%s: %.0f%% of its input's magnitude lies below 0 and is rounded to 0; an s behind "
                "the bits makes it signed, as in 'lsq:w4a4s'",
                path,
                100 * share,
            )
    ema = experiment.average_from(run.config, params, stats)
    return state._replace(params=params, stats=stats, ema=ema)


def training_batch(run: Experiment, images: int) -> dict:
    """The first batch of training images, of that size or what the devices and the split allow."""
    batch_size = run.config.train.batch_size  # which the devices divide
    most = len(run.dataset.train) // batch_size * batch_size
    size = min(sharding.round_up(images, run.mesh), most)
    rows = sharding.process_rows(size)
    with contextlib.closing(
        data.train_batches(run.dataset.train, size, seed=run.config.seed, rows=rows)
    ) as batches:
        return sharding.put_batch(next(batches), run.mesh)


def _with_statistics(run: Experiment, state: TrainState) -> TrainState:
    """The state with the batch norms' moments over `calibration.norm_batches` batches."""
    number, size = run.config.calibration.norm_batches, run.config.train.batch_size
    if not number:
        return state
    resident = put_resident(run, "train")

    @jax.jit
    def moments(params, stats, batch, resident):
        model = nnx.merge(run.graph, params, stats)
        images = data.normalise(data.gather(resident, batch)["image"], run.dataset.info)
        return layers.batch_moments(model, images)

    @functools.partial(jax.jit, out_shardings=_places(run))
    def with_moments(params, stats, found):
        model = nnx.merge(run.graph, params, stats)
        model = recalibrate.with_moments(model, recalibrate.merged(found))
        _, params, stats = nnx.split(model, nnx.Param, ...)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(stats)

    rows, hidden = sharding.process_rows(size), jax.process_index() > 0
    with contextlib.closing(
        data.train_batches(run.dataset.train, size, seed=run.config.seed, rows=rows)
    ) as batches:
        some = itertools.islice(batches, number)
        shown = tqdm(some, "norms", number, leave=False, delay=5, disable=hidden)
        found = [
            moments(state.params, state.stats, sharding.put_batch(batch, run.mesh), resident)
            for batch in shown
        ]
    params, stats = with_moments(state.params, state.stats, found)
    ema = experiment.average_from(run.config, params, stats)
    return state._replace(params=params, stats=stats, ema=ema)


def _places(run: Experiment):
    return jax.tree.map(lambda x: x.sharding, (run.abstract.params, run.abstract.stats))
