"""Every neuron as a layer: counts in closed form, starts, conversions, what it refuses."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_nets import analysis
from efficient_nets.errors import UserError
from efficient_nets.layers import BatchNorm, Conv, Dense, LayerSpec, convert, layer_norm_act
from efficient_nets.layers import neuron as neuron_parameters
from efficient_nets.ops import linear_maps, neurons

NAMES = [*neurons.NEURONS, "t1:1", "t1:3", "cqnn:2"]
LINEARISABLE = [name for name in NAMES if neurons.neuron(name).relinear]
KEY = jax.random.key(3)


def pairs(n):
    return n * (n + 1) // 2


# Weights and biases of an output value of n inputs, with `use_bias`, as the papers count them.
COUNTS = {
    "linear": lambda n: n + 1,
    "t1": lambda n: pairs(n) + n + 1,
    "t2": lambda n: n + 1,
    "t3": lambda n: n + 1,
    "t4": lambda n: 2 * (n + 1),
    "t1&2": lambda n: pairs(n) + n + 1,
    "t2&4": lambda n: 3 * (n + 1),
    "fan": lambda n: 3 * (n + 1),
    "ours": lambda n: 3 * (n + 1),
    "qres": lambda n: 2 * n + 1,
    "cqnn": lambda n: pairs(n + 1),  # the form of n inputs and a 1
    "t1:1": lambda n: 3 * n + 1,
    "t1:3": lambda n: 7 * n + 1,
    "cqnn:2": lambda n: 4 * (n + 1),
}
BIASES = {name: 1 for name in NAMES} | {"t4": 2, "t2&4": 3, "fan": 3, "ours": 3, "cqnn:2": 4}
# Multiplications of an output value: weights, then the neuron's own products.
PRODUCTS = {"t3": 1, "t4": 1, "t2&4": 1, "fan": 1, "ours": 1, "qres": 1}
PRODUCTS |= {"t1:1": 1, "t1:3": 3, "cqnn:2": 2}


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_macs_in_closed_form(name, use_bias):
    groups, features, n = 2, 6, 3 * 2 * 2
    conv = Conv(
        4, 6, (3, 2), groups=groups, use_bias=use_bias, spec=LayerSpec(name), rngs=nnx.Rngs(0)
    )
    (cost,) = analysis.layer_costs(conv, (5, 7, 4))
    kept = use_bias or name in ("fan", "cqnn", "cqnn:2")
    biases = BIASES[name]
    assert cost.params == features * (COUNTS[name](n) - (0 if kept else biases))
    positions, inputs = 5 * 7, 5 * 7 * 4
    macs = positions * features * (COUNTS[name](n) - biases + PRODUCTS.get(name, 0))
    if name in ("t2", "t2&4", "fan", "t1&2"):
        macs += inputs
    if name in ("t1", "t1&2", "cqnn"):
        macs += positions * groups * pairs(n)
    assert cost.macs == macs


# From linear to quadratic


def linear_layers():
    bias = dict(bias_init=nnx.initializers.normal(), rngs=nnx.Rngs(0))
    return {
        "dense": (Dense(8, 5, **bias), (3, 8)),
        "conv": (Conv(3, 5, (3, 3), strides=2, padding=1, **bias), (2, 7, 6, 3)),
        "groups": (Conv(4, 6, (3, 3), groups=2, **bias), (2, 5, 5, 4)),
        "depthwise": (Conv(4, 4, (3, 3), groups=4, **bias), (2, 5, 5, 4)),
        "1-D": (Conv(3, 5, (3,), **bias), (2, 7, 3)),
    }


@pytest.mark.parametrize("shape", linear_layers())
@pytest.mark.parametrize("name", LINEARISABLE)
def test_relinear_starts_as_the_linear_layer(name, shape):
    """Bit for bit the linear branch: the other terms add exactly 0, or multiply by exactly 1.

    That branch is computed beside others, which XLA may sum in another order than alone.
    """
    layer, x_shape = linear_layers()[shape]
    x = jnp.asarray(np.random.default_rng(0).normal(size=x_shape), jnp.float32)
    quadratic = convert(layer, [dict(match="", neuron=name, start="relinear")], KEY)
    parts = quadratic.spec.parts
    assert quadratic.spec.neuron == name

    @jax.jit
    def carried(x):
        kernels = [quadratic.branches[i].kernel[...] for i in parts.kinds["x"]]
        z = quadratic.linear_map(x, kernels)
        zs = linear_maps.split(z, len(kernels), quadratic.linear_map.groups)
        z = zs[parts.kinds["x"].index(parts.relinear.index("carry"))]
        return z + layer.w.bias[...].reshape((1,) * (z.ndim - 1) + (-1,))

    y = jax.jit(quadratic)(x)
    np.testing.assert_array_equal(y, carried(x))
    np.testing.assert_allclose(y, layer(x), rtol=1e-5, atol=1e-5)  # sums of up to 36 terms


@pytest.mark.parametrize("name", LINEARISABLE)
def test_relinear_is_bit_equal_where_a_channel_does_not_depend_on_its_neighbours(name):
    """As XLA:CPU's matrix product in whole vectors of channels."""
    layer = Dense(64, 32, bias_init=nnx.initializers.normal(), rngs=nnx.Rngs(0))
    x = jax.random.normal(KEY, (8, 64))
    quadratic = convert(layer, [dict(match="", neuron=name, start="relinear")], KEY)
    np.testing.assert_array_equal(jax.jit(quadratic)(x), jax.jit(layer)(x))


