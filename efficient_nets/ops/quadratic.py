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
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from efficient_nets.ops import batch_norm, branch_maps, linear_maps, neurons, quantizers
from efficient_nets.ops.batch_norm import Moments, Norm
from efficient_nets.ops.branch_maps import Ranges
from efficient_nets.ops.precision import FLOAT, Precision
from efficient_nets.ops.quantizers import Arrays
from efficient_nets.ops.winograd import WinogradMap


class Statistics(NamedTuple):
    """Moments used for each branch and for the combined value; None where there is no norm.

    ranges: Those of the quantizers that were used, moved by this call if `Unit.observes`.
    peak: Largest magnitude of a term of second order, if there is one and `Unit.peak` asks.
    """

    branches: tuple[Moments, ...] | None
    outer: Moments | None
    ranges: Ranges
    peak: Array | None = None


@dataclasses.dataclass(frozen=True)
class Unit:
    """What is static about a unit: a name of `neurons`, a map of `linear_maps`, what follows.

    With `observes`, quantizers first move what they observe, as in training.
    """

    neuron: str
    linear_map: linear_maps.DenseMap | linear_maps.ConvMap | WinogradMap
    activation: Callable[[Array], Array] | None = None
    branch_epsilon: float = 1e-5
    outer_epsilon: float = 1e-5
    precision: Precision = FLOAT
    observes: bool = False
    peak: bool = False

    @property
    def parts(self) -> neurons.Neuron:
        return neurons.neuron(self.neuron)


def unit(
    static: Unit, x, kernels, biases, branch_norms=None, outer_norm=None, bias=None, ranges=None
):
    """Applies a unit; gradients by automatic differentiation, so forward mode works too.

    Args:
      static: The unit.
      x: Input, as `static.linear_map` takes it. The products run in its dtype, the rest in float32.
      kernels: One a branch: as `static.linear_map` takes it, or `forms.quadratic_form` where the
        branch reads 'form'.
      biases: One a branch `(C,)`, or None.
      branch_norms: One `Norm` a branch, or None.
      outer_norm: `Norm` of the combined value, or None.
      bias: Of the combined value `(C,)`, or None.
      ranges: `branch_maps.Ranges` of the quantizers that `static.precision` has, 'output' included.

    Returns:
      y `(..., C)` in x's dtype, and the `Statistics`. These carry no gradient: they are for running
      averages.
    """
    y, statistics = _forward(
        static, x, kernels, *_prepared(x, biases, branch_norms, outer_norm, bias), ranges or {}
    )
    return y, lax.stop_gradient(statistics)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _hybrid(static, x, kernels, biases, branch_norms, outer_norm, bias, ranges):
    return _forward(static, x, kernels, biases, branch_norms, outer_norm, bias, ranges)


def hybrid_unit(
    static: Unit, x, kernels, biases, branch_norms=None, outer_norm=None, bias=None, ranges=None
):
    """`unit` with the symbolic hybrid backward: keeps x and per-channel statistics only."""
    y, statistics = _hybrid(
        static, x, kernels, *_prepared(x, biases, branch_norms, outer_norm, bias), ranges or {}
    )
    return y, lax.stop_gradient(statistics)


def _prepared(x: Array, biases, branch_norms, outer_norm, bias):
    """What follows the products in their accumulation type; frozen statistics as data."""
    wide = linear_maps.wide(x.dtype)

    def data(norm: Norm | None) -> Norm | None:
        if norm is None or norm.mean is None:
            return norm
        return norm._replace(mean=lax.stop_gradient(norm.mean), var=lax.stop_gradient(norm.var))

    branch_norms = None if branch_norms is None else tuple(map(data, branch_norms))
    biases = None if biases is None else tuple(biases)
    prepared = (biases, branch_norms, data(outer_norm), bias)
    return jax.tree.map(lambda leaf: leaf.astype(wide), prepared)


def _wide(x: Array) -> Array:
    """Products and sums of bfloat16 convolutions are taken in float32."""
    return x.astype(linear_maps.wide(x.dtype))


def _maps(static: Unit, x: Array, kernels, ranges, observes: bool = False):
    """The branches' linear maps, those that read the same thing fused into one; and the ranges."""
    return branch_maps.branch_maps(
        *(static.precision, static.linear_map, static.parts.kinds, x, kernels, ranges),
        branches=static.parts.branches,
        observes=observes,
    )


