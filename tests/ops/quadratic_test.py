"""Hybrid backward = automatic differentiation = a plain formulation, in float64."""

import dataclasses
import itertools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array, lax

from efficient_nets.ops import linear_maps, neurons, quadratic

# Rounding of float64 sums of at most some hundred terms, through two norms. A gradient that is
# exactly 0 on one side (a bias in front of a batch norm) is rounding of such sums on the other.
CLOSE = {"rtol": 1e-10, "atol": 1e-12}
EPSILONS = {
    "branch": 1e-3,
    "outer": 1e-2,
}  # unequal and large, so that neither can stand for the other


@dataclasses.dataclass(frozen=True)
class Case:
    """A unit and the shapes that it runs on. branch, outer: 'batch', 'frozen' or None."""

    x_shape: tuple[int, ...]
    kernel_shape: tuple[int, ...]
    linear_map: Callable[..., Array]
    neuron: str = "ours"
    bias: bool = True
    branch: str | None = "batch"
    outer: str | None = "batch"
    activation: Callable[[Array], Array] | None = jax.nn.relu

    @property
    def unit(self) -> quadratic.Unit:
        return quadratic.Unit(
            self.neuron, self.linear_map, self.activation, EPSILONS["branch"], EPSILONS["outer"]
        )

    @property
    def parts(self) -> neurons.Neuron:
        return neurons.neuron(self.neuron)

    @property
    def branches(self) -> int:
        return len(self.parts.branches)

    def arguments(self):
        """`(x, kernels, biases, branch_norms, outer_norm, bias)` with values of size about 1."""
        random = np.random.default_rng(0)
        features = self.kernel_shape[-1]

        def normal(*shape):
            return jnp.asarray(random.normal(size=shape))

        def norm(kind):
            frozen = (normal(features), jnp.exp(normal(features)))
            affine = (1 + normal(features) / 4, normal(features))
            return quadratic.Norm(*affine, *(frozen if kind == "frozen" else (None, None)))

        def kernel(branch):
            fan_in = math.prod(self.kernel_shape[:-1])
            if self.parts.read_by(branch) == "form":
                return normal(fan_in * (fan_in + 1) // 2, features) / fan_in
            return normal(*self.kernel_shape) / np.sqrt(fan_in)

        each = range(self.branches)
        biased = self.parts.bias if self.bias else None
        return (
            normal(*self.x_shape),
            tuple(map(kernel, self.parts.branches)),
            tuple(normal(features) for _ in each) if biased == "branch" else None,
            tuple(norm(self.branch) for _ in each) if self.branch else None,
            norm(self.outer) if self.outer else None,
            normal(features) if biased == "output" else None,
        )


def dense(**options) -> Case:
    return Case((7, 4), (4, 3), linear_maps.DenseMap(), **options)


def conv(size, kernel_size, *, inputs=4, features=6, groups=1, options=None, **rest) -> Case:
    rank = len(size)
    window = {"strides": (1,) * rank, "padding": "SAME", "dilation": (1,) * rank} | (options or {})
    kernel_shape = (*kernel_size, inputs // groups, features)
    linear_map = linear_maps.ConvMap(**window, groups=groups, kernel_size=kernel_size)
    return Case((2, *size, inputs), kernel_shape, linear_map, **rest)


ENDS = {
    "bias-relu": {"bias": True, "activation": jax.nn.relu},
    "bias": {"bias": True, "activation": None},
    "silu": {"bias": False, "activation": jax.nn.silu},
}
CASES = {
    f"dense-{branch}-{outer}-{end}": dense(branch=branch, outer=outer, **ENDS[end])
    for branch, outer, end in itertools.product(
        (None, "batch", "frozen"), (None, "batch", "frozen"), ENDS
    )
}
CASES |= {
    "dense of rank 3": dataclasses.replace(dense(), x_shape=(2, 3, 4)),
    "linear": dense(neuron="linear"),
    "linear, branch norm alone": dense(neuron="linear", outer=None),
    "linear, outer norm alone": dense(neuron="linear", branch=None),
    "conv 1-D": conv((7,), (3,)),
    "conv 2-D": conv((4, 5), (3, 3)),
    "conv 3-D": conv((3, 4, 3), (2, 2, 2), features=3),
    "strides": conv((5, 4), (3, 3), options={"strides": (2, 3)}),
    "dilation": conv((6, 5), (2, 2), options={"dilation": (2, 3)}),
    "valid": conv((4, 5), (3, 2), options={"padding": "VALID"}),
    "explicit padding": conv((4, 4), (3, 3), options={"padding": ((1, 0), (2, 1))}),
    "strides, padding, no norms": conv(
        (5, 5),
        (3, 3),
        options={"strides": (2, 2), "padding": ((1, 1), (1, 1))},
        branch=None,
        outer=None,
    ),
    "groups": conv((4, 3), (3, 3), groups=2),
    "groups, frozen": conv((4, 3), (3, 3), groups=2, branch="frozen", outer="frozen"),
    "depthwise": conv((4, 3), (3, 3), features=4, groups=4),
    "depthwise, multiplier 2": conv((4, 3), (3, 3), features=8, groups=4),
}
NAMES = [*neurons.NEURONS, "t1:1", "t1:3", "cqnn:2"]
for name in NAMES:
    window = {"strides": (2, 1), "dilation": (1, 2), "padding": ((1, 0), (2, 1))}
    CASES |= {
        f"{name}, no norms": dense(neuron=name, branch=None, outer=None, activation=None),
        f"{name}, norms": dense(neuron=name, bias=False),
        f"{name}, biases and norms": dense(neuron=name, branch="frozen"),
        f"{name}, conv": conv((4, 5), (2, 2), neuron=name, branch=None, options=window),
        f"{name}, groups": conv((3, 3), (2, 1), neuron=name, groups=2, outer=None),
        f"{name}, depthwise": conv((3, 3), (3, 1), neuron=name, features=4, groups=4),
    }


# Values of branches in the order of `Neuron.branches`, as in the papers.
FORMULAS = {
    "linear": lambda w: w,
    "t1": lambda q, w: q + w,
    "t2": lambda w: w,
    "t3": lambda a: a**2,
    "t4": lambda a, b: a * b,
    "t1&2": lambda q, w: q + w,
    "t2&4": lambda a, b, c: a * b + c,
    "fan": lambda a, b, c: a * b + c,
    "ours": lambda a, b, c: a * b + c,
    "qres": lambda a, b: a * (1 + b),
    "cqnn": lambda q, w: q + w,
    "t1:1": lambda u, v, w: u * v + w,
    "t1:3": lambda u1, v1, u2, v2, u3, v3, w: u1 * v1 + u2 * v2 + u3 * v3 + w,
    "cqnn:2": lambda u1, v1, u2, v2: u1 * v1 + u2 * v2,
}


def plain(case: Case, x, kernels, biases, branch_norms, outer_norm, bias):
    """The unit as a user would write it: a convolution a branch and textbook batch norms."""

    def norm(z, norm, epsilon):
        axes = tuple(range(z.ndim - 1))
        mean = norm.mean if norm.mean is not None else jnp.mean(z, axes)
        var = norm.var if norm.var is not None else jnp.var(z, axes)
        rows = [jnp.expand_dims(array, axes) for array in (mean, var, norm.scale, norm.bias)]
        return (z - rows[0]) / jnp.sqrt(rows[1] + epsilon) * rows[2] + rows[3], (mean, var)

    hs, inner, outer = [], [], None
    for index, kernel in enumerate(kernels):
        reads = case.parts.read_by(case.parts.branches[index])
        if reads == "form":
            h = _plain_form(case, x, kernel)
        else:
            h = _plain_map(case.linear_map, x**2 if reads == "square" else x, kernel)
        if biases is not None:
            h = h + jnp.expand_dims(biases[index], tuple(range(h.ndim - 1)))
        if branch_norms is not None:
            h, used = norm(h, branch_norms[index], EPSILONS["branch"])
            inner.append(used)
        hs.append(h)
    y = FORMULAS[case.neuron](*hs)
    if bias is not None:
        y = y + jnp.expand_dims(bias, tuple(range(y.ndim - 1)))
    if outer_norm is not None:
        y, outer = norm(y, outer_norm, EPSILONS["outer"])
    return y if case.activation is None else case.activation(y), (inner, outer)


def _plain_map(linear_map, x, kernel):
    if isinstance(linear_map, linear_maps.DenseMap):
        return jnp.einsum("...i,io->...o", x, kernel)
    out = lax.conv_general_dilated(
        jnp.moveaxis(x, -1, 1),
        jnp.moveaxis(kernel, (-1, -2), (0, 1)),
        linear_map.strides,
        linear_map.padding,
        rhs_dilation=linear_map.dilation,
        feature_group_count=linear_map.groups,
    )
    return jnp.moveaxis(out, 1, -1)


def _plain_form(case: Case, x, kernel):
    """x' W x with whole matrices W, of windows that JAX cuts out."""
    linear_map, features, groups = case.linear_map, case.kernel_shape[-1], case.linear_map.groups
    size = math.prod(case.kernel_shape[:-1])
    windows = x[..., None, :]
    if not isinstance(linear_map, linear_maps.DenseMap):
        patches = lax.conv_general_dilated_patches(
            jnp.moveaxis(x, -1, 1),
            case.kernel_shape[:-2],
            linear_map.strides,
            linear_map.padding,
            rhs_dilation=linear_map.dilation,
        )
        patches = jnp.moveaxis(patches, 1, -1)  # channels, then positions
        window = patches.reshape(*patches.shape[:-1], groups, -1, math.prod(case.kernel_shape[:-2]))
        windows = jnp.swapaxes(window, -1, -2).reshape(*window.shape[:-2], size)
    row = np.concatenate([np.arange(size)] * size)[: len(kernel)]
    column = (row + np.arange(len(kernel)) // size) % size
    matrices = jnp.zeros((size, size, features)).at[row, column].set(kernel)
    matrices = matrices.reshape(size, size, groups, features // groups)
    y = jnp.einsum("...gi,ijgo,...gj->...go", windows, matrices, windows)
    return y.reshape(*y.shape[:-2], features)


def value_and_gradients(apply, arguments):
    """y, statistics and the gradients of a random linear function of y (a sum would be blind)."""

    def loss(arguments):
        y, statistics = apply(*arguments)
        weights = np.random.default_rng(1).normal(size=y.shape)
        return jnp.sum(weights * y), (y, statistics)

    gradients, (y, statistics) = jax.grad(loss, has_aux=True)(arguments)
    return y, statistics, gradients


def trained(gradients) -> dict[str, Array]:
    """The gradients by path, less those of frozen statistics, which are data."""
    leaves = {jax.tree_util.keystr(k): v for k, v in jax.tree.leaves_with_path(gradients)}
    return {k: v for k, v in leaves.items() if not k.endswith((".mean", ".var"))}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_hybrid_is_autodiff_is_plain(case, x64):
    def everything(*arguments):
        return (
            value_and_gradients(lambda *a: plain(case, *a), arguments),
            value_and_gradients(lambda *a: quadratic.unit(case.unit, *a), arguments),
            value_and_gradients(lambda *a: quadratic.hybrid_unit(case.unit, *a), arguments),
        )

    if len(case.kernel_shape) > 2:  # Dense cases share their shapes and so run faster without jit
        everything = jax.jit(everything)
    (y, statistics, gradients), *others = everything(*case.arguments())
    assert y.dtype == jnp.float64
    gradients = trained(gradients)
    for other_y, other_statistics, other_gradients in others:
        np.testing.assert_allclose(other_y, y, **CLOSE)
        expected = jax.tree.leaves(statistics)
        for ours, theirs in zip(jax.tree.leaves(other_statistics), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, **CLOSE)
        other_gradients = trained(other_gradients)
        assert other_gradients.keys() == gradients.keys()
        for path, expected in gradients.items():
            ours = other_gradients[path]
            assert ours.dtype == expected.dtype
            np.testing.assert_allclose(ours, expected, **CLOSE, err_msg=path)

    # No comparison above was one of zeros, but for shifts that a batch norm takes away.
    for path, gradient in gradients.items():
        assert jnp.max(jnp.abs(gradient)) > 1e-3 or path in shifts_without_effect(case), path


def shifts_without_effect(case: Case) -> set[str]:
    """Biases, and the branch norms' biases, that the next batch norm takes away."""
    paths = {f"[2][{i}]" for i in range(case.branches)} if case.branch == "batch" else set()
    if case.outer != "batch":
        return paths
    # Branches that stand alone in the combined value.
    alone = {"linear": [0], "t1": [0, 1], "t2": [0], "t1&2": [0, 1], "cqnn": [0, 1]}
    alone |= dict.fromkeys(("t2&4", "fan", "ours", "t1:1"), [2]) | {"t1:3": [6]}
    alone = alone.get(case.neuron, [])
    return paths | {f"[{k}][{i}]{of}" for i in alone for k, of in ((2, ""), (3, ".bias"))} | {"[5]"}


@pytest.mark.parametrize("name", NAMES)
def test_symbolic_gradient_of_a_neuron_is_its_vjp(name, x64):
    neuron = neurons.neuron(name)
    random = np.random.default_rng(0)
    g, *values = (jnp.asarray(random.normal(size=(3, 2))) for _ in range(len(neuron.branches) + 1))
    expected = jax.vjp(neuron.combine, *values)[1](g)
    assert len(expected) == len(neuron.branches)
    for ours, theirs in zip(neuron.gradient(g, *values), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-14)  # the same one product


@pytest.mark.parametrize("apply", [quadratic.unit, quadratic.hybrid_unit])
def test_norms_of_one_unit_may_differ(apply, x64):
    """Some branches frozen, others on batch statistics: each bias gradient follows its own norm."""
    case = dense()
    x, kernels, biases, (norm_a, norm_b, norm_c), outer, bias = case.arguments()
    frozen = norm_b._replace(mean=jnp.zeros(3), var=jnp.full(3, 2.0))
    arguments = (x, kernels, biases, (norm_a, frozen, norm_c), outer, bias)
    expected = trained(value_and_gradients(lambda *a: plain(case, *a), arguments)[2])
    ours = trained(value_and_gradients(lambda *a: apply(case.unit, *a), arguments)[2])
    for path, gradient in expected.items():
        np.testing.assert_allclose(ours[path], gradient, **CLOSE, err_msg=path)
    assert jnp.max(jnp.abs(expected["[2][1]"])) > 0.1  # the frozen branch's bias


@pytest.mark.parametrize("apply", [quadratic.unit, quadratic.hybrid_unit])
def test_frozen_statistics_get_no_gradient(apply, x64):
    case = dense(branch="frozen", outer="frozen")
    _, _, gradients = value_and_gradients(lambda *a: apply(case.unit, *a), case.arguments())
    for norm in (*gradients[3], gradients[4]):
        assert not jnp.any(norm.mean) and not jnp.any(norm.var)


@pytest.mark.parametrize("apply", [quadratic.unit, quadratic.hybrid_unit])
def test_statistics_carry_no_gradient(apply, x64):
    case = dense()
    _, *parameters = case.arguments()

    def through_statistics(x):
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(apply(case.unit, x, *parameters)[1]))

    assert not jnp.any(jax.grad(through_statistics)(case.arguments()[0]))


@pytest.mark.parametrize("apply", [quadratic.unit, quadratic.hybrid_unit])
def test_statistics_are_numpys(apply, x64):
    case = conv((4, 3), (3, 3), groups=2)
    x, kernels, biases, norms, outer, _ = case.arguments()
    _, statistics = apply(case.unit, x, kernels, biases, norms, outer)
    for i, (mean, var) in enumerate(statistics.branches):
        z = np.asarray(_plain_map(case.linear_map, x, kernels[i])) + np.asarray(biases[i])
        np.testing.assert_allclose(mean, np.mean(z, (0, 1, 2)), **CLOSE)
        np.testing.assert_allclose(var, np.var(z, (0, 1, 2)), **CLOSE)
    bare = dataclasses.replace(case.unit, activation=None)
    combined = np.asarray(apply(bare, x, kernels, biases, norms, None)[0])
    np.testing.assert_allclose(statistics.outer.mean, np.mean(combined, (0, 1, 2)), **CLOSE)
    np.testing.assert_allclose(statistics.outer.var, np.var(combined, (0, 1, 2)), **CLOSE)


def test_no_norms_no_statistics(x64):
    case = dense(branch=None, outer=None)
    assert quadratic.unit(case.unit, *case.arguments())[1] == quadratic.Statistics(None, None, {})