@pytest.mark.parametrize("norm", ["none", "branch"])
@pytest.mark.parametrize("name", ["fan", "cqnn", "cqnn:2"])
def test_relinear_of_a_layer_without_bias_leaves_none_to_a_neuron_that_has_its_own(name, norm):
    random = dict(bias_init=nnx.initializers.normal(), rngs=nnx.Rngs(0))
    layer = Dense(8, 5, use_bias=False, spec=LayerSpec(norm=norm), **random)
    layer.eval()
    x = jax.random.normal(KEY, (3, 8))
    quadratic = convert(layer, [dict(match="", neuron=name, start="relinear")], KEY)
    quadratic.eval()
    np.testing.assert_allclose(quadratic(x), layer(x), rtol=1e-5, atol=1e-5)  # sums of 8 terms


@pytest.mark.parametrize("name", sorted({*LINEARISABLE} - {"linear"}))
def test_relinear_is_not_stuck(name):
    """Some weight of a product has a gradient at the start, so that the neuron can bend."""
    layer, x_shape = linear_layers()["conv"]
    x = jnp.asarray(np.random.default_rng(0).normal(size=x_shape), jnp.float32)
    quadratic = convert(layer, [dict(match="", neuron=name, start="relinear")], KEY)
    graph, params, rest = nnx.split(quadratic, nnx.Param, ...)

    def loss(params):
        return jnp.sum(nnx.merge(graph, params, rest)(x) ** 3)

    gradients = nnx.to_pure_dict(jax.grad(loss)(params))
    linear = [
        branch
        for branch, role in zip(quadratic.spec.branches, quadratic.spec.parts.relinear, strict=True)
        if role == "carry"
    ]
    bends = {branch: leaves for branch, leaves in gradients.items() if branch not in linear}
    assert max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(bends)) > 1e-2


class Net(nnx.Module):
    def __init__(self, norm, rngs):
        spec = LayerSpec(norm=norm)
        self.conv = Conv(3, 6, (3, 3), bias_init=nnx.initializers.normal(), spec=spec, rngs=rngs)
        self.norm = BatchNorm(6, rngs=rngs)

    def __call__(self, x):
        return layer_norm_act(x, self.conv, self.norm, nnx.relu)


