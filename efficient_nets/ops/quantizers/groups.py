"""Values that share a range: per layer, per channel, per group of channels, per tap.

Grouped figures have the shape `(G,)`, G being 1 per layer.
"""

import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import Array

from efficient_nets.errors import UserError
from efficient_nets.ops.quantizers.spec import INNER, Quantizer


def channel_axis(quantizer: Quantizer) -> int:
    """The axis that 'channel' and 'groups' cut, counted from the end."""
    return -2 if (quantizer.role, quantizer.axis) == ("kernel", "in") else -1


def cuts(quantizer: Quantizer, shape: Sequence[int]) -> dict[int, int]:
    """The axes that are cut, from the first one on, and the number of groups of each.

    Groups are counted along the last of them first.

    Raises:
      UserError: if groups of that number or size do not divide the channels.
    """
    kind, _, number = quantizer.per.partition(":")
    if kind == "layer":
        return {}
    if kind == "tap":
        taps = {0: shape[0]}
        return taps | _channels(quantizer, shape) if number else taps
    axis = len(shape) + channel_axis(quantizer)
    channels = shape[axis]
    if kind == "channel":
        return _channels(quantizer, shape)
    if channels % int(number):
        raise UserError(
            f"precision.{quantizer.site}.per={quantizer.per!r}: it does not divide the {channels} "
            "channels"
        )
    return {axis: int(number) if kind == "groups" else channels // int(number)}


def _channels(quantizer: Quantizer, shape: Sequence[int]) -> dict[int, int]:
    axis = len(shape) + channel_axis(quantizer)
    return {axis: shape[axis]}


def count(quantizer: Quantizer, shape: Sequence[int]) -> int:
    """G, for values of this shape.

    Raises:
      UserError: if groups of that number or size do not divide the channels.
    """
    return math.prod(cuts(quantizer, shape).values())


def reduce(quantizer: Quantizer, x: Array, function: Callable) -> Array:
    """`function(x, axis=axes)`, such as `jnp.mean`, over each group: `(G,)`.

    What the function gives has the axes that are left behind any others.
    """
    cut = cuts(quantizer, x.shape) or {x.ndim + channel_axis(quantizer): 1}
    shape, kept = [], []
    for axis, size in enumerate(x.shape):
        if axis in cut:
            kept.append(len(shape))
            shape += [cut[axis], size // cut[axis]]
        else:
            shape.append(size)
    found = function(x.reshape(shape), axis=tuple(i for i in range(len(shape)) if i not in kept))
    return found.reshape(*found.shape[: found.ndim - len(cut)], -1)


def spread(quantizer: Quantizer, values: Array, x: Array) -> Array:
    """Figures of groups `(G,)`, with an axis for each of x's, so that they broadcast to x."""
    if values.shape[0] == 1:
        return values.reshape((1,) * x.ndim)
    cut = cuts(quantizer, x.shape)
    for axis, groups in cut.items():  # several axes: each group is of one index of each
        if groups < x.shape[axis]:
            values = jnp.repeat(values, x.shape[axis] // groups)
    return values.reshape([x.shape[axis] if axis in cut else 1 for axis in range(x.ndim)])


def size(quantizer: Quantizer, x: Array) -> int:
    """Values of a group; of an input those of one sample, as a batch is no part of a layer."""
    values = x.size if quantizer.role == "kernel" else x[:1].size
    if quantizer.site in INNER:
        values = x.size // x.shape[1] if x.ndim == 4 else x.size
    return max(values // count(quantizer, x.shape), 1)
