"""The neuron axis: how linear maps of one input combine, a table of small parts.

A neuron is named parts: its branches, each a linear map of the input x, of its elementwise square,
or a quadratic form of the window that a kernel sees; an elementwise `combine` of the branches'
values; and the symbolic gradient of that. n is the number of inputs of an output value,
`kernel_h * kernel_w * in_features / groups` for a convolution.

    name      value                          weights      source
    linear    Wx                             n
    t1        x'Qx + Wx                      n(n+1)/2 + n Cheung & Leung 1991; Zoumpourlis 2017
    t2        W x^2                          n            DeClaris & Su 1991
    t3        (Wx)^2                         n            DeClaris & Su 1991
    t4        (Ax)(Bx)                       2n           Bu & Karpatne 2021
    t1&2      x'Qx + W x^2                   n(n+1)/2 + n Milenkovic et al. 1996
    t2&4      (Ax)(Bx) + C x^2               3n           Fan et al. 2018, without biases
    fan       (Ax + a)(Bx + b) + C x^2 + c   3n + 3       Fan et al. 2018, arXiv 1704.08362
    ours      (Ax)(Bx) + Cx                  3n           QuadraLib, arXiv 2204.01701
    qres      (Ax)(Bx) + Ax                  2n           Bu & Karpatne, arXiv 2101.08366
    cqnn      [x;1]'Q[x;1]                   (n+1)(n+2)/2 Mantini & Shah 2021
    t1:R      sum of R (Ux)(Vx), + Wx        (2R + 1) n   t1 with Q = U'V of rank R
    cqnn:R    sum of R (Ux + u)(Vx + v)      2R (n + 1)   cqnn with Q of rank R

Matrices Q of quadratic forms are symmetric, so n(n+1)/2 coefficients hold them (`ops.forms`). A
layer with `use_bias` adds one to each branch of t2 to ours, before the product, and one to the
combined value of t1, t1&2 and qres. fan and cqnn have theirs whether or not a layer asks for some.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

from jax import Array

from efficient_nets import names
from efficient_nets.errors import UserError

# Of a neuron that has both, the part of the output's second moment that initialisation
# 'variance' gives to the products. A product squares an error in its input's scale, so over depth d
# such an error grows by (1 + PRODUCT_SHARE)^d.
PRODUCT_SHARE = 0.25


@dataclasses.dataclass(frozen=True)
class Neuron:
    """How branches combine.

    Attributes:
      branches: Names of the linear maps, in the order `combine` takes them.
      combine: Elementwise, B arrays to one.
      gradient: `(g, *h)` to the B cotangents of `combine` at h.
      products: Elementwise multiplications an output value takes (for counting MACs).
      reads: What each branch reads: 'x', 'square' (x * x) or 'form' (products of pairs of inputs);
        () is x for all.
      bias: 'branch': a layer's `use_bias` gives every branch a bias; 'output': it gives one to the
        combined value.
      biased: The biases belong to the formula: they are there without `use_bias` too.
      rank: Of a low-rank quadratic form, else 0.
      nonnegative: No output is below 0.
      terms: What `combine` sums, each a branch or two branches that it multiplies; () if it is no
        such sum. For looking at nets: what each term gives, and the quadratic form they make.
      relinear: For each branch its role in a start as a linear neuron (ReLinear): 'carry' takes the
        linear weights, 'zero' is 0, 'one' is 1, 'fresh' is multiplied by a zero. () if there is no
        such start.
      moments: Second moment of the output, to the second moments of the branches that give it at
        initialisation, the branches being independent and of mean 0. None if not known.
    """

    branches: tuple[str, ...]
    combine: Callable[..., Array]
    gradient: Callable[..., tuple[Array, ...]]
    products: int = 0
    reads: tuple[str, ...] = ()
    bias: str = "branch"
    biased: bool = False
    rank: int = 0
    nonnegative: bool = False
    terms: tuple[tuple[str, ...], ...] = ()
    relinear: tuple[str, ...] = ()
    moments: Callable[[float], tuple[float, ...]] | None = None

    @functools.cached_property
    def kinds(self) -> dict[str, tuple[int, ...]]:
        """What is read, to the positions of the branches that read it: they are fused."""
        reads = self.reads or ("x",) * len(self.branches)
        return {
            kind: tuple(i for i, k in enumerate(reads) if k == kind) for kind in sorted({*reads})
        }

    def read_by(self, branch: str) -> str:
        return self.reads[self.branches.index(branch)] if self.reads else "x"

    @functools.cached_property
    def scaling(self) -> tuple[str, ...]:
        """Branches whose common factor is one of the output: each term has exactly one of them.

        () where there are none, as in (Wx)^2.
        """
        found = [term[0] for term in self.terms if len(term) == 1]
        for term in self.terms:
            if not set(term) & {*found}:
                found.append(term[0])
        fits = all(sum(name in found for name in term) == 1 for term in self.terms)
        return tuple(found) if fits else ()

    @functools.cached_property
    def shifting(self) -> tuple[str, ...]:
        """Branches that are added and nothing else: what is added to one is added to the output."""
        every = [name for term in self.terms for name in term]
        alone = [term[0] for term in self.terms if len(term) == 1]
        return tuple(name for name in alone if every.count(name) == 1)


def _sum(a, b):
    return a + b


def _both(g, a, b):
    return g, g


def _factors(moment: float, factors: int = 2) -> tuple[float, ...]:
    """Second moments of independent factors of a product that has this one."""
    return (math.sqrt(moment),) * factors


def _with_product(moment: float) -> tuple[float, ...]:
    """Of (a, b, c) in a b + c."""
    return *_factors(PRODUCT_SHARE * moment), (1 - PRODUCT_SHARE) * moment


_T1 = Neuron(
    ("q", "w"),
    _sum,
    _both,
    reads=("form", "x"),
    bias="output",
    terms=(("q",), ("w",)),
    relinear=("zero", "carry"),
    moments=lambda m: (PRODUCT_SHARE * m, (1 - PRODUCT_SHARE) * m),
)
_T2_AND_4 = Neuron(
    ("a", "b", "c"),
    lambda a, b, c: a * b + c,
    lambda g, a, b, c: (g * b, g * a, g),
    products=1,
    reads=("x", "x", "square"),
    terms=(("a", "b"), ("c",)),
    relinear=("carry", "one", "zero"),
    moments=lambda m: (*_factors(m / 2), m / 2),
)

NEURONS = {
    "linear": Neuron(
        ("w",),
        lambda w: w,
        lambda g, w: (g,),
        terms=(("w",),),
        relinear=("carry",),
        moments=lambda m: (m,),
    ),
    "t1": _T1,
    "t2": Neuron(
        ("w",),
        lambda w: w,
        lambda g, w: (g,),
        reads=("square",),
        terms=(("w",),),
        moments=lambda m: (m,),
    ),
    "t3": Neuron(
        ("a",),
        lambda a: a * a,
        lambda g, a: (2 * g * a,),
        products=1,
        nonnegative=True,
        terms=(("a", "a"),),
        moments=lambda m: (math.sqrt(m / 3),),  # E a^4 = 3 (E a^2)^2 of a Gaussian a
    ),
    "t4": Neuron(
        ("a", "b"),
        lambda a, b: a * b,
        lambda g, a, b: (g * b, g * a),
        products=1,
        terms=(("a", "b"),),
        relinear=("carry", "one"),
        moments=_factors,
    ),
    "t1&2": dataclasses.replace(
        _T1, reads=("form", "square"), relinear=(), moments=lambda m: (m / 2, m / 2)
    ),
    "t2&4": _T2_AND_4,
    "fan": dataclasses.replace(_T2_AND_4, biased=True),
    "ours": Neuron(
        ("a", "b", "c"),
        lambda a, b, c: a * b + c,
        lambda g, a, b, c: (g * b, g * a, g),
        products=1,
        terms=(("a", "b"), ("c",)),
        relinear=("fresh", "zero", "carry"),
        moments=_with_product,
    ),
    "qres": Neuron(
        ("a", "b"),
        lambda a, b: a * b + a,
        lambda g, a, b: (g * b + g, g * a),
        products=1,
        bias="output",
        terms=(("a", "b"), ("a",)),
        relinear=("carry", "zero"),
        moments=lambda m: ((1 - PRODUCT_SHARE) * m, PRODUCT_SHARE / (1 - PRODUCT_SHARE)),
    ),
    "cqnn": dataclasses.replace(_T1, biased=True),
}


def _products_gradient(g, factors) -> tuple[Array, ...]:
    """Of `u1 v1 + u2 v2 + ...`: each factor's cotangent is g times its partner."""
    return tuple(g * factors[i ^ 1] for i in range(len(factors)))