def _split(static: Unit, z: dict[str, Array]) -> list[Array]:
    """A value a branch, in their order, from one a kind."""
    found = {}
    for kind, positions in static.parts.kinds.items():
        values = linear_maps.split(z[kind], len(positions), static.linear_map.groups)
        found |= dict(zip(positions, values, strict=True))
    return [found[i] for i in range(len(found))]


def _fuse(static: Unit, zs) -> dict[str, Array]:
    """Undoes `_split`."""
    groups = static.linear_map.groups
    return {
        kind: linear_maps.fuse([zs[i] for i in positions], groups)
        for kind, positions in static.parts.kinds.items()
    }


def _branches(static: Unit, z: dict[str, Array], biases) -> list[Array]:
    """The branches' values with their biases, `(..., C)` each, in float32 or wider."""
    zs = list(map(_wide, _split(static, z)))
    if biases is None:
        return zs
    return [z + batch_norm.row(bias, z) for z, bias in zip(zs, biases, strict=True)]


def _combine(static: Unit, hs, bias: Array | None) -> Array:
    y = static.parts.combine(*hs)
    return y if bias is None else y + batch_norm.row(bias, y)


def _normalise_all(static: Unit, zs, norms, used) -> list[Array]:
    if norms is None:
        return zs
    triples = zip(zs, norms, used, strict=True)
    return [batch_norm.normalise(z, norm, of, static.branch_epsilon) for z, norm, of in triples]


def _rounded_output(static: Unit, y: Array, arrays: Arrays) -> Array:
    return (
        y
        if static.precision.output is None
        else quantizers.quantize(static.precision.output, y, arrays)
    )


def _values(static: Unit, x, kernels, biases, branch_norms, ranges, observes=False):
    """What is combined, a value a branch; the moments that their norms used; the ranges."""
    z, ranges = _maps(static, x, kernels, ranges, observes)
    zs = _branches(static, z, biases)
    used = None
    if branch_norms is not None:
        used = tuple(
            batch_norm.moments_used(z, norm) for z, norm in zip(zs, branch_norms, strict=True)
        )
    return _normalise_all(static, zs, branch_norms, used), used, ranges


def branch_values(
    static: Unit, x, kernels, biases=None, branch_norms=None, ranges=None
) -> list[Array]:
    """What `static.parts.combine` takes: the branches' values behind bias and norm.

    Args:
      static, x, kernels, biases, branch_norms, ranges: As in `unit`.

    Returns:
      B arrays `(..., C)` in float32 or wider.
    """
    biases, branch_norms, *_ = _prepared(x, biases, branch_norms, None, None)
    return _values(static, x, kernels, biases, branch_norms, ranges or {})[0]


def _product_peak(static: Unit, hs) -> Array | None:
    parts = static.parts
    values = dict(zip(parts.branches, hs, strict=True))
    second = [t for t in parts.terms if len(t) > 1 or parts.read_by(t[0]) != "x"]
    peaks = [jnp.max(jnp.abs(math.prod(values[name] for name in term))) for term in second]
    return jnp.max(jnp.stack(peaks)) if peaks else None


def _forward(static: Unit, x, kernels, biases, branch_norms, outer_norm, bias, ranges):
    if static.observes:
        ranges = branch_maps.observe(static.precision, x, kernels, ranges)
    hs, inner, ranges = _values(static, x, kernels, biases, branch_norms, ranges, static.observes)
    outer = None
    y = _combine(static, hs, bias)
    peak = _product_peak(static, hs) if static.peak else None
    if static.precision.output is not None:
        if static.observes:
            moved = quantizers.observe(static.precision.output, y, ranges["output"])
            ranges = {**ranges, "output": moved}
        y = _rounded_output(static, y, ranges["output"])
    if outer_norm is not None:
        if len(hs) > 1:
            y = lax.optimization_barrier(y)  # or XLA normalises all branches into one tensor first
        outer = batch_norm.moments_used(y, outer_norm)
        y = batch_norm.normalise(y, outer_norm, outer, static.outer_epsilon)
    if static.activation is not None:
        y = static.activation(y)
    return y.astype(x.dtype), Statistics(inner, outer, ranges, peak)


def _hybrid_forward(static, *arguments):
    out = _forward(static, *arguments)
    return out, (arguments[:-1], out[1])


