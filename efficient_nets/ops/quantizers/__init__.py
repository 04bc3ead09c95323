"""Quantizers: pure functions of a frozen spec and arrays, each with the gradient of its paper.

    quantizer = quantizers.make("kernel", dict(method="lsq", bits=4))
    arrays = quantizers.start(quantizer, kernel)
    quantizers.quantize(quantizer, kernel, arrays)

A method is an entry of `METHODS`: for each site where it can be, its `spec.Method`. `observe` moves
what is not learned, in training and before quantizing; `quantize` moves nothing.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from efficient_nets.ops import straight_through as through
from efficient_nets.ops.linear_maps import wide
from efficient_nets.ops.quantizers import binary, codebook, groups, spec, uniform
from efficient_nets.ops.quantizers.spec import Arrays, Method, Quantizer, Rounded

__all__ = [
    "METHODS",
    "Arrays",
    "Method",
    "Quantizer",
    "Rounded",
    "loss",
    "make",
    "observe",
    "output_scale",
    "phase",
    "quantize",
    "rounded",
    "start",
    "value",
]

METHODS = uniform.METHODS | binary.METHODS | codebook.METHODS


def make(site: str, fields: Mapping[str, Any]) -> Quantizer:
    """See `spec.quantizer`."""
    return spec.quantizer(METHODS, site, fields)


def method(quantizer: Quantizer) -> Method:
    return METHODS[quantizer.method][quantizer.site]


def start(quantizer: Quantizer, x: Array) -> Arrays:
    """The arrays that it begins with, made for values such as x."""
    x = _normalised(quantizer, x.astype(wide(x.dtype)))[0]
    found = method(quantizer).start
    learned, observed = ({}, {}) if found is None else found(quantizer, x)
    if quantizer.post_scale:
        number = groups.count(quantizer, x.shape[groups.channel_axis(quantizer)])
        learned = learned | {"post_scale": jnp.ones(number, x.dtype)}
    if quantizer.scheduled:
        observed = observed | phase(quantizer, 0.0)
    return Arrays(learned, observed)


def phase(quantizer: Quantizer, epoch: Array | float) -> dict[str, Array]:
    """What the schedule says of an epoch: stage, active, frozen."""
    epoch = jnp.asarray(epoch, jnp.float32)
    begins = jnp.asarray([begin for begin, _ in quantizer.stages[1:]], jnp.float32)
    frozen = jnp.logical_and(quantizer.freeze_epoch > 0, epoch >= quantizer.freeze_epoch)
    found = {
        "stage": jnp.sum(begins <= epoch),
        "active": epoch >= quantizer.float_epochs,
        "frozen": frozen,
    }
    return {name: value.astype(jnp.int32) for name, value in found.items()}


def observe(quantizer: Quantizer, x: Array, arrays: Arrays) -> Arrays:
    """The arrays with the observed ones moved on by x. Without gradient."""
    found = method(quantizer).observe
    if found is None:
        return arrays
    before = arrays.observed
    x = lax.stop_gradient(_normalised(quantizer, x.astype(wide(x.dtype)))[0])
    moved = lax.stop_gradient(found(quantizer, x, before))
    if "frozen" in before:
        moved = {
            name: jnp.where(before["frozen"] > 0, before[name], new) for name, new in moved.items()
        }
    return arrays._replace(observed=before | moved)


def rounded(quantizer: Quantizer, x: Array, arrays: Arrays) -> Rounded:
    """Codes and scale of x where the value is their product, else the value; and the surrogate.

    In float32, or float64 for its own.
    """
    x = x.astype(wide(x.dtype))
    learned, observed = arrays
    if "frozen" in observed:
        moves = 1.0 - observed["frozen"].astype(x.dtype)
        learned = {name: through.scale_gradient(v, moves) for name, v in learned.items()}
    normal, undo = _normalised(quantizer, x)
    found = method(quantizer).round(quantizer, normal, {**observed, **learned})
    if "post_scale" in learned:
        factor = groups.spread(quantizer, learned["post_scale"].astype(x.dtype), x)
        scale = None if found.scale is None else found.scale * lax.stop_gradient(factor)
        found = Rounded(value(found) * factor, found.codes, scale)
    if quantizer.normalise == "restored":
        found = Rounded(value(found) * undo[0] + undo[1])
    if quantizer.float_epochs:
        found = Rounded(jnp.where(observed["active"] > 0, value(found), x))
    if found.codes is None and found.value is None:
        return found._replace(value=lax.stop_gradient(found.surrogate))
    return found


def quantize(quantizer: Quantizer, x: Array, arrays: Arrays) -> Array:
    """The quantized value of x, of its type, with the quantizer's gradient."""
    return value(rounded(quantizer, x, arrays)).astype(x.dtype)


def value(found: Rounded) -> Array:
    """The quantized value of what `rounded` gives, with its gradient."""
    if found.codes is None and found.value is None:
        return found.surrogate
    exact = found.codes * found.scale if found.value is None else found.value
    return through.straight_through(lax.stop_gradient(exact), found.surrogate)


def _normalised(quantizer: Quantizer, x: Array):
    """x as `normalise` says, and the `(deviation, mean)` that undo it.

    Values that are all alike, but for the rounding of their mean, give zeros: their deviation is
    taken for 1, as a root has no derivative at 0.
    """
    if quantizer.normalise == "none":
        return x, None
    mean = groups.spread(quantizer, groups.reduce(quantizer, x, jnp.mean), x)
    centred = x - mean
    variance = groups.reduce(quantizer, jnp.square(centred), jnp.mean)
    variance = groups.spread(quantizer, variance, x)
    alike = variance <= jnp.square(64 * jnp.finfo(x.dtype).eps * mean)
    centred = through.straight_through(jnp.where(alike, 0.0, centred), centred)
    std = jnp.sqrt(jnp.where(alike, 1.0, variance))
    return centred / std, (std, mean)


def output_scale(quantizer: Quantizer | None, x: Array, arrays, linear_map) -> Array | None:
    """What multiplies the map's output in XNOR-Net and XNOR-Net++, else None."""
    found = None if quantizer is None else method(quantizer).output_scale
    return None if found is None else found(quantizer, x, arrays.learned, linear_map)


def loss(quantizer: Quantizer, x: Array, arrays: Arrays) -> Array:
    """`loss * mean |x - quantized|^p`, a scalar."""
    error = x.astype(wide(x.dtype)) - quantize(quantizer, x, arrays).astype(wide(x.dtype))
    error = jnp.abs(error) if quantizer.loss_norm == "l1" else jnp.square(error)
    return quantizer.loss * jnp.mean(error)
