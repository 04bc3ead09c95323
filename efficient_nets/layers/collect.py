"""What layers tell while a net runs, beside their values: peaks, losses, the norms behind them."""

import contextlib
import contextvars
from typing import Any

from flax import nnx

_kinds: dict[str, contextvars.ContextVar[list | None]] = {
    kind: contextvars.ContextVar(kind, default=None)
    for kind in ("peaks", "losses", "norms", "lost", "auxiliary")
}


@contextlib.contextmanager
def collecting(kind: str):
    """Inside, layers add `(layer, value)` of that kind to the list.

    'peaks': each Dense and Conv with a term of second order, that term's largest magnitude before
    norm and activation: products make extreme values, and one that is not finite stays so.
    'losses': each layer whose quantizers have a loss, what is to be added to the net's.
    'norms': each call of a Dense or Conv, the module that `layer_norm_act` has behind it, or None.

    'lost': in `calibrate`, in place of the layer the path of each whose input has a quantizer for
    values from 0 on; the share of the input's magnitude that lies below.

    'auxiliary': logits of an auxiliary head, with the net that has it and its weight of their loss,
    `net.auxiliary`.

    All but norms and logits are scalars, tracers under `jax.jit`: return them from the function
    that is traced; out of `nnx.remat` and the like they cannot be taken.
    """
    found: list = []
    token = _kinds[kind].set(found)
    try:
        yield found
    finally:
        _kinds[kind].reset(token)


@contextlib.contextmanager
def collecting_nothing():
    """Inside, no layer adds anything: as in a scan, whose tracers its caller cannot take."""
    tokens = [(found, found.set(None)) for found in _kinds.values()]
    try:
        yield
    finally:
        for found, token in tokens:
            found.reset(token)


def wanted(kind: str) -> bool:
    return _kinds[kind].get() is not None


def add(kind: str, layer: nnx.Module | str, value: Any) -> None:
    _kinds[kind].get().append((layer, value))
