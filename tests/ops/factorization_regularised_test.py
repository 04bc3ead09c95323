"""Tensor dropout and the rank lasso against their definitions in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from efficient_nets.errors import UserError
from efficient_nets.ops import factorization
from efficient_nets.ops.factorization import regularization

KERNEL = (3, 2, 4)
# One of each form, with few enough indices of bonds for all of their masks.
TEXTS = {
    "cp": "cp:5",
    "tucker": "tucker:2x3",
    "tt": "tt:2,order=2,in=1x2,out=2x2",
    "tr": "tr:2,order=1",
    "ht": "ht:2,order=2,in=2x1,out=2x2",
    "bt": "bt:2,blocks=3,layout=split,order=1",
}


def network_of(text, shape=KERNEL):
    return factorization.parse(text).network(shape)


def cores_of(net, seed=0):
    random = np.random.default_rng(seed)
    return {name: jnp.asarray(random.normal(size=shape)) for name, shape in net.shapes.items()}


# Dropout


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_the_mean_over_all_masks_is_the_kernel(text, x64):
    """Whatever the number of bonds: each term of the kernel has one factor of each of them."""
    net, rate = network_of(text), 0.3
    cores = cores_of(net)
    bonds = regularization.wide_bonds(net)
    sizes = [net.size(bond) for bond in bonds]
    assert bonds and 4 <= sum(sizes) <= 12
    every = np.array(list(itertools.product((0, 1), repeat=sum(sizes))))
    shares = np.prod(np.where(every, 1 - rate, rate), axis=1)
    parts = np.split(every / (1 - rate), np.cumsum(sizes)[:-1], axis=1)

    def kernel(masks):
        return factorization.reconstruct(net, regularization.masked(net, cores, masks))

    found = jax.vmap(kernel)(dict(zip(bonds, map(jnp.asarray, parts), strict=True)))
    mean = np.tensordot(shares, found, 1)
    # Sums of up to 4,096 kernels in float64.
    np.testing.assert_allclose(mean, factorization.reconstruct(net, cores), rtol=1e-11, atol=1e-12)
    assert np.all(found[0] == 0)  # all indices may be dropped


def test_masks_multiply_terms(x64):
    """By the definition of a ring, all of whose bonds are in two cores."""
    net = network_of("tr:2,order=1")
    cores = cores_of(net)
    masks = regularization.dropout_masks(net, 0.5, jax.random.key(3))
    a, b, c = (np.asarray(cores[name]) for name in net.shapes)
    r0, r1, r2 = (np.asarray(masks[bond]) for bond in ("r0", "r1", "r2"))
    expected = np.einsum("aib,bkc,coa,a,b,c->kio", a, b, c, r0, r1, r2)
    made = factorization.dropped(net, cores, 0.5, jax.random.key(3))
    found = factorization.reconstruct(net, made)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_masks_are_drawn_as_they_say(x64):
    net = network_of("tucker:40x40", (100, 100))
    masks = regularization.dropout_masks(net, 0.2, jax.random.key(0))
    assert {bond: mask.shape for bond, mask in masks.items()} == {"r_i0": (40,), "r_o0": (40,)}
    draw = jax.vmap(lambda key: regularization.dropout_masks(net, 0.2, key))
    many = draw(jax.random.split(jax.random.key(1), 2000))
    rows = np.concatenate([many["r_i0"], many["r_o0"]], axis=1)
    assert set(np.unique(rows)) == {0, 1.25}
    # Means of 2,000 draws with a deviation of 0.5 each: five times 0.011.
    np.testing.assert_allclose(rows.mean(axis=0), 1, atol=0.056)
    np.testing.assert_allclose(np.cov(rows.T), 0.25 * np.eye(80), atol=0.03)  # all independent
    one = network_of("cp:1")
    assert regularization.dropout_masks(one, 0.2, jax.random.key(0)) == {}


# Lasso


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_the_lasso_is_the_sum_of_the_norms_of_slices(text, x64):
    net = network_of(text)
    cores = cores_of(net)
    expected = 0.0
    for bond in net.bonds:
        for name, indices in net.cores:
            for i in range(net.size(bond)) if bond in indices and net.size(bond) > 1 else ():
                part = np.take(np.asarray(cores[name]), i, axis=indices.index(bond))
                expected += np.sqrt(np.sum(part**2))
    np.testing.assert_allclose(factorization.rank_lasso(net, cores), expected, rtol=1e-13)


def test_the_least_lasso_of_a_product_is_its_schatten_quasi_norm(x64):
    """Over all pairs of cores with this product: 2 sum of the roots of its singular values."""
    net = network_of("tt:2,order=2,in=2x2,out=2x2", (4, 4))
    assert net.shapes == {"core0": (2, 2, 2), "core1": (2, 2, 2)}
    a, b = (np.asarray(core).reshape(s) for core, s in zip(cores_of(net).values(), ((4, 2), (2, 4)),
                                                           strict=True))  # fmt: skip

    def lasso(a, b):
        cores = dict(core0=jnp.asarray(a.reshape(2, 2, 2)), core1=jnp.asarray(b.reshape(2, 2, 2)))
        return float(factorization.rank_lasso(net, cores))

    u, s, vt = np.linalg.svd(a @ b, full_matrices=False)
    root = np.sqrt(s[:2])
    least = lasso(u[:, :2] * root, root[:, None] * vt[:2])
    np.testing.assert_allclose(least, 2 * root.sum(), rtol=1e-12)
    random = np.random.default_rng(1)
    for _ in range(50):
        mix = random.normal(size=(2, 2))
        assert lasso(a @ mix, np.linalg.inv(mix) @ b) > least - 1e-9


def test_a_slice_of_zeros_has_no_gradient():
    net = network_of("cp:3")
    cores = {name: core.at[..., 0].set(0) for name, core in cores_of(net).items()}
    grads = jax.grad(lambda cores: factorization.rank_lasso(net, cores))(cores)
    for name, grad in grads.items():
        norms = np.linalg.norm(grad.reshape(-1, 3), axis=0)
        np.testing.assert_allclose(norms, [0, 1, 1], rtol=1e-6)  # float32
        assert grad.shape == cores[name].shape
    assert factorization.rank_lasso(network_of("cp:1"), cores_of(network_of("cp:1"))) == 0


# The spec


def test_the_spec():
    text = "tt:4,always,dropout=0.1,lasso=0.001"
    made = factorization.parse(text)
    assert (made.dropout, made.lasso, str(made)) == (0.1, 0.001, text)
    given = dict(form="tt", rank=4, always=True, dropout=0.1, lasso=1e-3)
    assert factorization.parse(given) == made == factorization.parse(str(made))
    assert factorization.parse(dict(form="tt", rank=4, lasso=0)) == factorization.parse("tt:4")
    assert made.network(KERNEL) == network_of("tt:4")


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ("tt:4,dropout=1", "kernel.dropout=1.0: allowed a probability from 0 on, below 1"),
        ("tt:4,dropout=-0.1", "kernel.dropout=-0.1"),
        ("tt:4,dropout=few", "dropout='few' is no number"),
        ("tt:4,lasso=inf", "kernel.lasso=inf: allowed a finite number from 0 on"),
        ("tt:4,lasso=nan", "kernel.lasso=nan"),
        ("tt:4,lasso=1,lasso=2", "'lasso' is given twice"),
        (dict(form="tt", rank=4, dropout=True), "kernel.dropout=True"),
        (dict(form="tt", rank=4, lasso="0.1"), "kernel.lasso='0.1'"),
    ],
)
def test_errors(given, match):
    with pytest.raises(UserError, match=match):
        factorization.parse(given)
