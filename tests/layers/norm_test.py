"""Running averages are Flax's, bit for bit, and so is the norm called alone; the other norms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_nets.layers import (
    BatchNorm,
    Dense,
    FrozenBatchNorm,
    GroupNorm,
    InstanceNorm,
    LayerSpec,
    layer_norm_act,
)

STEPS = 3


def _batches(*shape):
    random = np.random.default_rng(0)
    return [jnp.asarray(random.normal(i, 1 + i, shape), jnp.float32) for i in range(STEPS)]


def _theirs(features, momentum):
    return nnx.BatchNorm(
        features, momentum=momentum, epsilon=1e-5, use_fast_variance=False, rngs=nnx.Rngs(0)
    )


@pytest.mark.parametrize("momentum", [0.9, 0.99])
@pytest.mark.parametrize("where", ["outer", "branch"])
def test_averages_are_flaxs_exactly(where, momentum):
    theirs = _theirs(4, momentum)
    ours = BatchNorm(4, momentum=momentum, rngs=nnx.Rngs(0))
    linear = Dense(3, 4, rngs=nnx.Rngs(0))
    branched = Dense(3, 4, spec=LayerSpec(norm="branch"), rngs=nnx.Rngs(0))
    branched.w.kernel[...] = linear.w.kernel[...]
    branched.w.norm = ours
    for x in _batches(8, 5, 3):
        theirs(linear(x))
        branched(x) if where == "branch" else layer_norm_act(x, linear, ours)
        np.testing.assert_array_equal(ours.mean[...], theirs.mean[...])
        np.testing.assert_array_equal(ours.var[...], theirs.var[...])
    assert jnp.max(jnp.abs(ours.mean[...])) > 0.01


@pytest.mark.parametrize("spec", [LayerSpec("ours"), LayerSpec("ours", norm="branch")])
def test_averages_behind_a_product_are_flaxs(spec):
    theirs, ours = _theirs(4, 0.9), BatchNorm(4, rngs=nnx.Rngs(0))
    fused, apart = (Dense(3, 4, spec=spec, rngs=nnx.Rngs(0)) for _ in range(2))
    for x in _batches(8, 5, 3):
        theirs(apart(x))
        layer_norm_act(x, fused, ours)
    # float32 moments of 40 values, in two programs that round a * b + c differently
    np.testing.assert_allclose(ours.mean[...], theirs.mean[...], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours.var[...], theirs.var[...], rtol=1e-5, atol=1e-5)


def test_every_branch_follows_its_own_moments():
    model = Dense(3, 4, spec=LayerSpec("ours", norm="branch"), rngs=nnx.Rngs(0))
    x = _batches(8, 3)[1]
    model(x)
    for branch in model.branches:
        z = np.asarray(x) @ np.asarray(branch.kernel[...])
        # float32 moments of 8 values of size 1
        np.testing.assert_allclose(branch.norm.mean[...], 0.1 * np.mean(z, 0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(branch.norm.var[...], 0.9 + 0.1 * np.var(z, 0), rtol=1e-5)


def test_alone_it_is_flaxs():
    ours, theirs = BatchNorm(3, rngs=nnx.Rngs(0)), _theirs(3, 0.9)
    for x in _batches(8, 3):
        np.testing.assert_array_equal(ours(x), theirs(x))
    ours.eval(), theirs.eval()
    np.testing.assert_array_equal(ours(x), theirs(x))


def test_variance_survives_a_large_mean():
    """E[x^2] - E[x]^2 would leave nothing of it: 1000^2 has a rounding of 0.06 in float32."""
    norm, random = BatchNorm(2, momentum=0.0, rngs=nnx.Rngs(0)), np.random.default_rng(0)
    x = jnp.asarray(random.normal(1000, 0.1, (64, 2)), jnp.float32)
    identity = Dense(2, 2, use_bias=False, kernel_init=lambda *_: jnp.eye(2), rngs=nnx.Rngs(0))
    layer_norm_act(x, identity, norm)
    expected = np.var(np.asarray(x, np.float64), 0)
    np.testing.assert_allclose(norm.var[...], expected, rtol=1e-3)  # the mean's rounding, 3e-5


def test_modes_reach_every_norm():
    model = Dense(3, 4, spec=LayerSpec("ours", norm="branch"), rngs=nnx.Rngs(0))
    model.eval()
    assert all(branch.norm.use_running_average for branch in model.branches)
    model.train()
    assert not any(branch.norm.use_running_average for branch in model.branches)


def test_one_frozen_branch_keeps_its_averages():
    model = Dense(3, 4, spec=LayerSpec("ours", norm="branch"), rngs=nnx.Rngs(0))
    model.b.norm.eval()
    model(_batches(8, 3)[1])
    assert not jnp.any(model.b.norm.mean[...])
    assert jnp.any(model.a.norm.mean[...]) and jnp.any(model.c.norm.mean[...])


def test_averages_get_no_gradient():
    """Frozen averages are data: a caller who differentiates by the whole state gets zeros."""
    for backward in ("hybrid", "autodiff"):
        spec = LayerSpec("ours", norm="branch", backward=backward)
        model = Dense(3, 4, spec=spec, rngs=nnx.Rngs(0))
        model.eval()
        graphdef, state = nnx.split(model)
        x = _batches(8, 3)[1]
        gradient = jax.grad(lambda s, g=graphdef, x=x: jnp.sum(nnx.merge(g, s)(x) ** 2))(state)
        averages = jax.tree.leaves(nnx.filter_state(gradient, nnx.BatchStat))
        assert len(averages) == 6 and not any(jnp.any(leaf) for leaf in averages)


def test_a_frozen_norm_never_moves():
    """Neither by a step in training mode, fused or alone, nor by a gradient."""
    norm, layer = FrozenBatchNorm(4, rngs=nnx.Rngs(0)), Dense(3, 4, rngs=nnx.Rngs(0))
    norm.mean[...], norm.var[...] = jnp.arange(4.0), 1 + jnp.arange(4.0)
    norm.scale[...], norm.bias[...] = 2 - jnp.arange(4.0), jnp.arange(4.0) / 2
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(norm)))
    norm.train()
    x = _batches(8, 3)[1]
    fused, alone = layer_norm_act(x, layer, norm), norm(layer(x))
    root = np.sqrt(1e-5 + before["var"])
    y = np.asarray(layer(x))
    expected = (y - before["mean"]) / root * before["scale"] + before["bias"]
    for y in (fused, alone):
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)  # float32 rounding
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(norm)), before)
    assert len(jax.tree.leaves(before)) == 4
    graph, params, rest = nnx.split((layer, norm), nnx.Param, ...)

    def loss(params, unit):
        return jnp.sum(unit(*nnx.merge(graph, params, rest, copy=True)) ** 3)

    for unit in (lambda layer, norm: layer_norm_act(x, layer, norm), lambda a, b: b(a(x))):
        found = nnx.to_pure_dict(jax.grad(loss)(params, unit))
        assert jnp.any(found[0]["w"]["kernel"])
        assert not jnp.any(found[1]["scale"]) and not jnp.any(found[1]["bias"])


@pytest.mark.parametrize(
    ("make", "features", "groups"),
    [
        (GroupNorm, 6, 3),  # 2 is the greatest divisor of 16 and 6
        (GroupNorm, 48, 3),
        (functools.partial(GroupNorm, groups=3), 6, 3),
        (InstanceNorm, 5, 5),
    ],
)
def test_group_norms_are_their_formula(make, features, groups):
    norm = make(features, rngs=nnx.Rngs(0))
    norm.scale[...] = 1 + jnp.arange(float(features))
    norm.bias[...] = jnp.arange(float(features)) / 2
    x = np.random.default_rng(0).normal(3, 2, (2, 4, 3, features))
    grouped = x.reshape(2, 4, 3, groups, -1)
    centred = grouped - grouped.mean((1, 2, 4), keepdims=True)
    normal = centred / np.sqrt((centred**2).mean((1, 2, 4), keepdims=True) + 1e-5)
    expected = normal.reshape(x.shape) * np.asarray(norm.scale) + np.asarray(norm.bias)
    # float32 sums of at least 12 values of size 3.
    np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", [BatchNorm, FrozenBatchNorm, GroupNorm, InstanceNorm])
def test_a_norm_alone_computes_in_float32_and_keeps_the_type(norm):
    norm, x = norm(2, rngs=nnx.Rngs(0)), 1000 + 8 * _batches(4, 5, 2)[1]
    narrow = x.astype(jnp.bfloat16)  # in steps of 4
    wide = norm(narrow.astype(jnp.float32))
    assert norm(narrow).dtype == jnp.bfloat16
    np.testing.assert_array_equal(norm(narrow), wide.astype(jnp.bfloat16))
