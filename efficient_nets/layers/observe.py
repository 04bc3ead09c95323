"""Watching layers run: shapes for the summary table, activations for the analysis tools, peaks."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable

from flax import nnx
from jax import Array

from efficient_nets.layers.rules import layers

_peaks: contextvars.ContextVar[list | None] = contextvars.ContextVar("peaks", default=None)


@dataclasses.dataclass(frozen=True)
class Watch:
    """What a watched layer calls: `observer(path, layer, x, y)`.

    A static attribute of the layer, so that it goes through `nnx.jit`, `nnx.remat` and
    `nnx.split` with it: a trace that JAX cached for another observer, or for another layer of the
    same shapes, does not serve this one.
    """

    path: str
    observer: Callable

    def __call__(self, layer: nnx.Module, x: Array, y: Array) -> None:
        self.observer(self.path, layer, x, y)


def watched(model: nnx.Module, observer: Callable) -> nnx.Module:
    """A copy of the net in which every Dense and Conv calls `observer(path, layer, x, y)`.

    x is the layer's input in its compute type. y is the unit's output: behind a batch norm and
    activation that `layer_norm_act` took in with it.

    Under a transform x and y are tracers: use their shapes, or hand them out as variables of
    `layer`. A call that JAX does not trace anew is not seen: a second one of one layer on the same
    shapes inside one `nnx.remat` or `nnx.jit`, and the later steps of a scan.
    """
    model = nnx.merge(*nnx.split(model))  # a clone would copy arrays, which shapes do not have
    for path, layer in layers(model):
        layer.watch = Watch(path, observer)
    return model


@contextlib.contextmanager
def peaks():
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
