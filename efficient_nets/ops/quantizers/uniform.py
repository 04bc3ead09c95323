"""Methods with a uniform grid: value = scale * code.

DoReFa (arXiv 1606.06160), PACT (arXiv 1805.06085), LSQ (arXiv 1902.08153), LSQ+ (arXiv 2004.09576),
min-max with moving averages, and those of the BinaryNet family as the ENAS project has them (k-bit,
quantized tanh, quantized ReLU). L levels, codes `low ... high`; N values a group.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax

from efficient_nets.ops import straight_through as through
from efficient_nets.ops.linear_maps import wide
from efficient_nets.ops.quantizers import groups
from efficient_nets.ops.quantizers.spec import (
    SITES,
    STEP_GRADIENTS,
    Method,
    Quantizer,
    Rounded,
    Values,
    above_zero,
    at_least_zero,
    code_range,
)

TINY = 1e-12  # what is divided by is at least this, so that a group of zeros gives zeros


def limits(q: Quantizer, arrays: Values, x: Array) -> tuple:
    """The lowest and the highest code, of the present stage where there are stages."""
    if not q.stages:
        return code_range(q.levels, q.signed)
    ranges = jnp.asarray([code_range(levels, q.signed) for _, levels in q.stages], x.dtype)
    low, high = ranges[arrays["stage"]]
    return low, high


def first_range(q: Quantizer) -> tuple[int, int]:
    """The lowest and the highest code at the start of training."""
    return code_range(q.stages[0][1] if q.stages else q.levels, q.signed)


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


def _clip(x: Array, low, high) -> Array:
    """Clips; the gradient of x is 1 on both bounds, as a closed interval's."""
    return jnp.where(x > high, high, jnp.where(x < low, low, x))


# DoReFa


def _dorefa_input(q: Quantizer, x: Array, arrays: Values) -> Rounded:
    """`round(clip(x, 0, c) (L-1) / c) c / (L-1)`, straight through inside of [0, c]."""
    low, high = limits(q, arrays, x)
    inside = _clip(x, 0.0, q.option("clip"))
    scale = jnp.full((1,) * x.ndim, q.option("clip"), x.dtype) / high
    return Rounded(inside, nearest(q, inside / scale, low, high), scale)


def _dorefa_kernel(q: Quantizer, x: Array, arrays: Values) -> Rounded:
    """`2 round(t (L-1)) / (L-1) - 1`, t = tanh(w) / (2 max |tanh w|) + 1/2.

    Straight through the rounding, and with the gradients of tanh and max. With two levels
    `sign(w) mean |w|`, whose gradient passes as it is (section 2.3).
    """
    if q.levels == 2:
        size = groups.reduce(q, jnp.abs(x), jnp.mean)
        return Rounded(x, binary(x), lax.stop_gradient(groups.spread(q, size, x)))
    tanh = jnp.tanh(x)
    most = groups.reduce(q, jnp.abs(tanh), jnp.max)
    # A group of zeros is divided by 1, as its gradients are.
    whole = tanh / groups.spread(q, jnp.where(most > 0, most, 1.0), x)  # -1 to 1
    low, high = limits(q, arrays, x)
    steps = high - low  # L - 1
    codes = 2 * jnp.round((lax.stop_gradient(whole) / 2 + 0.5) * steps) - steps
    return Rounded(whole, codes, jnp.full((1,) * x.ndim, 1.0, x.dtype) / steps)


@jax.custom_vjp
def noisy_gradient(x: Array, steps: Array, key: Array) -> Array:
    """x; its gradient g is rounded to `steps + 1` levels, at random (DoReFa, equation 12).

    `2 m (round(clip(g / 2m + 1/2 + noise / steps, 0, 1) steps) / steps - 1/2)`, with m = max |g|
    of the sample and noise uniform in (-1/2, 1/2), which makes the rounding right on average.
    """
    del steps, key
    return x


def _noisy_forward(x, steps, key):
    return x, (steps, key)


