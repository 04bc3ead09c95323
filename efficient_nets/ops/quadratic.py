"""Neurons that combine linear maps of one input, and their symbolic hybrid backward.

A unit is the whole of: linear maps, bias, branch norm, product, outer norm, activation. For the
neuron `ours` (QuadraLib, arXiv 2204.01701, as trained there)

    a, b, c = norm_i(conv(x, W_i) + bias_i)        i in a, b, c
    y = activation(norm(a * b + c))

Automatic differentiation keeps x, the three products, their normalised forms and the outer norm's
input: L + 6M elements for L inputs and M outputs. The hybrid backward keeps x and per-channel
statistics only, L + O(C), and computes the products once more. With g = dL/dy the symbolic rule is

    da = g * b,  db = g * a,  dc = g
    dW_i = kernel_gradient(x, dz_i),  dx = sum_i input_gradient(dz_i, W_i)

where dz_i is da, db, dc carried back through its batch norm (n = (z - mu) / sigma):

    dz = gamma / sigma * (dh - mean(dh) - n * mean(dh * n))

Barriers bound what lives: one on the saved values, so that XLA cannot merge the recompute with the
forward, and one before each pass over the products. The forward has one too, before the outer norm.
`jax.checkpoint` around such a forward keeps as little; the symbolic backward reads and writes about
a fifth less, and needs no wrapper. README has the figures, compiled for a TPU; XLA:CPU drops
barriers and shows no saving.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from efficient_nets.ops import linear_maps


@dataclasses.dataclass(frozen=True)
class Neuron:
    """How branches combine: a name for each branch, `combine(*h)` and its symbolic gradient.

    Attributes:
      branches: Names of the linear maps, in the order `combine` takes them.
      combine: Elementwise, B arrays to one.
      gradient: `(g, *h)` to the B cotangents of `combine` at h.
      products: Elementwise multiplications an output value takes (for counting MACs).
    """

    branches: tuple[str, ...]
    combine: Callable[..., Array]
    gradient: Callable[..., tuple[Array, ...]]
    products: int = 0


NEURONS = {
    "linear": Neuron(("w",), lambda w: w, lambda g, w: (g,)),
    "ours": Neuron(
        ("a", "b", "c"), lambda a, b, c: a * b + c, lambda g, a, b, c: (g * b, g * a, g), products=1
    ),
}


class Norm(NamedTuple):
    """Batch norm's arrays `(C,)`. mean, var: frozen statistics, or None for the batch's."""

    scale: Array
    bias: Array
    mean: Array | None = None
    var: Array | None = None


class Moments(NamedTuple):
    """Mean and variance over all axes but the last, `(C,)`, float32."""

    mean: Array
    var: Array


class Statistics(NamedTuple):
    """Moments used for each branch and for the combined value; None where there is no norm."""

    branches: tuple[Moments, ...] | None
    outer: Moments | None


@dataclasses.dataclass(frozen=True)
class Unit:
    """What is static about a unit. `linear_map(x, kernels)` is one of `linear_maps`."""

    neuron: str
    linear_map: Callable[..., Array]
    activation: Callable[[Array], Array] | None = None
    branch_epsilon: float = 1e-5
    outer_epsilon: float = 1e-5

    @property
    def parts(self) -> Neuron:
        return NEURONS[self.neuron]


def moments(x: Array) -> Moments:
    """Two passes: E[x^2] - E[x]^2 would cancel where a product's mean is far from 0."""
    axes = tuple(range(x.ndim - 1))
    mean = jnp.mean(x, axes)
    return Moments(mean, jnp.mean(jnp.square(x - _row(mean, x)), axes))


def unit(static: Unit, x: Array, kernels, biases, branch_norms=None, outer_norm=None):
    """Applies a unit; gradients by automatic differentiation, so forward mode works too.

    Args:
      static: The unit.
      x: Input, as `static.linear_map` takes it. The products run in its dtype, the rest in float32.
      kernels: One a branch.
      biases: One a branch `(C,)`, or None.
      branch_norms: One `Norm` a branch, or None.
      outer_norm: `Norm` of the combined value, or None.

    Returns:
      y `(..., C)` in x's dtype, and the `Statistics`. These carry no gradient: they are for running
      averages.
    """
    y, statistics = _forward(static, x, kernels, *_prepared(x, biases, branch_norms, outer_norm))
    return y, lax.stop_gradient(statistics)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _hybrid(static, x, kernels, biases, branch_norms, outer_norm):
    return _forward(static, x, kernels, biases, branch_norms, outer_norm)


