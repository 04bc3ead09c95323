"""`--mode=sensitivity`: what each layer loses when it alone is rounded, and a precision for each.

    python -m efficient_nets.main --config=configs/mixed.py --mode=sensitivity --workdir=DIR
    python -m efficient_nets.main --config=DIR/built_config.py --workdir=DIR/built

The first measures a trained net in float on the validation split, each layer switched alone to each
of `mixed.choices`, and chooses one for each layer so that the losses' sum is least within
`mixed.keep` of the float net's packed bytes or bit operations (`assignment`). The second trains the
net that was chosen, from the weights in float.
"""

import pathlib
from typing import Any

import jax
from ml_collections import ConfigDict

from efficient_nets import analysis, data, experiment, names, workdirs
from efficient_nets import config as configs
from efficient_nets.errors import UserError
from efficient_nets.layers import rules
from efficient_nets.ops import precision as precisions
from efficient_nets.search import mixed_report, sensitivity
from efficient_nets.search.assignment import assign

BUDGETS = {
    "packed_bytes": "bytes of the net's arrays in a file, rounded kernels packed",
    "bops": "bit operations of the layers, for one image",
}


def build(config: ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
    """Measures, chooses if there is a budget, and writes the report and built_config.py.

    Args:
      config: `checkpoint.convert_from` is the trained net, `layers` say which of its layers are
        rounded, `mixed` what can be chosen; `calibration` says how ranges start.
      workdir: Gets sensitivity.json, sensitivity.txt, plots/sensitivity.png and built_config.py.

    Returns:
      What sensitivity.json holds.

    Raises:
      UserError: if one of these, or a validation split, is missing, or the budget too small.
    """
    configs.check(config)
    _check(config)
    found = sensitivity.candidates(config)
    workdirs.claim(workdir, config)
    choices = list(config.mixed.choices) or [sensitivity.OWN]
    costs = _costs(config, found, choices)
    report = {"checkpoint": config.checkpoint.convert_from, "choices": choices, "costs": costs}
    limit = config.mixed.keep * costs["float"][config.mixed.budget]
    if config.mixed.keep:
        _assigned(config, {name: dict.fromkeys(choices, 0.0) for name in found}, costs, limit)
    dataset = data.load(config.data)
    report |= {"images": len(dataset.validation), "dataset": dataset.info.name}
    report |= sensitivity.measure(config, dataset, found, choices)
    if config.mixed.keep:
        losses = {
            name: {choice: scores["loss"] for choice, scores in own.items()}
            for name, own in report["layers"].items()
        }
        chosen = _assigned(config, losses, costs, limit)
        built = _built(config, chosen)
        report["assignment"] = {
            "layers": chosen,
            "budget": config.mixed.budget,
            "keep": config.mixed.keep,
            "costs": {name: _cost(built)[name] for name in BUDGETS},
            "before_training": sensitivity.scores_of(built, dataset),
        }
        if jax.process_index() == 0:
            mixed_report.write_config(built, report, workdir)
    if jax.process_index() == 0:
        mixed_report.write(report, workdir)
    return report


def _check(config: ConfigDict) -> None:
    mixed = config.mixed
    names.pick("mixed.budget", mixed.budget, BUDGETS)
    if not 0 <= mixed.keep < 1:
        raise UserError(f"mixed.keep={mixed.keep}: allowed 0 to below 1")
    if mixed.choices and set(mixed.choices) <= {sensitivity.FLOAT}:
        raise UserError(f"mixed.choices={tuple(mixed.choices)}: none of them rounds anything")
    for choice in mixed.choices:
        if not isinstance(choice, str):
            raise UserError(f"mixed.choices: {choice!r} is no short form, as 'lsq:w4a4'")
        precisions.parse(choice)
    if len(set(mixed.choices)) < len(mixed.choices):
        raise UserError(f"mixed.choices={tuple(mixed.choices)}: one is given twice")
    if mixed.keep and len(mixed.choices) < 2:
        raise UserError(f"mixed.keep={mixed.keep}: it takes two mixed.choices or more")
    if not config.checkpoint.convert_from:
        raise UserError(
            "checkpoint.convert_from='': give the workdir of the trained net in float whose layers "
            "are switched"
        )
    source = workdirs.read_config(
        "checkpoint.convert_from", pathlib.Path(config.checkpoint.convert_from)
    )
    if any(map(rules.rounds, source.layers)):
        raise UserError(
            f"checkpoint.convert_from={config.checkpoint.convert_from} is rounded: a net in float "
            "is needed"
        )
    if config.calibration.norm_batches:
        raise UserError(
            f"calibration.norm_batches={config.calibration.norm_batches}: layers are switched in a "
            "net whose norms stay as they are; give 0"
        )
    if not config.data.validation:
        raise UserError(
            "data.validation='': layers are switched on held-out images; give a split that is not "
            "trained on, as data.train='train[:90%]', data.validation='train[90%:]'"
        )


def _cost(config: ConfigDict) -> dict[str, Any]:
    info = data.describe(config.data)
    return analysis.model_cost(experiment.abstract_model(config, info), info.image_shape)


def _costs(config: ConfigDict, found: list[str], choices: list[str]) -> dict[str, Any]:
    """Of the net in float, of that of each choice, and of each layer by choice."""
    costs: dict[str, Any] = {"float": None, "all": {}, "layers": {name: {} for name in found}}
    for choice in [sensitivity.FLOAT, *choices]:
        cost = _cost(sensitivity.with_choices(config, dict.fromkeys(found, choice)))
        whole = {name: cost[name] for name in BUDGETS}
        of_layers = {layer.name: layer for layer in cost["layers"]}
        costs["all"][choice] = whole
        for name in found:
            own = {budget: getattr(of_layers[name], budget) for budget in BUDGETS}
            costs["layers"][name][choice] = own
    costs["float"] = costs["all"][sensitivity.FLOAT]
    return costs


def _assigned(config: ConfigDict, losses, costs, limit: float) -> dict[str, str]:
    budget = config.mixed.budget
    own = {
        name: {choice: costs["layers"][name][choice][budget] for choice in losses[name]}
        for name in losses
    }
    in_float = {name: of[sensitivity.FLOAT][budget] for name, of in costs["layers"].items()}
    others = costs["float"][budget] - sum(in_float.values())
    try:
        return assign(losses, own, limit - others)
    except UserError as error:
        least = others + sum(min(each.values()) for each in own.values())
        raise UserError(
            f"mixed.keep={config.mixed.keep} is below what is reachable: with the cheapest choice "
            f"everywhere {least / costs['float'][budget]:.4f} of {budget} stay"
        ) from error


def _built(config: ConfigDict, chosen: dict[str, str]) -> ConfigDict:
    """The config that trains what was chosen, from the weights in float."""
    config = sensitivity.with_choices(config, chosen)
    config.mixed = configs.defaults().mixed
    return experiment.without_idle_rules(config)
