"""Sizes of modes: a number of features as a product of small ones."""

import math


def balanced(size: int, order: int) -> tuple[int, ...]:
    """`order` numbers, falling, whose product is `size` or, where it has no such, little more.

    Of all factorizations the one of least sum; where its largest number is more than twice the
    balanced one, size^(1/order), as of a prime, that of the next sizes up to one and a quarter.
    """
    ideal = size ** (1 / order)
    best = None
    for padded in range(size, max(size + 1, math.ceil(1.25 * size) + 1)):
        found = _least_sum(padded, order)
        if best is None or max(found) < max(best):
            best = found
        if max(best) <= max(2 * ideal, 2):
            break
    return best


def _least_sum(size: int, order: int, most: int | None = None) -> tuple[int, ...]:
    if order == 1:
        return (size,)
    best = None
    # The largest factor first; it is no less than the root.
    least = math.ceil(size ** (1 / order) - 1e-9)
    for first in range(least, (most or size) + 1):
        if size % first:
            continue
        if first ** (order) < size:
            continue
        rest = _least_sum(size // first, order - 1, first)
        if rest is not None and (best is None or first + sum(rest) < sum(best)):
            best = (first, *rest)
    return best