def hybrid_unit(static: Unit, x: Array, kernels, biases, branch_norms=None, outer_norm=None):
    """`unit` with the symbolic hybrid backward: keeps x and per-channel statistics only."""
    y, statistics = _hybrid(static, x, kernels, *_prepared(x, biases, branch_norms, outer_norm))
    return y, lax.stop_gradient(statistics)


def _prepared(x: Array, biases, branch_norms, outer_norm):
    """What follows the products in their accumulation type; frozen statistics as data."""
    wide = _wide(x).dtype

    def data(norm: Norm | None) -> Norm | None:
        if norm is None or norm.mean is None:
            return norm
        return norm._replace(mean=lax.stop_gradient(norm.mean), var=lax.stop_gradient(norm.var))

    branch_norms = None if branch_norms is None else tuple(map(data, branch_norms))
    biases = None if biases is None else tuple(biases)
    return jax.tree.map(lambda leaf: leaf.astype(wide), (biases, branch_norms, data(outer_norm)))


def _wide(x: Array) -> Array:
    """Products and sums of bfloat16 convolutions are taken in float32."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def _row(channel_values: Array, like: Array) -> Array:
    """`(C,)` to a shape that broadcasts with `(..., C)` under strict rank promotion."""
    return channel_values.reshape((1,) * (like.ndim - 1) + (-1,))


def _products(static: Unit, x, kernels, biases) -> list[Array]:
    """The branches' linear maps and biases, `(..., C)` each, in float32 or wider."""
    return _add_biases(static, static.linear_map(x, kernels), biases)


def _add_biases(static: Unit, z: Array, biases) -> list[Array]:
    branches = len(static.parts.branches)
    zs = linear_maps.split(_wide(z), branches, static.linear_map.groups)
    if biases is None:
        return zs
    return [z + _row(bias, z) for z, bias in zip(zs, biases, strict=True)]


def _moments_used(x: Array, norm: Norm) -> Moments:
    return moments(x) if norm.mean is None else Moments(norm.mean, norm.var)


def _normalise(x: Array, norm: Norm, used: Moments, epsilon: float) -> Array:
    """One multiply-add an element: XLA then has no normalised copy to keep."""
    slope = norm.scale * lax.rsqrt(used.var + epsilon)
    return x * _row(slope, x) + _row(norm.bias - used.mean * slope, x)


def _normalise_all(static: Unit, zs, norms, used) -> list[Array]:
    if norms is None:
        return zs
    triples = zip(zs, norms, used, strict=True)
    return [_normalise(z, norm, of, static.branch_epsilon) for z, norm, of in triples]


def _forward(static: Unit, x, kernels, biases, branch_norms, outer_norm):
    zs = _products(static, x, kernels, biases)
    inner = outer = None
    if branch_norms is not None:
        inner = tuple(_moments_used(z, norm) for z, norm in zip(zs, branch_norms, strict=True))
    y = static.parts.combine(*_normalise_all(static, zs, branch_norms, inner))
    if outer_norm is not None:
        if len(zs) > 1:
            y = lax.optimization_barrier(y)  # or XLA normalises all branches into one tensor first
        outer = _moments_used(y, outer_norm)
        y = _normalise(y, outer_norm, outer, static.outer_epsilon)
    if static.activation is not None:
        y = static.activation(y)
    return y.astype(x.dtype), Statistics(inner, outer)


def _hybrid_forward(static, x, kernels, biases, branch_norms, outer_norm):
    out = _forward(static, x, kernels, biases, branch_norms, outer_norm)
    return out, (x, kernels, biases, branch_norms, outer_norm, out[1])


def _norm_sums(g: Array, x: Array, used: Moments, epsilon: float) -> tuple[Array, Array]:
    """Gradients of a norm's scale and bias, `(C,)` each: all that its second pass must know."""
    axes = tuple(range(x.ndim - 1))
    normal = (x - _row(used.mean, x)) * _row(lax.rsqrt(used.var + epsilon), x)
    return jnp.sum(g * normal, axes), jnp.sum(g, axes)


