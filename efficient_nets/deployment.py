"""`--mode=deploy`: a trained net in whole numbers, as one file, and what that takes and saves.

A checkpoint of a run that was trained rounded is taken as it is, and its norms fold into the scales
of its whole numbers. Without one, the net of `config.checkpoint.convert_from` is rounded after
training: its norms fold first, so that ranges are of the folded kernels, then come ranges from
training images (`config.calibration`) and bias correction (`config.deploy`).
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from ml_collections import ConfigDict

from efficient_nets import (
    analysis,
    calibration,
    conversion,
    data,
    deploy,
    experiment,
    inspection,
    layers,
    pretraining,
    reporting,
    sharding,
    workdirs,
)
from efficient_nets import config as configs
from efficient_nets.checkpoint import Checkpoints
from efficient_nets.deploy.affine import add_biases, no_shifting
from efficient_nets.deploy.packed import check_settled
from efficient_nets.errors import UserError
from efficient_nets.evaluation import evaluate_all, evaluators, put_resident
from efficient_nets.experiment import Experiment, TrainState
from efficient_nets.ops.precision import FLOAT

FILE, RECORD = "net.safetensors", "deploy.json"


class Way(NamedTuple):
    """What was done to a net, of all that decides which arrays it has.

    fold: Its norms 'before' rounding, 'after' it, or 'not'.
    corrected: Whether its biases were corrected.
    """

    fold: str
    corrected: bool


class Deployed(NamedTuple):
    """The rounded net, the same in whole numbers, how they came about, `{norm left: why}`."""

    rounded: nnx.Module
    whole: nnx.Module
    way: Way
    left: dict[str, str]


def make_deployable(
    config: ConfigDict, workdir: pathlib.Path, folder: pathlib.Path, which: str
) -> dict[str, Any]:
    """Writes net.safetensors and deploy.json, and prints a table.

    All splits are evaluated three times: the net it came from (where there is one), the rounded
    net, and the net of whole numbers; the file is read again and must give the same outputs.

    Args:
      config: The run's config, whose layers are rounded.
      workdir: Where the files go.
      folder: Where a checkpoint may be: a run's workdir, or the checkpoints folder in one. If it is
        `workdir` and holds none, the net of `config.checkpoint.convert_from` is rounded.
      which: 'newest', 'best' or a step.

    Returns:
      What deploy.json holds.

    Raises:
      UserError: if nothing is rounded, there is neither checkpoint nor `convert_from`, the schedule
        of a quantizer is not over, or an option does not go with what is done.
    """
    if jax.process_count() > 1:
        raise UserError("--mode=deploy runs in one process; its evaluation takes all devices there")
    configs.check(config)
    run = experiment.build(config, data.load(config.data), training=False)
    abstract = nnx.merge(run.graph, *run.abstract[2:4])
    if not any(True for _ in layers.ranges(abstract)):
        raise UserError("--mode=deploy: config.layers rounds nothing, give a precision in a rule")
    saved = Checkpoints(workdirs.checkpoints_of(folder), create=False).steps()
    if saved or folder != workdir or which != "newest":
        made = _trained(run, folder, which)
    elif config.checkpoint.convert_from:
        made = _after_training(run)
    else:
        raise UserError(
            f"--mode=deploy: {folder} holds no checkpoint, and checkpoint.convert_from='' names no "
            "trained net to round: give one of the two"
        )
    workdir.mkdir(parents=True, exist_ok=True)
    size = deploy.save(made.whole, workdir / FILE)
    result = _measured(run, folder, made, abstract) | {"file_bytes": size}
    reporting.write_json(workdir / RECORD, result)
    _check_file(run, made.whole, workdir)
    _print(result, workdir)
    return result


def load(config: ConfigDict, folder: pathlib.Path | str) -> nnx.Module:
    """The net that `--mode=deploy` left in a folder, in evaluation mode.

    Args:
      config: The config of that command.
      folder: Its workdir.

    Raises:
      UserError: if there is none, or it is of another net.
    """
    folder = pathlib.Path(folder)
    if not (folder / RECORD).is_file():
        raise UserError(f"{folder} holds no {RECORD}: --mode=deploy writes it")
    record = json.loads((folder / RECORD).read_text())
    info = data.describe(config.data)

    def template():
        net = experiment.build_model(config, info, jax.random.key(config.seed))
        if record["fold"] == "before":
            plain, _ = deploy.fold_norms(unrounded(net), info.image_shape)
            net = rounded_as(plain, net)
        if record["corrected"]:
            for _, layer in layers.layers(net):
                if not no_shifting(layer):
                    add_biases(layer)
        net = deploy.to_integers(net, settle=True)
        return deploy.fold_norms(net, info.image_shape)[0] if record["fold"] == "after" else net

    return deploy.load(nnx.eval_shape(template), folder / FILE)


def unrounded(net: nnx.Module) -> nnx.Module:
    """A copy of a net with the same weights, in which nothing is rounded."""
    net = nnx.merge(*nnx.split(net))
    for _, layer in layers.layers(net):
        layer.spec = dataclasses.replace(layer.spec, precision=FLOAT)
        layer.ranges = nnx.data(None)
    return net


def rounded_as(plain: nnx.Module, net: nnx.Module) -> nnx.Module:
    """A copy of the plain net with the quantizers of another one, their ranges as they begin."""
    plain, rngs = nnx.merge(*nnx.split(plain)), nnx.Rngs(0)
    precisions = {path: layer.spec.precision for path, layer in layers.layers(net)}
    for path, layer in layers.layers(plain):
        spec = dataclasses.replace(layer.spec, precision=precisions[path], start="own")
        layer.respecify(spec, rngs)
    return plain


def _at_once(function: Callable[[nnx.Module], nnx.Module], net: nnx.Module) -> nnx.Module:
    """`function(net)` as one program: by itself each operation of a new shape would be one."""
    graph, state = nnx.split(net)
    made = []

    def run(state):
        made[:] = nnx.split(function(nnx.merge(graph, state)))
        return made[1]

    state = jax.jit(run, compiler_options=experiment.run_once())(state)
    return nnx.merge(made[0], state)


def _trained(run: Experiment, folder: pathlib.Path, which: str) -> Deployed:
    if run.config.deploy.bias_correction:
        raise UserError(
            f"deploy.bias_correction={run.config.deploy.bias_correction}: {folder} holds a net that"
            " was trained rounded, whose biases are right; give 0"
        )
    net, _ = inspection.restored_net(run, folder, which)
    return _in_whole_numbers(run, _on_one_device(net))


def _after_training(run: Experiment) -> Deployed:
    config = run.config
    if not config.calibration.batch_size:
        raise UserError(
            "calibration.batch_size=0: rounding after training takes ranges from images"
        )
    state = conversion.converted_start(run, run.abstract)  # of which only the net is looked at
    if config.calibration.norm_batches:
        if config.deploy.bias_correction:
            raise UserError(
                "calibration.norm_batches and deploy.bias_correction undo the same shift of means: "
                "give one of the two"
            )
        return _in_whole_numbers(run, _net_of(run, calibrated(run, state)))
    net = _net_of(run, state)
    plain, left = unrounded(net), {}
    if config.deploy.fold:
        plain, left = deploy.fold_norms(plain, run.dataset.info.image_shape)
    fresh = _at_once(functools.partial(rounded_as, net=net), plain)
    run, state = _with_net(run, fresh)
    rounded = _net_of(run, calibrated(run, state))
    check_settled(rounded)
    if images := config.deploy.bias_correction:
        batch = data.gather(put_resident(run, "train"), calibration.training_batch(run, images))
        images = data.normalise(batch["image"], run.dataset.info)
        rounded, stay = deploy.correct_biases(rounded, plain, images)
        for path, reason in stay.items():
            logging.warning("%s: its bias is not corrected, %s", path, reason)
    way = Way("before" if config.deploy.fold else "not", bool(config.deploy.bias_correction))
    return Deployed(rounded, deploy.to_integers(rounded), way, left)


def calibrated(run: Experiment, state: TrainState) -> TrainState:
    return calibration.calibrated_start(run, state, trained=True)


def _in_whole_numbers(run: Experiment, net: nnx.Module) -> Deployed:
    check_settled(net)
    whole, left = deploy.to_integers(net), {}
    if run.config.deploy.fold:
        whole, left = deploy.fold_norms(whole, run.dataset.info.image_shape)
    return Deployed(net, whole, Way("after" if run.config.deploy.fold else "not", False), left)


def _net_of(run: Experiment, state: TrainState) -> nnx.Module:
    """The state's net, on one device."""
    return _on_one_device(nnx.merge(run.graph, state.params, state.stats))


