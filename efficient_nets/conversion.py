"""Starting from another run's trained net, converted: `config.checkpoint.convert_from`.

So does a net whose kernels are decomposed from those that `config.pretrain` trained.

The net is built as that run built it, gets its weights, and is then what `layers.convert` makes of
it by this config's rules: a linear net starts quadratic with `start='relinear'`.

Of a shared net of cells, of all architectures, a net of one architecture is taken out first.
"""

import pathlib
from typing import Any

import jax
from absl import logging
from flax import nnx
from ml_collections import ConfigDict

from efficient_nets import experiment, layers, pretraining, sharding, workdirs
from efficient_nets.errors import UserError
from efficient_nets.experiment import Experiment, TrainState
from efficient_nets.models import cells

# Fields in which a net of cells may differ from the shared net that it is taken out of.
OWN = ("arc", "auxiliary", "drop_path", "drop_path_steps")


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
    source, config = workdirs.read_config(field, folder), run.config
    if first is None:
        _check_same_model(field, folder, source, config)
    graph, found = source_net(field, folder, source, run)
    if _is_taken_out(source, config) and not config.calibration.norm_batches:
        logging.warning(
            "%s=%s is a shared net, whose norms' running averages are of all architectures: "
            "calibration.norm_batches makes them anew for this one.",
            field,
            folder,
        )
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


def source_net(
    field: str, folder: pathlib.Path, source: ConfigDict, run: Experiment
) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """What `workdirs.trained_net` gives; of a shared net of cells, the net of this architecture.

    That one has the other run's weights, `cells.extract`. An auxiliary head is there if this config
    has one; it is fresh if the other run had none. What drop-path draws from is fresh.

    Args:
      field: The field whose value the folder is.
      folder: The other run's workdir.
      source: Its config.
      run: The experiment that starts from it.

    Raises:
      UserError: if the folder holds another net, or a shared net of other fields of `model`.
    """
    if not _is_taken_out(source, run.config):
        return workdirs.trained_net(field, folder, source, run)
    _check_same_model(field, folder, source, run.config)
    graph, found = workdirs.trained_net(field, folder, source, run)
    config = run.config.copy_and_resolve_references()
    config.layers = ()  # which are for the net that is taken out

    def taken_out(found):
        shared = nnx.merge(graph, found["params"], found["stats"])
        net = cells.extract(shared, shared.space.parse(config.model.arc))
        # Of the fresh net nothing but these is computed.
        key = jax.random.fold_in(jax.random.key(config.seed), 1)
        fresh = experiment.build_model(config, run.dataset.info, key)
        if net.auxiliary_head is None or fresh.auxiliary_head is None:
            net.auxiliary_head = nnx.data(fresh.auxiliary_head)
        net.seed, net.calls = nnx.data(fresh.seed), nnx.data(fresh.calls)
        for name in set(OWN) - {"arc"}:
            setattr(net, name, getattr(fresh, name))
        made, params, stats = nnx.split(net, nnx.Param, ...)
        return made, {"params": nnx.to_pure_dict(params), "stats": nnx.to_pure_dict(stats)}

    everywhere, options = sharding.replicated(run.mesh), experiment.run_once()
    return jax.jit(taken_out, out_shardings=everywhere, compiler_options=options)(found)


def _is_taken_out(source: ConfigDict, config: ConfigDict) -> bool:
    """Whether a shared net of cells is there, and the net of an architecture here."""
    both = source.model.name == config.model.name == "cells"
    return both and not source.model.arc and bool(config.model.arc)


def _check_same_model(
    field: str, folder: pathlib.Path, source: ConfigDict, config: ConfigDict
) -> None:
    here, there = config.model.to_dict(), source.model.to_dict()
    own = OWN if _is_taken_out(source, config) else ()
    differences = [
        f"{key}: there {there.get(key)!r}, here {here.get(key)!r}"
        for key in sorted({*here, *there}.difference(own))
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
