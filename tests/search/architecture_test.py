"""What is sampled from architecture parameters, and their gradient, against sums by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_nets.search import architecture

LOGITS = np.array([[0.5, -1.0, 0.2, 0.0], [2.0, 0.0, -2.0, 1.0]])
DRAWS = 20_000


def softmax(x):
    return np.exp(x) / np.exp(x).sum()


def shares(counts, p):
    """Frequencies beside probabilities, apart by at most 5 standard deviations of the former."""
    deviation = np.sqrt(p * (1 - p) / DRAWS)
    np.testing.assert_array_less(np.abs(counts / DRAWS - p), 5 * deviation + 1e-12)


def test_samples_follow_the_probabilities():
    keys = jax.random.split(jax.random.key(0), DRAWS)
    found = np.asarray(jax.jit(jax.vmap(architecture.sample, (0, None)))(keys, LOGITS))
    assert found.shape == (DRAWS, 2) and found.dtype == np.int32
    for row, logits in enumerate(LOGITS):
        shares(np.bincount(found[:, row], minlength=4), softmax(logits))


def test_pairs_are_drawn_without_replacement_and_one_gate_is_open():
    keys = jax.random.split(jax.random.key(1), DRAWS)
    found = np.asarray(jax.jit(jax.vmap(architecture.sample_pairs, (0, None)))(keys, LOGITS))
    assert (found[..., 0] != found[..., 1]).all()
    for row, logits in enumerate(LOGITS):
        p = softmax(logits)
        for i, j in itertools.permutations(range(4), 2):
            together = p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j])
            expected = together * p[i] / (p[i] + p[j])  # i is the open one
            hits = (found[:, row] == (i, j)).all(-1).sum()
            shares(hits, expected)


def test_the_gradient_by_the_gates_is_proxylessnas_s_equation_4():
    pairs, of_gates = np.array([[2, 0], [1, 3]]), np.array([[0.7, -0.4], [-1.5, 2.5]])
    with jax.enable_x64(True):
        found = np.asarray(
            architecture.gate_gradient(
                jnp.asarray(LOGITS), jnp.asarray(pairs), jnp.asarray(of_gates)
            )
        )
    assert found.dtype == np.float64
    expected = np.zeros_like(LOGITS)
    for row, pair in enumerate(pairs):
        p = softmax(LOGITS[row, pair])
        for i, j in itertools.product(range(2), repeat=2):
            expected[row, pair[i]] += of_gates[row, j] * p[j] * ((i == j) - p[i])
    # Some ten operations in double precision.
    np.testing.assert_allclose(found, expected, rtol=1e-13)


def test_the_expected_cost_is_the_sum_by_hand_and_so_is_its_gradient():
    costs = np.array([[1.0, 0.5, 0.25, 2.0], [0.1, 0.2, 0.3, 0.4]])
    with jax.enable_x64(True):
        found, gradient = jax.value_and_grad(architecture.expected_cost)(
            jnp.asarray(LOGITS), jnp.asarray(costs)
        )
    p = np.stack([softmax(row) for row in LOGITS])
    means = [sum(p[row, k] * costs[row, k] for k in range(4)) for row in range(2)]
    assert float(found) == pytest.approx(sum(means), rel=1e-13)
    np.testing.assert_allclose(gradient, p * (costs - np.array(means)[:, None]), atol=1e-15)


def test_entropy_says_how_much_is_decided():
    assert float(architecture.entropy(jnp.zeros((3, 4)))) == pytest.approx(np.log(4), rel=1e-6)
    assert float(architecture.entropy(jnp.array([[100.0, 0.0]]))) == pytest.approx(0, abs=1e-6)
