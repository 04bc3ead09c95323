"""One table of layers, and what must hold for every one of them, followed by a norm and ReLU."""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from efficient_nets.layers import BatchNorm, Conv, Dense, Layer, LayerSpec, layer_norm_act
from efficient_nets.ops import neurons


@dataclasses.dataclass(frozen=True)
class Case:
    """`make(*arguments, **options)`, on an input of shape x; y is the output's shape."""

    make: type
    arguments: tuple
    x: tuple[int, ...]
    y: tuple[int, ...]
    spec: LayerSpec = LayerSpec()
    options: tuple[tuple[str, object], ...] = ()

    def layer(self, seed=0) -> Layer:
        return self.make(*self.arguments, spec=self.spec, **dict(self.options), rngs=nnx.Rngs(seed))

    def input(self):
        """Not centred on 0, so that running means have somewhere to go."""
        return jnp.asarray(np.random.default_rng(1).normal(0.5, 1, self.x), jnp.float32)

    @property
    def narrow(self) -> bool:
        return dict(self.options).get("dtype") == jnp.bfloat16

    @property
    def close(self) -> dict:
        """Roundings of float32 (2^-24) or bfloat16 (2^-8): some hundred terms, through two norms
        that divide by deviations of about 1, for values up to about 10; a gradient may be the
        little that is left of such terms."""
        return {"rtol": 5e-2, "atol": 1e-1} if self.narrow else {"rtol": 1e-4, "atol": 5e-4}


def entry(make, arguments, x, y, spec=None, **options) -> Case:
    return Case(make, arguments, x, y, spec or LayerSpec(), tuple(options.items()))


BARE, BRANCH = LayerSpec("ours"), LayerSpec("ours", norm="branch")
AUTODIFF = dataclasses.replace(BRANCH, backward="autodiff")
IMAGE = (8, 4, 4, 2)
THREE = (3, 3)

CASES = {
    "dense": entry(Dense, (3, 4), (8, 3), (8, 4)),
    "dense, rank 3": entry(Dense, (3, 4), (8, 2, 3), (8, 2, 4), BRANCH, use_bias=False),
    "dense, bfloat16": entry(Dense, (3, 4), (8, 3), (8, 4), BARE, dtype=jnp.bfloat16),
    "conv": entry(Conv, (2, 4, THREE), IMAGE, (8, 4, 4, 4)),
    "conv, branch": entry(Conv, (2, 4, THREE), IMAGE, (8, 4, 4, 4), LayerSpec(norm="branch")),
    "ours": entry(Conv, (2, 4, THREE), IMAGE, (8, 4, 4, 4), BRANCH),
    "autodiff": entry(Conv, (2, 4, THREE), IMAGE, (8, 4, 4, 4), AUTODIFF),
    "bfloat16": entry(Conv, (2, 4, THREE), IMAGE, (8, 4, 4, 4), BRANCH, dtype=jnp.bfloat16),
    "strides": entry(Conv, (2, 4, THREE), IMAGE, (8, 2, 2, 4), BARE, strides=2, padding=1),
    "dilation": entry(
        Conv, (2, 4, THREE), IMAGE, (8, 2, 3, 4), BARE, dilation=2, padding=(1, (1, 2))
    ),
    "groups": entry(Conv, (4, 6, THREE), (8, 4, 4, 4), (8, 4, 4, 6), BRANCH, groups=2),
    "depthwise": entry(Conv, (4, 4, THREE), (8, 4, 4, 4), (8, 4, 4, 4), BRANCH, groups=4),
    "1-D": entry(Conv, (2, 4, (3,)), (8, 6, 2), (8, 4, 4), BRANCH, padding="VALID"),
    "3-D": entry(Conv, (2, 3, (2, 2, 2)), (8, 3, 3, 3, 2), (8, 3, 3, 3, 3), BRANCH),
}
CASES |= {
    name: entry(Conv, (2, 4, (2, 2)), IMAGE, (8, 4, 4, 4), LayerSpec(name, norm="branch"))
    for name in [*neurons.NEURONS, "t1:2", "cqnn:2"]
    if name not in CASES
}
CASES |= {
    f"{name}, bfloat16": entry(Dense, (3, 4), (8, 3), (8, 4), LayerSpec(name), dtype=jnp.bfloat16)
    for name in ("t1", "fan", "qres")
}


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def case(request) -> Case:
    """Scoped so that all tests of one case follow each other and share what is compiled."""
    return request.param


