"""`--mode=search`: wiNAS, an algorithm and a precision for each convolution.

    python -m efficient_nets.main --config=configs/winas.py --mode=search --workdir=DIR
    python -m efficient_nets.main --config=DIR/built_config.py --workdir=DIR/built

"Searching for Winograd-aware Quantized Networks" (arXiv 2002.10711), with the binary gates of
ProxylessNAS (arXiv 1812.00332). Weights and architecture are trained in turn:

    weights        a training batch; each layer is one candidate, sampled from p = softmax(logits),
                   and the weights move as in training. Of what candidates have of their own, that
                   of the sampled one moves alone.
    architecture   a validation batch, weights as they are; two candidates a layer are sampled, and
                   the logits move down the gradient of

                       cross-entropy + winas.cost_weight * sum_l sum_k p[l, k] cost[l, k]

The costs are shares of what the searched layers cost where all are direct and in float. In the end
each layer is its most probable candidate. A search that was stopped begins anew.
"""

import contextlib
import dataclasses
import functools
import math
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from ml_collections import ConfigDict

from efficient_nets import (
    calibration,
    conversion,
    data,
    evaluation,
    experiment,
    optim,
    paths,
    reporting,
    sharding,
    train,
    workdirs,
)
from efficient_nets import config as configs
from efficient_nets.errors import TrainingDiverged, UserError
from efficient_nets.evaluation import put_resident
from efficient_nets.experiment import Experiment, TrainState
from efficient_nets.search import architecture, supernet, winas_report
from efficient_nets.search import candidates as space
from efficient_nets.search.costs import costs as costs_of


class Architecture(NamedTuple):
    """logits `(L, K)`, and what their optimizer keeps."""

    logits: Array
    optimizer: Any


@dataclasses.dataclass(frozen=True)
class Search:
    """What is static about a search.

    Attributes:
      run: The supernet's experiment: `run.graph` is that of the supernet.
      layers: Paths of the L searched layers.
      candidates: The K candidates.
      costs: `(L, K)`, see `costs.costs`.
      optimizer: Of the logits.
    """

    run: Experiment
    layers: tuple[str, ...]
    candidates: tuple[dict[str, str], ...]
    costs: np.ndarray
    optimizer: Any

    def start(self) -> Architecture:
        """Where every candidate is as probable as the others."""
        logits = jnp.zeros((len(self.layers), len(self.candidates)), jnp.float32)
        return Architecture(logits, self.optimizer.init(logits))

    def by_path(self, rows: Array) -> dict[str, Array]:
        return dict(zip(self.layers, rows, strict=True))


