"""Nets of whole numbers give what the rounded ones give, bit for bit."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_nets import analysis, deploy, layers, models
from efficient_nets.errors import UserError
from efficient_nets.layers import BatchNorm, Conv, Dense, LayerSpec
from efficient_nets.ops.precision import Precision

EXACT = {
    "lsq 8": "lsq:w8a8",
    "lsq 4": "lsq:w4a4",
    "binary": "bireal",
    "ternary": "w=twn,a=pact:4",
    "dorefa": "dorefa:w8a8",
    "minmax": dict(
        kernel=dict(method="minmax", bits=8, per="channel"),
        input=dict(method="minmax", bits=8, signed=False, zero_point=True),
        output=dict(method="lsq", bits=8, signed=True),
    ),
    "normalised": dict(
        kernel=dict(method="lsq", bits=4),
        input=dict(method="lsq", bits=8, normalise="mean", pad="before"),
    ),
    "scaled": dict(
        kernel=dict(method="xnor++", case=3, size=(3, 3)), input=dict(method="xnor", k="box")
    ),
}


def normal(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def in_use(layer, x):
    """The layer with ranges for x, in evaluation mode."""
    layer = layers.calibrate(layer, x, how="minmax")
    layer.eval()
    return layer


def operands(layer, x):
    """Types of what the layer's convolution by its kernel takes."""
    equations = jax.make_jaxpr(lambda x: layer(x))(x).eqns
    for eqn in equations:  # a choice by platform has its equations inside
        inside = [eqn.params.get("jaxpr"), *eqn.params.get("branches", ())]
        equations.extend(e for of in inside if of is not None for e in of.eqns)
    size = layer.w.kernel.shape
    convolutions = [eqn.invars for eqn in equations if eqn.primitive.name == "conv_general_dilated"]
    return {x.aval.dtype for pair in convolutions if pair[1].aval.shape == size for x in pair}


