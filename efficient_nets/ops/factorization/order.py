"""The order in which arrays are contracted: that of least time, of all there are."""

import functools
import math
from collections.abc import Sequence

import opt_einsum

# Operations that a machine makes while it moves a byte. XLA:CPU on two cores makes some 20, an H100
# 300 in bfloat16; the choice is the same on all machines, so that a run is.
INTENSITY = 40
ITEM = 4  # bytes of a number
MOST = 9  # arrays whose orders are all looked at: 3^n pairs of subsets

Indices = tuple[str, ...]


def time(macs: int, moved: int) -> float:
    """In multiply-accumulates; moving numbers takes its time beside computing."""
    return macs + moved * ITEM * INTENSITY / 2


def best(operands: Sequence[Indices], out: Indices, sizes: dict[str, int]) -> list[tuple[int, ...]]:
    """Positions of the pairs that are contracted one after another, as `jnp.einsum` takes them.

    Each pair is taken out, the later first, and its product comes last.

    Args:
      operands: Indices of each array; one may be in any number of them.
      out: Of the result.
      sizes: Of each index.
    """
    return _best(tuple(map(tuple, operands)), tuple(out), tuple(sizes.items()))


@functools.lru_cache(maxsize=65536)
def _best(operands: tuple[Indices, ...], out: Indices, sizes) -> list[tuple[int, ...]]:
    if len(operands) < 3:
        return [tuple(range(len(operands)))]
    sizes = dict(sizes)
    if len(operands) > MOST:
        return _greedy(operands, out, sizes)
    tree = _tree(operands, out, sizes)
    path, left = [], [1 << i for i in range(len(operands))]

    def walk(subset: int) -> None:
        if subset not in tree:
            return  # an operand
        for part in tree[subset]:
            walk(part)
        places = tuple(sorted(left.index(part) for part in tree[subset]))
        path.append(places)
        for place in reversed(places):
            left.pop(place)
        left.append(subset)

    walk((1 << len(operands)) - 1)
    return path


def _tree(operands, out: Indices, sizes: dict[str, int]) -> dict[int, tuple[int, int]]:
    """The pair of subsets of each subset of operands, as bits, that is contracted last."""
    number = len(operands)
    whole = (1 << number) - 1
    owners = {index: sum(1 << i for i, of in enumerate(operands) if index in of) for index in sizes}
    kept, numbers = {}, {}
    for subset in range(1, whole + 1):
        kept[subset] = frozenset(
            index
            for index, mine in owners.items()
            if mine & subset and (mine & ~subset or index in out)
        )
        if subset & (subset - 1) == 0:  # one operand, as it is
            kept[subset] = frozenset(operands[subset.bit_length() - 1])
        numbers[subset] = math.prod(sizes[index] for index in kept[subset])
    cost = {1 << i: 0.0 for i in range(number)}
    tree = {}
    for subset in range(1, whole + 1):
        if subset in cost:
            continue
        found = math.inf
        part = (subset - 1) & subset
        while part:
            other = subset ^ part
            if part > other:
                macs = math.prod(sizes[index] for index in kept[part] | kept[other])
                moved = numbers[part] + numbers[other] + numbers[subset]
                total = cost[part] + cost[other] + time(macs, moved)
                if total < found:
                    found, tree[subset] = total, (part, other)
            part = (part - 1) & subset
        cost[subset] = found
    return tree


def _greedy(operands, out: Indices, sizes: dict[str, int]) -> list[tuple[int, ...]]:
    letters = {index: opt_einsum.get_symbol(i) for i, index in enumerate(sizes)}
    inputs = ["".join(letters[index] for index in indices) for indices in operands]
    shapes = [tuple(sizes[index] for index in indices) for indices in operands]
    equation = f"{','.join(inputs)}->{''.join(letters[index] for index in out)}"
    return opt_einsum.contract_path(equation, *shapes, shapes=True, optimize="greedy")[0]
