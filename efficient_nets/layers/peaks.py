"""The largest magnitudes of products, collected while a net runs."""

import contextlib
import contextvars

from flax import nnx
from jax import Array

_peaks: contextvars.ContextVar[list | None] = contextvars.ContextVar("peaks", default=None)


@contextlib.contextmanager
def collecting_peaks():
    """Inside, each Dense and Conv with a term of second order adds `(layer, peak)` to the list.

    peak is that term's largest magnitude, a scalar, before norm and activation: products make
    extreme values, and one that is not finite stays so. Tracers under `jax.jit`: return them from
    the function that is traced; out of `nnx.remat` and the like they cannot be taken.
    """
    found: list = []
    token = _peaks.set(found)
    try:
        yield found
    finally:
        _peaks.reset(token)


def wants_peaks() -> bool:
    return _peaks.get() is not None


def add_peak(layer: nnx.Module, peak: Array) -> None:
    _peaks.get().append((layer, peak))
