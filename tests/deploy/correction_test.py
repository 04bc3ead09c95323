"""Rounded layers give on average what the plain ones give, each with the earlier ones corrected."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_nets import deploy, layers
from efficient_nets.errors import UserError
from efficient_nets.layers import BatchNorm, Conv, Dense, layer_norm_act
from tests.deploy.integer_test import normal


class Net(nnx.Module):
    """Layers with a bias, without one, and of neurons that have it elsewhere or nowhere."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv = Conv(3, 6, (3, 3), use_bias=False, rngs=rngs)
        self.norm = BatchNorm(6, rngs=rngs)
        self.ours = Conv(6, 5, (3, 3), use_bias=False, rngs=rngs)
        self.square = Dense(5, 5, rngs=rngs)
        self.qres = Dense(5, 4, rngs=rngs)
        self.head = Dense(4, 2, rngs=rngs)

    def __call__(self, x):
        x = layer_norm_act(x, self.conv, self.norm, nnx.relu)
        x = layer_norm_act(x, self.ours, activation=nnx.relu)
        x = self.square(jnp.mean(x, axis=(1, 2)))
        return self.head(nnx.relu(self.qres(x)))


def nets(norm="none"):
    rules = [
        dict(match="ours", neuron="ours", norm=norm),
        dict(match="square", neuron="t3"),
        dict(match="qres", neuron="qres"),
    ]
    plain = layers.convert(Net(), rules, jax.random.key(0))
    x = normal(8, 6, 6, 3)
    plain(x)  # running averages of their own
    plain.eval()
    # Without inputs, or codes at ties: another program may round these in another way.
    rounded = layers.convert(plain, [dict(match="", precision="w=twn")], jax.random.key(1))
    rounded = layers.calibrate(rounded, x, how="minmax")
    rounded.eval()
    return plain, rounded, x


def own_means(net, x):
    """Of each layer's own output, by path, in float64."""
    found = {}

    def before(path, layer, x):
        y = np.asarray(layers.linear.without_norm(x, layer), np.float64)
        found[path] = y.mean(tuple(range(y.ndim - 1)))

    layers.watched(net, before=before)(x)
    return found


@pytest.mark.parametrize("norm", ["none", "branch"])
def test_every_layer_has_the_plain_nets_means(norm):
    plain, rounded, x = nets(norm)
    expected, before = own_means(plain, x), own_means(rounded, x)
    state = jax.tree.map(jnp.copy, nnx.state(rounded))
    found, left = deploy.correct_biases(rounded, plain, x)
    assert left == {"square": "neuron='t3' has no branch or bias that is added to its output"}
    after = own_means(found, x)
    for path in expected.keys() - left:
        assert np.max(np.abs(before[path] - expected[path])) > 1e-3, path
        # Sums of up to 8 * 6 * 6 numbers in float32, of products of such.
        np.testing.assert_allclose(after[path], expected[path], atol=1e-5, err_msg=path)
    assert np.max(np.abs(after["square"] - before["square"])) > 1e-4  # what it reads is another
    jax.tree.map(np.testing.assert_array_equal, nnx.state(rounded), state)


def test_biases_that_were_not_there_are_made():
    plain, rounded, x = nets()
    found, _ = deploy.correct_biases(rounded, plain, x)
    assert rounded.conv.w.bias is None and found.conv.geometry.use_bias
    shift = own_means(plain, x)["conv"] - own_means(rounded, x)["conv"]  # the first layer
    np.testing.assert_allclose(found.conv.w.bias[...], shift, atol=1e-6)
    biases = {name: getattr(found.ours, name).bias[...] for name in "abc"}
    assert np.any(biases["c"]) and not np.any(biases["a"]) and not np.any(biases["b"])
    whole = deploy.to_integers(found)
    np.testing.assert_array_equal(whole(x), found(x))


def test_other_nets():
    plain, rounded, x = nets()
    del plain.norm, plain.head
    with pytest.raises(UserError, match="different nets: one has no head"):
        deploy.correct_biases(rounded, plain, x)
