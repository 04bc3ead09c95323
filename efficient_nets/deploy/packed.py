"""Nets for use as files: weights as bits, everything else in its own type.

The format is safetensors: other programs can read it, and reading it runs nothing. A rounded kernel
is two arrays there: `NAME`, packed indices (see `ops.packing`), and `NAME:values`, what the indices
stand for, `(1, L)`, or `(features, L)` where each feature has its own; so is any other kernel with
so few values that this is smaller. The file's metadata have shape, bits and type.
"""

import functools
import json
import pathlib

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import numpy as safetensors
from safetensors import safe_open

from efficient_nets import layers, paths
from efficient_nets.deploy.integer import is_settled, to_integers
from efficient_nets.errors import UserError
from efficient_nets.ops import packing

VALUES = ":values"
MAX_BITS = 8


def save(model: nnx.Module, path: pathlib.Path | str) -> int:
    """Writes what `to_integers(model)` computes with; the model may be one of these already.

    A net of int4 operands is written as one of int8.

    Returns:
      The file's bytes: the layer table's `packed_bytes`, and beside them running averages, values
      of the indices and a header.

    Raises:
      UserError: if a quantizer's schedule is not over.
    """
    check_settled(model)
    bits = {}  # None: as many as it takes
    for where, layer in layers.layers(model):
        quantizer = layer.spec.precision.kernel
        for branch in layer.spec.branches:
            name = f"{where}/{branch}/kernel".removeprefix("/")
            gone = quantizer is None or quantizer.stop_epoch
            bits[name] = None if gone else quantizer.bits
    arrays, packed = {}, {}
    for name, value in _leaves(to_integers(model)).items():
        indexed = _indexed(value, bits[name]) if name in bits else None
        if indexed is None:
            arrays[name] = value
            continue
        indices, values, used = indexed
        codes = packing.pack(indices, used)
        if bits[name] is None and codes.nbytes + values.nbytes >= value.nbytes:
            arrays[name] = value
            continue
        arrays[name], arrays[name + VALUES] = codes, values
        packed[name] = {"bits": used, "shape": value.shape}
    path = pathlib.Path(path)
    safetensors.save_file(arrays, path, {"packed": json.dumps(packed)})
    return path.stat().st_size


def check_settled(model: nnx.Module) -> None:
    """Raises a UserError if a quantizer's schedule is not over."""
    for name, found in layers.ranges(model):
        if not is_settled(found):
            raise UserError(f"{name}: its schedule is not over, so the net is not what it will be")


def load(model: nnx.Module, path: pathlib.Path | str, *, operands: str = "int8") -> nnx.Module:
    """The net that `save` wrote, in evaluation mode.

    Args:
      model: A net of the same architecture and layers, folded if that was, with any values, or
        with shapes alone (`nnx.eval_shape`): nothing of it is computed.
      path: The file.
      operands: As `to_integers` takes them, whichever the net had that was saved.

    Raises:
      UserError: if the file is of another net; names a leaf that differs.
    """
    make = functools.partial(to_integers, settle=True, operands=operands)
    net = nnx.eval_shape(make, model)
    with safe_open(path, "np") as file:
        packed = json.loads(file.metadata()["packed"])
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, entry in packed.items():
        indices = packing.unpack(found[name], entry["bits"], tuple(entry["shape"]))
        values = found.pop(name + VALUES)
        columns = np.arange(entry["shape"][-1]) if len(values) > 1 else 0
        found[name] = values[columns, indices]
    graph, state = nnx.split(net)
    shapes = nnx.to_pure_dict(state)
    expected = paths.named_leaves(shapes)
    for name in expected.keys() & found.keys():
        if expected[name].dtype == jnp.int4 and np.all(found[name] == found[name].astype(jnp.int4)):
            found[name] = found[name].astype(jnp.int4)
    for name in sorted({*expected, *found}):
        here, there = (
            f"{x[name].dtype}{list(x[name].shape)}" if name in x else "nothing"
            for x in (expected, found)
        )
        if here != there:
            raise UserError(f"{path} is of another net: {name} is {there} there, {here} here")
    return nnx.merge(graph, paths.map_named(lambda name, _: jnp.asarray(found[name]), shapes))


def _leaves(model: nnx.Module) -> dict[str, np.ndarray]:
    state = nnx.to_pure_dict(nnx.state(model))
    return {name: np.asarray(value) for name, value in paths.named_leaves(state).items()}


def _indexed(value: np.ndarray, bits: int | None) -> tuple[np.ndarray, np.ndarray, int] | None:
    """Indices, the values they stand for, and their bits; None if there are too many values.

    Without bits, as many as each feature's values take.
    """
    whole, columns = np.unique(value), value.reshape(-1, value.shape[-1]).T
    if bits is None:
        most = max(len(np.unique(column)) for column in columns)
        bits = max((most - 1).bit_length(), 1)
        if bits > MAX_BITS:
            return None
    if len(whole) <= 2**bits:
        return np.searchsorted(whole, value), whole[None], bits
    own = [np.unique(column) for column in columns]
    if max(map(len, own)) > 2**bits:
        return None
    width = max(map(len, own))
    values = np.stack([np.pad(each, (0, width - len(each)), mode="edge") for each in own])
    indices = np.stack(
        [np.searchsorted(each, column) for each, column in zip(own, columns, strict=True)]
    )
    return indices.T.reshape(value.shape), values, bits
