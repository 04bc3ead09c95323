"""Tensor products against their definitions in NumPy's float64, in the literature's layout.

There tensors are rows x columns x tubes, W `(l, m, n)` and X `(m, p, n)`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft

from efficient_nets.errors import UserError
from efficient_nets.ops import tproduct

# float64 rounding of sums of some hundred products of numbers up to about 10.
close = dict(rtol=1e-11, atol=1e-11)
ROWS, COLUMNS, SLICES = 3, 2, 4  # l, m, p

SHIFTED = np.eye(6, k=1) + 2 * np.eye(6)  # invertible, and neither symmetric nor orthonormal


def by_name(name, size):
    return tproduct.transform(SHIFTED if name == "given" else name, size)


def draws(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def tensors(size):
    """W, X, and a cotangent of W * X."""
    shapes = ((ROWS, COLUMNS), (COLUMNS, SLICES), (ROWS, SLICES))
    return [draws(*shape, size, seed=seed) for seed, shape in enumerate(shapes)]


def of_ops(tensor):
    """Tubes first, columns, rows: a kernel of W, an input of X."""
    return jnp.asarray(tensor.transpose(2, 1, 0))


def product_and_gradients(w, x, g, by):
    @jax.jit
    def both(x, w, g):
        y, pull = jax.vjp(lambda x, w: tproduct.product(x, w, by), x, w)
        return y, *pull(g)

    return [np.transpose(z, (2, 1, 0)) for z in both(of_ops(x), of_ops(w), of_ops(g))]


def block_circulant(w):
    """Block (k, j) is W's frontal slice k - j modulo n (Kilmer, Martin 2011)."""
    size = w.shape[2]
    return np.block([[w[:, :, (k - j) % size] for j in range(size)] for k in range(size)])


def block_toeplitz_hankel(w):
    """Of slices W_0 ... W_{n-1} (Kernfeld, Kilmer, Aeron 2015).

    Toeplitz: W_|k-j|. Hankel: first column W_1 ... W_{n-1} 0, last column 0 W_{n-1} ... W_1.
    """
    size = w.shape[2]
    slices = [w[:, :, t] for t in range(size)]
    column = [*slices[1:], 0 * slices[0], *slices[:0:-1]]
    rows = range(size)
    return np.block([[slices[abs(k - j)] + column[k + j] for j in rows] for k in rows])


def unfold(x):
    return np.concatenate([x[:, :, t] for t in range(x.shape[2])])


def fold(matrix, size):
    return np.stack(np.split(matrix, size), axis=2)


@pytest.mark.parametrize("size", [4, 5])
@pytest.mark.parametrize("name", ["dft", "circulant"])
def test_the_t_product_is_the_block_circulant_one_and_so_are_its_gradients(name, size, x64):
    w, x, g = tensors(size)
    by = tproduct.transform(name, size)
    y, of_x, of_w = product_and_gradients(w, x, g, by)
    matrix = block_circulant(w)
    np.testing.assert_allclose(y, fold(matrix @ unfold(x), size), **close)
    np.testing.assert_allclose(of_x, fold(matrix.T @ unfold(g), size), **close)
    expected = np.zeros_like(w)
    for place in np.ndindex(w.shape):  # linear in W: each entry's block matrix by itself
        unit = np.zeros_like(w)
        unit[place] = 1
        expected[place] = np.sum(unfold(g) * (block_circulant(unit) @ unfold(x)))
    np.testing.assert_allclose(of_w, expected, **close)
    np.testing.assert_allclose(np.transpose(tproduct.to_dense(of_ops(w), by)), matrix, **close)


def test_kernfeld_s_cosine_product_is_that_of_block_toeplitz_plus_hankel_matrices(x64):
    w, x, _ = tensors(5)
    y = tproduct.product(of_ops(x), of_ops(w), tproduct.transform("toeplitz_hankel", 5))
    expected = block_toeplitz_hankel(w) @ block_toeplitz_hankel(x)
    np.testing.assert_allclose(block_toeplitz_hankel(np.transpose(y)), expected, **close)


