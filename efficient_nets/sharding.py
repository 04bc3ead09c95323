"""Devices: one mesh, where each array lies on it, and how host batches get there.

The mesh has axes `data` and `fsdp`. Batches are cut over both; parameters (and what the optimizer
keeps of them) are copied to every device, or cut over `fsdp` where a rule says so. Under `jax.jit`
a mean over the batch is then over the global batch, so batch norm does not depend on the devices.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from efficient_nets import names, paths
from efficient_nets.errors import UserError

BATCH_AXES = ("data", "fsdp")
RULE_FIELDS = ("match", "shard")
DEFAULT_RULES = (dict(match="kernel", shard="fsdp"),)


def join_processes() -> None:
    """Makes this process one of several of a run.

    Slurm, Open MPI, Kubernetes and Cloud TPU tell JAX which one it is. Elsewhere the environment
    does: JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Raises:
      UserError: if neither does.
    """
    given = {
        name: os.environ.get(f"JAX_{name.upper()}") for name in ("num_processes", "process_id")
    }
    try:
        jax.distributed.initialize(**{name: int(value) for name, value in given.items() if value})
    except ValueError as error:
        raise UserError(
            f"--distributed: {error} Where no Slurm, Open MPI, Kubernetes or Cloud TPU tells, set "
            "JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from None


def make_mesh(fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices (of all processes) as a `(data, fsdp)` mesh.

    Raises:
      UserError: if `fsdp` does not divide their number.
    """
    devices = jax.devices() if devices is None else devices
    if fsdp < 1 or len(devices) % fsdp:
        raise UserError(f"sharding.fsdp={fsdp}: must divide the number of devices, {len(devices)}")
    shape = (len(devices) // fsdp, fsdp)
    return jax.make_mesh(shape, BATCH_AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def check_batch(field: str, batch_size: int, mesh: Mesh) -> None:
    if batch_size % mesh.size:
        below = batch_size // mesh.size * mesh.size
        near = ", ".join(str(size) for size in (below, below + mesh.size) if size)
        raise UserError(
            f"{field}={batch_size}: {mesh.size} devices cannot divide it; nearest allowed: {near}"
        )


def round_up(batch_size: int, mesh: Mesh) -> int:
    """The nearest size from `batch_size` on that the devices divide."""
    return -(-batch_size // mesh.size) * mesh.size


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def state_shardings(state: Any, params: Any, rules: Sequence, mesh: Mesh) -> Any:
    """A sharding for each leaf of a train state, by `config.sharding.rules` on parameter paths.

    What the optimizer and the average keep of a parameter lies as it does. Under `shard='fsdp'` it
    is cut along its largest axis that the mesh divides, if any; all else is on every device.

    Raises:
      UserError: on a rule that matches no parameter.
    """
    rules = [dict(rule) for rule in rules]
    for rule in rules:
        names.pick("sharding.rules.shard", rule.get("shard", ""), {"fsdp": 0, "replicate": 0})
    parameters, size = paths.named_leaves(params), mesh.shape["fsdp"]
    given = [rule for rule in rules if rule not in DEFAULT_RULES]
    if missing := paths.unmatched(given, params):
        raise UserError(
            f"sharding.rules: {missing[0]!r} matches no parameter: {', '.join(parameters)}"
        )

    def place(leaf: str, x: jax.ShapeDtypeStruct) -> NamedSharding:
        parameter = _parameter_of(leaf, parameters)
        fits = [axis for axis, length in enumerate(x.shape) if length % size == 0]
        cut = parameter and paths.lookup(rules, parameter, "shard", "replicate") == "fsdp"
        if size == 1 or not fits or not cut:
            return replicated(mesh)
        axis = max(fits, key=lambda axis: x.shape[axis])
        return NamedSharding(mesh, P(*(None,) * axis, "fsdp"))

    return paths.map_named(place, state)


def _parameter_of(leaf: str, parameters: Mapping) -> str | None:
    """`stem/kernel` of `optimizer/1/0/trace/stem/kernel`: the parameter that a path ends in."""
    parts = leaf.split("/")
    endings = ("/".join(parts[start:]) for start in range(len(parts)))
    return next((ending for ending in endings if ending in parameters), None)


def process_rows(batch_size: int) -> slice:
    """The rows of a global batch that this process feeds."""
    each = batch_size // jax.process_count()
    return slice(jax.process_index() * each, (jax.process_index() + 1) * each)


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh, *, stacked: bool = False) -> dict:
    """This process's rows to global arrays cut along the batch axis (the second one if stacked)."""
    spec = P(None, BATCH_AXES) if stacked else P(BATCH_AXES)
    place = NamedSharding(mesh, spec)
    return {key: jax.make_array_from_process_local_data(place, rows) for key, rows in batch.items()}


def put_replicated(tree: Any, mesh: Mesh) -> Any:
    """Arrays that every process holds in full to every device."""
    place = replicated(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(place, x, x.shape), tree)


def fetch(tree: Any) -> Any:
    """Global arrays to NumPy on every process, gathering what is cut over processes."""
    from jax.experimental import multihost_utils

    def get(x):
        if x.is_fully_addressable or x.is_fully_replicated:
            return np.asarray(x)
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))

    return jax.tree.map(get, tree)
