"""What a net costs: parameters, bytes and multiply-accumulates, layer by layer.

The net is traced on one image and never run, so nets of shapes (`nnx.eval_shape`) can be asked too.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from clu import parameter_overview
from flax import nnx

from efficient_nets.layers import Codes, Layer, watched
from efficient_nets.ops import forms


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """One Dense or Conv of a net, on one image.

    Attributes:
      name: Path in the net, such as `stage1/0/conv2`.
      kind: 'Conv' or 'Dense'.
      kernels: Shapes of the branches' kernels.
      input_shape: `(*spatial, C)` of its first call, without the batch axis.
      output_shape: The same of its output.
      neuron, norm, kernel, algorithm, precision: Members of the axes, see `layers.LayerSpec`.
      bits: Bits of a weight: those of its codes where it is rounded.
      input_bits: The same of what it is multiplied with.
      params: Its own parameters: kernels, biases and branch norms.
      bytes: What these take in training.
      packed_bytes: The same with the kernels packed as codes of `bits` bits.
      macs: Multiply-accumulates of the linear maps and multiplications of squares, forms and the
        neuron's products, over all calls.
      bops: Bit operations: `bits * input_bits` for each of the MACs.
    """

    name: str
    kind: str
    kernels: tuple[tuple[int, ...], ...]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    neuron: str
    norm: str
    kernel: str
    algorithm: str
    precision: str
    bits: int
    input_bits: int
    params: int
    bytes: int
    packed_bytes: int
    macs: int
    bops: int


def layer_costs(model: nnx.Module, image_shape: Sequence[int]) -> list[LayerCost]:
    """The costs of a net's layers, in the order in which they are first called.

    A layer that is called twice is listed once and computes twice; one that is not called is left
    out.

    Args:
      model: A net `(N, H, W, C) -> anything`, of arrays or of `jax.ShapeDtypeStruct`s; it is left
        as it is.
      image_shape: `(H, W, C)`.
    """
    found: dict[str, LayerCost] = {}

    def observer(path, layer, x, y):
        cost = _layer_cost(path, layer, x.shape[1:], y.shape[1:])
        if path in found:
            macs, bops = found[path].macs + cost.macs, found[path].bops + cost.bops
            cost = dataclasses.replace(found[path], macs=macs, bops=bops)
        found[path] = cost

    graph, state = nnx.split(watched(model, observer))

    def trace(state, images):
        nnx.merge(graph, state)(images)

    jax.eval_shape(trace, state, jax.ShapeDtypeStruct((1, *image_shape), jnp.float32))
    return list(found.values())


def model_cost(model: nnx.Module, image_shape: Sequence[int]) -> dict[str, Any]:
    """Costs of a whole net; arithmetic outside of Dense and Conv is not counted.

    Of all parameters, norms included, `params`, `bytes`, `packed_bytes`; of the layers `macs`,
    `bops` and `layers`.
    """
    costs = layer_costs(model, image_shape)
    params, size = _parameters(model)
    return {
        "params": params,
        "macs": sum(cost.macs for cost in costs),
        "bytes": size,
        "packed_bytes": size - sum(cost.bytes - cost.packed_bytes for cost in costs),
        "bops": sum(cost.bops for cost in costs),
        "layers": costs,
    }


def _layer_cost(path: str, layer: Layer, input_shape, output_shape) -> LayerCost:
    spec, geometry = layer.spec, layer.geometry
    kernels = tuple(branch.kernel.shape for branch in layer.branches)
    positions = math.prod(output_shape[:-1])
    # Each position of the output takes every weight once: a kernel's shape already ends in the
    # output's channels, and its input channels are those of one group.
    macs = positions * sum(map(math.prod, kernels)) + spec.parts.products * math.prod(output_shape)
    if "square" in spec.parts.kinds:
        macs += math.prod(input_shape)
    if "form" in spec.parts.kinds:  # products of pairs of inputs, which all features share
        macs += positions * geometry.groups * forms.pairs(geometry.inputs)
    params, size = _parameters(layer)
    item = jnp.dtype(geometry.param_dtype).itemsize
    bits, input_bits = (
        8 * item if quantizer is None or quantizer.stop_epoch else quantizer.bits
        for quantizer in (spec.precision.kernel, spec.precision.input)
    )
    packed = size
    for branch in layer.branches:
        kernel = branch.kernel[...]
        packed -= kernel.size * kernel.dtype.itemsize - -(-kernel.size * bits // 8)
    return LayerCost(
        name=path,
        kind=type(layer).__name__,
        kernels=kernels,
        input_shape=input_shape,
        output_shape=output_shape,
        neuron=spec.neuron,
        norm=spec.norm,
        kernel=spec.kernel,
        algorithm=spec.algorithm,
        precision=str(spec.precision),
        bits=bits,
        input_bits=input_bits,
        params=params,
        bytes=size,
        packed_bytes=packed,
        macs=macs,
        bops=bits * input_bits * macs,
    )


def _parameters(module: nnx.Module) -> tuple[int, int]:
    """Number of a module's parameters, and the bytes they take."""
    params = nnx.to_pure_dict(nnx.state(module, nnx.Any(nnx.Param, Codes)))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    return int(parameter_overview.count_parameters(params)), size
