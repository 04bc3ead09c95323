"""Nets other than ResNet against their published layer lists."""

import jax
import numpy as np
import pytest
from flax import nnx

from efficient_nets import models
from efficient_nets.models import mobilenet_v2
from tests.models import published


@pytest.mark.parametrize(("name", "layout", "side"), published.OTHERS)
def test_a_net_has_its_published_layers(name, layout, side):
    options = dict(layout=layout) if layout else {}
    shape = (side, side, 3)
    model = nnx.eval_shape(
        lambda: models.create(name, image_shape=shape, num_classes=10, rngs=nnx.Rngs(0), **options)
    )
    assert published.traced(model, shape) == published.OTHERS[name, layout, side]


@pytest.mark.parametrize(("strides", "features"), [(1, 4), (1, 6), (2, 4)])
def test_an_inverted_residual_is_its_formula(strides, features):
    shape = (4, features, strides)
    block = mobilenet_v2.InvertedResidual(*shape, expansion=3, rngs=nnx.Rngs(0))
    block.eval()
    x = 9 * jax.random.normal(jax.random.key(0), (2, 5, 5, 4))  # some of it is cut off at 6
    y = nnx.relu6(block.expand_norm(block.expand(x)))
    assert y.max() == 6
    y = nnx.relu6(block.depthwise_norm(block.depthwise(y)))
    y = block.project_norm(block.project(y))
    # float32 rounding of sums of 12 products.
    expected = x + y if (strides, features) == (1, 4) else y
    np.testing.assert_allclose(block(x), expected, rtol=1e-5, atol=1e-5)
