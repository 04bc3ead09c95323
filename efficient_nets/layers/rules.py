"""`convert(model, rules)`: gives every Dense and Conv of a plain model its axes, by path."""

import dataclasses
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_nets import names
from efficient_nets.errors import UserError
from efficient_nets.layers.linear import Layer
from efficient_nets.layers.spec import LayerSpec

FIELDS = ("match", *(field.name for field in dataclasses.fields(LayerSpec)))


def layers(model: nnx.Module) -> Iterator[tuple[str, Layer]]:
    """Every Dense and Conv with its path, such as `stage1/0/conv2`, in the model's order."""
    for path, node in nnx.iter_graph(model):
        if isinstance(node, Layer):
            yield "/".join(map(str, path)), node


def convert(model: nnx.Module, rules: Sequence[Mapping], key: jax.Array) -> nnx.Module:
    """A copy of the model in which each layer has the spec of the first rule that matches its path.

    Args:
      model: Any Flax NNX module that holds `Dense` and `Conv` layers.
      rules: Mappings with `match`, a regular expression searched for in the layer's path, and any
        fields of `LayerSpec`. The first match wins; a layer that no rule matches, and a rule with
        `match` alone, leave the layer as it is.
      key: Where changed layers get fresh parameters, they are drawn from this key and the layer's
        path, so they do not depend on the other rules.

    Raises:
      ValueError: if a rule has an unknown field or member, or matches no layer, or only layers that
        an earlier rule has taken.
    """
    model = nnx.clone(model)
    found = dict(layers(model))
    matched_by = {path: _first_match(rules, path) for path in found}
    _check(rules, found, matched_by)
    for path, layer in found.items():
        if matched_by[path] is None:
            continue
        fields = {k: v for k, v in rules[matched_by[path]].items() if k != "match"}
        spec = dataclasses.replace(layer.spec, **fields)
        if spec != layer.spec:
            path_key = jax.random.fold_in(key, zlib.crc32(path.encode()) & 0x7FFFFFFF)
            layer.respecify(spec, nnx.Rngs(path_key))
    return model


def set_compute_dtype(model: nnx.Module, dtype: jnp.dtype) -> nnx.Module:
    """A copy of the model whose Dense and Conv layers compute their products in `dtype`."""
    model = nnx.clone(model)
    for _, layer in layers(model):
        layer.geometry = dataclasses.replace(layer.geometry, dtype=dtype)
    return model


def _first_match(rules: Sequence[Mapping], path: str) -> int | None:
    hits = (i for i, rule in enumerate(rules) if re.search(rule.get("match", ""), path))
    return next(hits, None)


def _check(rules: Sequence[Mapping], paths, matched_by: Mapping[str, int | None]) -> None:
    for index, rule in enumerate(rules):
        names.check_fields(f"layers[{index}]", rule, FIELDS)
        if "match" not in rule:
            raise UserError(
                f"layers[{index}]={dict(rule)} has no 'match': give a regular expression"
            )
        if index in matched_by.values():
            continue
        hits = [path for path in paths if re.search(rule["match"], path)]
        if hits:
            earlier = sorted({matched_by[path] for path in hits})
            reason = f"every layer it matches is taken by an earlier rule, layers{earlier}"
        else:
            reason = f"it matches none of the layers: {', '.join(paths)}"
        raise UserError(f"layers[{index}].match={rule['match']!r}: {reason}")