def along_tubes(matrix, tensor):
    found = np.zeros((*tensor.shape[:2], len(matrix)), np.result_type(matrix, tensor))
    for s, t in np.ndindex(matrix.shape):
        found[:, :, s] += matrix[s, t] * tensor[:, :, t]
    return found


def slice_by_slice(a, b):
    return np.stack([a[:, :, s] @ b[:, :, s] for s in range(a.shape[2])], axis=2)


@pytest.mark.parametrize("name", [*tproduct.TRANSFORMS, "given"])
def test_a_product_is_one_matrix_product_a_slice_and_so_are_its_gradients(name, x64):
    w, x, g = tensors(6)
    by = by_name(name, 6)
    forward, inverse = by.matrices
    y, of_x, of_w = product_and_gradients(w, x, g, by)
    w_slices, x_slices = along_tubes(forward, w), along_tubes(forward, x)
    g_slices = along_tubes(inverse.T, g)
    expected = along_tubes(inverse, slice_by_slice(w_slices, x_slices))
    np.testing.assert_allclose(y, expected.real, **close)
    assert np.abs(expected.imag).max() < 1e-12
    to_x = slice_by_slice(w_slices.transpose(1, 0, 2), g_slices)
    to_w = slice_by_slice(g_slices, x_slices.transpose(1, 0, 2))
    np.testing.assert_allclose(of_x, along_tubes(forward.T, to_x).real, **close)
    np.testing.assert_allclose(of_w, along_tubes(forward.T, to_w).real, **close)
    dense = np.asarray(tproduct.to_dense(of_ops(w), by))
    np.testing.assert_allclose(fold(dense.T @ unfold(x), 6), expected.real, **close)


def test_matrices_are_those_of_the_literature():
    eye = np.eye(7)
    dct = tproduct.transform("dct", 7).matrices[0]
    np.testing.assert_allclose(dct, scipy.fft.dct(eye, norm="ortho", axis=0), **close)
    dft = tproduct.transform("dft", 7).matrices[0]
    np.testing.assert_allclose(dft, np.fft.fft(eye, axis=0), **close)
    kernfeld = np.diag(1 / dct[:, 0]) @ dct @ (eye + np.eye(7, k=1))
    toeplitz_hankel = tproduct.transform("toeplitz_hankel", 7).matrices[0]
    np.testing.assert_allclose(toeplitz_hankel, kernfeld, **close)


def test_tubes_under_a_dct_multiply_as_toeplitz_plus_hankel_matrices(x64):
    """Of the tube v with W^-1 C (I + Z) v = C a; then W^-1 C (T + H) C^-1 W is diagonal too."""
    by, a = tproduct.transform("dct", 6), draws(6)
    dct = by.matrices[0]
    kernfeld = np.diag(1 / dct[:, 0]) @ dct @ (np.eye(6) + np.eye(6, k=1))
    v = np.linalg.solve(kernfeld, dct @ a)
    found = np.transpose(tproduct.to_dense(jnp.asarray(a)[:, None, None], by))
    np.testing.assert_allclose(found, block_toeplitz_hankel(v[None, None]), **close)


# Filters of one level, even positions' first: what multiplies x[2i - 2] ... x[2i + 2], and
# x[2i] ... x[2i + 2].
FILTERS = {
    "haar": ([0, 0, 1, 1, 0], [1, -1, 0], [1 / np.sqrt(2)] * 2),
    "bior": ([-1, 2, 6, 2, -1], [-1, 2, -1], [np.sqrt(2) / 8, 1 / np.sqrt(2) / 2]),
}


@pytest.mark.parametrize("size", [2, 6, 8, 28])
@pytest.mark.parametrize("name", FILTERS)
def test_wavelets_are_their_filters_on_every_level(name, size):
    low_pass, high_pass, scales = FILTERS[name]
    low, details = np.eye(size), []
    while len(low) % 2 == 0:
        steps = range(0, len(low), 2)
        pick = [[low[(i + d) % len(low)] for d in range(-2, 3)] for i in steps]
        details.insert(0, scales[1] * np.einsum("d,idt->it", high_pass, np.array(pick)[:, 2:]))
        low = scales[0] * np.einsum("d,idt->it", low_pass, pick)
    forward, inverse = tproduct.transform(name, size).matrices
    np.testing.assert_allclose(forward, np.concatenate([low, *details]), **close)
    np.testing.assert_allclose(inverse @ forward, np.eye(size), **close)
    if name == "haar":
        np.testing.assert_allclose(inverse, forward.T, **close)


