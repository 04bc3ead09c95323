"""Names of leaves in a tree, `stage1/0/conv1/a/kernel`: what regular expressions search."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from efficient_nets import names
from efficient_nets.errors import UserError


def name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def map_named(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """`jax.tree.map` whose function also gets each leaf's name, first."""
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function(name(path), *leaves), tree, *rest
    )


def named_leaves(tree: Any) -> dict[str, Any]:
    return {name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def check_rules(field: str, rules: Sequence[Mapping], allowed: Sequence[str]) -> None:
    """Raises a UserError unless each rule is a dict of `allowed` fields with a good `match`."""
    if isinstance(rules, Mapping | str):
        raise UserError(f"{field}={rules!r}: a sequence of dicts is needed")
    for index, rule in enumerate(rules):
        here = f"{field}[{index}]"
        if not isinstance(rule, Mapping):
            raise UserError(f"{here}={rule!r}: a dict with 'match' is needed")
        names.check_fields(here, rule, allowed)
        if "match" not in rule:
            raise UserError(f"{here}={dict(rule)} has no 'match': give a regular expression")
        try:
            re.compile(rule["match"])
        except (re.error, TypeError) as error:
            reason = f"is no regular expression: {error}"
            raise UserError(f"{here}.match={rule['match']!r} {reason}") from error


def matching(field: str, pattern: str, found: Sequence[str], what: str) -> list[str]:
    """Those of the names in which the pattern is found.

    Raises:
      UserError: if it is no regular expression, or is found in none of `what` these are.
    """
    here = f"{field}={pattern!r}"
    try:
        kept = [name for name in found if re.search(pattern, name)]
    except re.error as error:
        raise UserError(f"{here} is no regular expression: {error}") from error
    if not kept:
        raise UserError(f"{here} matches none of the {what}: {found}")
    return kept


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
