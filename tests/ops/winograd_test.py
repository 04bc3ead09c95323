"""Winograd's transforms and map against the sums that define them, in float64."""

import functools
import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_nets.errors import UserError
from efficient_nets.ops import linear_maps, winograd
from efficient_nets.ops.winograd import maps, points, spec, transforms

SETS = [*points.SETS, "reciprocal:1/2", "reciprocal:3/4:2/3:1/3"]


def exact(name, tile, taps):
    return transforms.cook_toom(tile, taps, points.points(name, tile + taps - 2))


@pytest.mark.parametrize("name", SETS)
def test_each_set_filters_exactly_in_fractions(name):
    for tile, taps in itertools.product(range(2, 9), range(2, 8)):
        made = exact(name, tile, taps)
        g = [Fraction(k * k - 3, 7) for k in range(taps)]
        d = [Fraction((5 * j) % 11 - 4, 3) for j in range(tile + taps - 1)]

        def times(matrix, vector):
            return [sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]

        products = [u * v for u, v in zip(times(made.G, g), times(made.BT, d), strict=True)]
        direct = [sum(g[k] * d[i + k] for k in range(taps)) for i in range(tile)]
        assert times(made.AT, products) == direct, (tile, taps)


def test_two_and_four_outputs_of_three_taps_are_those_of_lavin_and_gray():
    four = transforms.as_floats(exact("lavin", 4, 3))
    np.testing.assert_array_equal(
        four.BT,
        [
            [4, 0, -5, 0, 1, 0],
            [0, -4, -4, 1, 1, 0],
            [0, 4, -4, -1, 1, 0],
            [0, -2, -1, 2, 1, 0],
            [0, 2, -1, -2, 1, 0],
            [0, 4, 0, -5, 0, 1],
        ],
    )
    np.testing.assert_allclose(
        24 * four.G,
        [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]],
        rtol=1e-15,  # 1/24 is not a float
    )
    two = transforms.as_floats(exact("lavin", 2, 3))
    # Signs differ from theirs: each row of G and B' may have either.
    np.testing.assert_array_equal(
        np.abs(two.BT), [[1, 0, 1, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 1, 0, 1]]
    )
    np.testing.assert_array_equal(two.AT, [[1, 1, 1, 0], [0, 1, -1, 1]])


def test_better_points_amplify_less():
    def of(name, tile):
        return transforms.amplification(exact(name, tile, 3))

    assert of("reciprocal", 4) < of("lavin", 4) / 2
    assert of("half", 6) < of("three_halves", 6) / 6 < of("lavin", 6) / 6
    assert of("reciprocal", 8) < of("half", 8) / 2
    # F(2, 3) by hand: G's rows have sums 1, 3/2, 3/2, 1 and those of B' are 2; 1*2 + 3/2*2*2 = 8.
    assert of("lavin", 2) == pytest.approx(8 / 3)
    # The square matrix of powers of F(8, 3), NOVA's fractions beside whole numbers.
    worse = transforms.condition(points.points("lavin", 9))
    assert worse / transforms.condition(points.points("nova", 9)) > 415


def test_legendre_polynomials_are_orthogonal():
    rows = transforms.legendre(6)
    for n, m in itertools.combinations(range(6), 2):
        # The integral over [-1, 1] of x^k is 2/(k + 1) for even k.
        integral = sum(
            a * b * (Fraction(2, i + j + 1) if (i + j) % 2 == 0 else 0)
            for i, a in enumerate(rows[n])
            for j, b in enumerate(rows[m])
        )
        assert integral == 0
    assert all(rows[n][n] == 1 for n in range(6))
    assert transforms.product(rows, transforms.inverse(rows)) == tuple(
        tuple(Fraction(i == j) for j in range(6)) for i in range(6)
    )


FORMS = [
    "winograd:2",
    "winograd:4,points=lavin",
    "winograd:3,taps=2",
    "winograd:6,points=nova",
    "winograd:4,legendre",
    "winograd:5,legendre,taps=3",
]
# Input shape without batch, kernel, strides, groups, features, padding.
CASES = {
    "3x3": ((9, 7, 4), (3, 3), (1, 1), 1, 6, "SAME"),
    "even size, stride 2": ((8, 6, 4), (3, 3), (2, 2), 1, 6, ((1, 1), (1, 1))),
    "odd size, stride 2": ((9, 11, 4), (3, 3), (2, 2), 1, 6, "SAME"),
    "5x5 in groups": ((9, 8, 4), (5, 5), (1, 2), 2, 6, "VALID"),
    "not square, each channel alone": ((11, 13, 4), (3, 5), (2, 1), 4, 8, ((1, 0), (3, 2))),
    "one row": ((5, 9, 3), (1, 3), (1, 1), 1, 4, "SAME"),
    "1-D": ((17, 4), (3,), (1,), 1, 6, "SAME"),
    "1-D, 7 taps, stride 3": ((17, 4), (7,), (3,), 2, 6, "SAME"),
    "3-D": ((7, 6, 5, 2), (3, 3, 2), (1, 1, 2), 2, 4, "SAME"),
    "smaller than a tile": ((3, 2, 3), (3, 3), (1, 1), 1, 5, ((1, 1), (1, 1))),
}


