"""A search for the architecture of a net of cells, by `config.search.strategy`.

    python -m efficient_nets.main --config=configs/enas_mnist.py --workdir=DIR
    python -m efficient_nets.main --config=DIR/built_config.py --workdir=DIR/built

The weights of the shared net and the strategy learn in turn (ENAS, arXiv 1802.03268, section 2.2):

    weights     `search.interval` training batches, each under an architecture that the strategy
                proposes
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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict
from tqdm import tqdm

from efficient_nets import (
    analysis,
    data,
    experiment,
    reporting,
    sharding,
    train,
    workdirs,
)
from efficient_nets import config as configs
from efficient_nets.checkpoint import Checkpoints
from efficient_nets.evaluation import put_resident
from efficient_nets.experiment import TrainState
from efficient_nets.preemption import Preemption
from efficient_nets.search import (
    cell_costs,
    cell_report,
    cell_steps,
    judging,
    latency,
    rewards,
)
from efficient_nets.search.cell_steps import (
    OF_FINALISTS,
    OF_SHOWN,
    OF_START,
    Search,
    SearchState,
)


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
    cell_steps.check(config)
    dataset = data.load(config.data)
    search = cell_steps.prepare(config, dataset)
    workdirs.claim(workdir, config)
    checkpoints = Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep)
    state, meta = _start(search, checkpoints)
    reporter = reporting.Reporter(
        workdir,
        int(state.weights.step),
        search.run.total_steps,
        tensorboard=config.log.tensorboard,
    )
    resident = put_resident(search.run, "train")
    judge = judging.Judge(search.judged, config.search.norm_batches, resident)
    with contextlib.closing(checkpoints), contextlib.closing(reporter):
        if not meta:
            reporter.line(cell_report.space_line(search))
        learner = Learner(search, int(state.weights.step))
        with contextlib.closing(learner), train.explaining_divergence(checkpoints):
            loop = Loop(search, learner, judge, checkpoints, reporter)
            state, meta = loop(state, meta, resident)
        report = found(search, state, meta, learner, judge)
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
    cell_steps.check(config)
    workdirs.claim(workdir, config)
    options = config.search
    table = cell_costs.measure_cells(config, options.latency_batch_size, options.latency_repeats)
    latency.write(table, workdir)
    return table


def _start(search: Search, checkpoints: Checkpoints) -> tuple[SearchState, dict]:
    run, everywhere = search.run, sharding.replicated(search.run.mesh)
    init = functools.partial(search.strategy.init, search.key(OF_START))
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


@dataclasses.dataclass(frozen=True)
class Loop:
    """Weights and strategy in turn, to the end."""

    search: Search
    learner: "Learner"
    judge: judging.Judge
    checkpoints: Checkpoints
    reporter: reporting.Reporter

    def __call__(self, state: SearchState, meta: dict, resident) -> tuple[SearchState, dict]:
        """The last state, and the meta data of its checkpoint."""
        search, run, step = self.search, self.search.run, int(state.weights.step)
        config = run.config
        weights_fn = jax.jit(
            functools.partial(cell_steps.weight_steps, search),
            static_argnames="count",
            donate_argnums=0,
        )
        log = cell_report.Log(search, self.reporter, meta)
        size, every = config.train.batch_size, config.log.every_steps
        meter = reporting.Meter(meta, self.reporter, size, every, log.training_line)
        evaluated = run.steps(config.evaluate.every_epochs)
        saved = run.steps(config.checkpoint.every_epochs)
        periods = [search.interval, evaluated, saved]
        dispatches = train.batches_of(run, step, periods, on_device=resident is not None)
        with Preemption() as preemption, contextlib.closing(dispatches):
            for count, batch in dispatches:
                weights, metrics = weights_fn(
                    state.weights, state.strategy, batch, resident, count=count
                )
                state = state._replace(weights=weights)
                meter.push(step, count, metrics)
                step += count
                last, scores = step == run.total_steps, {}
                if search.is_phase(step) and search.by_gradient:
                    state = self._descended(state, step, log)
                elif search.is_phase(step):
                    state = self._told(state, step, log, meter)
                if last or step % evaluated == 0:
                    meter.settle()
                    with meter.paused():
                        scores = log.evaluation(step, *self._shown(state))
                stop = preemption.reached()
                if last or stop or step % saved == 0:
                    meter.settle()  # raises if the state is not worth saving
                    meta = meter.meta() | log.meta()
                    self.checkpoints.save(step, state.saved(), meta=meta, metrics=scores or None)
                if stop and not last:
                    self.checkpoints.wait()
                    self.reporter.line(
                        f"Stopped by SIGTERM; saved step {step}. The same command goes on."
                    )
                    preemption.exit()
            self.checkpoints.wait()
        return state, meta

    def _descended(self, state: SearchState, step: int, log) -> SearchState:
        """Behind a step of the logits, which nothing waits for."""
        strategy, metrics = self.learner.descend(state)
        log.push(step, metrics)
        if step % self.search.run.config.log.every_steps == 0:
            log.settle(but=1)
        return state._replace(strategy=strategy)

    def _told(self, state: SearchState, step: int, log, meter) -> SearchState:
        """Behind a phase of updates, whose time is not the weights'."""
        meter.settle()
        with meter.paused():
            begin = time.perf_counter()
            strategy = state.strategy
            for number in self.learner.updates():
                strategy, metrics = self.learner.update(state.weights, strategy, number)
                log.push(step, metrics)
            log.settle()
            log.timed(time.perf_counter() - begin)
        return state._replace(strategy=strategy)

    def _shown(self, state: SearchState):
        """Some architectures, their accuracies on the same images; scores of the best on splits."""
        number = self.search.run.config.search.shown
        architectures = self.learner.candidates(state, OF_SHOWN, number)
        accuracies = self.learner.measured(state, architectures)
        best = architectures[accuracies.argmax()]
        scores = self.judge(self.search.of_one(state.weights), best, ("validation", "test"))
        return architectures, accuracies, scores


