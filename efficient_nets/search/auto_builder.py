"""The auto-builder of QuadraLib (arXiv 2204.01701), as a whole loop, from a config to a config.

    round 0    train the net of the config, whose rules make its layers quadratic
    round k    score every layer that may go by RI (`importance`) on the validation split; remove
               the one that ranks first; fine-tune from the weights of round k - 1

until the net is within `builder.keep` of the first one's parameters, MACs or measured time, or its
validation accuracy falls below `builder.accuracy_floor`: then the round before is the answer. To
remove a layer is a rule of `config.layers`, so every round is an ordinary run, in `round_<k>/`. The
test split is looked at for the report alone.

builder.json holds what is done. It is written whole after each round and each scoring, so the same
command goes on where a killed one was; inside a round the run does, from its checkpoints.
"""

import functools
import itertools
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from efficient_nets import config as configs
from efficient_nets import data, evaluation, experiment, names, reporting, workdirs
from efficient_nets.errors import TrainingDiverged, UserError
from efficient_nets.search import builder_report, config_file, importance, reduction

BUDGETS = {
    "params": "parameters of the net",
    "macs": "multiply-accumulates of one image",
    "seconds": "measured time of one batch of config.evaluate.batch_size, forward",
}
PROGRESS = "builder.json"
Train = Callable[[ConfigDict, pathlib.Path], dict[str, Any]]


def build(config: ConfigDict, workdir: pathlib.Path, train: Train) -> dict[str, Any]:
    """Runs the loop to its end, or goes on with it, and writes the report and built_config.py.

    Args:
      config: With `config.builder.budget` set.
      workdir: Holds builder.json, round_0/, round_1/, ... and at the end report.json, report.txt,
        plots/auto_builder.png and built_config.py.
      train: `train(config, workdir)` trains or resumes a run and returns its results.

    Returns:
      What report.json holds.

    Raises:
      UserError: on a config that does not fit, a budget that no removal reaches, or a first net
        below the accuracy floor.
      TrainingDiverged: if the first net does; a later round that does ends the loop.
    """
    configs.check(config)
    _check(config)
    candidates = reduction.candidates(config)
    progress = _read(workdir) or dict(budget=_budget(config, candidates), rounds=[])
    workdirs.claim(workdir, config)
    _save(workdir, progress)

    budget, rounds, removed, chosen = progress["budget"], progress["rounds"], [], []
    if budget["kind"] == "seconds" and budget["batch_size"] != config.evaluate.batch_size:
        raise UserError(
            f"evaluate.batch_size={config.evaluate.batch_size}: the budget was measured on batches "
            f"of {budget['batch_size']}"
        )
    for number in itertools.count():
        removed += chosen
        net = _Round(config, workdir, number, removed)
        if number == len(rounds):
            try:
                result = train(net.config, net.folder)
            except TrainingDiverged as error:
                if not number:
                    raise
                _print(f"Round {number} diverged ({error}): round {number - 1} is the answer.")
                stopped = "diverged"
                break
            rounds.append(_record(net, chosen, result))
            _save(workdir, progress)
        left = [layer for layer in candidates if layer not in removed]
        if stopped := _stopped(config, budget, rounds[number], left):
            break
        if "scores" not in rounds[number]:
            rounds[number]["scores"] = net.scores(left)
            _save(workdir, progress)
        chosen = _choice(config, budget, removed, rounds[number]["scores"])
        _print(f"After round {number} it removes {', '.join(chosen)}.")
    return _finish(config, workdir, progress, stopped)


class _Round:
    """The net of one round, and, once it is trained, its weights."""

    def __init__(self, config: ConfigDict, workdir: pathlib.Path, number: int, removed: list[str]):
        previous = str(workdir / f"round_{number - 1}") if number else ""
        self.number, self.folder = number, workdir / f"round_{number}"
        self.config = reduction.of_round(config, removed, previous)
        self._builder = config.builder

    @functools.cached_property
    def _trained(self):
        run = experiment.build(self.config, data.load(self.config.data))
        state = workdirs.restore_for_evaluation(run, self.folder, "newest")
        return run, state, evaluation.Evaluator(run, "validation")

    def forward_seconds(self) -> float:
        _, state, evaluator = self._trained
        return _seconds(evaluator, state)

    def scores(self, candidates: list[str]) -> list[dict[str, Any]]:
        run, state, evaluator = self._trained
        return importance.score(
            evaluator,
            state,
            reduction.cost(self.config),
            candidates,
            samples=len(run.dataset.validation),
            fraction=self._builder.mask_fraction,
            masks=self._builder.mask_seeds,
            seed=self.config.seed,
        )


