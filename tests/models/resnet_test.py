"""ResNet's options: block orders against a plain composition, presets against layer lists."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_nets import layers, models, paths
from efficient_nets.errors import UserError
from efficient_nets.models import parts, residual, resnet
from tests.models import published

TINY = dict(blocks=(1, 1, 1), width=0.25)


def shapes(image_shape=(32, 32, 3), classes=10, **options):
    return nnx.eval_shape(
        lambda: models.create(
            "resnet", image_shape=image_shape, num_classes=classes, rngs=nnx.Rngs(0), **options
        )
    )


def count(model):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def drawn(make, seed=0):
    """A module in evaluation mode whose every array is drawn."""
    graph, state = nnx.split(nnx.eval_shape(make))
    draws = np.random.default_rng(seed)

    def value(x):
        # Positive as variances must be; kernels as large as their sums allow.
        return jnp.asarray(draws.uniform(0.1, 1, x.shape) / max(np.prod(x.shape[:-1]), 1), x.dtype)

    module = nnx.merge(graph, jax.tree.map(value, state))
    module.eval()
    return module


# (skip, order) to the block `conv1, norm1, conv2, norm2` as a plain composition; s its shortcut.
BLOCKS = {
    ("block", "cbsa"): lambda c1, n1, c2, n2, a, x, s: a(n2(c2(a(n1(c1(x))))) + s(x)),
    ("block", "cbas"): lambda c1, n1, c2, n2, a, x, s: a(n2(c2(a(n1(c1(x)))))) + s(x),
    ("block", "cabs"): lambda c1, n1, c2, n2, a, x, s: n2(a(c2(n1(a(c1(x)))))) + s(x),
    ("block", "bacs"): lambda c1, n1, c2, n2, a, x, s: c2(a(n2(c1(a(n1(x)))))) + s(x),
    ("block", "bcas"): lambda c1, n1, c2, n2, a, x, s: a(c2(n2(a(c1(n1(x)))))) + s(x),
    ("conv", "cbsa"): lambda c1, n1, c2, n2, a, x, s: (lambda y: a(n2(c2(y)) + y))(
        a(n1(c1(x)) + s(x))
    ),
    ("conv", "cbas"): lambda c1, n1, c2, n2, a, x, s: (lambda y: a(n2(c2(y))) + y)(
        a(n1(c1(x))) + s(x)
    ),
    ("conv", "cabs"): lambda c1, n1, c2, n2, a, x, s: (lambda y: n2(a(c2(y))) + y)(
        n1(a(c1(x))) + s(x)
    ),
    ("conv", "bacs"): lambda c1, n1, c2, n2, a, x, s: (lambda y: c2(a(n2(y))) + y)(
        c1(a(n1(x))) + s(x)
    ),
    ("conv", "bcas"): lambda c1, n1, c2, n2, a, x, s: (lambda y: a(c2(n2(y))) + y)(
        a(c1(n1(x))) + s(x)
    ),
}


@pytest.mark.parametrize(("skip", "order"), BLOCKS)
def test_a_block_is_its_plain_composition(skip, order, x64):
    style = residual.Style(order=order, skip=skip, activation="tanh")
    block = drawn(lambda: residual.BasicBlock(4, 6, 2, style=style, rngs=nnx.Rngs(0)))

    def shortcut(x):
        y = block.shortcut(x)
        return y if order[0] == "b" else block.shortcut_norm(y)

    x = jax.random.normal(jax.random.key(0), (2, 5, 6, 4), jnp.float32)
    called = (block.conv1, block.norm1, block.conv2, block.norm2, jnp.tanh, x, shortcut)
    expected = BLOCKS[skip, order](*called)
    assert expected.shape == (2, 3, 3, 6)
    # float32 rounding of sums of 54 products.
    np.testing.assert_allclose(block(x), expected, rtol=2e-5, atol=1e-6)


def test_every_order_and_skip_is_compared():
    assert set(BLOCKS) == set(itertools.product(residual.SKIPS, residual.ORDERS))


@pytest.mark.parametrize(
    ("order", "inner", "last"),
    [
        ("cbsa", ["cba"], ["cb", "s", "a"]),
        ("cbas", ["cba"], ["cba", "s"]),
        ("cabs", ["ca", "b"], ["ca", "b", "s"]),
        ("bacs", ["b", "a", "c"], ["b", "a", "c", "s"]),
        ("bcas", ["b", "ca"], ["b", "ca", "s"]),
    ],
)
def test_what_adjoins_is_one_unit(order, inner, last):
    """The hybrid backward keeps a unit's input alone, so norm and activation must be in it."""
    style = residual.Style(order=order)
    assert (style.steps(False), style.steps(True)) == (inner, last)


