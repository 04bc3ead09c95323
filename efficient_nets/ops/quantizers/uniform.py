"""Methods with a uniform grid over a range that is fixed or clipped to.

DoReFa (arXiv 1606.06160), PACT (arXiv 1805.06085), and those of the BinaryNet family as the ENAS
project has them (k-bit, quantized tanh, quantized ReLU). L levels, codes `low ... high`; N values a
group. Steps that are learned or observed are in `steps`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax

from efficient_nets.ops.linear_maps import wide
from efficient_nets.ops.quantizers import groups
from efficient_nets.ops.quantizers.fields import above_zero, at_least_zero
from efficient_nets.ops.quantizers.grid import (
    ROUNDING,
    TINY,
    above_two,
    any_number,
    binary,
    limits,
    nearest,
    places,
    positive,
    pseudo,
)
from efficient_nets.ops.quantizers.spec import SITES, Method, Quantizer, Rounded, Values


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
    """The option `alpha`, or where that is 0 the range of the values.

    10, the paper's, rounds nearly all that follows a batch norm to 0 at 2 bits.
    """
    lo, hi = groups.reduce(q, x, jnp.min), groups.reduce(q, x, jnp.max)
    if q.option("alpha"):
        return {"alpha": jnp.full_like(hi, q.option("alpha"))}, {}
    return _fit_pact(q, lo, hi)


def _fit_pact(q: Quantizer, lo: Array, hi: Array):
    """The largest value, signed the largest |value|; 1 where nothing is above 0."""
    most = jnp.maximum(-lo, hi) if q.signed else hi
    return {"alpha": jnp.where(most > 0, most, 1.0)}, {}


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

    hard_sigmoid(x) = clip((x + 1) / 2, 0, 1). Those are L values, one bit being the sign's; half
    steps go to even codes, which is the same but for odd L.
    """
    return _fixed(q, x, x * q.levels, 1 / q.levels, 0, q.levels - 1)


def even(levels: int) -> bool:
    return levels > 2 and levels % 2 == 0


DOREFA_INPUT = Method(
    _dorefa_input,
    any_number,
    options={"clip": 1.0},
    allowed={"clip": above_zero()},
    takes=("stages",),
    gradients=("clipped",),
    signed=False,
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
    "kbit": dict.fromkeys(SITES[:3], KBIT),
    "quantized_tanh": dict.fromkeys(SITES[:3], dataclasses.replace(KBIT, gradients=ROUNDING)),
    "quantized_relu": {"input": RELU, "output": RELU},
}
