"""A search for the architecture of a net of cells, by `config.search.strategy`.

    python -m efficient_nets.main --config=configs/enas_mnist.py --workdir=DIR
    python -m efficient_nets.main --config=DIR/built_config.py --workdir=DIR/built

The weights of the shared net and the strategy learn in turn (ENAS, arXiv 1802.03268, section 2.2):

    weights     `search.interval` training batches, each under an architecture that the strategy
                proposes; what others would have used stays as it is
    strategy    `search.updates` updates, each with the rewards of `search.proposals` architectures
                on a batch of the validation split

In the end the strategy's finalists are measured on the whole validation split, with batch norms
made anew for each; the best of them is what is found. The architecture is data: each step is
compiled once. What is random follows from the seed and the step, so that a search that was stopped
and started again ends bit-equal to one that was not.
"""

import contextlib
import dataclasses
import functools
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from jax import Array, lax
from ml_collections import ConfigDict
from tqdm import tqdm

from efficient_nets import (
    analysis,
    data,
    experiment,
    names,
    reporting,
    sharding,
    train,
    workdirs,
)
from efficient_nets import config as configs
from efficient_nets.checkpoint import Checkpoints
from efficient_nets.errors import UserError
from efficient_nets.evaluation import put_resident
from efficient_nets.experiment import Experiment, TrainState
from efficient_nets.layers import recalibrate
from efficient_nets.models.space import Space
from efficient_nets.preemption import Preemption
from efficient_nets.search import (
    cell_costs,
    cell_report,
    judging,
    latency,
    relaxation,
    rewards,
    strategies,
)
from efficient_nets.search.rewards import ArchitectureCost

NET = "cells"
REWARDS = {
    "accuracy": "the accuracy alone",
    "cost_aware": "accuracy (cost / target)^w",
}
OF_PROPOSALS, OF_UPDATES, OF_SHOWN, OF_FINALISTS = range(1, 5)  # streams of random numbers


class SearchState(NamedTuple):
    """All that a search is; what a checkpoint holds, the weights' fields beside the strategy.

    Attributes:
      weights: The shared net's training state.
      strategy: What the strategy knows.
    """

    weights: TrainState
    strategy: Any

    def saved(self) -> dict[str, Any]:
        return self.weights._asdict() | {"strategy": self.strategy}

    @classmethod
    def restored(cls, saved: dict[str, Any]) -> "SearchState":
        saved = dict(saved)
        return cls(strategy=saved.pop("strategy"), weights=TrainState(**saved))


