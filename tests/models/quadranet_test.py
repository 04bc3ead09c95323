"""QuadraNet against its formula in NumPy, ConvNeXt's parameter count, the stem, the start."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_nets import layers, models
from efficient_nets.errors import UserError
from tests.models import reference

RULE = dict(match="depthwise", neuron="ours")
TINY = dict(depths=(1, 1, 2, 1), width=1 / 24)


def shapes(image_shape, rules=(), classes=10, **options):
    def make():
        made = models.create(
            "quadranet", image_shape=image_shape, num_classes=classes, rngs=nnx.Rngs(0), **options
        )
        return layers.convert(made, rules, jax.random.key(1))

    return nnx.eval_shape(make)


def count(*args, **options):
    params = nnx.state(shapes(*args, **options), nnx.Param)
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def test_the_linear_net_has_the_parameters_of_convnext_t():
    """The count of the authors' ConvNeXt-T, arXiv 2201.03545."""
    convnext = count((224, 224, 3), classes=1000, depths=(3, 3, 9, 3))
    assert convnext == 28_589_128
    assert f"{convnext:,}" in models.MODELS["quadranet"].__doc__
    quadratic = count((224, 224, 3), [RULE], classes=1000, depths=(3, 3, 9, 3))
    # Two more branches of 49 weights and a bias.
    assert quadratic - convnext == 100 * (3 * 96 + 3 * 192 + 9 * 384 + 3 * 768)


def block(x, values, quadratic):
    """`x + scale * project(gelu(expand(norm(depthwise(x)))))`."""

    def branch(name):
        kernel, bias = values[f"depthwise/{name}/kernel"], values[f"depthwise/{name}/bias"]
        return reference.conv(x, kernel, depthwise=True) + bias

    y = branch("a") * branch("b") + branch("c") if quadratic else branch("w")
    y = reference.layer_norm(y, reference.part(values, "depthwise_norm"))
    y = reference.dense(y, reference.part(values, "expand"))
    y = y * (1 + np.vectorize(math.erf)(y / math.sqrt(2))) / 2
    y = reference.dense(y, reference.part(values, "project"))
    return x + values["scale"] * y


@pytest.mark.parametrize("quadratic", [False, True])
def test_quadranet_is_its_formula(quadratic, x64):
    shape = (32, 16, 3)
    model, values = reference.build("quadranet", shape, [RULE] if quadratic else [], **TINY)
    x = y = np.random.default_rng(1).normal(0, 1, (2, *shape))

    def part(name):
        return reference.part(values, name)

    def patches(y, name):
        kernel = values[f"{name}/w/kernel"]
        return reference.conv(y, kernel, len(kernel), 0) + values[f"{name}/w/bias"]

    y = reference.layer_norm(patches(y, "stem"), part("stem_norm"))
    for stage, depth in enumerate(TINY["depths"], start=1):
        if stage > 1:
            y = patches(reference.layer_norm(y, part(f"down{stage}_norm")), f"down{stage}")
        for index in range(depth):
            y = block(y, part(f"stage{stage}/{index}"), quadratic)
    assert y.shape == (2, 2, 1, 32)
    y = reference.layer_norm(y.mean((1, 2)), part("head_norm"))
    with jax.numpy_dtype_promotion("standard"):  # Flax mixes float64 with float32 types
        logits = jax.jit(lambda x: model(x))(x)
    # float64 rounding of sums of some hundred products, through layer norms of 4 to 32 values.
    np.testing.assert_allclose(logits, reference.dense(y, part("head")), rtol=1e-9, atol=1e-9)


def test_patches_follow_the_image():
    def side(size, **options):
        stem = shapes((size, size, 3), **TINY, **options).stem.geometry
        assert stem.kernel_size == stem.strides
        return stem.strides[0]

    assert (side(64), side(65)) == (2, 4)
    assert [side(224, stem=stem) for stem in (1, 2, 3, 4)] == [1, 2, 3, 4]


def test_a_block_starts_as_the_identity_but_for_layer_scale():
    made = models.quadranet.QuadraBlock(4, activation=nnx.gelu, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(made.scale[...], np.float32(1e-6))
    x = jax.random.normal(jax.random.key(0), (2, 5, 5, 4))
    moved = np.abs(made(x) - x)
    assert 0 < moved.max() < 1e-5


def test_initial_kernels_have_the_papers_scale():
    made = models.quadranet.QuadraBlock(64, activation=nnx.gelu, rngs=nnx.Rngs(0))
    for layer in (made.depthwise, made.expand, made.project):
        # Of 3136 draws and more, the standard deviation is off by 1.3% and less.
        np.testing.assert_allclose(np.std(layer.w.kernel[...]), 0.02, rtol=0.06)


def test_layer_norm_computes_in_float32_and_keeps_the_type():
    norm = layers.LayerNorm(8, rngs=nnx.Rngs(0))
    x = 1000 + jax.random.normal(jax.random.key(0), (4, 8))  # bfloat16 has steps of 8 or 4 there
    narrow = x.astype(jnp.bfloat16)
    out = norm(narrow)
    assert out.dtype == jnp.bfloat16
    expected = norm(narrow.astype(jnp.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(out, expected)
    scale_and_bias = dict(scale=1, bias=0)
    exact = reference.layer_norm(np.asarray(x, np.float64), scale_and_bias)
    # Inputs of 1000 are rounded to 2^-14; the variance in one pass would be wrong by 0.1.
    np.testing.assert_allclose(norm(x), exact, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(depths=(1, 1, 1)), r"model\.depths=\(1, 1, 1\): give four"),
        (dict(depths=(1, 1, 0, 1)), r"model\.depths=\(1, 1, 0, 1\)"),
        (dict(stem=5), r"model\.stem=5: allowed 0"),
        (dict(activation="geloo"), r"model\.activation='geloo' is not known.*mean 'gelu'"),
    ],
)
def test_bad_input_is_named(options, message):
    with pytest.raises(UserError, match=message):
        shapes((32, 32, 3), **options)
