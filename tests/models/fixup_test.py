"""Fixup: how it starts, its formula, its numbers before and behind convolutions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_nets import layers, models, paths
from efficient_nets.models import residual

STYLE = residual.Style(norm="fixup", depth=16)


@pytest.mark.parametrize("make", [residual.BasicBlock, residual.Bottleneck])
def test_a_block_starts_as_its_shortcut(make):
    width = 8 // make.expansion
    block = make(8, width, 1, style=STYLE, rngs=nnx.Rngs(0))
    x = nnx.relu(jax.random.normal(jax.random.key(0), (2, 5, 5, 8)))
    np.testing.assert_array_equal(block(x), x)  # what it reads is activated
    block = make(8, 2 * width, 2, style=STYLE, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(block(x), nnx.relu(block.shortcut(x)))


@pytest.mark.parametrize(
    ("make", "first", "last"), [(residual.BasicBlock, 1, 2), (residual.Bottleneck, 2, 3)]
)
def test_kernels_are_scaled_as_the_paper_says(make, first, last):
    block = make(256, 256 // make.expansion, 1, style=STYLE, rngs=nnx.Rngs(0))
    for number in range(1, first + 1):
        kernel = getattr(block, f"conv{number}").w.kernel[...]
        he = np.sqrt(2 / np.prod(kernel.shape[:-1]))
        # L^(-1/(2m - 2)), m convolutions. Of 16384 draws and more, off by 0.6% and less.
        np.testing.assert_allclose(np.std(kernel), he * 16 ** (-1 / (2 * last - 2)), rtol=0.03)
    assert not np.any(getattr(block, f"conv{last}").w.kernel[...])


def numbers(module):
    return {
        name: leaf
        for name, leaf in paths.named_leaves(nnx.to_pure_dict(nnx.state(module, nnx.Param))).items()
        if not name.endswith("kernel")
    }


@pytest.mark.parametrize("strides", [1, 2])
def test_a_block_is_its_formula(strides):
    """The rules of arXiv 1901.09321, and the authors' shortcut, which reads x + shift1."""
    block = residual.BasicBlock(4, 4, strides, style=STYLE, rngs=nnx.Rngs(0))
    values = dict(
        zip(
            ("shift1", "norm1", "shift2", "norm2"),
            np.float32([0.1, -0.2, 0.3, -0.4]),
            strict=True,
        )
    )
    assert sorted(numbers(block)) == sorted([f"{n}/bias" for n in values] + ["norm2/scale"])
    for name, value in values.items():
        getattr(block, name).bias[...] = jnp.asarray(value)
    block.norm2.scale[...] = jnp.asarray(1.5)
    kernel = jax.random.normal(jax.random.key(1), block.conv2.w.kernel.shape)
    block.conv2.w.kernel[...] = kernel

    x = jax.random.normal(jax.random.key(0), (2, 5, 6, 4))
    y = block.conv1(x + values["shift1"]) + values["norm1"]
    y = 1.5 * block.conv2(nnx.relu(y) + values["shift2"]) + values["norm2"]
    shortcut = block.shortcut(x + values["shift1"]) if strides == 2 else x
    # float32 rounding of sums of 36 products.
    np.testing.assert_allclose(block(x), nnx.relu(y + shortcut), rtol=1e-5, atol=1e-5)


def test_a_net_has_no_norms_and_starts_with_logits_of_0():
    model = models.create(
        "resnet",
        image_shape=(8, 8, 3),
        num_classes=5,
        rngs=nnx.Rngs(0),
        blocks=(1, 2, 1),
        width=0.25,
        norm="fixup",
    )
    assert not [node for _, node in nnx.iter_graph(model) if isinstance(node, layers.BatchNorm)]
    assert model.stage1[0].style.depth == 4
    # Five a block; stem, before the head, and the head's five.
    assert sum(leaf.size for leaf in numbers(model).values()) == 4 * 5 + 1 + 1 + 5
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    np.testing.assert_array_equal(model(x), 0)
    model.head.w.kernel[...] = jnp.ones_like(model.head.w.kernel[...])
    assert jnp.any(model(x))