def build(config: ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
    """Searches, and writes the report and built_config.py.

    Args:
      config: `winas` says what is searched and how; the weights are trained as by `optimizer`,
        `schedule` and `train`, for `winas.epochs`.
      workdir: Gets winas.json, winas.txt, plots/winas.png, metrics.jsonl and built_config.py.

    Returns:
      What winas.json holds.

    Raises:
      UserError: on a config that does not fit.
      TrainingDiverged: if a loss is not finite.
    """
    configs.check(config)
    _check(config)
    candidates, layers = space.of_config(config), space.searched(config)
    costs = costs_of(config, layers, candidates)
    dataset = data.load(config.data)
    workdirs.claim(workdir, config)
    search, state = prepare(config, dataset, layers, candidates, costs)
    reporter = reporting.Reporter(
        workdir, 0, search.run.total_steps, tensorboard=config.log.tensorboard
    )
    with contextlib.closing(reporter):
        state, found, history = _loop(search, state, reporter)
    logits = np.asarray(found.logits)
    chosen = dict(zip(layers, map(int, logits.argmax(-1)), strict=True))
    built = _built(config, {path: candidates[index] for path, index in chosen.items()})
    probabilities = np.asarray(jax.nn.softmax(found.logits))
    report = {
        "candidates": [space.label(candidate) for candidate in candidates],
        "cost": config.winas.cost,
        "layers": {
            path: {
                "chosen": space.label(candidates[chosen[path]]),
                **candidates[chosen[path]],
                "probabilities": probabilities[row].tolist(),
                "costs": costs[row].tolist(),
            }
            for row, path in enumerate(layers)
        },
        "expected_cost": float(np.sum(probabilities * costs)),
        "chosen_cost": float(sum(costs[row, chosen[path]] for row, path in enumerate(layers))),
        "shared_weights": scores_of(search, state, built, chosen),
        "history": history,
    }
    if jax.process_index() == 0:
        winas_report.write_config(built, report, workdir)
        winas_report.write(report, workdir)
    return report


def _check(config: ConfigDict) -> None:
    winas = config.winas
    if winas.warmup_epochs >= winas.epochs:
        raise UserError(
            f"winas.warmup_epochs={winas.warmup_epochs}: must be below winas.epochs={winas.epochs}"
        )
    if not config.data.validation:
        raise UserError(
            "data.validation='': the architecture learns from images that the weights do not see; "
            "give a split, as data.train='train[:50%]', data.validation='train[50%:]'"
        )
    why = "a search has none; set it in the built config"
    configs.check_off(config, configs.NOT_IN_A_SEARCH, why)


def prepare(
    config: ConfigDict, dataset: data.Dataset, layers, candidates, costs
) -> tuple[Search, TrainState]:
    """The supernet, from fresh weights or those that `config.checkpoint` names, and its state."""
    of_search = config.copy_and_resolve_references()
    of_search.train.epochs = config.winas.epochs
    plain = experiment.build(of_search, dataset)
    state, source = plain.initial_state(), config.checkpoint
    if source.convert_from:
        state = conversion.converted_start(plain, state)
    elif source.init_from:
        state = workdirs.warm_start(plain, state, pathlib.Path(source.init_from))
    trained = bool(source.convert_from or source.init_from)
    state = calibration.calibrated_start(plain, state, trained=trained)

    key = jax.random.key(config.seed)
    size, how = config.calibration.batch_size, config.calibration.how
    batch = calibration.training_batch(plain, size) if size else None

    def made(params, stats, batch, resident):
        model = nnx.merge(plain.graph, params, stats)
        model.eval() if trained else model.train()
        images = None
        if batch is not None:
            images = data.normalise(data.gather(resident, batch)["image"], dataset.info)
        return supernet.make(model, layers, candidates, key, images, how)

    def arrays(*given):
        _, params, stats = nnx.split(made(*given), nnx.Param, ...)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(stats)

    given = (state.params, state.stats, batch, put_resident(plain, "train"))
    graph, *_ = nnx.split(nnx.eval_shape(made, *given), nnx.Param, ...)
    everywhere = sharding.replicated(plain.mesh)
    options = experiment.run_once()
    params, stats = jax.jit(arrays, out_shardings=everywhere, compiler_options=options)(*given)
    optimizer = optim.optimizer(of_search.optimizer, plain.rate, params)
    kept = jax.jit(optimizer.init, out_shardings=everywhere)(params)
    state = state._replace(params=params, stats=stats, optimizer=kept, ema={})
    run = dataclasses.replace(plain, graph=graph, optimizer=optimizer)
    of_logits = optax.adam(config.winas.learning_rate, b1=0.0)  # as in ProxylessNAS
    return Search(run, tuple(layers), tuple(candidates), costs, of_logits), state


def _loop(search: Search, state: TrainState, reporter: reporting.Reporter):
    """The last states of weights and architecture, and a dict an epoch."""
    run, found = search.run, sharding.put_replicated(_host(search.start()), search.run.mesh)
    config, size = run.config, run.config.train.batch_size
    weight_fn = jax.jit(functools.partial(weight_step, search), donate_argnums=0)
    architecture_fn = jax.jit(functools.partial(architecture_step, search), donate_argnums=0)
    splits = {name: put_resident(run, name) for name in ("train", "validation")}
    warmup = round(config.winas.warmup_epochs * run.epoch_steps)
    meter = reporting.Meter({}, reporter, size, config.log.every_steps)
    history, every = [], {"train": config.seed, "validation": config.seed + 1}
    with contextlib.ExitStack() as stack:
        batches = {
            name: stack.enter_context(
                contextlib.closing(
                    data.train_batches(
                        getattr(run.dataset, name),
                        size,
                        seed=seed,
                        rows=sharding.process_rows(size),
                    )
                )
            )
            for name, seed in every.items()
        }
        for step in range(run.total_steps):
            batch = sharding.put_batch(next(batches["train"]), run.mesh)
            state, metrics = weight_fn(state, found.logits, batch, splits["train"])
            meter.push(step, 1, metrics)
            of_search = {}
            if step >= warmup:
                batch = sharding.put_batch(next(batches["validation"]), run.mesh)
                found, of_search = architecture_fn(found, state, batch, splits["validation"])
            done = step + 1
            if done % config.log.every_steps == 0 or done == run.total_steps:
                _tell(done, of_search, reporter)
            if done % run.epoch_steps == 0 or done == run.total_steps:
                history.append(_record(search, done, found))
                reporter.line(_line(history[-1]))
        meter.settle()
    return state, found, history


def _host(tree):
    return jax.tree.map(np.asarray, tree)


def _tell(step: int, metrics: dict, reporter: reporting.Reporter) -> None:
    scalars = {f"architecture/{name}": float(x) for name, x in metrics.items()}
    if not all(map(math.isfinite, scalars.values())):
        raise TrainingDiverged(f"the architecture's step {step} gives {scalars}")
    if scalars:
        reporter.scalars(step, scalars)


def _record(search: Search, step: int, found: Architecture) -> dict[str, float]:
    logits = jnp.asarray(_host(found.logits))
    return {
        "epoch": step / search.run.epoch_steps,
        "expected_cost": float(architecture.expected_cost(logits, _costs(search))),
        "entropy": float(architecture.entropy(logits)),
    }


def _line(record: dict[str, float]) -> str:
    return (
        f"epoch {record['epoch']:g}  expected cost {record['expected_cost']:.4f}  "
        f"entropy {record['entropy']:.4f}"
    )


def _costs(search: Search) -> Array:
    return jnp.asarray(search.costs, jnp.float32)


def _key(search: Search, step: Array, which: int) -> Array:
    """Random numbers of a step, other ones than those that training augments with."""
    key = jax.random.fold_in(jax.random.key(search.run.config.seed), 1 + which)
    return jax.random.fold_in(key, step)


def weight_step(search: Search, state: TrainState, logits: Array, batch, resident):
    """One step of training on one sampled path. Pure.

    Returns:
      The new state, and metrics as of `train.train_step`.
    """
    sampled = architecture.sample(_key(search, state.step, 0), logits)
    new, metrics = train.train_step(
        search.run, with_sampled(search, state, sampled), batch, resident
    )
    # What was not sampled has no gradient, but momentum and decay would move it.
    places = {
        f"{path}/{supernet.WAYS}/{number}/": sampled[row] == number
        for row, path in enumerate(search.layers)
        for number in range(len(search.candidates))
    }

    def moved(name: str, new, old):
        own = [is_sampled for place, is_sampled in places.items() if name.startswith(place)]
        return jnp.where(own[0], new, old) if own else new

    return new._replace(params=paths.map_named(moved, new.params, state.params)), metrics


def with_sampled(search: Search, state: TrainState, sampled: Array) -> TrainState:
    """The state of the supernet in which these candidates run, `(L,)`."""
    model = nnx.merge(search.run.graph, state.params, state.stats)
    supernet.sample(model, search.by_path(sampled))
    return state._replace(stats=nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param))))