@pytest.mark.parametrize("order", residual.ORDERS)
def test_a_convolution_that_is_removed_takes_its_norm_along(order):
    style = residual.Style(order=order)
    rules = [dict(match="conv2", remove=True)]
    made = residual.BasicBlock(4, 4, 1, style=style, rngs=nnx.Rngs(0))
    block = layers.convert(made, rules, jax.random.key(0))
    block.eval()
    x = jax.random.normal(jax.random.key(0), (2, 5, 5, 4))
    c, n, a = block.conv1, block.norm1, nnx.relu
    expected = {
        "cbsa": lambda: a(a(n(c(x))) + x),
        "cbas": lambda: a(n(c(x))) + x,
        "cabs": lambda: n(a(c(x))) + x,
        "bacs": lambda: a(c(a(n(x)))) + x,  # what is in front of it stays
        "bcas": lambda: a(c(n(x))) + x,
    }[order]()
    np.testing.assert_allclose(block(x), expected, rtol=1e-5, atol=1e-5)  # float32 rounding


def test_shortcuts_are_their_formulas():
    x = jnp.arange(2 * 5 * 3 * 2, dtype=jnp.float32).reshape(2, 5, 3, 2)

    def block(kind):
        style = residual.Style(shortcut=kind)
        return drawn(lambda: residual.BasicBlock(2, 5, 2, style=style, rngs=nnx.Rngs(0)))

    pad = block("pad")
    assert not hasattr(pad, "shortcut")
    padded = np.zeros((2, 3, 2, 5), np.float32)
    padded[..., 1:3] = x[:, ::2, ::2]
    np.testing.assert_array_equal(pad.carry(x), padded)

    pool = block("pool")
    means = np.zeros((2, 3, 2, 2))
    for i, j in np.ndindex(3, 2):
        means[:, i, j] = x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((1, 2))
    mapped = pool.shortcut_norm(jnp.asarray(means @ pool.shortcut.w.kernel[0, 0], jnp.float32))
    np.testing.assert_allclose(pool.carry(x), mapped, rtol=1e-5)

    conv = block("conv")
    mapped = conv.shortcut_norm(x[:, ::2, ::2] @ conv.shortcut.w.kernel[0, 0])
    np.testing.assert_allclose(conv.carry(x), mapped, rtol=1e-5)


@pytest.mark.parametrize("order", residual.ORDERS)
def test_prelu_stands_where_a_function_would(order):
    """With slopes of 0.01 it is 'leaky', in the stem and in every unit."""
    models_ = [shapes(**TINY, order=order, activation=name) for name in ("prelu", "leaky")]
    made = [drawn(lambda model=model: model) for model in models_]
    slopes = {
        "/".join(map(str, path)): node
        for path, node in nnx.iter_graph(made[0])
        if isinstance(node, parts.PReLU)
    }
    assert len(slopes) == 1 + 3 * 2
    for slope in slopes.values():
        slope.slope[...] = jnp.full_like(slope.slope[...], 0.01)
    # The other arrays by name: the draws went in another order.
    given = nnx.to_pure_dict(nnx.state(made[0]))
    state = nnx.state(made[1])
    nnx.replace_by_pure_dict(state, _shared(given, nnx.to_pure_dict(state)))
    nnx.update(made[1], state)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    np.testing.assert_allclose(made[0](x), made[1](x), rtol=1e-5, atol=1e-6)


