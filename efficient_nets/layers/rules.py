"""`convert(model, rules)`: gives every layer of a plain model its axes, by path.

A rule with `remove=True` takes its layers out: see `Layer.remove`.
"""

import dataclasses
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from efficient_nets import paths
from efficient_nets.errors import UserError
from efficient_nets.layers import joint
from efficient_nets.layers.linear import Layer
from efficient_nets.layers.precision import Range
from efficient_nets.layers.spec import LayerSpec
from efficient_nets.layers.tproduct import TDense
from efficient_nets.ops import precision

REMOVE = "remove"
FIELDS = ("match", REMOVE, *(field.name for field in dataclasses.fields(LayerSpec)))


def layers(model: nnx.Module) -> Iterator[tuple[str, Layer]]:
    """Every Dense, Conv and Embedding with its path, such as `stage1/0/conv2`, sorted by path.

    Those that a rule removed are left out; the channel adapters that replace some are not. So are
    stacked ones, which are several layers in one: see `switch.stacked`.
    """
    for path, layer in _with_removed(model):
        if not layer.removed:
            yield path, layer


def t_layers(model: nnx.Module) -> Iterator[tuple[str, TDense]]:
    """Every TDense with its path; it has none of the axes, so no rule of `convert` sees it."""
    for path, node in nnx.iter_graph(model):
        if isinstance(node, TDense):
            yield "/".join(map(str, path)), node


def ranges(model: nnx.Module) -> Iterator[tuple[str, Range]]:
    """The arrays of every quantizer with their path, such as `stage1/0/conv2/ranges/input`."""
    for path, layer in layers(model):
        for name, found in (layer.ranges or {}).items():
            yield f"{path}/ranges/{name}", found


def _with_removed(model: nnx.Module) -> Iterator[tuple[str, Layer]]:
    for path, node in nnx.iter_graph(model):
        if isinstance(node, Layer) and not node.stacked:
            yield "/".join(map(str, path)), node


def norm_name(layer: str) -> str:
    """By convention the name of the norm behind a layer, both being attributes of one module.

    `norm` for `conv`, `norm1` for `conv1`, and `stem_norm` for `stem`, `depthwise`, ... alike.
    """
    conv = re.fullmatch(r"conv(\d*)", layer)
    return f"norm{conv[1]}" if conv else f"{layer}_norm"


def convert(model: nnx.Module, rules: Sequence[Mapping], key: jax.Array) -> nnx.Module:
    """A copy of the model in which each layer has the spec of the first rule that matches its path.

    A layer whose neuron, norm or kernel changes gets fresh parameters, but with `start='relinear'`,
    that carries those of a linear layer on, so that the neuron starts as that layer, and with
    `start='kept'`, that makes the kernels from those that there are. Layers with one name
    in `joint` and kernels of one shape share their cores, see `join`. New norms are in training
    mode, so call `model.eval()` afterwards where that is wanted.

    Args:
      model: Any Flax NNX module that holds `Dense` and `Conv` layers.
      rules: Mappings with `match`, a regular expression searched for in the layer's path, and any
        fields of `LayerSpec`, or `remove=True` alone. The first match wins; a layer that no rule
        matches, and a rule with `match` alone, leave the layer as it is. One that was removed
        before stays so.
      key: Where changed layers get fresh parameters, they are drawn from this key and the layer's
        path, so they do not depend on the other rules.

    Raises:
      UserError: if a rule has an unknown field or member, or matches no layer, or only layers that
        an earlier rule has taken, or removes a layer that nothing smaller can replace, or parts
        layers that share their cores.
    """
    paths.check_rules("layers", rules, FIELDS)
    _check_removals(rules)
    model = nnx.clone(model)
    found = dict(_with_removed(model))
    if rules and not found:
        raise UserError(
            f"layers: {type(model).__name__} has no Dense, Conv or Embedding for rules to match"
        )
    matched_by = {path: _first_match(rules, path) for path in found}
    _check_used(rules, matched_by)
    groups: dict[tuple, joint.Group] = {}
    for path, layer in found.items():
        if matched_by[path] is None or layer.removed:
            continue
        rule, rngs = rules[matched_by[path]], nnx.Rngs(_path_key(key, path))
        try:
            if REMOVE in rule:
                layer.remove(rngs)
            else:
                spec = _spec(rule, layer)
                if spec.joint:
                    group = (spec.joint, layer.geometry.kernel_shape)
                    groups.setdefault(group, joint.Group(spec.joint)).add(path, layer, spec)
                layer.respecify(spec, rngs, joins=True)
        except UserError as error:
            raise UserError(f"layers[{matched_by[path]}]: {path}: {error}") from error
    for group in groups.values():
        group.tie(nnx.Rngs(_path_key(key, "/".join(("joint", *group.layers)))))
    joint.check_whole(layers(model))
    _drop_norms_of_removed(model)
    return model


