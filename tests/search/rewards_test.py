"""Rewards, fronts, costs and rank correlations against loops and SciPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_nets.errors import UserError
from efficient_nets.models.space import Space
from efficient_nets.search import rewards
from efficient_nets.search.relaxation import Choices, one_hots

SPACE = Space(nodes=3, ops=("sep3", "max3"), precisions=("a", "b", "c"))


def test_costs_above_the_target_take_from_the_accuracy():
    accuracy, cost = jnp.array([0.8, 0.8, 0.8]), jnp.array([50.0, 100.0, 200.0])
    hard = rewards.cost_aware(accuracy, cost, 100, rewards.HARD)
    np.testing.assert_allclose(hard, [0.8, 0.8, 0.4], rtol=1e-6)
    soft = rewards.cost_aware(accuracy, cost, 100)
    np.testing.assert_allclose(soft, 0.8 * np.array([0.5, 1, 2]) ** -0.07, rtol=1e-6)
    np.testing.assert_array_equal(rewards.objectives(accuracy, cost)[2], [np.float32(0.8), -200])
    with pytest.raises(UserError, match="reward.target=0: must be above 0"):
        rewards.cost_aware(accuracy, cost, 0)


def by_hand(cost, architecture):
    """The cost of an architecture, an operand after the other."""
    total = float(cost.constant)
    for cell, node, operand in np.ndindex(SPACE.shape[:-1]):
        total += cost.table[(cell, node, operand, *architecture[cell, node, operand])]
    for cell, node in np.ndindex(2, SPACE.nodes):
        if node + 2 not in architecture[cell, :, :, 0]:
            total += cost.ends[cell, node]
    return total


def random_cost(rng):
    table = rng.uniform(size=(2, SPACE.nodes, 2, SPACE.nodes + 2, 2, 3))
    return rewards.ArchitectureCost(jnp.array(5.0), table, rng.uniform(size=(2, SPACE.nodes)))


def test_the_cost_is_the_sum_over_operands_and_loose_ends():
    cost = random_cost(np.random.default_rng(0))
    of = jax.jit(lambda one: jax.tree.map(jnp.float32, cost).of(one_hots(SPACE, one)))
    for seed in range(5):
        architecture = SPACE.random(jax.random.key(seed))
        expected = by_hand(cost, np.asarray(architecture))
        # Twenty terms in single precision.
        assert float(of(architecture)) == pytest.approx(expected, rel=1e-5)


def test_of_probabilities_it_is_the_expected_cost():
    space = Space(nodes=2, ops=("a",), precisions=("x", "y"), shared_precision=True)
    rng = np.random.default_rng(1)
    p = rng.dirichlet(np.ones(4), size=(2, 2, 2))
    p[:, 0, :, 2:], p[:, 1, :, 3:] = 0, 0
    p /= p.sum(-1, keepdims=True)
    precisions = np.array([0.3, 0.7])
    cost = rewards.ArchitectureCost(
        jnp.array(1.0), rng.uniform(size=(2, 2, 2, 4, 1, 2)), rng.uniform(size=(2, 2))
    )
    of = jax.jit(jax.vmap(lambda one: jax.tree.map(jnp.float32, cost).of(one_hots(space, one))))
    inputs = np.array(list(itertools.product(*[range(n) for n in space.choices[..., 0].flat])))
    inputs = inputs.reshape(-1, 2, 2, 2)
    weights = np.prod(np.take_along_axis(p[None], inputs[..., None], -1)[..., 0], axis=(1, 2, 3))
    assert weights.sum() == pytest.approx(1)
    expected = 0.0
    for token, share in enumerate(precisions):
        tokens = np.stack([inputs, 0 * inputs, 0 * inputs + token], -1).astype(np.int32)
        expected += share * (weights @ np.asarray(of(jnp.asarray(tokens))))
    found = jax.tree.map(jnp.float32, cost).of(
        jax.tree.map(
            jnp.float32,
            Choices(p, np.ones((2, 2, 2, 1)), np.broadcast_to(precisions, (2, 2, 2, 2))),
        )
    )
    assert float(found) == pytest.approx(expected, rel=1e-5)  # single precision


def test_layers_add_up_to_cells():
    rng = np.random.default_rng(0)
    tables, ends = rng.uniform(size=(4, 3, 1, 1, 2, 3)), rng.uniform(size=(4, 3))
    found = rewards.cost_of_layers(7.0, tables, [0, 1, 0, 0], ends)
    np.testing.assert_allclose(found.table[0], tables[[0, 2, 3]].sum(0), rtol=1e-6)
    np.testing.assert_allclose(found.ends[1], ends[1], rtol=1e-6)
    architecture = SPACE.random(jax.random.key(0))
    full = rewards.ArchitectureCost(
        7.0,
        np.broadcast_to(found.table, (2, 3, 2, 5, 2, 3)),
        found.ends,
    )
    cost = float(found.of(one_hots(SPACE, architecture)))
    assert cost == pytest.approx(float(by_hand(full, np.asarray(architecture))), rel=1e-5)
    with pytest.raises(UserError, match="4 tables, 3 cells and 4 ends"):
        rewards.cost_of_layers(7.0, tables, [0, 1, 0], ends)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_hypervolume_is_the_share_of_random_points_below_the_front(number):
    rng = np.random.default_rng(number)
    points = rng.uniform(-0.2, 1, size=(12, number))
    draws = rng.uniform(size=(20_000, number))
    below = (draws[:, None] < points[None]).all(-1).any(-1).mean()
    # Five standard deviations of the share.
    assert rewards.hypervolume(points, np.zeros(number)) == pytest.approx(below, abs=5 * 0.0036)
    corners = rewards.hypervolume([[3, 1], [1, 2], [1, 1], [0, 9]], (0, 0))
    assert corners == 4 and rewards.hypervolume([[-1, -1]], (0, 0)) == 0


def test_what_is_not_a_number_is_on_no_front():
    points = jnp.asarray([[jnp.nan, -1.0], [0.9, -1.0]])
    np.testing.assert_array_equal(rewards.pareto_front(points), [False, True])


def test_the_front_is_what_none_dominates():
    points = jnp.array([[0, 3], [1, 2], [1, 2], [0.5, 2], [3, 0], [3, -1]])
    front = rewards.pareto_front(points)
    assert front.tolist() == [True, True, True, False, True, False]


@pytest.mark.parametrize("ties", [False, True])
def test_rank_correlations_are_scipy_s(ties):
    from scipy import stats

    rng = np.random.default_rng(0)
    one = rng.normal(size=30)
    other = one + rng.normal(size=30)
    if ties:
        one, other = one.round(), (2 * other).round()
    # Both are quotients of whole or half numbers.
    assert rewards.kendall(one, other) == pytest.approx(stats.kendalltau(one, other)[0], rel=1e-12)
    assert rewards.spearman(one, other) == pytest.approx(stats.spearmanr(one, other)[0], rel=1e-12)


def test_without_ranks_there_is_no_correlation():
    assert np.isnan(rewards.kendall([1, 1], [1, 2])) and np.isnan(rewards.spearman([1, 2], [1, 1]))
    with pytest.raises(UserError, match=r"shapes \(2,\) and \(3,\), must be two or more pairs"):
        rewards.kendall([1, 2], [1, 2, 3])
