"""Points at which a Winograd transform evaluates polynomials: named sets, as exact fractions.

A tile of `a = m + r - 1` values takes a - 1 of them; the last one is infinity in every set. Their
size decides how much rounding is amplified: see `transforms.amplification`.
"""

import math
from collections.abc import Callable, Iterator
from fractions import Fraction

from efficient_nets import names
from efficient_nets.errors import UserError

Points = tuple[Fraction, ...]


def _both(values: Iterator[Fraction]) -> Iterator[Fraction]:
    """0, then each value and its opposite."""
    yield Fraction(0)
    for value in values:
        yield value
        yield -value


def _rest(*first: str) -> Iterator[Fraction]:
    """These, then 1, 2, 1/2, 4, 1/4, 3, 1/3, ... as far as they are others."""
    seen = [Fraction(value) for value in first]
    yield from seen
    for number in (1, 2, 4, 3, 6, 5, 8, 7):
        for value in (Fraction(number), Fraction(1, number)):
            if value not in seen:
                seen.append(value)
                yield value


def _take(count: int, values: Iterator[Fraction]) -> Points:
    return tuple(value for value, _ in zip(_both(values), range(count), strict=False))


def _reciprocal(count: int, *given: str) -> Points:
    """0, +-1 where that many are needed, and groups {+-c, +-1/c}."""
    groups, left = divmod(max(count - 1, 0), 4)
    groups += left == 3
    chosen = [_fraction(text) for text in given]
    defaults = [Fraction(*pair) for pair in ((3, 5), (5, 6), (1, 3), (1, 5))]
    chosen += [c for c in defaults if c not in chosen and 1 / c not in chosen]
    if groups > len(chosen):
        raise UserError(f"points='reciprocal': {count} points take {groups} values c; name them")
    positive = [Fraction(1)] if left else []
    for c in chosen[:groups]:
        positive += [c, 1 / c]
    found = _take(count, iter(positive))
    if len(set(found)) < len(found):
        raise UserError(f"points='reciprocal:{':'.join(given)}': a point comes twice")
    return found


# By name `(count, *texts behind colons) -> points`.
SETS: dict[str, Callable[..., Points]] = {
    # Lavin and Gray, arXiv 1509.09308: F(2, 3) and F(4, 3); whole numbers beyond.
    "lavin": lambda count: _take(count, map(Fraction, range(1, 16))),
    # As the program of theirs that made F(6, 3): 0, 1, -1, 2, -2, 1/2, -1/2.
    "half": lambda count: _take(count, _rest("1", "2", "1/2")),
    # WinogradAwareNets': F(6, 3) has 3/2 and -3/2 beside those of F(4, 3).
    "three_halves": lambda count: _take(count, _rest("1", "2", "3/2")),
    # Alam et al., arXiv 2201.10369.
    "reciprocal": _reciprocal,
    # NOVA's fractions +-3/5, +-7/6, +-5/6, behind +-1: in this order each tile is conditioned best.
    "nova": lambda count: _take(count, _rest("1", "3/5", "7/6", "5/6")),
}


def _fraction(text: str) -> Fraction:
    try:
        found = Fraction(text)
    except (ValueError, ZeroDivisionError):
        found = Fraction(0)
    if not 0 < abs(found) < math.inf or abs(found) == 1:
        raise UserError(
            f"points={text!r}: give fractions other than 0 and 1, as in 'reciprocal:3/5'"
        )
    return abs(found)


def points(name: str, count: int) -> Points:
    """The finite points of a named set.

    Args:
      name: A key of `SETS`; 'reciprocal:3/5' gives c, and ':3/5:5/6' two of them.
      count: How many, `m + r - 2`.

    Raises:
      UserError: on an unknown name, or a set without so many points.
    """
    key, *texts = name.split(":")
    make = names.pick("points", key, SETS)
    if texts and key != "reciprocal":
        raise UserError(f"points={name!r}: {key!r} takes no numbers")
    return make(count, *texts)
