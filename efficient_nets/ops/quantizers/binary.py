"""Binary and ternary methods.

XNOR-Net (arXiv 1603.05279), XNOR-Net++ (arXiv 1909.13863), Bi-Real (arXiv 1808.00278), TWN (arXiv
1605.04711), TTQ (arXiv 1612.01064), and binarize and ternarize of the ENAS project. Sums are over
the n values of a group; the sign of 0 is 1 except in `binarize`.
"""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
from jax import Array, lax

from efficient_nets.ops.quantizers import groups
from efficient_nets.ops.quantizers.fields import above_zero, one_of, whole_numbers
from efficient_nets.ops.quantizers.grid import SIGN, binary, pseudo
from efficient_nets.ops.quantizers.spec import Method, Quantizer, Rounded, Values


def _sign(q: Quantizer, x: Array, arrays: Values) -> Rounded:
    """`sign(x)`, with the pseudo-gradient of the spec."""
    codes = binary(lax.stop_gradient(x))
    return Rounded(pseudo(q, codes, x, -1, 1), codes, jnp.ones((1,) * x.ndim, x.dtype))


def _mean_size(q: Quantizer, x: Array) -> Array:
    """mean |x| of each group, to multiply x with; without gradient."""
    size = groups.reduce(q, jnp.abs(lax.stop_gradient(x)), jnp.mean)
    return groups.spread(q, size, x)


def _xnor_kernel(q: Quantizer, x: Array, arrays: Values) -> Rounded:
    """`sign(w) mean |w|`, dw = g (1/n + mean |w| slope(w)): XNOR-Net, section 3.1.

    The paper's slope is 1 where |w| < 1; its 1/n stands for the gradient of the mean.
    """
    codes, scale = binary(lax.stop_gradient(x)), _mean_size(q, x)
    share = groups.count(q, x.shape) / x.size
    return Rounded(pseudo(q, codes, x, -1, 1) * scale + share * x, codes, scale)


def _magnitude_aware(q: Quantizer, x: Array, arrays: Values) -> Rounded:
    """`sign(w) mean |w|`, dw = g mean |w| slope(w): Bi-Real, equation 6."""
    codes, scale = binary(lax.stop_gradient(x)), _mean_size(q, x)
    return Rounded(pseudo(q, codes, x, -1, 1) * scale, codes, scale)


def _xnor_input(q: Quantizer, x: Array, arrays: Values) -> Rounded:
    """`sign(x) K`, the gradient being that of the sign times K.

    K: 'none': 1. 'channel': mean |x| over the channels, one a position. 'spatial': mean |x| over
    the positions, one a channel. 'box': 1 here, and `box_scale` behind the map.
    """
    codes = binary(lax.stop_gradient(x))
    size = jnp.abs(lax.stop_gradient(x))
    if q.option("k") == "channel":
        scale = jnp.mean(size, axis=-1, keepdims=True)
    elif q.option("k") == "spatial":
        scale = jnp.mean(size, axis=tuple(range(1, x.ndim - 1)), keepdims=True)
    else:
        scale = jnp.ones((1,) * x.ndim, x.dtype)
    return Rounded(pseudo(q, codes, x, -1, 1) * scale, codes, scale)


def _box_scale(q: Quantizer, x: Array, arrays: Values, linear_map) -> Array | None:
    """XNOR-Net's K (section 3.2): the mean of |x| over each window, one number a position.

    `(N, *spatial', 1)`; None unless k='box'. Without gradient.
    """
    if q.option("k") != "box":
        return None
    size = jnp.mean(jnp.abs(lax.stop_gradient(x)), axis=-1, keepdims=True)
    return linear_map.window_mean(size)


def _scaled_kernel(q: Quantizer, x: Array, arrays: Values) -> Rounded:
    """`sign(w) gamma`, gamma learned, one an output channel: XNOR-Net++, case 1.

    Case 2 has no gamma: its factors, one a position and channel, multiply the map's output.
    """
    if "gamma" not in arrays:
        return _sign(q, x, arrays)
    codes = binary(lax.stop_gradient(x))
    # Not `groups.spread`, as `axis` may be 'in' for a `post_scale`.
    scale = arrays["gamma"].astype(x.dtype).reshape(*(1,) * (x.ndim - 1), -1)
    return Rounded(pseudo(q, codes, x, -1, 1) * scale, codes, lax.stop_gradient(scale))


def _start_scaled(q: Quantizer, x: Array):
    """gamma, and for the spatial cases the factors of each position, or of rows and columns; 1."""
    features, size, case = x.shape[-1], q.option("size"), q.option("case")
    shapes = {} if case == 2 else {"gamma": (features,)}
    if case in (2, 3):
        shapes["positions"] = (*size, features if case == 2 else 1)
    if case == 4:
        for i, n in enumerate(size):
            shapes[f"axis{i}"] = (*(1,) * i, n, *(1,) * (len(size) - i))
    return {name: jnp.ones(shape, x.dtype) for name, shape in shapes.items()}, {}


def _case_and_size(options: Mapping) -> str | None:
    case, size = options["case"], options["size"]
    if (case == 1) == (size == ()):
        return None
    able = "(), as no factor depends on the position" if size else "one of the map's output"
    return f"size={size}: allowed for case={case}: {able}"


def is_factor(name: str) -> bool:
    """Whether a learned array of XNOR-Net++ is one of the position."""
    return name == "positions" or name.startswith("axis")


def spatial_scale(q: Quantizer, x: Array, arrays: Values, linear_map) -> Array | None:
    """XNOR-Net++, cases 2 to 4: the product of the factors that depend on the position."""
    factor = None
    for name, value in arrays.items():
        if is_factor(name):
            value = jnp.expand_dims(value, 0)
            factor = value if factor is None else factor * value
    return factor