@dataclasses.dataclass(frozen=True)
class Search:
    """What is static about a search.

    Attributes:
      run: The shared net's experiment; of "darts" it is a mixture.
      judged: The same with one architecture at a time.
      space: Of its architectures.
      strategy: See `strategies.Strategy`.
      cost: Of an architecture.
      mean_cost: Of all architectures.
      target: The cost that rewards relate to.
      interval: Steps of the weights from one phase of the strategy to the next.
    """

    run: Experiment
    judged: Experiment
    space: Space
    strategy: Any
    cost: ArchitectureCost
    mean_cost: float
    target: float
    interval: int

    def costs(self, architectures: Array) -> Array:
        """`(n,)`, in the unit of `config.search.cost`."""
        return jax.vmap(lambda one: self.cost.of(relaxation.one_hots(self.space, one)))(
            architectures
        )

    def rewards(self, accuracies: Array, costs: Array) -> Array:
        """What the strategy is told: `(n,)`, or `(n, 2)` where it wants both."""
        options = self.run.config.search
        if options.strategy == "nsga2":
            return rewards.objectives(accuracies, costs / self.target)
        if options.reward == "accuracy":
            return accuracies
        return rewards.cost_aware(accuracies, costs, self.target, tuple(options.exponents))

    def key(self, step: Array, stream: int, number: Array | int = 0) -> Array:
        """Random numbers of a step, other ones than those that training augments with."""
        key = jax.random.fold_in(jax.random.key(self.run.config.seed), stream)
        return jax.random.fold_in(jax.random.fold_in(key, step), number)

    def of_one(self, weights: TrainState) -> TrainState:
        """The weights as those of `judged`, with any architecture."""
        if self.run is self.judged:
            return weights
        stats = {name: arrays for name, arrays in weights.stats.items() if name != "choices"}
        stats["architecture"] = jnp.zeros(self.space.shape, jnp.int32)
        return weights._replace(stats=stats)

    def is_phase(self, step: int) -> bool:
        """Whether the strategy learns behind that step."""
        warmup = self.run.config.search.warmup_epochs * self.run.epoch_steps
        return step % self.interval == 0 and step > warmup

    def phases(self, step: int) -> int:
        """How many there are up to that step."""
        warmup = self.run.config.search.warmup_epochs * self.run.epoch_steps
        return max(step // self.interval - int(warmup // self.interval), 0)

    @property
    def updates(self) -> int:
        """Of the strategy, in a phase."""
        return 1 if self.by_gradient else self.run.config.search.updates

    @property
    def by_gradient(self) -> bool:
        return is_gradient(self.strategy)


def is_gradient(strategy: Any) -> bool:
    """Whether it descends the gradient of a loss, and is not told rewards: of a class too."""
    return hasattr(strategy, "descend")


def build(config: ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
    """Searches to the end, or goes on with it, and writes what was found.

    Args:
      config: `search` says how; the weights are trained as by `optimizer`, `schedule` and `train`.
      workdir: Gets metrics.jsonl, checkpoints, result.json, search.txt, plots/search.png,
        plots/cells.png and built_config.py.

    Returns:
      What result.json holds.

    Raises:
      UserError: on a config that does not fit.
      TrainingDiverged: if the weights' loss is not finite.
    """
    configs.check(config)
    check(config)
    dataset = data.load(config.data)
    search = prepare(config, dataset)
    workdirs.claim(workdir, config)
    checkpoints = Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep)
    state, meta = _start(search, checkpoints)
    reporter = reporting.Reporter(
        workdir,
        int(state.weights.step),
        search.run.total_steps,
        tensorboard=config.log.tensorboard,
    )
    with contextlib.closing(checkpoints), contextlib.closing(reporter):
        if not meta:
            reporter.line(cell_report.space_line(search))
        state, meta = _loop(search, state, meta, checkpoints, reporter)
    report = found(search, state, meta)
    if jax.process_index() == 0:
        cell_report.write(search, report, built(config, report["arc"]), workdir)
    return report


def measure(config: ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
    """`--mode=latency`: the table that `search.latency` names for `search.cost='latency'`.

    Returns:
      What latency.json holds, see `cell_costs.measure_cells`.

    Raises:
      UserError: on a config that does not fit.
    """
    configs.check(config)
    check(config)
    workdirs.claim(workdir, config)
    options = config.search
    table = cell_costs.measure_cells(config, options.latency_batch_size, options.latency_repeats)
    latency.write(table, workdir)
    return table


def check(config: ConfigDict) -> None:
    """Raises a UserError on a config of which there is no search."""
    options = config.search
    if config.model.name != NET or config.model.arc:
        raise UserError(
            f"model.name={config.model.name!r}, model.arc={config.model.get('arc', '')!r}: "
            f"search.strategy={options.strategy!r} is for model.name='{NET}' with model.arc=''"
        )
    if not config.data.validation:
        raise UserError(
            "data.validation='': architectures are judged by images that the weights do not see; "
            "give a split, as data.train='train[:90%]', data.validation='train[90%:]'"
        )
    names.pick("search.reward", options.reward, REWARDS)
    if options.warmup_epochs >= config.train.epochs:
        raise UserError(
            f"search.warmup_epochs={options.warmup_epochs}: must be below train.epochs="
            f"{config.train.epochs}"
        )
    by_gradient = is_gradient(strategies.STRATEGIES[options.strategy])
    default = configs.defaults().search
    for field, heeded in (
        ("cost_weight", by_gradient),
        ("reward", not by_gradient and options.strategy != "nsga2"),
        ("updates", not by_gradient),
    ):
        if not heeded and options[field] != default[field]:
            raise UserError(
                f"search.{field}={options[field]!r}: search.strategy={options.strategy!r} does not "
                "heed it"
            )
    if options.latency and options.cost != cell_costs.LATENCY:
        raise UserError(f"search.latency={options.latency!r}: it is for search.cost='latency'")
    for field, given in (
        ("train.ema", config.train.ema),
        ("teacher.checkpoint", config.teacher.checkpoint),
        ("pretrain.epochs", config.pretrain.epochs),
        ("builder.budget", config.builder.budget),
        ("log.products", config.log.products),
        ("checkpoint.convert_from", config.checkpoint.convert_from),
    ):
        if given:
            raise UserError(f"{field}={given!r}: a search has none; set it in the built config")


def prepare(config: ConfigDict, dataset: data.Dataset) -> Search:
    """The search of a checked config."""
    options = config.search
    space = space_of(config)
    strategy = strategies.make(options.strategy, space, options[options.strategy])
    judged = experiment.build(config, dataset)
    run = judged
    if is_gradient(strategy) and strategy.mixes:
        of_mixture = config.copy_and_resolve_references()
        of_mixture.model.mixes = True
        run = experiment.build(of_mixture, dataset)
    sharding.check_batch("search.batch_size", options.batch_size, run.mesh)
    if options.batch_size > len(dataset.validation):
        raise UserError(
            f"search.batch_size={options.batch_size}: the validation split has only "
            f"{len(dataset.validation)} images"
        )
    table = cell_costs.read(options.latency) if options.latency else None
    cost = cell_costs.architecture_cost(config, options.cost, table)
    mean_cost = float(cost.of(space.uniform))
    interval = options.interval or (1 if is_gradient(strategy) else run.epoch_steps)
    target = options.target or mean_cost
    return Search(run, judged, space, strategy, cost, mean_cost, target, interval)


def space_of(config: ConfigDict) -> Space:
    """The space of a config's net of cells."""
    model = config.model
    return Space(model.nodes, tuple(model.ops), tuple(model.precisions), model.shared_precision)


def _start(search: Search, checkpoints: Checkpoints) -> tuple[SearchState, dict]:
    run, everywhere = search.run, sharding.replicated(search.run.mesh)
    init = functools.partial(search.strategy.init, jax.random.key(run.config.seed))
    strategy = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), jax.eval_shape(init)
    )
    restored = checkpoints.restore(SearchState(run.abstract, strategy).saved())
    if restored is not None:
        saved, meta, step = restored
        logging.info("Goes on from the checkpoint of step %d.", step)
        return SearchState.restored(saved), meta
    weights = train.fresh_state(run)
    return SearchState(weights, jax.jit(init, out_shardings=everywhere)()), {}


