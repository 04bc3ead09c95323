"""A map in parts along one index of its network, one after another: less to hold at a time.

Along a bond the parts are summed, along a mode of the outputs they are put side by side, and of the
inputs each has its own and they are summed.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from jax import Array, lax

from efficient_nets.ops import linear_maps
from efficient_nets.ops.factorization.network import Cores, Network


def numbers_of_parts(size: int) -> Iterable[int]:
    """Those that an index of this size is cut in: 2, 3, 4, 6, 8, 12 ..."""
    powers = (1 << power for power in range(1, size.bit_length()))
    return (parts for power in powers for parts in (power, power + power // 2) if parts <= size)


def part(network: Network, index: str, parts: int) -> Network:
    """The network of one part, the last one of which may have zeros behind its own."""
    smaller = network.with_sizes({index: -(-network.size(index) // parts)})
    channels = (smaller.size(*smaller.inputs), smaller.size(*smaller.outputs))
    return dataclasses.replace(smaller, kernel_shape=(*network.kernel_shape[:-2], *channels))


def in_parts(
    network: Network,
    index: str,
    parts: int,
    run: Callable[[Network, Array, Cores], Array],
    x: Array,
    cores: Cores,
) -> Array:
    """The map of this network, of whose parts `run` is each: `(..., outputs)`.

    The backward pass computes each part again.

    Args:
      network: Without a window.
      index: One of its indices.
      parts: What it is cut in.
      run: `(part, x, cores)`, cores and x of the part, to `(..., outputs of the part)`.
      x: `(..., inputs)`, as many as the modes make up.
      cores: By name.
    """
    lead = x.shape[:-1]
    smaller = part(network, index, parts)
    modes = {**network.indices, "x": (*(f"axis{i}" for i in range(len(lead))), *network.inputs)}
    arrays = {**cores, "x": x.reshape(*lead, *map(network.size, network.inputs))}
    scanned = {
        name: _cut(array, modes[name].index(index), smaller.size(index), parts)
        for name, array in arrays.items()
        if index in modes[name]
    }
    whole = {name: array for name, array in arrays.items() if name not in scanned}

    @jax.checkpoint
    def one(whole, own):
        found = whole | own
        own_x = found.pop("x").reshape(*lead, smaller.size(*smaller.inputs))
        return run(smaller, own_x, found)

    if index not in network.outputs:

        def add(total, own):
            return total + one(whole, own).astype(total.dtype), None

        # From the first part on, as zeros would not vary over the devices of a `shard_map`.
        first, rest = (jax.tree.map(lambda a, at=at: a[at], scanned) for at in (0, slice(1, None)))
        total = one(whole, first).astype(linear_maps.wide(x.dtype))
        return lax.scan(add, total, rest)[0].astype(x.dtype)

    ys = lax.map(functools.partial(one, whole), scanned)
    size = network.size(*network.outputs)
    at = network.outputs.index(index)
    before, after = (network.size(*of) for of in (network.outputs[:at], network.outputs[at + 1 :]))
    one_size = smaller.size(index)
    ys = jnp.moveaxis(ys.reshape(parts, *lead, before, one_size, after), 0, -3)
    ys = ys.reshape(*lead, before, parts * one_size, after)[..., : network.size(index), :]
    return ys.reshape(*lead, size)


def _cut(array: Array, axis: int, size: int, parts: int) -> Array:
    """Parts in front, each with this size of the axis, the last one with zeros behind."""
    pads = [(0, 0)] * array.ndim
    pads[axis] = (0, parts * size - array.shape[axis])
    cut = jnp.pad(array, pads)
    cut = cut.reshape(*cut.shape[:axis], parts, size, *cut.shape[axis + 1 :])
    return jnp.moveaxis(cut, axis, 0)
