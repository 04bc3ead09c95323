"""Rounded kernels in a file: indices of 1 to 8 bits, packed into bytes without gaps, and tables.

A table is what the indices stand for. Its shape follows from the quantizer alone, so that a file's
size is known before there are values: see `analysis.model_cost`.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from efficient_nets.ops.quantizers import Quantizer, groups

MAX_BITS = 8  # of a packed number


def table_shape(quantizer: Quantizer, shape: Sequence[int], dtype: jnp.dtype) -> tuple[int, int]:
    """`(G, L)`: of the values that a kernel takes, L in each of G groups of its channels.

    One group of all where they are codes (of an integer `dtype`), unless these have zero points;
    else the groups of the quantizer's `per`, along its `axis`.
    """
    shared = jnp.issubdtype(dtype, jnp.integer) and not quantizer.zero_point
    number = 1 if shared else groups.count(quantizer, shape)
    return number, quantizer.levels


def narrowest(bounds: tuple[int, int], able: Sequence = (jnp.int8, jnp.int16)) -> jnp.dtype:
    """The first of these types that holds whole numbers between the bounds."""
    return next(x for x in able if jnp.iinfo(x).min <= bounds[0] and bounds[1] <= jnp.iinfo(x).max)


def packed_size(count: int, bits: int) -> int:
    """Bytes that so many numbers take."""
    return -(-count * bits // 8)


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Numbers `0 ... 2^bits - 1` of any shape, in C order, as `(packed_size,)` bytes.

    Each takes `bits` bits, the lowest first; the last byte is filled up with zeros.
    """
    flat = np.asarray(values).ravel()
    if flat.size and not (0 <= flat.min() and flat.max() < 2**bits):
        raise ValueError(f"values from {flat.min()} to {flat.max()} do not fit {bits} bits")
    planes = (flat.astype(np.uint8)[:, None] >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(planes.ravel(), bitorder="little")


def unpack(packed: np.ndarray, bits: int, shape: tuple[int, ...]) -> np.ndarray:
    """Undoes `pack`: uint8 of the given shape."""
    count = int(np.prod(shape))
    if packed.shape != (packed_size(count, bits),):
        raise ValueError(f"{count} numbers of {bits} bits do not lie in {packed.shape} bytes")
    planes = np.unpackbits(packed, count=count * bits, bitorder="little").reshape(count, bits)
    weights = (1 << np.arange(bits)).astype(np.uint8)
    return (planes * weights).sum(axis=1, dtype=np.uint8).reshape(shape)
