"""Ranges for values that are known: what a quantizer should cover, chosen without training.

Each is `(quantizer, x) -> (lo, hi)`, `(G,)` each; `Method.fit` makes arrays of them.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from efficient_nets.ops.quantizers import groups
from efficient_nets.ops.quantizers.spec import Quantizer

BINS = 1024  # of the histogram that 'entropy' takes
SHARES = 40  # ranges that 'mse' tries: 1/40, 2/40 ... of the values' own


def minmax(q: Quantizer, x: Array) -> tuple[Array, Array]:
    """From the least to the greatest value."""
    return groups.reduce(q, x, jnp.min), groups.reduce(q, x, jnp.max)


def percentile(q: Quantizer, x: Array, share: float = 0.9999) -> tuple[Array, Array]:
    """Without the outermost `1 - share` of the values on each side."""
    lo, hi = (
        groups.reduce(q, x, lambda x, axis, p=p: jnp.quantile(x, p, axis=axis))
        for p in (1 - share, share)
    )
    return lo, hi


def least_error(q: Quantizer, x: Array, quantize) -> tuple[Array, Array]:
    """The share of the range from the least to the greatest value with the least square error.

    Args:
      quantize: `(lo, hi) -> ` the values quantized with arrays that fit.
    """
    lo, hi = minmax(q, x)

    def error(share):
        return groups.reduce(q, jnp.square(quantize(lo * share, hi * share) - x), jnp.mean)

    shares = (jnp.arange(SHARES, dtype=x.dtype) + 1) / SHARES
    best = shares[jnp.argmin(jax.lax.map(error, shares), axis=0)]
    return lo * best, hi * best


def entropy(q: Quantizer, x: Array) -> tuple[Array, Array]:
    """The limit of |x| with the least divergence of the histogram from its quantized form.

    As TensorRT's calibration: P is the histogram up to a limit with what is beyond in its last bin,
    Q the same in as many steps as there are codes above 0, each spread over the bins of P that hold
    anything; the limit has the least sum P log(P / Q).
    """
    steps = (q.levels - 1) // 2 if q.signed else q.levels - 1
    steps = max(steps, 1)
    most = jnp.maximum(groups.reduce(q, jnp.abs(x), jnp.max), jnp.finfo(x.dtype).tiny)
    place = jnp.abs(x) / groups.spread(q, most, x) * BINS
    place = jnp.clip(place.astype(jnp.int32), 0, BINS - 1)
    counts = groups.reduce(q, place, functools.partial(_histogram, dtype=x.dtype))  # (BINS, G)
    first = min(max(steps, BINS // 64), BINS)
    ends = jnp.arange(first, BINS + 1, max(BINS // 128, 1))
    found = jax.vmap(lambda one: jax.lax.map(lambda end: _divergence(one, end, steps), ends))
    end = ends[jnp.argmin(found(counts.T), axis=1)].astype(x.dtype)
    limit = most * end / BINS
    return (-limit if q.signed else jnp.zeros_like(limit)), limit


def _histogram(place: Array, axis: tuple[int, ...], dtype) -> Array:
    """Counts of each bin over some axes: `(BINS, ...)`, the other axes kept."""
    kept = [i for i in range(place.ndim) if i not in axis]
    rows = jnp.transpose(place, (*kept, *axis)).reshape(place.shape[kept[0]], -1)
    counts = jax.vmap(lambda row: jnp.zeros(BINS, dtype).at[row].add(1))(rows)
    return counts.T


def _divergence(counts: Array, end: Array, steps: int) -> Array:
    bins = jnp.arange(BINS)
    inside = bins < end
    kept = jnp.where(inside, counts, 0)
    p = kept + jnp.where(bins == end - 1, jnp.sum(counts) - jnp.sum(kept), 0)
    step = jnp.clip(bins * steps // end, 0, steps - 1)
    holds = jnp.logical_and(inside, p > 0).astype(p.dtype)
    totals = jax.ops.segment_sum(kept, step, steps)
    number = jax.ops.segment_sum(holds, step, steps)
    q = (totals / jnp.maximum(number, 1))[step] * holds
    p, q = p / jnp.sum(p), q / jnp.maximum(jnp.sum(q), 1e-30)
    # A bin of P that Q gives nothing costs as much as one in 10^9 would.
    return jnp.sum(jnp.where(p > 0, p * (jnp.log(p) - jnp.log(jnp.maximum(q, 1e-9))), 0))
