"""Ranks that a kernel itself asks for: variational Bayes, or the energy that is to be kept.

Both look at singular values of the kernel's unfoldings, so they need numbers, not shapes.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from efficient_nets.ops.factorization import ranks
from efficient_nets.ops.factorization.network import Network
from efficient_nets.ops.factorization.spec import Factorization


def with_ranks(form: Factorization, kernels: Sequence[Array], layers: int = 0) -> Factorization:
    """The same with its ranks as numbers: the largest that one of these kernels asks for.

    With `layers`, each is those of as many layers, one behind another along a first axis.
    """
    shape = kernels[0].shape[1:] if layers else kernels[0].shape
    network = form.network(shape, layers)
    networks = [network]
    if form.of_kernel:
        networks = [of_kernel(network, kernel, form.rank, form.energy) for kernel in kernels]
    bonds = ranks.free_bonds(network)
    largest = {bond: max(other.size(bond) for other in networks) for bond in bonds}
    return of_network(form, network.with_sizes(largest))


def of_network(form: Factorization, network: Network) -> Factorization:
    """The same with the sizes of this network, one of the form's, as numbers."""
    sizes = tuple(network.size(bond) for bond in ranks.free_bonds(network))
    blocks = network.size("n") if form.blocks else 0
    return dataclasses.replace(form, rank=sizes, energy=0.0, blocks=blocks)


def of_kernel(network: Network, kernel: Array, rank: str, energy: float) -> Network:
    """The network with each bond as large as the kernel asks for, at least 1.

    A bond of a chain or tree parts the modes in two: its rank is that of the unfolding between.
    Blocks share it. That of CP is the largest of its leaves', and no tensor has less; that of a
    ring's first core is shared by its two bonds, and one of its others has what the first leaves to
    it. So CP, rings and blocks keep less than the energy that is asked for.

    Args:
      network: Any sizes of bonds.
      kernel: `network.kernel_shape`.
      rank: 'evbmf', or 'energy' with the share of squares to keep in all.
    """
    with jax.ensure_compile_time_eval():
        x = np.asarray(network.padded_kernel(jnp.asarray(kernel)), np.float64)
    splits = {bond: _side(network, bond) for bond in ranks.free_bonds(network)}
    parts = max(len(splits), 1)

    def found(own: tuple[str, ...]) -> int:
        axes = [network.modes.index(mode) for mode in own]
        matrix = np.moveaxis(x, axes, range(len(axes))).reshape(network.size(*own), -1)
        if rank == "evbmf":
            return max(evbmf_rank(matrix), 1)
        return kept_rank(matrix, (1 - energy) / parts)

    blocks = network.size("n") if "n" in network.bonds else 1
    sizes = {bond: -(-found(own) // blocks) for bond, own in splits.items() if own}
    rest = [bond for bond, own in splits.items() if not own]
    modes = [tuple(i for i in of if i in network.modes) for _, of in network.cores]
    if rest == ["r"]:
        sizes["r"] = max(map(found, modes))
    elif rest:
        first, *others = rest
        sizes[first] = max(math.isqrt(found(modes[0])), 1)
        for j, bond in enumerate(others, 1):
            left = tuple(i for own in modes[:j] for i in own)
            sizes[bond] = -(-found(left) // sizes[first])
    return ranks.trimmed(network.with_sizes(sizes))


def _side(network: Network, bond: str) -> tuple[str, ...]:
    """The modes on one side of a bond; none where it does not part the network."""
    owners = [name for name, indices in network.cores if bond in indices]
    indices = {name: set(of) - {bond, "n"} for name, of in network.cores}
    reached, waiting = set(), [owners[0]]
    while waiting:
        name = waiting.pop()
        reached.add(name)
        waiting += [o for o in indices if o not in reached and indices[name] & indices[o]]
    if len(owners) != 2 or owners[1] in reached:
        return ()
    return tuple(mode for mode in network.modes if any(mode in indices[name] for name in reached))


def kept_rank(matrix: np.ndarray, lost: float) -> int:
    """The least rank whose error has no more than this share of the squares."""
    squares = np.square(np.linalg.svd(matrix, compute_uv=False))
    tails = np.append(np.cumsum(squares[::-1])[::-1], 0.0)
    return max(int(np.argmax(tails <= lost * tails[0])), 1)


def evbmf_rank(matrix: np.ndarray) -> int:
    """Rank of empirical variational Bayesian matrix factorization, its noise estimated.

    Nakajima et al., JMLR 14 (2013): for L x M with L <= M and `alpha = L / M`, singular values
    above `sqrt(M sigma^2 (1 + tau) (1 + alpha / tau))`, `tau = 2.5129 sqrt(alpha)` (theorem 2,
    corollary 2), are kept, and sigma^2 is what minimises equation 39.
    """
    short, long = sorted(matrix.shape)
    squares = np.square(np.linalg.svd(matrix, compute_uv=False)) / long
    alpha = short / long
    tau_least = 2.5129 * math.sqrt(alpha)
    x_least = (1 + tau_least) * (1 + alpha / tau_least)
    total = squares.sum()
    if not total > 0:
        return 0

    def tau(x):
        b = x - (1 + alpha)
        return (b + np.sqrt(np.maximum(b * b - 4 * alpha, 0))) / 2

    def objective(noise: float) -> float:
        x = squares / noise
        above = x[x > x_least]
        psi_0 = x[x > 0] - np.log(x[x > 0])
        t = tau(above)
        psi_1 = np.log1p(t) + alpha * np.log1p(t / alpha) - t
        return float(psi_0.sum() + psi_1.sum())

    # Bounds of theorem 3: the largest rank that could be, and no signal at all.
    most = min(math.ceil(short / (1 + alpha)) - 1, short - 1)
    lower = max(squares[most] / x_least, squares[most:].mean(), 1e-12 * total)
    upper = max(total / short, lower)
    noises = np.geomspace(lower, upper, 400)
    noise = min(noises, key=objective)
    return int(np.sum(squares > noise * x_least))
