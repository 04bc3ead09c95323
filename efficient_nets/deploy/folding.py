"""Batch norms of a trained net, taken into the layers in front of them."""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from efficient_nets import layers
from efficient_nets.deploy import affine
from efficient_nets.errors import UserError
from efficient_nets.layers import BatchNorm, Layer
from efficient_nets.ops import batch_norm

# Their attributes are read in other ways than by name.
CONTAINERS = (nnx.List, nnx.Dict, nnx.Sequential)


def fold_norms(model: nnx.Module, image_shape: Sequence[int]) -> tuple[nnx.Module, dict[str, str]]:
    """A copy in evaluation mode, whose batch norms are parts of the layers in front of them.

        norm(y) = s y + t,  s = scale / sqrt(var + epsilon),  t = bias - s mean

    With running statistics a norm is that, and so are those of branches: see `affine` for where s
    and t go. What the net calls says which norm follows which layer. A norm stays where it follows
    no layer or several, the layer is also called without it, its kernel is rounded as it runs (fold
    before rounding, or after `to_integers`), its output is rounded in front of the norm, or the
    neuron has no place for s or t. Which ones stay does not depend on values.

    Args:
      model: A trained net `(N, H, W, C) -> anything`, or one of `to_integers`; it is left as it is.
      image_shape: `(H, W, C)`.

    Returns:
      The copy, and `{path of a batch norm that stayed: why}`.

    Raises:
      UserError: if layers run inside of `nnx.remat` and the like, which hides their norms.
    """
    model = nnx.clone(model)
    model.eval()
    left = {}
    for path, layer in layers.layers(model):
        layer.fix_kernels()
        if layer.spec.norm == "branch" and (reason := _fold_branches(layer)):
            left |= {f"{path}/{name}/norm": reason for name in layer.spec.branches}
    nodes = {"/".join(map(str, path)): node for path, node in nnx.iter_graph(model)}
    followed, followers = _followers(model, image_shape)
    for path, norm in nodes.items():
        if isinstance(norm, BatchNorm) and path not in left:
            if reason := _fold(model, norm, path, nodes, followed, followers):
                left[path] = reason
    return model, left


def _followers(model: nnx.Module, image_shape) -> tuple[dict[str, set], dict[str, set]]:
    """From each norm's path to those of the layers in front of it, and the other way round.

    A layer that is called alone has None among its norms.
    """
    graph, state = nnx.split(model)
    calls = []

    def trace(state, images):
        net = nnx.merge(graph, state)
        names = {id(node): "/".join(map(str, path)) for path, node in nnx.iter_graph(net)}
        with layers.collecting("norms") as found:
            net(images)
        for layer, norm in found:
            if id(layer) not in names:
                raise UserError(
                    "a layer runs inside of nnx.remat or the like, which hides its norm"
                )
            calls.append((names[id(layer)], None if norm is None else names.get(id(norm))))

    jax.eval_shape(trace, state, jax.ShapeDtypeStruct((1, *image_shape), jnp.float32))
    followed, followers = defaultdict(set), defaultdict(set)
    for layer, norm in calls:
        followed[norm].add(layer)
        followers[layer].add(norm)
    return followed, followers


def _fold(model, norm: BatchNorm, path: str, nodes, followed, followers) -> str:
    """Takes a norm behind a layer into it; gives '' or why it cannot be."""
    if not followed[path]:
        return "it follows no layer"
    if len(followed[path]) > 1:
        return f"it follows several layers: {', '.join(sorted(followed[path]))}"
    (name,) = followed[path]
    layer: Layer = nodes[name]
    if len(followers[name]) > 1:
        return f"{name} is called without it too"
    holders = _holders(model, norm)
    if not holders or any(isinstance(holder, CONTAINERS) for holder, _ in holders):
        return "it is no attribute of a module"
    if layer.spec.precision.output is not None:
        return f"the output of {name} is rounded in front of it"
    if reason := affine.no_scaling(layer) or affine.no_shifting(layer):
        return f"{name}: {reason}"
    slope, shift = _affine(norm)
    affine.scale_output(layer, slope)
    affine.shift_output(layer, shift)
    for holder, attribute in holders:
        setattr(holder, attribute, None)
    return ""


def _fold_branches(layer: Layer) -> str:
    """Takes the norms of branches into them; gives '' or why it cannot be."""
    if reason := affine.fixed_kernel(layer):
        return reason
    parts = layer.spec.parts
    if parts.bias == "output" and {*parts.shifting} != {*parts.branches}:
        return f"the branches of neuron={layer.spec.neuron!r} have no bias in front of the product"
    norms = [branch.norm for branch in layer.branches]
    for branch in layer.branches:
        branch.norm = None
    layer.spec = dataclasses.replace(layer.spec, norm="none")
    affine.add_biases(layer)
    for name, branch, norm in zip(parts.branches, layer.branches, norms, strict=True):
        slope, shift = _affine(norm)
        affine.scale_branch(layer, name, slope)
        bias = layer.bias if parts.bias == "output" else branch.bias
        bias[...] = bias[...] + shift
    return ""


def _affine(norm: BatchNorm) -> tuple[Array, Array]:
    arrays = norm.arrays()
    return batch_norm.affine(arrays, batch_norm.Moments(arrays.mean, arrays.var), norm.epsilon)


def _holders(model: nnx.Module, norm: BatchNorm) -> list[tuple[nnx.Module, str]]:
    """Modules and the names of their attributes that are this norm."""
    return [
        (node, name)
        for _, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Module)
        for name, value in vars(node).items()
        if value is norm
    ]
