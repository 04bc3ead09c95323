"""Regularised evolution (arXiv 1802.01548), and random search, which it has to beat."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from efficient_nets.errors import UserError
from efficient_nets.models.space import INPUT, OP, PRECISION, Space


class Best(NamedTuple):
    """The best architectures so far, the best first, each once.

    Attributes:
      architectures: int32 `(K, 2, B, 2, 3)`.
      rewards: float32 `(K,)`, -inf where there is none yet.
    """

    architectures: Array
    rewards: Array

    def told(self, architectures: Array, rewards: Array) -> "Best":
        """With these among them. One that is measured again has its last reward."""
        found = jnp.concatenate([self.architectures, architectures])
        scores = jnp.concatenate([self.rewards, no_number_is_worst(rewards)])
        scores = jnp.where(superseded(found, scores > -jnp.inf), -jnp.inf, scores)
        order = jnp.argsort(-scores)[: len(self.rewards)]
        return Best(found[order], scores[order])

    def first(self, number: int) -> Array:
        """So many, the best again where fewer are known."""
        if number > len(self.rewards):
            raise UserError(
                f"keep={len(self.rewards)}: search.shown and search.finalists ask for {number} of "
                "them; keep at least as many"
            )
        known = over(self.rewards > -jnp.inf, self.architectures)
        return jnp.where(known, self.architectures, self.architectures[:1])[:number]


def empty(space: Space, number: int) -> Best:
    return Best(
        jnp.zeros((number, *space.shape), jnp.int32), jnp.full(number, -jnp.inf, jnp.float32)
    )


def no_number_is_worst(rewards: Array) -> Array:
    return jnp.where(jnp.isnan(rewards), -jnp.inf, rewards)


def superseded(architectures: Array, known: Array) -> Array:
    """Which of n architectures come again later, among those that are known: bool `(n,)`."""
    flat = architectures.reshape(len(architectures), -1)
    alike = (flat[:, None] == flat[None]).all(-1)
    later = jnp.arange(len(flat))[:, None] < jnp.arange(len(flat))[None]
    return (alike & later & known[None]).any(-1)


def randoms(space: Space, key: Array, number: int) -> Array:
    """`(number, 2, B, 2, 3)`, each as probable as any other."""
    return jax.vmap(space.random)(jax.random.split(key, number))


def others(space: Space, key: Array, architecture: Array) -> Array:
    """Another value at each token that has several, all of these as probable."""
    choices = jnp.asarray(space.choices)
    step = 1 + jax.random.randint(key, space.shape, 0, jnp.maximum(choices - 1, 1), jnp.int32)
    return (architecture + step) % choices


def mutate(space: Space, key: Array, architecture: Array) -> Array:
    """With another input, op or precision of one operand; each of the three as probable.

    Ops and precisions that there is one of are left out. A shared precision changes everywhere.
    """
    of_field, of_place, of_value = jax.random.split(key, 3)
    several = {INPUT: True, OP: len(space.ops) > 1, PRECISION: len(space.precisions) > 1}
    fields = jnp.array([field for field, there in several.items() if there])
    field = jax.random.choice(of_field, fields)
    operands = space.choices[..., 0].size
    place = jax.random.randint(of_place, (), 0, operands)
    if space.shared_precision:
        place = jnp.where(field == PRECISION, 0, place)
    here = (jnp.arange(operands) == place)[:, None] & (jnp.arange(3) == field)[None]
    changed = others(space, of_value, architecture)
    return space.canonical(jnp.where(here.reshape(space.shape), changed, architecture))


class RandomState(NamedTuple):
    best: Best


@dataclasses.dataclass(frozen=True)
class Random:
    """The strategy "random", see `strategies.Strategy`.

    Attributes:
      space: Of the architectures.
      keep: How many of the best are remembered, which are the finalists.
    """

    space: Space
    keep: int = 10

    def __post_init__(self):
        check_least("random", self, keep=1)

    def init(self, key: Array) -> RandomState:
        del key
        return RandomState(empty(self.space, self.keep))

    def propose(self, state: RandomState, key: Array, number: int) -> Array:
        del state
        return randoms(self.space, key, number)

    def update(self, state: RandomState, architectures: Array, rewards: Array):
        best = state.best.told(architectures, rewards)
        return RandomState(best), {"reward": rewards.mean(), "best_reward": best.rewards[0]}

    def finalists(self, state: RandomState, key: Array, number: int) -> Array:
        del key
        return state.best.first(number)


class EvolutionState(NamedTuple):
    """The population, a ring whose oldest member is the next to go.

    Attributes:
      architectures: int32 `(P, 2, B, 2, 3)`.
      rewards: float32 `(P,)`, -inf where there is none yet.
      told: int32 (), how many were told; the next one's place is `told % P`.
      best: Of all that were told.
    """

    architectures: Array
    rewards: Array
    told: Array
    best: Best


@dataclasses.dataclass(frozen=True)
class Evolution:
    """The strategy "evolution": aging evolution, see `strategies.Strategy`.

    The first `population` architectures are random. From then on each is a mutation of the best of
    `sample` members, drawn with replacement, and takes the place of the oldest member. Those that
    are proposed together come from the same population.

    Attributes:
      space: Of the architectures.
      population: P.
      sample: S.
      keep: How many of the best of all are remembered, which are the finalists.
    """

    space: Space
    population: int = 100
    sample: int = 25
    keep: int = 10

    def __post_init__(self):
        check_least("evolution", self, population=1, sample=1, keep=1)

    def init(self, key: Array) -> EvolutionState:
        del key
        start, best = empty(self.space, self.population), empty(self.space, self.keep)
        return EvolutionState(*start, jnp.zeros((), jnp.int32), best)

    def propose(self, state: EvolutionState, key: Array, number: int) -> Array:
        of_random, of_parent, of_change = jax.random.split(key, 3)
        members = jnp.clip(state.told, 1, self.population)
        drawn = jax.random.randint(of_parent, (number, self.sample), 0, members)
        best = state.rewards[drawn].argmax(-1)
        parents = state.architectures[jnp.take_along_axis(drawn, best[:, None], 1)[:, 0]]
        keys = jax.random.split(of_change, number)
        children = jax.vmap(lambda key, parent: mutate(self.space, key, parent))(keys, parents)
        fresh = state.told + jnp.arange(number) < self.population
        return jnp.where(over(fresh, children), randoms(self.space, of_random, number), children)

    def update(self, state: EvolutionState, architectures: Array, rewards: Array):
        if len(rewards) > self.population:
            raise UserError(
                f"evolution.population={self.population}: must be at least the {len(rewards)} that "
                "are told together"
            )
        rewards = no_number_is_worst(rewards)
        places = (state.told + jnp.arange(len(rewards))) % self.population
        new = EvolutionState(
            state.architectures.at[places].set(architectures),
            state.rewards.at[places].set(rewards),
            state.told + len(rewards),
            state.best.told(architectures, rewards),
        )
        there = new.rewards > -jnp.inf
        metrics = {
            "reward": rewards.mean(),
            "population_reward": jnp.mean(new.rewards, where=there),
            "best_reward": new.best.rewards[0],
        }
        return new, metrics

    def finalists(self, state: EvolutionState, key: Array, number: int) -> Array:
        del key
        return state.best.first(number)


def over(mask: Array, architectures: Array) -> Array:
    """The mask `(n,)` in a shape that goes with architectures."""
    return mask.reshape(-1, *[1] * (architectures.ndim - 1))


def check_least(strategy: str, options, **least: int) -> None:
    """Raises a UserError if one of these options is below the least that it can be."""
    for name, number in least.items():
        if getattr(options, name) < number:
            raise UserError(
                f"{strategy}.{name}={getattr(options, name)}: must be at least {number}"
            )
