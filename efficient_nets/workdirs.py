"""A run's folder: whose it is, and the files it ends up with.

config.json  summary.txt  summary.json  metrics.jsonl  tensorboard/  checkpoints/  plots/
result.json  (eval.json after --mode=eval; analysis.json, analysis_maps.npz, plots/analysis/,
tensorboard/analysis/ after --mode=analyze; net.safetensors, deploy.json after --mode=deploy;
prune.json, prune.txt, plots/prune.png, built_config.py, pruned/ after --mode=prune;
predictions/, predictions.json after --mode=predict; histograms/ if
log.histograms_every_epochs; search.txt, plots/search.png, plots/cells.png, built_config.py after
a search by config.search)
"""

import os
import pathlib
import re
from typing import Any

import jax
from absl import logging
from flax import nnx
from ml_collections import ConfigDict

from efficient_nets import (
    analysis,
    checkpoint,
    data,
    experiment,
    paths,
    reporting,
    sharding,
    tasks,
)
from efficient_nets import config as configs
from efficient_nets.errors import UserError
from efficient_nets.experiment import Experiment, TrainState


def default(config_file: str) -> str:
    """`runs/qresnet-cifar100` of `configs/qresnet.py:cifar100`: no two arguments share a folder."""
    file, _, argument = config_file.partition(":")
    name = pathlib.Path(file).stem + (f"-{argument}" if argument else "")
    return "runs/" + re.sub(r"[^\w.=-]", "_", name)


# What a workdir may hold beside checkpoints that another config must not overwrite.
BACKBONE = "backbone"  # the part of a net that a classifier's weights fit
FINISHED = ("result.json", "builder.json", "sensitivity.json", "winas.json")


def claim(workdir: pathlib.Path, config: ConfigDict) -> None:
    """Makes the folder and writes config.json, or checks that the run in it is this config's.

    An attempt that left neither a checkpoint nor a result is no run yet: another config may follow.

    Raises:
      UserError: if it holds another config's run (naming the fields), or cannot be written to.
    """
    path = workdir / "config.json"
    taken = checkpoint.Checkpoints(workdir / "checkpoints", create=False).steps()
    taken = taken or any((workdir / name).exists() for name in FINISHED)
    if taken and (found := _differences(workdir, config)):
        raise UserError(
            f"workdir {workdir} holds a run of another config ({'; '.join(found)}): "
            "give another --workdir, or the same config"
        )
    if jax.process_index() > 0:
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        temporary = workdir / f"config.{os.getpid()}.tmp"
        temporary.write_text(configs.to_json(config))
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"workdir {workdir} cannot be written to: {error}") from error


def _differences(workdir: pathlib.Path, config: ConfigDict) -> list[str]:
    path = workdir / "config.json"
    return configs.differences(config, path.read_text()) if path.exists() else []


def write_summary(
    workdir: pathlib.Path, config: ConfigDict, model: nnx.Module, info: data.Info
) -> dict[str, Any]:
    """Prints the layer table; writes it and summary.json, but not over those of another config.

    Returns:
      What summary.json holds.
    """
    table = analysis.layer_table(model, info.image_shape)
    summary = analysis.summary_dict(model, info.image_shape)
    if jax.process_index() == 0:
        print(table, flush=True)
        if _differences(workdir, config):
            print(f"not written to {workdir}: it is another config's; --workdir gives another")
            return summary
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / "summary.txt").write_text(table + "\n")
        reporting.write_json(workdir / "summary.json", summary)
    return summary


def write_result(workdir: pathlib.Path, result: dict[str, Any]) -> None:
    """result.json and the curves, and where everything is."""
    if jax.process_index() > 0:
        return
    reporting.write_json(workdir / "result.json", result)
    plots = analysis.plot_curves(workdir / "metrics.jsonl", workdir / "plots")
    plots += analysis.plot_history(workdir)
    scores = {k: v for k, v in result.items() if "/" in k and not k.endswith("loss")}
    print(reporting.scores_line(scores))
    print(f"result       {workdir / 'result.json'}")
    print(f"layer table  {workdir / 'summary.txt'}")
    board = workdir / "tensorboard"
    shown = f", tensorboard --logdir {board}" if board.is_dir() else ""
    print(f"metrics      {workdir / 'metrics.jsonl'}{shown}")
    print(f"plots        {', '.join(map(str, plots))}")
    print(f"checkpoints  {workdir / 'checkpoints'}", flush=True)


def write_eval(workdir: pathlib.Path, result: dict[str, Any]) -> None:
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        reporting.write_json(workdir / "eval.json", result)
        print(f"result       {workdir / 'eval.json'}", flush=True)


def warm_start(run: Experiment, state: TrainState, folder: pathlib.Path) -> TrainState:
    """The state with the net of another run, in that folder, where path and shape match.

    Where that run kept an average, it is the averaged net, whose accuracy the run reported.
    """
    net = {"params": state.params, "stats": state.stats}
    if _is_of_a_backbone(run, folder):
        inner = {name: tree[BACKBONE] for name, tree in net.items()}
        inner, left = restore_net(folder, inner)
        left = {f"{BACKBONE}/{path}": reason for path, reason in left.items()}
        net = {name: net[name] | {BACKBONE: tree} for name, tree in inner.items()}
    else:
        net, left = restore_net(folder, net)
    # As of a net in float and direct, whose start every rounded or tiled net takes.
    own = [path for path in left if "/ranges/" in path or "/transforms/" in path]
    own += [path for path in left if path.endswith(("/kernel/seed", "/kernel/calls"))]  # of dropout
    if own:
        logging.info("%d arrays of quantizers and the like are not there: fresh.", len(own))
    for path in sorted(left.keys() - set(own)):
        logging.warning("%s %s: it starts fresh", path, left[path])
    return state._replace(**net, ema=experiment.average_from(run.config, **net))


