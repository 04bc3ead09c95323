"""Efficient nets: quadratic, quantized, factorized and Winograd layers in one JAX/Flax library."""

__version__ = "0.1.0"


def __getattr__(name: str):
    """`efficient_nets.run`, which imports what trains when it is asked for."""
    if name != "run":
        raise AttributeError(f"module 'efficient_nets' has no attribute {name!r}")
    from efficient_nets.one_call import run

    return run
