"""Recipes: which branches learn slower after a linear start."""

import re

import pytest

from efficient_nets import recipes
from efficient_nets.errors import UserError


@pytest.mark.parametrize(
    ("neuron", "slow", "linear"),
    [
        ("ours", ["conv1/a/kernel", "conv1/b/norm/scale"], ["conv1/c/kernel", "conv1/w/kernel"]),
        ("qres", ["head/b/kernel", "b/kernel"], ["head/a/kernel", "head/bias"]),
        ("t1:2", ["conv/u1/kernel", "conv/v2/kernel"], ["conv/w/kernel"]),
    ],
)
def test_products_learn_slower_and_the_linear_part_does_not(neuron, slow, linear):
    rule = recipes.slow_products(neuron, 0.1)
    assert rule["learning_rate"] == 0.1
    assert all(re.search(rule["match"], path) for path in slow)
    assert not any(re.search(rule["match"], path) for path in linear)


@pytest.mark.parametrize("neuron", ["linear", "t3"])
def test_a_neuron_without_such_products_is_named(neuron):
    with pytest.raises(UserError, match=f"neuron='{neuron}' has no products, or cannot start"):
        recipes.slow_products(neuron)