@pytest.mark.parametrize("name", LINEARISABLE)
@pytest.mark.parametrize("norm", ["none", "branch"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_relinear_under_branch_norms(norm, mode, name):
    """A carried branch norm changes nothing. A new one normalises what the next norm would anyway:
    exact in evaluation, and in training but for its epsilon."""
    net, x = Net(norm, nnx.Rngs(0)), jax.random.normal(KEY, (8, 6, 6, 3))
    net.norm.mean[...], net.norm.var[...] = jnp.full(6, 0.3), jnp.full(6, 2.0)
    if norm == "branch":
        net.conv.w.norm.mean[...], net.conv.w.norm.scale[...] = jnp.full(6, 0.1), jnp.full(6, 1.5)
    getattr(net, mode)()
    quadratic = convert(net, [dict(match="", neuron=name, norm="branch", start="relinear")], KEY)
    getattr(quadratic, mode)()  # its new norms are in training mode
    close = dict(rtol=1e-4, atol=1e-4)  # epsilon is 1e-5 of variances of about 1
    np.testing.assert_allclose(quadratic(x), net(x), **close)


def test_convert_to_every_neuron_with_and_without_bias():
    for use_bias in (True, False):
        dense = Dense(3, 2, use_bias=use_bias, rngs=nnx.Rngs(0))
        for name in NAMES:
            made = convert(dense, [dict(match="", neuron=name)], KEY)
            fresh = Dense(
                3, 2, use_bias=use_bias, spec=LayerSpec(name, start="own"), rngs=nnx.Rngs(0)
            )
            shapes = [
                jax.tree.map(jnp.shape, nnx.state(layer, nnx.Param)) for layer in (made, fresh)
            ]
            assert shapes[0] == shapes[1]


def test_a_start_is_for_the_rule_that_names_it():
    dense = Dense(3, 2, rngs=nnx.Rngs(0))
    started = convert(dense, [dict(match="", neuron="ours", start="relinear")], KEY)
    again = convert(started, [dict(match="", backward="autodiff")], KEY)
    np.testing.assert_array_equal(again.c.kernel[...], dense.w.kernel[...])
    np.testing.assert_array_equal(again.a.kernel[...], started.a.kernel[...])
    varied = convert(dense, [dict(match="", start="variance")], KEY)
    assert not np.array_equal(varied.w.kernel[...], dense.w.kernel[...])


# Initialisation that keeps the scale


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("start", ["variance", "variance:relu"])
def test_variance_is_kept_through_a_layer(name, start):
    """Inputs are as `start` takes them: Gaussian, or the positive part of one, of moment 1."""
    form = any(kind == "form" for kind in neurons.neuron(name).kinds)
    n, features, samples = (64, 128, 512) if form else (512, 512, 512)
    x = jax.random.normal(KEY, (samples, n))
    if start.endswith("relu"):
        x = math.sqrt(2) * nnx.relu(x)
    dense = Dense(n, features, spec=LayerSpec(name, start=start), rngs=nnx.Rngs(0))
    y = dense(x)
    if start.endswith("relu"):
        y = nnx.relu(y)
    # The mean of 65,536 values, correlated through 512 samples' norms and 128 rows of weights:
    # about 3% for products of Gaussians, more where fourth moments count.
    np.testing.assert_allclose(jnp.mean(y**2), 1, atol=0.2)


@pytest.mark.parametrize("start", ["variance", "variance:relu"])
@pytest.mark.parametrize("name", ["t3", "t4", "ours", "qres", "t1:3"])
def test_variance_is_kept_where_few_inputs_share_their_scale(name, start):
    """Depthwise 3x3: windows differ in size, and both factors of a product are of one window."""
    channels = 4096
    x = jax.random.normal(KEY, (64, 3, 3, channels))
    if start.endswith("relu"):
        x = math.sqrt(2) * nnx.relu(x)
    spec = LayerSpec(name, start=start)
    conv = Conv(
        channels, channels, (3, 3), padding="VALID", groups=channels, spec=spec, rngs=nnx.Rngs(0)
    )
    y = conv(x)
    if start.endswith("relu"):
        y = nnx.relu(y)
    # 262,144 values with heavy tails (products of Gaussians, squared, of 4096 kernels).
    np.testing.assert_allclose(jnp.mean(y**2), 1, atol=0.25)


DEEP = {"linear": (1024, 8), "ours": (1024, 8), "qres": (1024, 8), "t1:1": (1024, 8)}
DEEP |= {"t1:3": (1024, 8), "t1": (128, 4), "cqnn": (128, 4)}


@pytest.mark.parametrize("name", DEEP)
def test_variance_is_kept_over_depth(name):
    """Neurons with a linear term: an error of scale e grows by 1 + PRODUCT_SHARE a layer."""
    width, depth = DEEP[name]
    x = jax.random.normal(KEY, (256, width))
    for layer in range(depth):
        spec = LayerSpec(name, start="variance")
        x = Dense(width, width, spec=spec, use_bias=False, rngs=nnx.Rngs(layer))(x)
        # Each layer adds an error of about sqrt(4 / width); squares of these times 1.25^k over 8
        # layers of 1024, or 4 of 128, add up to about 0.5 squared.
        assert 0.5 < jnp.mean(x**2) < 2, layer


@pytest.mark.parametrize("name", ["ours", "t4", "t2&4", "qres", "t1:3"])
def test_own_initialisation_does_not_keep_it(name):
    """What the variance start is for: with Kaiming's kernels products grow or die with depth."""
    x = jax.random.normal(KEY, (64, 256))
    for layer in range(8):
        x = Dense(
            256,
            256,
            spec=LayerSpec(name),
            use_bias=False,
            kernel_init=nnx.initializers.he_normal(),
            rngs=nnx.Rngs(layer),
        )(x)
    moment = jnp.mean(x**2)
    assert not 1e-2 < moment < 1e2


# Bad input


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: LayerSpec("T4"), r"neuron='T4' is not known: allowed cqnn, .*t4"),
        (lambda: LayerSpec("t1:99999999"), r"neuron='t1:99999999': .* from 1 to 4096"),
        (lambda: LayerSpec("ours:3"), r"neuron='ours:3': a rank goes with 't1:RANK', 'cqnn:RANK'"),
        (lambda: LayerSpec("t1:0"), "whole number from 1"),
        (lambda: LayerSpec("t1:two"), "whole number from 1"),
        (lambda: LayerSpec("t2", start="relinear"), "'t2' cannot start linear; these can: linear"),
        (lambda: LayerSpec("ours", norm="branch", start="variance"), "the norm undoes every scale"),
        (
            lambda: Dense(4, 2, spec=LayerSpec("t1:5"), rngs=nnx.Rngs(0)),
            "a kernel with 4 inputs has rank 4 at most",
        ),
        (
            lambda: Dense(4, 2, spec=LayerSpec("cqnn:6"), rngs=nnx.Rngs(0)),
            "a kernel with 4 inputs has rank 5 at most",
        ),
        (
            lambda: Conv(512, 512, (3, 3), spec=LayerSpec("t1"), rngs=nnx.Rngs(0)),
            r"have 10,619,136 coefficients each and take 21,747,990,528 bytes, allowed are "
            r"1,073,741,824; give a rank",
        ),
        (
            lambda: Conv(512, 512, (3, 3), spec=LayerSpec("t1:64"), rngs=nnx.Rngs(0)),
            r"129 kernels of 4608 inputs and 512 features take 1,217,396,736 bytes, .*lower",
        ),
        (
            lambda: Dense(
                4, 2, use_bias=False, spec=LayerSpec("t4", start="relinear"), rngs=nnx.Rngs(0)
            ),
            "branch 'b' of neuron='t4' starts at 1, which takes use_bias=True or norm='branch'",
        ),
        (
            lambda: convert(
                Dense(4, 2, spec=LayerSpec("ours"), rngs=nnx.Rngs(0)),
                [dict(match="", neuron="t4", start="relinear")],
                KEY,
            ),
            r"layers\[0\].*start='relinear': the layer is 'ours', not linear",
        ),
        (
            lambda: convert(
                Dense(4, 2, spec=LayerSpec(norm="branch"), rngs=nnx.Rngs(0)),
                [dict(match="", neuron="ours", norm="none", start="relinear")],
                KEY,
            ),
            "carries a branch norm on only with norm='branch'",
        ),
    ],
)
def test_bad_input(make, says):
    with pytest.raises(UserError, match=says):
        make()


