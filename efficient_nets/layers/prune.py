"""Factorized kernels cut to the ranks that they use, after training."""

import dataclasses

from flax import nnx

from efficient_nets.errors import UserError
from efficient_nets.layers.linear import Layer
from efficient_nets.layers.rules import layers
from efficient_nets.ops import factorization


def prune(model: nnx.Module, threshold: float) -> nnx.Module:
    """A copy whose factorized kernels are without the indices of bonds that add little.

    See `ops.factorization.pruned_together`; the branches of a layer keep the same ranks, and its
    spec has them as numbers. All else stays. Of numbers: it cannot be traced.

    Args:
      model: The trained net; it is left as it is.
      threshold: The share of its bond's largest contribution up to which an index goes, in [0, 1);
        with 0 the kernels stay what they are.

    Raises:
      UserError: on another threshold, numbers that are not finite, or layers that share or round
        their cores.
    """
    model = nnx.clone(model)
    for path, layer in layers(model):
        if layer.spec.joint:
            raise UserError(
                f"{path} has joint={layer.spec.joint!r}: cores that layers share are not pruned"
            )
        if layer.spec.precision.core is not None:
            raise UserError(
                f"{path} has precision.core: rounded cores are not pruned; prune before, and round "
                "what is left"
            )
        if layer.branches[0].factored:
            _prune_layer(layer, threshold)
    return model


def _prune_layer(layer: Layer, threshold: float) -> None:
    kernels = [branch.kernel for branch in layer.branches]
    cores = [kernel.value().cores for kernel in kernels]
    network, made = factorization.pruned_together(kernels[0].network, cores, threshold)
    for kernel, own in zip(kernels, made, strict=True):
        kernel.resize(network, own)
    form = factorization.of_network(layer.spec.kernel, network)
    layer.spec = dataclasses.replace(layer.spec, kernel=form)
