"""What is done to values in front of a quantizer, and undone behind it: the field `normalise`.

With u the normalised values and Q the method, a kernel's groups and an input's samples are

    'standard'   Q(u)               u = (w - mean w) / deviation of w
    'restored'   Q(u) std + mean
    'mean'       Q(u) m             u = x / m,  m = mean |x|
    'variance'   Q(u) m             u = x / m,  m = sqrt(mean x^2)

The last two leave 0 where it is and every sign, so that a quantizer may be unsigned. The gradient
is that of these formulas, through the figures too, with the method's own for Q: in the last two

    dx_i = g_i Q'(u_i) + dm/dx_i sum_j g_j (Q(u_j) - u_j Q'(u_j))

dm/dx being sign(x) / n and x / (n m), for the n values of a sample.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from efficient_nets.ops import straight_through as through
from efficient_nets.ops.quantizers import groups
from efficient_nets.ops.quantizers.spec import Quantizer, Rounded, times, value

# What a sample's factor is the mean of. `jnp.abs` would have the slope 1 at 0.
SIZES = {"mean": lambda x: x * lax.stop_gradient(jnp.sign(x)), "variance": jnp.square}


def normalised(quantizer: Quantizer, x: Array) -> tuple[Array, Callable[[Rounded], Rounded]]:
    """x as `normalise` says, and what undoes it of a result of the method."""
    if quantizer.normalise == "none":
        return x, lambda found: found
    if quantizer.normalise in SIZES:
        factor = _size(quantizer, x)
        return x / factor, lambda found: times(found, factor)
    x, std, mean = _standard(quantizer, x)
    if quantizer.normalise == "standard":
        return x, lambda found: found
    return x, lambda found: Rounded(value(found) * std + mean)


def _size(quantizer: Quantizer, x: Array) -> Array:
    """The factor of each sample, `(N, 1, ...)`; 1 for one of zeros, as a root has no slope at 0."""
    axes = tuple(range(min(1, x.ndim - 1), x.ndim))  # a single vector is one sample
    size = jnp.mean(SIZES[quantizer.normalise](x), axis=axes, keepdims=True)
    size = jnp.where(size > 0, size, 1.0)
    return size if quantizer.normalise == "mean" else jnp.sqrt(size)


def _standard(quantizer: Quantizer, x: Array) -> tuple[Array, Array, Array]:
    """x with mean 0 and deviation 1 in each group; the deviation and the mean.

    Values that are all alike, but for the rounding of their mean, give zeros: their deviation is
    taken for 1, as a root has no derivative at 0.
    """
    mean = groups.spread(quantizer, groups.reduce(quantizer, x, jnp.mean), x)
    centred = x - mean
    variance = groups.reduce(quantizer, jnp.square(centred), jnp.mean)
    variance = groups.spread(quantizer, variance, x)
    alike = variance <= jnp.square(64 * jnp.finfo(x.dtype).eps * mean)
    centred = through.straight_through(jnp.where(alike, 0.0, centred), centred)
    std = jnp.sqrt(jnp.where(alike, 1.0, variance))
    return centred / std, std, mean