class Block(nnx.Module):
    def __init__(self, case: Case, seed=0):
        self.layer = case.layer(seed)
        self.norm = BatchNorm(case.y[-1], rngs=nnx.Rngs(seed))

    def __call__(self, x):
        return layer_norm_act(x, self.layer, self.norm, jax.nn.relu)


@functools.cache
def parts(case: Case):
    """Graph, parameters and running averages of one block: arrays, which no test changes."""
    return nnx.split(Block(case), nnx.Param, nnx.BatchStat)


TRACES = collections.Counter()  # how often Python ran the step of a case


def step(case, params, averages, x):
    """The gradients, the output and the new averages."""

    def loss(params):
        model = nnx.merge(parts(case)[0], params, averages, copy=True)
        y = model(x)
        return jnp.sum(y.astype(jnp.float32) ** 2), (y, nnx.state(model, nnx.BatchStat))

    TRACES[case] += 1
    gradients, (y, averages) = jax.grad(loss, has_aux=True)(params)
    return gradients, y, averages


@functools.cache
def jitted_step(case: Case):
    """One compiled step a case, for all the tests."""
    return jax.jit(functools.partial(step, case))


def assert_close(ours, expected, **close):
    pairs = zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(expected), strict=True)
    for (path, leaf), other in pairs:
        assert leaf.dtype == other.dtype and leaf.shape == other.shape
        leaf, other = np.asarray(leaf, np.float32), np.asarray(other, np.float32)
        np.testing.assert_allclose(leaf, other, **close, err_msg=jax.tree_util.keystr(path))


def test_shape_and_dtype(case):
    for model in (case.layer(), Block(case)):
        y = jax.eval_shape(lambda model, x: model(x), model, case.input())
        assert y.shape == case.y
        assert y.dtype == (jnp.bfloat16 if case.narrow else jnp.float32)


def test_jit_is_eager(case):
    _, params, averages = parts(case)
    model = Block(case)
    y = model(case.input())
    _, jitted_y, jitted_averages = jitted_step(case)(params, averages, case.input())
    assert_close(jitted_y, y, **case.close)
    assert_close(jitted_averages, nnx.state(model, nnx.BatchStat), **case.close)


def test_no_retrace_after_an_update(case):
    _, params, averages = parts(case)
    counts = []
    for _ in range(3):
        gradients, _, averages = jitted_step(case)(params, averages, case.input())
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients)
        counts.append(TRACES[case])
    assert len(set(counts)) == 1
    # Nor would a second model of the same make be traced, or one that went through a merge.
    other = nnx.split(Block(case, seed=1))[0]
    again = nnx.split(nnx.merge(*nnx.split(Block(case))))[0]
    assert hash(other) == hash(again) and other == again


def test_sharded_over_the_batch_is_unsharded(case):
    _, params, averages = parts(case)
    expected = jitted_step(case)(params, averages, case.input())
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    over_batch = NamedSharding(mesh, PartitionSpec("data"))
    params, averages = jax.device_put((params, averages), everywhere)
    ours = jitted_step(case)(params, averages, jax.device_put(case.input(), over_batch))
    assert_close(ours, expected, **case.close)
    assert ours[1].sharding.is_equivalent_to(over_batch, len(case.y))


def test_exports_with_any_batch_size(case):
    _, params, averages = parts(case)
    (batch,) = jax.export.symbolic_shape("batch")
    # Plain arrays: an exported function takes no NNX state.
    leaves, tree = jax.tree.flatten((params, averages))

    def plain_step(leaves, x):
        return jax.tree.leaves(step(case, *jax.tree.unflatten(tree, leaves), x))

    any_x = jax.ShapeDtypeStruct((batch, *case.x[1:]), jnp.float32)
    exported = jax.export.export(jax.jit(plain_step))(leaves, any_x)
    assert (batch, *case.y[1:]) in [aval.shape for aval in exported.out_avals]
    ours = jax.jit(exported.call)(leaves, case.input())
    expected = jax.tree.leaves(jitted_step(case)(params, averages, case.input()))
    assert_close(ours, expected, **case.close)


