"""What a quantizer is: a method's functions, a frozen spec, arrays. `fields` makes the spec."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jax import Array, lax

from efficient_nets.ops import straight_through as through

SITES = ("input", "kernel", "output", "gradient")
# Sites inside of a linear map that has transforms, each with the site whose methods it can have.
# Activations are `(taps, N, positions, C)` there, kernels `(taps, in, C)`.
INNER = {
    "transforms": "kernel",
    "transformed_input": "input",
    "transformed_kernel": "kernel",
    "hadamard": "output",
    "between": "output",
}
CORE = "core"  # of a factorized kernel
ROLES = INNER | {CORE: "kernel"}
STEP_GRADIENTS = {
    "paper": lambda n, fan, high: (n * high) ** -0.5,  # LSQ, arXiv 1902.08153, section 2.2
    "none": lambda n, fan, high: 1.0,
    "1/sqrt(n)": lambda n, fan, high: n**-0.5,
    "sqrt(n)": lambda n, fan, high: n**0.5,
    "1/sqrt(fan)": lambda n, fan, high: fan**-0.5,
    "sqrt(fan)": lambda n, fan, high: fan**0.5,
}
NORMALISATIONS = {  # by site; see `normalise`
    "kernel": {
        "none": "as it is",
        "standard": "(x - mean) / deviation of its group",
        "restored": "the same, multiplied and shifted back behind the quantizer",
    },
    "input": {
        "none": "as it is",
        "mean": "divided by mean |x| of its sample, and multiplied back behind the quantizer",
        "variance": "the same with sqrt(mean x^2)",
    },
}
# Option of a learned step, and name of the array then: its logarithm to base 2.
LOG_STEP = "log_step"
# The most whose codes bfloat16 holds, and whose sums of products are exact in float32.
CODED_LEVELS = 256
Values = Mapping[str, Array]


class Arrays(NamedTuple):
    """Of a quantizer: `learned` ones have a gradient, `observed` ones are moved by `observe`."""

    learned: dict[str, Array]
    observed: dict[str, Array]


class Rounded(NamedTuple):
    """What a method makes of x.

    Attributes:
      surrogate: Shape of x; its gradient is the quantizer's.
      codes: Whole numbers of x's type, shape of x, within `quantizers.code_bounds`; None for a
        method without a uniform grid. The values themselves in float epochs.
      scale: Broadcasts to x; the quantized value is `codes * scale`.
      value: The quantized value, where there are no codes.
    """

    surrogate: Array
    codes: Array | None = None
    scale: Array | None = None
    value: Array | None = None


def value(found: Rounded) -> Array:
    """The quantized value, with its gradient."""
    if found.codes is None and found.value is None:
        return found.surrogate
    exact = found.codes * found.scale if found.value is None else found.value
    return through.straight_through(lax.stop_gradient(exact), found.surrogate)


def times(found: Rounded, factor: Array) -> Rounded:
    """The quantized value times a factor that broadcasts to it, with the gradient of both."""
    scale = None if found.scale is None else found.scale * lax.stop_gradient(factor)
    return Rounded(value(found) * factor, found.codes, scale)


@dataclasses.dataclass(frozen=True)
class Method:
    """A quantizer's mathematics at one site: `METHODS[name][site]`.

    Attributes:
      round: `(quantizer, x, arrays) -> Rounded`; arrays are the learned and the observed ones.
      levels: `levels -> bool`: the level counts that it can have.
      most: The greatest one. Above `CODED_LEVELS` values have no codes.
      default: The level count where none is given; 0: one must be given.
      start: `(quantizer, x) -> (learned, observed)`, from values such as those that it will round;
        learned arrays are parameters, observed ones are moved by `observe` in training.
      observe: `(quantizer, x, arrays) -> observed`, or None where nothing moves.
      fit: `(quantizer, lo, hi) -> (learned, observed)` for ranges `(G,)` to cover, or None where
        the method has none of its own.
      output_scale: `(quantizer, x, arrays, linear_map) -> factor` of the map's output, or None.
      options: Fields of its own, with their defaults.
      allowed: Of each of those `(what is allowed, value -> bool)`.
      check: `options -> ` what is wrong with these together, or None.
      takes: Which of the optional fields of `Quantizer` it heeds.
      gradients: The pseudo-gradients that it can have, its own first.
      grouped: Whether it has figures that groups of channels have their own of.
      per: The granularity where none is given.
      signed: Whether it is where nothing is said.
      both_signs: Whether something else can be said.
    """

    round: Callable[["Quantizer", Array, Values], Rounded]
    levels: Callable[[int], bool]
    most: int = 256
    default: int = 0
    start: Callable[["Quantizer", Array], tuple[dict, dict]] | None = None
    observe: Callable[["Quantizer", Array, Values], dict] | None = None
    fit: Callable[["Quantizer", Array, Array], tuple[dict, dict]] | None = None
    output_scale: Callable | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    allowed: Mapping[str, tuple[str, Callable[[Any], bool]]] = dataclasses.field(
        default_factory=dict
    )
    check: Callable[[Mapping[str, Any]], str | None] = lambda options: None
    takes: tuple[str, ...] = ()
    gradients: tuple[str, ...] = ("identity",)
    grouped: bool = False
    per: str = "layer"
    signed: bool = True
    both_signs: bool = False


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """A method at a site. Make one with `fields.quantizer`, which fills in the method's defaults.

    Attributes:
      site: One of `SITES` or `ROLES`.
      method: A name in `METHODS`.
      levels: Number of values that it can give; 2^bits, or 3 for ternary.
      signed: Codes `-L/2 ... L/2 - 1`, for odd L `-(L-1)/2 ... (L-1)/2`, for L = 2 -1 and 1;
        else `0 ... L-1`.
      per: Which values share a range: 'layer', 'channel', 'groups:n' (n groups of channels) or
        'size:n' (groups of n channels); inside of transforms also 'tap' (their first axis) or
        'tap:channel'. Each core has ranges of its own, 'layer' being one; its channels are those of
        its last axis, be it a mode or a bond.
      axis: Of a kernel, whose channels 'per' means: 'out' or 'in'. Those of its input otherwise.
      gradient: Pseudo-gradient, a name in `straight_through.SIGN`.
      step_gradient: Factor of the gradient of a learned step, a name in `STEP_GRADIENTS`.
      power_of_two: Rounds the scale to a power of two (its gradient straight through).
      zero_point: A whole-number zero point, so that a range need not be symmetric.
      normalise: What is done to the values first, a name in `NORMALISATIONS` of the site: of a
        kernel per group, of an input per sample (its first axis), so that no sample's value
        depends on the others.
      post_scale: A learned factor behind it, one a group, that starts at 1.
      pad: 'after': a convolution pads with zeros behind the quantizer (a binary input then has
        three values); 'before': it pads first, and zeros are rounded as other values are.
      loss, loss_norm: Weight of the loss `mean |x - quantized|^p` that is added to the net's, p
        being 1 for 'l1' and 2 for 'l2'. It pulls values to levels, and learned levels to values.
      float_epochs: Epochs at the beginning in which nothing is rounded, and ranges are observed.
      freeze_epoch: The epoch at which ranges stop moving, not before rounding begins; 0: never.
      stop_epoch: The epoch from which nothing is rounded again, and ranges do not move; 0: never.
        It is above the other epochs; a net for use is without such a quantizer.
      stages: `(epoch, levels)` pairs: levels before the last ones. `((0, 16), (2, 8))` has 16
        levels, 8 from epoch 2 on; `levels` are those of the last stage.
      options: The method's own, as sorted pairs.
    """

    site: str
    method: str
    levels: int
    signed: bool
    per: str
    gradient: str
    axis: str = "out"
    step_gradient: str = "paper"
    power_of_two: bool = False
    zero_point: bool = False
    normalise: str = "none"
    post_scale: bool = False
    pad: str = "after"
    loss: float = 0.0
    loss_norm: str = "l2"
    float_epochs: float = 0.0
    freeze_epoch: float = 0.0
    stop_epoch: float = 0.0
    stages: tuple[tuple[float, int], ...] = ()
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def role(self) -> str:
        """The one of `SITES` whose methods it has."""
        return ROLES.get(self.site, self.site)

    def option(self, name: str) -> Any:
        return dict(self.options)[name]

    @property
    def bits(self) -> int:
        """Bits that a code takes: the whole number that holds all levels."""
        return (self.levels - 1).bit_length()

    @property
    def scheduled(self) -> bool:
        """Whether the epoch decides what it does, see `layers.advance`."""
        return bool(self.float_epochs or self.freeze_epoch or self.stop_epoch or self.stages)

    @property
    def shifts(self) -> bool:
        """Whether its range is between any two numbers: it has an offset or a zero point."""
        return self.zero_point or (self.method == "lsq+" and self.role != "kernel")

    @property
    def first_stage(self) -> int:
        """The stage in which rounding begins; learned arrays start for its levels."""
        return max(sum(begin <= self.float_epochs for begin, _ in self.stages) - 1, 0)

    @property
    def first_levels(self) -> int:
        """The levels with which rounding begins."""
        return self.stages[self.first_stage][1] if self.stages else self.levels

    @property
    def pauses(self) -> bool:
        """Whether there are epochs in which values pass as they are."""
        return bool(self.float_epochs or self.stop_epoch)


def code_range(levels: int, signed: bool) -> tuple[int, int]:
    """The lowest and the highest code."""
    if not signed:
        return 0, levels - 1
    if levels == 2:
        return -1, 1
    return -(levels // 2), (levels - 1) // 2
