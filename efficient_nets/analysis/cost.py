"""What a net costs: parameters, bytes and multiply-accumulates, layer by layer.

The net is traced on one image and never run, so nets of shapes (`nnx.eval_shape`) can be asked too.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from clu import parameter_overview
from flax import nnx

from efficient_nets.layers import Codes, Embedding, Layer, LayerSpec, TDense, layers, watched
from efficient_nets.layers.kernel import Joint, Kernel
from efficient_nets.layers.winograd import is_transformable, transform_layer
from efficient_nets.ops import factorization, forms, packing, quantizers, tproduct
from efficient_nets.ops.factorization import Network
from efficient_nets.ops.quantizers import Arrays, Quantizer
from efficient_nets.ops.quantizers.spec import CORE
from efficient_nets.ops.winograd import WinogradMap


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """One Dense, Conv, Embedding or TDense of a net, on one image.

    Attributes:
      name: Path in the net, such as `stage1/0/conv2`.
      kind: 'Conv', 'Dense', 'Embedding' or 'TDense'.
      kernels: Shapes of the branches' kernels; of factorized ones those that their cores make.
      input_shape: `(*spatial, C)` of its first call, without the batch axis; of a TDense with its
        tubes in front.
      output_shape: The same of its output.
      neuron, norm, kernel, algorithm, precision: Members of the axes, see `layers.LayerSpec`; of a
        TDense, which has no axes, kernel is 't-product' and algorithm the transform.
      bits: Bits of a weight: those of its codes where it is rounded, or its cores are, those of the
        parameters' type where not, or where a schedule stops it in the end.
      input_bits: The same of what it is multiplied with. Under Winograd's algorithm both are those
        of the transformed values, where these are rounded.
      output_bits, gradient_bits: Of the neuron's value, and of what the linear maps get back in
        training; 0 where these are not rounded.
      params: Its own parameters: kernels, biases, branch norms, and what its quantizers learn.
        Cores that layers share count, here and in the bytes, for the one that is called first.
      bytes: What all its arrays take in training: these, and running averages and observed ranges.
      packed_bytes: What they take in the file of `deploy.save`: each kernel, or core, as codes of
        `bits` bits with their table of values and scales, and all else that the net computes with.
      macs: Multiply-accumulates of the linear maps and multiplications of squares, forms and the
        neuron's products, over all calls, and over all steps of a recurrent layer. Under Winograd's
        algorithm those over the channels, a^2 a tile; the transforms are additions and are not
        counted. Of a factorized kernel those with its cores; where it is made first, as run='auto'
        does if that is fewer, those with it, and not those that make it. Of a TDense those of
        `ops.tproduct.multiplications`. Of an Embedding those that contract the cores of
        its rows, none where run='reconstructed' makes the table, and the map of each `attend`.
      bops: Bit operations, over all calls: the product of both operands' bits for each of the MACs.
        A square has twice the input's bits; branches are multiplied with each other in float. What
        rounded cores make is in float, and so is all that they are multiplied with, as little of it
        is the input.
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
    output_bits: int
    gradient_bits: int
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
    owners: dict[int, str] = {}  # of cores that layers share

    def observer(path, layer, x, y):
        if isinstance(layer, TDense):
            cost = _tensor_cost(path, layer, *(z.shape[:1] + z.shape[2:] for z in (x, y)))
        else:
            shared = [owners.setdefault(key, path) for key in _shared(layer)]
            owns = all(owner == path for owner in shared)
            cost = _layer_cost(path, layer, x.shape[1:], y.shape[1:], owns)
            if isinstance(layer, Embedding):
                macs = _embedding_multiplications(layer, x)
                cost = dataclasses.replace(cost, macs=macs, bops=macs * cost.bits**2)
        if path in found:
            macs, bops = found[path].macs + cost.macs, found[path].bops + cost.bops
            cost = dataclasses.replace(found[path], macs=macs, bops=bops)
        found[path] = cost

    graph, state = nnx.split(watched(model, observer, tensors=True))

    def trace(state, images):
        nnx.merge(graph, state)(images)

    jax.eval_shape(trace, state, jax.ShapeDtypeStruct((1, *image_shape), jnp.float32))
    return list(found.values())


def model_cost(model: nnx.Module, image_shape: Sequence[int]) -> dict[str, Any]:
    """Costs of a whole net; arithmetic outside of these layers is not counted.

    Of the whole net, norms included, `params`, `bytes` and `packed_bytes`, which a `LayerCost` has
    of a layer: `packed_bytes` are those of all arrays that `deploy.save` writes, its header aside.
    Of the layers `macs`, `bops` and `layers`.
    """
    costs = layer_costs(model, image_shape)
    return {
        "params": _params(model),
        "macs": sum(cost.macs for cost in costs),
        "bytes": _bytes(model),
        "packed_bytes": _packed_bytes(model),
        "bops": sum(cost.bops for cost in costs),
        "layers": costs,
    }


