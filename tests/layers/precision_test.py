"""Rounded layers: both backwards alike, whole numbers exact, ranges that move when they should."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from efficient_nets import layers
from efficient_nets.errors import UserError
from efficient_nets.layers import BatchNorm, Conv, Dense, LayerSpec, layer_norm_act
from efficient_nets.ops import quantizers

PRECISIONS = {
    "lsq": "lsq:w4a4",
    "output": "lsq:w4a4o4",
    "dorefa": "dorefa:w2a3g6",
    "mixed": "w=lq:2,a=pact:2,o=minmax:8",
    "ternary": "w=ttq,a=fatnn:3L",
    "xnor": dict(
        input=dict(method="xnor", k="box", pad="before", normalise="mean"),
        kernel=dict(method="xnor++", case=4, size=(4, 5)),
    ),
    "options": dict(
        kernel=dict(method="lsq", bits=3, per="channel", normalise="restored", post_scale=True),
        input=dict(method="lsq+", bits=4, per="groups:2", power_of_two=True, normalise="variance"),
    ),
}


def normal(*shape, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def gradients(layer, norm, x):
    """Gradients of all parameters and of x, and what the call moved."""
    graph, params, rest = nnx.split((layer, norm), nnx.Param, ...)

    def loss(params, x):
        layer, norm = nnx.merge(graph, params, rest, copy=True)
        y = layer_norm_act(x, layer, norm, jnp.tanh)
        moved = nnx.state((layer, norm), nnx.Not(nnx.Param))
        return jnp.sum(y * normal(*y.shape, seed=3, dtype=y.dtype)), nnx.to_pure_dict(moved)

    (params, x), moved = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)
    return nnx.to_pure_dict(params), x, moved


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
@pytest.mark.parametrize(
    ("neuron", "branch", "outer"),
    [
        ("ours", "branch", True),
        pytest.param("t4", "none", True, marks=pytest.mark.slow),
        pytest.param("qres", "none", False, marks=pytest.mark.slow),
    ],
)
def test_hybrid_equals_autodiff(x64, precision, neuron, branch, outer):
    found = []
    for backward in ("hybrid", "autodiff"):
        layer = Conv(
            4,
            6,
            (3, 3),
            groups=2,
            use_bias=branch == "none",
            spec=LayerSpec(neuron=neuron, norm=branch, backward=backward, precision=precision),
            param_dtype=jnp.float64,
            rngs=nnx.Rngs(0),
        )
        norm = BatchNorm(6, rngs=nnx.Rngs(1)) if outer else None
        found.append(gradients(layer, norm, normal(3, 4, 5, 4, dtype=np.float64)))
    # Batch norms are in float32 here, whatever comes before them; sums of some hundred terms.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), *found)


@pytest.mark.parametrize("precision", ["lsq:w4a4", "dorefa:w2a2", "bireal", "w=twn,a=pact:3"])
def test_the_gradient_is_that_of_the_map_of_rounded_values(precision):
    """The value comes from codes, and the gradient must not go with them; hybrid equals this."""
    layer = Conv(
        3,
        4,
        (3, 3),
        use_bias=False,
        spec=LayerSpec(precision=precision),
        rngs=nnx.Rngs(0),
    )
    layer.eval()
    kernel, x = layer.w.kernel[...], normal(2, 5, 5, 3)
    cotangent, spec = normal(2, 5, 5, 4, seed=1), layer.spec.precision
    found, dx, _ = gradients(layer, None, x)

    def plain(x, kernel, of_x, of_kernel):
        x = quantizers.quantize(spec.input, x, quantizers.Arrays(of_x, {}))
        kernel = quantizers.quantize(spec.kernel, kernel, quantizers.Arrays(of_kernel, {}))
        y = lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.sum(jnp.tanh(y) * normal(*cotangent.shape, seed=3))

    learned = [layer.ranges[name].arrays().learned for name in ("input", "w")]
    expected = jax.grad(plain, (0, 1, 2, 3))(x, kernel, *learned)
    assert jnp.any(expected[0]) and jnp.any(expected[1])
    ranges = found[0].get("ranges", {})
    ours = (dx, found[0]["w"]["kernel"], ranges.get("input", {}), ranges.get("w", {}))
    # float32 sums of up to some hundred terms.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, ours, expected)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_rounded_convolution_is_one_of_whole_numbers(groups, dtype):
    layer = Conv(
        8,
        12,
        (3, 3),
        groups=groups,
        use_bias=False,
        spec=LayerSpec(
            precision=dict(
                kernel=dict(method="lsq", bits=8, per="channel"), input=dict(method="lsq", bits=8)
            )
        ),
        rngs=nnx.Rngs(0),
    )
    layer.eval()
    for found in layer.ranges.values():  # LSQ's start uses few of 256 codes
        found.step[...] = found.step[...] / 10
    x = jnp.abs(normal(2, 6, 6, 8)).astype(dtype)
    step, steps = layer.ranges["input"].step[...], layer.ranges["w"].step[...]
    wide = x.astype(jnp.float32)
    codes = jnp.clip(jnp.round(wide / step.reshape(1, 1, 1, 1)), 0, 255).astype(jnp.int32)
    weights = layer.w.kernel[...] / steps.reshape(1, 1, 1, -1)
    weights = jnp.clip(jnp.round(weights), -128, 127).astype(jnp.int32)
    sums = lax.conv_general_dilated(
        codes,
        weights,
        (1, 1),
        "SAME",
        feature_group_count=groups,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    scale = (step.reshape(1, 1, 1, 1) * steps.reshape(1, 1, 1, -1)).astype(jnp.float32)
    expected = (sums.astype(jnp.float32) * scale).astype(dtype)
    assert jnp.max(jnp.abs(sums)) > 2**15  # or any arithmetic would do
    np.testing.assert_array_equal(layer(x), expected)


def test_a_kernel_starts_from_its_values_and_stays():
    layer = Conv(3, 4, (3, 3), rngs=nnx.Rngs(0))
    net = layers.convert(_Net(layer), [dict(match="conv", precision="lsq:w4a4")], jax.random.key(1))
    np.testing.assert_array_equal(net.conv.w.kernel[...], layer.w.kernel[...])
    expected = 2 * np.mean(np.abs(layer.w.kernel[...])) / np.sqrt(7)
    np.testing.assert_allclose(net.conv.ranges["w"].step[...], [expected], rtol=1e-6)
    back = layers.convert(net, [dict(match="conv", precision="float")], jax.random.key(1))
    assert back.conv.ranges is None
    x = normal(2, 5, 5, 3)
    np.testing.assert_array_equal(back(x), _Net(layer)(x))


def test_a_branch_that_starts_at_zero_has_a_step():
    """ReLinear's zeros have no mean size to take a step from."""
    spec = LayerSpec(neuron="ours", start="relinear", precision="lsq:w4a4")
    layer = Dense(5, 4, spec=spec, rngs=nnx.Rngs(0))
    steps = [float(layer.ranges[name].step[0]) for name in "abc"]
    assert min(steps) > 0.01 and max(steps) < 1
    found = layers.calibrate(layer, jnp.ones((2, 5)), how="own")
    assert [float(found.ranges[name].step[0]) for name in "abc"] == steps


