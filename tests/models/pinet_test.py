"""Pi-nets against their formulas in NumPy, and by what they are: polynomials of a known degree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from efficient_nets import analysis, models
from efficient_nets.errors import UserError
from tests.models import reference

IMAGE = (4, 3, 2)
BLOCKS = (1, 2)

# float64 rounding of sums of up to some hundred products.
close = dict(rtol=1e-10, atol=1e-10)


def images(shape):
    return np.random.default_rng(1).normal(0, 1, (3, *shape))


def ccp(z, values, degree):
    """x_n = (U_n'z) * x_{n-1} + x_{n-1}."""
    x = z @ values["factors/0/w/kernel"]
    for n in range(1, degree):
        x = np.einsum("bd,dk,bk->bk", z, values[f"factors/{n}/w/kernel"], x) + x
    return x


def ncp(z, values, degree):
    """x_n = (A_n'z) * (S_n'x_{n-1} + b_n)."""
    x = (z @ values["factors/0/w/kernel"]) * values["scale"]
    for n in range(1, degree):
        factor, state = values[f"factors/{n}/w/kernel"], values[f"states/{n - 1}/w/kernel"]
        factor_z = np.einsum("bd,dk->bk", z, factor)
        x = factor_z * (np.einsum("bj,jk->bk", x, state) + values[f"states/{n - 1}/w/bias"])
    return x


@pytest.mark.parametrize("degree", [1, 2, 4])
@pytest.mark.parametrize("form", [ccp, ncp])
def test_pinet_is_its_formula(form, degree, x64):
    model, values = reference.build("pinet", IMAGE, form=form.__name__, degree=degree, hidden=6)
    x = images(IMAGE)
    hidden = form(x.reshape(3, -1), values, degree)
    expected = reference.dense(hidden, reference.part(values, "head"))
    np.testing.assert_allclose(model(jnp.asarray(x)), expected, **close)


def pi_block(x, values, stride):
    """`alpha * m * s + s`."""

    def unit(x, conv, norm, stride=1):
        y = reference.conv(x, values[f"{conv}/w/kernel"], stride)
        return reference.batch_norm(y, reference.part(values, norm))

    m = unit(unit(x, "conv1", "norm1", stride), "conv2", "norm2")
    s = unit(x, "shortcut", "shortcut_norm", stride)
    return values["alpha"] * m * s + s


def test_pinet_resnet_is_its_formula(x64):
    shape = (7, 6, 3)
    model, values = reference.build("pinet_resnet", shape, blocks=BLOCKS, width=1 / 16)
    x = images(shape)
    y = reference.conv(x, values["stem/w/kernel"])
    y = reference.batch_norm(y, reference.part(values, "stem_norm"))
    for block, stride in (("stage1/0", 1), ("stage2/0", 2), ("stage2/1", 1)):
        y = pi_block(y, reference.part(values, block), stride)
    assert y.shape == (3, 4, 3, 8)
    expected = reference.dense(y.mean((1, 2)), reference.part(values, "head"))
    np.testing.assert_allclose(jax.jit(lambda x: model(x))(x), expected, **close)


@pytest.mark.parametrize(
    ("name", "options", "degree"),
    [
        *(
            ("pinet", dict(form=form, degree=degree, hidden=6), degree)
            for form in models.pinet.FORMS
            for degree in (1, 2, 3, 5)
        ),
        ("pinet_resnet", dict(blocks=(1,), width=1 / 16), 2),
        ("pinet_resnet", dict(blocks=(1, 1), width=1 / 16), 4),
        ("pinet_resnet", dict(blocks=BLOCKS, width=1 / 16), 8),
    ],
)
def test_logits_are_of_the_degree_in_the_image(name, options, degree, x64):
    """Differences of order N + 1 vanish along a line of images, those of order N do not."""
    model, _ = reference.build(name, IMAGE, **options)
    # Far out, where the highest power has a share in the logits.
    steps = np.linspace(-9, 9, degree + 2).reshape(-1, 1, 1, 1)
    logits = np.asarray(model(jnp.asarray(steps * images(IMAGE)[:1])))
    # A difference of order N + 1 adds up logits with factors of 2^(N + 1) in all.
    rounding = 1e-13 * 2 ** (degree + 1) * np.abs(logits).max()
    assert np.abs(np.diff(logits, degree + 1, axis=0)).max() < rounding
    assert np.abs(np.diff(logits, degree, axis=0)).min() > 100 * rounding


def shapes(name, **options):
    return nnx.eval_shape(
        lambda: models.create(
            name, image_shape=(32, 32, 3), num_classes=10, rngs=nnx.Rngs(0), **options
        )
    )


def count(name, **options):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(shapes(name, **options), nnx.Param)))


