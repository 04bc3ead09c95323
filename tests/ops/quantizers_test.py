"""What every quantizer is, whatever its formula: one table of methods and sites."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from efficient_nets.errors import UserError
from efficient_nets.ops import quantizers
from efficient_nets.ops import straight_through as through
from efficient_nets.ops.quantizers import groups

SHAPE = (2, 4, 4)  # (N, W, C) of values, (W, in, out) of a kernel
# What was quantized stays as it is, the arrays being the same; not so:
MOVE = {
    ("dorefa", "kernel"): "tanh bends the values, and their largest one stretches them",
    ("ttq", "kernel"): "the threshold is of the largest value, and one scale may be below it",
    ("fatnn", "kernel"): "values are whole numbers, the steps that x takes are 1 / slope wide",
    ("fatnn", "input"): "as for kernels",
    ("fatnn", "output"): "as for kernels",
}
# XNOR's K, with k='channel' or 'spatial', is a mean of equal sizes, and stays.


def table():
    for method, places in quantizers.METHODS.items():
        for site, entry in places.items():
            for levels in [n for n in (2, 3, 4, 16) if entry.levels(n)][:3]:
                yield method, site, levels


TABLE = list(table())
ROUNDED = [row for row in TABLE if row[1] != "gradient"]
FIRST = list({row[:2]: row for row in ROUNDED}.values())
EVERY = pytest.mark.parametrize("method, site, levels", ROUNDED)
ONCE = pytest.mark.parametrize("method, site, levels", FIRST)  # whatever the levels are


def make(method, site, levels, *, per=None, **fields):
    entry = quantizers.METHODS[method][site]
    if per is not None and entry.grouped:
        fields["per"] = per
    return quantizers.make(site, dict(method=method, levels=levels, **fields))


def values(spec, seed=0, dtype=jnp.float32):
    x = 2 * np.random.default_rng(seed).normal(size=SHAPE)
    x[0, 0, 0], x[1, 2, 3] = 0, 50
    return jnp.asarray(x if spec.signed else np.abs(x), dtype)


@EVERY
@pytest.mark.parametrize("per", ["layer", "groups:2"])
def test_no_more_values_than_levels(method, site, levels, per):
    spec = make(method, site, levels, per=per)
    x = values(spec)
    found = np.asarray(quantizers.quantize(spec, x, quantizers.start(spec, x)))
    channels = np.split(found, 4, axis=2)
    if quantizers.METHODS[method][site].grouped:
        channels = np.split(found, groups.count(spec, x.shape), axis=2)
    for group in channels:
        assert len(np.unique(group)) <= levels
    # Counts of kernels that layers pack: codes, where there are some, are as few.
    parts = quantizers.rounded(spec, x, quantizers.start(spec, x))
    if parts.codes is not None:
        assert len(np.unique(parts.codes)) <= levels


@ONCE
def test_quantized_values_stay(method, site, levels):
    levels = 16 if method == "dorefa" else levels  # with 4 the kernel's values happen to stay
    spec = make(method, site, levels, per="groups:2")
    x = values(spec)
    arrays = quantizers.start(spec, x)
    if method == "ttq":
        arrays.learned["negative"] = 0.01 * arrays.learned["positive"]
    once = quantizers.quantize(spec, x, arrays)
    twice = quantizers.quantize(spec, once, arrays)
    # Means of equal sizes are off by the rounding of their sum: XNOR-Net, Bi-Real, TWN.
    assert np.allclose(once, twice, rtol=1e-6, atol=0) != ((method, site) in MOVE)


@ONCE
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=str)
def test_jit_is_eager_and_types_stay(method, site, levels, dtype):
    spec = make(method, site, levels)
    x = values(spec, dtype=dtype)
    arrays = quantizers.start(spec, x)
    for array in jax.tree.leaves(arrays.learned):
        assert array.dtype == jnp.float32  # arrays are kept wide
    eager = quantizers.quantize(spec, x, arrays)
    compiled = jax.jit(quantizers.quantize, static_argnums=0)(spec, x, arrays)
    assert eager.dtype == compiled.dtype == dtype and eager.shape == SHAPE
    # XLA may order sums otherwise, and contract products: scales differ by a few last bits.
    digits = 1e-5 if dtype == jnp.float32 else 1e-2
    np.testing.assert_allclose(
        eager.astype(jnp.float32), compiled.astype(jnp.float32), rtol=digits, atol=1e-30
    )


@functools.partial(jax.jit, static_argnums=0)
def every_gradient(site, x, g):
    """Of each method there: the value, and the gradients of x and the learned arrays."""
    found = {}
    for method, _, levels in (row for row in FIRST if row[1] == site):
        spec = make(method, site, levels, per="groups:2")
        signed = x if spec.signed else jnp.abs(x)
        learned, observed = quantizers.start(spec, signed.astype(jnp.float32))

        def quantize(x, learned, spec=spec, observed=observed):
            return quantizers.quantize(spec, x, quantizers.Arrays(learned, observed))

        value, back = jax.vjp(quantize, signed, learned)
        found[method] = value, back(g)
    return found


@functools.cache
def arguments(site):
    x, g = (np.random.default_rng(seed).normal(size=(8, 3, 8)) for seed in (0, 1))
    # Numbers that bfloat16 has.
    return tuple(jnp.asarray(2 * each, jnp.bfloat16).astype(jnp.float32) for each in (x, g))


def compare(found, expected, digits):
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        ours, theirs = (np.asarray(each, np.float32) for each in (ours, theirs))
        size = np.max(np.abs(theirs))
        np.testing.assert_allclose(ours, theirs, rtol=digits, atol=digits * size, err_msg=str(path))


@pytest.mark.parametrize("site", ["kernel", "input"])
def test_gradients_of_bfloat16(site):
    """They are those of float32, rounded once: a method computes in that."""
    expected = every_gradient(site, *arguments(site))
    found = every_gradient(site, *(each.astype(jnp.bfloat16) for each in arguments(site)))
    for method, (value, (dx, learned)) in found.items():
        assert value.dtype == dx.dtype == jnp.bfloat16, method
        assert all(each.dtype == jnp.float32 for each in learned.values()), method
        # 8 bits; sums of 96 float32 are compiled in another order.
        compare((value, dx), (expected[method][0], expected[method][1][0]), 2**-8)
        compare(learned, expected[method][1][1], 1e-5)


@pytest.mark.parametrize("site", ["kernel", "input"])
def test_gradients_on_eight_devices(site):
    """An input is cut over its samples, a kernel over its output channels, as FSDP does."""
    expected = every_gradient(site, *arguments(site))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    cut = PartitionSpec("data") if site == "input" else PartitionSpec(None, None, "data")
    found = every_gradient(site, *jax.device_put(arguments(site), NamedSharding(mesh, cut)))
    compare(found, expected, 1e-5)  # sums of 96 numbers, in parts


@ONCE
@pytest.mark.parametrize("kind", ["zeros", "alike"])
def test_nothing_is_nan_for_values_without_spread(method, site, levels, kind):
    for normalise in quantizers.spec.NORMALISATIONS.get(site, ("none",)):
        fields = {} if normalise == "none" else dict(normalise=normalise)
        spec = make(method, site, levels, per="groups:2", **fields)
        # The mean of 0.1s is not quite 0.1 in float32.
        x = jnp.full(SHAPE, 0.0 if kind == "zeros" else 0.1, jnp.float32)
        arrays = quantizers.observe(spec, x, quantizers.start(spec, x))

        def total(x, learned, spec=spec, arrays=arrays):
            return jnp.sum(quantizers.quantize(spec, x, arrays._replace(learned=learned)))

        value, gradients = jax.value_and_grad(total, (0, 1))(x, arrays.learned)
        for array in jax.tree.leaves((value, gradients, arrays)):
            assert np.all(np.isfinite(array))
            assert np.all(np.abs(np.asarray(array, np.float64)) < 1e3)


@pytest.mark.parametrize("value", [0.1, -0.3, 1e-20])
def test_values_that_are_all_alike_are_normalised_to_zeros(value):
    """And not to the rounding of their mean over its own deviation, +-1."""
    spec = make("lsq", "kernel", 16, normalise="standard")
    x = jnp.full((13, 1, 4), value, jnp.float32)
    np.testing.assert_array_equal(quantizers.quantize(spec, x, quantizers.start(spec, x)), 0 * x)
    spec = make("lsq", "kernel", 16, normalise="restored")
    restored = quantizers.quantize(spec, x, quantizers.start(spec, x))
    np.testing.assert_allclose(restored, x, rtol=1e-6)  # the mean of 52, in float32


SIZES = {
    "mean": lambda x: np.mean(np.abs(x), axis=(1, 2), keepdims=True),
    "variance": lambda x: np.sqrt(np.mean(np.square(x), axis=(1, 2), keepdims=True)),
}


@pytest.mark.parametrize(("method", "normalise"), [("lsq", "mean"), ("minmax", "variance")])
def test_samples_are_normalised_on_their_own(method, normalise):
    """Ranges are those of the normalised values, and no sample depends on another."""
    spec = make(method, "input", 4, normalise=normalise)
    plain = make(method, "input", 4)
    x = values(spec) * jnp.asarray([1.0, 100.0]).reshape(2, 1, 1)
    sizes = SIZES[normalise](x)
    normal = x / sizes
    # Means of 16 values, in another order.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5)
    arrays = quantizers.start(spec, x)
    jax.tree.map(close, arrays, quantizers.start(plain, normal))
    for how in ("own", "mse", "percentile"):
        found = quantizers.calibrate(spec, x, how)
        jax.tree.map(close, found, quantizers.calibrate(plain, normal, how))
    moved = quantizers.observe(spec, 2 * x, arrays)
    jax.tree.map(close, moved, quantizers.observe(plain, normal, arrays))
    found = quantizers.quantize(spec, x, arrays)
    close(found, sizes * quantizers.quantize(plain, normal, arrays))
    np.testing.assert_array_equal(found[:1], quantizers.quantize(spec, x[:1], arrays))
    np.testing.assert_array_equal(found == 0, quantizers.quantize(plain, normal, arrays) == 0)


def test_a_schedule_is_nothing_to_calibrate():
    """Values pass in float epochs, and the least error would be that of any range."""
    x = values(make("lsq", "input", 4))
    plain = quantizers.calibrate(make("lsq", "input", 4), x, "mse").learned
    for fields in (
        dict(float_epochs=1.0),
        dict(stop_epoch=2.0),
        dict(float_epochs=1, stop_epoch=2),
    ):
        found = quantizers.calibrate(make("lsq", "input", 4, **fields), x, "mse").learned
        np.testing.assert_array_equal(found["step"], plain["step"])


@pytest.mark.parametrize(("method", "site"), [("lsq", "kernel"), ("lsq+", "input")])
def test_the_logarithm_of_a_step_is_of_the_same_step(method, site):
    """As started, as calibrated, and in every stage of a schedule, where powers of two rescale."""
    fields = dict(stages=((0, 65), (2, 17), (4, 5)))
    specs = [
        make(method, site, 5, per="channel", log_step=log_step, signed=True, **fields)
        for log_step in (False, True)
    ]
    x = values(specs[0])

    def compare(of_step, of_log):
        plain = dict(of_step.learned)
        step = plain.pop("step")
        found = dict(of_log.learned)
        np.testing.assert_allclose(2.0 ** found.pop("log_step"), step, rtol=1e-5)  # of 2^t
        assert plain.keys() == found.keys()

    for how in ("own", "mse", "percentile", "minmax"):
        compare(*(quantizers.calibrate(spec, x, how) for spec in specs))
    arrays = [quantizers.start(spec, x) for spec in specs]
    highs = []
    for epoch in (0.0, 2.0, 5.0):
        arrays = [quantizers.advance(*pair, epoch) for pair in zip(specs, arrays, strict=True)]
        compare(*arrays)
        highs.append(np.ptp(quantizers.quantize(specs[1], 100 * x, arrays[1])))
    np.testing.assert_allclose(highs, highs[0], rtol=0.1)  # 64, 16 or 4 steps


def test_a_sample_of_zeros_is_not_divided():
    for normalise in SIZES:
        spec = make("lsq", "input", 4, normalise=normalise)
        x = values(spec).at[0].set(0)
        arrays = quantizers.start(spec, x)
        found, back = jax.vjp(lambda x: quantizers.quantize(spec, x, arrays), x)  # noqa: B023
        assert np.all(found[0] == 0) and np.any(found[1])
        assert np.all(np.isfinite(back(found + 1)[0]))


@pytest.mark.parametrize("method, site, levels", list({row[:2]: row for row in TABLE}.values()))
def test_observe_moves_observed_arrays_alone(method, site, levels):
    spec = make(method, site, levels)
    arrays = quantizers.start(spec, values(spec))
    moved = quantizers.observe(spec, 3 * values(spec, seed=1) - 1, arrays)
    assert moved.learned is arrays.learned
    assert moved.observed.keys() == arrays.observed.keys()
    for name, array in arrays.observed.items():
        assert moved.observed[name].dtype == array.dtype
        assert moved.observed[name].shape == array.shape
        moves = np.any(moved.observed[name] != array)
        assert moves == (name not in ("seed",)), name


@ONCE
def test_forward_mode_is_reverse_mode(method, site, levels):
    spec = make(method, site, levels, per="groups:2")
    x, tangent, cotangent = (values(spec, seed) for seed in (0, 1, 2))
    arrays = quantizers.start(spec, x)

    def quantize(x, learned):
        return quantizers.quantize(spec, x, arrays._replace(learned=learned))

    learned = arrays.learned
    value, forward = jax.jvp(quantize, (x, learned), (tangent, learned))
    plain, back = jax.vjp(quantize, x, learned)
    np.testing.assert_array_equal(value, plain)
    dx, dlearned = back(cotangent)
    products = [dx * tangent, *jax.tree.leaves(jax.tree.map(jnp.multiply, dlearned, learned))]
    backward = sum(float(np.sum(product)) for product in products)
    forward = float(np.sum(forward * cotangent))
    size = sum(float(np.sum(np.abs(product))) for product in products)
    assert abs(forward - backward) <= 1e-5 * size  # sums of 32 terms of 6e-8 each


def test_rounded_gradients_have_few_levels():
    """Its gradient is another function, which has no forward mode."""
    spec = make("dorefa", "gradient", 4)
    x = values(spec)
    arrays = quantizers.start(spec, x)
    for dtype in (jnp.float32, jnp.bfloat16):
        value, back = jax.vjp(lambda x: quantizers.quantize(spec, x, arrays), x.astype(dtype))
        np.testing.assert_array_equal(value, x.astype(dtype))
        (found,) = back(values(spec, 1, dtype))
        assert found.dtype == dtype
        for sample in np.asarray(found.astype(jnp.float32)):
            assert len(np.unique(sample)) <= 4
    (zeros,) = jax.vjp(lambda x: quantizers.quantize(spec, x, arrays), x)[1](jnp.zeros_like(x))
    assert np.all(np.abs(zeros) < 1e-11)
    # Each call draws its own noise, and the mean over them is the gradient.
    total, cotangent = 0, values(spec, 1)
    pull = jax.jit(
        lambda arrays: jax.vjp(lambda x: quantizers.quantize(spec, x, arrays), x)[1](cotangent)[0]
    )
    for _ in range(400):
        arrays = quantizers.observe(spec, x, arrays)
        total = total + pull(arrays) / 400
    most = np.max(np.abs(cotangent), axis=(1, 2), keepdims=True)
    # A draw deviates by up to half a step, which is a third of the largest; the mean of 400 by a
    # twentieth of that; and five times as much is never met.
    assert np.all(np.abs(total - cotangent) / most < 5 / 20 / 3)


def test_straight_through_values_are_exact():
    """Even where the surrogate would take digits away, or has none."""
    value = jnp.asarray([1e-8, -0.0, 3.1, 1e30, 7.0], jnp.float32)
    surrogate = jnp.asarray([1e8, 1.0, 0.1, jnp.nan, jnp.inf], jnp.float32)
    for function in (through.straight_through, jax.jit(through.straight_through)):
        found = function(value, surrogate)
        np.testing.assert_array_equal(found.view(jnp.int32), value.view(jnp.int32))
    _, tangent = jax.jvp(through.straight_through, (value, surrogate), (2 * value, 3 * value))
    np.testing.assert_array_equal(tangent, 3 * value)
    one, other = jax.vjp(through.straight_through, value, surrogate)[1](value)
    np.testing.assert_array_equal(one, 0 * value)
    np.testing.assert_array_equal(other, value)


def test_scaled_gradients():
    x = jnp.asarray([0.1, -3.7], jnp.float32)
    value, back = jax.vjp(lambda x: through.scale_gradient(x, 0.3), x)
    np.testing.assert_array_equal(value, x)
    np.testing.assert_array_equal(back(x)[0], x * jnp.float32(0.3))


@pytest.mark.parametrize("name", through.SIGN)
def test_pseudo_gradients_of_large_values(name):
    u = jnp.asarray([-jnp.inf, -3e38, -1e5, 1e5, 3e38, jnp.inf], jnp.float32)
    found = through.SIGN[name](u, -1, 1)
    np.testing.assert_array_equal(found, np.full(6, 1.0 if name == "identity" else 0.0))


def test_groups_that_do_not_divide():
    for per in ("groups:3", "size:3"):
        spec = make("lsq", "kernel", 4, per=per)
        with pytest.raises(UserError, match=f"per='{per}': it does not divide the 4 channels"):
            quantizers.start(spec, jnp.ones(SHAPE))


@pytest.mark.parametrize("per, axis", [("channel", "in"), ("groups:2", "out"), ("size:4", "out")])
def test_groups_have_their_own_figures(per, axis):
    """Each group is quantized as if there were nothing else."""
    for method in ("lsq", "minmax", "twn", "lq"):
        levels = 3 if method == "twn" else 4
        spec = make(method, "kernel", levels, per=per, axis=axis, **_plain(method))
        alone = make(method, "kernel", levels, per="layer", **_plain(method))
        x = values(spec)
        found = quantizers.quantize(spec, x, quantizers.start(spec, x))
        cut = 1 if axis == "in" else 2
        parts = np.split(np.asarray(x), groups.count(spec, x.shape), axis=cut)
        parts = [
            quantizers.quantize(alone, p, quantizers.start(alone, p))
            for p in map(jnp.asarray, parts)
        ]
        # Means of a group are sums in another order.
        np.testing.assert_allclose(found, np.concatenate(parts, axis=cut), rtol=1e-5)


def _plain(method):
    return {"gradient": "identity"}


@pytest.mark.parametrize(
    ("method", "name", "good"),
    [("lsq", "step", ()), ("pact", "alpha", ()), ("fatnn", "slopes", ())]
    + [("fatnn", "slopes", (1.0,)), ("fatnn", "slopes", (1.0, 1.0))],
)
@pytest.mark.parametrize("value", [0.0, -0.1])
def test_a_range_below_zero_comes_back(method, name, good, value):
    """Where the output should be larger, the gradient makes the range larger, or a slope steeper.

    Of FATNN's slopes, the first one that is bad, behind those that are good.
    """
    spec = quantizers.make("input", dict(method=method, bits=2))
    x = jnp.asarray([[0.5, 1.0, 2.0, 3.0]], jnp.float32)
    shape = quantizers.start(spec, x).learned[name].shape
    learned = np.full(shape, value, np.float32)
    learned.flat[: len(good)] = good

    def error(x, found):
        arrays = quantizers.Arrays({name: found}, {})
        return jnp.sum(jnp.square(quantizers.quantize(spec, x, arrays) - x))

    dx, slopes = jax.grad(error, (0, 1))(x, jnp.asarray(learned))
    assert slopes.flatten()[len(good)] < -1e-3
    assert np.all(np.isfinite(dx)) and np.all(np.isfinite(slopes))


@pytest.mark.parametrize("levels", [3, 16, 256])
def test_minmax_rounds_gradients_by_their_own_range(levels):
    spec = make("minmax", "gradient", levels)
    x, g = values(spec), np.random.default_rng(3).normal(size=(2, 4, 4)).astype(np.float32)
    y, back = jax.vjp(lambda x: quantizers.quantize(spec, x, quantizers.start(spec, x)), x)
    np.testing.assert_array_equal(y, x)
    low, high = -(levels // 2), (levels - 1) // 2
    scale = 2 * np.abs(g).max() / np.float32(high - low)
    expected = np.clip(np.round(g / scale), low, high) * scale
    (found,) = back(jnp.asarray(g))
    # But for the largest, which lies on a tie where the levels are even.
    inner = np.abs(g) < np.abs(g).max()
    np.testing.assert_allclose(np.asarray(found)[inner], expected[inner], rtol=1e-6)
    assert np.abs(np.asarray(found) - g).max() <= scale * 0.5001
    np.testing.assert_array_equal(back(jnp.zeros_like(g))[0], np.zeros_like(g))
