"""Rounded layers in integer arithmetic: kernels as whole numbers, sums in int32."""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from efficient_nets import layers
from efficient_nets.ops import quantizers
from efficient_nets.ops.precision import Precision
from efficient_nets.ops.quantizers import Quantizer


def to_integers(model: nnx.Module, *, settle: bool = False) -> nnx.Module:
    """A copy in evaluation mode whose rounded kernels are whole numbers.

    A kernel with codes on a uniform grid becomes int8, or int16 where its codes need it, beside its
    scales; one of whole numbers stays. Where the input of such a layer has codes too (see
    `ops.branch_maps`), the layer's map is one of whole numbers with sums in int32, and gives bit
    for bit what it gave before. A kernel of a method without such a grid becomes its rounded
    values. Neither can be trained.

    Args:
      model: The trained net; it is left as it is.
      settle: Takes the schedules of quantizers as over, whatever the net's values say.
    """
    model = nnx.merge(*nnx.split(model))
    model.eval()
    for _, layer in layers.layers(model):
        if layer.ranges is None:
            continue
        for found in layer.ranges.values():
            if settle or is_settled(found):
                found.quantizer, arrays = quantizers.settled(found.quantizer, found.arrays())
                found.set(arrays)
        sites = {name: layer.ranges[name].quantizer for name in layer.ranges}
        sites = {name: q for name, q in sites.items() if name not in layer.spec.branches}
        if layer.spec.precision.kernel is not None:
            sites["kernel"] = _store(layer)
        layer.spec = dataclasses.replace(layer.spec, precision=Precision(**sites))
    return model


def is_settled(found: layers.Range) -> bool:
    """Whether a quantizer's schedule, if it has one, is over."""
    return quantizers.is_over(found.quantizer, found.arrays())


def _store(layer: layers.Layer) -> Quantizer | None:
    """Puts what is computed with in place of the kernels; gives the quantizer that reads it."""
    stored = None
    for name, branch in zip(layer.spec.branches, layer.branches, strict=True):
        found = layer.ranges[name]
        arrays, quantizer = found.arrays(), found.quantizer
        if quantizer.method == "stored":
            stored = quantizer
            continue
        rounded = quantizers.rounded(quantizer, branch.kernel[...], arrays)
        if rounded.codes is None:
            branch.kernel = nnx.Param(quantizers.value(rounded))
            continue
        dtype = jnp.int16 if quantizers.has_wide_codes(quantizer) else jnp.int8
        branch.kernel = layers.Codes(rounded.codes.astype(dtype))
        stored, arrays = quantizers.stored(quantizer, arrays, rounded)
        found.quantizer = stored
        found.set(arrays)
    if stored is None:
        kept = {name: x for name, x in layer.ranges.items() if name not in layer.spec.branches}
        layer.ranges = nnx.data(nnx.Dict(kept) if kept else None)
    return stored
