"""Factorized kernels as a layer's axis, with the other axes, and what conversion carries over."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_nets import analysis, deploy, layers, models
from efficient_nets.errors import UserError
from efficient_nets.layers import Conv, Dense, LayerSpec, convert
from efficient_nets.ops import factorization

TEXTS = ("cp:3", "tucker:0.4", "tt:2", "tr:2", "ht:2", "bt:0.4")
IMAGES = (2, 6, 6, 8)


def images(seed=0, shape=IMAGES):
    return jax.random.normal(jax.random.key(seed), shape)


def conv(text, neuron="linear", **fields):
    spec = LayerSpec(neuron, kernel=text, **fields)
    return Conv(8, 12, (3, 3), spec=spec, rngs=nnx.Rngs(0))


def with_dense(layer):
    """The same layer with its kernels as arrays."""
    spec = dataclasses.replace(layer.spec, kernel="dense", start="own")
    made = Conv(8, 12, (3, 3), spec=spec, rngs=nnx.Rngs(0))
    for name in layer.spec.branches:
        getattr(made, name).kernel[...] = getattr(layer, name).dense()
    return made


@pytest.mark.parametrize("neuron", ["linear", "ours", "qres"])
@pytest.mark.parametrize("text", TEXTS)
def test_a_layer_is_the_dense_one_of_its_kernel(text, neuron):
    x = images()
    found = [conv(f"{text},run={run}", neuron) for run in ("factorized", "reconstructed", "auto")]
    expected = with_dense(found[0])(x)
    for layer in found:
        assert layer.branches[0].factored and str(layer.spec.kernel).startswith(text)
        # Float32: sums of a hundred products.
        np.testing.assert_allclose(layer(x), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("text", ["cp:3", "tt:2"])
def test_gradients_of_the_hybrid_backward_are_those_of_autodiff(text):
    x = images()
    grads = []
    for backward in ("hybrid", "autodiff"):
        layer = conv(f"{text},run=factorized", "ours", norm="branch", backward=backward)
        grads.append(nnx.grad(lambda layer: jnp.sum(jnp.sin(layer(x))))(layer))
    a, b = (nnx.to_pure_dict(grad) for grad in grads)
    assert set(a["a"]["kernel"]) == {name for name, _ in layer.a.kernel.network.cores}
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-3), a, b)


@pytest.mark.parametrize("text", TEXTS)
def test_fresh_kernels_have_the_mean_square_of_dense_ones(text):
    made = conv(text).w.dense()
    np.testing.assert_allclose(jnp.mean(jnp.square(made)), 2 / 72, rtol=0.1)  # He: 2 / fan_in
    zero = Conv(
        8, 12, (3, 3), spec=LayerSpec(kernel=text), kernel_init=nnx.initializers.zeros,
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    assert np.all(zero.w.dense() == 0)
    grad = nnx.grad(lambda layer: jnp.sum(layer(images())))(zero)
    assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(nnx.to_pure_dict(grad)["w"]["kernel"]))


def lenet():
    return models.create(
        "lenet", image_shape=(8, 8, 1), num_classes=10, width=0.25, rngs=nnx.Rngs(0)
    )


@pytest.mark.parametrize("text", ["tucker:100,always", "tt:100,always", "cp:72,always"])
def test_kept_kernels_of_full_rank_leave_the_net_as_it_is(text):
    net, x = lenet(), images(shape=(2, 8, 8, 1))
    net.conv2.w.bias[...] = 0.1 + jnp.arange(16, dtype=jnp.float32)
    rules = [dict(match="conv2", kernel=text, start="kept")]
    made = convert(net, rules, jax.random.key(0))
    if "cp" not in text:  # whose full rank has as many terms as there are slices
        np.testing.assert_allclose(made(x), net(x), rtol=1e-4, atol=1e-4)
    back = convert(made, [dict(match="conv2", kernel="dense", start="kept")], jax.random.key(0))
    np.testing.assert_allclose(back(x), made(x), rtol=1e-4, atol=1e-5)
    assert not back.conv2.w.factored
    again = convert(made, [dict(match="conv2", kernel=f"{text},run=reconstructed", start="kept")],
                    jax.random.key(0))  # fmt: skip
    for name, _ in made.conv2.w.kernel.network.cores:
        np.testing.assert_array_equal(
            getattr(again.conv2.w.kernel, name)[...], getattr(made.conv2.w.kernel, name)[...]
        )


def test_kept_branches_of_a_quadratic_layer():
    layer = with_dense(conv("tucker:8x12,always", "ours", norm="branch"))
    layer.a.norm.scale[...] = 2.0
    net = nnx.List([layer])
    rule = dict(match="0", kernel="tucker:8x12,always", start="kept")
    made = convert(net, [rule], jax.random.key(0))[0]
    np.testing.assert_allclose(made(images()), layer(images()), rtol=1e-3, atol=1e-3)
    with pytest.raises(UserError, match="start='kept': the layer has neuron='ours'"):
        convert(net, [rule | dict(neuron="qres")], jax.random.key(0))


def test_relinear_carries_cores_and_decomposes_arrays():
    x = images()
    for first in ("tucker:8x12,always", "dense"):
        linear = conv(first)
        net = nnx.List([linear])
        rule = dict(match="0", neuron="ours", kernel="tucker:8x12,always", start="relinear")
        made = convert(net, [rule], jax.random.key(0))[0]
        np.testing.assert_allclose(made(x), linear(x), rtol=1e-4, atol=1e-5)


def test_layers_that_gain_nothing_stay_dense():
    net = lenet()
    made = convert(net, [dict(match="conv|hidden", kernel="tt:6")], jax.random.key(0))
    found = {path: str(layer.spec.kernel) for path, layer in layers.layers(made)}
    assert found == {"conv1": "dense", "conv2": "tt:6", "head": "dense", "hidden": "tt:6"}
    np.testing.assert_array_equal(made.conv1.w.kernel.shape, net.conv1.w.kernel.shape)


def test_layers_keep_their_parameters_under_the_same_kernel_again():
    """Also those that stayed dense, and under another way of running."""
    rule = dict(match="conv|hidden", kernel="tt:6")
    net = convert(lenet(), [rule], jax.random.key(0))
    for fields in (dict(precision="lsq:w4a4"), dict(kernel="tt:6,run=reconstructed")):
        again = convert(net, [rule | fields], jax.random.key(1))
        for path in ("conv1", "conv2", "hidden"):
            here, there = (getattr(of, path).w.dense() for of in (net, again))
            np.testing.assert_array_equal(here, there)
    assert again.conv2.w.kernel.run == "reconstructed"
    other = convert(net, [rule | dict(kernel="tt:5")], jax.random.key(1))
    assert np.any(other.conv2.w.dense() != net.conv2.w.dense())


def test_kept_layers_keep_their_ranges_and_ranks():
    rule = dict(match="conv2", precision="lsq:w4a4")
    net = convert(lenet(), [rule], jax.random.key(0))
    net.conv2.ranges["input"].step[...] = 7.0
    kept = [dict(match="conv2", kernel="tucker:energy=0.5", start="kept")]
    made = convert(net, kept, jax.random.key(1))
    assert made.conv2.ranges["input"].step[...] == 7.0
    assert made.conv2.ranges["w"].step[...] != net.conv2.ranges["w"].step[...]
    ranks = made.conv2.w.kernel.network
    again = convert(made, [dict(match="conv2", precision="minmax:w8a8")], jax.random.key(2))
    assert again.conv2.w.kernel.network == ranks
    np.testing.assert_array_equal(again.conv2.w.dense(), made.conv2.w.dense())


def test_ranks_of_the_kernel():
    net = lenet()
    noise = net.hidden.w.kernel[...]
    low = jnp.outer(jnp.sin(jnp.arange(noise.shape[0])), jnp.cos(jnp.arange(noise.shape[1])))
    net.hidden.w.kernel[...] = low + 0.01 * noise
    for rank in ("evbmf", "energy=0.9"):
        rule = dict(match="hidden", kernel=f"tucker:{rank}", start="kept")
        made = convert(net, [rule], jax.random.key(0)).hidden
        assert set(made.w.kernel.network.shapes.values()) == {(64, 1), (32, 1), (1, 1)}
        np.testing.assert_allclose(made.w.dense(), low, atol=0.05)
    with pytest.raises(UserError, match="give start='kept', or a rank"):
        LayerSpec(kernel="tt:evbmf")
    with pytest.raises(UserError, match="its rank depends on the numbers of a kernel"):
        nnx.eval_shape(lambda net: convert(net, [rule], jax.random.key(0)), net)


def test_conversion_can_be_traced():
    rules = [dict(match="conv2|hidden", kernel="tt:0.3", start="kept")]
    net = lenet()
    graph, state = nnx.split(net)

    def traced(state):
        return nnx.state(convert(nnx.merge(graph, state), rules, jax.random.key(0)))

    shapes = jax.eval_shape(traced, state)
    found = jax.jit(traced)(state)
    plain = nnx.state(convert(net, rules, jax.random.key(0)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-3), found, plain)
    assert jax.tree.structure(shapes) == jax.tree.structure(found)


@pytest.mark.parametrize(
    "fields",
    [
        dict(precision="lsq:w4a4"),
        dict(algorithm="winograd:2"),
        dict(algorithm="winograd:2,flex", precision="minmax:w8a8si8"),
        dict(precision="minmax:a8s"),
    ],
    ids=["lsq", "winograd", "winograd, int8", "input"],
)
@pytest.mark.parametrize("neuron", ["linear", "ours"])
def test_with_the_other_axes(fields, neuron):
    """Rounded and transformed is the kernel that the cores make."""
    x = images()
    layer = conv("tt:2", neuron, **fields)
    expected = with_dense(layer)
    if layer.ranges is not None:
        for name in layer.ranges:
            expected.ranges[name].set(layer.ranges[name].arrays())
    for made in (layer, expected):
        made.eval()
    np.testing.assert_allclose(layer(x), expected(x), rtol=1e-3, atol=1e-4)
    if "w4a4" in str(layer.spec.precision) or "w8" in str(layer.spec.precision):
        used = deploy.to_integers(nnx.List([layer]))[0]
        assert not used.branches[0].factored and used.spec.kernel == "dense"
        np.testing.assert_allclose(used(x), layer(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        (dict(neuron="t1", kernel="tt:2"), "its branches are forms of a window"),
        (dict(kernel="tt:2,run=factorized", precision="lsq:w4a4"), "what is rounded there is the"),
        (dict(kernel="tt:2,run=factorized", algorithm="winograd:4"), "transforms the whole kernel"),
        (dict(kernel="tt"), "kernel='tt': give a rank"),
    ],
)
def test_errors(fields, match):
    with pytest.raises(UserError, match=match):
        LayerSpec(**fields)


def test_groups_are_computed_with_the_whole_kernel():
    with pytest.raises(UserError, match="with groups=2: a convolution with groups takes the whole"):
        spec = LayerSpec(kernel="tt:2,run=factorized,order=2")
        Conv(8, 12, (3, 3), groups=2, spec=spec, rngs=nnx.Rngs(0))
    spec = LayerSpec(kernel="tt:2,order=2")
    layer = Conv(8, 12, (3, 3), groups=2, spec=spec, rngs=nnx.Rngs(0))
    plain = Conv(8, 12, (3, 3), groups=2, rngs=nnx.Rngs(0))
    plain.w.kernel[...] = layer.w.dense()
    np.testing.assert_allclose(layer(images()), plain(images()), rtol=1e-4, atol=1e-5)


def test_costs():
    net = convert(lenet(), [dict(match="conv2|hidden", kernel="tucker:4x4")], jax.random.key(0))
    cost = {layer.name: layer for layer in analysis.cost.layer_costs(net, (8, 8, 1))}
    conv2, hidden = cost["conv2"], cost["hidden"]
    assert (conv2.kernel, conv2.kernels) == ("tucker:4x4", ((5, 5, 8, 16),))
    assert conv2.params == 8 * 4 + 16 * 4 + 25 * 16 + 16
    assert conv2.macs == 16 * (8 * 4 + 25 * 16 + 4 * 16)  # 4x4 positions
    assert hidden.params == 64 * 4 + 4 * 4 + 4 * 32 + 32
    assert hidden.bytes == hidden.packed_bytes == 4 * hidden.params
    assert "tucker:4x4" in analysis.layer_table(net, (8, 8, 1))


def test_norms_do_not_fold_into_cores():
    class Block(nnx.Module):
        def __init__(self):
            self.conv, self.norm = conv("tt:2"), layers.BatchNorm(12, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return layers.layer_norm_act(x, self.conv, self.norm)

    block = Block()
    block.eval()
    _, kept = deploy.fold_norms(block, IMAGES[1:])
    assert "its kernel is factorized" in str(kept)
    assert factorization.dense(block.conv.w.value()).shape == (3, 3, 8, 12)
    assert isinstance(Dense(8, 4, rngs=nnx.Rngs(0)).w.value(), jax.Array)
