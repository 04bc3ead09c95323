"""Fused maps: the interleaving and its inverse, and one fused convolution against one a branch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from efficient_nets.ops import linear_maps


def _arrays(count, shape, seed=0):
    random = np.random.default_rng(seed)
    return [jnp.asarray(random.normal(size=shape)) for _ in range(count)]


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("branches", [1, 2, 3])
def test_split_undoes_fuse(branches, groups, x64):
    parts = _arrays(branches, (2, 3, 6))
    fused = linear_maps.fuse(parts, groups)
    assert fused.shape == (2, 3, 6 * branches)
    for part, back in zip(parts, linear_maps.split(fused, branches, groups), strict=True):
        np.testing.assert_array_equal(part, back)


def test_fuse_undoes_split(x64):
    (z,) = _arrays(1, (2, 12))
    np.testing.assert_array_equal(linear_maps.fuse(linear_maps.split(z, 3, 2), 2), z)


def test_group_g_holds_every_branch_of_group_g():
    a, b = jnp.arange(4), 10 + jnp.arange(4)
    assert linear_maps.fuse([a, b], 2).tolist() == [0, 1, 10, 11, 2, 3, 12, 13]
    assert linear_maps.fuse([a, b]).tolist() == [0, 1, 2, 3, 10, 11, 12, 13]


@pytest.mark.parametrize(
    ("size", "kernel", "options"),
    [
        pytest.param((7,), (3, 4, 6), {}, id="1-D"),
        pytest.param((5, 4), (3, 3, 4, 6), {}, id="2-D"),
        pytest.param((4, 3, 3), (2, 2, 2, 4, 6), {}, id="3-D"),
        pytest.param((5, 4), (3, 2, 4, 6), {"strides": (2, 1)}, id="strides"),
        pytest.param((6, 5), (2, 2, 4, 6), {"dilation": (2, 3)}, id="dilation"),
        pytest.param((4, 4), (3, 3, 4, 6), {"padding": ((1, 0), (2, 1))}, id="padding"),
        pytest.param((4, 4), (3, 3, 2, 6), {"groups": 2}, id="groups"),
        pytest.param((4, 4), (3, 3, 1, 8), {"groups": 4}, id="depthwise, multiplier 2"),
        pytest.param(
            (7, 6),
            (3, 2, 1, 4),
            {"groups": 4, "strides": (2, 3), "dilation": (1, 2), "padding": ((1, 0), (2, 1))},
            id="depthwise, all options",
        ),
        pytest.param((2, 1, 3), (3, 1, 2, 1, 4), {"groups": 4}, id="depthwise 3-D"),
        pytest.param((2,), (3, 1, 4), {"groups": 4, "padding": "VALID"}, id="depthwise, no window"),
    ],
)
def test_a_fused_convolution_is_one_convolution_a_branch(size, kernel, options, x64):
    rank = len(size)
    defaults = {"strides": (1,) * rank, "padding": "SAME", "dilation": (1,) * rank, "groups": 1}
    conv = linear_maps.ConvMap(**(defaults | options))
    (x,), kernels = _arrays(1, (2, *size, 4)), _arrays(3, kernel, seed=1)

    def together(x, *kernels):
        return tuple(linear_maps.split(conv(x, kernels), 3, conv.groups))

    def alone(x, *kernels):
        # Channels first, so that the layout is not taken from the code under test.
        images = jnp.moveaxis(x, -1, 1)
        parts = (
            lax.conv_general_dilated(
                images,
                jnp.moveaxis(kernel, (-1, -2), (0, 1)),
                conv.strides,
                conv.padding,
                rhs_dilation=conv.dilation,
                feature_group_count=conv.groups,
            )
            for kernel in kernels
        )
        return tuple(jnp.moveaxis(part, 1, -1) for part in parts)

    (z, back), (expected, expected_back) = (jax.vjp(f, x, *kernels) for f in (together, alone))
    cotangent = tuple(_arrays(3, expected[0].shape, seed=2))
    for found, right in zip(
        (*z, *back(cotangent)), (*expected, *expected_back(cotangent)), strict=True
    ):
        # float64 sums of at most 2 * 20 * 3 terms of size 1
        np.testing.assert_allclose(found, right, rtol=0, atol=1e-12)


def test_a_depthwise_convolution_has_forward_mode_and_keeps_little():
    """Tap by tap it keeps x and the kernel, not what each tap reads."""
    conv = linear_maps.ConvMap((1, 1), "SAME", (1, 1), groups=8)
    x, kernel = jnp.ones((4, 16, 16, 8)), jnp.ones((5, 5, 1, 8))
    _, tangent = jax.jvp(lambda x: conv(x, [kernel]), (x,), (x,))
    np.testing.assert_allclose(tangent, conv(x, [kernel]), rtol=1e-6)  # sums of 25 ones

    def step(x, kernel):
        z, back = jax.vjp(lambda x, kernel: conv(x, [kernel]), x, kernel)
        return back(z)

    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    of_images, whole = jax.P("data"), jax.P()
    mapped = jax.shard_map(
        lambda x, kernel: conv(x, [kernel]),
        mesh=mesh,
        in_specs=(of_images, whole),
        out_specs=of_images,
    )
    np.testing.assert_allclose(mapped(x, kernel), tangent, rtol=1e-6)

    planned = jax.jit(step).lower(x, kernel).compile().memory_analysis().temp_size_in_bytes
    assert planned < 8 * x.nbytes


@pytest.mark.parametrize("lead", [(5,), (2, 3), (2, 3, 4)])
def test_a_fused_matrix_product_is_one_product_a_branch(lead, x64):
    (x,), kernels = _arrays(1, (*lead, 4)), _arrays(3, (4, 6), seed=1)
    fused = linear_maps.split(linear_maps.DenseMap()(x, kernels), 3)
    for z, kernel in zip(fused, kernels, strict=True):
        alone = np.einsum("...i,io->...o", x, kernel)
        np.testing.assert_allclose(z, alone, rtol=0, atol=1e-13)  # float64 sums of 4 terms


def test_maps_are_hashable_and_equal_by_value():
    one = linear_maps.ConvMap((1, 1), "SAME", (1, 1))
    assert hash(one) == hash(linear_maps.ConvMap((1, 1), "SAME", (1, 1)))
    assert one == linear_maps.ConvMap((1, 1), "SAME", (1, 1), groups=1)
    assert one != linear_maps.ConvMap((1, 1), "SAME", (1, 1), groups=2)
    assert linear_maps.DenseMap() == linear_maps.DenseMap()


@pytest.mark.parametrize("size", [2, 3, 4])
def test_an_input_below_the_window_has_no_windows(size):
    conv = linear_maps.ConvMap((1,), "VALID", (2,), kernel_size=(3,))  # of extent 5
    x = jnp.ones((1, size, 2))
    assert conv(x, [jnp.ones((3, 2, 4))]).shape == (1, 0, 4)
    assert conv.windows(x).shape == (1, 0, 1, 6)
