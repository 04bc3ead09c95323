"""The assignment under a budget, against every assignment there is."""

import itertools

import numpy as np
import pytest

from efficient_nets.errors import UserError
from efficient_nets.search.assignment import assign


def brute_force(losses, costs, limit):
    layers = list(losses)
    able = []
    for choices in itertools.product(*(losses[layer] for layer in layers)):
        pairs = list(zip(layers, choices, strict=True))
        if sum(costs[layer][choice] for layer, choice in pairs) <= limit:
            able.append((sum(losses[layer][choice] for layer, choice in pairs), dict(pairs)))
    return min(able, key=lambda found: found[0])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scale", [1, 10**9])  # bytes, bit operations
def test_it_is_the_best_of_all(seed, scale):
    rng = np.random.default_rng(seed)
    layers, choices = [f"conv{i}" for i in range(6)], ["2", "4", "8"]
    costs = {
        layer: {choice: int(scale * size * int(choice)) for choice in choices}
        for layer, size in zip(layers, rng.integers(1, 50, 6), strict=True)
    }
    # A layer may lose less by more rounding, which is noise; it is taken as it is.
    losses = {layer: dict(zip(choices, rng.normal(1, 1, 3), strict=True)) for layer in layers}
    least = sum(own["2"] for own in costs.values())
    for factor in (1.0, 1.3, 2.0, 4.0):
        best, assignment = brute_force(losses, costs, factor * least)
        found = assign(losses, costs, factor * least)
        assert found == assignment
        assert sum(losses[layer][found[layer]] for layer in layers) == pytest.approx(best)


def test_a_budget_below_all_choices():
    with pytest.raises(UserError, match="the cheapest choices take 7, above the limit of 6"):
        assign({"a": {"x": 0.0}, "b": {"x": 0.0}}, {"a": {"x": 3}, "b": {"x": 4}}, 6.9)


def test_a_choice_without_a_loss_is_not_taken():
    losses = {"a": {"x": float("nan"), "y": 1.0, "z": 2.0}}
    costs = {"a": {"x": 1, "y": 2, "z": 3}}
    assert assign(losses, costs, 3) == {"a": "y"}
    with pytest.raises(UserError, match="the loss is not finite, whatever is chosen for a"):
        assign({"a": {"x": float("inf")}}, costs, 3)
