"""Whole numbers of 1 to 8 bits, packed into bytes without gaps."""

import numpy as np


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
