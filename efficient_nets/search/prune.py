"""`--mode=prune`: a trained net's factorized kernels, cut to the ranks that they use.

It goes well with a lasso of the bonds (`kernel="tt:0.3,lasso=0.01"`), which makes indices that are
not needed come to nothing. The smaller net is left as a checkpoint, and as a config that starts
from it.
"""

import contextlib
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from efficient_nets import analysis, data, experiment, inspection, layers, pretraining, workdirs
from efficient_nets import config as configs
from efficient_nets.checkpoint import Checkpoints
from efficient_nets.errors import UserError
from efficient_nets.evaluation import evaluate_all, evaluators
from efficient_nets.experiment import Experiment, TrainState
from efficient_nets.layers import rules
from efficient_nets.ops import factorization
from efficient_nets.search import prune_report

FOLDER = "pruned"  # in the workdir, of the checkpoint


def build(
    config: ConfigDict, workdir: pathlib.Path, folder: pathlib.Path, which: str, threshold: float
) -> dict[str, Any]:
    """Prunes the net of a checkpoint, the averaged one if it is kept; writes what it found.

    Args:
      config: Of the run.
      workdir: Gets prune.json, prune.txt, plots/prune.png, built_config.py and the checkpoint.
      folder, which: The checkpoint, as of `workdirs.restore_for_evaluation`.
      threshold: As of `layers.prune`.

    Returns:
      What prune.json holds: of each factorized layer `kernel`, the sizes of its bonds `before` and
      `after`, `params_before` and `params_after` of its kernels, and `contributions` of each bond's
      indices, as shares of the largest, in descending order, the greatest of the branches; scores
      and costs of the net before and after.

    Raises:
      UserError: on another threshold, or a net without factorized kernels, or several processes.
    """
    if jax.process_count() > 1:
        raise UserError("--mode=prune runs in one process; its evaluation takes all devices there")
    dataset = data.load(config.data)
    run = experiment.build(config, dataset, training=False)
    abstract = nnx.merge(run.graph, *run.abstract[2:4])
    if not any(layer.branches[0].factored for _, layer in layers.layers(abstract)):
        raise UserError("layers: no kernel is factorized, so there is nothing to prune")
    state = workdirs.restore_for_evaluation(run, folder, which)
    net, step = inspection.restored_net(run, folder, which)
    smaller = layers.prune(net, threshold)
    built = _built(config, smaller, folder, workdir)
    after = experiment.build(built, dataset, training=False)
    pruned = _state(after, smaller)
    report = {
        "checkpoint": str(folder),
        "step": step,
        "threshold": threshold,
        "dataset": dataset.info.name,
        "layers": dict(_compared(net, smaller)),
        "before": evaluate_all(evaluators(run), state),
        "after": evaluate_all(evaluators(after), pruned),
    }
    for name, made in (("before", config), ("after", built)):
        model = experiment.abstract_model(made, dataset.info)
        cost = analysis.model_cost(model, dataset.info.image_shape)
        report[name + "_cost"] = {key: cost[key] for key in ("params", "macs", "packed_bytes")}
    saved = {"step": pruned.step, "params": pruned.params, "stats": pruned.stats}
    saved |= {"ema": pruned.ema} if pruned.ema else {}
    with contextlib.closing(Checkpoints(workdir / FOLDER, keep=1)) as checkpoints:
        checkpoints.save(0, saved, meta={}, metrics=report["after"])
    prune_report.write_config(built, report, workdir)
    prune_report.write(report, workdir)
    return report


def _compared(net: nnx.Module, smaller: nnx.Module):
    """What the report says of each factorized layer, by path."""
    made = dict(layers.layers(smaller))
    for path, layer in layers.layers(net):
        if not layer.branches[0].factored:
            continue
        kernels = [branch.value() for branch in layer.branches]
        before, after = kernels[0].network, made[path].branches[0].kernel.network
        shares = {bond: _shares(kernels, bond) for bond in before.bonds}
        yield (
            path,
            {
                "kernel": str(made[path].spec.kernel),
                "before": {bond: before.size(bond) for bond in before.bonds},
                "after": {bond: after.size(bond) for bond in after.bonds},
                "params_before": len(kernels) * before.params,
                "params_after": len(kernels) * after.params,
                "contributions": shares,
            },
        )


def _shares(kernels: list[factorization.Factored], bond: str) -> list[float]:
    found = []
    for kernel in kernels:
        own = np.sort(factorization.contributions(kernel.network, kernel.cores, bond))[::-1]
        found.append(own / own[0] if own[0] > 0 else own)
    return np.max(found, axis=0).tolist()


def _built(
    config: ConfigDict, smaller: nnx.Module, folder: pathlib.Path, workdir: pathlib.Path
) -> ConfigDict:
    """The config with these ranks, which starts from the pruned net, its ranges included."""
    every = dict(layers.layers(smaller))
    fields = {
        path: {"kernel": str(layer.spec.kernel), "start": "own"}
        for path, layer in every.items()
        if layer.branches[0].factored
    }
    built, defaults = config.copy_and_resolve_references(), configs.defaults()
    built.layers = rules.with_fields(built.layers, fields, list(every))
    if built.teacher.checkpoint == configs.PRETRAINED:
        built.teacher.checkpoint = str(folder / pretraining.FOLDER)
    built.pretrain = defaults.pretrain
    if any(True for _ in layers.ranges(smaller)):
        built.calibration.batch_size = 0
    built.checkpoint.convert_from, built.checkpoint.init_from = "", str(workdir / FOLDER)
    return built


def _state(run: Experiment, net: nnx.Module) -> TrainState:
    """Of a net on the host, before its first step, without an optimizer's."""
    _, *states = nnx.split(net, nnx.Param, ...)
    places = jax.tree.map(lambda x: x.sharding, (run.abstract.params, run.abstract.stats))
    params, stats = jax.device_put(tuple(map(nnx.to_pure_dict, states)), places)
    step = jax.device_put(jnp.zeros((), jnp.int32), run.abstract.step.sharding)
    ema = experiment.average_from(run.config, params, stats)
    return run.abstract._replace(step=step, params=params, stats=stats, ema=ema)
