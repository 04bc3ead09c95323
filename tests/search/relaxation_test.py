"""Relaxed tokens: what is drawn, what the gradient is, and what is derived."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_nets.models.space import Space
from efficient_nets.search import relaxation
from efficient_nets.search.relaxation import Choices, Relaxation

SPACE = Space(nodes=2, ops=("sep3", "max3", "identity"), precisions=("a", "b"))
SHARED = Space(nodes=2, ops=("sep3",), precisions=("a", "b", "c"), shared_precision=True)


def softmax(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def random_logits(space):
    return Relaxation(space, noise=1.0).init(jax.random.key(3))


@pytest.mark.parametrize("space", [SPACE, SHARED])
def test_draws_follow_the_probabilities_and_none_is_out_of_range(space):
    relaxed, logits, number = Relaxation(space), random_logits(space), 4000
    p = jax.jit(relaxed.probabilities)(logits)
    for each, of in zip(p, logits, strict=True):
        expected = np.broadcast_to(softmax(np.asarray(of, np.float64)), each.shape)
        np.testing.assert_allclose(each, expected, rtol=1e-5)
    draw = jax.jit(jax.vmap(lambda key: relaxed.sample(logits, key, 0.5)))
    found = draw(jax.random.split(jax.random.key(0), number))
    tokens = np.asarray(jax.jit(jax.vmap(relaxation.most_probable))(found))
    for one in tokens[:100]:
        space.check(one)
    hots = jax.vmap(lambda one: relaxation.one_hots(space, one))(jnp.asarray(tokens))
    for hot, each, share in zip(hots, found, p, strict=True):
        # Forward it is the one-hot but for the rounding of (1 + soft) - soft.
        np.testing.assert_allclose(each, hot, atol=1e-6)
        deviation = np.sqrt(share * (1 - share) / number)
        np.testing.assert_array_less(np.abs(hot.mean(0) - share), 5 * deviation + 1e-9)


def test_the_gradient_is_that_of_the_softmax():
    relaxed, logits = Relaxation(SPACE), random_logits(SPACE)
    key, temperature = jax.random.key(1), 0.7
    weights = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size * 1.0)), logits)

    def total(choices):
        pairs = zip(choices, weights, strict=True)
        return sum(jnp.sum(each.reshape(-1) * weight) for each, weight in pairs)

    found = jax.jit(jax.grad(lambda logits: total(relaxed.sample(logits, key, temperature))))(
        logits
    )

    def soft(logits):
        keys = jax.random.split(key, 3)
        noisy = [
            of + jax.random.gumbel(one, of.shape) for of, one in zip(logits, keys, strict=True)
        ]
        return total(Choices(*(jax.nn.softmax(each / temperature) for each in noisy)))

    expected = jax.jit(jax.grad(soft))(logits)
    for one, other in zip(found, expected, strict=True):
        # Single precision; what is not there has no gradient.
        np.testing.assert_allclose(one, np.nan_to_num(other), atol=1e-6)
    assert not found.inputs[:, 0, :, 2:].any()


def test_gates_are_one_and_pass_on_the_gradient_of_what_was_chosen():
    relaxed, logits = Relaxation(SPACE), random_logits(SPACE)

    @jax.jit
    def of(logits):
        choices = relaxed.sample(logits, jax.random.key(1), 1.0)
        architecture = relaxation.most_probable(choices)
        return relaxation.gates(choices, architecture)

    np.testing.assert_allclose(of(logits), np.ones((2, 2, 2)), atol=1e-6)
    gradient = jax.jit(jax.grad(lambda logits: of(logits)[1, 0, 1]))(logits)
    for each in gradient:
        touched = np.argwhere(np.asarray(each).any(-1))
        assert touched.tolist() == [[1, 0, 1]]
        # Probabilities sum to 1 whatever the logits.
        assert float(each.sum()) == pytest.approx(0, abs=1e-6)


def test_entropy_is_that_of_all_architectures():
    relaxed = Relaxation(SHARED)
    logits = relaxed.init(jax.random.key(0))
    # At the start nearly as of architectures that are all as probable.
    assert float(relaxed.entropy(logits)) == pytest.approx(np.log(SHARED.size), rel=1e-4)
    logits = random_logits(SHARED)
    entropies = [
        -np.nansum(p * np.log(np.where(p > 0, p, np.nan)))
        for p in (softmax(np.asarray(of, np.float64)) for of in logits)
    ]
    assert float(relaxed.entropy(logits)) == pytest.approx(sum(entropies), rel=1e-5)
    assert all(np.isfinite(each).all() for each in jax.jit(jax.grad(relaxed.entropy))(logits))


@pytest.mark.parametrize("distinct", [True, False])
def test_what_is_derived_is_the_most_probable(distinct):
    relaxed = Relaxation(SPACE, distinct_inputs=distinct)
    logits = random_logits(SPACE)
    # Both operands of a node would have the input 1, and the second of them hardly rather than 2.
    inputs = logits.inputs.at[0, 1].set(jnp.array([[0, 3, 1, -jnp.inf], [0, 3, 2.9, -jnp.inf]]))
    logits = logits._replace(inputs=inputs)
    found = np.asarray(relaxed.derive(logits))
    SPACE.check(found)
    assert found[0, 1, :, 0].tolist() == ([1, 2] if distinct else [1, 1])
    for cell, node in np.ndindex(2, 2):
        one, other = np.asarray(logits.inputs)[cell, node]
        pairs = itertools.product(range(node + 2), repeat=2)
        scores = {pair: one[pair[0]] + other[pair[1]] for pair in pairs}
        allowed = [pair for pair in scores if pair[0] != pair[1] or not distinct]
        assert tuple(found[cell, node, :, 0]) == max(allowed, key=scores.get)
    np.testing.assert_array_equal(found[..., 1], np.argmax(logits.ops, -1))
    np.testing.assert_array_equal(found[..., 2], np.argmax(logits.precisions, -1))


def test_the_temperature_falls_linearly():
    assert [round(float(relaxation.annealed(x)), 6) for x in (0, 0.5, 1)] == [10, 5.05, 0.1]