def _loop(search: Search, state: SearchState, meta: dict, checkpoints, reporter):
    """The last state, and the meta data of its checkpoint."""
    run, step = search.run, int(state.weights.step)
    config, options = run.config, run.config.search
    resident = put_resident(run, "train")
    weights_fn = jax.jit(
        functools.partial(weight_steps, search), static_argnames="count", donate_argnums=0
    )
    learner, judge = Learner(search, step), judging.Judge(search.judged, options.norm_batches)
    log = cell_report.Log(search, reporter, meta)
    size, every = config.train.batch_size, config.log.every_steps
    meter = reporting.Meter(meta, reporter, size, every, log.training_line)
    evaluated = run.steps(config.evaluate.every_epochs)
    saved = run.steps(config.checkpoint.every_epochs)
    periods = [search.interval, evaluated, saved]
    dispatches = train.batches_of(run, step, periods, on_device=resident is not None)
    with Preemption() as preemption, contextlib.closing(dispatches), contextlib.closing(learner):
        for count, batch in dispatches:
            weights, metrics = weights_fn(
                state.weights, state.strategy, batch, resident, count=count
            )
            state = state._replace(weights=weights)
            meter.push(step, count, metrics)
            step += count
            last, scores = step == run.total_steps, {}
            if search.is_phase(step):
                begin = time.perf_counter()
                with meter.paused():
                    strategy, learned = learner(state)
                state = state._replace(strategy=strategy)
                log.phase(step, learned, begin)
            if last or step % evaluated == 0:
                meter.settle()
                with meter.paused():
                    scores = log.evaluation(step, *shown(search, state, learner, judge))
            stop = preemption.reached()
            if last or stop or step % saved == 0:
                meter.settle()  # raises if the state is not worth saving
                meta = meter.meta() | log.meta()
                checkpoints.save(step, state.saved(), meta=meta, metrics=scores or None)
            if stop and not last:
                checkpoints.wait()
                reporter.line(f"Stopped by SIGTERM; saved step {step}. The same command goes on.")
                preemption.exit()
        checkpoints.wait()
    return state, meta


