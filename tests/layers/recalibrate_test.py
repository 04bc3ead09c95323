"""Statistics made anew are the moments over all batches, to the letter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_nets import layers
from efficient_nets.errors import UserError
from efficient_nets.layers import BatchNorm, Dense, FrozenBatchNorm, LayerSpec, layer_norm_act
from efficient_nets.layers.recalibrate import merged
from efficient_nets.ops import quantizers

SPEC = LayerSpec(neuron="ours", norm="branch", precision="minmax:w4a4")


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first = Dense(3, 4, rngs=rngs)
        self.norm = BatchNorm(4, rngs=rngs)
        self.second = Dense(4, 5, spec=SPEC, rngs=rngs)
        self.frozen = FrozenBatchNorm(5, rngs=rngs)

    def __call__(self, x):
        x = layer_norm_act(x, self.first, self.norm, nnx.relu)
        return layer_norm_act(x, self.second, self.frozen)


def batches():
    random = np.random.default_rng(0)
    # Far from 0 and apart: E[x^2] - E[x]^2 in float32 would lose the variance.
    shifts = ([30.0], [31.0], [33.0])
    return [jnp.asarray(random.normal(size=(16, 3)) + shift, jnp.float32) for shift in shifts]


def test_moments_are_those_of_all_batches():
    net, given = Net(), batches()
    net.norm.mean[...] = jnp.full((4,), jnp.nan)  # what was there before does not matter
    found = layers.recalibrate_norms(net, given)
    kernel, bias = (np.asarray(x[...], np.float64) for x in (net.first.w.kernel, net.first.w.bias))
    values = [np.asarray(x, np.float64) @ kernel + bias for x in given]
    means = np.stack([x.mean(0) for x in values])
    squares = np.stack([x.var(0) for x in values]) + means**2
    # float32 sums of 16 numbers near 30 times the kernel; a variance is of differences of those.
    np.testing.assert_allclose(found.norm.mean[...], means.mean(0), rtol=1e-5)
    expected = squares.mean(0) - means.mean(0) ** 2
    np.testing.assert_allclose(found.norm.var[...], expected, rtol=1e-4)
    np.testing.assert_allclose(expected, np.concatenate(values).var(0))  # batches of one size
    assert np.all(np.isnan(net.norm.mean[...]))


def test_branches_follow_and_nothing_else_moves():
    net, given = Net(), batches()
    net.train()
    before = jax.tree.map(jnp.copy, nnx.state(net))
    found = layers.recalibrate_norms(net, given)
    changed = {
        "/".join(map(str, path))
        for (path, new), (_, old) in zip(
            nnx.to_flat_state(nnx.state(found)), nnx.to_flat_state(before), strict=True
        )
        if np.any(new[...] != old[...])
    }
    branches = {f"second/{name}/norm" for name in "abc"}
    assert changed == {f"{norm}/{x}" for norm in {"norm", *branches} for x in ("mean", "var")}
    jax.tree.map(np.testing.assert_array_equal, nnx.state(net), before)
    # Each batch goes through the net as in training, the branches' inputs normed by it.
    x = jax.nn.relu(jax.nn.standardize(net.first(given[0]), axis=0, epsilon=1e-5))
    moments = layers.batch_moments(net, given[0])["second/b/norm"]
    net.eval()
    kernel = net.second.rounded_kernel("b")
    quantizer = net.second.spec.precision.input
    z = quantizers.quantize(quantizer, x, net.second.ranges["input"].arrays()) @ kernel
    z = z + net.second.b.bias[...].reshape(1, -1)
    np.testing.assert_allclose(moments.mean, jnp.mean(z, 0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(moments.var, jnp.var(z, 0), rtol=1e-4, atol=1e-5)


def test_one_batch_merged_is_itself():
    (found,) = [layers.batch_moments(Net(), batches()[0])]
    jax.tree.map(np.testing.assert_array_equal, merged([found]), found)


def test_nothing_to_recalibrate():
    with pytest.raises(UserError, match="no batch norm"):
        layers.recalibrate_norms(Dense(3, 4, rngs=nnx.Rngs(0)), batches())
    with pytest.raises(UserError, match="batches is empty"):
        layers.recalibrate_norms(Net(), [])
