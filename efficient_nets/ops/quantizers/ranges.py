"""Ranges for values that are known: what a quantizer should cover, chosen without training.

Each is `(quantizer, x) -> (lo, hi)`, `(G,)` each; `Method.fit` makes arrays of them.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array

from efficient_nets.ops.quantizers import groups
from efficient_nets.ops.quantizers.grid import first_range
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
    """The limits with the least divergence of the histogram from its quantized form.

    As TensorRT's calibration: P is the histogram between the limits with what is outside in its
    outermost bins, Q the same in the quantizer's steps, each spread over the bins of P that hold
    anything; the limits have the least sum P log(P / Q). The histogram is of |x| where the codes
    are signed, and of x from 0 on where what is below is rounded to 0 anyway: one limit. A range
    that need not be symmetric has two, of the histogram between the least and the greatest value:
    the upper one for no lower one, then the lower one for that, on both sides of the median. (Where
    one bin has nearly all there is no divergence either.)
    """
    low, high = first_range(q)
    values = jnp.abs(x) if q.signed and not q.shifts else x
    most = groups.reduce(q, values, jnp.max)
    base = groups.reduce(q, x, jnp.min) if q.shifts else jnp.zeros_like(most)
    steps = high - low if q.shifts else high
    width = jnp.maximum(most - base, jnp.finfo(x.dtype).tiny)
    place = (values - groups.spread(q, base, x)) / groups.spread(q, width, x) * BINS
    place = jnp.where(place < 0, BINS, jnp.minimum(place, BINS - 1)).astype(jnp.int32)
    counts = groups.reduce(q, place, functools.partial(_histogram, dtype=x.dtype)).T  # (G, BINS)
    first = min(max(steps, BINS // 64), BINS)
    ends = jnp.arange(first, BINS + 1, max(BINS // 128, 1))

    def best(counts, begins, ends):
        found = jax.lax.map(lambda pair: _divergence(counts, *pair, steps), (begins, ends))
        return jnp.argmin(found)

    def limits(counts):
        middle = jnp.argmax(2 * jnp.cumsum(counts) >= jnp.sum(counts)) if q.shifts else 0
        tops = jnp.maximum(ends, middle + 1)
        end = tops[best(counts, jnp.zeros_like(ends), tops)]
        if not q.shifts:
            return jnp.zeros_like(end), end
        begins = jnp.minimum(ends - first, jnp.minimum(middle, end - first))
        return begins[best(counts, begins, jnp.full_like(ends, end))], end

    begin, end = (found.astype(x.dtype) for found in jax.vmap(limits)(counts))
    lo, hi = base + width * begin / BINS, base + width * end / BINS
    return (-hi if q.signed and not q.shifts else lo), hi


def _histogram(place: Array, axis: tuple[int, ...], dtype) -> Array:
    """Counts of each bin over some axes: `(BINS, ...)`, the other axes kept."""
    kept = [i for i in range(place.ndim) if i not in axis]
    shape = [place.shape[i] for i in kept]
    rows = jnp.transpose(place, (*kept, *axis)).reshape(math.prod(shape), -1)
    # A place behind the last bin is in none.
    counts = jax.vmap(lambda row: jnp.zeros(BINS, dtype).at[row].add(1, mode="drop"))(rows)
    return counts.T.reshape(BINS, *shape)


def _divergence(counts: Array, begin: Array, end: Array, steps: int) -> Array:
    """That of the bins from `begin` to before `end`, in this number of steps."""
    bins = jnp.arange(BINS)
    inside = jnp.logical_and(bins >= begin, bins < end)
    kept = jnp.where(inside, counts, 0)
    p = kept + jnp.where(bins == begin, jnp.sum(jnp.where(bins < begin, counts, 0)), 0)
    p = p + jnp.where(bins == end - 1, jnp.sum(jnp.where(bins >= end, counts, 0)), 0)
    step = jnp.clip((bins - begin) * steps // (end - begin), 0, steps - 1)
    holds = jnp.logical_and(inside, p > 0).astype(p.dtype)
    totals = jax.ops.segment_sum(kept, step, steps)
    number = jax.ops.segment_sum(holds, step, steps)
    q = (totals / jnp.maximum(number, 1))[step] * holds
    p, q = (one / jnp.maximum(jnp.sum(one), 1e-30) for one in (p, q))
    # A bin of P that Q gives nothing costs as much as one in 10^9 would.
    return jnp.sum(jnp.where(p > 0, p * (jnp.log(p) - jnp.log(jnp.maximum(q, 1e-9))), 0))