def test_slices_of_a_constant_image_are_in_the_coarsest_level():
    for name in FILTERS:
        found = tproduct.transform(name, 28).matrices[0] @ np.ones(28)
        np.testing.assert_allclose(found, [2.0] * 7 + [0.0] * 21, **close)  # sqrt(2)^2 levels


@pytest.mark.parametrize("name", ["bior", "dft", "given"])
def test_slices_go_back_to_their_tubes(name, x64):
    x, by = jnp.asarray(draws(6, 2, 3)), by_name(name, 6)
    slices = tproduct.to_slices(x, by)
    assert slices.shape == ((6 if by.is_real else 4), 2, 3)
    np.testing.assert_allclose(tproduct.from_slices(slices, by), x, **close)


@pytest.mark.parametrize("name", ["dct", "bior", "given"])
def test_a_tubal_softmax_is_one_softmax_a_slice(name, x64):
    rows, by = 3, by_name(name, 6)
    forward, inverse = by.matrices
    x = draws(6, 2, rows)
    expected, probabilities = np.zeros_like(x), np.zeros((2, rows))
    for n in range(2):
        for s in range(6):
            slices = [sum(forward[s, t] * x[t, n, r] for t in range(6)) for r in range(rows)]
            whole = sum(np.exp(value) for value in slices)
            for r in range(rows):
                expected[:, n, r] += inverse[:, s] * np.exp(slices[r]) / whole
                probabilities[n, r] += np.exp(slices[r]) / whole / 6
    found, logs = jax.jit(
        lambda x: (tproduct.tubal_softmax(x, by), tproduct.log_probabilities(x, by))
    )(jnp.asarray(x))
    np.testing.assert_allclose(found, expected, **close)
    one = np.broadcast_to((inverse @ np.ones(6))[:, None], (6, 2))  # of the algebra
    np.testing.assert_allclose(found.sum(-1), one, **close)
    np.testing.assert_allclose(np.exp(logs), probabilities, **close)
    np.testing.assert_allclose(probabilities.sum(-1), 1, **close)  # so they are their softmax
    # The reduction is the trace of what a tube multiplies by.
    tube = np.asarray(found)[:, 0, 0]
    matrix = tproduct.to_dense(jnp.asarray(tube)[:, None, None], by)
    np.testing.assert_allclose(np.trace(matrix) / 6, probabilities[0, 0], **close)


def test_log_probabilities_do_not_overflow():
    by, x = tproduct.transform("dct", 4), jnp.asarray(1e4 * draws(4, 5, 3), jnp.float32)

    def loss(x):
        return jnp.sum(tproduct.log_probabilities(x, by))

    value, gradient = jax.jit(jax.value_and_grad(loss))(x)
    assert np.isfinite(value) and np.all(np.isfinite(gradient))


@pytest.mark.parametrize("name", ["dct", "dft", "toeplitz_hankel", "bior", "given"])
def test_gain_is_the_variance_of_a_product(name, x64):
    """All pairs of an entry of a kernel and one of an input: of variance 1, and independent."""
    by = by_name(name, 6)
    # One kernel of 6 columns, in each of which one entry of the tube is 1.
    expected = np.sum(tproduct.to_dense(jnp.eye(6)[:, None], by) ** 2) / 6
    np.testing.assert_allclose(tproduct.gain(by), expected, **close)


@pytest.mark.parametrize("name", ["dct", "circulant", "identity"])
def test_multiplications_are_half_of_xlas_flops(name):
    by, kernel = tproduct.transform(name, 8), jnp.ones((8, 5, 3))

    def flops(slices):
        apply = jax.jit(lambda x: tproduct.product(x, kernel, by))
        cost = apply.lower(jnp.zeros((8, slices, 5))).compile().cost_analysis()
        return cost["flops"]

    # Of one more slice: the kernel's own transform is not counted.
    assert flops(3) - flops(2) == 2 * tproduct.multiplications(by, 5, 3)


