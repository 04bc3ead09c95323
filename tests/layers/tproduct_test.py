"""TDense: its formula and scale under every transform, types, sharding, cost, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from efficient_nets import analysis, layers
from efficient_nets.errors import UserError
from efficient_nets.layers import TDense
from efficient_nets.layers.tproduct import kaiming_normal
from efficient_nets.ops import tproduct

each_execution = pytest.mark.parametrize("name", ["dct", "dft", "circulant"])


def make(name="dct", in_features=3, features=5, tubes=4, **options):
    by = tproduct.transform(name, tubes)
    return TDense(in_features, features, by, rngs=nnx.Rngs(0), **options)


def draws(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@each_execution
def test_a_layer_is_its_product_and_bias_under_jit_too(name):
    layer, x = make(name), draws(4, 2, 3)
    layer.bias[...] = draws(4, 5, seed=1)
    expected = tproduct.product(x, layer.kernel[...], layer.transform)
    expected += np.asarray(layer.bias[...])[:, None]
    # float32 rounding of some ten products of numbers of about 1.
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(nnx.jit(layer)(x), expected, rtol=1e-5, atol=1e-5)


def test_axes_between_tubes_and_rows_are_all_batch():
    layer, x = make(use_bias=False), draws(4, 2, 6, 3)
    assert layer.bias is None and len(jax.tree.leaves(nnx.state(layer))) == 1
    found = layer(x)
    assert found.shape == (4, 2, 6, 5)
    expected = layer(x.reshape(4, 12, 3)).reshape(found.shape)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert make()(draws(4, 3)).shape == (4, 5)


@pytest.mark.parametrize("name", ["dct", "dft", "bior", "toeplitz_hankel"])
def test_the_variance_of_the_input_is_kept(name):
    layer = make(name, 64, 64, tubes=16)
    # The variance of n draws is off by sqrt(2 / n): 65,536 weights and as many inputs, of whose
    # tubes each product mixes no more than 16 and whose errors Toeplitz-plus-Hankel's gain widens.
    variance = np.var(nnx.jit(layer)(draws(16, 64, 64)))
    np.testing.assert_allclose(variance, 1, rtol=0.06)


def test_half_of_it_is_made_up_for_where_relu_follows():
    layer = make("dct", 64, 64, tubes=16, kernel_init=kaiming_normal)
    np.testing.assert_allclose(jnp.var(layer.kernel[...]), 2 / 64, rtol=0.02)


@pytest.mark.parametrize("name", ["dct", "dft"])
def test_parameters_stay_in_their_type_and_products_are_in_the_computes(name):
    layer = make(name, dtype=jnp.bfloat16)
    assert layer.kernel.dtype == layer.bias.dtype == jnp.float32
    assert layer(draws(4, 2, 3)).dtype == jnp.bfloat16
    narrow = make(name, param_dtype=jnp.bfloat16)
    assert narrow.kernel.dtype == narrow.bias.dtype == jnp.bfloat16
    assert narrow(draws(4, 2, 3)).dtype == jnp.float32
    converted = layers.set_compute_dtype(make(name), jnp.bfloat16)
    np.testing.assert_array_equal(converted(draws(4, 2, 3)), layer(draws(4, 2, 3)))


def test_two_of_a_make_are_traced_once():
    graphs = [nnx.split(layer)[0] for layer in (make(), make())]
    graphs.append(nnx.split(nnx.merge(*nnx.split(make())))[0])
    assert len(set(map(hash, graphs))) == 1 and graphs[0] == graphs[1] == graphs[2]


@each_execution
def test_sharded_over_the_batch_is_unsharded(name):
    graph, state = nnx.split(make(name))

    @jax.jit
    @jax.grad
    def gradient(state, x):
        return jnp.sum(nnx.merge(graph, state)(x) ** 2)

    x = draws(4, 8, 3)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    cut = jax.device_put(x, NamedSharding(mesh, PartitionSpec(None, "data")))
    everywhere = jax.device_put(state, NamedSharding(mesh, PartitionSpec()))
    pairs = zip(*map(jax.tree.leaves, (gradient(everywhere, cut), gradient(state, x))), strict=True)
    for ours, expected in pairs:  # float32 rounding of sums of some ten terms, the largest of ten
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


class Net(nnx.Module):
    def __init__(self, name):
        self.first = make(name, 4, 6, tubes=8)
        self.conv = layers.Conv(6, 2, (1, 1), rngs=nnx.Rngs(0))

    def __call__(self, images):
        """(N, 8, W, 4), columns of pixels as slices of their own."""
        x = self.first(images.transpose(1, 0, 2, 3))
        return self.conv(x.transpose(1, 0, 2, 3))


def test_the_layer_table_counts_it():
    net = Net("dct")
    first, conv = analysis.layer_costs(net, (8, 5, 4))
    each = 8 * 4 * 6 + 8 * 8 * (4 + 6)  # the slices' products, and both transforms
    assert (first.name, first.kind, first.kernels) == ("first", "TDense", ((8, 4, 6),))
    assert (first.input_shape, first.output_shape) == ((8, 5, 4), (8, 5, 6))
    assert (first.kernel, first.algorithm, first.macs) == ("t-product", "dct", 5 * each)
    assert first.params == 8 * 4 * 6 + 8 * 6 and first.bytes == 4 * first.params
    cost = analysis.model_cost(net, (8, 5, 4))
    assert cost["macs"] == first.macs + conv.macs and cost["bytes"] == first.bytes + conv.bytes
    assert "other arrays" not in analysis.layer_table(net, (8, 5, 4))
    assert net.first.watch is None


def test_rules_leave_it_alone():
    net = Net("haar")
    assert [path for path, _ in layers.layers(net)] == ["conv"]
    assert [path for path, _ in layers.t_layers(net)] == ["first"]
    quadratic = layers.convert(net, [dict(match=".", neuron="ours")], jax.random.key(0))
    np.testing.assert_array_equal(quadratic.first.kernel[...], net.first.kernel[...])
    with pytest.raises(UserError, match="matches none of the layers: conv"):
        layers.convert(net, [dict(match="first", neuron="ours")], jax.random.key(0))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (jnp.ones((5, 2, 3)), r"tubes=4, in_features=3: the input, .* cannot be \(5, 2, 3\)"),
        (jnp.ones((4, 2, 4)), r"cannot be \(4, 2, 4\)"),
        (jnp.ones(4), r"cannot be \(4,\)"),
        (jnp.ones((4, 2, 3), jnp.int32), r"dtype int32: a floating one is needed"),
    ],
)
def test_wrong_inputs_are_named(x, message):
    with pytest.raises(UserError, match=message):
        make()(x)


@pytest.mark.parametrize("field", ["in_features", "features"])
def test_wrong_sizes_are_named(field):
    with pytest.raises(UserError, match=f"^{field}=0: must be at least 1"):
        make(**{field: 0})
