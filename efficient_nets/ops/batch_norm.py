"""Batch norm over all axes but the last: its arithmetic, forward and backward, in passes.

    y = scale * (x - mean) / sqrt(var + epsilon) + bias

A backward over batch statistics takes two passes, since it must know two sums an axis before it can
write one gradient: with n = (x - mean) / sqrt(var + epsilon) and g = dL/dy,

    dscale = sum(g n),  dbias = sum(g)
    dx = scale / sqrt(var + epsilon) * (g - mean(g) - n * mean(g n))
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax


class Norm(NamedTuple):
    """Batch norm's arrays `(C,)`. mean, var: frozen statistics, or None for the batch's."""

    scale: Array
    bias: Array
    mean: Array | None = None
    var: Array | None = None


class Moments(NamedTuple):
    """Mean and variance over all axes but the last, `(C,)`, float32."""

    mean: Array
    var: Array


def moments(x: Array) -> Moments:
    """Two passes: E[x^2] - E[x]^2 would cancel where a product's mean is far from 0."""
    axes = tuple(range(x.ndim - 1))
    mean = jnp.mean(x, axes)
    return Moments(mean, jnp.mean(jnp.square(x - row(mean, x)), axes))


def row(channel_values: Array, like: Array) -> Array:
    """`(C,)` to a shape that broadcasts with `(..., C)` under strict rank promotion."""
    return channel_values.reshape((1,) * (like.ndim - 1) + (-1,))


def moments_used(x: Array, norm: Norm) -> Moments:
    return moments(x) if norm.mean is None else Moments(norm.mean, norm.var)


def affine(norm: Norm, used: Moments, epsilon: float) -> tuple[Array, Array]:
    """The slope and the shift of each channel, `(C,)` each, that a norm is with these moments."""
    slope = norm.scale * lax.rsqrt(used.var + epsilon)
    return slope, norm.bias - used.mean * slope


def normalise(x: Array, norm: Norm, used: Moments, epsilon: float) -> Array:
    """One multiply-add an element: XLA then has no normalised copy to keep."""
    slope, shift = affine(norm, used, epsilon)
    return x * row(slope, x) + row(shift, x)


def sums(g: Array, x: Array, used: Moments, epsilon: float) -> tuple[Array, Array]:
    """Gradients of a norm's scale and bias, `(C,)` each: all that its second pass must know."""
    axes = tuple(range(x.ndim - 1))
    normal = (x - row(used.mean, x)) * row(lax.rsqrt(used.var + epsilon), x)
    return jnp.sum(g * normal, axes), jnp.sum(g, axes)


def input_gradient(g: Array, x: Array, norm: Norm, used: Moments, sums, epsilon: float) -> Array:
    inverse = lax.rsqrt(used.var + epsilon)
    if norm.mean is None:
        count = x.size // x.shape[-1]
        normal = (x - row(used.mean, x)) * row(inverse, x)
        g = g - row(sums[1] / count, g) - normal * row(sums[0] / count, g)
    return g * row(norm.scale * inverse, g)


def parameter_gradient(norm: Norm, sums: tuple[Array, Array]) -> Norm:
    """Frozen statistics are data, not parameters: their gradient is 0."""
    return Norm(*sums, *jax.tree.map(jnp.zeros_like, (norm.mean, norm.var)))