def test_an_fft_multiplies_half_of_the_slices():
    of_fft, of_definition = (
        tproduct.multiplications(tproduct.transform(name, 8), 5, 3) for name in ("dft", "circulant")
    )
    assert of_fft == 5 * 4 * 5 * 3 and of_definition == 8 * 8 * 5 * 3


@pytest.mark.parametrize("name", tproduct.TRANSFORMS)
def test_no_work_is_done_slice_by_slice(name):
    """As many operations for any number of tubes, forward and backward, and no loop."""

    def operations(size):
        by = tproduct.transform(name, size)
        apply = jax.grad(lambda x, w: jnp.sum(tproduct.product(x, w, by) ** 2), argnums=(0, 1))
        equations = jax.make_jaxpr(apply)(jnp.ones((size, 2, 3)), jnp.ones((size, 3, 4))).eqns
        return [equation.primitive.name for equation in equations]

    assert operations(4) == operations(16)
    assert not {"while", "scan"} & set(operations(4))


@pytest.mark.parametrize("name", ["dct", "dft", "circulant"])
def test_products_have_the_type_of_the_input(name):
    by = tproduct.transform(name, 4)
    x, kernel = jnp.asarray(draws(4, 5, 3), jnp.float32), jnp.asarray(draws(4, 3, 2), jnp.float32)
    apply = jax.jit(lambda x: tproduct.product(x, kernel, by))
    exact, found = apply(x), apply(x.astype(jnp.bfloat16))
    assert (exact.dtype, found.dtype) == (jnp.float32, jnp.bfloat16)
    # Four roundings to 8 bits, of sums of some ten numbers up to about 3.
    np.testing.assert_allclose(found.astype(jnp.float32), exact, rtol=0.1, atol=0.3)


def test_transforms_are_values():
    one, same = (tproduct.transform(SHIFTED, 6) for _ in range(2))
    assert one == same and hash(one) == hash(same) and one != tproduct.transform("dct", 6)
    assert [str(by) for by in (one, tproduct.transform("haar", 6))] == ["given", "haar"]


@pytest.mark.parametrize(
    ("given", "size", "message"),
    [
        ("dcct", 4, r"transform='dcct' is not known: allowed bior, circulant.*mean 'dct'"),
        ("haar", 7, r"tubes=7: .* must be even"),
        ("bior", 1, r"tubes=1: .* must be even"),
        ("dct", 0, r"tubes=0: must be at least 1"),
        (np.eye(3), 4, r"a matrix \(3, 3\) of float64 for tubes=4; allowed are real ones \(4, 4\)"),
        (1j * np.eye(4), 4, r"of complex128 for tubes=4"),
        (np.ones((4, 4)), 4, r"condition number of .*allowed are those up to 1e\+04"),
        (np.full((2, 2), np.nan), 2, r"condition number of inf"),
    ],
)
def test_bad_transforms_are_named(given, size, message):
    with pytest.raises(UserError, match=message):
        tproduct.transform(given, size)


@pytest.mark.parametrize("name", ["dft", "circulant"])
def test_complex_slices_have_no_softmax(name):
    by = tproduct.transform(name, 4)
    for apply in (tproduct.tubal_softmax, tproduct.log_probabilities):
        with pytest.raises(UserError, match=rf"transform='{name}'.*complex.*allowed bior, dct"):
            apply(jnp.ones((4, 2, 3)), by)


@pytest.mark.parametrize(
    ("x", "kernel", "message"),
    [
        ((3, 2, 5), (4, 5, 6), r"tubes=4: x \(3, 2, 5\) and kernel"),
        ((4, 2, 5), (4, 5), r"tubes=4: .* kernel \(4, 5\)"),
        ((4, 2, 5), (4, 3, 6), r"x \(4, 2, 5\) has not the 3 rows of a kernel \(4, 3, 6\)"),
    ],
)
def test_shapes_that_do_not_go_together_are_named(x, kernel, message):
    with pytest.raises(UserError, match=message):
        tproduct.product(jnp.ones(x), jnp.ones(kernel), tproduct.transform("dct", 4))
