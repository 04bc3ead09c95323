"""The largest magnitudes that neurons combine, collected while a net runs."""

import contextlib
import contextvars

from flax import nnx
from jax import Array

_peaks: contextvars.ContextVar[list | None] = contextvars.ContextVar("peaks", default=None)


@contextlib.contextmanager
def collecting_peaks():
    """Inside, each Dense and Conv adds `(layer, peak)` to the list that is given.

    peak is the largest magnitude, a scalar, of what its neuron combines, before norm and
    activation: products make extreme values, and one that is not finite stays so. Tracers under
    `jax.jit`: return them from the function that is traced.
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