def case(name, form, seed=0, branches=2):
    shape, kernel, strides, groups, features, padding = CASES[name]
    direct = linear_maps.ConvMap(strides, padding, (1,) * len(kernel), groups, kernel)
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2, *shape))
    kernels = [rng.normal(size=(*kernel, shape[-1] // groups, features)) for _ in range(branches)]
    return winograd.WinogradMap(direct, winograd.parse(form)), x, kernels


def computed(static, x, kernels, stepwise=False):
    names = ("x", tuple(f"w{i}" for i in range(len(kernels))))
    matrices = static.constants()
    return winograd.apply(static, x, kernels, matrices, lambda *_: None, names, stepwise=stepwise)


PAIRS = [
    (name, FORMS[(i + shift) % len(FORMS)]) for i, name in enumerate(CASES) for shift in (0, 1)
]


@pytest.mark.parametrize(("name", "form"), [*PAIRS, *(("3x3", form) for form in FORMS[2:])])
def test_map_is_the_direct_one(x64, name, form):
    static, x, kernels = case(name, form)
    found = jax.jit(functools.partial(computed, static))(x, kernels)
    expected = static.direct(jnp.asarray(x), kernels)
    assert found.shape == expected.shape
    stepwise = jax.jit(functools.partial(computed, static, stepwise=True))(x, kernels)
    np.testing.assert_allclose(stepwise, found, atol=1e-10 * np.abs(expected).max())
    # F(6, 7 taps) loses up to 5 digits of 16.
    np.testing.assert_allclose(found, expected, atol=1e-10 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["odd size, stride 2", "not square, each channel alone", "1-D"])
def test_gradients_are_the_direct_ones(x64, name):
    static, x, kernels = case(name, "winograd:4,taps=3")

    def loss(function):
        return jax.grad(lambda x, ks: jnp.sum(jnp.sin(function(x, ks))), (0, 1))

    x, kernels = jnp.asarray(x), list(map(jnp.asarray, kernels))
    found = jax.jit(loss(functools.partial(computed, static)))(x, kernels)
    expected = jax.jit(loss(static.direct))(x, kernels)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10 * np.abs(b).max()), found, expected
    )


def test_gradients_of_the_transforms(x64):
    static, x, kernels = case("odd size, stride 2", "winograd:2,flex", branches=1)
    matrices = {name: jnp.asarray(m) for name, m in static.constants().items()}

    @jax.jit
    def loss(matrices):
        y = winograd.apply(static, jnp.asarray(x), kernels, matrices, lambda *_: None)
        return jnp.sum(jnp.sin(y))

    found = jax.jit(jax.grad(loss))(matrices)
    for name, matrix in matrices.items():
        for index in np.ndindex(matrix.shape):
            step = jnp.zeros_like(matrix).at[index].set(1e-6)
            near = [loss(matrices | {name: matrix + sign * step}) for sign in (1, -1)]
            slope = (near[0] - near[1]) / 2e-6
            np.testing.assert_allclose(found[name][index], slope, atol=1e-5)


def test_sums_of_a_tile_are_those_of_the_formula(x64):
    """Equation 8 of arXiv 1509.09308, tile by tile, each site seen with its shape."""
    static, x, kernels = case("3x3", "winograd:4", branches=1)
    seen = {}

    def visit(site, name, values):
        seen[site, name] = np.asarray(values)

    found = winograd.apply(
        static, jnp.asarray(x), kernels, static.constants(), visit, stepwise=True
    )
    at, g, bt = transforms.as_floats(static.form.transforms(3))
    (k,) = kernels
    padded = np.pad(x, ((0, 0), (1, 8), (1, 8), (0, 0)))
    u = np.einsum("ui,vj,ijco->uvco", g, g, k)
    np.testing.assert_allclose(
        seen["transformed_kernel", "w"], u.reshape(36, *k.shape[2:]), atol=1e-12
    )
    for n, row, column in itertools.product(range(2), range(3), range(2)):
        tile = padded[n, 4 * row : 4 * row + 6, 4 * column : 4 * column + 6]
        v = np.einsum("ui,vj,ijc->uvc", bt, bt, tile)
        at_tile = (slice(None), n, 2 * row + column)
        np.testing.assert_allclose(
            seen["transformed_input", "x"][at_tile], v.reshape(36, -1), atol=1e-12
        )
        m = np.einsum("uvc,uvco->uvo", v, u)
        np.testing.assert_allclose(seen["hadamard", "x"][at_tile], m.reshape(36, -1), atol=1e-11)
        y = np.einsum("iu,jv,uvo->ijo", at, at, m)
        whole = found[n, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        np.testing.assert_allclose(whole, y[: whole.shape[0], : whole.shape[1]], atol=1e-10)
    assert {name for site, name in seen if site == "between"} == {
        "input_pass1_x",
        "kernel_pass1_w",
        "output_pass1_x",
    }


def test_no_value_exists_for_each_tap_and_pair_of_channels():
    static, x, kernels = case("3x3", "winograd:4", branches=1)
    x = np.zeros((4, 32, 32, 16), np.float32)
    kernels = [np.zeros((3, 3, 16, 24), np.float32)]

    def loss(x, kernels):
        return jnp.sum(jnp.sin(computed(static, x, kernels)))

    jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1)))(x, kernels)

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (v.aval.size for v in equation.outvars)
            for value in equation.params.values():
                if hasattr(value, "jaxpr"):
                    yield from sizes(value.jaxpr)

    tiles = 4 * 8 * 8
    assert max(sizes(jaxpr.jaxpr)) <= 36 * tiles * 24 < tiles * 36 * 16 * 24