def _shared(given, wanted):
    if not isinstance(wanted, dict):
        return given
    return {name: _shared(given[name], value) for name, value in wanted.items()}


def test_prelu_is_its_formula():
    prelu = parts.PReLU(2, rngs=nnx.Rngs(0))
    x = jnp.asarray([[-2.0, 4.0], [3.0, -8.0]])
    np.testing.assert_array_equal(prelu(x), [[-0.5, 4.0], [3.0, -2.0]])
    prelu.slope[...] = jnp.asarray([0.5, 2.0])
    np.testing.assert_array_equal(prelu(x), [[-1.0, 4.0], [3.0, -16.0]])


@pytest.mark.parametrize(
    "options",
    [
        *(dict(order=order, pre_norm=True) for order in residual.ORDERS),
        *(dict(norm=norm) for norm in residual.NORMS),
        *(dict(shortcut=shortcut, activation="prelu") for shortcut in residual.SHORTCUTS),
        dict(bases=2, soft_gates=True),
        dict(stem="s2d"),
    ],
)
def test_bfloat16_stays_and_gradients_reach_every_parameter(options):
    model = shapes((8, 8, 3), **TINY, **options)
    model = drawn(lambda: layers.set_compute_dtype(model, jnp.bfloat16))
    model.train()
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def gradient(params, images):
        def loss(params):
            logits = nnx.merge(graph, params, rest, copy=True)(images)
            assert (logits.shape, logits.dtype) == ((4, 10), jnp.bfloat16)
            weights = jnp.arange(40, dtype=logits.dtype).reshape(4, 10) - 7
            return jnp.sum(logits * weights)

        return jax.grad(loss)(params)

    found = gradient(params, jax.random.normal(jax.random.key(0), (4, 8, 8, 3)))
    for path, leaf in paths.named_leaves(nnx.to_pure_dict(found)).items():
        still = options.get("norm") == "frozen" and re.search("norm.*/(scale|bias)$", path)
        assert np.all(np.isfinite(leaf)) and np.any(leaf) != bool(still), path


def test_pre_norm_moves_the_stems_norm_and_activation_behind_the_blocks():
    model = drawn(lambda: shapes(**TINY, order="bacs", pre_norm=True))
    assert model.stem_norm is None
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    y = model.stem(x)
    for stage in (model.stage1, model.stage2, model.stage3):
        y = stage[0](y)
    expected = model.head(nnx.relu(model.final_norm(y)).mean((1, 2)))
    np.testing.assert_allclose(model(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("preset", "options"), published.RESNETS)
def test_a_preset_has_its_published_layers(preset, options):
    expected = published.RESNETS[preset, options]
    size = 224 if dict(options).get("layout") == "imagenet" else 32
    model = shapes((size, size, 3), **resnet.PRESETS[preset] | dict(options))
    assert published.traced(model, (size, size, 3)) == expected


# What a block of each paper computes from its input; `s` is the shortcut, see `BLOCKS`.
PAPERS = {
    "torchvision": lambda c1, n1, c2, n2, x, s: nnx.relu(n2(c2(nnx.relu(n1(c1(x))))) + s(x)),
    "xnor": lambda c1, n1, c2, n2, x, s: n2(c2(n1(c1(x)))) + s(x),
    "bireal": lambda c1, n1, c2, n2, x, s: (lambda y: n2(c2(y)) + y)(n1(c1(x)) + s(x)),
    **dict.fromkeys(
        ("dorefa", "pact", "lq"),
        lambda c1, n1, c2, n2, x, s: c2(nnx.relu(n2(c1(nnx.relu(n1(x)))))) + s(x),
    ),
}


@pytest.mark.parametrize("preset", PAPERS)
def test_a_preset_s_block_is_that_of_its_paper(preset, x64):
    options = {"activation": "relu"} | resnet.PRESETS[preset]
    shortcut = options["shortcut"]
    fields = {key: options[key] for key in ("order", "skip", "shortcut", "activation")}
    style = residual.Style(**fields)
    block = drawn(lambda: residual.BasicBlock(4, 6, 2, style=style, rngs=nnx.Rngs(0)))

    def carried(x):
        if shortcut == "pool":
            x = x.reshape(2, 3, 2, 3, 2, 4).mean((2, 4))
        y = block.shortcut(x)
        return y if block.shortcut_norm is None else block.shortcut_norm(y)

    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 4), jnp.float32)
    expected = PAPERS[preset](block.conv1, block.norm1, block.conv2, block.norm2, x, carried)
    # float32 rounding of sums of 54 products.
    np.testing.assert_allclose(block(x), expected, rtol=2e-5, atol=1e-6)


