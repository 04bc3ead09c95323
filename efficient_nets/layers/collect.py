"""What layers tell while a net runs, beside their values: peaks of products, their own losses."""

import contextlib
import contextvars

from flax import nnx
from jax import Array

_kinds: dict[str, contextvars.ContextVar[list | None]] = {
    kind: contextvars.ContextVar(kind, default=None) for kind in ("peaks", "losses")
}


@contextlib.contextmanager
def collecting(kind: str):
    """Inside, layers add `(layer, value)` of that kind to the list; values are scalars.

    'peaks': each Dense and Conv with a term of second order, that term's largest magnitude before
    norm and activation: products make extreme values, and one that is not finite stays so.
    'losses': each layer whose quantizers have a loss, what is to be added to the net's.

    Tracers under `jax.jit`: return them from the function that is traced; out of `nnx.remat` and
    the like they cannot be taken.
    """
    found: list = []
    token = _kinds[kind].set(found)
    try:
        yield found
    finally:
        _kinds[kind].reset(token)


def wanted(kind: str) -> bool:
    return _kinds[kind].get() is not None


def add(kind: str, layer: nnx.Module, value: Array) -> None:
    _kinds[kind].get().append((layer, value))
