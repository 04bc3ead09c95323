"""Nets other than ResNet against their published layer lists."""

import jax
import numpy as np
import pytest
from flax import nnx

from efficient_nets import layers, models
from efficient_nets.models import mobilenet_v2, squeezenet
from tests.models import published


@pytest.mark.parametrize(("name", "layout", "side"), published.OTHERS)
def test_a_net_has_its_published_layers(name, layout, side):
    options = dict(layout=layout) if layout else {}
    shape = (side, side, 3)
    model = nnx.eval_shape(
        lambda: models.create(name, image_shape=shape, num_classes=10, rngs=nnx.Rngs(0), **options)
    )
    assert published.traced(model, shape) == published.OTHERS[name, layout, side]


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_a_fire_module_is_its_formula(norm):
    block = squeezenet.Fire(4, 2, 3, norm=norm == "batch", rngs=nnx.Rngs(0))
    block.eval()
    x = jax.random.normal(jax.random.key(0), (2, 5, 5, 4))

    def unit(name, x):
        y, norm = getattr(block, name)(x), getattr(block, f"{name}_norm")
        return nnx.relu(y if norm is None else norm(y))

    y = unit("squeeze", x)
    expected = np.concatenate([unit("expand1", y), unit("expand3", y)], axis=-1)
    # float32 rounding of sums of 18 products.
    np.testing.assert_allclose(block(x), expected, rtol=1e-5, atol=1e-6)


def test_only_the_3x3_convolutions_of_resnext_have_groups():
    model = nnx.eval_shape(
        lambda: models.create("resnext", image_shape=(32, 32, 3), num_classes=10, rngs=nnx.Rngs(0))
    )
    found = {path: layer.geometry.groups for path, layer in layers.layers(model) if path != "head"}
    assert {path for path, groups in found.items() if groups == 8} == {
        path for path in found if path.endswith("conv2")
    }
    assert set(found.values()) == {1, 8}


# Nets of arXiv 2002.10711 that are not ResNet-18, with the rules of their tiled convolutions.
TILED = {
    "lenet": (dict(width=0.125), (9, 13, 1), "^conv"),  # F(4, 5)
    "resnext": (dict(depth=11, base_width=8, cardinality=2, width=0.125), (9, 13, 3), "conv2$"),
    "squeezenet": (dict(width=0.125), (9, 13, 3), "expand3$"),
}


@pytest.mark.parametrize("name", TILED)
def test_winograd_s_algorithm_gives_the_same_net(name, monkeypatch):
    monkeypatch.setattr(squeezenet, "FIRES", squeezenet.FIRES[1:3])
    options, shape, match = TILED[name]
    model = models.create(name, image_shape=shape, num_classes=5, rngs=nnx.Rngs(0), **options)
    rules = [dict(match=match, algorithm="winograd:4")]
    tiled = layers.convert(model, rules, jax.random.key(0))
    algorithms = [str(layer.spec.algorithm) for _, layer in layers.layers(tiled)]
    assert "winograd:4" in algorithms and "direct" in algorithms
    x = jax.random.normal(jax.random.key(1), (2, *shape))
    model.eval()
    tiled.eval()
    expected, found = jax.jit(lambda x: (model(x), tiled(x)))(x)
    # float32 rounding, which F(4, 5) makes some 100 times as large (`transforms.amplification`).
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


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
