"""`convert(model, rules)`: gives every Dense and Conv of a plain model its axes, by path."""

import dataclasses
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_nets import paths
from efficient_nets.errors import UserError
from efficient_nets.layers.linear import Layer
from efficient_nets.layers.spec import LayerSpec

FIELDS = ("match", *(field.name for field in dataclasses.fields(LayerSpec)))


def layers(model: nnx.Module) -> Iterator[tuple[str, Layer]]:
    """Every Dense and Conv with its path, such as `stage1/0/conv2`, sorted by path."""
    for path, node in nnx.iter_graph(model):
        if isinstance(node, Layer):
            yield "/".join(map(str, path)), node


def convert(model: nnx.Module, rules: Sequence[Mapping], key: jax.Array) -> nnx.Module:
    """A copy of the model in which each layer has the spec of the first rule that matches its path.

    A layer that changes gets fresh parameters, but with `start='relinear'`: that carries those of a
    linear layer on, and the neuron starts as that layer. New norms are in training mode, so call
    `model.eval()` afterwards where that is wanted.

    Args:
      model: Any Flax NNX module that holds `Dense` and `Conv` layers.
      rules: Mappings with `match`, a regular expression searched for in the layer's path, and any
        fields of `LayerSpec`. The first match wins; a layer that no rule matches, and a rule with
        `match` alone, leave the layer as it is.
      key: Where changed layers get fresh parameters, they are drawn from this key and the layer's
        path, so they do not depend on the other rules.

    Raises:
      UserError: if a rule has an unknown field or member, or matches no layer, or only layers that
        an earlier rule has taken.
    """
    paths.check_rules("layers", rules, FIELDS)
    model = nnx.clone(model)
    found = dict(layers(model))
    if rules and not found:
        raise UserError(f"layers: {type(model).__name__} has no Dense or Conv for rules to match")
    matched_by = {path: _first_match(rules, path) for path in found}
    _check_used(rules, matched_by)
    for path, layer in found.items():
        if matched_by[path] is None:
            continue
        path_key = jax.random.fold_in(key, zlib.crc32(path.encode()) & 0x7FFFFFFF)
        try:
            layer.respecify(_spec(rules[matched_by[path]], layer), nnx.Rngs(path_key))
        except UserError as error:
            raise UserError(f"layers[{matched_by[path]}]: {path}: {error}") from error
    return model


def _spec(rule: Mapping, layer: Layer) -> LayerSpec:
    """The layer's spec with the rule's fields; a start is for the rule that names it."""
    fields = {"start": "own"} | {k: v for k, v in rule.items() if k != "match"}
    return dataclasses.replace(layer.spec, **fields)


def set_compute_dtype(model: nnx.Module, dtype: jnp.dtype) -> nnx.Module:
    """A copy of the model whose Dense and Conv layers compute their products in `dtype`."""
    model = nnx.clone(model)
    for _, layer in layers(model):
        layer.geometry = dataclasses.replace(layer.geometry, dtype=dtype)
    return model


def _first_match(rules: Sequence[Mapping], path: str) -> int | None:
    return next((i for i, rule in enumerate(rules) if re.search(rule["match"], path)), None)


def _check_used(rules: Sequence[Mapping], matched_by: Mapping[str, int | None]) -> None:
    for index, rule in enumerate(rules):
        if index in matched_by.values():
            continue
        hits = [path for path in matched_by if re.search(rule["match"], path)]
        if hits:
            earlier = sorted({matched_by[path] for path in hits})
            reason = f"every layer it matches is taken by an earlier rule, layers{earlier}"
        else:
            reason = f"it matches none of the layers: {', '.join(matched_by)}"
        raise UserError(f"layers[{index}].match={rule['match']!r}: {reason}")
