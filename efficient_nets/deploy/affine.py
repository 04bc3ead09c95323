"""Factors and shifts of a layer's output, put into its parameters.

    scale * y + shift,  y = neuron(branches of x)

A neuron is a sum of terms, each a branch or a product of two: the factor goes to one branch of each
term (`Neuron.scaling`), the shift to a branch that is a term alone (`Neuron.shifting`), or to the
bias of the output. A branch takes its factor in its norm, if it has one, else in its kernel: every
branch is linear in that, whatever it reads. Kernels of whole numbers keep their codes; their scales
take it.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jax import Array

from efficient_nets.layers import Layer
from efficient_nets.layers.neuron import Branch
from efficient_nets.ops import batch_norm
from efficient_nets.ops.quantizers import Arrays


def rounds_kernel(layer: Layer) -> bool:
    """Whether a quantizer rounds the kernel as it runs: a factor would move it on its grid.

    So it would what is rounded of it on its way through transforms.
    """
    sites = layer.spec.precision
    of_kernel = [sites.kernel, sites.transformed_kernel, sites.hadamard, sites.between]
    return any(quantizer is not None and quantizer.method != "stored" for quantizer in of_kernel)


def fixed_kernel(layer: Layer) -> str:
    """Why the kernels take no factor, or ''."""
    if rounds_kernel(layer):
        return "its kernel is rounded as it runs: `to_integers` first"
    if any(branch.factored for branch in layer.branches):
        return "its kernel is factorized, its features spread over cores: give it a dense one first"
    return ""


def no_scaling(layer: Layer) -> str:
    """Why `scale_output` cannot be, or ''."""
    if not layer.spec.parts.scaling:
        return f"no factor of branches of neuron={layer.spec.neuron!r} is one of its output"
    if layer.spec.norm != "none":
        return ""
    if layer.spec.precision.hadamard or layer.spec.precision.between:
        return "sums are rounded between its transforms, in steps that a factor would change"
    return fixed_kernel(layer)


def no_shifting(layer: Layer) -> str:
    """Why `shift_output` cannot be, or ''."""
    parts = layer.spec.parts
    if parts.bias != "output" and not parts.shifting:
        return f"neuron={layer.spec.neuron!r} has no branch or bias that is added to its output"
    return ""


def scale_output(layer: Layer, factor: Array) -> None:
    """The layer's output times a factor for each feature `(C,)`, in place."""
    for name in layer.spec.parts.scaling:
        scale_branch(layer, name, factor)
    if layer.bias is not None:
        layer.bias[...] = layer.bias[...] * factor


def shift_output(layer: Layer, shift: Array) -> None:
    """The layer's output plus a number for each feature `(C,)`, in place."""
    add_biases(layer)
    place = shifted(layer)
    place[...] = place[...] + shift.astype(place.dtype)


def shifted(layer: Layer) -> nnx.Variable:
    """Where `shift_output` adds: `(C,)`."""
    parts = layer.spec.parts
    if parts.bias == "output":
        return layer.bias
    branch = getattr(layer, parts.shifting[0])
    return branch.bias if branch.norm is None else branch.norm.bias


def add_biases(layer: Layer) -> None:
    """Makes the biases that `shift_output` needs, of zeros, as `use_bias=True` would have them.

    None where the branch that it adds to has a norm: that has one.
    """
    on_output = layer.spec.parts.bias == "output"
    if layer.spec.norm == "branch" and not on_output:
        return
    layer.geometry = geometry = dataclasses.replace(layer.geometry, use_bias=True)
    for holder in [layer] if on_output else layer.branches:
        if holder.bias is None:
            zeros = jnp.zeros((geometry.features,), geometry.param_dtype)
            holder.bias = nnx.data(nnx.Param(zeros))


def scale_branch(layer: Layer, name: str, factor: Array) -> None:
    """A branch's value times a factor for each feature `(C,)`, in place."""
    branch: Branch = getattr(layer, name)
    if branch.norm is not None:
        for array in (branch.norm.scale, branch.norm.bias):
            array[...] = array[...] * factor
        return
    if branch.bias is not None:
        branch.bias[...] = branch.bias[...] * factor
    if getattr(layer.spec.precision, layer.kernel_site) is None:
        kernel = branch.kernel[...]
        branch.kernel[...] = kernel * batch_norm.row(factor, kernel)
        return
    found = layer.ranges[layer.kernel_range(name)]
    learned, observed = found.arrays()
    scale = observed["scale"]
    scale = scale * batch_norm.row(factor, scale)
    found.set(Arrays(learned, observed | {"scale": scale}))
