"""A net whose searched layers are several candidates each, of which a call computes one.

The index of that one is an array, so that a step which samples it is compiled once; `lax.switch`
computes what is sampled and nothing else. Candidates share kernels and bias; quantizers' ranges and
learned transforms are each one's own.
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from efficient_nets import layers
from efficient_nets.layers import Layer
from efficient_nets.layers import norm as norms

WAYS = "ways"  # the attribute of a `Choice` that holds its candidates


class Sampled(nnx.Variable):
    """Which of a layer's candidates is computed, and which is the other one of a pair."""


class Gates(nnx.Variable):
    """The binary gates of a pair; only the architecture's gradient asks for them."""


class Choice(Layer):
    """A layer that is one of its candidates, which `sampled` says.

    With gates g it is `g[0] * first(x) + g[1] * second(x)`, and g = (1, 0) lets the first one
    through (ProxylessNAS, arXiv 1812.00332, equation 2): the gradient by g is what is asked for,
    and through the closed gate nothing else has one.

    A candidate is followed by norm and activation as separate steps, which all share.

    Attributes:
      sampled: int32 `(2,)`, indices of candidates.
      ways: The candidates. Sorted behind the branches, whose paths are so those of a plain layer.
      gates: `(2,)`, or None, where the first one alone is computed.
    """

    def __init__(self, layer: Layer, ways: Sequence[Layer]):
        self.geometry, self.spec, self.removed = layer.geometry, layer.spec, False
        for name in layer.spec.branches:
            for one in (self, *ways):
                setattr(one, name, getattr(layer, name))
        for one in (self, *ways):
            one.bias = nnx.data(layer.bias)
        self.ranges = self.transforms = self.gates = nnx.data(None)
        self.sampled = Sampled(jnp.zeros((2,), jnp.int32))
        self.ways = nnx.List(ways)

    def unit(self, x: Array, norm: nnx.Module | None = None, activation: Callable | None = None):
        first, second = self.sampled[...]
        y = self._way(first, x)
        if self.gates is not None:
            other = lax.stop_gradient(self._way(second, lax.stop_gradient(x)))
            gates = self.gates[...].astype(y.dtype)
            y = gates[0] * y + gates[1] * other
        y = norms.normalise(norm, y)
        return y if activation is None else activation(y)

    def _way(self, index: Array, x: Array) -> Array:
        return layers.switched(self.ways, index, x, lambda way, x: way.unit(x))


def choices(model: nnx.Module) -> dict[str, Choice]:
    """The searched layers of a supernet, by path."""
    return {path: layer for path, layer in layers.layers(model) if isinstance(layer, Choice)}


def make(
    model: nnx.Module,
    paths: Iterable[str],
    candidates: Sequence[Mapping[str, str]],
    key: Array,
    images: Array | None = None,
    how: str = "own",
) -> nnx.Module:
    """A copy of the net in which these layers can be any of the candidates.

    Args:
      model: The net; its weights stay.
      paths: Of the layers that are searched.
      candidates: Fields of `LayerSpec`: see `candidates`.
      key: For arrays of quantizers that are drawn.
      images: A batch, or None; candidates have the ranges that suit what comes to their layer, as
        of `layers.calibrate`. Norms do as the model's mode says.
      how: As there.

    Raises:
      UserError: if a candidate cannot compute one of the layers, naming both.
    """
    ways = {path: [] for path in paths}
    for candidate in candidates:
        given = [{"match": f"^{re.escape(path)}$", **candidate} for path in ways]
        converted = dict(layers.layers(layers.convert(model, given, key)))
        for path, found in ways.items():
            found.append(converted[path])
    if images is not None:
        _calibrate(model, ways, images, how)
    return _replaced(
        model, {path: functools.partial(Choice, ways=found) for path, found in ways.items()}
    )


def _calibrate(model: nnx.Module, ways: dict[str, list[Layer]], images: Array, how: str) -> None:
    """All candidates from one pass of the net as it is."""
    seen = set()

    def observer(path, layer, x, y):
        if path in ways and path not in seen:  # of a layer that is called twice the first counts
            seen.add(path)
            ways[path][:] = [layers.calibrate(way, x, how=how) for way in ways[path]]

    layers.watched(model, observer)(images)


def sample(model: nnx.Module, sampled: Mapping[str, Array]) -> None:
    """Sets which candidates run: a scalar or `(2,)`, an index or a pair of them, by path."""
    for path, layer in choices(model).items():
        index = jnp.asarray(sampled[path], jnp.int32)
        layer.sampled[...] = jnp.broadcast_to(index, (2,))


def open_gates(model: nnx.Module, gates: Mapping[str, Array]) -> None:
    """Gives each searched layer the gates of its pair, `(2,)` by path."""
    for path, layer in choices(model).items():
        layer.gates = Gates(gates[path])


def extract(model: nnx.Module, chosen: Mapping[str, int]) -> nnx.Module:
    """A copy whose searched layers are these candidates: what `convert` makes, weights as here."""
    return _replaced(
        model,
        {path: lambda layer, index=index: layer.ways[index] for path, index in chosen.items()},
    )


def _replaced(model: nnx.Module, made: Mapping[str, Callable[[Layer], Layer]]) -> nnx.Module:
    """A copy with other layers at these paths, each made of the one that was there."""
    model = nnx.clone(model)
    nodes = dict(nnx.iter_graph(model))
    for path, node in nodes.items():
        function = made.get("/".join(map(str, path)))
        if function is None:
            continue
        parent, name = nodes[path[:-1]], path[-1]
        if isinstance(parent, nnx.List):
            parent[name] = function(node)
        else:
            setattr(parent, name, function(node))
    return model
