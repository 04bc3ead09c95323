"""A net looked into: what each layer read and gave, its gradients, under remat, with NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_nets import analysis, layers
from efficient_nets.analysis.analyze import cross_entropy
from efficient_nets.errors import UserError
from efficient_nets.layers import BatchNorm, Conv, Dense, LayerSpec, layer_norm_act
from efficient_nets.ops import factorization

OURS = LayerSpec(neuron="ours", norm="branch")


class Block(nnx.Module):
    def __init__(self, features, rngs):
        self.conv = Conv(features, 4, (3, 3), spec=OURS, rngs=rngs)
        self.norm = BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        return layer_norm_act(x, self.conv, self.norm, nnx.relu)


class Rematted(Block):
    @nnx.remat
    def __call__(self, x):
        return super().__call__(x)


class Net(nnx.Module):
    """Calls `second` before `first`, `second` twice, `unused` never."""

    def __init__(self, block=Block):
        rngs = nnx.Rngs(0)
        self.first, self.second = block(4, rngs), block(4, rngs)
        self.stem = Conv(3, 4, (1, 1), rngs=rngs)
        self.unused = Dense(2, 2, rngs=rngs)
        self.head = Dense(4, 5, rngs=rngs)

    def __call__(self, x):
        x = self.second(self.stem(x))
        return self.head(jnp.mean(self.second(self.first(x[:, ::2])), axis=(1, 2)))


def batch():
    rng = np.random.default_rng(0)
    return rng.normal(size=(6, 8, 6, 3)).astype(np.float32), np.arange(6) % 5


@pytest.fixture(scope="module")
def found():
    return analysis.analyze(Net(), *batch())


def test_layers_come_in_the_order_of_their_calls(found):
    assert [layer.name for layer in found.layers] == ["stem", "second/conv", "first/conv", "head"]
    assert found.images == 6 and found.image.shape == (8, 6, 3)


def test_activations_are_the_output_in_evaluation_mode(found):
    net, (images, _) = Net(), batch()
    net.eval()
    y = net.second(net.stem(jnp.asarray(images)))
    layer = found.layers[1]  # in its first call
    # Two compilations of one float32 formula.
    np.testing.assert_allclose(layer.map, y[0], rtol=1e-4, atol=1e-5)
    assert layer.activations.counts.sum() == y.size
    assert layer.activations.mean == pytest.approx(float(jnp.mean(y)), rel=1e-4)


def test_maps_of_both_orders_are_the_terms_before_the_outer_norm(found):
    net, (images, _) = Net(), batch()
    net.eval()
    x, conv = net.stem(jnp.asarray(images)), net.second.conv
    a, b, c = (branch.norm(conv.linear_map(x, [branch.kernel[...]])) for branch in conv.branches)
    layer = found.layers[1]
    np.testing.assert_allclose(layer.second_map, (a * b)[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(layer.first_map, c[0], rtol=1e-4, atol=1e-4)
    assert layer.product_max == pytest.approx(float(jnp.max(abs(a * b))), rel=1e-4)
    assert layer.product_rms == pytest.approx(float(jnp.sqrt(jnp.mean((a * b) ** 2))), rel=1e-4)
    assert found.layers[0].second_map is None and found.layers[0].product_max == 0


def test_gradients_are_those_of_training(found):
    net, (images, labels) = Net(), batch()
    net.train()
    loss, gradient = nnx.value_and_grad(
        lambda net: analysis.cross_entropy(net(jnp.asarray(images)), jnp.asarray(labels))
    )(net)
    assert found.loss == pytest.approx(float(loss), rel=1e-5)
    kernel = np.asarray(gradient["second"]["conv"]["a"]["kernel"][...])
    histogram = found.layers[1].gradients["a"]
    # Gradients through batch norms of batches of 6 carry the rounding of their cancelling sums.
    extremes = [kernel.min(), kernel.max()]
    np.testing.assert_allclose(histogram.edges[[0, -1]], extremes, rtol=1e-3, atol=1e-6)
    weights = np.asarray(net.second.conv.a.kernel[...])
    assert found.layers[1].weights["a"].counts.sum() == weights.size
    assert list(found.layers[1].weights) == ["a", "b", "c"]
    np.testing.assert_array_equal(found.layers[1].weight_maps["a"], weights[..., 0, :12])
    np.testing.assert_allclose(
        found.layers[1].gradient_maps["a"], kernel[..., 0, :12], rtol=1e-3, atol=1e-6
    )
    head = np.asarray(net.head.w.kernel[...])
    np.testing.assert_array_equal(found.layers[-1].weight_maps["w"], head[:64, :12])


@pytest.mark.parametrize("block", [Block, Rematted])
def test_histograms_of_a_batch_are_those_of_training(found, block):
    net, (images, labels) = Net(block), batch()
    both = [analysis.batch_histograms(net, images, labels) for _ in range(2)]
    names = [name for name in both[0] if name.startswith("activations/")]
    assert names == [f"activations/{layer.name}" for layer in found.layers]
    for layer in found.layers:
        for branch, expected in layer.gradients.items():
            histogram = both[0].pop(f"gradients/{layer.name}/{branch}")
            # As above; and two compilations of one formula.
            np.testing.assert_allclose(histogram.edges, expected.edges, rtol=1e-3, atol=1e-5)
            assert histogram.counts.sum() == expected.counts.sum()
    assert list(both[0]) == names
    net = Net()
    y = net.second(net.stem(jnp.asarray(images)))  # in training mode, in its first call
    first, again = (histograms["activations/second/conv"] for histograms in both)
    assert first.mean == again.mean == pytest.approx(float(jnp.mean(y)), rel=1e-4)
    assert first.std == pytest.approx(float(jnp.std(y)), rel=1e-4)
    assert first.std != pytest.approx(found.layers[1].activations.std, rel=0.01)


def test_gradient_checkpointing_changes_nothing(found):
    for _ in range(2):  # JAX caches what it traced
        again = analysis.analyze(Net(Rematted), *batch())
        assert [layer.name for layer in again.layers] == [layer.name for layer in found.layers]
        for one, two in zip(again.layers, found.layers, strict=True):
            np.testing.assert_allclose(one.map, two.map, rtol=1e-4, atol=1e-5)
            assert one.shares == pytest.approx(two.shares, rel=1e-4)


def test_the_net_is_left_as_it_is():
    net = Net()
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(net)))
    graph = nnx.graphdef(net)
    analysis.analyze(net, *batch())
    assert nnx.graphdef(net) == graph and not net.first.norm.use_running_average
    jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(net)))


def test_a_net_without_such_layers_is_an_error():
    with pytest.raises(UserError, match="BatchNorm has no Dense or Conv to look into"):
        analysis.analyze(BatchNorm(3, rngs=nnx.Rngs(0)), np.ones((2, 3)), np.ones(2, int))


def test_nan_and_infinity_are_counted_where_they_are():
    net, (images, labels) = Net(), batch()
    net.first.conv.b.kernel[...] = net.first.conv.b.kernel[...].at[0, 0, 0, :2].set(jnp.nan)
    images[0, 0, 0, 0] = np.inf
    stem, second, first, head = analysis.analyze(net, images, labels).layers
    assert stem.nonfinite["input"] == 1 and stem.nonfinite["weights"] == 0
    assert stem.nonfinite["activations"] == 4  # a 1x1 kernel spreads it to its position's channels
    assert second.nonfinite["products"] == 4 * 4  # and a 3x3 one to four positions at the corner
    assert first.nonfinite["weights"] == 2 and second.nonfinite["weights"] == 0
    assert head.nonfinite["activations"] == 6 * 5 and head.nonfinite["gradients"] == 4 * 5
    assert np.isnan(list(head.shares.values())).all() and np.isnan(head.cross)


def test_bfloat16_products():
    net = layers.set_compute_dtype(Net(), jnp.bfloat16)
    found = analysis.analyze(net, *batch())
    exact = analysis.analyze(Net(), *batch())
    for one, two in zip(found.layers, exact.layers, strict=True):
        assert one.map.dtype == np.float32
        # 8 bits of mantissa, through four layers.
        assert one.shares == pytest.approx(two.shares, abs=0.05)


def test_the_largest_product_is_the_largest_finite_one():
    layer = Dense(1, 2, spec=LayerSpec("t4"), use_bias=False, rngs=nnx.Rngs(0))
    layer.a.kernel[...], layer.b.kernel[...] = jnp.asarray([[2.0, jnp.nan]]), jnp.ones((1, 2))
    (found,) = analysis.analyze(layer, jnp.ones((3, 1)), jnp.zeros(3, jnp.int32)).layers
    assert (found.product_max, found.product_nonfinite) == (2, 3)


def test_the_gradient_of_cores_is_shown_by_what_it_does_to_their_kernel():
    net = layers.convert(
        Net(), [dict(match="first", kernel="tucker:2x2", norm="none")], jax.random.key(0)
    )
    found = analysis.analyze(net, *batch())
    layer = next(layer for layer in found.layers if layer.name == "first/conv")
    images, labels = map(jnp.asarray, batch())

    def loss(net):
        net.train()
        return cross_entropy(net(images), labels)

    gradient = nnx.grad(loss)(nnx.clone(net))["first"]["conv"]["a"]["kernel"]
    kernel, step = net.first.conv.a.kernel, 1e-3
    moved = nnx.clone(kernel)
    for name, _ in kernel.network.cores:
        getattr(moved, name)[...] += step * gradient[name][...]
    change = moved.value(), kernel.value()
    change = [factorization.dense(value) for value in change]
    expected = np.asarray((change[0] - change[1]) / step)[..., 0, :]
    # A difference over a small step, in float32.
    np.testing.assert_allclose(layer.gradient_maps["a"], expected, rtol=0.05, atol=2e-3)
    assert np.any(np.abs(expected) > 0.02)
    assert layer.weights["a"].counts.sum() == 3 * 3 * 4 * 4
