"""The training loop, readable top to bottom; a step is one pure jitted function.

A run is a function of its config: the batch of step s, its random numbers and its learning rate
follow from s, so a run that is stopped anywhere and started again by the same command ends
bit-equal to one that was not (on the same number of devices; on GPUs, with the DETERMINISTIC=1 of
launch/gpu.sh).
"""

import contextlib
import functools
import hashlib
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from jax import lax
from ml_collections import ConfigDict

from efficient_nets import (
    adversarial,
    analysis,
    calibration,
    conversion,
    data,
    distillation,
    experiment,
    inspection,
    layers,
    paths,
    pretraining,
    reporting,
    sharding,
    updates,
    workdirs,
)
from efficient_nets import config as configs
from efficient_nets.checkpoint import Checkpoints
from efficient_nets.distillation import Teacher
from efficient_nets.errors import TrainingDiverged
from efficient_nets.evaluation import evaluate_all, evaluators, features_of, put_resident
from efficient_nets.experiment import Experiment, TrainState
from efficient_nets.preemption import Preemption


def train(config: ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
    """Trains to the end of `config.train.epochs`, from the newest checkpoint if there is one.

    Returns:
      What `result.json` holds.

    Raises:
      UserError: on a config that does not fit itself, the data, the devices or the workdir.
      TrainingDiverged: if loss, gradient or parameters are not finite; the last good checkpoint
        stays.
    """
    configs.check(config)
    workdirs.claim(workdir, config)
    before = workdir / pretraining.FOLDER
    if config.pretrain.epochs:
        plain = pretraining.float_config(config)
        if not pretraining.is_done(before, plain):
            train(plain, before)
    info = data.describe(config.data, config.task)
    costs = workdirs.write_summary(workdir, config, experiment.abstract_model(config, info), info)
    dataset = data.load(config.data, config.task)
    run = experiment.build(config, dataset)
    teacher = distillation.teacher(run, before)

    checkpoints = Checkpoints(
        workdir / "checkpoints",
        keep=config.checkpoint.keep,
        best_metric=workdirs.best_metric(run),
        best_mode=run.task.best_mode,
    )
    state, meta = _start(run, checkpoints, before)
    reporter = reporting.Reporter(
        workdir, int(state.step), run.total_steps, tensorboard=config.log.tensorboard
    )
    evaluation = evaluators(run)
    with contextlib.closing(checkpoints), contextlib.closing(reporter):
        if not meta and _starts_trained(config):
            scores = evaluate_all(evaluation, state)  # of the net that training starts from
            reporter.scalars(0, scores)
            reporter.line(reporting.evaluation_line(0, 0, scores))
        with explaining_divergence(checkpoints):
            state, meta, scores = _loop(
                run, state, meta, teacher, evaluation, checkpoints, reporter
            )
        scores |= evaluate_all(evaluation[1:] if scores else evaluation, state)
        result = scores | _result(run, state, meta, costs)
    workdirs.write_result(workdir, result)
    return result


def _starts_trained(config: ConfigDict) -> bool:
    source = config.checkpoint
    return bool(source.init_from or source.convert_from or config.pretrain.epochs)


def _start(
    run: Experiment, checkpoints: Checkpoints, pretrained: pathlib.Path
) -> tuple[TrainState, dict]:
    restored = checkpoints.restore(run.abstract)
    if restored is not None:
        state, meta, step = restored
        logging.info("Goes on from the checkpoint of step %d.", step)
        return state, meta
    return fresh_state(run, pretrained), {}


def fresh_state(run: Experiment, pretrained: pathlib.Path | None = None) -> TrainState:
    """The state of step 0: fresh, or from the net that the config names; calibrated.

    Args:
      run: The experiment.
      pretrained: The workdir of the run that `config.pretrain` made, where it makes one.
    """
    state, config = run.initial_state(), run.config
    if config.checkpoint.convert_from:
        state = conversion.converted_start(run, state)
    elif config.pretrain.epochs and pretraining.decomposes(config):
        state = conversion.converted_start(run, state, pretrained)
    elif config.pretrain.epochs:
        state = workdirs.warm_start(run, state, pretrained)
    elif config.checkpoint.init_from:
        state = workdirs.warm_start(run, state, pathlib.Path(config.checkpoint.init_from))
    return calibration.calibrated_start(run, state, trained=_starts_trained(config))


def _loop(run: Experiment, state, meta, teacher, evaluation, checkpoints, reporter):
    """Trains to the end.

    Returns:
      The last state, the meta data of its checkpoint, and its scores on the first split; none where
      there was nothing left to train.
    """
    config, step, scores = run.config, int(state.step), {}
    resident = put_resident(run, "train")
    step_fn = jax.jit(
        functools.partial(train_steps, run), static_argnames="count", donate_argnums=0
    )
    meter = reporting.Meter(meta, reporter, config.train.batch_size, config.log.every_steps)
    look = _histogram_batch(run)
    if step == 0:
        _write_histograms(run, state, step, look, reporter)
    periods = [run.steps(config.evaluate.every_epochs), run.steps(config.checkpoint.every_epochs)]
    dispatches = batches_of(run, step, periods, on_device=resident is not None)
    with Preemption() as preemption, contextlib.closing(dispatches):
        for count, batch in dispatches:
            state, metrics = step_fn(state, batch, resident, teacher, count=count)
            meter.push(step, count, metrics)
            step += count
            last, scores = step == run.total_steps, {}
            if last or step % run.steps(config.evaluate.every_epochs) == 0:
                meter.settle()
                with meter.paused():
                    scores = evaluate_all(evaluation[:1], state)
                    _write_histograms(run, state, step, look, reporter)
                reporter.scalars(step, scores)
                reporter.pictures(step, evaluation[0].pictures() if evaluation else {})
                reporter.line(reporting.evaluation_line(step / run.epoch_steps, step, scores))
            stop = preemption.reached()
            if last or stop or step % run.steps(config.checkpoint.every_epochs) == 0:
                meter.settle()  # raises if the state is not worth saving
                meta = meter.meta()
                checkpoints.save(step, state, meta=meta, metrics=scores or None)
            if stop and not last:
                checkpoints.wait()
                reporter.line(f"Stopped by SIGTERM; saved step {step}. The same command goes on.")
                preemption.exit()
        checkpoints.wait()  # while SIGTERM cannot end the process yet
    return state, meta, scores


def _histogram_batch(run: Experiment):
    """Images and labels whose activations and gradients are recorded, the same in all of the run.

    None on other processes than the first, and where the config records nothing or holds nothing
    out.
    """
    held_out = run.dataset.validation or run.dataset.test
    if not run.config.log.histograms_every_epochs or not held_out or jax.process_index() > 0:
        return None
    return inspection.first_batch(run)


def _write_histograms(run: Experiment, state: TrainState, step: int, look, reporter) -> None:
    """At both ends of the run, and at the first evaluation of each period.

    Of weights and running averages, and of each layer's activations and gradients on `look` in
    training mode, which the first process computes on one device.
    """
    epochs = run.config.log.histograms_every_epochs
    if not epochs:
        return
    period, since = run.steps(epochs), run.steps(run.config.evaluate.every_epochs)
    if step in (0, run.total_steps) or step // period > (step - since) // period:
        arrays = sharding.fetch({"params": state.params, "stats": state.stats})
        if not reporter.active:
            return
        found = analysis.histograms_of(arrays)
        if look is not None:
            model = nnx.merge(run.graph, arrays["params"], arrays["stats"])
            found |= analysis.batch_histograms(model, *look, run.task.label_loss)
        reporter.histograms(step, found)


def train_steps(
    run: Experiment, state: TrainState, batch, resident, teacher: Teacher | None = None, *, count
):
    """`count` steps in one dispatch: arrays of `batch` have a leading axis of that length if > 1.

    Returns:
      The new state, and metrics, each `(count,)` or a scalar for one step.
    """
    one = functools.partial(STEPS[run.task.name], run)
    if count == 1:
        return one(state, batch, resident, teacher)
    return lax.scan(lambda state, batch: one(state, batch, resident, teacher), state, batch)


def train_step(
    run: Experiment,
    state: TrainState,
    batch: dict,
    resident: dict | None,
    teacher: Teacher | None = None,
):
    """One supervised step: gather, augment, loss, gradient, update. Pure."""
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    batch = data.gather(resident, batch)
    images, targets = run.task.inputs(
        key, batch, config_data=run.config.data, info=run.dataset.info
    )

    state = updates.advanced(run, state)

    def loss_fn(params):
        model = nnx.merge(run.graph, params, state.stats)
        model.train()
        with layers.collecting("losses") as losses, layers.collecting("auxiliary") as heads:
            outputs, peaks = (
                _watched(model, images) if run.config.log.products else (model(images), {})
            )
        loss, metrics = run.task.loss(outputs, targets)
        if teacher is not None:
            weight, temperature = run.config.teacher.weight, run.config.teacher.temperature
            soft = run.task.distillation_loss(outputs, teacher.logits(images), temperature)
            metrics["distillation_loss"] = soft
            loss = (1 - weight) * loss + weight * soft
        if heads:
            parts = [net.auxiliary * run.task.loss(own, targets)[0] for net, own in heads]
            metrics["auxiliary_loss"] = sum(parts)
            loss = loss + metrics["auxiliary_loss"]
        if losses:
            metrics["quantization_loss"] = sum(value for _, value in losses)
            loss = loss + metrics["quantization_loss"]
        if penalties := [layer.penalty for _, layer in layers.layers(model) if layer.has_penalty]:
            metrics["rank_lasso"] = sum(penalties)
            loss = loss + metrics["rank_lasso"]
        return loss, (updates.stats_of(model), metrics | peaks)

    gradient, (stats, metrics) = jax.grad(loss_fn, has_aux=True)(state.params)
    state, of_update = updates.updated(run, state, gradient, stats)
    return state, metrics | of_update


# The step of a task: `(run, state, batch, resident, teacher)` gives the new state, and metrics that
# hold a loss, or several names that end in _loss, and those of `updates.updated`. Pure.
STEPS = {
    "classification": train_step,
    "detection": train_step,
    "generation": adversarial.train_step,
}


def _watched(model: nnx.Module, images):
    """Outputs, and the largest magnitude of each layer's products, over all its calls."""
    paths_of = {id(layer): path for path, layer in layers.layers(model)}
    with layers.collecting("peaks") as peaks:
        outputs = model(images)
    largest = {}
    for layer, peak in peaks:
        name = f"{paths_of[id(layer)].replace('/', '.')}/product_max"
        largest[name] = jnp.maximum(largest.get(name, peak), peak)
    return outputs, largest


def batches_of(run: Experiment, step: int, periods: Sequence[int], *, on_device: bool):
    """`(count, batch)` of each dispatch to the end of the run.

    Args:
      run: The experiment.
      step: The first one.
      periods: Steps of which no dispatch goes beyond a multiple.
      on_device: Whether the images are there already.
    """
    config = run.config
    size = config.train.batch_size
    most = config.train.steps_per_dispatch
    if not most:  # XLA:CPU runs a convolution in a loop body many times slower than outside
        most = 16 if on_device and jax.default_backend() != "cpu" else 1
    batches = data.train_batches(
        run.dataset.train,
        size,
        seed=config.seed,
        first_step=step,
        rows=sharding.process_rows(size),
    )
    with contextlib.closing(batches):
        for count in _counts(step, run.total_steps, periods, most):
            rows = [next(batches) for _ in range(count)]
            batch = rows[0] if count == 1 else jax.tree.map(lambda *each: np.stack(each), *rows)
            yield count, sharding.put_batch(batch, run.mesh, stacked=count > 1)


def _counts(step: int, total: int, periods: Sequence[int], most: int) -> Iterator[int]:
    """Steps of each dispatch: at most `most`, and none goes beyond a multiple of a period.

    They follow from the step alone, so that a resumed run makes the same ones. They are counted
    from the last such multiple, so that each epoch has the same: every new count is compiled.
    """
    while step < total:
        begin = max(step - step % period for period in periods)
        end = min(total, *(step - step % period + period for period in periods))
        count = min(most - (step - begin) % most, end - step)
        yield count
        step += count


@contextlib.contextmanager
def explaining_divergence(checkpoints: Checkpoints):
    try:
        yield
    except TrainingDiverged as error:
        checkpoints.wait()
        saved = checkpoints.steps()
        good = f"the last good checkpoint is step {saved[-1]}" if saved else "no checkpoint yet"
        where = ", in a new --workdir as the config is another one" if saved else ""
        raise TrainingDiverged(
            f"{error}; {good}. Try a lower optimizer.learning_rate, schedule.warmup_epochs, or "
            f"optimizer.clip_norm{where}"
        ) from error


def _result(run: Experiment, state: TrainState, meta: dict, costs: dict) -> dict[str, Any]:
    return {
        "params": costs["params"],
        "macs": costs["macs"],
        "steps": int(state.step),
        "seconds": meta["seconds"],
        "images_per_second": meta["images_per_second"],
        "dataset": run.dataset.info.name,
        **features_of(run),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "config_hash": configs.fingerprint(run.config),
        "params_digest": digest(state.params),
    }


def digest(params: Any) -> str:
    """SHA-256 over names, shapes and bytes of all parameters, in the order of their names."""
    total = hashlib.sha256()
    for leaf, value in sorted(paths.named_leaves(sharding.fetch(params)).items()):
        total.update(f"{leaf} {value.dtype} {value.shape}\n".encode())
        total.update(np.ascontiguousarray(value).tobytes())
    return total.hexdigest()
