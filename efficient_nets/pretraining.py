"""A net in float first, the rounded one from its weights: `config.pretrain`, in one command."""

from ml_collections import ConfigDict

from efficient_nets import config as configs
from efficient_nets import experiment
from efficient_nets.errors import UserError

FOLDER = "float"  # of the first run, in the workdir of the second


def float_config(config: ConfigDict) -> ConfigDict:
    """The config of the first run: the same net with nothing rounded, trained as config.pretrain.

    The learning rate's schedule is that of the config, its milestones and periods stretched to the
    other number of epochs. Optimizer rules for parameters that only the rounded net has are left
    out. It has no teacher.

    Raises:
      UserError: if nothing is rounded, so that the two runs are of the same net.
    """
    layers = tuple(_without(rule, "precision") for rule in config.layers)
    if layers == tuple(map(dict, config.layers)):
        raise UserError(
            f"pretrain.epochs={config.pretrain.epochs}: no rule of layers has a precision, so that "
            "the net in float is the net itself"
        )
    plain = configs.from_json(configs.to_json(config))
    defaults = configs.defaults()
    plain.layers = layers
    for section in ("pretrain", "teacher", "calibration"):
        plain[section] = defaults[section]
    plain.optimizer.learning_rate = config.pretrain.learning_rate
    plain.train.epochs = config.pretrain.epochs
    stretch = config.pretrain.epochs / config.train.epochs
    plain.schedule.milestones = tuple(stretch * epoch for epoch in config.schedule.milestones)
    plain.schedule.period = stretch * config.schedule.period
    return experiment.without_idle_rules(plain)


def _without(rule, field: str) -> dict:
    return {key: value for key, value in rule.items() if key != field}
