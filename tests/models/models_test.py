"""Every architecture: published parameter counts, stable names, shapes, gradients, errors."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_nets import layers, models, paths
from efficient_nets.errors import UserError
from efficient_nets.models import mobilenet, mobilenet_v2, resnet, resnext, squeezenet, vgg

QUADRATIC = dict(neuron="ours", norm="branch")
# Options that make each architecture small, the image it takes, and its quadratic layers.
SMALL = {
    "lenet": (dict(width=0.125), (9, 13, 1), "conv|hidden"),
    "vgg": (dict(layout="Q7", width=0.0625), (33, 47, 3), "conv"),
    "resnet": (dict(blocks=(1, 1, 1), width=0.25), (9, 13, 3), r"stage\d/.*/conv\d"),
    "mobilenet": (dict(layout="q8", width=0.0625), (17, 25, 3), "depthwise|pointwise"),
    "mobilenet_v2": (dict(layout="cifar", width=0.0625), (17, 25, 3), "depthwise|project"),
    "nin": (dict(width=0.03), (9, 13, 3), "blocks"),
    "resnext": (dict(depth=11, cardinality=2, base_width=8, width=0.125), (9, 13, 3), "conv2"),
    "squeezenet": (dict(width=0.125), (9, 13, 3), "expand3"),
    "pinet": (dict(form="ncp", degree=3, hidden=8), (5, 4, 3), "factors|states"),
    "pinet_resnet": (dict(blocks=(1, 1), width=0.0625), (9, 13, 3), r"stage\d/.*/conv\d"),
    "quadranet": (dict(depths=(1, 1, 1, 1), width=1 / 24), (9, 13, 3), "depthwise"),
    "tnn": (dict(depth=1), (5, 4, 3), "head"),
    "conv_tnn": (dict(width=0.125), (9, 13, 1), "conv"),
    "rnn": (dict(hidden=8), (5, 4, 3), "input"),
    "cells": (
        dict(nodes=1, layers=1, features=2, ops=("conv3", "identity"), arc="0 0 1 1 0 1 1 0"),
        (9, 13, 3),
        "op/conv",
    ),
}
# Two groups of blocks have all that more of them have.
SHORT_V2 = (1, ((1, 16, 1, 1), (6, 24, 2, 2)))
IMAGENET = dict(layout="imagenet", blocks=(1, 1, 1, 1), width=0.0625)


def build(name, image_shape=(32, 32, 3), num_classes=10, rules=(), **options):
    model = models.create(
        name, image_shape=image_shape, num_classes=num_classes, rngs=nnx.Rngs(0), **options
    )
    return layers.convert(model, rules, jax.random.key(1))


def shapes(*args, **kwargs):
    """`build` without arrays."""
    return nnx.eval_shape(lambda: build(*args, **kwargs))


def arrays(*args, **kwargs):
    """`build` with values from NumPy: compiling JAX's draws takes longer than the test."""
    graph, state = nnx.split(shapes(*args, **kwargs))
    draws = np.random.default_rng(0)

    def value(name, x):
        kind = name.split("/")[-1]
        if kind == "kernel":
            return draws.normal(0, np.sqrt(2 / np.prod(x.shape[:-1])), x.shape).astype(x.dtype)
        return np.full(x.shape, kind in ("scale", "var", "alpha"), x.dtype)

    values = paths.map_named(value, nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, values))
    return nnx.merge(graph, state)


def small(name, form, make):
    options, image_shape, pattern = SMALL[name]
    rules = [dict(match=pattern, **QUADRATIC)] if form == "quadratic" else []
    return make(name, image_shape, rules=rules, **options), image_shape