def test_bfloat16_products_have_float32_sums():
    static, x, kernels = case("3x3", "winograd:2", branches=1)
    x, kernels = (
        jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), tree) for tree in (x, kernels)
    )
    found = computed(static, x, kernels)
    assert found.dtype == jnp.bfloat16
    jaxpr = str(jax.make_jaxpr(functools.partial(computed, static))(x, kernels))
    assert "preferred_element_type=float32" in jaxpr
    expected = static.direct(*jax.tree.map(lambda a: a.astype(jnp.float32), (x, kernels)))
    # Operands of 8 bits: 2^-9 of each, amplified by the transforms.
    np.testing.assert_allclose(found, expected, atol=0.05 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("winograd", "winograd:4"),
        ("winograd:1", r"algorithm.tile=1: allowed 2 to 15"),
        ("winograd:4,fles", "'fles' is not understood; allowed are flex, legendre"),
        ("winograd:4,flex,flex", "'flex' is given twice"),
        ("winograd:4,points=lavi", "points='lavi' is not known.*did you mean 'lavin'"),
        ("winograd:4,points=nova:2", "'nova' takes no numbers"),
        ("winograd:4,points=reciprocal:0", "give fractions other than 0 and 1"),
        ("winograd:4,taps=1", "pieces of one tap save nothing"),
        ("direct:4", "'direct' takes nothing behind it"),
        ("winogrand:4", "did you mean 'winograd'"),
        (4, "algorithm=4 is not known"),
        ({"learned": True}, "algorithm has no 'tile'"),
        ({"tile": 4, "point": "nova"}, "no field 'point'"),
        ({"tile": 4, "learned": 1}, "algorithm.learned=1: allowed True, False"),
    ],
)
def test_what_is_no_algorithm(text, message):
    with pytest.raises(UserError, match=message):
        winograd.parse(text)


@pytest.mark.parametrize("text", [*FORMS, "winograd:4,flex,legendre,points=reciprocal:3/5,taps=3"])
def test_short_form_is_what_it_was_made_of(text):
    made = winograd.parse(text)
    assert winograd.parse(str(made)) == made
    assert str(made) == text


def test_maps_that_have_no_tiles():
    def made(kernel, strides=(1, 1), dilation=(1, 1), form="winograd:4"):
        direct = linear_maps.ConvMap(strides, "SAME", dilation, 1, kernel)
        return winograd.WinogradMap(direct, winograd.parse(form))

    with pytest.raises(UserError, match=r"dilation=\(2, 1\): tiles have no gaps"):
        made((3, 3), dilation=(2, 1))
    with pytest.raises(UserError, match="one tap saves nothing; give algorithm='direct'"):
        made((1, 1))
    with pytest.raises(UserError, match="one tap saves nothing"):
        made((2, 2), strides=(2, 2))
    with pytest.raises(UserError, match="tiles for 15 taps have 18 values.*give a smaller tile"):
        made((15, 1))
    assert made((15, 1), form="winograd:4,taps=3").axes[0] == maps.Axis(4, 3, 5, 1)


def test_points_run_out():
    with pytest.raises(UserError, match="take 5 values c; name them"):
        points.points("reciprocal", 21)
    with pytest.raises(UserError, match="a point comes twice"):
        points.points("reciprocal:3/5:5/3", 9)
    with pytest.raises(UserError, match=r"F\(4, 3\) takes 5 different points"):
        transforms.cook_toom(4, 3, points.points("lavin", 4))
    assert len(points.points("lavin", spec.MAX_SIZE - 1)) == spec.MAX_SIZE - 1
    assert len(points.points("half", spec.MAX_SIZE - 1)) == spec.MAX_SIZE - 1
    assert len(points.points("nova", spec.MAX_SIZE - 1)) == spec.MAX_SIZE - 1


def test_transforms_are_asked_for_in_full_precision():
    """By default a TPU rounds operands to bfloat16, which the transforms amplify."""
    static, x, kernels = case("3x3", "winograd:4", branches=1)
    lowered = jax.jit(functools.partial(computed, static)).lower(x.astype(np.float32), kernels)
    exact = [line for line in lowered.as_text().splitlines() if "HIGHEST" in line]
    assert len(exact) == 4  # two passes of the input, one each of kernel and output
