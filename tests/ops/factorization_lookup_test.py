"""Rows of factorized kernels: those of the table that the cores make, which is never made."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_nets.errors import UserError
from efficient_nets.ops import factorization
from efficient_nets.ops.factorization import Factored, forms

VOCABULARY, FEATURES = 22, 9  # 22 = 2 * 11, so that orders above 1 pad it
TEXTS = {form: f"{form}:2" for form in forms.FORMS} | {
    "padded": "tt:2,order=2,in=4x7,out=2x5",
}
IDS = np.array([[0, 21, 6, 7], [13, 13, -1, -22]])


def kernel_of(text, run="factorized", shape=(VOCABULARY, FEATURES), dtype=jnp.float32):
    net = factorization.parse(text).network(shape)
    keys = jax.random.split(jax.random.key(0), len(net.cores))
    pairs = zip(keys, net.shapes.items(), strict=True)
    cores = {name: jax.random.normal(key, shape, dtype) for key, (name, shape) in pairs}
    return Factored(net, run, cores)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_rows_and_gradients_are_those_of_the_table(text, x64):
    kernel = kernel_of(text, dtype=jnp.float64)
    weights = np.random.default_rng(0).normal(size=(*IDS.shape, FEATURES))
    of_table = np.zeros((VOCABULARY, FEATURES))
    np.add.at(of_table, IDS, weights)

    @jax.jit
    def both(kernel):
        rows, back = jax.vjp(lambda k: factorization.lookup(k, jnp.asarray(IDS)), kernel)
        table, expected = jax.vjp(factorization.dense, kernel)
        return rows, table, back(jnp.asarray(weights)), expected(jnp.asarray(of_table))

    rows, table, (found,), (expected,) = both(kernel)
    # Float64: sums of a hundred products.
    np.testing.assert_allclose(rows, np.asarray(table)[IDS], rtol=1e-10, atol=1e-11)
    for name, gradient in expected.cores.items():
        np.testing.assert_allclose(found.cores[name], gradient, rtol=1e-10, atol=1e-11)


def test_digits_are_those_of_the_formula(x64):
    kernel = kernel_of(TEXTS["padded"], dtype=jnp.float64)
    first, second = (np.asarray(kernel.cores[f"core{i}"]) for i in range(2))
    ids = [0, 6, 7, 21]
    found = jax.jit(factorization.lookup)(kernel, jnp.asarray(ids))
    for id, row in zip(ids, found, strict=True):
        expected = np.einsum("or,rp->op", first[id // 7], second[:, id % 7]).reshape(-1)
        np.testing.assert_allclose(row, expected[:FEATURES], rtol=1e-12)


def is_program(value):
    return isinstance(value, jax.extend.core.Jaxpr | jax.extend.core.ClosedJaxpr)


def intermediates(jaxpr):
    """Sizes of all that a program computes, the programs inside of it too."""
    for equation in jaxpr.eqns:
        yield from (out.aval.size for out in equation.outvars)
        for inner in jax.tree.leaves(tuple(equation.params.values()), is_leaf=is_program):
            if is_program(inner):
                yield from intermediates(getattr(inner, "jaxpr", inner))


def largest_intermediate(text, run, ids=3):
    """Of rows of a table of 300,000 numbers and their gradient."""
    kernel = jax.eval_shape(lambda: kernel_of(text, run, (10_000, 30)))

    def loss(kernel):
        return jnp.sum(jnp.sin(factorization.lookup(kernel, jnp.arange(ids))))

    return max(intermediates(jax.make_jaxpr(jax.grad(loss))(kernel).jaxpr))


@pytest.mark.parametrize("text", ["cp:4", "tucker:0.05", "tt:4", "tr:4", "ht:4", "bt:0.05"])
def test_no_table_is_made(text):
    assert largest_intermediate(text, "factorized") < 60_000  # the gradient of cp's core has 40,000


def test_auto_makes_the_table_where_that_is_less():
    few = largest_intermediate("tt:4", "auto")
    assert few < 60_000 and largest_intermediate("tt:4", "reconstructed") >= 300_000
    net = factorization.parse("tt:4").network((10_000, 30))
    assert factorization.lookup_cost(net, "auto", 100_000) is None
    assert factorization.lookup_cost(net, "factorized", 100_000) is not None


def test_cost_counts_the_contraction_and_what_is_gathered():
    net = kernel_of(TEXTS["padded"]).network
    cost = factorization.lookup_cost(net, "factorized", 100)
    slices = 2 * 2 + 2 * 5
    assert cost.macs == 100 * 2 * 2 * 5
    assert (cost.moved, cost.kept) == (100 * (2 * slices + slices + 10), 100 * slices)
    assert factorization.lookup_cost(net, "reconstructed", 100) is None


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint32])
def test_ids_outside_of_the_vocabulary_are_as_in_take(dtype):
    kernel = kernel_of(TEXTS["padded"])
    ids = jnp.asarray([0, 21, 22, 27, 28, 120], dtype)  # 22 to 27 are padding
    if jnp.issubdtype(dtype, jnp.signedinteger):
        ids = jnp.concatenate([ids, jnp.asarray([-1, -22, -23, -120], dtype)])

    @jax.jit
    def both(kernel, ids):
        expected = jnp.take(factorization.dense(kernel), ids, axis=0)
        return factorization.lookup(kernel, ids), expected

    found, expected = both(kernel, ids)
    assert np.isnan(expected[2:6]).all() and not np.isnan(expected[:2]).any()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_what_a_pass_would_keep_is_computed_again_where_it_is_more_than_the_table():
    kernel = kernel_of("tt:2")

    def program(number):
        ids = jnp.zeros(number, jnp.int32)
        return str(jax.make_jaxpr(functools.partial(factorization.lookup, kernel))(ids))

    assert "remat" not in program(4) and "checkpoint" not in program(4)
    assert "remat" in program(1000) or "checkpoint" in program(1000)


def test_wrong_ids_are_named():
    kernel = kernel_of("tt:2")
    with pytest.raises(UserError, match="the ids have dtype float32: an integer one is needed"):
        factorization.lookup(kernel, jnp.zeros(3))
    large = factorization.parse("tt:1,order=2,in=65536x65536,out=1x2").network((2**31, 2))
    cores = {name: jnp.zeros(shape) for name, shape in large.shapes.items()}
    with pytest.raises(UserError, match="int32, which does not count up to the 4,294,967,296"):
        factorization.lookup(Factored(large, "factorized", cores), jnp.zeros(3, jnp.int32))


def test_no_ids_give_no_rows():
    for run in ("auto", "factorized"):
        kernel = kernel_of("tt:2", run)
        assert factorization.lookup(kernel, jnp.zeros((2, 0), jnp.int32)).shape == (2, 0, FEATURES)
