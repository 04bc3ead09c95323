"""A net in float first, the rounded one from its weights: `config.pretrain`, in one command."""

import pathlib

from ml_collections import ConfigDict

from efficient_nets import config as configs
from efficient_nets import experiment
from efficient_nets.errors import UserError
from efficient_nets.layers import rules
from efficient_nets.ops import precision

FOLDER = "float"  # of the first run, in the workdir of the second


def float_config(config: ConfigDict) -> ConfigDict:
    """The config of the first run: the same net with nothing rounded, trained as config.pretrain.

    The learning rate's schedule is that of the config, stretched to the other number of epochs.
    Optimizer rules for parameters that only the rounded net has are left out. It has no teacher.
    A net without activations whose inputs become signs would be linear in float: it has
    clip(x, -1, 1) there, as Bi-Real Net is pre-trained (arXiv 1808.00278, section 3.3).

    Raises:
      UserError: if nothing is rounded, so that the two runs are of the same net.
    """
    layers = tuple(_without(rule, "precision") for rule in config.layers)
    rounding = [rule for rule in config.layers if rules.rounds(rule)]
    if not rounding:
        raise UserError(
            f"pretrain.epochs={config.pretrain.epochs}: no rule of layers has a precision, so that "
            "the net in float is the net itself"
        )
    plain = configs.from_json(configs.to_json(config))
    defaults = configs.defaults()
    plain.layers = layers
    for section in ("pretrain", "teacher", "calibration"):
        plain[section] = defaults[section]
    if plain.model.get("activation") == "none" and any(map(_takes_signs, rounding)):
        plain.model.activation = "hard_tanh"
    plain.optimizer.learning_rate = config.pretrain.learning_rate
    plain.train.epochs = config.pretrain.epochs
    stretch = config.pretrain.epochs / config.train.epochs
    plain.schedule.warmup_epochs = stretch * config.schedule.warmup_epochs
    plain.schedule.milestones = tuple(stretch * epoch for epoch in config.schedule.milestones)
    plain.schedule.period = stretch * config.schedule.period
    return experiment.without_idle_rules(plain)


def is_done(workdir: pathlib.Path, config: ConfigDict) -> bool:
    """Whether a run of this config has ended there."""
    if not (workdir / "result.json").exists():
        return False
    return not configs.differences(config, (workdir / "config.json").read_text())


def _takes_signs(rule) -> bool:
    found = precision.parse(rule["precision"]).input
    return found is not None and found.signed and found.levels == 2


def _without(rule, field: str) -> dict:
    return {key: value for key, value in rule.items() if key != field}
