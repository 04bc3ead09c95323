"""Methods whose steps are not all alike: LQ-Nets, FATNN, powers of two.

LQ-Nets (arXiv 1807.10029), FATNN (arXiv 2008.05101), and log2 of the ENAS project.
"""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from efficient_nets.ops import straight_through as through
from efficient_nets.ops.quantizers import groups
from efficient_nets.ops.quantizers.fields import above_zero
from efficient_nets.ops.quantizers.grid import ROUNDING, binary, finite, positive
from efficient_nets.ops.quantizers.spec import Method, Quantizer, Rounded, Values, code_range

# Added to the diagonal of the normal equations, as a share of n: a bit that no value has set would
# leave them singular.
RIDGE = 1e-6


# LQ-Nets


def _codes(q: Quantizer) -> np.ndarray:
    """Every code of K bits, `(2^K, K)`: bits are -1 and 1, unsigned 0 and 1."""
    bits = [(-1.0, 1.0) if q.signed else (0.0, 1.0)] * q.bits
    return np.array(list(itertools.product(*bits)))[:, ::-1]


def _nearest_bits(q: Quantizer, x: Array, basis: Array) -> tuple[Array, list[Array]]:
    """The level nearest to each value, and its K bits, each of x's shape.

    Sums over the thresholds that a value is above, as a gather would be slow and large.
    """
    codes = jnp.asarray(_codes(q), x.dtype)
    levels = basis @ codes.T  # (G, L)
    order = jnp.argsort(levels, axis=1)
    levels = jnp.take_along_axis(levels, order, axis=1)
    bits = codes[order]  # (G, L, K), in the order of the levels

    def spread(values):
        return groups.spread(q, values, x)

    def first(values):
        return jnp.broadcast_to(spread(values), x.shape)

    value = first(levels[:, 0])
    found = [first(bits[:, 0, k]) for k in range(q.bits)]
    for i in range(1, q.levels):
        above = (x > spread((levels[:, i - 1] + levels[:, i]) / 2)).astype(x.dtype)
        value = value + above * spread(levels[:, i] - levels[:, i - 1])
        found = [
            bit + above * spread(bits[:, i, k] - bits[:, i - 1, k]) for k, bit in enumerate(found)
        ]
    return value, found


def _lq(q: Quantizer, x: Array, arrays: Values) -> Rounded:
    """The nearest of the levels `code . basis`, thresholds at their midpoints.

    The gradient is that of x; an unsigned one stops above the highest level.
    """
    basis = lax.stop_gradient(arrays["basis"]).astype(x.dtype)
    value, _ = _nearest_bits(q, lax.stop_gradient(x), basis)
    if q.gradient == "identity":
        return Rounded(x, value=value)
    highest = jnp.max(basis @ jnp.asarray(_codes(q), x.dtype).T, axis=1)
    highest = groups.spread(q, highest, x)
    inside = x <= highest if not q.signed else jnp.abs(x) <= highest
    return Rounded(jnp.where(inside, x, lax.stop_gradient(x)), value=value)


def _observe_lq(q: Quantizer, x: Array, arrays: Values) -> dict:
    """The basis by least squares, `(B B')^-1 B x` for the present bits B, 0.9 of the old kept.

    One step of QEM (section 3.2).
    """
    basis = arrays["basis"].astype(x.dtype)
    _, bits = _nearest_bits(q, x, basis)
    n = groups.reduce(q, jnp.ones_like(x), jnp.sum)[0]
    pairs = {
        (j, k): groups.reduce(q, bits[j] * bits[k], jnp.sum) / n
        for j in range(q.bits)
        for k in range(j, q.bits)
    }
    gram = jnp.stack(
        [
            jnp.stack([pairs[min(j, k), max(j, k)] for k in range(q.bits)], axis=-1)
            for j in range(q.bits)
        ],
        axis=-2,
    )
    right = jnp.stack([groups.reduce(q, bit * x, jnp.sum) / n for bit in bits], axis=-1)
    # The ridge pulls towards the old basis: a bit that nothing has set stays where it is.
    ridge = jnp.broadcast_to(RIDGE * jnp.eye(q.bits, dtype=x.dtype), gram.shape)
    solved = jnp.linalg.solve(gram + ridge, (right + RIDGE * basis)[..., None])[..., 0]
    keep = q.option("keep")
    moved = keep * basis + (1 - keep) * solved
    return {"basis": moved.astype(arrays["basis"].dtype)}