@pytest.mark.parametrize("name", ["t1:4", "cqnn:5"])  # cqnn's form is of the inputs and a 1
def test_a_form_of_full_rank_is_fine(name):
    assert Dense(4, 2, spec=LayerSpec(name), rngs=nnx.Rngs(0))(jnp.ones((3, 4))).shape == (3, 2)


def test_a_form_of_one_input_a_channel_is_fine():
    """Depthwise 1x1: one coefficient a channel."""
    conv = Conv(512, 512, (1, 1), groups=512, spec=LayerSpec("t1"), rngs=nnx.Rngs(0))
    assert conv.q.kernel.shape == (1, 512)
    x = jax.random.normal(KEY, (1, 2, 2, 512))
    expected = np.asarray(conv.q.kernel[0]) * np.asarray(x) ** 2
    expected += np.asarray(conv.w.kernel[0, 0, 0]) * np.asarray(x)
    np.testing.assert_allclose(conv(x), expected, rtol=1e-5, atol=1e-6)


def test_the_budget_is_that_of_bytes(monkeypatch):
    monkeypatch.setattr(neuron_parameters, "FORM_BYTES", 4 * pairs(9) * 2)
    Conv(1, 2, (3, 3), spec=LayerSpec("cqnn"), rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="take 540 bytes, allowed are 360"):
        Conv(1, 3, (3, 3), spec=LayerSpec("cqnn"), rngs=nnx.Rngs(0))
