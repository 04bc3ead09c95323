"""A checksum of an array, taken on the device where it lies."""

import jax
import jax.numpy as jnp


@jax.jit
def checksum(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two uint32 sums over the bits of x, modulo 2**32 and so exact in any order and sharding.

    The first sees every change of a single word. The second sums MurmurHash3's mix of each word
    with its index, so that it also sees words swapped or shifted.
    """
    if x.dtype == bool:
        words = x.astype(jnp.uint32)
    else:
        unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
        words = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    index = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    mixed = words ^ (index * jnp.uint32(0x9E3779B9))
    mixed = (mixed ^ (mixed >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
    mixed = mixed ^ (mixed >> jnp.uint32(16))
    return jnp.sum(words, dtype=jnp.uint32), jnp.sum(mixed, dtype=jnp.uint32)
