"""`--mode=latency`: the forward time of every candidate of every searched layer, on this machine.

    python -m efficient_nets.main --config=configs/winas.py --mode=latency --workdir=DIR

writes DIR/latency.json, which `config.winas.latency` names for a search. Layers of one shape are
measured once, as nets for use: kernels are transformed before. What is measured is what is computed
here: rounding is arithmetic in float, so that times of rounded candidates are those of a
simulation, not of integer kernels. A table from a machine that has these can be put in its place:
the file is plain JSON.
"""

import dataclasses
import pathlib
import platform
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from efficient_nets import analysis, data, experiment, layers, reporting, workdirs
from efficient_nets import config as configs
from efficient_nets.layers import Layer
from efficient_nets.search import candidates as space
from efficient_nets.search import costs

FILE = "latency.json"


def measure(config: ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
    """Measures on one device, and writes the table.

    Args:
      config: `winas.candidates` and `winas.layers` say of what, `winas.latency_batch_size` for how
        many images, `winas.latency_repeats` how often.
      workdir: Gets latency.json.

    Returns:
      What latency.json holds: `seconds`, medians by a layer's shape and a candidate, and what they
      were measured with.

    Raises:
      UserError: on a config that does not fit.
    """
    configs.check(config)
    candidates, paths = space.of_config(config), space.searched(config)
    workdirs.claim(workdir, config)
    every = {space.label(candidate): candidate for candidate in (*candidates, space.REFERENCE)}
    repeats, size = config.winas.latency_repeats, config.winas.latency_batch_size
    first = {shape: path for path, shape in reversed(costs.shapes(config, paths).items())}
    info = data.describe(config.data)
    model = experiment.abstract_model(config, info)
    found = dict(layers.layers(model))
    inputs = {c.name: c.input_shape for c in analysis.layer_costs(model, info.image_shape)}
    seconds: dict[str, dict[str, float]] = {shape: {} for shape in reversed(first)}
    with reporting.progress(len(seconds) * len(every), desc="measuring", unit="candidate") as bar:
        for shape, own in seconds.items():
            path = first[shape]
            for name, candidate in every.items():
                layer = _layer(found[path], candidate)
                own[name] = seconds_of(layer, (size, *inputs[path]), config.dtype, repeats)
                bar.update()
    table = with_conditions(seconds, size, repeats, config.dtype)
    write(table, workdir)
    return table


def with_conditions(
    seconds: dict[str, dict[str, float]], batch_size: int, repeats: int, dtype: str
) -> dict[str, Any]:
    """The table: times and what they were measured with."""
    return {
        "device": f"{jax.devices()[0].device_kind}, {platform.processor() or platform.machine()}",
        "host": platform.node(),
        "jax": jax.__version__,
        "batch_size": batch_size,
        "repeats": repeats,
        "dtype": dtype,
        "rounding": "computed in float",
        "seconds": seconds,
    }


def write(table: dict[str, Any], workdir: pathlib.Path) -> None:
    """Writes workdir/latency.json, which `costs.read` reads, and prints the table."""
    if jax.process_index() == 0:
        reporting.write_json(workdir / FILE, table)
        print(text(table))
        print(f"table        {workdir / FILE}", flush=True)


def _layer(like: Layer, candidate: space.Candidate) -> Layer:
    """A layer of that geometry with fresh weights, for use."""
    geometry = like.geometry
    made = layers.Conv(
        geometry.in_features,
        geometry.features,
        geometry.kernel_size,
        strides=geometry.strides,
        padding=geometry.padding,
        dilation=geometry.dilation,
        groups=geometry.groups,
        use_bias=geometry.use_bias,
        spec=dataclasses.replace(like.spec, **candidate),
        dtype=geometry.dtype,
        rngs=nnx.Rngs(0),
    )
    return layers.transform_kernels(made)


def seconds_of(module: nnx.Module, shape: Sequence[int], dtype: str, repeats: int) -> float:
    """The median over `repeats` calls, behind one that compiles and one that warms up.

    Args:
      module: In evaluation mode.
      shape: Of its input, the batch axis included.
      dtype: Of its input.
      repeats: How many calls.
    """
    graph, state = nnx.split(module)
    forward = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    x = jax.random.normal(jax.random.key(0), shape, jnp.dtype(dtype))
    times = []
    for _ in range(repeats + 2):
        begin = time.perf_counter()
        jax.block_until_ready(forward(state, x))
        times.append(time.perf_counter() - begin)
    return statistics.median(times[2:])


def text(table: dict[str, Any]) -> str:
    """A line a shape, and one for each of what was measured in it, in microseconds."""
    lines = [f"microseconds for {table['batch_size']} images on {table['device']}"]
    for shape, own in table["seconds"].items():
        lines.append(shape)
        lines += [f"  {1e6 * seconds:>10,.1f}  {name}" for name, seconds in own.items()]
    return "\n".join(lines)
