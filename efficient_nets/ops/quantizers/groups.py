"""Values that share a range: per layer, per channel, per group of channels.

Grouped figures have the shape `(G,)`, G being 1 per layer.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from efficient_nets.errors import UserError
from efficient_nets.ops.quantizers.spec import Quantizer


def channel_axis(quantizer: Quantizer) -> int:
    """The axis that 'channel' and 'groups' cut, counted from the end."""
    return -2 if (quantizer.site, quantizer.axis) == ("kernel", "in") else -1


def count(quantizer: Quantizer, channels: int) -> int:
    """G, for an axis of this many channels.

    Raises:
      UserError: if groups of that number or size do not divide them.
    """
    kind, _, number = quantizer.per.partition(":")
    if kind == "layer":
        return 1
    if kind == "channel":
        return channels
    if channels % int(number):
        raise UserError(
            f"precision.{quantizer.site}.per={quantizer.per!r}: it does not divide the {channels} "
            "channels"
        )
    return int(number) if kind == "groups" else channels // int(number)


def reduce(
    quantizer: Quantizer, x: Array, function: Callable, *, keep_batch: bool = False
) -> Array:
    """`function(x, axis=axes)`, such as `jnp.mean`, over each group: `(G,)`.

    With `keep_batch` the first axis is not reduced: `(N, G)`.
    """
    axis = x.ndim + channel_axis(quantizer)
    groups = count(quantizer, x.shape[axis])
    x = x.reshape(*x.shape[:axis], groups, -1, *x.shape[axis + 1 :])
    kept = (0, axis) if keep_batch else (axis,)
    return function(x, axis=tuple(i for i in range(x.ndim) if i not in kept))


def spread(quantizer: Quantizer, values: Array, x: Array) -> Array:
    """Figures of groups `(G,)`, with an axis for each of x's, so that they broadcast to x."""
    axis = x.ndim + channel_axis(quantizer)
    channels, groups = x.shape[axis], values.shape[0]
    if 1 < groups < channels:
        values = jnp.repeat(values, channels // groups)
    shape = [1] * x.ndim
    shape[axis] = values.shape[0]
    return values.reshape(shape)


def size(quantizer: Quantizer, x: Array) -> int:
    """Values of a group; of an input those of one sample, as a batch is no part of a layer."""
    groups = count(quantizer, x.shape[channel_axis(quantizer)])
    values = x.size if quantizer.site == "kernel" else x[:1].size
    return max(values // groups, 1)