class Learner:
    """The strategy's phases: validation batches, and what is compiled for them."""

    def __init__(self, search: Search, step: int):
        run, size = search.run, search.run.config.search.batch_size
        self.search = search
        self._resident = put_resident(run, "validation")
        everywhere = dict(out_shardings=sharding.replicated(run.mesh))
        # Three programs, as the one in the middle, which is the net, is for what is shown too.
        self._propose = jax.jit(functools.partial(propose, search), **everywhere)
        self._measure = jax.jit(functools.partial(judging.accuracies, search.judged), **everywhere)
        self._tell = jax.jit(functools.partial(tell, search), **everywhere)
        self._descend = jax.jit(functools.partial(descend, search), **everywhere)
        self._batches = data.train_batches(
            run.dataset.validation,
            size,
            seed=run.config.seed + 1,
            first_step=search.phases(step) * search.updates,
            rows=sharding.process_rows(size),
        )

    def __call__(self, state: SearchState) -> tuple[Any, list[dict]]:
        """The strategy behind a phase, and metrics of each update, on the devices."""
        mesh, (weights, strategy), learned = self.search.run.mesh, state, []
        if self.search.by_gradient:
            batch = sharding.put_batch(next(self._batches), mesh)
            strategy, metrics = self._descend(weights, strategy, batch, self._resident)
            return strategy, [metrics]
        hidden, updates = jax.process_index() > 0, self.search.updates
        for number in tqdm(range(updates), "updates", leave=False, delay=5, disable=hidden):
            batch = sharding.put_batch(next(self._batches), mesh)
            architectures = self._propose(strategy, weights.step, np.int32(number))
            accuracies = self._measure(weights, architectures, batch, self._resident)
            strategy, metrics = self._tell(strategy, architectures, accuracies)
            learned.append(metrics)
        return strategy, learned

    def measured(self, state: SearchState, architectures: np.ndarray) -> np.ndarray:
        """Accuracies of some architectures, all on the same images."""
        run, options = self.search.run, self.search.run.config.search
        size, each = options.batch_size, options.proposals
        with contextlib.closing(
            data.train_batches(
                run.dataset.validation,
                size,
                seed=run.config.seed + 2,
                first_step=int(state.weights.step),
                rows=sharding.process_rows(size),
            )
        ) as batches:
            batch = sharding.put_batch(next(batches), run.mesh)
        found, weights = [], self.search.of_one(state.weights)
        for start in range(0, len(architectures), each):  # as many at once as in an update
            some = np.resize(architectures[start:][:each], (each, *architectures.shape[1:]))
            some = sharding.put_replicated(some, run.mesh)
            found.append(np.asarray(self._measure(weights, some, batch, self._resident)))
        return np.concatenate(found)[: len(architectures)]

    def close(self) -> None:
        self._batches.close()


