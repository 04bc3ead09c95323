"""Mutations, the ring of the population, and what evolution finds beside random search."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_nets.errors import UserError
from efficient_nets.models.space import Space
from efficient_nets.search import evolution
from efficient_nets.search.evolution import Evolution, Random

SPACE = Space(nodes=2, precisions=("a", "b", "c"))


@functools.partial(jax.jit, static_argnums=1)
def randoms(key, number):
    return evolution.randoms(SPACE, key, number)


@pytest.mark.parametrize("shared", [False, True])
def test_a_mutation_changes_one_thing_of_each_kind_as_often(shared):
    space = Space(nodes=2, precisions=("a", "b", "c"), shared_precision=shared)
    parent = space.random(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), 3000)
    found = jax.jit(jax.vmap(lambda key: evolution.mutate(space, key, parent)))(keys)
    for one in found[:100]:
        space.check(one)
    changed = np.asarray(found) != np.asarray(parent)
    kinds = changed.any((1, 2, 3))
    assert (kinds.sum(-1) == 1).all()
    several = 8 if shared else 1
    sizes = changed.sum((1, 2, 3, 4))
    np.testing.assert_array_equal(sizes, np.where(kinds[:, 2], several, 1))
    # Five standard deviations of a count of 3,000 draws.
    assert np.abs(kinds.sum(0) - 1000).max() < 5 * 26
    ops = changed[..., 1].sum(0)
    assert np.abs(ops - 125).max() < 5 * 11
    values = np.asarray(found)[changed[:, 0, 1, 0, 0], 0, 1, 0, 0]
    assert set(values) == set(range(space.choices[0, 1, 0, 0])) - {int(parent[0, 1, 0, 0])}


def test_what_there_is_one_of_does_not_change():
    space = Space(nodes=2, ops=("a",))
    keys = jax.random.split(jax.random.key(1), 50)
    parent = space.random(jax.random.key(0))
    found = jax.jit(jax.vmap(lambda key: evolution.mutate(space, key, parent)))(keys)
    changed = np.asarray(found) != np.asarray(parent)
    assert changed[..., 0].sum() == 50 == changed.sum()


def test_the_oldest_members_go_and_the_best_of_all_are_remembered():
    strategy = Evolution(SPACE, population=3, sample=2, keep=2)
    state, update = strategy.init(jax.random.key(0)), jax.jit(strategy.update)
    told = randoms(jax.random.key(1), 8)
    rewards = jnp.array([0.9, 0.1, 0.2, 0.3, 0.8, 0.4, jnp.nan, 0.5])
    for start in range(0, 8, 2):
        state, metrics = update(state, told[start : start + 2], rewards[start : start + 2])
    np.testing.assert_array_equal(state.architectures, told[jnp.array([6, 7, 5])])
    np.testing.assert_array_equal(state.rewards, jnp.array([-jnp.inf, 0.5, 0.4]))
    np.testing.assert_array_equal(strategy.finalists(state, None, 2), told[jnp.array([0, 4])])
    assert metrics["best_reward"] == rewards[0]
    assert metrics["population_reward"] == pytest.approx(0.45)


def test_children_are_of_the_best_of_a_sample():
    strategy = Evolution(SPACE, population=4, sample=2)
    told = randoms(jax.random.key(1), 4)
    state, _ = strategy.update(strategy.init(jax.random.key(0)), told, jnp.arange(4.0))
    found = np.asarray(jax.jit(strategy.propose, static_argnums=2)(state, jax.random.key(2), 4000))
    distances = (found[:, None] != np.asarray(told)[None]).sum((2, 3, 4, 5))
    assert (distances.min(1) == 1).all()
    counts = np.bincount(distances.argmin(1), minlength=4)
    # The greatest of two draws of 0 to 3; five standard deviations of a count.
    p = np.array([1, 3, 5, 7]) / 16
    np.testing.assert_array_less(np.abs(counts - 4000 * p), 5 * np.sqrt(4000 * p * (1 - p)))


def test_the_best_are_remembered_once_with_their_last_reward():
    strategy = Random(SPACE, keep=3)
    told = randoms(jax.random.key(1), 3)
    state = strategy.init(jax.random.key(0))
    state, _ = strategy.update(state, told[:2], jnp.array([0.5, 0.6]))
    expected = told[jnp.array([1, 0, 1])]  # the best again where fewer are known
    np.testing.assert_array_equal(strategy.finalists(state, None, 3), expected)
    again = told[jnp.array([1, 2, 2])]
    state, _ = strategy.update(state, again, jnp.array([0.1, 0.9, 0.3]))
    np.testing.assert_array_equal(strategy.finalists(state, None, 3), told[jnp.array([0, 2, 1])])
    np.testing.assert_array_equal(state.best.rewards, jnp.array([0.5, 0.3, 0.1]))


@pytest.mark.slow
def test_evolution_beats_random_search():
    hidden = SPACE.random(jax.random.key(3))

    @functools.partial(jax.jit, static_argnums=0)
    def searched(strategy, key):
        def step(state, key):
            found = strategy.propose(state, key, 10)
            hits = (found == hidden[None]).mean((1, 2, 3, 4))
            return strategy.update(state, found, hits)[0], None

        state, _ = jax.lax.scan(step, strategy.init(key), jax.random.split(key, 60))
        return state.best.rewards[0]

    keys = jax.random.split(jax.random.key(0), 4)
    found, other = (
        np.mean([searched(strategy, key) for key in keys])
        for strategy in (Evolution(SPACE, population=30, sample=8), Random(SPACE))
    )
    # Of 24 tokens random search finds about 15 by 600 tries.
    assert found > 0.85 and other < 0.75


def test_numbers_that_do_not_fit_are_named():
    with pytest.raises(UserError, match="evolution.sample=0: must be at least 1"):
        Evolution(SPACE, sample=0)
    strategy = Evolution(SPACE, population=2, keep=3)
    state, told = strategy.init(None), randoms(jax.random.key(1), 3)
    with pytest.raises(UserError, match="evolution.population=2: must be at least the 3"):
        strategy.update(state, told, jnp.zeros(3))
    with pytest.raises(UserError, match="keep=3: search.shown and search.finalists ask for 4"):
        strategy.finalists(state, None, 4)
