"""Optimizers and learning-rate schedules, from optax, with decay and rate set by parameter path."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from efficient_nets import names, paths
from efficient_nets.errors import UserError

Schedule = Callable[[jax.Array], jax.Array]
RULE_FIELDS = ("match", "learning_rate", "weight_decay", "bound")


def schedule(config: ConfigDict, learning_rate: float, epochs: float, per_epoch: float) -> Schedule:
    """Learning rate as a function of the number of updates made.

    Args:
      config: `config.schedule`.
      learning_rate: The peak.
      epochs: Length of the run; warm-up included.
      per_epoch: Updates an epoch.
    """
    if config.milestones and config.name != "multistep":
        raise UserError(
            f"schedule.milestones={tuple(config.milestones)}: {config.name} has none; "
            "use schedule.name='multistep', or leave them ()"
        )
    warmup = round(config.warmup_epochs * per_epoch)
    total = max(round(epochs * per_epoch), 1)
    if warmup >= total and warmup:
        raise UserError(
            f"schedule.warmup_epochs={config.warmup_epochs}: must be below train.epochs={epochs}"
        )
    rate = names.pick("schedule.name", config.name, SCHEDULES)(
        config, learning_rate, total - warmup, per_epoch, warmup
    )
    if warmup:
        rise = optax.linear_schedule(0.0, learning_rate, warmup)
        rate = optax.join_schedules([rise, rate], [warmup])
    return _standard_promotion(rate)


def _standard_promotion(function: Callable) -> Callable:
    """Optax's arithmetic mixes int and float, which JAX's strict mode would refuse."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        with jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return wrapped


def _cosine(config, peak, steps, per_epoch, warmup):
    return optax.cosine_decay_schedule(peak, steps, alpha=config.end_value / peak)


def _multistep(config, peak, steps, per_epoch, warmup):
    if not config.milestones:
        raise UserError(
            "schedule.milestones=(): multistep needs the epochs at which the rate drops"
        )
    return optax.piecewise_constant_schedule(
        peak, {round(epoch * per_epoch) - warmup: config.factor for epoch in config.milestones}
    )


def _restarts(config, peak, steps, per_epoch, warmup):
    if config.period <= 0 or config.stretch < 1:
        raise UserError(
            f"schedule.period={config.period}, schedule.stretch={config.stretch}: "
            "restarts need a period above 0 and a stretch of at least 1"
        )
    cycles, ends, period = [], [], config.period * per_epoch
    while not ends or ends[-1] < steps:
        length = max(round(period), 1)
        cycles.append(optax.cosine_decay_schedule(peak, length, alpha=config.end_value / peak))
        ends.append((ends[-1] if ends else 0) + length)
        period *= config.stretch
    return optax.join_schedules(cycles, ends[:-1])


SCHEDULES = {
    "constant": lambda config, peak, steps, per_epoch, warmup: optax.constant_schedule(peak),
    "cosine": _cosine,
    "multistep": _multistep,
    "poly": lambda config, peak, steps, per_epoch, warmup: optax.polynomial_schedule(
        peak, config.end_value, config.power, steps
    ),
    "restarts": _restarts,
}


def _sgd(config, decay):
    momentum = (
        optax.trace(config.momentum, config.nesterov) if config.momentum else optax.identity()
    )
    return optax.chain(decay, momentum)


def _scale_by_adam(config):
    return optax.scale_by_adam(config.b1, config.b2, config.epsilon)


OPTIMIZERS = {
    "sgd": _sgd,
    "adam": lambda config, decay: optax.chain(decay, _scale_by_adam(config)),
    "adamw": lambda config, decay: optax.chain(_scale_by_adam(config), decay),
    "lamb": lambda config, decay: optax.chain(
        _scale_by_adam(config), decay, optax.scale_by_trust_ratio()
    ),
}