@pytest.mark.parametrize("degree", [1, 4])
def test_pinet_counts_its_factors(degree):
    d, k, classes = 32 * 32 * 3, 100, 10
    expected = degree * d * k + (k + 1) * classes
    assert count("pinet", degree=degree, hidden=k) == expected
    assert count("pinet", degree=degree, hidden=2 * k, width=0.5) == expected
    nested = expected + degree * k + (degree - 1) * k**2
    assert count("pinet", form="ncp", degree=degree, hidden=k) == nested
    # Of the maps: products of hidden values are no layer's.
    cost = analysis.model_cost(shapes("pinet", degree=degree, hidden=k), (32, 32, 3))
    assert cost["macs"] == degree * d * k + k * classes


@pytest.mark.parametrize("blocks", [(2, 2, 2, 2), (1, 3)])
def test_pinet_resnet_counts_its_blocks(blocks):
    expected, before = 9 * 3 * 64 + 2 * 64, 64
    for stage, number in enumerate(blocks):
        c = 64 * 2**stage
        for _ in range(number):
            # conv1, shortcut; conv2; scale and bias of three norms; alpha.
            expected += (9 + 1) * before * c + 9 * c**2 + 3 * 2 * c + 1
            before = c
    assert count("pinet_resnet", blocks=blocks) == expected + (before + 1) * 10
    if blocks == (2, 2, 2, 2):
        assert f"{count('pinet_resnet'):,}" in models.MODELS["pinet_resnet"].__doc__


def test_pinet_resnet_starts_as_its_shortcuts():
    model = models.create(
        "pinet_resnet", image_shape=IMAGE, num_classes=5, rngs=nnx.Rngs(0), blocks=(1,), width=0.1
    )
    model.eval()
    (block,) = model.stage1
    x = jnp.asarray(images((4, 3, 6)), jnp.float32)
    np.testing.assert_array_equal(block(x), block.shortcut_norm(block.shortcut(x)))


def test_ncp_has_every_degree_from_the_start():
    """b_1 = 1 lets the image in, b_n = 1 keeps the lower degrees beside the higher ones."""
    model = models.create(
        "pinet", image_shape=IMAGE, num_classes=5, rngs=nnx.Rngs(0), form="ncp", degree=3, hidden=8
    )
    for vector in (model.scale, *(state.w.bias for state in model.states)):
        np.testing.assert_array_equal(vector[...], 1)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pinet", dict(form="cpp"), r"model\.form='cpp' is not known: allowed ccp, ncp"),
        ("pinet", dict(degree=0), r"model\.degree=0: must be at least 1"),
        ("pinet", dict(hidden=0), r"model\.hidden=0: must be at least 1"),
        ("pinet_resnet", dict(blocks=()), r"model\.blocks=\(\): give a number"),
        ("pinet_resnet", dict(blocks=(1, 0)), r"model\.blocks=\(1, 0\): give a number"),
    ],
)
def test_bad_input_is_named(name, options, message):
    with pytest.raises(UserError, match=message):
        models.create(name, image_shape=IMAGE, num_classes=5, rngs=nnx.Rngs(0), **options)