@pytest.mark.parametrize("precision", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize(
    "make",
    [
        lambda spec: Conv(8, 12, (3, 3), strides=2, groups=2, spec=spec, rngs=nnx.Rngs(0)),
        lambda spec: Conv(
            8, 8, (3, 3), strides=2, groups=8, padding=1, spec=spec, rngs=nnx.Rngs(0)
        ),
    ],
    ids=["grouped", "depthwise"],
)
def test_integers_give_the_same_bits(precision, make):
    x = normal(2, 6, 6, 8) if precision == "bireal" else jnp.abs(normal(2, 6, 6, 8))
    layer = in_use(make(LayerSpec(precision=precision)), x)
    found = deploy.to_integers(layer)
    assert jnp.issubdtype(found.w.kernel.dtype, jnp.integer)
    np.testing.assert_array_equal(found(x), layer(x))
    wide = "minmax" in str(layer.spec.precision) or precision == "dorefa:w8a8"
    assert operands(found, x) == {jnp.dtype(jnp.int32 if wide else jnp.int8)}
    assert operands(layer, x) == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("bits", [3, 8])
def test_quadratic_and_dense_layers(bits):
    spec = LayerSpec(neuron="ours", norm="branch", precision=f"lsq:w{bits}a{bits}")
    x = jnp.abs(normal(5, 20))
    layer = in_use(Dense(20, 6, spec=spec, rngs=nnx.Rngs(0)), x)
    np.testing.assert_array_equal(deploy.to_integers(layer)(x), layer(x))


@pytest.mark.parametrize("precision", ["w=lq:2,a=lsq:4", "w=ttq,a=lsq:4", "w=log2:3,a=lsq:4"])
def test_kernels_without_a_grid_stay_values(precision):
    x = jnp.abs(normal(5, 20))
    layer = in_use(Dense(20, 6, spec=LayerSpec(precision=precision), rngs=nnx.Rngs(0)), x)
    found = deploy.to_integers(layer)
    np.testing.assert_array_equal(found.w.kernel[...], layer.rounded_kernel("w"))
    assert found.spec.precision.kernel is None and set(found.ranges) == {"input"}
    np.testing.assert_array_equal(found(x), layer(x))


def test_a_whole_net_with_schedules_that_are_over():
    schedule = dict(float_epochs=1.0, stages=((0, 256), (2, 16)))
    precision = dict(
        kernel=dict(method="lsq", bits=4, **schedule), input=dict(method="lsq", bits=4, **schedule)
    )
    rules = [dict(match=r"conv\d", precision=precision)]
    plain = models.create(
        "resnet",
        image_shape=(8, 8, 3),
        num_classes=10,
        blocks=(1, 1, 1),
        width=0.25,
        rngs=nnx.Rngs(0),
    )
    net = layers.convert(plain, rules, jax.random.key(0))
    x = normal(4, 8, 8, 3)
    net.eval()
    half = deploy.to_integers(net)  # nothing is rounded yet
    np.testing.assert_array_equal(half(x), net(x))
    for epoch in (0.0, 1.0, 2.0):
        layers.advance([found for _, found in layers.ranges(net)], epoch)
    found = deploy.to_integers(net)
    assert found.stage1[0].conv1.w.kernel.dtype == jnp.int8
    np.testing.assert_array_equal(found(x), net(x))


INT4 = {  # kernels in int4 or not, as codes of kernel and input fit
    "lsq:w4a4": True,  # codes of the input are 0 ... 15, moved down by 8
    "bireal": True,
    "dorefa:w3a2": True,  # -7 ... 7 in steps of 2
    "w=lsq:4,a=lsq:5": False,
    "w=dorefa:4,a=lsq:4": False,
    "w=lsq:4": False,
}


@pytest.mark.parametrize(("precision", "narrow"), INT4.items(), ids=INT4)
def test_int4_operands_give_the_same_bits(precision, narrow):
    x = normal(2, 6, 6, 8) if precision == "bireal" else jnp.abs(normal(2, 6, 6, 8))
    spec = LayerSpec(neuron="ours", precision=precision)
    layer = in_use(Conv(8, 6, (3, 3), strides=2, groups=2, spec=spec, rngs=nnx.Rngs(0)), x)
    found, whole = deploy.to_integers(layer, operands="int4"), deploy.to_integers(layer)
    assert found.a.kernel.dtype == (jnp.int4 if narrow else jnp.int8)
    np.testing.assert_array_equal(found(x), layer(x))
    np.testing.assert_array_equal(jax.jit(lambda x: found(x))(x), jax.jit(lambda x: whole(x))(x))
    wide = deploy.to_integers(found)  # and back
    assert wide.a.kernel.dtype == jnp.int8
    again = deploy.to_integers(wide, operands="int4")
    assert again.a.kernel.dtype == found.a.kernel.dtype
    np.testing.assert_array_equal(again.a.kernel[...], found.a.kernel[...])


@pytest.mark.parametrize("operands", ["int8", "int4"])
def test_codes_of_an_earlier_stage_have_room(operands):
    fields = dict(method="lsq", bits=4, stages=((0, 256), (2, 16)))
    spec = LayerSpec(precision=dict(kernel=fields, input=fields))
    layer = in_use(Dense(20, 6, spec=spec, rngs=nnx.Rngs(0)), jnp.abs(normal(5, 20)))
    x = 100 * jnp.abs(normal(5, 20))  # all of them the highest code
    found = deploy.to_integers(layer, operands=operands)
    np.testing.assert_array_equal(found(x), layer(x))
    layers.advance(layer.ranges.values(), 2.0)
    found = deploy.to_integers(layer, operands=operands)
    np.testing.assert_array_equal(found(x), layer(x))
    assert found.w.kernel.dtype == operands


def test_the_rounded_input_has_no_gradient_of_its_codes():
    layer = Dense(5, 4, spec=LayerSpec(precision="lsq:w4a4"), rngs=nnx.Rngs(0))
    found = deploy.to_integers(layer, operands="int4")
    assert not jnp.any(jax.grad(lambda x: jnp.sum(found(x)))(normal(2, 5)))


def test_operands_of_another_type():
    layer = Dense(5, 4, spec=LayerSpec(precision="lsq:w4a4"), rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="operands='int2' is not known: allowed int4, int8"):
        deploy.to_integers(layer, operands="int2")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda spec: Conv(128, 128, (3, 3), spec=spec, rngs=nnx.Rngs(0)), (8, 16, 16, 128)),
        (lambda spec: Dense(256, 128, spec=spec, rngs=nnx.Rngs(0)), (128, 256)),
    ],
    ids=["conv", "dense"],
)
@pytest.mark.parametrize(("operands", "kind"), [("int4", "s4"), ("int8", "s8")])
def test_what_a_tpu_multiplies(make, shape, operands, kind, tpu):
    layer = make(LayerSpec(precision="lsq:w4a4"))
    graph, state = nnx.split(deploy.to_integers(layer, operands=operands))
    sharding = jax.sharding.SingleDeviceSharding(tpu)
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        (state, jnp.zeros(shape)),
    )
    compiled = jax.jit(lambda state, x: nnx.merge(graph, state)(x)).lower(*arguments).compile()
    text = compiled.as_text()
    types = dict(re.findall(r"(%[\w.-]+) = (\w+)\[", text))
    products = re.findall(r" = (\w+)\[\S* (?:convolution|dot)\((%[\w.-]+), (%[\w.-]+)\)", text)
    assert [(out, types[a], types[b]) for out, a, b in products] == [("s32", kind, kind)]


