"""Layers under Winograd's algorithm: every neuron, rounding at each site, nets for use."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_nets import deploy, layers
from efficient_nets.analysis import layer_costs, model_cost
from efficient_nets.errors import UserError
from efficient_nets.layers import Conv, Dense, LayerSpec
from efficient_nets.ops.quantizers import groups
from efficient_nets.ops.winograd import transforms

IMAGES = jax.random.normal(jax.random.key(1), (2, 7, 6, 4))
# Not min-max: its largest value lies on a tie, which two programs may round to either side, and
# here each channel of a tap has one.
STEPS = {
    "transformed_input": dict(method="lsq", bits=8, per="tap"),
    "transformed_kernel": dict(method="lsq", bits=4, per="tap:channel"),
    "hadamard": dict(method="lsq", bits=8, per="tap"),
}


def conv(dtype=jnp.float32, **fields):
    return Conv(4, 6, (3, 3), spec=LayerSpec(**fields), rngs=nnx.Rngs(0), param_dtype=dtype)


def gradients(layer, x):
    def loss(layer):
        return jnp.sum(jnp.sin(layer(x)))

    return nnx.to_pure_dict(nnx.jit(nnx.grad(loss))(layer))


@pytest.mark.parametrize("neuron", ["linear", "ours", "t2&4"])
def test_neurons_are_the_direct_ones(x64, neuron):
    x = IMAGES.astype(jnp.float64)
    made, expected = (
        conv(jnp.float64, neuron=neuron, norm="branch", algorithm=algorithm)
        for algorithm in ("winograd:4", "direct")
    )
    np.testing.assert_allclose(
        nnx.jit(lambda m: m(x))(made), nnx.jit(lambda m: m(x))(expected), atol=1e-11
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9),
        gradients(made, x),
        gradients(expected, x),
    )


@pytest.mark.parametrize(
    ("neuron", "precision"),
    [("ours", "minmax:w8a8si8t8b8o8s"), ("t2&4", "lsq:w4a4si4t8")],
)
def test_hybrid_backward_is_automatic(x64, neuron, precision):
    """Learned transforms and the steps of inner sites included."""
    x = IMAGES.astype(jnp.float64)
    found = [
        gradients(
            conv(
                jnp.float64,
                **dict(neuron=neuron, norm="branch", backward=backward, precision=precision),
                algorithm="winograd:2,flex",
            ),
            x,
        )
        for backward in ("hybrid", "autodiff")
    ]
    assert "AT3" in found[0]["transforms"]
    # Biases in front of a norm have the gradient 0, which automatic differentiation rounds.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), *found)


def rounded(x, like, levels, axis=None):
    """x in steps for values such as `like`: per tap as LSQ fits a range, else as WinogradAwareNets.

    The latter's scale is max |x| / ((levels - 1) / 2).
    """
    keep = dict(axis=axis, keepdims=axis is not None)
    low, high = -(levels // 2), levels // 2 - 1
    scale = np.max(np.abs(like), **keep) / ((levels - 1) / 2)
    if axis is not None:
        scale = np.maximum(np.max(like, **keep) / high, np.min(like, **keep) / low)
    return np.clip(np.round(x / scale), low, high) * scale


@pytest.mark.parametrize("sites", ["i", "vuht", "tap"])
def test_rounded_layer_is_the_formula(x64, sites):
    """Each site rounded where arXiv 2002.10711 has it, in plain loops over tiles."""
    x, tap = np.asarray(IMAGES, np.float64), sites == "tap"
    layer = conv(
        jnp.float64,
        algorithm="winograd:2,points=lavin",
        precision=STEPS if tap else {"i": "minmax:i8", "vuht": "minmax:i8t8"}[sites],
    )
    layer = layers.calibrate(layer, jnp.asarray(x), how="minmax")
    layer.eval()
    k = np.asarray(layer.w.kernel[...])
    padded = np.pad(x, ((0, 0), (1, 2), (1, 1), (0, 0)))

    def transformed(g, bt):
        u, v = np.einsum("ui,vj,ijco->uvco", g, g, k), np.zeros((4, 4, 2, 4, 3, 4))
        for row, column in itertools.product(range(4), range(3)):
            tile = padded[:, 2 * row : 2 * row + 4, 2 * column : 2 * column + 4]
            v[:, :, :, row, column] = np.einsum("ui,vj,nijc->uvnc", bt, bt, tile)
        return u, v, np.einsum("uvnhwc,uvco->uvnhwo", v, u)

    at, g, bt = exact = transforms.as_floats(layer.linear_map.form.transforms(3))
    u0, v0, m0 = transformed(g, bt)  # ranges are those of the layer in which nothing is rounded
    if sites == "vuht":
        at, g, bt = (rounded(m, m, 256) for m in exact)
    u, v, _ = transformed(g, bt)
    of_tiles = (2, 3, 4, 5) if tap else None
    v = rounded(v, v0, 256, of_tiles)
    u = rounded(u, u0, 16, (2,)) if tap else rounded(u, u0, 256)
    m = rounded(np.einsum("uvnhwc,uvco->uvnhwo", v, u), m0, 256, of_tiles)
    y = np.einsum("iu,jv,uvnhwo->nhiwjo", at, at, m).reshape(2, 8, 6, 6)[:, :7, :6]
    found = jax.jit(lambda x: layer(x))(jnp.asarray(x))
    np.testing.assert_allclose(found, y + np.asarray(layer.w.bias[...]), atol=1e-9)


def test_ranges_move_in_training_alone():
    layer = conv(algorithm="winograd:4,flex", precision="minmax:i8t8b8")
    names = set(layer.ranges)
    assert {"transforms_AT3", "between_input_pass1_x", "hadamard_x", "transformed_kernel_w"} < names

    def observed():
        return {name: np.asarray(found.hi[...]) for name, found in layer.ranges.items()}

    before = observed()
    layer.eval()
    layer(100 * IMAGES)
    assert all(np.array_equal(before[name], value) for name, value in observed().items())
    layer.train()
    layer(100 * IMAGES)
    moved = {name for name, value in observed().items() if not np.array_equal(before[name], value)}
    of_x = {name for name in names if name.endswith("_x")}
    assert of_x <= moved
    # A hundred times the input: 1 % of the way to a range a hundred times as large.
    assert 1.5 < observed()["between_input_pass1_x"] / before["between_input_pass1_x"] < 2.5


def test_one_compilation_and_no_host_in_a_step():
    layer = conv(algorithm="winograd:4,flex", precision="lsq:w8a8i8")
    graph, state = nnx.split(layer)
    traces = []

    @jax.jit
    def step(state, x):
        traces.append(1)
        layer = nnx.merge(graph, state)
        return jax.grad(lambda x: jnp.sum(layer(x)))(x)

    with jax.transfer_guard_device_to_host("disallow"):
        for scale in (1.0, 2.0):
            step(state, scale * IMAGES)
    assert len(traces) == 1


def test_adapt_carries_kernels_on():
    """A direct net under learned transforms is the same net before it is trained."""
    direct = conv()
    found = layers.convert(direct, [dict(match="", algorithm="winograd:4,flex")], jax.random.key(3))
    np.testing.assert_array_equal(found.w.kernel[...], direct.w.kernel[...])
    np.testing.assert_allclose(found(IMAGES), direct(IMAGES), atol=1e-4)
    found.transforms["AT3"][...] *= 2
    again = layers.convert(found, [dict(match="", precision="minmax:w8a8")], jax.random.key(3))
    np.testing.assert_array_equal(again.transforms["AT3"][...], found.transforms["AT3"][...])
    back = layers.convert(found, [dict(match="", algorithm="direct")], jax.random.key(3))
    assert back.transforms is None


PRECISIONS = {"float": "float", "int8": "minmax:w8a8i8t8b8o8", "tap": STEPS, "steps": "lsq:u4v4"}


@pytest.mark.parametrize(
    ("precision", "algorithm"),
    [
        ("float", "winograd:4,flex"),
        ("int8", "winograd:2,legendre"),
        ("tap", "winograd:4,flex"),
        ("steps", "winograd:2,legendre"),
    ],
)
def test_net_for_use_gives_the_same(precision, algorithm, tmp_path):
    layer = conv(algorithm=algorithm, precision=PRECISIONS[precision], neuron="ours")
    layer = layers.calibrate(layer, IMAGES, how="minmax")
    layer.eval()

    def outputs(net):
        return np.asarray(jax.jit(lambda x: net(x))(IMAGES))

    expected = outputs(layer)
    used = layers.transform_kernels(layer)
    assert used.a.kernel.shape == (36 if "4" in algorithm else 16, 4, 6)
    assert used.transforms is None or set(used.transforms) == {"AT3", "BT3"}
    # Without codes XLA may round the sums of a transform in another order.
    atol = 1e-5 if precision == "float" else 0
    np.testing.assert_allclose(outputs(used), expected, atol=atol)
    whole = deploy.to_integers(layer)
    np.testing.assert_allclose(outputs(whole), expected, atol=atol)
    if precision != "float":
        assert whole.a.kernel.dtype == jnp.int8
        text = jax.jit(lambda x: whole(x)).lower(IMAGES).as_text()
        assert "xi8>" in text and "xi32>" in text
    size = deploy.save(layer, tmp_path / "net")
    loaded = deploy.load(nnx.eval_shape(lambda: layer), tmp_path / "net")
    np.testing.assert_array_equal(outputs(loaded), outputs(whole))
    header = int.from_bytes((tmp_path / "net").read_bytes()[:8], "little") + 8
    assert size - header == model_cost(layer, (7, 6, 4))["packed_bytes"]


def test_costs_are_those_of_the_tiles():
    rounded = conv(algorithm="winograd:4", precision="minmax:w8a8v4u3h8")
    found = Conv(4, 6, (5, 5), strides=2, spec=LayerSpec(algorithm="winograd:4"), rngs=nnx.Rngs(0))
    (cost,) = layer_costs(found, (11, 13, 4))
    # Two phases of 3 taps an axis; 6 x 7 outputs in 2 x 2 tiles of 6 x 6.
    assert cost.macs == (6 * 2 * 2) * (6 * 2 * 2) * 4 * 6
    (cost,) = layer_costs(rounded, (7, 6, 4))
    assert cost.macs == 36 * 2 * 2 * 4 * 6
    assert (cost.bits, cost.input_bits) == (3, 4)
    assert cost.bops == 12 * cost.macs
    assert cost.algorithm == "winograd:4"
    (direct,) = layer_costs(conv(), (8, 8, 4))
    (tiles,) = layer_costs(conv(algorithm="winograd:4"), (8, 8, 4))
    assert direct.macs == 4 * tiles.macs


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            dict(precision="minmax:i8"),
            "precision.transformed_input: algorithm='direct' has no transforms",
        ),
        (dict(algorithm="winograd:4", neuron="t1"), "algorithm='winograd:4' with neuron='t1'"),
        (dict(algorithm="winograd:4", precision="dorefa:v8"), "it is for values from 0 on"),
        (dict(algorithm="winograd:4", precision="xnor:v2"), "scales a map's output"),
        (
            dict(
                algorithm="winograd:4",
                precision=dict(input=dict(method="minmax", bits=8, per="tap")),
            ),
            "precision.input.per='tap' is not known",
        ),
        (
            dict(
                algorithm="winograd:4",
                precision=dict(transforms=dict(method="minmax", bits=8, per="tap")),
            ),
            "precision.transforms.per='tap' is not known: allowed layer",
        ),
    ],
)
def test_what_does_not_go_together(fields, message):
    with pytest.raises(UserError, match=message):
        LayerSpec(**fields)


def test_layers_that_have_no_tiles():
    spec = LayerSpec(algorithm="winograd:4")
    with pytest.raises(UserError, match="a dense layer has no window"):
        Dense(4, 4, spec=spec, rngs=nnx.Rngs(0))
    net = nnx.List([Conv(4, 4, (1, 1), rngs=nnx.Rngs(0))])
    with pytest.raises(UserError, match=r"layers\[0\]: 0: .*one tap saves nothing"):
        layers.convert(net, [dict(match="", algorithm="winograd:4")], jax.random.key(0))


@pytest.mark.parametrize("bits", [16, 8])
def test_more_than_eight_bits_have_no_codes(bits):
    layer = conv(precision=f"minmax:w{bits}a{bits}s")
    layer = layers.calibrate(layer, IMAGES)
    layer.eval()
    plain = conv()
    error = jnp.max(jnp.abs(layer(IMAGES) - plain(IMAGES))) / jnp.max(jnp.abs(plain(IMAGES)))
    assert 2.0 ** -(bits + 3) < error < 2.0 ** -(bits - 2)
    whole = deploy.to_integers(layer)
    assert whole.w.kernel.dtype == (jnp.float32 if bits == 16 else jnp.int8)
    jitted = [
        jax.jit(functools.partial(lambda net, x: net(x), net))(IMAGES) for net in (layer, whole)
    ]
    np.testing.assert_array_equal(*jitted)


def jitted(net, x=IMAGES):
    graph, state = nnx.split(net)
    return np.asarray(jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, x))


KERNELS = {
    "ttq": dict(method="ttq"),
    "lq": dict(method="lq", bits=3),
    "zero point": dict(method="minmax", bits=4, signed=False, zero_point=True),
    "dorefa": dict(method="dorefa", bits=8),
}


@pytest.mark.parametrize("per", ["tap", "tap:channel", "channel"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_each_range_of_a_packed_kernel_has_its_own_table(kernel, per, tmp_path):
    fields = dict(KERNELS[kernel]) | (
        {} if kernel == "dorefa" and per == "channel" else {"per": per}
    )
    layer = conv(algorithm="winograd:2", precision={"transformed_kernel": fields})
    layer.eval()
    size = deploy.save(layer, tmp_path / "net")
    loaded = deploy.load(nnx.eval_shape(lambda: layer), tmp_path / "net")
    np.testing.assert_array_equal(jitted(loaded), jitted(deploy.to_integers(layer)))
    header = int.from_bytes((tmp_path / "net").read_bytes()[:8], "little") + 8
    assert size - header == model_cost(layer, (7, 6, 4))["packed_bytes"]


@pytest.mark.parametrize(
    "precision",
    [
        # Codes of 9 bits beside such of 8.
        dict(
            transformed_kernel=dict(method="dorefa", bits=8),
            transformed_input=dict(method="lsq", bits=8),
        ),
        # Values pass as they are on one side, in float epochs.
        dict(
            transformed_kernel=dict(method="lsq", bits=8),
            transformed_input=dict(method="lsq", bits=8, float_epochs=2.0),
        ),
        # The kernel alone is whole numbers, and the other way round.
        "lsq:w8",
        "lsq:w8a8su8",
        # Factors behind the map, which transformed kernels would lose.
        dict(
            kernel=dict(method="xnor++", case=3, size=(7, 6)),
            transformed_kernel=dict(method="lsq", bits=8),
        ),
    ],
    ids=["wide codes", "float epochs", "kernel", "no input", "factors"],
)
def test_other_nets_for_use_give_the_same(precision):
    layer = layers.calibrate(conv(algorithm="winograd:2,flex", precision=precision), IMAGES)
    layer.eval()
    # Float epochs may round the sums of values in another order.
    atol = 1e-5 * np.abs(jitted(layer)).max()
    np.testing.assert_allclose(jitted(deploy.to_integers(layer)), jitted(layer), atol=atol)
    twice = layers.transform_kernels(deploy.to_integers(layer))
    np.testing.assert_allclose(jitted(twice), jitted(layer), atol=atol)


def test_two_kinds_of_reading_move_the_ranges_of_their_transforms_once():
    one, two = (
        conv(algorithm="winograd:2", precision="minmax:i8t8", neuron=neuron)
        for neuron in ("linear", "t2&4")
    )
    for layer in (one, two):
        layer.ranges["transforms_BT3"].hi[...] = jnp.zeros(1)
        layer(IMAGES)
    assert {"hadamard_x", "hadamard_square"} < set(two.ranges)
    np.testing.assert_array_equal(
        one.ranges["transforms_BT3"].hi[...], two.ranges["transforms_BT3"].hi[...]
    )


def test_relinear_keeps_learned_transforms_and_gives_new_kernels_steps():
    layer = conv(algorithm="winograd:2,flex")
    layer.transforms["AT3"][...] *= 1.5
    rule = dict(match="", neuron="ours", start="relinear")
    found = layers.convert(layer, [rule], jax.random.key(2))
    np.testing.assert_allclose(found(IMAGES), layer(IMAGES), atol=1e-5)
    found = layers.convert(layer, [rule | dict(precision="lsq:i8")], jax.random.key(2))
    for net in (found, layers.calibrate(found, IMAGES)):
        steps = [float(net.ranges[f"transformed_kernel_{name}"].step[...][0]) for name in "abc"]
        assert max(steps) < 3 * min(steps)  # a step of nothing would be 2 / sqrt(127)


def test_between_is_where_a_transform_has_two_steps():
    spec = LayerSpec(algorithm="winograd:2", precision="minmax:b8")
    with pytest.raises(UserError, match="precision.between: the transforms .* have one step each"):
        Conv(4, 6, (3,), spec=spec, rngs=nnx.Rngs(0))
    spec = LayerSpec(algorithm="winograd:2,legendre", precision="minmax:b8")
    for kernel in ((1, 3), (3, 1)):
        found = Conv(4, 6, kernel, spec=spec, rngs=nnx.Rngs(0))
        assert len([name for name in found.ranges if name.startswith("between")]) == 3


def test_shapes_between_steps_are_those_of_the_other_sites():
    layer = conv(algorithm="winograd:2,legendre", precision="minmax:b8")
    found = layer.inner_values(IMAGES, layer.spec.precision)
    shapes = {name: x.shape for (site, name), x in found.items() if site == "between"}
    assert shapes["input_base0_x"] == (16, 2, 4 * 3, 4)
    assert shapes["input_pass1_x"] == (16, 2, 4 * 3, 4)
    assert shapes["output_pass1_x"] == (8, 2, 4 * 3, 6)
    assert shapes["kernel_pass1_w"] == (12, 4, 6)


def test_steps_have_the_gradient_of_one_sample():
    """LSQ's N are the values of a group: of activations those of one image, of a kernel all."""
    sites = dict.fromkeys(("transformed_input", "transformed_kernel"), {"per": "tap"})
    sites["between"] = {"per": "layer"}
    layer = conv(
        algorithm="winograd:2",
        precision={site: dict(method="lsq", bits=8) | fields for site, fields in sites.items()},
    )
    for batch in (2, 6):
        x = jnp.zeros((batch, 7, 6, 4))
        values = layer.inner_values(x, layer.spec.precision)
        sizes = {
            name: groups.size(layer.spec.precision.quantizers[site], found)
            for (site, name), found in values.items()
            if site in sites and not name.startswith("output")
        }
        # 4 x 3 tiles of 4 channels; of 10 padded rows 3 tiles a row.
        assert sizes == {
            "x": 4 * 3 * 4,
            "w": 4 * 6,
            "input_pass1_x": 4 * 10 * 3 * 4,
            "kernel_pass1_w": 4 * 3 * 4 * 6,
        }


def test_transformed_kernels_are_the_end():
    used = layers.transform_kernels(conv(algorithm="winograd:2"))
    with pytest.raises(UserError, match="its kernels are transformed, for use"):
        layers.convert(used, [dict(match="", algorithm="direct")], jax.random.key(0))


def test_squares_are_transformed_as_they_are_rounded():
    layer = conv(algorithm="winograd:2", precision="minmax:w8a4si6", neuron="t2")
    (cost,) = layer_costs(layer, (8, 8, 4))
    products = 16 * 4 * 4 * 4 * 6
    assert cost.bops == products * 6 * 6 + 8 * 8 * 4 * 4 * 4


def test_phases_behind_the_kernel_are_left_out():
    layer = Conv(
        4, 6, (1, 3), strides=(2, 1), spec=LayerSpec(algorithm="winograd:2"), rngs=nnx.Rngs(0)
    )
    (cost,) = layer_costs(layer, (8, 8, 4))
    assert cost.macs == 4 * (4 * 4) * 4 * 6
    plain = layers.convert(layer, [dict(match="", algorithm="direct")], jax.random.key(0))
    np.testing.assert_allclose(jitted(layer), jitted(plain), atol=1e-5)