def _noisy_backward(saved, g):
    steps, key = saved
    precise = g.astype(wide(g.dtype))
    steps = steps.astype(precise.dtype)
    most = jnp.max(jnp.abs(precise), axis=tuple(range(1, g.ndim)), keepdims=True)
    most = jnp.broadcast_to(2 * jnp.maximum(most, TINY), g.shape)
    noise = jax.random.uniform(key, g.shape, precise.dtype, -0.5, 0.5)
    whole = jnp.clip(precise / most + 0.5 + noise / steps, 0, 1)
    rounded = most * (jnp.round(whole * steps) / steps - 0.5)
    return rounded.astype(g.dtype), jnp.zeros_like(saved[0]), None


noisy_gradient.defvjp(_noisy_forward, _noisy_backward)


def _noisy(q: Quantizer, x: Array, arrays: Values) -> Rounded:
    key = jax.random.fold_in(jax.random.wrap_key_data(arrays["seed"]), arrays["calls"])
    steps = jnp.asarray(q.levels - 1, x.dtype)
    return Rounded(noisy_gradient(x, steps, key), value=x)


def _start_noisy(q: Quantizer, x: Array):
    return {}, {"seed": jnp.zeros(2, jnp.uint32), "calls": jnp.zeros((), jnp.int32)}


def _next_noise(q: Quantizer, x: Array, arrays: Values) -> dict:
    return {"seed": arrays["seed"], "calls": arrays["calls"] + 1}


# PACT


def _pact(q: Quantizer, x: Array, arrays: Values) -> Rounded:
    """`round(clip(x, 0, alpha) (L-1) / alpha) alpha / (L-1)`.

    The gradient of x is 1 in [0, alpha), that of alpha 1 where x >= alpha (equations 2 and 3).
    Signed, the range is [-alpha, alpha].
    """
    low, high = limits(q, arrays, x)
    alpha = groups.spread(q, positive(arrays["alpha"].astype(x.dtype)), x)
    floor = -alpha if q.signed else jnp.zeros_like(alpha)
    inside = jnp.where(x >= alpha, alpha, jnp.where(x < floor, floor, x))
    scale = lax.stop_gradient(alpha) / high
    return Rounded(inside, nearest(q, inside / scale, -high if q.signed else low, high), scale)


def _start_pact(q: Quantizer, x: Array):
    """The option `alpha`, or where that is 0 the largest value.

    10, the paper's, rounds nearly all that follows a batch norm to 0 at 2 bits.
    """
    most = groups.reduce(q, x if q.site != "kernel" else jnp.abs(x), jnp.max)
    most = jnp.where(most > 0, most, 1.0)
    return {"alpha": jnp.full_like(most, q.option("alpha")) if q.option("alpha") else most}, {}


def _fit_pact(q: Quantizer, lo: Array, hi: Array):
    return {"alpha": jnp.maximum(jnp.maximum(-lo, hi) if q.signed else hi, TINY)}, {}


# LSQ and LSQ+


def _lsq(q: Quantizer, x: Array, arrays: Values) -> Rounded:
    """`s round(clip(x / s, low, high))`.

    Straight through inside of (low, high) steps. The gradient of s is `round(x/s) - x/s` inside,
    low or high outside (equation 3), times the step gradient, by default 1/sqrt(N high).
    """
    low, high = limits(q, arrays, x)
    step = _step(q, x, arrays["step"], high)
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
    fan = x.size // x.shape[-1] if q.site == "kernel" else x.shape[-1]
    factor = STEP_GRADIENTS[q.step_gradient](groups.size(q, x), fan, high)
    return through.scale_gradient(value.astype(x.dtype), jnp.asarray(factor, x.dtype))


def _step(q: Quantizer, x: Array, step: Array, high) -> Array:
    return divisor(q, _scaled(q, x, step, high))


def _start_lsq(q: Quantizer, x: Array):
    """`2 mean |x| / sqrt(high)`, section 2.1."""
    _, high = first_range(q)
    size = groups.reduce(q, jnp.abs(x), jnp.mean)
    return {"step": 2 * jnp.where(size > 0, size, 1.0) / high**0.5}, {}


def _fit_lsq(q: Quantizer, lo: Array, hi: Array):
    """The step that just covers the range."""
    low, high = first_range(q)
    step = jnp.maximum(hi, 0) / high
    if low:
        step = jnp.maximum(step, jnp.minimum(lo, 0) / low)
    return {"step": jnp.where(step > 0, step, 1.0)}, {}


