"""Bonds cut to the indices that the kernel is made of; of numbers, as sizes depend on them."""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
import opt_einsum
from jax import Array

from efficient_nets.errors import UserError
from efficient_nets.ops.factorization import ranks
from efficient_nets.ops.factorization.network import Cores, Network
from efficient_nets.ops.factorization.regularization import wide_bonds


def pruned_together(
    network: Network, kernels: Sequence[Cores], threshold: float
) -> tuple[Network, list[dict[str, Array]]]:
    """A smaller network, and cores of it that make nearly the same kernels.

    An index of a bond goes if its contribution is no more than this share of the largest of its
    bond; one always stays, and of several kernels, which share a network, as many as most have
    need of. What goes with threshold 0 contributes exactly nothing. A bond that is then
    larger than what the rest of a core spans, having lost indices of its other bonds, is made as
    small as that by a QR decomposition, which leaves the kernel as it is.

    Args:
      network: Of all kernels.
      kernels: The cores of each.
      threshold: In [0, 1).

    Raises:
      UserError: on another threshold.
    """
    if not 0 <= threshold < 1:
        raise UserError(f"threshold={threshold}: allowed a share from 0 on, below 1")
    dtypes = {name: core.dtype for name, core in kernels[0].items()}
    kernels = [_as_doubles(cores) for cores in kernels]
    least: dict[str, int] = {}
    while True:
        found = [_cut(network, cores, threshold, least) for cores in kernels]
        networks = [own for own, _ in found]
        if all(own == networks[0] for own in networks):
            break
        least = {b: max(own.size(b) for own in networks) for b in network.bonds}
    network, kernels = networks[0], [cores for _, cores in found]
    while (excess := ranks.excess(network)) is not None:
        kernels = [_absorbed(network, cores, *excess) for cores in kernels]
        bond, _, most = excess
        network = network.with_sizes({bond: most})
    return network, [
        {name: jnp.asarray(core, dtypes[name]) for name, core in cores.items()} for cores in kernels
    ]


def contributions(network: Network, cores: Cores, bond: str) -> np.ndarray:
    """Norms of the kernels that the indices of a bond make alone, all others being 0: `(size,)`.

        squares[b] = <kernel of b, kernel of b>, a contraction of all cores with themselves

    in which only the modes and b are shared: the kernels are not made, and the scales that cores
    have among themselves do not matter. In float64, so that shares are exact to some 1e-8. Modes
    that make up more than the kernel count as a whole.
    """
    shared = {*network.modes, bond}
    operands = []
    for mark in ("", "'"):
        for name, indices in network.cores:
            own = [index if index in shared else index + mark for index in indices]
            operands += [np.asarray(cores[name], np.float64), own]
    squares = opt_einsum.contract(*operands, [bond])
    return np.sqrt(np.maximum(squares, 0))


def _as_doubles(cores: Cores) -> dict[str, np.ndarray]:
    return {name: np.asarray(core, np.float64) for name, core in cores.items()}


def _cut(network: Network, cores: Cores, threshold: float, least: Mapping[str, int]):
    """Without the weakest indices, but for the `least` numbers that stay."""
    while True:
        before = network
        for bond in wide_bonds(network):
            strengths = contributions(network, cores, bond)
            if not np.isfinite(strengths).all():
                raise UserError("the cores have values that are not finite: nothing can be pruned")
            strong = int(np.sum(strengths > threshold * strengths.max()))
            left = max(strong, least.get(bond, 1))
            kept = np.sort(np.argsort(-strengths, kind="stable")[:left])
            network = network.with_sizes({bond: left})
            cores = {
                name: np.take(cores[name], kept, of.index(bond)) if bond in of else cores[name]
                for name, of in network.cores
            }
        if network == before:
            return network, cores


def _absorbed(network: Network, cores: Cores, bond: str, owner: str, most: int):
    """The same kernel with a bond of this size, which is that of the rest of its core `owner`.

    Of the core as a matrix A `(rest, bond)`, `A' = Q R`: it becomes R', and the other core, that
    the bond ends at, Q' times itself. Blocks each have their own.
    """
    other = next(n for n, of in network.cores if bond in of and n != owner)
    of = network.indices[owner]
    batch = [index for index in of if index == "n"]
    rest = [index for index in of if index not in (bond, "n")]
    order = [of.index(index) for index in (*batch, bond, *rest)]
    lead = [network.size(*batch)] if batch else []
    matrix = np.transpose(cores[owner], order)
    shape = matrix.shape
    q, r = np.linalg.qr(matrix.reshape(*lead, network.size(bond), most))
    made = r.reshape(*lead, most, *shape[len(lead) + 1 :])
    into = [index if index != bond else "new" for index in network.indices[other]]
    joined = opt_einsum.contract(
        q, [*batch, bond, "new"], cores[other], list(network.indices[other]), into
    )
    return {**cores, owner: np.transpose(made, np.argsort(order)), other: joined}