def count(*args, **kwargs):
    params = nnx.state(shapes(*args, **kwargs), nnx.Param)
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("params", "name", "options"),
    [
        (14_728_266, "vgg", dict(layout="D")),
        (9_416_010, "vgg", dict(layout="B")),
        (20_040_522, "vgg", dict(layout="E")),
        (12_304_330, "vgg", dict(layout="Q7", rules=[dict(match="conv", **QUADRATIC)])),
        (466_906, "resnet", dict(depth=32)),
        (
            518_938,
            "resnet",
            dict(blocks=(2, 2, 2), rules=[dict(match=r"stage\d/.*/conv\d", **QUADRATIC)]),
        ),
        (11_689_512, "resnet", dict(layout="imagenet", depth=18, num_classes=1000)),
        (21_797_672, "resnet", dict(layout="imagenet", depth=34, num_classes=1000)),
        (25_557_032, "resnet", dict(layout="imagenet", depth=50, num_classes=1000)),
        (44_549_160, "resnet", dict(layout="imagenet", depth=101, num_classes=1000)),
        (4_231_976, "mobilenet", dict(layout="v1", num_classes=1000)),
        (3_504_872, "mobilenet_v2", dict(num_classes=1000)),  # torchvision's
        (1_235_496, "squeezenet", dict(layout="imagenet", num_classes=1000)),  # torchvision's
        # The published 34.4M and 68.1M of arXiv 1611.05431, table 7.
        (34_426_698, "resnext", dict(depth=29, base_width=64)),
        (68_155_210, "resnext", dict(depth=29, base_width=64, cardinality=16)),
        (966_986 + 2_816, "nin", {}),  # arXiv 1312.4400's code, and the norms
        # 4,574,592 weights in convolutions, a dense layer of 8192 to 10, the norms.
        (4_574_592 + 81_930 + 3_584, "vgg", dict(layout="small")),
        (
            3_227_594,
            "mobilenet",
            dict(layout="q8", rules=[dict(match="depthwise|pointwise", **QUADRATIC)]),
        ),
    ],
)
def test_parameter_counts_are_the_published_ones(params, name, options):
    assert count(name, **options) == params


def test_lenet_counts_its_layers():
    expected = (25 + 1) * 32 + (25 * 32 + 1) * 64 + (7 * 7 * 64 + 1) * 128 + (128 + 1) * 10
    assert count("lenet", (28, 28, 1)) == expected


def test_vgg_11_counts_its_layers():
    """Layout A at 10 classes, which no table has: 3x3 kernels, a bias, a norm of two a conv."""
    channels = [3, 64, 128, 256, 256, 512, 512, 512, 512]
    convs = sum(9 * before * after + 3 * after for before, after in itertools.pairwise(channels))
    assert count("vgg", layout="A") == convs + (512 + 1) * 10


def test_names_of_layers_are_stable(monkeypatch):
    """Rules, checkpoints and configs depend on these names."""
    monkeypatch.setitem(mobilenet_v2.LAYOUTS, "cifar", SHORT_V2)
    monkeypatch.setattr(squeezenet, "FIRES", squeezenet.FIRES[1:3])
    basic = ["conv1", "conv2"]
    projected = [*basic, "shortcut"]
    expected = {
        "lenet": ["conv1", "conv2", "head", "hidden"],
        "vgg": [
            "head",
            *(f"stage{s}/{i}/conv" for s, n in enumerate((2, 2, 1, 1, 1), 1) for i in range(n)),
        ],
        "resnet": [
            "head",
            *(f"stage1/0/{name}" for name in basic),
            *(f"stage{s}/0/{name}" for s in (2, 3) for name in projected),
            "stem",
        ],
        "mobilenet": [
            *(f"blocks/{i}/{name}" for i in range(8) for name in ("depthwise", "pointwise")),
            *("head", "stem"),
        ],
        "mobilenet_v2": [
            *("blocks/0/depthwise", "blocks/0/project"),
            *(f"blocks/{i}/{n}" for i in (1, 2) for n in ("depthwise", "expand", "project")),
            *("head", "last", "stem"),
        ],
        "nin": [*(f"blocks/{i}/conv" for i in range(7)), "head", "stem"],
        "resnext": [
            "head",
            *(f"stage{s}/0/{n}" for s in (1, 2, 3) for n in (*basic, "conv3", "shortcut")),
            "stem",
        ],
        "squeezenet": [
            *(f"blocks/{i}/{n}" for i in (0, 1) for n in ("expand1", "expand3", "squeeze")),
            *("head", "stem"),
        ],
        "pinet": [*(f"factors/{i}" for i in range(3)), "head", "states/0", "states/1"],
        "pinet_resnet": [
            "head",
            *(f"stage{s}/0/{name}" for s in (1, 2) for name in projected),
            "stem",
        ],
        "quadranet": [
            *("down2", "down3", "down4", "head"),
            *(f"stage{s}/0/{n}" for s in (1, 2, 3, 4) for n in ("depthwise", "expand", "project")),
            "stem",
        ],
        "tnn": ["head"],
        "conv_tnn": ["conv1", "conv2", "head"],
        "rnn": ["cells/0/hidden", "cells/0/input", "head"],
        "cells": [
            *(
                f"cells/{i}/{name}"
                for i in (0, 1)
                for name in ("end0", "first/conv1", "first/conv2", "nodes/0/y/op/conv")
                + ("reduce/conv1", "reduce/conv2")
            ),
            *("cells/2/end0", "cells/2/nodes/0/x/op/conv", "head", "stem"),
        ],
    }
    for name, (options, image_shape, _) in SMALL.items():
        model = shapes(name, image_shape, **options)
        assert sorted(path for path, _ in layers.layers(model)) == expected[name]


