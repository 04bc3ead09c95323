"""Rounded layers in integer arithmetic: kernels as whole numbers, sums in int32."""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from efficient_nets import layers, names
from efficient_nets.layers.winograd import is_transformable, transform_layer
from efficient_nets.ops import branch_maps, factorization, packing, quantizers
from efficient_nets.ops.quantizers import Quantizer

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
    Neither can be trained. Where a schedule has stopped a quantizer, nothing is rounded, and its
    ranges are gone.

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
        if layer.ranges is None:
            continue
        _settle(layer, settle)
        if layer.spec.precision.transformed_kernel is not None and is_transformable(layer):
            transform_layer(layer)
        site = layer.kernel_site
        if getattr(layer.spec.precision, site) is not None:
            reads = "input" if site == "kernel" else "transformed_input"
            stored = _store(layer, operands, getattr(layer.spec.precision, reads))
            _set_sites(layer, {site: stored})
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


def _store(layer: layers.Layer, operands: str, of_input: Quantizer | None) -> Quantizer | None:
    """Puts what is computed with in place of the kernels; gives the quantizer that reads it."""
    stored = None
    for name, branch in zip(layer.spec.branches, layer.branches, strict=True):
        found = layer.ranges[layer.kernel_range(name)]
        arrays, quantizer = found.arrays(), found.quantizer
        if quantizer.method == "stored":
            stored, dtype = quantizer, _kernel_type(quantizer, operands, of_input)
            branch.kernel = layers.Codes(branch.kernel[...].astype(dtype))
            continue
        rounded = quantizers.rounded(quantizer, branch.dense(), arrays)
        if rounded.codes is None or quantizer.pauses:
            branch.kernel = nnx.Param(quantizers.value(rounded))
            continue
        dtype = _kernel_type(quantizer, operands, of_input)
        branch.kernel = layers.Codes(rounded.codes.astype(dtype))
        stored, arrays = quantizers.stored(quantizer, arrays, rounded)
        found.quantizer = stored
        found.set(arrays)
    layer.spec = dataclasses.replace(layer.spec, kernel=factorization.DENSE)
    if stored is None:
        _drop_ranges(layer, [layer.kernel_range(name) for name in layer.spec.branches])
    return stored
