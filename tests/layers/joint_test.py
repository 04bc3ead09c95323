"""Layers that share the cores of one kernel: starts, gradients, rules, and runs of such nets."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_nets import analysis, deploy, models, pretraining, train
from efficient_nets.errors import UserError
from efficient_nets.layers import Conv, Dense, LayerSpec, convert, join
from efficient_nets.layers import kernel as kernels
from efficient_nets.ops import factorization
from efficient_nets.search import decompose
from tests import tiny_config

SHAPE = (8, 8, 3)
RULE = dict(match="stage1/.*conv", kernel="tucker:0.2", joint="body")


def images(shape=(2, 6, 6, 4)):
    return jax.random.normal(jax.random.key(7), shape)


def convs(number=3, neuron="linear", **fields):
    spec = LayerSpec(neuron, **fields)
    return [Conv(4, 4, (3, 3), spec=spec, rngs=nnx.Rngs(seed)) for seed in range(number)]


def arrays(module):
    return nnx.to_pure_dict(nnx.state(module))


def count(module):
    return sum(leaf.size for leaf in jax.tree.leaves(arrays(module)))


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, arrays(one), arrays(other))


@pytest.mark.parametrize("neuron", ["ours"])
def test_fresh_layers_have_the_mean_squares_of_their_dense_kernels(neuron):
    layers, rngs = convs(neuron=neuron), nnx.Rngs(0)
    join(layers, "tucker:0.3", rngs=rngs)
    for layer in layers:
        for branch in layer.branches:  # He: 2 / fan_in, of 144 numbers of a dense kernel
            np.testing.assert_allclose(jnp.mean(jnp.square(branch.dense())), 2 / 36, rtol=0.5)
    first, second = (np.asarray(layer.branches[0].dense()) for layer in layers[:2])
    assert np.abs(first - second).max() > 0.01
    shared = [layer.branches[0].kernel.shared for layer in layers]
    assert all(own is shared[0] for own in shared)
    held = {branch.kernel.shared.network.params for branch in layers[0].branches}
    biases = sum(b.bias.size for layer in layers for b in layer.branches if b.bias is not None)
    biases += sum(layer.bias.size for layer in layers if layer.bias is not None)
    assert count(nnx.List(layers)) == len(layers[0].branches) * held.pop() + biases


def test_fresh_mean_squares_are_exact():
    dense = jnp.stack([jnp.full((3, 3, 4, 4), size) for size in (1.0, 3.0, 0.5)])
    network = factorization.parse("cp:5").network((3, 3, 4, 4), 3)
    cores = kernels.fresh_joint(network, dense, nnx.Rngs(0))
    made = factorization.reconstruct(network, cores)
    # Float32: a root and a product of what is summed.
    np.testing.assert_allclose(jnp.mean(made**2, axis=(1, 2, 3, 4)), [1.0, 9.0, 0.25], rtol=1e-5)


@pytest.mark.parametrize("text", ["tucker:99", pytest.param("tt:99", marks=pytest.mark.slow)])
def test_kept_kernels_of_full_rank_leave_the_layers_as_they_are(text):
    layers, x = convs(), images()
    expected = [layer(x) for layer in layers]
    join(layers, f"{text},always", start="kept", rngs=nnx.Rngs(0))
    for layer, y in zip(layers, expected, strict=True):
        # Float32: singular vectors, and products of up to five cores.
        np.testing.assert_allclose(layer(x), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("text", ["tt:2", pytest.param("tucker:2", marks=pytest.mark.slow)])
def test_gradients_of_shared_cores_are_the_sum_over_the_layers(text):
    with jax.enable_x64(True):
        layers = [
            Conv(4, 4, (3, 3), param_dtype=jnp.float64, rngs=nnx.Rngs(seed)) for seed in range(3)
        ]
        join(layers, f"{text},always", rngs=nnx.Rngs(0))
        net, x = nnx.List(layers), images((2, 5, 5, 4)).astype(jnp.float64)

        def loss(net):
            y = x
            for layer in net:
                y = jnp.sin(layer(y))
            return jnp.sum(y)

        found = nnx.grad(loss)(net)[0].w.kernel.shared
        shared = layers[0].w.kernel.shared

        def apart(kernels):
            y = x
            for layer, kernel in zip(layers, kernels, strict=True):
                y = jnp.sin(layer.linear_map(y, [kernel]))  # biases start at 0
            return jnp.sum(y)

        whole, back = jax.vjp(
            lambda cores: factorization.reconstruct(shared.network, cores), shared.cores
        )
        each = jax.grad(apart)(list(whole))  # of each layer's kernel, as one of its own
        (expected,) = back(jnp.stack(each))
        for name, value in expected.items():
            # Float64: sums of a few hundred products in another order.
            np.testing.assert_allclose(found[name][...], value, rtol=1e-8, atol=1e-10)


def resnet():
    return models.create(
        "resnet", image_shape=SHAPE, num_classes=10, blocks=(2, 1, 1), width=0.25,
        rngs=nnx.Rngs(0),
    )  # fmt: skip


def test_rules_join_layers_and_leave_joint_ones_alone():
    net = resnet()
    made = convert(net, [RULE], jax.random.key(0))
    assert made.stage1[0].conv1.w.kernel.shared is made.stage1[1].conv2.w.kernel.shared
    assert_same(convert(made, [RULE], jax.random.key(1)), made)
    assert_same(convert(made, [RULE | dict(start="kept")], jax.random.key(1)), made)
    back = convert(made, [dict(match="stage1/.*conv", kernel="dense", start="kept")],
                   jax.random.key(0))  # fmt: skip
    kernel = back.stage1[1].conv1.w.kernel[...]
    np.testing.assert_array_equal(kernel, made.stage1[1].conv1.w.dense())
    assert back.stage1[1].conv1.spec.joint == ""


def test_the_layer_table_counts_shared_cores_once():
    made = convert(resnet(), [RULE], jax.random.key(0))
    costs = {cost.name: cost for cost in analysis.layer_costs(made, SHAPE)}
    shared = made.stage1[0].conv1.w.kernel.shared.network.params
    joint = [cost.params for name, cost in costs.items() if name.startswith("stage1")]
    assert joint == [shared, 0, 0, 0]
    assert costs["stage1/1/conv1"].bytes == costs["stage1/1/conv1"].packed_bytes == 0
    assert costs["stage1/0/conv1"].kernel == "tucker:0.2, body"
    found = analysis.model_cost(made, SHAPE)
    assert found["params"] == sum(
        leaf.size for leaf in jax.tree.leaves(nnx.to_pure_dict(nnx.state(made, nnx.Param)))
    )


def test_rules_say_what_cannot_be_joined():
    made = convert(resnet(), [RULE], jax.random.key(0))
    for rule, message in (
        (dict(match="stage1/0.*conv", kernel="dense", start="kept"), "4 layers share these cores"),
        (dict(match="stage1/1/conv1", remove=True), "4 layers share these cores"),
        (dict(match="head", joint="x"), "joint='x' with kernel='dense'"),
        (dict(match="head", kernel="tt:2", joint="x"), "head is the only layer with kernels"),
        (RULE | dict(start="relinear", joint="x"), "joint='x' with start='relinear'"),
        (RULE | dict(kernel="tt:5.0"), "the cores would have as many parameters as the 4"),
        (RULE | dict(joint=3), "joint=3: give a name"),
    ):
        with pytest.raises(UserError, match=message):
            convert(made, [rule], jax.random.key(0))


def test_join_says_what_cannot_be_joined():
    rngs, one = nnx.Rngs(0), convs(1)[0]
    other = Conv(4, 8, (3, 3), rngs=rngs)
    grouped = Conv(8, 4, (3, 3), groups=2, rngs=rngs)
    for layers, message in (
        ([one], "only layer with kernels"),
        ([one, one], r"layers\[1\] is there twice"),
        ([one, other], r"layers\[1\] has kernel_shape=\(3, 3, 4, 8\), allowed \(3, 3, 4, 4\)"),
        ([one, grouped], r"layers\[1\] has groups='2', allowed '1'"),
        ([one, convs(1, "ours")[0]], r"layers\[1\] has neuron='ours', allowed 'linear'"),
        ([one, nnx.Dropout(0.1)], r"layers\[1\] is a Dropout"),
    ):
        with pytest.raises(UserError, match=message):
            join(layers, rngs=rngs)
    with pytest.raises(UserError, match="layers share cores"):
        join(convs(), "dense", rngs=rngs)
    with pytest.raises(UserError, match="start='relinear'"):
        join(convs(), start="relinear", rngs=rngs)
    with pytest.raises(UserError, match="one layer by itself shares nothing"):
        Dense(4, 4, spec=LayerSpec(kernel="tt:2", joint="x"), rngs=rngs)
    joined = convs()
    join(joined, "tucker:0.3", rngs=rngs)
    with pytest.raises(UserError, match="3 layers share these cores"):
        join(joined[:2], "tt:2", rngs=rngs)


def test_a_first_dense_run_joins_nothing_and_decompose_refuses():
    rule = RULE | dict(start="kept")
    config = tiny_config.get_config()
    config.layers = (rule, dict(match="head"))
    config.pretrain.epochs = 1.0
    plain = pretraining.float_config(config)
    assert plain.layers == (dict(match=RULE["match"]), dict(match="head"))
    with pytest.raises(UserError, match="stage1/0/conv1 has joint='body': --mode=decompose"):
        list(decompose._decomposed_layers(config, resnet()))


def test_quantizers_round_each_layers_kernel_and_files_hold_codes(tmp_path):
    layers, x = convs(2), images()
    join(layers, "tucker:0.4", rngs=nnx.Rngs(0))
    net = nnx.List(layers)
    rule = dict(match=".", precision="minmax:w4a8")
    net = convert(net, [rule], jax.random.key(0))
    assert net[0].w.kernel.shared is net[1].w.kernel.shared
    net.train()
    [layer(x) for layer in net]
    net.eval()
    whole = deploy.to_integers(net)
    deploy.save(whole, tmp_path / "net.safetensors")
    template = nnx.eval_shape(lambda: deploy.to_integers(net, settle=True))
    loaded = deploy.load(template, tmp_path / "net.safetensors")
    for rounded, layer in zip(net, loaded, strict=True):
        assert layer.spec.joint == "" and not layer.w.factored
        # Whole numbers times scales, in float32.
        np.testing.assert_allclose(layer(x), rounded(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_net_of_joint_layers_trains_sharded_and_goes_on_from_its_checkpoint(tmp_path):
    def config():
        found = tiny_config.get_config()
        found.model.update(blocks=(2, 1, 1))
        found.layers = (dict(match="stage1/.*conv", kernel="tucker:0.3", joint="body"),)
        found.sharding.fsdp, found.train.ema, found.train.epochs = 2, 0.9, 1.0
        found.checkpoint.every_epochs = 1.0
        return found

    once = train.train(config(), tmp_path)
    again = train.train(config(), tmp_path)  # restores the last step, and evaluates it
    assert once["test/accuracy"] == again["test/accuracy"]
    leaves = (tmp_path / "checkpoints").glob("*/record/metadata")
    record = json.loads(next(leaves).read_text())["leaves"]
    shared = {path.split("/kernel/")[0] for path in record if path.startswith("params")
              and "shared" in path}  # fmt: skip
    assert shared == {"params/stage1/0/conv1/w"}


def test_layers_that_share_stay_whatever_their_order():
    """Names in another order than the slices, two groups of one name, and one layer by itself."""
    layers = convs(4)
    join([layers[1], layers[0]], "tt:2", rngs=nnx.Rngs(0))
    join(layers[2:], "tt:2", rngs=nnx.Rngs(1))
    net = nnx.List(layers)
    before = [layer.w.dense() for layer in layers]
    for match in (".", "^1$"):
        found = convert(net, [dict(match=match, precision="w=minmax:4")], jax.random.key(2))
        for layer, kernel in zip(found, before, strict=True):
            np.testing.assert_array_equal(layer.w.dense(), kernel)
        assert found[0].w.kernel.shared is not found[2].w.kernel.shared
    again = convert(nnx.List(layers[:2]), [dict(match=".", start="kept")], jax.random.key(2))
    for layer, kernel in zip(again, before[:2], strict=True):
        np.testing.assert_array_equal(layer.w.dense(), kernel)


def test_layers_that_cannot_be_joined_are_as_they_were():
    layers = convs(2)
    before = [layer.w.dense() for layer in layers]
    with pytest.raises(UserError, match="as many parameters"):
        join(layers, "tt:100", rngs=nnx.Rngs(0))
    for layer, kernel in zip(layers, before, strict=True):
        assert layer.spec == LayerSpec()
        np.testing.assert_array_equal(layer.w.kernel[...], kernel)
