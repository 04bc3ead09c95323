"""The algorithm axis: direct convolution, or Winograd's with a tile and what its transforms are.

Short forms are 'direct', or 'winograd:M' and any of these behind it, with commas between:

    flex            the transforms are learned, each layer its own
    legendre        tiles are written in the base of Legendre polynomials in between
    points=NAME     the polynomials' points, see `points.SETS`
    taps=R          kernels are cut into pieces of at most R taps an axis

The long form is a mapping with the fields of `Winograd`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from efficient_nets import names
from efficient_nets.errors import UserError
from efficient_nets.ops.winograd import points
from efficient_nets.ops.winograd.transforms import (
    Matrix,
    Transforms,
    cook_toom,
    inverse,
    legendre,
    product,
)

DIRECT = "direct"
MAX_SIZE = 16  # of a tile with its border; float32 has no correct digit left long before
BASES = {
    "canonical": "powers",
    "legendre": "Legendre polynomials, arXiv 2004.11077: sums of terms that cancel less",
}


@dataclasses.dataclass(frozen=True)
class Winograd:
    """Winograd's convolution (arXiv 1509.09308), F(tile, taps) along each spatial axis.

    Attributes:
      tile: m, the outputs of a tile along each axis.
      learned: The transforms are parameters of the layer that start as the exact ones, 'flex' in
        arXiv 2002.10711; else they are constants.
      points: Name of the polynomials' points, see `points.SETS`.
      base: A key of `BASES`.
      taps: Kernels with more taps along an axis are cut into equal pieces of at most so many (DWM,
        arXiv 2002.00552); 0: they are not.
      transformed: The layer holds transformed kernels, `(taps, parts * in/groups, features)`: of a
        net for use, see `layers.transform_kernels`.
    """

    tile: int
    learned: bool = False
    points: str = "half"
    base: str = "canonical"
    taps: int = 0
    transformed: bool = False

    def __post_init__(self):
        for field, least in (("tile", 2), ("taps", 0)):
            value = getattr(self, field)
            if type(value) is not int or not least <= value < MAX_SIZE:
                raise UserError(f"algorithm.{field}={value!r}: allowed {least} to {MAX_SIZE - 1}")
        if self.taps == 1:
            raise UserError(
                "algorithm.taps=1: pieces of one tap save nothing; allowed 0, 2, 3, ..."
            )
        if not isinstance(self.learned, bool):
            raise UserError(f"algorithm.learned={self.learned!r}: allowed True, False")
        names.pick("algorithm.base", self.base, BASES)
        points.points(self.points, self.tile + 1)

    def __str__(self) -> str:
        """The short form."""
        parts = [f"winograd:{self.tile}"]
        parts += ["flex"] if self.learned else []
        parts += ["legendre"] if self.base == "legendre" else []
        parts += [f"points={self.points}"] if self.points != "half" else []
        parts += [f"taps={self.taps}"] if self.taps else []
        parts += ["transformed"] if self.transformed else []  # which no config can ask for
        return ",".join(parts)

    def check_taps(self, taps: int) -> None:
        """Raises a UserError if a tile for so many taps is too large."""
        if self.tile + taps - 1 > MAX_SIZE:
            raise UserError(
                f"algorithm='{self}': tiles for {taps} taps have {self.tile + taps - 1} values "
                f"along an axis, allowed are {MAX_SIZE}; give a smaller tile, or taps=3"
            )

    def transforms(self, taps: int) -> Transforms:
        """Those of F(tile, taps), as fractions, behind the change of base where there is one."""
        self.check_taps(taps)
        tile = self.tile if taps > 1 else 1
        exact = cook_toom(tile, taps, points.points(self.points, tile + taps - 2))
        bases = self.bases(taps)
        if bases is None:
            return exact
        return Transforms(
            product(inverse(bases.AT), exact.AT),
            product(exact.G, inverse(bases.G)),
            product(exact.BT, inverse(bases.BT)),
        )

    def bases(self, taps: int) -> Transforms | None:
        """What writes tiles and kernels in another base, and brings outputs back from it."""
        if self.base == "canonical":
            return None
        tile = self.tile if taps > 1 else 1
        # V P' has the values of the Legendre polynomials at the points; what it is inserted for
        # stands behind V in A and G, and behind its inverse in B.
        return Transforms(
            inverse(legendre(tile)),
            inverse(transposed(legendre(taps))),
            legendre(tile + taps - 1),
        )


def transposed(matrix: Matrix) -> Matrix:
    return tuple(zip(*matrix, strict=True))


def parse(value: Any) -> Winograd | str:
    """'direct', or a `Winograd`, of a short or long form.

    Raises:
      UserError: on what is neither.
    """
    if isinstance(value, Winograd) or value == DIRECT:
        return value
    if isinstance(value, Mapping):
        fields = [f.name for f in dataclasses.fields(Winograd) if f.name != "transformed"]
        names.check_fields("algorithm", value, fields)
        if "tile" not in value:
            raise UserError("algorithm has no 'tile': give outputs of a tile, as in tile=4")
        return Winograd(**value)
    return Winograd(**_short_form(value))


def _short_form(text: Any) -> dict[str, Any]:
    name, colon, rest = text.partition(":") if isinstance(text, str) else (text, "", "")
    names.pick("algorithm", name, {DIRECT: None, "winograd": None})
    if name == DIRECT:
        raise UserError(f"algorithm={text!r}: 'direct' takes nothing behind it")
    number, *options = rest.split(",")
    if not number.isdecimal():
        raise UserError(f"algorithm={text!r}: give a tile's outputs, as in 'winograd:4'")
    found: dict[str, Any] = {"tile": int(number)}
    for option in options:
        key, _, given = option.partition("=")
        if option == "flex":
            new = {"learned": True}
        elif option == "legendre":
            new = {"base": "legendre"}
        elif key == "points" and given:
            new = {"points": given}
        elif key == "taps" and given.isdecimal():
            new = {"taps": int(given)}
        else:
            raise UserError(
                f"algorithm={text!r}: {option!r} is not understood; allowed are flex, legendre, "
                "points=NAME, taps=R"
            )
        if new.keys() & found.keys():
            raise UserError(f"algorithm={text!r}: {key!r} is given twice")
        found |= new
    return found
