"""Parts of a training step that do not depend on what is trained for. Pure."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from efficient_nets import layers, optim
from efficient_nets.experiment import Experiment, TrainState


def advanced(run: Experiment, state: TrainState) -> TrainState:
    """The state with the quantizers, the averaged net's too, where their schedules are now."""
    epoch = state.step.astype(jnp.float32) / run.epoch_steps

    def moved(params, stats):
        model = nnx.merge(run.graph, params, stats)
        scheduled = [found for _, found in layers.ranges(model) if found.quantizer.scheduled]
        if not scheduled:
            return {"params": params, "stats": stats}
        layers.advance(scheduled, epoch)
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        return {"params": params, "stats": stats_of(model)}

    ema = moved(**state.ema) if state.ema else state.ema
    return state._replace(**moved(state.params, state.stats), ema=ema)


def updated(
    run: Experiment, state: TrainState, gradient, stats
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The state a step on, by the optimizer.

    Args:
      run: The experiment.
      state: As of `advanced`.
      gradient: Of `state.params`.
      stats: The net's other state after the step.

    Returns:
      The new state; norms of the gradient and of the new parameters, and the learning rate.
    """
    updates, optimizer = run.optimizer.update(gradient, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    state, metrics = stepped(run, state, params, stats, optimizer)
    return state, {"gradient_norm": optax.tree.norm(gradient)} | metrics


def stepped(
    run: Experiment, state: TrainState, params, stats, optimizer
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The state a step on, with parameters and the other arrays as an update left them.

    Returns:
      The new state; the norm of its parameters, and the learning rate.
    """
    params = _held(run, state, params)
    accumulate = run.config.optimizer.accumulate
    metrics = {
        "parameter_norm": optax.tree.norm(params),
        "learning_rate": jnp.asarray(run.rate(state.step // accumulate), jnp.float32),
    }
    return TrainState(
        step=state.step + 1,
        key=state.key,
        params=params,
        stats=stats,
        optimizer=optimizer,
        ema=_moved(run, state, params, stats),
    ), metrics


def stats_of(model: nnx.Module) -> dict:
    """What a `TrainState` holds of a model beside its parameters."""
    return nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param)))


def _held(run: Experiment, state: TrainState, params):
    """The parameters with the ranges that their schedules have frozen as they were."""
    models = [nnx.merge(run.graph, found, state.stats) for found in (params, state.params)]
    new, old = (
        [found for _, found in layers.ranges(model) if found.quantizer.scheduled]
        for model in models
    )
    if not new:
        return params
    layers.hold(new, old)
    return nnx.to_pure_dict(nnx.state(models[0], nnx.Param))


def _moved(run: Experiment, state: TrainState, params, stats):
    """The moving average, a step on; what is not of a float type, as counts, stays the net's."""
    decay = run.config.train.ema
    if not decay:
        return {}
    moves = optim.is_update(state.step, run.config.optimizer.accumulate)
    keep = jnp.where(moves, decay, 1.0).astype(jnp.float32)

    def move(old, new):
        return keep * old + (1 - keep) * new if jnp.issubdtype(new.dtype, jnp.floating) else new

    return jax.tree.map(move, state.ema, {"params": params, "stats": stats})
