"""Watching layers run: shapes for the summary table, activations for the analysis tools, peaks."""

import contextlib
import contextvars
from collections.abc import Callable

_observer: contextvars.ContextVar[Callable | None] = contextvars.ContextVar(
    "observer", default=None
)
_peaks: contextvars.ContextVar[list | None] = contextvars.ContextVar("peaks", default=None)


@contextlib.contextmanager
def observing(observer: Callable):
    """Inside, every Dense and Conv calls `observer(layer, x, y)` with its input and output.

    y is the unit's: behind a batch norm and activation that `layer_norm_act` took in with it.

    Under `jax.jit` or `jax.eval_shape` x and y are tracers: use their shapes, do not keep them.
    """
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)


def observed(layer, x, y) -> None:
    observer = _observer.get()
    if observer is not None:
        observer(layer, x, y)


@contextlib.contextmanager
def watching():
    """Inside, each Dense and Conv adds `(layer, peak)` to the list that is given.

    peak is the largest magnitude, a scalar, of what its neuron combines, before norm and
    activation: products make extreme values, and one that is not finite stays so. Tracers under
    `jax.jit`: return them from the function that is traced.
    """
    peaks: list = []
    token = _peaks.set(peaks)
    try:
        yield peaks
    finally:
        _peaks.reset(token)


def is_watching() -> bool:
    return _peaks.get() is not None


def watched(layer, peak) -> None:
    _peaks.get().append((layer, peak))
