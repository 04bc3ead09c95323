"""The training step of a generator and its discriminator, each with an optimizer of its own."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array, lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from efficient_nets import data, layers, sharding, updates
from efficient_nets.experiment import Experiment, TrainState

GENERATOR, DISCRIMINATOR = "generator", "discriminator"


def train_step(
    run: Experiment, state: TrainState, batch: dict, resident: dict | None, teacher=None
):
    """Some updates of the discriminator, then one of the generator. Pure.

    The `train.batch_size` images are those of all `generation.critic_updates`: each has B of its
    own, and B made ones, as one batch; the generator's has `generation.generator_batches` times B.
    What the discriminator is shown is made in one batch, by the generator in training mode.

    Norms' averages and quantizers of a part move in its own updates alone, as do spectral norms.

    Args:
      run, state, batch, resident: As of `train.train_step`.
      teacher: None; this task has none.

    Returns:
      The new state; losses and mean scores, of the discriminator over its updates, norms of the
      gradients, and what `updates.stepped` gives.
    """
    task = run.task
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    inputs_key, *latent_keys = jax.random.split(key, 3)
    batch = data.gather(resident, batch)
    images, _ = task.inputs(inputs_key, batch, config_data=run.config.data, info=run.dataset.info)
    state = updates.advanced(run, state)
    params, stats, optimizer = state.params, state.stats, state.optimizer

    of_part = len(images) // task.critic_updates
    shown = merged(run, params, stats).generator(latents(run, latent_keys[0], len(images)))
    shown = lax.stop_gradient(shown).astype(images.dtype)
    # Cut so that each device keeps rows of its own.
    rows = jnp.stack([images, shown], axis=1)
    rows = rows.reshape(of_part, task.critic_updates, 2, *images.shape[1:])
    real = jnp.tile(jnp.array([1, 0], jnp.float32), of_part)

    found = []
    for index in range(task.critic_updates):
        both = rows[:, index].reshape(2 * of_part, *images.shape[1:])

        def criticise(model, both=both):
            return task.loss(model.discriminator(both), real)

        params, stats, optimizer, metrics = _update(
            run, DISCRIMINATOR, criticise, params, stats, optimizer
        )
        found.append(metrics)
    metrics = {name: sum(each[name] for each in found) / len(found) for name in found[0]}

    def generate(model):
        z = latents(run, latent_keys[1], task.generator_batches * of_part)
        loss = task.generator_loss(model.discriminator(model.generator(z)))
        return loss, {"generator_loss": loss}

    params, stats, optimizer, others = _update(run, GENERATOR, generate, params, stats, optimizer)
    metrics |= others
    norms = [metrics[f"{part}_gradient_norm"] for part in (GENERATOR, DISCRIMINATOR)]
    metrics["gradient_norm"] = jnp.sqrt(sum(norm**2 for norm in norms))
    state, of_state = updates.stepped(run, state, params, stats, optimizer)
    return state, metrics | of_state


def merged(run: Experiment, params, stats) -> nnx.Module:
    """The net in training mode."""
    model = nnx.merge(run.graph, params, stats)
    model.train()
    return model


def latents(run: Experiment, key: Array, number: int) -> Array:
    """`(number, latent)` of a standard normal distribution, cut over the devices."""
    size = run.config.model.latent
    drawn = jax.random.normal(key, (number, size), jnp.float32)
    return lax.with_sharding_constraint(drawn, NamedSharding(run.mesh, P(sharding.BATCH_AXES)))


def _update(
    run: Experiment, part: str, objective: Callable, params: dict, stats: dict, optimizer: dict
) -> tuple[dict, dict, dict, dict[str, Array]]:
    """One update of a part: parameters, stats, the optimizer's state, metrics."""

    def loss_fn(own):
        model = merged(run, params | own, stats)
        with layers.collecting("losses") as losses:
            loss, metrics = objective(model)
        mine = [layer for path, layer in layers.layers(model) if path.startswith(f"{part}/")]
        for layer in mine:
            of_quantizers = [value for other, value in losses if other is layer]
            loss = loss + sum(of_quantizers)
            if layer.has_penalty:
                loss = loss + layer.penalty
        return loss, (updates.stats_of(model), metrics)

    own = {part: params[part]}
    gradient, (moved, metrics) = jax.grad(loss_fn, has_aux=True)(own)
    chain = run.optimizer.chains[part]
    change, of_chain = chain.update(gradient, optimizer[part], own)
    metrics[f"{part}_gradient_norm"] = optax.tree.norm(gradient)
    stats = stats | {part: moved[part]} if part in moved else stats
    own = optax.apply_updates(own, change)
    return params | own, stats, optimizer | {part: of_chain}, metrics