def weight_steps(search: Search, weights: TrainState, strategy, batch, resident, *, count: int):
    """`count` steps of the weights, each under an architecture that the strategy proposes. Pure.

    Momentum and decay move what that architecture has not too, as in ENAS's code.

    Returns:
      The new weights, and metrics as of `train.train_steps`.
    """

    def one(weights, batch):
        key = search.key(weights.step, OF_PROPOSALS)
        return train.train_step(
            search.run, _proposed(search, weights, strategy, key), batch, resident
        )

    return one(weights, batch) if count == 1 else lax.scan(one, weights, batch)


def _proposed(search: Search, weights: TrainState, strategy, key: Array) -> TrainState:
    """The weights' state under what the strategy proposes."""
    model = nnx.merge(search.run.graph, weights.params, weights.stats)
    if search.run is search.judged:
        model.architecture[...] = search.strategy.propose(strategy, key, 1)[0]
    else:
        model.choose(search.strategy.probabilities(strategy))
    return weights._replace(stats=nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param))))


def propose(search: Search, strategy, step: Array, number: Array) -> Array:
    """The architectures of an update: int32 `(n, 2, B, 2, 3)`. Pure."""
    key = search.key(step, OF_UPDATES, number)
    return search.strategy.propose(strategy, key, search.run.config.search.proposals)


def tell(search: Search, strategy, architectures: Array, accuracies: Array) -> tuple[Any, dict]:
    """The strategy's state once it is told their rewards, and metrics. Pure."""
    costs = search.costs(architectures)
    told = search.rewards(accuracies, costs)
    strategy, metrics = search.strategy.update(strategy, architectures, told)
    return strategy, metrics | {"accuracy": accuracies.mean(), "cost": costs.mean()}


def descend(search: Search, weights: TrainState, strategy, batch, resident) -> tuple[Any, dict]:
    """A step of the strategy's logits, with weights, statistics and ranges as they are. Pure.

    Down the gradient of the loss `+ search.cost_weight * cost / target` of a validation batch.

    Returns:
      The strategy's new state, and metrics.
    """
    run, options = search.run, search.run.config.search
    batch = data.gather(resident, batch)
    images = data.normalise(batch["image"], run.dataset.info)
    key = search.key(weights.step, OF_UPDATES)
    progress = weights.step.astype(jnp.float32) / run.total_steps

    def loss_fn(logits):
        model = nnx.merge(run.graph, weights.params, weights.stats)
        recalibrate.by_batch(model)  # what moves is dropped
        choices, tokens = search.strategy.relaxed(logits, key, progress)
        if tokens is None:
            model.choose(choices)
        else:
            model.architecture[...] = tokens
            model.gates = nnx.data(relaxation.gates(choices, tokens))
        found, labels = model(images), batch["label"]
        loss, cost = run.task.label_loss(found, labels), search.cost.of(choices)
        hits = jnp.argmax(found, axis=-1) == labels
        metrics = {"loss": loss, "accuracy": jnp.mean(hits.astype(jnp.float32)), "cost": cost}
        return loss + options.cost_weight * cost / search.target, metrics

    gradient, metrics = jax.grad(loss_fn, has_aux=True)(strategy.logits)
    strategy, learned = search.strategy.descend(strategy, gradient)
    return strategy, metrics | learned


def candidates(search: Search, state: SearchState, stream: int, number: int) -> np.ndarray:
    """Some of what the strategy holds for the best, each once: `(at most number, 2, B, 2, 3)`.

    Before its first phase it knows of none, and they are some that it proposes.
    """
    strategy, key = search.strategy, search.key(state.weights.step, stream)
    known = search.phases(int(state.weights.step)) > 0
    give = strategy.finalists if known else strategy.propose
    everywhere = sharding.replicated(search.run.mesh)
    give = jax.jit(give, static_argnums=2, out_shardings=everywhere)
    found = np.asarray(give(state.strategy, key, number))
    return found[sorted(np.unique(found, axis=0, return_index=True)[1])]


