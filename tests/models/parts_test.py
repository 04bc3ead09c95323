"""Pooling by slices against reduce_window."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_nets.models import parts


@pytest.mark.parametrize("size", [(2, 2), (4, 6), (5, 7), (3, 2)])
def test_max_pool2_is_a_window_maximum_and_so_is_its_gradient(size):
    x = jax.random.normal(jax.random.key(0), (2, *size, 3))

    def windows(x):
        return nnx.max_pool(x, (2, 2), strides=(2, 2))

    @jax.jit
    def both(x, g):
        return [(f(x), jax.vjp(f, x)[1](g)) for f in (parts.max_pool2, windows)]

    g = jax.random.normal(jax.random.key(1), (2, size[0] // 2, size[1] // 2, 3))
    jax.tree.map(np.testing.assert_array_equal, *both(x, g))


def test_max_pool3_pads_with_less_than_any_value():
    x = -jnp.arange(1.0, 17).reshape(1, 4, 4, 1)
    expected = [[-1.0, -2.0], [-5.0, -6.0]]
    np.testing.assert_array_equal(parts.max_pool3(x)[0, :, :, 0], expected)


def test_scaled_rounds_and_keeps_a_channel():
    assert [parts.scaled(16, width) for width in (0.01, 0.4, 1.0, 2.5)] == [1, 6, 16, 40]


@pytest.mark.parametrize("window", [2, 3])
def test_mean_pool_is_the_mean_of_what_there_is(window):
    x = np.random.default_rng(0).normal(0, 1, (2, 5, 4, 3)).astype(np.float32)
    # Windows that overlap are centred as well as 'SAME' can: one pixel early where H is odd.
    early = [(-(-side // 2) - 1) * 2 + window - side for side in (5, 4)]
    early = [max(missing, 0) // 2 for missing in early]
    expected = np.zeros((2, 3, 2, 3))
    for i, j in np.ndindex(3, 2):
        low = [max(2 * at - less, 0) for at, less in zip((i, j), early, strict=True)]
        high = [2 * at - less + window for at, less in zip((i, j), early, strict=True)]
        expected[:, i, j] = x[:, low[0] : high[0], low[1] : high[1]].mean((1, 2))
    # float32 rounding of nine terms.
    np.testing.assert_allclose(parts.mean_pool(jnp.asarray(x), window), expected, atol=1e-6)