def _layer_cost(path: str, layer: Layer, input_shape, output_shape, owns: bool) -> LayerCost:
    spec, geometry = layer.spec, layer.geometry
    others = [] if owns else list(_shared(layer).values())
    kernels = tuple(_kernel_shape(layer, branch) for branch in layer.branches)
    positions = math.prod(output_shape[:-1])
    of_float = 8 * jnp.dtype(geometry.param_dtype).itemsize
    rounded = {
        site: quantizer.bits
        for site, quantizer in spec.precision.quantizers.items()
        if not quantizer.stop_epoch
    }
    sites, linear_map = ("kernel", "input"), layer.linear_map
    transformed = isinstance(linear_map, WinogradMap)
    if transformed:
        sites = ("transformed_kernel", "transformed_input")
    bits, input_bits = (rounded.get(site, of_float) for site in sites)
    outer_bits = rounded.get("input", of_float)
    # What is transformed is the square already, and rounded then.
    square_bits = min(2 * outer_bits, of_float)
    if transformed and "transformed_input" in rounded:
        square_bits = input_bits
    # Multiplications, each with the bits of both operands. Each position of the output takes every
    # weight once: a kernel's shape already ends in the output's channels, and its input channels
    # are those of one group.
    each = linear_map.multiplications(output_shape[:-1]) if transformed else 0
    factorized = 0
    if layer.branches[0].factored and not transformed and "kernel" not in rounded:
        kernel = layer.branches[0].kernel
        run = "reconstructed" if geometry.groups > 1 else kernel.run
        before = math.prod(input_shape[:-1])
        factorized = _core_multiplications(kernel.network, run, before, positions)
    held_bits = rounded.get(sites[0], rounded.get(CORE, of_float))
    if factorized and CORE in rounded:
        bits, input_bits, square_bits = held_bits, of_float, of_float
    products = [
        (
            each * math.prod(geometry.kernel_shape[-2:])
            or factorized
            or positions * math.prod(shape),
            bits,
            input_bits if reads == "x" else square_bits,
        )
        for shape, reads in zip(kernels, map(spec.parts.read_by, spec.branches), strict=True)
    ]
    products.append((spec.parts.products * math.prod(output_shape), of_float, of_float))
    if "square" in spec.parts.kinds:
        products.append((math.prod(input_shape), outer_bits, outer_bits))
    if "form" in spec.parts.kinds:  # products of pairs of inputs, which all features share
        pairs = positions * geometry.groups * forms.pairs(geometry.inputs)
        products.append((pairs, input_bits, input_bits))
    return LayerCost(
        name=path,
        kind=type(layer).__name__,
        kernels=kernels,
        input_shape=input_shape,
        output_shape=output_shape,
        neuron=spec.neuron,
        norm=spec.norm,
        kernel=", ".join(_kernel_words(spec)),
        algorithm=str(spec.algorithm),
        precision=str(spec.precision),
        bits=held_bits,
        input_bits=rounded.get(sites[1], of_float),
        output_bits=rounded.get("output", 0),
        gradient_bits=rounded.get("gradient", 0),
        params=_params(layer) - sum(map(_params, others)),
        bytes=_bytes(layer) - sum(map(_bytes, others)),
        packed_bytes=_packed_bytes(layer, owns),
        macs=sum(count for count, *_ in products),
        bops=sum(math.prod(each) for each in products),
    )


def _kernel_words(spec: LayerSpec) -> list[str]:
    """The form, then what is particular: the name of layers that share, the norm of kernels."""
    norm = "" if spec.kernel_norm == "none" else spec.kernel_norm
    return [word for word in (str(spec.kernel), spec.joint, norm) if word]


def _shared(module: nnx.Module) -> dict[int, Kernel]:
    """The cores in it that layers share, by the object's id."""
    found = [node.shared for _, node in nnx.iter_graph(module) if isinstance(node, Joint)]
    return {id(shared): shared for shared in found}


def _kernel_shape(layer: Layer, branch) -> tuple[int, ...]:
    return layer.geometry.kernel_shape if branch.factored else branch.kernel.shape


def _core_multiplications(network: Network, run: str, before: int, after: int) -> int:
    """Of a map whose input goes from core to core; 0 where its kernel is made first.

    'auto' goes the way of fewer for large batches, for which making the kernel counts little.
    """
    if run == "reconstructed":
        return 0
    found = factorization.cheapest(network, (before, after)).cost.macs
    dense = after * network.dense_params
    return 0 if run == "auto" and dense < found else found


def _embedding_multiplications(layer: Embedding, x) -> int:
    """Of a call with ids `(N, ...)`, or of `attend` with floating `(N, ..., features)`."""
    kernel = layer.w.kernel
    if jnp.issubdtype(x.dtype, jnp.integer):
        if not layer.w.factored or kernel.run == "reconstructed":
            return 0
        return factorization.lookup_cost(kernel.network, "factorized", x.size).macs
    positions, macs = math.prod(x.shape[:-1]), 0
    if layer.w.factored:
        network = kernel.network.transposed
        macs = _core_multiplications(network, kernel.run, positions, positions)
    return macs or positions * math.prod(layer.geometry.kernel_shape)


