"""Costs against the published figures, XLA's own count, and the models' parameters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_nets import analysis, layers, models
from efficient_nets.layers import Conv, Dense, LayerSpec

QUADRATIC = LayerSpec(neuron="ours", norm="branch")
RULE = dict(neuron="ours", norm="branch")


def build(name, rules=(), num_classes=10, image_shape=(32, 32, 3), **options):
    model = models.create(
        name, image_shape=image_shape, num_classes=num_classes, rngs=nnx.Rngs(0), **options
    )
    return layers.convert(model, rules, jax.random.key(0))


@pytest.mark.parametrize(
    ("macs", "name", "options"),
    [
        (313_201_664, "vgg", dict(layout="D")),
        (430_210_048, "vgg", dict(layout="Q7", rules=[dict(match="conv", **RULE)])),
        (69_124_736, "resnet", dict(depth=32)),
        (
            78_676_608,
            "resnet",
            dict(blocks=(2, 2, 2), rules=[dict(match=r"stage\d/.*/conv\d", **RULE)]),
        ),
        # The literature's 4.09 G and 569 M.
        (
            4_089_184_256,
            "resnet",
            dict(layout="imagenet", depth=50, image_shape=(224, 224, 3), num_classes=1000),
        ),
        (568_740_352, "mobilenet", dict(image_shape=(224, 224, 3), num_classes=1000)),
    ],
)
def test_macs_are_the_published_ones(macs, name, options):
    model = nnx.eval_shape(lambda: build(name, **options))
    assert analysis.model_cost(model, options.get("image_shape", (32, 32, 3)))["macs"] == macs


@pytest.mark.parametrize(
    ("image_shape", "layer"),
    [
        ((9, 7, 4), dict(features=6, kernel_size=(3, 3))),
        ((9, 7, 4), dict(features=6, kernel_size=(3, 2), strides=(2, 1), dilation=(2, 1))),
        ((9, 7, 4), dict(features=6, kernel_size=(3, 3), groups=2)),
        ((9, 7, 4), dict(features=8, kernel_size=(3, 3), groups=4)),
        ((11, 4), dict(features=5, kernel_size=(3,))),
        ((4, 5, 6, 4), dict(features=5, kernel_size=(2, 3, 2))),
        ((4,), dict(features=7)),
        ((3, 4), dict(features=7)),
    ],
)
def test_macs_of_linear_layers_are_half_of_xlas_flops(image_shape, layer):
    kind = Conv if "kernel_size" in layer else Dense
    more = dict(padding="VALID") if kind is Conv else {}
    model = kind(image_shape[-1], **layer, **more, use_bias=False, rngs=nnx.Rngs(0))
    kernel, linear_map = model.w.kernel[...], model.linear_map

    def computed(x):
        # A depthwise convolution is a loop on CPUs, of which XLA counts one round.
        if kind is Conv:
            return linear_map._convolved(x, kernel, out=None)
        return linear_map(x, [kernel])

    compiled = jax.jit(computed).lower(jnp.zeros((1, *image_shape)))
    (cost,) = analysis.layer_costs(model, image_shape)
    assert 2 * cost.macs == compiled.compile().cost_analysis()["flops"]


def test_a_quadratic_layer_costs_its_branches_and_products():
    options = dict(padding=1, groups=2, rngs=nnx.Rngs(0))
    linear, quadratic = (Conv(4, 6, (3, 3), spec=spec, **options) for spec in (None, QUADRATIC))
    (one,), (three,) = (analysis.layer_costs(layer, (5, 7, 4)) for layer in (linear, quadratic))
    assert three.macs == 3 * one.macs + 5 * 7 * 6
    assert three.params == 3 * (one.params + 2 * 6)  # branch norms: scale and bias
    assert dataclasses.asdict(three) == dict(
        name="",
        kind="Conv",
        kernels=((3, 3, 2, 6),) * 3,
        input_shape=(5, 7, 4),
        output_shape=(5, 7, 6),
        neuron="ours",
        norm="branch",
        kernel="dense",
        algorithm="direct",
        precision="float",
        bits=32,
        input_bits=32,
        output_bits=0,
        gradient_bits=0,
        params=3 * (3 * 3 * 2 * 6 + 6 + 2 * 6),
        bytes=4 * (three.params + 3 * 2 * 6),  # their running averages
        packed_bytes=4 * (three.params + 3 * 2 * 6),
        macs=3 * 5 * 7 * 6 * 3 * 3 * 2 + 5 * 7 * 6,
        bops=32 * 32 * three.macs,
    )


class Twice(nnx.Module):
    """Calls `shared` on two sizes, `once` once, `never` not at all."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.never = Dense(3, 3, rngs=rngs)
        self.once = Conv(3, 3, (1, 1), use_bias=False, rngs=rngs)
        self.shared = Conv(3, 3, (1, 1), use_bias=False, rngs=rngs)
        self.norm = layers.BatchNorm(3, rngs=rngs)
        self.half = nnx.Param(jnp.zeros(5, jnp.bfloat16))

    def __call__(self, x):
        x = self.shared(x)
        return self.once(self.norm(self.shared(x[:, ::2])))


