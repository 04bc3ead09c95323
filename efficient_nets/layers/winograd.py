"""Layers under Winograd's algorithm that hold transformed kernels: nets for use."""

import dataclasses

from flax import nnx

from efficient_nets.layers import linear, rules
from efficient_nets.layers import precision as precisions
from efficient_nets.ops import branch_maps, factorization, linear_maps, quantizers, winograd


def transform_kernels(model: nnx.Module) -> nnx.Module:
    """A copy in evaluation mode whose layers under Winograd's algorithm hold transformed kernels.

    What the layers compute stays; what is done to kernels first - rounding, learned or constant
    transforms, rounding between their steps - is done once. A kernel `(3, 3, in, C)` becomes
    `(36, in, C)` for tiles of 4, of float32 or wider. Such a net is not to be trained. A layer
    whose kernel quantizer also scales the output, as XNOR-Net++'s does, stays as it is.

    Args:
      model: The trained net; it is left as it is.
    """
    model = nnx.merge(*nnx.split(model))
    model.eval()
    for _, layer in rules.layers(model):
        layer.fix_kernels()
        if is_transformable(layer):
            transform_layer(layer)
    return model


def is_transformable(layer: linear.Layer) -> bool:
    """Whether it transforms its kernels as it runs, and their quantizer does nothing else.

    XNOR-Net++'s has factors that multiply what the map gives.
    """
    form, quantizer = layer.spec.algorithm, layer.spec.precision.kernel
    scales = quantizer is not None and quantizers.method(quantizer).output_scale is not None
    return form != winograd.DIRECT and not form.transformed and not scales


def transform_layer(layer: linear.Layer) -> None:
    """`transform_kernels` of one layer, in place."""
    static, sites = layer.linear_map, layer.spec.precision
    arrays = precisions.arrays(layer.ranges, layer.spec.branches)
    learned = layer.learned_transforms()
    matrices = learned[branch_maps.LEARNED].learned if learned else static.constants()
    spent = {name for name in layer.spec.branches if sites.kernel is not None} | set(layer.cores)

    def visit(site, name, values):
        quantizer, key = getattr(sites, site), branch_maps.inner_name(site, name)
        if quantizer is None:
            return None
        if site == "between" or name.startswith(winograd.OF_KERNELS):
            spent.add(key)
        return quantizers.rounded(quantizer, values, arrays[key])

    for name in layer.spec.branches:
        kernel = layer.rounded_kernel(name)
        exact = kernel.astype(linear_maps.wide(kernel.dtype))
        made = winograd.transformed_kernel(
            static, exact, matrices, visit, name, stepwise=sites.between is not None
        )
        getattr(layer, name).kernel = nnx.Param(made)
    layer.spec = dataclasses.replace(
        layer.spec,
        kernel=factorization.DENSE,
        algorithm=dataclasses.replace(layer.spec.algorithm, transformed=True),
        precision=dataclasses.replace(sites, kernel=None, core=None),
    )
    kept = {name: found for name, found in (layer.ranges or {}).items() if name not in spent}
    layer.ranges = nnx.data(nnx.Dict(kept) if kept else None)
    if layer.transforms is not None:
        rest = {n: m for n, m in layer.transforms.items() if not n.startswith(winograd.OF_KERNELS)}
        layer.transforms = nnx.data(nnx.Dict(rest))
