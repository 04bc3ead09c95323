"""A net in float, direct and dense first, that of a config from its weights: `config.pretrain`.

Both are runs of one command.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from efficient_nets import config as configs
from efficient_nets import experiment
from efficient_nets.errors import UserError
from efficient_nets.layers import rules
from efficient_nets.ops import precision, winograd

FOLDER = "float"  # of the first run, in the workdir of the second


def float_config(config: ConfigDict) -> ConfigDict:
    """The config of the first run: the same net, direct and in float, trained as config.pretrain.

    Kernels that start='kept' decomposes are dense in it.
    With `pretrain.keep_precision` it is rounded as the rules say, but for the sites inside of
    transforms, which a direct layer has not.

    The learning rate's schedule is that of the config, stretched to the other number of epochs.
    Optimizer rules for parameters that only the second net has are left out. It has no teacher.
    A net without activations whose inputs become signs would be linear in float: it has
    clip(x, -1, 1) there, as Bi-Real Net is pre-trained (arXiv 1808.00278, section 3.3).

    Raises:
      UserError: if no rule has what the first run leaves out, so that both are of the same net.
    """
    rounding = [rule for rule in config.layers if rules.rounds(rule)]
    _check_differs(config, rounding)
    plain = configs.from_json(configs.to_json(config))
    defaults = configs.defaults()
    keeps = config.pretrain.keep_precision
    plain.layers = tuple(_direct(rule, keeps) for rule in config.layers)
    for section in ("pretrain", "teacher", *(() if keeps else ("calibration",))):
        plain[section] = defaults[section]
    plain.calibration.norm_batches = 0  # for a start from another run
    if plain.model.get("activation") == "none" and not keeps and any(map(_takes_signs, rounding)):
        plain.model.activation = "hard_tanh"
    plain.optimizer.learning_rate = config.pretrain.learning_rate
    plain.train.epochs = config.pretrain.epochs
    stretch = config.pretrain.epochs / config.train.epochs
    plain.schedule.warmup_epochs = stretch * config.schedule.warmup_epochs
    plain.schedule.milestones = tuple(stretch * epoch for epoch in config.schedule.milestones)
    plain.schedule.period = stretch * config.schedule.period
    return experiment.without_idle_rules(plain)


def without_start(rule: Mapping) -> dict:
    """The rule for a net that has been trained by it already, but for what it decomposes."""
    return {k: v for k, v in rule.items() if k != "start" or _decomposes(rule)}


def decomposes(config: ConfigDict) -> bool:
    """Whether rules decompose kernels that are trained first."""
    return any(map(_decomposes, config.layers))


def is_done(workdir: pathlib.Path, config: ConfigDict) -> bool:
    """Whether a run of this config has ended there."""
    if not (workdir / "result.json").exists():
        return False
    return not configs.differences(config, (workdir / "config.json").read_text())


def _check_differs(config: ConfigDict, rounding) -> None:
    pretrain = config.pretrain
    if decomposes(config):
        return
    if any(
        winograd.parse(rule.get("algorithm", winograd.DIRECT)) != winograd.DIRECT
        for rule in config.layers
    ):
        return
    if pretrain.keep_precision:
        raise UserError(
            "pretrain.keep_precision=True: no rule of layers has an algorithm, so that the net of "
            "the first run is the net itself"
        )
    if not rounding:
        raise UserError(
            f"pretrain.epochs={pretrain.epochs}: no rule of layers has a precision or an "
            "algorithm, or start='kept', so that the net in float is the net itself"
        )


def _decomposes(rule: Mapping) -> bool:
    return rule.get("start") == "kept" and rule.get("kernel", "dense") != "dense"


def _takes_signs(rule) -> bool:
    found = precision.parse(rule["precision"]).input
    return found is not None and found.signed and found.levels == 2


def _direct(rule: Mapping, keeps_precision: bool) -> dict:
    """The rule for the first run."""
    later = {"algorithm", "precision"} | (
        {"kernel", "start", "joint"} if _decomposes(rule) else set()
    )
    left = {key: value for key, value in rule.items() if key not in later}
    if keeps_precision and "precision" in rule:
        left["precision"] = _outer(rule["precision"])
    return left


def _outer(value: Any) -> Any:
    """A precision without the sites inside of transforms, in the form that it has."""
    inner = precision.parse(value).inner
    if isinstance(value, Mapping):
        return {site: fields for site, fields in value.items() if site not in inner}
    return str(dataclasses.replace(precision.parse(value), **dict.fromkeys(inner)))
