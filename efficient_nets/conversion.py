"""Starting from another run's trained net, converted: `config.checkpoint.convert_from`.

So does a net whose kernels are decomposed from those that `config.pretrain` trained.

The net is built as that run built it, gets its weights, and is then what `layers.convert` makes of
it by this config's rules: a linear net starts quadratic with `start='relinear'`.
"""

import pathlib

import jax
from flax import nnx

from efficient_nets import experiment, layers, pretraining, workdirs
from efficient_nets.errors import UserError
from efficient_nets.experiment import Experiment, TrainState


def converted_start(
    run: Experiment, state: TrainState, first: pathlib.Path | None = None
) -> TrainState:
    """The fresh state with the parameters and statistics of the converted net in it.

    Args:
      run: The experiment.
      state: Its fresh state.
      first: The workdir of the run that `config.pretrain` made, else that of `convert_from`.

    Raises:
      UserError: if the other run is of another architecture or another number of classes, or the
        rules make another net of it than of a plain one.
    """
    field = "checkpoint.convert_from" if first is None else "pretrain"
    folder = first or pathlib.Path(run.config.checkpoint.convert_from)
    source = workdirs.read_config(field, folder)
    if first is None:
        _check_same_model(field, folder, source, run)
    graph, found = workdirs.trained_net(field, folder, source, run)
    config = run.config
    if first is not None:
        # What the first run has of the rules' starts is trained since.
        config = config.copy_and_resolve_references()
        config.layers = tuple(map(pretraining.without_start, config.layers))

    def convert(found):
        model = nnx.merge(graph, found["params"], found["stats"])
        model = experiment.convert(config, model, jax.random.key(config.seed))
        _check_same(field, model, nnx.merge(run.graph, *run.abstract[2:4]))
        _, params, stats = nnx.split(model, nnx.Param, ...)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(stats)

    shardings = jax.tree.map(lambda x: x.sharding, (run.abstract.params, run.abstract.stats))
    options = experiment.run_once()
    params, stats = jax.jit(convert, out_shardings=shardings, compiler_options=options)(found)
    ema = experiment.average_from(run.config, params, stats)
    return state._replace(params=params, stats=stats, ema=ema)


def _check_same_model(field: str, folder: pathlib.Path, source, run: Experiment) -> None:
    here, there = run.config.model.to_dict(), source.model.to_dict()
    differences = [
        f"{key}: there {there.get(key)!r}, here {here.get(key)!r}"
        for key in sorted({*here, *there})
        if here.get(key) != there.get(key)
    ]
    if differences:
        raise UserError(f"{field}={folder} is of another model ({'; '.join(differences)})")


def _check_same(field: str, converted: nnx.Module, expected: nnx.Module) -> None:
    """Rules see the source's specs where they leave a field open, a plain net's otherwise."""
    specs = [
        {
            path: (
                *layer.spec.storage,
                layer.spec.algorithm,
                layer.spec.precision,
                layer.geometry.kernel_shape,
            )
            for path, layer in layers.layers(model)
        }
        for model in (converted, expected)
    ]
    for path in sorted({*specs[0], *specs[1]}):
        if specs[0].get(path) != specs[1].get(path):
            raise UserError(
                f"{field}: layer {path} of the converted net is {specs[0].get(path)}, by this "
                f"config's `layers` alone it is {specs[1].get(path)}: name the field in a rule"
            )
