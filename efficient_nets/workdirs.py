"""A run's folder: whose it is, and the files it ends up with.

config.json  summary.txt  summary.json  metrics.jsonl  tensorboard/  checkpoints/  plots/
result.json  (eval.json after --mode=eval)
"""

import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from flax import nnx
from ml_collections import ConfigDict

from efficient_nets import analysis, checkpoint, data, reporting
from efficient_nets import config as configs
from efficient_nets.errors import UserError
from efficient_nets.experiment import Experiment, TrainState

# A run has written one of these as soon as there is something to lose.
STARTED = ("metrics.jsonl", "builder.json")


def claim(workdir: pathlib.Path, config: ConfigDict) -> None:
    """Makes the folder and writes config.json, or checks that the run in it is this config's.

    Raises:
      UserError: if it holds another config's run (naming the fields), or cannot be written to.
    """
    path = workdir / "config.json"
    if path.exists() and any((workdir / name).exists() for name in STARTED):
        if differences := configs.differences(config, path.read_text()):
            raise UserError(
                f"workdir {workdir} holds a run of another config ({'; '.join(differences)}): "
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


def write_summary(workdir: pathlib.Path, model: nnx.Module, info: data.Info) -> dict[str, Any]:
    """Prints the layer table; writes it and summary.json. Returns what summary.json holds."""
    table = analysis.layer_table(model, info.image_shape)
    summary = analysis.summary_dict(model, info.image_shape)
    if jax.process_index() == 0:
        print(table, flush=True)
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
    shown = {k: v for k, v in result.items() if k.endswith("accuracy")}
    print("  ".join(f"{name} {100 * value:.2f}%" for name, value in shown.items()))
    print(f"result       {workdir / 'result.json'}")
    print(f"layer table  {workdir / 'summary.txt'}")
    print(
        f"metrics      {workdir / 'metrics.jsonl'}, tensorboard --logdir {workdir / 'tensorboard'}"
    )
    print(f"plots        {', '.join(map(str, plots))}")
    print(f"checkpoints  {workdir / 'checkpoints'}", flush=True)


def write_eval(workdir: pathlib.Path, result: dict[str, Any]) -> None:
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        reporting.write_json(workdir / "eval.json", result)
        print(f"result       {workdir / 'eval.json'}", flush=True)


def warm_start(run: Experiment, state: TrainState) -> TrainState:
    """The state with the weights of `config.checkpoint.init_from` where path and shape match."""
    like = {"params": state.params, "stats": state.stats}
    folder = checkpoints_of(pathlib.Path(run.config.checkpoint.init_from))
    found, left, step = checkpoint.restore_params(folder, like, partial=True)
    logging.info("Starts from step %d of %s.", step, folder)
    for path, reason in left.items():
        logging.warning("%s %s: it starts fresh", path, reason)
    ema = jax.tree.map(jnp.copy, found["params"]) if run.config.train.ema else {}
    return state._replace(params=found["params"], stats=found["stats"], ema=ema)


def restore_for_evaluation(run: Experiment, folder: pathlib.Path, which: str) -> TrainState:
    """What evaluation needs of a saved state: weights (averaged ones if kept) and statistics.

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
        best_metric=best_metric(run.dataset),
    )
    return run.abstract._replace(**found)


def best_metric(dataset: data.Dataset) -> str:
    """What is greatest at the best checkpoint: validation accuracy, or test where there is none."""
    return "validation/accuracy" if dataset.validation is not None else "test/accuracy"


def checkpoints_of(folder: pathlib.Path) -> pathlib.Path:
    inner = folder / "checkpoints"
    return inner if inner.is_dir() else folder