def _tensor_cost(path: str, layer: TDense, input_shape, output_shape) -> LayerCost:
    bits = 8 * layer.kernel.dtype.itemsize
    each = tproduct.multiplications(layer.transform, layer.in_features, layer.features)
    macs = math.prod(output_shape[1:-1]) * each
    return LayerCost(
        name=path,
        kind=type(layer).__name__,
        kernels=(layer.kernel.shape,),
        input_shape=input_shape,
        output_shape=output_shape,
        neuron="linear",
        norm="none",
        kernel="t-product",
        algorithm=str(layer.transform),
        precision="float",
        bits=bits,
        input_bits=bits,
        output_bits=0,
        gradient_bits=0,
        params=_params(layer),
        bytes=_bytes(layer),
        packed_bytes=_packed_bytes(layer),
        macs=macs,
        bops=macs * bits**2,
    )


def _params(module: nnx.Module) -> int:
    params = nnx.to_pure_dict(nnx.state(module, nnx.Any(nnx.Param, Codes)))
    return int(parameter_overview.count_parameters(params))


def _size(arrays: Any) -> int:
    """Bytes of a tree of arrays, or of their shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays))


def _bytes(module: nnx.Module) -> int:
    """Of all its arrays, but for the keys of dropout and the like."""
    return _size(nnx.state(module, nnx.Not(nnx.RngState)))


def _packed_bytes(module: nnx.Module, owns: bool = True) -> int:
    """Of the arrays of a file for use, once the schedules of its quantizers are over.

    With the cores that layers share, if it owns them and any of their kernels stays in float.
    """
    module = nnx.eval_shape(_as_filed, module)
    size = _bytes(module) - sum(map(_bytes, _shared(module).values()))
    for _, layer in layers(module):
        of_kernels = {layer.kernel_range(name): name for name in layer.spec.branches}
        whole = getattr(layer.spec.precision, layer.kernel_site)
        cores = layer.cores if whole is None or whole.stop_epoch else {}
        for name, found in (layer.ranges or {}).items():
            arrays = nnx.to_pure_dict(nnx.state(found))
            size -= _size(arrays)
            learned, observed = (
                {name: arrays[name] for name in names} for names in (found.learned, found.observed)
            )
            end = quantizers.settled(found.quantizer, Arrays(learned, observed))
            if end is None or (found.quantizer.site == CORE and name not in cores):
                continue  # it goes, as do cores whose kernel is rounded too
            if name in cores:
                size += _packed_kernel(cores[name], *end) - _size(cores[name])
                continue
            if name not in of_kernels:
                size += _size(end[1])
                continue
            branch = getattr(layer, of_kernels[name])
            kernel = jax.ShapeDtypeStruct(_kernel_shape(layer, branch), layer.geometry.param_dtype)
            held = branch.kernel
            if isinstance(held, Joint):
                branch.kernel, held = nnx.data(None), ()  # in a file it holds them no more
            elif branch.factored:
                held = nnx.state(held, nnx.Param)
            size += _packed_kernel(kernel, *end) - _size(held)
    if owns:
        size += sum(map(_bytes, _shared(module).values()))
    return size


def _as_filed(module: nnx.Module) -> nnx.Module:
    """The net whose rounded kernels are those of a file, which are transformed ones."""
    module = nnx.merge(*nnx.split(module))
    for _, layer in layers(module):
        layer.fix_kernels()
        quantizer = layer.spec.precision.transformed_kernel
        if quantizer is not None and not quantizer.stop_epoch and is_transformable(layer):
            transform_layer(layer)
    return module


def _packed_kernel(kernel, quantizer: Quantizer, arrays: Arrays) -> int:
    """Of its indices, their table, and the scales and factors that are left of the range.

    Numbers of more bits than a file packs stay as they are.
    """
    if quantizer.bits > packing.MAX_BITS:
        return _size(kernel)
    kernel = jax.ShapeDtypeStruct(kernel.shape, kernel.dtype)
    rounded = jax.eval_shape(functools.partial(quantizers.rounded, quantizer), kernel, arrays)
    kept = ()
    if rounded.codes is None:
        dtype = rounded.value.dtype
    else:
        dtype = jnp.dtype(packing.narrowest(quantizers.code_bounds(quantizer)))
        _, kept = quantizers.stored(quantizer, arrays, rounded)
    table = packing.table_shape(quantizer, kernel.shape, dtype)
    indices = packing.packed_size(math.prod(kernel.shape), quantizer.bits)
    packed = indices + math.prod(table) * dtype.itemsize
    if quantizer.site == CORE:  # small ones are not packed
        packed = min(packed, math.prod(kernel.shape) * dtype.itemsize)
    return packed + _size(kept)