class _Net(nnx.Module):
    def __init__(self, conv, head=None):
        self.conv, self.head = conv, head

    def __call__(self, x):
        x = nnx.relu(self.conv(x))
        return x if self.head is None else self.head(x)


def _two_layers(precision):
    rngs = nnx.Rngs(0)
    spec = LayerSpec(precision=precision)
    return _Net(Conv(3, 4, (3, 3), spec=spec, rngs=rngs), Dense(4, 2, spec=spec, rngs=rngs))


def test_calibration_sees_the_net_in_float():
    net = _two_layers("lsq:w4a4o4")
    x = jnp.abs(normal(2, 5, 5, 3))
    plain = layers.convert(net, [dict(match=".*", precision="float")], jax.random.key(0))
    hidden = nnx.relu(plain.conv(x))
    expected = {
        ("conv", "input"): x,
        ("conv", "output"): plain.conv(x),
        ("head", "input"): hidden,
        ("head", "output"): plain.head(hidden),
    }
    found = layers.calibrate(net, x)
    for (layer, site), values in expected.items():
        step = getattr(found, layer).ranges[site].step[...]
        np.testing.assert_allclose(step, [2 * np.mean(np.abs(values)) / np.sqrt(15)], rtol=1e-5)
    assert net.conv.ranges["input"].step[0] != found.conv.ranges["input"].step[0]


