"""Where a run's quantizers start: ranges from one batch of training images."""

import contextlib

import jax
from flax import nnx

from efficient_nets import data, experiment, layers, sharding
from efficient_nets.evaluation import put_resident
from efficient_nets.experiment import Experiment, TrainState


def calibrated_start(run: Experiment, state: TrainState, *, trained: bool) -> TrainState:
    """The state with `config.calibration` applied, if anything is rounded.

    Ranges that another run brought are made anew too: its steps are those of its own bits.

    Args:
      run: The experiment.
      state: Before its first step.
      trained: Whether its norms have running statistics of their own, which are then used.
    """
    config = run.config.calibration
    model = nnx.merge(run.graph, *run.abstract[2:4])
    if not config.batch_size or not any(True for _ in layers.ranges(model)):
        return state
    batch_size = run.config.train.batch_size  # which the devices divide
    most = len(run.dataset.train) // batch_size * batch_size
    size = min(sharding.round_up(config.batch_size, run.mesh), most)
    rows = sharding.process_rows(size)
    with contextlib.closing(
        data.train_batches(run.dataset.train, size, seed=run.config.seed, rows=rows)
    ) as batches:
        batch = sharding.put_batch(next(batches), run.mesh)

    def calibrate(params, stats, batch, resident):
        model = nnx.merge(run.graph, params, stats)
        model.eval() if trained else model.train()
        images = data.normalise(data.gather(resident, batch)["image"], run.dataset.info)
        found = layers.calibrate(model, images, how=config.how)
        _, params, stats = nnx.split(found, nnx.Param, ...)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(stats)

    places = jax.tree.map(lambda x: x.sharding, (run.abstract.params, run.abstract.stats))
    params, stats = jax.jit(calibrate, out_shardings=places)(
        state.params, state.stats, batch, put_resident(run, "train")
    )
    ema = experiment.average_from(run.config, params, stats)
    return state._replace(params=params, stats=stats, ema=ema)