def _fit_lsq_plus(q: Quantizer, lo: Array, hi: Array):
    if q.site == "kernel":
        return _fit_lsq(q, lo, hi)
    low, high = first_range(q)
    step = jnp.where(hi > lo, (hi - lo) / (high - low), 1.0)
    return {"step": step, "offset": lo - low * step}, {}


def _start_lsq_plus(q: Quantizer, x: Array):
    """Kernel: the larger of |mean +- 3 deviations| over 2^(b-1) (section 4.1); input: least MSE.

    Of ranges that are 10, 20 ... 100% of that of the values about its middle.
    """
    low, high = first_range(q)
    if q.site == "kernel":
        mean, std = groups.reduce(q, x, jnp.mean), groups.reduce(q, x, jnp.std)
        most = jnp.maximum(jnp.abs(mean - 3 * std), jnp.abs(mean + 3 * std))
        return {"step": jnp.where(most > 0, most, 1.0) / (high + 1)}, {}
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
    return {"step": best[1], "offset": best[2]}, {}


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


# The BinaryNet family of the ENAS project, H = 1


def _fixed(q: Quantizer, x: Array, u: Array, step: float, low: float, high: float) -> Rounded:
    """Codes of u, in steps that no range decides."""
    codes = nearest(q, u, low, high)
    scale = jnp.full((1,) * x.ndim, step, x.dtype)
    return Rounded(pseudo(q, codes, u, low, high) * scale, codes, scale)


def _kbit(q: Quantizer, x: Array, arrays: Values) -> Rounded:
    """`clip(round(x m), -m, m - 1) / m`, m = L/2; straight through."""
    half = q.levels // 2
    return _fixed(q, x, x * half, 1 / half, -half, half - 1)


def _quantized_relu(q: Quantizer, x: Array, arrays: Values) -> Rounded:
    """`clip(2 round(hard_sigmoid(x) 2^k) / 2^k - 1, 0, 1 - 2^(1-k))`, 2^k = 2 L.

    hard_sigmoid(x) = clip((x + 1) / 2, 0, 1). Those are L values, one bit being the sign's.
    """
    return _fixed(q, x, x * q.levels, 1 / q.levels, 0, q.levels - 1)


ROUNDING = ("clipped", "identity", "scaled")
SIGN = (*ROUNDING, "triangle", "swish")


def any_number(levels: int) -> bool:
    return True


def above_two(levels: int) -> bool:
    return levels > 2


def even(levels: int) -> bool:
    return levels > 2 and levels % 2 == 0


def places(method: Method) -> dict[str, Method]:
    """Of a kernel signed; of what layers read and give unsigned, unless something else is said."""
    unsigned = dataclasses.replace(method, signed=False)
    return {"input": unsigned, "kernel": method, "output": unsigned}


DOREFA_INPUT = Method(
    _dorefa_input,
    any_number,
    options={"clip": 1.0},
    allowed={"clip": above_zero()},
    takes=("stages",),
    gradients=("clipped",),
    signed=False,
)
LSQ = Method(
    _lsq,
    any_number,
    start=_start_lsq,
    fit=_fit_lsq,
    takes=("stages", "step_gradient", "power_of_two"),
    gradients=SIGN,
    grouped=True,
    both_signs=True,
)
KBIT = Method(_kbit, even, gradients=("identity", "clipped", "scaled"))
RELU = Method(_quantized_relu, any_number, gradients=ROUNDING, signed=False)

METHODS = {
    "dorefa": {
        "input": DOREFA_INPUT,
        "output": DOREFA_INPUT,
        "kernel": Method(_dorefa_kernel, any_number, takes=("stages",), grouped=True),
        "gradient": Method(_noisy, above_two, start=_start_noisy, observe=_next_noise),
    },
    "pact": places(
        Method(
            _pact,
            above_two,
            start=_start_pact,
            fit=_fit_pact,
            options={"alpha": 0.0},
            allowed={"alpha": at_least_zero()},
            takes=("stages",),
            gradients=("clipped",),
            grouped=True,
            both_signs=True,
        )
    ),
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
    ),
    "kbit": dict.fromkeys(SITES[:3], KBIT),
    "quantized_tanh": dict.fromkeys(SITES[:3], dataclasses.replace(KBIT, gradients=ROUNDING)),
    "quantized_relu": {"input": RELU, "output": RELU},
}
