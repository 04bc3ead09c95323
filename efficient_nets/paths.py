"""Names of leaves in a tree, `stage1/0/conv1/a/kernel`: what regular expressions search."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax


def name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def map_named(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """`jax.tree.map` whose function also gets each leaf's name, first."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(name(path), *leaves), tree, *rest
    )


def named_leaves(tree: Any) -> dict[str, Any]:
    return {name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def lookup(rules: Sequence[Mapping], leaf: str, field: str, default: Any) -> Any:
    """The field of the first rule that has it and whose `match` is found in the leaf's name."""
    for rule in rules:
        if field in rule and re.search(rule["match"], leaf):
            return rule[field]
    return default


def unmatched(rules: Sequence[Mapping], tree: Any) -> list[str]:
    """The patterns that match no leaf."""
    leaves = named_leaves(tree)
    return [
        rule["match"]
        for rule in rules
        if not any(re.search(rule["match"], leaf) for leaf in leaves)
    ]
