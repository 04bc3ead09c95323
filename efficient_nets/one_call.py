"""One call that trains a net and gives its curves: `efficient_nets.run`."""

import dataclasses
import pathlib
import tempfile
from typing import Any

from ml_collections import ConfigDict

from efficient_nets import analysis, recipes
from efficient_nets import train as training
from efficient_nets.analysis.curves import Curves
from efficient_nets.errors import UserError


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run gave.

    Attributes:
      result: Scores of the last net, parameters, MACs and more, as result.json has them.
      curves: `{"accuracy": {"train": (steps, values), "validation": ..., "test": ...}, ...}`.
      workdir: Where checkpoints, plots and the layer table are.
    """

    result: dict[str, Any]
    curves: Curves
    workdir: pathlib.Path


def run(
    dataset: str = "mnist",
    model: str = "lenet",
    decomposition: str | None = None,
    *,
    iterations: float = 10.0,
    learning_rate: float = 0.05,
    dense_iterations: float = 0.0,
    workdir: str | pathlib.Path | None = None,
    changes: dict[str, Any] | None = None,
) -> Run:
    """Trains a net on a data set, with factorized kernels where a decomposition is given.

        run = efficient_nets.run("mnist", "lenet", "tucker:0.1", iterations=2)
        steps, accuracies = run.curves["accuracy"]["validation"]

    The recipe is `recipes.factorized`, that of `configs/factorized.py`, with a warm-up of half an
    epoch, or a tenth of the run if that is less.

    Args:
      dataset: Such as 'mnist', 'fashion_mnist', 'cifar10', 'cifar100', 'digits'.
      model: 'lenet' or 'vgg'.
      decomposition: A kernel such as 'cp:0.1' or 'tt:8', see `ops.factorization.spec`; no rank
        that depends on a kernel, as 'evbmf'. None: all kernels are dense.
      iterations: Epochs.
      learning_rate: Of SGD with momentum, at its peak.
      dense_iterations: Epochs for which the dense net is trained first, whose kernels are
        decomposed then; 0: from scratch.
      workdir: A new temporary folder if none is given. In that of an earlier run of the same
        arguments it goes on from there.
      changes: Other fields of the config by dotted name, as `{"train.batch_size": 64}`.

    Raises:
      UserError: on a value that cannot be, naming it.
    """
    if dense_iterations and not decomposition:
        raise UserError(f"dense_iterations={dense_iterations}: without a decomposition, give 0")
    config = recipes.factorized(decomposition or "dense", model, dataset, dense_iterations)
    config.train.epochs = float(iterations)
    config.optimizer.learning_rate = learning_rate
    if dense_iterations:
        config.pretrain.learning_rate = learning_rate
    config.schedule.warmup_epochs = min(config.schedule.warmup_epochs, 0.1 * iterations)
    for name, value in (changes or {}).items():
        section, _, field = name.rpartition(".")
        place = config.get(section) if section else config
        if not isinstance(place, ConfigDict) or field not in place:
            raise UserError(f"changes: the config has no field {name!r}")
        place[field] = value
    folder = pathlib.Path(workdir or tempfile.mkdtemp(prefix=f"{model}-"))
    result = training.train(config, folder)
    return Run(result, analysis.read_metrics(folder / "metrics.jsonl"), folder)