def test_names_of_parameters_are_stable():
    params = nnx.to_pure_dict(nnx.state(shapes("resnet", blocks=(1, 1, 1)), nnx.Param))
    names = set(paths.named_leaves(params))
    assert {"stem/w/kernel", "stem_norm/scale", "head/w/bias"} <= names
    block = {name.removeprefix("stage2/0/") for name in names if name.startswith("stage2/0/")}
    assert block == {
        *("conv1/w/kernel", "conv2/w/kernel", "shortcut/w/kernel"),
        *(f"{n}/{p}" for n in ("norm1", "norm2", "shortcut_norm") for p in ("scale", "bias")),
    }


@pytest.mark.parametrize("form", ["linear", "quadratic"])
@pytest.mark.parametrize("name", SMALL)
def test_logits_follow_the_input_and_gradients_reach_every_parameter(name, form, monkeypatch):
    # Two stages or blocks have all that more of them have.
    monkeypatch.setitem(vgg.LAYOUTS, "Q7", ((64,), (128,)))
    monkeypatch.setitem(mobilenet.LAYOUTS, "q8", ((64, 1), (128, 2)))
    monkeypatch.setitem(mobilenet_v2.LAYOUTS, "cifar", SHORT_V2)
    monkeypatch.setattr(squeezenet, "FIRES", squeezenet.FIRES[1:3])
    monkeypatch.setattr(resnext, "STAGES", 2)
    model, image_shape = small(name, form, arrays)
    graph, params, stats = nnx.split(model, nnx.Param, ...)
    images = jax.random.normal(jax.random.key(2), (8, *image_shape))
    weights = jax.random.normal(jax.random.key(3), (8, 10))

    @jax.jit
    @jax.value_and_grad
    def value_and_grad(params, images):
        logits = nnx.merge(graph, params, stats, copy=True)(images)
        assert logits.shape == (8, 10)
        return jnp.sum(jax.nn.log_softmax(logits) * weights)

    value, gradient = value_and_grad(params, images)
    assert value != value_and_grad(params, jnp.flip(images, 1))[0]
    # A batch norm takes the mean away: the gradient of a bias before it is 0, but for rounding.
    before_norm = r"/[abc]/bias" if form == "quadratic" else r"\d/conv/w/bias"
    if name == "nin":
        before_norm += "|stem/w/bias"
    for path, leaf in paths.named_leaves(nnx.to_pure_dict(gradient)).items():
        assert np.all(np.isfinite(leaf)), path
        if re.search(before_norm, path) is None:
            assert np.any(leaf), path


