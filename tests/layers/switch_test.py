"""Several modules as one: what they add to the loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_nets import layers
from efficient_nets.layers import Dense, LayerSpec


def test_losses_of_quantizers_are_mixed_as_values_are():
    rounded = LayerSpec(precision=dict(kernel=dict(method="lsq", bits=2, loss=0.5)))

    def ways(rngs):
        return nnx.List([Dense(2, 2, spec=spec, rngs=rngs) for spec in (rounded, None, rounded)])

    weights = jnp.array([[0.1, 0.2, 0.3], [0.4, 0.5, -0.6]])

    @jax.jit
    def both(key, xs):
        stacked = layers.stacked(ways, 2, key)
        with layers.collecting("losses") as told:
            y = layers.mixed(stacked, weights, xs, lambda way, x: way(x))
        ((owner, loss),) = told
        assert owner is stacked
        expected, of_one = jnp.zeros_like(y), jnp.zeros(())
        for (at, number), _ in np.ndenumerate(np.zeros(weights.shape)):
            way = layers.taken(stacked[number], at)
            with layers.collecting("losses") as told:
                expected += weights[at, number] * way(xs[at])
            of_one += sum(weights[at, number] * own for _, own in told)
        return y, expected, loss, of_one

    y, expected, loss, of_one = both(
        jax.random.key(0), jax.random.normal(jax.random.key(1), (2, 4, 2))
    )
    # Single precision.
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    assert float(loss) == pytest.approx(float(of_one), rel=1e-5) and abs(float(loss)) > 1e-4