def test_every_preset_has_a_layer_list():
    assert {preset for preset, _ in published.RESNETS} == set(resnet.PRESETS)


@pytest.mark.parametrize(
    ("params", "options"),
    [
        # The published 0.27M of arXiv 1512.03385, table 6: option A has no parameters.
        (269_722, dict(depth=20, shortcut="pad")),
        (1_727_962, dict(depth=110, shortcut="pad")),
        (11_689_512, dict(layout="imagenet", depth=18, classes=1000)),
        # kuangliu/pytorch-cifar's ResNet-18 and ResNet-50.
        (11_173_962, dict(layout="cifar4", depth=18)),
        (23_520_842, dict(layout="cifar4", depth=50)),
        (11_689_512, dict(layout="imagenet", depth=18, classes=1000, norm="group")),
        (11_689_512, dict(layout="imagenet", depth=18, classes=1000, norm="frozen")),
    ],
)
def test_parameter_counts(params, options):
    assert count(shapes(**options)) == params


@pytest.mark.parametrize(
    ("width", "millions", "exact"),
    [(0.125, ".179", 0), (0.25, ".705", 0), (0.5, "2.798", 2_797_610), (1.0, "11.16", 0)],
)
def test_winograd_s_net_has_the_parameters_of_its_source(width, millions, exact):
    found = count(shapes(**resnet.PRESETS["winograd"], depth=18, width=width))
    digits = len(millions.partition(".")[2])
    assert f"{found / 1e6:.{digits}f}".removeprefix("0") == millions
    assert not exact or found == exact


def test_each_base_of_a_group_is_pooled():
    plain, grouped = (
        published.traced(shapes(**TINY, bases=bases, downsample="maxpool"), (32, 32, 3))
        for bases in (1, 2)
    )
    assert [side for *_, side in plain if side < 32] == [16] * 3 + [8] * 3 + [1]
    assert grouped == published.bases(plain, 2)