def _on_one_device(net: nnx.Module) -> nnx.Module:
    graph, state = nnx.split(net)
    return nnx.merge(graph, jax.tree.map(jnp.asarray, jax.device_get(state)))


def _with_net(run: Experiment, net: nnx.Module) -> tuple[Experiment, TrainState]:
    """The run with another net, on every device."""
    graph, params, stats = nnx.split(net, nnx.Param, ...)
    found = jax.device_get({"params": nnx.to_pure_dict(params), "stats": nnx.to_pure_dict(stats)})
    found = sharding.put_replicated(found, run.mesh)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), found
    )
    state = run.abstract._replace(**found, ema={})
    return dataclasses.replace(run, graph=graph, abstract=state._replace(**shapes)), state


def _scores(run: Experiment, net: nnx.Module) -> dict[str, float]:
    run, state = _with_net(run, net)
    return evaluate_all(evaluators(run), state)


def _source_scores(run: Experiment, folder: pathlib.Path) -> dict[str, Any]:
    """Scores of the net that the run in a folder started from, and where it is; none if gone."""
    start = run.config.checkpoint
    sources = {
        "checkpoint.convert_from": start.convert_from,
        "checkpoint.init_from": start.init_from,
    }
    if run.config.pretrain.epochs:
        workdir = folder.parent if folder.name == "checkpoints" else folder
        sources["pretrain.epochs"] = str(workdir / pretraining.FOLDER)
    for field, given in sources.items():
        folder = pathlib.Path(given)
        if not given:
            continue
        try:
            source = workdirs.read_config(field, folder)
            graph, found = conversion.source_net(field, folder, source, run)
        except UserError as error:
            logging.warning("The net that this one came from is not evaluated: %s", error)
            continue
        state = run.abstract._replace(**found, ema={})
        scores = evaluate_all(evaluators(dataclasses.replace(run, graph=graph)), state)
        return {"source": str(folder), "scores": scores}
    return {}


