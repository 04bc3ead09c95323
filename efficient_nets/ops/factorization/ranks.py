"""The sizes of bonds: from a number, a share of the parameters, or the kernel itself."""

from collections.abc import Callable, Sequence

from efficient_nets.errors import UserError
from efficient_nets.ops.factorization.network import Network


def free_bonds(network: Network) -> tuple[str, ...]:
    """The bonds whose sizes a rank gives: all but the number of blocks."""
    return tuple(bond for bond in network.bonds if bond != "n")


def trimmed(network: Network) -> Network:
    """The same with no bond larger than what the rest of a core that has it can span.

    More adds parameters and no tensors. A bond of more than two cores, as CP has, stays: the rank
    of a tensor may be above its sizes.
    """
    while (found := excess(network)) is not None:
        bond, _, most = found
        network = network.with_sizes({bond: most})
    return network


def excess(network: Network) -> tuple[str, str, int] | None:
    """The first bond to be trimmed, the core with the least rest, and the size of that rest."""
    for bond in free_bonds(network):
        owners = {name: indices for name, indices in network.cores if bond in indices}
        if len(owners) > 2:
            continue
        spans = {
            name: network.size(*(i for i in indices if i not in (bond, "n")))
            for name, indices in owners.items()
        }
        owner = min(spans, key=spans.get)
        if spans[owner] < network.size(bond):
            return bond, owner, spans[owner]
    return None


def of_numbers(network: Network, ranks: Sequence[int]) -> Network:
    """One size for each bond, in the order of `free_bonds`.

    Raises:
      UserError: if there are more or fewer.
    """
    bonds = free_bonds(network)
    if len(ranks) != len(bonds):
        raise UserError(
            f"kernel.rank={tuple(ranks)}: give one number, or one for each of the bonds "
            f"{', '.join(bonds)}"
        )
    return trimmed(network.with_sizes(dict(zip(bonds, ranks, strict=True))))


def of_share(network: Network, share: float, *, proportional: bool) -> Network:
    """The largest bonds with which the cores have no more than this share of the kernel's numbers.

    Equal ones, or with `proportional` one share of what each leaf can span. Even bonds of 1 may
    take more than that: they are what is left then.
    """
    budget = share * network.dense_params
    bonds = free_bonds(network)
    full = trimmed(network.with_sizes({bond: network.dense_params for bond in bonds}))
    most = max(map(full.size, bonds), default=1)

    def sized(step: int) -> Network:
        if proportional:
            sizes = {b: max(round(full.size(b) * step / most), 1) for b in bonds}
        else:
            sizes = dict.fromkeys(bonds, step)
        return trimmed(network.with_sizes(sizes))

    step = _last(lambda step: sized(step).params <= budget, _bound(network, budget))
    return sized(max(step, 1))


def _bound(network: Network, budget: float) -> int:
    """No bond is larger: each core that has it holds at least as many numbers."""
    return max(int(budget), 1)


def _last(able: Callable[[int], bool], most: int) -> int:
    """The last of 0 ... most that is able, all before it being so; 0 counts as able."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if able(middle):
            low = middle
        else:
            high = middle - 1
    return low