@pytest.mark.parametrize("site", ["kernel", "input"])
def test_a_schedule_of_one_site_that_is_not_over(site):
    """The other one's codes are whole numbers, and this one's are not."""
    precision = {name: dict(method="lsq", bits=4) for name in ("kernel", "input")}
    precision[site]["float_epochs"] = 1.0
    layer = Conv(4, 4, (3, 3), spec=LayerSpec(precision=precision), rngs=nnx.Rngs(0))
    layer.eval()
    x = jnp.abs(normal(2, 6, 6, 4))
    # Products are rounded before or behind the sum of 36 of them.
    np.testing.assert_allclose(deploy.to_integers(layer)(x), layer(x), rtol=1e-5, atol=1e-5)
    layers.advance(layer.ranges.values(), 1.0)
    found = deploy.to_integers(layer)
    assert found.w.kernel.dtype == jnp.int8
    np.testing.assert_array_equal(found(x), layer(x))


def test_what_a_schedule_stopped_is_gone():
    precision = dict(
        kernel=dict(method="lsq", bits=4, float_epochs=1.0, stop_epoch=2.0),
        input=dict(method="lsq", bits=4),
    )
    layer = Conv(4, 4, (3, 3), spec=LayerSpec(precision=precision), rngs=nnx.Rngs(0))
    layer.eval()
    x = jnp.abs(normal(2, 6, 6, 4))
    for epoch, kind in ((0, jnp.float32), (1, jnp.float32), (2, jnp.float32)):
        layers.advance(layer.ranges.values(), epoch)
        found = deploy.to_integers(layer)
        assert found.w.kernel.dtype == kind
        np.testing.assert_array_equal(found(x), layer(x))
    assert found.spec.precision.kernel is None and set(found.ranges) == {"input"}
    np.testing.assert_array_equal(found.w.kernel[...], layer.w.kernel[...])
    cost = analysis.model_cost(layer, (6, 6, 4))
    of_kernel = sum(x.nbytes for x in jax.tree.leaves(nnx.state(layer.ranges["w"])))
    assert cost["layers"][0].bits == 32 and cost["packed_bytes"] == cost["bytes"] - of_kernel

    only = dict(input=dict(method="lsq", bits=4, stop_epoch=1.0))
    layer = Conv(4, 4, (3, 3), spec=LayerSpec(precision=only), rngs=nnx.Rngs(0))
    found = deploy.to_integers(layer, settle=True)
    assert found.ranges is None and found.spec.precision == Precision()


def test_norms_and_activation_stay_fused():
    x = jnp.abs(normal(2, 6, 6, 4))
    layer = in_use(Conv(4, 4, (3, 3), spec=LayerSpec(precision="lsq:w4a4"), rngs=nnx.Rngs(0)), x)
    norm = BatchNorm(4, rngs=nnx.Rngs(0))
    norm.eval()
    expected = layers.layer_norm_act(x, layer, norm, nnx.relu)
    found = layers.layer_norm_act(x, deploy.to_integers(layer), norm, nnx.relu)
    np.testing.assert_array_equal(found, expected)


def test_its_layer_table_says_what_is_stored():
    layer = Conv(4, 6, (3, 3), spec=LayerSpec(precision="lsq:w3a4"), rngs=nnx.Rngs(0))
    cost = analysis.model_cost(deploy.to_integers(layer), (6, 6, 4))
    (one,) = cost["layers"]
    assert (one.bits, one.input_bits, one.precision) == (3, 4, "w=stored:3,a=lsq:4")
    count = 3 * 3 * 4 * 6
    assert cost["bytes"] == count + 4 * (6 + 1 + 1)  # int8; biases, a scale, the input's step
    assert cost["packed_bytes"] == count * 3 // 8 + 8 + 4 * (6 + 1 + 1)  # with 8 values in int8
