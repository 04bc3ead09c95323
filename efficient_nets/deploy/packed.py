"""Nets for use as files: weights as bits, everything else in its own type.

The format is safetensors: other programs can read it, and reading it runs nothing. A rounded kernel
or core of L levels is two arrays there: `NAME`, packed indices (see `ops.packing`), and
`NAME:values`, what the indices stand for, `(G, L)`: one row for all channels, or one for each of G
groups of them. Which of these follows from the quantizer, not from the values; a row that takes
fewer values repeats its last. A kernel without a quantizer that has so few values a feature that
this is smaller is written so too. The file's metadata have each one's shape, bits, and the axes
that its groups cut.
"""

import functools
import json
import math
import pathlib
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import numpy as safetensors
from safetensors import safe_open

from efficient_nets import layers, paths
from efficient_nets.deploy.integer import is_settled, to_integers
from efficient_nets.errors import UserError
from efficient_nets.layers.kernel import Kernel
from efficient_nets.ops import packing
from efficient_nets.ops.quantizers import Quantizer, groups
from efficient_nets.ops.quantizers.spec import CORE

VALUES = ":values"
SAVED = nnx.Not(nnx.RngState)  # keys of dropout and the like: in evaluation nothing asks for them


def save(model: nnx.Module, path: pathlib.Path | str) -> int:
    """Writes what `to_integers(model)` computes with; the model may be one of these already.

    A net of int4 operands is written as one of int8.

    Returns:
      The file's bytes: `packed_bytes` of `analysis.model_cost`, and a header.

    Raises:
      UserError: if a quantizer's schedule is not over.
    """
    check_settled(model)
    whole, of_kernels = to_integers(model), {}
    for (where, layer), (_, used) in zip(layers.layers(model), layers.layers(whole), strict=True):
        for branch in layer.spec.branches:
            kernel, site = getattr(used, branch).kernel, used.kernel_site
            name = f"{where}/{branch}/kernel".removeprefix("/")
            names = [name]
            if isinstance(kernel, Kernel):
                names, site = [f"{name}/{core}" for core in kernel.cores], CORE
            quantizer = getattr(layer.spec.precision, site)
            quantizer = None if quantizer is None or quantizer.stop_epoch else quantizer
            of_kernels |= dict.fromkeys(names, quantizer)
    arrays, packed = {}, {}
    for name, value in _leaves(whole).items():
        if name not in of_kernels:
            arrays[name] = value
            continue
        found = _packed(value, of_kernels[name])
        if found is None:
            arrays[name] = value
            continue
        arrays[name], arrays[name + VALUES], packed[name] = found
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
        own = np.arange(indices.size).reshape(indices.shape)
        rows = np.empty(indices.size, np.int64)
        for row, places in enumerate(_grouped(own, entry["cuts"])):
            rows[places] = row
        found[name] = values[rows.reshape(indices.shape), indices]
    graph, state, others = nnx.split(net, SAVED, ...)
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
    values = paths.map_named(lambda name, _: jnp.asarray(found[name]), shapes)
    return nnx.merge(graph, values, others)


def _leaves(model: nnx.Module) -> dict[str, np.ndarray]:
    state = nnx.to_pure_dict(nnx.state(model, SAVED))
    return {name: np.asarray(value) for name, value in paths.named_leaves(state).items()}


def _grouped(value: np.ndarray, cuts: Sequence[tuple[int, int]]) -> np.ndarray:
    """`(G, n)`: the values of each group, of axes that are cut into so many: see `groups.cuts`."""
    shape, fronts = [], []
    numbers = dict(map(tuple, cuts))
    for axis, size in enumerate(value.shape):
        if axis in numbers:
            fronts.append(len(shape))
            shape += [numbers[axis], size // numbers[axis]]
        else:
            shape.append(size)
    value = np.moveaxis(value.reshape(shape), fronts, range(len(fronts)))
    return value.reshape(math.prod(numbers.values()), -1)


def _packed(value: np.ndarray, quantizer: Quantizer | None):
    """Packed indices, the table of values that they stand for, and the entry in the metadata.

    None where the kernel as it is takes no more: if there is no quantizer, or of cores, as small
    ones have fewer numbers than a table.
    """
    if quantizer is not None and quantizer.method == "stored":  # it does not say where zero lies
        quantizer = quantizer if len(np.unique(value)) <= quantizer.levels else None
    if quantizer is None:
        last = value.ndim - 1
        columns = _grouped(value, [(last, value.shape[-1])])
        levels = max(len(np.unique(column)) for column in columns)
        bits = max((levels - 1).bit_length(), 1)
        cuts = [(last, value.shape[-1])]
        if (of_all := len(np.unique(value))) <= 2**bits:  # one table will do
            cuts, levels = [], of_all
    else:
        bits = quantizer.bits
        number, levels = packing.table_shape(quantizer, value.shape, value.dtype)
        cuts = list(groups.cuts(quantizer, value.shape).items()) if number > 1 else []
    if bits > packing.MAX_BITS:
        return None
    indices, table = np.empty(value.size, np.int64), []
    places = _grouped(np.arange(value.size).reshape(value.shape), cuts)
    for own, where in zip(_grouped(value, cuts), places, strict=True):
        found = np.unique(own)
        if len(found) > levels:
            raise ValueError(f"{quantizer.method!r} gives {len(found)} values, not {levels}")
        indices[where] = np.searchsorted(found, own)
        table.append(np.pad(found, (0, levels - len(found)), mode="edge"))
    codes, table = packing.pack(indices, bits), np.stack(table)
    small = quantizer is None or quantizer.site == CORE
    if small and codes.nbytes + table.nbytes >= value.nbytes:
        return None
    return codes, table, {"bits": bits, "shape": value.shape, "cuts": cuts}