def _path_key(key: jax.Array, path: str) -> jax.Array:
    """Random numbers of one layer, that do not depend on which others there are."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()) & 0x7FFFFFFF)


def _drop_norms_of_removed(model: nnx.Module) -> None:
    nodes = dict(nnx.iter_graph(model))
    for path, node in nodes.items():
        if path and isinstance(node, Layer) and node.removed:
            parent, name = nodes[path[:-1]], norm_name(str(path[-1]))
            if getattr(parent, name, None) is not None:
                setattr(parent, name, None)


def _check_removals(rules: Sequence[Mapping]) -> None:
    for index, rule in enumerate(rules):
        if REMOVE not in rule:
            continue
        if rule[REMOVE] is not True:
            raise UserError(f"layers[{index}].remove={rule[REMOVE]!r}: allowed True")
        if others := sorted(rule.keys() - {"match", REMOVE}):
            raise UserError(
                f"layers[{index}] removes layers, so it cannot set {', '.join(others)} of them"
            )


def specs(model: nnx.Module, rules: Sequence[Mapping]) -> dict[str, LayerSpec]:
    """What `convert` would give each layer that a rule matches and does not remove."""
    found = {}
    for path, layer in layers(model):
        index = _first_match(rules, path)
        if index is not None and REMOVE not in rules[index]:
            found[path] = _spec(rules[index], layer)
    return found


def _spec(rule: Mapping, layer: Layer) -> LayerSpec:
    """The layer's spec with the rule's fields; a start is for the rule that names it."""
    fields = {"start": "own"} | {k: v for k, v in rule.items() if k != "match"}
    spec = dataclasses.replace(layer.spec, **fields)
    if rule.get("joint") and not spec.joint:
        raise UserError(
            f"joint={rule['joint']!r} with kernel='dense': layers share cores; give a kernel such "
            "as 'tucker:0.1'"
        )
    return spec


def set_compute_dtype(model: nnx.Module, dtype: jnp.dtype) -> nnx.Module:
    """A copy of the model whose Dense, Conv and TDense layers compute their products in `dtype`."""
    model = nnx.clone(model)
    for _, layer in nnx.iter_graph(model):
        if isinstance(layer, Layer):
            layer.geometry = dataclasses.replace(layer.geometry, dtype=dtype)
    for _, layer in t_layers(model):
        layer.dtype = dtype
    return model


def _first_match(rules: Sequence[Mapping], path: str) -> int | None:
    return next((i for i, rule in enumerate(rules) if re.search(rule["match"], path)), None)


def rounds(rule: Mapping) -> bool:
    """Whether a rule of `convert` gives its layers a precision other than 'float'."""
    return bool(precision.parse(rule.get("precision", precision.FLOAT)).quantizers)


def with_removals(
    rules: Sequence[Mapping], removed: Sequence[str], every: Sequence[str]
) -> tuple[dict, ...]:
    """The rules with one in front for each removed layer, without those that then take no layer.

    Args:
      rules: Of `convert`.
      removed: Paths of layers.
      every: Paths of all layers, removed or not.
    """
    return _in_front({path: {REMOVE: True} for path in removed}, rules, every)


def with_precisions(
    rules: Sequence[Mapping], precisions: Mapping[str, str], every: Sequence[str]
) -> tuple[dict, ...]:
    """`with_fields` for the precision alone, given by path of a layer."""
    return with_fields(rules, {path: {"precision": own} for path, own in precisions.items()}, every)


def with_fields(
    rules: Sequence[Mapping], given: Mapping[str, Mapping], every: Sequence[str]
) -> tuple[dict, ...]:
    """The rules with one in front for each of these layers, its own rule with other fields.

    Args:
      rules: Of `convert`.
      given: Fields of `LayerSpec` by path of a layer.
      every: Paths of all layers that rules have not removed.
    """
    fields = {}
    for path, others in given.items():
        index = _first_match(rules, path)
        own = {} if index is None else {k: v for k, v in rules[index].items() if k != "match"}
        fields[path] = own | dict(others)
    removals = [rule for rule in rules if REMOVE in rule]  # of layers that are not among `every`
    return _in_front(fields, rules, every, removals)


def _in_front(fields: Mapping, rules: Sequence[Mapping], every: Sequence[str], kept=()):
    kept = list(map(dict, kept))
    first = [{"match": f"^{re.escape(path)}$"} | dict(own) for path, own in fields.items()]
    rules = [*first, *map(dict, rules)]
    used = {_first_match(rules, path) for path in every}
    return tuple(rule for index, rule in enumerate(rules) if index in used or rule in kept)


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