def shifts_without_effect(layer: Layer) -> list[str]:
    """Paths of biases that the next batch norm takes away."""
    paths = [f"layer/{name}/bias" for name in layer.spec.branches if layer.spec.norm == "branch"]
    # Those of the combined value, which has a norm behind it, and of branches that stand alone
    # in it: their gradient is that of the combined value.
    g, *values = np.random.default_rng(0).normal(size=1 + len(layer.spec.branches))
    gradients = layer.spec.parts.gradient(g, *values)
    alone = [n for n, each in zip(layer.spec.branches, gradients, strict=True) if each == g]
    paths += [f"layer/{name}/{of}" for name in alone for of in ("norm/bias", "bias")]
    return [*paths, "layer/bias"]


def scales_without_effect(layer: Layer) -> list[str]:
    """Scales of branch norms that multiply the whole combined value, which has a norm behind it."""
    values = np.random.default_rng(0).normal(size=len(layer.spec.branches))
    without = values * (1 - np.eye(len(values)))
    pairs = zip(layer.spec.branches, without, strict=True)
    return [f"layer/{n}/norm/scale" for n, h in pairs if layer.spec.parts.combine(*h) == 0]


def test_gradients_are_finite_and_not_zero(case):
    _, params, averages = parts(case)
    gradients, _, _ = jitted_step(case)(params, averages, case.input())
    flat = nnx.to_flat_state(gradients)
    assert len(flat) == len(jax.tree.leaves(params)) > 2
    layer = case.layer()
    without_effect = [*shifts_without_effect(layer), *scales_without_effect(layer)]
    for path, gradient in flat:
        name, value = "/".join(map(str, path)), np.asarray(gradient[...])
        assert np.all(np.isfinite(value)), name
        if name not in without_effect:
            assert np.max(np.abs(value)) > 1e-3, name


def test_split_and_merge_change_nothing(case):
    model = Block(case)
    graphdef, state = nnx.split(model)
    merged = nnx.merge(graphdef, state)
    assert merged.layer.spec == case.spec and merged.layer.geometry == model.layer.geometry
    np.testing.assert_array_equal(merged(case.input()), model(case.input()))
    for leaf, other in zip(
        jax.tree.leaves(nnx.state(merged)), jax.tree.leaves(nnx.state(model)), strict=True
    ):
        np.testing.assert_array_equal(leaf, other)


def test_averages_move_in_training_alone(case):
    model = Block(case)
    model.train()
    before = jax.tree.map(np.asarray, nnx.state(model, nnx.BatchStat))
    model(case.input())
    moved = jax.tree.map(np.asarray, nnx.state(model, nnx.BatchStat))
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(moved), strict=True):
        assert np.all(old != new)
    model.eval()
    y = model(case.input())
    kept = jax.tree.map(np.asarray, nnx.state(model, nnx.BatchStat))
    for old, new in zip(jax.tree.leaves(moved), jax.tree.leaves(kept), strict=True):
        np.testing.assert_array_equal(old, new)
    # In evaluation a sample's output does not depend on the others.
    others = jnp.concatenate([case.input()[:1], 2 * case.input()[1:]])
    np.testing.assert_array_equal(y[0], model(others)[0])


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_one_unit_is_layer_then_flaxs_norm_then_activation(case, mode):
    x, fused, apart = case.input(), Block(case), Block(case)
    theirs = nnx.BatchNorm(
        case.y[-1], momentum=0.9, use_fast_variance=False, dtype=jnp.float32, rngs=nnx.Rngs(0)
    )
    for norm in (fused.norm, theirs):
        norm.scale[...], norm.bias[...] = jnp.full(case.y[-1], 1.5), jnp.full(case.y[-1], 0.2)
        norm.mean[...], norm.var[...] = jnp.full(case.y[-1], 0.3), jnp.full(case.y[-1], 2.0)
    for model in (fused, apart, theirs):
        getattr(model, mode)()
    expected = jax.nn.relu(theirs(apart.layer(x)))
    np.testing.assert_allclose(np.asarray(fused(x), np.float32), expected, **case.close)
    for ours, other in ((fused.norm.mean, theirs.mean), (fused.norm.var, theirs.var)):
        np.testing.assert_allclose(ours[...], other[...], **case.close)
