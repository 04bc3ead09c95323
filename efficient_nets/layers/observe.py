"""Watching layers run: shapes for the summary table, activations for the analysis tools."""

import contextlib
import contextvars
from collections.abc import Callable

_observer: contextvars.ContextVar[Callable | None] = contextvars.ContextVar(
    "observer", default=None
)


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
