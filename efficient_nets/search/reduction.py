"""Nets with layers removed: as configs that `main` trains, and what they cost."""

import re
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from efficient_nets import analysis, data, experiment, layers
from efficient_nets import config as configs
from efficient_nets.errors import UserError
from efficient_nets.layers import rules


def reduced(config: ConfigDict, removed: Sequence[str]) -> ConfigDict:
    """The config of the net without these layers, and without a builder.

    Rules of layers, optimizer and sharding that then have nothing to match are left out: they would
    be errors.
    """
    config = _copy(config)
    config.builder = configs.defaults().builder
    if not removed:
        return config
    info = data.describe(config.data)
    plain = _copy(config)
    plain.layers = ()
    every = [path for path, _ in layers.layers(experiment.abstract_model(plain, info))]
    config.layers = rules.with_removals(config.layers, removed, every)
    return experiment.without_idle_rules(config)


def built(config: ConfigDict, removed: Sequence[str]) -> ConfigDict:
    """`reduced`, as it is trained from scratch."""
    config = reduced(config, removed)
    config.checkpoint.init_from = config.checkpoint.convert_from = ""
    return config


def of_round(config: ConfigDict, removed: Sequence[str], previous: str) -> ConfigDict:
    """`reduced`, as it is trained in a round: fine-tuned from the weights in the run `previous`.

    Without one it is the first round, which trains as the config says.
    """
    builder, config = config.builder, reduced(config, removed)
    if previous:
        config.checkpoint.init_from, config.checkpoint.convert_from = previous, ""
        config.train.epochs = builder.finetune_epochs
        config.optimizer.learning_rate *= builder.finetune_rate
        config.schedule.end_value *= builder.finetune_rate
        config.schedule.warmup_epochs = 0.0
    return config


def cost(config: ConfigDict) -> dict[str, Any]:
    """`params`, `macs` and `layers` of the config's net, see `analysis.model_cost`."""
    info = data.describe(config.data)
    return analysis.model_cost(experiment.abstract_model(config, info), info.image_shape)


def candidates(config: ConfigDict) -> list[str]:
    """Layers that `config.builder.candidates` matches and whose removal saves something.

    A linear 1x1 convolution that changes the number of channels is its own channel adapter, so its
    removal would save nothing.

    Returns:
      Paths in the order of the calls.

    Raises:
      UserError: if there is none, or one that cannot be removed.
    """
    field = f"builder.candidates={config.builder.candidates!r}"
    try:
        pattern = re.compile(config.builder.candidates)
    except re.error as error:
        raise UserError(f"{field} is no regular expression: {error}") from error
    before = {layer.name: layer for layer in cost(reduced(config, ()))["layers"]}
    found = [name for name in before if pattern.search(name)]
    if not found:
        raise UserError(f"{field}: it matches none of the layers: {', '.join(before)}")
    try:
        least = cost(reduced(config, found))
    except UserError as error:
        raise UserError(f"{field}: {error}") from error
    after = {layer.name: (layer.params, layer.macs) for layer in least["layers"]}
    saving = [name for name in found if after.get(name) != (before[name].params, before[name].macs)]
    if not saving:
        raise UserError(f"{field}: removing {', '.join(found)} saves nothing")
    return saving


def _copy(config: ConfigDict) -> ConfigDict:
    return config.copy_and_resolve_references()
