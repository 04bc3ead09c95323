"""Methods whose step is learned or observed.

LSQ (arXiv 1902.08153), LSQ+ (arXiv 2004.09576), min-max with moving averages. L levels, codes
`low ... high`; N values a group.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from efficient_nets.ops import straight_through as through
from efficient_nets.ops.linear_maps import wide
from efficient_nets.ops.quantizers import groups
from efficient_nets.ops.quantizers.fields import above_zero, one_of
from efficient_nets.ops.quantizers.grid import (
    ROUNDING,
    SIGN,
    TINY,
    above_two,
    any_number,
    divisor,
    finite,
    first_range,
    limits,
    nearest,
    places,
    pseudo,
)
from efficient_nets.ops.quantizers.spec import (
    LOG_STEP,
    STEP_GRADIENTS,
    Method,
    Quantizer,
    Rounded,
    Values,
    code_range,
)

# LSQ and LSQ+


def _lsq(q: Quantizer, x: Array, arrays: Values) -> Rounded:
    """`s round(clip(x / s, low, high))`.

    Straight through inside of (low, high) steps. The gradient of s is `round(x/s) - x/s` inside,
    low or high outside (equation 3), times the step gradient, by default 1/sqrt(N high). With
    `log_step` what is learned is t, the step being `2^t`, its gradient that of s times `s ln 2`
    (arXiv 1903.08066, section 3.2).
    """
    low, high = limits(q, arrays, x)
    step = jnp.exp2(arrays[LOG_STEP]) if LOG_STEP in arrays else arrays["step"]
    step = _step(q, x, step, high)
    scale = groups.spread(q, step, x)
    x = finite(x)
    shift = None
    if "offset" in arrays:
        shift = groups.spread(q, _scaled(q, x, arrays["offset"], high), x)
        x = x - shift
    u = x / scale
    codes = pseudo(q, nearest(q, u, low, high), u, low, high)
    surrogate = codes * scale
    if shift is None:
        return Rounded(surrogate, lax.stop_gradient(codes), lax.stop_gradient(scale))
    return Rounded(surrogate + shift, value=lax.stop_gradient(surrogate + shift))


def _scaled(q: Quantizer, x: Array, value: Array, high) -> Array:
    fan = x.size // x.shape[-1] if q.role == "kernel" else x.shape[-1]
    factor = STEP_GRADIENTS[q.step_gradient](groups.size(q, x), fan, high)
    return through.scale_gradient(value.astype(x.dtype), jnp.asarray(factor, x.dtype))


def _step(q: Quantizer, x: Array, step: Array, high) -> Array:
    return divisor(q, _scaled(q, x, step, high))


def _learned(q: Quantizer, step: Array) -> dict[str, Array]:
    return {LOG_STEP: jnp.log2(step)} if q.option(LOG_STEP) else {"step": step}


def _start_lsq(q: Quantizer, x: Array):
    """`2 mean |x| / sqrt(high)`, section 2.1."""
    _, high = first_range(q)
    size = groups.reduce(q, jnp.abs(x), jnp.mean)
    return _learned(q, 2 * jnp.where(size > 0, size, 1.0) / high**0.5), {}


def _fit_lsq(q: Quantizer, lo: Array, hi: Array):
    """The step that just covers the range."""
    low, high = first_range(q)
    step = jnp.maximum(hi, 0) / high
    if low:
        step = jnp.maximum(step, jnp.minimum(lo, 0) / low)
    return _learned(q, jnp.where(step > 0, step, 1.0)), {}


def _fit_lsq_plus(q: Quantizer, lo: Array, hi: Array):
    if q.role == "kernel":
        return _fit_lsq(q, lo, hi)
    low, high = first_range(q)
    step = jnp.where(hi > lo, (hi - lo) / (high - low), 1.0)
    return _learned(q, step) | {"offset": lo - low * step}, {}


def _start_lsq_plus(q: Quantizer, x: Array):
    """Kernel: the larger of |mean +- 3 deviations| over 2^(b-1) (section 4.1); input: least MSE.

    Of ranges that are 10, 20 ... 100% of that of the values about its middle.
    """
    low, high = first_range(q)
    if q.role == "kernel":
        mean, std = groups.reduce(q, x, jnp.mean), groups.reduce(q, x, jnp.std)
        most = jnp.maximum(jnp.abs(mean - 3 * std), jnp.abs(mean + 3 * std))
        return _learned(q, jnp.where(most > 0, most, 1.0) / (high + 1)), {}
    least, most = groups.reduce(q, x, jnp.min), groups.reduce(q, x, jnp.max)
    middle, half = (least + most) / 2, (most - least) / 2
    half = jnp.where(half > 0, half, 1.0)
    best = None
    for share in jnp.arange(1, 11) / 10:
        step = 2 * share * half / (high - low)
        offset = middle - share * half - low * step
        scale, shift = groups.spread(q, step, x), groups.spread(q, offset, x)
        error = jnp.square(jnp.round(jnp.clip((x - shift) / scale, low, high)) * scale + shift - x)
        error = groups.reduce(q, error, jnp.mean)
        if best is not None:
            better = error < best[0]
            step, offset = jnp.where(better, step, best[1]), jnp.where(better, offset, best[2])
            error = jnp.where(better, error, best[0])
        best = error, step, offset
    return _learned(q, best[1]) | {"offset": best[2]}, {}


# Min-max


def _minmax(q: Quantizer, x: Array, arrays: Values) -> Rounded:
    """Codes of a range that is observed; the gradient is that of x, unmasked by default.

    Signed: scale = max(-lo, hi) / ((L-1)/2), as WinogradAwareNets (arXiv 2002.10711) has it.
    Unsigned: hi / (L-1). With a zero point: (hi - lo) / (L-1), codes less round(-lo / scale).
    """
    low, high = limits(q, arrays, x)
    lo, hi = (lax.stop_gradient(arrays[name]).astype(x.dtype) for name in ("lo", "hi"))
    span = hi
    if q.signed:
        span = 2 * jnp.maximum(-lo, hi)
    elif q.zero_point:
        span = hi - lo
    scale = divisor(q, span / (high - low))
    steps = groups.spread(q, scale, x)
    if q.zero_point:
        zero = groups.spread(q, jnp.clip(jnp.round(-lo / scale), low, high), x)
        low, high = low - zero, high - zero
    u = x / steps
    codes = nearest(q, u, low, high)
    return Rounded(pseudo(q, codes, u, low, high) * steps, codes, steps)


def _observe_minmax(q: Quantizer, x: Array, arrays: Values) -> dict:
    """Moving averages of the least and the largest value, 0 included."""
    share = q.option("momentum")
    least = jnp.minimum(groups.reduce(q, x, jnp.min), 0).astype(arrays["lo"].dtype)
    most = jnp.maximum(groups.reduce(q, x, jnp.max), 0).astype(arrays["hi"].dtype)
    return {
        "lo": (1 - share) * arrays["lo"] + share * least,
        "hi": (1 - share) * arrays["hi"] + share * most,
    }


def _start_minmax(q: Quantizer, x: Array):
    return _fit_minmax(q, groups.reduce(q, x, jnp.min), groups.reduce(q, x, jnp.max))


def _fit_minmax(q: Quantizer, lo: Array, hi: Array):
    return {}, {"lo": jnp.minimum(lo, 0), "hi": jnp.maximum(hi, 0)}


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def rounded_gradient(x: Array, levels: int) -> Array:
    """x; its gradient g is rounded as min-max rounds a signed value, the range being this g's own.

    Nothing observes it: it is known when it is there, and not before.
    """
    del levels
    return x


def _rounded_gradient_forward(x, levels):
    return x, None


def _rounded_gradient_backward(levels, saved, g):
    low, high = code_range(levels, signed=True)
    precise = g.astype(wide(g.dtype))
    scale = jnp.maximum(2 * jnp.max(jnp.abs(precise)) / (high - low), TINY)
    codes = jnp.clip(jnp.round(precise / scale), low, high)
    return ((codes * scale).astype(g.dtype),)


rounded_gradient.defvjp(_rounded_gradient_forward, _rounded_gradient_backward)


def _round_gradient(q: Quantizer, x: Array, arrays: Values) -> Rounded:
    return Rounded(rounded_gradient(x, q.levels), value=x)


LSQ = Method(
    _lsq,
    any_number,
    start=_start_lsq,
    fit=_fit_lsq,
    options={LOG_STEP: False},
    allowed={LOG_STEP: one_of(False, True)},
    takes=("stages", "step_gradient", "power_of_two"),
    gradients=SIGN,
    grouped=True,
    both_signs=True,
)

METHODS = {
    "lsq": places(LSQ),
    "lsq+": places(
        dataclasses.replace(
            LSQ,
            levels=above_two,
            start=_start_lsq_plus,
            fit=_fit_lsq_plus,
            gradients=ROUNDING,
        )
    ),
    "minmax": places(
        Method(
            _minmax,
            above_two,
            most=2**16,
            start=_start_minmax,
            fit=_fit_minmax,
            observe=_observe_minmax,
            options={"momentum": 0.01},
            allowed={"momentum": above_zero(up_to=1)},
            takes=("stages", "power_of_two", "zero_point"),
            gradients=("identity", "clipped", "scaled"),
            grouped=True,
            both_signs=True,
        )
    )
    | {"gradient": Method(_round_gradient, above_two, most=2**16)},
}
