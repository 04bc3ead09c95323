"""What the terms of a neuron give: their values, second moments, and maps of one image.

A neuron's value, before the norm and activation behind it, is a sum of terms (`Neuron.terms`):

    product   products of two branches, (Ax)(Bx), all of them added up
    form      quadratic forms x'Qx
    square    linear maps of the squared input, W x^2
    linear    linear maps of the input
    bias      the bias of the combined value

Where branches have biases or norms, a product is one of affine functions, so it has a linear part
of its own: terms are those of the formula, not homogeneous parts of it.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from efficient_nets.layers import Layer
from efficient_nets.ops import quadratic
from efficient_nets.ops.neurons import Neuron

SECOND_ORDER = ("product", "form", "square")
FIRST_ORDER = ("linear",)
KINDS = (*SECOND_ORDER, *FIRST_ORDER, "bias")
OTHER = "value"  # all of a neuron that gives no `terms`
_OF_READ = {"x": "linear", "square": "square", "form": "form"}


def kind_of(parts: Neuron, factors: tuple[str, ...]) -> str:
    return "product" if len(factors) > 1 else _OF_READ[parts.read_by(factors[0])]


def term_values(layer: Layer, x: Array) -> dict[str, Array]:
    """The terms of a layer's value, by kind, for its input; they add up to the value.

    Args:
      layer: In evaluation mode, or branch norms take the batch's statistics.
      x: `(N, *spatial, in_features)`.

    Returns:
      `(N, *spatial', features)` each, in float32 or wider.
    """
    parts = layer.spec.parts
    static, arguments = layer.unit_arguments()
    values = quadratic.branch_values(static, x, **arguments)
    values = dict(zip(parts.branches, values, strict=True))
    found: dict[str, Array] = {}
    for factors in parts.terms:
        kind = kind_of(parts, factors)
        value = math.prod(values[name] for name in factors[1:]) * values[factors[0]]
        found[kind] = found[kind] + value if kind in found else value
    if not parts.terms:
        found[OTHER] = parts.combine(*values.values())
    if layer.bias is not None:
        like = next(iter(found.values()))
        row = layer.bias[...].astype(like.dtype).reshape((1,) * (like.ndim - 1) + (-1,))
        found["bias"] = jnp.broadcast_to(row, like.shape)
    return found


def added(terms: dict[str, Array], kinds) -> Array | None:
    """The sum of the terms of these kinds, None if there is none."""
    chosen = [terms[kind] for kind in kinds if kind in terms]
    return functools.reduce(jnp.add, chosen) if chosen else None


@functools.partial(jax.jit, static_argnums=(0, 4))
def measured(graph: nnx.GraphDef, state, x: Array, y: Array, channels: int) -> dict:
    """What `analyze` keeps of one layer's input and output, `graph` and `state` being the layer's.

    Maps are of the first image and the first `channels` channels.
    """
    terms = term_values(nnx.merge(graph, state), x)
    second, first = added(terms, SECOND_ORDER), added(terms, FIRST_ORDER)
    found = {
        "moments": {kind: jnp.mean(jnp.square(value)) for kind, value in terms.items()},
        "moment": jnp.mean(jnp.square(added(terms, terms))),
        "input_nonfinite": jnp.sum(~jnp.isfinite(x)),
        "map": y[0, ..., :channels].astype(jnp.float32),
        "first_map": None if first is None else first[0, ..., :channels],
        "second_map": None if second is None else second[0, ..., :channels],
    }
    if second is not None:
        finite = jnp.isfinite(second)
        found["product_max"] = jnp.max(jnp.abs(second), initial=0.0, where=finite)
        found["product_rms"] = jnp.sqrt(jnp.mean(jnp.square(second)))
        found["product_nonfinite"] = jnp.sum(~finite)
    return found