def _check(config: ConfigDict) -> None:
    builder = config.builder
    names.pick("builder.budget", builder.budget, BUDGETS)
    for field, lowest, highest in (("keep", 0, 1), ("mask_fraction", 0, 1)):
        if not lowest < builder[field] <= highest:
            raise UserError(f"builder.{field}={builder[field]}: allowed above 0, up to 1")
    for field in ("layers_per_round", "mask_seeds", "finetune_epochs", "finetune_rate"):
        if not builder[field] > 0:
            raise UserError(f"builder.{field}={builder[field]}: must be above 0")
    if not 0 <= builder.accuracy_floor <= 1:
        raise UserError(f"builder.accuracy_floor={builder.accuracy_floor}: allowed 0 to 1")
    if not config.data.validation:
        raise UserError(
            "data.validation='': the auto-builder scores layers on held-out images; give a split "
            "that is not trained on, as data.train='train[:90%]', data.validation='train[90%:]'"
        )


def _budget(config: ConfigDict, candidates: list[str]) -> dict[str, Any]:
    """What the first net costs, what may stay, and the least that removals leave."""
    kind, keep = config.builder.budget, config.builder.keep
    first, least = (
        _measured(reduction.reduced(config, removed), kind) for removed in ((), candidates)
    )
    if least > keep * first:
        stay = f"{builder_report.amount(least)} of {builder_report.amount(first)}"
        stay += f" {builder_report.UNITS[kind]}"
        raise UserError(
            f"builder.keep={keep} is below what is reachable: with all {len(candidates)} "
            f"candidates removed {stay} stay, so keep must be at least "
            f"{math.ceil(1e4 * least / first) / 1e4:g}"
        )
    return dict(
        **dict(kind=kind, keep=keep, first=first, limit=keep * first, least=least),
        batch_size=config.evaluate.batch_size,
    )


def _measured(config: ConfigDict, kind: str) -> float:
    if kind != "seconds":
        return reduction.cost(config)[kind]
    run = experiment.build(config, data.load(config.data))
    return _seconds(evaluation.Evaluator(run, "validation"), run.initial_state())


def _seconds(evaluator: evaluation.Evaluator, state: experiment.TrainState) -> float:
    """Process 0's, so that all decide alike."""
    return float(multihost_utils.broadcast_one_to_all(np.float32(evaluator.seconds(state))))


def _record(net: _Round, removed: list[str], result: dict[str, Any]) -> dict[str, Any]:
    """What builder.json keeps of a round; `seconds` is the forward pass, as the budget means it."""
    kept = ("params", "macs", "validation/accuracy", "test/accuracy", "params_digest")
    return dict(
        round=net.number,
        removed=list(removed),
        **{name: result[name] for name in kept if name in result},
        seconds=net.forward_seconds(),
        train_seconds=result["seconds"],
    )


def _stopped(config: ConfigDict, budget: dict, record: dict, left: list[str]) -> str:
    """Why this round is the last one, or an empty string."""
    floor, accuracy = config.builder.accuracy_floor, record["validation/accuracy"]
    if accuracy < floor and not record["round"]:
        raise UserError(
            f"builder.accuracy_floor={floor}: the first net, before any removal, has a validation "
            f"accuracy of {accuracy:.4f}; lower the floor, or train that net better"
        )
    if accuracy < floor:
        return "floor"
    if record[budget["kind"]] <= budget["limit"]:
        return "budget"
    return "" if left else "candidates"


def _choice(config: ConfigDict, budget: dict, removed: list[str], scores: list[dict]) -> list[str]:
    """The layers of highest RI, no more than the budget needs."""
    ranked = sorted(scores, key=lambda score: -score["ri"])  # stable: ties in the order of calls
    chosen = []
    for score in ranked[: config.builder.layers_per_round]:
        chosen.append(score["layer"])
        kind = budget["kind"]
        if kind == "seconds" or len(chosen) == config.builder.layers_per_round:
            continue
        if reduction.cost(reduction.reduced(config, removed + chosen))[kind] <= budget["limit"]:
            break
    return chosen


def _finish(config: ConfigDict, workdir: pathlib.Path, progress: dict, stopped: str) -> dict:
    rounds = progress["rounds"]
    answer = len(rounds) - (2 if stopped == "floor" else 1)
    removed = [layer for record in rounds[: answer + 1] for layer in record["removed"]]
    report = dict(
        builder=config.builder.to_dict(),
        budget=progress["budget"],
        stopped=stopped,
        answer=answer,
        removed=removed,
        rounds=rounds,
    )
    if jax.process_index() == 0:
        built = workdir / "built_config.py"
        text = builder_report.docstring(report, workdir)
        built.write_text(config_file.source(reduction.built(config, removed), text))
        builder_report.write(report, workdir)
    return report


def _read(workdir: pathlib.Path) -> dict[str, Any] | None:
    path = workdir / PROGRESS
    return json.loads(path.read_text()) if path.exists() else None


def _save(workdir: pathlib.Path, progress: dict[str, Any]) -> None:
    if jax.process_index() == 0:
        reporting.write_json(workdir / PROGRESS, progress)


def _print(line: str) -> None:
    if jax.process_index() == 0:
        print(line, flush=True)
