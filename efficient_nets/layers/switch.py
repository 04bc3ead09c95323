"""One of several modules, chosen by data: a step is compiled once for all of them. Or their sum."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from efficient_nets.layers.collect import add, collecting, wanted
from efficient_nets.layers.linear import Layer
from efficient_nets.layers.precision import Range
from efficient_nets.ops import linear_maps


def switched(
    ways: nnx.List,
    index: Array,
    x: Array,
    call: Callable[[nnx.Module, Array], Array],
    *,
    at: Array | None = None,
) -> Array:
    """`call(ways[index], x)`, of which nothing but that one is computed (`lax.switch`).

    What it moved, as running averages, is kept, and the losses of its quantizers are collected.

    What a branch would keep for the backward pass, every other one would have to keep as zeros:
    each computes it again. On a CPU a `lax.conv` in a branch takes many times as long as outside:
    there depthwise convolutions, dense layers and Winograd's algorithm are for it.

    Args:
      ways: The modules; they may share variables. Their outputs are of one shape and type.
      index: int32, a scalar.
      x: The input.
      call: A module's value.
      at: int32, a scalar; then each variable has a leading axis, and this is the position on it
        that is computed with.
    """
    graph, params, others = nnx.split(ways, nnx.Param, ...)
    if at is not None:
        every, (params, others) = others, _at(at, (params, others))

    @functools.partial(jax.checkpoint, static_argnums=0)
    def one(number: int, params, others, x):
        found = nnx.merge(graph, params, others)
        y, loss = _called(call, found[number], x)
        return y, nnx.state(found, nnx.Not(nnx.Param)), loss

    branches = [functools.partial(one, number) for number in range(len(ways))]
    y, others, loss = lax.switch(index, branches, params, others, x)
    if at is not None:
        others = jax.tree.map(
            lambda old, new: lax.dynamic_update_index_in_dim(old, new, at, 0), every, others
        )
    _tell(ways, others, loss)
    return y


def mixed(
    ways: nnx.List,
    weights: Array,
    xs: Array,
    call: Callable[[nnx.Module, Array], Array],
) -> Array:
    """`sum_i sum_k weights[i, k] call(ways[k] at i, xs[i])`, all of which is computed.

    What they moved is kept, whatever the weights: a variable that ways share moves with each of
    them. The losses of quantizers are added with the same weights.

    The backward pass computes all again, one i after the other: what it keeps at a time is that of
    all ways of one input.

    Args:
      ways: Modules whose variables have a leading axis, see `stacked`; they may share some. Their
        outputs are of the shape and the type of an input.
      weights: `(n, ways)`, differentiable.
      xs: `(n, ...)`.
      call: A module's value.
    """
    graph, params, others = nnx.split(ways, nnx.Param, ...)
    wide = linear_maps.wide(xs.dtype)

    @functools.partial(jax.checkpoint, prevent_cse=False)  # a scan has no other half to merge with
    def one(params, others, weights, x):
        found = nnx.merge(graph, params, others)
        total, losses = jnp.zeros(x.shape, wide), jnp.zeros((), jnp.float32)
        for weight, way in zip(weights, found, strict=True):
            y, loss = _called(call, way, x)
            total += weight.astype(wide) * y.astype(wide)
            losses += weight.astype(jnp.float32) * loss
        return (total, losses), nnx.state(found, nnx.Not(nnx.Param))

    def step(totals, each):
        found, others = one(*each)
        return jax.tree.map(jnp.add, totals, found), others

    start = jnp.zeros(xs.shape[1:], wide), jnp.zeros((), jnp.float32)
    (y, loss), others = lax.scan(step, start, (params, others, weights, xs))
    _tell(ways, others, loss)
    return y.astype(xs.dtype)


def _called(call, way: nnx.Module, x: Array) -> tuple[Array, Array]:
    """The value, and the sum of what its quantizers add to the loss: in a branch none sees it."""
    with collecting("losses") as losses, collecting("peaks"), collecting("norms"):
        y = call(way, x)
    return y, sum((x.astype(jnp.float32) for _, x in losses), jnp.zeros((), jnp.float32))


def _tell(ways: nnx.List, others, loss: Array) -> None:
    nnx.update(ways, others)
    if wanted("losses") and any(
        isinstance(node, Range) and node.quantizer.loss for _, node in nnx.iter_graph(ways)
    ):
        add("losses", ways, loss)


def stacked(make: Callable[[nnx.Rngs], nnx.Module], number: int, key: Array) -> nnx.Module:
    """A module whose variables have a leading axis: of `number` modules that `make` gives.

    It is for `switched` with `at`, `mixed` or `taken`; as it is, it cannot be called. Nothing that
    goes over the layers of a net sees those in it: neither rules nor the layer table nor
    `calibrate`.
    """
    graphs = []

    @jax.vmap
    def made(key):
        graph, state = nnx.split(make(nnx.Rngs(key)))
        graphs.append(graph)
        return state

    state = made(jax.random.split(key, number))
    module = nnx.merge(graphs[0], state)
    for layer in _layers(module):
        layer.stacked = True
    return module


def taken(module: nnx.Module, at: Array | int) -> nnx.Module:
    """The one at this position of a stacked module, with its own copy of the variables."""
    graph, state = nnx.split(module)
    found = nnx.merge(graph, _at(jnp.asarray(at, jnp.int32), state))
    for layer in _layers(found):
        del layer.stacked
    return found


def _layers(module: nnx.Module) -> list[Layer]:
    return [node for _, node in nnx.iter_graph(module) if isinstance(node, Layer)]


def _at(index: Array, state):
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, 0, keepdims=False), state)