def _sum_of_products(factors) -> Array:
    total = factors[0] * factors[1]
    for u, v in zip(factors[2::2], factors[3::2], strict=True):
        total = total + u * v
    return total


def _factor_names(rank: int) -> tuple[str, ...]:
    return tuple(f"{side}{r}" for r in range(1, rank + 1) for side in "uv")


def _factor_pairs(rank: int) -> tuple[tuple[str, str], ...]:
    factors = _factor_names(rank)
    return tuple(zip(factors[::2], factors[1::2], strict=True))


def _low_rank_t1(rank: int) -> Neuron:
    return Neuron(
        (*_factor_names(rank), "w"),
        lambda *h: _sum_of_products(h[:-1]) + h[-1],
        lambda g, *h: (*_products_gradient(g, h[:-1]), g),
        products=rank,
        bias="output",
        rank=rank,
        terms=(*_factor_pairs(rank), ("w",)),
        relinear=(*("fresh", "zero") * rank, "carry"),
        moments=lambda m: (
            *_factors(PRODUCT_SHARE * m / rank, 2 * rank),
            (1 - PRODUCT_SHARE) * m,
        ),
    )


def _low_rank_cqnn(rank: int) -> Neuron:
    return Neuron(
        _factor_names(rank),
        lambda *h: _sum_of_products(h),
        lambda g, *h: _products_gradient(g, h),
        products=rank,
        biased=True,
        rank=rank,
        terms=_factor_pairs(rank),
        relinear=("carry", "one", *("fresh", "zero") * (rank - 1)),
        moments=lambda m: _factors(m / rank, 2 * rank),
    )


LOW_RANK = {"t1": _low_rank_t1, "cqnn": _low_rank_cqnn}
MAX_RANK = 4096  # two branches each; a layer's own bound, its inputs, is known later


def neuron(name: str) -> Neuron:
    """The neuron of a name: a key of `NEURONS`, or one of `LOW_RANK` with a rank, as `t1:4`.

    Raises:
      UserError: if there is none; says what is allowed.
    """
    base, colon, argument = name.partition(":") if isinstance(name, str) else (name, "", "")
    if not colon:
        return names.pick("neuron", name, NEURONS)
    number = int(argument) if argument.isdecimal() and len(argument) < 10 else 0
    if base not in LOW_RANK or not 1 <= number <= MAX_RANK:
        allowed = ", ".join(f"'{form}:RANK'" for form in LOW_RANK)
        raise UserError(
            f"neuron={name!r}: a rank goes with {allowed} alone, and is a whole number from 1 to "
            f"{MAX_RANK}"
        )
    return _low_rank(base, number)


@functools.cache
def _low_rank(base: str, rank: int) -> Neuron:
    return LOW_RANK[base](rank)
