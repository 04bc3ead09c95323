"""What keeps the bonds of a factorized kernel from being used where they are not needed.

Tensor dropout leaves out random indices of the bonds in training; the rank lasso makes indices that
are not needed small, so that `pruning` can take them out.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from efficient_nets.ops import linear_maps
from efficient_nets.ops.factorization.network import Cores, Network


def wide_bonds(network: Network) -> tuple[str, ...]:
    """The bonds that have something to leave out: of sizes above 1, that of blocks included."""
    return tuple(bond for bond in network.bonds if network.size(bond) > 1)


def dropout_masks(network: Network, rate: float, key: Array) -> dict[str, Array]:
    """What multiplies the indices of each bond of a size above 1: `(size,)`.

    Each index is 0 with probability `rate` and else `1 / (1 - rate)`, independently of all others.
    That all indices of a bond are 0, and the kernel with them, is possible: a mask that always kept
    one would have another mean than 1.
    """
    bonds = wide_bonds(network)
    kept = 1 - rate
    return {
        bond: jnp.where(jax.random.bernoulli(own, kept, (network.size(bond),)), 1 / kept, 0.0)
        for bond, own in zip(bonds, jax.random.split(key, len(bonds)), strict=True)
    }


def masked(network: Network, cores: Cores, masks: Mapping[str, Array]) -> dict[str, Array]:
    """The cores whose contraction has each index of a bond multiplied by its mask.

    The sum over a bond multiplies the same index of all cores that have it, so that one of them,
    here the first, is multiplied.
    """
    found = dict(cores)
    for bond, mask in masks.items():
        name, indices = next((n, of) for n, of in network.cores if bond in of)
        shape = [network.size(bond) if index == bond else 1 for index in indices]
        found[name] = found[name] * mask.astype(found[name].dtype).reshape(shape)
    return found


def dropped(network: Network, cores: Cores, rate: float, key: Array) -> dict[str, Array]:
    """Tensor dropout (Kolbeinsson et al., arXiv 1902.10758): `masked` by `dropout_masks`.

    The kernel is a sum with one term for each choice of an index of each bond,

        kernel = sum over (i_1, ..., i_B) of term(i_1, ..., i_B)
        dropped = sum of m_1[i_1] ... m_B[i_B] term(i_1, ..., i_B),

    whatever the form. The masks m_b are independent with mean 1, and a term has one factor of each,
    so that E[dropped] = kernel. The variance grows with the number of bonds B: a term is kept with
    probability `(1 - rate)^B`, and is `(1 - rate)^-B` times as large then.

    Args:
      network: Of the kernel.
      cores: By name.
      rate: The probability with which an index is dropped, in [0, 1).
      key: Of this draw.
    """
    return masked(network, cores, dropout_masks(network, rate, key))


def slice_norms(network: Network, cores: Cores) -> dict[str, dict[str, Array]]:
    """Frobenius norms of the slices of cores, `{bond: {core: (size,)}}`, of bonds above 1.

    The gradient of a norm of 0 is 0.
    """
    found = {bond: {} for bond in wide_bonds(network)}
    for name, indices in network.cores:
        core = cores[name].astype(linear_maps.wide(cores[name].dtype))
        for axis, bond in enumerate(indices):
            if bond in found:
                others = tuple(other for other in range(core.ndim) if other != axis)
                squares = jnp.sum(jnp.square(core), axis=others)
                positive = squares > 0
                roots = jnp.sqrt(jnp.where(positive, squares, 1))
                found[bond][name] = jnp.where(positive, roots, 0)
    return found


def rank_lasso(network: Network, cores: Cores) -> Array:
    """The group lasso of the bonds: a scalar, to be added to the loss times a factor.

        penalty = sum over bonds b of sizes above 1, their indices i, and the cores C that have b,
                  of |C[b = i]|,

    the Frobenius norms of the slices. There are no learned gates, as what they take from an index
    a core can give back: `g a` is the same for g / 2 and 2 a, and the penalty of g alone is half.
    Here all that an index multiplies is counted. A scale that goes from one core to another takes
    from one norm what it adds to the other, and the least sum over all such scales is where the
    norms are the same: of d cores, `d (|C_1[i]| ... |C_d[i]|)^(1/d)`, which is 0 only where the
    index adds nothing. For two cores that is `2 sum_i s_i^(1/2)` of the singular values of their
    product, its Schatten-1/2 quasi-norm (Fan et al., arXiv 1911.05774): nearer to the rank than
    the nuclear norm, which half the squares of the norms, weight decay, have as their least. The
    pull on a slice has the same size whatever the slice's, so that those that are not needed
    reach 0 and do not only become small. A step of SGD takes the learning rate times the factor
    off a norm: over a run the sum of the rates times the factor is to be about what a norm is, of
    the order of 1, for an index to go.

    A norm behind the layer undoes a scale of the whole kernel, also one that this makes smaller:
    indices are weighed against each other there.
    """
    norms = jax.tree.leaves(slice_norms(network, cores))
    return jnp.asarray(sum(map(jnp.sum, norms), 0.0))
