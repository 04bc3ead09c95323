"""NSGA-II: evolution towards a front of several objectives (Deb et al., IEEE TEVC 6(2), 2002)."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from efficient_nets.errors import UserError
from efficient_nets.models.space import Space
from efficient_nets.search import evolution
from efficient_nets.search.rewards import dominates


class NSGA2State(NamedTuple):
    """The population, in the order of front and crowding: of two, the earlier one wins.

    Attributes:
      architectures: int32 `(P, 2, B, 2, 3)`, each once.
      objectives: float32 `(P, M)`, -inf where there is none yet.
      told: int32 (), how many were told.
    """

    architectures: Array
    objectives: Array
    told: Array


@dataclasses.dataclass(frozen=True)
class NSGA2:
    """The strategy "nsga2", see `strategies.Strategy`.

    The first `population` architectures are random. From then on each is a child of two parents:
    each is the better of two members, by the front that it is in, then by the room around it. A
    token comes from either parent, then changes with a small probability. Of members and children
    the best `population` stay, each architecture once, with the last objectives it had.

    Attributes:
      space: Of the architectures.
      objectives: M, how many, each the greater the better: a cost is told negated.
      population: P.
      crossover: Probability that a child has two parents; else it is a mutation of one.
      mutation: Probability that a token changes; None for that of one token a child.
    """

    space: Space
    objectives: int = 2
    population: int = 50
    crossover: float = 0.9
    mutation: float | None = None

    def __post_init__(self):
        evolution.check_least("nsga2", self, objectives=1, population=2)
        for name in ("crossover", "mutation"):
            if (given := getattr(self, name)) is not None and not 0 <= given <= 1:
                raise UserError(f"nsga2.{name}={given}: must be in [0, 1]")

    def init(self, key: Array) -> NSGA2State:
        del key
        architectures, _ = evolution.empty(self.space, self.population)
        objectives = jnp.full((self.population, self.objectives), -jnp.inf, jnp.float32)
        return NSGA2State(architectures, objectives, jnp.zeros((), jnp.int32))

    def propose(self, state: NSGA2State, key: Array, number: int) -> Array:
        of_random, of_parents, of_children = jax.random.split(key, 3)
        members = jnp.maximum(_known(state.objectives).sum(), 1)
        drawn = jax.random.randint(of_parents, (number, 2, 2), 0, members)
        parents = state.architectures[drawn.min(-1)]
        children = jax.vmap(self._child)(jax.random.split(of_children, number), parents)
        fresh = state.told + jnp.arange(number) < self.population
        random = evolution.randoms(self.space, of_random, number)
        return jnp.where(evolution.over(fresh, children), random, children)

    def _child(self, key: Array, parents: Array) -> Array:
        """`(2, B, 2, 3)` of parents `(2, 2, B, 2, 3)`."""
        of_pair, of_cross, of_mask, of_value = jax.random.split(key, 4)
        shape, tokens = self.space.shape, self.space.choices
        crossed = jax.random.bernoulli(of_pair, self.crossover)
        second = jax.random.bernoulli(of_cross, 0.5, shape) & crossed
        child = jnp.where(second, parents[1], parents[0])
        rate = 1 / (tokens > 1).sum() if self.mutation is None else self.mutation
        mutated = jax.random.bernoulli(of_mask, rate, shape)
        child = jnp.where(mutated, evolution.others(self.space, of_value, child), child)
        return self.space.canonical(child)

    def update(self, state: NSGA2State, architectures: Array, rewards: Array):
        if rewards.ndim != 2 or rewards.shape[1] != self.objectives:
            raise UserError(
                f"nsga2.objectives={self.objectives}: rewards have the shape {rewards.shape}, must "
                f"be (n, {self.objectives})"
            )
        found = jnp.concatenate([state.architectures, architectures])
        objectives = jnp.concatenate([state.objectives, rewards])
        gone = evolution.superseded(found, _known(objectives)) | ~_known(objectives)
        objectives = jnp.where(gone[:, None], -jnp.inf, objectives)
        ranks = fronts(objectives)
        order = jnp.lexsort((-crowding(objectives, ranks), ranks))[: self.population]
        new = NSGA2State(found[order], objectives[order], state.told + len(rewards))
        first = (ranks[order] == 0) & _known(new.objectives)
        metrics = {"front": first.sum().astype(jnp.float32)}
        for column in range(self.objectives):
            metrics[f"objective{column}"] = rewards[:, column].mean()
            metrics[f"best_objective{column}"] = new.objectives[:, column].max()
        return new, metrics

    def finalists(self, state: NSGA2State, key: Array, number: int) -> Array:
        """The front first, its ends and its loneliest members before others."""
        del key
        if number > self.population:
            raise UserError(
                f"nsga2.population={self.population}: search.shown and search.finalists ask for "
                f"{number} of them; have at least as many"
            )
        known = evolution.over(_known(state.objectives), state.architectures)
        return jnp.where(known, state.architectures, state.architectures[:1])[:number]


def fronts(objectives: Array) -> Array:
    """The front that each of n is in, int32 `(n,)`: 0 for those that none dominates.

    Front k has those that none dominates once the fronts before it are taken away.

    Args:
      objectives: `(n, M)`, the greater the better.
    """
    beats = dominates(objectives)

    def peel(carry):
        number, ranks = carry
        left = ranks < 0
        front = left & ~(beats & left[:, None]).any(0)
        return number + 1, jnp.where(front, number, ranks)

    start = jnp.zeros((), jnp.int32), jnp.full(len(objectives), -1, jnp.int32)
    return lax.while_loop(lambda carry: (carry[1] < 0).any(), peel, start)[1]


def crowding(objectives: Array, ranks: Array) -> Array:
    """How far each of n is from its neighbours in its front: `(n,)`, inf at the ends.

        sum_m (f_m of the next greater one - f_m of the next smaller one) / (max f_m - min f_m)

    Args:
      objectives: `(n, M)`.
      ranks: Of `fronts`.
    """
    number = len(ranks)
    objectives = jnp.where(jnp.isfinite(objectives), objectives, 0)

    def along(values):
        order = jnp.lexsort((values, ranks))
        sorted_values, sorted_ranks = values[order], ranks[order]
        lowest, highest = (
            extreme(values, ranks, number)[sorted_ranks]
            for extreme in (jax.ops.segment_min, jax.ops.segment_max)
        )
        span = highest - lowest
        gaps = jnp.roll(sorted_values, -1) - jnp.roll(sorted_values, 1)
        gaps = jnp.where(span > 0, gaps / jnp.where(span > 0, span, 1), 0)
        begins = jnp.append(True, sorted_ranks[1:] != sorted_ranks[:-1])
        ends = jnp.append(sorted_ranks[1:] != sorted_ranks[:-1], True)
        return jnp.zeros_like(values).at[order].set(jnp.where(begins | ends, jnp.inf, gaps))

    return jax.vmap(along, 1)(objectives).sum(0)


def _known(objectives: Array) -> Array:
    return jnp.isfinite(objectives).all(-1)
