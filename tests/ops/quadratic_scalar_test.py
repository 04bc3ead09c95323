"""Quadratic units written out in Python loops: values, statistics and every gradient.

The derivatives are taken by complex steps, `Im f(t + ih) / h`, which are exact to rounding because
the chain is analytic (ReLU looks at the real part).
"""

import cmath
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_nets.ops import linear_maps, neurons, quadratic

pytestmark = pytest.mark.every_case

SAMPLES, INPUTS, FEATURES, EPSILON = 5, 3, 2, 1e-3
# The combined value of an output neuron, from its branches' values.
FORMULAS = {
    "t1": lambda q, w: q + w,
    "t2": lambda w: w,
    "t3": lambda a: a * a,
    "t4": lambda a, b: a * b,
    "t1&2": lambda q, w: q + w,
    "t2&4": lambda a, b, c: a * b + c,
    "fan": lambda a, b, c: a * b + c,
    "ours": lambda a, b, c: a * b + c,
    "qres": lambda a, b: a * b + a,
    "cqnn": lambda q, w: q + w,
    "t1:2": lambda u1, v1, u2, v2, w: u1 * v1 + u2 * v2 + w,
    "cqnn:2": lambda u1, v1, u2, v2: u1 * v1 + u2 * v2,
}
# What a branch multiplies with its weights; `forms` says in which order a form's pairs are.
READS = {
    "x": lambda x: [x[0], x[1], x[2]],
    "square": lambda x: [x[0] * x[0], x[1] * x[1], x[2] * x[2]],
    "form": lambda x: [
        *(x[0] * x[0], x[1] * x[1], x[2] * x[2]),
        *(x[0] * x[1], x[1] * x[2], x[2] * x[0]),
    ],
}


def _unit(neuron):
    epsilons = dict(branch_epsilon=EPSILON, outer_epsilon=EPSILON)
    return quadratic.Unit(neuron, linear_maps.DenseMap(), jax.nn.relu, **epsilons)


def _norm(values, scale, bias, mean, var):
    if mean is None:
        mean = sum(values) / len(values)
        var = sum((value - mean) * (value - mean) for value in values) / len(values)
    normal = [(value - mean) / cmath.sqrt(var + EPSILON) for value in values]
    return [scale * value + bias for value in normal], (mean, var)


def _channel(norm, channel):
    return [None if array is None else array[channel] for array in norm]


def _neuron(name, arguments, channel):
    """relu(norm(combined of norm(branch))) of one output neuron, a value for each sample."""
    x, kernels, biases, branch_norms, outer_norm, bias = arguments
    parts = neurons.neuron(name)
    branches, inner = [], []
    for i, branch in enumerate(parts.branches):
        values = []
        for n in range(SAMPLES):
            total = 0.0 if biases is None else biases[i][channel]
            for k, value in enumerate(READS[parts.read_by(branch)](x[n])):
                total += value * kernels[i][k, channel]
            values.append(total)
        if branch_norms is not None:
            values, used = _norm(values, *_channel(branch_norms[i], channel))
            inner.append(used)
        branches.append(values)
    shift = 0.0 if bias is None else bias[channel]
    combined = [FORMULAS[name](*values) + shift for values in zip(*branches, strict=True)]
    outer = None
    if outer_norm is not None:
        combined, outer = _norm(combined, *_channel(outer_norm, channel))
    return [y if y.real > 0 else 0.0 for y in combined], inner, outer


def _loss(name, arguments, weights):
    total = 0.0
    for channel in range(FEATURES):
        values, _, _ = _neuron(name, arguments, channel)
        total += sum(weight * y for weight, y in zip(weights[:, channel], values, strict=True))
    return total


def _complex_step(name, arguments, weights, leaf_index, position):
    leaves, tree = jax.tree.flatten(arguments)
    leaves[leaf_index] = leaves[leaf_index].astype(complex)
    leaves[leaf_index][position] += 1e-30j
    return _loss(name, jax.tree.unflatten(tree, leaves), weights).imag / 1e-30


def _arguments(neuron, branch, outer):
    parts = neurons.neuron(neuron)
    random = np.random.default_rng(0)

    def norm(kind):
        frozen = (random.normal(size=FEATURES), random.uniform(0.5, 2, FEATURES))
        affine = (random.uniform(0.5, 2, FEATURES), random.normal(size=FEATURES))
        return quadratic.Norm(*affine, *(frozen if kind == "frozen" else (None, None)))

    return (
        random.normal(size=(SAMPLES, INPUTS)),
        tuple(
            random.normal(size=(len(READS[parts.read_by(branch)](range(INPUTS))), FEATURES))
            for branch in parts.branches
        ),
        tuple(random.normal(size=FEATURES) for _ in parts.branches)
        if parts.bias == "branch"
        else None,
        tuple(norm(branch) for _ in parts.branches) if branch else None,
        norm(outer) if outer else None,
        random.normal(size=FEATURES) if parts.bias == "output" else None,
    )


# `ours` under every kind of norms, the other neurons under none and under both.
CASES = [("ours", *norms) for norms in itertools.product([None, "batch", "frozen"], repeat=2)]
CASES += [(name, norm, norm) for name in FORMULAS if name != "ours" for norm in (None, "batch")]


@pytest.mark.parametrize("apply", [quadratic.unit, quadratic.hybrid_unit])
@pytest.mark.parametrize(("neuron", "branch", "outer"), CASES)
def test_values_and_gradients_are_those_of_the_loops(neuron, branch, outer, apply, x64):
    arguments = _arguments(neuron, branch, outer)
    weights = np.random.default_rng(1).normal(size=(SAMPLES, FEATURES))

    def loss(arguments):
        y, statistics = apply(_unit(neuron), *arguments)
        return jnp.sum(weights * y), (y, statistics)

    gradient, (y, statistics) = jax.grad(loss, has_aux=True)(jax.tree.map(jnp.asarray, arguments))

    for channel in range(FEATURES):
        values, inner, outer_moments = _neuron(neuron, arguments, channel)
        close = {"rtol": 0, "atol": 1e-12}  # float64, some tens of operations on values of size 1
        np.testing.assert_allclose(y[:, channel], np.real(values), **close)
        for i, (mean, var) in enumerate(inner):
            np.testing.assert_allclose(statistics.branches[i].mean[channel], mean.real, **close)
            np.testing.assert_allclose(statistics.branches[i].var[channel], var.real, **close)
        if outer_moments:
            np.testing.assert_allclose(
                statistics.outer.mean[channel], outer_moments[0].real, **close
            )
            np.testing.assert_allclose(
                statistics.outer.var[channel], outer_moments[1].real, **close
            )

    for index, (path, leaf) in enumerate(jax.tree.leaves_with_path(arguments)):
        if jax.tree_util.keystr(path).endswith((".mean", ".var")):
            continue  # frozen statistics are data
        ours = jax.tree.leaves(gradient)[index]
        for position in np.ndindex(leaf.shape):
            expected = _complex_step(neuron, arguments, weights, index, position)
            np.testing.assert_allclose(ours[position], expected, rtol=1e-10, atol=1e-11)
