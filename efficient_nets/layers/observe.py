"""Watching layers run: shapes for the summary table, activations for the analysis tools."""

import dataclasses
from collections.abc import Callable

from flax import nnx
from jax import Array

from efficient_nets.layers.rules import layers, t_layers


@dataclasses.dataclass(frozen=True)
class Watch:
    """What a watched layer calls: `observer(path, layer, x, y)`, or without y in front of it.

    A static attribute of the layer, so that it goes through `nnx.jit`, `nnx.remat` and
    `nnx.split` with it: a trace that JAX cached for another observer, or for another layer of the
    same shapes, does not serve this one.
    """

    path: str
    observer: Callable

    def __call__(self, layer: nnx.Module, *values: Array) -> None:
        self.observer(self.path, layer, *values)


def watched(
    model: nnx.Module,
    observer: Callable | None = None,
    before: Callable | None = None,
    *,
    tensors: bool = False,
) -> nnx.Module:
    """A copy of the net in which every Dense and Conv calls `observer(path, layer, x, y)`.

    `before(path, layer, x)` is called in front of the layer, and may change its parameters. With
    `tensors` every TDense calls the observer too; its x and y have the tubes in front of the batch.

    x is the layer's input in its compute type. y is the unit's output: behind a batch norm and
    activation that `layer_norm_act` took in with it.

    Under a transform x and y are tracers: use their shapes, or hand them out as variables of
    `layer`. A call that JAX does not trace anew is not seen: a second one of one layer on the same
    shapes inside one `nnx.remat` or `nnx.jit`, and the later steps of a scan.
    """
    model = nnx.merge(*nnx.split(model))  # a clone would copy arrays, which shapes do not have
    for path, layer in layers(model):
        layer.watch = observer and Watch(path, observer)
        layer.prepare = before and Watch(path, before)
    for path, layer in t_layers(model) if tensors else ():
        layer.watch = observer and Watch(path, observer)
    return model
