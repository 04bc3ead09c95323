"""`prune`: layers with smaller kernels that give the same."""

import jax
import numpy as np
import pytest
from flax import nnx

from efficient_nets import layers
from efficient_nets.errors import UserError
from efficient_nets.layers import Conv, Dense, LayerSpec, convert

TEXT = "tucker:4x5,dropout=0.2,lasso=0.1"


@pytest.fixture
def net():
    """A quadratic layer whose branches have different indices to lose, and a dense one."""
    spec = LayerSpec("ours", kernel=TEXT)
    conv = Conv(8, 12, (3, 3), spec=spec, rngs=nnx.Rngs(0))
    net = nnx.List([conv, Dense(12, 4, rngs=nnx.Rngs(1))])
    for branch, lost in zip(conv.branches, ((0, 2), (1, 2), (3,)), strict=True):
        core = branch.kernel.factor_i0
        core[...] = core[...].at[:, np.array(lost)].set(0)
    net.eval()
    return net


def test_layers_give_the_same_with_less(net):
    made = layers.prune(net, 0.0)
    conv = made[0]
    assert str(conv.spec.kernel) == "tucker:3x5,dropout=0.2,lasso=0.1"
    assert {branch.kernel.network.size("r_i0") for branch in conv.branches} == {3}
    x = jax.random.normal(jax.random.key(0), (2, 5, 5, 8))
    # Float32: sums of a hundred products, and products of them.
    np.testing.assert_allclose(conv(x), net[0](x), rtol=1e-4, atol=1e-4)
    for before, after in zip(net[0].branches, conv.branches, strict=True):
        np.testing.assert_array_equal(before.kernel.seed[...], after.kernel.seed[...])
    np.testing.assert_array_equal(made[1].w.kernel[...], net[1].w.kernel[...])
    fresh = convert(net, [dict(match="0", kernel=str(conv.spec.kernel))], jax.random.key(0))
    shapes = [jax.tree.map(lambda x: x.shape, nnx.state(each)) for each in (fresh, made)]
    assert shapes[0] == shapes[1]  # a config with these ranks makes the same arrays


def test_errors(net):
    with pytest.raises(UserError, match="threshold=1.5: allowed a share"):
        layers.prune(net, 1.5)
    plain = nnx.List([net[1]])
    pruned = layers.prune(plain, 0.5)
    np.testing.assert_array_equal(pruned[0].w.kernel[...], net[1].w.kernel[...])
    rounded = convert(net, [dict(match="0", precision="c=lsq:4")], jax.random.key(0))
    with pytest.raises(UserError, match="0 has precision.core: rounded cores are not pruned"):
        layers.prune(rounded, 0.0)
    net[0].a.kernel.core[...] = np.nan
    with pytest.raises(UserError, match="not finite"):
        layers.prune(net, 0.0)