def _start_lq(q: Quantizer, x: Array):
    """`2^i base`; 0.6745 is the upper quartile of a normal distribution.

    Kernel: base 0.6745 deviation / 2^(K-1). Input: 0.6745 * 2 / (2^K - 1) of the deviation that a
    normal distribution had before its negative half was cut off.
    """
    size = jnp.sqrt(groups.reduce(q, x * x, jnp.mean))
    size = jnp.where(size > 0, size, 1.0)
    half = 2 ** (q.bits - 1)
    base = 0.6745 * size / half if q.signed else 0.6745 * 2 * 2**0.5 * size / (2 * half - 1)
    powers = jnp.asarray(2.0 ** np.arange(q.bits), x.dtype)
    return {}, {"basis": jnp.expand_dims(base, 1) * jnp.expand_dims(powers, 0)}


# FATNN


def _fatnn(q: Quantizer, x: Array, arrays: Values) -> Rounded:
    """`sum_i round(clip((x - sum_{j<i} 1/a_j) a_i, 0, 1))`, with a learned slope a_i for each step.

    Straight through the rounding. Signed, the steps below 0 are counted downwards from there.
    """
    slopes = positive(arrays["slopes"].astype(x.dtype))  # (G, steps): those below 0 first
    low, high = code_range(q.levels, q.signed)
    x = finite(x)
    total = jnp.zeros_like(x)
    for sign, columns in ((-1, range(-low)), (1, range(-low, high - low))):
        passed = jnp.zeros_like(slopes[:, 0])
        for i in columns:
            slope = slopes[:, i]
            ramp = sign * x - groups.spread(q, passed, x)
            ramp = jnp.clip(ramp * groups.spread(q, slope, x), 0, 1)
            step = through.straight_through(jnp.round(lax.stop_gradient(ramp)), ramp)
            total = total + sign * step
            passed = passed + 1 / slope
    return Rounded(total, lax.stop_gradient(total), jnp.ones((1,) * x.ndim, x.dtype))


def _start_fatnn(q: Quantizer, x: Array):
    """Steps as wide as LSQ's first one, `2 mean |x| / sqrt(high)`."""
    low, high = code_range(q.levels, q.signed)
    size = groups.reduce(q, jnp.abs(x), jnp.mean)
    slope = high**0.5 / (2 * jnp.where(size > 0, size, 1.0))
    return {"slopes": jnp.repeat(jnp.expand_dims(slope, 1), high - low, axis=1)}, {}


def _fit_fatnn(q: Quantizer, lo: Array, hi: Array):
    low, high = code_range(q.levels, q.signed)
    most = jnp.maximum(hi, -lo) if q.signed else hi
    slope = high / jnp.where(most > 0, most, 1.0)
    return {"slopes": jnp.repeat(jnp.expand_dims(slope, 1), high - low, axis=1)}, {}


# Powers of two


def _log2(q: Quantizer, x: Array, arrays: Values) -> Rounded:
    """`sign(x) 2^clip(round(log2 |x|), 1 - L/2, 0)`; the gradient passes as it is."""
    fixed = lax.stop_gradient(x)
    size = jnp.maximum(jnp.abs(fixed), jnp.finfo(x.dtype).tiny)
    exponent = jnp.clip(jnp.round(jnp.log2(size)), 1 - q.levels // 2, 0)
    return Rounded(x, value=binary(fixed) * jnp.exp2(exponent))


def _few_bits(levels: int) -> bool:
    return levels in (2, 4, 8, 16)


LQ = Method(
    _lq,
    _few_bits,
    start=_start_lq,
    observe=_observe_lq,
    options={"keep": 0.9},
    allowed={"keep": above_zero(up_to=1)},
    gradients=("identity", "clipped"),
    grouped=True,
    per="channel",
)
LQ_INPUT = dataclasses.replace(
    LQ, gradients=("clipped", "identity"), per="layer", signed=False, both_signs=True
)
FATNN = Method(
    _fatnn,
    lambda levels: levels in (3, 4),
    start=_start_fatnn,
    fit=_fit_fatnn,
    gradients=ROUNDING[:1],
    grouped=True,
)
FATNN_INPUT = dataclasses.replace(FATNN, signed=False, both_signs=True)

METHODS = {
    "lq": {"kernel": LQ, "input": LQ_INPUT, "output": LQ_INPUT},
    "fatnn": {"kernel": FATNN, "input": FATNN_INPUT, "output": FATNN_INPUT},
    "log2": {
        "kernel": Method(_log2, lambda levels: levels in (4, 8, 16, 32, 64)),
        "input": Method(_log2, lambda levels: levels in (4, 8, 16, 32, 64)),
    },
}
