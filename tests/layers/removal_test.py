"""Layers that a rule removes: what stays in their place, for every model, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_nets import models
from efficient_nets.layers import BatchNorm, Conv, Dense, convert, layer_norm_act, layers, rules
from efficient_nets.models.vgg import ConvBlock

KEY = jax.random.key(3)


def removing(*patterns):
    return [{"match": pattern, "remove": True} for pattern in patterns]


def names(model):
    return {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))}


class Net(nnx.Module):
    """One unit with every kind of geometry that matters, given by the arguments of Conv."""

    def __init__(self, *arguments, **options):
        rngs = nnx.Rngs(0)
        self.conv1 = Conv(*arguments, **options, rngs=rngs)
        self.norm1 = BatchNorm(arguments[1], rngs=rngs)

    def __call__(self, x):
        return layer_norm_act(x, self.conv1, self.norm1, nnx.relu)


def test_where_the_shape_stays_the_whole_unit_becomes_the_identity():
    net = convert(ConvBlock(4, 4, rngs=nnx.Rngs(0)), removing("conv"), KEY)
    x = jax.random.normal(KEY, (2, 6, 6, 4))  # with negative values: no ReLU is left either
    np.testing.assert_array_equal(net(x), x)
    assert not names(net) and not jax.tree.leaves(nnx.state(net)) and not list(layers(net))
    np.testing.assert_array_equal(nnx.merge(*nnx.split(net))(x), x)


def test_where_channels_differ_a_linear_1x1_convolution_stays_with_its_norm():
    block = ConvBlock(4, 6, rngs=nnx.Rngs(0))
    quadratic = convert(block, [{"match": "", "neuron": "ours", "norm": "branch"}], KEY)
    x, kernel, bias = (
        np.asarray(jax.random.normal(KEY, shape)) for shape in ((2, 5, 5, 4), (1, 1, 4, 6), (6,))
    )
    for net in (block, quadratic):
        reduced = convert(net, removing("conv"), KEY)
        assert names(reduced) == {"conv/w/kernel", "conv/w/bias", "norm/scale", "norm/bias"}
        assert reduced.conv.w.kernel.shape == kernel.shape
        reduced.conv.w.kernel[...], reduced.conv.w.bias[...] = kernel, bias
        reduced.eval()  # running averages are 0 and 1 at the start
        expected = np.maximum((x @ kernel[0, 0] + bias) / np.sqrt(1 + 1e-5), 0)
        np.testing.assert_allclose(reduced(x), expected, rtol=1e-5, atol=1e-5)  # sums of 4 products


@pytest.mark.parametrize("side", [7, 8])
@pytest.mark.parametrize(
    "options",
    [
        dict(strides=2, padding=1),
        dict(strides=2, padding="SAME"),
        dict(strides=(1, 2), groups=2),
        dict(strides=3, padding=2, dilation=2, use_bias=False),
        dict(strides=2, padding=[(0, 2), (2, 0)]),
    ],
    ids=str,
)
def test_an_adapter_keeps_strides_groups_bias_and_the_output_s_shape(options, side):
    net = Net(4, 4, (3, 3), **options)
    reduced = convert(net, removing("conv"), KEY)
    x = jnp.ones((1, side, side, 4))
    assert reduced(x).shape == net(x).shape
    assert reduced.conv1.w.kernel.shape == (1, 1, 4 // options.get("groups", 1), 4)
    assert reduced.conv1.geometry.strides == net.conv1.geometry.strides
    assert (reduced.conv1.w.bias is None) == (options.get("use_bias") is False)


def test_a_dense_layer_that_keeps_the_width_can_go():
    layer = convert(Dense(4, 4, rngs=nnx.Rngs(0)), removing(""), KEY)
    x = jnp.ones((2, 4))
    np.testing.assert_array_equal(layer(x), x)


def test_vgg_without_convolutions_has_the_adapters_parameters():
    net = models.create(
        "vgg", image_shape=(32, 32, 3), num_classes=10, width=1 / 16, rngs=nnx.Rngs(0)
    )
    reduced = convert(net, removing("conv"), KEY)
    widths = [3, 4, 8, 16, 32]  # the last stage has as many channels as the one before
    adapters = sum(i * o + o + 2 * o for i, o in zip(widths, widths[1:], strict=False))
    count = sum(x.size for x in jax.tree.leaves(nnx.state(reduced, nnx.Param)))
    assert count == adapters + 32 * 10 + 10
    assert [path for path, _ in layers(reduced)] == [
        "head",
        *(f"stage{stage}/0/conv" for stage in (1, 2, 3, 4)),
    ]


EVERY = "conv|depthwise|pointwise|stem|shortcut"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lenet", {}),
        ("vgg", {"layout": "A"}),
        ("resnet", {"depth": 8}),
        ("resnet", {"layout": "imagenet", "depth": 50}),
        ("mobilenet", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_every_convolution_of_every_model_can_go_and_takes_its_norm_along(name, options):
    """A norm whose name breaks the convention would stay, and the forward pass would say so."""

    def build():
        model = models.create(
            *(name,),
            image_shape=(32, 32, 3),
            num_classes=5,
            rngs=nnx.Rngs(0),
            width=0.25,
            **options,
        )
        return convert(model, removing(EVERY), KEY)

    reduced = nnx.eval_shape(build)
    norms = [node for _, node in nnx.iter_graph(reduced) if isinstance(node, BatchNorm)]
    adapters = [layer for _, layer in layers(reduced) if isinstance(layer, Conv)]
    assert len(norms) == (0 if name == "lenet" else len(adapters)) and adapters
    assert {layer.geometry.kernel_size for layer in adapters} == {(1, 1)}
    logits = nnx.eval_shape(lambda net, x: net(x), reduced, jnp.ones((2, 32, 32, 3)))
    assert logits.shape == (2, 5)


def test_other_layers_are_as_they_would_be_without_the_removal():
    net = models.create(
        "resnet", image_shape=(8, 8, 1), num_classes=3, depth=8, width=0.25, rngs=nnx.Rngs(0)
    )
    ours = {"match": "conv", "neuron": "ours"}
    whole, reduced = (
        dict(nnx.to_flat_state(nnx.state(convert(net, found, KEY), nnx.Param)))
        for found in ([ours], [*removing("stage1/0/conv1"), ours])
    )
    gone = {path for path in whole if path[:3] in {("stage1", 0, "conv1"), ("stage1", 0, "norm1")}}
    assert reduced.keys() == whole.keys() - gone and len(gone) == 5
    for path, value in reduced.items():
        np.testing.assert_array_equal(value[...], whole[path][...], err_msg=str(path))


def test_a_removed_layer_stays_removed_under_later_rules():
    block = convert(ConvBlock(4, 4, rngs=nnx.Rngs(0)), removing("conv"), KEY)
    for rules_ in ([{"match": "conv", "neuron": "ours"}], removing("conv")):
        again = convert(block, rules_, KEY)
        assert again.conv.removed and not jax.tree.leaves(nnx.state(again, nnx.Param))


def test_an_adapter_that_is_removed_again_keeps_its_weights():
    block = convert(ConvBlock(4, 6, rngs=nnx.Rngs(0)), removing("conv"), KEY)
    again = convert(block, removing("conv"), jax.random.key(9))
    np.testing.assert_array_equal(again.conv.w.kernel[...], block.conv.w.kernel[...])


def test_fields_of_layers_leave_the_removal_of_others():
    given = [dict(match="a", remove=True), dict(match="b", neuron="ours"), dict(match="c")]
    found = rules.with_fields(given, {"b": {"neuron": "t2"}}, ["b", "c"])
    assert found == (dict(match="^b$", neuron="t2"), given[0], given[2])


def test_with_removals_puts_them_first_and_drops_rules_that_take_nothing_more():
    given = [{"match": "a|b", "neuron": "ours"}, {"match": "c"}, {"match": ""}]
    found = rules.with_removals(given, ["a.1", "b"], ["a.1", "b", "c", "d"])
    assert found == (
        {"match": r"^a\.1$", "remove": True},
        {"match": "^b$", "remove": True},
        {"match": "c"},
        {"match": ""},
    )


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (removing("head"), r"layers\[0\]: head: a dense layer from 4 to 3 features cannot"),
        ([{"match": "conv1", "remove": False}], r"layers\[0\].remove=False: allowed True"),
        ([{"match": "conv1", "remove": 1}], r"layers\[0\].remove=1: allowed True"),
        (
            [{"match": "conv1", "remove": True, "neuron": "ours", "norm": "branch"}],
            r"layers\[0\] removes layers, so it cannot set neuron, norm",
        ),
        (removing("valid"), r"valid: .*\(3, 3\) and padding=VALID cannot be removed: it shrinks"),
        (removing("conv3"), r"matches none"),
        ([{"match": "conv1", "removed": True}], r"'removed'.* did you mean 'remove'"),
    ],
)
def test_what_cannot_be_removed_is_named(found, message):
    net = Net(4, 4, (3, 3))
    net.head = Dense(4, 3, rngs=nnx.Rngs(0))
    net.valid = Conv(4, 4, (3, 3), padding="VALID", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=message):
        convert(net, found, KEY)


def test_a_norm_of_another_name_is_an_error_when_it_runs():
    net = Net(4, 4, (3, 3))
    net.other, net.norm1 = net.norm1, None
    reduced = convert(net, removing("conv1"), KEY)
    with pytest.raises(ValueError, match="a layer was removed, but its norm was not"):
        layer_norm_act(jnp.ones((1, 4, 4, 4)), reduced.conv1, reduced.other, nnx.relu)
