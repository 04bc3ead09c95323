"""Values whose gradient is that of something else, and the gradients that stand in for rounding.

Rounding has the derivative 0 almost everywhere. A quantizer trains because its backward pass takes
the derivative of a surrogate in place of its own.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax


@jax.custom_jvp
def straight_through(value: Array, surrogate: Array) -> Array:
    """`value`, with the gradient of `surrogate`, forward and reverse mode.

    `surrogate + stop_gradient(value - surrogate)` would round: here the value is exact.
    """
    del surrogate
    return value


@straight_through.defjvp
def _straight_through_jvp(primals, tangents):
    return primals[0], tangents[1]


def scale_gradient(x: Array, factor: Array | float) -> Array:
    """x, with its gradient multiplied by `factor`."""
    return straight_through(x, x * lax.stop_gradient(factor))


def _inside(u: Array, low, high) -> Array:
    return ((low < u) & (u < high)).astype(u.dtype)


def _scaled(u: Array, low, high) -> Array:
    inside = _inside(u, low, high)
    return inside * jnp.mean(inside)


def _triangle(u: Array, low, high) -> Array:
    return jnp.maximum(2 - 2 * jnp.abs(u), 0)


def _swish(u: Array, low, high) -> Array:
    # With v = beta u / 2 this is beta (1 - v tanh v) sech^2 v, and sech^2 does not overflow.
    beta = 5.0
    tanh = jnp.tanh(beta * u / 2)
    v = jnp.clip(beta * u / 2, -1e4, 1e4)  # an infinite one would give inf * 0
    return beta * (1 - v * tanh) * (1 - tanh * tanh)


# Derivatives of the code with respect to u = (x - offset) / scale, codes being `low ... high`.
ROUNDING = {
    "identity": lambda u, low, high: jnp.ones_like(u),
    "clipped": _inside,  # 1 inside of (low, high), 0 at the bounds and outside
    "scaled": _scaled,  # that times the share of the values that are inside
}
# Of the sign. Triangle: 2 - 2|u| where |u| < 1 (Bi-Real, arXiv 1808.00278), the derivative of a
# piecewise polynomial. Swish: of 2 sigmoid(b u) (1 + b u (1 - sigmoid(b u))) - 1, b = 5 (arXiv
# 1812.11800, equation 9).
SIGN = ROUNDING | {"triangle": _triangle, "swish": _swish}