@pytest.mark.parametrize("name", SMALL)
def test_bfloat16_products_give_bfloat16_logits(name):
    model, image_shape = small(name, "quadratic", shapes)
    model = layers.set_compute_dtype(model, jnp.bfloat16)
    logits = nnx.eval_shape(lambda m, x: m(x), model, jnp.zeros((2, *image_shape)))
    assert (logits.shape, logits.dtype) == ((2, 10), jnp.bfloat16)


@pytest.mark.parametrize(
    ("name", "options", "sizes"),
    [
        ("vgg", SMALL["vgg"][0], [(32, 32), (64, 95)]),
        ("resnet", SMALL["resnet"][0], [(1, 1), (8, 8), (31, 64)]),
        ("resnet", IMAGENET, [(8, 8), (64, 97)]),
        ("mobilenet", SMALL["mobilenet"][0], [(1, 1), (8, 8), (64, 97)]),
        ("mobilenet_v2", SMALL["mobilenet_v2"][0], [(1, 1), (8, 8), (64, 97)]),
        ("nin", SMALL["nin"][0], [(1, 1), (8, 8), (64, 97)]),
        ("resnext", SMALL["resnext"][0], [(1, 1), (8, 8), (31, 64)]),
        ("squeezenet", SMALL["squeezenet"][0], [(1, 1), (8, 8), (31, 64)]),
        ("pinet_resnet", SMALL["pinet_resnet"][0], [(1, 1), (8, 8), (31, 64)]),
        ("quadranet", SMALL["quadranet"][0], [(1, 1), (8, 8), (64, 97)]),
    ],
)
def test_a_model_takes_images_of_other_sizes(name, options, sizes):
    model = shapes(name, (64, 64, 3), **options)
    for size in sizes:
        logits = nnx.eval_shape(lambda m, x: m(x), model, jnp.zeros((3, *size, 3)))
        assert logits.shape == (3, 10)


@pytest.mark.parametrize(
    "name", [*(n for n in SMALL if n not in ("pinet", "tnn", "rnn")), "imagenet"]
)
def test_convolutions_pad_half_the_kernel_on_both_sides(name):
    options, image_shape, _ = SMALL.get(name, (IMAGENET, (64, 64, 3), ""))
    model = shapes("resnet" if name == "imagenet" else name, image_shape, **options)
    convs = [layer for _, layer in layers.layers(model) if isinstance(layer, layers.Conv)]
    assert convs
    for conv in convs:
        window = conv.geometry.kernel_size
        if window == conv.geometry.strides != (1, 1):  # patches: no more than it takes to fill them
            assert conv.linear_map.padding == "SAME"
        else:
            assert conv.linear_map.padding == tuple((k // 2, k // 2) for k in window)


def test_initial_kernels_have_the_papers_scale():
    model = build("lenet", (28, 28, 1))
    # The standard deviation of n draws is off by 1 / sqrt(2 n): 2.5%, 0.3%, 0.1% and 2% here.
    for layer, expected, rtol in (
        (model.conv1, np.sqrt(2 / 25), 0.1),
        (model.conv2, np.sqrt(2 / (25 * 32)), 0.012),
        (model.hidden, np.sqrt(2 / 3136), 0.004),
        (model.head, 0.01, 0.08),
    ):
        np.testing.assert_allclose(np.std(layer.w.kernel[...]), expected, rtol=rtol)


def test_basic_block_is_its_formula():
    def both(x):
        block = resnet.BasicBlock(4, 8, 2, rngs=nnx.Rngs(0))
        block.eval()
        main = block.norm2(block.conv2(nnx.relu(block.norm1(block.conv1(x)))))
        return block(x), nnx.relu(main + block.shortcut_norm(block.shortcut(x)))

    out, expected = jax.jit(both)(jax.random.normal(jax.random.key(0), (2, 6, 6, 4)))
    # float32 rounding of sums of 72 products.
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "last"),
    [(dict(blocks=(1, 1, 1)), "norm2"), (dict(layout="imagenet", depth=50), "norm3")],
)
def test_zero_init_gamma_starts_blocks_as_their_shortcut(options, last, monkeypatch):
    monkeypatch.setitem(resnet.IMAGENET_BLOCKS, 50, (1, 1, 1, 1))

    def zero_scales(**more):
        model = build("resnet", **options, **more, width=0.01)  # one channel: few shapes
        leaves = paths.named_leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
        scales = [name for name in leaves if name.endswith("scale")]
        return {name for name in scales if not np.any(leaves[name])}, scales

    assert zero_scales()[0] == set()
    zero, scales = zero_scales(zero_init_gamma=True)
    assert zero == {name for name in scales if name.endswith(f"{last}/scale")} != set()


