"""What is static about a search over cells, and its steps, which are pure functions.

`cell_search` has the loop around them.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from ml_collections import ConfigDict

from efficient_nets import config as configs
from efficient_nets import data, experiment, names, sharding, train
from efficient_nets.errors import UserError
from efficient_nets.experiment import Experiment, TrainState
from efficient_nets.layers import recalibrate
from efficient_nets.models.space import Space
from efficient_nets.search import cell_costs, relaxation, rewards, strategies
from efficient_nets.search.rewards import ArchitectureCost

NET = "cells"
# Streams of random numbers.
OF_START, OF_PROPOSALS, OF_UPDATES, OF_SHOWN, OF_FINALISTS, OF_RANKED = range(6)
# Where they branch off. A key that is folded with i is its i-th one of a split, and the weights'
# training has the first of these: no split is that long.
BRANCH = 0x5EA2C4


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

        def of(architecture):
            return self.cost.of(relaxation.one_hots(self.space, architecture))

        return jax.vmap(of)(architectures)

    def rewards(self, accuracies: Array, costs: Array) -> Array:
        """`(n,)`, by `config.search.reward`."""
        options = self.run.config.search
        if options.reward == "accuracy":
            return accuracies
        return rewards.cost_aware(accuracies, costs, self.target, tuple(options.exponents))

    def told(self, accuracies: Array, costs: Array) -> Array:
        """What the strategy is told: rewards, or `(n, 2)` of both to "nsga2"."""
        if self.run.config.search.strategy == "nsga2":
            return rewards.objectives(accuracies, costs / self.target)
        return self.rewards(accuracies, costs)

    def key(self, stream: int, step: Array | int = 0, number: Array | int = 0) -> Array:
        """Random numbers of a step, which nothing else has."""
        key = jax.random.fold_in(jax.random.key(self.run.config.seed), BRANCH)
        for branch in (stream, step, number):
            key = jax.random.fold_in(key, branch)
        return key

    def of_one(self, weights: TrainState) -> TrainState:
        """The weights as those of `judged`, with any architecture."""
        stats = {name: arrays for name, arrays in weights.stats.items() if name != "choices"}
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
    names.pick("search.strategy", options.strategy, strategies.STRATEGIES)
    names.pick("search.reward", options.reward, rewards.REWARDS)
    if config.model.mixes:
        raise UserError("model.mixes=True: a search sets it itself, for search.strategy='darts'")
    numbers = [x for x in options.exponents if isinstance(x, int | float)]
    if len(numbers) != 2 or len(options.exponents) != 2:
        raise UserError(
            f"search.exponents={options.exponents}: give two numbers, below and above the target"
        )
    if options.warmup_epochs >= config.train.epochs:
        raise UserError(
            f"search.warmup_epochs={options.warmup_epochs}: must be below train.epochs="
            f"{config.train.epochs}"
        )
    by_gradient = is_gradient(strategies.STRATEGIES[options.strategy])
    default = configs.defaults().search
    others = {name: False for name in strategies.STRATEGIES if name != options.strategy}
    heeded = dict(cost_weight=by_gradient, updates=not by_gradient)
    heeded["exponents"] = options.reward != "accuracy"
    heeded["target"] = options.reward != "accuracy" or by_gradient
    for field, heeds in (heeded | others).items():
        if not heeds and options[field] != default[field]:
            raise UserError(
                f"search.{field}={_plain(options[field])}: nothing heeds it with search.strategy="
                f"{options.strategy!r} and search.reward={options.reward!r}"
            )
    if options.latency and options.cost != cell_costs.LATENCY:
        raise UserError(f"search.latency={options.latency!r}: it is for search.cost='latency'")
    why = "a search has none; set it in the built config"
    configs.check_off(config, (*configs.NOT_IN_A_SEARCH, "checkpoint.convert_from"), why)


def _plain(value: Any) -> Any:
    return value.to_dict() if isinstance(value, ConfigDict) else value


def prepare(config: ConfigDict, dataset: data.Dataset) -> Search:
    """The search of a checked config.

    Raises:
      UserError: on what does not fit data, devices, space or strategy.
    """
    options = config.search
    space = cell_costs.space_of(config)
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
    search = Search(run, judged, space, strategy, cost, mean_cost, target, interval)
    if not search.phases(run.total_steps):
        raise UserError(
            f"search.interval={options.interval}: the strategy would learn nothing in "
            f"{run.total_steps} steps, of which {options.warmup_epochs} epochs are warm-up"
        )
    # What the strategy refuses, as more finalists than it keeps, is better known now.
    jax.eval_shape(functools.partial(_rehearsed, search))
    return search


def _rehearsed(search: Search) -> Any:
    """All that is asked of the strategy, once."""
    options, key = search.run.config.search, search.key(OF_START)
    state = search.strategy.init(key)
    if not search.by_gradient:
        architectures = search.strategy.propose(state, key, options.proposals)
        zeros = jnp.zeros(options.proposals)
        state, _ = search.strategy.update(state, architectures, search.told(zeros, zeros + 1))
    numbers = (options.shown, options.finalists)
    return [search.strategy.finalists(state, key, number) for number in numbers]


def weight_steps(search: Search, weights: TrainState, strategy, batch, resident, *, count: int):
    """`count` steps of the weights, each under an architecture that the strategy proposes. Pure.

    Momentum and decay move what that architecture has not too, as in ENAS's code.

    Returns:
      The new weights, and metrics as of `train.train_steps`.
    """

    def one(weights, batch):
        key = search.key(OF_PROPOSALS, weights.step)
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
    key = search.key(OF_UPDATES, step, number)
    return search.strategy.propose(strategy, key, search.run.config.search.proposals)


def tell(search: Search, strategy, architectures: Array, accuracies: Array) -> tuple[Any, dict]:
    """The strategy's state once it is told their rewards, and metrics. Pure."""
    costs = search.costs(architectures)
    told = search.told(accuracies, costs)
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
    key = search.key(OF_UPDATES, weights.step)
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