class Learner:
    """What the strategy learns by: validation batches, and what is compiled for it.

    Args:
      search: The search.
      step: From which it goes on.
    """

    def __init__(self, search: Search, step: int):
        run, size = search.run, search.run.config.search.batch_size
        self.search = search
        self._resident = put_resident(run, "validation")
        everywhere = dict(out_shardings=sharding.replicated(run.mesh))
        # Three programs, as the one in the middle, which is the net, is for what is shown too.
        self._propose = jax.jit(functools.partial(cell_steps.propose, search), **everywhere)
        self._measure = jax.jit(functools.partial(judging.accuracies, search.judged), **everywhere)
        self._tell = jax.jit(functools.partial(cell_steps.tell, search), **everywhere)
        self._descend = jax.jit(functools.partial(cell_steps.descend, search), **everywhere)
        self._give = {
            known: jax.jit(give, static_argnums=2, **everywhere)
            for known, give in (
                (True, search.strategy.finalists),
                (False, search.strategy.propose),
            )
        }
        self._batches = data.train_batches(
            run.dataset.validation,
            size,
            seed=run.config.seed + 1,
            first_step=search.phases(step) * search.updates,
            rows=sharding.process_rows(size),
        )

    def updates(self):
        """The numbers of a phase's updates, with a progress bar."""
        hidden = jax.process_index() > 0
        return tqdm(range(self.search.updates), "updates", leave=False, delay=5, disable=hidden)

    def update(self, weights: TrainState, strategy: Any, number: int) -> tuple[Any, dict]:
        """The strategy once some architectures are proposed, measured and told; and metrics."""
        batch = sharding.put_batch(next(self._batches), self.search.run.mesh)
        architectures = self._propose(strategy, weights.step, np.int32(number))
        accuracies = self._measure(weights, architectures, batch, self._resident)
        return self._tell(strategy, architectures, accuracies)

    def descend(self, state: SearchState) -> tuple[Any, dict]:
        """The strategy behind a step of its logits, and metrics, both on their way."""
        batch = sharding.put_batch(next(self._batches), self.search.run.mesh)
        return self._descend(state.weights, state.strategy, batch, self._resident)

    def candidates(self, state: SearchState, stream: int, number: int) -> np.ndarray:
        """Some of what the strategy holds for the best: `(at most number, 2, B, 2, 3)`, each once.

        Before its first phase it knows of none, and they are some that it proposes.
        """
        step = int(state.weights.step)
        give = self._give[self.search.phases(step) > 0]
        found = np.asarray(give(state.strategy, self.search.key(stream, step), number))
        return found[sorted(np.unique(found, axis=0, return_index=True)[1])]

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


def found(
    search: Search, state: SearchState, meta: dict, learner: Learner, judge: judging.Judge
) -> dict[str, Any]:
    """What result.json holds: the finalists on the whole validation split, and the best of them.

    That is the one of the greatest reward, for all strategies. The test split is looked at for it
    alone.
    """
    config, space, begin = search.judged.config, search.space, time.perf_counter()
    weights = search.of_one(state.weights)
    finalists = learner.candidates(state, OF_FINALISTS, config.search.finalists)
    costs = np.asarray(search.costs(jnp.asarray(finalists)))
    hidden, scores = jax.process_index() > 0, []
    for tokens in tqdm(finalists, "finalists", leave=False, delay=5, disable=hidden):
        scores.append(judge(weights, tokens))
    accuracies = np.array([score["validation/accuracy"] for score in scores])
    told = np.asarray(search.rewards(jnp.asarray(accuracies, jnp.float32), jnp.asarray(costs)))
    best = int(told.argmax())
    front = rewards.pareto_front(rewards.objectives(jnp.asarray(accuracies), jnp.asarray(costs)))
    order = np.argsort(-accuracies, kind="stable")
    of_best = judge(weights, finalists[best], ("validation", "test"))
    return {
        "arc": space.text(finalists[best]),
        "lists": space.lists(finalists[best]),
        "ops": list(space.ops),
        "precisions": list(space.precisions),
        "strategy": config.search.strategy,
        **of_best,
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
        "seconds": meta["seconds"] + time.perf_counter() - begin,
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
      as_searched: Whether the net is as deep and wide as the shared one, whatever
        `search.built_*` say.
    """
    options, config = config.search, config.copy_and_resolve_references()
    config.search = configs.defaults().search
    config.model.arc = arc
    if not as_searched:
        config.model.layers = options.built_layers or config.model.layers
        config.model.features = options.built_features or config.model.features
        lengthen(config, options.built_epochs or config.train.epochs)
    return experiment.without_idle_rules(config)


def lengthen(config: ConfigDict, epochs: float) -> None:
    """Makes a run one of so many epochs, and the ramp of drop-path as much longer or shorter."""
    longer = epochs / config.train.epochs
    config.model.drop_path_steps = round(config.model.drop_path_steps * longer)
    config.train.epochs = epochs


def costs_of(config: ConfigDict) -> dict[str, int]:
    """Of a config's net, by the kinds that `analysis.layer_costs` counts."""
    info = data.describe(config.data)
    every = analysis.layer_costs(experiment.abstract_model(config, info), info.image_shape)
    kinds = ("params", "macs", "bops", "packed_bytes")
    return {kind: sum(getattr(cost, kind) for cost in every) for kind in kinds}