def architecture_step(search: Search, found: Architecture, state: TrainState, batch, resident):
    """One step of the logits, with weights, statistics and ranges as they are. Pure.

    Returns:
      The new architecture, and metrics.
    """
    gradient, metrics = architecture_gradient(search, found.logits, state, batch, resident)
    with jax.numpy_dtype_promotion("standard"):  # as optax needs
        updates, optimizer = search.optimizer.update(gradient, found.optimizer)
    logits = optax.apply_updates(found.logits, updates)
    return Architecture(logits, optimizer), metrics


def architecture_gradient(search: Search, logits: Array, state: TrainState, batch, resident):
    """dL/dlogits `(L, K)` of a batch, and metrics: see the module."""
    run, costs = search.run, _costs(search)
    batch = data.gather(resident, batch)
    images = data.normalise(batch["image"], run.dataset.info)
    labels = jax.nn.one_hot(batch["label"], run.dataset.info.num_classes)
    pairs = architecture.sample_pairs(_key(search, state.step, 1), logits)

    def loss_fn(gates):
        model = nnx.merge(run.graph, state.params, state.stats)
        model.train()  # norms by the batch; what moves is dropped
        supernet.sample(model, search.by_path(pairs))
        supernet.open_gates(model, search.by_path(gates))
        return run.task.loss(model(images), labels)

    gates = jnp.broadcast_to(jnp.array([1.0, 0.0]), pairs.shape)
    of_gates, metrics = jax.grad(loss_fn, has_aux=True)(gates)
    cost, of_cost = jax.value_and_grad(architecture.expected_cost)(logits, costs)
    gradient = architecture.gate_gradient(logits, pairs, of_gates)
    metrics |= {"expected_cost": cost, "entropy": architecture.entropy(logits)}
    return gradient + run.config.winas.cost_weight * of_cost, metrics


def _built(config: ConfigDict, chosen: dict[str, dict[str, str]]) -> ConfigDict:
    """The config that trains what was chosen."""
    config = space.with_chosen(config, chosen)
    config.winas = configs.defaults().winas
    return experiment.without_idle_rules(config)


def scores_of(
    search: Search, state: TrainState, built: ConfigDict, chosen: dict[str, int]
) -> dict[str, float]:
    """Loss and accuracy of the built net with the supernet's weights, not trained on its own."""
    run = experiment.build(built, search.run.dataset, training=False)
    model = supernet.extract(nnx.merge(search.run.graph, state.params, state.stats), chosen)
    _, params, stats = nnx.split(model, nnx.Param, ...)
    state = run.abstract._replace(
        params=nnx.to_pure_dict(params), stats=nnx.to_pure_dict(stats), ema={}
    )
    return evaluation.evaluate_all(evaluation.evaluators(run), state)