def _is_of_a_backbone(run: Experiment, folder: pathlib.Path) -> bool:
    """Whether the folder holds a classifier, and this run's net has one as its backbone."""
    path = checkpoints_of(folder).parent / "config.json"
    if BACKBONE not in run.abstract.params or not path.is_file():
        return False
    return configs.from_json(path.read_text()).task == "classification"


def restore_net(folder: pathlib.Path, net: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The newest net of another run, averaged if that run kept an average.

    Args:
      folder: A workdir, or the checkpoints folder in one.
      net: `{"params": ..., "stats": ...}`, leaves as `checkpoint.restore_params` takes them.

    Returns:
      The net, and `{path: reason}` of the leaves that do not fit and stay as they are in `net`.
    """
    folder = checkpoints_of(folder)
    found, left, step = checkpoint.restore_params(folder, net | {"ema": net}, partial=True)
    averaged = any(path not in left for path in paths.named_leaves({"ema": net}))
    logging.info("Starts from step %d of %s.", step, folder)
    net = found["ema"] if averaged else {name: found[name] for name in net}
    left = {
        path.removeprefix("ema/"): reason
        for path, reason in left.items()
        if path.startswith("ema/") == averaged
    }
    return net, left


def read_config(field: str, folder: pathlib.Path) -> ConfigDict:
    """The config of another run.

    Raises:
      UserError: if the folder, the value of that field, is no workdir.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{field}={folder}: it is no workdir, it has no config.json")
    config = configs.from_json(path.read_text())
    configs.check(config)
    return config


def trained_net(
    field: str, folder: pathlib.Path, config: ConfigDict, run: Experiment
) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """Another run's net for this run's data, as that run's config builds it, on all devices.

    Returns:
      The graph, and `{"params": ..., "stats": ...}`, see `restore_net`.

    Raises:
      UserError: if the folder, the value of that field, holds another net.
    """
    model = experiment.abstract_model(config, run.dataset.info)
    graph, params, stats = nnx.split(model, nnx.Param, ...)
    everywhere = sharding.replicated(run.mesh)
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere),
        {"params": nnx.to_pure_dict(params), "stats": nnx.to_pure_dict(stats)},
    )
    net, left = restore_net(folder, like)
    if left:
        few = "; ".join(f"{path} {reason}" for path, reason in list(left.items())[:5])
        raise UserError(f"{field}={folder} holds another net ({len(left)} leaves): {few}")
    return graph, net


def restore_for_evaluation(run: Experiment, folder: pathlib.Path, which: str) -> TrainState:
    """What evaluation needs of a saved state: the net, and the averaged one if it is kept.

    Args:
      folder: A workdir, or the checkpoints folder in one.
      which: 'newest', 'best' or a step.
    """
    like = {"params": run.abstract.params, "stats": run.abstract.stats, "step": run.abstract.step}
    if run.config.train.ema:
        like["ema"] = run.abstract.ema
    found, _, _ = checkpoint.restore_params(
        checkpoints_of(folder),
        like,
        int(which) if which.isdigit() else which,
        best_metric=best_metric(run),
        best_mode=run.task.best_mode,
    )
    return run.abstract._replace(**found)


def restored_net(
    config: ConfigDict, info: data.Info, folder: pathlib.Path, which: str
) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """A saved net, for use on one device: its graph, and `{"params": ..., "stats": ...}`.

    The averaged one, if it is kept. The data set need not be there.

    Args:
      config: Of the run.
      info: Of its data.
      folder: A workdir, or the checkpoints folder in one.
      which: 'newest', 'best' or a step.
    """
    graph, params, stats = nnx.split(experiment.abstract_model(config, info), nnx.Param, ...)
    net = {"params": nnx.to_pure_dict(params), "stats": nnx.to_pure_dict(stats)}
    task = tasks.create(config)
    split = "validation" if config.data.validation else "test"
    found, _, _ = checkpoint.restore_params(
        checkpoints_of(folder),
        {"ema": net} if config.train.ema else net,
        int(which) if which.isdigit() else which,
        best_metric=f"{split}/{task.best_metric}",
        best_mode=task.best_mode,
    )
    return graph, found["ema"] if config.train.ema else found


def best_metric(run: Experiment) -> str:
    """What picks the best checkpoint: the task's metric of validation, or test where there is none.

    As 'validation/accuracy'; whether it is greatest or least there says `run.task.best_mode`.
    """
    split = "validation" if run.dataset.validation is not None else "test"
    return f"{split}/{run.task.best_metric}"


def checkpoints_of(folder: pathlib.Path) -> pathlib.Path:
    inner = folder / "checkpoints"
    return inner if inner.is_dir() else folder