def test_calibration_covers_a_range():
    net, x = _two_layers("w=lsq:4,a=pact:4"), jnp.abs(normal(2, 5, 5, 3))
    found = layers.calibrate(net, x, how="minmax")
    np.testing.assert_array_equal(found.conv.ranges["input"].alpha[...], [jnp.max(x)])
    kernel = found.conv.w.kernel[...]
    step = max(float(jnp.max(kernel)) / 7, float(jnp.min(kernel)) / -8)
    np.testing.assert_allclose(found.conv.ranges["w"].step[...], [step], rtol=1e-6)
    with pytest.raises(UserError, match="how='max'.*minmax"):
        layers.calibrate(net, x, how="max")


def test_ranges_move_in_training_alone():
    net = _two_layers("minmax:w4a4")
    x = 100 * jnp.abs(normal(2, 5, 5, 3))
    before = float(net.conv.ranges["input"].hi[0])
    net.eval()
    net(x)
    assert float(net.conv.ranges["input"].hi[0]) == before
    net.train()
    net(x)
    np.testing.assert_allclose(
        net.conv.ranges["input"].hi[...], [0.99 * before + 0.01 * jnp.max(x)], rtol=1e-5
    )


def test_float_epochs_collect_and_then_begin():
    spec = dict(input=dict(method="lsq", bits=2, float_epochs=1.0, freeze_epoch=2.0))
    layer = Dense(5, 3, use_bias=False, spec=LayerSpec(precision=spec), rngs=nnx.Rngs(0))
    found, x = layer.ranges["input"], 100 * jnp.abs(normal(64, 5))
    np.testing.assert_array_equal(layer(x), x @ layer.w.kernel[...])
    for _ in range(60):
        layer(x)
    seen = float(found.seen_step[0])
    np.testing.assert_allclose(seen, 2 * jnp.mean(x) / np.sqrt(3), rtol=0.01)  # 0.9^60 is left
    layers.advance([found], 0.99)
    assert float(found.step[0]) < seen / 10
    layers.advance([found], 1.0)
    assert float(found.step[0]) == seen
    assert len(np.unique(np.round(found.quantizer.levels))) == 1
    assert not np.allclose(layer(x), x @ layer.w.kernel[...])

    def gradient():
        graph, params, rest = nnx.split(layer, nnx.Param, ...)
        loss = lambda params: jnp.sum(nnx.merge(graph, params, rest, copy=True)(x))  # noqa: E731
        return jax.grad(loss)(params)["ranges"]["input"]["step"][...]

    assert gradient()[0] != 0
    layers.advance([found], 2.0)
    assert gradient()[0] == 0
    assert float(found.step[0]) == seen


STOPPED = {
    "lsq": dict.fromkeys(("kernel", "input", "output"), dict(method="lsq", bits=2)),
    "xnor": dict(
        input=dict(method="xnor", k="box"),
        kernel=dict(method="xnor++", case=3, size=(5, 5), post_scale=True),
    ),
    "minmax": dict(kernel=dict(method="twn"), input=dict(method="minmax", bits=4)),
}


@pytest.mark.parametrize("precision", STOPPED.values(), ids=STOPPED)
def test_a_stopped_layer_is_one_in_float(precision):
    schedule = dict(float_epochs=1.0, stop_epoch=2.0)
    spec = LayerSpec(precision={site: fields | schedule for site, fields in precision.items()})
    layer = Conv(3, 4, (3, 3), spec=spec, rngs=nnx.Rngs(0))
    x = jnp.abs(normal(2, 5, 5, 3))
    plain = layers.convert(_Net(layer), [dict(match="conv", precision="float")], jax.random.key(0))
    expected = plain.conv(x)
    for found in layer.ranges.values():  # that factors which learn would show
        found.set(
            found.arrays()._replace(learned={n: 2 * v for n, v in found.arrays().learned.items()})
        )
    for epoch, rounds in ((0, False), (1, True), (1.9, True), (2, False), (5, False)):
        layers.advance(layer.ranges.values(), epoch)
        before = jax.tree.map(jnp.copy, [found.arrays() for found in layer.ranges.values()])
        y = layer(x)
        assert np.allclose(y, expected, rtol=1e-5, atol=1e-6) != rounds
        if epoch >= 2:  # and nothing moves, in training either
            after = [found.arrays() for found in layer.ranges.values()]
            jax.tree.map(np.testing.assert_array_equal, before, after)