def shown(search: Search, state: SearchState, learner: Learner, judge: judging.Judge):
    """Some architectures, their accuracies on the same images; and scores of the best on splits."""
    architectures = candidates(search, state, OF_SHOWN, search.run.config.search.shown)
    accuracies = learner.measured(state, architectures)
    best = architectures[accuracies.argmax()]
    scores = judge(search.of_one(state.weights), best, ("validation", "test"))
    return architectures, accuracies, scores


def found(search: Search, state: SearchState, meta: dict) -> dict[str, Any]:
    """What result.json holds: the finalists on the whole validation split, and the best of them.

    The test split is looked at for the best alone.
    """
    config, space = search.judged.config, search.space
    judge = judging.Judge(search.judged, config.search.norm_batches)
    weights = search.of_one(state.weights)
    finalists = candidates(search, state, OF_FINALISTS, config.search.finalists)
    costs = np.asarray(search.costs(jnp.asarray(finalists)))
    hidden, scores = jax.process_index() > 0, []
    for tokens in tqdm(finalists, "finalists", leave=False, delay=5, disable=hidden):
        scores.append(judge(weights, tokens))
    accuracies = np.array([score["validation/accuracy"] for score in scores])
    told = np.asarray(search.rewards(jnp.asarray(accuracies, jnp.float32), jnp.asarray(costs)))
    best = int((accuracies if told.ndim > 1 else told).argmax())
    front = rewards.pareto_front(rewards.objectives(jnp.asarray(accuracies), jnp.asarray(costs)))
    order = np.argsort(-accuracies, kind="stable")
    return {
        "arc": space.text(finalists[best]),
        "lists": space.lists(finalists[best]),
        "ops": list(space.ops),
        "precisions": list(space.precisions),
        "strategy": config.search.strategy,
        **judge(weights, finalists[best], ("validation", "test")),
        "cost": config.search.cost,
        "target": search.target,
        "finalists": [
            {
                "arc": space.text(finalists[index]),
                "validation/accuracy": float(accuracies[index]),
                "cost": float(costs[index]),
                "on_front": bool(front[index]),
                "chosen": bool(index == best),
            }
            for index in order
        ],
        "costs": costs_of(built(config, space.text(finalists[best]))),
        "history": meta["history"],
        "steps": int(state.weights.step),
        "seconds": meta["seconds"],
        "images_per_second": meta["images_per_second"],
        "architectures": meta["architectures"],
        "architectures_per_second": meta["architectures_per_second"],
        "dataset": search.run.dataset.info.name,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "config_hash": configs.fingerprint(config),
        "params_digest": train.digest(state.weights.params),
    }


def built(config: ConfigDict, arc: str, *, as_searched: bool = False) -> ConfigDict:
    """The config that trains an architecture on its own.

    Args:
      config: The search's.
      arc: The architecture.
      as_searched: Whether the net is as deep and wide as the shared one, and trained as long,
        whatever `search.built_*` say.
    """
    options, config = config.search, config.copy_and_resolve_references()
    config.search = configs.defaults().search
    config.model.arc = arc
    if not as_searched:
        config.model.layers = options.built_layers or config.model.layers
        config.model.features = options.built_features or config.model.features
        config.train.epochs = options.built_epochs or config.train.epochs
    return experiment.without_idle_rules(config)


def costs_of(config: ConfigDict) -> dict[str, int]:
    """Of a config's net, by the kinds that `analysis.layer_costs` counts."""
    info = data.describe(config.data)
    every = analysis.layer_costs(experiment.abstract_model(config, info), info.image_shape)
    kinds = ("params", "macs", "bops", "packed_bytes")
    return {kind: sum(getattr(cost, kind) for cost in every) for kind in kinds}