def _norm_input_gradient(g: Array, x: Array, norm: Norm, used: Moments, sums, epsilon: float):
    inverse = lax.rsqrt(used.var + epsilon)
    if norm.mean is None:
        count = x.size // x.shape[-1]
        normal = (x - _row(used.mean, x)) * _row(inverse, x)
        g = g - _row(sums[1] / count, g) - normal * _row(sums[0] / count, g)
    return g * _row(norm.scale * inverse, g)


def _norm_gradient(norm: Norm, sums: tuple[Array, Array]) -> Norm:
    """Frozen statistics are data, not parameters: their gradient is 0."""
    return Norm(*sums, *jax.tree.map(jnp.zeros_like, (norm.mean, norm.var)))


def _hybrid_backward(static: Unit, saved, cotangents):
    # A barrier before each pass over the products: XLA must read them again, it may not carry the
    # last pass's intermediates along.
    saved, g = lax.optimization_barrier((saved, cotangents[0]))
    x, kernels, biases, branch_norms, outer_norm, statistics = saved
    z, transpose = jax.vjp(static.linear_map, x, kernels)

    d_outer_norm = d_branch_norms = None
    if outer_norm is not None:
        before, combined = _before_outer_norm(
            static, z, g, biases, branch_norms, outer_norm, statistics
        )
        sums = _norm_sums(before, combined, statistics.outer, static.outer_epsilon)
        d_outer_norm = _norm_gradient(outer_norm, sums)
        z, g, sums = lax.optimization_barrier((z, g, sums))
    g, combined = _before_outer_norm(static, z, g, biases, branch_norms, outer_norm, statistics)
    if outer_norm is not None:
        g = _norm_input_gradient(
            g, combined, outer_norm, statistics.outer, sums, static.outer_epsilon
        )
    z, g = lax.optimization_barrier((z, g))

    if branch_norms is not None:
        zs, d_hs = _branch_gradients(static, z, g, biases, branch_norms, statistics)
        sums_of = functools.partial(_norm_sums, epsilon=static.branch_epsilon)
        sums = list(map(sums_of, d_hs, zs, statistics.branches))
        d_branch_norms = tuple(map(_norm_gradient, branch_norms, sums))
        z, g, sums = lax.optimization_barrier((z, g, sums))
    zs, d_zs = _branch_gradients(static, z, g, biases, branch_norms, statistics)
    if branch_norms is not None:
        back = functools.partial(_norm_input_gradient, epsilon=static.branch_epsilon)
        d_zs = list(map(back, d_zs, zs, branch_norms, statistics.branches, sums))
    d_z = linear_maps.fuse(d_zs, static.linear_map.groups).astype(z.dtype)
    d_z = lax.optimization_barrier(d_z)
    d_x, d_kernels = transpose(d_z)
    return (
        d_x,
        d_kernels,
        _bias_gradient(static, d_z, biases, branch_norms),
        d_branch_norms,
        d_outer_norm,
    )


def _before_outer_norm(static: Unit, z, g, biases, branch_norms, outer_norm, statistics):
    """The cotangent behind the activation, and the combined value that the outer norm takes."""
    zs = _add_biases(static, z, biases)
    combined = static.parts.combine(*_normalise_all(static, zs, branch_norms, statistics.branches))
    g = _wide(g)
    if static.activation is not None:
        before = combined
        if outer_norm is not None:
            before = _normalise(combined, outer_norm, statistics.outer, static.outer_epsilon)
        (g,) = jax.vjp(static.activation, before)[1](g)
    return g, combined


def _branch_gradients(static: Unit, z, g, biases, branch_norms, statistics):
    """The products with bias, and the cotangents of the branches behind their norms."""
    zs = _add_biases(static, z, biases)
    hs = _normalise_all(static, zs, branch_norms, statistics.branches)
    return zs, static.parts.gradient(g, *hs)


def _bias_gradient(static: Unit, d_z, biases, branch_norms):
    if biases is None:
        return None
    sums = jnp.sum(_wide(d_z), tuple(range(d_z.ndim - 1)))
    parts = linear_maps.split(sums, len(static.parts.branches), static.linear_map.groups)
    if branch_norms is None:
        return tuple(parts)
    # The norm of a batch takes the mean away, and the bias with it: its gradient is exactly 0.
    return tuple(
        jnp.zeros_like(part) if norm.mean is None else part
        for part, norm in zip(parts, branch_norms, strict=True)
    )


_hybrid.defvjp(_hybrid_forward, _hybrid_backward)
