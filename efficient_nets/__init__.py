"""Efficient nets: quadratic, quantized, factorized and Winograd layers in one JAX/Flax library."""

__version__ = "0.1.0"
