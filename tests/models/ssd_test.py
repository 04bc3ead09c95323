"""SSD: published sizes, names, axes of its layers, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_nets import layers, models, recipes
from efficient_nets.errors import UserError
from efficient_nets.models.ssd import L2Norm

TINY = dict(backbone="vgg", layout="Q7", width=1 / 64, first_stride=4)


def build(side=32, num_classes=3, **options):
    return models.create(
        "ssd",
        image_shape=(side, side, 3),
        num_classes=num_classes,
        rngs=nnx.Rngs(0),
        **(options or TINY),
    )


def outputs(model, side, batch=2):
    images = jax.ShapeDtypeStruct((batch, side, side, 3), jnp.float32)
    return nnx.eval_shape(lambda model, x: model(x), model, images)


def count(model):
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


def test_ssd300_on_vgg16():
    model = nnx.eval_shape(lambda: build(300, 20, backbone="vgg"))
    found = outputs(model, 300)
    assert [x.shape for x in found] == [(2, 8732, 21), (2, 8732, 4), (8732, 4)]
    norms = sum(
        count(node) for _, node in nnx.iter_graph(model) if isinstance(node, layers.BatchNorm)
    )
    # 26,285,486 is what open SSD300s have, which have no norms.
    assert count(model) - norms == 26_285_486


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "sides"),
    [
        (dict(backbone="resnet", depth=18), (38, 19, 10, 5, 3, 1)),
        (dict(backbone="mobilenet", first_stride=16), (19, 10, 5, 3, 1)),
    ],
)
def test_maps_of_other_backbones(options, sides):
    model = nnx.eval_shape(lambda: build(300, 20, width=1 / 16, **options))
    priors = outputs(model, 300).priors
    per_pixel = model.priors.counts
    total = sum(n * side**2 for n, side in zip(per_pixel, sides, strict=True))
    assert priors.shape == (total, 4)
    assert {path for path, _ in layers.layers(model)} >= {"class_heads/0", "box_heads/4"}


def test_l2_norm():
    x = np.random.default_rng(0).normal(size=(2, 1, 3, 5)).astype(np.float32)
    norm = L2Norm(5, rngs=nnx.Rngs(0))
    assert norm.scale[...].tolist() == [20.0] * 5
    norm.scale[...] = np.arange(1, 6, dtype=np.float32)
    length = np.sqrt(np.sum(np.float64(x) ** 2, -1, keepdims=True))
    np.testing.assert_allclose(jax.jit(norm)(x), np.arange(1, 6) * x / length, rtol=1e-5)


def test_rules_reach_every_layer_and_leave_the_heads():
    model = nnx.eval_shape(build)

    def changed(rules, axis):
        converted = nnx.eval_shape(lambda: layers.convert(build(), rules, jax.random.key(1)))
        plain = {path: getattr(layer.spec, axis) for path, layer in layers.layers(model)}
        new = {path: getattr(layer.spec, axis) for path, layer in layers.layers(converted)}
        return {path for path in new if new[path] != plain[path]}

    every = {path for path, _ in layers.layers(model)}
    heads = {path for path in every if "heads" in path}
    levels = {path for path in every if path.startswith("levels")}
    quadratic = changed([dict(recipes.QUADRATIC_DETECTOR)], "neuron")
    assert quadratic == every - heads - levels
    rounded = changed(recipes.quantized("lsq:w4a4"), "precision")
    assert rounded == every - heads - {"backbone/stage1/0/conv"}


@pytest.mark.slow
def test_winograd_s_detector_is_the_direct_one():
    model = build()
    tiled = layers.convert(
        model, [dict(match=r"^backbone/.*/conv$", algorithm="winograd:2")], jax.random.key(1)
    )
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    model.eval()
    tiled.eval()
    for found, expected in zip(jax.jit(tiled)(images), jax.jit(model)(images), strict=True):
        # float32: a tile's sums have numbers of several times the size, in each of eight layers.
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(backbone="lenet"), r"model\.backbone='lenet'.*allowed mobilenet, resnet, vgg"),
        (dict(backbone="vgg", depth=18), r"model\.depth=18: 'vgg' has no such option"),
        (dict(backbone="vgg", first_stride=32), r"model\.first_stride=32: 'vgg' has \[1, 2, 4, 8"),
        (dict(backbone="vgg", scales=(0.1,)), r"model\.scales=\(0\.1,\).* each of the 2 maps"),
    ],
)
def test_bad_input_is_named(options, message):
    with pytest.raises(UserError, match=message):
        nnx.eval_shape(lambda: build(**options))