def _hybrid_backward(static: Unit, saved, cotangents):
    # A barrier before each pass over the products: XLA must read them again, it may not carry the
    # last pass's intermediates along.
    saved, g = lax.optimization_barrier((saved, cotangents[0]))
    (x, kernels, biases, branch_norms, outer_norm, bias), statistics = saved
    learned = branch_maps.learned_of(statistics.ranges)

    def maps(x, kernels, learned):
        return _maps(static, x, kernels, branch_maps.with_learned(statistics.ranges, learned))[0]

    z, transpose = jax.vjp(maps, x, kernels, learned)

    def values(z):
        """The branches' values, and what follows their norms."""
        zs = _branches(static, z, biases)
        return zs, _normalise_all(static, zs, branch_norms, statistics.branches)

    def output(z):
        """The rounded combined value, and its transpose."""
        combined = _combine(static, values(z)[1], bias)
        if static.precision.output is None:
            return combined, None
        arrays = statistics.ranges["output"]
        return jax.vjp(
            lambda y, learned: _rounded_output(static, y, arrays._replace(learned=learned)),
            combined,
            arrays.learned,
        )

    def before_outer_norm(z, g):
        """The cotangent behind the activation, and the value that the outer norm takes."""
        combined, _ = output(z)
        g = _wide(g)
        if static.activation is not None:
            before = combined
            if outer_norm is not None:
                before = batch_norm.normalise(
                    combined, outer_norm, statistics.outer, static.outer_epsilon
                )
            (g,) = jax.vjp(static.activation, before)[1](g)
        return g, combined

    def branch_gradients(z, g):
        """The branches' values, and the cotangents behind their norms."""
        zs, hs = values(z)
        return zs, static.parts.gradient(g, *hs)

    d_outer_norm = d_branch_norms = None
    if outer_norm is not None:
        sums = batch_norm.sums(*before_outer_norm(z, g), statistics.outer, static.outer_epsilon)
        d_outer_norm = batch_norm.parameter_gradient(outer_norm, sums)
        z, g, sums = lax.optimization_barrier((z, g, sums))
    g, combined = before_outer_norm(z, g)
    if outer_norm is not None:
        g = batch_norm.input_gradient(
            g, combined, outer_norm, statistics.outer, sums, static.outer_epsilon
        )
    d_output = {}
    if static.precision.output is not None:
        g, d_learned_output = output(z)[1](g)
        d_output["output"] = Arrays(d_learned_output, None)
    d_bias = _bias_gradient(g, bias, None if d_output else outer_norm)
    z, g = lax.optimization_barrier((z, g))

    if branch_norms is not None:
        zs, d_hs = branch_gradients(z, g)
        sums_of = functools.partial(batch_norm.sums, epsilon=static.branch_epsilon)
        sums = list(map(sums_of, d_hs, zs, statistics.branches))
        d_branch_norms = tuple(map(batch_norm.parameter_gradient, branch_norms, sums))
        z, g, sums = lax.optimization_barrier((z, g, sums))
    zs, d_zs = branch_gradients(z, g)
    if branch_norms is not None:
        back = functools.partial(batch_norm.input_gradient, epsilon=static.branch_epsilon)
        d_zs = list(map(back, d_zs, zs, branch_norms, statistics.branches, sums))
    d_z = {kind: value.astype(z[kind].dtype) for kind, value in _fuse(static, d_zs).items()}
    d_z = lax.optimization_barrier(d_z)
    d_x, d_kernels, d_learned = transpose(d_z)
    d_ranges = d_learned | d_output
    d_biases = None
    if biases is not None:
        d_biases = tuple(map(_bias_gradient, d_zs, biases, branch_norms or (None,) * len(biases)))
    return d_x, d_kernels, d_biases, d_branch_norms, d_outer_norm, d_bias, d_ranges


def _bias_gradient(g: Array, bias: Array | None, norm: Norm | None) -> Array | None:
    """The norm of a batch takes the mean away, and a bias with it: its gradient is exactly 0."""
    if bias is None:
        return None
    if norm is not None and norm.mean is None:
        return jnp.zeros_like(bias)
    return jnp.sum(g, tuple(range(g.ndim - 1)))


_hybrid.defvjp(_hybrid_forward, _hybrid_backward)
