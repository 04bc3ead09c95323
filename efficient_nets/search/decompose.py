"""`--mode=decompose`: a trained net's kernels as cores, before anything is trained.

For each layer that a rule with start='kept' factorizes: its ranks - also those that depend on the
kernel, `evbmf` and `energy` -, its error, and the error at other shares of the parameters. The
ranks go into a config that trains the net from there.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from efficient_nets import analysis, conversion, data, experiment, layers, reporting, workdirs
from efficient_nets import config as configs
from efficient_nets.errors import UserError
from efficient_nets.evaluation import evaluate_all, evaluators
from efficient_nets.layers import rules
from efficient_nets.layers.spec import LayerSpec
from efficient_nets.ops import factorization
from efficient_nets.ops.factorization import Factorization
from efficient_nets.search import decompose_report

SHARES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75)  # of the parameters, of which the error is shown


def build(config: ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
    """Decomposes the net of `config.checkpoint.convert_from`; writes what it found.

    Returns:
      What decompose.json holds: of each layer `ranks`, `params`, `dense_params`, `error`, and
      `errors` by share, with the greatest of its branches; the layers that stay dense; scores of
      the net before and after.

    Raises:
      UserError: without such a net, or a rule that decomposes.
    """
    configs.check(config)
    field, folder = "checkpoint.convert_from", config.checkpoint.convert_from
    if not folder:
        raise UserError(f"{field}='': give the workdir of the trained net that is decomposed")
    workdirs.claim(workdir, config)
    dataset = data.load(config.data)
    source = workdirs.read_config(field, pathlib.Path(folder))
    plain = config.copy_and_resolve_references()
    plain.layers, plain.checkpoint.convert_from = source.layers, ""
    run = experiment.build(experiment.without_idle_rules(plain), dataset, training=False)
    graph, net = conversion.source_net(field, pathlib.Path(folder), source, run)
    model = nnx.merge(graph, net["params"], net["stats"])
    specs = dict(_decomposed_layers(config, model))
    report = {"checkpoint": folder, "dataset": dataset.info.name, "layers": {}, "dense": []}
    found, fields = {}, {}
    total = len(specs) * (1 + len(SHARES))
    with reporting.progress(total, desc="decomposing", unit="kernel") as bar:
        for path, spec in specs.items():
            kernels = {name: b.dense() for name, b in _branches(model, path).items()}
            explicit = factorization.with_ranks(spec.kernel, list(kernels.values()))
            fields[path] = {"kernel": str(explicit)}
            network = explicit.network(next(iter(kernels.values())).shape)
            if not explicit.always and network.params >= network.dense_params:
                report["dense"].append(path)
                fields[path] = {"kernel": factorization.DENSE, "start": "own"}
                bar.update(1 + len(SHARES))
                continue
            found[path] = {
                "kernel": str(explicit),
                "ranks": {bond: network.size(bond) for bond in network.bonds},
                "params": len(kernels) * network.params,
                "dense_params": len(kernels) * network.dense_params,
                "error": _error(explicit, kernels, bar),
                "errors": {
                    str(share): _error(dataclasses.replace(explicit, rank=share), kernels, bar)
                    for share in SHARES
                },
            }
    report["layers"] = found
    built = config.copy_and_resolve_references()
    every = [path for path, _ in layers.layers(model)]
    built.layers = rules.with_fields(built.layers, fields, every)
    built = experiment.without_idle_rules(built)
    report["before"] = evaluate_all(
        evaluators(run), run.abstract._replace(params=net["params"], stats=net["stats"], ema={})
    )
    run = experiment.build(built, dataset, training=False)
    state = conversion.converted_start(run, run.abstract)
    report["after"] = evaluate_all(evaluators(run), state._replace(ema={}))
    for name, net in (("dense", plain), ("factorized", built)):
        cost = analysis.model_cost(
            experiment.abstract_model(net, dataset.info), dataset.info.image_shape
        )
        report[name + "_cost"] = {key: cost[key] for key in ("params", "macs", "packed_bytes")}
    if jax.process_index() == 0:
        decompose_report.write_config(built, report, workdir)
        decompose_report.write(report, workdir)
    return report


def _decomposed_layers(config: ConfigDict, model: nnx.Module) -> Iterator[tuple[str, LayerSpec]]:
    """Of the rules that decompose, the layers and what they become."""
    every = dict(layers.layers(model))
    chosen = rules.specs(model, [dict(rule) for rule in config.layers])
    found = {
        path: spec
        for path, spec in chosen.items()
        if spec.start == "kept" and spec.kernel != factorization.DENSE and path in every
    }
    for path, spec in found.items():
        if spec.joint:
            raise UserError(
                f"layers: {path} has joint={spec.joint!r}: --mode=decompose looks at each layer's "
                "kernel by itself; leave joint out, or train with start='kept', which decomposes "
                "them together"
            )
    if not found:
        raise UserError(
            "layers: no rule has start='kept' and a kernel such as 'tt:0.1', so there is nothing "
            "to decompose"
        )
    yield from found.items()


def _branches(model: nnx.Module, path: str):
    layer = dict(layers.layers(model))[path]
    return {name: getattr(layer, name) for name in layer.spec.branches}


def _error(form: Factorization, kernels: dict[str, jax.Array], bar) -> float:
    """The greatest relative error of the kernels."""
    found = [float(_decomposed_error(form, kernel)) for kernel in kernels.values()]
    bar.update()
    return float(np.max(found))


@functools.partial(jax.jit, static_argnums=0)
def _decomposed_error(form: Factorization, kernel: jax.Array) -> jax.Array:
    network = form.network(kernel.shape)
    cores = factorization.approximate(form.form, network, kernel)
    return factorization.relative_error(network, cores, kernel)
