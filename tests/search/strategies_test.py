"""What holds for every strategy: valid proposals, jit, and searches that are resumed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_nets.checkpoint import Checkpoints
from efficient_nets.models.space import Space
from efficient_nets.search.strategies import STRATEGIES

SPACE = Space(nodes=1, precisions=("a", "b"))
OPTIONS = {"enas": dict(size=4), "evolution": dict(population=6, sample=3), "random": {}}
OPTIONS |= {"nsga2": dict(population=6), "darts": {}, "gumbel": {}}


def reward(name, architectures):
    found = -jnp.mean(architectures, (1, 2, 3), dtype=jnp.float32)
    return found[:, :2] if name == "nsga2" else found.mean(-1)


def told(name, strategy, state, architectures, step):
    """The next state, and metrics."""
    if hasattr(strategy, "update"):
        return strategy.update(state, architectures, reward(name, architectures))

    def loss(logits):
        choices, _ = strategy.relaxed(logits, jax.random.key(step), step / 4)
        return sum(jnp.sum(jnp.sin(each)) for each in choices)

    return strategy.descend(state, jax.grad(loss)(state.logits))


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_resumed_search_equals_the_one_that_was_not_stopped(name, tmp_path):
    strategy = STRATEGIES[name](SPACE, **OPTIONS[name])

    @jax.jit
    def a_round(state, step):
        found = strategy.propose(state, jax.random.fold_in(jax.random.key(0), step), 4)
        return found, *told(name, strategy, state, found, step)

    def run(state, steps):
        for step in steps:
            found, state, metrics = a_round(state, step)
            assert found.shape == (4, *SPACE.shape) and found.dtype == jnp.int32
            for one in np.asarray(found):
                SPACE.check(one)
            for value in metrics.values():
                assert value.shape == () and value.dtype == jnp.float32 and np.isfinite(value)
        return state

    start = jax.jit(strategy.init)(jax.random.key(1))
    whole, half = run(start, range(4)), run(start, range(2))
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(2, half, meta={}, metrics={})
    restored, *_ = checkpoints.restore(jax.tree.map(jnp.zeros_like, half))
    checkpoints.close()
    restored = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), restored)
    resumed = run(restored, range(2, 4))
    assert a_round._cache_size() == 1
    assert jax.tree.structure(whole) == jax.tree.structure(resumed) == jax.tree.structure(start)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(one, other)
    finalists = jax.jit(strategy.finalists, static_argnums=2)(resumed, jax.random.key(2), 3)
    assert finalists.shape == (3, *SPACE.shape) and finalists.dtype == jnp.int32
