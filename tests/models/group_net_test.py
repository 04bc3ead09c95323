"""Group-Net: one base is the block; several are the paper's sums, with and without gates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_nets import models
from efficient_nets.models.group_net import Group
from efficient_nets.models.residual import BasicBlock

TINY = dict(blocks=(1, 1, 1), width=0.25)


def block(rngs):
    return BasicBlock(4, 4, 1, rngs=rngs)


def image():
    return jax.random.normal(jax.random.key(0), (2, 5, 5, 4))


@pytest.mark.parametrize("gated", [False, True])
def test_one_base_is_the_plain_block(gated):
    group = Group(block, 1, gated=gated, rngs=nnx.Rngs(0))
    plain = block(nnx.Rngs(0))
    (y,) = group((image(),))
    # sigmoid(0) y + (1 - sigmoid(0)) y, both 1/2, is y exactly.
    np.testing.assert_array_equal(y, plain(image()))


def test_gates_choose_between_a_branch_and_the_sum():
    group = Group(block, 3, gated=True, rngs=nnx.Rngs(0))
    group.eval()
    group.scale[...] = jnp.asarray([0.5, -1.0, 2.0])
    group.gate[...] = jnp.asarray([0.0, 40.0, -40.0])  # half, its own branch, the sum
    reads = tuple(image() + k for k in range(3))
    outputs = [base(x) for base, x in zip(group.bases, reads, strict=True)]
    total = 0.5 * outputs[0] - outputs[1] + 2 * outputs[2]
    found = group(reads)
    # float32 rounding of three terms.
    for y, expected in zip(found, ((outputs[0] + total) / 2, outputs[1], total), strict=True):
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    group.gate = None
    for y in group(reads):
        np.testing.assert_allclose(y, total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gates", [False, True])
def test_a_net_of_groups_is_its_plain_composition(gates):
    model = models.create(
        "resnet",
        image_shape=(8, 8, 3),
        num_classes=5,
        rngs=nnx.Rngs(0),
        bases=2,
        soft_gates=gates,
        **TINY,
    )
    model.eval()
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    y = nnx.relu(model.stem_norm(model.stem(x)))
    reads = [y, y]
    for stage in (model.stage1, model.stage2, model.stage3):
        outputs = [base(x) for base, x in zip(stage[0].bases, reads, strict=True)]
        total = (outputs[0] + outputs[1]) / 2
        reads = [(y + total) / 2 if gates else total for y in outputs]
    expected = model.head(total.mean((1, 2)))
    np.testing.assert_allclose(model(x), expected, rtol=1e-4, atol=1e-6)
    gated = [stage[0].gate is not None for stage in (model.stage1, model.stage2, model.stage3)]
    assert gated == [gates, gates, False]
