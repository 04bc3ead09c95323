"""One network for the kernels of several layers: the number of the layer is one more mode of it.

T-Net (Kossaifi et al., arXiv 1904.02698): the kernels K_1 ... K_n of layers of one shape are the
slices of one tensor `(n, *kernel_size, in, features)`, which is factorized as a whole:

    K_i = contraction of the cores, the one with the mode of layers at i

At i, that core has bonds alone. It is contracted into a neighbour, so that what a layer computes
with is a network like any other: of CP, Tucker and block terms without one factor, of chains, rings
and trees without one end.
"""

import dataclasses
import functools

from jax import Array, lax

from efficient_nets.ops.factorization.network import LAYERS, Cores, Network, contract


def layer_of(network: Network, cores: Cores, index: int) -> tuple[Network, dict[str, Array]]:
    """The network of one layer's kernel `(*kernel_size, in, features)`, and its cores.

    Args:
      network: Of `Factorization.network(kernel_shape, layers)`.
      cores: Its cores.
      index: Of the layer, from 0.
    """
    own, neighbour, indices = _absorbed(network)
    axis = network.indices[own].index(LAYERS)
    slice_ = lax.index_in_dim(cores[own], index, axis, keepdims=False)
    bonds = tuple(i for i in network.indices[own] if i != LAYERS)
    # Of parameters, as the kernel that a dense layer holds.
    merged = contract(
        [(slice_, bonds), (cores[neighbour], network.indices[neighbour])],
        indices,
        precision=lax.Precision.HIGHEST,
    )
    left = {name: core for name, core in cores.items() if name != own}
    return layer_network(network), left | {neighbour: merged}


@functools.lru_cache(maxsize=4096)
def layer_network(network: Network) -> Network:
    """The network that `layer_of` gives, the same for all layers."""
    own, neighbour, indices = _absorbed(network)
    cores = tuple(
        (name, indices if name == neighbour else of) for name, of in network.cores if name != own
    )
    left = {index for _, of in cores for index in of}
    return dataclasses.replace(
        network,
        cores=cores,
        sizes=tuple((index, size) for index, size in network.sizes if index in left),
        spatial=tuple(mode for mode in network.spatial if mode != LAYERS),
        kernel_shape=network.kernel_shape[1:],
    )


def scale_layers(network: Network, cores: Cores, factors: Array) -> dict[str, Array]:
    """The cores whose kernels are those of these cores, each times its factor `(n,)`."""
    own, *_ = _absorbed(network)
    of = network.indices[own]
    return {**cores, own: contract([(cores[own], of), (factors, (LAYERS,))], of)}


@functools.lru_cache(maxsize=4096)
def _absorbed(network: Network) -> tuple[str, str, tuple[str, ...]]:
    """The core with the mode of layers, a neighbour, and the indices that both make.

    That is the one with most bonds to it - of block terms not those that share their number alone -
    and of these the smallest.
    """
    of = network.indices
    own = next(name for name, indices in of.items() if LAYERS in indices)
    bonds = [index for index in of[own] if index != LAYERS]
    others = [name for name in of if name != own]
    neighbour = min(
        others, key=lambda name: (-len(set(of[name]) & set(bonds)), network.size(*of[name]))
    )
    elsewhere = {i for name, indices in of.items() if name not in (own, neighbour) for i in indices}
    merged = dict.fromkeys([*of[neighbour], *bonds])
    return own, neighbour, tuple(i for i in merged if i in elsewhere or i in network.modes)
