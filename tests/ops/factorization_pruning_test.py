"""Pruning of bonds: what goes, what stays, and that the kernel does too."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from efficient_nets.errors import UserError
from efficient_nets.ops import factorization

KERNEL = (3, 4, 6)
TEXTS = {
    "cp": "cp:5",
    "tucker": "tucker:3x4",
    "tt": "tt:4,order=2,in=2x2,out=2x3,layout=split",
    "tr": "tr:3,order=1",
    "ht": "ht:3,order=2,in=2x2,out=2x3,layout=split",
    "bt": "bt:3,blocks=3,layout=split,order=1",
}


def network_of(text, shape=KERNEL):
    return factorization.parse(text).network(shape)


def cores_of(net, seed=0):
    random = np.random.default_rng(seed)
    return {name: random.normal(size=shape) for name, shape in net.shapes.items()}


def pruned(net, cores, threshold):
    """Of one kernel."""
    smaller, (found,) = factorization.pruned_together(net, [cores], threshold)
    return smaller, found


def tensor(net, cores):
    """The contraction of all cores in float64: `(modes)`."""
    numbers = {index: number for number, (index, _) in enumerate(net.sizes)}
    operands = [(np.asarray(cores[name]), [numbers[i] for i in of]) for name, of in net.cores]
    out = [numbers[mode] for mode in net.modes]
    return np.einsum(*(part for pair in operands for part in pair), out, optimize=True)


def scaled(net, cores, bond, index, factor):
    """With this index of a bond multiplied in the last core that has it."""
    name, of = [(n, of) for n, of in net.cores if bond in of][-1]
    at = (slice(None),) * of.index(bond) + (index,)
    core = cores[name].copy()
    core[at] *= factor
    return {**cores, name: core}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_contributions_are_norms_of_what_an_index_makes(text, x64):
    net = network_of(text)
    cores = cores_of(net)
    for bond in net.bonds:
        found = factorization.contributions(net, cores, bond)
        for index in range(net.size(bond)):
            alone = cores
            for other in range(net.size(bond)):
                if other != index:
                    alone = scaled(net, alone, bond, other, 0.0)
            # Roots of sums of products of float64, in another order.
            np.testing.assert_allclose(
                found[index], np.linalg.norm(tensor(net, alone).ravel()), rtol=1e-9
            )


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_what_contributes_nothing_goes_and_the_kernel_stays(text, x64):
    net, form = network_of(text), factorization.parse(text)
    cores = cores_of(net)
    for position, bond in enumerate(net.bonds):
        cores = scaled(net, cores, bond, position % net.size(bond), 0.0)
    kernel = tensor(net, cores)
    made, left = pruned(net, cores, 0.0)
    assert all(made.size(bond) < max(net.size(bond), 2) for bond in net.bonds)
    assert {name: core.shape for name, core in left.items()} == made.shapes
    np.testing.assert_allclose(tensor(made, left), kernel, rtol=1e-11, atol=1e-12)
    explicit = factorization.of_network(form, made)
    assert explicit.network(KERNEL) == made  # from which a config makes it again
    assert factorization.parse(str(explicit)).network(KERNEL) == made
    again, same = pruned(made, left, 0.0)
    assert again == made
    for name, core in left.items():
        np.testing.assert_array_equal(same[name], core)


def test_a_bond_is_no_larger_than_what_is_left_beside_it(x64):
    """r1 of one index leaves r2 no more than the two of the mode between."""
    net = network_of("tt:4,order=2,in=2x2,out=2x3,layout=split")
    assert [net.size(bond) for bond in net.bonds] == [2, 4, 4, 3]
    cores = scaled(net, cores_of(net), "r1", 1, 0.0)
    made, left = pruned(net, cores, 0.0)
    assert [made.size(bond) for bond in made.bonds] == [1, 2, 4, 3]
    np.testing.assert_allclose(tensor(made, left), tensor(net, cores), rtol=1e-11, atol=1e-12)


def test_a_block_that_is_cut_to_less_than_its_bonds(x64):
    net = network_of("bt:3x3x3,blocks=2,layout=split,order=1", (3, 3, 3))
    cores = cores_of(net)
    for index in (0, 2):
        for bond in net.bonds[1:3]:
            cores = scaled(net, cores, bond, index, 0.0)
    made, left = pruned(net, cores, 0.0)
    assert [made.size(bond) for bond in made.bonds] == [2, 1, 1, 1]  # 1 by what is beside it
    np.testing.assert_allclose(tensor(made, left), tensor(net, cores), rtol=1e-11, atol=1e-12)


def test_the_threshold_is_a_share_of_the_largest_of_the_bond(x64):
    net = network_of("cp:4")
    cores = cores_of(net)
    sizes = factorization.contributions(net, cores, "r")
    for index, size in enumerate((1.0, 0.2, 0.05, 0.01)):
        cores = scaled(net, cores, "r", index, size / sizes[index])
    for threshold, left in ((0.0, 4), (0.03, 3), (0.1, 2), (0.5, 1)):
        made, own = pruned(net, cores, threshold)
        assert made.size("r") == left
        np.testing.assert_array_equal(own["factor_i0"], cores["factor_i0"][:, :left])
    zero = {name: 0 * core for name, core in cores.items()}
    assert pruned(net, zero, 0.0)[0].size("r") == 1
    for threshold in (1.0, -0.1, float("nan")):
        with pytest.raises(UserError, match="allowed a share from 0 on, below 1"):
            pruned(net, cores, threshold)


def test_kernels_of_one_network_keep_as_many(x64):
    net = network_of("tucker:3x4")
    cores = [cores_of(net, seed) for seed in (0, 1)]
    cores[0] = scaled(net, scaled(net, cores[0], "r_i0", 0, 0.0), "r_i0", 2, 0.0)
    cores[1] = scaled(net, cores[1], "r_i0", 1, 0.0)
    made, found = factorization.pruned_together(net, cores, 0.0)
    assert (made.size("r_i0"), made.size("r_o0")) == (2, 4)
    for before, after in zip(cores, found, strict=True):
        np.testing.assert_allclose(tensor(made, after), tensor(net, before), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("text", "low"), [("cp:6", "cp:2"), ("tt:5,order=2", "tt:2,order=2")])
def test_the_lasso_finds_the_rank_of_its_target(text, low):
    """A kernel is fitted to one of low rank: surplus indices come to nothing, and are cut.

    Without a lasso all indices share the target, and none can go.
    """
    net, low = (network_of(given, (8, 8)) for given in (text, low))
    target = factorization.reconstruct(low, singles(cores_of(low, 3)))
    target = target / jnp.sqrt(jnp.mean(target**2))
    optimizer = optax.adam(optax.linear_schedule(0.03, 0.0, 600))

    @jax.jit
    def fitted(cores, lasso):
        def loss(cores):
            error = factorization.reconstruct(net, cores) - target
            return jnp.sum(jnp.square(error)) / 2 + lasso * factorization.rank_lasso(net, cores)

        def step(carry, _):
            cores, state = carry
            updates, state = optimizer.update(jax.grad(loss)(cores), state)
            return (optax.apply_updates(cores, updates), state), None

        with jax.numpy_dtype_promotion("standard"):
            return jax.lax.scan(step, (cores, optimizer.init(cores)), None, 600)[0][0]

    start = singles({name: core / 2 for name, core in cores_of(net).items()})
    found = fitted(start, 1.0)
    made, left = pruned(net, found, 0.01)
    assert made == low
    kernel = factorization.reconstruct(net, found)
    # What was cut has come to less than a thousandth; what stays is near the target, and shrunk.
    np.testing.assert_allclose(factorization.reconstruct(made, left), kernel, atol=1e-3)
    assert np.linalg.norm(kernel - target) < 0.1 * np.linalg.norm(target)
    assert pruned(net, fitted(start, 0.0), 0.01)[0] == net


def singles(cores):
    return {name: jnp.asarray(core, jnp.float32) for name, core in cores.items()}
