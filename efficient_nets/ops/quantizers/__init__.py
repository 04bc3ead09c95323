"""Quantizers: pure functions of a frozen spec and arrays, each with the gradient of its paper.

    quantizer = quantizers.make("kernel", dict(method="lsq", bits=4))
    arrays = quantizers.start(quantizer, kernel)
    quantizers.quantize(quantizer, kernel, arrays)

A method is an entry of `METHODS`: for each site where it can be, its `spec.Method`. `observe` moves
what is not learned, in training and before quantizing; `quantize` moves nothing.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from efficient_nets import names
from efficient_nets.ops import straight_through as through
from efficient_nets.ops.linear_maps import wide
from efficient_nets.ops.quantizers import (
    binary,
    codebook,
    fields,
    groups,
    ranges,
    spec,
    steps,
    uniform,
)
from efficient_nets.ops.quantizers.normalise import normalised
from efficient_nets.ops.quantizers.schedule import (
    SEEN,
    advance,
    held,
    is_over,
    phase,
    settled,
)
from efficient_nets.ops.quantizers.spec import Arrays, Method, Quantizer, Rounded, times, value

__all__ = [
    "METHODS",
    "Arrays",
    "Method",
    "Quantizer",
    "Rounded",
    "advance",
    "calibrate",
    "code_bounds",
    "held",
    "is_over",
    "loss",
    "make",
    "observe",
    "output_scale",
    "phase",
    "quantize",
    "rounded",
    "settled",
    "start",
    "stored",
    "value",
]

CALIBRATIONS = {
    "own": "as the quantizer's paper starts it",
    "minmax": "all values",
    "percentile": "all but one in 10,000 on each side",
    "mse": "the range of least square error",
    "entropy": "the range of least divergence between the histograms",
}

METHODS = uniform.METHODS | steps.METHODS | binary.METHODS | codebook.METHODS


def _stored(quantizer: Quantizer, x: Array, arrays) -> Rounded:
    return Rounded(x, codes=x, scale=arrays["scale"])


# A kernel of whole numbers already, with its scales: what `stored` gives a net for use.
STORED = Method(_stored, lambda levels: True, output_scale=binary.spatial_scale)


def make(site: str, options: Mapping[str, Any]) -> Quantizer:
    """See `fields.quantizer`."""
    return fields.quantizer(METHODS, site, options)


def method(quantizer: Quantizer) -> Method:
    return STORED if quantizer.method == "stored" else METHODS[quantizer.method][quantizer.role]


def stored(quantizer: Quantizer, arrays: Arrays, rounded: Rounded) -> tuple[Quantizer, Arrays]:
    """The quantizer, and its arrays, that a kernel of this one's codes has."""
    made = Quantizer(
        *(quantizer.site, "stored", quantizer.levels, quantizer.signed, quantizer.per, "identity"),
        axis=quantizer.axis,
        zero_point=quantizer.zero_point,
        options=(("bounds", code_bounds(quantizer)),),
    )
    factors = {name: x for name, x in arrays.learned.items() if binary.is_factor(name)}
    return made, Arrays(factors, {"scale": rounded.scale})


def code_bounds(quantizer: Quantizer) -> tuple[int, int]:
    """Between which its codes lie, in each of its stages.

    DoReFa's of a kernel are `1-L ... L-1` in steps of 2; a zero point makes them as wide.
    """
    if quantizer.method == "stored":
        return quantizer.option("bounds")
    levels = max([quantizer.levels, *(levels for _, levels in quantizer.stages)])
    if quantizer.zero_point or (quantizer.method, quantizer.role) == ("dorefa", "kernel"):
        return 1 - levels, levels - 1
    return spec.code_range(levels, quantizer.signed)


def start(quantizer: Quantizer, x: Array) -> Arrays:
    """The arrays that it begins with, made for values such as x."""
    x = normalised(quantizer, x.astype(wide(x.dtype)))[0]
    found = method(quantizer).start
    learned, observed = ({}, {}) if found is None else found(quantizer, x)
    if quantizer.post_scale:
        number = groups.count(quantizer, x.shape)
        learned = learned | {"post_scale": jnp.ones(number, x.dtype)}
    if quantizer.scheduled:
        observed = observed | phase(quantizer, 0.0)
    if quantizer.float_epochs:
        observed = observed | {f"{SEEN}{name}": value for name, value in learned.items()}
    return Arrays(learned, observed)


def calibrate(quantizer: Quantizer, x: Array, how: str = "own") -> Arrays:
    """The arrays for values that are known, x.

    Args:
      quantizer: The spec.
      x: Values such as it will round.
      how: 'own': as the method starts; 'minmax', 'percentile', 'mse', 'entropy': to cover a range
        of `ranges`. A method without a range of its own starts as it does.

    Raises:
      UserError: on another name.
    """
    names.pick("how", how, CALIBRATIONS)
    arrays, fit = start(quantizer, x), method(quantizer).fit
    if how == "own" or fit is None:
        return arrays
    x = normalised(quantizer, x.astype(wide(x.dtype)))[0]

    def fitted(lo, hi):
        found = fit(quantizer, lo, hi)
        return Arrays(*(old | new for old, new in zip(arrays, found, strict=True)))

    if how == "mse":
        plain = dataclasses.replace(
            quantizer,
            **dict(levels=quantizer.first_levels, stages=(), normalise="none"),
            **dict(float_epochs=0.0, stop_epoch=0.0),
        )
        lo, hi = ranges.least_error(quantizer, x, lambda lo, hi: quantize(plain, x, fitted(lo, hi)))
    else:
        lo, hi = getattr(ranges, how)(quantizer, x)
    return fitted(lo, hi)


