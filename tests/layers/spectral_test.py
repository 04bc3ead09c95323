"""Spectral normalisation against the singular value decomposition in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_nets.errors import UserError
from efficient_nets.layers import Conv, Dense, LayerSpec, convert
from efficient_nets.layers.spectral import SpectralNorm

SPECTRAL = LayerSpec("ours", kernel_norm="spectral")


def matrix(kernel):
    return np.asarray(kernel, np.float64).reshape(-1, kernel.shape[-1])


def largest(kernel):
    return np.linalg.svd(matrix(kernel), compute_uv=False)[0]


def a_kernel(shape, seed=0):
    """With singular values 1, 1/2, 1/3, ... : an iteration leaves a fourth of the error."""
    u, _, v = np.linalg.svd(
        np.random.default_rng(seed).normal(size=(np.prod(shape[:-1]), shape[-1]))
    )
    size = min(u.shape[0], v.shape[0])
    kernel = u[:, :size] / np.arange(1, 1 + size) @ v[:size]
    return jnp.asarray(7 * kernel.reshape(shape), jnp.float32)


@functools.partial(jax.jit, static_argnums=(0, 3))
def turned(graph, state, kernel, steps):
    norm = nnx.merge(graph, state)
    for _ in range(steps):
        norm.advance(kernel)
    return norm.u[...]


def advanced(norm, kernel, steps):
    """In one program, as eager operations take longer than all of them."""
    norm.u[...] = turned(*nnx.split(norm), kernel, steps)
    return norm


def test_sigma_is_the_largest_singular_value():
    kernel = a_kernel(shape := (3, 3, 4, 5))
    norm = SpectralNorm(shape[-1], jnp.float32, rngs=nnx.Rngs(0))
    far = abs(float(norm.sigma(kernel)) - 7)
    advanced(norm, kernel, 20)  # whose squared ratio of 1/2 leaves nothing above float32
    np.testing.assert_allclose(norm.sigma(kernel), largest(kernel), rtol=1e-6)
    assert far > 0.1
    np.testing.assert_allclose(largest(norm.normed(kernel)), 1, rtol=1e-6)


def test_gradient_is_that_of_the_singular_value():
    """d sum(c W / sigma) = c / sigma - <c, W> v u^T / sigma^2, which finite differences confirm."""
    kernel, weight = a_kernel((3, 4)), np.random.default_rng(1).normal(size=(3, 4))
    norm = advanced(SpectralNorm(4, jnp.float32, rngs=nnx.Rngs(0)), kernel, 30)
    given = jnp.asarray(weight, jnp.float32)
    ours = jax.grad(lambda kernel: jnp.sum(given * norm.normed(kernel)))(kernel)
    exact = matrix(kernel)
    left, values, right = np.linalg.svd(exact)
    outer = np.outer(left[:, 0], right[0])
    expected = weight / values[0] - np.sum(weight * exact) * outer / values[0] ** 2
    numeric = np.empty((3, 4))
    for index in np.ndindex(3, 4):
        step = np.zeros((3, 4))
        step[index] = 1e-6
        high, low = (np.sum(weight * k) / largest(k) for k in (exact + step, exact - step))
        numeric[index] = (high - low) / 2e-6
    np.testing.assert_allclose(expected, numeric, atol=1e-8)  # of float64, cubed step
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)  # float32, a dozen terms


def test_a_kernel_of_zeros_stays_one_and_has_a_gradient():
    norm = SpectralNorm(3, jnp.float32, rngs=nnx.Rngs(0))
    before, zeros = norm.u[...], jnp.zeros((2, 3), jnp.float32)
    norm.advance(zeros)
    np.testing.assert_array_equal(norm.u[...], before)
    gradient = jax.grad(lambda kernel: jnp.sum(norm.normed(kernel)))(zeros)
    np.testing.assert_array_equal(gradient, jnp.ones_like(zeros))


def test_only_calls_in_training_move_it_and_each_branch_has_its_own():
    layer = Dense(4, 3, spec=SPECTRAL, rngs=nnx.Rngs(0))
    x = jnp.ones((2, 4), jnp.float32)
    for name in layer.spec.branches:
        getattr(layer, name).kernel[...] = a_kernel((4, 3), seed=ord(name))
    layer.eval()
    starts = [branch.spectral.u[...] for branch in layer.branches]
    layer(x)
    for branch, start in zip(layer.branches, starts, strict=True):
        np.testing.assert_array_equal(branch.spectral.u[...], start)
    layer.train()
    for _ in range(20):
        y = layer(x)
    exact = [matrix(branch.kernel[...]) / largest(branch.kernel[...]) for branch in layer.branches]
    a, b, c = (np.ones((2, 4)) @ kernel for kernel in exact)
    np.testing.assert_allclose(y, a * b + c, rtol=1e-5, atol=1e-5)  # float32, some terms of 1


def test_a_factorized_kernel_is_divided_too():
    spec = LayerSpec("t4", kernel="cp:2,run=factorized", kernel_norm="spectral")
    layer = Conv(4, 6, (3, 3), spec=spec, rngs=nnx.Rngs(0))
    for branch in layer.branches:
        advanced(branch.spectral, branch.held, 60)
    for branch in layer.branches:
        np.testing.assert_allclose(largest(branch.dense()), 1, rtol=1e-3)  # as far as it has come
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 4, 4)), jnp.float32)
    layer.eval()
    fixed = nnx.clone(layer)
    fixed.fix_kernels()
    assert fixed.spec.kernel_norm == "none"
    np.testing.assert_allclose(fixed(x), layer(x), rtol=1e-5, atol=1e-5)


def test_a_rule_sets_it_and_takes_it_away():
    layer = nnx.Dict(one=Dense(4, 3, rngs=nnx.Rngs(0)))
    on = convert(
        layer, [dict(match="one", kernel_norm="spectral", start="kept")], jax.random.key(0)
    )
    np.testing.assert_array_equal(on["one"].w.kernel[...], layer["one"].w.kernel[...])
    off = convert(on, [dict(match="one", kernel_norm="none")], jax.random.key(0))
    assert on["one"].w.spectral is not None and off["one"].w.spectral is None


def test_errors():
    with pytest.raises(UserError, match="kernel_norm='spectrum'.*spectral"):
        LayerSpec(kernel_norm="spectrum")
    with pytest.raises(UserError, match="start='relinear'"):
        dataclasses.replace(SPECTRAL, start="relinear")
    with pytest.raises(UserError, match="joint='name'"):
        LayerSpec(kernel="tt:2", joint="name", kernel_norm="spectral")
    with pytest.raises(UserError, match="precision.core"):
        LayerSpec(kernel="tt:2", precision="lsq:c4", kernel_norm="spectral")
