"""`--mode=analyze`: a checkpoint of a run, looked into with one batch of held-out images."""

import contextlib
import pathlib

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from ml_collections import ConfigDict

from efficient_nets import analysis, data, experiment, sharding, workdirs
from efficient_nets.errors import UserError
from efficient_nets.experiment import Experiment

IMAGES = 64  # looked at, at most


def inspect(
    config: ConfigDict, workdir: pathlib.Path, folder: pathlib.Path, which: str, reference: str = ""
) -> None:
    """Writes numbers, maps, plots/analysis/ and tensorboard/analysis/, and prints a table.

    On one device, whatever the run's devices: it holds all that the layers read and give for one
    batch, of `first_batch`.

    Args:
      config: Of the run.
      workdir: Where the files go.
      folder: The run's workdir, or the checkpoints folder in one.
      which: 'newest', 'best' or a step.
      reference: A workdir that was analysed before, to show beside this one, or "".

    Raises:
      UserError: if there is no such checkpoint, no held-out split, nothing in `reference`, or
        no layer of the same name there.
    """
    beside = analysis.read_reference(pathlib.Path(reference)) if reference else None
    run = experiment.build(config, data.load(config.data), training=False)
    net, step = restored_net(run, folder, which)
    if jax.process_index() > 0:
        return
    images, labels = first_batch(run)
    found = analysis.analyze(net, images, labels, run.task.label_loss)
    if beside and not beside.maps.keys() & {layer.name for layer in found.layers}:
        raise UserError(
            f"--reference={reference} shares no layer's name with the net of {folder}, as "
            f"{next(iter(beside.maps))!r} is none of {', '.join(x.name for x in found.layers)}"
        )
    pictures = analysis.write_analysis(found, workdir, step, beside)
    print(analysis.analysis_table(found))
    print(f"result       {workdir / 'analysis.json'}")
    print(f"plots        {', '.join(map(str, pictures))}")
    print(f"tensorboard  tensorboard --logdir {workdir / 'tensorboard'}", flush=True)


def restored_net(run: Experiment, folder: pathlib.Path, which: str) -> tuple[nnx.Module, int]:
    """The net of a checkpoint, the averaged one if it is kept, on the host; and its step."""
    state = workdirs.restore_for_evaluation(run, folder, which)
    net = sharding.fetch(state.net)
    return nnx.merge(run.graph, net["params"], net["stats"]), int(state.step)


def first_batch(run: Experiment) -> tuple[Array, Array]:
    """Normalised images `(N, H, W, C)` and labels `(N,)` of the validation, else the test split.

    The first ones in the split's order. N is `evaluate.batch_size`, but at most `IMAGES`, as the
    activations of all layers are in memory at once; less where the split is smaller.
    """
    source = run.dataset.validation or run.dataset.test
    if source is None:
        raise UserError("data.validation='' and data.test='': one of them is needed for a batch")
    size = min(run.config.evaluate.batch_size, IMAGES, len(source))
    with contextlib.closing(data.eval_batches(source, size)) as batches:
        batch = data.gather(source.resident, next(batches))
    return data.normalise(jnp.asarray(batch["image"]), run.dataset.info), batch["label"]