def optimizer(config: ConfigDict, rate: Schedule, params: Any) -> optax.GradientTransformation:
    """Clip, then the named method with its weight decay, then the learning rate.

    SGD and Adam add `weight_decay * parameter` to the gradient (L2), AdamW and LAMB to the update
    (decoupled). `config.rules` set decay and rate by parameter path; by default biases and norm
    scales are not decayed. A rule's `bound` B keeps parameters in [-B, B], as BinaryNet (arXiv
    1602.02830) does with the weights behind signs.

    Args:
      config: `config.optimizer`.
      rate: Learning rate by number of updates.
      params: Parameters or their shapes, for their paths.

    Raises:
      UserError: on an unknown name, a rule that matches no parameter, or Nesterov's momentum where
        there is none.
    """
    make = names.pick("optimizer.name", config.name, OPTIMIZERS)
    if config.nesterov and not (config.name == "sgd" and config.momentum):
        raise UserError(
            f"optimizer.nesterov=True: it needs optimizer.name='sgd', here {config.name!r}, "
            f"and optimizer.momentum above 0, here {config.momentum}"
        )
    rules = [dict(rule) for rule in config.rules]
    if missing := paths.unmatched(rules, params):
        raise UserError(
            f"optimizer.rules: {missing[0]!r} matches no parameter: "
            + ", ".join(paths.named_leaves(params))
        )

    def by_path(field, default):
        return paths.map_named(
            lambda leaf, _: float(paths.lookup(rules, leaf, field, default)), params
        )

    decays = by_path("weight_decay", config.weight_decay)
    factors = by_path("learning_rate", 1.0)
    bounds = by_path("bound", 0.0)
    if not min(jax.tree.leaves(bounds), default=0.0) >= 0:
        raise UserError("optimizer.rules: bound must be at least 0; 0 is none")
    decay = optax.stateless(
        lambda updates, params: jax.tree.map(
            lambda u, p, wd: u + wd * p if wd else u, updates, params, decays
        )
    )
    parts = [
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        make(config, decay),
        optax.scale_by_learning_rate(rate),
        optax.stateless(
            lambda updates, _: jax.tree.map(
                lambda u, factor: u * factor if factor != 1.0 else u, updates, factors
            )
        ),
        optax.stateless(
            lambda updates, params: jax.tree.map(
                lambda u, p, b: jnp.clip(p + u, -b, b) - p if b else u, updates, params, bounds
            )
        ),
    ]
    chain = optax.chain(*parts)
    if config.accumulate > 1:
        chain = optax.MultiSteps(chain, config.accumulate).gradient_transformation()
    return optax.GradientTransformation(chain.init, _standard_promotion(chain.update))


@dataclasses.dataclass(frozen=True)
class Apart:
    """An optimizer for each part of a net, as a generator and its discriminator have.

    Attributes:
      chains: By the parts' names, the first ones in the parameters' paths. Each takes gradients and
        parameters `{part: ...}`, so that rules see the whole paths.
    """

    chains: dict[str, optax.GradientTransformation]

    def init(self, params: dict) -> dict:
        """States by part."""
        return {part: chain.init({part: params[part]}) for part, chain in self.chains.items()}


def apart(config: ConfigDict, rate: Schedule, params: Any, updates: dict[str, int]) -> Apart:
    """`optimizer` for each part.

    Args:
      config: `config.optimizer`.
      rate: Learning rate by number of steps.
      params: Parameters or their shapes.
      updates: How many each part has a step.

    Raises:
      UserError: as of `optimizer`, of the whole net.
    """
    optimizer(config, rate, params)  # which checks the rules
    chains = {}
    for part, number in updates.items():
        own = {part: params[part]}
        section = config.copy_and_resolve_references()
        idle = paths.unmatched([dict(rule) for rule in config.rules], own)
        section.rules = tuple(rule for rule in config.rules if rule["match"] not in idle)
        chains[part] = optimizer(section, functools.partial(_at_step, rate, number), own)
    return Apart(chains)


def _at_step(rate: Schedule, number: int, update: jax.Array) -> jax.Array:
    return rate(update // number)


def is_update(step: jax.Array, accumulate: int) -> jax.Array:
    """Whether step (from 0) ends with a change of the parameters."""
    return jnp.equal(jnp.remainder(step + 1, accumulate), 0)
