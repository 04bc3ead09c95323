"""A config as the text of a config file: what differs from the defaults, and nothing else."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from efficient_nets import config as configs
from efficient_nets import models

INDENT = "    "


def source(config: ConfigDict, docstring: str) -> str:
    """Python whose `get_config()` gives this config, for `--config=FILE`.

    Args:
      config: Built on `config.defaults()`.
      docstring: Of the file, lines without indentation.
    """
    lines = [f'"""{docstring}"""', "", "from efficient_nets import config as configs", "", ""]
    lines += ["def get_config():", f"{INDENT}config = configs.defaults()"]
    lines += [INDENT + line for line in _model(config.model)]
    defaults = configs.defaults()
    for name, value in config.items():
        if name == "model":
            continue
        if not isinstance(value, ConfigDict):
            lines += _assignment(f"config.{name}", value, defaults[name])
            continue
        for field, inner in value.items():
            lines += _assignment(f"config.{name}.{field}", inner, defaults[name][field])
    return "\n".join([*lines, f"{INDENT}return config", ""])


def write(path: pathlib.Path, config: ConfigDict, lines: Sequence[str]) -> None:
    """`source` as a file, its folder made if it is not there; `lines` are the docstring's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source(config, "\n".join(lines)))


def _model(model: ConfigDict) -> list[str]:
    defaults = models.options(model.name)
    given = {k: v for k, v in model.items() if k != "name" and v != defaults[k]}
    arguments = [repr(model.name), *(f"{name}={value!r}" for name, value in given.items())]
    return [f"config.model = configs.model({', '.join(arguments)})"]


def _assignment(target: str, value: Any, default: Any) -> list[str]:
    value, default = _plain(value), _plain(default)
    if value == default:
        return []
    if isinstance(value, tuple) and value and isinstance(value[0], dict):
        rules = [f"{INDENT * 2}{_rule(rule)}," for rule in value]
        return [f"{INDENT}{target} = (", *rules, f"{INDENT})"]
    return [f"{INDENT}{target} = {value!r}"]


def _rule(rule: dict) -> str:
    return f"dict({', '.join(f'{name}={value!r}' for name, value in rule.items())})"


def _plain(value: Any) -> Any:
    if isinstance(value, ConfigDict):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value
