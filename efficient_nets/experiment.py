"""A config made real: devices, data, net, optimizer, and where each array lies."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict

from efficient_nets import config as configs
from efficient_nets import data, layers, models, optim, paths, sharding, tasks
from efficient_nets.errors import UserError


class TrainState(NamedTuple):
    """All that a run is; what a checkpoint holds. Trees are nested dicts named by module path.

    Attributes:
      step: int32, steps made. The position in the data and the random numbers follow from it.
      key: Key data of the run's random numbers.
      params: Parameters.
      stats: The model's other state: running averages.
      optimizer: State of the optax chain.
      ema: Moving averages of `params` and `stats`, under these names, or an empty dict.
    """

    step: Array
    key: Array
    params: Any
    stats: Any
    optimizer: Any
    ema: Any

    @property
    def net(self) -> dict[str, Any]:
        """`params` and `stats` of the net that is evaluated: the averaged one if it is kept."""
        return self.ema or {"params": self.params, "stats": self.stats}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Built by `build`; everything here is static, the arrays are in a `TrainState`.

    Attributes:
      config: The checked config.
      mesh: The devices.
      dataset: See `data.load`.
      task: What the net is trained for.
      graph: The net without its arrays; `nnx.merge(graph, params, stats)` is the net.
      abstract: A `TrainState` of shapes with shardings.
      epoch_steps: Steps an epoch.
      total_steps: Steps of the run.
    """

    config: ConfigDict
    mesh: Mesh
    dataset: data.Dataset
    task: tasks.Task
    graph: nnx.GraphDef
    optimizer: Any
    rate: optim.Schedule
    abstract: TrainState
    epoch_steps: int
    total_steps: int

    def initial_state(self) -> TrainState:
        """Fresh parameters, made on the devices where they stay."""
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract)
        init = functools.partial(_init, self.config, self.dataset.info, self.optimizer)
        return jax.jit(init, out_shardings=shardings, compiler_options=run_once())()

    def steps(self, epochs: float) -> int:
        return max(round(epochs * self.epoch_steps), 1)


def build_model(config: ConfigDict, info: data.Info, key: Array) -> nnx.Module:
    """The architecture in plain layers, then converted by `config.layers`."""
    plain_key, convert_key = jax.random.split(key)
    options = {name: value for name, value in config.model.items() if name != "name"}
    model = models.create(
        config.model.name,
        image_shape=info.image_shape,
        num_classes=info.num_classes,
        rngs=nnx.Rngs(plain_key),
        **options,
    )
    return convert(config, model, convert_key)


def convert(config: ConfigDict, model: nnx.Module, key: Array) -> nnx.Module:
    """The net with `config.layers` and `config.dtype` applied."""
    model = layers.convert(model, [dict(rule) for rule in config.layers], key)
    return layers.set_compute_dtype(model, jnp.dtype(config.dtype))


def abstract_model(config: ConfigDict, info: data.Info) -> nnx.Module:
    """`build_model` without arrays: shapes only."""
    return nnx.eval_shape(lambda: build_model(config, info, jax.random.key(config.seed)))


def without_idle_rules(config: ConfigDict) -> ConfigDict:
    """A copy whose rules of optimizer and sharding each match a parameter, or they were errors.

    For a config made of another one, whose net has parameters that this one's has not.
    """
    config = config.copy_and_resolve_references()
    model = abstract_model(config, data.describe(config.data))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    for section in (config.optimizer, config.sharding):
        idle = paths.unmatched(section.rules, params)
        section.rules = tuple(rule for rule in section.rules if rule["match"] not in idle)
    return config


def build(config: ConfigDict, dataset: data.Dataset, *, training: bool = True) -> Experiment:
    """Checks the config against data and devices and puts the experiment together.

    Args:
      training: False is for evaluation alone, where any number of devices will do.

    Raises:
      UserError: naming the field that does not fit.
    """
    configs.check(config)
    mesh = sharding.make_mesh(config.sharding.fsdp)
    if training:
        sharding.check_batch("train.batch_size", config.train.batch_size, mesh)
    if dataset.train is None:
        raise UserError("data.train='': an experiment needs a split to train on")
    epoch_steps = len(dataset.train) // config.train.batch_size
    if not epoch_steps:
        raise UserError(
            f"train.batch_size={config.train.batch_size}: the train split has only "
            f"{len(dataset.train)} samples"
        )
    total_steps = max(round(config.train.epochs * epoch_steps), 1)
    if config.optimizer.accumulate > total_steps:
        raise UserError(
            f"optimizer.accumulate={config.optimizer.accumulate}: the run has only "
            f"{total_steps} steps, so that it would change nothing"
        )
    graph, params, _ = nnx.split(abstract_model(config, dataset.info), nnx.Param, ...)
    updates = epoch_steps / config.optimizer.accumulate
    rate = optim.schedule(
        config.schedule, config.optimizer.learning_rate, config.train.epochs, updates
    )
    task, params = tasks.create(config), nnx.to_pure_dict(params)
    if task.updates:
        optimizer = optim.apart(config.optimizer, rate, params, task.updates)
    else:
        optimizer = optim.optimizer(config.optimizer, rate, params)
    shapes = jax.eval_shape(functools.partial(_init, config, dataset.info, optimizer))
    shardings = sharding.state_shardings(shapes, shapes.params, config.sharding.rules, mesh)
    abstract = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, shardings
    )
    return Experiment(
        config=config,
        mesh=mesh,
        dataset=dataset,
        task=task,
        graph=graph,
        optimizer=optimizer,
        rate=rate,
        abstract=abstract,
        epoch_steps=epoch_steps,
        total_steps=total_steps,
    )


def run_once() -> dict:
    """Compiler options for a program that runs once.

    XLA:CPU optimises every random draw for a second; a ResNet's initialisation would take longer
    than its training step to compile.
    """
    if jax.default_backend() != "cpu":
        return {}
    return {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def average_from(config: ConfigDict, params, stats) -> dict:
    """The moving average where it begins; empty where the config has none."""
    if not config.train.ema:
        return {}
    return jax.tree.map(jnp.copy, {"params": params, "stats": stats})


def _init(config: ConfigDict, info: data.Info, optimizer) -> TrainState:
    model_key, run_key = jax.random.split(jax.random.key(config.seed))
    _, params, stats = nnx.split(build_model(config, info, model_key), nnx.Param, ...)
    params, stats = nnx.to_pure_dict(params), nnx.to_pure_dict(stats)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        key=jax.random.key_data(run_key),
        params=params,
        stats=stats,
        optimizer=optimizer.init(params),
        ema=average_from(config, params, stats),
    )