def _measured(
    run: Experiment, folder: pathlib.Path, made: Deployed, abstract: nnx.Module
) -> dict[str, Any]:
    source = _source_scores(run, folder)
    scores = {"float": source["scores"]} if source else {}
    scores |= {"rounded": _scores(run, made.rounded), "integer": _scores(run, made.whole)}
    first = next(iter(scores))
    drops = {
        net: {
            name: scores[first][name] - value
            for name, value in found.items()
            if name.endswith("/accuracy")
        }
        for net, found in scores.items()
        if net != first
    }
    shape = run.dataset.info.image_shape
    cost = analysis.model_cost(abstract, shape)
    return made.way._asdict() | {
        "source": source.get("source", ""),
        "scores": scores,
        "drops": drops,
        "packed_bytes": cost["packed_bytes"],
        "float_bytes": analysis.model_cost(unrounded(abstract), shape)["bytes"],
        "bops": cost["bops"],
        "macs": cost["macs"],
        "norms_left": made.left,
    }


def _check_file(run: Experiment, whole: nnx.Module, workdir: pathlib.Path) -> None:
    images, _ = inspection.first_batch(run)
    expected, found = (
        jax.jit(lambda images, net=net: net(images))(images)
        for net in (whole, load(run.config, workdir))
    )
    if not np.array_equal(expected, found):
        raise RuntimeError(f"{workdir / FILE} does not give what was written: a defect, tell us")


def _print(result: dict[str, Any], workdir: pathlib.Path) -> None:
    names = {
        "float": f"float, {result['source']}",
        "rounded": "rounded" + (", biases corrected" if result["corrected"] else ""),
        "integer": "whole numbers",
    }
    width = max(len(names[net]) for net in result["scores"])
    for net, scores in result["scores"].items():
        drops = result["drops"].get(net, {})
        shown = [
            f"{name} {100 * value:.2f}%"
            + (f" ({-100 * drops[name]:+.2f})" if name in drops else "")
            for name, value in scores.items()
            if name.endswith("/accuracy")
        ]
        print(f"{names[net]:{width}}  {'  '.join(shown)}")
    folded = {"before": "before rounding", "after": "into scales", "not": "not"}[result["fold"]]
    stay = f"; {len(result['norms_left'])} stay, see deploy.json" if result["norms_left"] else ""
    print(f"norms folded {folded}{stay}; {result['bops']:,} bit operations")
    print(
        f"file         {workdir / FILE}, {result['file_bytes']:,} bytes; layer table: "
        f"{result['packed_bytes']:,}, in float {result['float_bytes']:,}"
    )
    print(f"result       {workdir / RECORD}", flush=True)