def _twn(q: Quantizer, x: Array, arrays: Values) -> Rounded:
    """1, 0 or -1 where x is above 0.7 mean |x|, between, below; times mean |x| of those kept.

    The gradient passes as it is (sections 2.2 and 2.3).
    """
    fixed = lax.stop_gradient(x)
    threshold = groups.spread(q, 0.7 * groups.reduce(q, jnp.abs(fixed), jnp.mean), x)
    kept = (jnp.abs(fixed) > threshold).astype(x.dtype)
    total = groups.reduce(q, jnp.abs(fixed) * kept, jnp.sum)
    number = jnp.maximum(groups.reduce(q, kept, jnp.sum), 1)
    return Rounded(x, binary(fixed) * kept, groups.spread(q, total / number, x))


def _ttq(q: Quantizer, x: Array, arrays: Values) -> Rounded:
    """`positive` where x > t max |x|, `-negative` where x < -t max |x|, else 0 (section 3.1).

    dx = g times positive, negative or, between, 1; the two scales get the sums of their g
    (equations 7 and 8; ours of -negative has the sign that follows from the forward).
    """
    fixed = lax.stop_gradient(x)
    most = q.option("threshold") * groups.reduce(q, jnp.abs(fixed), jnp.max)
    threshold = groups.spread(q, most, x)
    above = (fixed > threshold).astype(x.dtype)
    below = (fixed < -threshold).astype(x.dtype)
    positive, negative = (
        groups.spread(q, arrays[name].astype(x.dtype), x) for name in ("positive", "negative")
    )
    value = above * positive - below * negative
    slope = lax.stop_gradient(above * positive + below * negative + (1 - above - below))
    return Rounded(value + slope * x, value=lax.stop_gradient(value))


def _start_ttq(q: Quantizer, x: Array):
    """The two scales of TWN: means of what is kept on each side."""
    most = q.option("threshold") * groups.reduce(q, jnp.abs(x), jnp.max)
    threshold = groups.spread(q, most, x)

    def mean(side):
        kept = (side > threshold).astype(x.dtype)
        number = groups.reduce(q, kept, jnp.sum)
        found = groups.reduce(q, side * kept, jnp.sum) / jnp.maximum(number, 1)
        return jnp.where(number > 0, found, 1.0)

    return {"positive": mean(x), "negative": mean(-x)}, {}


def _binarize(q: Quantizer, x: Array, arrays: Values) -> Rounded:
    """`2 round(clip((x + 1) / 2, 0, 1)) - 1`: the sign, but -1 at 0, as ties go to even."""
    codes = jnp.where(lax.stop_gradient(x) > 0, jnp.ones_like(x), -jnp.ones_like(x))
    return Rounded(pseudo(q, codes, x, -1, 1), codes, jnp.ones((1,) * x.ndim, x.dtype))


def _ternarize(q: Quantizer, x: Array, arrays: Values) -> Rounded:
    """1 above 0.5, -1 at -0.5 and below, else 0."""
    fixed = lax.stop_gradient(x)
    codes = (fixed > 0.5).astype(x.dtype) - (fixed <= -0.5).astype(x.dtype)
    return Rounded(pseudo(q, codes, x, -1, 1), codes, jnp.ones((1,) * x.ndim, x.dtype))


def two(levels: int) -> bool:
    return levels == 2


def three(levels: int) -> bool:
    return levels == 3


SIGN_INPUT = Method(_sign, two, default=2, gradients=SIGN)
XNOR_INPUT = Method(
    _xnor_input,
    two,
    default=2,
    options={"k": "none"},
    allowed={"k": one_of("none", "channel", "spatial", "box")},
    output_scale=_box_scale,
    gradients=SIGN,
)
XNOR_KERNEL = Method(_xnor_kernel, two, default=2, gradients=SIGN, grouped=True, per="channel")
BIREAL_INPUT = dataclasses.replace(SIGN_INPUT, gradients=("triangle", *SIGN[:3], "swish"))
TERNARY = Method(_twn, three, default=3, grouped=True)

METHODS = {
    "sign": {"input": SIGN_INPUT, "kernel": SIGN_INPUT, "output": SIGN_INPUT},
    "xnor": {"input": XNOR_INPUT, "kernel": XNOR_KERNEL},
    "xnor++": {
        "input": SIGN_INPUT,
        "kernel": Method(
            _scaled_kernel,
            two,
            default=2,
            start=_start_scaled,
            options={"case": 1, "size": ()},
            allowed={"case": one_of(1, 2, 3, 4), "size": whole_numbers()},
            check=_case_and_size,
            output_scale=spatial_scale,
            gradients=SIGN,
            per="channel",
        ),
    },
    "bireal": {
        "input": BIREAL_INPUT,
        "kernel": dataclasses.replace(XNOR_KERNEL, round=_magnitude_aware),
    },
    "twn": {"kernel": TERNARY},
    "ttq": {
        "kernel": dataclasses.replace(
            TERNARY,
            round=_ttq,
            start=_start_ttq,
            options={"threshold": 0.05},
            allowed={"threshold": above_zero(up_to=1)},
        )
    },
    "binarize": dict.fromkeys(
        ("input", "kernel", "output"), dataclasses.replace(SIGN_INPUT, round=_binarize)
    ),
    "ternarize": dict.fromkeys(
        ("input", "kernel", "output"),
        Method(_ternarize, three, default=3, gradients=("identity", "clipped", "scaled")),
    ),
}