def test_stem_stride_of_mobilenet_follows_the_image():
    def stride(size, **options):
        return shapes("mobilenet", (size, size, 3), **options).stem.geometry.strides

    assert (stride(64), stride(65)) == ((1, 1), (2, 2))
    assert (stride(64, stem_strides=2), stride(65, stem_strides=1)) == ((2, 2), (1, 1))


@pytest.mark.parametrize("name", models.MODELS)
def test_options_are_what_a_config_can_hold(name):
    options = models.options(name)
    assert options["width"] == 1.0
    assert all(isinstance(value, int | float | bool | str | tuple) for value in options.values())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnett", {}, r"model\.name='resnett' is not known.*did you mean 'resnet'"),
        ("resnet", dict(dept=20), r"model has no field 'dept'.*did you mean 'depth'"),
        ("resnet", {}, r"model\.depth=0 and model\.blocks=\(\): give one"),
        ("resnet", dict(depth=20, blocks=(1, 1, 1)), r"model\.depth=20 and model\.blocks="),
        ("resnet", dict(depth=21), r"model\.depth=21: allowed .* 6n \+ 2"),
        ("resnet", dict(depth=2), r"model\.depth=2: allowed"),
        ("resnet", dict(layout="imagenet", depth=20), r"model\.depth=20: allowed .* 18, 34, 50"),
        ("resnet", dict(blocks=(1, 1)), r"model\.blocks=\(1, 1\): layout 'cifar' needs 3"),
        ("resnet", dict(blocks=(1, 0, 1)), r"model\.blocks=\(1, 0, 1\)"),
        ("resnet", dict(layout="cifra", depth=20), r"model\.layout='cifra'.*mean 'cifar'"),
        ("resnet", dict(depth=20, width=0.0), r"model\.width=0\.0: must be above 0"),
        ("vgg", dict(layout="C"), r"model\.layout='C' is not known: allowed A, B, D, E, Q7"),
        ("vgg", dict(image_shape=(28, 28, 1)), r"image_shape=\(28, 28, 1\).* at least 32"),
        ("lenet", dict(image_shape=(3, 8, 1)), r"image_shape=\(3, 8, 1\).* at least 4"),
        ("lenet", dict(image_shape=(28, 28)), r"image_shape=\(28, 28\): give \(height"),
        ("lenet", dict(num_classes=0), r"num_classes=0: must be at least 1"),
        ("mobilenet", dict(stem_strides=3), r"model\.stem_strides=3: allowed 0"),
        ("resnext", dict(depth=21), r"model\.depth=21: allowed 11, 20, 29, .*9n \+ 2"),
        ("resnext", dict(cardinality=0), r"model\.cardinality=0: must be at least 1"),
        ("resnext", dict(base_width=0), r"model\.base_width=0: must be at least 1"),
        ("resnext", dict(downsample="pool"), r"model\.downsample='pool'.*allowed maxpool, stride"),
        (
            "resnext",
            dict(downsample="maxpool", image_shape=(3, 8, 3)),
            r"image_shape=\(3, 8, 3\).* at least 4",
        ),
        ("squeezenet", dict(layout="cifra"), r"model\.layout='cifra'.*mean 'cifar'"),
        ("squeezenet", dict(norm="btach"), r"model\.norm='btach'.*mean 'batch'"),
        ("mobilenet", dict(layout="q9"), r"model\.layout='q9' is not known: allowed q8, v1"),
    ],
)
def test_bad_input_is_named(name, options, message):
    with pytest.raises(UserError, match=message):
        build(name, **options)
