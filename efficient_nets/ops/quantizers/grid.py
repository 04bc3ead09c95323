"""What uniform grids share: value = scale * code, L levels, codes `low ... high`."""

import dataclasses

import jax.numpy as jnp
from jax import Array, lax

from efficient_nets.ops import straight_through as through
from efficient_nets.ops.quantizers.spec import Method, Quantizer, Values, code_range

TINY = 1e-12  # what is divided by is at least this, so that a group of zeros gives zeros


def limits(q: Quantizer, arrays: Values, x: Array) -> tuple:
    """The lowest and the highest code, of the present stage where there are stages."""
    if not q.stages:
        return code_range(q.levels, q.signed)
    ranges = jnp.asarray([code_range(levels, q.signed) for _, levels in q.stages], x.dtype)
    low, high = ranges[arrays["stage"]]
    return low, high


def first_range(q: Quantizer) -> tuple[int, int]:
    """The lowest and the highest code when rounding begins."""
    return code_range(q.first_levels, q.signed)


def binary(x: Array) -> Array:
    """-1 or 1; 1 at 0."""
    return jnp.where(x >= 0, jnp.ones_like(x), -jnp.ones_like(x))


def nearest(q: Quantizer, u: Array, low, high) -> Array:
    """The codes nearest to u, ties to even; without gradient."""
    u = lax.stop_gradient(u)
    if q.signed and q.levels == 2:
        return binary(u)
    return jnp.round(jnp.clip(u, low, high))


def pseudo(q: Quantizer, codes: Array, u: Array, low, high) -> Array:
    """The codes, with the quantizer's pseudo-gradient with respect to u."""
    slope = through.SIGN[q.gradient](lax.stop_gradient(u), low, high)
    return through.straight_through(codes, slope * u)


def positive(scale: Array) -> Array:
    """At least TINY, straight through: what an update took below 0 gets a gradient back."""
    return through.straight_through(jnp.maximum(lax.stop_gradient(scale), TINY), scale)


def divisor(q: Quantizer, scale: Array) -> Array:
    """At least TINY, and a power of two where that is asked for; straight through."""
    scale = positive(scale)
    if not q.power_of_two:
        return scale
    return through.straight_through(jnp.exp2(jnp.round(jnp.log2(lax.stop_gradient(scale)))), scale)


def finite(x: Array) -> Array:
    """x within +-1/TINY, straight through: an infinite one gives 0 * inf as a step's gradient."""
    return through.straight_through(jnp.clip(x, -1 / TINY, 1 / TINY), x)


ROUNDING = ("clipped", "identity", "scaled")
SIGN = (*ROUNDING, "triangle", "swish")


def any_number(levels: int) -> bool:
    return True


def above_two(levels: int) -> bool:
    return levels > 2


def places(method: Method) -> dict[str, Method]:
    """Of a kernel signed; of what layers read and give unsigned, unless something else is said."""
    unsigned = dataclasses.replace(method, signed=False)
    return {"input": unsigned, "kernel": method, "output": unsigned}
