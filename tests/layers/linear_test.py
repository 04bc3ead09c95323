"""Dense and Conv beside Flax's, their arguments, and layer_norm_act's ways."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_nets.layers import BatchNorm, Conv, Dense, LayerSpec, layer_norm_act, watched

OURS = LayerSpec("ours", norm="branch")
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}  # float32 sums of at most 36 terms of size 1


def _conv(*arguments, **options):
    return Conv(*arguments, **options, rngs=nnx.Rngs(0))


def _input(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


# Linear layers are Flax's


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("lead", [(5,), (2, 3)])
def test_dense_is_flaxs(lead, use_bias):
    bias_init = nnx.initializers.normal()
    ours = Dense(4, 6, use_bias=use_bias, bias_init=bias_init, rngs=nnx.Rngs(0))
    theirs = nnx.Linear(4, 6, use_bias=use_bias, rngs=nnx.Rngs(1))
    theirs.kernel[...] = ours.w.kernel[...]
    if use_bias:
        theirs.bias[...] = ours.w.bias[...]
    x = _input(*lead, 4)
    np.testing.assert_allclose(ours(x), theirs(x), **ROUNDING)


@pytest.mark.parametrize(
    ("shape", "kernel_size", "ours", "theirs"),
    [
        pytest.param((6,), (3,), {}, {}, id="1-D"),
        pytest.param((5, 4), (3, 3), {}, {}, id="2-D"),
        pytest.param((3, 4, 3), (2, 2, 2), {}, {}, id="3-D"),
        pytest.param((5, 4), (3, 3), {"strides": 2}, {"strides": 2}, id="strides"),
        pytest.param((5, 4), (3, 3), {"strides": (2, 1)}, {"strides": (2, 1)}, id="strides 2, 1"),
        pytest.param((6, 6), (3, 3), {"dilation": 2}, {"kernel_dilation": 2}, id="dilation"),
        pytest.param((5, 4), (3, 3), {"groups": 2}, {"feature_group_count": 2}, id="groups"),
        pytest.param((5, 4), (3, 3), {"groups": 4}, {"feature_group_count": 4}, id="depthwise"),
        pytest.param((5, 4), (3, 3), {"padding": "VALID"}, {"padding": "VALID"}, id="valid"),
        pytest.param((5, 4), (3, 3), {"padding": 1}, {"padding": 1}, id="padding"),
        pytest.param((5, 4), (3, 3), {"padding": (1, 0)}, {"padding": (1, 0)}, id="padding 1, 0"),
        pytest.param(
            (5, 4),
            (3, 3),
            {"padding": [(0, 1), (2, 0)]},
            {"padding": [(0, 1), (2, 0)]},
            id="padding pairs",
        ),
        pytest.param((5, 4), (3, 3), {"use_bias": False}, {"use_bias": False}, id="no bias"),
    ],
)
def test_conv_is_flaxs(shape, kernel_size, ours, theirs):
    ours = _conv(4, 8, kernel_size, bias_init=nnx.initializers.normal(), **ours)
    theirs = nnx.Conv(4, 8, kernel_size, **theirs, rngs=nnx.Rngs(1))
    theirs.kernel[...] = ours.w.kernel[...]
    if ours.geometry.use_bias:
        theirs.bias[...] = ours.w.bias[...]
    x = _input(2, *shape, 4)
    np.testing.assert_allclose(ours(x), theirs(x), **ROUNDING)


def test_parameters_of_ours():
    conv = _conv(4, 6, (3, 5), groups=2, spec=OURS)
    shapes = jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(conv, nnx.Param)))
    branch = {"kernel": (3, 5, 2, 6), "bias": (6,), "norm": {"scale": (6,), "bias": (6,)}}
    assert shapes == {"a": branch, "b": branch, "c": branch}
    a, b = conv.a.kernel[...], conv.b.kernel[...]
    assert jnp.max(jnp.abs(a - b)) > 0.1  # each branch is drawn anew
    # Kaiming over fan-in: deviation sqrt(2 / 30), known to 1 in sqrt(2 * 540).
    kernels = jnp.stack([branch.kernel[...] for branch in conv.branches])
    assert abs(jnp.std(kernels) / np.sqrt(2 / 30) - 1) < 0.1


def test_ours_is_product_plus_linear():
    conv, x = _conv(2, 3, (3, 3), spec=LayerSpec("ours")), _input(2, 4, 4, 2)
    a, b, c = (_conv(2, 3, (3, 3)) for _ in range(3))
    for part, branch in zip((a, b, c), conv.branches, strict=True):
        part.w.kernel[...] = branch.kernel[...]
    np.testing.assert_allclose(conv(x), a(x) * b(x) + c(x), **ROUNDING)


# Types


@pytest.mark.parametrize("spec", [LayerSpec(), OURS])
@pytest.mark.parametrize("x_dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, jnp.float32])
def test_output_type_is_the_compute_type_or_the_inputs(spec, x_dtype, dtype):
    dense = Dense(2, 3, spec=spec, dtype=dtype, rngs=nnx.Rngs(0))
    assert dense(jnp.ones((4, 2), x_dtype)).dtype == (dtype or x_dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(dense))} == {jnp.dtype("float32")}


@pytest.mark.parametrize("spec", [LayerSpec(), OURS])
def test_float64_input_beside_float32_parameters(spec):
    dense = Dense(2, 3, spec=spec, rngs=nnx.Rngs(0))
    with jax.enable_x64(True):
        assert dense(jnp.ones((4, 2), jnp.float64)).dtype == jnp.float64
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(dense))} == {jnp.dtype("float32")}


def test_images_in_whole_numbers_are_refused():
    with pytest.raises(ValueError, match="uint8.*floating"):
        _conv(3, 4, (3, 3))(jnp.ones((2, 5, 5, 3), jnp.uint8))


def test_parameters_in_bfloat16():
    conv = _conv(2, 3, (3, 3), spec=OURS, param_dtype=jnp.bfloat16)
    assert {branch.kernel.dtype for branch in conv.branches} == {jnp.dtype(jnp.bfloat16)}
    assert conv(jnp.ones((2, 4, 4, 2), jnp.bfloat16)).dtype == jnp.bfloat16
    assert conv(jnp.ones((2, 4, 4, 2), jnp.float32)).dtype == jnp.float32


# layer_norm_act


def test_a_norm_that_is_not_ours_is_called():
    conv, norm, x = (
        _conv(2, 4, (3, 3), spec=OURS),
        nnx.LayerNorm(4, rngs=nnx.Rngs(0)),
        _input(2, 4, 4, 2),
    )
    np.testing.assert_array_equal(
        layer_norm_act(x, conv, norm, jax.nn.relu), jax.nn.relu(norm(conv(x)))
    )
    np.testing.assert_array_equal(layer_norm_act(x, conv, norm), norm(conv(x)))


@pytest.mark.parametrize("spec", [LayerSpec(), LayerSpec("ours"), OURS])
def test_every_part_may_be_left_out(spec):
    conv, norm, x = (
        _conv(2, 4, (3, 3), spec=spec),
        BatchNorm(4, rngs=nnx.Rngs(0)),
        _input(2, 4, 4, 2),
    )
    np.testing.assert_array_equal(layer_norm_act(x, conv), conv(x))
    # Two compilations of the same float32 formula, through norms.
    close = {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(
        layer_norm_act(x, conv, None, jax.nn.relu), jax.nn.relu(conv(x)), **close
    )
    np.testing.assert_allclose(layer_norm_act(x, conv, norm), norm(conv(x)), **close)


def test_a_watched_copy_shows_the_calls_of_its_layers():
    seen = []
    net = nnx.List([Dense(3, 4, rngs=nnx.Rngs(0)), Dense(4, 2, spec=OURS, rngs=nnx.Rngs(1))])
    copy = watched(net, lambda *call: seen.append(call))
    y = copy[1](copy[0](_input(5, 3)))
    jax.eval_shape(lambda x: copy[0](x), _input(5, 3))
    net[0](_input(5, 3))  # the net itself is not watched
    assert [(path, layer, x.shape, y.shape) for path, layer, x, y in seen] == [
        ("0", copy[0], (5, 3), (5, 4)),
        ("1", copy[1], (5, 4), (5, 2)),
        ("0", copy[0], (5, 3), (5, 4)),
    ]
    np.testing.assert_array_equal(seen[1][3], y)


class Rematted(nnx.Module):
    def __init__(self, rngs):
        self.conv = Conv(3, 3, (3, 3), rngs=rngs)

    @nnx.remat
    def __call__(self, x):
        return self.conv(x)


def test_layers_of_one_shape_inside_remat_are_watched_apart_and_anew():
    net = nnx.List([Rematted(nnx.Rngs(0)), Rematted(nnx.Rngs(1))])
    for _ in range(2):  # JAX caches the trace of the first time
        seen = []
        copy = watched(net, lambda path, *_, seen=seen: seen.append(path))
        copy[1](copy[0](_input(2, 4, 4, 3)))
        assert seen == ["0/conv", "1/conv"]


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_features": 0}, "in_features=0"),
        ({"features": -1}, "features=-1"),
        ({"groups": 0}, "groups=0"),
        ({"groups": 3}, "groups=3 does not divide in_features=4"),
        ({"groups": 4}, "groups=4 does not divide features=6"),
        ({"kernel_size": ()}, r"kernel_size=\(\)"),
        ({"kernel_size": (3, 3, 3, 3)}, "kernel_size"),
        ({"kernel_size": 3}, "kernel_size=3"),
        ({"kernel_size": (0, 3)}, r"kernel_size=\(0, 3\)"),
        ({"kernel_size": (1.5, 3)}, r"kernel_size=\(1.5, 3\)"),
        ({"strides": (1, 2, 3)}, r"strides=\(1, 2, 3\).* 2 of them"),
        ({"strides": 0}, "strides=0"),
        ({"strides": 2.0}, "strides=2.0"),
        ({"dilation": (1,)}, r"dilation=\(1,\)"),
        ({"padding": "same"}, "padding='same'.*'SAME'"),
        ({"padding": ((1, 1),)}, r"padding=\(\(1, 1\),\)"),
        ({"padding": ((1, 1, 1), (1, 1))}, r"padding=\(\(1, 1, 1\), \(1, 1\)\)"),
        ({"padding": ((1,), (1, 1, 1))}, r"padding=\(\(1,\), \(1, 1, 1\)\)"),
        ({"padding": -1}, "padding=-1"),
        ({"padding": 1.5}, "padding=1.5"),
    ],
)
def test_a_bad_geometry_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        _conv(**({"in_features": 4, "features": 6, "kernel_size": (3, 3)} | options))


def test_numpy_numbers_are_numbers():
    conv = _conv(2, 4, np.array([3, 3]), strides=np.int64(2), padding=np.int64(1))
    assert conv(_input(1, 4, 4, 2)).shape == (1, 2, 2, 4)


@pytest.mark.parametrize("shape", [(2, 5, 5, 4), (2, 5, 3), (5, 5, 3), (2, 5, 5, 5, 3), ()])
def test_conv_names_an_input_of_another_shape(shape):
    with pytest.raises(ValueError, match="in_features=3.*kernel_size|kernel_size.*in_features=3"):
        _conv(3, 4, (3, 3))(jnp.ones(shape))


@pytest.mark.parametrize("shape", [(2, 4), ()])
def test_dense_names_an_input_of_another_shape(shape):
    with pytest.raises(ValueError, match="in_features=3"):
        Dense(3, 4, rngs=nnx.Rngs(0))(jnp.ones(shape))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("features", [1, 8])
def test_a_norm_of_another_size_is_named(features, mode):
    norm = BatchNorm(features, rngs=nnx.Rngs(0))
    getattr(norm, mode)()
    with pytest.raises(ValueError, match=f"norm.*{features}.*features=4"):
        layer_norm_act(_input(2, 5, 5, 3), _conv(3, 4, (3, 3)), norm)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"neuron": "our"}, "neuron='our'.*linear, ours.*did you mean 'ours'"),
        ({"norm": "brnch"}, "norm='brnch'.*did you mean 'branch'"),
        ({"backward": "hybird"}, "backward='hybird'.*did you mean 'hybrid'"),
        ({"kernel": "dens"}, "kernel='dens'.*dense"),
        (
            {"algorithm": "winograd"},
            "algorithm='winograd': give a tile's outputs, as in 'winograd:4'",
        ),
        ({"precision": 8}, "precision=8.*'float'"),
        ({"neuron": ["ours"]}, r"neuron=\['ours'\].*linear, ours"),
    ],
)
def test_an_unknown_member_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        LayerSpec(**fields)