def _seen(quantizer: Quantizer, x: Array, arrays: Arrays) -> dict[str, Array]:
    """While nothing is rounded yet: moving averages of what the learned arrays would start from."""
    active, before, found = arrays.observed["active"] > 0, arrays.observed, start(quantizer, x)
    return {
        f"{SEEN}{name}": jnp.where(
            active, before[f"{SEEN}{name}"], 0.9 * before[f"{SEEN}{name}"] + 0.1 * value
        )
        for name, value in found.learned.items()
    }


def observe(quantizer: Quantizer, x: Array, arrays: Arrays) -> Arrays:
    """The arrays with the observed ones moved on by x. Without gradient."""
    found, before = method(quantizer).observe, arrays.observed
    x = lax.stop_gradient(x)
    moved = {}
    if found is not None:
        normal = normalised(quantizer, x.astype(wide(x.dtype)))[0]
        moved = found(quantizer, normal, before)
    if quantizer.float_epochs:
        moved = moved | _seen(quantizer, x, arrays)
    if "frozen" in before:
        moved = {
            name: jnp.where(before["frozen"] > 0, before[name], new) for name, new in moved.items()
        }
    return arrays._replace(observed=before | moved)


def _while_active(quantizer: Quantizer, found: Rounded, x: Array, active: Array) -> Rounded:
    """That, else x: as codes with a scale of 1, which changes no bit, so that one map serves both.

    One that stops has no codes: a net for use is without it, and its map is of the values.
    """
    surrogate = jnp.where(active, value(found), x)
    if found.codes is None or quantizer.stop_epoch:
        return Rounded(surrogate)
    codes = jnp.where(active, found.codes, lax.stop_gradient(x))
    return Rounded(surrogate, codes, jnp.where(active, found.scale, 1))


def rounded(
    quantizer: Quantizer, x: Array, arrays: Arrays, pad: Callable[[Array], Array] | None = None
) -> Rounded:
    """Codes and scale of x where the value is their product, else the value; and the surrogate.

    In float32, or float64 for its own. `pad` is what puts zeros around x before they are rounded,
    which are no part of the sample that `normalise` looks at.
    """
    x = x.astype(wide(x.dtype))
    learned, observed = arrays
    if "frozen" in observed:
        moves = 1.0 - observed["frozen"].astype(x.dtype)
        learned = {name: through.scale_gradient(v, moves) for name, v in learned.items()}
    normal, undo = normalised(quantizer, x)
    if pad is not None:
        x, normal = pad(x), pad(normal)
    found = method(quantizer).round(quantizer, normal, {**observed, **learned})
    if "post_scale" in learned:
        found = times(found, groups.spread(quantizer, learned["post_scale"].astype(x.dtype), x))
    found = undo(found)
    if quantizer.levels > spec.CODED_LEVELS and found.codes is not None:
        found = Rounded(found.surrogate, value=lax.stop_gradient(found.codes * found.scale))
    if quantizer.pauses:
        found = _while_active(quantizer, found, x, observed["active"] > 0)
    if found.codes is None and found.value is None:
        return found._replace(value=lax.stop_gradient(found.surrogate))
    return found


def quantize(quantizer: Quantizer, x: Array, arrays: Arrays) -> Array:
    """The quantized value of x, of its type, with the quantizer's gradient."""
    return value(rounded(quantizer, x, arrays)).astype(x.dtype)


def loses_negatives(quantizer: Quantizer) -> bool:
    """Whether it rounds what is below 0 to 0, which no activation in front of it may have done."""
    # Quantized ReLU is the activation.
    return not (quantizer.signed or quantizer.shifts or quantizer.method == "quantized_relu")


def output_scale(quantizer: Quantizer | None, x: Array, arrays, linear_map) -> Array | None:
    """What multiplies the map's output in XNOR-Net and XNOR-Net++, else None."""
    found = None if quantizer is None else method(quantizer).output_scale
    if found is None:
        return None
    if quantizer.site == "input" and quantizer.normalise != "none":
        x = normalised(quantizer, x.astype(wide(x.dtype)))[0]
    factor = found(quantizer, x, arrays.learned, linear_map)
    if factor is None or not quantizer.pauses:
        return factor
    return jnp.where(arrays.observed["active"] > 0, factor, 1)


def loss(quantizer: Quantizer, x: Array, arrays: Arrays) -> Array:
    """`loss * mean |x - quantized|^p`, a scalar.

    Its gradient pulls the values to their levels, these taken as constant, and the levels to the
    values: that of x is `loss p |x - q|^(p-1) sign(x - q) / n`, that of learned arrays the
    quantizer's own for the opposite of it. Through the straight-through gradient of q with respect
    to x the two would cancel.
    """
    quantized = quantize(quantizer, lax.stop_gradient(x), arrays)
    error = x.astype(wide(x.dtype)) - quantized.astype(wide(x.dtype))
    # `jnp.abs` would have the slope 1 at 0, where values pass as they are.
    sign = lax.stop_gradient(jnp.sign(error))
    return quantizer.loss * jnp.mean(error * (sign if quantizer.loss_norm == "l1" else error))
