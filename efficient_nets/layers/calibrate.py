"""Ranges of inputs and outputs, from what the net in float does with a batch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_nets.layers import linear, observe, rules
from efficient_nets.layers.collect import add, wanted
from efficient_nets.ops import branch_maps, quantizers
from efficient_nets.ops.precision import FLOAT


def calibrate(model: nnx.Module, *inputs, how: str = "own") -> nnx.Module:
    """A copy whose quantizers have ranges for these inputs.

    Each one gets its arrays from the values that reach it when nothing in the net is rounded; those
    of kernels and cores, from these. Norms do as the model's mode says: `model.eval()` first for a
    trained net. Layers inside of `nnx.remat`, `nnx.scan` and the like cannot be reached.

    Args:
      model: Any module with `Dense` and `Conv` layers; it is left as it is.
      *inputs: What the model is called with; one batch.
      how: A key of `quantizers.CALIBRATIONS`.
    """
    found: dict[str, dict] = {}
    specs = {path: layer.spec.precision for path, layer in rules.layers(model)}

    def observer(path, layer, x, y):
        precision = specs[path]
        if path in found:  # a later call of the same layer: the first one counts
            return
        found[path] = {}
        if precision.input is not None:
            found[path]["input"] = x, quantizers.calibrate(precision.input, x, how)
            if wanted("lost") and quantizers.loses_negatives(precision.input):
                size = jnp.sum(jnp.abs(x), dtype=jnp.float32)
                below = jnp.sum(jnp.maximum(-x, 0), dtype=jnp.float32)
                add("lost", path, below / jnp.maximum(size, jnp.finfo(jnp.float32).tiny))
        if precision.output is not None:
            y = linear.without_norm(x, layer)
            found[path]["output"] = y, quantizers.calibrate(precision.output, y, how)
        if precision.inner:
            for (site, name), values in layer.inner_values(x, precision).items():
                quantizer = precision.quantizers.get(site)
                if quantizer is not None:
                    name = branch_maps.inner_name(site, name)
                    found[path][name] = values, quantizers.calibrate(quantizer, values, how)

    plain = observe.watched(model, observer)
    for _, layer in rules.layers(plain):
        layer.spec = dataclasses.replace(layer.spec, precision=FLOAT)
        layer.ranges = nnx.data(None)
    plain(*inputs)
    unrounded = dict(rules.layers(plain))

    model = nnx.merge(*nnx.split(model))
    for path, layer in rules.layers(model):
        for name, range_ in (layer.ranges or {}).items():
            fitted = found.get(path, {}).get(name)
            held = unrounded[path].held(name)
            if fitted is None and held is not None:
                fitted = held, quantizers.calibrate(range_.quantizer, held, how)
            if fitted is not None:
                values, arrays = fitted
                # ReLinear starts some kernels at 0, which say nothing of a range.
                choose = functools.partial(jnp.where, jnp.any(values != 0))
                range_.set(jax.tree.map(choose, arrays, range_.arrays()))
    return model
