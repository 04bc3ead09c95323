"""What rounding one layer alone costs a trained net, layer by layer and choice by choice.

Every quantizer has a switch, the `active` of its schedule. A net of one choice is made and compiled
once, all its switches off, and is then the net in float; each layer is switched on alone, and in
the end all of them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from efficient_nets import (
    analysis,
    calibration,
    conversion,
    data,
    experiment,
    layers,
    paths,
    reporting,
)
from efficient_nets.errors import UserError
from efficient_nets.evaluation import Evaluator
from efficient_nets.layers import rules
from efficient_nets.ops.precision import Precision

OWN = "own"  # the choice that config.layers make
FLOAT = "float"


def with_choices(config: ConfigDict, choices: Mapping[str, str]) -> ConfigDict:
    """The config in which each of these layers has its choice, all others what they have."""
    info = data.describe(config.data)
    every = [path for path, _ in layers.layers(experiment.abstract_model(config, info))]
    named = {path: choice for path, choice in choices.items() if choice != OWN}
    config = config.copy_and_resolve_references()
    config.layers = rules.with_precisions(config.layers, named, every)
    return config


def candidates(config: ConfigDict) -> list[str]:
    """Paths of the layers that `config.layers` rounds and `config.mixed.layers` matches.

    Returns:
      In the order of the calls.

    Raises:
      UserError: if there are none.
    """
    info = data.describe(config.data)
    costs = analysis.layer_costs(experiment.abstract_model(config, info), info.image_shape)
    rounded = [cost.name for cost in costs if cost.precision != FLOAT]
    if not rounded:
        raise UserError("layers: no rule has a precision, so there is no layer to switch")
    return paths.matching("mixed.layers", config.mixed.layers, rounded, "layers that are rounded")


def measure(
    config: ConfigDict, dataset: data.Dataset, names: Sequence[str], choices: Sequence[str]
) -> dict[str, Any]:
    """Accuracy and loss on the validation split, nothing being trained.

    Args:
      config: `checkpoint.convert_from` is the net in float, `calibration` says how ranges start.
      dataset: Of the config.
      names: Paths of the layers that are switched; others that are rounded are on.
      choices: Short forms, 'float' or `OWN`.

    Returns:
      Dicts of `loss` and `accuracy`: under `float` that of the net in float, under `all` one for
      each choice, with all layers of it, under `layers` one for each layer and choice.
    """
    found: dict[str, Any] = {"float": None, "all": {}, "layers": {name: {} for name in names}}
    rounding = [choice for choice in choices if choice != FLOAT]
    total = len(rounding) * (len(names) + 2)
    with reporting.progress(total, desc="switching layers", unit="net") as bar:

        def scores(net, on: Sequence[str]) -> dict[str, float]:
            bar.update()
            return net(on)

        for choice in rounding:
            net = _Switched(with_choices(config, dict.fromkeys(names, choice)), dataset, names)
            found["float"] = found["float"] or scores(net, ())
            for name in names:
                found["layers"][name][choice] = scores(net, (name,))
            found["all"][choice] = scores(net, names)
        bar.update(bar.total - bar.n)
    if FLOAT in choices:
        found["all"][FLOAT] = found["float"]
        for own in found["layers"].values():
            own[FLOAT] = found["float"]
    return found


def scores_of(config: ConfigDict, dataset: data.Dataset) -> dict[str, float]:
    """Loss and accuracy of the net that training this config starts from, all of it rounded."""
    return _Switched(config, dataset, ())(())


class _Switched:
    """The rounded net that training this config would start from; these layers can be off."""

    def __init__(self, config: ConfigDict, dataset: data.Dataset, names: Sequence[str]):
        model = experiment.abstract_model(config, dataset.info)
        # All of them: a schedule of their own would keep the others in float.
        precisions = {
            path: switchable(layer.spec.precision)
            for path, layer in layers.layers(model)
            if layer.spec.precision.quantizers
        }
        self._always = [path for path in precisions if path not in names]
        config = experiment.without_idle_rules(with_choices(config, precisions))
        run = experiment.build(config, dataset, training=False)
        state = conversion.converted_start(run, run.abstract)
        self._state = calibration.calibrated_start(run, state, trained=True)
        self._evaluator = Evaluator(run, "validation")

    def __call__(self, on: Sequence[str]) -> dict[str, float]:
        net = self._state.net
        state = self._state._replace(
            params=net["params"], stats=switched(net["stats"], [*on, *self._always]), ema={}
        )
        found = self._evaluator(state)
        return {name: found[f"validation/{name}"] for name in ("loss", "accuracy")}


def switched(stats: Mapping[str, Any], on: Sequence[str]) -> Any:
    """The statistics of a net with the quantizers of these layers on, and all others off."""
    places = tuple(f"{path}/ranges/" for path in on)

    def switch(name: str, x: jax.Array) -> jax.Array:
        if not name.endswith("/active"):
            return x
        return jax.device_put(jnp.full_like(x, name.startswith(places)), x.sharding)

    return paths.map_named(switch, stats)


def switchable(precision: Precision) -> Precision:
    """A precision whose quantizers have a switch and no other schedule; none at the gradient."""
    plain = dict(freeze_epoch=0.0, stop_epoch=0.0, stages=(), float_epochs=1.0)
    sites = {site: q for site, q in precision.quantizers.items() if site != "gradient"}
    return Precision(**{site: dataclasses.replace(q, **plain) for site, q in sites.items()})
