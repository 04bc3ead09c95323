"""Fronts and crowding against loops, and what NSGA-II finds beside random search."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_nets.errors import UserError
from efficient_nets.models.space import Space
from efficient_nets.search import evolution, nsga2
from efficient_nets.search.nsga2 import NSGA2
from efficient_nets.search.rewards import hypervolume

SPACE = Space(nodes=2, precisions=("a", "b", "c"))


@functools.partial(jax.jit, static_argnums=1)
def randoms(key, number):
    return evolution.randoms(SPACE, key, number)


def beats(one, other):
    return all(one >= other) and any(one > other)


def front_numbers(points):
    left, found, number = set(range(len(points))), {}, 0
    while left:
        front = {i for i in left if not any(beats(points[j], points[i]) for j in left)}
        found |= dict.fromkeys(front, number)
        left, number = left - front, number + 1
    return [found[i] for i in range(len(points))]


def distances(points, ranks):
    """By Deb's procedure, a front and an objective after the other."""
    found = np.zeros(len(points))
    for rank in set(ranks):
        members = np.flatnonzero(ranks == rank)
        for values in points.T:
            order = members[np.argsort(values[members], kind="stable")]
            span = values[order[-1]] - values[order[0]]
            found[order[[0, -1]]] = np.inf
            for before, here, after in zip(order, order[1:], order[2:], strict=False):
                found[here] += (values[after] - values[before]) / span if span else 0
    return found


@pytest.mark.parametrize("ties", [False, True])
def test_fronts_and_crowding_are_those_of_the_definitions(ties):
    rng = np.random.default_rng(0)
    points = rng.integers(0, 4, (40, 2)) if ties else rng.normal(size=(40, 3))
    points = points.astype(np.float32)
    ranks = np.asarray(jax.jit(nsga2.fronts)(jnp.asarray(points)))
    np.testing.assert_array_equal(ranks, front_numbers(points))
    assert ranks.max() > 2
    found = jax.jit(nsga2.crowding)(jnp.asarray(points), jnp.asarray(ranks))
    # Sums of three quotients in single precision.
    np.testing.assert_allclose(found, distances(points, ranks), rtol=1e-5)


def test_the_first_fronts_stay_and_of_the_last_the_loneliest():
    strategy = NSGA2(SPACE, population=4)
    told = randoms(jax.random.key(1), 7)
    objectives = [[0, 3], [0.1, 2], [0.5, 1.9], [3, 0], [0, 0], [9, 9], [jnp.nan, 9]]
    update = jax.jit(strategy.update)
    state, metrics = update(strategy.init(None), told, jnp.array(objectives))
    assert metrics["front"] == 1 and metrics["best_objective1"] == 9
    # The second front's ends, and then (0.5, 1.9), which has more room than (0.1, 2).
    kept = {tuple(row) for row in np.asarray(state.objectives).tolist()}
    assert kept == {(9, 9), (0, 3), (3, 0), (0.5, np.float32(1.9))}
    # What is measured again has its last objectives.
    state, _ = update(state, told[5:6], jnp.array([[-1.0, -1.0]]))
    assert state.objectives[-1].tolist() == [-1, -1]
    assert not (state.objectives == 9).any()
    assert (strategy.finalists(state, None, 4)[-1] == told[5]).all()


def test_children_are_of_tokens_of_two_parents():
    strategy = NSGA2(SPACE, population=6, crossover=1.0, mutation=0.0)
    told = randoms(jax.random.key(1), 2)
    # Both are ends of one front; with crossover and no mutation all tokens are of either.
    objectives = jnp.array([[0.0, 1.0], [1.0, 0.0]])
    state, _ = strategy.update(strategy.init(None), told, objectives)
    state = state._replace(told=jnp.asarray(6))
    children = jax.jit(strategy.propose, static_argnums=2)(state, jax.random.key(2), 500)
    of_first, of_second = (np.asarray(children == one[None]) for one in told)
    assert (of_first | of_second).all()
    mixed = ~of_first.all((1, 2, 3, 4)) & ~of_second.all((1, 2, 3, 4))
    assert mixed.mean() > 0.3  # one half has twice the same parent


def test_parents_win_a_tournament_of_two():
    strategy = NSGA2(SPACE, population=4, crossover=0.0, mutation=0.0)
    told = randoms(jax.random.key(1), 4)
    objectives = jnp.array([[3.0, 3.0], [2.0, 2.0], [1.0, 1.0], [0.0, 0.0]])
    state, _ = strategy.update(strategy.init(None), told, objectives)
    found = jax.jit(strategy.propose, static_argnums=2)(state, jax.random.key(2), 2000)
    counts = (np.asarray(found)[:, None] == np.asarray(told)[None]).all((2, 3, 4, 5)).sum(0)
    # The first of two draws of four; five standard deviations of a count.
    p = np.array([7, 5, 3, 1]) / 16
    np.testing.assert_array_less(np.abs(counts - 2000 * p), 5 * np.sqrt(2000 * p * (1 - p)))


@pytest.mark.slow
def test_it_finds_a_better_front_than_random_search():
    weights = jax.random.uniform(jax.random.key(3), (*SPACE.shape, 5))

    def objectives(found):
        """A table of what tokens are worth, more at high precisions, which cost."""
        hits = jnp.take_along_axis(
            jnp.broadcast_to(weights, (len(found), *weights.shape)), found[..., None], -1
        )[..., 0]
        cost = found[..., 2].mean((1, 2, 3)) / 2
        return jnp.stack([hits.mean((1, 2, 3, 4)) * (0.5 + cost / 2), -cost], axis=-1)

    @functools.partial(jax.jit, static_argnums=0)
    def searched(strategy, key):
        def step(state, key):
            found = strategy.propose(state, key, 20)
            return strategy.update(state, found, objectives(found))[0], None

        return jax.lax.scan(step, strategy.init(key), jax.random.split(key, 30))[0].objectives

    volumes = []
    for seed in range(3):
        key = jax.random.key(seed)
        found = searched(NSGA2(SPACE, population=20), key)
        other = objectives(randoms(key, 20 * 30))
        volumes.append([hypervolume(each, (0.0, -1.0)) for each in (found, other)])
    assert all(found > 1.1 * other for found, other in volumes), volumes


def test_numbers_that_do_not_fit_are_named():
    with pytest.raises(UserError, match=r"nsga2.mutation=2: must be in \[0, 1\]"):
        NSGA2(SPACE, mutation=2)
    strategy = NSGA2(SPACE, objectives=2)
    told = randoms(jax.random.key(1), 3)
    with pytest.raises(UserError, match=r"rewards have the shape \(3,\), must be \(n, 2\)"):
        strategy.update(strategy.init(None), told, jnp.zeros(3))