def test_a_layer_called_twice_computes_twice_but_is_stored_once():
    cost = analysis.model_cost(Twice(), (4, 4, 3))
    shared, once = cost["layers"]
    assert [shared.name, once.name] == ["shared", "once"]  # in the order of the calls
    assert (shared.macs, once.macs) == ((16 + 8) * 9, 8 * 9)
    assert (shared.input_shape, shared.params) == ((4, 4, 3), 9)
    float32 = 9 + 9 + (9 + 3) + 2 * 3  # with what is never called, and the norm
    averages = 2 * 3
    assert (cost["params"], cost["bytes"]) == (float32 + 5, 4 * (float32 + averages) + 2 * 5)
    assert cost["packed_bytes"] == cost["bytes"]


def test_nothing_is_computed_or_changed():
    model = Twice()
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    cost = analysis.model_cost(model, (8, 8, 3))
    jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(model)))
    assert not model.norm.use_running_average  # still in training mode
    shapes = nnx.eval_shape(Twice)
    assert analysis.model_cost(shapes, (8, 8, 3)) == cost


class Rematted(Twice):
    @nnx.remat
    def __call__(self, x):
        return super().__call__(x)


def test_gradient_checkpointing_does_not_change_the_costs():
    net = nnx.Sequential(Rematted(), Rematted())
    plain = nnx.Sequential(Twice(), Twice())
    costs = analysis.layer_costs(plain, (8, 8, 3))
    assert len(costs) == 4
    for _ in range(2):  # JAX caches what it traced
        assert analysis.layer_costs(net, (8, 8, 3)) == costs


def test_rounded_layers_are_packed():
    spec = layers.LayerSpec(precision="w=ttq,a=lsq:4")
    layer = layers.Conv(3, 5, (3, 3), use_bias=False, spec=spec, rngs=nnx.Rngs(0))
    (cost,) = analysis.layer_costs(layer, (4, 4, 3))
    assert (cost.bits, cost.input_bits) == (2, 4)  # three levels take two bits
    assert cost.bytes == 4 * (3 * 3 * 3 * 5 + 2 + 1)  # two scales and a step
    assert cost.packed_bytes == -(-3 * 3 * 3 * 5 * 2 // 8) + 4 * (3 + 1)  # three values, a step
    assert cost.bops == 2 * 4 * cost.macs
    total = analysis.model_cost(layer, (4, 4, 3))
    assert (total["packed_bytes"], total["bops"]) == (cost.packed_bytes, cost.bops)
    assert "2/4" in analysis.layer_table(layer, (4, 4, 3))


@pytest.mark.parametrize(
    ("neuron", "macs", "bops"),
    [
        # The map of 5 squares of 8 bits; the squares.
        ("t2", 15 + 5, 15 * 2 * 8 + 5 * 4 * 4),
        # Two maps of 5 inputs; the products of the 3 pairs that they give, in float.
        ("t4", 2 * 15 + 3, 2 * 15 * 2 * 4 + 3 * 32 * 32),
        ("fan", 3 * 15 + 5 + 3, 2 * 15 * 2 * 4 + 15 * 2 * 8 + 5 * 4 * 4 + 3 * 32 * 32),
        # Forms of 5 * 6 / 2 products of two inputs.
        ("t1", 45 + 15 + 15, 45 * 2 * 8 + 15 * 2 * 4 + 15 * 4 * 4),
    ],
)
def test_bit_operations_of_squares_and_products(neuron, macs, bops):
    def cost(precision):
        spec = LayerSpec(neuron=neuron, precision=precision)
        (cost,) = analysis.layer_costs(Dense(5, 3, spec=spec, rngs=nnx.Rngs(0)), (5,))
        return cost.macs, cost.bops

    assert cost("lsq:w2a4") == (macs, bops)
    assert cost("float") == (macs, 32 * 32 * macs)


def test_bits_of_what_is_rounded_beside_kernel_and_input():
    spec = LayerSpec(precision="w=lsq:2,o=lsq:8,g=dorefa:6")
    (cost,) = analysis.layer_costs(Dense(5, 3, spec=spec, rngs=nnx.Rngs(0)), (5,))
    found = (cost.bits, cost.input_bits, cost.output_bits, cost.gradient_bits)
    assert found == (2, 32, 8, 6)


def test_a_layer_that_is_never_called_is_packed_too():
    net = layers.convert(Twice(), [dict(match="never", precision="w=lsq:2")], jax.random.key(0))
    plain, rounded = (analysis.model_cost(each, (4, 4, 3)) for each in (Twice(), net))
    # 9 weights in 3 bytes, their 4 values and a scale.
    assert rounded["packed_bytes"] == plain["packed_bytes"] - 4 * 9 + 3 + 4 + 4