def test_levels_fall_by_stages():
    spec = dict(input=dict(method="lsq", bits=2, stages=((0, 16), (1, 8), (3, 4))))
    layer = Dense(5, 3, use_bias=False, spec=LayerSpec(precision=spec), rngs=nnx.Rngs(0))
    layer.w.kernel[...] = jnp.eye(5, 3)
    found, x = layer.ranges["input"], jnp.broadcast_to(jnp.linspace(0, 50, 500)[:, None], (500, 5))
    first = float(found.step[0])
    for epoch, levels in ((0, 16), (1, 8), (2.9, 8), (3, 4)):
        layers.advance([found], epoch)
        values = np.unique(layer(x))
        assert len(values) == levels
        np.testing.assert_allclose(values[-1], 15 * first, rtol=1e-5)  # it covers the same range


@pytest.mark.parametrize("case", [2, 3, 4])
def test_factors_of_other_positions(case):
    """Nor is a single row spread over all of them."""
    for size in ((4, 4), (1, 5), (5,), (5, 5, 1)):
        spec = LayerSpec(precision=dict(kernel=dict(method="xnor++", case=case, size=size)))
        layer = Conv(3, 4, (3, 3), spec=spec, rngs=nnx.Rngs(0))
        words = f"precision.kernel.size={size}: .* these positions: (5, 5)"
        with pytest.raises(UserError, match=re.escape(words).replace(r"\.\*", ".*")):
            jax.eval_shape(layer, jax.ShapeDtypeStruct((2, 5, 5, 3), jnp.float32))


def test_losses_are_collected():
    spec = dict(kernel=dict(method="lsq", bits=2, loss=0.5, loss_norm="l1"))
    layer = Dense(5, 3, spec=LayerSpec(precision=spec), rngs=nnx.Rngs(0))
    with layers.collecting("losses") as found:
        layer(normal(2, 5))
    error = jnp.abs(layer.w.kernel[...] - layer.rounded_kernel("w"))
    assert [owner for owner, _ in found] == [layer]
    np.testing.assert_allclose(found[0][1], 0.5 * jnp.mean(error), rtol=1e-6)


@pytest.mark.parametrize("pad", ["after", "before"])
def test_a_layer_whose_samples_are_normalised(pad):
    """Their factors, with which zeros of the padding have nothing to do, leave a map of codes."""
    spec = dict(
        kernel=dict(method="lsq", bits=4),
        input=dict(method="lsq", bits=4, normalise="mean", pad=pad),
    )
    layer = Conv(3, 4, (3, 3), use_bias=False, spec=LayerSpec(precision=spec), rngs=nnx.Rngs(0))
    sizes = jnp.asarray([1.0, 8.0]).reshape(2, 1, 1, 1)
    x = jnp.repeat(jnp.abs(normal(1, 5, 5, 3)), 2, axis=0) * sizes
    layer = layers.calibrate(layer, x)
    layer.eval()
    y = layer(x)
    np.testing.assert_array_equal(y[1], 8 * y[0])  # factors of 8 are exact
    np.testing.assert_array_equal(layer(x[:1]), y[:1])
    size, step = jnp.mean(x[0]), layer.ranges["input"].step[0]
    codes = jnp.clip(jnp.round(x[:1] / size / step), 0, 15)
    kernel = layer.rounded_kernel("w")
    expected = lax.conv_general_dilated(
        codes * step * size, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(y[:1], expected, rtol=1e-5, atol=1e-6)  # sums of 27, in float32


def test_forward_mode():
    layer = Dense(5, 3, spec=LayerSpec(precision="lsq:w4a4", backward="autodiff"), rngs=nnx.Rngs(0))
    layer.eval()
    x, t = normal(4, 5), normal(4, 5, seed=1)
    _, forward = jax.jvp(layer, (x,), (t,))
    _, transpose = jax.vjp(layer, x)
    cotangent = normal(4, 3, seed=2)
    np.testing.assert_allclose(
        jnp.sum(forward * cotangent), jnp.sum(t * transpose(cotangent)[0]), rtol=1e-5
    )
