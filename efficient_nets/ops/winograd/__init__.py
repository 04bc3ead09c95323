"""Winograd's convolution: exact transforms for any tile, points and base, and the map itself."""

from efficient_nets.ops.winograd.maps import (
    OF_KERNELS,
    PRODUCTS,
    WinogradMap,
    apply,
    transformed_kernel,
)
from efficient_nets.ops.winograd.spec import DIRECT, Winograd, parse

__all__ = [
    "DIRECT",
    "OF_KERNELS",
    "PRODUCTS",
    "Winograd",
    "WinogradMap",
    "apply",
    "parse",
    "transformed_kernel",
]
