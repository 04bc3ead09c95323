"""Rounded layers in integer arithmetic: kernels as whole numbers, sums in int32."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jax import Array

from efficient_nets import layers, names
from efficient_nets.layers.precision import core_name
from efficient_nets.layers.winograd import is_transformable, transform_layer
from efficient_nets.ops import branch_maps, factorization, packing, quantizers
from efficient_nets.ops.quantizers import Quantizer
from efficient_nets.ops.quantizers.spec import CORE

OPERANDS = {
    "int8": "kernels in int8, and int8 times int8 where the input's codes fit too",
    "int4": "the same in int4 where the codes of a layer's kernels and its input fit; on other "
    "platforms than TPUs these are widened to int8 before the map, and so they are inside of "
    "Winograd's transforms",
}


def to_integers(model: nnx.Module, *, settle: bool = False, operands: str = "int8") -> nnx.Module:
    """A copy in evaluation mode whose rounded kernels are whole numbers.

    A kernel with codes on a uniform grid becomes int8, or int16 where its codes need it, beside its
    scales; one of whole numbers stays. Where the input of such a layer has codes too (see
    `ops.branch_maps`), the layer's map is one of whole numbers with sums in int32, and gives bit
    for bit what it gave before. A kernel of a method without such a grid becomes its rounded
    values, and so does one whose schedule is not over, which may add another rounding of float32.
    Where a layer rounds transformed kernels it holds these, see `layers.transform_kernels`.
    Rounded cores become whole numbers and scales in the same way, but are contracted in floating
    point: their products have more bits than they. Where what they make is rounded too, they go.
    None of these can be trained. Where a schedule has stopped a quantizer, nothing is rounded, and
    its ranges are gone.

    Args:
      model: The trained net; it is left as it is.
      settle: Takes the schedules of quantizers as over, whatever the net's values say.
      operands: 'int8' or 'int4', the narrowest type of what is multiplied, see `OPERANDS`; the
        outputs are the same bit for bit. A net of whole numbers can be given the other one.

    Raises:
      UserError: on another name of operands.
    """
    names.pick("operands", operands, OPERANDS)
    model = nnx.merge(*nnx.split(model))
    model.eval()
    for _, layer in layers.layers(model):
        layer.fix_kernels()
        if layer.ranges is None:
            continue
        _settle(layer, settle)
        if layer.spec.precision.transformed_kernel is not None and is_transformable(layer):
            transform_layer(layer)
        site = layer.kernel_site
        if getattr(layer.spec.precision, site) is not None:
            reads = "input" if site == "kernel" else "transformed_input"
            _store(layer, site, operands, getattr(layer.spec.precision, reads))
        elif layer.spec.precision.core is not None:
            _store_cores(layer)
    return model


def _set_sites(layer: layers.Layer, sites: dict[str, Quantizer | None]) -> None:
    precision = dataclasses.replace(layer.spec.precision, **sites)
    layer.spec = dataclasses.replace(layer.spec, precision=precision)


def _settle(layer: layers.Layer, every: bool) -> None:
    """Takes away the schedules that are over, and the quantizers that they have stopped."""
    stopped, sites = set(), {}
    for name, found in layer.ranges.items():
        if every or is_settled(found):
            site, end = found.quantizer.site, quantizers.settled(found.quantizer, found.arrays())
            sites[site] = None if end is None else end[0]
            if end is None:
                stopped.add(name)
                continue
            found.quantizer, arrays = end
            found.set(arrays)
    _set_sites(layer, sites)
    _drop_ranges(layer, stopped)


def _drop_ranges(layer: layers.Layer, names) -> None:
    kept = {name: found for name, found in layer.ranges.items() if name not in names}
    layer.ranges = nnx.data(nnx.Dict(kept) if kept else None)


def is_settled(found: layers.Range) -> bool:
    """Whether a quantizer's schedule, if it has one, is over."""
    return quantizers.is_over(found.quantizer, found.arrays())


def _kernel_type(kernel: Quantizer, operands: str, of_input: Quantizer | None) -> jnp.dtype:
    """The narrowest type of a kernel's codes."""
    narrow = operands == "int4" and of_input is not None
    narrow = narrow and branch_maps.fits(quantizers.code_bounds(of_input), jnp.int4)
    able = [jnp.int4, jnp.int8, jnp.int16] if narrow else [jnp.int8, jnp.int16]
    return packing.narrowest(quantizers.code_bounds(kernel), able)


def _store(layer: layers.Layer, site: str, operands: str, of_input: Quantizer | None) -> None:
    """Puts what is computed with in place of the kernels."""
    names = [layer.kernel_range(name) for name in layer.spec.branches]
    kernels = [factorization.dense(layer.value(name)) for name in layer.spec.branches]
    _drop_ranges(layer, layer.cores)
    for branch, name, kernel in zip(layer.branches, names, kernels, strict=True):
        branch.kernel = _stored(layer.ranges[name], kernel, operands, of_input)
    layer.spec = layer.spec.with_kernel(factorization.DENSE)
    _set_stored(layer, site, names)


def _store_cores(layer: layers.Layer) -> None:
    """The same of the cores, which stay cores."""
    names = list(layer.cores)
    for branch in layer.spec.branches:
        kernel = getattr(layer, branch).kernel
        for core, held in kernel.cores.items():
            found = layer.ranges[core_name(branch, core)]
            setattr(kernel, core, _stored(found, held, "int8", None))
    _set_stored(layer, CORE, names)


def _stored(
    found: layers.Range, held: Array, operands: str, of_input: Quantizer | None
) -> nnx.Variable:
    """What is held as codes, the range becoming that of these; as values where it has none."""
    arrays, quantizer = found.arrays(), found.quantizer
    if quantizer.method == "stored":
        return layers.Codes(held.astype(_kernel_type(quantizer, operands, of_input)))
    rounded = quantizers.rounded(quantizer, held, arrays)
    if rounded.codes is None or quantizer.pauses:
        return nnx.Param(quantizers.value(rounded))
    found.quantizer, arrays = quantizers.stored(quantizer, arrays, rounded)
    found.set(arrays)
    return layers.Codes(rounded.codes.astype(_kernel_type(quantizer, operands, of_input)))


def _set_stored(layer: layers.Layer, site: str, names: Sequence[str]) -> None:
    """The site's quantizer is that of its ranges now, none where values are held."""
    quantizer = layer.ranges[names[-1]].quantizer
    stored = quantizer if quantizer.method == "stored" else None
    if stored is None:
        _drop_ranges(layer, names)
    _set_sites(layer, {site: stored})
