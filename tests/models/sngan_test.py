"""SNGAN: shapes, names, parameters, its blocks against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_nets import layers, models
from efficient_nets.errors import UserError
from efficient_nets.models import sngan

SMALL = dict(latent=4, width=1 / 64, discriminator_blocks=2)


def shapes(image_shape=(32, 32, 3), **options):
    return nnx.eval_shape(
        lambda: models.create(
            "sngan", image_shape=image_shape, num_classes=10, rngs=nnx.Rngs(0), **options
        )
    )


def count(model):
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


def test_it_counts_the_layers_of_the_paper_s_table_4():
    up = 2 * (9 * 256 * 256 + 256) + (256 * 256 + 256) + 4 * 256
    generator = (128 * 4096 + 4096) + 3 * up + 2 * 256 + (9 * 256 * 3 + 3)
    conv = 9 * 128 * 128 + 128
    first = (9 * 3 * 128 + 128) + conv + (3 * 128 + 128)
    discriminator = first + (2 * conv + 128 * 128 + 128) + 2 * 2 * conv + (128 + 1)
    model = shapes()
    assert count(model.generator) == generator and count(model.discriminator) == discriminator
    assert f"{generator + discriminator:,}" in sngan.SNGAN.__doc__


@pytest.mark.parametrize(
    ("side", "start", "doublings"), [(8, 4, 1), (28, 7, 2), (32, 4, 3), (48, 6, 3), (64, 4, 4)]
)
def test_sides(side, start, doublings):
    model = shapes((side, side, 1), **SMALL)
    assert model.generator.start == (start, start) and len(model.generator.blocks) == doublings
    images = jax.ShapeDtypeStruct((2, side, side, 1), jnp.float32)
    scores, made = nnx.eval_shape(lambda model, x: model(x), model, images)
    assert scores.shape == (2,) and made.shape == images.shape


def test_rules_find_both_parts_and_spectral_norms_stay():
    rules = [
        dict(match=r"generator/blocks/.*/conv", neuron="ours", norm="branch"),
        dict(match=r"discriminator/blocks/.*/conv", neuron="ours"),
    ]

    def build():
        model = models.create(
            "sngan", image_shape=(8, 8, 1), num_classes=10, rngs=nnx.Rngs(0), **SMALL
        )
        return layers.convert(model, rules, jax.random.key(0))

    specs = {path: layer.spec for path, layer in layers.layers(nnx.eval_shape(build))}
    assert sorted(specs) == [
        *(f"discriminator/blocks/0/{name}" for name in ("conv1", "conv2", "shortcut")),
        *(f"discriminator/blocks/1/{name}" for name in ("conv1", "conv2", "shortcut")),
        "discriminator/head",
        *(f"generator/blocks/0/{name}" for name in ("conv1", "conv2", "shortcut")),
        *("generator/image", "generator/project"),
    ]
    for path, spec in specs.items():
        assert (spec.kernel_norm == "spectral") == path.startswith("discriminator")
        assert (spec.neuron == "ours") == ("/conv" in path)


def test_blocks_are_their_formulas():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4, 2)), jnp.float32)

    def up(x):
        block = sngan.UpBlock(2, 3, nnx.relu, rngs=nnx.Rngs(0))
        block.eval()
        big = lambda x: jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)  # noqa: E731
        y = block.conv1(big(nnx.relu(block.norm0(x))))
        y = block.conv2(nnx.relu(block.norm1(y)))
        return block(x), y + block.shortcut(big(x))

    def down(x, first):
        block = sngan.DownBlock(2, 3, nnx.relu, halves=True, first=first, rngs=nnx.Rngs(0))
        block.eval()
        half = lambda x: sum(x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4  # noqa: E731
        y = block.conv2(nnx.relu(block.conv1(x if first else nnx.relu(x))))
        return block(x), half(y) + half(block.shortcut(x))

    for out, expected in jax.jit(lambda x: (up(x), down(x, True), down(x, False)))(x):
        # float32 rounding of sums of 27 products.
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(6, 6, 1), (18, 18, 1), (32, 64, 3)])
def test_sides_that_do_not_fit(shape):
    with pytest.raises(UserError, match="28 and 32 are possible"):
        shapes(shape)
    with pytest.raises(UserError, match="model.discriminator_blocks=1: must be at least 2"):
        shapes(discriminator_blocks=1)
