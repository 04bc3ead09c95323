"""The matrices of Winograd's minimal filtering F(m, r), exactly, for any m, r and points.

m outputs of a filter of r taps from a tile of `a = m + r - 1` inputs, with a multiplications:

    y = A' [(G g) * (B' d)]        y_i = sum_k g_k d_(i + k)        (Lavin and Gray, equation 6)

This is the transpose of the Cook-Toom algorithm, which multiplies polynomials of m and r
coefficients by their values at a points p, the last one infinity: with V_n the values of the powers
up to n - 1 at the points,

    A = V_m,  G = V_r,  B' = V_a^-T

and any diagonal D with its inverse may go between G and B. D_i = prod_j (p_i - p_j) makes B' whole
for whole points, as Lavin and Gray have it.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from efficient_nets.errors import UserError
from efficient_nets.ops.winograd.points import Points

Matrix = tuple[tuple[Fraction, ...], ...]


class Transforms(NamedTuple):
    """The matrices of F(m, r) with a = m + r - 1: of fractions, or of floats.

    Attributes:
      AT: A', `(m, a)`, of outputs.
      G: `(a, r)`, of kernels.
      BT: B', `(a, a)`, of inputs.
    """

    AT: Sequence
    G: Sequence
    BT: Sequence


def _powers(points: Points, number: int) -> list[list[Fraction]]:
    """V: of each point, infinity last, the powers up to number - 1."""
    rows = [[point**power for power in range(number)] for point in points]
    return [*rows, [Fraction(power == number - 1) for power in range(number)]]


def _times(left: list[Fraction], root: Fraction) -> list[Fraction]:
    """Coefficients of a polynomial, lowest first, times (x - root)."""
    shifted, scaled = [Fraction(0), *left], [*(-root * value for value in left), Fraction(0)]
    return [a + b for a, b in zip(shifted, scaled, strict=True)]


def _matrix(rows) -> Matrix:
    return tuple(map(tuple, rows))


def cook_toom(tile: int, taps: int, points: Points) -> Transforms:
    """The exact transforms of F(tile, taps), as fractions.

    Args:
      tile: m, outputs of a tile, at least 1.
      taps: r of the filter, at least 1.
      points: The `tile + taps - 2` finite points, all different.

    Raises:
      UserError: on another number of points, or two that are the same.
    """
    size = tile + taps - 1
    if tile < 1 or taps < 1 or len(points) != size - 1 or len(set(points)) < len(points):
        raise UserError(
            f"F({tile}, {taps}) takes {size - 1} different points, not "
            f"({', '.join(map(str, points))})"
        )
    whole = [Fraction(1)]
    for point in points:
        whole = _times(whole, point)
    inputs, scales = [], []
    for i, point in enumerate(points):
        others, scale = [Fraction(1)], Fraction(1)
        for j, other in enumerate(points):
            if j != i:
                others, scale = _times(others, other), scale * (point - other)
        # Row i of V^-T is the Lagrange polynomial prod_j (x - p_j) / D_i.
        inputs.append([*others, Fraction(0)])
        scales.append(scale)
    inputs.append(whole)
    scales.append(Fraction(1))
    kernel = [
        [value / scale for value in row]
        for row, scale in zip(_powers(points, taps), scales, strict=True)
    ]
    output = zip(*_powers(points, tile), strict=True)
    return Transforms(_matrix(output), _matrix(kernel), _matrix(inputs))


def as_floats(transforms: Transforms) -> Transforms:
    """The nearest float64 arrays."""
    return Transforms(*(np.array([list(map(float, row)) for row in m]) for m in transforms))


def legendre(size: int) -> Matrix:
    """P, `(size, size)`: row n has the coefficients of the Legendre polynomial P_n, highest term 1.

    Barabasz et al., arXiv 2004.11077, take it as the base that data are written in between two
    rounded steps: `B' d = (B' P^-1) (P d)`.
    """
    rows = [[Fraction(n == 0) for n in range(size)], [Fraction(n == 1) for n in range(size)]]
    for n in range(1, size - 1):
        # Monic: P_(n+1) = x P_n - n^2 / (4 n^2 - 1) P_(n-1).
        factor = Fraction(n * n, 4 * n * n - 1)
        shifted = [Fraction(0), *rows[n][:-1]]
        rows.append([a - factor * b for a, b in zip(shifted, rows[n - 1], strict=True)])
    return _matrix(rows[:size])


def inverse(matrix: Matrix) -> Matrix:
    """Of a square matrix of fractions, exactly."""
    size = len(matrix)
    rows = [[*row, *(Fraction(i == j) for j in range(size))] for i, row in enumerate(matrix)]
    for i in range(size):
        pivot = next(j for j in range(i, size) if rows[j][i])
        rows[i], rows[pivot] = rows[pivot], rows[i]
        rows[i] = [value / rows[i][i] for value in rows[i]]
        for j in range(size):
            if j != i and rows[j][i]:
                factor = rows[j][i]
                rows[j] = [a - factor * b for a, b in zip(rows[j], rows[i], strict=True)]
    return _matrix(row[size:] for row in rows)


def product(left: Matrix, right: Matrix) -> Matrix:
    columns = list(zip(*right, strict=True))
    return _matrix(
        [sum(a * b for a, b in zip(row, column, strict=True)) for column in columns] for row in left
    )


def amplification(transforms: Transforms) -> float:
    """Of how many roundings the largest sum is made, beside its value: the bound of the 1-D error.

    `max_i sum_u |A'_iu| sum_k |G_uk| sum_j |B'_uj|` over `r`, the same of the plain filter: the
    error of y is at most about as many units of rounding of max |g| max |d| (as Barabasz et
    al. bound it, arXiv 1803.10986). In 2-D it is the square.
    """
    output, kernel, inputs = (np.abs(m) for m in as_floats(transforms))
    taps = kernel.shape[1]
    return float(np.max(output @ (kernel.sum(1) * inputs.sum(1))) / taps)


def condition(points: Points) -> float:
    """The condition number of the square matrix of powers at the points and infinity."""
    return float(np.linalg.cond(np.array(_powers(points, len(points) + 1), float)))