@pytest.mark.parametrize(("skip", "shortcut"), [("block", "conv"), ("conv", "pad")])
def test_max_pooling_stands_in_front_of_a_stage(skip, shortcut):
    options = dict(skip=skip, shortcut=shortcut, downsample="maxpool", stem_features=3)
    model = drawn(lambda: shapes(**TINY, **options))
    x = jax.random.normal(jax.random.key(0), (2, 9, 13, 3))
    y = nnx.relu(model.stem_norm(model.stem(x)))
    assert y.shape == (2, 9, 13, 3)
    for stage in (model.stage1, model.stage2, model.stage3):
        if stage is not model.stage1:
            y = nnx.max_pool(y, (2, 2), strides=(2, 2))
        y = stage[0](y)
        assert stage[0].strides == 1
    assert y.shape[1:3] == (2, 3)
    np.testing.assert_allclose(model(x), model.head(y.mean((1, 2))), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", ["group", "instance"])
def test_norms_of_single_images_do_not_see_the_batch(norm):
    model = drawn(lambda: shapes(**TINY, norm=norm))
    model.train()
    x = jax.random.normal(jax.random.key(0), (3, 8, 8, 3))
    # float32 rounding: other batches may be summed in another order.
    np.testing.assert_allclose(model(x)[:1], model(x[:1]), rtol=1e-5, atol=1e-6)


def test_s2d_stem_reads_squares_as_pixels():
    x = jnp.arange(2 * 8 * 4 * 3).reshape(2, 8, 4, 3)
    squares = parts.space_to_depth(x, 4)
    assert squares.shape == (2, 2, 1, 48)
    np.testing.assert_array_equal(squares[1, 1, 0].reshape(4, 4, 3), x[1, 4:])
    model = shapes((224, 224, 3), layout="imagenet", depth=18, stem="s2d")
    # 56x56 before the first stage, as behind ResNet's pooling.
    assert published.traced(model, (224, 224, 3))[0] == ("stem", 48, 64, 3, 1, 56)
    with pytest.raises(UserError, match=r"image_shape=\(30, 32, 3\).* multiples of 4"):
        parts.space_to_depth(jnp.zeros((1, 30, 32, 3)), 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(order="bcsa"), r"model\.order='bcsa' is not known: allowed bacs, bcas, cabs, cbas"),
        (dict(skip="convs"), r"model\.skip='convs' is not known: allowed block, conv"),
        (dict(shortcut="conv1"), r"model\.shortcut='conv1' is not known: allowed conv, pad, pool"),
        (dict(norm="btach"), r"model\.norm='btach' is not known: .*mean 'batch'"),
        (dict(stem="s3d"), r"model\.stem='s3d' is not known: .*mean 's2d'"),
        (dict(activation="plu"), r"model\.activation='plu' is not known: .*prelu"),
        (
            dict(norm="fixup", order="bacs"),
            r"model\.order='bacs': with norm 'fixup' allowed 'cbsa'",
        ),
        (dict(norm="fixup", pre_norm=True), r"model\.pre_norm=True.*model\.norm='fixup'"),
        (dict(norm="fixup", zero_init_gamma=True), r"zero_init_gamma=True .*model\.norm='fixup'"),
        (dict(skip="conv", zero_init_gamma=True), r"zero_init_gamma.*allowed for skip 'block'"),
        (dict(norm="frozen", zero_init_gamma=True), r"zero_init_gamma.*a norm that learns"),
        (dict(norm="fixup", skip="conv"), r"model\.skip='conv' with .*allowed 'block'"),
        (dict(order="bacs", zero_init_gamma=True), r"model\.order='bacs'.*allowed .* cabs, cbsa"),
        (dict(bases=0), r"model\.bases=0: must be at least 1"),
        (dict(soft_gates=True), r"model\.soft_gates=True: with model\.bases=1"),
        (dict(stem_features=-1), r"model\.stem_features=-1: must be at least 0"),
        (dict(downsample="max"), r"model\.downsample='max' .*allowed maxpool, stride"),
        (
            dict(downsample="maxpool", shortcut="pool"),
            r"model\.shortcut='pool' with model\.downsample='maxpool': .*allowed 'conv', 'pad'",
        ),
        (
            dict(downsample="maxpool", image_shape=(3, 8, 3)),
            r"image_shape=\(3, 8, 3\).*halves images 2 times.* at least 4",
        ),
        (
            dict(downsample="maxpool", stem="s2d", image_shape=(8, 8, 3)),
            r"image_shape=\(8, 8, 3\).*halves images 4 times.* at least 16",
        ),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        shapes(**TINY, **options)


def test_a_skip_around_each_convolution_is_for_basic_blocks():
    with pytest.raises(UserError, match=r"model\.skip='conv': .*basic blocks"):
        shapes((64, 64, 3), layout="imagenet", depth=50, skip="conv")
