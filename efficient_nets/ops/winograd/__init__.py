"""Winograd's convolution: exact transforms for any tile, points and base, and the map itself."""

from efficient_nets.ops.winograd.maps import WinogradMap, apply
from efficient_nets.ops.winograd.spec import DIRECT, Winograd, parse

__all__ = ["DIRECT", "Winograd", "WinogradMap", "apply", "parse"]
